"""refer.annotations: corrupt, malformed and hostile annotation files are refused with a message that says where."""

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
    for ref, expected_ref, text in zip(refs, expected, texts, strict=True):
        ref["split"] = ref["split"].encode()
        ref["sentences"][0]["raw"], expected_ref["sentences"][0]["raw"] = text, text
        ref["sentences"][1]["raw"], expected_ref["sentences"][1]["raw"] = text.encode(), text  # a UTF-8 str
    data = python2_pickle(refs, protocol)
    assert (b"U" if protocol else b"S'") in data
    write(tmp_path, data)
    assert REFER(tmp_path).data["refs"] == expected


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_python_3(tmp_path, protocol):
    path, _ = write(tmp_path, pickle.dumps(make_refs(), protocol=protocol))
    assert read_refs(path) == make_refs()


def test_byte_strings_that_are_not_utf_8(tmp_path):
    path, _ = write(tmp_path, python2_pickle([{"raw": "é".encode("latin-1")}], 2))
    with pytest.raises(UserError) as caught:
        REFER(tmp_path)
    assert str(caught.value).startswith(f"{path} is corrupt or in another format (UnicodeDecodeError: ")


class Touch:
    """Creates a folder when unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("where", ["top", "sentence"])
def test_a_pickle_that_would_run_code(tmp_path, protocol, where):
    trap = tmp_path / "trap"
    refs = make_refs()
    refs[3]["sentences"][0]["raw"] = Touch(trap)
    data = pickle.dumps(Touch(trap) if where == "top" else refs, protocol=protocol)
    path, _ = write(tmp_path, data)
    with pytest.raises(UserError) as caught:
        REFER(tmp_path)
    assert str(caught.value).startswith(
        f"{path} was not loaded: it refers to the Python object '{os.mkdir.__module__}.mkdir'"
    )
    assert not trap.exists()
    pickle.loads(data)  # the pickle does create it when loaded by Python
    assert trap.exists()


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"(S'exit'\nios\n_exit\n.", "Python object 'os._exit'"),  # INST
        (b"(cos\n_exit\nI1\no.", "Python object 'os._exit'"),  # OBJ
        (b"c__builtin__\neval\n(S'1'\ntR.", "Python object '__builtin__.eval'"),
        (b"\x80\x04\x8c\x02os\x8c\x06sys\nem\x93.", r"Python object 'os.sys\nem'"),
        (b"P12\n.", "refers to an object outside the file"),
        (b"K\x01Q.", "refers to an object outside the file"),
        (b"\x80\x02\x82\x01.", "not plain data, at byte 2"),  # EXT1
        (b"K\x01)R.", "not plain data, at byte 2"),
        (b"}K\x01" + b"\x85" * 200_000 + b"K\x01s.", "not plain data, at byte 3"),  # hashing these crashes Python
        (b"]r" + struct.pack("<I", 2**32 - 1) + b".", "not plain data, at byte 1"),  # 64 GiB
        (b"]p4294967295\n.", "not plain data, at byte 1"),
        (b"X" + struct.pack("<I", 2**32 - 1) + b"a.", "truncated, or not plain data"),
        (b"\x8d" + struct.pack("<Q", 2**64 - 1) + b"a.", "is corrupt or in another format"),
        (b"I" + b"1" * 10_000 + b"\n.", "is corrupt or in another format (ValueError"),
        (b"h\x07.", "is corrupt or in another format (UnpicklingError"),
        (b"a.", "is corrupt or in another format"),
        (b"].]", "must be a list of at least one ref"),
        (b"](" + b"]" * 100_000 + b"e.", "refs[0]: must be dict, not list"),
        (b"", "truncated, or not plain data"),
        (b".", "is corrupt or in another format"),
        (b"PK\x03\x04", "is corrupt or in another format"),
        (b"<!DOCTYPE html>\n", "is corrupt or in another format"),
        (pickle.dumps({"refs": []}), "must be a list of at least one ref"),
        (pickle.dumps({1, 2}, 4), "not plain data"),
    ],
)
def test_malformed_pickles(tmp_path, data, problem):
    path, _ = write(tmp_path, data)
    with pytest.raises(UserError) as caught:
        REFER(tmp_path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert problem in message
    assert len(message.splitlines()) == 1
    assert len(message) < len(str(path)) + 400


def test_more_opcodes_than_one_match_covers(tmp_path):
    refs = make_refs()
    refs[0]["sent_ids"] = list(range(5000))
    path, _ = write(tmp_path, refs)
    assert read_refs(path) == refs


def test_truncated_files(tmp_path):
    refs_path, instances_path = write(tmp_path)
    for path in (refs_path, instances_path):
        content = path.read_bytes()
        for length in range(0, len(content), max(1, len(content) // 60)):
            path.write_bytes(content[:length])
            with pytest.raises(UserError) as caught:
                REFER(tmp_path)
            assert str(caught.value).startswith(f"{path} is corrupt or in another format (")
        path.write_bytes(content)
    REFER(tmp_path)


# ---- structure ----


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ((2, "a ref"), "refs[2]: must be dict, not str"),
        ((2, "ref_id", DELETE), "refs[2]: ref_id is missing"),
        ((2, "ref_id", "40"), "refs[2]: ref_id must be int, not str"),
        ((2, "ref_id", True), "refs[2]: ref_id must be int, not bool"),
        ((2, "ref_id", 2**63), "refs[2]: ref_id does not fit into 64 bits"),
        ((2, "ref_id", 2**30000), "refs[2]: ref_id does not fit into 64 bits"),
        ((2, "ref_id", 50), "refs[2]: ref_id 50 occurs twice"),
        ((2, "ann_id", DELETE), "refs[2] (ref_id 40): ann_id is missing"),
        ((2, "ann_id", 104.0), "refs[2] (ref_id 40): ann_id must be int, not float"),
        ((2, "image_id", None), "refs[2] (ref_id 40): image_id must be int, not NoneType"),
        ((2, "image_id", False), "refs[2] (ref_id 40): image_id must be int, not bool"),
        ((2, "split", DELETE), "refs[2] (ref_id 40): split is missing"),
        ((2, "split", ["val"]), "refs[2] (ref_id 40): split must be str, not list"),
        ((2, "sentences", DELETE), "refs[2] (ref_id 40): sentences is missing"),
        ((2, "sentences", {}), "refs[2] (ref_id 40): sentences must be list, not dict"),
        ((2, "sentences", []), "refs[2] (ref_id 40): sentences is empty"),
        ((2, "sentences", 1, None), "refs[2] (ref_id 40) sentences[1]: must be dict, not NoneType"),
        ((2, "sentences", 1, "sent_id", DELETE), "refs[2] (ref_id 40) sentences[1]: sent_id is missing"),
        ((2, "sentences", 1, "sent_id", True), "refs[2] (ref_id 40) sentences[1]: sent_id must be int, not bool"),
        ((2, "sentences", 1, "sent_id", 400), "refs[2] (ref_id 40) sentences[1]: sent_id 400 occurs twice"),
        ((2, "sentences", 1, "sent_id", 501), "refs[2] (ref_id 40) sentences[1]: sent_id 501 occurs twice"),
        ((2, "sentences", 1, "raw", 7), "refs[2] (ref_id 40) sentences[1] (sent_id 401): raw must be str, not int"),
        (
            (2, "sentences", 1, "raw", "a \ud800"),
            "refs[2] (ref_id 40) sentences[1] (sent_id 401): raw is not valid Unicode",
        ),
        ((2, "sentences", 1, {"sent_id": 401}), "refs[2] (ref_id 40) sentences[1] (sent_id 401): sent is missing"),
        (
            (2, "sentences", 1, {"sent_id": 401, "sent": 1}),
            "refs[2] (ref_id 40) sentences[1] (sent_id 401): sent must be str, not int",
        ),
    ],
)
def test_malformed_refs(tmp_path, path, problem):
    refs_path, _ = write(tmp_path, edited(make_refs(), *path))
    with pytest.raises(UserError) as caught:
        REFER(tmp_path)
    assert str(caught.value) == f"{refs_path}: {problem}"


def test_optional_fields_of_refs(tmp_path):
    refs = make_refs()
    for ref in refs:
        del ref["category_id"], ref["sent_ids"], ref["file_name"], ref["sentences"][0]["raw"]
        ref["sentences"][1] = {"sent_id": ref["sentences"][1]["sent_id"], "raw": ""}
    write(tmp_path, refs)
    assert REFER(tmp_path).getRefIds(cat_ids=1) == [40, 20]


NO_FILE = "is not a path below the image folder"


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        (("images", DELETE), "must be a dict with the lists images, annotations, categories"),
        (("annotations", {}), "must be a dict with the lists images, annotations, categories"),
        (("categories", None), "must be a dict with the lists images, annotations, categories"),
        (("images", 1, 5), "images[1]: must be dict, not int"),
        (("images", 1, "id", DELETE), "images[1]: id is missing"),
        (("images", 1, "id", 3), "images[1]: id 3 occurs twice"),
        (("images", 1, "id", True), "images[1]: id must be int, not bool"),
        (("images", 1, "width", 30.0), "images[1] (id 1): width must be int, not float"),
        (("images", 1, "height", "20"), "images[1] (id 1): height must be int, not str"),
        (("images", 1, "height", DELETE), "images[1] (id 1): height is missing"),
        (("images", 1, "width", 0), "images[1] (id 1): width must be between 1 and 16384, not 0"),
        (("images", 1, "height", -20), "images[1] (id 1): height must be between 1 and 16384, not -20"),
        (("images", 1, "height", 10**9), "images[1] (id 1): height must be between 1 and 16384, not 1000000000"),
        (("images", 1, "file_name", None), "images[1] (id 1): file_name must be str, not NoneType"),
        (("images", 1, "file_name", "\ud800.jpg"), "images[1] (id 1): file_name is not valid Unicode"),
        *(
            (("images", 1, "file_name", name), f"images[1] (id 1): file_name {name!r} {NO_FILE}")
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
        (("annotations", 0, "id", 101), "annotations[1]: id 101 occurs twice"),
        (("annotations", 0, "id", None), "annotations[0]: id must be int, not NoneType"),
        (("annotations", 0, "image_id", "1"), "annotations[0] (id 105): image_id must be int, not str"),
        (("annotations", 0, "category_id", DELETE), "annotations[0] (id 105): category_id is missing"),
        (("categories", 1, "id", 2), "categories[1]: id 2 occurs twice"),
        (("categories", 1, "name", 1), "categories[1] (id 1): name must be str, not int"),
    ],
)
def test_malformed_instances(tmp_path, path, problem):
    _, instances_path = write(tmp_path, instances=edited(make_instances(), *path))
    with pytest.raises(UserError) as caught:
        REFER(tmp_path)
    assert str(caught.value) == f"{instances_path}: {problem}"


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
def test_corrupt_json(tmp_path, data):
    _, path = write(tmp_path, instances=data)
    with pytest.raises(UserError) as caught:
        REFER(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{path} is corrupt or in another format (")
    assert len(message) < len(str(path)) + 400
    for other in (b"[]", b"null", b"7", b'"images"'):
        write(tmp_path, instances=other)
        with pytest.raises(UserError, match="must be a dict with the lists"):
            REFER(tmp_path)


def test_links_between_the_files(tmp_path):
    refs_path, instances_path = write(tmp_path, edited(make_refs(), 3, "ann_id", 777))
    tail = f"which is not in {instances_path}. Use both files of the same download."
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
        f"{refs_path}: ref 20 is on image 1, but its annotation 102 is on image 2 in {instances_path}. "
        "Use both files of the same download."
    )


# ---- random damage ----

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


def error_message(call, *args):
    """The message of a UserError, or None; any other exception fails the test."""
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
    assert str(path.parent) in (error_message(use_all, tmp_path) or str(path))


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
    assert str(path.parent) in (error_message(use_all, tmp_path) or str(path))


@given(polygon=st.lists(st.one_of(st.floats(-40, 60), st.integers(-40, 60)), min_size=6, max_size=40))
@bounded
def test_any_polygon_is_drawn_or_refused(tmp_path, polygon):
    refer = with_segmentation(tmp_path, [polygon])
    message = error_message(refer.getMask, 50)
    if message is not None:
        assert "annotation 105 of ref 50" in message
        return
    mask = refer.getMask(50)["mask"]
    xs, ys = polygon[::2], polygon[1::2]
    rows, columns = np.nonzero(mask)
    assert not len(rows) or (rows.min() >= min(ys) - 1 and rows.max() <= max(ys) + 1)
    assert not len(columns) or (columns.min() >= min(xs) - 1 and columns.max() <= max(xs) + 1)
