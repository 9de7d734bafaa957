"""Referring expressions as samples: picture, token ids, mask.

Letters: S img_size, N max_tokens.
"""

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import BertTokenizer

from bert.tokenization import tokenize
from data.packed import PackedList
from data.transforms import preprocess_mask, resize_image
from lib.errors import UserError
from lib.variants import MAX_TOKENS
from refer.annotations import Record
from refer.masks import Shape
from refer.refer import REFER
from utils import derive_seed, gc_paused

DECODING_ERRORS = (OSError, ValueError, SyntaxError, NotImplementedError, Image.DecompressionBombError)  # of Pillow


class Expression(NamedTuple):
    """One sentence about one object."""

    ref_id: int
    sent_id: int
    image_id: int
    sentence: str
    ann_id: int


class Target(NamedTuple):
    """The object of a ref: its picture, and what its mask is drawn from."""

    file_name: str  # of the picture, below the dataset's image folder
    shape: Shape

    @classmethod
    def unpack(cls, plain: tuple[str, Any]) -> "Target":
        """From what a PackedList gives back."""
        return cls(plain[0], Shape._make(plain[1]))


def open_image(path: Path) -> Image.Image:
    """Decode a picture to RGB.

    Raises:
        UserError: the file is missing, can't be decoded or has more than 8 bits per channel; it names the file.
    """
    try:
        with Image.open(path) as image:
            check_depth(image, path)
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise UserError(f"no picture {path}: see refer/README.md for what belongs where") from error
    except DECODING_ERRORS as error:
        raise UserError(f"the picture {path} can't be decoded: {error}") from error


def check_depth(image: Image.Image, path: Path) -> None:
    """UserError for 16 bits or real numbers per channel: as RGB they would be cut off at 255, not scaled."""
    if image.mode.startswith(("I", "F")):
        raise UserError(f"the picture {path} has more than 8 bits per channel ({image.mode}): store it with 8")


class ReferDataset(Dataset):
    """A split of a REFER dataset, tokenised at once; pictures and masks are decoded on demand.

    What it needs of the annotations it keeps as bytes (see data.packed): they can be forgotten, and however many
    workers load its samples, there is one copy.

    Args:
        refer: the annotations.
        split: train, val, testA, testB, test.
        tokenizer: BERT's.
        img_size: S; pictures and masks are brought to S×S.
        max_tokens: N; see :func:`bert.tokenization.tokenize`.
        draw_sentences: True for training: a sample per ref, with one of its sentences, drawn by
            (seed, epoch, index); False: a sample per sentence (for evaluation see data.image_batches).
        seed: of the drawing and the shuffling.
        shuffle_sentences: permute the sentences within the split: a control that shows whether language is used.
        excluded_images: ids of images whose refs are left out.

    A sample is a dict: ``image`` uint8 [3, S, S], ``input_ids`` and ``attention_mask`` int64 [N], ``mask`` uint8
    [S, S] and ``index`` int64 []: the position in the dataset. :class:`data.loaders.DeviceBatches` makes of them what
    the model takes.
    """

    def __init__(
        self,
        refer: REFER,
        split: str,
        tokenizer: BertTokenizer,
        *,
        img_size: int,
        max_tokens: int = MAX_TOKENS,
        draw_sentences: bool = False,
        seed: int = 0,
        shuffle_sentences: bool = False,
        excluded_images: Collection[int] = (),
    ) -> None:
        self.name, self.split_by, self.split = refer.dataset, refer.splitBy, split
        self.annotation_files = (refer.refs_path, refer.instances_path)
        self.image_dir, self.img_size = refer.image_dir, img_size
        self.draw_sentences, self.seed = draw_sentences, seed
        with gc_paused():
            self._pack(refer, tokenizer, max_tokens, shuffle_sentences, set(excluded_images))
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that are already running

    def _pack(
        self, refer: REFER, tokenizer: BertTokenizer, max_tokens: int, shuffle_sentences: bool, excluded: set[int]
    ) -> None:
        refs = [ref for ref in refer.loadRefs(refer.getRefIds(split=self.split)) if ref["image_id"] not in excluded]
        expressions = [expression for ref in refs for expression in _expressions_of(ref)]
        if shuffle_sentences:
            order = np.random.default_rng(derive_seed("shuffled sentences", self.seed)).permutation(len(expressions))
            texts = [expressions[i].sentence for i in order]
            expressions = [e._replace(sentence=t) for e, t in zip(expressions, texts, strict=True)]
        ids = tokenize(tokenizer, [e.sentence for e in expressions], max_tokens)
        self.input_ids, self.attention_mask = (torch.from_numpy(one) for one in ids)
        self.expressions = PackedList(map(tuple, expressions), Expression._make)
        # Where a ref's sentences begin, and after the last ref where they end.
        self._starts = torch.from_numpy(np.cumsum([0, *(len(ref["sentences"]) for ref in refs)], dtype=np.int64))
        try:
            self._targets = PackedList((_packed_target(refer, ref) for ref in refs), Target.unpack)
        except ValueError as error:
            raise UserError(f"{refer.instances_path}: an annotation's segmentation is no list of polygons") from error

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next drawn sentences belong to."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self._targets) if self.draw_sentences else len(self.expressions)

    def expression_of(self, index: int) -> int:
        """Which of ``expressions`` sample ``index`` shows; in training that depends on seed and epoch."""
        if not self.draw_sentences:
            return index
        first, end = self._starts[index : index + 2].tolist()
        return first + derive_seed(self.seed, int(self._epoch), index) % (end - first)

    def _target(self, index: int) -> Target:
        if self.draw_sentences:
            return self._targets[index]
        return self._targets[int(torch.searchsorted(self._starts, index, right=True)) - 1]

    def image_path(self, index: int) -> Path:
        """The picture file of a sample."""
        return self.image_dir / self._target(index).file_name

    def load_image(self, index: int) -> Image.Image:
        """The picture of a sample, RGB, at its own size."""
        return open_image(self.image_path(index))

    def check_images(self) -> None:
        """Find out before the work whether every picture of the split is there.

        Raises:
            UserError: some are missing; it says how many, and names the first.
        """
        paths = [self.image_dir / name for name in sorted({target.file_name for target in self._targets})]
        present = {
            folder: set(os.listdir(folder)) if folder.is_dir() else set() for folder in {p.parent for p in paths}
        }
        missing = [path for path in paths if path.name not in present[path.parent]]
        if missing:
            raise UserError(
                f"{len(missing)} of the {len(paths)} pictures of split {self.split} are missing, {missing[0]} for one: "
                "see refer/README.md for what belongs where"
            )

    def full_size_mask(self, index: int, mode: str = "paper") -> np.ndarray:
        """The true mask of a sample at the picture's own size: uint8 [H, W] of 0 and 1; mode: one of MASK_MODES."""
        return self._target(index).shape.draw(mode)

    def check_size(self, index: int, image: Image.Image, mask: np.ndarray) -> None:
        """UserError where the picture of a sample isn't as large as its annotation says."""
        if image.size != mask.shape[::-1]:
            raise UserError(
                f"the picture {self.image_path(index)} is {image.width}×{image.height}, "
                f"but its annotation says {mask.shape[1]}×{mask.shape[0]}"
            )

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        chosen = self.expression_of(index)
        image, mask = self.load_image(index), self.full_size_mask(index)
        self.check_size(index, image, mask)
        return {
            "image": resize_image(image, self.img_size),
            "input_ids": self.input_ids[chosen].long(),
            "attention_mask": self.attention_mask[chosen].long(),
            "mask": preprocess_mask(mask, self.img_size),
            "index": torch.tensor(index),
        }


def _expressions_of(ref: Record) -> Iterator[Expression]:
    for sentence in ref["sentences"]:
        text = sentence["raw"] if "raw" in sentence else sentence["sent"]
        yield Expression(ref["ref_id"], sentence["sent_id"], ref["image_id"], text, ref["ann_id"])


def _packed_target(refer: REFER, ref: Record) -> tuple[str, tuple]:
    return refer.Imgs[ref["image_id"]]["file_name"], tuple(refer.get_shape(ref["ref_id"]))
