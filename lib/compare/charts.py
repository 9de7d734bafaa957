"""Charts of a comparison: learning curves with the range of the seeds, and mean IoU by kind of expression.

Each figure is as wide as a phone's screen can show legibly. Colors are those of the models' masks in the panels.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from PIL import ImageColor

from lib.charts import COLORS, GRAY, styled_figure
from lib.compare.kinds import Grouping
from lib.compare.plan import Run
from lib.files import METRICS_FILE
from lib.report.curves import Line, read_metrics
from lib.visualize import TARGET_COLOR

# Of the models, in charts and masks. The target has its own color; black, the least transparent one, comes last.
PALETTE = tuple(
    sorted((c for c in map(ImageColor.getrgb, COLORS) if c != TARGET_COLOR), key=lambda color: color == (0, 0, 0))
)
WIDTH, HEIGHT, DPI = 4.2, 3.2, 200  # inches, dots per inch
CURVES = {  # file: kind of the lines, field, title
    "curve_mIoU": ("eval", "mIoU", "Mean IoU during training, %"),
    "curve_loss": ("train", "segmentation", "Segmentation loss"),
}
Figures = dict[str, "Figure"]  # noqa: F821  (matplotlib is optional)


def colors_of(names: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Return the color of each model."""
    return {name: tuple(x / 255 for x in color) for name, color in zip(names, cycle(PALETTE), strict=False)}


def read_runs(runs: Sequence[Run]) -> dict[str, list[list[Line]]]:
    """Return the lines of metrics.jsonl of each model's seeds. Runs whose file is not here are left out."""
    found: dict[str, list[list[Line]]] = {}
    for run in runs:
        path = run.logs / METRICS_FILE
        if not run.given and path.is_file():
            found.setdefault(run.model.name, []).append(read_metrics(path))
    return found


def draw_curves(runs: Mapping[str, Sequence[Sequence[Line]]], names: Sequence[str]) -> Figures:
    """Return a figure for each quantity: the mean over the seeds as a line, their range as a band.

    Args:
        runs: as :func:`read_runs` returns them.
        names: all models, which determine the colors.
    """
    figures, colors = {}, colors_of(names)
    for file, (kind, field, title) in CURVES.items():
        curves = {name: curve_of(seeds, kind, field) for name, seeds in runs.items()}
        if not any(len(steps) for steps, _ in curves.values()):
            continue
        with styled_figure(WIDTH, HEIGHT) as figure:
            axes = figure.subplots()
            for name, (steps, values) in curves.items():
                marker = "o" if kind == "eval" else ""
                axes.plot(steps, values.mean(0), color=colors[name], label=name, linewidth=1.3, marker=marker)
                axes.fill_between(steps, values.min(0), values.max(0), color=colors[name], alpha=0.2, linewidth=0)
            axes.set_xlabel("optimizer steps")
            axes.xaxis.get_major_locator().set_params(integer=True)
            _finish(figure, axes, title)
        figures[file] = figure
    return figures


def curve_of(seeds: Sequence[Sequence[Line]], kind: str, field: str) -> tuple[list[int], np.ndarray]:
    """Return the P steps that all seeds have, and the values [S, P] of a field there."""
    curves = [
        {line["step"]: line[field] for line in lines if line["kind"] == kind and line.get(field) is not None}
        for lines in seeds
    ]
    steps = sorted(set.intersection(*map(set, curves)))
    return steps, np.array([[curve[step] for step in steps] for curve in curves], dtype=float)


def draw_kinds(ious: Mapping[str, np.ndarray], groupings: Sequence[Grouping]) -> Figures:
    """Return a bar chart for each grouping: mean over the seeds, error bars of ± one standard deviation.

    Args:
        ious: IoU (0 to 1) of each expression with each seed, [S, n], by model.
        groupings: of the n expressions.
    """
    figures, colors = {}, colors_of(list(ious))
    for number, grouping in enumerate(groupings, 1):
        with styled_figure(WIDTH, HEIGHT) as figure:
            axes, width = figure.subplots(), 0.8 / len(ious)
            positions = np.arange(len(grouping.groups))
            for i, (name, values) in enumerate(ious.items()):
                means = 100 * np.array([values[:, indices].mean(1) for indices in grouping.groups.values()])  # [G, S]
                error = means.std(1, ddof=1) if means.shape[1] > 1 else None
                left = positions + (i - (len(ious) - 1) / 2) * width
                bars = {"color": colors[name], "label": name, "error_kw": {"elinewidth": 0.8, "ecolor": GRAY}}
                axes.bar(left, means.mean(1), width, yerr=error, **bars)
            labels = [f"{name}\nn = {len(indices)}" for name, indices in grouping.groups.items()]
            axes.set_xticks(positions, labels, fontsize=7)
            axes.grid(visible=False, axis="x")
            axes.set_ylim(0, min(100, axes.get_ylim()[1]))
            axes.set_ylabel("mean IoU, %")
            _finish(figure, axes, grouping.title)
        figures[f"kinds_{number}"] = figure
    return figures


def _finish(figure: Any, axes: Any, title: str) -> None:
    figure.suptitle(title, weight="bold", x=0.02, ha="left")
    handles, labels = axes.get_legend_handles_labels()
    for text in figure.legend(handles, labels, loc="outside lower center", ncols=3).get_texts():
        text.set_parse_math(False)  # a name may contain $
