"""Object masks: drawn from COCO segmentations, converted to and from RLE, resized.

pycocotools is written in C and does not check its input: a malformed polygon or RLE could crash the process or allocate
all memory. Every segmentation is therefore checked here first.

Shapes: H×W height and width of an image in pixels.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from lib.errors import UserError
from lib.variants import MASK_MODES

MAX_SIDE = 2**14  # of an image, in pixels; COCO's longest side is 640
MAX_PIXELS = 100_000_000  # of an image; Pillow warns of decompression bombs above about this size
MAX_OUTLINE = 2_000_000  # pixels along an object's polygons, because pycocotools allocates memory for each
MAX_DRAWN = 2**30  # image pixels × parts of an object, because each part is drawn into a separate image


class Segmentation(NamedTuple):
    """Segmentation of an object as stored in its annotation. It is checked when the mask is drawn."""

    source: str  # annotation file, annotation and ref, for error messages
    height: int  # of the image, in pixels
    width: int
    parts: Any  # a list of polygons and RLEs, or one RLE

    def draw(self, mode: str = "paper") -> np.ndarray:
        """Draw the object's mask at the image's size: uint8 [H, W] of 0 and 1.

        Each part (polygon or RLE) is drawn separately.

        Args:
            mode: ``paper``: a pixel belongs to the object if exactly one part covers it, so overlaps are holes. This is
                the published protocol. ``union``: a pixel belongs to the object if any part covers it.

        Raises:
            UserError: unknown mode, or a segmentation that is not valid for this image.
        """
        if mode not in MASK_MODES:
            raise UserError(f"Unknown mask mode {mode!r}. Choose one of {', '.join(MASK_MODES)}.")
        # In column-major order, as pycocotools returns the parts.
        covered, overlap = (np.zeros((self.height, self.width), np.uint8, order="F") for _ in range(2))
        try:
            for part in _draw_parts(self.parts, self.height, self.width):
                overlap |= covered & part
                covered |= part
        except ValueError as error:
            raise UserError(f"{self.source}: {error}") from error
        return np.ascontiguousarray(covered ^ overlap if mode == "paper" else covered)


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Encode a mask, bool [H, W], as a COCO RLE that can be written as JSON."""
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}


def decode_mask(rle: dict[str, Any]) -> np.ndarray:
    """Decode a COCO RLE to bool [H, W].

    Raises:
        ValueError: it is not a valid RLE.
    """
    try:
        H, W = rle["size"]
        if not all(type(side) is int and 1 <= side <= MAX_SIDE for side in (H, W)):
            raise ValueError(f"{W}×{H} is not a valid image size")
        (mask,) = _draw_parts(rle, H, W)
    except (TypeError, KeyError) as error:
        raise ValueError(f"not an RLE: {error}") from error
    return mask.astype(bool)


def resize_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """Resize a mask [H, W] of 0 and 1 to uint8 [size, size] by Pillow's nearest neighbor, as published."""
    resized = Image.fromarray(mask.astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)
    return np.array(resized, dtype=np.uint8)


def is_number(value: Any, low: float, high: float) -> bool:
    """Return whether a value from a JSON file is an int or a float (not NaN, not a bool) between two bounds."""
    return type(value) in (int, float) and low <= value <= high


def _draw_parts(segmentation: Any, H: int, W: int) -> Iterator[np.ndarray]:
    """Yield each polygon or RLE as uint8 [H, W] of 0 and 1. ValueError: it is not valid."""
    if not isinstance(segmentation, list | dict) or not segmentation:
        raise ValueError("segmentation must be a list of polygons or an RLE")
    parts = [segmentation] if isinstance(segmentation, dict) else segmentation
    if len(parts) * H * W > MAX_DRAWN:
        raise ValueError(f"{len(parts)} polygons and RLEs are too many for an image of {W}x{H}")
    outline = 0.0
    for part in parts:
        if isinstance(part, dict):
            yield _decode_rle(part, H, W)
        else:
            outline += _outline_length(part, H, W)
            if outline > MAX_OUTLINE:
                raise ValueError(f"the outline of the polygons is longer than {MAX_OUTLINE} pixels")
            yield _draw_polygon(part, H, W)


def _draw_polygon(polygon: list[float], H: int, W: int) -> np.ndarray:
    try:
        return coco_mask.decode(coco_mask.frPyObjects([polygon], H, W))[:, :, 0]
    except TypeError as error:
        # NumPy first calls pycocotools' __array__ with `copy=`, which raises this TypeError, and then without it. If
        # Ctrl-C interrupts the second call, NumPy raises this TypeError instead of KeyboardInterrupt.
        if "'copy'" in str(error):
            raise KeyboardInterrupt from error
        raise


def _outline_length(polygon: Any, H: int, W: int) -> float:
    """Return the length of a polygon's outline in pixels. ValueError: it is not a polygon on or near the image."""
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        raise ValueError("a polygon must be a list of at least three x, y pairs")
    for low, high, values in ((-W, 2 * W, polygon[::2]), (-H, 2 * H, polygon[1::2])):
        if not all(is_number(value, low, high) for value in values):
            raise ValueError(f"a polygon has a coordinate that is not a number near the {W}x{H} image")
    points = np.array(polygon, float).reshape(-1, 2)
    return float((abs(points - np.roll(points, 1, axis=0)).max(axis=1) + 1).sum())


def _decode_rle(rle: dict[str, Any], H: int, W: int) -> np.ndarray:
    """Decode a COCO RLE: the lengths of runs of 0, 1, 0, … down the columns, as a list or a compressed string."""
    if rle.get("size") != [H, W]:
        raise ValueError(f"the size of an RLE must be that of the image, [{H}, {W}]")
    counts = rle.get("counts")
    if isinstance(counts, str):
        counts = _decompress(counts)
    if type(counts) is not list or not all(type(count) is int and 0 <= count <= H * W for count in counts):
        raise ValueError("the counts of an RLE must be run lengths")
    if sum(counts) != H * W:
        raise ValueError(f"the counts of an RLE sum to {sum(counts)} instead of {H}x{W}")
    return np.repeat((np.arange(len(counts)) & 1).astype(np.uint8), counts).reshape(W, H).T


def _decompress(text: str) -> list[int]:
    """Decompress COCO's string form of run lengths.

    Each character holds five bits of a number (character code - 48), lowest bits first. Bit 32 means that more
    characters follow; bit 16 of the last one is the sign. From the fourth number on, each is the difference from the
    number two places before.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("the compressed counts of an RLE are corrupt")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    if shift:
        raise ValueError("the compressed counts of an RLE are truncated")
    return counts
