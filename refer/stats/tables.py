"""Format the statistics of splits: tables for a terminal and the JSON report."""

from collections.abc import Sequence
from typing import Any

from lib.tables import to_text
from refer.stats.statistics import SharedImages, SplitStatistics, percent

MAX_WIDTH = 120
# Keys of a split's summary and their labels, in the order of the rows.
COUNTS = {
    "refs": "refs",
    "expressions": "expressions",
    "images": "images",
    "objects": "objects",
    "categories": "categories",
    "empty_masks": "objects with an empty mask",
}
SHARES = {
    "cut": "expressions with more than {} tokens",
    "ambiguous": "expressions used for several objects",
    "several_parts": "objects with several parts",
    "overlap": "objects with overlapping parts",
    "stored_area_off": "stored areas that differ by over 1 %",
}
DISTRIBUTIONS = {
    "expressions_per_ref": "expressions per ref",
    "words": "words",
    "tokens": "tokens with [CLS] and [SEP]",
    "size_percent": "object size in % of the image",
}
STATISTICS = {"mean": "mean", "p5": "5 %", "median": "median", "p95": "95 %", "maximum": "maximum"}


def split_table(splits: Sequence[SplitStatistics]) -> str:
    """Return the summaries of one dataset's splits as a table with one column per split."""
    summaries = [split.summary for split in splits]
    rows = [["", *(split.name for split in splits)]]
    for key, label in COUNTS.items():
        rows.append([label, *(str(summary[key]) for summary in summaries)])
    for key, label in SHARES.items():
        label = label.format(splits[0].max_tokens)
        rows.append([label, *(_cell(summary[key], "percent", "{count} ({percent:.2f} %)") for summary in summaries)])
    lost = [_cell(summary["overlap"], "pixels_lost_percent", "{pixels_lost_percent:.2f} %") for summary in summaries]
    rows.append(["pixels lost by overlaps in paper mode", *lost])
    for key, label in DISTRIBUTIONS.items():
        for statistic, name in STATISTICS.items():
            cells = [_cell(summary[key], statistic, f"{{{statistic}:.2f}}") for summary in summaries]
            rows.append([f"{label}: {name}", *cells])
    return to_text([row for row in rows if set(row[1:]) != {"–"}])


def _cell(numbers: dict[str, float | None] | None, required: str, form: str) -> str:
    """Format some numbers of a summary, or return a dash if the required one is missing."""
    return "–" if numbers is None or numbers[required] is None else form.format(**numbers)


def sharing_table(splits: Sequence[SplitStatistics], shared: Sequence[SharedImages]) -> str:
    """Return a table of the images that each pair of splits shares, unless it is too wide, and a line for each leak."""
    if not shared:
        return "No image is in two splits (same file or same COCO number)."
    names = split_names(splits)
    counts = {(split, split): len(split.expressions_per_image) for split in splits}
    for pair in shared:
        counts[pair.first, pair.second] = counts[pair.second, pair.first] = pair.images
    rows = [["images in both", *(f"({i})" for i in range(1, len(splits) + 1))]]
    for i, split in enumerate(splits, 1):
        rows.append([f"({i}) {names[split]}", *(str(counts.get((split, other), 0)) for other in splits)])
    table = to_text(rows)
    if max(map(len, table.splitlines())) > MAX_WIDTH:
        table = f"{len(shared)} pairs of the {len(splits)} splits have images in common (--json lists them)."
    leaks = [pair for pair in shared if pair.is_leak]
    leaks.sort(key=lambda pair: pair.first.title != pair.second.title)  # leaks within a dataset first
    return "\n".join([table, *([_leak(pair, names) for pair in leaks] or ["No image of train is in another split."])])


def _leak(pair: SharedImages, names: dict[SplitStatistics, str]) -> str:
    train, evaluated, count = pair.first, pair.second, pair.expressions[1]
    if evaluated.name == "train":
        train, evaluated, count = pair.second, pair.first, pair.expressions[0]
    total = len(evaluated.words)
    return (
        f"leak: {pair.images} of {len(evaluated.expressions_per_image)} {names[evaluated]} images ({count} of {total} "
        f"expressions, {percent(count, total):.1f} %) are also in {names[train]}"
    )


def split_names(splits: Sequence[SplitStatistics]) -> dict[SplitStatistics, str]:
    """Return the name of each split, with the dataset if there are several datasets."""
    is_several = len({split.title for split in splits}) > 1
    return {split: f"{split.title} {split.name}" if is_several else split.name for split in splits}


def json_report(
    splits: Sequence[SplitStatistics], shared: Sequence[SharedImages], tokenizers: dict[str, str | None]
) -> dict[str, Any]:
    """Return the report that ``--json`` writes.

    Args:
        splits, shared: of all datasets.
        tokenizers: {dataset: fingerprint of the vocabulary, None if tokens were not counted}.
    """
    names = split_names(splits)
    return {
        "max_tokens": splits[0].max_tokens,
        "tokenizers": tokenizers,
        "splits": [split.summary for split in splits],
        "shared_images": [
            {
                "splits": [names[pair.first], names[pair.second]],
                "images": pair.images,
                "expressions": list(pair.expressions),
                "leak": pair.is_leak,
            }
            for pair in shared
        ],
    }
