"""Draw the statistics of splits: sentence lengths, object sizes, expressions per ref, and parts per object."""

import itertools
from typing import Any

import numpy as np

from lib.charts import COLORS, GRAY, styled_figure
from refer.stats.statistics import SplitStatistics

SPLITS = ("train", "val", "testA", "testB", "test")  # have the same colors in every figure
MAX_BARS = 8  # larger values are in the last group of bars
WIDTH, HEIGHT, DPI = 10.0, 6.8, 160  # inches per dataset, dots per inch
Colors = dict[str, str]  # split: color


def draw_statistics(datasets: list[list[SplitStatistics]]) -> "Figure":  # noqa: F821  (matplotlib is optional)
    """Return a figure with four panels per dataset. Values are in percent, so that small splits are visible.

    Args:
        datasets: the splits of each dataset, as :func:`refer.stats.statistics.statistics_of` returns them.

    Raises:
        UserError: matplotlib is not installed.
    """
    names = dict.fromkeys([*SPLITS, *(split.name for splits in datasets for split in splits)])
    colors = dict(zip(names, itertools.cycle(COLORS), strict=False))
    with styled_figure(WIDTH, HEIGHT * len(datasets)) as figure:
        for row, splits in zip(figure.subfigures(len(datasets), 1, squeeze=False)[:, 0], datasets, strict=True):
            title = row.suptitle(splits[0].title, weight="bold", fontsize=10)
            title.set_parse_math(False)  # a name may contain $
            lengths, sizes, refs, parts = row.subplots(2, 2).flat
            _draw_lengths(lengths, splits, colors)
            _draw_sizes(sizes, splits, colors)
            _draw_refs(refs, splits, colors)
            _draw_parts(parts, splits, colors)
    return figure


def _draw_lengths(axes: Any, splits: list[SplitStatistics], colors: Colors) -> None:
    """Draw tokens per expression and the length at which they are cut. Without a tokenizer, draw words."""
    has_tokens = bool(splits[0].tokens)
    numbers = {split: split.tokens if has_tokens else split.words for split in splits}
    end = (
        max(int(np.percentile(lengths, 99.9)) for lengths in numbers.values()) + 4
    )  # without the few sentences that are much longer
    for split, lengths in numbers.items():
        label = f"median {split.summary['words']['median']:.1f}"
        if has_tokens:
            label = f"{split.summary['cut']['percent']:.2f} % cut"
        shares = 100 * np.bincount(lengths, minlength=end + 1)[: end + 1] / len(lengths)
        axes.plot(shares, color=colors[split.name], linewidth=1.2, label=f"{split.name}: {label}")
    cut = splits[0].max_tokens + 0.5
    if has_tokens and cut < end:
        axes.axvspan(cut, end + 0.5, color="#000000", alpha=0.06, linewidth=0)
        axes.axvline(cut, color=GRAY, linestyle="--", linewidth=1)
        text = f"cut at {splits[0].max_tokens}"
        axes.text(cut + 0.3, 0.97, text, color=GRAY, va="top", rotation=90, transform=axes.get_xaxis_transform())
    axes.set_xlim(-0.5, end + 0.5)
    _finish(axes, "Sentence lengths", "tokens with [CLS] and [SEP]" if has_tokens else "words", "% of expressions")


def _draw_sizes(axes: Any, splits: list[SplitStatistics], colors: Colors) -> None:
    """Draw histograms of object sizes with logarithmic bins."""
    edges = np.logspace(-2, 2, 33)
    for split in splits:
        sizes = [size for size in split.size_percent if size > 0]  # a log scale has no 0, the size of an empty mask
        if sizes:
            shares = 100 * np.histogram(np.clip(sizes, edges[0], edges[-1]), edges)[0] / len(sizes)
            label = f"{split.name}: median {split.summary['size_percent']['median']:.1f} %"
            axes.stairs(shares, edges, color=colors[split.name], linewidth=1.3, label=label)
    axes.set_xscale("log")
    axes.set_xlim(edges[0], edges[-1])
    axes.xaxis.set_major_formatter("{x:g}")
    _finish(axes, "Object sizes", "% of the image, log scale", "% of objects")


def _draw_refs(axes: Any, splits: list[SplitStatistics], colors: Colors) -> None:
    values = {split: list(split.expressions_per_ref.values()) for split in splits}
    labels = {split: f"mean {split.summary['expressions_per_ref']['mean']:.1f}" for split in splits}
    _draw_bars(axes, values, labels, colors)
    _finish(axes, "Expressions per ref", "expressions", "% of refs")


def _draw_parts(axes: Any, splits: list[SplitStatistics], colors: Colors) -> None:
    values = {split: [item.parts for item in split.objects.values()] for split in splits if split.objects}
    labels = {split: f"{split.summary['overlap']['percent']:.2f} % overlap" for split in values}
    _draw_bars(axes, values, labels, colors)
    _finish(axes, "Parts", "polygons or RLEs per object", "% of objects")


def _draw_bars(
    axes: Any, values: dict[SplitStatistics, list[int]], labels: dict[SplitStatistics, str], colors: Colors
) -> None:
    """Draw a group of bars for each of the values 1, 2, …, with one bar per split."""
    maximum = max((max(numbers) for numbers in values.values()), default=1)
    groups, width = min(maximum, MAX_BARS), 0.8 / max(1, len(values))
    for row, (split, numbers) in enumerate(values.items()):
        shares = 100 * np.bincount(np.minimum(numbers, groups), minlength=groups + 1)[1:] / len(numbers)
        x = np.arange(1, groups + 1) + (row - (len(values) - 1) / 2) * width
        axes.bar(x, shares, width, color=colors[split.name], label=f"{split.name}: {labels[split]}")
    names = [*map(str, range(1, groups)), f"{groups}+" if maximum > groups else str(groups)]
    axes.set_xticks(range(1, groups + 1), names)
    axes.set_xlim(0.4, max(groups, 3) + 0.6)
    axes.grid(visible=False, axis="x")


def _finish(axes: Any, title: str, x_label: str, y_label: str) -> None:
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:g}")
    if axes.get_legend_handles_labels()[0]:
        # Above the panel, where it hides nothing.
        legend = axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2, fontsize=7.5)
        for text in legend.get_texts():
            text.set_parse_math(False)
