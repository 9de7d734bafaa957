"""One optimizer step: forward and backward over micro-batches, precision, clipping, the check for finite numbers."""

import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lib.criterion import CrossVLTCriterion
from lib.engine.precision import Precision
from lib.errors import UserError
from lib.evaluation import Batch
from utils import on_main, sum_over_processes

MOST_SKIPPED = 50  # successive steps: from there on the loss scale isn't what is wrong


class NonFiniteError(FloatingPointError):
    """A loss or gradient is inf or nan; no weight was updated. ``own``: this process's samples caused it."""

    def __init__(self, message: str, own: bool) -> None:
        super().__init__(message)
        self.own = own


class TrainingStep:
    """Everything between a few micro-batches and updated weights.

    Args:
        model: the network, wrapped in DistributedDataParallel or not.
        criterion: :class:`CrossVLTCriterion`.
        optimizer, scheduler: the scheduler is stepped once per optimizer step.
        precision: of the forward pass.
        clip_grad: largest gradient norm; 0 leaves the gradient alone.
        ema: moving average to update after each step.
        global_norm: divide the cross-entropy by the class weights of all micro-batches and processes together. Then a
            step's gradient doesn't depend on how its samples are divided. The published code divides each process's
            share by that share's own sum, which this leaves as it is when False.
        group: for exchanging numbers between processes (:func:`utils.cpu_group`).
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: CrossVLTCriterion,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        precision: Precision,
        *,
        clip_grad: float = 0.0,
        ema: ModelEmaV3 | None = None,
        global_norm: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.model, self.criterion, self.optimizer, self.scheduler = model, criterion, optimizer, scheduler
        self.precision, self.clip_grad, self.ema = precision, clip_grad, ema
        self.global_norm, self.group = global_norm, group
        self.trained = [p for part in optimizer.param_groups for p in part["params"] if p.requires_grad]
        self.skipped_in_a_row = 0

    def __call__(self, batches: Sequence[Batch]) -> dict[str, float]:
        """One step on this process's micro-batches, as :class:`data.loaders.DeviceBatches` gives them.

        Returns:
            the means over all processes of ``loss``, ``segmentation`` and ``alignment1…4``; ``lr``, the rate used;
            ``grad_norm``, before clipping. Or only ``skipped``: 1, where fp16 overflowed; its loss scale is lowered.

        Raises:
            NonFiniteError: on every process, when a loss or the gradient is inf or nan on any.
            UserError: the GPU's memory doesn't suffice; fp16 skipped ``MOST_SKIPPED`` steps in a row.
        """
        try:
            return self._step(batches)
        except torch.OutOfMemoryError as error:  # the first update makes AdamW's state: backward may fit, and that not
            raise UserError(out_of_memory(batches[0]["image"].shape[0])) from error

    def _step(self, batches: Sequence[Batch]) -> dict[str, float]:
        self.optimizer.zero_grad(set_to_none=True)
        scaler = self.precision.scaler
        # A forward pass that overflows would stay in BatchNorm's running statistics for good.
        buffers = [buffer.clone() for buffer in self.model.buffers()] if scaler.is_enabled() else []
        terms = self._backward(batches)
        scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.trained, self.clip_grad if self.clip_grad > 0 else math.inf)
        *own, norm = torch.cat([terms, norm.to(terms)[None]]).tolist()  # one wait for the device
        bad = not all(map(math.isfinite, own))
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        anywhere, *sums = sum_over_processes([float(bad or not math.isfinite(norm)), *own], self.group)
        if anywhere and not scaler.is_enabled():
            told = f"the loss is {own[0]}" if bad else f"the gradient's norm is {norm}"
            raise NonFiniteError(told, bad)
        lr = self.optimizer.param_groups[0]["lr"]
        if not anywhere:
            scaler.step(self.optimizer)
        scaler.update()
        with warnings.catch_warnings():
            # A skipped step counts as done. The scheduler would warn that the optimizer hasn't begun yet.
            warnings.filterwarnings(
                "ignore", message=".*lr_scheduler.step.* before .*optimizer.step", category=UserWarning
            )
            self.scheduler.step()
        if anywhere:
            with torch.no_grad():
                for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                    buffer.copy_(before)
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row >= MOST_SKIPPED:
                on_main(self._give_up)
            return {"skipped": 1.0}
        self.skipped_in_a_row = 0
        if self.ema is not None:
            self.ema.update(self._unwrapped())
        names = ["loss", "segmentation", *(f"alignment{i}" for i in range(1, len(own) - 1))]
        return dict(zip(names, (s / world_size for s in sums), strict=True)) | {"lr": lr, "grad_norm": norm}

    def _give_up(self) -> None:
        raise UserError(
            f"fp16 overflowed in {self.skipped_in_a_row} steps in a row: use --amp bf16, lower --lr, or set --clip_grad"
        )

    def _backward(self, batches: Sequence[Batch]) -> torch.Tensor:
        """Gradients of the mean over micro-batches; gives back their mean terms: loss, segmentation, alignment…"""
        normalizer = self._shared_normalizer(batches) if self.global_norm else None
        terms = []
        for number, batch in enumerate(batches, 1):
            several = isinstance(self.model, DistributedDataParallel) and number < len(batches)
            with self.model.no_sync() if several else nullcontext():  # processes exchange gradients once per step
                with self.precision.autocast():
                    output = self.model(batch["image"], batch["input_ids"], batch["attention_mask"])
                losses = self.criterion(output, batch["mask"], normalizer)
                self.precision.scaler.scale(losses["loss"] / len(batches)).backward()
            terms.append(torch.cat([losses["loss"][None], losses["segmentation"][None], losses["alignment"]]).detach())
        return torch.stack(terms).mean(0)

    def _shared_normalizer(self, batches: Sequence[Batch]) -> float:
        """The mean over micro-batches and processes of the class weights' sum."""
        total, count = sum_over_processes(
            [sum(self.criterion.weight_sum(batch["mask"]) for batch in batches), len(batches)], self.group
        )
        return total / count

    def _unwrapped(self) -> nn.Module:
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model


def out_of_memory(batch_size: int) -> str:
    """What to say when a training step doesn't fit."""
    return (
        f"the GPU's memory doesn't suffice for a batch of {batch_size}: use --amp bf16 or --grad_checkpoint, or lower "
        "--batch-size and keep the global batch by --accum-steps"
    )
