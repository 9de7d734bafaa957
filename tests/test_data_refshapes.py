"""RefShapes: the written dataset is checked by independent readers, without the generator's own functions."""

import colorsys
import itertools
import json
import math
import pickle
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from refshapes_semantics import COLORS, SHAPES, kind, named_properties, understand

from data.refshapes.dataset import write_refshapes
from data.refshapes.drawing import render
from data.refshapes.language import candidates, describe
from data.refshapes.objects import Scene, SceneObject
from data.refshapes.scenes import generate_scene

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools

HELD_OUT = {("red", "triangle"), ("blue", "circle"), ("green", "square"), ("yellow", "cross")}


class PlainUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        raise AssertionError(f"{module}.{name} in a pickle of plain lists, dicts, strings and integers")


def read(folder):
    """Read a dataset; decode the mask of every object and compute its share of the image area."""
    instances = json.loads((folder / "instances.json").read_text())
    with open(folder / "refs(unc).p", "rb") as file:
        refs = PlainUnpickler(file).load()
    images = {image["id"]: image for image in instances["images"]}
    scenes = {image_id: [] for image_id in images}
    for annotation in instances["annotations"]:
        image = images[annotation["image_id"]]
        height, width = image["height"], image["width"]
        segmentation = annotation["segmentation"]
        rle = coco_mask.frPyObjects(segmentation, height, width) if isinstance(segmentation, list) else [segmentation]
        mask = coco_mask.decode(rle).sum(axis=2) == 1
        attributes = annotation["attributes"]
        scenes[image["id"]].append(
            SimpleNamespace(
                id=annotation["id"],
                annotation=annotation,
                mask=mask,
                share=mask.mean(),
                u=attributes["cx"] / width,
                v=attributes["cy"] / height,
                **attributes,
            )
        )
    return SimpleNamespace(folder=folder, instances=instances, refs=refs, images=images, scenes=scenes)


def expressions(data, split=None):
    for ref in data.refs:
        if split in (None, ref["split"]):
            for sentence in ref["sentences"]:
                yield ref, sentence["sent"]


@pytest.fixture(scope="module")
def basic(tmp_path_factory):
    root = tmp_path_factory.mktemp("basic")
    return read(write_refshapes(root, train_images=120, testA_images=50, testB_images=50))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    root = tmp_path_factory.mktemp("full")
    counts = {"train_images": 200, "val_images": 50, "testA_images": 40, "testB_images": 40}
    return read(write_refshapes(root, level="full", seed=3, **counts))


# the sentences


def example(number, shape="circle", color="red", size="small", share=0.035, u=0.5, v=0.5, hidden_by=()):
    return SimpleNamespace(
        id=number, shape=shape, color=color, size=size, share=share, u=u, v=v, hidden_by=list(hidden_by)
    )


def test_the_semantics_of_these_tests_reject_wrong_sentences():
    scene = [
        example(1, u=0.2),
        example(2, u=0.45),
        example(3, "square", "blue", "large", 0.1, u=0.8, hidden_by=[4]),
        example(4, "cross", "blue", "medium", 0.06, u=0.7, v=0.62),
    ]
    assert understand("red circle", scene, strict=False) == [1, 2]
    assert understand("the circle on the left", scene, strict=True) == [1]
    assert understand("the circle on the left", scene, strict=False) == [1, 2]
    assert understand("the biggest blue one", scene, strict=True) == [3]
    assert understand("small square", scene, strict=False) == []
    assert understand("shape behind the medium blue cross", scene, strict=True) == [3]
    assert understand("shape to the left of the cross", scene, strict=True) == [1, 2]
    with pytest.raises(AssertionError, match="not understood"):
        understand("the heavy circle", scene, strict=False)


@pytest.mark.parametrize("level", ["basic", "full"])
def test_every_sentence_is_true_of_its_target_only(level, request):
    data = request.getfixturevalue(level)
    for ref, sentence in expressions(data):
        scene = data.scenes[ref["image_id"]]
        for strict in (True, False):
            assert understand(sentence, scene, strict) == [ref["ann_id"]], (ref["image_id"], sentence, strict)


@pytest.mark.parametrize(("visible", "is_biggest"), [(1.0, True), (0.64, False)])
def test_a_superlative_considers_the_visible_area(visible, is_biggest):
    large = SceneObject("square", "red", "large", (214, 40, 36), 33.0, 0.02, 5, 5, 20.0, 20.0, visible)
    medium = SceneObject("square", "red", "medium", (214, 40, 36), 25.0, 0.02, 60, 5, 75.0, 20.0)
    scene = Scene(0, "train", 0, "full", 100, 100, (120.0, 0, 0, 0, 0, 0), (large, medium))
    assert any(description.superlative == "biggest" for description in candidates(scene, 0)) == is_biggest
    assert any(description.superlative == "smallest" for description in candidates(scene, 1)) == is_biggest


def test_all_kinds_of_sentences_occur(basic, full):
    basic_text = " ".join(sentence for _, sentence in expressions(basic))
    full_text = " ".join(sentence for _, sentence in expressions(full))
    for words in ("above", "under", "behind", "in front of", "left of", "to the right of", "medium", "topmost"):
        assert f" {words} " in full_text
        assert f" {words} " not in basic_text
    for data, max_unique in ((basic, 0.92), (full, 0.85)):
        unique, kinds = 0, Counter()
        for ref, sentence in expressions(data, "train"):
            scene = data.scenes[ref["image_id"]]
            target = next(o for o in scene if o.id == ref["ann_id"])
            unique += sum((o.color, o.shape) == (target.color, target.shape) for o in scene) == 1
            kinds[named_properties(sentence)] += 1
        total = sum(kinds.values())
        assert 0.4 < unique / total < max_unique  # color and shape together are often unambiguous, and often not
        assert max(kinds.values()) < 0.4 * total
        for part in ("color", "noun", "size", "superlative", "place"):
            assert sum(n for kind, n in kinds.items() if part in kind) > 0.05 * total
        only_position = sum(n for kind, n in kinds.items() if set(kind) <= {"superlative", "place"})
        assert only_position < 0.25 * total


# scenes and images


def test_no_object_is_tiny_or_huge(basic, full):
    for data in (basic, full):
        for scene in data.scenes.values():
            assert 3 <= len(scene) <= 6
            for o in scene:
                assert 0.018 < o.share <= 0.12
                assert o.annotation["area"] == o.mask.sum()
                ys, xs = np.nonzero(o.mask)
                assert (o.cx, o.cy) == pytest.approx((xs.mean() + 0.5, ys.mean() + 0.5), abs=0.6)
                # COCO's box of a polygon follows its corners, that of an RLE its pixels.
                box = (xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min())
                assert o.annotation["bbox"] == pytest.approx(box, abs=1.1)


def test_size_classes_are_separated(basic, full):
    for data in (basic, full):
        shares = {"small": [], "medium": [], "large": []}
        for o in itertools.chain(*data.scenes.values()):
            shares[o.size].append(o.share / o.visible)
        assert max(shares["small"]) * 1.15 < min(shares["medium"])
        assert max(shares["medium"]) * 1.15 < min(shares["large"])


def test_segmentations_are_polygons_and_rles(basic, full):
    for data in (basic, full):
        types = Counter(type(a["segmentation"]).__name__ for a in data.instances["annotations"])
        assert types["list"] > types["dict"] > 0


def dilated(mask):
    out = mask.copy()
    out[1:] |= mask[:-1]
    out[:-1] |= mask[1:]
    out[:, 1:] |= out[:, :-1].copy()
    out[:, :-1] |= out[:, 1:].copy()
    return out


def test_objects_touch_only_where_hidden_by_says_so(basic, full):
    overlaps = 0
    for data in (basic, full):
        for scene in data.scenes.values():
            for a, b in itertools.combinations(scene, 2):
                assert not (a.mask & b.mask).sum() > 0.02 * a.mask.sum()
                recorded = b.id in a.hidden_by or a.id in b.hidden_by
                assert (dilated(a.mask) & b.mask).any() == recorded
            for o in scene:
                assert (o.visible == 1) == (not o.hidden_by)
                assert o.visible >= 0.6
                edges = np.concatenate([o.mask[0], o.mask[-1], o.mask[:, 0], o.mask[:, -1]])
                assert not edges.any()
            hidden = [o for o in scene if o.hidden_by]
            overlaps += len(hidden)
            assert not hidden or data is full
    assert 0.2 < overlaps / len(full.scenes) < 0.6


def color_name(rgb):
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in rgb))
    assert saturation > 0.45
    assert value > 0.45
    hues = {"red": 0, "yellow": 53, "green": 124, "cyan": 184, "blue": 228, "purple": 287, "red (360°)": 360}
    return min(hues, key=lambda name: abs(hues[name] - 360 * hue)).split()[0]


def test_masks_agree_with_images(basic, full):
    for data in (basic, full):
        for image_id, scene in data.scenes.items():
            image = data.images[image_id]
            with Image.open(data.folder / "images" / image["file_name"]) as file:
                assert file.mode == "RGB"
                assert file.size == (image["width"], image["height"])
                pixels = np.asarray(file).astype(int)
            near_objects = np.zeros(pixels.shape[:2], bool)
            for o in scene:
                assert color_name(pixels[o.mask].mean(axis=0)) == o.color
                assert pixels[o.mask & ~dilated(~o.mask)].std(axis=0).max() < 12  # one color inside
                near_objects |= dilated(dilated(o.mask))
            background = pixels[~near_objects]
            assert (background.max(axis=1) - background.min(axis=1)).mean() < 40  # grayish: no object without a mask
            assert background.std(axis=0).min() > 1  # and not constant
    assert any(i["width"] != i["height"] for i in data.images.values())


def test_shapes_match_their_names(basic):
    for o in itertools.chain(*basic.scenes.values()):
        ys, xs = np.nonzero(o.mask)
        reach = np.hypot(xs - xs.mean(), ys - ys.mean()).max() ** 2 * math.pi / len(xs)  # 1 for a disc
        fill = len(xs) / ((np.ptp(xs) + 1) * (np.ptp(ys) + 1))
        measured = "circle" if reach < 1.25 else "triangle" if reach > 1.9 else "square" if fill > 0.65 else "cross"
        assert measured == o.shape, (reach, fill)


@pytest.mark.parametrize(("level", "seed"), [("basic", 0), ("full", 3)])
def test_rendered_masks_match_the_annotations(level, seed, request):
    data = request.getfixturevalue(level)
    for index in range(40):
        image, masks = render(generate_scene(seed, "train", index, level))
        written = data.scenes[index + 1]
        assert image.size == written[0].mask.shape[::-1]
        for mask, o in zip(masks, written, strict=True):
            assert (mask & o.mask).sum() / (mask | o.mask).sum() >= 0.93


def test_generation_is_deterministic():
    scene = generate_scene(5, "testA", 7, "full")
    assert scene == generate_scene(5, "testA", 7, "full")
    assert scene != generate_scene(5, "testA", 8, "full")
    assert scene.objects != generate_scene(5, "testA", 7, "basic").objects
    target = scene.targets()[0]
    assert len({tuple(describe(scene, target, np.random.default_rng(1))) for _ in range(2)}) == 1
    assert render(scene)[0].tobytes() == render(scene)[0].tobytes()


# the splits


def test_refs_are_in_the_refer_layout(basic, full):
    for data in (basic, full):
        annotations = {a["id"]: a for a in data.instances["annotations"]}
        names = {c["id"]: c["name"] for c in data.instances["categories"]}
        assert sorted(names.values()) == sorted(SHAPES)
        assert len({ref["ref_id"] for ref in data.refs}) == len(data.refs)
        assert len({ref["ann_id"] for ref in data.refs}) == len(data.refs)
        keys = {"ref_id", "ann_id", "image_id", "category_id", "file_name", "split", "sent_ids", "sentences"}
        for ref in data.refs:
            assert set(ref) == keys
            annotation = annotations[ref["ann_id"]]
            assert (annotation["image_id"], annotation["category_id"]) == (ref["image_id"], ref["category_id"])
            assert names[ref["category_id"]] == annotation["attributes"]["shape"]
            assert [s["sent_id"] for s in ref["sentences"]] == ref["sent_ids"]
            assert 1 <= len({kind(s["sent"]) for s in ref["sentences"]}) == len(ref["sentences"]) <= 3
            for s in ref["sentences"]:
                assert set(s) == {"sent_id", "raw", "sent", "tokens"}
                assert s["tokens"] == s["sent"].split() == s["raw"].split()
        sent_ids = [i for ref in data.refs for i in ref["sent_ids"]]
        assert len(set(sent_ids)) == len(sent_ids)
        for image in data.images.values():
            assert re.fullmatch(r"refshapes_\d{12}\.jpg", image["file_name"])
        assert len(data.images) == len(list((data.folder / "images").iterdir()))


def test_the_recorded_counts_are_correct(basic):
    info = json.loads((basic.folder / "refshapes.json").read_text())
    assert info["images"] == {"train": 120, "val": 320, "testA": 50, "testB": 50}
    for split in info["images"]:
        assert info["refs"][split] == sum(ref["split"] == split for ref in basic.refs)
        assert info["expressions"][split] == len(list(expressions(basic, split)))
    val_images = {ref["image_id"] for ref in basic.refs if ref["split"] == "val"}
    assert len(val_images) == 320
    assert info["expressions"]["val"] >= 1000
    assert info["refs"]["val"] > 0.9 * sum(len(basic.scenes[i]) for i in val_images)  # most objects are referred to


def test_splits_contain_the_intended_objects(basic, full):
    for data in (basic, full):
        scene_splits, targets = {}, {}
        for ref in data.refs:
            scene = data.scenes[ref["image_id"]]
            appearance = frozenset((o.shape, o.color, o.size, round(8 * o.u), round(8 * o.v)) for o in scene)
            assert scene_splits.setdefault(appearance, ref["split"]) == ref["split"], "a scene is in two splits"
            (target,) = [o for o in scene if o.id == ref["ann_id"]]
            targets.setdefault(ref["split"], []).append((target, scene))
        assert len(targets["testA"]) > 60
        for target, scene in targets["testA"]:
            assert sum(o.shape == target.shape for o in scene) > 1, "testA: another object has the same shape"
        assert {(target.color, target.shape) for target, _ in targets["testB"]} == HELD_OUT
        other_objects = itertools.chain(*(scene for split in ("train", "val", "testA") for _, scene in targets[split]))
        assert {(o.color, o.shape) for o in other_objects} == set(itertools.product(COLORS, SHAPES)) - HELD_OUT


def test_every_word_is_one_token_of_the_vocabulary(basic, full):
    from transformers import BertTokenizer

    assert (basic.folder / "vocab.txt").read_bytes() == (full.folder / "vocab.txt").read_bytes()
    words = (basic.folder / "vocab.txt").read_text().splitlines()
    assert len(set(words)) == len(words) < 250
    assert words[0] == "[PAD]"
    tokenizer = BertTokenizer.from_pretrained(basic.folder)
    assert len(tokenizer) == len(words)
    sentences = sorted({sentence for data in (basic, full) for _, sentence in expressions(data)})
    for sentence, ids in zip(sentences, tokenizer(sentences)["input_ids"], strict=True):
        tokens = tokenizer.convert_ids_to_tokens(ids)
        assert tokens == ["[CLS]", *sentence.split(), "[SEP]"], "every word is one token"
        assert len(ids) <= 21
    assert "[UNK]" not in tokenizer.tokenize("Two zebras, under an 8-legged table!")
