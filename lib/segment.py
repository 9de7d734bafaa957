"""Segment the object that a sentence refers to in one image."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from bert.tokenization import tokenize
from data.transforms import preprocess_image, read_image
from lib.evaluation import predict
from lib.files import Kind, check_writable
from lib.loading import load_for_evaluation
from lib.visualize import overlay, save_image
from utils import init_distributed


def segment_image(args: Any) -> None:
    """Segment the object that ``--sentence`` refers to in ``--image``. Write overlay and mask in the image's size.

    Args:
        args: the parsed flags of test.py: ``resume``, ``image``, ``sentence``, ``out``, ``threshold``.

    Raises:
        MissingFileError, UserError: an input cannot be read, or an output cannot be written.
    """
    image_path, overlay_path = Path(args.image), Path(args.out)
    mask_path = overlay_path.with_name(f"{overlay_path.stem}_mask.png")
    loaded = load_for_evaluation(args, args.resume)
    for path in (overlay_path, mask_path):
        check_writable(path, Kind.PNG)
    image = ImageOps.exif_transpose(read_image(image_path))  # "left" means left in the image as displayed
    ids, attention_mask = tokenize(loaded.tokenizer, [args.sentence], loaded.cfg.DATA.MAX_TOKENS)

    dist = init_distributed(loaded.cfg.DEVICE, tf32=loaded.cfg.TRAIN.TF32)
    model = loaded.build_model(dist.device)
    mask = predict(
        model,
        preprocess_image(image, loaded.cfg.DATA.IMG_SIZE)[None].to(dist.device),
        torch.from_numpy(ids.astype(np.int64)).to(dist.device),
        torch.from_numpy(attention_mask.astype(np.int64)).to(dist.device),
        size=image.size[::-1],
        protocol=loaded.protocols[0],
    )[0]
    mask = mask.cpu().numpy()
    if dist.is_main:
        save_image(overlay(image, mask), overlay_path)
        save_image(Image.fromarray(mask.astype(np.uint8) * 255), mask_path)
        print(f"Mask covers {mask.mean():.1%} of the image. Overlay: {overlay_path}. Mask: {mask_path}.")
