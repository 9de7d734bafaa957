"""Objects and scenes of RefShapes, described by their properties."""

from bisect import bisect
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import numpy as np

from data.refshapes.settings import LEVELS, SPLITS

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (214, 40, 36),
    "green": (44, 158, 52),
    "blue": (40, 76, 214),
    "yellow": (240, 216, 40),
    "purple": (160, 52, 190),
    "cyan": (70, 214, 222),
}
# Range of an object's area as a fraction of the image area. Consecutive ranges are separated by a factor of at least
# 1.3, so that a size word is never ambiguous.
SIZES = {"small": (0.031, 0.039), "medium": (0.053, 0.066), "large": (0.092, 0.109)}
# Pairs that occur in testB only. In training, each of these colors and shapes occurs in other pairs.
HELD_OUT = (("red", "triangle"), ("blue", "circle"), ("green", "square"), ("yellow", "cross"))
Choice = TypeVar("Choice")


@dataclass(frozen=True)
class SceneObject:
    """One object. Lengths are in pixels, positions relative to the top left corner of the image."""

    shape: str
    color: str
    size: str
    rgb: tuple[int, ...]
    side: float  # square root of the area of the whole object
    angle: float  # radians
    left: int = 0  # left edge of the box in which the object is drawn
    top: int = 0  # its top edge
    cx: float = 0.0  # centroid of the visible part
    cy: float = 0.0
    visible: float = 1.0  # fraction of the object that is visible
    hidden_by: tuple[int, ...] = ()  # indices of the objects that cover a part of this one

    @property
    def area(self) -> float:
        """Area of the whole object in pixels."""
        return self.side**2


@dataclass(frozen=True)
class Scene:
    """The content of an image, except for its noise."""

    seed: int
    split: str
    index: int
    level: str
    width: int
    height: int
    background: tuple[float, ...]  # gray value, offset of the three channels, gradient along x and y
    objects: tuple[SceneObject, ...]

    def key(self) -> tuple:
        """Return a key that is equal for scenes that look the same. The order of the objects does not matter."""
        objects = ((o.shape, o.color, o.size, round(o.cx), round(o.cy)) for o in self.objects)
        return (self.width, self.height, *sorted(objects))

    def targets(self) -> list[int]:
        """Return the indices of the objects that sentences may refer to.

        train, val: all objects. testA: objects whose shape occurs several times. testB: held-out pairs.
        """
        shapes = [obj.shape for obj in self.objects]
        if self.split == "testA":
            return [i for i, shape in enumerate(shapes) if shapes.count(shape) > 1]
        if self.split == "testB":
            return [i for i, obj in enumerate(self.objects) if (obj.color, obj.shape) in HELD_OUT]
        return list(range(len(shapes)))


def random_stream(seed: int, split: str, index: int, level: str, purpose: int) -> np.random.Generator:
    """Return the random generator of one image for one purpose (0 scene, 1 background, 2 sentences).

    Images do not depend on each other, so a split does not depend on the number of images in other splits.
    """
    return np.random.default_rng([seed, LEVELS.index(level), SPLITS.index(split), index, purpose])


def choose(rng: np.random.Generator, weights: dict[Choice, float]) -> Choice:
    """Return a random key with a probability proportional to its weight. Faster than Generator.choice."""
    sums = list(accumulate(weights.values()))
    return list(weights)[bisect(sums, rng.random() * sums[-1])]
