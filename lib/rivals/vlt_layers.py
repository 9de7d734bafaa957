"""Layers of the VLT-style network (:mod:`lib.rivals.vlt`).

Attention and transformer layers are written with plain linear layers, which lib.inference can replace; PyTorch's read
the weights of theirs directly.

Shapes: B batch size, H×W image size, N tokens, T text width, D width, Q number of queries, h×w = H/16 × W/16 size of
the map, S positions of an input, M positions that it attends to.
"""

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import nn

from lib.kernels import attention, to_conv_layout

NUM_QUERIES = 16
NUM_HEADS = 8


class Attention(nn.Module):
    """Multi-head attention with an output projection.

    Args:
        dim: D, width of input, attention and output.
        context_dim: width of the positions that the input attends to.
        num_heads: heads; they divide D.
    """

    def __init__(self, dim: int, context_dim: int, num_heads: int = NUM_HEADS) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(context_dim, dim)
        self.value = nn.Linear(context_dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, context: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return what each position of the input attends to: [B, S, D].

        Args:
            x: [B, S, D].
            context: [B, M, context_dim].
            bias: added to the attention scores, [B, 1, 1, M].
        """
        query = self._split_heads(self.query(x))
        key, value = self._split_heads(self.key(context)), self._split_heads(self.value(context))
        return self.out(attention(query, key, value, bias).transpose(1, 2).flatten(2))

    def _split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, D] → [B, heads, S, D/heads]."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class TransformerLayer(nn.Module):
    """Self-attention, optional cross-attention, and an MLP, each followed by a residual connection and a LayerNorm.

    Args:
        dim: D; the MLP has 4·D hidden channels.
        dropout: of the output of each part and of the MLP's hidden channels.
        cross_attention: whether the layer is a decoder layer, which attends to a memory.
    """

    def __init__(self, dim: int, dropout: float, *, cross_attention: bool) -> None:
        super().__init__()
        self.attention = Attention(dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attention = Attention(dim, dim) if cross_attention else None
        self.norm2 = nn.LayerNorm(dim) if cross_attention else None
        self.mlp = Mlp(dim, hidden_features=4 * dim, act_layer=nn.ReLU, drop=dropout)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        """Return the layer's output [B, S, D].

        Args:
            x: [B, S, D].
            memory: [B, M, D], for decoder layers.
        """
        x = self.norm1(x + self.dropout(self.attention(x, x)))
        if self.cross_attention is not None:
            x = self.norm2(x + self.dropout(self.cross_attention(x, memory)))
        return self.norm3(x + self.mlp(x))


def conv_norm_relu(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    """Build a convolution that keeps the map's size, with BatchNorm and ReLU."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


class VisionNeck(nn.Module):
    """Merge the vision features y2, y3 and y4 into one map at stride 16."""

    def __init__(self, embed_dim: int, dim: int) -> None:
        super().__init__()
        self.project2 = conv_norm_relu(2 * embed_dim, dim, 1)
        self.project3 = conv_norm_relu(4 * embed_dim, dim, 1)
        self.project4 = conv_norm_relu(8 * embed_dim, dim, 1)
        self.merge = conv_norm_relu(3 * dim, dim, 3)

    def forward(self, y2: torch.Tensor, y3: torch.Tensor, y4: torch.Tensor) -> torch.Tensor:
        """Return [B, D, h, w] for y2 [B, 2C, H/8, W/8], y3 [B, 4C, h, w] and y4 [B, 8C, H/32, W/32]."""
        y2, y3, y4 = map(to_conv_layout, (y2, y3, y4))
        y2 = self.project2(F.adaptive_avg_pool2d(y2, y3.shape[-2:]))
        y4 = self.project4(F.interpolate(y4, size=y3.shape[-2:], mode="bilinear", align_corners=True))
        return self.merge(torch.cat([y2, self.project3(y3), y4], dim=1))


class SpatialDynamicFusion(nn.Module):
    """Multiply every position by what it attends to in the sentence (TPAMI version)."""

    def __init__(self, dim: int, text_dim: int) -> None:
        super().__init__()
        self.attention = Attention(dim, text_dim, num_heads=1)
        self.project = nn.Conv2d(dim, dim, 1)
        self.norm = nn.BatchNorm2d(dim)
        self.activation = nn.GELU()

    def forward(self, x: torch.Tensor, words: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Return the fused map [B, D, h, w] for a map x [B, D, h, w], words [B, N, T] and padding bias [B, 1, 1, N]."""
        attended = self.attention(to_positions(x), words, bias)
        return self.activation(self.norm(self.project(x) * to_map(attended, x)))


class QueryGeneration(nn.Module):
    """Make queries from the sentence, each from another point of view on the image.

    Each query pools the fused map with its own attention map and then attends to the words.
    """

    def __init__(self, dim: int, text_dim: int) -> None:
        super().__init__()
        self.attention_maps = nn.Sequential(
            conv_norm_relu(dim + 2, dim, 3),
            conv_norm_relu(dim, dim, 3),
            conv_norm_relu(dim, dim, 3),
            nn.Conv2d(dim, NUM_QUERIES, 1),
        )
        self.attention = Attention(dim, text_dim)

    def forward(self, x: torch.Tensor, words: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Return the queries [B, Q, D] for the fused map x [B, D, h, w], words [B, N, T] and bias [B, 1, 1, N]."""
        maps = self.attention_maps(torch.cat([x, grid_coordinates(x)], dim=1))  # [B, Q, h, w]
        vision_queries = maps.flatten(2).softmax(2).to(x.dtype) @ to_positions(x)  # [B, Q, D]
        return vision_queries + self.attention(vision_queries, words, bias)


class QueryBalance(nn.Module):
    """Compute the confidence in the response to each query."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.response = nn.Sequential(nn.Linear(dim, dim), nn.ReLU())
        self.query = nn.Sequential(nn.Linear(dim, dim), nn.ReLU())
        self.confidence = nn.Sequential(nn.Linear(2 * dim, dim), nn.ReLU(), nn.Linear(dim, 1))

    def forward(self, responses: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Return the confidences [B, Q, 1], from 0 to 1, for responses and queries [B, Q, D]."""
        both = torch.cat([self.response(responses), self.query(queries)], dim=2)
        return self.confidence(both).sigmoid()


class MaskDecoder(nn.Module):
    """Up-sample the responses' maps and the fused map to two-class logits, without features of finer stages."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv3 = conv_norm_relu(dim + NUM_QUERIES, dim, 3)
        self.conv2 = conv_norm_relu(dim, dim, 3)
        self.conv1 = conv_norm_relu(dim, dim, 3)
        self.logits = nn.Conv2d(dim, 2, 1)

    def forward(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Return logits [B, 2, H, W] for x [B, D + Q, h, w] and size (H, W)."""
        x = self.conv3(x)
        for stride, conv in ((8, self.conv2), (4, self.conv1)):
            x = conv(resize(x, [-(-side // stride) for side in size]))
        return resize(self.logits(x), size)


def grid_coordinates(x: torch.Tensor) -> torch.Tensor:
    """Return the coordinates of the positions of a map x [B, C, h, w]: [B, 2, h, w], from −1 to 1, vertical first."""
    axes = [torch.linspace(-1, 1, size, dtype=x.dtype, device=x.device) for size in x.shape[-2:]]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(len(x), -1, -1, -1)


def sinusoidal_positions(x: torch.Tensor) -> torch.Tensor:
    """Return two-dimensional sinusoidal position embeddings for a map x [B, D, h, w]: [h·w, D].

    A quarter of the channels each contains sines and cosines of the row and of the column, counted from 0, with
    wavelengths from 2π to 20000π.

    Raises:
        ValueError: D is not divisible by 4.
    """
    dim, height, width = x.shape[1:]
    if dim % 4:
        raise ValueError(f"Sinusoidal positions need a width that is divisible by 4, not {dim}.")
    frequencies = 1e4 ** -(torch.arange(dim // 4, device=x.device, dtype=torch.float32) / (dim // 4))
    row, column = (torch.arange(size, device=x.device)[:, None] * frequencies for size in (height, width))  # [h, D/4]
    row, column = row[:, None].expand(-1, width, -1), column.expand(height, -1, -1)  # [h, w, D/4]
    embeddings = torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], dim=2)
    return embeddings.flatten(0, 1).to(x.dtype)


def to_positions(x: torch.Tensor) -> torch.Tensor:
    """[B, D, h, w] → [B, h·w, D]."""
    return x.flatten(2).transpose(1, 2)


def to_map(positions: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B, h·w, D] → [B, D, h, w], the map's size being that of ``like``."""
    return positions.transpose(1, 2).unflatten(2, like.shape[-2:])


def resize(x: torch.Tensor, size: tuple[int, int] | list[int]) -> torch.Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)
