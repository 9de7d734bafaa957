"""Batches of an evaluation split. All sentences of an image are in one batch, so that it is loaded and encoded once.

Shapes: I images, R objects and B expressions of a batch; S img_size, N max_tokens; H×W an image's own size.
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch.utils.data import Dataset

from data.dataset_refer_bert import ReferDataset


class ImageBatches(Dataset):
    """Batches that contain each expression of a split exactly once, and all expressions of an image together.

    Images are in the order of their first expressions. Consecutive images share a batch while it has at most
    ``batch_size`` expressions in total; an image with more expressions has a batch of its own. The batches depend only
    on ``dataset``, ``batch_size`` and ``indices``. They are the same for any number of processes and after an
    interrupted evaluation, so that results are bitwise reproducible.

    Args:
        dataset: the split, with one sample per sentence.
        batch_size: maximum number of expressions of a forward pass.
        targets: kinds of target masks to provide: pairs of gt_mask (``paper``, ``union``) and eval_size (``resized``,
            ``original``).
        indices: indices of the expressions to evaluate; None: all.
        evaluated: indices of expressions whose results exist already. Batches of only such expressions are left out.

    A batch is a dict:
        ``image``: uint8 [I, 3, S, S].
        ``input_ids``, ``attention_mask``: int64 [B, N].
        ``index``: int64 [B], each expression's position in the dataset.
        ``image_index``: int64 [B], each expression's row in ``image``.
        ``object_index``: int64 [B], each expression's row in the masks of ``targets``.
        ``targets``: for each pair of ``targets``, uint8 [R, S, S] if resized, else a list of R masks uint8 [H, W].
    """

    def __init__(
        self,
        dataset: ReferDataset,
        batch_size: int,
        targets: Iterable[tuple[str, str]] = (("paper", "resized"),),
        indices: Iterable[int] | None = None,
        evaluated: Collection[int] = (),
    ) -> None:
        self.dataset, self.targets = dataset, tuple(dict.fromkeys(targets))
        image_ids = [expression.image_id for expression in dataset.expressions]
        by_image: dict[int, list[int]] = {}
        for index in range(len(dataset)) if indices is None else sorted(set(map(int, indices))):
            by_image.setdefault(image_ids[index], []).append(index)
        batches: list[list[int]] = []
        for group in by_image.values():
            if batches and len(batches[-1]) + len(group) <= batch_size:
                batches[-1] += group
            else:
                batches.append(group)
        self.batches = [batch for batch in batches if not all(index in evaluated for index in batch)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> dict[str, Any]:
        dataset, batch = self.dataset, self.batches[number]
        expressions = [dataset.expressions[index] for index in batch]
        first_of_image: dict[int, int] = {}  # image_id to the batch's first expression of this image
        first_of_object: dict[int, int] = {}  # ref_id to the batch's first expression of this object
        for index, expression in zip(batch, expressions, strict=True):
            first_of_image.setdefault(expression.image_id, index)
            first_of_object.setdefault(expression.ref_id, index)
        images = [dataset.input_image(index) for index in first_of_image.values()]
        targets: dict[tuple[str, str], torch.Tensor | list[torch.Tensor]] = {}
        for gt_mask, eval_size in self.targets:
            masks = [dataset.target_mask(index, gt_mask, eval_size) for index in first_of_object.values()]
            targets[gt_mask, eval_size] = torch.stack(masks) if eval_size == "resized" else masks
        image_row = {image_id: row for row, image_id in enumerate(first_of_image)}
        object_row = {ref_id: row for row, ref_id in enumerate(first_of_object)}
        return {
            "image": torch.stack(images),
            "input_ids": dataset.input_ids[batch].long(),
            "attention_mask": dataset.attention_mask[batch].long(),
            "index": torch.tensor(batch),
            "image_index": torch.tensor([image_row[expression.image_id] for expression in expressions]),
            "object_index": torch.tensor([object_row[expression.ref_id] for expression in expressions]),
            "targets": targets,
        }
