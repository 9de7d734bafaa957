"""Convert images of all kinds that people have to upright RGB images."""

import logging
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from data.transforms import check_depth, open_image_file
from lib.errors import UserError

LOG = logging.getLogger("crossvlt")
ImageInput = str | os.PathLike | Image.Image | np.ndarray | torch.Tensor


def load_image(image: ImageInput) -> Image.Image:
    """Return an RGB image as people see it.

    The EXIF orientation is applied, so that "left" means left in the image as displayed. Transparent pixels become
    white. Of an animation, the first frame is used, with a warning. All other modes are converted by Pillow.

    Args:
        image: path of a file; PIL image; NumPy array, uint8 [H, W, 3] or [H, W]; or tensor, uint8 [3, H, W].

    Raises:
        UserError: the file is missing or cannot be decoded, the image has more than 8 bits per channel, or the array
            has another dtype or shape.
        TypeError: the argument is of another class.
    """
    if isinstance(image, str | os.PathLike):
        with open_image_file(Path(image)) as opened:
            return _upright_rgb(opened, Path(image).name)
    if isinstance(image, Image.Image):
        try:
            return _upright_rgb(image, "The PIL image")
        except UserError:
            raise
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"Cannot convert the PIL image to RGB: {str(error).rstrip('.')}.") from error
    if isinstance(image, np.ndarray):
        _check_array("NumPy array", image.dtype, image.shape, image.ndim == 2 or image.shape[2:] == (3,))
        return Image.fromarray(np.ascontiguousarray(image)).convert("RGB")
    if isinstance(image, torch.Tensor):
        _check_array("tensor", image.dtype, image.shape, image.ndim == 3 and len(image) == 3)
        return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    raise TypeError(
        f"An image must be a path, a PIL image, a NumPy array or a tensor, not an object of class {type(image)}."
    )


def _check_array(kind: str, dtype: object, shape: tuple[int, ...], has_channels: bool) -> None:
    """Raise a UserError unless an array contains an image."""
    if dtype not in (np.dtype("uint8"), torch.uint8) or not has_channels or 0 in shape:
        expected = "uint8 [3, H, W]" if kind == "tensor" else "uint8 [H, W, 3] or [H, W]"
        name = str(dtype).removeprefix("torch.")
        raise UserError(f"An image as a {kind} must be {expected}, with values from 0 to 255, not {name} {[*shape]}.")


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    check_depth(image, name)
    if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a photo with its preview
        LOG.warning("%s has several frames: only the first one is used", name)
    image = ImageOps.exif_transpose(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
