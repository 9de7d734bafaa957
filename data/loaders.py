"""DataLoaders: shuffled shares for training, exact shares for evaluation, and their way to the model's device."""

import signal
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.transforms import normalize_images
from utils import UserError, derive_seed


class BatchShare(Sampler[list[int]]):
    """This process's batches of an evaluation: the split is cut into batches first, then dealt out like cards.

    Nothing is padded or repeated: every index is in exactly one process's share, whatever the number of processes,
    and the batches themselves don't depend on it.
    """

    def __init__(self, length: int, batch_size: int, rank: int, world_size: int) -> None:
        self.batches = [list(range(i, min(i + batch_size, length))) for i in range(0, length, batch_size)]
        self.batches = self.batches[rank::world_size]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class TrainShare(Sampler[list[int]]):
    """This process's micro-batches of a training epoch, from any of its steps on.

    A step's samples are ``world_size``·``accum_steps``·``batch_size`` successive entries of a permutation that follows
    from (seed, epoch) alone: the same ones however they are divided. What doesn't fill a step is left out.

    Args:
        length: of the dataset.
        batch_size: of one forward pass.
        accum_steps: forward passes per process and optimizer step.
        rank, world_size: this process, of how many.
        seed: of the permutations.
    """

    def __init__(
        self, length: int, batch_size: int, *, accum_steps: int, rank: int, world_size: int, seed: int
    ) -> None:
        self.length, self.batch_size, self.accum_steps = length, batch_size, accum_steps
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.epoch, self.first_step = 0, 0
        self.steps_per_epoch = length // (batch_size * accum_steps * world_size)

    def set_position(self, epoch: int, first_step: int = 0) -> None:
        """Say which epoch comes next, and how many of its steps are done already."""
        self.epoch, self.first_step = epoch, first_step

    def __iter__(self) -> Iterator[list[int]]:
        source = torch.Generator().manual_seed(derive_seed("order", self.seed, self.epoch))
        order = torch.randperm(self.length, generator=source)
        per_step = self.world_size * self.accum_steps * self.batch_size
        steps = order[: self.steps_per_epoch * per_step].view(-1, self.accum_steps, self.world_size, self.batch_size)
        yield from steps[self.first_step :, :, self.rank].flatten(0, 1).tolist()

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.first_step) * self.accum_steps


class DeviceBatches:
    """A loader's batches as the model takes them, on its device.

    Each is a dict: ``image`` float32 [B, 3, S, S], normalised; ``input_ids`` and ``attention_mask`` int64 [B, N];
    ``mask`` int64 [B, S, S]; ``index`` int64 [B], which stays on the CPU. Pictures and masks travel as bytes.
    """

    def __init__(self, loader: DataLoader, device: torch.device) -> None:
        self.loader, self.device = loader, device

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in self.loader:
            moved = {name: batch[name].to(self.device, non_blocking=True) for name in batch if name != "index"}
            moved["image"], moved["mask"] = normalize_images(moved["image"]), moved["mask"].long()
            yield {**moved, "index": batch["index"]}

    def __len__(self) -> int:
        return len(self.loader)


def build_train_loader(
    dataset: Dataset,
    *,
    batch_size: int,
    accum_steps: int = 1,
    workers: int,
    rank: int,
    world_size: int,
    seed: int,
    pin_memory: bool = False,
) -> DataLoader:
    """Shuffled micro-batches; its ``batch_sampler`` is a :class:`TrainShare`.

    Raises:
        UserError: the dataset doesn't fill a single step.
    """
    share = TrainShare(len(dataset), batch_size, accum_steps=accum_steps, rank=rank, world_size=world_size, seed=seed)
    if not share.steps_per_epoch:
        raise UserError(
            f"{len(dataset)} training samples don't fill one step of {world_size} process(es) × {batch_size} × "
            f"{accum_steps} accumulated: lower --batch-size"
        )
    return _loader(dataset, workers, pin_memory, share, seed=(seed, rank))


def build_eval_loader(
    dataset: Dataset, *, batch_size: int, workers: int, rank: int, world_size: int, pin_memory: bool = False
) -> DataLoader:
    """This process's share of a split, in order, every sample exactly once over all processes."""
    return _loader(dataset, workers, pin_memory, BatchShare(len(dataset), batch_size, rank, world_size), seed=(0, rank))


def _loader(
    dataset: Dataset, workers: int, pin_memory: bool, batch_sampler: Sampler[list[int]], seed: tuple[int, int]
) -> DataLoader:
    generator = torch.Generator().manual_seed(
        derive_seed("workers", *seed)
    )  # else each iter() draws from the global one
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=workers,
        pin_memory=pin_memory and torch.cuda.is_available(),
        generator=generator,
        worker_init_fn=_leave_signals_to_the_parent,
    )


def _leave_signals_to_the_parent(worker: int) -> None:
    """Schedulers signal every process of a job: a worker that died of it would take the saving process along."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
