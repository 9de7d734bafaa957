"""Evaluations of whole splits, which can be stopped and gone on with; what becomes of them in files."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import nn

from lib.errors import StoppedError
from lib.evaluation import Batch, EvaluationResult, ExpressionResult, evaluate
from lib.metrics import iou
from lib.protocols import Protocol
from lib.report.intervals import intervals
from lib.report.results import Line, ResultFile
from utils import on_main

Masks = dict[int, dict[str, Any]]


def judge_splits(
    model: nn.Module,
    datasets: Mapping[str, Any],
    protocols: Sequence[Protocol],
    *,
    make_batches: Callable[[Any, Collection[int]], Collection[Batch]],
    batch_size: int,
    drawn: Mapping[str, Collection[int]],
    only_drawn: bool = False,
    file: ResultFile | None = None,
    show_progress: bool = False,
    log: Callable[[str], None] | None = None,
    stop_requested: Callable[[], bool] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Iterator[tuple[str, dict[str, EvaluationResult]]]:
    """Evaluate a model on splits, one after the other; gives each one's results by protocol as soon as it has them.

    Args:
        model: a CrossVLT.
        datasets: a ReferDataset per split.
        protocols: by which each is judged.
        make_batches: of a dataset, this process's share of the batches that hold what isn't done yet.
        batch_size: the most expressions of a forward pass.
        drawn: per split the indices of those whose masks (by the first protocol) the results keep.
        only_drawn: judge no others.
        file: takes every result; where it has been begun before, the evaluation goes on. Whole after the last split.
        show_progress: on this process.
        log, stop_requested, group: see :func:`lib.evaluation.evaluate`.

    Raises:
        StoppedError: ``stop_requested`` said so; it says how to go on.
        KeyboardInterrupt: the same where there is no file, so that nothing is kept.
        UserError: the file can't be written, or is another evaluation's.
    """
    known, kept = on_main(lambda: _begun(file, protocols, drawn)) if file else ({}, {})
    for split, dataset in datasets.items():
        rows = known.get(split, np.empty((0, 4), np.int64))
        indices, times = np.unique(rows[:, 0], return_counts=True)
        done = set(indices[times == len(protocols)].tolist())
        try:
            results = evaluate(
                model,
                make_batches(dataset, done),
                indices=drawn[split] if only_drawn else range(len(dataset)),
                batch_size=batch_size,
                protocols=protocols,
                keep_masks=drawn.get(split, ()),
                report_masks=file is not None,
                known=rows,
                report=_reporter(file, dataset) if file else None,
                progress=split if show_progress else None,
                log=log,
                stop_requested=stop_requested,
                group=group,
            )
        except StoppedError as error:
            if file is None:
                raise KeyboardInterrupt from error
            told = f"stopped in split {split}: {file.partial} has what was done, and the same command goes on"
            raise StoppedError(told) from error
        results[protocols[0].name].masks.update(kept.get(split, {}))
        if file and split == list(datasets)[-1]:
            on_main(file.finish)
        yield split, results


def _begun(
    file: ResultFile, protocols: Sequence[Protocol], drawn: Mapping[str, Collection[int]]
) -> tuple[dict[str, np.ndarray], dict[str, Masks]]:
    """What a result file has already: rows as ``evaluate`` takes them, and the masks to be drawn, by split."""
    file.begin()
    names = [protocol.name for protocol in protocols]
    rows, masks = defaultdict(list), defaultdict(dict)
    for line in file.lines():
        split, index = line["split"], line["index"]
        rows[split].append((index, names.index(line["protocol"]), line["intersection"], line["union"]))
        if line["protocol"] == names[0] and index in drawn.get(split, ()):
            masks[split][index] = line["mask"]
    return {split: np.array(found, dtype=np.int64) for split, found in rows.items()}, dict(masks)


def _reporter(file: ResultFile, dataset: Any) -> Callable[[list[ExpressionResult]], None]:
    return lambda results: file.append(_line(dataset, result) for result in results)


def _line(dataset: Any, result: ExpressionResult) -> Line:
    """A result as its line in a result file."""
    expression = dataset.expressions[result.index]
    return {
        "dataset": dataset.name,
        "split_by": dataset.split_by,
        "split": dataset.split,
        "protocol": result.protocol,
        "index": result.index,
        "image_id": expression.image_id,
        "ref_id": expression.ref_id,
        "ann_id": expression.ann_id,
        "sent_id": expression.sent_id,
        "sentence": expression.sentence,
        "intersection": result.intersection,
        "union": result.union,
        "iou": iou(result.intersection, result.union),
        "mask": result.mask,
    }


def summary(dataset: Any, protocol: Protocol, result: EvaluationResult, settings: dict[str, Any]) -> dict[str, Any]:
    """A split's metrics by one protocol, with their 95 % intervals over images, for ``--json``."""
    images = [dataset.expressions[index].image_id for index in result.indices]
    return {
        "dataset": settings["dataset"],
        "split_by": settings["split_by"],
        "split": dataset.split,
        "protocol": protocol.name,
        "num_expressions": len(dataset),
        "metrics": result.metrics,
        "interval_95": intervals(images, result.counts),
        "settings": {**settings, "protocol": protocol.settings()},
    }
