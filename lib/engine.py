"""One epoch of training: step, learning rate, clipping, and the checks that keep a run honest."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from utils import UserError

Batch = dict[str, torch.Tensor]


@dataclass
class Meter:
    """Means of named values over the steps since the last line and over the epoch."""

    totals: dict[str, float] = field(default_factory=dict)
    count: int = 0

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.totals[name] = self.totals.get(name, 0.0) + value
        self.count += 1

    def means(self) -> dict[str, float]:
        return {name: total / self.count for name, total in self.totals.items()} if self.count else {}


def training_step(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    batch: Batch,
    *,
    device: torch.device,
    clip_grad: float = 0.0,
) -> dict[str, float]:
    """One optimizer step on one batch; gives back the losses, the learning rate used and the gradient's norm.

    Args:
        model: the network, wrapped in DistributedDataParallel or not.
        criterion, optimizer, scheduler: the scheduler is stepped after the optimizer.
        batch: as :class:`ReferDataset` samples, collated.
        device: where the model is.
        clip_grad: largest gradient norm; 0 leaves the gradient alone.

    Raises:
        FloatingPointError: the loss is not finite; no weight was updated.
    """
    images, ids, text_mask, masks = (
        batch[name].to(device, non_blocking=True) for name in ("image", "input_ids", "attention_mask", "mask")
    )
    losses = criterion(model(images, ids, text_mask), masks)
    loss = losses["loss"].item()
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")
    optimizer.zero_grad(set_to_none=True)
    losses["loss"].backward()
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(trained, clip_grad if clip_grad > 0 else float("inf"))
    lr = optimizer.param_groups[0]["lr"]
    optimizer.step()
    scheduler.step()
    values = {"loss": loss, "segmentation": losses["segmentation"].item()}
    values |= {f"alignment{i}": term for i, term in enumerate(losses["alignment"].tolist(), 1)}
    return values | {"lr": lr, "grad_norm": norm.item()}


def train_one_epoch(
    step: Callable[[Batch], dict[str, float]],
    batches: Iterable[Batch],
    *,
    title: str,
    first_step: int,
    total_steps: int,
    print_freq: int,
    log: Callable[[str], None],
    show_bar: bool,
) -> dict[str, float]:
    """Run ``step`` over the batches, at most up to ``total_steps`` counted from ``first_step``.

    Args:
        step: :func:`training_step` with all but the batch given.
        batches: this process's share.
        title: what the lines begin with.
        first_step: optimizer steps done before.
        total_steps: of the whole training.
        print_freq: steps between lines.
        log: takes a line.
        show_bar: a tqdm bar where stderr is a terminal.

    Returns:
        the epoch's means of what ``step`` returns, and ``steps``: how many were done.

    Raises:
        UserError: the loss became inf or nan; it names the step and the samples.
    """
    epoch, recent, started = Meter(), Meter(), time.perf_counter()
    number = min(len(batches), total_steps - first_step)
    bar = tqdm(total=number, desc=title, disable=None if show_bar else True, leave=False, unit="step")
    for done, batch in enumerate(batches, 1):
        try:
            values = step(batch)
        except FloatingPointError as error:
            raise UserError(
                f"{title}, step {first_step + done}: {error} on samples {batch['index'].tolist()}; "
                "lower --lr, or set --warmup_steps or --clip_grad"
            ) from error
        epoch.add(values)
        recent.add(values)
        bar.update()
        bar.set_postfix_str(f"loss {values['loss']:.3f}")
        if done % print_freq == 0 or done == number:
            seconds = (time.perf_counter() - started) / recent.count
            log(f"{title} step {first_step + done}/{total_steps}  {_line(recent.means())}  {seconds:.2f} s/step")
            recent, started = Meter(), time.perf_counter()
        if done == number:
            break
    bar.close()
    return {**epoch.means(), "steps": epoch.count}


def _line(means: dict[str, float]) -> str:
    alignment = [value for name, value in means.items() if name.startswith("alignment")]
    shown = f"loss {means['loss']:.4f}  segmentation {means['segmentation']:.4f}"
    if alignment:
        shown += "  alignment " + " ".join(f"{value:.3f}" for value in alignment)
    return f"{shown}  lr {means['lr']:.3g}  grad norm {means['grad_norm']:.2f}"


def broadcast_buffers(model: nn.Module) -> None:
    """Give every process the main one's buffers: BatchNorm's running statistics, where they are not synchronised."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
