"""The curves of training runs in one picture: losses, learning rate, gradient norm, speed, evaluations.

python -m lib.plot models/<id> [models/<id2> …] [--out curves.png]
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from lib.cli import Parser, run_command
from lib.errors import MissingFileError, UserError
from lib.files import atomic_write, check_writable
from lib.journal import METRICS_FILE

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#8c564b")  # for all eyes
GREY = "#555555"
SIZE, DPI = (11.2, 5.0), 200  # inches, dots per inch
STYLE = {
    "font.size": 8, "axes.titlesize": 9, "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.grid": True,
    "axes.axisbelow": True, "axes.edgecolor": "#999999", "axes.spines.top": False, "axes.spines.right": False,
    "grid.color": "#e4e4e4", "grid.linewidth": 0.6, "xtick.color": GREY, "ytick.color": GREY, "figure.titlesize": 9,
    "lines.markersize": 2.8, "legend.frameon": False, "legend.fontsize": 8, "legend.handletextpad": 0.4,
    "legend.handlelength": 1.6, "legend.borderpad": 0.1,
}  # fmt: skip
RING = {"marker": "o", "linestyle": "", "markersize": 8, "markerfacecolor": "none", "color": "black"}


class Curve(NamedTuple):
    """A field of the lines of one kind, and how it is drawn."""

    kind: str
    field: str
    label: str = ""
    form: str = "-"  # matplotlib's short one: marker and line
    width: float = 1.1


DASHES = ("-", "--", "-.", ":")
OIOU = Curve("eval", "oIoU", "oIoU", "o-")
EVALUATION = "Evaluation on {split}, %"
PANELS = {
    EVALUATION: (
        OIOU, Curve("eval", "mIoU", "mIoU", "s--"),
        Curve("eval", "P@0.5", "P@0.5", "^-.", 0.6), Curve("eval", "P@0.9", "P@0.9", "v:", 0.6),
    ),
    "Loss": (Curve("train", "loss"),),
    "Segmentation loss": (Curve("train", "segmentation"),),
    "Alignment": tuple(Curve("train", f"alignment{i}", f"{i}", form) for i, form in enumerate(DASHES, 1)),
    "Learning rate": (Curve("train", "lr"),),
    "Gradient norm": (Curve("train", "grad_norm"),),
    "Samples / s": (Curve("train", "samples_per_second"),),
}  # fmt: skip
NUMBERS = {"step"}.union(curve.field for curves in PANELS.values() for curve in curves)


def metrics_file(path: str | Path) -> Path:
    """The metrics.jsonl that a run's folder, or the file itself, means; a MissingFileError where there is none."""
    file = Path(path, METRICS_FILE) if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise MissingFileError(f"no file {file}: give a run's folder, such as models/<model_id>, or its {METRICS_FILE}")
    return file


def read_metrics(path: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, of whatever kind; a torn last line is left out.

    Args:
        path: the run's folder, or the file itself.

    Raises:
        MissingFileError, UserError: no such file; a broken line; no train line yet.
    """
    path = metrics_file(path)
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from error
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    lines = []
    for number, line in numbered:
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            if number == numbered[-1][0]:  # the run is writing it, or was killed while it did
                break
            raise UserError(f"{path}, line {number} is not JSON ({error}): remove that line") from error
        _check(lines[-1], f"{path}, line {number}")
    if not any(line["kind"] == "train" and line.get("loss") is not None for line in lines):
        raise UserError(f"{path} holds no train lines with a loss: wait until the run has logged its first steps")
    return lines


def _check(line: Any, where: str) -> None:
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
        raise UserError(f"{where} is not an object with a kind: remove that line")
    for name in NUMBERS if line["kind"] in ("train", "eval") else ():
        value = line.get(name)
        # Where fp16 skipped all steps of a line, it has no loss.
        if type(value) not in (int, float) and (value is not None or name == "step"):
            raise UserError(f"{where}: {name} must be a number, not {json.dumps(value)}: correct or remove that line")


def run_names(files: list[Path]) -> list[str]:
    """The runs' folder names (a file of another name stands for itself), with parents where names are equal.

    Raises:
        UserError: a run is given twice.
    """
    paths = [Path(os.path.abspath(file)) for file in files]
    tails = [path.parent.parts if path.name == METRICS_FILE else path.parts for path in paths]
    names = []
    for file, tail in zip(files, tails, strict=True):
        if tails.count(tail) > 1:
            raise UserError(f"{file} is given twice: name each run once")
        depth = next(n for n in range(1, len(tail) + 1) if sum(other[-n:] == tail[-n:] for other in tails) == 1)
        names.append("/".join(tail[-depth:]))
    return names


def draw(runs: dict[str, list[dict]]) -> "Figure":  # noqa: F821  (matplotlib is optional)
    """The panels that have something to show.

    Args:
        runs: what :func:`read_metrics` gives, by the run's name.

    Raises:
        UserError: matplotlib isn't installed; more runs than colours.
    """
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("drawing needs matplotlib: pip install -r requirements-extra.txt") from error
    if len(runs) > len(COLORS):
        raise UserError(f"{len(runs)} runs: one picture can tell {len(COLORS)} apart; name fewer")
    shown = [t for t, curves in PANELS.items() if any(_points(run, c)[0] for c in curves for run in runs.values())]
    with style.context(["default", STYLE]):
        figure = Figure(figsize=SIZE, layout="constrained")
        rows = [shown[: len(shown) // 2], shown[len(shown) // 2 :]]
        rows[0][:0] = [EVALUATION] * (EVALUATION in shown)  # twice as wide as the others
        # In twelfths of the width the panels of both rows line up, be they two, three or four.
        axes = figure.subplot_mosaic([[t for t in row for _ in range(12 // len(row))] for row in rows if row])
        for title in shown:
            _draw_panel(axes[title], title, list(runs.values()))
        figure.supxlabel("optimizer steps", fontsize=9)
        _name_runs(figure, runs)
    return figure


def _points(run: list[dict], curve: Curve) -> tuple[list[float], list[float]]:
    """Steps and values."""
    lines = [line for line in run if line["kind"] == curve.kind and line.get(curve.field) is not None]
    return [line["step"] for line in lines], [line[curve.field] for line in lines]


def _best(run: list[dict]) -> tuple[float, float] | None:
    """Step and value of the best oIoU, the earliest among equal ones."""
    points = [point for point in zip(*_points(run, OIOU), strict=True) if math.isfinite(point[1])]
    return max(points, key=lambda point: point[1], default=None)


def _draw_panel(axes: Any, title: str, runs: list[list[dict]]) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

    evaluations = [line for run in runs for line in run if line["kind"] == "eval"]
    split = ", ".join(dict.fromkeys(str(line.get("split", "val")) for line in evaluations))
    if title == "Gradient norm" and any(value > 0 for run in runs for value in _points(run, PANELS[title][0])[1]):
        # Single spikes would flatten the rest.
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(LogLocator(subs=()))
    entries = 0
    for i, curve in enumerate(PANELS[title]):
        colors, label = (COLORS, GREY) if len(runs) > 1 else (COLORS[i:], COLORS[i])
        lines = [_points(run, curve) for run in runs]
        for color, (steps, values) in zip(colors, lines, strict=False):
            lone = {"marker": "o"} if len(steps) == 1 and curve.kind == "train" else {}  # a line needs two points
            axes.plot(steps, values, curve.form, color=color, linewidth=curve.width, zorder=2 + (curve == OIOU), **lone)
        if curve.label and any(steps for steps, _ in lines):
            axes.plot([], [], curve.form, color=label, linewidth=curve.width, label=curve.label)
            entries += 1
    if title == EVALUATION:
        best = [point for point in map(_best, runs) if point]
        axes.plot([step for step, _ in best], [value for _, value in best], label="best oIoU", zorder=4, **RING)
        entries += 1
    axes.set_title(title.format(split=split))
    if entries > 1:  # in the title's line, where no curve is
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=entries, columnspacing=0.8, borderaxespad=0.4)
    last = max(1, *(line["step"] for run in runs for line in run if line["kind"] in ("train", "eval")))
    axes.set_xlim(-0.03 * last, 1.03 * last)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10), integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter("{x:g}")


def _name_runs(figure: Any, runs: dict[str, list[dict]]) -> None:
    """Above the panels: each run's colour, name and best oIoU."""
    from matplotlib.lines import Line2D

    labels = []
    for name, run in runs.items():
        best = _best(run)
        labels.append(f"{name} (best oIoU {best[1]:.2f}, step {best[0]})" if best else name)
    if len(runs) == 1:  # colours tell curves apart here, so none stands for the run
        texts = [figure.suptitle(labels[0])]
    else:
        handles = [Line2D([], [], color=color, linewidth=2.5) for color, _ in zip(COLORS, runs, strict=False)]
        columns = max(1, 165 // (max(map(len, labels)) + 8))  # so many letters fit in a line
        texts = figure.legend(handles, labels, loc="outside upper center", ncols=columns).get_texts()
    for text in texts:
        text.set_parse_math(False)  # a $ is a $


def get_parser() -> Parser:
    parser = Parser(prog="python -m lib.plot", description="Draw the curves of training runs into one picture.")
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help=f"a run's folder, models/<model_id>, or its {METRICS_FILE}"
    )
    parser.add_argument("--out", metavar="FILE", help="the png (default for one run: curves.png in its folder)")
    return parser


def main() -> None:
    args = get_parser().parse_args(sys.argv[1:])
    files = [metrics_file(run) for run in args.runs]
    if not args.out and len(files) > 1:
        raise UserError("several runs: say with --out FILE where their picture goes")
    out = Path(args.out) if args.out else files[0].with_name("curves.png")
    check_writable(out)
    figure = draw({name: read_metrics(file) for name, file in zip(run_names(files), files, strict=True)})
    with atomic_write(out) as aside:
        figure.savefig(aside, format="png", dpi=DPI)
    print(out)


if __name__ == "__main__":
    run_command(main)
