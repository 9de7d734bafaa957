"""instances.json for the fuzzer: the ways it is mutated."""

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from benchmarks.fuzz_sets import (
    BASES,
    HUGE,
    NUMBERS,
    ODD,
    TEXTS,
    changed_bytes,
    copy,
    cut,
    place,
    sets,
    spliced,
    structure,
)
from refer.masks import encode_mask

TOKENS = ("NaN", "-NaN", "Infinity", "-Infinity",
          "1e999", "-1e999", "1e-999", "-0", "-0.0", "01", "+1", "1.", ".5", "1e5",
          "9" * 4300, "9" * 4301, "9" * 100_000, "0." + "9" * 100_000, "1" + "0" * 400, "True", "nul", "0x10", "1_0",
          "9223372036854775807", "9223372036854775808", "-9223372036854775809", "1.0", '"', "'a'", '"\\ud800"', '"\\x"',
          '"\\u0000"', '"a\nb"', "", "1 1", "1,", "[1,]", "{}", '{"a"}', "/**/1")  # fmt: skip
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be", "latin-1", "cp1252",
             "utf-7")  # fmt: skip
RIGHT_SIDES = st.sampled_from((1, 2, 20, 30, 480, 640, 1000, 6000, 10_000, 2**14))
WRONG_SIDES = st.sampled_from((2**14 + 1, 2**31, 2**63, HUGE, 0, -1, -(2**31), 1.0, "640", None))
RUNS = st.sampled_from(
    (0, 1, 5, 599, 600, 601, 480 * 640, 480 * 640 - 1, 2**28, 2**31, 2**32, 2**63, HUGE, -1, 1.0, True, None)
)
NAMES = ("../a.jpg", "a/../../b.jpg", "/etc/passwd", "..\\a.jpg", "C:a.jpg", "\\\\server\\a.jpg", "a\0.jpg", "", ".",
         "..", "a/", "a//b.jpg", "./a.jpg", "a/./b.jpg", "~/a.jpg", "a/b/c.jpg", "a" * 300, "../" + "a" * 100_000,
         "a/" * 50_000 + "b", "…/a.jpg", "．．/a.jpg", "a\nb.jpg", "%2e%2e/a.jpg", " ../a.jpg", ".. /a.jpg", "/",
         "//a", "file:///etc/passwd")  # fmt: skip


def _nested_json(draw: st.DrawFn) -> str:
    depth = draw(st.sampled_from((2, 50, 900, 1100, 5000, 100_000)))
    opened, closed = draw(st.sampled_from((("[", "]"), ('{"a":', "}"), ('[{"id":', "}]"), ("[[],", "]"), ("[", ""))))
    return opened * depth + draw(st.sampled_from(("", "1", "null"))) + closed * depth


def _with_token(draw: st.DrawFn, instances: Any, token: str) -> bytes:
    """A token of any kind, also of those that no dump would write, in the place of some value."""
    instances = copy(instances)
    parent, key = place(draw, instances)
    parent[key] = "\0token"
    return json.dumps(instances).replace(json.dumps("\0token"), token).encode("utf-8", "surrogatepass")


def _with_keys_again(draw: st.DrawFn, instances: Any) -> bytes:
    text = json.dumps(instances)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.sampled_from([match.end() for match in re.finditer("{", text)]))
        key = draw(st.sampled_from(("id", "image_id", "width", "file_name", "size", "counts", "images", "")))
        text = f"{text[:at]}{json.dumps(key)}: {draw(st.sampled_from(TOKENS))}, {text[at:]}"
        if draw(st.booleans()):  # the last one of a key is what counts
            at = draw(st.sampled_from([match.start() for match in re.finditer("}", text)]))
            text = f"{text[:at]}, {json.dumps(key)}: {draw(st.sampled_from(TOKENS))}{text[at:]}"
    return text.encode()


def _encoded(draw: st.DrawFn, instances: Any) -> bytes:
    instances = copy(instances)
    instances["categories"][0]["name"] = draw(st.sampled_from(("é", "狗", "\ud800", "plain")))
    text = json.dumps(instances, ensure_ascii=draw(st.booleans()))
    name = draw(st.sampled_from(ENCODINGS))
    data = text.encode(name, "surrogatepass" if name[:5] in ("utf-8", "utf-1", "utf-3") else "replace")
    mark = draw(st.sampled_from((b"", b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\0", b" \n")))
    return mark + (changed_bytes(draw, data, 1) if draw(st.booleans()) else data)


def _rle(draw: st.DrawFn, width: int, height: int, right: bool) -> Any:
    area, times = height * width, draw(st.sampled_from((*[1] * 6, 2, 1000, 50_000)))
    runs = st.integers(0, area).map(lambda run: [run, area - run] + [0] * (times - 1))
    if right:
        return {"size": [height, width], "counts": draw(runs)}
    size = draw(st.sampled_from(([height, width],) * 5 + ([width, height], [height], [0.5] * 2, None, "x", [[], []])))
    counts = draw(
        st.one_of(
            runs,
            st.lists(RUNS, max_size=8).map(lambda runs: runs * times),
            st.just([1] * min(area, 2**20)),
            st.text(st.characters(min_codepoint=48, max_codepoint=111), max_size=30).map(lambda text: text * times),
            st.sampled_from(("", "0", "o" * 12, "_" * 100_000, "PPPPPPPPPPPP0", "1é", "\ud800")),
            st.just(encode_mask(np.ones((480, 640), bool))["counts"]),
            ODD,
        )
    )
    return {"size": size, "counts": counts}


def _polygon(draw: st.DrawFn, width: int, height: int, right: bool) -> Any:
    def near(side: int) -> st.SearchStrategy[float]:
        edges = st.sampled_from((0, side, -side, 2 * side, side - 0.5))
        return st.floats(-side, 2 * side) | st.integers(0, side) | edges

    pairs = st.lists(st.tuples(near(width), near(height)), min_size=3, max_size=8)
    values = pairs.map(lambda found: [value for pair in found for value in pair])
    if not right:
        values |= st.lists(near(width) | st.sampled_from((3 * width, -2 * height)) | ODD, max_size=9)
    return draw(values) * draw(st.sampled_from((*[1] * 8, 2, 3, 10, 300, 3000, 30_000)))


def _segmentation(draw: st.DrawFn, instances: Any, sides: bool) -> bytes:
    """Hostile outlines and run lengths, many of them or few; also right ones, of pictures of any size."""
    instances, right = copy(instances), draw(st.booleans())
    image = draw(st.sampled_from(instances["images"]))
    if sides:
        image["width"], image["height"] = draw(RIGHT_SIDES), draw(RIGHT_SIDES if right else RIGHT_SIDES | WRONG_SIDES)
    whole = [one if type(one) is int and 0 < one <= 2**15 else 640 for one in (image["width"], image["height"])]
    several = draw(st.sampled_from((1, 1, 1, 1, 1, 10, 300, 4000)))
    for annotation in instances["annotations"]:
        if annotation["image_id"] == image["id"]:
            kinds = draw(st.lists(st.sampled_from((_rle, _polygon, _polygon)), min_size=1, max_size=3))
            parts = [kind(draw, *whole, right) for kind in kinds]
            if sum(len(str(part)) for part in parts) < 2000:  # else the file would be of many megabytes
                parts *= several
            annotation["segmentation"] = draw(st.sampled_from((parts, parts, parts, parts[0])))
    return _dumped(instances)


def _names(draw: st.DrawFn, instances: Any) -> bytes:
    instances = copy(instances)
    parts = st.lists(st.sampled_from(("..", ".", "", "a", "a.jpg", "\0", "~", " ", "C:")) | TEXTS, max_size=5)
    paths = st.builds(lambda names, mark: mark.join(names), parts, st.sampled_from(("/", "/", "\\", "")))
    draw(st.sampled_from(instances["images"]))["file_name"] = draw(st.sampled_from(NAMES) | paths)
    return _dumped(instances)


def _boxes_and_ids(draw: st.DrawFn, instances: Any) -> bytes:
    instances = copy(instances)
    for _ in range(draw(st.integers(1, 3))):
        annotation = draw(st.sampled_from(instances["annotations"]))
        if draw(st.booleans()):
            annotation["bbox"] = draw(st.lists(NUMBERS, min_size=4, max_size=4) | st.lists(ODD, max_size=5) | ODD)
        else:
            record = draw(st.sampled_from([annotation, *instances["images"], *instances["categories"]]))
            record[draw(st.sampled_from([key for key in record if "id" in key]))] = draw(NUMBERS | ODD)
    return _dumped(instances)


def _long_json(draw: st.DrawFn, instances: Any) -> bytes:
    count = draw(st.sampled_from((300, 70_000, 1_000_000)))
    long = ('"' + "a" * count + '"', '"' + "\\n" * count + '"', "[" + "1," * count + "1]", "[" + "{}," * count + "1]",
            "[" + "[]," * count + "1]", "{" + '"a":1,' * count + '"a":1}', " " * count + "1", "9" * count)  # fmt: skip
    return _with_token(draw, instances, draw(st.sampled_from(long)))


def _dumped(instances: Any) -> bytes:
    return json.dumps(instances).encode("utf-8", "surrogatepass")


def _kind(mutate: Callable[[st.DrawFn, Any], bytes]) -> st.SearchStrategy[tuple[str, bytes]]:
    @st.composite
    def mutated(draw: st.DrawFn) -> tuple[str, bytes]:
        base = draw(BASES)
        return base, mutate(draw, sets()[base][1])

    return mutated()


def json_kinds() -> dict[str, st.SearchStrategy[tuple[str, bytes]]]:
    """The ways instances.json is mutated, by name."""
    ways: dict[str, Callable[[st.DrawFn, Any], bytes]] = {
        "bytes changed": lambda draw, instances: changed_bytes(draw, _dumped(instances)),
        "cut, more after its end": lambda draw, instances: cut(draw, _dumped(instances)),
        "spliced, repeated": lambda draw, instances: spliced(draw, _dumped(instances), _dumped(sets()["small"][1])),
        "wrong values": lambda draw, instances: _dumped(structure(draw, instances)),
        "wrong values, bytes changed": lambda draw, one: changed_bytes(draw, _dumped(structure(draw, one)), 2),
        "deep nesting": lambda draw, instances: _with_token(draw, instances, _nested_json(draw)),
        "numbers and tokens": lambda draw, instances: _with_token(draw, instances, draw(st.sampled_from(TOKENS))),
        "keys twice": _with_keys_again,
        "encodings": _encoded,
        "outlines and run lengths": lambda draw, instances: _segmentation(draw, instances, sides=False),
        "pictures' sizes": lambda draw, instances: _segmentation(draw, instances, sides=True),
        "file names": _names,
        "boxes and ids": _boxes_and_ids,
        "very long": _long_json,
    }
    return {name: _kind(mutate) for name, mutate in ways.items()}
