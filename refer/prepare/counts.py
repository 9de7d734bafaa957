"""Summarize the installed datasets and compare their counts with the published ones."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lib.tables import to_text
from refer.datasets import PUBLISHED_COUNTS, Counts, split_systems
from refer.refer import REFER


class Summary(NamedTuple):
    """Contents of a dataset under one split system."""

    dataset: str
    split_by: str
    counts: dict[str, Counts]  # split: counts
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
        """Return {split: how its counts differ from the published ones}. A missing split has the counts 0, 0, 0."""
        found = {}
        for split, published in self.published.items():
            numbers = zip(Counts._fields, self.counts.get(split, Counts(0, 0, 0)), published, strict=True)
            details = [
                f"{count} {name} instead of {expected}"
                for name, count, expected in numbers
                if expected is not None and count != expected
            ]
            if details:
                found[split] = ", ".join(details)
        return found

    def difference(self) -> str:
        """Describe all mismatches on one line; empty if there are none or if no counts are published."""
        return "; ".join(f"{split} has {details}" for split, details in self.mismatches().items())


def summarize(data_root: Path, dataset: str) -> list[Summary]:
    """Read a dataset under each split system that is installed. The first split system is required.

    Raises:
        UserError: a file is missing or corrupt.
    """
    first, *others = split_systems(data_root, dataset)
    existing = [name for name in others if Path(data_root, dataset, f"refs({name}).p").exists()]
    summaries = []
    for split_by in (first, *existing):
        refer = REFER(data_root, dataset, split_by)
        counts, images = refer.counts(), {}
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
    """Return a table of the counts per split, with their differences from the published counts.

    Args:
        summaries: the datasets.
        faults: {image folder: names of missing or invalid images} for the folders that were checked.
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
