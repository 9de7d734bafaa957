"""Language-to-vision fusion: cross-attention from the positions of a vision map to the words (paper, section III).

Shapes: B batch size, L positions of the map, C vision channels, N tokens, T text width, D inner width, h heads.
"""

import torch
import torch.nn.functional as F
from torch import nn

from lib.kernels import attention, instance_norm
from lib.precision import full_precision

HEAD_DIM = 64
PADDING_SCORE = -1e4  # added to the attention scores of padded tokens


def padding_bias(attention_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the bias that masks padded tokens when it is added to attention scores.

    Args:
        attention_mask: [B, N], 1 on tokens and 0 on padding.
        dtype: of the query. With another dtype, scaled_dot_product_attention silently returns wrong values on CPU.

    Returns:
        [B, 1, 1, N]: 0 on tokens, -10000 on padding.
    """
    return ((1.0 - attention_mask[:, None, None, :].to(dtype)) * PADDING_SCORE).to(dtype)


def gate(dim: int) -> nn.Sequential:
    """Build the gate g of the residual connection x + g(r)·r: [..., dim] → [..., dim] with values in [−1, 1]."""
    return nn.Sequential(nn.Linear(dim, dim, bias=False), nn.ReLU(), nn.Linear(dim, dim, bias=False), nn.Tanh())


class PositionwiseConv(nn.Conv1d):
    """1×1 convolution of positions: [B, L, C] → [B, L, D], channels last unlike ``nn.Conv1d``."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight[:, :, 0], self.bias)


class InstanceNorm(nn.InstanceNorm1d):
    """Instance normalization over positions: [B, L, C] → [B, L, C], channels last unlike ``nn.InstanceNorm1d``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return instance_norm(x, self.eps)


class LanguageToVisionFusion(nn.Module):
    """Cross-attention layer in which every position of a vision map attends to the words.

    Args:
        vision_dim: C, channels of the map.
        inner_dim: D, width of the attention, which has max(1, D // 64) heads.
        text_dim: T, width of the language features.

    Raises:
        ValueError: ``inner_dim`` cannot be divided into that many heads.
    """

    not_in_mixed_precision = ("l_q", "values_l", "w_v")  # layers that a prepared model computes in float32

    def __init__(self, vision_dim: int, inner_dim: int, text_dim: int) -> None:
        super().__init__()
        self.num_heads = max(1, inner_dim // HEAD_DIM)
        if inner_dim % self.num_heads:
            raise ValueError(
                f"A fusion layer of width {inner_dim} cannot be divided into {self.num_heads} equal heads. "
                f"Choose an embed_dim that is a multiple of {HEAD_DIM // 2}."
            )
        self.v_q = nn.Sequential(PositionwiseConv(vision_dim, inner_dim), InstanceNorm(inner_dim))
        self.l_q = nn.Linear(text_dim, inner_dim)
        self.values_l = nn.Linear(text_dim, inner_dim)
        self.w_v = nn.Sequential(PositionwiseConv(inner_dim, vision_dim), InstanceNorm(vision_dim))
        self.project_mm = nn.Sequential(PositionwiseConv(vision_dim, vision_dim), nn.GELU())

    def forward(self, v: torch.Tensor, text: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the fused map r.

        Args:
            v: vision map [B, ..., C] with at least two positions, which InstanceNorm needs.
            text: language features [B, N, T].
            attention_mask: [B, N], 1 on tokens and 0 on padding.

        Returns:
            [B, ..., C], the shape of ``v``.
        """
        map_shape = v.shape[1:-1]
        v = v.flatten(1, -2)  # [B, L, C]
        query = self._split_heads(self.v_q(v))  # [B, h, L, D/h]
        key, value = self._split_heads(self.l_q(text)), self._split_heads(self.values_l(text))  # [B, h, N, D/h]
        dtype = self.w_v[0].weight.dtype
        bias = padding_bias(attention_mask, dtype)
        # Mixed precision is disabled: if the words differ little, the attended map is nearly constant, and InstanceNorm
        # would amplify its rounding errors.
        with full_precision(v.device):
            attended = attention(query.to(dtype), key.to(dtype), value.to(dtype), bias)
            attended = self.w_v(attended.transpose(1, 2).flatten(2))  # [B, h, L, D/h] → [B, L, D] → [B, L, C]
        return self.project_mm(attended + v).unflatten(1, map_shape)

    def _split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, D] → [B, h, S, D/h] for S positions or tokens."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


# The language-to-vision layer of each fusion in lib.variants.FUSIONS. The paper's ablations use the same layer in
# different places.
FUSION_LAYERS: dict[str, type[nn.Module]] = {
    "cross": LanguageToVisionFusion,
    "vision": LanguageToVisionFusion,
    "late": LanguageToVisionFusion,
}
