"""Count the refs, expressions and images of each split, and compare them with the published numbers."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lib.errors import UserError
from lib.tables import to_text
from refer.datasets import PUBLISHED_COUNTS, Counts, split_systems
from refer.refer import REFER, SPLIT_ORDER


class Summary(NamedTuple):
    """Content of a dataset under one split system."""

    dataset: str
    split_by: str
    counts: dict[str, Counts]  # by split
    images: dict[str, set[str]]  # split: file names
    sizes: dict[str, tuple[int, int]]  # file name: (width, height) in pixels
    image_dir: Path

    @property
    def name(self) -> str:
        return f"{self.dataset} ({self.split_by})"

    @property
    def published(self) -> dict[str, Counts]:
        return PUBLISHED_COUNTS.get((self.dataset, self.split_by), {})

    def mismatches(self) -> dict[str, str]:
        """Return {split: how its counts differ from the published ones}; a missing split counts as empty."""
        found = {}
        for split, published in self.published.items():
            numbers = zip(self.counts.get(split, Counts(0, 0, 0)), published, Counts._fields, strict=True)
            details = [f"{n} {field} instead of {m}" for n, m, field in numbers if m is not None and n != m]
            if details:
                found[split] = ", ".join(details)
        return found

    def difference(self) -> str:
        """Describe all mismatches in one line; empty if there are none, or if no counts were published."""
        return "; ".join(f"{split} has {details}" for split, details in self.mismatches().items())


def count_splits(refer: REFER) -> dict[str, Counts]:
    """Return the counts of every split: train first, then the usual order, then a user's own split names.

    Splits are selected as by ``REFER.getRefIds``, so a ref marked ``testAB`` counts for testA and for testB.
    """
    order = ("train", *SPLIT_ORDER)
    published = PUBLISHED_COUNTS.get((refer.dataset, refer.splitBy), {})
    names = dict.fromkeys([*refer.splits(), *published])
    counts = {}
    for split in sorted(names, key=lambda name: order.index(name) if name in order else len(order)):
        try:
            refs = refer.loadRefs(refer.getRefIds(split=split))
        except UserError:  # published, but not in this refs file
            continue
        expressions = sum(len(ref["sentences"]) for ref in refs)
        counts[split] = Counts(len(refs), expressions, len({ref["image_id"] for ref in refs}))
    return counts


def summarize(data_root: Path, dataset: str) -> list[Summary]:
    """Read a dataset under each split system whose refs file exists, the first one in any case.

    Raises:
        UserError: a file is missing or corrupt.
    """
    first, *others = split_systems(data_root, dataset)
    existing = [name for name in others if Path(data_root, dataset, f"refs({name}).p").exists()]
    summaries = []
    for split_by in (first, *existing):
        refer = REFER(data_root, dataset, split_by)
        counts, images = count_splits(refer), {}
        for split in counts:
            ids = {ref["image_id"] for ref in refer.loadRefs(refer.getRefIds(split=split))}
            images[split] = {refer.Imgs[image_id]["file_name"] for image_id in ids}
        needed = set().union(*images.values())
        sizes = {
            image["file_name"]: (image["width"], image["height"])
            for image in refer.data["images"]
            if image["file_name"] in needed
        }
        summaries.append(Summary(dataset, split_by, counts, images, sizes, refer.image_dir))
    return summaries


def format_counts(summaries: Sequence[Summary], faults: Mapping[Path, Collection[str]]) -> str:
    """Return the table of counts per split, with the difference from the published counts.

    Args:
        summaries: the datasets.
        faults: {image folder: names of images that are missing or invalid}, for folders that were checked.
    """
    rows = [("dataset", "split", "refs", "expressions", "images", "valid images", "")]
    for summary in summaries:
        mismatches, checked = summary.mismatches(), faults.get(summary.image_dir)
        for split in dict.fromkeys([*summary.counts, *mismatches]):
            counts = map(str, summary.counts.get(split, (0, 0, 0)))
            valid = "not checked" if checked is None else str(len(summary.images.get(split, set()) - set(checked)))
            note = mismatches.get(split) or ("as published" if split in summary.published else "no published counts")
            rows.append((summary.name, split, *counts, valid, note))
    return to_text(rows, left=(0, 1, 6))
