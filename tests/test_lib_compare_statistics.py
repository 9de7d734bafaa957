"""lib.compare.statistics: the estimates, and simulations of their intervals and tests."""

import numpy as np
import pytest
from scipy import stats

from lib.compare.statistics import estimate_difference, estimate_mean, holm

TRIALS = 1000
K, S = 120, 3  # images, seeds
DIFFERENCE = 0.02


def simulate(rng, seed_std):
    """Return IoUs [S, n] of two models with equal expected values, and the image of each expression.

    Images differ in difficulty and in their number of expressions, expressions differ, each model is better on some
    images, each seed is better or worse everywhere and on single images, and the rest is noise.
    """
    sizes = rng.integers(2, 9, K)
    images = np.repeat(np.arange(K), sizes)
    difficulty = 0.2 * rng.standard_normal(K)[images] + 0.2 * rng.standard_normal(len(images))

    def model():
        seed = seed_std * rng.standard_normal((S, 1)) + 0.1 * rng.standard_normal((S, K))[:, images]
        own = 0.1 * rng.standard_normal(K)[images]
        return 0.5 + difficulty + own + seed + 0.2 * rng.standard_normal((S, len(images)))

    return model(), model(), images


@pytest.mark.parametrize("seed_std", [0.0, 0.01, 0.05])
def test_intervals_cover_the_true_value_and_tests_reject_no_true_hypothesis(seed_std):
    """In 95 % ± 2 and 5 % ± 2 of the trials, whether or not the seeds differ."""
    rng = np.random.default_rng(0)
    covered = covered_mean = rejected = 0
    for _ in range(TRIALS):
        ious, reference, images = simulate(rng, seed_std)
        rejected += estimate_difference(ious, reference, images).p_value < 0.05
        difference = estimate_difference(ious + DIFFERENCE, reference, images)
        covered += difference.low <= 100 * DIFFERENCE <= difference.high
        mean = estimate_mean(ious, images)
        covered_mean += mean.low <= 50 <= mean.high
    assert 0.93 <= covered / TRIALS <= 0.97
    assert 0.93 <= covered_mean / TRIALS <= 0.97
    assert 0.03 <= rejected / TRIALS <= 0.07


def test_a_single_seed_is_the_paired_t_test_over_images():
    rng = np.random.default_rng(0)
    images = np.repeat(np.arange(30), 4)
    a, b = rng.random((2, 1, 120))
    difference = estimate_difference(a, b, images)
    means = (a - b).reshape(30, 4).mean(1)
    expected = stats.ttest_1samp(means, 0)
    low, high = expected.confidence_interval(0.95)
    assert difference.p_value == pytest.approx(expected.pvalue)
    assert difference[:1] + difference[2:4] == pytest.approx((100 * means.mean(), 100 * low, 100 * high))


def test_seeds_without_image_variance_are_welchs_test():
    """All expressions of a seed have the same IoU, so only the seeds vary."""
    a, b = np.array([0.5, 0.52, 0.56]), np.array([0.48, 0.49, 0.49, 0.50])
    ious = [np.repeat(seeds[:, None], 8, axis=1) for seeds in (a, b)]
    difference = estimate_difference(*ious, np.arange(8) // 2)
    expected = stats.ttest_ind(a, b, equal_var=False)
    assert difference.p_value == pytest.approx(expected.pvalue)
    low, high = expected.confidence_interval(0.95)
    assert difference[2:4] == pytest.approx((100 * low, 100 * high))


def test_value_and_standard_deviation_are_those_of_the_seeds():
    ious = np.array([[0.2, 0.4, 0.9], [0.4, 0.4, 1.0]])
    mean = estimate_mean(ious, ["a", "a", "b"])
    assert mean.value == pytest.approx(100 * ious.mean())
    assert mean.std == pytest.approx(100 * ious.mean(1).std(ddof=1))


def test_the_order_of_the_expressions_has_no_effect():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 3, 40))
    images, order = rng.integers(9, size=40), rng.permutation(40)
    expected = estimate_difference(a, b, images)
    assert estimate_difference(a[:, order], b[:, order], images[order])[2:] == pytest.approx(expected[2:])


def test_equal_models_and_a_single_image():
    ious = np.full((2, 3), 0.5)
    assert estimate_difference(ious, ious, [1, 2, 3])[2:] == (0, 0, 1)
    assert np.isnan(estimate_mean(ious, [1, 1, 1]).low)


def test_one_image_id_per_expression():
    with pytest.raises(ValueError, match="2 image ids for 3 expressions"):
        estimate_mean(np.zeros((1, 3)), [1, 2])


def test_holm():
    """The example of Holm's step-down: ordered p-values times 4, 3, 2, 1, never decreasing, at most 1."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


def test_holm_controls_the_family():
    """Of 1,000 families of five true hypotheses, 5 % ± 2 contain a rejection."""
    p_values = np.random.default_rng(0).random((TRIALS, 5))
    assert 0.03 <= np.mean([min(holm(family)) < 0.05 for family in p_values]) <= 0.07
