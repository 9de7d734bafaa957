"""RefShapes: what is written holds, judged by readers of their own and not by the generator's functions."""

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

from data.refshapes.__main__ import Scene, describe, generate_scene, render, write_refshapes
from data.refshapes.language import candidates
from data.refshapes.objects import SceneObject
from lib.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools

COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "cross")
HELD_OUT = {("red", "triangle"), ("blue", "circle"), ("green", "square"), ("yellow", "cross")}


class PlainUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        raise AssertionError(f"{module}.{name} in a pickle of plain lists, dicts, strings and integers")


def read(folder):
    """A finished set with every object's decoded mask and its share of the picture, without the generator's help."""
    instances = json.loads((folder / "instances.json").read_text())
    with open(folder / "refs(unc).p", "rb") as file:
        refs = PlainUnpickler(file).load()
    images = {image["id"]: image for image in instances["images"]}
    scenes = {image_id: [] for image_id in images}
    for annotation in instances["annotations"]:
        image = images[annotation["image_id"]]
        height, width = image["height"], image["width"]
        shown = annotation["segmentation"]
        rle = coco_mask.frPyObjects(shown, height, width) if isinstance(shown, list) else [shown]
        mask = coco_mask.decode(rle).sum(axis=2) == 1
        facts = annotation["attributes"]
        scenes[image["id"]].append(
            SimpleNamespace(
                id=annotation["id"],
                annotation=annotation,
                mask=mask,
                share=mask.mean(),
                u=facts["cx"] / width,
                v=facts["cy"] / height,
                **facts,
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


# ------------------------------------------------------------------- the judge: its own grammar, its own semantics

GRAMMAR = re.compile(
    r"(?:the )?(?:(?P<most>biggest|largest|smallest|leftmost|rightmost|topmost|bottommost) )?"
    r"(?:(?P<size>small|medium|large|big) )?"
    rf"(?:(?P<color>{'|'.join(COLORS)}) )?"
    rf"(?P<noun>{'|'.join(SHAPES)}|shape|one|object)"
    r"(?: (?P<place>on the left|on the right|at the top|at the bottom|in the (?:top|bottom) (?:left|right)))?"
    r"(?: (?P<relation>(?:to the )?left of|(?:to the )?right of|above|below|under|behind|in front of)"
    r" (?P<landmark>the .+))?"
)


def judge(sentence, scene, strict):
    """Ids of the objects the sentence is true of. Strict: by a margin. Otherwise: at all."""
    parts = GRAMMAR.fullmatch(sentence)
    assert parts, f"not understood: {sentence!r}"
    found = list(scene)
    if parts["color"]:
        found = [o for o in found if o.color == parts["color"]]
    if parts["noun"] in SHAPES:
        found = [o for o in found if o.shape == parts["noun"]]
    if parts["size"]:
        low, high = {"small": (0.025, 0.046), "medium": (0.046, 0.08), "large": (0.08, 0.12)}[
            parts["size"].replace("big", "large")
        ]
        size = parts["size"].replace("big", "large")
        by_name = [o for o in found if o.size == size]
        by_eye = [o for o in found if low < o.share < high]
        found = [o for o in found if o in by_name and o in by_eye] if strict else by_name
    if parts["place"]:
        limit = 0.4 if strict else 0.5
        found = [o for o in found if all(side(o, word) < limit + 1e-4 for word in parts["place"].split()[1:])]
    if parts["most"]:
        found = lead(found, parts["most"], strict)
    if parts["relation"]:
        (mark,) = judge(parts["landmark"], scene, strict=False)
        assert judge(parts["landmark"], scene, strict=True) == [mark]
        (mark,) = [o for o in scene if o.id == mark]
        found = [o for o in found if o is not mark and stands(o, parts["relation"], mark, strict)]
    return [o.id for o in found]


def side(o, word):
    return {"the": 0, "left": o.u, "right": 1 - o.u, "top": o.v, "bottom": 1 - o.v}[word]


def lead(found, word, strict):
    if word in ("biggest", "largest", "smallest"):
        values, margin = [math.log(o.share) for o in found], math.log(1.18)
    else:
        values, margin = [o.u if word in ("leftmost", "rightmost") else o.v for o in found], 0.0799
    if word in ("smallest", "leftmost", "topmost"):
        values = [-value for value in values]
    best = max(range(len(found)), key=values.__getitem__)
    rest = [value for i, value in enumerate(values) if i != best]
    assert rest, "a superlative of a single object"
    return [found[best]] if not strict or values[best] - max(rest) > margin else []


def stands(o, relation, mark, strict):
    if relation == "behind":
        return mark.id in o.hidden_by
    if relation == "in front of":
        return o.id in mark.hidden_by
    word = relation.removeprefix("to the ").removesuffix(" of")
    along = {"left": mark.u - o.u, "right": o.u - mark.u, "above": mark.v - o.v}.get(word, o.v - mark.v)
    across = abs(mark.v - o.v) if word in ("left", "right") else abs(mark.u - o.u)
    return along > 0.1199 and along > across - 1e-3 if strict else along > 0


def thing(number, shape="circle", color="red", size="small", share=0.035, u=0.5, v=0.5, hidden_by=()):
    return SimpleNamespace(
        id=number, shape=shape, color=color, size=size, share=share, u=u, v=v, hidden_by=list(hidden_by)
    )


def test_the_judge_can_say_no():
    scene = [
        thing(1, u=0.2),
        thing(2, u=0.45),
        thing(3, "square", "blue", "large", 0.1, u=0.8, hidden_by=[4]),
        thing(4, "cross", "blue", "medium", 0.06, u=0.7, v=0.62),
    ]
    assert judge("red circle", scene, strict=False) == [1, 2]
    assert judge("the circle on the left", scene, strict=True) == [1]
    assert judge("the circle on the left", scene, strict=False) == [1, 2]  # not clear: never to be said
    assert judge("the biggest blue one", scene, strict=True) == [3]
    assert judge("small square", scene, strict=False) == []
    assert judge("shape behind the medium blue cross", scene, strict=True) == [3]
    assert judge("shape to the left of the cross", scene, strict=True) == [1, 2]
    with pytest.raises(AssertionError, match="not understood"):
        judge("the heavy circle", scene, strict=False)


@pytest.mark.parametrize("level", ["basic", "full"])
def test_every_expression_is_true_of_its_target_only(level, request):
    data = request.getfixturevalue(level)
    for ref, sentence in expressions(data):
        scene = data.scenes[ref["image_id"]]
        for strict in (True, False):
            assert judge(sentence, scene, strict) == [ref["ann_id"]], (ref["image_id"], sentence, strict)


@pytest.mark.parametrize(("visible", "leads"), [(1.0, True), (0.64, False)])
def test_a_superlative_counts_what_is_visible(visible, leads):
    one = SceneObject("square", "red", "large", (214, 40, 36), 33.0, 0.02, 5, 5, 20.0, 20.0, visible)
    two = SceneObject("square", "red", "medium", (214, 40, 36), 25.0, 0.02, 60, 5, 75.0, 20.0)
    scene = Scene(0, "train", 0, "full", 100, 100, (120.0, 0, 0, 0, 0, 0), (one, two))
    assert any(description.most == "biggest" for description, _ in candidates(scene, 0)) == leads
    assert any(description.most == "smallest" for description, _ in candidates(scene, 1)) == leads


def test_the_kinds_of_expressions(basic, full):
    simple = " ".join(sentence for _, sentence in expressions(basic))
    rich = " ".join(sentence for _, sentence in expressions(full))
    for words in ("above", "under", "behind", "in front of", "left of", "to the right of", "medium", "topmost"):
        assert f" {words} " in rich
        assert f" {words} " not in simple
    for data, most_alone in ((basic, 0.92), (full, 0.85)):
        alone, kinds = 0, Counter()
        for ref, sentence in expressions(data, "train"):
            scene = data.scenes[ref["image_id"]]
            target = next(o for o in scene if o.id == ref["ann_id"])
            alone += sum((o.color, o.shape) == (target.color, target.shape) for o in scene) == 1
            named = GRAMMAR.fullmatch(sentence).groupdict()
            kinds[tuple(k for k, v in named.items() if v and v not in ("shape", "one", "object"))] += 1
        total = sum(kinds.values())
        assert 0.4 < alone / total < most_alone  # colour and shape together are often enough, and often not
        assert max(kinds.values()) < 0.4 * total
        for part in ("color", "noun", "size", "most", "place"):
            assert sum(n for kind, n in kinds.items() if part in kind) > 0.05 * total
        only_place = sum(n for kind, n in kinds.items() if set(kind) <= {"most", "place"})
        assert only_place < 0.25 * total


# ------------------------------------------------------------------------------------------- scenes and pictures


def test_no_object_is_tiny_or_huge(basic, full):
    for data in (basic, full):
        for scene in data.scenes.values():
            assert 3 <= len(scene) <= 6
            for o in scene:
                assert 0.018 < o.share <= 0.12
                assert o.annotation["area"] == o.mask.sum()
                ys, xs = np.nonzero(o.mask)
                assert (o.cx, o.cy) == pytest.approx((xs.mean() + 0.5, ys.mean() + 0.5), abs=0.6)
                # COCO's box of a polygon is the polygon's own, that of an RLE counts pixels
                box = (xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min())
                assert o.annotation["bbox"] == pytest.approx(box, abs=1.1)


def test_size_classes_are_apart(basic, full):
    for data in (basic, full):
        shares = {"small": [], "medium": [], "large": []}
        for o in itertools.chain(*data.scenes.values()):
            shares[o.size].append(o.share / o.visible)
        assert max(shares["small"]) * 1.15 < min(shares["medium"])
        assert max(shares["medium"]) * 1.15 < min(shares["large"])


def test_both_forms_of_segmentation(basic, full):
    for data in (basic, full):
        forms = Counter(type(a["segmentation"]).__name__ for a in data.instances["annotations"])
        assert forms["list"] > forms["dict"] > 0


def grown(mask):
    out = mask.copy()
    out[1:] |= mask[:-1]
    out[:-1] |= mask[1:]
    out[:, 1:] |= out[:, :-1].copy()
    out[:, :-1] |= out[:, 1:].copy()
    return out


def test_objects_are_apart_or_overlap_as_told(basic, full):
    overlaps = 0
    for data in (basic, full):
        for scene in data.scenes.values():
            for a, b in itertools.combinations(scene, 2):
                assert not (a.mask & b.mask).sum() > 0.02 * a.mask.sum()
                told = b.id in a.hidden_by or a.id in b.hidden_by
                assert (grown(a.mask) & b.mask).any() == told
            for o in scene:
                assert (o.visible == 1) == (not o.hidden_by)
                assert o.visible >= 0.6
                edges = np.concatenate([o.mask[0], o.mask[-1], o.mask[:, 0], o.mask[:, -1]])
                assert not edges.any()
            hidden = [o for o in scene if o.hidden_by]
            overlaps += len(hidden)
            assert not hidden or data is full
    assert 0.2 < overlaps / len(full.scenes) < 0.6


def named_color(rgb):
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in rgb))
    assert saturation > 0.45
    assert value > 0.45
    hues = {"red": 0, "yellow": 53, "green": 124, "cyan": 184, "blue": 228, "purple": 287, "red again": 360}
    return min(hues, key=lambda name: abs(hues[name] - 360 * hue)).split()[0]


def test_masks_agree_with_pictures(basic, full):
    for data in (basic, full):
        for image_id, scene in data.scenes.items():
            image = data.images[image_id]
            with Image.open(data.folder / "images" / image["file_name"]) as file:
                assert file.mode == "RGB"
                assert file.size == (image["width"], image["height"])
                picture = np.asarray(file).astype(int)
            objects = np.zeros(picture.shape[:2], bool)
            for o in scene:
                assert named_color(picture[o.mask].mean(axis=0)) == o.color
                assert picture[o.mask & ~grown(~o.mask)].std(axis=0).max() < 12  # nothing else within
                objects |= grown(grown(o.mask))
            background = picture[~objects]
            assert (background.max(axis=1) - background.min(axis=1)).mean() < 40  # greyish: no object without mask
            assert background.std(axis=0).min() > 1  # and not a constant
    assert any(i["width"] != i["height"] for i in data.images.values())


def test_shapes_are_what_they_are_called(basic):
    for o in itertools.chain(*basic.scenes.values()):
        ys, xs = np.nonzero(o.mask)
        reach = np.hypot(xs - xs.mean(), ys - ys.mean()).max() ** 2 * math.pi / len(xs)  # 1 for a disc
        fill = len(xs) / ((np.ptp(xs) + 1) * (np.ptp(ys) + 1))
        seen = "circle" if reach < 1.25 else "triangle" if reach > 1.9 else "square" if fill > 0.65 else "cross"
        assert seen == o.shape, (reach, fill)


@pytest.mark.parametrize("level", ["basic", "full"])
def test_drawn_masks_match_the_annotations(level, request):
    data = request.getfixturevalue(level)
    seed = 0 if level == "basic" else 3
    for index in range(40):
        picture, masks = render(generate_scene(seed, "train", index, level))
        written = data.scenes[index + 1]
        assert picture.size == written[0].mask.shape[::-1]
        for mask, o in zip(masks, written, strict=True):
            assert (mask & o.mask).sum() / (mask | o.mask).sum() >= 0.93


def test_public_functions_repeat_themselves():
    scene = generate_scene(5, "testA", 7, "full")
    assert scene == generate_scene(5, "testA", 7, "full")
    assert scene != generate_scene(5, "testA", 8, "full")
    assert scene.objects != generate_scene(5, "testA", 7, "basic").objects
    target = scene.targets()[0]
    said = [describe(scene, target, np.random.default_rng(1), count=3) for _ in range(2)]
    assert said[0] == said[1]
    assert len({e.text for e in said[0]}) == len({e.kind for e in said[0]}) == len(said[0])
    first, again = render(scene)[0], render(scene)[0]
    assert first.tobytes() == again.tobytes()
    for seed, split, index, level in ((0, "train", 0, "hard"), (0, "test", 0, "full"), (-1, "val", 0, "full")):
        with pytest.raises(UserError):
            generate_scene(seed, split, index, level)


# --------------------------------------------------------------------------------------------------- the splits


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
            assert 1 <= len({s["sent"] for s in ref["sentences"]}) == len(ref["sentences"]) <= 3
            for s in ref["sentences"]:
                assert set(s) == {"sent_id", "raw", "sent", "tokens"}
                assert s["tokens"] == s["sent"].split() == s["raw"].split()
        sent_ids = [i for ref in data.refs for i in ref["sent_ids"]]
        assert len(set(sent_ids)) == len(sent_ids)
        for image in data.images.values():
            assert re.fullmatch(r"refshapes_\d{12}\.jpg", image["file_name"])
        assert len(data.images) == len(list((data.folder / "images").iterdir()))


def test_counts(basic):
    info = json.loads((basic.folder / "refshapes.json").read_text())
    assert info["images"] == {"train": 120, "val": 320, "testA": 50, "testB": 50}
    for split in info["images"]:
        assert info["refs"][split] == sum(ref["split"] == split for ref in basic.refs)
        assert info["expressions"][split] == len(list(expressions(basic, split)))
    assert len({ref["image_id"] for ref in basic.refs if ref["split"] == "val"}) == 320
    assert info["expressions"]["val"] >= 1000
    objects = sum(len(basic.scenes[i]) for i in {ref["image_id"] for ref in basic.refs if ref["split"] == "val"})
    assert info["refs"]["val"] > 0.9 * objects  # most objects are referred to


def split_of(data):
    return {ref["image_id"]: ref["split"] for ref in data.refs}


def test_no_scene_is_in_two_splits(basic, full):
    for data in (basic, full):
        seen = {}
        for image_id, split in split_of(data).items():
            shown = frozenset((o.shape, o.color, o.size, round(8 * o.u), round(8 * o.v)) for o in data.scenes[image_id])
            assert seen.setdefault(shown, split) == split


def test_test_a_has_a_rival_of_the_same_shape(basic, full):
    for data in (basic, full):
        refs = [ref for ref in data.refs if ref["split"] == "testA"]
        assert len(refs) > 60
        for ref in refs:
            scene = data.scenes[ref["image_id"]]
            shape = next(o.shape for o in scene if o.id == ref["ann_id"])
            assert sum(o.shape == shape for o in scene) > 1


def test_held_out_pairs_are_in_test_b_only(basic, full):
    for data in (basic, full):
        seen, targets = set(), set()
        splits = split_of(data)
        for ref in data.refs:
            o = next(o for o in data.scenes[ref["image_id"]] if o.id == ref["ann_id"])
            if ref["split"] == "testB":
                targets.add((o.color, o.shape))
        for image_id, scene in data.scenes.items():
            if splits.get(image_id) != "testB":
                seen |= {(o.color, o.shape) for o in scene}
        assert targets == HELD_OUT
        assert seen == set(itertools.product(COLORS, SHAPES)) - HELD_OUT


def test_vocabulary(basic, full):
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
        assert tokens == ["[CLS]", *sentence.split(), "[SEP]"]  # every word is one piece
        assert len(ids) <= 21
    assert "[UNK]" not in tokenizer.tokenize("Two zebras, under an 8-legged table!")
