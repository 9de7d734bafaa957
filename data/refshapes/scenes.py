"""Generate the random scenes of RefShapes: the objects of an image and their positions."""

import math
from dataclasses import replace

import numpy as np

from data.refshapes.drawing import GAP, centroid, full_mask, stamp_of
from data.refshapes.language import candidates
from data.refshapes.objects import COLORS, HELD_OUT, SHAPES, SIZES, Scene, SceneObject, choose, random_stream

MAX_OBJECT_SHARE = 0.12  # of the image area, for one object
MAX_TOTAL_SHARE = 0.37  # of the image area, for all objects together; more leaves no room to place them
DISTINCT_COLORS = 0.6  # fraction of scenes of level basic in which all objects have different colors
HIDDEN_SHARE = (0.12, 0.36)  # fraction of the rear object that an overlap hides (level full)
MIN_OFFSET = 0.25  # minimum offset of the front object along both axes, as a fraction of the rear object's side
FREE_TRIES, OVERLAP_TRIES = 150, 400  # number of random positions tried for an object
Position = tuple[int, int]  # top and left of an object's box


def generate_scene(seed: int, split: str, index: int, level: str) -> Scene:
    """Return the scene with this index in a split. At least one of its targets can be described unambiguously.

    Level ``basic``: no object overlaps another. Level ``full``: two objects may overlap.
    """
    rng = random_stream(seed, split, index, level, purpose=0)
    while True:
        width, height = rng.integers(96, 129, size=2).tolist()
        offsets, gradient = rng.uniform(-6, 6, size=3).tolist(), rng.uniform(-14, 14, size=2).tolist()
        background = (rng.uniform(95, 190), *offsets, *gradient)
        objects = _choose_objects(rng, split, level, width * height)
        overlap = level == "full" and rng.random() < 0.5 and objects[0].color != objects[1].color
        placed = _place_objects(rng, objects, (height, width), overlap)
        if placed is None:
            continue
        order = rng.permutation(len(placed)).tolist()  # otherwise the order would reveal sizes and overlaps
        shuffled = (
            replace(placed[i], hidden_by=tuple(order.index(front) for front in placed[i].hidden_by)) for i in order
        )
        scene = Scene(seed, split, index, level, width, height, background, tuple(shuffled))
        if any(candidates(scene, target) for target in scene.targets()):
            return scene


def _choose_objects(rng: np.random.Generator, split: str, level: str, image_area: int) -> list[SceneObject]:
    """Return 3 to 6 objects without positions.

    A scene has few colors and shapes, so a single property often matches several objects. However, in most scenes of
    level basic, all objects have different colors.
    """
    count = choose(rng, {3: 0.1, 4: 0.3, 5: 0.35, 6: 0.25})
    pairs = _choose_pairs(rng, split, level, count)
    shares = [1.0]  # of the image area, per object; drawn until their sum is small enough
    while sum(shares) > MAX_TOTAL_SHARE:
        sizes = [choose(rng, {"small": 1, "medium": 1.2, "large": 1.8}) for _ in range(count)]
        lowest, highest = zip(*(SIZES[size] for size in sizes), strict=True)
        shares = rng.uniform(lowest, highest).tolist()
    objects = []
    for (color, shape), size, share in zip(pairs, sizes, shares, strict=True):
        shift = rng.integers(-12, 13, size=3).tolist()
        rgb = tuple(min(max(value + change, 0), 255) for value, change in zip(COLORS[color], shift, strict=True))
        side = round(2 * math.sqrt(share * image_area)) / 2  # rounded, so that cached stamps are reused
        angle = 0.0 if shape == "circle" else 0.04 * int(rng.integers(-4, 4)) + 0.02
        objects.append(SceneObject(shape, color, size, rgb, side, angle))
    return objects


def _choose_pairs(rng: np.random.Generator, split: str, level: str, count: int) -> list[tuple[str, str]]:
    """Return the color and shape of ``count`` objects. In testB, some but not all of them are held-out pairs."""
    colors = [list(COLORS)[i] for i in rng.permutation(len(COLORS))[: rng.integers(3, 7)]]
    num_shapes = rng.integers(1, 3) if split == "testA" else rng.integers(2, 5)
    shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))[:num_shapes]]
    allowed = [(color, shape) for color in colors for shape in shapes if (color, shape) not in HELD_OUT]
    pairs = [allowed[i] for i in rng.integers(len(allowed), size=count)]
    if split == "testB":
        for i in range(min(count - 1, int(rng.integers(1, 4)))):
            pairs[i] = HELD_OUT[rng.integers(len(HELD_OUT))]
        pairs = [pairs[i] for i in rng.permutation(count)]
    if level == "basic" and rng.random() < DISTINCT_COLORS:
        pairs = _make_colors_distinct(rng, pairs, shapes)
    return pairs


def _make_colors_distinct(
    rng: np.random.Generator, pairs: list[tuple[str, str]], shapes: list[str]
) -> list[tuple[str, str]]:
    """Return the pairs with distinct colors. Each repetition of a color is replaced by an unused color."""
    unused = [list(COLORS)[i] for i in rng.permutation(len(COLORS))]
    for color, _ in pairs:
        if color in unused:
            unused.remove(color)
    seen: set[str] = set()
    distinct = []
    for color, shape in pairs:
        if color in seen:
            color = unused.pop()
            if (color, shape) in HELD_OUT:  # the new pair must not be held out: change its shape, too
                others = [other for other in (*shapes, *SHAPES[:2]) if (color, other) not in HELD_OUT]
                shape = others[0]
        seen.add(color)
        distinct.append((color, shape))
    return distinct


def _place_objects(
    rng: np.random.Generator, objects: list[SceneObject], image_shape: tuple[int, int], overlap: bool
) -> list[SceneObject] | None:
    """Return the objects with positions inside an image of shape (H, W), at least GAP pixels apart.

    With ``overlap``, the second object covers a part of the first one. Return None if there is no room for all objects.
    """
    # Large objects need more room and are placed first, but the two that overlap come before them.
    num_overlapping = 2 if overlap else 0
    objects = objects[:num_overlapping] + sorted(objects[num_overlapping:], key=lambda obj: -obj.area)
    placed: list[SceneObject] = []
    # Pixels within GAP of the objects placed so far. The array extends GAP pixels beyond the image on each side.
    occupied = np.zeros((image_shape[0] + 2 * GAP, image_shape[1] + 2 * GAP), bool)
    for obj in objects:
        stamp = stamp_of(obj)
        assert stamp.area <= MAX_OBJECT_SHARE * image_shape[0] * image_shape[1]
        in_front = overlap and len(placed) == 1
        if in_front:
            position = _overlapping_position(rng, obj, placed[0], image_shape)
        else:
            position = _free_position(rng, obj, placed, occupied)
        if position is None:
            return None
        top, left = position
        cx, cy = stamp.centroid
        placed.append(replace(obj, left=left, top=top, cx=left + cx, cy=top + cy))
        if in_front:
            placed[0] = _partly_hidden(*placed, image_shape)
        height, width = stamp.dilated.shape
        occupied[top:, left:][:height, :width] |= stamp.dilated
    return placed


def _random_positions(
    rng: np.random.Generator, mask: np.ndarray, image_shape: tuple[int, int], count: int
) -> np.ndarray:
    """Return random positions, int [count, 2], at which a box with the shape of ``mask`` lies inside the image."""
    height, width = mask.shape
    return rng.integers((image_shape[0] - height + 1, image_shape[1] - width + 1), size=(count, 2))


def _free_position(
    rng: np.random.Generator, obj: SceneObject, placed: list[SceneObject], occupied: np.ndarray
) -> Position | None:
    """Return a random position at which the object covers no occupied pixel, or None if no such position was found."""
    mask = stamp_of(obj).mask
    height, width = mask.shape
    image_shape = (occupied.shape[0] - 2 * GAP, occupied.shape[1] - 2 * GAP)
    positions = _random_positions(rng, mask, image_shape, FREE_TRIES)
    if placed:  # discard positions near other objects first, because comparing pixels is slower
        min_distance = np.array([(obj.side + other.side) / 2 + GAP for other in placed])
        dy = positions[:, :1] + height / 2 - [other.cy for other in placed]
        dx = positions[:, 1:] + width / 2 - [other.cx for other in placed]
        positions = positions[(dy**2 + dx**2 >= min_distance**2).all(axis=1)]
    for top, left in positions.tolist():
        if not (occupied[top + GAP :, left + GAP :][:height, :width] & mask).any():
            return top, left
    return None


def _overlapping_position(
    rng: np.random.Generator, obj: SceneObject, rear: SceneObject, image_shape: tuple[int, int]
) -> Position | None:
    """Return a random position at which the object hides a share of ``rear`` within HIDDEN_SHARE, or None."""
    mask, rear_mask = stamp_of(obj).mask, full_mask(rear, image_shape)
    height, width = mask.shape
    for top, left in _random_positions(rng, mask, image_shape, OVERLAP_TRIES).tolist():
        hidden = np.count_nonzero(rear_mask[top : top + height, left : left + width] & mask)
        offset = min(abs(left + width / 2 - rear.cx), abs(top + height / 2 - rear.cy))
        lowest, highest = HIDDEN_SHARE
        if lowest <= hidden / stamp_of(rear).area <= highest and offset >= MIN_OFFSET * rear.side:
            return top, left
    return None


def _partly_hidden(rear: SceneObject, front: SceneObject, image_shape: tuple[int, int]) -> SceneObject:
    """Return ``rear``, updated for the part that stays visible behind ``front``, the object with index 1."""
    visible = full_mask(rear, image_shape) & ~full_mask(front, image_shape)
    cx, cy = centroid(visible)
    share = int(np.count_nonzero(visible)) / stamp_of(rear).area
    return replace(rear, hidden_by=(1,), visible=share, cx=cx, cy=cy)
