"""Reproduce the paper's table: evaluate its rows and write our numbers next to the paper's in four formats."""

import csv
import functools
import io
import json
import logging
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from data.pack.source import check_packed
from lib import config
from lib.errors import CommonError, UserError
from lib.evaluation import EvalSetup, evaluate
from lib.files import Kind, check_writable, write_text
from lib.loading import LoadedCheckpoint, load_for_evaluation, start_evaluation
from lib.metrics import METRIC_NAMES, compute_metrics
from lib.report.intervals import intervals
from lib.report.published import DOUBTFUL_NOTE, PUBLISHED, PublishedRow, choose_rows, find_checkpoints
from lib.report.results import ResultFile, counts_of, read_results
from lib.tables import latex_document, to_latex, to_markdown, to_text
from refer.refer import REFER
from utils import attempt, on_main

LOG = logging.getLogger("crossvlt")


class MeasuredRow(NamedTuple):
    """A published row with our metrics under a protocol, or with the reason why it was not measured."""

    published: PublishedRow
    protocol: str = ""  # empty if the row was not measured
    metrics: dict[str, float] | None = None
    intervals: dict[str, tuple[float, float]] | None = None
    num_expressions: int = 0
    checkpoint: str = ""
    precision: str = ""
    reason: str = ""  # why the row was not measured

    @property
    def other_size(self) -> str:
        """A note if the row was measured on another number of expressions than the published split has, else empty."""
        if self.num_expressions in (0, self.published.num_expressions):
            return ""
        counts = f"{self.num_expressions} expressions here, but {self.published.num_expressions} as published"
        return f"‡ {self.published.title} has {counts}: the numbers are not comparable."


def reproduce_table(args: Any) -> None:
    """Evaluate the published rows that have a checkpoint and a dataset, and write the table.

    Rows that an earlier run has finished are read from their result files.

    Args:
        args: the parsed flags of test.py; ``checkpoints`` names the input (a folder or YAML file), ``table_dir`` the
            output folder.

    Raises:
        UserError: no row matches the flags, no row can be measured, or a file cannot be written.
    """
    flags, folder = vars(args), Path(args.table_dir)
    # The published numbers are those of one network. Checkpoints of another one are not measured.
    model = config.load_config(_with_dataset(args, PUBLISHED[0]))[0].MODEL.NAME
    flags[config.NAME_KEY] = model
    checkpoints = find_checkpoints(args.checkpoints, model)
    published = choose_rows(flags.get("DATA.NAME"), flags.get("DATA.SPLIT_BY"), flags.get("DATA.SPLIT"), model)
    cfg, _ = config.load_config(_with_dataset(args, published[0]))
    check_packed(cfg.DATA.PACKED, *((row.dataset, row.split_by, row.split) for row in published))
    rows = []
    with start_evaluation(cfg, keeps_results=True) as setup:
        on_main(lambda: check_writable(folder / "table.md", Kind.TEXT))
        for name in dict.fromkeys(row.checkpoint_name for row in published):
            of_checkpoint = [row for row in published if row.checkpoint_name == name]
            rows += _measure_dataset(of_checkpoint, checkpoints.get(name), args, setup)
        paths = on_main(lambda: write_tables(rows, folder))
        if setup.dist.is_main:
            for protocol in dict.fromkeys(row.protocol for row in rows if row.protocol):
                print(f"\n{text_table(rows, protocol)}")
            print("\n".join(map(str, paths)))


def _with_dataset(args: Any, row: PublishedRow) -> Any:
    """Return a copy of the flags with the dataset and splitBy of a row."""
    changed = copy(args)
    vars(changed).update({"DATA.NAME": row.dataset, "DATA.SPLIT_BY": row.split_by})
    return changed


def _measure_dataset(
    published: Sequence[PublishedRow], checkpoint: Path | None, args: Any, setup: EvalSetup
) -> list[MeasuredRow]:
    """Evaluate the rows of one dataset and splitBy, or read those that an earlier run has evaluated."""
    first = published[0]
    if checkpoint is None:
        reason = f"no checkpoint for {first.checkpoint_name} in {args.checkpoints}"
        return [MeasuredRow(row, reason=reason) for row in published]

    def load() -> tuple[LoadedCheckpoint, REFER]:
        loaded = load_for_evaluation(_with_dataset(args, first), checkpoint)
        return loaded, REFER(loaded.cfg.DATA.ROOT, first.dataset, first.split_by)

    found, reason = attempt(load)
    if reason:
        return [MeasuredRow(row, reason=reason) for row in published]
    loaded, refer = found
    # Built once, and only if a row needs it.
    build_model = functools.cache(lambda: loaded.build_model(setup.dist.device))
    rows = []
    for row in published:
        rows += _measure_row(row, loaded, refer, build_model, Path(args.table_dir), setup)
    return rows


def _measure_row(
    row: PublishedRow,
    loaded: LoadedCheckpoint,
    refer: REFER,
    build_model: Callable[[], nn.Module],
    folder: Path,
    setup: EvalSetup,
) -> list[MeasuredRow]:
    datasets, reason = attempt(lambda: loaded.open_splits(refer, [row.split]))
    if reason:
        return [MeasuredRow(row, reason=reason)]
    settings = loaded.settings(datasets, setup.dist.device)
    with ResultFile(folder / f"{row.file_name}.jsonl", settings, replace=True) as file:
        if on_main(file.is_complete):
            LOG.info("%s: already complete in %s", row.title, file.path)
        else:
            try:
                evaluate(build_model(), datasets[row.split], loaded.protocols, setup, sink=file)
            except CommonError as error:  # such as a corrupt image
                return [MeasuredRow(row, reason=str(error))]
    return on_main(lambda: measured_rows(row, file.path))


def measured_rows(published: PublishedRow, path: Path) -> list[MeasuredRow]:
    """Return a row for each protocol of a complete result file."""
    header, lines = read_results(path)
    rows = []
    for protocol in (settings["name"] for settings in header["protocols"]):
        selected = [line for line in lines if line["protocol"] == protocol]
        counts = counts_of(selected)
        bounds = intervals([line["image_id"] for line in selected], counts)
        row = MeasuredRow(published, protocol, compute_metrics(counts), bounds, len(selected))
        rows.append(row._replace(checkpoint=header["checkpoint"], precision=header["precision"]))
    return rows


def write_tables(rows: list[MeasuredRow], folder: Path) -> list[Path]:
    """Write table.md, .tex, .csv and .json, and return their paths. Raise a UserError if no row was measured."""
    protocols = list(dict.fromkeys(row.protocol for row in rows if row.protocol))
    if not protocols:
        reasons = dict.fromkeys(row.reason.removesuffix(".") for row in rows)
        raise UserError(f"--table: no row can be measured: {'; '.join(reasons)}.")
    contents = {
        "table.md": "\n".join(markdown_table(rows, protocol) for protocol in protocols),
        "table.tex": latex_document([(f"{name} protocol", latex_table(rows, name)) for name in protocols]),
        "table.csv": csv_table(rows),
        "table.json": json_table(rows),
    }
    for name, content in contents.items():
        write_text(folder / name, content)
    return [folder / name for name in contents]


def text_table(rows: list[MeasuredRow], protocol: str) -> str:
    """Return the table for a terminal."""
    cells = _cells(rows, protocol, corner=f"{protocol} protocol")
    return "\n".join([to_text(cells, left=(0, 1)), *_notes(rows, protocol)])


def markdown_table(rows: list[MeasuredRow], protocol: str) -> str:
    """Return the table as Markdown."""
    table = to_markdown(_cells(rows, protocol, corner="split"), left=(0, 1))
    return "\n".join([f"**{protocol} protocol**\n", table, *(f"\n{note}" for note in _notes(rows, protocol)), ""])


def latex_table(rows: list[MeasuredRow], protocol: str) -> str:
    """Return the table as LaTeX, see :func:`lib.tables.to_latex`."""
    return to_latex(_cells(rows, protocol, corner="split"), left=(0, 1), notes=_notes(rows, protocol))


def csv_table(rows: list[MeasuredRow]) -> str:
    """Return the table as CSV: one line per row, protocol and metric."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys, numbers = (
        ("dataset", "split_by", "split", "protocol", "metric"),
        ("ours", "low", "high", "paper", "difference"),
    )
    writer.writerow([*keys, *numbers, "doubtful", "expressions", "published_expressions"])
    for row in rows:
        published = row.published
        for metric, paper in zip(METRIC_NAMES, published.values, strict=True):
            ours = low = high = difference = ""
            if row.metrics is not None and row.intervals is not None:
                low, high = (f"{bound:.4f}" for bound in row.intervals[metric])
                ours, difference = f"{row.metrics[metric]:.4f}", f"{row.metrics[metric] - paper:.4f}"
            key = (published.dataset, published.split_by, published.split, row.protocol, metric)
            doubtful, counts = int(metric in published.doubtful), (row.num_expressions, published.num_expressions)
            writer.writerow([*key, ours, low, high, f"{paper:.2f}", difference, doubtful, *counts])
    return text.getvalue()


def json_table(rows: list[MeasuredRow]) -> str:
    """Return the table as JSON: a list with one object per row and protocol."""
    entries = []
    for row in rows:
        published = row.published
        paper = dict(zip(METRIC_NAMES, published.values, strict=True))
        entries.append(
            {
                "title": published.title,
                "dataset": published.dataset,
                "split_by": published.split_by,
                "split": published.split,
                "protocol": row.protocol,
                "num_expressions": row.num_expressions,
                "published_expressions": published.num_expressions,
                "checkpoint": row.checkpoint,
                "precision": row.precision or None,
                "ours": row.metrics,
                "interval_95": row.intervals,
                "paper": paper,
                "difference": row.metrics and {name: row.metrics[name] - paper[name] for name in METRIC_NAMES},
                "doubtful": list(published.doubtful),
                "not_measured": row.reason or None,
            }
        )
    return json.dumps(entries, indent=1, ensure_ascii=False) + "\n"


def _of_protocol(rows: list[MeasuredRow], protocol: str) -> list[MeasuredRow]:
    """Return the rows measured under a protocol, and those that were not measured."""
    return [row for row in rows if row.protocol in (protocol, "")]


def _cells(rows: list[MeasuredRow], protocol: str, corner: str) -> list[list[str]]:
    """Return the table's cells: a header, then for each row our metrics, the paper's metrics and the difference."""
    cells = [[corner, "", *METRIC_NAMES]]
    for row in _of_protocol(rows, protocol):
        published = dict(zip(METRIC_NAMES, row.published.values, strict=True))
        paper = [f"{value:.2f}{'†' * (name in row.published.doubtful)}" for name, value in published.items()]
        if row.metrics is None:
            cells += [[row.published.title, "ours", *["–"] * len(paper)], ["", "paper", *paper]]
            continue
        ours = [f"{row.metrics[name]:.2f}" for name in METRIC_NAMES]
        difference = [f"{row.metrics[name] - value:+.2f}".replace("-", "−") for name, value in published.items()]
        title = f"{row.published.title}{'‡' * bool(row.other_size)}"
        cells += [[title, "ours", *ours], ["", "paper", *paper], ["", "difference", *difference]]
    return cells


def _notes(rows: list[MeasuredRow], protocol: str) -> list[str]:
    shown = _of_protocol(rows, protocol)
    notes = [DOUBTFUL_NOTE] if any(row.published.doubtful for row in shown) else []
    notes += [row.other_size for row in shown if row.other_size]
    precisions = dict.fromkeys(row.precision for row in shown if row.precision)
    if precisions:
        notes.append(f"Our numbers were computed in {', '.join(precisions)}.")
    if any(protocol != row.published.protocol for row in shown):
        notes.append("The paper uses another protocol, so differences come from both protocol and model.")
    return notes + [f"{row.published.title}: {row.reason}" for row in shown if row.reason]
