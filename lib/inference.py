"""Prepare a model for inference: the same numbers, faster.

The prepared model consists of the model's own modules. Only layers are replaced: linear layers and convolutions by
packed ones (:mod:`lib.kernels`), which contain the folded BatchNorm and the activation that follows them.
"""

import copy
import functools
from typing import Any

import torch
from timm.layers import Mlp
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from transformers.activations import GELUActivation
from transformers.models.bert.modeling_bert import BertIntermediate

from lib.fusion import PositionwiseConv
from lib.kernels import PackedLinear, matrix_product_rate, pack_conv
from lib.precision import AMP_DTYPES, autocast
from lib.seg_decoder import SegDecoder
from lib.vision_encoder import WindowAttention
from utils import warn_once

PACKABLE = (nn.Linear, nn.Conv2d, PositionwiseConv)
ACTIVATION_NAMES = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.GELU: "gelu", GELUActivation: "gelu"}
FOLLOWERS = (nn.BatchNorm2d, *ACTIVATION_NAMES)


class PreparedModel(nn.Module):
    """A model prepared by :func:`prepare`, with the methods of the original one. It computes no gradients."""

    def __init__(self, model: nn.Module, amp: str) -> None:
        super().__init__()
        self.model, self.amp, self.config = model, amp, model.config
        self.temp = getattr(model, "temp", None)  # temperatures of the similarity maps, if the network has any

    @torch.inference_mode()
    def forward(self, images: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with autocast(self.amp, images.device):
            return self.model(images, *args, **kwargs)

    @torch.inference_mode()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        with autocast(self.amp, images.device):
            return self.model.encode_images(images)

    @torch.inference_mode()
    def segment(self, encoded_images: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with autocast(self.amp, encoded_images.device):
            return self.model.segment(encoded_images, *args, **kwargs)


def prepare(model: nn.Module, *, amp: str = "off") -> PreparedModel:
    """Return a copy of a model that is optimized for inference on the model's device.

    The copy shares the weights that need no other layout: after changing the model's weights, prepare it again.

    Args:
        model: a network with the methods of :class:`CrossVLT.CrossVLT`, in float32.
        amp: ``off``; or ``bf16`` or ``fp16``: mixed precision as in :func:`lib.precision.autocast`, with weights cast
            once.
    """
    dtype = AMP_DTYPES[amp] or next(model.parameters()).dtype
    with torch.inference_mode():
        return PreparedModel(_prepared(model, dtype), amp).eval()


def warn_if_slower(amp: str, device: torch.device) -> None:
    """Log a warning if matrix products of a CPU are slower in mixed precision ``amp`` than in float32."""
    if amp != "off" and device.type == "cpu":
        full, mixed = matrix_product_rate(torch.float32), matrix_product_rate(AMP_DTYPES[amp])
        if mixed < full:
            warn_once("--amp %s is slower on this CPU: %.0f GFLOP/s, %.0f in float32", amp, mixed / 1e9, full / 1e9)


def _prepared(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a module in which layers are replaced by packed ones of this dtype."""
    if isinstance(module, PACKABLE):
        return _pack(module, dtype)
    prepared = copy.copy(module)
    prepared._compiled_call_impl = None  # compiled blocks would run the original layers
    full, in_full = torch.promote_types(dtype, torch.float32), getattr(module, "not_in_mixed_precision", ())
    prepared._modules = {
        name: None if child is None else _prepared(child, full if name in in_full else dtype)
        for name, child in module._modules.items()
    }
    for name, *followers in _chains(module):
        layers = [module._modules[follower] for follower in followers]
        activation = next(filter(None, (ACTIVATION_NAMES.get(type(layer)) for layer in layers)), "none")
        norm = next((layer for layer in layers if isinstance(layer, nn.BatchNorm2d)), None)
        layer = module._modules[name] if norm is None else _folded(module._modules[name], norm)
        prepared._modules[name] = _pack(layer, dtype, activation)
        prepared._modules |= {follower: nn.Identity() for follower in followers}
    if isinstance(module, WindowAttention):
        # A copy without layers computes the biases. A cache of a method of ``prepared`` would be a reference cycle, and
        # its weights would stay in memory until the garbage collector runs.
        source = copy.copy(prepared)
        source._modules, source._parameters = {}, {}
        source.relative_position_bias_table = nn.Parameter(module.relative_position_bias_table.to(dtype), False)
        prepared._parameters, prepared.bias = {}, functools.cache(source.bias)
    return prepared


def _chains(module: nn.Module) -> list[tuple[str, ...]]:
    """Return the names of the layers of a module that become one packed layer.

    Each chain is a packable layer and its followers: BatchNorm, an activation, or both.
    """
    if isinstance(module, Mlp):
        return [("fc1", "act")]
    if isinstance(module, BertIntermediate):
        return [("dense", "intermediate_act_fn")]
    if isinstance(module, SegDecoder):
        return [(*names, "relu") for names in module.layer_names()]
    chains, is_open = [], False
    for name, layer in module._modules.items() if isinstance(module, nn.Sequential) else ():
        if isinstance(layer, PACKABLE):
            chains.append((name,))
            is_open = True
        elif is_open and isinstance(layer, FOLLOWERS):
            chains[-1] += (name,)
            is_open = isinstance(layer, nn.BatchNorm2d)
        else:
            is_open = False
    return chains


def _pack(layer: nn.Module, dtype: torch.dtype, activation: str = "none") -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        return pack_conv(layer, activation, dtype)
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight[:, :, 0]
    return PackedLinear(weight, layer.bias, activation, dtype)


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Return a copy of a convolution that contains the BatchNorm that follows it."""
    folded = copy.copy(conv)
    folded._parameters = {}
    folded.weight, folded.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    return folded
