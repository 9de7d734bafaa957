"""refer.refer: indexes, filters, boxes and masks of annotation files that the tests write themselves."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from refer_sets import HUGE, SHIFTED, SQUARE, H, W, box_mask, make_instances, make_refs, with_segmentation, write

from lib.errors import MissingFileError, UserError
from refer.refer import REFER

# ---- records ----


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
        assert str(caught.value) == f"No {name} 777 in {path}."
    for bad in ("20", 20.0, True, None, [[20]]):
        with pytest.raises(UserError, match="Ids must be integers, not"):
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
        with pytest.raises(UserError, match=r"No (image|ref) 777 in "):
            call(777)


@pytest.mark.parametrize("box", [None, [], [1, 2, 3], [1, 2, 3, "4"], [1, 2, 3, float("nan")], [1, 2, HUGE, 1], "1234"])
def test_malformed_box(tmp_path, box):
    instances = make_instances()
    instances["annotations"][0]["bbox"] = box
    _, path = write(tmp_path, instances=instances)
    with pytest.raises(UserError) as caught:
        REFER(tmp_path).getRefBox(50)
    assert str(caught.value) == f"{path}: annotation 105 of ref 50: bbox must be four numbers [x, y, w, h]"


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
    assert sorted(refer.splits()) == sorted(set(values.split()))


@pytest.mark.parametrize("split", ["testC", "trian", "TRAIN", "tes", "v", None])
def test_absent_split(tmp_path, split):
    path, _ = write(tmp_path)
    refer = REFER(tmp_path)
    with pytest.raises(UserError) as caught:
        refer.getRefIds(split=split)
    assert str(caught.value) == f"No split {split!r} in {path}. It has train, val, testA, testB."


# ---- masks ----


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
    with pytest.raises(UserError, match=r"Unknown mask mode 'hole'\. Choose one of paper, union"):
        refer.getMask(50, mode="hole")
    for ref in ({}, {"ref_id": "50"}, {"ref_id": [50, 10]}, None):
        with pytest.raises(UserError, match="Ids must be integers"):
            refer.getMask(ref)


def test_more_parts_than_fit_into_uint8(tmp_path):
    """A sum of 257 layers in uint8 would be 1."""
    refer = with_segmentation(tmp_path, [SQUARE] * 257)
    assert refer.getMask(50)["area"] == 0
    assert refer.getMask(50, "union")["area"] == 100


def runs(mask):
    flat = np.concatenate([[0], mask.T.ravel(), [1 - mask[-1, -1]]])
    ends = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate([[0], ends])).tolist()


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("shape", [(H, W), (480, 640)])
def test_all_forms_of_run_lengths(tmp_path, density, shape):
    """The compressed strings are encoded by pycocotools; the runs of large images take several characters."""
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


POLYGON, NEAR = "a polygon must be a list of at least three", "coordinate that is not a number near the 30x20 image"
SIZE, COUNTS = "the size of an RLE must be that of the image, [20, 30]", "the counts of an RLE must be run lengths"
CORRUPT, TRUNCATED = "compressed counts of an RLE are corrupt", "compressed counts of an RLE are truncated"


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "segmentation must be a list of polygons or an RLE"),
        ([], "segmentation must be a list of polygons or an RLE"),
        ({}, "segmentation must be a list of polygons or an RLE"),
        ("oops", "segmentation must be a list of polygons or an RLE"),
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
        ([[0, 0, 29, 19] * 40_000], "outline of the polygons is longer than"),
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
        ({"size": [H, W], "counts": []}, "counts of an RLE sum to 0 instead of 20x30"),
        ({"size": [H, W], "counts": [300, 299]}, "counts of an RLE sum to 599 instead of 20x30"),
        ({"size": [H, W], "counts": [300, 300, 300]}, "counts of an RLE sum to 900 instead of 20x30"),
        ([SQUARE, {"size": [H, W], "counts": [1]}], "counts of an RLE sum to 1 instead of 20x30"),
        ({"size": [H, W], "counts": ""}, "counts of an RLE sum to 0 instead of 20x30"),
        ({"size": [H, W], "counts": "1"}, "counts of an RLE sum to 1 instead of 20x30"),
        ({"size": [H, W], "counts": "1 2"}, CORRUPT),
        ({"size": [H, W], "counts": "1é"}, CORRUPT),
        ({"size": [H, W], "counts": "o" * 100_000}, CORRUPT),
        ({"size": [H, W], "counts": "1oo"}, TRUNCATED),
        ({"size": [H, W], "counts": "A"}, COUNTS),  # minus 15
        ({"size": [H, W], "counts": "1111A"}, COUNTS),
        ({"size": [H, W], "counts": "o" * 11 + "0"}, COUNTS),  # about 2**55
    ],
)
def test_malformed_segmentation(tmp_path, segmentation, message):
    refer = with_segmentation(tmp_path, segmentation)
    for mode in ("paper", "union"):
        with pytest.raises(UserError) as caught:
            refer.getMask(50, mode)
        assert str(caught.value).startswith(f"{refer.instances_path}: annotation 105 of ref 50: ")
        assert message in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    assert refer.getMask(10)["area"] == 100  # other annotations are not affected


def test_polygons_are_clipped_at_the_border_of_the_image(tmp_path):
    refer = with_segmentation(tmp_path, [[-30, -20, 60, -20, 60, 40, -30, 40]])
    assert refer.getMask(50)["area"] == H * W
    refer = with_segmentation(tmp_path, [[-20, -10, -5, -10, -5, -5]])
    assert refer.getMask(50)["area"] == 0


# ---- names and files ----


@pytest.mark.parametrize(
    ("dataset", "splitBy", "parts"),
    [
        (
            "refcocoo",
            "unc",
            [
                "No such dataset 'refcocoo'. Did you mean refcoco?",
                "Choose one of refcoco, refcoco+, refcocog, refshapes",
            ],
        ),
        ("refshape", "unc", ["No such dataset 'refshape'. Did you mean refshapes?"]),
        ("xyz", "unc", ["No such dataset 'xyz'. Choose one of"]),
        (None, "unc", ["No such dataset None"]),
        ("refcoco", "umd", ["refcoco has no splitBy 'umd'. Choose unc or google."]),
        ("refcoco+", "google", ["refcoco+ has no splitBy 'google'. Choose unc."]),
        ("refcocog", "unc", ["refcocog has no splitBy 'unc'. Choose umd or google."]),
        ("refshapes", "UNC", ["refshapes has no splitBy 'UNC'. Choose unc."]),
    ],
)
def test_unknown_names(tmp_path, dataset, splitBy, parts):
    with pytest.raises(UserError) as caught:
        REFER(tmp_path, dataset, splitBy)
    assert not isinstance(caught.value, MissingFileError)
    for part in parts:
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
    again = " --again" if splitBy == "google" else ""  # refer.prepare installs the first split system by default
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
            remedy = f"Run `python -m {command} {flags}`." if command else "See docs/custom_data.md."
            assert str(caught.value) == f"{path} is missing. {remedy}"
            assert isinstance(caught.value, MissingFileError)
        path.write_bytes(content)


def test_a_folder_instead_of_an_annotation_file(tmp_path):
    path, _ = write(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError) as caught:
        REFER(tmp_path)
    assert str(caught.value).startswith(f"Cannot read {path}: ")
    with pytest.raises(MissingFileError):
        REFER(tmp_path / "refcoco" / "instances.json")


def test_ctrl_c_while_a_mask_is_drawn(tmp_path, monkeypatch):
    """NumPy raises the TypeError of its first attempt when the second one is interrupted."""
    refer = with_segmentation(tmp_path, [SQUARE])

    def interrupted(_):
        raise TypeError("__array__() got an unexpected keyword argument 'copy'")

    monkeypatch.setattr(coco_mask, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        refer.getMask(50)
    monkeypatch.setattr(coco_mask, "decode", lambda rles: rles + 1)
    with pytest.raises(TypeError, match="can only concatenate"):
        refer.getMask(50)


def test_custom_dataset(tmp_path):
    """Any folder with the two files is a dataset. Its images are in its own images folder, or COCO's without one."""
    write(tmp_path, make_refs(), make_instances(), dataset="mine", splitBy="first")
    write(tmp_path, make_refs(), make_instances(), dataset="mine", splitBy="second")
    refer = REFER(tmp_path, "mine", "second")
    assert refer.getRefIds(split="train") == [50, 30]
    assert refer.get_image_path(3) == tmp_path / "images/mscoco/images/train2014/COCO_train2014_000000000003.jpg"
    (tmp_path / "mine" / "images").mkdir()
    refer = REFER(tmp_path, "mine", "first")
    assert refer.get_image_path(3) == tmp_path / "mine/images/COCO_train2014_000000000003.jpg"
    with pytest.raises(UserError, match=r"mine has no splitBy 'unc'. Choose first or second\."):
        REFER(tmp_path, "mine", "unc")
    with pytest.raises(
        UserError, match=r"No such dataset 'mime'. Did you mean mine\?.*refshapes, mine, or convert your"
    ):
        REFER(tmp_path, "mime", "first")
    with pytest.raises(UserError, match="names several datasets"):
        REFER(tmp_path, "mine,refcoco", "first")
    for name in ("../" + tmp_path.name, "mine/../mine", ".", "", "mi\0ne", "mi*"):
        with pytest.raises(UserError, match="No such dataset"):
            REFER(tmp_path, name, "first")
