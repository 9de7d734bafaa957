"""Figures of results: a panel per expression, models side by side, and a sheet of them all."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from lib.evaluation import EvaluationResult, alignment_maps
from lib.files import atomic_write
from lib.visualize import Prediction, expression_panel, sheet
from refer.masks import decode_mask

MAX_PANELS = 60


class Judged(NamedTuple):
    """A model's results on a split: ``result`` keeps the masks of what is to be drawn."""

    name: str
    dataset: Any  # a ReferDataset
    result: EvaluationResult
    gt_mask: str = "paper"  # which true masks are drawn
    maps: Mapping[int, list[np.ndarray]] | None = None  # the alignment maps of what is to be drawn, by index


def spread(length: int, number: int) -> list[int]:
    """At most ``number`` of the first ``length`` integers, evenly spread."""
    return np.unique(np.linspace(0, length - 1, min(number, length)).astype(int)).tolist()


def distinct_names(paths: Sequence[str]) -> list[str]:
    """Files' names without folder and ending, or with their folder's where that doesn't tell them apart."""
    for names in (
        [Path(path).stem for path in paths],
        [f"{Path(path).parent.name}/{Path(path).stem}" for path in paths],
    ):
        if len(set(names)) == len(names):
            return names
    return list(paths)


def maps_of(
    model: nn.Module, dataset: Any, indices: Iterable[int], normalize: Callable[[torch.Tensor], torch.Tensor]
) -> dict[int, list[np.ndarray]]:
    """The four alignment maps of some expressions; ``normalize`` makes of a dataset's picture the model's."""
    maps = {}
    for index in indices:
        sample = dataset[index]
        inputs = (normalize(sample["image"]), sample["input_ids"], sample["attention_mask"])
        maps[index] = alignment_maps(model, *(one[None] for one in inputs))[0]
    return maps


def result_panel(judged: Sequence[Judged], index: int) -> Image.Image:
    """Picture, truth and each model's prediction of one expression."""
    dataset = judged[0].dataset
    expression = dataset.expressions[index]
    predictions = [
        Prediction(
            one.name, decode_mask(one.result.masks[index]), one.result.iou(index), one.maps[index] if one.maps else None
        )
        for one in judged
    ]
    truth = dataset.full_size_mask(index, judged[0].gt_mask).astype(bool)
    note = f"{dataset.split}  ref {expression.ref_id}  sentence {expression.sent_id}"
    return expression_panel(dataset.load_image(index), truth, predictions, expression.sentence, note)


def draw(judged: Sequence[Judged], indices: Sequence[int], folder: Path) -> Path:
    """Write a panel per index and a sheet of them, or of the first ``MAX_PANELS``; gives back the sheet.

    UserError: they can't be written.
    """
    dataset, panels = judged[0].dataset, []
    for index in indices:
        expression, panel = dataset.expressions[index], result_panel(judged, index)
        name = f"{dataset.split}_{index:06d}_ref{expression.ref_id}_sent{expression.sent_id}.png"
        save_image(panel, folder / name)
        if len(panels) < MAX_PANELS:
            panels.append(panel)
    path = folder / f"{dataset.split}_sheet.png"
    save_image(sheet(panels), path)
    return path


def save_image(picture: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with atomic_write(path) as aside:
        picture.save(aside, format="PNG")
