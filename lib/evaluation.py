"""The one evaluate loop, for validation while training and for test.py, and the one predict().

Letters: P pictures, R objects, B expressions, S the pictures' side, N tokens; H×W the size masks are judged at.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from lib.errors import StoppedError, UserError
from lib.metrics import compute_metrics, intersection_and_union, iou
from lib.protocols import PAPER, Protocol
from refer.masks import encode_mask
from utils import gather, sum_over_processes

SECONDS_BETWEEN_LINES = 30
SECONDS_BETWEEN_REPORTS = 60  # what at most is lost when a process is killed
Batch = dict[str, Any]
UNKNOWN = -1


class ExpressionResult(NamedTuple):
    """One expression under one protocol."""

    index: int  # in the dataset
    protocol: str
    intersection: int  # pixels
    union: int
    mask: dict[str, Any] | None  # the prediction as COCO RLE, where it was asked for


class EvaluationResult(NamedTuple):
    """Every expression once under one protocol, in the dataset's order."""

    indices: np.ndarray  # int64 [n]
    counts: np.ndarray  # int64 [n, 2]: intersection, union
    metrics: dict[str, float]  # in percent
    masks: dict[int, dict[str, Any]]  # COCO RLE by index, of those that were to be kept (the first protocol's)

    def iou(self, index: int) -> float:
        """The IoU of the expression at ``index``, 0 where the union is empty."""
        return iou(*self.counts[np.searchsorted(self.indices, index)].tolist())


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
    """Masks of what the sentences mean: bool [B, H, W].

    Args:
        model: a CrossVLT in eval mode.
        images: [B, 3, S, S], preprocessed.
        input_ids, attention_mask: [B, N].
        size: (H, W) of the masks, where it is not the images': the logits are resized, then compared.
        protocol: says how logits become a mask.
    """
    logits = model(images, input_ids, attention_mask, return_similarities=False).mask_logits
    return protocol.predicted(logits, tuple(size or images.shape[-2:]))


@torch.inference_mode()
def alignment_maps(
    model: nn.Module, images: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> list[list[np.ndarray]]:
    """What ties pixels and sentence at each stage, for each of B sentences: four float32 [h, w] of cosines (−1…1).

    Args:
        model: a CrossVLT in eval mode.
        images, input_ids, attention_mask: as for :func:`predict`, on any device.
    """
    device = model.temp.device
    inputs = (x.to(device) for x in (images, input_ids, attention_mask))
    similarities = model(*inputs, return_similarities=True).similarities
    cosines = [(stage * temperature).float().cpu() for stage, temperature in zip(similarities, model.temp, strict=True)]
    return [[stage[b, 0].numpy() for stage in cosines] for b in range(len(images))]


def evaluate(
    model: nn.Module,
    batches: Collection[Batch],
    *,
    indices: Sequence[int] | np.ndarray,
    batch_size: int,
    protocols: Sequence[Protocol] = (PAPER,),
    keep_masks: Collection[int] = (),
    report_masks: bool = False,
    share_images: bool = True,
    known: np.ndarray | None = None,
    report: Callable[[list[ExpressionResult]], None] | None = None,
    progress: str | None = None,
    log: Callable[[str], None] | None = None,
    stop_requested: Callable[[], bool] | None = None,
    group: dist.ProcessGroup | None = None,
) -> dict[str, EvaluationResult]:
    """Judge every expression exactly once, whatever the number of processes.

    Args:
        model: an unwrapped CrossVLT; left in the mode it was in.
        batches: this process's share, on the model's device; see :class:`data.image_batches.ImageBatches`.
        indices: of all expressions that all processes together judge, ascending.
        batch_size: the most expressions of a forward pass.
        protocols: each is judged of the same logits.
        keep_masks: indices whose predicted masks by the first protocol its result keeps.
        report_masks: whether ``report`` gets every predicted mask.
        share_images: compute what depends on the picture alone once per picture, not once per expression.
        known: what an earlier evaluation has found, which ``batches`` needn't have: int64 [k, 4] of index, number of
            the protocol, intersection, union.
        report: called now and then on the main process with what is new since, from all processes; every result of
            ``batches`` that isn't known comes by once.
        progress: a title: show a bar, or call ``log`` now and then where there is no terminal.
        log: called with a line.
        stop_requested: called before each batch, by all processes together, and the same on all: whether to leave.
        group: joins the processes for exchanging numbers on the CPU (:func:`utils.cpu_group`).

    Returns:
        by the protocols' names, the same on every process.

    Raises:
        StoppedError: ``stop_requested`` said so; everything until then was reported.
        UserError: a batch doesn't fit into the GPU's memory.
        RuntimeError: an expression was judged twice or not at all.
    """
    tally = _Tally(np.asarray(indices, dtype=np.int64), protocols, known)
    new: list[ExpressionResult] = []
    first, masks = protocols[0].name, {}
    wanted = range(int(indices[-1]) + 1) if report_masks else keep_masks
    line = _ProgressLine(progress, tally, log)
    reported_at = time.monotonic()

    def exchange() -> None:
        nonlocal reported_at
        everyones = [result for part in gather(new) for result in part if tally.add(result)]
        for result in everyones:
            if result.protocol == first and result.index in keep_masks:
                masks[result.index] = result.mask
        if report is not None and (not dist.is_initialized() or dist.get_rank() == 0):
            report(everyones)
        new.clear()
        reported_at = time.monotonic()

    was_training = model.training
    model.eval()
    try:
        for batch in _in_rounds(batches):
            if stop_requested is not None and stop_requested():
                exchange()
                raise StoppedError("stopped while judging: nothing was lost, and nothing has changed")
            try:
                done = [] if batch is None else _judged(model, batch, protocols, batch_size, wanted, share_images)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"the GPU's memory doesn't hold {batch_size} expressions: lower --batch-size"
                ) from error
            new += done
            counts = [
                (result.intersection, result.union)
                for result in done
                if result.protocol == first and not tally.is_known(result)
            ]
            due = time.monotonic() - reported_at > SECONDS_BETWEEN_REPORTS
            news = [len(counts), sum(i for i, _ in counts), sum(u for _, u in counts), due]
            *sums, due = sum_over_processes([float(number) for number in news], group)
            line.add(*map(int, sums))
            if due:
                exchange()
        exchange()
    finally:
        line.close()
        model.train(was_training)
    return tally.results({first: masks})


@torch.inference_mode()
def _judged(
    model: nn.Module,
    batch: Batch,
    protocols: Sequence[Protocol],
    batch_size: int,
    keep_masks: Collection[int],
    share_images: bool,
) -> list[ExpressionResult]:
    """The results of a batch, in its order."""
    results, indices = [], batch["index"].tolist()
    for rows, logits in _logits(model, batch, batch_size, share_images):
        objects = batch["object_index"][rows]
        for protocol in protocols:
            truths = batch["targets"][protocol.truth]
            if protocol.eval_size == "resized":
                parts = [(logits, truths[objects])]
            else:  # every picture has a size of its own
                parts = [(logits[i : i + 1], truths[k][None]) for i, k in enumerate(objects.tolist())]
            place = rows.start
            for part, truth in parts:
                predicted = protocol.predicted(part, tuple(truth.shape[-2:]))
                counts = torch.stack(intersection_and_union(predicted, truth), dim=1).tolist()
                for (intersection, union), mask in zip(counts, predicted, strict=True):
                    kept = encode_mask(mask.cpu().numpy()) if indices[place] in keep_masks else None
                    results.append(ExpressionResult(indices[place], protocol.name, intersection, union, kept))
                    place += 1
    return results


def _logits(
    model: nn.Module, batch: Batch, batch_size: int, share_images: bool
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Logits [b, 2, S, S] of at most ``batch_size`` successive expressions at a time."""
    images, of = batch["image"], batch["image_index"]
    encoded = model.encode_images(images) if share_images else None
    for start in range(0, len(of), batch_size):
        rows = slice(start, start + batch_size)
        inputs = (batch["input_ids"][rows], batch["attention_mask"][rows])
        if encoded is None:
            output = model(images[of[rows]], *inputs, return_similarities=False)
        else:
            output = model.segment(encoded[of[rows]], *inputs, size=images.shape[-2:], return_similarities=False)
        yield rows, output.mask_logits


def _in_rounds(batches: Collection[Batch]) -> Iterator[Batch | None]:
    """The batches, and None once they are done, as often on every process, though one may have a batch less."""
    iterator = iter(batches)
    for _ in range(max(gather(len(batches)))):
        yield next(iterator, None)


class _Tally:
    """Pixel counts of every expression under every protocol: as large before the first as after the last."""

    def __init__(self, indices: np.ndarray, protocols: Sequence[Protocol], known: np.ndarray | None) -> None:
        self.indices, self.names = indices, [protocol.name for protocol in protocols]
        self.counts = np.full((len(protocols), len(indices), 2), UNKNOWN, dtype=np.int64)
        if known is not None and len(known):
            self.counts[known[:, 1], self._places(known[:, 0])] = known[:, 2:]
        self.known = self.counts[:, :, 0] != UNKNOWN

    def _places(self, indices: np.ndarray) -> np.ndarray:
        places = np.searchsorted(self.indices, indices).clip(max=len(self.indices) - 1)
        if not np.array_equal(self.indices[places], indices):
            raise RuntimeError("an expression was judged that isn't among those to be judged")
        return places

    def _place(self, result: ExpressionResult) -> tuple[int, int]:
        return self.names.index(result.protocol), int(self._places(np.array([result.index]))[0])

    def is_known(self, result: ExpressionResult) -> bool:
        """Whether it was known beforehand: a batch may be computed again for the sake of one expression."""
        return bool(self.known[self._place(result)])

    def add(self, result: ExpressionResult) -> bool:
        """Count a result, unless it is known: whether it is news."""
        if self.is_known(result):
            return False
        protocol, place = self._place(result)
        if self.counts[protocol, place, 0] != UNKNOWN:
            raise RuntimeError(f"expression {result.index} was judged twice")
        self.counts[protocol, place] = result.intersection, result.union
        return True

    def results(self, masks: dict[str, dict[int, dict[str, Any]]]) -> dict[str, EvaluationResult]:
        never = int((self.counts[:, :, 0] == UNKNOWN).any(axis=0).sum())
        if never:
            raise RuntimeError(f"{never} of {len(self.indices)} expressions were never judged")
        found = {}
        for name, counts in zip(self.names, self.counts, strict=True):
            found[name] = EvaluationResult(self.indices, counts, compute_metrics(counts), masks.get(name, {}))
        return found


class _ProgressLine:
    """A bar over all processes' expressions with the overall IoU so far, or a plain line now and then."""

    def __init__(self, title: str | None, tally: _Tally, log: Callable[[str], None] | None) -> None:
        self.title, self.log, self.total = title, log, len(tally.indices)
        self.intersection, self.union = np.where(tally.known[0, :, None], tally.counts[0], 0).sum(0).tolist()
        done = int(tally.known[0].sum())
        self.bar = tqdm(
            total=self.total, initial=done, desc=title, disable=None if title else True, leave=False, unit="expr"
        )
        self.done, self.begun_with, self.begun = done, done, time.monotonic()
        self.told = self.begun

    def add(self, expressions: int, intersection: int, union: int) -> None:
        self.done += expressions
        self.intersection, self.union = self.intersection + intersection, self.union + union
        overall = f"oIoU {100 * iou(self.intersection, self.union):.2f}"
        self.bar.set_postfix_str(overall, refresh=False)
        self.bar.update(expressions)
        now = time.monotonic()
        if self.title and self.log and self.bar.disable and now - self.told > SECONDS_BETWEEN_LINES:
            rate = (self.done - self.begun_with) / (now - self.begun)
            self.log(f"{self.title}: {self.done}/{self.total} expressions, {rate:.1f}/s, {overall} so far")
            self.told = now

    def close(self) -> None:
        self.bar.close()
