"""What is in the splits of a set: sentences, objects, holes in masks, pictures shared between splits.

Everything is read through REFER, and a split is what a ref says it is, by equality: `testA` and `testB` of RefCOCO are
two splits here, and there is no `test` that holds both. Letters: E expressions, R refs, O objects.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from lib.errors import UserError
from refer.annotations import Record
from refer.masks import is_number
from refer.refer import REFER, SPLIT_ORDER

AREA_TOLERANCE = 0.01  # of the mask's area: by how much a stored area may differ from it


class ObjectShape(NamedTuple):
    """An annotation's mask in numbers; areas in pixels."""

    area: int  # of the union of its parts
    lost: int  # where parts overlap: the holes of the paper's mask
    parts: int  # polygons or RLEs
    picture: int  # height · width
    stored: float | None  # the annotation's own `area`, where it has one


class Distribution(NamedTuple):
    """Some numbers in six."""

    mean: float
    minimum: float
    p5: float
    median: float
    p95: float
    maximum: float


@dataclass(frozen=True, eq=False)  # each is itself only, so it can be a key
class SplitStatistics:
    """One split of one set; of an object that several refs mean, the mask counts once."""

    dataset: str
    split_by: str
    split: str
    images: dict[str, int]  # what tells a picture from others: how many expressions are about it
    categories: int
    expressions_per_ref: np.ndarray  # [R]
    words: np.ndarray  # [E], parted by white space
    tokens: np.ndarray | None  # [E], [CLS] and [SEP] among them; None: there is no tokenizer
    max_tokens: int
    ambiguous: int  # expressions said of another object of the picture, too, in whatever split
    shapes: tuple[ObjectShape, ...]  # [O], of the objects whose mask can be drawn
    undrawable: tuple[str, ...]  # for each of the others, why

    @property
    def sizes(self) -> np.ndarray:
        """Areas of the union masks in percent of the picture, [O]."""
        return np.array([100 * shape.area / shape.picture for shape in self.shapes])

    @property
    def parts(self) -> np.ndarray:
        """Polygons or RLEs per object, [O]."""
        return np.array([shape.parts for shape in self.shapes], int)

    @property
    def cut(self) -> int | None:
        """How many expressions have more than max_tokens tokens; one with a token more loses only its [SEP]."""
        return None if self.tokens is None else int((self.tokens > self.max_tokens).sum())

    def summary(self) -> dict[str, Any]:
        """The numbers that are shown: plain values, as JSON takes them; None: nothing to take them of."""
        shapes, tokens = self.shapes, self.tokens
        overlapping = [shape for shape in shapes if shape.lost]
        stored = [shape for shape in shapes if shape.stored is not None]
        off = [shape for shape in stored if abs(shape.stored - shape.area) > AREA_TOLERANCE * shape.area]
        expressions, objects = len(self.words), len(shapes)
        lost, covered = (sum(getattr(shape, name) for shape in overlapping) for name in ("lost", "area"))
        return {
            "dataset": self.dataset,
            "splitBy": self.split_by,
            "split": self.split,
            "refs": len(self.expressions_per_ref),
            "expressions": expressions,
            "images": len(self.images),
            "categories": self.categories,
            "expressions_per_ref": _distribution(self.expressions_per_ref),
            "words": _distribution(self.words),
            "tokens": None if tokens is None else _distribution(tokens),
            "cut": None if self.cut is None else _share(self.cut, expressions),
            "ambiguous": _share(self.ambiguous, expressions),
            "objects": objects + len(self.undrawable),
            "size_percent": _distribution(self.sizes),
            "several_parts": _share(int((self.parts > 1).sum()), objects),
            "overlap": {**_share(len(overlapping), objects), "pixels_lost_percent": percent(lost, covered)},
            "stored_area_off": _share(len(off), len(stored)),
            "empty_masks": sum(shape.area == 0 for shape in shapes),
            "undrawable": {"count": len(self.undrawable), "first": next(iter(self.undrawable), None)},
        }


class SharedImages(NamedTuple):
    """Pictures that are in two splits; never empty."""

    first: SplitStatistics
    second: SplitStatistics
    images: int
    expressions: tuple[int, int]  # of the first and of the second split, about these pictures

    @property
    def is_leak(self) -> bool:
        """Whether what one trains on is also judged: exactly one of the two is a training split."""
        return (self.first.split == "train") != (self.second.split == "train")


def statistics_of(
    refer: REFER,
    count_tokens: Callable[[list[str]], list[int]] | None = None,
    *,
    max_tokens: int = 21,
    known: dict[int, ObjectShape | str] | None = None,
) -> list[SplitStatistics]:
    """The statistics of every split of a set: train, then the usual order.

    Args:
        refer: the annotations; pictures are not needed.
        count_tokens: sentences → how many tokens each has, [CLS] and [SEP] among them; None: no tokenizer.
        max_tokens: how many of them a model keeps.
        known: objects by annotation id, filled in; given again for another split system of the same dataset, no mask
            is drawn twice.
    """
    known = {} if known is None else known
    refs = refer.data["refs"]
    for ref in tqdm(refs, desc=f"{refer.dataset} ({refer.splitBy})", unit="ref", disable=None):
        if ref["ann_id"] not in known:
            known[ref["ann_id"]] = _measure(refer, ref)
    places = refer.image_keys()
    said: dict[tuple[str, str], set[int]] = {}  # picture, sentence: objects
    for ref in refs:
        for text in sentences_of(ref):
            said.setdefault((places[ref["image_id"]], _plain(text)), set()).add(ref["ann_id"])

    found = []
    for split in sorted(refer.splits(), key=_usual_order):
        own = [ref for ref in refs if ref["split"] == split]
        texts = [(ref, text) for ref in own for text in sentences_of(ref)]
        images: dict[str, int] = {}
        for ref, _ in texts:
            images[places[ref["image_id"]]] = images.get(places[ref["image_id"]], 0) + 1
        objects = [known[ann_id] for ann_id in dict.fromkeys(ref["ann_id"] for ref in own)]
        found.append(
            SplitStatistics(
                refer.dataset,
                refer.splitBy,
                split,
                images=images,
                categories=len({refer.refToAnn[ref["ref_id"]]["category_id"] for ref in own}),
                expressions_per_ref=np.array([len(ref["sentences"]) for ref in own]),
                words=np.array([len(text.split()) for _, text in texts]),
                tokens=np.array(count_tokens([text for _, text in texts])) if count_tokens else None,
                max_tokens=max_tokens,
                ambiguous=sum(len(said[places[ref["image_id"]], _plain(text)]) > 1 for ref, text in texts),
                shapes=tuple(one for one in objects if isinstance(one, ObjectShape)),
                undrawable=tuple(one for one in objects if isinstance(one, str)),
            )
        )
    return found


def shared_images(splits: list[SplitStatistics]) -> list[SharedImages]:
    """Each pair of splits, of one set or of several, that has pictures in common.

    Which are the same: see :meth:`refer.refer.REFER.image_keys`.
    """
    found = []
    for row, first in enumerate(splits):
        for second in splits[row + 1 :]:
            common = first.images.keys() & second.images.keys()
            if common:
                concerned = tuple(sum(one.images[place] for place in common) for one in (first, second))
                found.append(SharedImages(first, second, len(common), concerned))
    return found


def sentences_of(ref: Record) -> list[str]:
    """What a model reads: the sentences as written, or cleaned where a file has only that."""
    return [sentence.get("raw", sentence.get("sent")) for sentence in ref["sentences"]]


def percent(count: float, of: float) -> float | None:
    """None: of nothing."""
    return 100 * count / of if of else None


def _measure(refer: REFER, ref: Record) -> ObjectShape | str:
    """A ref's object, or why its mask can't be drawn."""
    annotation, image = refer.refToAnn[ref["ref_id"]], refer.Imgs[ref["image_id"]]
    try:
        area = refer.getMask(ref, mode="union")["area"]
        segmentation = annotation["segmentation"]
        parts = len(segmentation) if isinstance(segmentation, list) else 1
        lost = area - refer.getMask(ref, mode="paper")["area"] if parts > 1 else 0
    except UserError as error:
        return str(error)
    stored = annotation.get("area")
    known = float(stored) if is_number(stored, 0, 1e12) else None
    return ObjectShape(area, lost, parts, image["height"] * image["width"], known)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _usual_order(split: str) -> tuple[int, str]:
    order = ("train", *SPLIT_ORDER)
    return (order.index(split), "") if split in order else (len(order), split)


def _distribution(values: Iterable[float]) -> dict[str, float] | None:
    values = np.asarray(values)
    if not values.size:
        return None
    p5, median, p95 = np.percentile(values, (5, 50, 95), method="inverted_cdf")  # values that occur
    numbers = Distribution(values.mean(), values.min(), p5, median, p95, values.max())
    return {name: float(number) for name, number in numbers._asdict().items()}


def _share(count: int, of: int) -> dict[str, float | None]:
    return {"count": count, "percent": percent(count, of)}
