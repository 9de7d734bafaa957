"""Mutations of instances.json."""

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from benchmarks.fuzz_annotations.mutations import (
    HUGE,
    LARGE,
    TEXTS,
    VALUES,
    change_bytes,
    change_values,
    choose_place,
    splice,
    truncate,
    valid_instances,
)
from refer.masks import encode_mask

TOKENS = ("NaN", "-NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "-0", "-0.0", "01", "+1", "1.", ".5",
          "1e5", "9" * 4300, "9" * 4301, "9" * 100_000, "0." + "9" * 100_000, "1" + "0" * 400, "True", "nul", "0x10",
          "1_0", "9223372036854775807", "9223372036854775808", "-9223372036854775809", "1.0", '"', "'a'", '"\\ud800"',
          '"\\x"', '"\\u0000"', '"a\nb"', "", "1 1", "1,", "[1,]", "{}", '{"a"}', "/**/1")  # fmt: skip
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be", "latin-1", "cp1252",
             "utf-7")  # fmt: skip
VALID_SIDES = st.sampled_from((1, 2, 20, 30, 480, 640, 1000, 6000, 10_000, 2**14))
INVALID_SIDES = st.sampled_from((2**14 + 1, 2**31, 2**63, HUGE, 0, -1, -(2**31), 1.0, "640", None))
RUNS = st.sampled_from(
    (0, 1, 5, 599, 600, 601, 480 * 640, 480 * 640 - 1, 2**28, 2**31, 2**32, 2**63, HUGE, -1, 1.0, True, None)
)
FILE_NAMES = ("../a.jpg", "a/../../b.jpg", "/etc/passwd", "..\\a.jpg", "C:a.jpg", "\\\\server\\a.jpg", "a\0.jpg", "",
              ".", "..", "a/", "a//b.jpg", "./a.jpg", "a/./b.jpg", "~/a.jpg", "a/b/c.jpg", "a" * 300,
              "../" + "a" * 100_000, "a/" * 50_000 + "b", "…/a.jpg", "．．/a.jpg", "a\nb.jpg", "%2e%2e/a.jpg",
              " ../a.jpg", ".. /a.jpg", "/", "//a", "file:///etc/passwd")  # fmt: skip


def _dump(instances: Any) -> bytes:
    return json.dumps(instances).encode("utf-8", "surrogatepass")


def _change_values(draw: st.DrawFn) -> bytes:
    data = _dump(change_values(draw, valid_instances()))
    return change_bytes(draw, data) if draw(st.booleans()) else data


def _insert_token(draw: st.DrawFn, token: str) -> bytes:
    """Replace a value by any text, including text that json.dumps would not write."""
    instances = valid_instances()
    parent, key = choose_place(draw, instances)
    parent[key] = "\0token"
    return json.dumps(instances).replace(json.dumps("\0token"), token).encode("utf-8", "surrogatepass")


def _nest(draw: st.DrawFn) -> bytes:
    depth = draw(st.sampled_from((2, 50, 900, 1100, 5000, 100_000)))
    opening, closing = draw(st.sampled_from((("[", "]"), ('{"a":', "}"), ('[{"id":', "}]"), ("[[],", "]"), ("[", ""))))
    return _insert_token(draw, opening * depth + draw(st.sampled_from(("", "1", "null"))) + closing * depth)


def _lengthen(draw: st.DrawFn) -> bytes:
    count = draw(st.sampled_from((300, 70_000, 1_000_000)))
    tokens = ('"' + "a" * count + '"', '"' + "\\n" * count + '"', "[" + "1," * count + "1]", "[" + "{}," * count + "1]",
              "[" + "[]," * count + "1]", "{" + '"a":1,' * count + '"a":1}', " " * count + "1",
              "9" * count)  # fmt: skip
    return _insert_token(draw, draw(st.sampled_from(tokens)))


def _duplicate_keys(draw: st.DrawFn) -> bytes:
    text = json.dumps(valid_instances())
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(("id", "image_id", "width", "file_name", "size", "counts", "images", "")))
        entry = f"{json.dumps(key)}: {draw(st.sampled_from(TOKENS))}"
        bracket = draw(st.sampled_from("{}"))  # as the first or the last key; Python's parser uses the last one
        at = draw(st.sampled_from([match.start() for match in re.finditer(bracket, text)]))
        text = f"{text[: at + 1]}{entry}, {text[at + 1 :]}" if bracket == "{" else f"{text[:at]}, {entry}{text[at:]}"
    return text.encode()


def _encode(draw: st.DrawFn) -> bytes:
    instances = valid_instances()
    instances["categories"][0]["name"] = draw(st.sampled_from(("é", "狗", "\ud800", "plain")))
    text, encoding = json.dumps(instances, ensure_ascii=draw(st.booleans())), draw(st.sampled_from(ENCODINGS))
    data = text.encode(encoding, "surrogatepass" if encoding[:5] in ("utf-8", "utf-1", "utf-3") else "replace")
    mark = draw(st.sampled_from((b"", b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\0", b" \n")))
    return mark + (change_bytes(draw, data) if draw(st.booleans()) else data)


def _rle(draw: st.DrawFn, width: int, height: int, valid: bool) -> Any:
    area, times = height * width, draw(st.sampled_from((*[1] * 6, 2, 1000, 50_000)))
    runs = st.integers(0, area).map(lambda run: [run, area - run] + [0] * (times - 1))
    if valid:
        return {"size": [height, width], "counts": draw(runs)}
    sizes = ([height, width],) * 5 + ([width, height], [height], [0.5] * 2, None, "x", [[], []])
    counts = st.one_of(
        runs,
        st.lists(RUNS, max_size=8).map(lambda runs: runs * times),
        st.just([1] * min(area, 2**20)),
        st.text(st.characters(min_codepoint=48, max_codepoint=111), max_size=30).map(lambda text: text * times),
        st.sampled_from(("", "0", "o" * 12, "_" * 100_000, "PPPPPPPPPPPP0", "1é", "\ud800")),
        st.just(encode_mask(np.ones(LARGE[::-1], bool))["counts"]),
        VALUES,
    )
    return {"size": draw(st.sampled_from(sizes)), "counts": draw(counts)}


def _polygon(draw: st.DrawFn, width: int, height: int, valid: bool) -> Any:
    def near(side: int) -> st.SearchStrategy[float]:
        edges = st.sampled_from((0, side, -side, 2 * side, side - 0.5))
        return st.floats(-side, 2 * side) | st.integers(0, side) | edges

    pairs = st.lists(st.tuples(near(width), near(height)), min_size=3, max_size=8)
    polygons = pairs.map(lambda pairs: [value for pair in pairs for value in pair])
    if not valid:
        polygons |= st.lists(near(width) | st.sampled_from((3 * width, -2 * height)) | VALUES, max_size=9)
    return draw(polygons) * draw(st.sampled_from((*[1] * 8, 2, 3, 10, 300, 3000, 30_000)))


def _change_segmentations(draw: st.DrawFn, *, resize: bool = False) -> bytes:
    """Write valid and invalid polygons and run lengths, few or many; with ``resize`` for images of any size."""
    instances, valid = valid_instances(), draw(st.booleans())
    image = draw(st.sampled_from(instances["images"]))
    if resize:
        image["width"], image["height"] = draw(VALID_SIDES), draw(VALID_SIDES if valid else VALID_SIDES | INVALID_SIDES)
    sides = [side if type(side) is int and 0 < side <= 2**15 else 640 for side in (image["width"], image["height"])]
    copies = draw(st.sampled_from((1, 1, 1, 1, 1, 10, 300, 4000)))
    for annotation in instances["annotations"]:
        if annotation["image_id"] == image["id"]:
            kinds = draw(st.lists(st.sampled_from((_rle, _polygon, _polygon)), min_size=1, max_size=3))
            parts = [kind(draw, *sides, valid) for kind in kinds]
            if len(str(parts)) < 2000:  # larger ones would make a file of many megabytes
                parts *= copies
            annotation["segmentation"] = draw(st.sampled_from((parts, parts, parts, parts[0])))
    return _dump(instances)


def _change_file_names(draw: st.DrawFn) -> bytes:
    instances = valid_instances()
    parts = st.lists(st.sampled_from(("..", ".", "", "a", "a.jpg", "\0", "~", " ", "C:")) | TEXTS, max_size=5)
    paths = st.builds(lambda parts, separator: separator.join(parts), parts, st.sampled_from(("/", "/", "\\", "")))
    draw(st.sampled_from(instances["images"]))["file_name"] = draw(st.sampled_from(FILE_NAMES) | paths)
    return _dump(instances)


JSON_MUTATIONS: dict[str, Callable[[st.DrawFn], bytes]] = {
    "bytes": lambda draw: change_bytes(draw, _dump(valid_instances())),
    "truncated": lambda draw: truncate(draw, _dump(valid_instances())),
    "spliced, repeated": lambda draw: splice(draw, *[_dump(valid_instances())] * 2),
    "values": _change_values,
    "numbers and tokens": lambda draw: _insert_token(draw, draw(st.sampled_from(TOKENS))),
    "deep nesting": _nest,
    "very long": _lengthen,
    "duplicate keys": _duplicate_keys,
    "encodings": _encode,
    "polygons and run lengths": _change_segmentations,
    "image sizes": lambda draw: _change_segmentations(draw, resize=True),
    "file names": _change_file_names,
}
