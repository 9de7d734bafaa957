"""The evaluation metrics in percent: P@X, mean IoU and overall IoU.

The IoU of an expression is the intersection of its predicted and its target mask divided by their union, in pixels, and
0 if the union is empty. P@X is the share of expressions with IoU ≥ X, mIoU the mean of the IoUs, oIoU the sum of all
intersections divided by the sum of all unions.

Each metric is a ratio of two sums over expressions. :func:`expression_terms` returns the terms of the sums and
:func:`metrics_from_sums` the ratios, both for a whole split and for the draws of a bootstrap (lib/report/intervals.py).

Shapes: B masks in a batch, H×W mask size, n expressions, T thresholds.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


def metric_names(thresholds: Sequence[float] = THRESHOLDS) -> tuple[str, ...]:
    """Return the names of the metrics in the order of their columns in every table."""
    return (*(f"P@{threshold}" for threshold in thresholds), "mIoU", "oIoU")


METRIC_NAMES = metric_names()


def intersection_and_union(predicted: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return intersections and unions in pixels, int64 [B] each, of two batches of boolean masks [B, H, W]."""
    predicted, target = predicted.bool().flatten(1), target.bool().flatten(1)
    return (predicted & target).sum(1), (predicted | target).sum(1)


def iou(intersection: int, union: int) -> float:
    """Return intersection / union, and 0 for an empty union."""
    return intersection / union if union else 0.0


def compute_metrics(
    counts: Sequence[tuple[int, int]] | np.ndarray, thresholds: Sequence[float] = THRESHOLDS, *, strict: bool = False
) -> dict[str, float]:
    """Return the metrics of n expressions by name. The sums are exact, so the order of the expressions has no effect.

    Args:
        counts: intersection and union of each expression in pixels, [n, 2].
        thresholds: the X of P@X.
        strict: count IoU > X instead of IoU ≥ X.

    Raises:
        ValueError: there are no expressions, or an intersection is larger than its union.
    """
    terms = expression_terms(counts, thresholds, strict=strict)
    values = metrics_from_sums(np.array([math.fsum(column) for column in terms.T]))
    return dict(zip(metric_names(thresholds), values.tolist(), strict=True))


def expression_terms(
    counts: Sequence[tuple[int, int]] | np.ndarray, thresholds: Sequence[float], *, strict: bool
) -> np.ndarray:
    """Return the terms that each expression adds to the sums from which metrics are computed, float64 [n, T + 4].

    The columns are 1 or 0 for each threshold (reached or not), the IoU, the intersection, the union, and 1.
    Arguments and errors are those of :func:`compute_metrics`.
    """
    counts = np.asarray(counts, dtype=np.int64)
    if counts.size == 0:
        raise ValueError("There are no expressions to compute metrics from.")
    intersections, unions = counts.T
    impossible = (intersections < 0) | (intersections > unions)
    if impossible.any():
        intersection, union = counts[impossible][0].tolist()
        raise ValueError(f"An intersection of {intersection} pixels does not fit a union of {union}.")
    ious = np.divide(intersections, unions, out=np.zeros(len(counts)), where=unions > 0)
    reached = np.greater if strict else np.greater_equal
    hits = [reached(ious, threshold) for threshold in thresholds]
    return np.stack([*hits, ious, intersections, unions, np.ones(len(counts))], axis=1)


def metrics_from_sums(sums: np.ndarray) -> np.ndarray:
    """Return the metrics in percent, [..., T + 2], from sums of :func:`expression_terms`, [..., T + 4]."""
    means = sums[..., :-3] / sums[..., -1:]
    intersection, union = sums[..., -3:-2], sums[..., -2:-1]
    overall = np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
    return 100 * np.concatenate([means, overall], axis=-1)
