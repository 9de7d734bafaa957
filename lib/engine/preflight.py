"""Preflight checks of a training: disk space, memory, expected time per epoch."""

import logging
import shutil
import time
from pathlib import Path

import torch
from torch import nn

from data.loaders import Batch
from lib.criterion import CrossVLTCriterion
from lib.engine.loop import compute_losses, out_of_memory_message
from lib.engine.state import TrainState, random_states, restore_random_states
from lib.errors import UserError
from lib.files import Kind, check_writable
from utils import on_main

LOG = logging.getLogger("crossvlt")
GIB = 2**30


def time_training(model: nn.Module, criterion: CrossVLTCriterion, batch: Batch, amp: str) -> float:
    """Return the seconds of one forward and backward pass. Model, gradients and random states are left unchanged.

    Args:
        model: as in training, possibly wrapped in DistributedDataParallel. This wrapper rebuilds its gradient buckets
            after its first backward pass. Since that happens here, a resumed run sums gradients in the same order as
            an uninterrupted one from its first step on.
        criterion: the losses.
        batch: a micro-batch on the model's device.
        amp: mixed precision, see :func:`lib.precision.autocast`.

    Raises:
        UserError: the pass does not fit into the GPU's memory.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    states, was_training = random_states(), model.training
    model.train()
    for _ in range(2):  # the first pass also compiles and loads libraries
        started = time.perf_counter()
        try:
            compute_losses(model, criterion, batch, amp)["loss"].backward()
        except torch.OutOfMemoryError as error:
            raise UserError(out_of_memory_message(batch["image"].shape[0])) from error
        if batch["image"].is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    model.train(was_training)
    restore_random_states(states)
    return seconds


def checkpoint_bytes(state: TrainState) -> tuple[int, int]:
    """Return the approximate sizes of a resumable checkpoint and of one with weights only."""
    weights = sum(t.numel() * t.element_size() for t in state.model.state_dict().values())
    trained = sum(p.numel() * p.element_size() for p in state.model.parameters() if p.requires_grad)
    moments = 3 if state.recipe.AMSGRAD else 2
    return weights * (2 if state.ema else 1) + trained * moments, weights


def check_disk_space(state: TrainState, folder: Path, keep: int) -> None:
    """Check on the main process that the disk can hold the run's checkpoints, and log its free space.

    The folder holds at most ``keep`` resumable checkpoints, another one from the end of an epoch, one that is being
    written, and best.pth twice, while it is replaced.

    Raises:
        UserError: the disk is too full, or the folder is not writable.
    """
    resumable, weights = checkpoint_bytes(state)

    def check() -> None:
        check_writable(folder / "last.pth", Kind.BINARY)
        free = shutil.disk_usage(folder).free
        # last.pth is a hard link to another checkpoint.
        existing = sum(path.stat().st_size for path in folder.glob("*.pth") if path.name != "last.pth")
        needed = (keep + 2) * resumable + 2 * weights - existing
        if needed > free:
            raise UserError(
                f"{folder}: the checkpoints need {needed / GIB:.2f} GiB more ({resumable / GIB:.2f} each), but only "
                f"{free / GIB:.2f} GiB of disk space are free. Make room, choose another --output-dir, or lower --keep "
                f"(now {keep})."
            )
        LOG.info(f"Checkpoint size {resumable / GIB:.2f} GiB, free disk space {free / GIB:.0f} GiB")

    on_main(check)
