"""Read the metrics.jsonl of training runs and draw their curves."""

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from lib.charts import COLORS, GRAY, styled_figure
from lib.errors import MissingFileError, UserError
from lib.files import METRICS_FILE, protect

SIZE, DPI = (11.2, 5.0), 200  # inches, dots per inch
BEST_MARKER = {"marker": "o", "linestyle": "", "markersize": 8, "markerfacecolor": "none", "color": "black"}
Line = dict[str, Any]  # of metrics.jsonl


class Curve(NamedTuple):
    """How one field of the lines is drawn."""

    kind: str  # of the lines: train or eval
    field: str
    label: str = ""
    fmt: str = "-"  # marker and line style in matplotlib's short form
    width: float = 1.1


OIOU = Curve("eval", "oIoU", "oIoU", "o-")
EVALUATION = "Evaluation on {split}, %"
PANELS = {
    EVALUATION: (
        OIOU,
        Curve("eval", "mIoU", "mIoU", "s--"),
        Curve("eval", "P@0.5", "P@0.5", "^-.", 0.6),
        Curve("eval", "P@0.9", "P@0.9", "v:", 0.6),
    ),
    "Loss": (Curve("train", "loss"),),
    "Segmentation loss": (Curve("train", "segmentation"),),
    "Alignment": tuple(Curve("train", f"alignment{i}", f"{i}", fmt) for i, fmt in enumerate(("-", "--", "-.", ":"), 1)),
    "Learning rate": (Curve("train", "lr"),),
    "Gradient norm": (Curve("train", "grad_norm"),),
    "Samples / s": (Curve("train", "samples_per_second"),),
}
NUMBERS = {"step"}.union(curve.field for curves in PANELS.values() for curve in curves)


def find_metrics_file(path: str | Path) -> Path:
    """Return the metrics.jsonl of a run's folder, or ``path`` if it is a file. MissingFileError: there is none."""
    file = Path(path, METRICS_FILE) if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise MissingFileError(
            f"There is no file {file}. Give the folder of a run, such as models/<model_id>, or its {METRICS_FILE}."
        )
    return file


def read_metrics(path: str | Path) -> list[Line]:
    """Return the lines of a run's metrics.jsonl. An incomplete last line, which is being written, is left out.

    Args:
        path: the folder of the run, or the file.

    Raises:
        MissingFileError, UserError: there is no such file, a line is invalid, or no training step has been logged yet.
    """
    path = find_metrics_file(path)
    protect(path)
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    lines = []
    for number, content in numbered:
        where = f"{path}, line {number}"
        try:
            line = json.loads(content)
        except ValueError as error:
            if number == numbered[-1][0]:
                break
            raise UserError(f"{where} is not JSON ({error}). Remove the line.") from error
        _check_line(line, where)
        lines.append(line)
    if not any(line["kind"] == "train" and line.get("loss") is not None for line in lines):
        raise UserError(f"{path} has no losses yet. Wait until the run has logged its first steps.")
    return lines


def _check_line(line: Any, where: str) -> None:
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
        raise UserError(f"{where} is not an object with a kind. Remove the line.")
    if line["kind"] in ("train", "eval"):
        for name in NUMBERS:
            value = line.get(name)
            may_be_missing = name != "step"  # for example, there is no loss if fp16 skipped all steps of a line
            if type(value) not in (int, float) and not (value is None and may_be_missing):
                raise UserError(
                    f"{where}: {name} must be a number, not {json.dumps(value)}. Correct or remove the line."
                )


def run_names(files: list[Path]) -> list[str]:
    """Return the folder name of each run (the file name if it is not metrics.jsonl), with parents where it repeats.

    Raises:
        UserError: a run occurs twice.
    """
    paths = [Path(os.path.abspath(file)) for file in files]
    all_parts = [path.parent.parts if path.name == METRICS_FILE else path.parts for path in paths]
    names = []
    for file, parts in zip(files, all_parts, strict=True):
        if all_parts.count(parts) > 1:
            raise UserError(f"{file} is given twice. Give each run once.")
        # the shortest end of the path that no other run has
        length = next(n for n in range(1, len(parts) + 1) if sum(p[-n:] == parts[-n:] for p in all_parts) == 1)
        names.append("/".join(parts[-length:]))
    return names


def draw_curves(runs: dict[str, list[Line]]) -> "Figure":  # noqa: F821  (matplotlib is optional)
    """Return a figure with a panel for each quantity that a run has.

    Args:
        runs: lines of metrics.jsonl by the name of the run, as :func:`read_metrics` returns them.

    Raises:
        UserError: matplotlib is not installed, or there are more runs than colors.
    """
    if len(runs) > len(COLORS):
        raise UserError(f"{len(runs)} runs: a figure has colors for {len(COLORS)}. Give fewer.")
    shown = [
        title
        for title, curves in PANELS.items()
        if any(_points(run, curve)[0] for curve in curves for run in runs.values())
    ]
    with styled_figure(*SIZE) as figure:
        rows = [shown[: len(shown) // 2], shown[len(shown) // 2 :]]
        if EVALUATION in shown:
            rows[0].insert(0, EVALUATION)  # twice as wide as the others
        # Rows of two, three or four panels are aligned, since each has 12 columns.
        axes = figure.subplot_mosaic([[title for title in row for _ in range(12 // len(row))] for row in rows if row])
        for title in shown:
            _draw_panel(axes[title], title, list(runs.values()))
        figure.supxlabel("optimizer steps", fontsize=9)
        _add_run_names(figure, runs)
    return figure


def _points(run: list[Line], curve: Curve) -> tuple[list[float], list[float]]:
    """Return the steps and the values of a curve."""
    lines = [line for line in run if line["kind"] == curve.kind and line.get(curve.field) is not None]
    return [line["step"] for line in lines], [line[curve.field] for line in lines]


def _best(run: list[Line]) -> tuple[float, float] | None:
    """Return step and value of the highest oIoU, the earliest if there are several."""
    points = [point for point in zip(*_points(run, OIOU), strict=True) if math.isfinite(point[1])]
    return max(points, key=lambda point: point[1], default=None)


def _draw_panel(axes: Any, title: str, runs: list[list[Line]]) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

    lines = [line for run in runs for line in run]
    if title == "Gradient norm" and any(value > 0 for run in runs for value in _points(run, PANELS[title][0])[1]):
        # On a linear scale, single spikes would flatten the rest.
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(LogLocator(subs=()))
    entries = 0
    for i, curve in enumerate(PANELS[title]):
        # A color stands for a run, or for a curve if there is only one run.
        colors, legend_color = (COLORS, GRAY) if len(runs) > 1 else (COLORS[i:], COLORS[i])
        points = [_points(run, curve) for run in runs]
        for color, (steps, values) in zip(colors, points, strict=False):
            marker = {"marker": "o"} if len(steps) == 1 and curve.kind == "train" else {}  # a line needs two points
            axes.plot(
                steps, values, curve.fmt, color=color, linewidth=curve.width, zorder=2 + (curve == OIOU), **marker
            )
        if curve.label and any(steps for steps, _ in points):
            axes.plot([], [], curve.fmt, color=legend_color, linewidth=curve.width, label=curve.label)
            entries += 1
    if title == EVALUATION:
        best = [point for point in map(_best, runs) if point]
        axes.plot([step for step, _ in best], [value for _, value in best], label="best oIoU", zorder=4, **BEST_MARKER)
        entries += 1
    splits = dict.fromkeys(str(line.get("split", "val")) for line in lines if line["kind"] == "eval")
    axes.set_title(title.format(split=", ".join(splits)))
    if entries > 1:  # beside the title, where it covers no curve
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=entries, borderaxespad=0.4)
    last_step = max(1, *(line["step"] for line in lines if line["kind"] in ("train", "eval")))
    axes.set_xlim(-0.03 * last_step, 1.03 * last_step)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10), integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter("{x:g}")


def _add_run_names(figure: Any, runs: dict[str, list[Line]]) -> None:
    """Write the name and the best oIoU of each run, and its color if there are several, above the panels."""
    from matplotlib.lines import Line2D

    labels = []
    for name, run in runs.items():
        best = _best(run)
        labels.append(f"{name} (best oIoU {best[1]:.2f}, step {best[0]})" if best else name)
    if len(runs) == 1:
        texts = [figure.suptitle(labels[0])]
    else:
        handles = [Line2D([], [], color=color, linewidth=2.5) for color, _ in zip(COLORS, runs, strict=False)]
        columns = max(1, 165 // (max(map(len, labels)) + 8))  # a line has room for 165 characters
        texts = figure.legend(handles, labels, loc="outside upper center", ncols=columns).get_texts()
    for text in texts:
        text.set_parse_math(False)  # a name may contain $
