"""What the arithmetic of a training is done in, and what is compiled or recomputed for its sake."""

from contextlib import AbstractContextManager

import torch
from torch import nn

AMP_TYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MOST_COMPILED = 512  # forms of one layer class: blocks differ in size, shift and drop-path rate


class Precision:
    """Mixed precision of the forward pass; ``off``, the published way, changes nothing at all.

    Args:
        amp: ``off``, ``bf16`` or ``fp16``; fp16 scales the loss, so that small gradients aren't lost.
        device: where the model is.
    """

    def __init__(self, amp: str, device: torch.device) -> None:
        self.amp, self.device = amp, device
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    def autocast(self) -> AbstractContextManager:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, AMP_TYPES[self.amp], enabled=self.amp != "off")


def compile_blocks(blocks: list[nn.Module]) -> None:
    """Compile modules one by one: minutes less than the whole network, and state-dict names stay as they are."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_COMPILED)
    torch._dynamo.config.accumulated_recompile_limit = MOST_COMPILED
    for block in blocks:
        block.compile(dynamic=False)
