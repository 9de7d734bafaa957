"""DataLoaders for training and evaluation, divided among processes, and transfer of batches to the model's device."""

import gc
import itertools
import signal
import threading
import traceback
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.dataset_refer_bert import ReferDataset
from data.image_batches import ImageBatches
from data.mixed import MixedDataset
from data.transforms import normalize_images
from lib.errors import LostWorkerError, UserError
from utils import STOP_SIGNALS, derive_seed

Batch = dict[str, Any]


class TrainBatchSampler(Sampler[list[int]]):
    """Sampler of one process's micro-batches of a training epoch, which can start at any optimizer step.

    An optimizer step uses ``world_size * accum_steps * batch_size`` consecutive entries of a permutation of the
    dataset. The permutation depends only on the seed and the epoch. A step therefore has the same samples, however they
    are divided among processes and micro-batches. Samples left over after the last full step are dropped.

    Args:
        length: number of samples of the dataset.
        batch_size: samples per forward pass.
        accum_steps: forward passes per process and optimizer step.
        rank, world_size: this process and the number of processes.
        seed: seed of the permutations.
    """

    def __init__(
        self, length: int, batch_size: int, *, accum_steps: int, rank: int, world_size: int, seed: int
    ) -> None:
        self.length, self.batch_size, self.accum_steps = length, batch_size, accum_steps
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.epoch, self.first_step = 0, 0
        self.steps_per_epoch = length // (batch_size * accum_steps * world_size)

    def set_position(self, epoch: int, first_step: int = 0) -> None:
        """Set the epoch, and the optimizer step within it, at which the next iteration starts."""
        self.epoch, self.first_step = epoch, first_step

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(derive_seed("order", self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator)
        per_step = self.world_size * self.accum_steps * self.batch_size
        steps = order[: self.steps_per_epoch * per_step].view(-1, self.accum_steps, self.world_size, self.batch_size)
        yield from steps[self.first_step :, :, self.rank].flatten(0, 1).tolist()

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.first_step) * self.accum_steps


class DeviceBatches:
    """A loader's batches on the model's device. Images and masks are transferred as uint8.

    Each batch is the loader's dict with ``image`` as normalized float32 and ``mask``, if present, as int64. ``index``
    and ``object_index`` stay on the CPU. If a worker process dies, the iteration raises a LostWorkerError.
    """

    def __init__(self, loader: DataLoader, device: torch.device) -> None:
        self.loader, self.device = loader, device

    def __iter__(self) -> Iterator[Batch]:
        for batch in _watched(self.loader):
            on_cpu = {name: batch[name] for name in ("index", "object_index") if name in batch}
            moved = self._moved({name: value for name, value in batch.items() if name not in on_cpu})
            moved["image"] = normalize_images(moved["image"])
            if "mask" in moved:
                moved["mask"] = moved["mask"].long()
            yield moved | on_cpu

    def _moved(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._moved(item) for name, item in value.items()}
        if isinstance(value, list):
            return [self._moved(item) for item in value]
        return value.to(self.device, non_blocking=True)

    def __len__(self) -> int:
        return len(self.loader)


def _watched(loader: DataLoader) -> Iterator[Batch]:
    """Yield the loader's batches. LostWorkerError: a worker process has died."""
    iterator = None
    handler = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
    try:
        iterator = iter(loader)
        if threading.current_thread() is threading.main_thread():
            # PyTorch's handler would raise in the middle of an optimizer step or of a save; next() raises as well.
            signal.signal(signal.SIGCHLD, handler)
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            yield batch
    except Exception as error:
        # An error from a worker is in a reference cycle with PyTorch's frames. The workers would live until the garbage
        # collector runs, and at exit Python would wait forever for them, since they ignore SIGTERM.
        traceback.clear_frames(error.__traceback__)
        lost = [worker for worker in getattr(iterator, "_workers", []) if worker.exitcode]
        if not lost:
            raise
        code = lost[0].exitcode
        reason = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        raise LostWorkerError(
            f"A data-loading worker (process {lost[0].pid}) {reason}. The usual causes are too little host memory "
            f"(SIGKILL) and a full /dev/shm (SIGBUS). Lower --workers (now {loader.num_workers}) or --batch-size, or "
            "provide more memory (for a container also --shm-size)."
        ) from error


class TrainLoader:
    """The optimizer steps of a training split, as lists of micro-batches on the model's device.

    Args:
        loader: loader of a dataset with ``set_epoch``; its ``batch_sampler`` is a :class:`TrainBatchSampler`.
        device: the model's device.
    """

    def __init__(self, loader: DataLoader, device: torch.device) -> None:
        self.loader, self.device = loader, device
        self.sampler: TrainBatchSampler = loader.batch_sampler
        self.steps_per_epoch = self.sampler.steps_per_epoch

    def steps(self, epoch: int, start: int = 0) -> Iterator[list[Batch]]:
        """Yield the steps of an epoch from step ``start`` on. Each is a list of ``accum_steps`` micro-batches."""
        self.loader.dataset.set_epoch(epoch)
        self.sampler.set_position(epoch, start)
        micro_batches = iter(DeviceBatches(self.loader, self.device))
        while step := list(itertools.islice(micro_batches, self.sampler.accum_steps)):
            yield step


def build_train_loader(
    dataset: ReferDataset | MixedDataset,
    device: torch.device,
    *,
    batch_size: int,
    accum_steps: int,
    workers: int,
    rank: int,
    world_size: int,
    seed: int,
    pin_memory: bool = False,
) -> TrainLoader:
    """Build the shuffled loader of a training split.

    Args:
        dataset: the training split.
        device: the model's device.
        batch_size, accum_steps, rank, world_size, seed: see :class:`TrainBatchSampler`.
        workers: number of data-loading processes.
        pin_memory: speeds up the transfer to a CUDA device.

    Raises:
        UserError: the dataset has too few samples for a single optimizer step.
    """
    sampler = TrainBatchSampler(
        len(dataset), batch_size, accum_steps=accum_steps, rank=rank, world_size=world_size, seed=seed
    )
    if not sampler.steps_per_epoch:
        raise UserError(
            f"{len(dataset)} training samples are not enough for one optimizer step of {world_size} process(es) × "
            f"{batch_size} × {accum_steps} accumulated. Lower --batch-size."
        )
    loader = _build_loader(dataset, workers, pin_memory, seed=(seed, rank), batch_sampler=sampler)
    return TrainLoader(loader, device)


def build_eval_batches(
    dataset: ReferDataset,
    device: torch.device,
    *,
    batch_size: int,
    workers: int,
    rank: int,
    world_size: int,
    pin_memory: bool = False,
    targets: Iterable[tuple[str, str]] = (("paper", "resized"),),
    indices: Iterable[int] | None = None,
    evaluated: Collection[int] = (),
) -> DeviceBatches:
    """Build this process's share of an evaluation split's batches.

    Process ``rank`` gets every ``world_size``-th batch. Each expression is in the share of exactly one process; none is
    repeated to equalize the shares.

    Args:
        dataset, batch_size, targets, indices, evaluated: see :class:`data.image_batches.ImageBatches`.
        device: the model's device.
        workers: number of data-loading processes.
        rank, world_size: this process and the number of processes.
        pin_memory: speeds up the transfer to a CUDA device.
    """
    batches = ImageBatches(dataset, batch_size, targets, indices, evaluated)
    share = range(len(batches))[rank::world_size]
    loader = _build_loader(batches, workers, pin_memory, seed=(0, rank), sampler=share, batch_size=None)
    return DeviceBatches(loader, device)


def _build_loader(
    dataset: Dataset, workers: int, pin_memory: bool, *, seed: tuple[int, int], **kwargs: Any
) -> DataLoader:
    # Without this generator, each iter() of the loader would draw a seed from PyTorch's global generator.
    generator = torch.Generator().manual_seed(derive_seed("workers", *seed))
    return DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=pin_memory and torch.cuda.is_available(),
        generator=generator,
        worker_init_fn=_init_worker,
        **kwargs,
    )


def _init_worker(worker: int) -> None:
    # Garbage collection writes to every object that it visits, which would copy the memory shared with the parent.
    gc.freeze()
    # Cluster schedulers send signals to all processes of a job. If a signal ended a worker, the training process would
    # fail before it could save its checkpoint.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
