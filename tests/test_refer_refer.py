"""refer.refer: what the annotation files say is what comes out, and nothing bad in them gets any further.

Every test writes its own files. The set: three pictures, 20 x 30 pixels (H x W), and five refs.
"""

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

from refer.files import read_refs
from refer.refer import REFER
from utils import MissingFileError, UserError

H, W = 20, 30
SQUARE = [2, 2, 12, 2, 12, 12, 2, 12]  # 10 x 10 pixels
SHIFTED = [8, 8, 18, 8, 18, 18, 8, 18]  # overlaps SQUARE in 4 x 4 of them
HUGE = 10**400


def make_refs():
    """(ref_id, ann_id, image_id, split): file order is not the order of the ids."""
    rows = [
        (50, 105, 1, "train"),
        (10, 101, 1, "val"),
        (40, 104, 2, "testA"),
        (20, 102, 2, "testB"),
        (30, 103, 3, "train"),
    ]
    return [
        {
            "ref_id": ref_id,
            "ann_id": ann_id,
            "image_id": image_id,
            "category_id": 99,
            "split": split,
            "file_name": f"COCO_train2014_{image_id}_{ref_id}.jpg",
            "sent_ids": [ref_id * 10, ref_id * 10 + 1],
            "sentences": [
                {
                    "sent_id": ref_id * 10 + k,
                    "raw": f"Naïve dog {k}",
                    "sent": f"naive dog {k}",
                    "tokens": ["naive", "dog", str(k)],
                }
                for k in range(2)
            ],
        }
        for ref_id, ann_id, image_id, split in rows
    ]


def make_instances():
    images = [{"id": one, "width": W, "height": H, "file_name": f"COCO_train2014_{one:012d}.jpg"} for one in (3, 1, 2)]
    owners = {105: 1, 101: 1, 104: 2, 102: 2, 103: 3, 106: 3}
    annotations = [
        {
            "id": one,
            "image_id": image,
            "category_id": 2 if one % 2 else 1,
            "area": 100.0,
            "bbox": [2.0, 2, 10, 10.5],
            "segmentation": [SQUARE],
        }
        for one, image in owners.items()
    ]
    categories = [{"id": 2, "name": "dog"}, {"id": 1, "name": "person"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def write(root, refs=None, instances=None, dataset="refcoco", splitBy="unc"):
    """Files of a set: what is not bytes already is pickled and dumped. Returns the two paths."""
    folder = root / dataset
    folder.mkdir(exist_ok=True)
    refs_path, instances_path = folder / f"refs({splitBy}).p", folder / "instances.json"
    refs = make_refs() if refs is None else refs
    instances = make_instances() if instances is None else instances
    refs_path.write_bytes(refs if isinstance(refs, bytes) else pickle.dumps(refs, protocol=2))
    instances_path.write_bytes(instances if isinstance(instances, bytes) else json.dumps(instances).encode())
    return refs_path, instances_path


def with_segmentation(root, segmentation):
    instances = make_instances()
    instances["annotations"][0]["segmentation"] = segmentation  # ref 50
    write(root, instances=instances)
    return REFER(root)


def edited(value, *path):
    """A copy with path[:-2] walked, and the key path[-2] set to path[-1], or deleted for `del`."""
    value = copy.deepcopy(value)
    *walk, key, new = path
    target = value
    for step in walk:
        target = target[step]
    if new is DELETE:
        del target[key]
    else:
        target[key] = new
    return value


DELETE = object()


# ---- what comes out ----


def test_indexes_and_records(tmp_path):
    write(tmp_path)
    refer = REFER(tmp_path)
    assert [ref["ref_id"] for ref in refer.data["refs"]] == [50, 10, 40, 20, 30]
    assert sorted(refer.data) == ["annotations", "categories", "images", "refs"]
    assert refer.Refs[20]["split"] == "testB"
    assert refer.Anns[106]["image_id"] == 3
    assert refer.Imgs[2]["file_name"] == "COCO_train2014_000000000002.jpg"
    assert refer.Cats == {2: "dog", 1: "person"}
    assert refer.Sents[401]["raw"] == "Naïve dog 1"
    assert [ref["ref_id"] for ref in refer.imgToRefs[1]] == [50, 10]
    assert [annotation["id"] for annotation in refer.imgToAnns[3]] == [103, 106]
    assert refer.refToAnn[30]["id"] == 103
    assert refer.annToRef[103]["ref_id"] == 30
    assert 106 not in refer.annToRef
    assert [ref["ref_id"] for ref in refer.catToRefs[1]] == [40, 20]  # the annotation's category, not the ref's
    assert refer.sentToRef[301]["ref_id"] == 30


def test_filters(tmp_path):
    write(tmp_path)
    refer = REFER(tmp_path)
    assert refer.getRefIds() == [50, 10, 40, 20, 30]
    assert refer.getRefIds(image_ids=[2, 1]) == [50, 10, 40, 20]
    assert refer.getRefIds(image_ids=1, split="val") == [10]
    assert refer.getRefIds(cat_ids=2) == [50, 10, 30]
    assert refer.getRefIds(ref_ids=(20, 50, 20)) == [50, 20]
    assert refer.getRefIds(ref_ids=[10, 50]) == refer.getRefIds(ref_ids=[50, 10]) == [50, 10]
    assert refer.getRefIds(ref_ids=[20, 50], image_ids=2) == [20]
    assert refer.getRefIds(ref_ids=[20, 50], cat_ids=[1], split="train") == []
    assert refer.getRefIds(ref_ids=777) == refer.getRefIds(image_ids=777) == refer.getRefIds(cat_ids=777) == []
    assert refer.getRefIds(image_ids=np.array([3])) == refer.getRefIds(np.int64(3)) == [30]
    assert refer.getAnnIds() == [105, 101, 104, 102, 103, 106]
    assert refer.getAnnIds(image_ids=[3, 1]) == [105, 101, 103, 106]
    assert refer.getAnnIds(cat_ids=1, image_ids=3) == [106]
    assert refer.getAnnIds(ref_ids=[30, 50]) == [105, 103]
    assert refer.getAnnIds(ref_ids=777) == []
    assert refer.getImgIds() == [3, 1, 2]
    assert refer.getImgIds(ref_ids=[50, 10, 30]) == [3, 1]
    assert refer.getImgIds(777) == []
    assert refer.getCatIds() == [2, 1]


def test_load(tmp_path):
    refs_path, instances_path = write(tmp_path)
    refer = REFER(tmp_path)
    assert [ref["ref_id"] for ref in refer.loadRefs([20, 50, 20])] == [20, 50, 20]
    assert refer.loadRefs(20) == [refer.Refs[20]]
    assert refer.loadAnns((106,))[0] is refer.Anns[106]
    assert refer.loadImgs(3)[0] is refer.Imgs[3]
    assert refer.loadCats([1, 2]) == ["person", "dog"]
    assert refer.loadRefs([]) == []
    for load, name, path in (
        (refer.loadRefs, "ref", refs_path),
        (refer.loadAnns, "annotation", instances_path),
        (refer.loadImgs, "image", instances_path),
        (refer.loadCats, "category", instances_path),
    ):
        with pytest.raises(UserError) as caught:
            load([777])
        assert str(caught.value) == f"no {name} 777 in {path}"
    for bad in ("20", 20.0, True, None, [[20]]):
        with pytest.raises(UserError, match="ids are integers, not"):
            refer.getRefIds(ref_ids=bad)


def test_box_and_image_path(tmp_path):
    write(tmp_path)
    write(tmp_path, dataset="refshapes")
    refer = REFER(tmp_path)
    assert refer.getRefBox(50) == [2, 2, 10, 10.5]
    assert refer.get_image_path(1) == tmp_path / "images/mscoco/images/train2014/COCO_train2014_000000000001.jpg"
    assert REFER(str(tmp_path), "refshapes").get_image_path(1) == (
        tmp_path / "refshapes/images/COCO_train2014_000000000001.jpg"
    )
    for call in (refer.get_image_path, refer.getRefBox, refer.getMask):
        with pytest.raises(UserError, match=r"no (image|ref) 777 in "):
            call(777)


@pytest.mark.parametrize("box", [None, [], [1, 2, 3], [1, 2, 3, "4"], [1, 2, 3, float("nan")], [1, 2, HUGE, 1], "1234"])
def test_malformed_box(tmp_path, box):
    instances = make_instances()
    instances["annotations"][0]["bbox"] = box
    _, path = write(tmp_path, instances=instances)
    with pytest.raises(UserError) as caught:
        REFER(tmp_path).getRefBox(50)
    assert str(caught.value) == f"{path}: annotation 105 of ref 50: bbox is not four numbers [x, y, w, h]"


@pytest.mark.parametrize(
    ("values", "split", "chosen"),
    [
        ("train val testA testB testC", "train", [0]),
        ("train val testA testB testC", "val", [1]),
        ("train val testA testB testC", "testA", [2]),
        ("train val testA testB testC", "test", [2, 3, 4]),
        ("train val testA testB testC", "", [0, 1, 2, 3, 4]),
        ("testAB testBC testC test train", "testA", [0]),
        ("testAB testBC testC test train", "testB", [0, 1]),
        ("testAB testBC testC test train", "testC", [1, 2]),
        ("testAB testBC testC test train", "testAB", [0]),
        ("testAB testBC testC test train", "test", [0, 1, 2, 3]),
        ("train trainval val val2 train", "train", [0, 4]),
        ("train trainval val val2 train", "val", [2]),
        ("Train A B mytest val", "testA", [1]),
        ("Train A B mytest val", "test", [3]),
    ],
)
def test_split_selection(tmp_path, values, split, chosen):
    refs = make_refs()
    for ref, value in zip(refs, values.split(), strict=True):
        ref["split"] = value
    write(tmp_path, refs)
    refer = REFER(tmp_path)
    assert refer.getRefIds(split=split) == [refs[row]["ref_id"] for row in chosen]
    assert refer.splits() == list(dict.fromkeys(values.split()))


@pytest.mark.parametrize("split", ["testC", "trian", "TRAIN", "tes", "v", None])
def test_absent_split(tmp_path, split):
    path, _ = write(tmp_path)
    refer = REFER(tmp_path)
    with pytest.raises(UserError) as caught:
        refer.getRefIds(split=split)
    assert str(caught.value) == f"no split {split!r} in {path}: it has train, val, testA, testB"


# ---- masks ----


def box_mask(*boxes):
    """The number of boxes (x0, y0, x1, y1) over each pixel, int [H, W]."""
    count = np.zeros((H, W), int)
    for x0, y0, x1, y1 in boxes:
        count[y0:y1, x0:x1] += 1
    return count


def test_overlapping_polygons(tmp_path):
    third = [9, 9, 11, 9, 11, 11, 9, 11]
    refer = with_segmentation(tmp_path, [SQUARE, SHIFTED, third])
    count = box_mask((2, 2, 12, 12), (8, 8, 18, 18), (9, 9, 11, 11))
    for ref in (50, refer.Refs[50]):
        paper, union = refer.getMask(ref), refer.getMask(ref, mode="union")
        np.testing.assert_array_equal(paper["mask"], count == 1)
        np.testing.assert_array_equal(union["mask"], count >= 1)
        assert (paper["area"], union["area"]) == (168, 184)
    assert paper["mask"].dtype == np.uint8
    assert paper["mask"].shape == (H, W)
    assert type(paper["area"]) is int
    with pytest.raises(UserError, match="unknown mask mode 'hole': choose one of paper, union"):
        refer.getMask(50, mode="hole")
    for ref in ({}, {"ref_id": "50"}, {"ref_id": [50, 10]}, None):
        with pytest.raises(UserError, match="ids are integers"):
            refer.getMask(ref)


def test_many_parts_do_not_wrap_around(tmp_path):
    """257 layers: a sum in uint8 would be 1 again."""
    refer = with_segmentation(tmp_path, [SQUARE] * 257)
    assert refer.getMask(50)["area"] == 0
    assert refer.getMask(50, "union")["area"] == 100


def runs(mask):
    flat = np.concatenate([[0], mask.T.ravel(), [1 - mask[-1, -1]]])
    ends = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate([[0], ends])).tolist()


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("shape", [(H, W), (480, 640)])
def test_run_lengths_in_all_forms(tmp_path, density, shape):
    """The compressed strings are pycocotools' own; the large pictures have runs of several characters."""
    rng = np.random.default_rng(0)
    coarse = rng.random((shape[0] // 4, shape[1] // 10)) < density
    mask = np.kron(coarse, np.ones((4, 10), int)).astype(np.uint8)
    assert mask.shape == shape
    encoded = coco_mask.encode(np.asfortranarray(mask))
    plain = {"size": list(shape), "counts": runs(mask)}
    compressed = {"size": list(shape), "counts": encoded["counts"].decode()}
    half = np.zeros_like(mask)
    half[: shape[0] // 2] = 1
    instances = make_instances()
    for image in instances["images"]:
        image["height"], image["width"] = shape
    forms = [plain, compressed, [plain], [compressed, {"size": list(shape), "counts": runs(half)}]]
    for annotation, form in zip(instances["annotations"], forms, strict=False):
        annotation["segmentation"] = form
    write(tmp_path, instances=instances)
    refer = REFER(tmp_path)
    for ref_id in (50, 10, 40):
        np.testing.assert_array_equal(refer.getMask(ref_id)["mask"], mask)
        np.testing.assert_array_equal(refer.getMask(ref_id, "union")["mask"], mask)
    np.testing.assert_array_equal(refer.getMask(20)["mask"], mask ^ half)
    np.testing.assert_array_equal(refer.getMask(20, "union")["mask"], mask | half)


POLYGON, NEAR = "a polygon is not a list of three or more", "coordinate is not a number near the 30x20 picture"
SIZE, COUNTS = "an RLE's size is not the picture's [20, 30]", "an RLE's counts are not run lengths"
DAMAGED, WITHIN = "an RLE's compressed counts are damaged", "an RLE's compressed counts end within a number"


@pytest.mark.parametrize(
    ("segmentation", "told"),
    [
        (None, "neither a list of polygons nor an RLE"),
        ([], "neither a list of polygons nor an RLE"),
        ({}, "neither a list of polygons nor an RLE"),
        ("oops", "neither a list of polygons nor an RLE"),
        (SQUARE, POLYGON),
        ([[]], POLYGON),
        ([[1, 2, 3, 4]], POLYGON),
        ([SQUARE, SQUARE[:7]], POLYGON),
        (["abcdef"], POLYGON),
        ([None], POLYGON),
        ([[1, 2, 3, 4, 5, "6"]], NEAR),
        ([[1, 2, 3, 4, 5, True]], NEAR),
        ([[1, 2, 3, 4, 5, None]], NEAR),
        ([[1, 2, 3, 4, 5, [6]]], NEAR),
        ([[1, 2, 3, 4, 5, float("nan")]], NEAR),
        ([[1, 2, 3, 4, float("inf"), 6]], NEAR),
        ([[1, 2, 3, 4, 5, -1e300]], NEAR),
        ([[1, 2, 3, 4, HUGE, 6]], NEAR),
        ([[1, 2, 3, 4, 5, 41]], NEAR),
        ([[0, 0, 29, 19] * 40_000], "outline is longer than"),
        ({"counts": [600]}, SIZE),
        ({"size": [W, H], "counts": [600]}, SIZE),
        ({"size": [2**40, 2**40], "counts": [2**80]}, SIZE),
        ({"size": "20", "counts": [600]}, SIZE),
        ({"size": [H, W]}, COUNTS),
        ({"size": [H, W], "counts": None}, COUNTS),
        ({"size": [H, W], "counts": [600.0]}, COUNTS),
        ({"size": [H, W], "counts": [599, True]}, COUNTS),
        ({"size": [H, W], "counts": [-1, 601]}, COUNTS),
        ({"size": [H, W], "counts": [601, -1]}, COUNTS),
        ({"size": [H, W], "counts": [HUGE]}, COUNTS),
        ({"size": [H, W], "counts": []}, "counts sum to 0, not to 20x30"),
        ({"size": [H, W], "counts": [300, 299]}, "counts sum to 599, not to 20x30"),
        ({"size": [H, W], "counts": [300, 300, 300]}, "counts sum to 900, not to 20x30"),
        ([SQUARE, {"size": [H, W], "counts": [1]}], "counts sum to 1, not to 20x30"),
        ({"size": [H, W], "counts": ""}, "counts sum to 0, not to 20x30"),
        ({"size": [H, W], "counts": "1"}, "counts sum to 1, not to 20x30"),
        ({"size": [H, W], "counts": "1 2"}, DAMAGED),
        ({"size": [H, W], "counts": "1é"}, DAMAGED),
        ({"size": [H, W], "counts": "o" * 100_000}, DAMAGED),
        ({"size": [H, W], "counts": "1oo"}, WITHIN),
        ({"size": [H, W], "counts": "A"}, COUNTS),  # minus 15
        ({"size": [H, W], "counts": "1111A"}, COUNTS),
        ({"size": [H, W], "counts": "o" * 11 + "0"}, COUNTS),  # about 2**55
    ],
)
def test_malformed_segmentation(tmp_path, segmentation, told):
    refer = with_segmentation(tmp_path, segmentation)
    for mode in ("paper", "union"):
        with pytest.raises(UserError) as caught:
            refer.getMask(50, mode)
        message = str(caught.value)
        assert message.startswith(f"{refer.instances_path}: annotation 105 of ref 50: ")
        assert told in message
        assert len(message.splitlines()) == 1
    assert refer.getMask(10)["area"] == 100  # the others are as good as before


def test_polygons_out_of_the_picture_are_cut(tmp_path):
    refer = with_segmentation(tmp_path, [[-30, -20, 60, -20, 60, 40, -30, 40]])
    assert refer.getMask(50)["area"] == H * W
    refer = with_segmentation(tmp_path, [[-20, -10, -5, -10, -5, -5]])
    assert refer.getMask(50)["area"] == 0


# ---- names and files ----


@pytest.mark.parametrize(
    ("dataset", "splitBy", "told"),
    [
        (
            "refcocoo",
            "unc",
            [
                "unknown dataset 'refcocoo'",
                "(did you mean refcoco?)",
                "choose one of refcoco, refcoco+, refcocog, refshapes",
            ],
        ),
        ("refshape", "unc", ["unknown dataset 'refshape'", "(did you mean refshapes?)"]),
        ("xyz", "unc", ["unknown dataset 'xyz': choose one of"]),
        (None, "unc", ["unknown dataset None"]),
        ("refcoco", "umd", ["unknown splitBy 'umd': refcoco has unc, google"]),
        ("refcoco+", "google", ["unknown splitBy 'google': refcoco+ has unc"]),
        ("refcocog", "unc", ["unknown splitBy 'unc': refcocog has umd, google"]),
        ("refshapes", "UNC", ["unknown splitBy 'UNC': refshapes has unc"]),
    ],
)
def test_unknown_names(tmp_path, dataset, splitBy, told):
    with pytest.raises(UserError) as caught:
        REFER(tmp_path, dataset, splitBy)
    assert not isinstance(caught.value, MissingFileError)
    for part in told:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("dataset", "splitBy"),
    [
        ("refcoco", "unc"),
        ("refcoco", "google"),
        ("refcoco+", "unc"),
        ("refcocog", "umd"),
        ("refcocog", "google"),
        ("refshapes", "unc"),
        ("mine", "unc"),
    ],
)
def test_missing_files(tmp_path, dataset, splitBy):
    command = {"refshapes": "data.refshapes", "mine": ""}.get(dataset, f"refer.prepare --dataset {dataset}")
    verb = "makes" if dataset == "refshapes" else "brings"
    again = " --again" if splitBy == "google" else ""  # the first split system is brought without being told
    for path in write(tmp_path, dataset=dataset, splitBy=splitBy):
        assert REFER(tmp_path, dataset, splitBy).getRefIds(split="val") == [10]
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(UserError) as caught:
            REFER(tmp_path, dataset, splitBy)
        if dataset == "mine" and path.name.startswith("refs"):
            assert str(caught.value).startswith(f"{path.parent} has no refs(<splitBy>).p")
        else:
            flags = f"--root {tmp_path}{again if path.name != 'instances.json' else ''}"
            remedy = f"`python -m {command} {flags}` {verb} it" if command else "see docs/custom_data.md"
            assert str(caught.value) == f"{path} is missing: {remedy}"
            assert isinstance(caught.value, MissingFileError)
        path.write_bytes(content)


def test_folder_in_a_files_place(tmp_path):
    path, _ = write(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError) as caught:
        REFER(tmp_path)
    assert str(caught.value).startswith(f"{path} cannot be read: ")
    with pytest.raises(MissingFileError):
        REFER(tmp_path / "refcoco" / "instances.json")


# ---- pickles ----


def python2_pickle(value, protocol):
    """As Python 2's cPickle wrote it: here bytes are its str, str its unicode."""
    puts = iter(range(10**6))

    def put():
        number = next(puts)
        if protocol == 0:
            return b"p%d\n" % number
        return b"q" + bytes([number]) if number < 256 else b"r" + struct.pack("<I", number)

    def dump(one):
        if isinstance(one, list):
            items = [dump(item) for item in one]
            return (
                b"(l" + put() + b"".join(item + b"a" for item in items)
                if protocol == 0
                else (b"]" + put() + b"(" + b"".join(items) + b"e")
            )
        if isinstance(one, dict):
            items = [dump(key.encode()) + dump(item) for key, item in one.items()]
            return (
                b"(d" + put() + b"".join(item + b"s" for item in items)
                if protocol == 0
                else (b"}" + put() + b"(" + b"".join(items) + b"u")
            )
        if isinstance(one, int):
            if protocol == 0:
                return b"I%d\n" % one if one % 2 else b"L%dL\n" % one
            return b"K" + bytes([one]) if one < 256 else b"J" + struct.pack("<i", one)
        if isinstance(one, bytes):
            if protocol == 0:
                return b"S" + repr(one)[1:].encode() + b"\n" + put()
            return (b"U" + bytes([len(one)]) if len(one) < 256 else b"T" + struct.pack("<i", len(one))) + one + put()
        if protocol == 0:
            return b"V" + one.encode("raw-unicode-escape") + b"\n" + put()
        return b"X" + struct.pack("<I", len(one.encode())) + one.encode() + put()

    return (b"\x80\x02" if protocol == 2 else b"") + dump(value) + b"."


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


def test_a_dataset_of_ones_own(tmp_path):
    """Any folder with the two files is a dataset; its pictures are in its own images folder, or are COCO's."""
    write(tmp_path, make_refs(), make_instances(), dataset="mine", splitBy="first")
    write(tmp_path, make_refs(), make_instances(), dataset="mine", splitBy="second")
    refer = REFER(tmp_path, "mine", "second")
    assert refer.getRefIds(split="train") == [50, 30]
    assert refer.get_image_path(3) == tmp_path / "images/mscoco/images/train2014/COCO_train2014_000000000003.jpg"
    (tmp_path / "mine" / "images").mkdir()
    refer = REFER(tmp_path, "mine", "first")
    assert refer.get_image_path(3) == tmp_path / "mine/images/COCO_train2014_000000000003.jpg"
    with pytest.raises(UserError, match="unknown splitBy 'unc': mine has first, second"):
        REFER(tmp_path, "mine", "unc")
    with pytest.raises(
        UserError, match=r"unknown dataset 'mime' \(did you mean mine\?\).*refshapes, mine, or make your"
    ):
        REFER(tmp_path, "mime", "first")
    with pytest.raises(UserError, match="names several datasets"):
        REFER(tmp_path, "mine,refcoco", "first")
    for name in ("../" + tmp_path.name, "mine/../mine", ".", "", "mi\0ne", "mi*"):
        with pytest.raises(UserError, match="unknown dataset"):
            REFER(tmp_path, name, "first")
