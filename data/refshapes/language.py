"""Generate the sentences of RefShapes. Each sentence is true of exactly one object of a scene.

A property is true of an object, false, or unclear. For example, it is unclear whether an object near the center is on
the left. A description is used only if it is true of its target and false of all other objects.
"""

import string
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data.refshapes.objects import COLORS, SHAPES, SIZES, Scene, SceneObject, choose

CENTER_START, CENTER_END = 0.4, 0.51  # "on the left": true for cx < 0.4 W, false from 0.51 W on
EXTREME_MARGIN = 0.08  # distance of the leftmost object from all others, as a fraction of W
AREA_FACTOR = 1.25  # by which the biggest object is larger than all others
RELATION_MARGIN = 0.12  # "left of": true from a distance of 0.12 W on, false from 0 on
MIN_VISIBLE_SIZE = 0.96  # visible area for a clear size, relative to the smallest area of the object's size class

PLACES = ("left", "right", "top", "bottom", "top left", "top right", "bottom left", "bottom right")
SUPERLATIVES = ("biggest", "smallest", "leftmost", "rightmost", "topmost", "bottommost")
RELATIONS = ("left of", "right of", "above", "below", "behind", "in front of")
# The axis (0 x, 1 y) along which the target lies before (1) or after (-1) the other objects.
DIRECTIONS = {
    "leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "bottommost": (1, -1),
    "left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1),
}  # fmt: skip
FULL_ONLY = ("medium", "topmost", "bottommost")  # words that only level full uses, besides all relations

# Relative frequency of each kind of description among those that a scene allows.
KIND_WEIGHTS = {
    "basic": {"color": 9, "shape": 3, "color+shape": 14, "size": 5, "size superlative": 1,
              "place": 1.5, "place superlative": 0.4},
    "full": {"color": 4, "shape": 4, "color+shape": 5, "size": 5, "size superlative": 1.5,
             "place": 3, "place superlative": 1.5, "relation": 7, "overlap": 10},
}  # fmt: skip
REDUNDANT_WEIGHT = 0.5  # factor for redundant descriptions: "the small red circle" if there is only one red circle
PHRASES: dict[str, tuple[str, ...]] = {  # phrases for a property; other properties are expressed by their names
    "large": ("large", "big"),
    "biggest": ("biggest", "largest"),
    "left": ("on the left",),
    "right": ("on the right",),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    **{corner: (f"in the {corner}",) for corner in PLACES if " " in corner},
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "below": ("below", "under"),
}
ANY_SHAPE = {"basic": ("shape", "one"), "full": ("shape", "one", "object")}


class Description(NamedTuple):
    """The properties of the target that a sentence names; None: not named."""

    color: str | None = None
    shape: str | None = None
    size: str | None = None
    place: str | None = None
    superlative: str | None = None
    relation: str | None = None
    landmark: "Description | None" = None  # the object to which the relation refers
    redundant: bool = False  # already unambiguous by color and shape

    def kind(self) -> str:
        """Return the kind of description, a key of KIND_WEIGHTS."""
        if self.relation:
            return "overlap" if self.relation in ("behind", "in front of") else "relation"
        if self.superlative:
            return "size superlative" if self.superlative in ("biggest", "smallest") else "place superlative"
        if self.place:
            return "place"
        if self.size:
            return "size"
        return "+".join(name for name in ("color", "shape") if getattr(self, name))


def describe(scene: Scene, target: int, rng: np.random.Generator) -> list[str]:
    """Return up to three sentences of different kinds, each true of the target only. The list may be empty."""
    count = choose(rng, {1: 0.6, 2: 0.3, 3: 0.1})
    concise, redundant = defaultdict(list), defaultdict(list)
    for description in candidates(scene, target):
        (redundant if description.redundant else concise)[description.kind()].append(description)
    weights = {
        kind: weight if kind in concise else weight * REDUNDANT_WEIGHT
        for kind, weight in KIND_WEIGHTS[scene.level].items()
        if kind in concise or kind in redundant
    }
    sentences: list[str] = []
    while weights and len(sentences) < count:
        kind = choose(rng, weights)
        del weights[kind]
        descriptions = concise.get(kind) or redundant[kind]
        sentences.append(say(descriptions[rng.integers(len(descriptions))], rng, scene.level))
    return sentences


def say(description: Description, rng: np.random.Generator, level: str) -> str:
    """Return the description in words, with random synonyms."""

    def pick(phrases: tuple[str, ...]) -> str:
        return phrases[rng.integers(len(phrases))]

    def pick_phrases(*properties: str | None) -> list[str]:
        return [pick(PHRASES.get(name, (name,))) for name in properties if name]

    words = ["the"] if rng.random() < 0.5 else []
    words += pick_phrases(description.superlative, description.size)
    words += [description.color] if description.color else []
    words.append(description.shape or pick(ANY_SHAPE[level]))
    words += pick_phrases(description.place, description.relation)
    if description.landmark:
        words += ["the", say(description.landmark, rng, level).removeprefix("the ")]
    return " ".join(words)


def vocabulary() -> list[str]:
    """Return a WordPiece vocabulary: special tokens, the words of both levels, and characters for other words."""
    names = ("the", *COLORS, *SHAPES, *SIZES, *SUPERLATIVES, *PLACES, *RELATIONS)
    phrases = [phrase for name in names for phrase in PHRASES.get(name, (name,))]
    words = sorted({word for phrase in (*phrases, *ANY_SHAPE["full"]) for word in phrase.split()})
    characters = string.ascii_lowercase + string.digits + string.punctuation
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *characters, *(f"##{c}" for c in characters)]


def candidates(scene: Scene, target: int) -> list[Description]:
    """Return all descriptions that are true of the target and false of every other object of the scene."""
    facts = _facts_of(scene)
    words = [word for word in (*SIZES, *PLACES) if facts.has_word(word) and target in facts.certain[word]]
    descriptions = list(_without_relation(facts, target, words))
    if scene.level == "full":
        descriptions += _with_relation(facts, target, [word for word in words if word in SIZES])
    return descriptions


class _Facts:
    """Which words are true of which objects of a scene. Objects are identified by their indices.

    For each word, ``certain`` contains the objects of which it is true, and ``possible`` also those of which it is
    unclear.
    """

    def __init__(self, scene: Scene) -> None:
        self.objects, self.level = scene.objects, scene.level
        self.visible_areas = [obj.area * obj.visible for obj in self.objects]
        self.centers = [(obj.cx / scene.width, obj.cy / scene.height) for obj in self.objects]
        self.certain: dict[str, set[int]] = defaultdict(set)
        self.possible: dict[str, set[int]] = defaultdict(set)
        for i, obj in enumerate(self.objects):
            self._add(i, obj.color, certain=True, possible=True)
            self._add(i, obj.shape, certain=True, possible=True)
            # A partly hidden object may look smaller than it is, so its size is unclear.
            min_area = MIN_VISIBLE_SIZE * SIZES[obj.size][0] * scene.width * scene.height
            clear = self.visible_areas[i] >= min_area
            for size in SIZES:
                self._add(i, size, certain=clear and size == obj.size, possible=not clear or size == obj.size)
            x, y = self.centers[i]
            distance_from = {"left": x, "right": 1 - x, "top": y, "bottom": 1 - y}
            for place in PLACES:
                distance = max(distance_from[edge] for edge in place.split())
                self._add(i, place, certain=distance < CENTER_START, possible=distance < CENTER_END)

    def _add(self, i: int, word: str, *, certain: bool, possible: bool) -> None:
        if certain:
            self.certain[word].add(i)
        if possible:
            self.possible[word].add(i)

    def has_word(self, word: str) -> bool:
        return self.level == "full" or word not in FULL_ONLY

    def matches(self, description: Description) -> set[int]:
        """Return the objects that the color, shape, size and place of the description may refer to."""
        matches = set(range(len(self.objects)))
        for word in (description.color, description.shape, description.size, description.place):
            if word:
                matches &= self.possible[word]
        return matches

    def leads(self, superlative: str, target: int, others: set[int]) -> bool:
        """Return whether a superlative is true of the target, whatever the size of hidden parts."""
        if superlative == "biggest":
            return self.visible_areas[target] >= AREA_FACTOR * max(self.objects[i].area for i in others)
        if superlative == "smallest":
            return min(self.visible_areas[i] for i in others) >= AREA_FACTOR * self.objects[target].area
        axis, sign = DIRECTIONS[superlative]
        return all(sign * (self.centers[i][axis] - self.centers[target][axis]) >= EXTREME_MARGIN for i in others)

    def related(self, relation: str, landmark: int) -> tuple[set[int], set[int]]:
        """Return the objects that are certainly, and those that are possibly, in this relation to the landmark."""
        indices = range(len(self.objects))
        if relation == "behind":
            behind = {i for i in indices if landmark in self.objects[i].hidden_by}
            return behind, behind
        if relation == "in front of":
            in_front = set(self.objects[landmark].hidden_by)
            return in_front, in_front
        certain, possible = set(), set()
        axis, sign = DIRECTIONS[relation]
        for i in indices:
            along = sign * (self.centers[landmark][axis] - self.centers[i][axis])
            across = abs(self.centers[landmark][1 - axis] - self.centers[i][1 - axis])
            if along > 0:
                possible.add(i)
            if along >= max(RELATION_MARGIN, across):
                certain.add(i)
        return certain, possible


@lru_cache(maxsize=4)
def _facts_of(scene: Scene) -> _Facts:
    return _Facts(scene)


def _simple_descriptions(obj: SceneObject, sizes: list[str]) -> list[Description]:
    """Return all combinations of the object's color, shape and one of ``sizes``; each of them may be absent."""
    pairs = [(color, shape) for color in (None, obj.color) for shape in (None, obj.shape)]
    return [Description(color, shape, size) for color, shape in pairs for size in (None, *sizes)]


def _without_relation(facts: _Facts, target: int, words: list[str]) -> Iterator[Description]:
    """Yield color and shape of the target, alone or combined with one of ``words`` (size, place) or a superlative."""
    for simple in _simple_descriptions(facts.objects[target], []):
        matches = facts.matches(simple)
        unique = matches == {target}
        if unique and any(simple):
            yield simple
        for word in words:
            if matches & facts.possible[word] == {target}:
                yield simple._replace(**{"size" if word in SIZES else "place": word}, redundant=unique)
        others = matches - {target}
        for superlative in SUPERLATIVES if others else ():
            if facts.has_word(superlative) and facts.leads(superlative, target, others):
                yield simple._replace(superlative=superlative)


def _with_relation(facts: _Facts, target: int, sizes: list[str]) -> Iterator[Description]:
    """Yield descriptions that are unambiguous only because of a relation to another object, the landmark."""
    ambiguous = []
    for simple in _simple_descriptions(facts.objects[target], sizes):
        matches = facts.matches(simple)
        if matches != {target}:
            ambiguous.append((simple, matches))
    for landmark in range(len(facts.objects)):
        if landmark == target:
            continue
        landmarks = _landmark_descriptions(facts, landmark)
        for relation in RELATIONS if landmarks else ():
            certain, possible = facts.related(relation, landmark)
            if target not in certain:
                continue
            for simple, matches in ambiguous:
                if matches & possible == {target}:
                    for description in landmarks:
                        yield simple._replace(relation=relation, landmark=description)


def _landmark_descriptions(facts: _Facts, landmark: int) -> list[Description]:
    """Return unambiguous descriptions of a landmark by its color or shape, and by its size where that is needed."""
    sizes = [size for size in SIZES if landmark in facts.certain[size]]
    return [
        simple
        for simple in _simple_descriptions(facts.objects[landmark], sizes)
        if (simple.color or simple.shape)
        and facts.matches(simple) == {landmark}
        and (simple.size is None or facts.matches(simple._replace(size=None)) != {landmark})
    ]
