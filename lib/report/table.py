"""The paper's table: the published rows, which checkpoint belongs to which, and ours beside them in four formats."""

import csv
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lib.cli import did_you_mean
from lib.errors import MissingFileError, UserError
from lib.files import write_text
from lib.metrics import METRIC_NAMES, compute_metrics
from lib.report.intervals import intervals
from lib.report.results import ResultFile, counts_of, read_results

MINUS = "−"


class PublishedRow(NamedTuple):
    """A row of the paper's table, in percent, in the order of METRIC_NAMES."""

    title: str
    dataset: str
    split_by: str
    split: str
    values: tuple[float, ...]
    doubtful: tuple[str, ...] = ()  # metrics that equal another method's published ones

    @property
    def name(self) -> str:
        """For files."""
        return f"{self.dataset}_{self.split_by}_{self.split}"


# fmt: off
PUBLISHED = (
    PublishedRow("RefCOCO val", "refcoco", "unc", "val", (85.82, 82.80, 77.49, 67.21, 35.97, 75.48, 73.44)),
    PublishedRow("RefCOCO testA", "refcoco", "unc", "testA", (88.92, 86.25, 81.62, 69.79, 36.68, 77.54, 76.16)),
    PublishedRow("RefCOCO testB", "refcoco", "unc", "testB", (81.35, 77.74, 72.27, 62.63, 37.64, 72.69, 70.15)),
    PublishedRow("RefCOCO+ val", "refcoco+", "unc", "val", (76.41, 73.09, 68.49, 59.09, 31.39, 67.27, 63.60)),
    PublishedRow("RefCOCO+ testA", "refcoco+", "unc", "testA", (82.43, 79.57, 74.80, 64.65, 32.89, 72.00, 69.10)),
    PublishedRow("RefCOCO+ testB", "refcoco+", "unc", "testB", (67.19, 63.31, 58.89, 49.93, 29.15, 60.09, 55.23)),
    PublishedRow("G-Ref (umd) val", "refcocog", "umd", "val", (74.75, 70.45, 64.58, 54.21, 28.57, 66.21, 62.68)),
    PublishedRow("G-Ref (umd) test", "refcocog", "umd", "test", (71.54, 66.38, 59.00, 48.21, 23.10, 62.09, 63.75),
                 doubtful=METRIC_NAMES[:-1]),
)
# fmt: on
SETS = tuple(dict.fromkeys(row.dataset for row in PUBLISHED))
DOUBTFUL_NOTE = (
    "† the published entry equals another method's published row; of that row only the overall IoU is a safe target."
)


class MeasuredRow(NamedTuple):
    """What became of a published row: our metrics by a protocol, with their intervals, or why there are none."""

    published: PublishedRow
    protocol: str = ""  # none: it was not measured
    metrics: dict[str, float] | None = None
    intervals: dict[str, tuple[float, float]] | None = None
    num_expressions: int = 0
    checkpoint: str = ""
    reason: str = ""  # why it was not measured


def measured_rows(published: PublishedRow, file: ResultFile) -> list[MeasuredRow]:
    """A row of each protocol of a whole result file."""
    header, lines = read_results(file.path)
    rows = []
    for protocol in (one["name"] for one in header["protocols"]):
        own = [line for line in lines if line["protocol"] == protocol]
        counts = counts_of(own)
        interval = intervals([line["image_id"] for line in own], counts)
        rows.append(MeasuredRow(published, protocol, compute_metrics(counts), interval, len(own), header["checkpoint"]))
    return rows


def choose_rows(dataset: str | None, split_by: str | None, splits: str | None) -> list[PublishedRow]:
    """The published rows that the flags leave; None: not given. UserError: none, or a split that none of them has."""
    rows = [row for row in PUBLISHED if dataset in (None, row.dataset) and split_by in (None, row.split_by)]
    names = [name.strip() for name in (splits or "all").split(",") if name.strip()]
    for name in names:
        if name != "all" and name not in [row.split for row in rows]:
            raise UserError(f"--table: no published row has split {name!r} with that --dataset and --splitBy")
    rows = [row for row in rows if "all" in names or row.split in names]
    if not rows:
        raise UserError(
            f"--table has rows of {', '.join(SETS)} (refcocog: umd), none with that --dataset and --splitBy"
        )
    return rows


def find_checkpoints(where: str | Path) -> dict[str, Path]:
    """The checkpoint of each dataset of the table.

    Args:
        where: a folder with best_<set>.pth, <set>.pth or <set>/best.pth, or a yaml of set: file (relative to itself).

    Raises:
        MissingFileError, UserError: it isn't there, names an unknown set or a file that isn't there, or has none.
    """
    where = Path(where)
    if where.is_dir():
        found: dict[str, Path] = {}
        for name in SETS:
            candidates = (where / f"best_{name}.pth", where / f"{name}.pth", where / name / "best.pth")
            first = next((path for path in candidates if path.is_file()), None)
            if first is not None:
                found[name] = first
        if not found:
            raise MissingFileError(f"--checkpoints {where}: no best_<set>.pth for any of {', '.join(SETS)}")
        return found
    try:
        entries = yaml.safe_load(where.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingFileError(f"--checkpoints {where}: no such folder or file") from error
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--checkpoints {where} is not a yaml of set: file ({' '.join(str(error).split())})") from error
    if not isinstance(entries, dict) or not entries or not all(isinstance(path, str) for path in entries.values()):
        raise UserError(f"--checkpoints {where} is not a yaml of set: file")
    for name, path in entries.items():
        if name not in SETS:
            raise UserError(f"--checkpoints {where}: unknown set {name!r}{did_you_mean(str(name), SETS)}")
        if not (where.parent / path).is_file():
            raise MissingFileError(f"--checkpoints {where}: {name}: no file {where.parent / path}")
    return {name: where.parent / path for name, path in entries.items()}


def metrics_table(rows: list[tuple[str, dict[str, float], int]]) -> str:
    """(name, metrics, number of expressions) as lines under the metrics' names, in percent."""
    width = max(len("split"), *(len(name) for name, _, _ in rows))
    lines = [f"{'split':<{width}}" + "".join(f"{name:>8}" for name in METRIC_NAMES) + f"{'expressions':>13}"]
    for name, metrics, count in rows:
        lines.append(f"{name:<{width}}" + "".join(f"{metrics[m]:>8.2f}" for m in METRIC_NAMES) + f"{count:>13}")
    return "\n".join(lines)


def text_table(rows: list[MeasuredRow], protocol: str) -> str:
    """The table for a terminal."""
    heading = f"{protocol} protocol"
    width = max(len(heading), *(len(row.published.title) for row in rows))
    lines = [f"{heading:<{width}}" + " " * 12 + "".join(f"{name:>9}" for name in METRIC_NAMES)]
    for row in _of(rows, protocol):
        for number, (what, cells) in enumerate(_cells(row).items()):
            title = row.published.title if number == 0 else ""
            lines.append(f"{title:<{width}}{what:>12}" + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join([*lines, *_notes(rows, protocol)])


def markdown_table(rows: list[MeasuredRow], protocol: str) -> str:
    """The table as Markdown."""
    lines = [
        f"**{protocol} protocol**\n",
        f"| split | | {' | '.join(METRIC_NAMES)} |",
        "|---|---|" + "---:|" * len(METRIC_NAMES),
    ]
    for row in _of(rows, protocol):
        for number, (what, cells) in enumerate(_cells(row).items()):
            title = row.published.title if number == 0 else ""
            lines.append(f"| {title} | {what} | {' | '.join(cells)} |")
    return "\n".join([*lines, *(f"\n{note}" for note in _notes(rows, protocol)), ""])


def latex_table(rows: list[MeasuredRow], protocol: str) -> str:
    """The table as LaTeX (booktabs)."""
    lines = [
        f"% {protocol} protocol",
        r"\begin{tabular}{ll" + "r" * len(METRIC_NAMES) + "}",
        r"\toprule",
        " & ".join(["split", "", *METRIC_NAMES]) + r" \\",
    ]
    for row in _of(rows, protocol):
        lines.append(r"\midrule")
        for number, (what, cells) in enumerate(_cells(row).items()):
            title = row.published.title if number == 0 else ""
            marked = [
                "--" if cell == "–" else cell.replace(MINUS, "$-$").replace("†", r"\textsuperscript{\dag}")
                for cell in cells
            ]
            lines.append(" & ".join([title, what, *marked]) + r" \\")
    width = 2 + len(METRIC_NAMES)
    for note in _notes(rows, protocol):
        text = note.replace("†", r"\textsuperscript{\dag}").replace("_", r"\_").replace("%", r"\%")
        lines.append(rf"\multicolumn{{{width}}}{{l}}{{\footnotesize {text}}} \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def csv_table(rows: list[MeasuredRow]) -> str:
    """A line per row, protocol and metric."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["dataset", "split_by", "split", "protocol", "metric", "ours", "low", "high", "paper", "difference", "doubtful"]
    )
    for row in rows:
        published = row.published
        for metric, paper in zip(METRIC_NAMES, published.values, strict=True):
            ours = low = high = difference = ""
            if row.metrics is not None and row.intervals is not None:
                low, high = (f"{bound:.4f}" for bound in row.intervals[metric])
                ours, difference = f"{row.metrics[metric]:.4f}", f"{row.metrics[metric] - paper:.4f}"
            which = (published.dataset, published.split_by, published.split, row.protocol, metric)
            doubtful = int(metric in published.doubtful)
            writer.writerow([*which, ours, low, high, f"{paper:.2f}", difference, doubtful])
    return text.getvalue()


def json_table(rows: list[MeasuredRow]) -> str:
    """An object per row and protocol."""
    entries: list[dict[str, Any]] = []
    for row in rows:
        published = row.published
        paper = dict(zip(METRIC_NAMES, published.values, strict=True))
        entries.append(
            {
                **{name: getattr(published, name) for name in ("title", "dataset", "split_by", "split")},
                "protocol": row.protocol,
                "num_expressions": row.num_expressions,
                "checkpoint": row.checkpoint,
                "ours": row.metrics,
                "interval_95": row.intervals,
                "paper": paper,
                "difference": row.metrics and {name: row.metrics[name] - paper[name] for name in METRIC_NAMES},
                "doubtful": list(published.doubtful),
                "not_measured": row.reason or None,
            }
        )
    return json.dumps(entries, indent=1, ensure_ascii=False) + "\n"


def write_tables(rows: list[MeasuredRow], folder: Path) -> list[Path]:
    """Write table.md, table.tex, table.csv and table.json; gives back their paths. UserError: no row was measured."""
    if not any(row.protocol for row in rows):
        raise UserError("--table: no row can be measured: " + "; ".join(dict.fromkeys(row.reason for row in rows)))
    protocols = list(dict.fromkeys(row.protocol for row in rows if row.protocol))
    contents = {
        "table.md": "\n".join(markdown_table(rows, protocol) for protocol in protocols),
        "table.tex": "\n".join(latex_table(rows, protocol) for protocol in protocols),
        "table.csv": csv_table(rows),
        "table.json": json_table(rows),
    }
    for name, content in contents.items():
        write_text(folder / name, content)
    return [folder / name for name in contents]


def _of(rows: list[MeasuredRow], protocol: str) -> list[MeasuredRow]:
    return [row for row in rows if row.protocol in (protocol, "")]


def _cells(row: MeasuredRow) -> dict[str, list[str]]:
    """What stands in the lines of a row: ours, the paper's, the difference."""
    marks = ["†" if name in row.published.doubtful else "" for name in METRIC_NAMES]
    paper = [f"{value:.2f}{mark}" for value, mark in zip(row.published.values, marks, strict=True)]
    if row.metrics is None:
        return {"ours": ["–"] * len(paper), "paper": paper}
    ours = [row.metrics[name] for name in METRIC_NAMES]
    differences = [f"{a - b:+.2f}".replace("-", MINUS) for a, b in zip(ours, row.published.values, strict=True)]
    return {"ours": [f"{value:.2f}" for value in ours], "paper": paper, "difference": differences}


def _notes(rows: list[MeasuredRow], protocol: str) -> list[str]:
    notes = [DOUBTFUL_NOTE] if any(row.published.doubtful for row in _of(rows, protocol)) else []
    if protocol != "paper":
        notes.append("The paper's numbers are by its own protocol: the differences are of protocol and model together.")
    return notes + [f"{row.published.title}: {row.reason}" for row in _of(rows, protocol) if row.reason]
