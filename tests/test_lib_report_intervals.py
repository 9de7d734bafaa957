"""lib.report.intervals: against explicit resampling, and against populations with known metrics."""

import tracemalloc

import numpy as np
import pytest

from lib.metrics import METRIC_NAMES, compute_metrics
from lib.report.intervals import Scoring, intervals, paired_intervals


def random_expressions(num_expressions=60, num_images=12, seed=0):
    """Return image ids (each occurs at least once) and counts that include IoU 0, IoU 1 and an empty union."""
    generator = np.random.default_rng(seed)
    others = generator.integers(num_images, size=num_expressions - num_images)
    images = np.concatenate([np.arange(num_images), others])
    unions = generator.integers(1, 1000, num_expressions)
    intersections = np.minimum((unions * generator.uniform(0, 1.3, num_expressions)).astype(int), unions)
    counts = np.stack([intersections, unions], 1)
    counts[0] = 0
    return (1000 - 7 * images).tolist(), counts


def metrics_of_draws(images, counts, draws, seed):
    """Return the metrics of every draw, computed one by one as defined."""
    generator, ids = np.random.default_rng(seed), sorted(set(images))
    by_image = {id_: [pair for pair, image in zip(counts, images, strict=True) if image == id_] for id_ in ids}
    draws = generator.integers(len(ids), size=(draws, len(ids)))
    return [compute_metrics([pair for k in drawn for pair in by_image[ids[k]]]) for drawn in draws]


def test_an_interval_is_the_middle_95_percent_of_the_draws():
    images, counts = random_expressions()
    draws = metrics_of_draws(images, counts, 300, seed=3)
    found = intervals(images, counts, Scoring(draws=300, seed=3))
    assert list(found) == list(METRIC_NAMES)
    for name, bounds in found.items():
        assert bounds == pytest.approx(np.percentile([values[name] for values in draws], [2.5, 97.5]), abs=1e-6)
        assert 0 <= bounds[0] < compute_metrics(counts)[name] < bounds[1] <= 100


def test_a_difference_uses_the_same_draws_of_both():
    images, a = random_expressions()
    b = a.copy()
    b[:, 0] = a[:, 0] // 2
    draws = [metrics_of_draws(images, counts, 300, seed=3) for counts in (a, b)]
    found = paired_intervals(images, a, b, Scoring(draws=300, seed=3))
    assert list(found) == list(METRIC_NAMES)
    for name, bounds in found.items():
        differences = [of_b[name] - of_a[name] for of_a, of_b in zip(*draws, strict=True)]
        assert bounds == pytest.approx(np.percentile(differences, [2.5, 97.5]), abs=1e-6)
    assert set(paired_intervals(images, a, a).values()) == {(0.0, 0.0)}


def test_intervals_in_earlier_result_files_are_reproduced_to_the_digit():
    found = intervals(*random_expressions(500, 50))
    assert found["P@0.9"] == (26.146878218086123, 33.33489681050656)
    assert found["mIoU"] == (58.89611139957915, 65.37709655892657)
    assert found["oIoU"] == (60.50043924089411, 67.27294272746295)


def test_95_percent_of_the_intervals_contain_the_value_of_the_population():
    """Images differ in difficulty: the IoU is uniform in [0, 1] over images, and nearly constant within one."""
    generator, contained, num_trials = np.random.default_rng(0), np.zeros(3), 300
    for seed in range(num_trials):
        difficulty, noise = generator.uniform(0, 1, 80)[:, None], generator.uniform(-0.02, 0.02, (80, 5))
        ious = np.clip(difficulty + noise, 0, 1).ravel()
        counts = np.stack([(10_000 * ious).astype(int), np.full(400, 10_000)], axis=1)
        found = intervals(np.repeat(np.arange(80), 5), counts, Scoring(draws=300, seed=seed))
        population = (("mIoU", 50), ("oIoU", 50), ("P@0.8", 20))
        contained += [found[name][0] <= value <= found[name][1] for name, value in population]
    assert (contained > 0.91 * num_trials).all()
    assert (contained < 0.985 * num_trials).all()


def test_repeated_expressions_of_an_image_do_not_narrow_the_interval():
    images, counts = random_expressions()
    assert intervals(images * 10, np.tile(counts, (10, 1))) == intervals(images, counts)


def test_the_order_of_expressions_does_not_change_a_digit():
    images, counts = random_expressions(500, 50)
    order = np.random.default_rng(1).permutation(500)
    shuffled = [images[i] for i in order]
    assert intervals(shuffled, counts[order]) == intervals(images, counts)
    paired = paired_intervals(images, counts, counts[::-1])
    assert paired_intervals(shuffled, counts[order], counts[::-1][order]) == paired
    assert intervals(images, counts, Scoring(seed=1)) != intervals(images, counts)


def test_many_draws_need_little_memory():
    images, counts = random_expressions(12_000, 2_600)
    tracemalloc.start()
    intervals(images, counts, Scoring(draws=10_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6  # bytes; the drawn images of all draws at once would be 200 MB


def test_a_single_image_empty_unions_and_no_expressions():
    single = intervals([7, 7], np.array([[5, 10], [0, 10]]))
    assert single["mIoU"] == single["oIoU"] == (25.0, 25.0)
    assert single["P@0.5"] == (50.0, 50.0)
    assert set(intervals([1, 2], np.zeros((2, 2), int)).values()) == {(0.0, 0.0)}
    assert intervals([1, 2], np.array([[0, 0], [10, 10]]))["oIoU"] == (0.0, 100.0)  # the union of some draws is empty
    with pytest.raises(ValueError, match="no expressions"):
        intervals([], np.zeros((0, 2), int))
    with pytest.raises(ValueError, match="1 image ids for 2 expressions"):
        intervals([1], np.zeros((2, 2), int))


def test_other_thresholds():
    images, counts = ["a", "a", "b"], np.array([[5, 10], [9, 10], [5, 10]])
    assert intervals(images, counts, Scoring(thresholds=(0.5, 0.55)))["P@0.5"] == (100.0, 100.0)
    found = intervals(images, counts, Scoring(thresholds=(0.5, 0.55), strict=True))
    assert list(found) == ["P@0.5", "P@0.55", "mIoU", "oIoU"]
    assert found["P@0.5"] == found["P@0.55"] == (0.0, 50.0)  # IoU > X: one of two expressions of image a, none of b
    better = counts + np.array([1, 0])
    assert paired_intervals(images, counts, better, Scoring(thresholds=(0.6,)))["P@0.6"] == (50.0, 100.0)
