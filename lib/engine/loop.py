"""The training loop: one epoch, and one optimizer step.

Shapes: B samples per micro-batch, S side of the images, N tokens.
"""

import itertools
import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data.loaders import Batch, TrainLoader
from lib.criterion import CrossVLTCriterion
from lib.engine.run import NonFiniteError, Run
from lib.engine.state import TrainState
from lib.errors import UserError
from lib.precision import autocast
from utils import on_main, sum_over_processes

MAX_CONSECUTIVE_SKIPS = 50  # each skip halves the loss scale; if 50 do not help, the scale is not the cause


def train_one_epoch(
    model: nn.Module, criterion: CrossVLTCriterion, loader: TrainLoader, state: TrainState, run: Run
) -> None:
    """Train to the end of the epoch, or to the last step of the run. An interrupted epoch continues at its next step.

    Args:
        model: ``state.model``, possibly wrapped in DistributedDataParallel.
        criterion: the losses.
        loader: this process's micro-batches.
        state: updated in place.
        run: logs, saves checkpoints and stops the training.

    Raises:
        StoppedError: a signal was received.
        UserError: a loss is inf or nan, an image is unreadable, a data-loading worker has died, or the disk or the
            GPU's memory is full.
    """
    run.begin_epoch(state)
    model.train()
    steps = loader.steps(state.epoch, start=state.epoch_step)
    for micro_batches in itertools.islice(steps, state.remaining_steps()):
        try:
            losses = optimizer_step(model, criterion, micro_batches, state)
        except NonFiniteError as error:
            run.report_non_finite(error, state, micro_batches)
        except torch.OutOfMemoryError as error:
            raise UserError(out_of_memory_message(loader.sampler.batch_size)) from error
        state.count_step(losses)
        run.after_step(state, losses, num_samples=sum(len(batch["index"]) for batch in micro_batches))
    broadcast_buffers(state.model)
    if state.ema:
        broadcast_buffers(state.ema.module)


def optimizer_step(
    model: nn.Module, criterion: CrossVLTCriterion, micro_batches: Sequence[Batch], state: TrainState
) -> dict[str, float]:
    """Take one optimizer step on the micro-batches of all processes.

    Args:
        model: ``state.model``, possibly wrapped in DistributedDataParallel.
        criterion: the losses.
        micro_batches: those of this process, dicts with ``image`` [B, 3, S, S], ``input_ids`` and ``attention_mask``
            [B, N], and ``mask`` [B, S, S].
        state: updated in place: weights, optimizer, schedule, scaler and moving average.

    Returns:
        the criterion's terms, averaged over all processes (``alignment`` as ``alignment1`` to ``alignment4``), the
        learning rate ``lr``, and ``grad_norm``, the norm before clipping. If fp16 overflowed, the step is skipped and
        the result is only {``skipped``: 1}.

    Raises:
        NonFiniteError: on every process, if a loss or the gradient is inf or nan on any of them (not with fp16).
        UserError: fp16 skipped ``MAX_CONSECUTIVE_SKIPS`` steps in a row.
    """
    optimizer, scaler, recipe = state.optimizer, state.scaler, state.recipe
    optimizer.zero_grad(set_to_none=True)
    # If fp16 overflows, the forward pass must not change BatchNorm's running statistics.
    saved_buffers = [buffer.clone() for buffer in model.buffers()] if scaler.is_enabled() else []
    names, losses = accumulate_gradients(model, criterion, micro_batches, state)

    scaler.unscale_(optimizer)
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    grad_norm = nn.utils.clip_grad_norm_(trained, recipe.CLIP_GRAD if recipe.CLIP_GRAD > 0 else math.inf, foreach=True)

    # The step's only synchronization with the device.
    *local_losses, grad_norm = torch.cat([losses, grad_norm.to(losses)[None]]).tolist()
    loss_is_bad = not all(map(math.isfinite, local_losses))
    num_bad, *sums = sum_over_processes([float(loss_is_bad or not math.isfinite(grad_norm)), *local_losses])
    if num_bad and not scaler.is_enabled():
        value = f"the loss is {local_losses[0]}" if loss_is_bad else f"the gradient norm is {grad_norm}"
        raise NonFiniteError(value, caused_here=loss_is_bad)

    lr = optimizer.param_groups[0]["lr"]
    if not num_bad:
        scaler.step(optimizer)
    scaler.update()
    with warnings.catch_warnings():
        # The schedule also advances in a skipped step. If the first step is skipped, PyTorch would warn about this.
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.* before .*optimizer.step", category=UserWarning)
        state.scheduler.step()
    if num_bad:
        _skip(model, saved_buffers, state)
        return {"skipped": 1.0}
    state.skipped_in_a_row = 0
    if state.ema is not None:
        state.ema.update()
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    means = {name: total / world_size for name, total in zip(names, sums, strict=True)}
    return means | {"lr": lr, "grad_norm": grad_norm}


def accumulate_gradients(
    model: nn.Module, criterion: CrossVLTCriterion, micro_batches: Sequence[Batch], state: TrainState
) -> tuple[list[str], torch.Tensor]:
    """Backpropagate the mean loss over the micro-batches.

    The published code normalizes each forward pass's cross-entropy by its own class weights. With GLOBAL_NORM, all
    micro-batches and processes share one normalizer, and the gradient does not depend on how samples are divided.

    Returns:
        the names of the criterion's terms, ``loss`` first, and their means over the micro-batches [num_terms]. The
        elements of a term that is a vector are named ``alignment1``, ``alignment2``, …
    """
    normalizer = None
    if state.recipe.GLOBAL_NORM:
        local_sum = criterion.weight_sum(*(batch["mask"] for batch in micro_batches))
        total, count = sum_over_processes([local_sum, len(micro_batches)])
        normalizer = total / count
    rows = []
    for number, batch in enumerate(micro_batches, 1):
        # Processes exchange gradients once per step, in the last backward pass.
        skip_sync = isinstance(model, DistributedDataParallel) and number < len(micro_batches)
        with model.no_sync() if skip_sync else nullcontext():
            losses = compute_losses(model, criterion, batch, state.recipe.AMP, normalizer)
            state.scaler.scale(losses["loss"] / len(micro_batches)).backward()
        rows.append(torch.cat([term.detach().reshape(-1) for term in losses.values()]))
    names = []
    for name, term in losses.items():
        names += [name] if term.ndim == 0 else [f"{name}{i}" for i in range(1, len(term) + 1)]
    return names, torch.stack(rows).mean(0)


def compute_losses(
    model: nn.Module, criterion: CrossVLTCriterion, batch: Batch, amp: str, normalizer: float | None = None
) -> dict[str, torch.Tensor]:
    """Return the criterion's terms for a micro-batch, with the forward pass in the precision ``amp``."""
    with autocast(amp, batch["image"].device):
        output = model(
            batch["image"], batch["input_ids"], batch["attention_mask"], return_similarities=criterion.alignment
        )
    return criterion(output, batch["mask"], normalizer)


def _skip(model: nn.Module, saved_buffers: list[torch.Tensor], state: TrainState) -> None:
    """Restore the buffers after an overflow in fp16. Raise a UserError after too many overflows in a row."""
    with torch.no_grad():
        for buffer, saved in zip(model.buffers(), saved_buffers, strict=True):
            buffer.copy_(saved)
    state.skipped_in_a_row += 1

    def give_up() -> None:
        raise UserError(
            f"fp16 overflowed in {state.skipped_in_a_row} steps in a row. Use --amp bf16, lower --lr, or set "
            "--clip_grad."
        )

    if state.skipped_in_a_row >= MAX_CONSECUTIVE_SKIPS:
        on_main(give_up)


def broadcast_buffers(model: nn.Module) -> None:
    """Copy rank 0's buffers, such as BatchNorm's running statistics, to all processes."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def out_of_memory_message(batch_size: int) -> str:
    """Return the error message for a training step that does not fit into the GPU's memory."""
    return (
        f"The GPU's memory is too small for a batch of {batch_size}. Use --amp bf16 or --grad_checkpoint, or lower "
        "--batch-size and keep the global batch with --accum-steps."
    )
