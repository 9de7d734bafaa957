"""Read and preprocess images.

Preprocessing is exactly as published: Pillow's bilinear resize to a square, then normalization by ImageNet's mean and
standard deviation. Images are copied to the model's device as uint8 and normalized there. This copies a quarter of the
bytes and gives the same float32 values.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torchvision.transforms.functional as TF
from PIL import Image, UnidentifiedImageError

from lib.errors import UserError
from refer.datasets import IMAGE_FORMATS
from refer.masks import Segmentation

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def preprocessing(img_size: int, max_tokens: int) -> dict[str, Any]:
    """Return the description of a model's inputs that checkpoints contain."""
    normalization = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    return {"img_size": img_size, "max_tokens": max_tokens, "resize": "bilinear", **normalization}


def check_preprocessing(saved: Any, path: Path) -> None:
    """Raise a UserError unless this module preprocesses images as a checkpoint describes (:func:`preprocessing`)."""
    if not isinstance(saved, dict) or not all(type(saved.get(name)) is int for name in ("img_size", "max_tokens")):
        raise UserError(f"{path} is corrupt: its entry preprocessing is incomplete.")
    for name, value in preprocessing(saved["img_size"], saved["max_tokens"]).items():
        if saved.get(name) != value:
            raise UserError(
                f"{path} was trained with another preprocessing: {name} {saved.get(name)!r} instead of {value!r}."
            )


@contextmanager
def open_image_file(path: Path, kind: str = "image", formats: tuple[str, ...] = IMAGE_FORMATS) -> Iterator[Image.Image]:
    """Open an image file. Pillow's errors within the block become UserErrors that name the file.

    Args:
        path: path of the file.
        kind: what error messages call the file, such as ``mask``.
        formats: the accepted formats.

    Raises:
        UserError: the file is missing or cannot be decoded.
    """
    try:
        if not path.is_file() and path.exists():  # opening a FIFO would wait for a writer
            raise UserError(f"Cannot decode {kind} {path}: it is not a regular file.")
        with Image.open(path, formats=formats) as image:
            yield image
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"No such {kind}: {path}.") from error
    except UnidentifiedImageError as error:
        accepted = f"{', '.join(formats[:-1])} or {formats[-1]}" if len(formats) > 1 else formats[0]
        raise UserError(f"Cannot decode {kind} {path}: it is not a {accepted} file.") from error
    except (OSError, ValueError, SyntaxError, NotImplementedError, Image.DecompressionBombError) as error:
        raise UserError(f"Cannot decode {kind} {path}: {str(error).rstrip('.')}.") from error


def read_image(path: Path) -> Image.Image:
    """Decode an image file to RGB.

    Raises:
        UserError: the file is missing, cannot be decoded or has more than 8 bits per channel.
    """
    with open_image_file(path) as image:
        check_depth(image, path)
        return image.convert("RGB")


def check_depth(image: Image.Image, path: Path | str) -> None:
    """Raise a UserError if an image has 16 or 32 bits per channel: Pillow would clip the values, not scale them."""
    if image.mode.startswith(("I", "F")):
        bits = 16 if "16" in image.mode else 32
        raise UserError(f"{path} is a {bits}-bit image (mode {image.mode}). Convert it to 8 bits per channel.")


def check_image_size(image: Image.Image, path: Path, segmentation: Segmentation) -> None:
    """Raise a UserError if an image and the segmentation of an object in it differ in size."""
    if image.size != (segmentation.width, segmentation.height):
        raise UserError(
            f"Image {path} is {image.width}×{image.height}, but its annotation says "
            f"{segmentation.width}×{segmentation.height}."
        )


def resize_image(image: Image.Image, size: int) -> torch.Tensor:
    """Resize an RGB image of any size to uint8 [3, size, size]."""
    return TF.pil_to_tensor(TF.resize(image, [size, size], TF.InterpolationMode.BILINEAR))


def normalize_images(images: torch.Tensor) -> torch.Tensor:
    """Scale images, uint8 [..., 3, H, W], to [0, 1] and normalize them: float32, on the same device."""

    # Constants are created on the device, because copying them would wait for it. They are tensors: on CUDA, PyTorch
    # divides by a Python number by multiplying by its rounded reciprocal.
    def constants(*values: float) -> torch.Tensor:
        return torch.stack([torch.full((1, 1), value, device=images.device) for value in values])

    scaled = images.to(torch.float32).div_(constants(255.0))
    return scaled.sub_(constants(*IMAGENET_MEAN)).div_(constants(*IMAGENET_STD))


def preprocess_image(image: Image.Image, size: int) -> torch.Tensor:
    """Convert an RGB image of any size to the model's input: float32 [3, size, size]."""
    return normalize_images(resize_image(image, size))
