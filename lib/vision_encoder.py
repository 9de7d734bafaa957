"""Vision encoder, stage by stage: Swin blocks, fusion with language, down-sampling (paper, section III).

Shapes: B batch size, H×W size of the stage's map, C = embed_dim·2^index its channels, N tokens, T text width,
w window size. Maps are channels-last, [B, H, W, C]; features for the decoder are channels-first.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath, Mlp, PatchEmbed
from timm.models import swin_transformer
from timm.models.swin_transformer import PatchMerging, window_partition
from torch import nn
from torch.utils.checkpoint import checkpoint

from lib.fusion import gate
from lib.kernels import attention
from lib.variants import NUM_STAGES

PATCH_SIZE = 4
SHIFT_SCORE = -100.0  # added to the attention scores of positions that are neighbors only because of the cyclic shift


class VisionStageOutput(NamedTuple):
    """Outputs of one vision stage."""

    decoder_feature: torch.Tensor  # y [B, C, H, W]
    next_input: torch.Tensor | None  # v [B, H/2, W/2, 2C]; None in the last stage


def shifted_window_mask(rows: int, columns: int, window_size: int, device: torch.device) -> torch.Tensor:
    """Return which pairs of positions of a shifted window come from different regions of the unshifted map.

    Zero-padded positions are treated like all others.

    Args:
        rows, columns: number of windows in each direction.
        window_size: w.
        device: of the result.

    Returns:
        bool [rows · columns, w², w²].
    """
    shift = window_size // 2
    regions = torch.zeros((1, rows * window_size, columns * window_size, 1), dtype=torch.int32, device=device)
    bands = (slice(0, -window_size), slice(-window_size, -shift), slice(-shift, None))
    for i, horizontal in enumerate(bands):
        for j, vertical in enumerate(bands):
            regions[:, horizontal, vertical] = 3 * i + j
    regions = window_partition(regions, (window_size, window_size)).flatten(1)  # [windows, w²]
    return regions[:, None, :] != regions[:, :, None]


def _pad_and_shift(x: torch.Tensor, dim: int, size: int, shift: int, fill: torch.Tensor) -> torch.Tensor:
    """Return x with a dimension padded at its end to ``size`` with ``fill`` [C], then rotated by -``shift``."""
    real, rotated = x.shape[dim], min(x.shape[dim], shift)
    if real == size and not shift:
        return x

    def padding(length: int) -> torch.Tensor:
        return fill.expand(*x.shape[:dim], length, *x.shape[dim + 1 :])

    front, back = x.narrow(dim, rotated, real - rotated), x.narrow(dim, 0, rotated)
    return torch.cat([front, padding(size - max(real, shift)), back, padding(shift - rotated)], dim)


def _shift_back(x: torch.Tensor, dim: int, real: int, shift: int) -> torch.Tensor:
    """Return the input of :func:`_pad_and_shift` for its output, without padding; ``real`` is its size."""
    rotated = min(real, shift)
    if not shift:
        return x.narrow(dim, 0, real)
    return torch.cat([x.narrow(dim, x.shape[dim] - shift, rotated), x.narrow(dim, 0, real - rotated)], dim)


class WindowAttention(swin_transformer.WindowAttention):
    """Attention within windows, with a learned bias for each relative position."""

    def forward(self, x: torch.Tensor, shift: int) -> torch.Tensor:
        """Return the output for a map, [B, H, W, C] → [B, H, W, C].

        The map is padded to whole windows with zeros, which take part in the attention like all other positions. Their
        query, key and value are the bias of ``qkv``, and their outputs are not needed, so neither is computed.

        Args:
            x: the map.
            shift: by how many positions the windows are shifted, 0 or w // 2.
        """
        batch, height, width, _ = x.shape
        size = self.window_size[0]
        rows, columns = -(-height // size), -(-width // size)
        x = self.qkv(x)
        fill = self.qkv.bias.to(x.dtype)
        x = _pad_and_shift(_pad_and_shift(x, 2, columns * size, shift, fill), 1, rows * size, shift, fill)
        x = x.view(batch, rows, size, columns, size, 3, self.num_heads, -1)
        qkv = x.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(1, 3).flatten(3, 4)  # [3, B·windows, h, w², C/h]
        x = attention(*qkv.unbind(0), self.bias((rows, columns) if shift else None))
        x = x.view(batch, rows, columns, self.num_heads, size, size, -1).permute(0, 1, 4, 2, 5, 3, 6)
        x = x.flatten(5).flatten(3, 4).flatten(1, 2)  # [B, rows·w, columns·w, C]
        return self.proj(_shift_back(_shift_back(x, 1, height, shift), 2, width, shift))

    def bias(self, shifted_grid: tuple[int, int] | None) -> torch.Tensor:
        """Return what is added to attention scores: [1, h, w², w²], or one per shifted window, [windows, h, w², w²]."""
        bias = self._get_rel_pos_bias()
        if shifted_grid is None:
            return bias
        return bias + SHIFT_SCORE * shifted_window_mask(*shifted_grid, self.window_size[0], bias.device)[:, None]


class SwinBlock(nn.Module):
    """Swin block as in the official repository: norm → pad to whole windows → shift → attention → shift back → crop.

    timm's block shifts before it pads, which gives other results if the window size does not divide the map size.
    A map smaller than the window is padded to one window and still shifted.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, *, shifted: bool, drop_path: float) -> None:
        super().__init__()
        self.shift = window_size // 2 if shifted else 0
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads=num_heads, window_size=window_size)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden_features=4 * dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output: [B, H, W, C] → [B, H, W, C]."""
        x = x + self.drop_path(self.attn(self.norm1(x), self.shift))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def build_patch_embed(embed_dim: int) -> PatchEmbed:
    """Build the patch embedding: an image [B, 3, H, W] of any size → [B, ⌈H/4⌉, ⌈W/4⌉, embed_dim]."""
    return PatchEmbed(
        img_size=None,
        patch_size=PATCH_SIZE,
        embed_dim=embed_dim,
        norm_layer=nn.LayerNorm,
        output_fmt="NHWC",
        strict_img_size=False,
        dynamic_img_pad=True,
    )


def build_blocks(dim: int, num_heads: int, window_size: int, drop_path: list[float]) -> nn.ModuleList:
    """Build the Swin blocks of a stage, every second one shifted. ``drop_path`` has one rate per block."""
    return nn.ModuleList(
        SwinBlock(dim, num_heads, window_size, shifted=j % 2 == 1, drop_path=rate) for j, rate in enumerate(drop_path)
    )


def check_image_size(height: int, width: int) -> None:
    """Raise a ValueError if an image of this size has only one position in the last stage."""
    coarsest = PATCH_SIZE * 2 ** (NUM_STAGES - 1)
    if height <= coarsest and width <= coarsest:
        raise ValueError(
            f"An image of {height}×{width} pixels is too small: one side must be longer than {coarsest}, "
            "because the last stage's InstanceNorm needs two positions."
        )


class VisionStage(nn.Module):
    """One stage of the vision encoder, ``backbone.{index}`` in the state dict.

    Args:
        index: 0 to 3. Stage 0 embeds the image; the last stage is not down-sampled.
        embed_dim: channels of stage 0.
        num_heads, window_size: of the Swin blocks.
        drop_path: one rate per block.
        text_dim: T, width of the language features.
        align_dim: width of the space in which pixels and sentence are aligned. With None the stage has no
            projection to it.
        fusion_layer: class of the language-to-vision layers, called as :class:`lib.fusion.LanguageToVisionFusion`.
            With None the stage has no fusion and no gates (ablation ``late``).
    """

    def __init__(
        self,
        index: int,
        embed_dim: int,
        num_heads: int,
        window_size: int,
        drop_path: list[float],
        text_dim: int,
        align_dim: int | None,
        fusion_layer: type[nn.Module] | None,
    ) -> None:
        super().__init__()
        dim = embed_dim * 2**index
        inner_dim = 2 * embed_dim if index == 0 else dim
        last = index == NUM_STAGES - 1
        self.patch_embed = None
        if index == 0:
            self.patch_embed = build_patch_embed(embed_dim)
        # The last stage's gate linear1 is part of the released weights but unused: no map follows it.
        self.layers = nn.ModuleDict(
            {
                "blocks": build_blocks(dim, num_heads, window_size, drop_path),
                "proj": nn.Linear(dim, align_dim) if align_dim else None,
                "attn1": fusion_layer(dim, inner_dim, text_dim) if fusion_layer else None,
                "linear1": gate(dim) if fusion_layer else None,
                "downsample": None if last else PatchMerging(dim),
                "attn2": fusion_layer(2 * dim, 2 * dim, text_dim) if fusion_layer and not last else None,
                "linear2": gate(2 * dim) if fusion_layer and not last else None,
            }
        )
        # The released weights name the norm of the decoder feature after its stage.
        self.norm0 = nn.LayerNorm(dim) if index == 0 else None
        self.norm1 = nn.LayerNorm(dim) if index == 1 else None
        self.norm2 = nn.LayerNorm(dim) if index == 2 else None
        self.norm3 = nn.LayerNorm(dim) if index == 3 else None
        self.grad_checkpointing = False

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the Swin blocks, which depend on the image only.

        Args:
            x: the image [B, 3, 4·H, 4·W] in stage 0, else the previous stage's ``next_input`` [B, H, W, C].

        Returns:
            [B, H, W, C].
        """
        if self.patch_embed is not None:
            x = self.patch_embed(x)
        for block in self.layers.blocks:
            x = self._run(block, x)
        return x

    def forward(
        self, x: torch.Tensor, text: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None
    ) -> VisionStageOutput:
        """Fuse language into the encoded map and down-sample it.

        Args:
            x: output of :meth:`encode`, [B, H, W, C].
            text: language features of the same stage, [B, N, T]; not used by a stage without fusion.
            attention_mask: [B, N], 1 on tokens and 0 on padding.
        """
        return self._run(self._fuse, x, text, attention_mask)

    def _fuse(
        self, x: torch.Tensor, text: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> VisionStageOutput:
        layers = self.layers
        fused = x
        if layers.attn1 is not None:
            fused = layers.attn1(x, text, attention_mask)
            if layers.downsample is not None:
                x = x + layers.linear1(fused) * fused
        norm = self.norm0 or self.norm1 or self.norm2 or self.norm3
        decoder_feature = norm(fused).permute(0, 3, 1, 2)
        if layers.downsample is None:
            return VisionStageOutput(decoder_feature, None)
        x = layers.downsample(x)  # [B, H/2, W/2, 2C]
        if layers.attn2 is not None:
            fused = layers.attn2(x, text, attention_mask)
            x = x + layers.linear2(fused) * fused
        return VisionStageOutput(decoder_feature, x)

    def _run(self, part: Callable[..., Any], *inputs: torch.Tensor | None) -> Any:
        """Call a part of the stage, with gradient checkpointing if it is enabled."""
        return checkpoint(part, *inputs, use_reentrant=False) if self.grad_checkpointing else part(*inputs)


def initialize_vision(module: nn.Module, *, convolutions: bool = True) -> None:
    """Initialize as published: linear layers and bias tables truncated normal (0.02), convolutions Kaiming normal.

    Args:
        module: its linear layers, bias tables and convolutions are initialized.
        convolutions: whether convolutions are initialized. If not, they keep PyTorch's initialization (LAVT).
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif convolutions and isinstance(part, nn.Conv1d | nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)
        elif isinstance(part, WindowAttention):
            nn.init.trunc_normal_(part.relative_position_bias_table, std=0.02)
