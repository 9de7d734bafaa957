"""Language→vision fusion: where a stage's pixels look at the words (paper, section III).

Letters: B batch, L positions of the map, C vision channels, N tokens, T text width, D inner width.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

HEAD_WIDTH = 64
MASKED_SCORE = -1e4  # added to the scores of padded tokens


def padding_bias(attention_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Turn a text mask [B, N] of 0/1 into what is added to attention scores: [B, 1, 1, N] in ``dtype``.

    ``dtype`` must be the query's: scaled_dot_product_attention on CPU is silently wrong where they differ.
    """
    return ((1.0 - attention_mask[:, None, None, :].to(dtype)) * MASKED_SCORE).to(dtype)


def gate(width: int) -> nn.Sequential:
    """The language gate g of a fusion: [..., width] → [..., width] in (−1, 1), so that x ← x + g(r)·r."""
    return nn.Sequential(nn.Linear(width, width, bias=False), nn.ReLU(), nn.Linear(width, width, bias=False), nn.Tanh())


class LanguageToVisionFusion(nn.Module):
    """Every position of a vision map gathers from the words what concerns it.

    Args:
        vision_dim: C, channels of the map.
        inner_dim: D, width of the attention; it has D // 64 heads (at least one), 64 wide where 64 divides D.
        text_dim: T, width of the language states.
    """

    def __init__(self, vision_dim: int, inner_dim: int, text_dim: int) -> None:
        super().__init__()
        self.num_heads = max(1, inner_dim // HEAD_WIDTH)
        if inner_dim % self.num_heads:
            raise ValueError(
                f"a fusion of inner width {inner_dim} can't be divided into {self.num_heads} equal heads: "
                f"choose an embed_dim that is a multiple of {HEAD_WIDTH // 2}"
            )
        self.v_q = nn.Sequential(nn.Conv1d(vision_dim, inner_dim, 1), nn.InstanceNorm1d(inner_dim))
        self.l_q = nn.Linear(text_dim, inner_dim)
        self.values_l = nn.Linear(text_dim, inner_dim)
        self.w_v = nn.Sequential(nn.Conv1d(inner_dim, vision_dim, 1), nn.InstanceNorm1d(vision_dim))
        self.project_mm = nn.Sequential(nn.Conv1d(vision_dim, vision_dim, 1), nn.GELU())

    def forward(self, v: torch.Tensor, text: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """v [B, L, C], text [B, N, T], attention_mask [B, N] → r [B, L, C]; L must be at least 2 (InstanceNorm)."""
        v = v.transpose(1, 2)  # [B, C, L]: the convolutions' layout
        query = self._heads(self.v_q(v).transpose(1, 2))  # [B, h, L, D/h]
        key, value = self._heads(self.l_q(text)), self._heads(self.values_l(text))  # [B, h, N, D/h]
        dtype = self.w_v[0].weight.dtype
        bias = padding_bias(attention_mask, dtype)
        # Mixed precision stops here: where words differ little the gathered map is nearly constant, and InstanceNorm
        # would blow up its rounding to the size of a signal.
        kind = v.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            gathered = F.scaled_dot_product_attention(query.to(dtype), key.to(dtype), value.to(dtype), attn_mask=bias)
            gathered = self.w_v(gathered.transpose(-1, -2).flatten(1, 2))  # [B, h, D/h, L] → [B, D, L] → [B, C, L]
        return self.project_mm(gathered + v).transpose(1, 2)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, D] → [B, h, S, D/h]."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
