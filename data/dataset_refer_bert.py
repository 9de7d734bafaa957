"""Referring expressions as samples: picture, token ids, mask.

Letters: S img_size, N max_tokens.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import BertTokenizer

from bert.tokenization import tokenize
from data.transforms import preprocess_mask, resize_image
from refer.refer import REFER
from utils import UserError, derive_seed

MAX_TOKENS = 21  # the published length of a tokenised sentence


class Expression(NamedTuple):
    """One sentence about one object."""

    ref_id: int
    sent_id: int
    image_id: int
    sentence: str


def open_image(path: Path) -> Image.Image:
    """Decode a picture to RGB.

    Raises:
        UserError: the file is missing or can't be decoded; it names the file.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise UserError(f"no picture {path}: see refer/README.md for what belongs where") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"the picture {path} can't be decoded: {error}") from error


class ReferDataset(Dataset):
    """A split of a REFER dataset, tokenised at once; pictures and masks are decoded on demand.

    Args:
        refer: the annotations.
        split: train, val, testA, testB, test.
        tokenizer: BERT's.
        img_size: S; pictures and masks are brought to S×S.
        max_tokens: N; see :func:`bert.tokenization.tokenize`.
        mask_mode: ``paper`` (a pixel belongs to the object where exactly one polygon covers it) or ``union``.
        draw_sentences: True for training: a sample per ref, with one of its sentences, drawn by
            (seed, epoch, index); False: a sample per sentence (for evaluation see data.picture_batches).
        seed: of the drawing and the shuffling.
        shuffle_sentences: permute the sentences within the split: a control that shows whether language is used.

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
        mask_mode: str = "paper",
        draw_sentences: bool = False,
        seed: int = 0,
        shuffle_sentences: bool = False,
    ) -> None:
        self.refer, self.split, self.img_size, self.mask_mode = refer, split, img_size, mask_mode
        self.draw_sentences, self.seed = draw_sentences, seed
        refs = refer.loadRefs(refer.getRefIds(split=split))
        self.expressions = [
            Expression(ref["ref_id"], sentence["sent_id"], ref["image_id"], sentence.get("raw", sentence.get("sent")))
            for ref in refs
            for sentence in ref["sentences"]
        ]
        ends = np.cumsum([len(ref["sentences"]) for ref in refs])
        self._sentence_ranges = np.stack([ends - [len(ref["sentences"]) for ref in refs], ends], axis=1)
        if shuffle_sentences:
            order = np.random.default_rng(derive_seed("shuffled sentences", seed)).permutation(len(self.expressions))
            texts = [self.expressions[i].sentence for i in order]
            self.expressions = [e._replace(sentence=t) for e, t in zip(self.expressions, texts, strict=True)]
        self.input_ids, self.attention_mask = tokenize(tokenizer, [e.sentence for e in self.expressions], max_tokens)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that are already running

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next drawn sentences belong to."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self._sentence_ranges) if self.draw_sentences else len(self.expressions)

    def expression_of(self, index: int) -> int:
        """Which of ``expressions`` sample ``index`` shows; in training that depends on seed and epoch."""
        if not self.draw_sentences:
            return index
        first, end = self._sentence_ranges[index]
        return int(first) + derive_seed(self.seed, int(self._epoch), index) % int(end - first)

    def image_path(self, index: int) -> Path:
        """The picture file of a sample."""
        return self.refer.get_image_path(self.expressions[self.expression_of(index)].image_id)

    def picture(self, index: int) -> Image.Image:
        """The picture of a sample, RGB, at its own size."""
        return open_image(self.image_path(index))

    def check_pictures(self) -> None:
        """Find out before the work whether every picture of the split is there.

        Raises:
            UserError: some are missing; it says how many, and names the first.
        """
        paths = [self.refer.get_image_path(image_id) for image_id in sorted({e.image_id for e in self.expressions})]
        present = {
            folder: set(os.listdir(folder)) if folder.is_dir() else set() for folder in {p.parent for p in paths}
        }
        missing = [path for path in paths if path.name not in present[path.parent]]
        if missing:
            raise UserError(
                f"{len(missing)} of the {len(paths)} pictures of split {self.split} are missing, {missing[0]} for one: "
                "see refer/README.md for what belongs where"
            )

    def full_size_mask(self, index: int, mode: str | None = None) -> np.ndarray:
        """The true mask of a sample at the picture's own size: uint8 [H, W] of 0 and 1; by default of ``mask_mode``."""
        ref_id = self.expressions[self.expression_of(index)].ref_id
        return self.refer.getMask(ref_id, mode=mode or self.mask_mode)["mask"]

    def check_size(self, index: int, image: Image.Image, mask: np.ndarray) -> None:
        """UserError where the picture of a sample isn't as large as its annotation says."""
        if image.size != mask.shape[::-1]:
            raise UserError(
                f"the picture {self.image_path(index)} is {image.width}×{image.height}, "
                f"but its annotation says {mask.shape[1]}×{mask.shape[0]}"
            )

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        chosen = self.expression_of(index)
        image, mask = self.picture(index), self.full_size_mask(index)
        self.check_size(index, image, mask)
        return {
            "image": resize_image(image, self.img_size),
            "input_ids": torch.from_numpy(self.input_ids[chosen].astype(np.int64)),
            "attention_mask": torch.from_numpy(self.attention_mask[chosen].astype(np.int64)),
            "mask": preprocess_mask(mask, self.img_size),
            "index": torch.tensor(index),
        }
