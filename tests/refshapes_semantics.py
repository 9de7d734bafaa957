"""The meaning of RefShapes sentences, independent of the generator: which objects a sentence refers to.

An object has the attributes id, shape, color, size, share (of the image area), u and v (center as a fraction of the
image's width and height) and hidden_by (ids).
"""

import math
import re

COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "cross")
GRAMMAR = re.compile(
    r"(?:the )?(?:(?P<superlative>biggest|largest|smallest|leftmost|rightmost|topmost|bottommost) )?"
    r"(?:(?P<size>small|medium|large|big) )?"
    rf"(?:(?P<color>{'|'.join(COLORS)}) )?"
    rf"(?P<noun>{'|'.join(SHAPES)}|shape|one|object)"
    r"(?: (?P<place>on the left|on the right|at the top|at the bottom|in the (?:top|bottom) (?:left|right)))?"
    r"(?: (?P<relation>(?:to the )?left of|(?:to the )?right of|above|below|under|behind|in front of)"
    r" (?P<landmark>the .+))?"
)


def understand(sentence, scene, strict):
    """Return the ids of the objects of which the sentence is true; with ``strict``, true by a clear margin."""
    parts = GRAMMAR.fullmatch(sentence)
    assert parts, f"not understood: {sentence!r}"
    matches = list(scene)
    if parts["color"]:
        matches = [o for o in matches if o.color == parts["color"]]
    if parts["noun"] in SHAPES:
        matches = [o for o in matches if o.shape == parts["noun"]]
    if parts["size"]:
        size = parts["size"].replace("big", "large")
        low, high = {"small": (0.025, 0.046), "medium": (0.046, 0.08), "large": (0.08, 0.12)}[size]
        matches = [o for o in matches if o.size == size and (not strict or low < o.share < high)]
    if parts["place"]:
        limit = 0.4 if strict else 0.5
        edges = parts["place"].split()[2:]  # after "on the", "at the" or "in the"
        matches = [o for o in matches if all(distance_from(edge, o) < limit + 1e-4 for edge in edges)]
    if parts["superlative"]:
        matches = leading(matches, parts["superlative"], strict)
    if parts["relation"]:
        (landmark_id,) = understand(parts["landmark"], scene, strict=False)
        assert understand(parts["landmark"], scene, strict=True) == [landmark_id]
        (landmark,) = [o for o in scene if o.id == landmark_id]
        matches = [o for o in matches if o is not landmark and is_related(o, parts["relation"], landmark, strict)]
    return [o.id for o in matches]


def distance_from(edge, o):
    return {"left": o.u, "right": 1 - o.u, "top": o.v, "bottom": 1 - o.v}[edge]


def leading(matches, superlative, strict):
    if superlative in ("biggest", "largest", "smallest"):
        values, margin = [math.log(o.share) for o in matches], math.log(1.18)
    else:
        values, margin = [o.u if superlative in ("leftmost", "rightmost") else o.v for o in matches], 0.0799
    if superlative in ("smallest", "leftmost", "topmost"):
        values = [-value for value in values]
    best = max(range(len(matches)), key=values.__getitem__)
    others = [value for i, value in enumerate(values) if i != best]
    assert others, "a superlative of a single object"
    return [matches[best]] if not strict or values[best] - max(others) > margin else []


def is_related(o, relation, landmark, strict):
    if relation == "behind":
        return landmark.id in o.hidden_by
    if relation == "in front of":
        return o.id in landmark.hidden_by
    word = relation.removeprefix("to the ").removesuffix(" of")
    dx, dy = landmark.u - o.u, landmark.v - o.v
    along = {"left": dx, "right": -dx, "above": dy}.get(word, -dy)
    across = abs(dy) if word in ("left", "right") else abs(dx)
    return along > 0.1199 and along > across - 1e-3 if strict else along > 0


def named_properties(sentence):
    parts = GRAMMAR.fullmatch(sentence).groupdict()
    return tuple(name for name, word in parts.items() if word and word not in ("shape", "one", "object"))


def kind(sentence):
    """Return the kind of a sentence; the sentences of a ref are of different kinds."""
    parts = GRAMMAR.fullmatch(sentence).groupdict()
    if parts["relation"]:
        return "overlap" if parts["relation"] in ("behind", "in front of") else "relation"
    if parts["superlative"]:
        return "extent" if parts["superlative"] in ("biggest", "largest", "smallest") else "position"
    return "place" if parts["place"] else "size" if parts["size"] else named_properties(sentence)
