"""Masks: from COCO segmentations, which are checked (pycocotools is C and trusts its input), from and to RLE, resized.

H, W: height and width of the picture in pixels.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from lib.errors import UserError
from lib.variants import MASK_MODES

MAX_SIDE = 2**14  # of a picture, in pixels; COCO's are 640 at most
MAX_PIXELS = 100_000_000  # of a picture; PIL takes larger ones for decompression bombs
MAX_OUTLINE = 2_000_000  # pixels along an object's polygons: pycocotools allocates for each of them
MAX_DRAWN = 2**30  # pixels of a picture times parts of an object, each of which is drawn on all of it


class Shape(NamedTuple):
    """What an object's mask is drawn from."""

    where: str  # file, annotation and ref, for messages
    height: int  # of the picture, in pixels
    width: int
    segmentation: Any  # as the annotation has it, not yet checked

    def draw(self, mode: str = "paper") -> np.ndarray:
        """uint8 [H, W] of 0 and 1 at the picture's size.

        Each part of the segmentation (polygon or RLE) is rasterised by itself. "paper", the released protocol: the
        object is where exactly one part lies, so where two overlap is a hole. "union": where any part lies.

        Raises:
            UserError: unknown mode; a segmentation that cannot be a mask of this picture.
        """
        if mode not in MASK_MODES:
            raise UserError(f"unknown mask mode {mode!r}: choose one of {', '.join(MASK_MODES)}")
        covered, twice = (np.zeros((self.height, self.width), np.uint8, order="F") for _ in range(2))  # as the parts
        try:
            for part in parts_of(self.segmentation, self.height, self.width):
                twice |= covered & part
                covered |= part
        except ValueError as error:
            raise UserError(f"{self.where}: {error}") from error
        return np.ascontiguousarray(covered ^ twice if mode == "paper" else covered)


def parts_of(segmentation: Any, H: int, W: int) -> Iterator[np.ndarray]:
    """Each polygon or RLE as uint8 [H, W] of 0 and 1. ValueError: what is wrong with it."""
    if not isinstance(segmentation, list | dict) or not segmentation:
        raise ValueError("segmentation is neither a list of polygons nor an RLE")
    parts = [segmentation] if isinstance(segmentation, dict) else segmentation
    if len(parts) * H * W > MAX_DRAWN:
        raise ValueError(f"{len(parts)} polygons and RLEs are too many for a picture of {W}x{H}")
    left = MAX_OUTLINE
    for part in parts:
        if isinstance(part, dict):
            yield _decode_rle(part, H, W)
        else:
            left -= _check_polygon(part, H, W)
            if left < 0:
                raise ValueError(f"the polygons' outline is longer than {MAX_OUTLINE} pixels")
            yield decode_rles(coco_mask.frPyObjects([part], H, W))[:, :, 0]


def decode_rles(rles: list[dict[str, Any]]) -> np.ndarray:
    """COCO's decode, uint8 [H, W, parts] of 0 and 1, which Ctrl-C interrupts as it interrupts anything else."""
    try:
        return coco_mask.decode(rles)
    except TypeError as error:
        # NumPy asks COCO's array twice, as it knows no `copy`; a signal in between ends in the first one's error.
        if "'copy'" in str(error):
            raise KeyboardInterrupt from error
        raise


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """bool [H, W] → COCO RLE, as JSON takes it."""
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}


def decode_mask(rle: dict[str, Any]) -> np.ndarray:
    """The inverse of :func:`encode_mask`. ValueError: it is damaged."""
    try:
        H, W = rle["size"]
        if not all(type(side) is int and 1 <= side <= MAX_SIDE for side in (H, W)):
            raise ValueError(f"no picture is {W}×{H}")
        (mask,) = parts_of(rle, H, W)
    except (TypeError, KeyError) as error:
        raise ValueError(f"not an RLE: {error}") from error
    return mask.astype(bool)


def resize_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """A mask [H, W] of 0 and 1 → uint8 [size, size], by PIL's nearest neighbour: the published preprocessing."""
    resized = Image.fromarray(mask.astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)
    return np.array(resized, dtype=np.uint8)


def is_number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high  # false for NaN; a huge int does not overflow


def _check_polygon(polygon: Any, H: int, W: int) -> float:
    """How long its outline is in pixels. pycocotools is C and trusts its input: far coordinates overflow there, long
    outlines eat the memory."""
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        raise ValueError("a polygon is not a list of three or more x, y pairs")
    for low, high, values in ((-W, 2 * W, polygon[::2]), (-H, 2 * H, polygon[1::2])):
        if not all(is_number(value, low, high) for value in values):
            raise ValueError(f"a polygon's coordinate is not a number near the {W}x{H} picture")
    points = np.array(polygon, float).reshape(-1, 2)
    return float((abs(points - np.roll(points, 1, axis=0)).max(axis=1) + 1).sum())


def _decode_rle(rle: dict[str, Any], H: int, W: int) -> np.ndarray:
    """COCO's RLE: lengths of runs of 0, 1, 0, … down the columns, as a list or as a compressed string."""
    if rle.get("size") != [H, W]:
        raise ValueError(f"an RLE's size is not the picture's [{H}, {W}]")
    counts = rle.get("counts")
    if isinstance(counts, str):
        counts = _decompress(counts)
    if type(counts) is not list or not all(type(one) is int and 0 <= one <= H * W for one in counts):
        raise ValueError("an RLE's counts are not run lengths")
    if sum(counts) != H * W:
        raise ValueError(f"an RLE's counts sum to {sum(counts)}, not to {H}x{W}")
    return np.repeat((np.arange(len(counts)) & 1).astype(np.uint8), counts).reshape(W, H).T


def _decompress(text: str) -> list[int]:
    """A character holds five bits of a number (code - 48), lowest first; 32 in it: more follow; 16 in the last:
    negative. From the fourth number on, each is the difference to the one two before."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("an RLE's compressed counts are damaged")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    if shift:
        raise ValueError("an RLE's compressed counts end within a number")
    return counts
