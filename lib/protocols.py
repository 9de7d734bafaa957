"""What a published number depends on besides the model, by name (docs/protocols.md).

Letters: B expressions, h×w the logits' size, H×W the size masks are judged at.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from lib.errors import UserError
from lib.variants import EVAL_SIZES, MASK_MODES, MAX_TOKENS

# What the loop over expressions always does; part of every result file, so that a number says how it came about.
FIXED = {"text": "raw", "sentences": "all", "precision": ">="}


@dataclass(frozen=True)
class Protocol:
    """How a prediction is made of the logits, and what it is judged against.

    Args:
        name: of the protocol; a changed switch is part of it.
        gt_mask: ``paper``: a pixel belongs to the object where exactly one of its polygons lies, so overlaps are
            holes; ``union``: where any lies.
        eval_size: ``resized``: prediction and truth at the model's picture size, the truth by nearest neighbour;
            ``original``: the logits are brought back (bilinear) to the picture's own size, the truth is as annotated.
        threshold: of the object's probability, reached or exceeded; None: the class with the higher logit.
        max_tokens: ids kept of a sentence, [CLS] and [SEP] among them.
    """

    name: str
    gt_mask: str = "paper"
    eval_size: str = "resized"
    threshold: float | None = None
    max_tokens: int = MAX_TOKENS

    @property
    def truth(self) -> tuple[str, str]:
        """Which true masks are needed: (gt_mask, eval_size)."""
        return self.gt_mask, self.eval_size

    def predicted(self, logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """logits [B, 2, h, w] → masks, bool [B, H, W] of ``size`` (H, W)."""
        if logits.shape[-2:] != size:
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        if self.threshold is None:
            return logits.argmax(1).bool()
        return logits.softmax(1)[:, 1] >= self.threshold

    def settings(self) -> dict[str, Any]:
        """Everything that this protocol settles, for result files."""
        return {**asdict(self), **FIXED}


PAPER = Protocol("paper")
PROTOCOLS = {"paper": PAPER, "original": Protocol("original", gt_mask="union", eval_size="original")}


def choose_protocols(
    names: str,
    *,
    gt_mask: str | None = None,
    eval_size: str | None = None,
    threshold: float | None = None,
    max_tokens: int = MAX_TOKENS,
) -> list[Protocol]:
    """The protocols of ``--protocol paper,original``, with the single switches that were given.

    A switch that changes a protocol becomes part of its name: ``paper+gt_mask=union``.

    Raises:
        UserError: an unknown name or value, or two protocols that the switches make the same.
    """
    if gt_mask is not None and gt_mask not in MASK_MODES:
        raise UserError(f"--gt_mask {gt_mask}: choose one of {', '.join(MASK_MODES)}")
    if eval_size is not None and eval_size not in EVAL_SIZES:
        raise UserError(f"--eval_size {eval_size}: choose one of {', '.join(EVAL_SIZES)}")
    if threshold is not None and not 0 < threshold < 1:
        raise UserError(f"--threshold {threshold}: a probability between 0 and 1")
    switches = {"gt_mask": gt_mask, "eval_size": eval_size, "threshold": threshold, "max_tokens": max_tokens}
    chosen: list[Protocol] = []
    for name in dict.fromkeys(part.strip() for part in names.split(",") if part.strip()):
        if name not in PROTOCOLS:
            raise UserError(f"--protocol {name}: choose of {', '.join(PROTOCOLS)}")
        protocol = PROTOCOLS[name]
        changed = {k: v for k, v in switches.items() if v is not None and v != getattr(protocol, k)}
        full_name = "+".join([name, *(f"{key}={value}" for key, value in changed.items())])
        protocol = replace(protocol, name=full_name, **changed)
        same = [one.name for one in chosen if replace(one, name=full_name) == protocol]
        if same:
            raise UserError(f"--protocol {names}: with these switches {same[0]} and {full_name} are the same")
        chosen.append(protocol)
    if not chosen:
        raise UserError(f"--protocol {names!r} names no protocol: choose of {', '.join(PROTOCOLS)}")
    return chosen
