"""The statistics of splits as text for a terminal of 120 characters, and as what JSON takes."""

from itertools import groupby
from typing import Any, NamedTuple

from refer.stats.statistics import SharedImages, SplitStatistics, percent

WIDTH = 120
NONE = "–"


class Column(NamedTuple):
    """Of a table whose rows are splits."""

    group: str  # what stands above neighbours of the same group
    name: str
    key: str  # into a split's summary, dotted
    form: str = "{}"


COUNTS = (
    Column("", "refs", "refs"),
    Column("", "expressions", "expressions"),
    Column("", "per ref", "expressions_per_ref.mean", "{:.2f}"),
    Column("", "images", "images"),
    Column("", "ambiguous", "ambiguous.percent", "{:.2f} %"),
)
WORDS = (
    Column("words", "mean", "words.mean", "{:.1f}"),
    Column("words", "95 %", "words.p95", "{:.0f}"),
    Column("words", "max", "words.maximum", "{:.0f}"),
)
TOKENS = (
    Column("tokens", "mean", "tokens.mean", "{:.1f}"),
    Column("tokens", "median", "tokens.median", "{:.0f}"),
    Column("tokens", "95 %", "tokens.p95", "{:.0f}"),
    Column("tokens", "max", "tokens.maximum", "{:.0f}"),
    Column("cut at {}", "number", "cut.count"),
    Column("cut at {}", "share", "cut.percent", "{:.2f} %"),
)
OBJECTS = (
    Column("", "objects", "objects"),
    Column("", "categories", "categories"),
    Column("size, % of picture", "5 %", "size_percent.p5", "{:.2f}"),
    Column("size, % of picture", "median", "size_percent.median", "{:.2f}"),
    Column("size, % of picture", "mean", "size_percent.mean", "{:.2f}"),
    Column("size, % of picture", "95 %", "size_percent.p95", "{:.2f}"),
    Column("parts", "several", "several_parts.percent", "{:.1f} %"),
    Column("parts overlap", "objects", "overlap.count"),
    Column("parts overlap", "share", "overlap.percent", "{:.2f} %"),
    Column("parts overlap", "lost", "overlap.pixels_lost_percent", "{:.2f} %"),
    Column("area off", "objects", "stored_area_off.count"),
    Column("area off", "share", "stored_area_off.percent", "{:.2f} %"),
)
ABOUT_SENTENCES = "  ambiguous: also said of another object of the picture"
ABOUT_TOKENS = "; tokens: with [CLS] and [SEP]; cut: expressions with more"
ABOUT_OBJECTS = (
    "  overlap: the paper's mask has holes; lost: of these objects' pixels; area off: the stored one, by more than 1 %"
)


def tables(splits: list[SplitStatistics]) -> str:
    """The splits of one set as rows of two tables, of sentences and of objects."""
    rows = [one.summary() for one in splits]
    has_tokens = rows[0]["tokens"] is not None
    tokens = [one._replace(group=one.group.format(splits[0].max_tokens)) for one in TOKENS] if has_tokens else []
    lines = [
        _table(rows, [*COUNTS, *WORDS, *tokens]),
        ABOUT_SENTENCES + (ABOUT_TOKENS if has_tokens else ""),
        "",
        _table(rows, OBJECTS),
        ABOUT_OBJECTS,
    ]
    lines += [f"  {row['split']}: {row['empty_masks']} masks without a pixel" for row in rows if row["empty_masks"]]
    return "\n".join(lines)


def sharing(splits: list[SplitStatistics], shared: list[SharedImages]) -> str:
    """Which splits have images in common: a matrix where it fits, and a line for each leak."""
    if not shared:
        return "no image is in two splits (by file and COCO's number)"
    names = labels(splits)
    counts = {(pair.first, pair.second): pair.images for pair in shared}
    counts |= {(second, first): images for (first, second), images in counts.items()}
    counts |= {(one, one): len(one.images) for one in splits}
    grid = [["images in both", *(f"({number}) {names[one]}" for number, one in enumerate(splits, 1))]]
    grid += [[f"({i})", *(str(counts.get((one, other), 0)) for one in splits)] for i, other in enumerate(splits, 1)]
    width = max(map(len, grid[0]))
    grid[0] = [f"{cell:<{width}}" for cell in grid[0]]
    lines = _aligned(grid, between="   ")
    if max(map(len, lines)) > WIDTH:
        lines = [f"of {len(splits)} splits, {len(shared)} pairs have images in common (each is in --json)"]
    leaks = sorted((pair for pair in shared if pair.is_leak), key=_is_of_two_sets)  # each set's own first
    lines += [_leak(pair, names) for pair in leaks] or ["no image of train is in another split"]
    return "\n".join(lines)


def report(
    splits: list[SplitStatistics], shared: list[SharedImages], tokenizers: dict[str, str | None]
) -> dict[str, Any]:
    """Everything as JSON takes it; ``tokenizers``: by dataset, what token counts are by."""
    names = labels(splits)
    return {
        "max_tokens": splits[0].max_tokens,
        "tokenizers": tokenizers,
        "splits": [one.summary() for one in splits],
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


def labels(splits: list[SplitStatistics]) -> dict[SplitStatistics, str]:
    """The splits' names, with their set's where there are several sets."""
    several = len({(one.dataset, one.split_by) for one in splits}) > 1
    return {one: f"{one.dataset} ({one.split_by}) {one.split}" if several else one.split for one in splits}


def _is_of_two_sets(pair: SharedImages) -> bool:
    return (pair.first.dataset, pair.first.split_by) != (pair.second.dataset, pair.second.split_by)


def _leak(pair: SharedImages, names: dict[SplitStatistics, str]) -> str:
    train, judged, count = pair.first, pair.second, pair.expressions[1]
    if judged.split == "train":
        train, judged, count = judged, train, pair.expressions[0]
    expressions = len(judged.words)
    return (
        f"leak: {pair.images} of {len(judged.images)} {names[judged]} images ({count} of {expressions} expressions, "
        f"{percent(count, expressions):.1f} %) are in {names[train]} too"
    )


def _table(rows: list[dict[str, Any]], columns: list[Column] | tuple[Column, ...]) -> str:
    """The columns' names under their groups'; the splits' names first, numbers at the right of their columns."""
    lines = ["", "split", *(row["split"] for row in rows)]
    for group, members in groupby(columns, key=lambda column: column.group):
        block = _aligned([[column.name, *(_cell(row, column) for row in rows)] for column in members], between="  ")
        width, left = max(len(group), len(block[0])), max(map(len, lines))
        block = [group, *block]
        lines = [f"{line:<{left}}   {more:>{width}}" for line, more in zip(lines, block, strict=True)]
    return "\n".join(line.rstrip() for line in lines)


def _aligned(columns: list[list[str]], between: str) -> list[str]:
    """Columns of equally many cells → lines of equal length; the first cells are names."""
    widths = [max(map(len, column)) for column in columns]
    return [
        between.join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
        for line in zip(*columns, strict=True)
    ]


def _cell(row: dict[str, Any], column: Column) -> str:
    value: Any = row
    for part in column.key.split("."):
        value = None if value is None else value[part]
    return NONE if value is None else column.form.format(value)
