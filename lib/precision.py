"""Numeric precision of the forward pass, and compilation of the encoders' blocks."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_COMPILED_VARIANTS = 512  # per layer class: blocks differ in size, shift and drop-path rate


def autocast(amp: str, device: torch.device) -> AbstractContextManager:
    """Return the context manager of a forward pass in mixed precision; ``off`` (published) changes nothing.

    Args:
        amp: ``off``, ``bf16`` or ``fp16``.
        device: the model's device.
    """
    return torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp != "off")


def full_precision(device: torch.device) -> AbstractContextManager:
    """Return the context manager of a part of a forward pass that is never computed in mixed precision."""
    available = torch.amp.is_autocast_available(device.type)  # not on the meta device
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def build_scaler(amp: str, device: torch.device) -> torch.amp.GradScaler:
    """Return a loss scaler. It is enabled for fp16 only, whose small gradients would underflow without it."""
    return torch.amp.GradScaler(device.type, enabled=amp == "fp16")


def compile_blocks(blocks: list[nn.Module]) -> None:
    """Compile each module separately. This saves minutes compared to the whole network, and keeps state-dict names."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_COMPILED_VARIANTS)
    torch._dynamo.config.accumulated_recompile_limit = MAX_COMPILED_VARIANTS
    for block in blocks:
        block.compile(dynamic=False)
