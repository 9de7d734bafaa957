"""The files that the fuzzer damages, as they should be, and what its mutations of both kinds draw from."""

import functools
import pickle
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refer.masks import encode_mask

REFS, INSTANCES = "refs(unc).p", "instances.json"
MARKER = "marker"  # what a pickle's program would leave behind
BASES = st.sampled_from(("small", "realistic", "realistic"))
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
ODD = st.one_of(
    NUMBERS, TEXTS, st.none(), st.integers(), st.floats(), st.sampled_from(([], {}, [[]], [{}], {"a": []}, [None])),
    st.lists(st.one_of(NUMBERS, TEXTS), max_size=6),
)  # fmt: skip


def small_set() -> tuple[list[Any], dict[str, Any]]:
    """Two refs on one picture of 30×20."""
    refs = [_ref(one, one + 4, 3, split, ["a dog", "the left one"]) for one, split in ((1, "train"), (2, "val"))]
    square = [2, 2, 12, 2, 12, 12, 2, 12]
    annotations = [_annotation(5, 3, [square]), _annotation(6, 3, {"size": [20, 30], "counts": [90, 400, 110]})]
    return refs, _instances([(3, 30, 20)], annotations)


def realistic_set() -> tuple[list[Any], dict[str, Any]]:
    """Six refs on three pictures of COCO's size, with every form of segmentation."""
    rows, columns = np.mgrid[:480, :640]
    blob = (rows - 200) ** 2 + 2 * (columns - 300) ** 2 + 900 * np.sin(columns / 9) < 20_000
    runs = np.diff(np.flatnonzero(np.diff(blob.T.ravel(), prepend=0, append=0)), prepend=0).tolist()
    plain = {"size": [480, 640], "counts": [*runs, 480 * 640 - sum(runs)]}
    forms = [
        [_outline(200, 150, 90)],
        [_outline(100, 100, 50), _outline(140, 110, 40), _outline(400, 300, 8)],
        encode_mask(blob),
        plain,
        [encode_mask(blob), _outline(320, 240, 200)],
        [_outline(600, 460, 77.7)],
    ]
    images = [(9, 640, 480), (25, 640, 480), (581929, 640, 480)]
    splits = ("train", "train", "val", "testA", "testB", "testAB")
    annotations = [_annotation(1000 + row, images[row // 2][0], form) for row, form in enumerate(forms)]
    texts = ["Man in RED shirt", "señora — izquierda 😀", 'a girl\'s "hat"', "2nd from left, not the guy w/ 狗"]
    refs = [
        _ref(row, 1000 + row, images[row // 2][0], split, texts[row % 2 : row % 4 + 1])
        for row, split in enumerate(splits)
    ]
    return refs, _instances(images, annotations)


def _ref(ref_id: int, ann_id: int, image_id: int, split: str, texts: list[str]) -> dict[str, Any]:
    sentences = [
        {"sent_id": ref_id * 10 + k, "raw": text, "sent": text.lower(), "tokens": text.lower().split()}
        for k, text in enumerate(texts)
    ]
    return {
        "ref_id": ref_id, "ann_id": ann_id, "image_id": image_id, "category_id": 1, "split": split,
        "file_name": f"COCO_train2014_{image_id:012d}_{ref_id}.jpg", "sentences": sentences,
        "sent_ids": [one["sent_id"] for one in sentences],
    }  # fmt: skip


def _annotation(ann_id: int, image_id: int, segmentation: Any) -> dict[str, Any]:
    return {"id": ann_id, "image_id": image_id, "category_id": 1, "iscrowd": 0, "area": 100.0,
            "bbox": [2.0, 2, 10, 10.5], "segmentation": segmentation}  # fmt: skip


def _instances(images: list[tuple[int, int, int]], annotations: list[Any]) -> dict[str, Any]:
    pictures = [{"id": i, "width": w, "height": h, "file_name": f"COCO_train2014_{i:012d}.jpg"} for i, w, h in images]
    categories = [{"id": 1, "name": "person", "supercategory": "person"}, {"id": 2, "name": "dog"}]
    return {"info": {"year": 2014}, "images": pictures, "annotations": annotations, "categories": categories}


def _outline(x: float, y: float, radius: float) -> list[float]:
    turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    return np.stack([x + radius * np.cos(turn), y + radius * np.sin(turn)], 1).round(2).ravel().tolist()


@functools.cache
def sets() -> dict[str, tuple[list[Any], dict[str, Any]]]:
    return {"small": small_set(), "realistic": realistic_set()}


def changed_bytes(draw: st.DrawFn, data: bytes, most: int = 8) -> bytes:
    changed = bytearray(data)
    for _ in range(min(most, draw(st.sampled_from((1, 1, 1, 2, 3, 8))))):
        at = draw(st.integers(0, max(0, len(changed) - 1)))
        way = draw(st.sampled_from(("digit", "set", "flip", "delete", "insert", "odd")))
        if way == "digit":  # the next one becomes another
            at = next((one for one in range(at, len(changed)) if 48 <= changed[one] <= 57), at)
            changed[at : at + 1] = bytes([draw(st.integers(48, 57))])
        elif way == "set":
            changed[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif way == "flip" and changed:
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif way == "delete":
            del changed[at : at + draw(st.integers(1, 6))]
        elif way == "insert":
            changed[at:at] = draw(st.binary(max_size=6))
        else:
            odd = st.sampled_from((b"\0", b"\xff", b"\n", b"(", b".", b"-", b"9" * 30, b"[", b"]"))
            changed[at : at + 1] = draw(odd)
    return bytes(changed)


def cut(draw: st.DrawFn, data: bytes) -> bytes:
    kept = data[: draw(st.integers(0, len(data)))]
    return kept + draw(st.sampled_from((b"", b"", b".", b"]", b"}]}", b"\0" * 50, data[:40], b"garbage")))


def spliced(draw: st.DrawFn, data: bytes, other: bytes) -> bytes:
    """The beginning of one with the end of another, or a range of it again and again."""
    first, second = sorted(draw(st.tuples(*[st.integers(0, len(data))] * 2)))
    if draw(st.booleans()):
        return data[:first] + other[draw(st.integers(0, len(other))) :]
    return data[:second] + data[first:second] * draw(st.sampled_from((1, 2, 10, 100))) + data[second:]


def structure(draw: st.DrawFn, value: Any) -> Any:
    """Up to three values in it become others, vanish, or are there twice."""
    value = copy(value)
    for _ in range(draw(st.integers(1, 3))):
        if not value:
            return value
        parent, key = place(draw, value)
        way = draw(st.sampled_from(("odd", "odd", "odd", "delete", "again", "wrap", "elsewhere")))
        if way == "odd":
            parent[key] = copy(draw(ODD))  # a copy: what is drawn may be shared, and the next change be in it
        elif way == "delete":
            del parent[key]
        elif way == "again" and isinstance(parent, list):
            parent.insert(key, parent[key])
        elif way == "wrap":
            parent[key] = draw(st.sampled_from(([parent[key]], {"a": parent[key]}, [parent[key]] * 2)))
        else:
            other, source = place(draw, value)
            parent[key] = copy(other[source])  # a copy: JSON cannot say that something holds itself
    return value


def copy(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def place(draw: st.DrawFn, value: Any) -> tuple[Any, Any]:
    """A place in nested lists and dicts: what holds it, and its key. The upper ones are as likely as the many below."""
    while True:
        key = draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
        inner = value[key]
        if not isinstance(inner, dict | list) or not inner or not draw(st.integers(0, 5)):
            return value, key
        value = inner
