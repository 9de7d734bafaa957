"""What can be known before the first step: whether the disk has room, whether a step fits, how long an epoch takes."""

import shutil
import time
from pathlib import Path

import torch
from torch import nn

from lib.criterion import CrossVLTCriterion
from lib.engine.precision import Precision
from lib.engine.progress import random_states, restore_random_states
from lib.engine.step import out_of_memory
from lib.errors import UserError
from lib.evaluation import Batch
from lib.files import check_writable

GIB = 2**30


def time_training(model: nn.Module, criterion: CrossVLTCriterion, precision: Precision, batch: Batch) -> float:
    """Seconds of a forward and backward pass on a batch; afterwards everything is as it was.

    Args:
        model: as the training's, wrapped or not. DistributedDataParallel arranges its exchange anew after the first
            pass: behind these two a resumed run's first step adds in the same order as an uninterrupted run's.
        criterion, precision: as the training's.
        batch: as the training's, on the model's device.

    Raises:
        UserError: it doesn't fit into the GPU's memory.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    states, was_training = random_states(), model.training
    model.train()
    for _ in range(2):  # the first one also compiles, and makes libraries load
        started = time.perf_counter()
        try:
            with precision.autocast():
                output = model(batch["image"], batch["input_ids"], batch["attention_mask"])
            criterion(output, batch["mask"])["loss"].backward()
        except torch.OutOfMemoryError as error:
            raise UserError(out_of_memory(batch["image"].shape[0])) from error
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


def checkpoint_bytes(model: nn.Module, *, amsgrad: bool, ema: bool) -> tuple[int, int]:
    """About how large (a resumable checkpoint, one of weights alone) will be."""
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return weights * (2 if ema else 1) + trained * (3 if amsgrad else 2), weights


def check_space(folder: Path, resumable: int, weights: int, keep: int) -> int:
    """Find out before the training whether its checkpoints fit on the disk; gives back the bytes free.

    At the most there are ``keep`` resumable ones, one that ends an epoch, one being written, and the best twice.

    Raises:
        UserError: they don't fit, or the folder can't be written to.
    """
    check_writable(folder / "last.pth")
    free = shutil.disk_usage(folder).free
    # last.pth is a second name of one of the others.
    there = sum(path.stat().st_size for path in folder.glob("*.pth") if path.name != "last.pth")
    needed = (keep + 2) * resumable + 2 * weights - there
    if needed > free:
        raise UserError(
            f"{folder}: the checkpoints need another {needed / GIB:.2f} GiB ({resumable / GIB:.2f} each), but the disk "
            f"has {free / GIB:.2f} left: make room, choose another --output-dir, or lower --keep (now {keep})"
        )
    return free


def duration(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.5 h``."""
    for unit, size, digits in (("h", 3600, 1), ("min", 60, 0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
