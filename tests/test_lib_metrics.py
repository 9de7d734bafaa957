"""The metrics, against values worked out by hand."""

import random

import pytest
import torch

from lib.baselines import baseline_metrics
from lib.metrics import METRIC_NAMES, SegmentationMetrics, intersection_and_union


def metrics_of(*pairs):
    metrics = SegmentationMetrics()
    metrics.add([i for i, _ in pairs], [u for _, u in pairs])
    return metrics


def test_metrics_by_hand():
    # IoU 1, 0.5, 0.7, 0, and 0 for a union of nothing
    values = metrics_of((10, 10), (5, 10), (7, 10), (0, 30), (0, 0)).compute()
    assert list(values) == list(METRIC_NAMES)
    assert values["P@0.5"] == pytest.approx(60)  # ≥, so 0.5 counts
    assert values["P@0.6"] == pytest.approx(40)
    assert values["P@0.7"] == pytest.approx(40)
    assert values["P@0.8"] == values["P@0.9"] == pytest.approx(20)
    assert values["mIoU"] == pytest.approx(100 * 2.2 / 5)
    assert values["oIoU"] == pytest.approx(100 * 22 / 60)


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.8, 0.9])
def test_an_iou_on_the_threshold_counts(threshold):
    for scale in (1, 3, 7, 1001):
        exact = (round(threshold * 10) * scale, 10 * scale)
        below = (exact[0] - 1, exact[1])
        assert metrics_of(exact).compute()[f"P@{threshold}"] == 100
        assert metrics_of(below).compute()[f"P@{threshold}"] == 0


def test_merging_and_order_change_nothing():
    source = random.Random(0)
    pairs = [(source.randrange(u), u) for u in (source.randrange(1, 5000) for _ in range(500))]
    whole = metrics_of(*pairs).compute()
    source.shuffle(pairs)
    parts = metrics_of(*pairs[:123])
    parts.merge(metrics_of(*pairs[123:]))
    assert parts.compute() == whole


def test_all_empty_is_zero_and_nothing_is_an_error():
    assert set(metrics_of((0, 0)).compute().values()) == {0.0}
    with pytest.raises(ValueError, match="no expression"):
        SegmentationMetrics().compute()
    with pytest.raises(ValueError, match="can't be"):
        metrics_of((3, 2))


def test_intersection_and_union():
    predicted = torch.tensor([[[1, 1], [0, 0]], [[0, 0], [0, 0]]]).bool()
    truth = torch.tensor([[[1, 0], [1, 0]], [[0, 0], [0, 0]]])
    intersections, unions = intersection_and_union(predicted, truth)
    assert (intersections.tolist(), unions.tolist()) == ([1, 0], [3, 0])


def test_baselines_by_hand():
    # One picture of 10 pixels, three expressions: two mean object a (4 pixels), one object b (2 other pixels).
    masks = {"a": torch.zeros(1, 10).long(), "b": torch.zeros(1, 10).long()}
    masks["a"][0, :4] = 1
    masks["b"][0, 4:6] = 1
    objects = ["b", "a", "a"]
    values = baseline_metrics(["picture"] * 3, objects, lambda index: masks[objects[index]])
    assert values["all foreground"]["mIoU"] == pytest.approx(100 * (0.2 + 0.4 + 0.4) / 3)
    assert values["all foreground"]["oIoU"] == pytest.approx(100 * 10 / 30)
    assert values["best object"]["mIoU"] == pytest.approx(100 * 2 / 3)
    assert values["best object"]["oIoU"] == pytest.approx(100 * 8 / (6 + 4 + 4))
