"""The style of all charts. Matplotlib is optional. Imports no torch."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lib.errors import UserError
from lib.files import atomic_write

FORMATS = ("png", "pdf", "svg")  # of figures
# Distinguishable for color-blind readers (Okabe and Ito).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#8c564b")
GRAY = "#555555"
STYLE = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": "#999999",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
    "figure.titlesize": 9,
    "lines.markersize": 2.8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handletextpad": 0.4,
    "legend.handlelength": 1.6,
    "legend.borderpad": 0.1,
    "legend.labelspacing": 0.25,
    "legend.columnspacing": 0.8,
}


def check_format(file_format: str) -> None:
    """Raise a UserError if figures of this format (one of ``FORMATS``) need matplotlib, and it is not installed."""
    if file_format != "png":
        check_matplotlib(f"Writing {file_format} files")


def check_matplotlib(task: str) -> None:
    """Raise a UserError that names the task if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"{task} needs matplotlib. Run: pip install -r requirements-extra.txt")


@contextmanager
def styled_figure(width: float, height: float) -> Iterator["Figure"]:  # noqa: F821  (matplotlib is optional)
    """Yield an empty figure. Inside the block, matplotlib uses the style of the project.

    Args:
        width, height: in inches.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("Drawing needs matplotlib. Run: pip install -r requirements-extra.txt") from error
    with style.context(["default", STYLE]):
        yield Figure(figsize=(width, height), layout="constrained")


def save_png(figure: "Figure", path: Path, *, dpi: int) -> None:  # noqa: F821  (matplotlib is optional)
    """Write a figure atomically. UserError: it cannot be written."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
