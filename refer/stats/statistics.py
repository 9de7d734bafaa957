"""Statistics of a dataset's splits: sentences, objects, masks, and images that splits share.

Splits are those of :meth:`refer.refer.REFER.splits`: ``testA`` and ``testB`` of RefCOCO are two splits, and there is no
split ``test`` that contains both.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from lib.errors import UserError
from lib.terminal import draws_bars
from lib.variants import MAX_TOKENS
from refer.annotations import Record
from refer.masks import is_number
from refer.refer import REFER

AREA_TOLERANCE = 0.01  # accepted difference between a stored area and the mask's, relative to the mask's


class MeasuredObject(NamedTuple):
    """Measurements of one annotation's mask; areas in pixels."""

    area: int  # of the union of all parts
    overlap: int  # covered by several parts, which are holes in masks of the mode "paper"
    parts: int  # polygons or RLEs
    image_area: int
    stored_area: float | None  # `area` of the annotation, if it is a number


@dataclass(eq=False)  # compared by identity, so that it can be a dictionary key
class SplitStatistics:
    """Statistics of one split of one dataset. An object of several refs is counted once."""

    dataset: str
    split_by: str
    name: str  # of the split
    max_tokens: int  # token ids that a model keeps of a sentence
    expressions_per_ref: Counter[int] = field(default_factory=Counter)
    expressions_per_image: Counter[str] = field(default_factory=Counter)  # by REFER.image_keys
    categories: set[int] = field(default_factory=set)
    words: list[int] = field(default_factory=list)  # of each expression, separated by white space
    tokens: list[int] = field(default_factory=list)  # of each expression, with [CLS] and [SEP]; empty: no tokenizer
    ambiguous: int = 0  # expressions that also refer to another object of the image, in any split
    objects: dict[int, MeasuredObject] = field(default_factory=dict)  # by annotation id
    errors: dict[int, str] = field(default_factory=dict)  # error messages of the objects whose masks are invalid

    @property
    def title(self) -> str:
        return f"{self.dataset} ({self.split_by})"

    @property
    def size_percent(self) -> list[float]:
        """Area of each object in percent of its image."""
        return [100 * item.area / item.image_area for item in self.objects.values()]

    @cached_property
    def summary(self) -> dict[str, Any]:
        """All numbers as ``--json`` writes them. A number that cannot be computed is None."""
        objects, num_expressions = self.objects.values(), len(self.words)
        overlapping = [item for item in objects if item.overlap]
        stored = [item for item in objects if item.stored_area is not None]
        is_wrong = [abs(item.stored_area - item.area) > AREA_TOLERANCE * item.area for item in stored]
        lost, covered = sum(item.overlap for item in overlapping), sum(item.area for item in overlapping)
        cut = sum(number > self.max_tokens for number in self.tokens)
        return {
            "dataset": self.dataset,
            "splitBy": self.split_by,
            "split": self.name,
            "refs": len(self.expressions_per_ref),
            "expressions": num_expressions,
            "images": len(self.expressions_per_image),
            "categories": len(self.categories),
            "expressions_per_ref": _distribution([*self.expressions_per_ref.values()]),
            "words": _distribution(self.words),
            "tokens": _distribution(self.tokens),
            "cut": _share(cut, num_expressions) if self.tokens else None,
            "ambiguous": _share(self.ambiguous, num_expressions),
            "objects": len(objects) + len(self.errors),
            "size_percent": _distribution(self.size_percent),
            "several_parts": _share(sum(item.parts > 1 for item in objects), len(objects)),
            "overlap": _share(len(overlapping), len(objects)) | {"pixels_lost_percent": percent(lost, covered)},
            "stored_area_off": _share(sum(is_wrong), len(stored)),
            "empty_masks": sum(item.area == 0 for item in objects),
            "undrawable": {"count": len(self.errors), "first": next(iter(self.errors.values()), None)},
        }


def statistics_of(
    refer: REFER,
    count_tokens: Callable[[list[str]], Sequence[int]] | None = None,
    *,
    max_tokens: int = MAX_TOKENS,
    known_objects: dict[int, MeasuredObject | str] | None = None,
) -> list[SplitStatistics]:
    """Return the statistics of every split of a dataset, in the order of REFER.splits().

    Args:
        refer: the annotations. Image files are not needed.
        count_tokens: returns the number of tokens of each sentence, with [CLS] and [SEP]; None: no tokenizer.
        max_tokens: number of token ids that a model keeps.
        known_objects: measured objects, or their error messages, by annotation id. The function adds to it. Pass the
            same dictionary for another split system of the dataset, and no mask is rasterized twice.
    """
    known_objects = {} if known_objects is None else known_objects
    splits = {name: SplitStatistics(refer.dataset, refer.splitBy, name, max_tokens) for name in refer.splits()}
    image_keys = refer.image_keys()
    same_sentence = defaultdict(set)  # (image, sentence): annotation ids of the objects it refers to
    for ref in tqdm(
        refer.data["refs"], desc=f"{refer.dataset} ({refer.splitBy})", unit="ref", disable=not draws_bars()
    ):
        ann_id, split = ref["ann_id"], splits[ref["split"]]
        if ann_id not in known_objects:
            known_objects[ann_id] = _measure_object(refer, ref)
        if isinstance(known_objects[ann_id], str):
            split.errors[ann_id] = known_objects[ann_id]
        else:
            split.objects[ann_id] = known_objects[ann_id]
        split.categories.add(refer.refToAnn[ref["ref_id"]]["category_id"])
        split.expressions_per_ref[ref["ref_id"]] = len(ref["sentences"])
        split.expressions_per_image[image_keys[ref["image_id"]]] += len(ref["sentences"])
        for sentence in _sentences_of(ref):
            same_sentence[image_keys[ref["image_id"]], _normalized(sentence)].add(ann_id)
    for split in splits.values():
        refs = [ref for ref in refer.data["refs"] if ref["split"] == split.name]
        pairs = [(image_keys[ref["image_id"]], sentence) for ref in refs for sentence in _sentences_of(ref)]
        split.words = [len(sentence.split()) for _, sentence in pairs]
        split.tokens = list(count_tokens([sentence for _, sentence in pairs])) if count_tokens else []
        split.ambiguous = sum(len(same_sentence[image, _normalized(sentence)]) > 1 for image, sentence in pairs)
    return list(splits.values())


def _sentences_of(ref: Record) -> list[str]:
    """Return the raw sentences, which are the models' input, or the cleaned ones if the file has no raw ones."""
    return [sentence.get("raw", sentence.get("sent")) for sentence in ref["sentences"]]


def _normalized(sentence: str) -> str:
    return " ".join(sentence.lower().split())


def _measure_object(refer: REFER, ref: Record) -> MeasuredObject | str:
    """Return the measurements of a ref's object, or why its mask is invalid."""
    annotation, image = refer.refToAnn[ref["ref_id"]], refer.Imgs[ref["image_id"]]
    try:
        area = refer.getMask(ref, mode="union")["area"]
        segmentation = annotation["segmentation"]
        parts = len(segmentation) if isinstance(segmentation, list) else 1
        overlap = area - refer.getMask(ref, mode="paper")["area"] if parts > 1 else 0
    except UserError as error:
        return str(error)
    stored = annotation.get("area")
    stored_area = float(stored) if is_number(stored, 0, 1e12) else None
    return MeasuredObject(area, overlap, parts, image["height"] * image["width"], stored_area)


def _distribution(numbers: Sequence[float]) -> dict[str, float] | None:
    if not numbers:
        return None
    values = np.array(numbers)
    p5, median, p95 = np.percentile(values, (5, 50, 95), method="inverted_cdf")  # values that occur in the data
    maximum = values.max()
    found = {"mean": values.mean(), "minimum": values.min(), "p5": p5, "median": median, "p95": p95, "maximum": maximum}
    return {name: float(value) for name, value in found.items()}


def _share(count: int, total: int) -> dict[str, float | None]:
    return {"count": count, "percent": percent(count, total)}


def percent(count: int, total: int) -> float | None:
    """Return 100 · count / total, or None if the total is 0."""
    return 100 * count / total if total else None


class SharedImages(NamedTuple):
    """Images that two splits have in common."""

    first: SplitStatistics
    second: SplitStatistics
    images: int
    expressions: tuple[int, int]  # about these images, in the first and in the second split

    @property
    def is_leak(self) -> bool:
        """Whether one of the two splits is used for training and the other for evaluation."""
        return (self.first.name == "train") != (self.second.name == "train")


def shared_images(splits: Sequence[SplitStatistics]) -> list[SharedImages]:
    """Return the pairs of splits, of one or several datasets, that have images in common (see REFER.image_keys)."""
    found = []
    for first, second in combinations(splits, 2):
        common = first.expressions_per_image.keys() & second.expressions_per_image.keys()
        if common:
            expressions = tuple(
                sum(split.expressions_per_image[image] for image in common) for split in (first, second)
            )
            found.append(SharedImages(first, second, len(common), expressions))
    return found
