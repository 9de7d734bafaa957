"""RefShapes, the pure part: scenes of plain shapes, and descriptions that are true of exactly one of them.

Nothing here reads or writes a file. A scene follows from (seed, split, index, level) alone. `data.refshapes`
renders the scenes, chooses among the descriptions, puts them into words and writes the dataset.

Every property is judged with three values: true, false and unclear (an object near the middle is neither on
the left nor not on the left). A description is used only if it is true of its target and false of the others.

Legend: H, W height and width of a picture in pixels; h, w of an object's stamp, the part around the object.
"""

import math
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageDraw

from utils import UserError

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


def generate_scene(seed: int, split: str, index: int, level: str) -> Scene:
    """The scene with this number. At least one of its targets can be told apart in words."""
    rng = random_stream(seed, split, index, level, purpose=0)
    while True:
        width, height = rng.integers(96, 129, size=2).tolist()
        tint, slopes = rng.uniform(-6, 6, size=3).tolist(), rng.uniform(-14, 14, size=2).tolist()
        background = (rng.uniform(95, 190), *tint, *slopes)
        cast = _draw_cast(rng, split, level, width * height)
        overlap = level == "full" and rng.random() < 0.5 and cast[0].color != cast[1].color
        placed = _place(rng, cast, (height, width), overlap)
        if placed is None:
            continue
        order = rng.permutation(len(placed)).tolist()  # so that the numbers say nothing about size or depth
        objects = [placed[i] for i in order]
        if overlap:
            objects = [replace(o, hidden_by=tuple(order.index(j) for j in o.hidden_by)) for o in objects]
        scene = Scene(seed, split, index, level, width, height, background, tuple(objects))
        if any(candidates(scene, target) for target in scene.targets()):
            return scene


def _draw_cast(rng: np.random.Generator, split: str, level: str, picture_area: int) -> list[SceneObject]:
    """3–6 objects without places. Few colours and shapes per scene, so that one alone is often not enough; but at level
    basic most scenes have a colour for each object."""
    count = draw(rng, {3: 0.1, 4: 0.3, 5: 0.35, 6: 0.25})
    colors = [list(COLORS)[i] for i in rng.permutation(len(COLORS))[: rng.integers(3, 7)]]
    few = rng.integers(1, 3) if split == "testA" else rng.integers(2, 5)
    shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))[:few]]
    usual = [(c, s) for c in colors for s in shapes if (c, s) not in HELD_OUT]
    pairs = [usual[i] for i in rng.integers(len(usual), size=count)]
    if split == "testB":
        for i in range(min(count - 1, int(rng.integers(1, 4)))):
            pairs[i] = HELD_OUT[rng.integers(len(HELD_OUT))]
        pairs = [pairs[i] for i in rng.permutation(count)]
    if level == "basic" and rng.random() < ALL_COLORS_DIFFER:
        pairs = _with_other_colors(rng, pairs, shapes)
    shares = [1.0]
    while sum(shares) > MAX_TOTAL:
        sizes = [draw(rng, {"small": 1, "medium": 1.2, "large": 1.8}) for _ in range(count)]
        shares = rng.uniform(*zip(*(SIZES[size] for size in sizes), strict=True)).tolist()
    cast = []
    for (color, shape), size, share in zip(pairs, sizes, shares, strict=True):
        shift = rng.integers(-12, 13, size=3).tolist()
        rgb = tuple(min(max(v + d, 0), 255) for v, d in zip(COLORS[color], shift, strict=True))
        side = round(2 * math.sqrt(share * picture_area)) / 2  # few values: stamps are used again
        angle = 0.0 if shape == "circle" else 0.04 * int(rng.integers(-4, 4)) + 0.02
        cast.append(SceneObject(shape, color, size, rgb, side, angle))
    return cast


def _with_other_colors(
    rng: np.random.Generator, pairs: list[tuple[str, str]], shapes: list[str]
) -> list[tuple[str, str]]:
    """The pairs, with each colour once: the first to have it keeps it, the later ones get one that is left."""
    free = [list(COLORS)[i] for i in rng.permutation(len(COLORS))]
    for color, _ in pairs:
        if color in free:
            free.remove(color)
    seen: set[str] = set()
    different = []
    for color, shape in pairs:
        if color in seen:
            color = free.pop()
            if (color, shape) in HELD_OUT:  # only those drawn on purpose are in a scene
                shape = next((other for other in shapes if (color, other) not in HELD_OUT), SHAPES[0])
                shape = shape if (color, shape) not in HELD_OUT else SHAPES[1]
        seen.add(color)
        different.append((color, shape))
    return different


def _place(
    rng: np.random.Generator, cast: list[SceneObject], shape: tuple[int, int], overlap: bool
) -> list[SceneObject] | None:
    """Give every object a place inside the picture of this (H, W), apart from the others; with `overlap` the
    second one covers a part of the first. None if there is no room."""
    pair = 2 if overlap else 0
    cast = cast[:pair] + sorted(cast[pair:], key=lambda obj: -obj.area)  # the large ones while there is room
    placed: list[SceneObject] = []
    taken = np.zeros((shape[0] + 2 * GAP, shape[1] + 2 * GAP), bool)  # the objects so far, GAP pixels thicker
    for obj in cast:
        _, drawn = stamp(obj)
        assert drawn.pixels <= MAX_SHARE * shape[0] * shape[1]
        height, width = drawn.solid.shape
        rear = whole_mask(placed[0], shape) if overlap and len(placed) == 1 else None
        room = (shape[0] - height + 1, shape[1] - width + 1)
        spots = rng.integers(room, size=(150 if rear is None else 400, 2))
        if placed and rear is None:  # most of the spots that won't do are out at a glance
            far = np.array([(obj.side + o.side) / 2 + GAP for o in placed])
            rows = spots[:, :1] + height / 2 - [o.cy for o in placed]
            columns = spots[:, 1:] + width / 2 - [o.cx for o in placed]
            spots = spots[(rows**2 + columns**2 >= far**2).all(axis=1)]
        for top, left in spots.tolist():
            if rear is not None:
                hidden = np.count_nonzero(rear[top : top + height, left : left + width] & drawn.solid)
                off = min(abs(left + width / 2 - placed[0].cx), abs(top + height / 2 - placed[0].cy))
                if HIDDEN[0] <= hidden / stamp(placed[0])[1].pixels <= HIDDEN[1] and off >= OFF_AXIS * placed[0].side:
                    break
            elif not (taken[top + GAP :, left + GAP :][:height, :width] & drawn.solid).any():
                break
        else:
            return None
        cx, cy = drawn.middle
        placed.append(replace(obj, left=left, top=top, cx=left + cx, cy=top + cy))
        if rear is not None:
            rest = rear & ~whole_mask(placed[1], shape)
            visible = int(np.count_nonzero(rest)) / stamp(placed[0])[1].pixels
            cx, cy = _middle(rest)
            placed[0] = replace(placed[0], hidden_by=(1,), visible=visible, cx=cx, cy=cy)
        taken[top:, left:][: height + 2 * GAP, : width + 2 * GAP] |= drawn.thick
    return placed


# ----------------------------------------------------------------------------------------------- descriptions


class Description(NamedTuple):
    """The properties that an expression names; None where it is silent."""

    color: str | None = None
    shape: str | None = None
    size: str | None = None
    place: str | None = None
    most: str | None = None
    relation: str | None = None
    landmark: "Description | None" = None

    def kind(self) -> str:
        """What kind of expression it makes."""
        if self.relation:
            return "overlap" if self.relation in ("behind", "in front of") else "relation"
        if self.most:
            return "biggest" if self.most in ("biggest", "smallest") else "leftmost"
        if self.place or self.size:
            return "place" if self.place else "size"
        return "+".join(name for name in ("color", "shape") if getattr(self, name))


class _Facts:
    """What is true in a scene. Sets of objects are the bits of an integer. For every word `sure` holds the
    objects it is clearly true of, and `maybe` those it is not clearly false of."""

    def __init__(self, scene: Scene) -> None:
        self.objects, self.level = scene.objects, scene.level
        self.sure: dict[str, int] = {}
        self.maybe: dict[str, int] = {}
        self.whole = [obj.area for obj in self.objects]
        self.seen = [obj.area * obj.visible for obj in self.objects]
        self.unit = [(o.cx / scene.width, o.cy / scene.height) for o in self.objects]
        for i, (obj, (u, v)) in enumerate(zip(self.objects, self.unit, strict=True)):
            self._note(i, obj.color, True, True)
            self._note(i, obj.shape, True, True)
            # What an overlap leaves of an object may look a size smaller: then no size word is clear.
            clear = obj.visible * obj.area >= 0.96 * SIZES[obj.size][0] * scene.width * scene.height
            for size in SIZES:
                self._note(i, size, clear and size == obj.size, not clear or size == obj.size)
            sides = {"left": u, "right": 1 - u, "top": v, "bottom": 1 - v}
            for place in PLACES:
                far = max(sides[side] for side in place.split())
                self._note(i, place, far < PLACE_SURE, far < PLACE_MAYBE)

    def _note(self, i: int, word: str, sure: bool, maybe: bool) -> None:
        self.sure[word] = self.sure.get(word, 0) | (sure << i)
        self.maybe[word] = self.maybe.get(word, 0) | (maybe << i)

    def meant(self, description: Description) -> int:
        """The objects that colour, shape, size and place of the description may mean."""
        bits = (1 << len(self.objects)) - 1
        for word in description[:4]:
            if word:
                bits &= self.maybe[word]
        return bits

    def is_most(self, most: str, target: int, others: list[int]) -> bool:
        """Whether the target leads all others clearly; in size both as a whole and as far as visible."""
        if most == "biggest":
            return self.seen[target] >= AREA_FACTOR * max(self.whole[j] for j in others)
        if most == "smallest":
            return min(self.seen[j] for j in others) >= AREA_FACTOR * self.whole[target]
        axis, sign = DIRECTIONS[most]
        return all(sign * (self.unit[j][axis] - self.unit[target][axis]) >= EDGE_MARGIN for j in others)

    def related(self, relation: str, landmark: int) -> tuple[int, int]:
        """The objects of which "<relation> the landmark" is sure, and those of which it may be true."""
        sure = maybe = 0
        for i, place in enumerate(self.unit):
            if relation in DIRECTIONS:
                axis, sign = DIRECTIONS[relation]
                along = sign * (self.unit[landmark][axis] - place[axis])
                across = abs(self.unit[landmark][1 - axis] - place[1 - axis])
                yes, could = along >= max(RELATION_MARGIN, across), along > 0
            else:
                rear, front = (i, landmark) if relation == "behind" else (landmark, i)
                yes = could = front in self.objects[rear].hidden_by
            sure |= yes << i
            maybe |= could << i
        return sure, maybe


@lru_cache(maxsize=4)
def _facts(scene: Scene) -> _Facts:
    return _Facts(scene)


def candidates(scene: Scene, target: int) -> list[tuple[Description, bool]]:
    """All descriptions that single the target out, each with whether it says more than it needs to."""
    return list(_candidates(_facts(scene), target))


def _heads(obj: SceneObject, sizes: list[str]) -> list[Description]:
    """What colour, shape and one of these sizes make together, "shape" or "one" first."""
    named = [(c, s) for c in (None, obj.color) for s in (None, obj.shape)]
    return [Description(c, s, size) for c, s in named for size in [None, *sizes]]


def _candidates(facts: _Facts, target: int) -> Iterator[tuple[Description, bool]]:
    me = 1 << target
    allowed = [word for word in (*SIZES, *PLACES) if facts.level == "full" or word not in FULL_ONLY]
    true = [word for word in allowed if facts.sure[word] & me]
    sizes = [size for size in SIZES if size in true]
    for head in _heads(facts.objects[target], []):
        bits = facts.meant(head)
        unique = bits == me
        if unique and any(head):
            yield head, False
        for word in true:
            if bits & facts.maybe[word] == me:
                yield head._replace(**{"size" if word in SIZES else "place": word}), unique
        others = [j for j in range(len(facts.objects)) if bits >> j & 1 and j != target]
        for most in MOST if others else ():
            if (facts.level == "full" or most not in FULL_ONLY) and facts.is_most(most, target, others):
                yield head._replace(most=most), False
    if facts.level == "full":
        yield from _relational(facts, target, sizes)


def _relational(facts: _Facts, target: int, sizes: list[str]) -> Iterator[tuple[Description, bool]]:
    me = 1 << target
    heads = [(head, facts.meant(head)) for head in _heads(facts.objects[target], sizes)]
    heads = [(head, bits) for head, bits in heads if bits != me]  # the relation is to be what decides
    for other, obj in enumerate(facts.objects):
        it = 1 << other
        marks = _heads(obj, [size for size in SIZES if facts.sure[size] & it]) if other != target else []
        marks = [m for m in marks if (m.color or m.shape) and facts.meant(m) == it
                 and (m.size is None or facts.meant(m._replace(size=None)) != it)]  # fmt: skip
        for relation in RELATIONS if marks else ():
            sure, maybe = facts.related(relation, other)
            for head, bits in heads if sure & me else ():
                if bits & maybe == me:
                    yield from ((head._replace(relation=relation, landmark=mark), False) for mark in marks)
