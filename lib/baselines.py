"""Baselines that ignore the sentence. They show which metrics are possible without reading it."""

from collections import defaultdict

import torch

from data.dataset_refer_bert import ReferDataset
from lib.metrics import compute_metrics, intersection_and_union
from lib.protocols import Protocol


def baseline_metrics(dataset: ReferDataset, protocol: Protocol) -> dict[str, dict[str, float]]:
    """Return the metrics of two predictions that ignore the sentence.

    ``all foreground`` predicts every pixel. ``best object`` predicts, for each image, the object with the highest mean
    IoU over the image's expressions. It uses the target masks, so it is the best possible method that ignores the
    sentence and predicts one of these objects.
    """
    all_foreground: list[tuple[int, int]] = []  # intersections and unions
    best_object: list[tuple[int, int]] = []
    by_image = defaultdict(list)
    for index, expression in enumerate(dataset.expressions):
        by_image[expression.image_id].append((index, expression.ref_id))
    for expressions in by_image.values():
        masks: dict[int, torch.Tensor] = {}  # by ref_id
        for index, ref_id in reversed(expressions):  # of equally good objects, the one mentioned last is used
            if ref_id not in masks:
                masks[ref_id] = dataset.target_mask(index, *protocol.target_key).bool()
        targets = torch.stack([masks[ref_id] for _, ref_id in expressions])
        all_foreground += [(area, targets[0].numel()) for area in targets.sum((1, 2)).tolist()]
        scores = []
        for mask in masks.values():
            intersections, unions = intersection_and_union(mask.expand_as(targets), targets)
            mean_iou = float((intersections / unions.clamp(min=1)).mean())
            scores.append((mean_iou, intersections.tolist(), unions.tolist()))
        _, intersections, unions = max(scores, key=lambda score: score[0])
        best_object += zip(intersections, unions, strict=True)
    return {"all foreground": compute_metrics(all_foreground), "best object": compute_metrics(best_object)}
