"""RefShapes, its language: descriptions that are true of exactly one object of a scene.

Every property is judged with three values: true, false and unclear (an object near the middle is neither on
the left nor not on the left). A description is used only if it is true of its target and false of the others.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from data.refshapes.objects import (
    AREA_FACTOR,
    DIRECTIONS,
    EDGE_MARGIN,
    FULL_ONLY,
    MOST,
    PLACE_MAYBE,
    PLACE_SURE,
    PLACES,
    RELATION_MARGIN,
    RELATIONS,
    SIZES,
    Scene,
    SceneObject,
)


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
