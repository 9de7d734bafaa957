"""Layers of LAVT: fusion of word features into a Swin stage, and the vision encoder (Yang et al., CVPR 2022).

Shapes: B batch size, H×W image size, N tokens, T text width. Vision stage i = 0…3 has C = embed_dim·2^i channels, and
L = h·w positions with h×w = H/2^(i+2) × W/2^(i+2).
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.models.swin_transformer import PatchMerging
from torch import nn
from torch.utils.checkpoint import checkpoint

from lib.fusion import InstanceNorm, PositionwiseConv, gate
from lib.kernels import attention
from lib.precision import full_precision
from lib.vision_encoder import build_patch_embed


class WordAttention(nn.Module):
    """Attention of every position of a map to the words; ``image_lang_att``.

    Args:
        dim: C.
        text_dim: T.
        num_heads: a divisor of C.
    """

    # Where words differ little, the attended map is nearly constant, and InstanceNorm would amplify rounding errors.
    not_in_mixed_precision = ("f_key", "f_value", "W")

    def __init__(self, dim: int, text_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.f_query = nn.Sequential(PositionwiseConv(dim, dim), InstanceNorm(dim))
        self.f_key = nn.Sequential(PositionwiseConv(text_dim, dim))
        self.f_value = nn.Sequential(PositionwiseConv(text_dim, dim))
        self.W = nn.Sequential(PositionwiseConv(dim, dim), InstanceNorm(dim))

    def forward(self, x: torch.Tensor, words: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Return the attended words, [B, L, C].

        Args:
            x: [B, L, C] with L of at least 2, which InstanceNorm needs.
            words: [B, N, T].
            bias: [B, 1, 1, N], added to the attention scores; its dtype is that of the weights.
        """
        query = self._split_heads(self.f_query(x).to(bias.dtype))  # [B, h, L, C/h]
        with full_precision(x.device):
            words = words.to(bias.dtype)
            # The scores are divided by √C for any number of heads, and by √(C/h) in ``attention``.
            key = self._split_heads(self.f_key(words) * self.num_heads**-0.5)  # [B, h, N, C/h]
            attended = attention(query, key, self._split_heads(self.f_value(words)), bias)
            return self.W(attended.transpose(1, 2).flatten(2))

    def _split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, C] → [B, h, S, C/h] for S positions or tokens."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class PixelWordAttention(nn.Module):
    """Fusion of a stage: the product of projections of the map and of the attended words; ``fusion``.

    Args:
        dim, text_dim, num_heads: as in :class:`WordAttention`.
        dropout: after each of the two GELUs.
    """

    def __init__(self, dim: int, text_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.vis_project = nn.Sequential(PositionwiseConv(dim, dim), nn.GELU(), nn.Dropout(dropout))
        self.image_lang_att = WordAttention(dim, text_dim, num_heads)
        self.project_mm = nn.Sequential(PositionwiseConv(dim, dim), nn.GELU(), nn.Dropout(dropout))

    def forward(self, x: torch.Tensor, words: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Return the fused map [B, h, w, C] of x [B, h, w, C], words [B, N, T] and bias [B, 1, 1, N]."""
        positions = x.flatten(1, 2)  # [B, L, C]
        attended = self.image_lang_att(positions, words, bias)
        return self.project_mm(self.vis_project(positions) * attended).unflatten(1, x.shape[1:3])


class LAVTStage(nn.Module):
    """One vision stage, ``backbone.layers.{i}``.

    Args:
        fusion: :class:`PixelWordAttention`.
        blocks: Swin blocks.
        dim: C.
        is_last: whether no stage follows. The gate of the last stage is part of the released weights, but not used.
    """

    def __init__(self, fusion: nn.Module, blocks: nn.ModuleList, dim: int, *, is_last: bool) -> None:
        super().__init__()
        self.blocks = blocks
        self.fusion = fusion
        self.res_gate = gate(dim)
        self.downsample = None if is_last else PatchMerging(dim)
        self.grad_checkpointing = False

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the Swin blocks, [B, h, w, C] → [B, h, w, C]."""
        for block in self.blocks:
            x = self._run(block, x)
        return x

    def forward(
        self, x: torch.Tensor, words: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Fuse the words into the encoded map and down-sample it.

        Args:
            x: output of :meth:`encode`, [B, h, w, C].
            words: [B, N, T].
            bias: [B, 1, 1, N], added to the attention scores.

        Returns:
            the fused map [B, h, w, C], and the input of the next stage, [B, h/2, w/2, 2C]; None in the last stage.
        """
        return self._run(self._fuse, x, words, bias)

    def _fuse(
        self, x: torch.Tensor, words: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        fused = self.fusion(x, words, bias)
        if self.downsample is None:
            return fused, None
        return fused, self.downsample(x + self.res_gate(fused) * fused)

    def _run(self, part: Callable[..., Any], *inputs: torch.Tensor) -> Any:
        """Call a part of the stage, with gradient checkpointing if it is enabled."""
        return checkpoint(part, *inputs, use_reentrant=False) if self.grad_checkpointing else part(*inputs)


class LAVTBackbone(nn.Module):
    """The vision encoder, ``backbone``.

    Args:
        stages: four :class:`LAVTStage`.
        embed_dim: channels of stage 0.
    """

    def __init__(self, stages: list[LAVTStage], embed_dim: int) -> None:
        super().__init__()
        self.patch_embed = build_patch_embed(embed_dim)
        self.layers = nn.ModuleList(stages)
        self.norm0 = nn.LayerNorm(embed_dim)
        self.norm1 = nn.LayerNorm(2 * embed_dim)
        self.norm2 = nn.LayerNorm(4 * embed_dim)
        self.norm3 = nn.LayerNorm(8 * embed_dim)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Apply the patch embedding and the blocks of stage 0: [B, 3, H, W] → [B, H/4, W/4, C]."""
        return self.layers[0].encode(self.patch_embed(images))

    def forward(self, encoded: torch.Tensor, words: torch.Tensor, bias: torch.Tensor) -> list[torch.Tensor]:
        """Return the features of the decoder, y1 to y4, one [B, C, h, w] per stage.

        Args:
            encoded: output of :meth:`encode`, [B, H/4, W/4, C].
            words: [B, N, T], the same for every stage.
            bias: [B, 1, 1, N], added to the attention scores.
        """
        features, x = [], encoded
        for i, (stage, norm) in enumerate(
            zip(self.layers, (self.norm0, self.norm1, self.norm2, self.norm3), strict=True)
        ):
            if i > 0:
                x = stage.encode(x)
            fused, x = stage(x, words, bias)
            features.append(norm(fused).permute(0, 3, 1, 2))
        return features
