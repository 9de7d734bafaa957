"""Trivial answers that any model has to beat: they show what a dataset gives away without reading the sentence."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from lib.metrics import compute_metrics, intersection_and_union
from lib.protocols import Protocol
from refer.masks import resize_mask


def baseline_metrics(
    groups: Sequence[Hashable], object_ids: Sequence[Hashable], get_mask: Callable[[int], torch.Tensor]
) -> dict[str, dict[str, float]]:
    """Metrics of two answers that ignore the sentence.

    ``all foreground``: every pixel. ``best object``: for each picture the one of its objects that scores best over
    all of the picture's expressions by mean IoU — chosen knowing the truth, so no method that ignores the sentence and
    answers with one of these objects has a higher mean IoU.

    Args:
        groups: per expression, its picture.
        object_ids: per expression, its object.
        get_mask: the true mask [S, S] of an expression's object.
    """
    everything: list[tuple[int, int]] = []  # intersections and unions
    best_object: list[tuple[int, int]] = []
    by_picture = defaultdict(list)
    for index, picture in enumerate(groups):
        by_picture[picture].append(index)
    for indices in by_picture.values():
        first_of = {object_ids[index]: index for index in reversed(indices)}
        masks = {object_id: get_mask(index).bool() for object_id, index in first_of.items()}
        truths = torch.stack([masks[object_ids[index]] for index in indices])
        everything += [(area, truths[0].numel()) for area in truths.sum((1, 2)).tolist()]
        answers = []
        for mask in masks.values():
            intersections, unions = intersection_and_union(mask.expand_as(truths), truths)
            answers.append(
                (float((intersections / unions.clamp(min=1)).mean()), intersections.tolist(), unions.tolist())
            )
        best_object += zip(*max(answers, key=lambda answer: answer[0])[1:], strict=True)
    return {"all foreground": compute_metrics(everything), "best object": compute_metrics(best_object)}


def baselines_of(dataset: Any, protocol: Protocol) -> dict[str, dict[str, float]]:
    """:func:`baseline_metrics` of a ReferDataset, judged by a protocol."""

    def true_mask(index: int) -> torch.Tensor:
        mask = dataset.full_size_mask(index, protocol.gt_mask)
        return torch.from_numpy(resize_mask(mask, dataset.img_size) if protocol.eval_size == "resized" else mask)

    images, objects = ([getattr(one, name) for one in dataset.expressions] for name in ("image_id", "ref_id"))
    return baseline_metrics(images, objects, true_mask)
