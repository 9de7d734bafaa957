"""The metrics, compared with values computed by hand."""

import random

import numpy as np
import pytest
import torch

from lib.metrics import METRIC_NAMES, compute_metrics, expression_terms, intersection_and_union, metrics_from_sums


def test_metrics_by_hand():
    values = compute_metrics([(10, 10), (5, 10), (7, 10), (0, 30), (0, 0)])  # IoU 1, 0.5, 0.7, 0, and 0 without union
    assert list(values) == list(METRIC_NAMES)
    assert values["P@0.5"] == pytest.approx(60)  # 0.5 counts
    assert values["P@0.6"] == pytest.approx(40)
    assert values["P@0.7"] == pytest.approx(40)
    assert values["P@0.8"] == values["P@0.9"] == pytest.approx(20)
    assert values["mIoU"] == pytest.approx(100 * 2.2 / 5)
    assert values["oIoU"] == pytest.approx(100 * 22 / 60)


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.8, 0.9])
def test_an_iou_equal_to_the_threshold_counts_unless_strict(threshold):
    for scale in (1, 3, 7, 1001):
        intersection, union = round(threshold * 10) * scale, 10 * scale
        name = f"P@{threshold}"
        assert compute_metrics([(intersection, union)])[name] == 100
        assert compute_metrics([(intersection, union)], strict=True)[name] == 0
        assert compute_metrics([(intersection - 1, union)])[name] == 0


def test_the_order_of_expressions_does_not_change_the_metrics():
    generator = random.Random(0)
    counts = [(generator.randrange(union), union) for union in (generator.randrange(1, 5000) for _ in range(500))]
    values = compute_metrics(counts)
    generator.shuffle(counts)
    assert compute_metrics(np.array(counts)) == values


def test_metrics_of_several_sums_at_once():
    counts = [(5, 10), (9, 10), (0, 0), (1, 1)]
    sums = np.stack([expression_terms(part, (0.5, 0.9), strict=False).sum(0) for part in (counts[:2], counts[2:])])
    assert metrics_from_sums(sums).tolist() == [pytest.approx([100, 50, 70, 70]), pytest.approx([50, 50, 50, 100])]


def test_empty_masks_have_iou_0_and_impossible_counts_are_errors():
    assert set(compute_metrics([(0, 0)]).values()) == {0.0}
    with pytest.raises(ValueError, match="no expressions"):
        compute_metrics([])
    for impossible in ((3, 2), (-1, 2)):
        with pytest.raises(ValueError, match=f"intersection of {impossible[0]} pixels"):
            compute_metrics([(1, 2), impossible])


def test_intersection_and_union():
    predicted = torch.tensor([[[1, 1], [0, 0]], [[0, 0], [0, 0]]]).bool()
    target = torch.tensor([[[1, 0], [1, 0]], [[0, 0], [0, 0]]])
    intersections, unions = intersection_and_union(predicted, target)
    assert (intersections.tolist(), unions.tolist()) == ([1, 0], [3, 0])
