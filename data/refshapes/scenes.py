"""RefShapes, its scenes: which objects a picture has, and where."""

import math
from dataclasses import replace

import numpy as np

from data.refshapes.language import candidates
from data.refshapes.objects import (
    ALL_COLORS_DIFFER,
    COLORS,
    GAP,
    HELD_OUT,
    HIDDEN,
    MAX_SHARE,
    MAX_TOTAL,
    OFF_AXIS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    _middle,
    draw,
    random_stream,
    stamp,
    whole_mask,
)


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
