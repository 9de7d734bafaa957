"""The one evaluate loop, for validation while training and for test.py, and the one predict()."""

import time
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from lib.metrics import SegmentationMetrics, intersection_and_union
from utils import StoppedError, gather

SECONDS_BETWEEN_LINES = 30
Batch = dict[str, torch.Tensor]


class ExpressionResult(NamedTuple):
    """One expression's pixel counts, by its index in the dataset."""

    index: int
    intersection: int
    union: int


class EvaluationResult(NamedTuple):
    """Every expression once, in the dataset's order; metrics in percent; the predicted masks that were asked for."""

    expressions: list[ExpressionResult]
    metrics: dict[str, float]
    masks: dict[int, np.ndarray]


@torch.inference_mode()
def predict(
    model: nn.Module,
    images: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    size: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Masks of what the sentences mean: bool [B, H, W].

    Args:
        model: a CrossVLT in eval mode.
        images: [B, 3, H, W], preprocessed.
        input_ids, attention_mask: [B, N].
        size: (height, width) of the masks, where it is not the images': the logits are resized, then compared.
    """
    logits = model(images, input_ids, attention_mask, return_similarities=False).mask_logits
    if size is not None:
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    return logits.argmax(1).bool()


def evaluate(
    model: nn.Module,
    batches: Collection[Batch],
    *,
    num_expressions: int,
    keep_masks: Collection[int] = (),
    progress: str | None = None,
    log: Callable[[str], None] | None = None,
    stop_asked: Callable[[], bool] | None = None,
) -> EvaluationResult:
    """Judge every expression exactly once, whatever the number of processes.

    Args:
        model: an unwrapped CrossVLT; left in the mode it was in.
        batches: this process's share, on the model's device: dicts with ``image`` [B, 3, S, S], ``input_ids`` and
            ``attention_mask`` [B, N], ``mask`` [B, S, S] and ``index`` [B], which is on the CPU.
        num_expressions: of all processes together.
        keep_masks: indices whose predicted masks are wanted.
        progress: a title: show a bar on a terminal.
        log: called with a plain line now and then where there is no bar.
        stop_asked: called before each batch, by all processes together, and the same on all: whether to leave.

    Raises:
        StoppedError: ``stop_asked`` said so.
        RuntimeError: an expression was judged twice or not at all.
    """
    was_training = model.training
    model.eval()
    rows, masks = [], {}
    bar = tqdm(total=len(batches), desc=progress, disable=None if progress else True, leave=False, unit="batch")
    last_line = time.monotonic()
    try:
        for number, batch in enumerate(_unless_stopped(batches, stop_asked), 1):
            predicted = predict(model, batch["image"], batch["input_ids"], batch["attention_mask"])
            counts = intersection_and_union(predicted, batch["mask"])
            rows.append(torch.stack([batch["index"], *(count.cpu() for count in counts)], dim=1))
            for index, mask in zip(batch["index"].tolist(), predicted, strict=True):
                if index in keep_masks:
                    masks[index] = mask.cpu().numpy()
            bar.update()
            if log and progress and bar.disable and time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
                log(f"{progress}: {number}/{len(batches)} batches")
                last_line = time.monotonic()
    finally:
        bar.close()
        model.train(was_training)

    own = torch.cat(rows).numpy() if rows else np.empty((0, 3), dtype=np.int64)
    table = np.concatenate(gather(own))
    table = table[np.argsort(table[:, 0], kind="stable")]
    if not np.array_equal(table[:, 0], np.arange(num_expressions)):
        raise RuntimeError(f"{len(table)} results for {num_expressions} expressions: some were judged twice or never")
    metrics = SegmentationMetrics()
    metrics.add(table[:, 1].tolist(), table[:, 2].tolist())
    everyones_masks = {index: mask for part in gather(masks) for index, mask in part.items()} if keep_masks else {}
    return EvaluationResult([ExpressionResult(*row) for row in table.tolist()], metrics.compute(), everyones_masks)


def _unless_stopped(batches: Collection[Batch], stop_asked: Callable[[], bool] | None) -> Iterator[Batch]:
    """The batches, with the question in as many rounds on every process, though one may have a batch less."""
    if stop_asked is None:
        yield from batches
        return
    iterator = iter(batches)
    for _ in range(max(gather(len(batches)))):
        if stop_asked():
            raise StoppedError("stopped while judging: nothing was lost, and nothing has changed")
        batch = next(iterator, None)
        if batch is not None:
            yield batch
