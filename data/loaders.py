"""DataLoaders: shuffled shares for training, exact shares for evaluation."""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

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


def build_train_loader(
    dataset: Dataset, *, batch_size: int, workers: int, rank: int, world_size: int, seed: int, pin_memory: bool = False
) -> DataLoader:
    """Shuffled batches of ``batch_size`` per process, incomplete ones dropped; call ``sampler.set_epoch`` each epoch.

    Raises:
        UserError: the dataset doesn't fill a single batch on every process.
    """
    if len(dataset) < batch_size * world_size:
        raise UserError(
            f"{len(dataset)} training samples don't fill one batch of {batch_size} on {world_size} process(es): "
            "lower --batch-size"
        )
    sampler = DistributedSampler(dataset, world_size, rank, shuffle=True, seed=seed % 2**32, drop_last=True)
    return _loader(
        dataset, workers, pin_memory, batch_size=batch_size, sampler=sampler, drop_last=True, seed=(seed, rank)
    )


def build_eval_loader(
    dataset: Dataset, *, batch_size: int, workers: int, rank: int, world_size: int, pin_memory: bool = False
) -> DataLoader:
    """This process's share of a split, in order, every sample exactly once over all processes."""
    share = BatchShare(len(dataset), batch_size, rank, world_size)
    return _loader(dataset, workers, pin_memory, batch_sampler=share, seed=(0, rank))


def _loader(dataset: Dataset, workers: int, pin_memory: bool, *, seed: tuple[int, int], **how: object) -> DataLoader:
    generator = torch.Generator().manual_seed(
        derive_seed("workers", *seed)
    )  # else each iter() draws from the global one
    return DataLoader(
        dataset, num_workers=workers, pin_memory=pin_memory and torch.cuda.is_available(), generator=generator, **how
    )
