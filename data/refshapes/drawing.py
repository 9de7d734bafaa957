"""Draw the objects, masks and images of RefShapes.

Shapes: H, W height and width of an image in pixels; h, w of the box around one object.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from data.refshapes.objects import SHAPES, Scene, SceneObject, random_stream

SUPERSAMPLING = 8
GAP = 3  # smallest distance in pixels between two objects that do not overlap


class Stamp(NamedTuple):
    """An object drawn in the smallest box of whole pixels that leaves a margin of one pixel on each side."""

    corners: np.ndarray  # float [N, 2], x and y relative to the top left corner of the box
    coverage: Image.Image  # w×h, share of each pixel that the object covers; 255: the whole pixel
    mask: np.ndarray  # bool [h, w], whether the object covers at least half of the pixel
    dilated: np.ndarray  # bool [h + 2 GAP, w + 2 GAP], ``mask`` grown by GAP pixels in all directions
    centroid: tuple[float, float]  # x and y of ``mask``
    area: int  # pixels in ``mask``


def stamp_of(obj: SceneObject) -> Stamp:
    """Return the stamp of an object. It depends only on the object's shape, side and angle."""
    return _stamp(obj.shape, obj.side, obj.angle)


@lru_cache(maxsize=4096)
def _stamp(shape: str, side: float, angle: float) -> Stamp:
    cos, sin = math.cos(angle), math.sin(angle)
    corners = _unit_outline(shape) @ np.array([[cos, sin], [-sin, cos]]) * side
    corners -= np.floor(corners.min(axis=0)) - 1
    width, height = (np.ceil(corners.max(axis=0)) + 1).astype(int).tolist()
    canvas = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    points = corners * SUPERSAMPLING - 0.5  # Pillow's coordinates refer to the centers of pixels
    ImageDraw.Draw(canvas).polygon(points.ravel().tolist(), fill=255)
    coverage = canvas.reduce(SUPERSAMPLING)
    mask = np.asarray(coverage) >= 128
    dilated = _dilate_rows(_dilate_rows(mask).T).T
    return Stamp(corners, coverage, mask, dilated, centroid(mask), np.count_nonzero(mask))


@lru_cache(maxsize=len(SHAPES))
def _unit_outline(shape: str) -> np.ndarray:
    """Return the corners, float [N, 2], of a shape with area 1 whose centroid is the origin; y points down."""
    if shape == "cross":  # its arms are a third as wide as the cross
        corners = np.array([(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1),
                            (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)], float)  # fmt: skip
    else:
        count, start = {"circle": (48, 0.0), "square": (4, math.pi / 4), "triangle": (3, -math.pi / 2)}[shape]
        angles = start + 2 * math.pi * np.arange(count) / count
        corners = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    x, y = corners.T
    area = abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
    return corners / math.sqrt(area)


def _dilate_rows(mask: np.ndarray) -> np.ndarray:
    """Grow a mask [h, w] by GAP pixels upwards and downwards: [h + 2 GAP, w]."""
    height, width = mask.shape
    dilated = np.zeros((height + 2 * GAP, width), bool)
    for shift in range(2 * GAP + 1):
        dilated[shift : shift + height] |= mask
    return dilated


def centroid(mask: np.ndarray) -> tuple[float, float]:
    """Return x and y of the centroid of a mask [H, W], relative to its top left corner."""
    ys, xs = np.nonzero(mask)
    return int(xs.sum()) / len(xs) + 0.5, int(ys.sum()) / len(ys) + 0.5


def full_mask(obj: SceneObject, image_shape: tuple[int, int]) -> np.ndarray:
    """Return the mask of the whole object, hidden parts included: bool [H, W] for an image of shape (H, W)."""
    mask = np.zeros(image_shape, bool)
    drawn = stamp_of(obj).mask
    mask[obj.top :, obj.left :][: drawn.shape[0], : drawn.shape[1]] = drawn
    return mask


def render(scene: Scene) -> tuple[Image.Image, list[np.ndarray]]:
    """Return the RGB image of a scene and the visible mask of every object, bool [H, W], in the scene's order."""
    rng = random_stream(scene.seed, scene.split, scene.index, scene.level, purpose=1)
    gray, red, green, blue, along_x, along_y = scene.background
    columns = np.linspace(-along_x, along_x, scene.width, dtype=np.float32)
    rows = np.linspace(-along_y, along_y, scene.height, dtype=np.float32)
    gradient = rows[:, None] + columns
    canvas = np.stack([gradient + (gray + offset) for offset in (red, green, blue)], axis=2)
    image = Image.fromarray(canvas.astype(np.uint8))
    for obj in sorted(scene.objects, key=lambda obj: not obj.hidden_by):  # draw partly hidden objects first
        image.paste(obj.rgb, (obj.left, obj.top), stamp_of(obj).coverage)
    noise = rng.integers(-5, 6, size=canvas.shape, dtype=np.int8)
    image = Image.fromarray((np.asarray(image, np.int16) + noise).clip(0, 255).astype(np.uint8))
    full_masks = [full_mask(obj, (scene.height, scene.width)) for obj in scene.objects]
    visible_masks = []
    for obj, mask in zip(scene.objects, full_masks, strict=True):
        for i in obj.hidden_by:
            mask = mask & ~full_masks[i]
        visible_masks.append(mask)
    return image, visible_masks
