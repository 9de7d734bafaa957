"""The field's numbers, from intersections and unions: pure accumulators that merge."""

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


def metric_names(thresholds: Sequence[float] = THRESHOLDS) -> tuple[str, ...]:
    """What the metrics are called, in the order they are shown in."""
    return (*(f"P@{threshold}" for threshold in thresholds), "mIoU", "oIoU")


METRIC_NAMES = metric_names()


def intersection_and_union(predicted: torch.Tensor, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel counts of boolean masks [B, H, W] → intersections [B] and unions [B], int64."""
    predicted, truth = predicted.bool().flatten(1), truth.bool().flatten(1)
    return (predicted & truth).sum(1), (predicted | truth).sum(1)


def iou(intersection: int, union: int) -> float:
    """I/U, and 0 where U = 0."""
    return intersection / union if union else 0.0


@dataclass
class SegmentationMetrics:
    """P@X, mean IoU and overall IoU over expressions (spec: evaluation).

    IoU = I/U, and 0 where U = 0; P@X is the share with IoU ≥ X; mean IoU the mean over expressions; overall IoU ΣI/ΣU.
    Everything but the mean is kept in integers, and the mean is summed exactly rounded, so the order of adding and
    merging changes nothing.
    """

    pairs: list[tuple[int, int]] = field(default_factory=list)

    def add(self, intersections: Iterable[int], unions: Iterable[int]) -> None:
        """Count expressions by their pixel counts."""
        for intersection, union in zip(intersections, unions, strict=True):
            if not 0 <= intersection <= union:
                raise ValueError(f"an intersection of {intersection} pixels with a union of {union} can't be")
            self.pairs.append((int(intersection), int(union)))

    def merge(self, other: "SegmentationMetrics") -> None:
        """Add what another process or split has counted."""
        self.pairs.extend(other.pairs)

    def compute(self, thresholds: Sequence[float] = THRESHOLDS, *, strict: bool = False) -> dict[str, float]:
        """The metrics in percent, by the names of ``metric_names(thresholds)``.

        Args:
            thresholds: the X of P@X.
            strict: P@X is the share with IoU > X instead.

        Raises:
            ValueError: nothing was added.
        """
        if not self.pairs:
            raise ValueError("no expression was evaluated: there are no metrics of nothing")
        ious = [iou(*pair) for pair in self.pairs]
        count, union = len(ious), sum(union for _, union in self.pairs)
        reached = operator.gt if strict else operator.ge
        values = [sum(reached(iou, threshold) for iou in ious) / count for threshold in thresholds]
        values.append(math.fsum(ious) / count)
        values.append(sum(intersection for intersection, _ in self.pairs) / union if union else 0.0)
        return {name: 100 * value for name, value in zip(metric_names(thresholds), values, strict=True)}


def metrics_of(
    counts: np.ndarray, thresholds: Sequence[float] = THRESHOLDS, *, strict: bool = False
) -> dict[str, float]:
    """The metrics of expressions with these intersections and unions, int64 [n, 2]; see SegmentationMetrics.compute."""
    metrics = SegmentationMetrics()
    metrics.add(*np.asarray(counts).T.tolist())
    return metrics.compute(thresholds, strict=strict)
