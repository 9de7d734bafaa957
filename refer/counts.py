"""How many refs, expressions and images each split has, and how many the datasets were published with."""

from typing import NamedTuple

from lib.errors import UserError
from refer.refer import REFER, SPLIT_ORDER


class Counts(NamedTuple):
    """Of one split. None: no such number was published."""

    refs: int
    expressions: int
    images: int | None = None


# The tables of the datasets' papers: (dataset, splitBy): {split: counts}. RefCOCO (google) has none.
PUBLISHED_COUNTS: dict[tuple[str, str], dict[str, Counts]] = {
    ("refcoco", "unc"): {
        "train": Counts(42404, 120624, 16994),
        "val": Counts(3811, 10834, 1500),
        "testA": Counts(1975, 5657, 750),
        "testB": Counts(1810, 5095, 750),
    },
    ("refcoco+", "unc"): {
        "train": Counts(42278, 120191, 16992),
        "val": Counts(3805, 10758, 1500),
        "testA": Counts(1975, 5726, 750),
        "testB": Counts(1798, 4889, 750),
    },
    ("refcocog", "umd"): {
        "train": Counts(42226, 80512, 21899),
        "val": Counts(2573, 4896, 1300),
        "test": Counts(5023, 9602, 2600),
    },
    ("refcocog", "google"): {"train": Counts(44822, 85474), "val": Counts(5000, 9536)},
}


def counts_of(refer: REFER) -> dict[str, Counts]:
    """The counts of every split that a set has, train first and then in the usual order.

    A split is chosen as everywhere (REFER.getRefIds), so refs marked ``testAB`` count for testA and for testB.
    """
    names = refer.splits()
    published = PUBLISHED_COUNTS.get((refer.dataset, refer.splitBy), {})
    order = [name for name in ("train", *SPLIT_ORDER) if name in names or (name in published and _has(refer, name))]
    counts = {}
    for split in [*order, *(name for name in names if name not in order)]:
        refs = refer.loadRefs(refer.getRefIds(split=split))
        expressions = sum(len(ref["sentences"]) for ref in refs)
        counts[split] = Counts(len(refs), expressions, len({ref["image_id"] for ref in refs}))
    return counts


def _has(refer: REFER, split: str) -> bool:
    try:
        return bool(refer.getRefIds(split=split))
    except UserError:
        return False


def differs(counts: Counts | None, published: Counts | None) -> bool:
    """Whether a published number is another than the counted one; a split that is missing differs."""
    if published is None:
        return False
    return counts is None or any(b is not None and a != b for a, b in zip(counts, published, strict=True))


def difference(refer: REFER) -> str:
    """How a set's counts are not the published ones, in a few words; empty if they are, or none were published."""
    counts, published = counts_of(refer), PUBLISHED_COUNTS.get((refer.dataset, refer.splitBy), {})
    wrong = [split for split, numbers in published.items() if differs(counts.get(split), numbers)]
    if not wrong:
        return ""
    first, *others = wrong
    here, right = counts.get(first, Counts(0, 0, 0)), published[first]
    told = ", ".join(
        f"{n} {name} instead of {m}"
        for name, n, m in zip(Counts._fields, here, right, strict=True)
        if m is not None and n != m
    )
    return f"{first} has {told}" + (f", and {', '.join(others)} differ too" if others else "")
