"""refer.annotations: nothing bad in the annotation files gets any further. Every test writes its own files."""

import copy
import json
import os
import pickle
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from refer_sets import (
    DELETE,
    SHIFTED,
    SQUARE,
    H,
    W,
    box_mask,
    edited,
    make_instances,
    make_refs,
    python2_pickle,
    with_segmentation,
    write,
)

from lib.errors import UserError
from refer.annotations import read_refs
from refer.refer import REFER

# ---- pickles ----


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_pickles_of_python_2(tmp_path, protocol):
    refs = make_refs()
    texts = ["", 'a girl\'s "hat"', "señor — 狗 😀", "x" * 300, "plain"]
    expected = copy.deepcopy(refs)
    for ref, wanted, text in zip(refs, expected, texts, strict=True):
        ref["split"] = ref["split"].encode()
        ref["sentences"][0]["raw"], wanted["sentences"][0]["raw"] = text, text
        ref["sentences"][1]["raw"], wanted["sentences"][1]["raw"] = text.encode(), text  # a UTF-8 str
    data = python2_pickle(refs, protocol)
    assert (b"U" if protocol else b"S'") in data
    write(tmp_path, data)
    assert REFER(tmp_path).data["refs"] == expected


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_python_3(tmp_path, protocol):
    path, _ = write(tmp_path, pickle.dumps(make_refs(), protocol=protocol))
    assert read_refs(path) == make_refs()


def test_latin_1_is_refused_not_guessed(tmp_path):
    path, _ = write(tmp_path, python2_pickle([{"raw": "é".encode("latin-1")}], 2))
    with pytest.raises(UserError) as caught:
        REFER(tmp_path)
    assert str(caught.value).startswith(f"{path} is damaged or of another format (UnicodeDecodeError: ")


class Touch:
    """Makes a file when unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("where", ["top", "sentence"])
def test_pickle_that_runs_code(tmp_path, protocol, where):
    trap = tmp_path / "trap"
    refs = make_refs()
    refs[3]["sentences"][0]["raw"] = Touch(trap)
    data = pickle.dumps(Touch(trap) if where == "top" else refs, protocol=protocol)
    path, _ = write(tmp_path, data)
    with pytest.raises(UserError) as caught:
        REFER(tmp_path)
    assert str(caught.value).startswith(f"{path} asks for '{os.mkdir.__module__}.mkdir'")
    assert not trap.exists()
    pickle.loads(data)  # the trap does work
    assert trap.exists()


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"(S'exit'\nios\n_exit\n.", "asks for 'os._exit'"),  # INST
        (b"(cos\n_exit\nI1\no.", "asks for 'os._exit'"),  # OBJ
        (b"c__builtin__\neval\n(S'1'\ntR.", "asks for '__builtin__.eval'"),
        (b"\x80\x04\x8c\x02os\x8c\x06sys\nem\x93.", r"asks for 'os.sys\nem'"),
        (b"P12\n.", "asks for an object outside the file"),
        (b"K\x01Q.", "asks for an object outside the file"),
        (b"\x80\x02\x82\x01.", "not plain data at byte 2"),  # EXT1
        (b"K\x01)R.", "not plain data at byte 2"),
        (b"}K\x01" + b"\x85" * 200_000 + b"K\x01s.", "not plain data at byte 3"),  # hashing these crashes Python
        (b"]r" + struct.pack("<I", 2**32 - 1) + b".", "not plain data at byte 1"),  # 64 GiB
        (b"]p4294967295\n.", "not plain data at byte 1"),
        (b"X" + struct.pack("<I", 2**32 - 1) + b"a.", "cut short"),
        (b"\x8d" + struct.pack("<Q", 2**64 - 1) + b"a.", "is damaged or of another format"),
        (b"I" + b"1" * 10_000 + b"\n.", "is damaged or of another format (ValueError"),
        (b"h\x07.", "is damaged or of another format (UnpicklingError"),
        (b"a.", "is damaged or of another format"),
        (b"].]", "should be a list of refs, and not empty"),
        (b"](" + b"]" * 100_000 + b"e.", "refs[0]: should be a dict, is list"),
        (b"", "cut short"),
        (b".", "is damaged or of another format"),
        (b"PK\x03\x04", "is damaged or of another format"),
        (b"<!DOCTYPE html>\n", "is damaged or of another format"),
        (pickle.dumps({"refs": []}), "should be a list of refs, and not empty"),
        (pickle.dumps({1, 2}, 4), "not plain data"),
    ],
)
def test_absurd_pickles(tmp_path, data, told):
    path, _ = write(tmp_path, data)
    with pytest.raises(UserError) as caught:
        REFER(tmp_path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert told in message
    assert len(message.splitlines()) == 1
    assert len(message) < len(str(path)) + 400


def test_runs_of_opcodes_longer_than_one_match(tmp_path):
    refs = make_refs()
    refs[0]["sent_ids"] = list(range(5000))
    path, _ = write(tmp_path, refs)
    assert read_refs(path) == refs


def test_cut_files(tmp_path):
    refs_path, instances_path = write(tmp_path)
    for path in (refs_path, instances_path):
        content = path.read_bytes()
        for length in range(0, len(content), max(1, len(content) // 60)):
            path.write_bytes(content[:length])
            with pytest.raises(UserError) as caught:
                REFER(tmp_path)
            assert str(caught.value).startswith(f"{path} is damaged or of another format (")
        path.write_bytes(content)
    REFER(tmp_path)


# ---- structure ----


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ((2, "a ref"), "refs[2]: should be a dict, is str"),
        ((2, "ref_id", DELETE), "refs[2]: ref_id should be int, is missing"),
        ((2, "ref_id", "40"), "refs[2]: ref_id should be int, is str"),
        ((2, "ref_id", True), "refs[2]: ref_id should be int, is bool"),
        ((2, "ref_id", 2**63), "refs[2]: ref_id should be int, is beyond 64 bits"),
        ((2, "ref_id", 2**30000), "refs[2]: ref_id should be int, is beyond 64 bits"),
        ((2, "ref_id", 50), "refs[2]: ref_id 50 is there twice"),
        ((2, "ann_id", DELETE), "refs[2] (ref_id 40): ann_id should be int, is missing"),
        ((2, "ann_id", 104.0), "refs[2] (ref_id 40): ann_id should be int, is float"),
        ((2, "image_id", None), "refs[2] (ref_id 40): image_id should be int, is NoneType"),
        ((2, "image_id", False), "refs[2] (ref_id 40): image_id should be int, is bool"),
        ((2, "split", DELETE), "refs[2] (ref_id 40): split should be str, is missing"),
        ((2, "split", ["val"]), "refs[2] (ref_id 40): split should be str, is list"),
        ((2, "sentences", DELETE), "refs[2] (ref_id 40): sentences should be list, is missing"),
        ((2, "sentences", {}), "refs[2] (ref_id 40): sentences should be list, is dict"),
        ((2, "sentences", []), "refs[2] (ref_id 40): sentences is empty"),
        ((2, "sentences", 1, None), "refs[2] (ref_id 40): should be a dict, is NoneType"),
        ((2, "sentences", 1, "sent_id", DELETE), "refs[2] (ref_id 40): sent_id should be int, is missing"),
        ((2, "sentences", 1, "sent_id", True), "refs[2] (ref_id 40): sent_id should be int, is bool"),
        ((2, "sentences", 1, "sent_id", 400), "refs[2] (ref_id 40): sent_id 400 is there twice"),
        ((2, "sentences", 1, "sent_id", 501), "refs[2] (ref_id 40): sent_id 501 is there twice"),
        ((2, "sentences", 1, "raw", 7), "refs[2] (ref_id 40) (sent_id 401): raw should be str, is int"),
        (
            (2, "sentences", 1, "raw", "a \ud800"),
            "refs[2] (ref_id 40) (sent_id 401): raw should be str, is not Unicode",
        ),
        ((2, "sentences", 1, {"sent_id": 401}), "refs[2] (ref_id 40) (sent_id 401): sent should be str, is missing"),
        (
            (2, "sentences", 1, {"sent_id": 401, "sent": 1}),
            "refs[2] (ref_id 40) (sent_id 401): sent should be str, is int",
        ),
    ],
)
def test_malformed_refs(tmp_path, path, told):
    refs_path, _ = write(tmp_path, edited(make_refs(), *path))
    with pytest.raises(UserError) as caught:
        REFER(tmp_path)
    assert str(caught.value) == f"{refs_path}: {told}"


def test_what_refs_may_lack(tmp_path):
    refs = make_refs()
    for ref in refs:
        del ref["category_id"], ref["sent_ids"], ref["file_name"], ref["sentences"][0]["raw"]
        ref["sentences"][1] = {"sent_id": ref["sentences"][1]["sent_id"], "raw": ""}
    write(tmp_path, refs)
    assert REFER(tmp_path).getRefIds(cat_ids=1) == [40, 20]


NO_FILE = "is not a file below the image folder"


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (("images", DELETE), "should be a dict with the lists images, annotations, categories"),
        (("annotations", {}), "should be a dict with the lists images, annotations, categories"),
        (("categories", None), "should be a dict with the lists images, annotations, categories"),
        (("images", 1, 5), "images[1]: should be a dict, is int"),
        (("images", 1, "id", DELETE), "images[1]: id should be int, is missing"),
        (("images", 1, "id", 3), "images[1]: id 3 is there twice"),
        (("images", 1, "id", True), "images[1]: id should be int, is bool"),
        (("images", 1, "width", 30.0), "images[1] (id 1): width should be int, is float"),
        (("images", 1, "height", "20"), "images[1] (id 1): height should be int, is str"),
        (("images", 1, "height", DELETE), "images[1] (id 1): height should be int, is missing"),
        (("images", 1, "width", 0), "image 1: 0x20 is not a picture's size"),
        (("images", 1, "height", -20), "image 1: 30x-20 is not a picture's size"),
        (("images", 1, "height", 10**9), "image 1: 30x1000000000 is not a picture's size"),
        (("images", 1, "file_name", None), "images[1] (id 1): file_name should be str, is NoneType"),
        (("images", 1, "file_name", "\ud800.jpg"), "images[1] (id 1): file_name should be str, is not Unicode"),
        *(
            (("images", 1, "file_name", name), f"image 1: file_name {name!r} {NO_FILE}")
            for name in (
                "",
                ".",
                "..",
                "../a.jpg",
                "a/../../b.jpg",
                "/etc/a.jpg",
                "a//b.jpg",
                "..\\a.jpg",
                "C:\\a.jpg",
                "C:a.jpg",
                "a\0.jpg",
                "a/",
            )
        ),
        (("annotations", 0, "id", 101), "annotations[1]: id 101 is there twice"),
        (("annotations", 0, "id", None), "annotations[0]: id should be int, is NoneType"),
        (("annotations", 0, "image_id", "1"), "annotations[0] (id 105): image_id should be int, is str"),
        (("annotations", 0, "category_id", DELETE), "annotations[0] (id 105): category_id should be int, is missing"),
        (("categories", 1, "id", 2), "categories[1]: id 2 is there twice"),
        (("categories", 1, "name", 1), "categories[1] (id 1): name should be str, is int"),
    ],
)
def test_malformed_instances(tmp_path, path, told):
    _, instances_path = write(tmp_path, instances=edited(make_instances(), *path))
    with pytest.raises(UserError) as caught:
        REFER(tmp_path)
    assert str(caught.value) == f"{instances_path}: {told}"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"<html>",
        b"[" * 200_000,
        b'{"images":' * 100_000,
        b"\x80\x02].",
        b'{"images": [1' + b"0" * 10_000 + b"]}",
    ],
)
def test_absurd_json(tmp_path, data):
    _, path = write(tmp_path, instances=data)
    with pytest.raises(UserError) as caught:
        REFER(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{path} is damaged or of another format (")
    assert len(message) < len(str(path)) + 400
    for other in (b"[]", b"null", b"7", b'"images"'):
        write(tmp_path, instances=other)
        with pytest.raises(UserError, match="should be a dict with the lists"):
            REFER(tmp_path)


def test_links_between_the_files(tmp_path):
    refs_path, instances_path = write(tmp_path, edited(make_refs(), 3, "ann_id", 777))
    tail = f"which {instances_path} does not have; take both files from the same download"
    with pytest.raises(UserError) as caught:
        REFER(tmp_path)
    assert str(caught.value) == f"{refs_path}: ref 20 needs annotation 777, {tail}"
    write(tmp_path, edited(make_refs(), 3, "image_id", 777))
    with pytest.raises(UserError) as caught:
        REFER(tmp_path)
    assert str(caught.value) == f"{refs_path}: ref 20 needs image 777, {tail}"
    write(tmp_path, edited(make_refs(), 3, "image_id", 1))
    with pytest.raises(UserError) as caught:
        REFER(tmp_path)
    assert str(caught.value) == (
        f"{refs_path}: ref 20 is on image 1, but its annotation 102 is on image 2 in {instances_path}"
    )


# ---- damage of any kind ----

changes = st.lists(
    st.tuples(st.sampled_from(["set", "delete", "insert", "swap"]), st.integers(0, 10**6), st.integers(0, 255)),
    min_size=1,
    max_size=4,
)


def damage(data, steps):
    data = bytearray(data)
    for action, at, byte in steps:
        at %= len(data)
        if action == "set":
            data[at] = byte
        elif action == "delete":
            del data[at : at + 1 + byte % 4]
        elif action == "insert":
            data.insert(at, byte)
        else:
            data[at], data[byte % len(data)] = data[byte % len(data)], data[at]
    return bytes(data)


def refusal(call, *args):
    """None, or the message of the UserError; any other exception goes through."""
    try:
        call(*args)
    except UserError as error:
        return str(error)
    return None


def use_all(root):
    refer = REFER(root)
    for ref_id in refer.getRefIds():
        ref = refer.Refs[ref_id]
        image = refer.Imgs[ref["image_id"]]
        assert refer.getMask(ref)["mask"].shape == (image["height"], image["width"])
        assert refer.get_image_path(image["id"]).is_relative_to(refer.image_dir)
        assert len(refer.getRefBox(ref_id)) == 4
        assert ref_id in refer.getRefIds(split=ref["split"])
        for sentence in ref["sentences"]:
            (sentence["raw"] if "raw" in sentence else sentence["sent"]).encode()


bounded = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("kind", ["python 2, protocol 0", "python 2, protocol 2", "python 3, protocol 4"])
@given(steps=changes)
@bounded
def test_damaged_pickle(tmp_path, kind, steps):
    refs = make_refs()[:3]
    data = pickle.dumps(refs, protocol=4) if "3" in kind else python2_pickle(refs, int(kind[-1]))
    path, _ = write(tmp_path, damage(data, steps))
    assert str(path.parent) in (refusal(use_all, tmp_path) or str(path))


@given(steps=changes)
@bounded
def test_damaged_json(tmp_path, steps):
    instances = make_instances()
    rle = {"size": [H, W], "counts": coco_mask.encode(np.asfortranarray(box_mask((1, 1, 9, 9)), np.uint8))}
    rle["counts"] = rle["counts"]["counts"].decode()
    instances["annotations"][0]["segmentation"] = rle
    instances["annotations"][1]["segmentation"] = [{"size": [H, W], "counts": [100, 400, 100]}]
    instances["annotations"][2]["segmentation"] = [SQUARE, SHIFTED]
    path, _ = write(tmp_path, instances=damage(json.dumps(instances).encode(), steps))
    assert str(path.parent) in (refusal(use_all, tmp_path) or str(path))


@given(polygon=st.lists(st.one_of(st.floats(-40, 60), st.integers(-40, 60)), min_size=6, max_size=40))
@bounded
def test_any_polygon_is_drawn_or_refused(tmp_path, polygon):
    refer = with_segmentation(tmp_path, [polygon])
    message = refusal(refer.getMask, 50)
    if message is not None:
        assert "annotation 105 of ref 50" in message
        return
    mask = refer.getMask(50)["mask"]
    xs, ys = polygon[::2], polygon[1::2]
    rows, columns = np.nonzero(mask)
    assert not len(rows) or (rows.min() >= min(ys) - 1 and rows.max() <= max(ys) + 1)
    assert not len(columns) or (columns.min() >= min(xs) - 1 and columns.max() <= max(xs) + 1)
