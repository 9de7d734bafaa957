"""Kinds of expressions: what a sentence names, how long it is, how large its object is, how many distractors it has.

The words are those of RefShapes (data/refshapes/language.py) and common ones of RefCOCO; they are English.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data.refshapes.objects import COLORS, SHAPES
from lib.report.results import Line
from refer.refer import REFER

# The first entry with a word in the sentence is its property: a relation is usually combined with the others.
WORDS = {
    "relation": "above below under behind between near beside next of",  # "left of", "next to", "in front of"
    "position": "left right top bottom middle center upper lower leftmost rightmost topmost bottommost front back "
    "corner",
    "size": "small medium large big tall short little tiny huge biggest largest smallest bigger larger smaller tallest",
    "color": " ".join(COLORS) + " white black gray grey brown pink",
    "shape": " ".join(SHAPES),
}
OTHER = "other"
LENGTHS = {"1–2": 2, "3–4": 4, "5–6": 6, "7–9": 9, "10 or more": np.inf}  # largest number of words
SIZES = ("smallest third", "middle third", "largest third")
DISTRACTORS = {"0": 0, "1": 1, "2": 2, "3 or more": np.inf}  # largest number


class Grouping(NamedTuple):
    """A division of n expressions into groups."""

    title: str
    groups: dict[str, np.ndarray]  # indices of the expressions, by the name of the group; none is empty


def groupings(lines: Sequence[Line], refer: REFER | None) -> list[Grouping]:
    """Return how the expressions are divided. Without annotations (``refer``), only by their sentences."""
    properties = np.array([property_of(line["sentence"]) for line in lines])
    found = [
        _by_name("Property that the sentence names", properties, [*WORDS, OTHER]),
        _by_limit("Words of the sentence", [len(line["sentence"].split()) for line in lines], LENGTHS),
    ]
    if refer is not None:
        ref_ids = list(dict.fromkeys(line["ref_id"] for line in lines))
        size_of = {ref_id: float(refer.getMask(ref_id)["mask"].mean()) for ref_id in ref_ids}
        rivals_of = {ref_id: distractors(refer, ref_id) for ref_id in ref_ids}
        sizes = np.array([100 * size_of[line["ref_id"]] for line in lines])
        thirds = np.quantile(sizes, [1 / 3, 2 / 3])
        names = [f"{name}\n{limit}" for name, limit in zip(SIZES, _ranges(thirds), strict=True)]
        limits = dict(zip(names, [*thirds, np.inf], strict=True))
        found.append(_by_limit("Size of the object, % of the image", sizes, limits))
        rivals = [rivals_of[line["ref_id"]] for line in lines]
        found.append(_by_limit("Other objects of the same shape or category", rivals, DISTRACTORS))
    return found


def property_of(sentence: str) -> str:
    """Return the most complex property that a sentence names, a key of ``WORDS`` or ``OTHER``."""
    words = set(re.findall(r"\w+", sentence.lower()))
    return next((name for name, listed in WORDS.items() if words & set(listed.split())), OTHER)


def distractors(refer: REFER, ref_id: int) -> int:
    """Return the number of other annotated objects in the image of the same category (in RefShapes: shape)."""
    ref = refer.Refs[ref_id]
    return sum(
        other["category_id"] == ref["category_id"] and other["id"] != ref["ann_id"]
        for other in refer.imgToAnns[ref["image_id"]]
    )


def _ranges(thirds: np.ndarray) -> list[str]:
    low, high = (f"{value:.2g}" for value in thirds)
    return [f"up to {low}", f"{low}–{high}", f"over {high}"]


def _by_name(title: str, names: np.ndarray, order: Sequence[str]) -> Grouping:
    groups = {name: np.flatnonzero(names == name) for name in order}
    return Grouping(title, {name: indices for name, indices in groups.items() if len(indices)})


def _by_limit(title: str, values: Sequence[float], limits: dict[str, float]) -> Grouping:
    """Put each value into the first group whose limit is not below it."""
    names = np.array(list(limits))
    return _by_name(title, names[np.searchsorted(list(limits.values()), values)], list(limits))
