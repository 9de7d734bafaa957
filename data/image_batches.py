"""An evaluation split as batches of whole pictures: what depends on a picture alone is done once for all its sentences.

Letters: P pictures, R objects, B expressions of a batch; S img_size, N max_tokens; H×W a picture's own size.
"""

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from data.dataset_refer_bert import ReferDataset
from data.transforms import preprocess_mask, resize_image


class ImageBatches(Dataset):
    """Every expression of a split exactly once, an image's together, in the order of the images' first expressions.

    Images are taken together while their expressions don't exceed ``batch_size``; an image with more has a batch to
    itself. What is in which batch depends on nothing else, so however many processes share the batches, each is
    computed alike.

    Args:
        dataset: with every sentence of the split.
        batch_size: expressions of a forward pass.
        truths: which true masks are wanted: pairs of gt_mask (``paper``, ``union``) and eval_size (``resized``,
            ``original``).
        indices: of the expressions that are judged; None: all.

    A batch is a dict: ``image`` uint8 [P, 3, S, S]; ``input_ids`` and ``attention_mask`` int64 [B, N]; ``index`` int64
    [B], positions in the dataset; ``picture`` int64 [B], which of P; ``object`` int64 [B], which of R; ``truths``: for
    each pair of ``truths`` R masks, uint8 [R, S, S] or a list of [H, W].
    """

    def __init__(
        self,
        dataset: ReferDataset,
        batch_size: int,
        truths: Iterable[tuple[str, str]] = (("paper", "resized"),),
        indices: Iterable[int] | None = None,
    ) -> None:
        self.dataset, self.truths = dataset, tuple(dict.fromkeys(truths))
        self.indices = np.arange(len(dataset)) if indices is None else np.unique(np.fromiter(indices, np.int64))
        image_ids = [expression.image_id for expression in dataset.expressions]
        by_image: dict[int, list[int]] = {}
        for index in self.indices.tolist():
            by_image.setdefault(image_ids[index], []).append(index)
        self.batches: list[list[int]] = []
        for group in by_image.values():
            if self.batches and len(self.batches[-1]) + len(group) <= batch_size:
                self.batches[-1] += group
            else:
                self.batches.append(list(group))

    def remaining(self, done: Collection[int]) -> list[int]:
        """The numbers of the batches that have an expression which is not among ``done``."""
        return [number for number, batch in enumerate(self.batches) if not all(index in done for index in batch)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> dict[str, Any]:
        dataset, batch = self.dataset, self.batches[number]
        expressions = [dataset.expressions[index] for index in batch]
        pictures: dict[int, Image.Image] = {}  # by image_id
        masks: dict[int, dict[str, np.ndarray]] = {}  # by ref_id: by gt_mask
        for index, expression in zip(batch, expressions, strict=True):
            if expression.image_id not in pictures:
                pictures[expression.image_id] = dataset.picture(index)
            if expression.ref_id not in masks:
                modes = {gt_mask for gt_mask, _ in self.truths}
                masks[expression.ref_id] = {mode: dataset.full_size_mask(index, mode) for mode in sorted(modes)}
                for mask in masks[expression.ref_id].values():
                    dataset.check_size(index, pictures[expression.image_id], mask)
        images, objects = list(pictures), list(masks)
        truths: dict[tuple[str, str], torch.Tensor | list[torch.Tensor]] = {}
        for gt_mask, eval_size in self.truths:
            full_size = [mask[gt_mask] for mask in masks.values()]
            if eval_size == "resized":
                truths[gt_mask, eval_size] = torch.stack([preprocess_mask(m, dataset.img_size) for m in full_size])
            else:
                truths[gt_mask, eval_size] = [torch.from_numpy(mask) for mask in full_size]
        return {
            "image": torch.stack([resize_image(picture, dataset.img_size) for picture in pictures.values()]),
            "input_ids": dataset.input_ids[batch].long(),
            "attention_mask": dataset.attention_mask[batch].long(),
            "index": torch.tensor(batch),
            "picture": torch.tensor([images.index(one.image_id) for one in expressions]),
            "object": torch.tensor([objects.index(one.ref_id) for one in expressions]),
            "truths": truths,
        }
