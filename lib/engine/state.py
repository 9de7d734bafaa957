"""Everything that training changes: weights, optimizer, schedule, moving average, position, random states."""

import logging
import random
from collections.abc import Iterator
from copy import copy, deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from yacs.config import CfgNode

from lib.checkpoint import Checkpoint, load_strictly
from lib.errors import UserError
from lib.optim import build_lr_scheduler, build_optimizer, freeze, names_without_gradient
from lib.precision import build_scaler
from utils import derive_seed

LOG = logging.getLogger("crossvlt")

POSITION = ("epoch", "epoch_step", "step", "best_oIoU", "metrics", "skipped")
METERS = ("recent", "whole")


@dataclass
class Meter:
    """Means of named values, each over the steps that reported it."""

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


class MovingAverage:
    """Exponential moving average of a model's weights and floating-point buffers. Integer buffers are copied.

    Args:
        model: on its device; its tensors may be changed, but not replaced.
        decay: share of the old average in each update.

    Attributes:
        module: the averaged model, in evaluation mode.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module, self.decay = deepcopy(model).eval(), decay
        # The tensors are listed once. For a small model, reading the state dicts takes longer than the arithmetic.
        tensors = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
        self._integers = [pair for pair in tensors if not pair[0].is_floating_point()]
        self._averages, self._values = map(
            list, zip(*(pair for pair in tensors if pair[0].is_floating_point()), strict=True)
        )

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the model's current weights."""
        torch._foreach_lerp_(self._averages, self._values, weight=1.0 - self.decay)
        for average, value in self._integers:
            average.copy_(value)


@dataclass
class TrainState:
    """Everything that training changes.

    Attributes:
        model: the network, not wrapped in DistributedDataParallel.
        scaler: enabled for fp16 only.
        ema: moving average of the weights, or None.
        recipe: the TRAIN section of the configuration.
        total_steps, steps_per_epoch: optimizer steps of the whole training and of an epoch.
        epoch: number of epochs that are trained and validated.
        epoch_step: steps since the last validation; equal to ``steps_per_epoch`` if only the validation is missing.
        step: optimizer steps so far.
        best_oIoU: highest overall IoU of all validations, in percent.
        metrics: metrics of the last validation.
        skipped: number of steps skipped because fp16 overflowed.
        skipped_in_a_row: how many of them since the last step that was not skipped.
        recent: losses since the last log line.
        whole: losses since the beginning of the epoch.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    ema: MovingAverage | None
    recipe: CfgNode
    total_steps: int
    steps_per_epoch: int
    epoch: int = 0
    epoch_step: int = 0
    step: int = 0
    best_oIoU: float = 0.0  # noqa: N815  (the field's name for overall IoU)
    metrics: dict[str, float] = field(default_factory=dict)
    skipped: int = 0
    skipped_in_a_row: int = 0
    recent: Meter = field(default_factory=Meter)
    whole: Meter = field(default_factory=Meter)

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done and validated."""
        return self.step >= self.total_steps and self.epoch_step == 0

    @property
    def eval_model(self) -> nn.Module:
        """The model that is validated and saved as best.pth: the moving average if there is one."""
        return self.ema.module if self.ema else self.model

    def remaining_epochs(self) -> Iterator[int]:
        """Yield epoch numbers until all steps are done and validated. The caller advances the state in between."""
        while not self.is_finished:
            yield self.epoch

    def remaining_steps(self) -> int:
        """Return the steps left in this epoch, or in the training if that ends earlier."""
        return max(0, min(self.steps_per_epoch - self.epoch_step, self.total_steps - self.step))

    def count_step(self, values: dict[str, float]) -> None:
        """Advance by one optimizer step that reported ``values``."""
        self.step += 1
        self.epoch_step += 1
        self.skipped += int(values.get("skipped", 0))
        self.recent.add(values)
        self.whole.add(values)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that resuming needs besides the random states, as values that load safely."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            **self.position(),
        }

    def position(self) -> dict[str, Any]:
        """Return the counters, metrics and meters as plain values."""
        meters = {name: [dict(getattr(self, name).totals), dict(getattr(self, name).counts)] for name in METERS}
        return {name: copy(getattr(self, name)) for name in POSITION} | {"meters": meters}

    def load_position(self, saved: dict[str, Any]) -> None:
        """Load what :meth:`position` returned; other entries are ignored."""
        for name in POSITION:
            setattr(self, name, copy(saved[name]))
        for name in METERS:
            totals, counts = saved["meters"][name]
            setattr(self, name, Meter(dict(totals), dict(counts)))

    def load_state_dict(self, checkpoint: Checkpoint) -> None:
        """Load everything but the model's weights: optimizer, schedule, scaler, moving average and position.

        Afterwards, the tensors of ``checkpoint`` are released, because they take as much memory as model and optimizer.
        """
        saved = checkpoint.extra
        for group, current in zip(saved["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True):
            group["fused"] = current["fused"]  # depends on the device, which may have changed
        # On a CPU, the optimizer would keep these tensors, which are mapped from the file.
        self.optimizer.load_state_dict(deepcopy(saved["optimizer"]))
        self.scheduler.load_state_dict(saved["scheduler"])
        for group, base_lr, factor in zip(
            self.optimizer.param_groups, self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base_lr * factor(self.scheduler.last_epoch)  # the saved rate, unless the length has changed
        self.scaler.load_state_dict(saved["scaler"])
        if self.ema:
            load_strictly(self.ema.module, saved["ema"], str(checkpoint.path))
        self.load_position(saved)
        checkpoint.state_dict.clear()
        saved["optimizer"] = saved["ema"] = None


def build_train_state(
    model: nn.Module, recipe: CfgNode, steps_per_epoch: int, resumed: Checkpoint | None = None
) -> TrainState:
    """Build optimizer, schedule, scaler and moving average, and load them from ``resumed``.

    Args:
        model: on its device, with its initial or resumed weights. Parameters without a gradient are frozen.
        recipe: the TRAIN section of the configuration.
        steps_per_epoch: optimizer steps.
        resumed: the checkpoint that the run resumes from.

    Raises:
        UserError: the warm-up is longer than the training.
    """
    total_steps = recipe.STEPS or _count_steps(recipe.EPOCHS, steps_per_epoch, resumed)
    if total_steps < recipe.WARMUP_STEPS:
        raise UserError(f"--warmup_steps {recipe.WARMUP_STEPS}: the whole training has only {total_steps} steps.")
    frozen = names_without_gradient(model, alignment=recipe.ALIGNMENT, train_temperature=recipe.TRAIN_TEMPERATURE)
    freeze(model, frozen)
    LOG.info("Frozen, as in the published code: %s", ", ".join(frozen))
    optimizer = build_optimizer(
        model, recipe.LR, recipe.WEIGHT_DECAY, amsgrad=recipe.AMSGRAD, train_temperature=recipe.TRAIN_TEMPERATURE
    )
    state = TrainState(
        model,
        optimizer,
        build_lr_scheduler(optimizer, total_steps, recipe.WARMUP_STEPS),
        build_scaler(recipe.AMP, next(model.parameters()).device),
        MovingAverage(model, recipe.EMA) if recipe.EMA else None,
        recipe,
        total_steps,
        steps_per_epoch,
    )
    if resumed:
        state.load_state_dict(resumed)
    return state


def _count_steps(epochs: int, steps_per_epoch: int, resumed: Checkpoint | None) -> int:
    """Return the steps of the whole training. Finished epochs may have had a different number of steps."""
    if resumed is None:
        return epochs * steps_per_epoch
    saved = resumed.extra
    return saved["step"] - saved["epoch_step"] + max(0, epochs - saved["epoch"]) * steps_per_epoch


def random_states() -> dict[str, Any]:
    """Return the states of this process's random generators, as values that load safely."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "numpy": [kind, keys.tolist(), *rest],
        "python": random.getstate(),
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Restore what :func:`random_states` returned."""
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_initialized():
        if states["cuda"] is None:  # saved on a machine without a GPU
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
