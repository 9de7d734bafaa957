"""95 % percentile bootstrap intervals of the metrics over images.

Expressions of one image share its objects and its difficulty. A draw therefore consists of whole images: as many as
there are, drawn with replacement. An interval excludes the lowest and the highest 2.5 % of the draws.

Shapes: n expressions, K images, D draws, M metrics, C columns of :func:`lib.metrics.expression_terms`.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from lib.metrics import THRESHOLDS, expression_terms, metric_names, metrics_from_sums

PERCENTILES = (2.5, 97.5)
IOU_UNIT = 2.0**-32  # IoUs are rounded to multiples of it


class Scoring(NamedTuple):
    """How metrics and their intervals are computed."""

    thresholds: tuple[float, ...] = THRESHOLDS  # the X of P@X
    strict: bool = False  # P@X counts IoU > X instead of IoU ≥ X
    draws: int = 2000  # of the bootstrap
    seed: int = 0  # of the bootstrap


DEFAULT_SCORING = Scoring()


def intervals(
    images: Sequence[Hashable], counts: np.ndarray, scoring: Scoring = DEFAULT_SCORING
) -> dict[str, tuple[float, float]]:
    """Return the interval (low, high) of each metric in percent. With a single image, low and high are equal.

    The result depends on the arguments only, not on the order of the expressions.

    Args:
        images: image id of each expression; ids must be sortable.
        counts: intersection and union of each expression in pixels, int64 [n, 2].
        scoring: thresholds, number of draws, and seed.

    Raises:
        ValueError: there are no expressions, or not one image id for each.
    """
    sums = _sums_by_image(images, counts, scoring)
    return _percentiles(metrics_from_sums(_resample(sums, scoring)), scoring)


def paired_intervals(
    images: Sequence[Hashable], counts_a: np.ndarray, counts_b: np.ndarray, scoring: Scoring = DEFAULT_SCORING
) -> dict[str, tuple[float, float]]:
    """Return the interval (low, high) of the difference B − A of each metric in percentage points.

    Both are computed from the same draws, so that the difficulty of the images cancels out.

    Args:
        images: as for :func:`intervals`.
        counts_a, counts_b: int64 [n, 2] of the same expressions in the same order.
        scoring: as for :func:`intervals`.

    Raises:
        ValueError: as for :func:`intervals`.
    """
    sums = np.concatenate([_sums_by_image(images, counts, scoring) for counts in (counts_a, counts_b)], axis=1)
    sums_a, sums_b = np.split(_resample(sums, scoring), 2, axis=1)
    return _percentiles(metrics_from_sums(sums_b) - metrics_from_sums(sums_a), scoring)


def _sums_by_image(images: Sequence[Hashable], counts: np.ndarray, scoring: Scoring) -> np.ndarray:
    """Return the sums of the terms of each image's expressions, float64 [K, C]."""
    terms = expression_terms(counts, scoring.thresholds, strict=scoring.strict)
    if len(images) != len(terms):
        raise ValueError(f"There are {len(images)} image ids for {len(terms)} expressions.")
    # Multiples of a power of two are summed without rounding errors, so the order of the expressions has no effect.
    ious = terms[:, len(scoring.thresholds)]
    ious[:] = np.rint(ious / IOU_UNIT) * IOU_UNIT
    distinct_images, rows = np.unique(np.asarray(images), return_inverse=True)
    sums = np.zeros((len(distinct_images), terms.shape[1]))
    np.add.at(sums, rows, terms)
    return sums


def _resample(sums: np.ndarray, scoring: Scoring) -> np.ndarray:
    """Return the sums over the images of each draw, [D, C], from the sums of each image, [K, C]."""
    generator, K = np.random.default_rng(scoring.seed), len(sums)
    return np.stack([sums[generator.integers(K, size=K)].sum(axis=0) for _ in range(scoring.draws)])


def _percentiles(values: np.ndarray, scoring: Scoring) -> dict[str, tuple[float, float]]:
    """Return the bounds of the middle 95 % of each metric's values [D, M]."""
    lows, highs = np.percentile(values, PERCENTILES, axis=0).tolist()
    return dict(zip(metric_names(scoring.thresholds), zip(lows, highs, strict=True), strict=True))
