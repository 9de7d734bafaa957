"""Segment the objects that sentences refer to in any images.

    predictor = Predictor.from_pretrained("checkpoints/best_refcoco.pth")
    results = predictor("photo.jpg", ["the dog on the left", "the red ball"])
    results[0].overlay().save("dog.png")

Shapes: H×W the image, S the model's image size, B sentences, N tokens.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm
from transformers import BertTokenizer

from bert.sentences import check_sentence
from bert.tokenization import tokenize
from data.image_input import ImageInput, load_image
from data.transforms import normalize_images, resize_image
from lib.drawing import Color
from lib.errors import UserError
from lib.evaluation import logits_to_masks, resize_logits
from lib.loading import LoadedCheckpoint, load_for_evaluation
from lib.polygons import mask_to_polygons
from lib.protocols import SWITCHES, Protocol
from lib.terminal import draws_bars
from lib.visualize import PREDICTION_COLOR, overlay
from refer.masks import encode_mask
from utils import select_device, set_tf32

BEST = "best.pth"  # the file of a run's folder that is loaded


@dataclass(frozen=True)
class Result:
    """The object that a sentence refers to in an image, as predicted.

    ``score`` is the mean probability of the object over the pixels of the mask, 0 if the mask is empty. It says how
    certain the model is of the pixels, not whether the sentence fits: a model trained on sentences that refer to an
    object finds one in every image.
    """

    sentence: str
    image: Image.Image = field(repr=False)  # upright, RGB
    mask: np.ndarray = field(repr=False)  # bool [H, W]
    probability: np.ndarray = field(repr=False)  # float32 [H, W], of the object

    @property
    def score(self) -> float:
        return float(self.probability[self.mask].mean(dtype=np.float64)) if self.mask.any() else 0.0

    @property
    def box(self) -> tuple[int, int, int, int] | None:
        """The smallest box around the mask in pixels, (x, y, width, height); None if the mask is empty."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        if not len(rows):
            return None
        x, y = int(columns[0]), int(rows[0])
        return x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y

    def overlay(self, color: Color = PREDICTION_COLOR) -> Image.Image:
        """Return the image with the mask tinted and outlined."""
        return overlay(self.image, self.mask, color)

    def rle(self) -> dict[str, Any]:
        """Return the mask as a COCO RLE that can be written as JSON: {"size": [H, W], "counts": text}."""
        return encode_mask(self.mask)

    def polygons(self) -> list[list[int]]:
        """Return the outline of each connected part as a COCO polygon [x0, y0, x1, y1, …]. Holes are filled."""
        return mask_to_polygons(self.mask)


class Predictor:
    """Predict masks for images and sentences. Use :meth:`from_pretrained`.

    Args:
        model: prepared by :func:`lib.inference.prepare`, on its device.
        tokenizer: of the model.
        img_size: S.
        max_tokens: token ids kept of a sentence, [CLS] and [SEP] included.
        protocol: defines how logits become a mask.
        batch_size: largest number of sentences per forward pass, and of images that are encoded at once.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: BertTokenizer,
        *,
        img_size: int,
        max_tokens: int,
        protocol: Protocol,
        batch_size: int,
    ) -> None:
        self.model, self.tokenizer, self.protocol = model, tokenizer, protocol
        self.img_size, self.max_tokens, self.batch_size = img_size, max_tokens, batch_size
        self.device = next(model.parameters()).device
        self._image: Image.Image | None = None  # of set_image
        self._encoded: torch.Tensor | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str = "auto",
        amp: str = "off",
        *,
        tokenizer: str | Path | None = None,
        batch_size: int | None = None,
        threshold: float | None = None,
    ) -> "Predictor":
        """Load a checkpoint. The arguments have the meanings of test.py's flags, whose names error messages contain.

        Args:
            path: a checkpoint file, released or written by train.py; or the folder of a run, which contains best.pth.
            device: ``auto`` (CUDA if available), ``cpu``, ``cuda`` or ``cuda:N``. On a GPU, TF32 is switched off for
                the whole program, as in test.py.
            amp: ``off``; or ``bf16`` or ``fp16``: mixed precision.
            tokenizer: for files without a vocabulary: vocab.txt, its folder, or a name on the Hugging Face Hub
                (``--bert_tokenizer``). Default: bert-base-uncased.
            batch_size: largest number of sentences per forward pass. Default: that of test.py.
            threshold: the mask contains pixels of at least this probability. Default: where it is above 0.5.

        Raises:
            MissingFileError, UserError: a file is missing or damaged, or an argument has no valid value.
        """
        flags = {
            "DEVICE": device,
            "TRAIN.AMP": amp,
            "PRETRAINED.TOKENIZER": None if tokenizer is None else str(tokenizer),
            "BATCH_SIZE": batch_size,
        }
        given = {key: value for key, value in flags.items() if value is not None}
        switches = dict.fromkeys(SWITCHES) | {"threshold": threshold}
        path = Path(path) / BEST if Path(path).is_dir() else Path(path)
        args = SimpleNamespace(cfg=None, protocol=None, **switches, **given)
        loaded = load_for_evaluation(args, path)
        selected = select_device(device)
        if selected.type == "cuda":
            set_tf32(False)
        return cls.from_loaded(loaded, selected)

    @classmethod
    def from_loaded(cls, loaded: LoadedCheckpoint, device: torch.device) -> "Predictor":
        """Build the model of a loaded checkpoint on a device."""
        return cls(
            loaded.build_model(device),
            loaded.tokenizer,
            img_size=loaded.cfg.DATA.IMG_SIZE,
            max_tokens=loaded.cfg.DATA.MAX_TOKENS,
            protocol=loaded.protocols[0],
            batch_size=loaded.cfg.BATCH_SIZE,
        )

    def __call__(self, image: ImageInput, sentences: str | Iterable[str]) -> list[Result]:
        """Return a result for each sentence about an image, which is encoded once.

        Args:
            image: path, PIL image, array or tensor, see :func:`data.image_input.load_image`.
            sentences: one or several.

        Raises:
            UserError (a ValueError): the image cannot be read, a sentence is blank, or the model's logits are inf or
                nan.
        """
        sentences = self._check(sentences)
        rgb = load_image(image)
        return self._segment([rgb], self._encode([rgb]), [sentences])[0] if sentences else []

    def set_image(self, image: ImageInput) -> None:
        """Encode an image for several calls of :meth:`predict`."""
        rgb = load_image(image)
        self._image, self._encoded = rgb, self._encode([rgb])

    def predict(self, sentences: str | Iterable[str]) -> list[Result]:
        """Return a result for each sentence about the image of :meth:`set_image`."""
        if self._image is None:
            raise RuntimeError("There is no image. Call set_image first.")
        sentences = self._check(sentences)
        return self._segment([self._image], self._encoded, [sentences])[0] if sentences else []

    def batch(
        self,
        pairs: Iterable[tuple[ImageInput, str | Iterable[str]]],
        *,
        progress: bool = True,
        on_error: Callable[[ImageInput, UserError], None] | None = None,
    ) -> Iterator[tuple[ImageInput, list[Result]]]:
        """Yield each image with its results, in order. Images are read as needed and processed in batches.

        Results differ from those of separate calls only by the rounding of sums in batches of another size.

        Args:
            pairs: image and sentences, as for a call. Any iterable, also a generator.
            progress: show a progress bar, if stderr is a terminal.
            on_error: called with an image and its error; the image is left out. None: the error is raised, after the
                results of the images before it.
        """
        total = len(pairs) if hasattr(pairs, "__len__") else None
        group: list[tuple[ImageInput, Image.Image, list[str]]] = []
        with tqdm(total=total, unit="image", disable=not (progress and draws_bars())) as bar:
            for image, sentences in pairs:
                try:
                    checked = self._check(sentences)
                    group.append((image, load_image(image), checked))
                except UserError as error:
                    if on_error is None:
                        yield from self._predict_group(group, bar)
                        raise
                    on_error(image, error)
                    bar.update()
                if len(group) == self.batch_size or sum(len(item[2]) for item in group) >= self.batch_size:
                    yield from self._predict_group(group, bar)
                    group = []
            yield from self._predict_group(group, bar)

    def _predict_group(
        self, group: list[tuple[ImageInput, Image.Image, list[str]]], bar: tqdm
    ) -> Iterator[tuple[ImageInput, list[Result]]]:
        if group:
            images, sentences = [item[1] for item in group], [item[2] for item in group]
            results = self._segment(images, self._encode(images), sentences)
            for (image, *_), found in zip(group, results, strict=True):
                bar.update()
                yield image, found

    def _check(self, sentences: str | Iterable[str]) -> list[str]:
        checked = [sentences] if isinstance(sentences, str) else list(sentences)
        for sentence in checked:
            check_sentence(self.tokenizer, sentence, self.max_tokens)
        return checked

    def _encode(self, images: list[Image.Image]) -> torch.Tensor:
        """Return the features of images that do not depend on a sentence."""
        pixels = torch.stack([resize_image(image, self.img_size) for image in images])
        return self.model.encode_images(normalize_images(pixels.to(self.device)))

    @torch.inference_mode()
    def _segment(
        self, images: list[Image.Image], encoded: torch.Tensor, sentences: list[list[str]]
    ) -> list[list[Result]]:
        """Return the results of each image's sentences."""
        flat = [(i, sentence) for i, items in enumerate(sentences) for sentence in items]
        results: list[list[Result]] = [[] for _ in images]
        for start in range(0, len(flat), self.batch_size):
            part = flat[start : start + self.batch_size]
            arrays = tokenize(self.tokenizer, [sentence for _, sentence in part], self.max_tokens)
            ids, attention_mask = (torch.from_numpy(array.astype(np.int64)).to(self.device) for array in arrays)
            rows = torch.tensor([i for i, _ in part], device=self.device)
            size = (self.img_size, self.img_size)
            logits = self.model.segment(encoded[rows], ids, attention_mask, size=size).mask_logits
            if not logits.isfinite().all():
                raise UserError("The model's logits are inf or nan. The weights are damaged: use another checkpoint.")
            for (i, sentence), single in zip(part, logits.split(1), strict=True):
                resized = resize_logits(single, images[i].size[::-1])
                mask = logits_to_masks(resized, resized.shape[-2:], self.protocol)[0].cpu().numpy()
                probability = resized.float().softmax(1)[0, 1].cpu().numpy()
                results[i].append(Result(sentence, images[i], mask, probability))
        return results
