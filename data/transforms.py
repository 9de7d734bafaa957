"""The published preprocessing, to the digit: PIL's bilinear resize to a square, ImageNet statistics.

Pictures travel as bytes and are normalised where the model is: a quarter of the transfer, the same float32 numbers.
"""

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image

from refer.masks import resize_mask

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def resize_image(image: Image.Image, size: int) -> torch.Tensor:
    """An RGB picture of any size → uint8 [3, size, size]."""
    return TF.pil_to_tensor(TF.resize(image, [size, size], TF.InterpolationMode.BILINEAR))


def normalize_images(images: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 3, H, W] → float32, scaled to [0, 1] and normalised, on the same device."""
    # A GPU would multiply by the rounded 1/255 instead of dividing by a number that isn't on it.
    most = torch.full((), 255.0, device=images.device)
    return TF.normalize(images.to(torch.float32).div_(most), IMAGENET_MEAN, IMAGENET_STD, inplace=True)


def preprocess_image(image: Image.Image, size: int) -> torch.Tensor:
    """An RGB picture of any size → float32 [3, size, size], normalised."""
    return normalize_images(resize_image(image, size))


def preprocess_mask(mask: np.ndarray, size: int) -> torch.Tensor:
    """A mask [H, W] of 0 and 1 → uint8 [size, size], by PIL's nearest neighbour."""
    return torch.from_numpy(resize_mask(mask, size))
