"""The published preprocessing, to the digit: PIL's bilinear resize to a square, ImageNet statistics."""

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def preprocess_image(image: Image.Image, size: int) -> torch.Tensor:
    """An RGB picture of any size → float32 [3, size, size], normalised."""
    resized = TF.resize(image, [size, size], TF.InterpolationMode.BILINEAR)
    return TF.normalize(TF.to_tensor(resized), IMAGENET_MEAN, IMAGENET_STD)


def preprocess_mask(mask: np.ndarray, size: int) -> torch.Tensor:
    """A mask [H, W] of 0 and 1 → int64 [size, size], by PIL's nearest neighbour."""
    resized = TF.resize(Image.fromarray(mask.astype(np.uint8)), [size, size], TF.InterpolationMode.NEAREST)
    return torch.from_numpy(np.array(resized, dtype=np.int64))
