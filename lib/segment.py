"""Segment the objects that sentences refer to in one image."""

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from bert.tokenization import tokenize
from data.transforms import preprocess_image, read_image
from lib.drawing import save_image
from lib.evaluation import predict
from lib.files import Kind, check_writable
from lib.loading import load_for_evaluation
from lib.visualize import overlay, parse_style
from utils import init_distributed


def segment_image(args: Any) -> None:
    """Segment the object that each ``--sentence`` refers to in ``--image``. Write overlays and masks of its size.

    ``dog.png`` and ``dog_mask.png`` for one sentence; ``dog_1.png``, ``dog_1_mask.png``, ``dog_2.png``, … for several.

    Args:
        args: the parsed flags of test.py: ``resume``, ``image``, ``sentence``, ``out``, ``threshold``.

    Raises:
        MissingFileError, UserError: an input cannot be read, or an output cannot be written.
    """
    color = parse_style(args.vis_color, None).colors[0]
    paths = output_paths(Path(args.out), len(args.sentence))
    loaded = load_for_evaluation(args, args.resume)
    for path in chain(*paths):
        check_writable(path, Kind.PNG)
    image = ImageOps.exif_transpose(read_image(Path(args.image)))  # "left" means left in the image as displayed
    ids, attention_mask = tokenize(loaded.tokenizer, args.sentence, loaded.cfg.DATA.MAX_TOKENS)

    dist = init_distributed(loaded.cfg.DEVICE, tf32=loaded.cfg.TRAIN.TF32)
    model = loaded.build_model(dist.device)
    masks = predict(
        model,
        preprocess_image(image, loaded.cfg.DATA.IMG_SIZE)[None].to(dist.device),
        torch.from_numpy(ids.astype(np.int64)).to(dist.device),
        torch.from_numpy(attention_mask.astype(np.int64)).to(dist.device),
        size=image.size[::-1],
        protocol=loaded.protocols[0],
        batch_size=loaded.cfg.BATCH_SIZE,
    )
    if dist.is_main:
        for sentence, mask, (overlay_path, mask_path) in zip(args.sentence, masks.cpu().numpy(), paths, strict=True):
            save_image(overlay(image, mask, color), overlay_path)
            save_image(Image.fromarray(mask.astype(np.uint8) * 255), mask_path)
            beginning = f"{sentence}: mask" if len(paths) > 1 else "Mask"
            print(f"{beginning} covers {mask.mean():.1%} of the image. Overlay: {overlay_path}. Mask: {mask_path}.")


def output_paths(out: Path, count: int) -> list[tuple[Path, Path]]:
    """Return the paths of overlay and mask for each of ``count`` sentences, numbered from 1 if there are several."""
    stems = [out.stem] if count == 1 else [f"{out.stem}_{number}" for number in range(1, count + 1)]
    return [(out.with_name(f"{stem}{out.suffix}"), out.with_name(f"{stem}_mask.png")) for stem in stems]
