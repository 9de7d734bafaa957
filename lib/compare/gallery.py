"""Expressions that are drawn with the masks of all models: where the reference wins and loses most, and its failures.

Expressions are chosen by the mean IoU over the seeds; the masks drawn are those of the first seed.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.transforms import read_image
from lib.compare.charts import PALETTE
from lib.compare.results import ModelResults
from lib.drawing import Drawing
from lib.protocols import PROTOCOLS
from lib.report.analysis import stored_mask
from lib.report.results import Line
from lib.visualize import Cell, Prediction, Style, contact_sheet, mask_cells, panel
from refer.refer import REFER

NUM_EXTREMES, NUM_FAILURES = 6, 12


class Example(NamedTuple):
    """An expression with the target's mask and those of all models."""

    image: Image.Image
    cells: list[Cell]
    sentence: str
    note: str


class Section(NamedTuple):
    """A part of the gallery."""

    title: str
    examples: list[Example]


def make_sections(models: Sequence[ModelResults], reference: str, refer: REFER, protocol: str) -> list[Section]:
    """Choose and draw the expressions of the gallery.

    Args:
        models: results on all splits.
        reference: name of the model that the others are compared with.
        refer: annotations and images.
        protocol: the target masks are those of this protocol.
    """
    gt_mask = PROTOCOLS[protocol].settings()["gt_mask"]
    means = {model.name: model.ious.mean(0) for model in models}  # [n]
    others = [values for name, values in means.items() if name != reference]
    orders = {}
    if others:
        difference = means[reference] - np.mean(others, axis=0)
        for title, sign in (("wins", -1), ("loses", 1)):
            order = [i for i in np.argsort(sign * difference, kind="stable") if sign * difference[i] < 0]
            orders[f"Where {reference} {title} most against the mean of the others"] = (order, NUM_EXTREMES)
    # Among equally bad ones, those with the largest wrong area come first.
    unions = [line["union"] for line in next(model for model in models if model.name == reference).lines[0]]
    orders[f"Worst failures of {reference}"] = (np.lexsort((-np.array(unions), means[reference])), NUM_FAILURES)
    sections = []
    for title, (order, count) in orders.items():
        chosen = choose(order, models[0].lines[0], refer, count)
        sections.append(Section(title, [_draw(models, index, refer, gt_mask) for index in chosen]))
    return [section for section in sections if section.examples]


def choose(order: Iterable[int], lines: Sequence[Line], refer: REFER, count: int) -> list[int]:
    """Return the first ``count`` of the indices, one for each image whose file exists."""
    chosen: dict[int, int] = {}
    for index in order:
        image_id = lines[index]["image_id"]
        if len(chosen) < count and image_id not in chosen and refer.get_image_path(image_id).is_file():
            chosen[image_id] = int(index)
    return list(chosen.values())


def _draw(models: Sequence[ModelResults], index: int, refer: REFER, gt_mask: str) -> Example:
    line = models[0].lines[0][index]
    image = read_image(refer.get_image_path(line["image_id"]))
    target = refer.getMask(line["ref_id"], mode=gt_mask)["mask"].astype(bool)
    predictions = [
        Prediction(
            model.name,
            stored_mask(model.lines[0][index], f"{model.name}: sent_id {line['sent_id']}"),
            float(model.ious[0, index]),
        )
        for model in models
    ]
    note = f"{line['split']}  ref {line['ref_id']}  sentence {line['sent_id']}"
    return Example(image, mask_cells(image, target, predictions, Style(PALETTE)), line["sentence"], note)


def draw_sheet(section: Section) -> Drawing:
    """Return the examples as a contact sheet."""
    return contact_sheet([panel(*example) for example in section.examples])
