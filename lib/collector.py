"""Collect the results of an evaluation from all processes: pixel counts, masks to keep, and a file to write to."""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from data.dataset_refer_bert import ReferDataset
from lib.errors import CommonError
from lib.metrics import compute_metrics, iou
from lib.protocols import Protocol
from lib.terminal import draws_bars
from utils import gather, on_main, sum_over_processes

LOG = logging.getLogger("crossvlt")
SECONDS_BETWEEN_LINES = 30
SECONDS_BETWEEN_WRITES = 60  # longest work lost if a process is killed
UNKNOWN = -1


class ExpressionResult(NamedTuple):
    """Result of one expression under one protocol."""

    index: int  # in the dataset
    protocol: str
    intersection: int  # pixels
    union: int
    mask: dict[str, Any] | None  # the predicted mask as COCO RLE, if requested


class EvaluationResult(NamedTuple):
    """Results of all expressions under one protocol, in the order of the dataset."""

    indices: np.ndarray  # int64 [n]
    counts: np.ndarray  # int64 [n, 2]: intersection, union
    metrics: dict[str, float]  # in percent
    masks: dict[int, dict[str, Any]]  # COCO RLE by index: the requested masks of the first protocol

    def iou(self, index: int) -> float:
        """Return the IoU of the expression at ``index``; 0 if the union is empty."""
        return iou(*self.counts[np.searchsorted(self.indices, index)].tolist())


class ResultSink(ABC):
    """Store results while an evaluation runs, and return those of an earlier, interrupted evaluation."""

    resume_hint = ""  # added to the message of an interrupted evaluation

    @abstractmethod
    def earlier_results(self, split: str) -> Iterable[ExpressionResult]:
        """Return the results of a split that are already stored."""

    @abstractmethod
    def write(self, dataset: ReferDataset, results: Sequence[ExpressionResult]) -> None:
        """Store new results. Called on the main process; each result is passed exactly once."""


class Collector:
    """Collect the results of all processes: pixel counts for each expression and protocol, and the masks to keep.

    All other masks are only passed to the sink, so memory use does not grow with the split.

    Args:
        dataset, protocols, keep_masks, sink: see :func:`lib.evaluation.evaluate`.
        indices: expressions to evaluate, int64 [n], ascending.
    """

    def __init__(
        self,
        dataset: ReferDataset,
        indices: np.ndarray,
        protocols: Sequence[Protocol],
        keep_masks: Collection[int],
        sink: ResultSink | None,
    ) -> None:
        self.dataset, self.indices, self.keep_masks, self.sink = dataset, indices, set(keep_masks), sink
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
            raise RuntimeError(f"Expression {result.index} was evaluated, but was not requested.")
        return self.row[result.protocol], self.position[result.index]

    def _count(self, result: ExpressionResult) -> None:
        row, position = self._place(result)
        if self.counts[row, position, 0] != UNKNOWN:
            raise RuntimeError(f"Expression {result.index} was evaluated twice.")
        self.counts[row, position] = result.intersection, result.union
        if result.protocol == self.first and result.index in self.keep_masks:
            self.masks[result.index] = result.mask

    def complete_indices(self) -> set[int]:
        """Return the expressions that have a result under every protocol."""
        return set(self.indices[(self.counts[:, :, 0] != UNKNOWN).all(axis=0)].tolist())

    def needs_mask(self, index: int) -> bool:
        """Return whether the predicted masks of an expression are needed for the sink or the caller."""
        return self.sink is not None or index in self.keep_masks

    def add(self, results: Iterable[ExpressionResult], failure: str = "") -> tuple[int, int, int]:
        """Add a batch of this process, and exchange results if it is time. All processes must call it.

        Args:
            results: of the batch.
            failure: why the batch could not be evaluated; empty if it was.

        Returns:
            the number of new expressions of all processes, and their total intersection and union under the first
            protocol (for the progress bar).

        Raises:
            CommonError: a process has a failure. The sink has all other results.
        """
        # A batch contains all expressions of its images, including those that have an earlier result.
        new = [result for result in results if not self.is_earlier[self._place(result)]]
        self.new += new
        counts = [(result.intersection, result.union) for result in new if result.protocol == self.first]
        due = time.monotonic() - self.exchanged_at > SECONDS_BETWEEN_WRITES
        totals = [len(counts), sum(i for i, _ in counts), sum(u for _, u in counts)]
        count, intersection, union, due, failed = map(int, sum_over_processes([*totals, float(due), bool(failure)]))
        if due or failed:
            self.exchange()
        if failed:
            raise CommonError(next(filter(None, gather(failure))))
        return count, intersection, union

    def exchange(self) -> None:
        """Send the new results of each process to all processes and to the sink. All processes must call it."""
        gathered = [result for part in gather(self.new) for result in part]
        for result in gathered:
            self._count(result)
        if self.sink is not None:
            on_main(lambda: self.sink.write(self.dataset, gathered))
        self.new.clear()
        self.exchanged_at = time.monotonic()

    def results(self) -> dict[str, EvaluationResult]:
        """Return the results by protocol name. RuntimeError: an expression has no result."""
        missing = len(self.indices) - len(self.complete_indices())
        if missing:
            raise RuntimeError(f"{missing} of {len(self.indices)} expressions were not evaluated.")
        results = {}
        for name, row in self.row.items():
            masks = self.masks if name == self.first else {}
            results[name] = EvaluationResult(self.indices, self.counts[row], compute_metrics(self.counts[row]), masks)
        return results


class ProgressBar:
    """Progress of all processes with the overall IoU so far: a bar, or log lines without a terminal."""

    def __init__(self, title: str, collector: Collector, *, show: bool) -> None:
        self.title, self.show, self.total = title, show, len(collector.indices)
        earlier = collector.counts[0][collector.is_earlier[0]]
        self.done = self.initial = len(earlier)
        self.intersection, self.union = earlier.sum(axis=0).tolist()
        if show and self.done:
            rest = self.total - self.done
            LOG.info(f"{title}: continuing, {self.done} of {self.total} expressions are evaluated, {rest} remain")
        self.bar = tqdm(
            total=self.total,
            initial=self.done,
            desc=title,
            disable=not (show and draws_bars()),
            leave=False,
            unit="expr",
        )
        self.started = self.logged_at = time.monotonic()

    def update(self, count: int, intersection: int, union: int) -> None:
        """Add the numbers returned by :meth:`Collector.add`."""
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
