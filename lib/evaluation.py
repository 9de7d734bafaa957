"""Evaluate a model on a split, during training and in test.py, and predict masks.

Shapes: B expressions, N tokens, S the model's image size, H×W the size at which masks are compared.
"""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data.dataset_refer_bert import ReferDataset
from data.loaders import Batch, build_eval_batches
from lib.errors import StoppedError, UserError
from lib.metrics import compute_metrics, intersection_and_union, iou
from lib.protocols import PAPER, Protocol
from refer.masks import encode_mask
from utils import Distributed, gather, on_main, sum_over_processes

LOG = logging.getLogger("crossvlt")
SECONDS_BETWEEN_LINES = 30
SECONDS_BETWEEN_WRITES = 60  # longest work lost if a process is killed
UNKNOWN = -1


class ExpressionResult(NamedTuple):
    """One expression under one protocol."""

    index: int  # in the dataset
    protocol: str
    intersection: int  # pixels
    union: int
    mask: dict[str, Any] | None  # the predicted mask as COCO RLE, if requested


class EvaluationResult(NamedTuple):
    """All expressions under one protocol, in the dataset's order."""

    indices: np.ndarray  # int64 [n]
    counts: np.ndarray  # int64 [n, 2]: intersection, union
    metrics: dict[str, float]  # in percent
    masks: dict[
        int, dict[str, Any]
    ]  # predicted masks (COCO RLE) by index, those of ``keep_masks``, first protocol only

    def iou(self, index: int) -> float:
        """Return the IoU of the expression at ``index``; 0 if the union is empty."""
        return iou(*self.counts[np.searchsorted(self.indices, index)].tolist())


class ResultSink(ABC):
    """Receives results while an evaluation runs, and knows those of an earlier, interrupted run."""

    resume_hint = ""  # how an interrupted evaluation is continued

    @abstractmethod
    def earlier_results(self, split: str) -> Iterable[ExpressionResult]:
        """Return the results of a split that are stored already."""

    @abstractmethod
    def write(self, dataset: ReferDataset, results: Sequence[ExpressionResult]) -> None:
        """Store new results; called on the main process, once for each result."""


@dataclass(frozen=True)
class EvalSetup:
    """Processes and resources of an evaluation. Apart from rounding, results do not depend on them.

    Args:
        dist: this process among all.
        batch_size: expressions per forward pass.
        workers: data-loading processes per process.
        pin_memory: use page-locked memory.
        stop_requested: called before each batch on all processes together; returns the same value on all.
    """

    dist: Distributed
    batch_size: int
    workers: int = 0
    pin_memory: bool = False
    stop_requested: Callable[[], bool] = lambda: False


def evaluate(
    model: nn.Module,
    dataset: ReferDataset,
    protocols: Sequence[Protocol],
    setup: EvalSetup,
    *,
    indices: Iterable[int] | None = None,
    keep_masks: Collection[int] = (),
    sink: ResultSink | None = None,
) -> dict[str, EvaluationResult]:
    """Evaluate every expression of a split exactly once, independent of the number of processes.

    All protocols are evaluated from the same logits. Whatever depends on the image alone is computed once per image.

    Args:
        model: an unwrapped CrossVLT; its training mode is restored afterwards.
        dataset: the split, one sample per sentence.
        protocols: at least one.
        setup: processes and resources.
        indices: of the expressions to evaluate (default: all).
        keep_masks: indices of expressions whose predicted masks are returned, for the first protocol.
        sink: receives each new result once, about every minute. Results that it has already are not computed again.

    Returns:
        results by protocol name, the same on every process.

    Raises:
        StoppedError: ``setup.stop_requested`` returned True; ``sink`` has all results up to there.
        UserError: a batch does not fit into the GPU's memory, or ``sink`` cannot write.
        RuntimeError: an expression was evaluated twice or not at all.
    """
    selected = np.arange(len(dataset)) if indices is None else np.unique(np.fromiter(indices, np.int64))
    results = _Results(dataset, selected, protocols, keep_masks, sink)
    batches = build_eval_batches(
        dataset,
        setup.dist.device,
        batch_size=setup.batch_size,
        workers=setup.workers,
        pin_memory=setup.pin_memory,
        rank=setup.dist.rank,
        world_size=setup.dist.world_size,
        targets=[protocol.target_key for protocol in protocols],
        indices=selected,
        evaluated=results.complete_indices(),
    )
    progress = _ProgressBar(dataset.split, results, show=setup.dist.is_main)
    was_training = model.training
    model.eval()
    try:
        for batch in _same_number_on_all(batches):
            if setup.stop_requested():
                results.exchange()
                hint = f" {sink.resume_hint}" if sink else ""
                raise StoppedError(f"Stopped while evaluating split {dataset.split}.{hint}")
            new = (
                [] if batch is None else _evaluate_batch(model, batch, protocols, setup.batch_size, results.needs_mask)
            )
            progress.update(*results.add(new))
        results.exchange()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{setup.batch_size} expressions do not fit into the GPU's memory. Lower --batch-size."
        ) from error
    finally:
        progress.close()
        model.train(was_training)
    return results.by_protocol()


@torch.inference_mode()
def _evaluate_batch(
    model: nn.Module, batch: Batch, protocols: Sequence[Protocol], batch_size: int, needs_mask: Callable[[int], bool]
) -> list[ExpressionResult]:
    """Return the results of a batch of :class:`data.image_batches.ImageBatches`, at most ``batch_size`` at a time."""
    results = []
    indices, image_of, object_of = batch["index"].tolist(), batch["image_index"], batch["object_index"]
    encoded = model.encode_images(batch["image"])
    for start in range(0, len(indices), batch_size):
        rows = slice(start, start + batch_size)
        logits = model.segment(
            encoded[image_of[rows]],
            batch["input_ids"][rows],
            batch["attention_mask"][rows],
            size=batch["image"].shape[-2:],
        ).mask_logits
        for protocol in protocols:
            targets, objects = batch["targets"][protocol.target_key], object_of[rows]
            if protocol.eval_size == "resized":
                pairs = [(logits, targets[objects])]
            else:  # every image has its own size
                pairs = [(logits[i : i + 1], targets[k][None]) for i, k in enumerate(objects.tolist())]
            remaining = iter(indices[rows])
            for part, target in pairs:
                predicted = logits_to_masks(part, target.shape[-2:], protocol)
                counts = torch.stack(intersection_and_union(predicted, target), dim=1).tolist()
                for (intersection, union), mask in zip(counts, predicted, strict=True):
                    index = next(remaining)
                    rle = encode_mask(mask.cpu().numpy()) if needs_mask(index) else None
                    results.append(ExpressionResult(index, protocol.name, intersection, union, rle))
    return results


def logits_to_masks(logits: torch.Tensor, size: Sequence[int], protocol: Protocol = PAPER) -> torch.Tensor:
    """Turn logits [B, 2, h, w] into masks, bool [B, H, W].

    Args:
        logits: of background and object.
        size: (H, W); logits of another size are resized (bilinear) first.
        protocol: sets the threshold.
    """
    if tuple(logits.shape[-2:]) != tuple(size):
        logits = F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)
    if protocol.threshold is None:
        return logits.argmax(1).bool()
    return logits.softmax(1)[:, 1] >= protocol.threshold


@torch.inference_mode()
def predict(
    model: nn.Module,
    images: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    size: tuple[int, int] | None = None,
    protocol: Protocol = PAPER,
) -> torch.Tensor:
    """Return the masks of the referred objects, bool [B, H, W].

    Args:
        model: a CrossVLT in eval mode.
        images: [B, 3, S, S], preprocessed.
        input_ids, attention_mask: [B, N].
        size: (H, W) of the masks (default: the images' size).
        protocol: how logits become a mask.
    """
    logits = model(images, input_ids, attention_mask).mask_logits
    return logits_to_masks(logits, size or images.shape[-2:], protocol)


@torch.inference_mode()
def alignment_maps(
    model: nn.Module, images: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> list[list[np.ndarray]]:
    """Return the cosine similarity of pixels and sentence: per sentence and stage a float32 map [h, w] (−1…1).

    Args:
        model: a CrossVLT in eval mode.
        images, input_ids, attention_mask: as for :func:`predict`, on any device.
    """
    device = model.temp.device
    inputs = (x.to(device) for x in (images, input_ids, attention_mask))
    similarities = model(*inputs, return_similarities=True).similarities
    cosines = [(stage * temperature).float().cpu() for stage, temperature in zip(similarities, model.temp, strict=True)]
    return [[stage[b, 0].numpy() for stage in cosines] for b in range(len(images))]


def _same_number_on_all(batches: Collection[Batch]) -> Iterator[Batch | None]:
    """Yield the batches, then None until every process has had as many as the process with the most batches."""
    iterator = iter(batches)
    for _ in range(max(gather(len(batches)))):
        yield next(iterator, None)


class _Results:
    """Results of all processes: counts of every expression under every protocol, and the masks to keep.

    Memory does not grow with the number of masks: they are passed on to the sink at every exchange.
    """

    def __init__(
        self,
        dataset: ReferDataset,
        indices: np.ndarray,
        protocols: Sequence[Protocol],
        keep_masks: Collection[int],
        sink: ResultSink | None,
    ) -> None:
        self.dataset, self.indices, self.keep_masks, self.sink = dataset, indices, keep_masks, sink
        self.position = {index: position for position, index in enumerate(indices.tolist())}
        self.row = {protocol.name: row for row, protocol in enumerate(protocols)}
        self.first = protocols[0].name
        self.counts = np.full((len(protocols), len(indices), 2), UNKNOWN, dtype=np.int64)
        self.masks: dict[int, dict[str, Any]] = {}
        self.new: list[ExpressionResult] = []  # of this process, since the last exchange
        for result in on_main(self._read_sink) if sink else []:
            self._count(result)
        self.is_earlier = self.counts[:, :, 0] != UNKNOWN
        self.exchanged_at = time.monotonic()

    def _read_sink(self) -> list[ExpressionResult]:
        return [
            result if result.index in self.keep_masks else result._replace(mask=None)
            for result in self.sink.earlier_results(self.dataset.split)
        ]

    def _place(self, result: ExpressionResult) -> tuple[int, int]:
        if result.index not in self.position:
            raise RuntimeError(f"expression {result.index} was evaluated, but is not among those to evaluate")
        return self.row[result.protocol], self.position[result.index]

    def _count(self, result: ExpressionResult) -> None:
        place = self._place(result)
        if self.counts[place][0] != UNKNOWN:
            raise RuntimeError(f"expression {result.index} was evaluated twice")
        self.counts[place] = result.intersection, result.union
        if result.protocol == self.first and result.index in self.keep_masks:
            self.masks[result.index] = result.mask

    def complete_indices(self) -> set[int]:
        """Return the expressions that have a result under every protocol."""
        return set(self.indices[(self.counts[:, :, 0] != UNKNOWN).all(axis=0)].tolist())

    def needs_mask(self, index: int) -> bool:
        return self.sink is not None or index in self.keep_masks

    def add(self, results: Iterable[ExpressionResult]) -> tuple[int, int, int]:
        """Add a batch of this process. Exchange results if it is time; called on all processes together.

        Returns:
            numbers for the progress bar, over all processes: new expressions, their intersection and union under the
            first protocol.
        """
        # A batch may repeat expressions with an earlier result, because it holds all expressions of its images.
        new = [result for result in results if not self.is_earlier[self._place(result)]]
        self.new += new
        shown = [(result.intersection, result.union) for result in new if result.protocol == self.first]
        due = time.monotonic() - self.exchanged_at > SECONDS_BETWEEN_WRITES
        sums = sum_over_processes([len(shown), sum(i for i, _ in shown), sum(u for _, u in shown), float(due)])
        count, intersection, union, due = map(int, sums)
        if due:
            self.exchange()
        return count, intersection, union

    def exchange(self) -> None:
        """Pass the new results of every process to all processes, and to the sink."""
        everyones = [result for part in gather(self.new) for result in part]
        for result in everyones:
            self._count(result)
        if self.sink is not None:
            on_main(lambda: self.sink.write(self.dataset, everyones))
        self.new.clear()
        self.exchanged_at = time.monotonic()

    def by_protocol(self) -> dict[str, EvaluationResult]:
        missing = len(self.indices) - len(self.complete_indices())
        if missing:
            raise RuntimeError(f"{missing} of {len(self.indices)} expressions were not evaluated")
        found = {}
        for name, row in self.row.items():
            masks = self.masks if name == self.first else {}
            found[name] = EvaluationResult(self.indices, self.counts[row], compute_metrics(self.counts[row]), masks)
        return found


class _ProgressBar:
    """A bar over the expressions of all processes with the overall IoU so far; without a terminal, lines in the log."""

    def __init__(self, title: str, results: _Results, *, show: bool) -> None:
        self.title, self.show, self.total = title, show, len(results.indices)
        earlier = results.counts[0][results.is_earlier[0]]
        self.done = self.initial = len(earlier)
        self.intersection, self.union = earlier.sum(axis=0).tolist()
        self.bar = tqdm(
            total=self.total, initial=self.done, desc=title, disable=None if show else True, leave=False, unit="expr"
        )
        self.started = self.logged_at = time.monotonic()

    def update(self, count: int, intersection: int, union: int) -> None:
        self.done += count
        self.intersection += intersection
        self.union += union
        overall = f"oIoU {100 * iou(self.intersection, self.union):.2f}"
        self.bar.set_postfix_str(overall, refresh=False)
        self.bar.update(count)
        now = time.monotonic()
        if self.show and self.bar.disable and now - self.logged_at > SECONDS_BETWEEN_LINES:
            rate = (self.done - self.initial) / (now - self.started)
            LOG.debug(f"{self.title}: {self.done}/{self.total} expressions, {rate:.1f}/s, {overall} so far")
            self.logged_at = now

    def close(self) -> None:
        self.bar.close()
