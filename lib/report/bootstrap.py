"""95 % intervals of the metrics by the percentile bootstrap over images.

Expressions of one image share its objects and its difficulty, so they are drawn together: as many images as there are,
with replacement, again and again; an interval leaves out 2.5 % of the draws on either side.

Letters: n expressions, K images, D draws, M metrics.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from lib.metrics import THRESHOLDS, metric_names, metrics_of

PERCENTILES = (2.5, 97.5)
IOU_UNITS = 2**32  # IoUs are summed in these, as whole numbers: then no order of adding changes a last digit
CHUNK = 2**20  # drawn images held in memory at once


def intervals(
    images: Sequence[Hashable],
    counts: np.ndarray,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    strict: bool = False,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Each metric's 95 % interval (low, high) in percent.

    A function of the arguments, whatever the order of the expressions. With a single image low and high are equal.

    Args:
        images: per expression, the id of its image; ids can be sorted.
        counts: int64 [n, 2], intersections and unions in pixels.
        thresholds, strict: as :meth:`SegmentationMetrics.compute` takes them.
        draws: D, at least 1.
        seed: of the drawing.

    Raises:
        ValueError: no expressions, or not one image per expression.
    """
    sums = _image_sums(images, counts, thresholds, strict)
    return _between(_metrics(_totals(sums, draws, seed)), thresholds)


def paired_intervals(
    images: Sequence[Hashable],
    counts_a: np.ndarray,
    counts_b: np.ndarray,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    strict: bool = False,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, tuple[float, float, float]]:
    """Each metric of B less that of A, with the difference's 95 % interval: (difference, low, high) in percentage
    points. Both are judged on the same draws, so what makes an image hard for both cancels.

    Args:
        counts_a, counts_b: int64 [n, 2] of the same expressions, in the same order.

    The other arguments and errors are those of :func:`intervals`.
    """
    sums = [_image_sums(images, counts, thresholds, strict) for counts in (counts_a, counts_b)]
    totals_a, totals_b = np.split(_totals(np.concatenate(sums, axis=1), draws, seed), 2, axis=1)
    between = _between(_metrics(totals_b) - _metrics(totals_a), thresholds)
    points = [metrics_of(counts, thresholds, strict=strict) for counts in (counts_a, counts_b)]
    return {name: (points[1][name] - points[0][name], low, high) for name, (low, high) in between.items()}


def _image_sums(
    images: Sequence[Hashable], counts: np.ndarray, thresholds: Sequence[float], strict: bool
) -> np.ndarray:
    """Sums over each image's expressions: float64 [K, M + 2] of whole numbers. The columns: how many reach each
    threshold, IoU, intersection, union, number of expressions."""
    counts = np.asarray(counts)
    if len(images) == 0 or counts.shape != (len(images), 2):
        raise ValueError(f"{len(images)} expressions with counts of shape {counts.shape}: must be [n, 2], n above 0")
    intersections, unions = counts.T
    ious = np.divide(intersections, unions, out=np.zeros(len(counts)), where=unions > 0)
    reached = np.greater if strict else np.greater_equal
    columns = [reached(ious, threshold) for threshold in thresholds]
    columns += [np.rint(ious * IOU_UNITS), intersections, unions, np.ones(len(counts))]
    _, rows = np.unique(np.asarray(images), return_inverse=True)
    return np.stack([np.bincount(rows, weights=column) for column in columns], axis=1)


def _totals(sums: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Sums [K, C] over images → [D, C], over the images of each draw."""
    source, totals, K = np.random.default_rng(seed), [], len(sums)
    step = max(1, CHUNK // K)
    for D in (min(step, draws - first) for first in range(0, draws, step)):
        drawn = source.integers(K, size=(D, K)) + K * np.arange(D)[:, None]  # a range of its own for each draw
        times = np.bincount(drawn.ravel(), minlength=D * K).reshape(D, K)
        totals.append(times.astype(np.float64) @ sums)
    return np.concatenate(totals)


def _metrics(totals: np.ndarray) -> np.ndarray:
    """Totals [D, M + 2], columns as of :func:`_image_sums` → metrics in percent [D, M]."""
    means, (intersection, union, number) = totals[:, :-3], totals[:, -3:].T
    means = means / number[:, None]
    means[:, -1] /= IOU_UNITS
    overall = np.divide(intersection, union, out=np.zeros(len(totals)), where=union > 0)
    return 100 * np.concatenate([means, overall[:, None]], axis=1)


def _between(values: np.ndarray, thresholds: Sequence[float]) -> dict[str, tuple[float, float]]:
    """[D, M] → the middle 95 % of each column."""
    lows, highs = np.percentile(values, PERCENTILES, axis=0).tolist()
    return {name: (low, high) for name, low, high in zip(metric_names(thresholds), lows, highs, strict=True)}
