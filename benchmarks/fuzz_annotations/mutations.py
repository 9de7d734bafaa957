"""Valid annotation files from which the fuzzer starts, and mutations for both kinds of files.

A mutation is a function of Hypothesis's ``draw``, which makes all random choices, and of a value or bytes.
"""

import copy
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refer.masks import encode_mask

REFS, INSTANCES = "refs(unc).p", "instances.json"
SMALL, LARGE = (30, 20), (640, 480)  # width and height of the two images
HUGE = 10**400

NUMBERS = st.sampled_from(
    (0, 1, -1, 2, 1.0, 2.5, -0.5, 20, 30, 480, 640, 2**14, 2**14 + 1, 2**31, -(2**31), 2**53 + 1, 2**63 - 1, 2**63,
     2**64, -(2**64), HUGE, -HUGE, 1e9, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf"), True)
)  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=20),
    st.text(st.sampled_from("\ud800\udfff\0\n\r\x1b\x85\u2028\u202e'\"\\/%{}"), max_size=12),
    st.sampled_from(
        ("", ".", "train", "val", "testAB", "test,val", " val ", "7", "nan", "a\nb", "\x1b[31mred", "é", "../x", "a\\b",
         "a" * 101, "long " * 1000)
    ),
)  # fmt: skip
VALUES = st.one_of(
    NUMBERS, TEXTS, st.none(), st.integers(), st.floats(), st.sampled_from(([], {}, [[]], [{}], {"a": []}, [None])),
    st.lists(st.one_of(NUMBERS, TEXTS), max_size=6),
)  # fmt: skip


def valid_refs() -> list[Any]:
    """Return five refs on two images."""
    texts = ["Man in RED shirt", "señora — izquierda 😀", 'a girl\'s "hat"', "2nd from left, not the guy w/ 狗"]
    refs = []
    for ref_id, split in enumerate(("train", "val", "testA", "testB", "testAB")):
        sentences = [
            {"sent_id": 10 * ref_id + k, "raw": text, "sent": text.lower(), "tokens": text.lower().split()}
            for k, text in enumerate(texts[ref_id % 3 : ref_id % 3 + 2])
        ]
        refs.append(
            {"ref_id": ref_id, "ann_id": 1000 + ref_id, "image_id": 9 if ref_id < 2 else 581929, "category_id": 1,
             "split": split, "file_name": f"COCO_train2014_{ref_id}.jpg", "sentences": sentences,
             "sent_ids": [sentence["sent_id"] for sentence in sentences]}
        )  # fmt: skip
    return refs


def valid_instances() -> dict[str, Any]:
    """Return annotations of a small image and of one with COCO's size, with every form of segmentation."""
    square = [2, 2, 12, 2, 12, 12, 2, 12]
    mask = np.zeros(LARGE[::-1], bool)
    mask[100:300, 200:500] = True
    rle = encode_mask(mask)
    segmentations = (
        [square],
        {"size": [20, 30], "counts": [90, 400, 110]},
        [[100.5, 100.25, 200, 90.75, 180, 300], [150, 80, 400, 100, 300.5, 250.5]],
        rle,
        [rle, square],
    )
    annotations = [
        {"id": 1000 + row, "image_id": 9 if row < 2 else 581929, "category_id": 1, "iscrowd": 0, "area": 100.0,
         "bbox": [2.0, 2, 10, 10.5], "segmentation": segmentation}
        for row, segmentation in enumerate(segmentations)
    ]  # fmt: skip
    images = [
        {"id": image_id, "width": width, "height": height, "file_name": f"COCO_train2014_{image_id:012d}.jpg"}
        for image_id, (width, height) in ((9, SMALL), (581929, LARGE))
    ]
    categories = [{"id": 1, "name": "person", "supercategory": "person"}, {"id": 2, "name": "dog"}]
    return {"info": {"year": 2014}, "images": images, "annotations": annotations, "categories": categories}


def change_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Change, delete or insert a few bytes."""
    changed = bytearray(data)
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3, 8)))):
        at = draw(st.integers(0, max(0, len(changed) - 1)))
        action = draw(st.sampled_from(("digit", "replace", "flip", "delete", "insert")))
        if action == "digit":  # replace the next digit by another one
            at = next((i for i in range(at, len(changed)) if 48 <= changed[i] <= 57), at)
            changed[at : at + 1] = bytes([draw(st.integers(48, 57))])
        elif action == "replace":
            special = st.sampled_from((b"\0", b"\xff", b"\n", b"(", b".", b"-", b"9" * 30, b"[", b"]"))
            changed[at : at + 1] = draw(special | st.binary(min_size=1, max_size=1))
        elif action == "flip" and changed:
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif action == "delete":
            del changed[at : at + draw(st.integers(1, 6))]
        else:
            changed[at:at] = draw(st.binary(max_size=6))
    return bytes(changed)


def truncate(draw: st.DrawFn, data: bytes) -> bytes:
    """Cut the end off, and perhaps append something."""
    end = st.sampled_from((b"", b"", b".", b"]", b"}]}", b"\0" * 50, data[:40], b"garbage"))
    return data[: draw(st.integers(0, len(data)))] + draw(end)


def splice(draw: st.DrawFn, data: bytes, other: bytes) -> bytes:
    """Join the beginning of one file and the end of another, or repeat a part of a file."""
    first, second = sorted(draw(st.tuples(*[st.integers(0, len(data))] * 2)))
    if draw(st.booleans()):
        return data[:first] + other[draw(st.integers(0, len(other))) :]
    return data[:second] + data[first:second] * draw(st.sampled_from((1, 2, 10, 100))) + data[second:]


def change_values(draw: st.DrawFn, value: Any) -> Any:
    """Replace, delete, duplicate, wrap or move up to three values within nested lists and dicts."""
    for _ in range(draw(st.integers(1, 3))):
        if not value:
            return value
        parent, key = choose_place(draw, value)
        action = draw(st.sampled_from(("replace", "replace", "replace", "delete", "duplicate", "wrap", "move")))
        # Drawn and moved values are copied, because the same object in two places would be changed in both.
        if action == "replace":
            parent[key] = copy.deepcopy(draw(VALUES))
        elif action == "delete":
            del parent[key]
        elif action == "duplicate" and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif action == "wrap":
            parent[key] = draw(st.sampled_from(([parent[key]], {"a": parent[key]})))
        else:
            source, source_key = choose_place(draw, value)
            parent[key] = copy.deepcopy(source[source_key])
    return value


def choose_place(draw: st.DrawFn, value: Any) -> tuple[Any, Any]:
    """Choose a place (container and key) in nested lists and dicts. Outer places are more likely than inner ones."""
    while True:
        key = draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
        inner = value[key]
        if not isinstance(inner, dict | list) or not inner or not draw(st.integers(0, 5)):
            return value, key
        value = inner
