"""The distributions of a set's splits in one picture: sentence lengths, object sizes, expressions per ref, parts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lib.errors import UserError
from refer.stats.statistics import SplitStatistics, percent

# Colours that all eyes tell apart; a split has the same one in every set.
COLORS = {"train": "#0072b2", "val": "#d55e00", "testA": "#009e73", "testB": "#cc79a7", "test": "#e69f00"}
OTHER_COLORS = ("#56b4e9", "#000000", "#8c564b")
MARKERS = "os^vDP*X"
GREY = "#555555"
DPI = 160
STYLE = {
    "font.size": 8, "axes.titlesize": 9, "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.grid": True,
    "axes.axisbelow": True, "axes.edgecolor": "#999999", "axes.spines.top": False, "axes.spines.right": False,
    "grid.color": "#e4e4e4", "grid.linewidth": 0.6, "xtick.color": GREY, "ytick.color": GREY, "figure.titlesize": 10,
    "lines.linewidth": 1.2, "lines.markersize": 3, "legend.frameon": False, "legend.fontsize": 7.5,
    "legend.handlelength": 1.5, "legend.handletextpad": 0.5, "legend.columnspacing": 1.2, "legend.labelspacing": 0.25,
}  # fmt: skip
MOST_BARS = 8  # more expressions or parts than that share the last group of bars
ALONE, ROW = (10.0, 6.8), (18.0, 3.4)  # inches: one set's four panels; of several sets one set's row


class Look(NamedTuple):
    """How a split is drawn."""

    color: str
    marker: str


def draw(sets: list[list[SplitStatistics]]) -> "Figure":  # noqa: F821  (matplotlib is optional)
    """Four panels per set; lines and bars are percentages of their own split, so small splits can be seen.

    Args:
        sets: what :func:`refer.stats.statistics.statistics_of` gives, for each set.

    Raises:
        UserError: matplotlib isn't installed.
    """
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("drawing needs matplotlib: pip install -r requirements-extra.txt") from error
    alone = len(sets) == 1
    names = list(dict.fromkeys(one.split for splits in sets for one in splits))
    with style.context(["default", STYLE]):
        figure = Figure(figsize=ALONE if alone else (ROW[0], ROW[1] * len(sets)), layout="constrained")
        for part, splits in zip(figure.subfigures(len(sets), 1, squeeze=False)[:, 0], sets, strict=True):
            title = part.suptitle(f"{splits[0].dataset} ({splits[0].split_by})", weight="bold")
            title.set_parse_math(False)  # a $ is a $
            panels = part.subplots(2, 2) if alone else part.subplots(1, 4)
            looks = [_look(one.split, names) for one in splits]
            for axes, panel in zip(panels.flat, (_lengths, _sizes, _expressions, _parts), strict=True):
                panel(axes, splits, looks)
    return figure


def _look(split: str, names: list[str]) -> Look:
    others = [name for name in names if name not in COLORS]
    order = [*COLORS, *others]
    color = COLORS.get(split) or OTHER_COLORS[others.index(split) % len(OTHER_COLORS)]
    return Look(color, MARKERS[order.index(split) % len(MARKERS)])


def _lengths(axes: Any, splits: list[SplitStatistics], looks: list[Look]) -> None:
    """Tokens per expression with the cut, or words where there is no tokenizer."""
    has_tokens = all(one.tokens is not None for one in splits)
    lengths = [one.tokens if has_tokens else one.words for one in splits]
    cut = splits[0].max_tokens if has_tokens else 0
    # Few sentences are much longer than the others; the tables tell the longest.
    end = max(int(np.percentile(one, 99.9)) + 1 for one in lengths)
    end = max(end, cut + 4) if cut < 4 * end else end  # a cut far away would squeeze the lines
    for one, length, look in zip(splits, lengths, looks, strict=True):
        counts = np.bincount(length, minlength=end + 1)[: end + 1]
        label = (
            f"{one.split}: {percent(one.cut, len(length)):.2f} % cut" if has_tokens else _named(one, "words", "median")
        )
        shown = np.flatnonzero(counts)
        x = np.arange(max(0, shown[0] - 1), min(end, shown[-1] + 1) + 1)
        marked = np.flatnonzero(counts[x]).tolist()
        shares = 100 * counts[x] / len(length)
        axes.plot(x, shares, color=look.color, marker=look.marker, markevery=marked, label=label)
    if 0 < cut < end:
        axes.axvspan(cut + 0.5, end + 0.5, color="#000000", alpha=0.06, linewidth=0)
        axes.axvline(cut + 0.5, color=GREY, linestyle="--", linewidth=1)
        place = {"ha": "left", "va": "top", "rotation": 90, "transform": axes.get_xaxis_transform()}
        axes.text(cut + 0.8, 0.97, f"cut at {cut}", color=GREY, **place)
    axes.set_xlim(-0.5, end + 0.5)
    _finish(axes, "Sentence lengths", "tokens, [CLS] and [SEP] too" if has_tokens else "words", "% of expressions")


def _sizes(axes: Any, splits: list[SplitStatistics], looks: list[Look]) -> None:
    sizes = [one.sizes[one.sizes > 0] for one in splits]  # an empty mask has no place on a log scale
    smallest = min((one.min() for one in sizes if one.size), default=1.0)
    decades = int(2 - np.floor(np.log10(min(smallest, 10))))
    per_decade = 8 if min(map(len, sizes)) >= 200 else 4
    edges = np.logspace(2 - decades, 2, decades * per_decade + 1)
    edges[-1] *= 1 + 1e-9  # 100 % belongs to the last bin
    for one, size, look in zip(splits, sizes, looks, strict=True):
        if size.size:
            shares = 100 * np.histogram(size, edges)[0] / len(size)
            axes.stairs(
                shares, edges, color=look.color, linewidth=1.3, label=_named(one, "size_percent", "median", " %")
            )
    axes.set_xscale("log")
    axes.set_xlim(edges[0], edges[-1])
    axes.xaxis.set_major_formatter("{x:g}")
    _finish(axes, "Object sizes", "% of the picture, log scale", "% of objects")


def _expressions(axes: Any, splits: list[SplitStatistics], looks: list[Look]) -> None:
    _bars(
        axes, splits, looks, lambda one: one.expressions_per_ref, lambda one: _named(one, "expressions_per_ref", "mean")
    )
    _finish(axes, "Expressions per ref", "expressions", "% of refs")


def _parts(axes: Any, splits: list[SplitStatistics], looks: list[Look]) -> None:
    def label(one: SplitStatistics) -> str:
        return f"{one.split}: {one.summary()['overlap']['percent']:.2f} % overlap"

    _bars(axes, splits, looks, lambda one: one.parts, label)
    _finish(axes, "Parts", "polygons or RLEs per object", "% of objects")


def _bars(
    axes: Any,
    splits: list[SplitStatistics],
    looks: list[Look],
    values: Callable[[SplitStatistics], np.ndarray],
    label: Callable[[SplitStatistics], str],
) -> None:
    """Groups of bars at 1, 2, …, a bar per split."""
    drawn = [(one, values(one), look) for one, look in zip(splits, looks, strict=True) if values(one).size]
    most = max((int(counts.max()) for _, counts, _ in drawn), default=1)
    groups, width = min(most, MOST_BARS), 0.8 / max(1, len(drawn))
    for row, (one, counts, look) in enumerate(drawn):
        shares = 100 * np.bincount(np.minimum(counts, groups), minlength=groups + 1)[1:] / len(counts)
        x = np.arange(1, groups + 1) + (row - (len(drawn) - 1) / 2) * width
        axes.bar(x, shares, width, color=look.color, label=label(one))
    axes.set_xticks(range(1, groups + 1), [*map(str, range(1, groups)), f"{groups}+" if most > groups else str(groups)])
    axes.set_xlim(0.4, max(groups, 3) + 0.6)
    axes.grid(visible=False, axis="x")


def _named(one: SplitStatistics, group: str, key: str, unit: str = "") -> str:
    return f"{one.split}: {key} {one.summary()[group][key]:.1f}{unit}"


def _finish(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:g}")
    if axes.get_legend_handles_labels()[0]:
        # Above the panel, where nothing is drawn.
        legend = axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2)
        for text in legend.get_texts():
            text.set_parse_math(False)
