"""Referring expressions as samples of image, token ids and target mask.

Shapes: S = img_size, N = max_tokens, H×W an image's own size.
"""

import itertools
import os
import pickle
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import BertTokenizer

from bert.tokenization import tokenize
from data.transforms import check_image_size, read_image, resize_image
from lib.errors import UserError
from lib.variants import MAX_TOKENS
from refer.annotations import Record
from refer.masks import Segmentation, resize_mask
from refer.refer import REFER
from utils import derive_seed, gc_paused

Item = TypeVar("Item")


class Expression(NamedTuple):
    """One sentence about one object."""

    ref_id: int
    sent_id: int
    image_id: int
    sentence: str
    ann_id: int


class ImageFiles:
    """Source of a dataset's pixels: the image files, and masks drawn from the annotations.

    :class:`data.pack.source.PackedImages` has the same methods and reads a packed file.
    """

    def check_images(self, dataset: "ReferDataset") -> None:
        """Raise a UserError if image files of the split are missing."""
        paths = sorted(dataset.image_paths().values())
        existing = {
            folder: set(os.listdir(folder)) if folder.is_dir() else set() for folder in {p.parent for p in paths}
        }
        missing = [path for path in paths if path.name not in existing[path.parent]]
        if missing:
            raise UserError(
                f"{len(missing)} of the {len(paths)} images of split {dataset.split} are missing, for example "
                f"{missing[0]}. See refer/README.md for where images belong."
            )

    def load_image(self, dataset: "ReferDataset", index: int) -> Image.Image:
        """Return the image of a sample, RGB, at its own size."""
        return read_image(dataset.image_path(index))

    def input_image(self, dataset: "ReferDataset", index: int) -> torch.Tensor:
        """Return the image of a sample, resized to uint8 [3, S, S]."""
        image = dataset.load_image(index)
        check_image_size(image, dataset.image_path(index), dataset.segmentation(index))
        return resize_image(image, dataset.img_size)

    def resized_mask(self, dataset: "ReferDataset", index: int, gt_mask: str) -> torch.Tensor:
        """Return the target mask of a sample, resized to uint8 [S, S] of 0 and 1."""
        return torch.from_numpy(resize_mask(dataset.full_size_mask(index, gt_mask), dataset.img_size))


class ReferDataset(Dataset):
    """A split of a REFER dataset. Sentences are tokenized in advance, images and masks loaded on demand.

    The dataset copies the annotations that it needs from ``refer``, which can be deleted afterwards.

    Args:
        refer: the annotations.
        split: train, val, testA, testB, test.
        tokenizer: BERT's tokenizer.
        img_size: S; images and masks are resized to S×S.
        max_tokens: N; see :func:`bert.tokenization.tokenize`.
        draw_seed: seed for drawing sentences, used for training. The dataset then has one sample per object (ref), and
            one of the object's sentences is drawn at random in each epoch. The draw depends only on this seed, the
            epoch and the index. If None, the dataset has one sample per sentence, which
            :class:`data.image_batches.ImageBatches` requires.
        shuffle_seed: seed for permuting the sentences within the split, to test whether a model uses them. If None,
            the sentences are not permuted.
        excluded_images: ids of images whose refs are left out.
        source: where images and masks come from (default: the image files and the annotations).

    A sample is a dict:
        ``image``: uint8 [3, S, S].
        ``input_ids``, ``attention_mask``: int64 [N].
        ``mask``: uint8 [S, S] of 0 and 1.
        ``index``: int64 [], position in the dataset.
    :class:`data.loaders.DeviceBatches` converts batches of samples to the model's input.
    """

    def __init__(
        self,
        refer: REFER,
        split: str,
        tokenizer: BertTokenizer,
        *,
        img_size: int,
        max_tokens: int = MAX_TOKENS,
        draw_seed: int | None = None,
        shuffle_seed: int | None = None,
        excluded_images: Collection[int] = (),
        source: ImageFiles | None = None,
    ) -> None:
        self.name, self.split_by, self.split = refer.dataset, refer.splitBy, split
        self.annotation_files = (refer.refs_path, refer.instances_path)
        self.image_dir, self.img_size = refer.image_dir, img_size
        self.draw_seed, self.source = draw_seed, source or ImageFiles()
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # so that running workers see changes
        with gc_paused():
            excluded = set(excluded_images)
            refs = [ref for ref in refer.loadRefs(refer.getRefIds(split=split)) if ref["image_id"] not in excluded]
            expressions = [expression for ref in refs for expression in _expressions_of(ref)]
            if shuffle_seed is not None:
                expressions = _with_shuffled_sentences(expressions, shuffle_seed)
            ids, mask = tokenize(tokenizer, [expression.sentence for expression in expressions], max_tokens)
            self.input_ids, self.attention_mask = torch.from_numpy(ids), torch.from_numpy(mask)
            self.expressions = SharedList(expressions)
            # Ref i has the expressions from _bounds[i] up to _bounds[i + 1], one segmentation and one image file.
            self._bounds = torch.from_numpy(np.cumsum([0, *(len(ref["sentences"]) for ref in refs)], dtype=np.int64))
            self._ids = torch.tensor([(ref["image_id"], ref["ann_id"]) for ref in refs], dtype=torch.int64).view(-1, 2)
            self._file_names = SharedList(refer.Imgs[ref["image_id"]]["file_name"] for ref in refs)
            try:
                self._segmentations = SharedList(refer.get_segmentation(ref["ref_id"]) for ref in refs)
            except RecursionError as error:
                raise UserError(
                    f"{refer.instances_path}: the segmentation of an annotation is nested too deeply. It must be a "
                    "list of polygons or an RLE."
                ) from error

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch. The random draw of sentences depends on it."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.expressions if self.draw_seed is None else self._segmentations)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        expression = self.expression_of(index)
        return {
            "image": self.input_image(index),
            "input_ids": self.input_ids[expression].long(),
            "attention_mask": self.attention_mask[expression].long(),
            "mask": self.target_mask(index),
            "index": torch.tensor(index),
        }

    def expression_of(self, index: int) -> int:
        """Return the index of a sample's sentence in ``expressions``. With ``draw_seed``, it depends on the epoch."""
        if self.draw_seed is None:
            return index
        first, end = self._bounds[index : index + 2].tolist()
        return first + derive_seed(self.draw_seed, int(self._epoch), index) % (end - first)

    def _ref_of(self, index: int) -> int:
        """Return the index of a sample's ref in the split."""
        if self.draw_seed is not None:
            return index
        return int(torch.searchsorted(self._bounds, index, right=True)) - 1

    def ids_of(self, index: int) -> tuple[int, int]:
        """Return the ids of a sample's image and annotation."""
        image_id, ann_id = self._ids[self._ref_of(index)].tolist()
        return image_id, ann_id

    def file_name(self, index: int) -> str:
        """Return the name of a sample's image file, relative to the folder of the images."""
        return self._file_names[self._ref_of(index)]

    def image_path(self, index: int) -> Path:
        """Return the image file of a sample."""
        return self.image_dir / self.file_name(index)

    def image_paths(self) -> dict[int, Path]:
        """Return the image file of each image id in the split."""
        names = dict(zip(self._ids[:, 0].tolist(), self._file_names, strict=True))
        return {image_id: self.image_dir / name for image_id, name in names.items()}

    def load_image(self, index: int) -> Image.Image:
        """Return the image of a sample, RGB, at its own size, for drawing."""
        return self.source.load_image(self, index)

    def input_image(self, index: int) -> torch.Tensor:
        """Return the image of a sample, resized to uint8 [3, S, S].

        Raises:
            UserError: the image cannot be read, or its size differs from that in the annotations.
        """
        return self.source.input_image(self, index)

    def target_mask(self, index: int, gt_mask: str = "paper", eval_size: str = "resized") -> torch.Tensor:
        """Return the target mask of a sample, uint8 of 0 and 1.

        Args:
            gt_mask: see :meth:`refer.masks.Segmentation.draw`.
            eval_size: ``resized``: [S, S]; ``original``: [H, W], the image's own size.
        """
        if eval_size == "original":
            return torch.from_numpy(self.full_size_mask(index, gt_mask))
        return self.source.resized_mask(self, index, gt_mask)

    def segmentation(self, index: int) -> Segmentation:
        """Return the segmentation of a sample's object."""
        return self._segmentations[self._ref_of(index)]

    def full_size_mask(self, index: int, mode: str = "paper") -> np.ndarray:
        """Return the target mask of a sample at the image's own size, uint8 [H, W] of 0 and 1.

        Args:
            mode: see :meth:`refer.masks.Segmentation.draw`.
        """
        return self.segmentation(index).draw(mode)

    def check_images(self) -> None:
        """Raise a UserError if an image of the split cannot be provided. Called before the first epoch."""
        self.source.check_images(self)


class SharedList(Sequence[Item]):
    """Immutable list stored in two tensors. DataLoader workers share them instead of copying them.

    A worker process that only reads a Python object still changes its reference count, so the operating system copies
    the memory page. With a Python list, after an epoch, each worker would have its own copy of nearly all annotations.

    Args:
        items: anything that can be pickled.
    """

    def __init__(self, items: Iterable[Item]) -> None:
        pickled = [pickle.dumps(item, pickle.HIGHEST_PROTOCOL) for item in items]
        self._bounds = torch.from_numpy(np.cumsum([0, *map(len, pickled)], dtype=np.int64))
        self._bytes = torch.from_numpy(np.frombuffer(b"".join(pickled), dtype=np.uint8).copy())

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> Item:
        index = range(len(self))[index]  # supports negative indices and raises IndexError
        start, end = self._bounds[index : index + 2].tolist()
        return pickle.loads(self._bytes.numpy()[start:end])

    def __iter__(self) -> Iterator[Item]:
        content = self._bytes.numpy()
        for start, end in itertools.pairwise(self._bounds.tolist()):
            yield pickle.loads(content[start:end])


def _expressions_of(ref: Record) -> Iterator[Expression]:
    for sentence in ref["sentences"]:
        text = sentence["raw"] if "raw" in sentence else sentence["sent"]
        yield Expression(ref["ref_id"], sentence["sent_id"], ref["image_id"], text, ref["ann_id"])


def _with_shuffled_sentences(expressions: list[Expression], seed: int) -> list[Expression]:
    order = np.random.default_rng(derive_seed("shuffled sentences", seed)).permutation(len(expressions))
    return [
        expression._replace(sentence=expressions[other].sentence)
        for expression, other in zip(expressions, order, strict=True)
    ]
