"""DataLoaders: shuffled shares for training, exact shares for evaluation, and their way to the model's device."""

import gc
import signal
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.dataset_refer_bert import ReferDataset
from data.image_batches import ImageBatches
from data.transforms import normalize_images
from lib.errors import UserError
from utils import derive_seed


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
    """A loader's batches as the model takes them, on its device; pictures and masks travel as bytes.

    Each is the loader's dict, with ``image`` float32, normalised, and ``mask``, if there is one, int64. ``index`` stays
    on the CPU.
    """

    def __init__(self, loader: DataLoader, device: torch.device) -> None:
        self.loader, self.device = loader, device

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.loader:
            moved = self._moved({name: value for name, value in batch.items() if name != "index"})
            moved["image"] = normalize_images(moved["image"])
            if "mask" in moved:
                moved["mask"] = moved["mask"].long()
            yield {**moved, "index": batch["index"]}

    def _moved(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._moved(one) for name, one in value.items()}
        if isinstance(value, list):
            return [self._moved(one) for one in value]
        return value.to(self.device, non_blocking=True)

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
    return _loader(dataset, workers, pin_memory, seed=(seed, rank), batch_sampler=share)


def build_eval_batches(
    dataset: ReferDataset,
    device: torch.device,
    *,
    batch_size: int,
    workers: int,
    rank: int,
    world_size: int,
    pin_memory: bool = False,
    truths: Iterable[tuple[str, str]] = (("paper", "resized"),),
    indices: Iterable[int] | None = None,
    done: Collection[int] = (),
) -> DeviceBatches:
    """This process's share of a split's batches, on a device; they are cut first, then dealt out like cards.

    Nothing is padded or repeated: every expression is in exactly one process's share.

    Args:
        dataset, batch_size, truths, indices: see :class:`data.image_batches.ImageBatches`.
        device: the model's.
        workers, pin_memory: of the loader.
        rank, world_size: this process, of how many.
        done: batches whose expressions are all among these are left out.
    """
    batches = ImageBatches(dataset, batch_size, truths, indices)
    own = batches.remaining(done)[rank::world_size]
    how = {"sampler": own, "batch_size": None, "collate_fn": _as_it_is}
    return DeviceBatches(_loader(batches, workers, pin_memory, seed=(0, rank), **how), device)


def _as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


def _loader(dataset: Dataset, workers: int, pin_memory: bool, *, seed: tuple[int, int], **order: Any) -> DataLoader:
    generator = torch.Generator().manual_seed(
        derive_seed("workers", *seed)
    )  # else each iter() draws from the global one
    return DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=pin_memory and torch.cuda.is_available(),
        generator=generator,
        worker_init_fn=_set_up_worker,
        **order,
    )


def _set_up_worker(worker: int) -> None:
    gc.freeze()  # to look for garbage among what the parent made would copy the memory that is shared with it
    # Schedulers signal every process of a job: a worker that died of it would take the saving process along.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
