"""Image preprocessing, exactly as published: Pillow's bilinear resize to a square, then ImageNet's mean and deviation.

Images are transferred to the model's device as uint8 and normalized there: a quarter of the bytes, the same float32
values.
"""

import torch
import torchvision.transforms.functional as TF
from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def resize_image(image: Image.Image, size: int) -> torch.Tensor:
    """Resize an RGB image of any size to uint8 [3, size, size]."""
    return TF.pil_to_tensor(TF.resize(image, [size, size], TF.InterpolationMode.BILINEAR))


def normalize_images(images: torch.Tensor) -> torch.Tensor:
    """Scale images, uint8 [..., 3, H, W], to [0, 1] and normalize them: float32, on the same device."""
    # A divisor on the device: for a Python number, CUDA multiplies by the rounded 1/255 instead of dividing.
    divisor = torch.full((), 255.0, device=images.device)
    return TF.normalize(images.to(torch.float32).div_(divisor), IMAGENET_MEAN, IMAGENET_STD, inplace=True)


def preprocess_image(image: Image.Image, size: int) -> torch.Tensor:
    """Convert an RGB image of any size to the model's input: float32 [3, size, size]."""
    return normalize_images(resize_image(image, size))
