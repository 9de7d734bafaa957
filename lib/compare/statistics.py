"""Mean IoU over several seeds: standard deviation, 95 % intervals, and a paired test of the difference of two models.

A mean IoU depends on which images are in the split and on the seed of the training. Both are taken as random samples:

    squared standard error = variance between images / K + variance between seeds / S

Expressions of one image are not independent, so the sampled unit is the image with all its expressions (as in
lib/report/intervals.py). The variance between images is that of the mean over the seeds. For a difference, it is that
of the image-wise difference of two models, because both are evaluated on the same images; their seeds are independent,
and each model adds its own variance. The part of the seeds' variance that comes from the sample of images is subtracted
first. Intervals and p-values use Student's t distribution with the degrees of freedom of Welch and Satterthwaite. With
a single seed, they cover the images only, and the test is the paired t-test over images.

tests/test_lib_compare_statistics.py simulates how often the intervals cover the true value. With two seeds that differ
more than the images, it is 92 instead of 95 %; use at least three.

Shapes: S seeds, n expressions, K images.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean IoU, or a difference of two, in percent."""

    value: float
    std: float  # standard deviation over the seeds; nan for a single seed and for differences
    low: float  # bounds of the 95 % interval
    high: float
    p_value: float  # of the two-sided test that the true value is 0, not corrected for the number of tests


def estimate_mean(ious: np.ndarray, images: Sequence[Hashable]) -> Estimate:
    """Return the mean IoU with its interval.

    Args:
        ious: IoU (0 to 1) of each expression with each seed, float [S, n].
        images: image id of each expression.
    """
    sums, sizes = _sums_by_image(ious, images)
    return _estimate([sums], sums.mean(0), sizes)


def estimate_difference(ious: np.ndarray, reference: np.ndarray, images: Sequence[Hashable]) -> Estimate:
    """Return the difference ``ious`` − ``reference`` of two mean IoUs with its interval and its p-value.

    Args:
        ious, reference: as for :func:`estimate_mean`, of the same expressions. The numbers of seeds may differ.
        images: image id of each expression.
    """
    (sums, sizes), (reference_sums, _) = (_sums_by_image(values, images) for values in (ious, reference))
    return _estimate([sums, reference_sums], sums.mean(0) - reference_sums.mean(0), sizes)._replace(std=float("nan"))


def _sums_by_image(ious: np.ndarray, images: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of the IoUs of each image, [S, K], and its number of expressions, [K]."""
    distinct_images, rows = np.unique(np.asarray(images), return_inverse=True)
    if ious.shape[1] != len(rows) or not len(rows):
        raise ValueError(f"There are {len(rows)} image ids for {ious.shape[1]} expressions.")
    sums = np.zeros((len(ious), len(distinct_images)))
    np.add.at(sums.T, rows, ious.T)
    return sums, np.bincount(rows)


def _estimate(models: Sequence[np.ndarray], combined: np.ndarray, sizes: np.ndarray) -> Estimate:
    """Return the estimate of sum(combined) / sum(sizes).

    Args:
        models: [S, K] of each model that takes part, with its own S.
        combined: the quantity of interest, [K]: the mean over the seeds of a model, or a difference of such means.
        sizes: number of expressions of each image, [K].
    """
    K, total = len(sizes), sizes.sum()
    value = combined.sum() / total
    # Variances and degrees of freedom whose sum is the squared standard error. The mean IoU is a ratio of two sums over
    # images; its variance is that of the linearized terms (Cochran, Sampling Techniques, chapter 6).
    terms = [(_variance_of_sum(combined - value * sizes) / total**2, K - 1)]
    stds = []
    for sums in models:
        S = len(sums)
        means = sums.sum(1) / total  # of each seed
        stds.append(means.std(ddof=1) if S > 1 else float("nan"))
        if S > 1:
            # A seed's deviation on each image. Its variance between images is also in that of ``combined``.
            deviations = sums - sums.mean(0) - np.outer(means - means.mean(), sizes)
            from_images = sum(_variance_of_sum(row) for row in deviations) / total**2 / (S - 1)
            terms.append((max(0.0, means.var(ddof=1) - from_images) / S, S - 1))
    variance = sum(term for term, _ in terms)
    if variance == 0:
        p_value = float(value == 0)
        half_width = 0.0 if K > 1 else float("nan")
    else:
        freedom = variance**2 / sum(term**2 / freedom for term, freedom in terms if freedom)
        half_width = stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * np.sqrt(variance)
        p_value = 2 * stats.t.sf(abs(value) / np.sqrt(variance), freedom)
    return Estimate(*(100 * float(x) for x in (value, stds[0], value - half_width, value + half_width)), float(p_value))


def _variance_of_sum(values: np.ndarray) -> float:
    """Return the variance of the sum of K independent values, estimated from the values [K]; nan for a single one."""
    K = len(values)
    return K * values.var(ddof=1) if K > 1 else float("nan")


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm, 1979).

    Rejecting those below 5 % gives any false rejection in at most 5 % of such families of tests.
    """
    order = np.argsort(p_values)
    corrected = np.empty(len(p_values))
    factors = len(p_values) - np.arange(len(p_values))
    corrected[order] = np.minimum(1, np.maximum.accumulate(factors * np.asarray(p_values)[order]))
    return corrected.tolist()
