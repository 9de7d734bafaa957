"""``test.py --image``: segment the objects that sentences refer to in one image."""

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lib.drawing import save_image
from lib.files import Kind, check_writable
from lib.loading import load_for_evaluation
from lib.predictor import Predictor
from lib.visualize import parse_style
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
    dist = init_distributed(loaded.cfg.DEVICE, tf32=loaded.cfg.TRAIN.TF32)
    results = Predictor.from_loaded(loaded, dist.device)(args.image, args.sentence)
    if dist.is_main:
        for result, (overlay_path, mask_path) in zip(results, paths, strict=True):
            save_image(result.overlay(color), overlay_path)
            save_image(Image.fromarray(result.mask.astype(np.uint8) * 255), mask_path)
            beginning = f"{result.sentence}: mask" if len(paths) > 1 else "Mask"
            covered = f"{beginning} covers {result.mask.mean():.1%} of the image"
            print(f"{covered}. Overlay: {overlay_path}. Mask: {mask_path}.")


def output_paths(out: Path, count: int) -> list[tuple[Path, Path]]:
    """Return the paths of overlay and mask for each of ``count`` sentences, numbered from 1 if there are several."""
    stems = [out.stem] if count == 1 else [f"{out.stem}_{number}" for number in range(1, count + 1)]
    return [(out.with_name(f"{stem}{out.suffix}"), out.with_name(f"{stem}_mask.png")) for stem in stems]
