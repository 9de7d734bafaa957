"""Statistics of a dataset's splits: sentences, objects, masks, and images that splits share.

Annotations are read through REFER. A ref belongs to the split whose name it carries: `testA` and `testB` of RefCOCO are
two splits here, and there is no split `test` that contains both.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from lib.errors import UserError
from lib.variants import MAX_TOKENS
from refer.annotations import Record
from refer.datasets import check_dataset, split_systems
from refer.masks import is_number
from refer.refer import REFER, SPLIT_ORDER

AREA_TOLERANCE = 0.01  # accepted difference between a stored area and the mask's, relative to the mask's
CountTokens = Callable[[list[str]], Sequence[int]]

EXPRESSION = np.dtype([
    ("split", object),
    ("ref_id", object),
    ("ann_id", object),
    ("category_id", object),
    ("image", object),  # the same for all records of an image; see REFER.image_keys
    ("words", int),  # separated by white space
    ("tokens", int),  # with [CLS] and [SEP]; 0 without a tokenizer
    ("is_ambiguous", bool),  # also refers to another object of the image, in any split
])  # fmt: skip
OBJECT = np.dtype([
    ("area", int),  # pixels of the union of all parts
    ("overlap", int),  # pixels covered by several parts: holes in the paper's masks
    ("parts", int),  # polygons or RLEs
    ("image_area", int),  # pixels
    ("stored_area", float),  # `area` of the annotation in pixels; NaN if it is not a number
])  # fmt: skip


@dataclass(frozen=True, eq=False)  # compared by identity, so that it can be a dictionary key
class SplitStatistics:
    """One split of one dataset. An object of several refs counts once."""

    dataset: str
    split_by: str
    split: str
    expressions: np.ndarray  # of EXPRESSION
    objects: np.ndarray  # of OBJECT
    errors: list[str]  # of the objects whose mask cannot be rasterised
    max_tokens: int  # token ids that a model keeps of a sentence

    @property
    def title(self) -> str:
        return f"{self.dataset} ({self.split_by})"

    @property
    def expressions_per_ref(self) -> np.ndarray:
        return np.array(list(Counter(self.expressions["ref_id"]).values()))

    @cached_property
    def expressions_per_image(self) -> Counter[str]:
        return Counter(self.expressions["image"])

    @property
    def size_percent(self) -> np.ndarray:
        """Area of each object in percent of its image."""
        return 100 * self.objects["area"] / self.objects["image_area"]

    @cached_property
    def summary(self) -> dict[str, Any]:
        """All numbers as ``--json`` writes them; None if there is nothing to compute them of."""
        expressions, objects, tokens = self.expressions, self.objects, self.expressions["tokens"]
        overlapping = objects[objects["overlap"] > 0]
        stored = objects[np.isfinite(objects["stored_area"])]
        is_wrong = abs(stored["stored_area"] - stored["area"]) > AREA_TOLERANCE * stored["area"]
        return {
            "dataset": self.dataset,
            "splitBy": self.split_by,
            "split": self.split,
            "refs": len(self.expressions_per_ref),
            "expressions": len(expressions),
            "images": len(self.expressions_per_image),
            "categories": len(set(expressions["category_id"])),
            "expressions_per_ref": _distribution(self.expressions_per_ref),
            "words": _distribution(expressions["words"]),
            "tokens": _distribution(tokens) if tokens.any() else None,
            "cut": _share(tokens > self.max_tokens) if tokens.any() else None,
            "ambiguous": _share(expressions["is_ambiguous"]),
            "objects": len(objects) + len(self.errors),
            "size_percent": _distribution(self.size_percent),
            "several_parts": _share(objects["parts"] > 1),
            "overlap": {
                **_share(objects["overlap"] > 0),
                "pixels_lost_percent": percent(int(overlapping["overlap"].sum()), int(overlapping["area"].sum())),
            },
            "stored_area_off": _share(is_wrong),
            "empty_masks": int((objects["area"] == 0).sum()),
            "undrawable": {"count": len(self.errors), "first": self.errors[0] if self.errors else None},
        }


def statistics_of(
    refer: REFER,
    count_tokens: CountTokens | None = None,
    *,
    max_tokens: int = MAX_TOKENS,
    known_objects: dict[int, tuple | str] | None = None,
) -> list[SplitStatistics]:
    """Return the statistics of every split of a dataset: train first, then in the usual order.

    Args:
        refer: the annotations. Image files are not needed.
        count_tokens: returns the number of tokens of each sentence, with [CLS] and [SEP]; None: no tokenizer.
        max_tokens: number of token ids that a model keeps.
        known_objects: filled with the objects by annotation id. If the same dictionary is passed for another split
            system of the dataset, no mask is rasterised twice.
    """
    known_objects = {} if known_objects is None else known_objects
    for ref in tqdm(refer.data["refs"], desc=f"{refer.dataset} ({refer.splitBy})", unit="ref", disable=None):
        if ref["ann_id"] not in known_objects:
            known_objects[ref["ann_id"]] = _measure_object(refer, ref)
    expressions = _measure_expressions(refer, count_tokens)
    order = ("train", *SPLIT_ORDER)
    splits = []
    for split in sorted(refer.splits(), key=lambda name: (order.index(name) if name in order else len(order), name)):
        in_split = expressions[expressions["split"] == split]
        found = [known_objects[ann_id] for ann_id in dict.fromkeys(in_split["ann_id"])]
        objects = np.array([one for one in found if isinstance(one, tuple)], dtype=OBJECT)
        errors = [one for one in found if isinstance(one, str)]
        splits.append(SplitStatistics(refer.dataset, refer.splitBy, split, in_split, objects, errors, max_tokens))
    return splits


def _measure_expressions(refer: REFER, count_tokens: CountTokens | None) -> np.ndarray:
    """Return every expression of the dataset as an array of EXPRESSION."""
    image_keys = refer.image_keys()
    # Models read the raw sentence; some files have only the cleaned one.
    pairs = [(ref, one.get("raw", one.get("sent"))) for ref in refer.data["refs"] for one in ref["sentences"]]
    tokens = count_tokens([sentence for _, sentence in pairs]) if count_tokens else [0] * len(pairs)
    rows, objects = [], defaultdict(set)  # the objects that a sentence refers to on an image
    for (ref, sentence), number in zip(pairs, tokens, strict=True):
        image, words = image_keys[ref["image_id"]], sentence.split()
        same_sentence = objects[image, " ".join(words).lower()]
        same_sentence.add(ref["ann_id"])
        category = refer.refToAnn[ref["ref_id"]]["category_id"]
        rows.append((ref["split"], ref["ref_id"], ref["ann_id"], category, image, len(words), number, same_sentence))
    return np.array([(*row, len(same_sentence) > 1) for *row, same_sentence in rows], dtype=EXPRESSION)


def _measure_object(refer: REFER, ref: Record) -> tuple | str:
    """Return a ref's object as the fields of OBJECT, or why its mask cannot be rasterised."""
    annotation, image = refer.refToAnn[ref["ref_id"]], refer.Imgs[ref["image_id"]]
    try:
        area = refer.getMask(ref, mode="union")["area"]
        segmentation = annotation["segmentation"]
        parts = len(segmentation) if isinstance(segmentation, list) else 1
        overlap = area - refer.getMask(ref, mode="paper")["area"] if parts > 1 else 0
    except UserError as error:
        return str(error)
    stored_area = annotation.get("area")
    if not is_number(stored_area, 0, 1e12):
        stored_area = np.nan
    return area, overlap, parts, image["height"] * image["width"], stored_area


def _distribution(values: np.ndarray) -> dict[str, float] | None:
    if not values.size:
        return None
    p5, median, p95 = np.percentile(values, (5, 50, 95), method="inverted_cdf")  # values that occur
    numbers = {"mean": values.mean(), "minimum": values.min(), "p5": p5, "median": median, "p95": p95}
    return {name: float(number) for name, number in (numbers | {"maximum": values.max()}).items()}


def _share(is_counted: np.ndarray) -> dict[str, float | None]:
    count = int(is_counted.sum())
    return {"count": count, "percent": percent(count, len(is_counted))}


def percent(count: int, total: int) -> float | None:
    """Return 100 · count / total, or None if the total is 0."""
    return 100 * count / total if total else None


class SharedImages(NamedTuple):
    """Images that two splits have in common."""

    first: SplitStatistics
    second: SplitStatistics
    images: int
    expressions: tuple[int, int]  # of the first and of the second split, on these images

    @property
    def is_leak(self) -> bool:
        """Whether one of the two splits is used for training and the other for evaluation."""
        return (self.first.split == "train") != (self.second.split == "train")


def shared_images(splits: Sequence[SplitStatistics]) -> list[SharedImages]:
    """Return each pair of splits, of one dataset or of several, that have images in common (see REFER.image_keys)."""
    found = []
    for first, second in combinations(splits, 2):
        common = first.expressions_per_image.keys() & second.expressions_per_image.keys()
        if common:
            expressions = tuple(sum(one.expressions_per_image[image] for image in common) for one in (first, second))
            found.append(SharedImages(first, second, len(common), expressions))
    return found


def select_datasets(data_root: str | Path, datasets: str, split_by: str = "") -> list[tuple[str, str]]:
    """Return the (dataset, splitBy) pairs that the flags --dataset and --splitBy select.

    Args:
        data_root: folder of the datasets.
        datasets: names, separated by commas.
        split_by: one for all datasets, or one for each, or several for one dataset; empty: all that are installed.

    Raises:
        UserError: there is no such dataset or split system, or the numbers of names do not fit.
    """
    names, systems = ([name.strip() for name in text.split(",") if name.strip()] for text in (datasets, split_by))
    if not names:
        raise UserError(f"--dataset {datasets!r} contains no name.")
    if len(names) > 1 and len(systems) > 1:
        if len(names) != len(systems):
            raise UserError(f"--splitBy {split_by}: {len(systems)} names for {len(names)} datasets. Give one for each.")
        pairs = list(zip(names, systems, strict=True))
    else:
        pairs = [(name, system) for name in names for system in systems or _installed_systems(data_root, name)]
    for name, system in pairs:
        check_dataset(data_root, name, system)
    return list(dict.fromkeys(pairs))


def _installed_systems(data_root: str | Path, dataset: str) -> Sequence[str]:
    """Return the installed split systems; if there is none, the usual one, so that reading it says how to get it."""
    known = split_systems(data_root, dataset)
    return [name for name in known if Path(data_root, dataset, f"refs({name}).p").is_file()] or known[:1]
