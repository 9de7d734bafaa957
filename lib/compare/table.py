"""The table of a comparison as text, Markdown, LaTeX and CSV."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lib.compare.cost import Cost
from lib.compare.results import ModelResults
from lib.compare.statistics import Estimate, estimate_difference, estimate_mean, holm
from lib.tables import latex_document, to_latex, to_markdown, to_text

METRICS = ("P@0.5", "P@0.9", "oIoU")  # columns besides the mean IoU
COSTS = ("parameters, M", "GFLOP", "ms")


class Row(NamedTuple):
    """A model on one split, in percent."""

    split: str
    model: str
    seeds: int
    mean: Estimate  # mean IoU
    metrics: dict[str, tuple[float, float]]  # mean and standard deviation over the seeds
    shuffled: float  # mean IoU with shuffled sentences; nan if not evaluated
    difference: Estimate | None  # from the reference; None: it is the reference
    p_corrected: float  # p-value of the difference, corrected for all differences of the table; nan for the reference
    cost: Cost | None  # None: unknown, because there is no checkpoint


def make_rows(
    results: Mapping[str, Sequence[ModelResults]],
    shuffled: Mapping[str, Sequence[ModelResults]],
    reference: str,
    costs: Mapping[str, Cost] | None = None,
) -> list[Row]:
    """Return a row for each split and model.

    Args:
        results: by split.
        shuffled: the same with shuffled sentences; models may be missing.
        reference: name of the model from which the differences are computed.
        costs: by model; models may be missing.
    """
    rows, costs = [], costs or {}
    for split, models in results.items():
        base = next(model for model in models if model.name == reference)
        controls = {model.name: 100 * model.ious.mean() for model in shuffled.get(split, ())}
        for model in models:
            values = {name: [metrics[name] for metrics in model.metrics()] for name in METRICS}
            metrics = {name: (float(np.mean(items)), _std(items)) for name, items in values.items()}
            is_reference = model.name == reference
            difference = None if is_reference else estimate_difference(model.ious, base.ious, base.images)
            mean, control = estimate_mean(model.ious, base.images), controls.get(model.name, math.nan)
            seeds, cost = len(model.ious), costs.get(model.name)
            rows.append(Row(split, model.name, seeds, mean, metrics, control, difference, math.nan, cost))
    compared = [i for i, row in enumerate(rows) if row.difference]
    corrected = holm([rows[i].difference.p_value for i in compared])
    for i, p_value in zip(compared, corrected, strict=True):
        rows[i] = rows[i]._replace(p_corrected=p_value)
    return rows


def _std(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def method(rows: Sequence[Row], reference: str) -> str:
    """Return the sentences below the table that say how it was computed."""
    count = sum(row.difference is not None for row in rows)
    seeds = sorted({row.seeds for row in rows})
    devices = sorted({row.cost.device for row in rows if row.cost})
    cost = f" GFLOP and ms per expression are those of one image and one sentence, timed on {' or '.join(devices)}."
    if seeds == [1]:
        values = "Mean IoU of a single seed, in percent; 95 % intervals cover images only"
        test = "a two-sided paired t-test over images"
    else:
        values = f"Mean ± standard deviation over {' or '.join(map(str, seeds))} seeds, in percent; "
        values += "95 % intervals cover seeds and images"
        test = "a two-sided paired t-test over images that includes the variance between seeds"
    return (
        f"{values}, with all expressions of an image as one unit; differences are from {reference}, their p-values "
        f"from {test}, Holm-corrected for all {count} differences of the table.{cost if devices else ''}"
    )


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """Return the cells of the table, a header row first."""
    header = ["split", "model", "mIoU", "95 % interval", "shuffled", *METRICS]
    table, previous = [[*header, "difference", "95 % interval", "p (Holm)", *COSTS]], ""
    for row in rows:
        metrics = [f"{mean:.2f}{_plus_minus(std)}" for mean, std in row.metrics.values()]
        difference, cost = ["–", "–", "–"], ["–", "–", "–"]
        if row.difference:
            difference = [_signed(row.difference.value), _interval(row.difference), _p_value(row.p_corrected)]
        if row.cost:
            cost = [f"{row.cost.parameters / 1e6:.4g}", f"{row.cost.gflop:.4g}", f"{row.cost.ms:.1f}"]
        table.append(
            [
                row.split if row.split != previous else "",
                row.model,
                f"{row.mean.value:.2f}{_plus_minus(row.mean.std)}",
                f"{row.mean.low:.2f}…{row.mean.high:.2f}",
                "–" if math.isnan(row.shuffled) else f"{row.shuffled:.2f}",
                *metrics,
                *difference,
                *cost,
            ]
        )
        previous = row.split
    return table


def _plus_minus(std: float) -> str:
    return "" if math.isnan(std) else f" ± {std:.2f}"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _interval(estimate: Estimate) -> str:
    return f"{_signed(estimate.low)}…{_signed(estimate.high)}"


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def text_table(rows: Sequence[Row], reference: str) -> str:
    """Return the table for a terminal."""
    return f"{to_text(cells(rows), left=(0, 1))}\n{method(rows, reference)}"


def markdown_table(rows: Sequence[Row], reference: str) -> str:
    """Return the table as Markdown."""
    return f"{to_markdown(cells(rows), left=(0, 1))}\n\n{method(rows, reference)}\n"


def latex_table(rows: Sequence[Row], reference: str) -> str:
    """Return the table as a LaTeX document, see :func:`lib.tables.latex_document`."""
    tabular = to_latex(cells(rows), left=(0, 1), notes=[method(rows, reference)])
    return latex_document([(f"Comparison with {reference}", tabular)])


def csv_table(rows: Sequence[Row]) -> str:
    """Return the table as CSV with unrounded numbers."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = ["split", "model", "seeds", "mIoU", "std", "low", "high", "shuffled"]
    header += [f"{name}{suffix}" for name in METRICS for suffix in ("", " std")]
    writer.writerow(
        [*header, "difference", "difference low", "difference high", "p", "p Holm", "parameters", "GFLOP", "ms"]
    )
    for row in rows:
        numbers = [*row.mean[:4], row.shuffled, *(x for pair in row.metrics.values() for x in pair)]
        if row.difference:
            numbers += [row.difference.value, *row.difference[2:], row.p_corrected]
        else:
            numbers += [math.nan] * 5
        numbers += [row.cost.parameters, row.cost.gflop, row.cost.ms] if row.cost else [math.nan] * 3
        writer.writerow([row.split, row.model, row.seeds, *("" if math.isnan(x) else repr(float(x)) for x in numbers)])
    return text.getvalue()
