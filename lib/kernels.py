"""The fastest exact kernel of each device for attention in windows, instance normalization, and packed layers.

All other modules call these and contain no code for a particular device.

Shapes: B batch size, G groups (windows of all images), h heads, n positions, d head width, L positions, C channels.
"""

import math
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return softmax(query · keyᵀ / √d + bias) · value.

    Args:
        query: [G, h, n, d].
        key, value: [G, h, m, d].
        bias: [W, h or 1, n or 1, m]; W divides G, and group g uses row g mod W. None: no bias.

    Returns:
        [G, h, n, d].
    """
    groups, heads = query.shape[:2]
    if query.device.type != "cpu":
        if bias is not None:
            if 1 < len(bias) < groups:
                bias = bias.repeat(groups // len(bias), 1, 1, 1)
            # With another dtype than the query's, scaled_dot_product_attention may silently return wrong values.
            bias = bias.to(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    # On CPU, plain matrix products are faster than the fused kernel. Like there, scores are never bf16 or fp16.
    scale, dtype = query.shape[-1] ** -0.5, torch.promote_types(query.dtype, torch.float32)
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))  # [G·h, n or m, d]
    with torch.autocast("cpu", enabled=False):
        # The products are added to copies of the bias.
        bias = query.new_zeros(1, 1, 1, 1) if bias is None else bias
        shape = (groups // len(bias), len(bias), heads, query.shape[1], key.shape[1])
        scores = bias.to(dtype).expand(shape).clone(memory_format=torch.contiguous_format).flatten(0, 2)
        scores.baddbmm_(query.to(dtype), key.to(dtype).transpose(1, 2), alpha=scale)
        weights = torch.softmax(scores, -1, out=None if scores.requires_grad else scores)
        return torch.bmm(weights.to(value.dtype), value).unflatten(0, (groups, -1))


def instance_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalize every channel of every sample over its positions, [B, L, C] → [B, L, C].

    Raises:
        ValueError: there is only one position.
    """
    if x.device.type != "cpu" or x[0].numel() < 2**16:
        return F.instance_norm(x.transpose(1, 2), eps=eps).transpose(1, 2)
    # For one sample, this is batch normalization over positions, whose kernel needs no transposed copy. For small maps,
    # the copy costs less than one call for each sample.
    return torch.stack([F.batch_norm(sample, None, None, training=True, eps=eps) for sample in x])


def to_conv_layout(x: torch.Tensor) -> torch.Tensor:
    """Return x [B, C, H, W] in the memory format in which convolutions are fastest."""
    # oneDNN computes the gradients of float32 weights 20 % faster with this layout, and everything else with the other.
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.is_grad_enabled():
        return x.contiguous()
    return x.contiguous(memory_format=torch.channels_last)


def matrix_product_rate(dtype: torch.dtype) -> float:
    """Return the FLOP/s of the CPU's matrix products in packed layers, the best of five. Takes about 0.1 s."""
    side, seconds = 1024, math.inf
    layer, x = PackedLinear(torch.ones(side, side), None, "none", dtype), torch.ones(side, side)
    with torch.inference_mode():
        for _ in range(5):
            started = time.perf_counter()
            layer(x)
            seconds = min(seconds, time.perf_counter() - started)
    return 2 * side**3 / seconds


def pack_conv(conv: nn.Conv2d, activation: str, dtype: torch.dtype) -> nn.Module:
    """Return the fastest exact module for inference that computes a convolution and an activation.

    Args:
        conv, activation, dtype: see :class:`PackedConv2d`.
    """
    ordinary = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    if ordinary == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and has_onednn(conv.weight.device, dtype):
        return WinogradConv2d(conv, activation, dtype)
    return PackedConv2d(conv, activation, dtype)


class PackedLinear(nn.Module):
    """Linear layer for inference with an activation, [..., in] → [..., out]. On CPU, oneDNN computes both at once.

    Args:
        weight: [out, in].
        bias: [out] or None.
        activation: a key of ``ACTIVATIONS``.
        dtype: of weight, input and output.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, activation: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.activation, self.is_packed = activation, has_onednn(weight.device, dtype)
        self.weight = weight.detach().to(dtype).contiguous()
        self.bias = None if bias is None else bias.detach()
        if self.is_packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)
        elif self.bias is not None:
            self.bias = self.bias.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.weight.dtype)
        if self.is_packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *_onednn(self.activation))
        return ACTIVATIONS[self.activation](F.linear(x, self.weight, self.bias))


class PackedConv2d(nn.Module):
    """Convolution for inference with an activation, [B, in, H, W] → [B, out, H', W']. See :class:`PackedLinear`.

    Args:
        conv: a convolution; its weight and bias [out, in, kernel height, kernel width], [out] or None, are used.
        activation, dtype: see :class:`PackedLinear`.
    """

    def __init__(self, conv: nn.Conv2d, activation: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.activation, self.is_packed = activation, has_onednn(conv.weight.device, dtype)
        self.weight = conv.weight.detach().to(dtype, memory_format=torch.channels_last)
        self.bias = None if conv.bias is None else conv.bias.detach()
        self.shape = (conv.padding, conv.stride, conv.dilation, conv.groups)
        if self.is_packed:
            self.weight = torch._C._nn.mkldnn_reorder_conv2d_weight(self.weight.to_mkldnn(), *self.shape)
        elif self.bias is not None:
            self.bias = self.bias.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.weight.dtype, memory_format=torch.channels_last)
        if self.is_packed:
            return torch.ops.mkldnn._convolution_pointwise(
                x, self.weight, self.bias, *self.shape, *_onednn(self.activation)
            )
        padding, stride, dilation, groups = self.shape
        return ACTIVATIONS[self.activation](F.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups))


class WinogradConv2d(nn.Module):
    """3×3 convolution for inference by Winograd's minimal filtering F(2×2, 3×3), [B, in, H, W] → [B, out, H, W].

    Each tile of 2×2 outputs takes 16 products instead of 36; one linear layer computes each of the 16 for all tiles
    (Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016, section 4.1). The transforms only add
    and subtract, and the rounding error in float32 is no larger than that of the sums over 9·in products.

    Args:
        conv: a 3×3 convolution with stride and groups 1 and padding 1.
        activation, dtype: see :class:`PackedLinear`.
    """

    def __init__(self, conv: nn.Conv2d, activation: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.activation, self.dtype = activation, dtype
        taps = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
        weight = torch.einsum("ia,ocab,jb->ijoc", taps, conv.weight.detach().double(), taps).flatten(0, 1)
        # Product (1, 1), number 5, is part of all four outputs of a tile.
        self.products = nn.ModuleList(
            PackedLinear(weight[i], conv.bias if i == 5 else None, "none", dtype) for i in range(16)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2:]
        x = F.pad(x.to(self.dtype).permute(0, 2, 3, 1), (0, 0, 1, 1 + width % 2, 1, 1 + height % 2))
        products = [self.products[i : i + 4] for i in range(0, 16, 4)]
        rows = [  # four transformed rows of all tiles, with the two outputs of each: [B, H/2, W/2, out]
            _winograd_outputs([layer(x) for layer, x in zip(layers, _winograd_inputs(row, 2), strict=True)])
            for layers, row in zip(products, _winograd_inputs(x, 1), strict=True)
        ]
        tiles = rows[0][0].new_empty(*rows[0][0].shape[:2], 2, rows[0][0].shape[2], 2, rows[0][0].shape[3])
        for j, column in enumerate(zip(*rows, strict=True)):
            for i, output in enumerate(_winograd_outputs(column)):
                tiles[:, :, i, :, j] = ACTIVATIONS[self.activation](output)
        return tiles.flatten(3, 4).flatten(1, 2)[:, :height, :width].permute(0, 3, 1, 2)


def _winograd_inputs(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
    """Return the four transformed inputs of all overlapping tiles of 4 positions of a dimension."""
    even, odd = x.unflatten(dim, (-1, 2)).unbind(dim + 1)
    tiles = even.shape[dim] - 1
    first, third = even.narrow(dim, 0, tiles), even.narrow(dim, 1, tiles)
    second, fourth = odd.narrow(dim, 0, tiles), odd.narrow(dim, 1, tiles)
    return first - third, second + third, third - second, second - fourth


def _winograd_outputs(products: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two outputs of each tile from its four products."""
    first, second, third, fourth = products
    return first + second + third, second - third - fourth


ACTIVATIONS = {"none": lambda x: x, "relu": torch.relu, "tanh": torch.tanh, "gelu": F.gelu}


def _onednn(activation: str) -> tuple[str, list, str]:
    """Return the arguments of oneDNN's fused operators for an activation; the GELU is the exact one."""
    return activation, [], "none" if activation == "gelu" else ""


def has_onednn(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether oneDNN has fast kernels for a device and dtype."""
    if device.type != "cpu" or not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32
