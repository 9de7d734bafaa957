"""The vision encoder, one stage at a time: Swin blocks, then fusion with language, gates and down-sampling.

Letters: B batch, H×W the stage's map, C = embed_dim·2^stage its channels, N tokens, T text width, w window size.
Maps are channels-last ([B, H, W, C]) inside; what leaves for the decoder and the alignment is channels-first.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, PatchEmbed
from timm.models.swin_transformer import PatchMerging, WindowAttention, window_partition, window_reverse
from torch import nn
from torch.utils.checkpoint import checkpoint

from lib.fusion import LanguageToVisionFusion, gate

PATCH = 4
SHIFT_MASKED_SCORE = -100.0  # added to scores between regions that only the cyclic shift brought together


class VisionStageOutput(NamedTuple):
    """What one vision stage hands out (``passed_on`` is None after the last stage)."""

    decoder_feature: torch.Tensor  # y  [B, C, H, W]
    alignment_feature: torch.Tensor  # p  [B, H, W, A]
    passed_on: torch.Tensor | None  # v  [B, H/2, W/2, 2C]


def shift_bias(height: int, width: int, window: int, like: torch.Tensor) -> torch.Tensor:
    """What shifted windows add to their scores: [windows, w², w²] for a padded map height×width, in like's dtype.

    Only positions that lay in different regions before the shift are masked; zero-padded ones are ordinary tokens.
    """
    shift = window // 2
    regions = torch.zeros((1, height, width, 1), dtype=torch.int32, device=like.device)
    cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for i, rows in enumerate(cuts):
        for j, columns in enumerate(cuts):
            regions[:, rows, columns] = 3 * i + j
    regions = window_partition(regions, (window, window)).flatten(1)  # [windows, w²]
    differ = regions[:, None, :] != regions[:, :, None]
    return differ.to(like.dtype) * SHIFT_MASKED_SCORE


class SwinBlock(nn.Module):
    """Pre-norm Swin block with the official order: norm → pad to whole windows → shift → attend → shift back → crop.

    (timm's own block rolls before it pads, which gives other numbers on maps that don't divide by the window.)
    The window never shrinks: a smaller map is padded up to one window and still shifted.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, *, shifted: bool, drop_path: float) -> None:
        super().__init__()
        self.window_size = window_size
        self.shift = window_size // 2 if shifted else 0
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads=num_heads, window_size=window_size)
        self.attn.fused_attn = True  # timm would decide by an environment variable; ours does not depend on one
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden_features=4 * dim)

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None) -> torch.Tensor:
        """x [B, H, W, C], attn_mask of :func:`shift_bias` (used by shifted blocks only) → [B, H, W, C]."""
        x = x + self.drop_path(self._window_attention(self.norm1(x), attn_mask if self.shift else None))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _window_attention(self, x: torch.Tensor, attn_mask: torch.Tensor | None) -> torch.Tensor:
        _, height, width, _ = x.shape
        window = (self.window_size, self.window_size)
        x = F.pad(x, (0, 0, 0, -width % self.window_size, 0, -height % self.window_size))
        padded_height, padded_width = x.shape[1:3]
        if self.shift:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        windows = window_partition(x, window).flatten(1, 2)  # [B·windows, w², C]
        windows = self.attn(windows, mask=attn_mask).unflatten(1, window)
        x = window_reverse(windows, window, padded_height, padded_width)  # [B, H', W', C]
        if self.shift:
            x = torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))
        return x[:, :height, :width]


class VisionStageLayers(nn.Module):
    """The parts of a stage that the state dict calls ``backbone.{i}.layers``."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        drop_path: list[float],
        *,
        fusion_dim: int,
        text_dim: int,
        align_dim: int,
        fuse: bool,
        downsample: bool,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinBlock(dim, num_heads, window_size, shifted=j % 2 == 1, drop_path=rate)
            for j, rate in enumerate(drop_path)
        )
        self.proj = nn.Linear(dim, align_dim)
        if fuse:
            self.attn1 = LanguageToVisionFusion(dim, fusion_dim, text_dim)
            # The last stage's gate exists in the released files but acts on nothing: no map follows it.
            self.linear1 = gate(dim)
        if downsample:
            self.downsample = PatchMerging(dim)
        if fuse and downsample:
            self.attn2 = LanguageToVisionFusion(2 * dim, 2 * dim, text_dim)
            self.linear2 = gate(2 * dim)


class VisionStage(nn.Module):
    """Stage ``index`` (0…3) of the vision encoder: ``backbone.{index}``.

    Args:
        index: position among the stages; stage 0 embeds the picture.
        embed_dim: channels of stage 0; this stage has C = embed_dim·2^index.
        num_heads, window_size: of the Swin blocks.
        drop_path: one rate per block.
        text_dim: T, width of the language states.
        align_dim: A, width of the alignment space.
        fuse: False leaves fusion and gates out (the ``late`` ablation); the decoder feature is then the norm of
            the blocks' output.
        last: the last stage is not down-sampled.
    """

    def __init__(
        self,
        index: int,
        *,
        embed_dim: int,
        num_heads: int,
        window_size: int,
        drop_path: list[float],
        text_dim: int,
        align_dim: int,
        fuse: bool,
        last: bool,
    ) -> None:
        super().__init__()
        dim = embed_dim * 2**index
        if index == 0:
            self.patch_embed = PatchEmbed(
                img_size=None,
                patch_size=PATCH,
                embed_dim=embed_dim,
                norm_layer=nn.LayerNorm,
                output_fmt="NHWC",
                strict_img_size=False,
                dynamic_img_pad=True,
            )
        self.layers = VisionStageLayers(
            dim,
            num_heads,
            window_size,
            drop_path,
            fusion_dim=2 * embed_dim if index == 0 else dim,
            text_dim=text_dim,
            align_dim=align_dim,
            fuse=fuse,
            downsample=not last,
        )
        self.norm_name = f"norm{index}"
        self.add_module(self.norm_name, nn.LayerNorm(dim))
        self.window_size = window_size
        self.fuse = fuse
        self.last = last
        self.grad_checkpointing = False

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """The part that sees no language: picture [B, 3, H₀, W₀] (stage 0) or map [B, H, W, C] → [B, H, W, C]."""
        if hasattr(self, "patch_embed"):
            x = self.patch_embed(x)
        _, height, width, _ = x.shape
        padded = (height + -height % self.window_size, width + -width % self.window_size)
        any_shifted = any(block.shift for block in self.layers.blocks)
        attn_mask = shift_bias(*padded, self.window_size, like=x) if any_shifted else None
        for block in self.layers.blocks:
            x = self._run(block, x, attn_mask)
        return x

    def _run(self, part: Callable[..., Any], *inputs: torch.Tensor | None) -> Any:
        """Call a part of the stage; with gradient checkpointing what it computes is computed again for backward."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(part, *inputs, use_reentrant=False)
        return part(*inputs)

    def forward(
        self, x: torch.Tensor, text: torch.Tensor, attention_mask: torch.Tensor, *, encoded: bool = False
    ) -> VisionStageOutput:
        """x as for :meth:`encode`, or with ``encoded`` what it gave; text [B, N, T] with its mask [B, N] → features."""
        return self._run(self._fuse_language, x if encoded else self.encode(x), text, attention_mask)

    def _fuse_language(self, x: torch.Tensor, text: torch.Tensor, attention_mask: torch.Tensor) -> VisionStageOutput:
        """The rest of the stage, on encoded x [B, H, W, C]: fusion, gate, down-sampling, fusion, gate."""
        layers = self.layers
        alignment_feature = layers.proj(x)  # before fusion: what the picture alone says
        if self.fuse:
            gathered = _on_map(layers.attn1, x, text, attention_mask)
            if not self.last:
                x = x + layers.linear1(gathered) * gathered
        else:
            gathered = x
        decoder_feature = getattr(self, self.norm_name)(gathered).permute(0, 3, 1, 2)
        if self.last:
            return VisionStageOutput(decoder_feature, alignment_feature, None)
        x = layers.downsample(x)  # [B, H/2, W/2, 2C]
        if self.fuse:
            gathered = _on_map(layers.attn2, x, text, attention_mask)
            x = x + layers.linear2(gathered) * gathered
        return VisionStageOutput(decoder_feature, alignment_feature, x)


def _on_map(
    fusion: LanguageToVisionFusion, x: torch.Tensor, text: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """Apply a fusion, which knows positions but no rows, to a map [B, H, W, C]."""
    return fusion(x.flatten(1, 2), text, attention_mask).unflatten(1, x.shape[1:3])


def initialize_vision(module: nn.Module) -> None:
    """Published start of the vision side: Linear trunc-normal 0.02 with zero bias, convolutions Kaiming normal."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Conv1d | nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)
        elif isinstance(part, WindowAttention):
            nn.init.trunc_normal_(part.relative_position_bias_table, std=0.02)
