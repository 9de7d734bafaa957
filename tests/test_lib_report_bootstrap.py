"""The bootstrap over images, against resampling written out and populations whose metrics are known."""

import tracemalloc

import numpy as np
import pytest

from lib.metrics import METRIC_NAMES, SegmentationMetrics
from lib.report import bootstrap
from lib.report.bootstrap import intervals, paired_intervals


def made(num_expressions=60, num_images=12, seed=0):
    """Ids of images (each occurs), and counts of every kind: IoU 0 and 1, an empty union."""
    source = np.random.default_rng(seed)
    images = np.concatenate([np.arange(num_images), source.integers(num_images, size=num_expressions - num_images)])
    unions = source.integers(1, 1000, num_expressions)
    counts = np.stack([np.minimum((unions * source.uniform(0, 1.3, num_expressions)).astype(int), unions), unions], 1)
    counts[0] = 0
    return (1000 - 7 * images).tolist(), counts


def metrics_of(counts, *thresholds, strict=False):
    metrics = SegmentationMetrics()
    metrics.add(*np.asarray(counts).T.tolist())
    return metrics.compute(*thresholds, strict=strict)


def drawn_plainly(images, counts, draws, seed):
    """The metrics of every draw, one after the other, as the definition says."""
    source, names = np.random.default_rng(seed), sorted(set(images))
    of_image = {name: [pair for pair, image in zip(counts, images, strict=True) if image == name] for name in names}
    draws = source.integers(len(names), size=(draws, len(names)))
    return [metrics_of([pair for k in drawn for pair in of_image[names[k]]]) for drawn in draws]


def test_an_interval_is_the_middle_of_the_draws():
    images, counts = made()
    drawn = drawn_plainly(images, counts, 300, seed=3)
    found = intervals(images, counts, draws=300, seed=3)
    assert list(found) == list(METRIC_NAMES)
    for name, between in found.items():
        assert between == pytest.approx(np.percentile([values[name] for values in drawn], [2.5, 97.5]), abs=1e-6)
        assert 0 <= between[0] < metrics_of(counts)[name] < between[1] <= 100


def test_a_difference_is_of_the_same_draws():
    images, a = made()
    b = a.copy()
    b[:, 0] = a[:, 0] // 2
    drawn = [drawn_plainly(images, counts, 300, seed=3) for counts in (a, b)]
    found = paired_intervals(images, a, b, draws=300, seed=3)
    assert list(found) == list(METRIC_NAMES)
    for name, (difference, *between) in found.items():
        differences = [of_b[name] - of_a[name] for of_a, of_b in zip(*drawn, strict=True)]
        assert difference == metrics_of(b)[name] - metrics_of(a)[name]
        assert between == pytest.approx(np.percentile(differences, [2.5, 97.5]), abs=1e-6)
    assert set(paired_intervals(images, a, a).values()) == {(0.0, 0.0, 0.0)}


def test_95_of_100_intervals_hold_the_population_s_value():
    """Images differ in difficulty: IoU is uniform in [0, 1] over images, and nearly the same within one."""
    source, held, tries = np.random.default_rng(0), np.zeros(3), 300
    for seed in range(tries):
        ious = np.clip(source.uniform(0, 1, 80)[:, None] + source.uniform(-0.02, 0.02, (80, 5)), 0, 1).ravel()
        counts = np.stack([(10_000 * ious).astype(int), np.full(400, 10_000)], axis=1)
        found = intervals(np.repeat(np.arange(80), 5), counts, draws=300, seed=seed)
        held += [found[name][0] <= true <= found[name][1] for name, true in (("mIoU", 50), ("oIoU", 50), ("P@0.8", 20))]
    assert (held > 0.91 * tries).all()
    assert (held < 0.985 * tries).all()


def test_expressions_of_one_image_count_together():
    """Saying everything ten times tells nothing new, so no interval gets narrower."""
    images, counts = made()
    assert intervals(images * 10, np.tile(counts, (10, 1))) == intervals(images, counts)


def test_neither_order_nor_memory_changes_a_digit(monkeypatch):
    images, counts = made(500, 50)
    once, paired = intervals(images, counts), paired_intervals(images, counts, counts[::-1])
    order = np.random.default_rng(1).permutation(500)
    shuffled = [images[i] for i in order]
    assert intervals(shuffled, counts[order]) == once
    assert paired_intervals(shuffled, counts[order], counts[::-1][order]) == paired
    assert intervals(images, counts, seed=1) != once
    monkeypatch.setattr(bootstrap, "CHUNK", 1234)  # 24 draws at a time instead of all
    assert intervals(images, counts) == once


def test_little_memory_for_many_draws():
    images, counts = made(12_000, 2_600)
    tracemalloc.start()
    intervals(images, counts, draws=10_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6  # all at once would be 200 MB for the drawn images alone


def test_one_image_empty_unions_and_nothing():
    one = intervals([7, 7], np.array([[5, 10], [0, 10]]))
    assert one["mIoU"] == one["oIoU"] == (25.0, 25.0)
    assert one["P@0.5"] == (50.0, 50.0)
    assert set(intervals([1, 2], np.zeros((2, 2), int)).values()) == {(0.0, 0.0)}
    low, high = intervals([1, 2], np.array([[0, 0], [10, 10]]))["oIoU"]  # some draws have no union at all
    assert (low, high) == (0.0, 100.0)
    for images, counts in (([], np.zeros((0, 2), int)), ([1], np.zeros((2, 2), int))):
        with pytest.raises(ValueError, match="expressions with counts of shape"):
            intervals(images, counts)


def test_other_thresholds():
    images, counts = ["a", "a", "b"], np.array([[5, 10], [9, 10], [5, 10]])
    assert intervals(images, counts, thresholds=(0.5, 0.55))["P@0.5"] == (100.0, 100.0)
    found = intervals(images, counts, thresholds=(0.5, 0.55), strict=True)
    assert list(found) == ["P@0.5", "P@0.55", "mIoU", "oIoU"]
    assert found["P@0.5"] == found["P@0.55"] == (0.0, 50.0)  # IoU > X: of image a the half, of b none
    assert metrics_of(counts, (0.5,), strict=True)["P@0.5"] == pytest.approx(100 / 3)
    better = counts + np.array([1, 0])
    assert paired_intervals(images, counts, better, thresholds=(0.6,))["P@0.6"][0] == pytest.approx(200 / 3)
