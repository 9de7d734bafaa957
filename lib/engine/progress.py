"""How far a run is: everything besides weights, optimizer and the like that going on exactly needs."""

import random
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from utils import derive_seed

PLAIN = ("epoch", "epoch_step", "step", "best_oIoU", "metrics", "skipped")
METERS = ("recent", "whole")


@dataclass
class Meter:
    """Means of named values, each over the steps that had it."""

    totals: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.totals[name] = self.totals.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        return {name: total / self.counts[name] for name, total in self.totals.items()}

    def total(self, name: str) -> float:
        return self.totals.get(name, 0.0)


@dataclass
class Progress:
    """Where a run is. ``epoch`` counts those that are trained and validated, ``epoch_step`` the steps since."""

    epoch: int = 0
    epoch_step: int = 0
    step: int = 0
    best_oIoU: float = 0.0  # noqa: N815  (the field's name)
    metrics: dict[str, float] = field(default_factory=dict)  # of the last validation
    skipped: int = 0
    recent: Meter = field(default_factory=Meter)  # since the last line
    whole: Meter = field(default_factory=Meter)  # since the epoch began

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        meters = {name: [dict(getattr(self, name).totals), dict(getattr(self, name).counts)] for name in METERS}
        return {name: copy(getattr(self, name)) for name in PLAIN} | {"meters": meters}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Progress":
        """The inverse of :meth:`state_dict`; other entries are ignored."""
        meters = {name: Meter(*map(dict, state["meters"][name])) for name in METERS}
        return cls(**{name: state[name] for name in PLAIN}, **meters)


def random_states() -> dict[str, Any]:
    """The states of this process's random generators, as values that load safely."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "numpy": [kind, keys.tolist(), *rest],
        "python": random.getstate(),
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """The inverse of :func:`random_states`."""
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_initialized():
        if states["cuda"] is None:  # saved where there was no GPU
            torch.cuda.manual_seed(derive_seed("cuda", states["torch"].numpy().tobytes().hex()))
        else:
            torch.cuda.set_rng_state(states["cuda"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))


def seed_everything(seed: int) -> None:
    """Seed every random generator of this process."""
    torch.manual_seed(seed)  # CUDA's too
    np.random.seed(seed % 2**32)
    random.seed(seed)
