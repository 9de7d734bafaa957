"""RefShapes, its objects: what they are, what a scene of them is, and where their pixels lie.

Nothing in `data.refshapes.objects`, `_language` and `_scenes` reads or writes a file. A scene follows from (seed,
split, index, level) alone. `data.refshapes` renders the scenes, chooses among the descriptions and writes the dataset.

Legend: H, W height and width of a picture in pixels; h, w of an object's stamp, the part around the object.
"""

import math
from bisect import bisect
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageDraw

from lib.errors import UserError

LEVELS = ("basic", "full")
SPLITS = ("train", "val", "testA", "testB")
SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (214, 40, 36),
    "green": (44, 158, 52),
    "blue": (40, 76, 214),
    "yellow": (240, 216, 40),
    "purple": (160, 52, 190),
    "cyan": (70, 214, 222),
}
# Share of the picture's area. The gaps are factors of about 1.3 and more: a size word is never a close call.
SIZES = {"small": (0.031, 0.039), "medium": (0.053, 0.066), "large": (0.092, 0.109)}
MAX_SHARE = 0.12
ALL_COLORS_DIFFER = 0.6  # share of scenes where a colour alone tells an object (level basic)
MAX_TOTAL = 0.37  # of all objects together, or there is no room for them
# Pairs that occur in testB only: four colours, four shapes, each of which training shows in other pairs.
HELD_OUT = (("red", "triangle"), ("blue", "circle"), ("green", "square"), ("yellow", "cross"))

SUPERSAMPLE = 8
GAP = 3  # pixels at least between two objects that do not overlap
HIDDEN = (0.12, 0.36)  # share of the rear object that an overlap hides (level full)
OFF_AXIS = 0.25  # of its side, how far the one in front lies aside along either axis: not just edge to edge
PLACE_SURE, PLACE_MAYBE = 0.4, 0.51  # "on the left": true for cx < 0.4 W, false from 0.51 W on
EDGE_MARGIN = 0.08  # by how much of the side the leftmost object must lead
AREA_FACTOR = 1.25  # by which factor the biggest object must lead
RELATION_MARGIN = 0.12  # "left of": true from 0.12 W of distance on, false from 0 on

PLACES = ("left", "right", "top", "bottom", "top left", "top right", "bottom left", "bottom right")
MOST = ("biggest", "smallest", "leftmost", "rightmost", "topmost", "bottommost")
RELATIONS = ("left of", "right of", "above", "below", "behind", "in front of")
# Axis and direction along which the target comes before the others.
DIRECTIONS = {
    "leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "bottommost": (1, -1),
    "left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1),
}  # fmt: skip
FULL_ONLY = ("medium", "topmost", "bottommost")  # and every relation
T = TypeVar("T")


@dataclass(frozen=True)
class SceneObject:
    """One object; lengths in pixels from the picture's top left corner."""

    shape: str
    color: str
    size: str
    rgb: tuple[int, ...]
    side: float  # square root of the area of the whole object
    angle: float  # radians
    left: int = 0  # corner of the stamp
    top: int = 0
    cx: float = 0.0  # centre of mass of what is visible
    cy: float = 0.0
    visible: float = 1.0  # share of the whole object that is visible
    hidden_by: tuple[int, ...] = ()  # indices of the objects that cover a part of this one

    @property
    def area(self) -> float:
        """Of the whole object, in pixels."""
        return self.side**2


@dataclass(frozen=True)
class Scene:
    """A picture to be."""

    seed: int
    split: str
    index: int
    level: str
    width: int
    height: int
    background: tuple[float, ...]  # grey value, tint of the three channels, slope along x and along y
    objects: tuple[SceneObject, ...]

    def key(self) -> tuple:
        """What the scene shows, for telling whether two are the same: objects in any order, no noise."""
        shown = ((o.shape, o.color, o.size, round(o.cx), round(o.cy)) for o in self.objects)
        return (self.width, self.height, *sorted(shown))

    def targets(self) -> list[int]:
        """Indices of the objects that may be referred to: all in train and val, in testA those with another
        object of the same shape, in testB those of a held-out pair."""
        shapes = [obj.shape for obj in self.objects]
        if self.split == "testA":
            return [i for i, shape in enumerate(shapes) if shapes.count(shape) > 1]
        if self.split == "testB":
            return [i for i, obj in enumerate(self.objects) if (obj.color, obj.shape) in HELD_OUT]
        return list(range(len(shapes)))


def random_stream(seed: int, split: str, index: int, level: str, purpose: int) -> np.random.Generator:
    """The random numbers of one picture for one purpose (0 scene, 1 background, 2 expressions). No picture
    depends on another one, so no split depends on how many pictures another split has."""
    if level not in LEVELS:
        raise UserError(f"unknown level {level!r}: choose {' or '.join(LEVELS)}")
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if seed < 0 or index < 0:
        raise UserError(f"the seed and the index must be 0 or more, got {seed} and {index}")
    return np.random.default_rng([seed, LEVELS.index(level), SPLITS.index(split), index, purpose])


def draw(rng: np.random.Generator, weights: dict[T, float]) -> T:
    """A key, as often as its weight says. Generator.choice does it too, more slowly."""
    sums = list(accumulate(weights.values()))
    return list(weights)[bisect(sums, rng.random() * sums[-1])]


# ------------------------------------------------------------------------------------------ shapes and scenes


@lru_cache(maxsize=len(SHAPES))
def _unit_outline(shape: str) -> np.ndarray:
    """Corners (N, 2) of the shape with area 1, its centre of mass at the origin, y downwards."""
    if shape == "cross":  # arms as wide as a third of the whole
        corners = np.array([(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1),
                            (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)], float)  # fmt: skip
    else:
        count, start = {"circle": (48, 0.0), "square": (4, math.pi / 4), "triangle": (3, -math.pi / 2)}[shape]
        turns = start + 2 * math.pi * np.arange(count) / count
        corners = np.stack([np.cos(turns), np.sin(turns)], axis=1)
    x, y = corners.T
    return corners / math.sqrt(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


class Stamp(NamedTuple):
    """A shape in the smallest box of whole pixels with one pixel free all around."""

    corners: np.ndarray  # (N, 2) float, from the top left corner of the box
    cover: Image.Image  # of w by h pixels, 255 where the shape covers all of a pixel
    solid: np.ndarray  # (h, w) bool, the pixels covered to a half or more
    thick: np.ndarray  # (h + 2 GAP, w + 2 GAP) bool, `solid` grown by GAP pixels in all directions
    middle: tuple[float, float]  # of `solid`
    pixels: int  # in `solid`


@lru_cache(maxsize=4096)
def _stamp(shape: str, side: float, angle: float) -> Stamp:
    cos, sin = math.cos(angle), math.sin(angle)
    corners = _unit_outline(shape) @ np.array([[cos, sin], [-sin, cos]]) * side
    corners -= np.floor(corners.min(axis=0)) - 1
    width, height = (np.ceil(corners.max(axis=0)) + 1).astype(int).tolist()
    canvas = Image.new("L", (width * SUPERSAMPLE, height * SUPERSAMPLE))
    points = corners * SUPERSAMPLE - 0.5  # Pillow counts from the middle of the first pixel
    ImageDraw.Draw(canvas).polygon(points.ravel().tolist(), fill=255)
    cover = canvas.reduce(SUPERSAMPLE)
    solid = thick = np.asarray(cover) >= 128
    for _ in range(2):  # along one axis, then along the other
        grown = np.zeros((thick.shape[0] + 2 * GAP, thick.shape[1]), bool)
        for step in range(2 * GAP + 1):
            grown[step : step + thick.shape[0]] |= thick
        thick = grown.T
    return Stamp(corners, cover, solid, thick, _middle(solid), np.count_nonzero(solid))


def _middle(mask: np.ndarray) -> tuple[float, float]:
    """x and y of the centre of mass of the mask (H, W), from its top left corner."""
    ys, xs = np.nonzero(mask)
    return int(xs.sum()) / len(xs) + 0.5, int(ys.sum()) / len(ys) + 0.5


def stamp(obj: SceneObject) -> tuple[tuple[slice, slice], Stamp]:
    """The whole object, and where its stamp lies in the picture."""
    drawn = _stamp(obj.shape, obj.side, obj.angle)
    height, width = drawn.solid.shape
    return (slice(obj.top, obj.top + height), slice(obj.left, obj.left + width)), drawn


def whole_mask(obj: SceneObject, shape: tuple[int, int]) -> np.ndarray:
    """All of the object, hidden or not, in a picture of this shape: (H, W) bool."""
    mask = np.zeros(shape, bool)
    place, drawn = stamp(obj)
    mask[place] = drawn.solid
    return mask
