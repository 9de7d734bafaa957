"""data.convert: the written dataset contains exactly what the user's files say."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import contents
from own_data import (
    BOXES,
    HEIGHT,
    ONLY_TRAIN,
    SHARES,
    TEXTS,
    WIDTH,
    by_id,
    by_mask,
    expected_mask,
    expressions,
    file_name,
    rows_by_id,
    rows_by_mask,
    table,
    write,
)
from PIL import Image

from data.convert.annotations import read_mask
from data.convert.dataset import Source, convert
from data.convert.sentences import words
from data.convert.splits import SplitShares
from data.convert.summary import samples
from lib.errors import UserError
from refer.datasets import COCO_IMAGES
from refer.masks import decode_mask
from refer.refer import REFER

EXPECTED = [
    (file_name(i), expected_mask(box).astype(np.uint8).tobytes(), text)
    for i in range(1, 11)
    for box, texts in enumerate(TEXTS)
    for text in texts
]


def test_coco_annotations_are_not_changed(source):
    refer = by_id(source, rows_by_id()).refer
    assert expressions(refer) == EXPECTED
    again = REFER("data", "mine", "unc")
    assert again.data == refer.data
    original = json.loads((source / "coco.json").read_text())
    assert again.data["images"] == original["images"][:10]
    assert again.data["annotations"] == original["annotations"][:30], "including annotations without a ref"
    assert again.data["categories"] == original["categories"]
    assert [ref["ref_id"] for ref in again.data["refs"]] == list(range(20))
    assert list(again.Sents) == list(range(30))
    ref = again.Refs[2]
    assert (ref["image_id"], ref["ann_id"], ref["category_id"]) == (2, 20, 7)
    assert ref["file_name"] == "COCO_train2014_000000000002_20.jpg"
    assert ref["sent_ids"] == [3, 4]
    assert ref["sentences"][0] == {
        "sent_id": 3, "raw": "Bob's red box, left", "sent": "bobs red box left",
        "tokens": ["bobs", "red", "box", "left"],
    }  # fmt: skip
    for image in again.Imgs.values():
        photo = source / "photos" / image["file_name"]
        assert again.get_image_path(image["id"]).read_bytes() == photo.read_bytes()
    assert (source / "data/mine/refs(unc).p").read_bytes()[:2] == b"\x80\x02"


def test_masks_are_not_changed(source):
    refer = by_mask(source, rows_by_mask()).refer
    assert expressions(refer) == EXPECTED
    annotation = refer.Anns[2]
    left, top, right, bottom = BOXES[1]
    assert annotation["bbox"] == [left, top, right - left, bottom - top]
    assert annotation["area"] == expected_mask(1).sum()
    assert annotation["iscrowd"] == 0
    assert np.array_equal(decode_mask(annotation["segmentation"]), expected_mask(1))
    assert list(refer.Imgs) == list(range(1, 11))
    assert refer.Cats == {1: "object"}
    noise = np.random.default_rng(1).random((HEIGHT, WIDTH)) < 0.5
    Image.fromarray(noise).save(source / "masks" / "noise.png")
    row = {"image": file_name(3), "mask": "noise.png", "sentence": "dots"}
    refer = by_mask(source, [row], "noise", shares=ONLY_TRAIN).refer
    assert np.array_equal(refer.getMask(0)["mask"], noise)


def test_without_a_mask_column_masks_have_the_names_of_the_images(source):
    (source / "photos" / "a").mkdir()
    for i in (1, 2):
        shutil.copy(source / "photos" / file_name(i), source / "photos" / "a" / f"photo.{i}.jpg")
        (source / "masks" / "a").mkdir(exist_ok=True)
        Image.fromarray(expected_mask(i)).save(source / "masks" / "a" / f"photo.{i}.png")
    write(source / "sentences.tsv", "Image\tSentence\tsplit\na/photo.1.jpg\tone\ttrain\na/photo.2.jpg\ttwo\tval\n")
    refer = by_mask(source, sentences="sentences.tsv").refer
    assert expressions(refer) == [
        (f"a/photo.{i}.jpg", expected_mask(i).astype(np.uint8).tobytes(), text) for i, text in ((1, "one"), (2, "two"))
    ]
    assert refer.get_image_path(1).is_file()


def test_masks_have_the_categories_of_their_rows(source):
    rows = [{**row, "category": category} for row, category in zip(rows_by_mask([1]), ("", "cup", ""), strict=True)]
    refer = by_mask(source, rows, shares=ONLY_TRAIN).refer
    assert refer.Cats == {1: "cup", 2: "object"}
    assert [annotation["category_id"] for annotation in refer.data["annotations"]] == [1, 2]
    assert [ref["category_id"] for ref in refer.data["refs"]] == [1, 2]
    rows[2]["category"] = "cup"
    assert by_mask(source, rows, shares=ONLY_TRAIN, force=True).refer.Cats == {1: "cup"}
    rows[0]["category"] = "bowl"
    with pytest.raises(UserError, match=r"^sentences.csv:3: the category of the mask 1/0.png is cup, but bowl in an"):
        by_mask(source, rows, force=True)


def test_csv_tsv_and_jsonl_give_the_same_refs(source):
    rows = [{**row, "split": "val" if i % 9 < 3 else "train"} for i, row in enumerate(rows_by_id())]
    as_json = "".join(json.dumps(row) + "\n\n" for row in rows)
    with_image_ids = "".join(json.dumps({**row, "image": 1 + i // 3}) + "\n" for i, row in enumerate(rows))
    files = {
        "sentences.csv": table(rows),
        "bom.csv": b"\xef\xbb\xbf" + table(rows).replace("\n", "\r\n\r\n").encode(),
        "sentences.tsv": table(rows, "\t"),
        "sentences.jsonl": as_json,
        "ids.jsonl": with_image_ids,
    }
    refs = []
    for i, (name, content) in enumerate(files.items()):
        write(source / name, content)
        refer = by_id(source, name=f"set{i}", sentences=name).refer
        refs.append(contents(source / "data" / f"set{i}")["refs(unc).p"])
        assert expressions(refer) == EXPECTED, name
    assert len(set(refs)) == 1


@pytest.mark.parametrize(
    ("mode", "values"),
    [
        ("1", {0: 0, 1: 255}), ("L", {0: 0, 1: 1}), ("P", {0: 0, 1: 3}), ("I;16", {0: 0, 1: 256}),
        ("RGB", {0: (0, 0, 0), 1: (0, 0, 1)}), ("RGBA", {0: (0, 0, 0, 255), 1: (9, 0, 0, 0)}),
        ("LA", {0: (0, 255), 1: (1, 0)}),
    ],
)  # fmt: skip
def test_masks_may_have_any_png_mode(tmp_path, mode, values):
    image = Image.new(mode, (WIDTH, HEIGHT), values[0])
    if mode == "P":
        image.putpalette([10, 10, 10, 0, 0, 0] + [0] * 762)  # the indices count, not the colors
    for y, x in np.argwhere(expected_mask(0)).tolist():
        image.putpixel((x, y), values[1])
    image.save(tmp_path / "mask.png")
    assert np.array_equal(read_mask(tmp_path / "mask.png"), expected_mask(0))


def test_warnings_about_sentences_and_splits(source):
    rows = rows_by_id()
    assert by_id(source, rows, name="a").warnings == []
    rows = [{**row, "split": "train" if row["annotation_id"] % 10 else "val", "annotator": "x"} for row in rows]
    rows += [rows[0], {**rows[2], "sentence": "the first, one!"}, {**rows[3], "sentence": "w " * 20}]
    unused, repeated, leak, long, ambiguous = by_id(source, rows, name="b").warnings
    assert unused == "sentences.csv: unused columns: annotator."
    assert repeated == "repeated sentences of the same object: 1. Each is used once."
    assert leak.startswith(
        f"LEAK: images in train and in another split: 10, for example {file_name(1)} in val and train."
    )
    assert long.startswith("sentences with more than 19 words: 1, for example “w w")
    assert ambiguous.endswith(f"several objects of one image: 1, for example “the first one” in {file_name(1)}.")
    assert len(REFER("data", "b", "unc").Sents) == 32
    rows = [{**row, "split": "testA" if row["annotation_id"] % 10 else "testB"} for row in rows_by_id()]
    shared, no_train, no_val = by_id(source, rows, name="c").warnings
    assert shared.startswith("images in several evaluation splits: 10, for example")
    assert no_train.startswith("no split train: ")
    assert no_val.startswith("no split val: ")


def test_inverted_masks_are_reported(source):
    for path in (source / "masks").rglob("*.png"):
        mask = np.asarray(Image.open(path))
        Image.fromarray(mask == 0).save(path)
    assert by_mask(source, rows_by_mask(), name="inverted").warnings == [
        "masks that cover more than half of the image: 20 of 20. Is the background 0?"
    ]
    Image.fromarray(np.ones((HEIGHT, WIDTH), bool)).save(source / "masks/1/0.png")
    assert by_mask(source, rows_by_mask()).warnings == [
        "masks that cover the whole image: 1, for example 1/0.png. Is the background 0?"
    ]


def test_an_image_with_two_ids_or_names_is_one_image(source):
    rows = [{**row, "split": "train"} for row in rows_by_id()]
    instances = json.loads((source / "coco.json").read_text())
    instances["images"].append({**instances["images"][0], "id": 77})
    instances["annotations"][1]["image_id"] = 77
    (source / "coco.json").write_text(json.dumps(instances))
    two_ids = [{**row, "image": 1} if row["image"] == file_name(1) else row for row in rows]
    second = next(row for row in two_ids if row["annotation_id"] == instances["annotations"][1]["id"])
    second |= {"split": "val", "image": 77}
    (leak,) = by_id(source, two_ids).warnings
    assert leak.startswith(
        f"LEAK: images in train and in another split: 1, for example {file_name(1)} in train and val."
    )
    (source / "photos" / file_name(3)).write_bytes((source / "photos" / file_name(2)).read_bytes())
    rows = [row for row in rows if row["image"] not in (file_name(1), file_name(10))]
    two_names = [{**row, "split": "val"} if row["image"] == file_name(3) else row for row in rows]
    (leak,) = by_id(source, two_names, name="other").warnings
    assert f": 1, for example {file_name(2)} in train and {file_name(3)} in val (identical files)." in leak


def splits_by_image(refer):
    splits = {}
    for ref in refer.data["refs"]:
        name = refer.Imgs[ref["image_id"]]["file_name"]
        assert splits.setdefault(name, ref["split"]) == ref["split"], "an image is in one split only"
    return splits


def test_splits_are_assigned_by_image_and_stay_the_same(source):
    splits = splits_by_image(by_id(source, rows_by_id(), name="a").refer)
    assert set(splits.values()) == {"train", "val", "test"}
    assert splits_by_image(by_id(source, rows_by_id()[::-1], name="b").refer) == splits
    extended = splits_by_image(by_id(source, rows_by_id(range(1, 13)), name="c").refer)
    assert {name: extended[name] for name in splits} == splits, "additional images do not move the others"
    assert splits_by_image(by_mask(source, rows_by_mask()).refer) == splits, "independent of the kind of objects"
    other = by_id(source, rows_by_id(), name="d", shares=SplitShares(val=0.4, test=0.3, seed=5)).refer
    assert splits_by_image(other) != splits
    only_train = by_id(source, rows_by_id(), name="e", shares=ONLY_TRAIN).refer
    assert set(splits_by_image(only_train).values()) == {"train"}


def test_the_error_about_an_empty_split_suggests_another_seed(source):
    def error_of(name="mine", images=(1, 2, 3), seed=0):
        try:
            by_id(source, rows_by_id(images), name, shares=SplitShares(0.2, 0.2, seed), force=True)
        except UserError as error:
            return str(error)
        return ""

    bad = next(seed for seed in range(99) if error_of(seed=seed))
    message = error_of(seed=bad)
    assert message.startswith(f"--seed {bad} assigns none of the 3 images to ")
    better = int(message.split("Use --seed ")[1].split()[0])
    assert message.endswith(f"Use --seed {better} (1 train, 1 val, 1 test), or add a column split.")
    refer = by_id(source, force=True, shares=SplitShares(0.2, 0.2, better)).refer
    assert set(splits_by_image(refer).values()) == {"train", "val", "test"}
    assert error_of("few", (1, 2)).endswith("Add a column split, or change --val-share and --test-share.")


def test_splits_can_be_given_in_the_sentence_file(source):
    names = ["train", "val", "testA", "testB", "test-hard"]
    rows = [{**row, "split": names[i // 3 % 5]} for i, row in enumerate(rows_by_id())]
    refer = by_id(source, rows).refer
    assert refer.splits() == names
    assert set(splits_by_image(refer).values()) == set(names)
    assert len(refer.getRefIds(split="testA")) == 4
    assert len(refer.getRefIds(split="test")) == 12


def test_samples_are_the_expressions_with_the_given_indices(source):
    refer = by_id(source, rows_by_id()).refer
    for sample, index in zip(samples(refer, [0, 2, 29]), [0, 2, 29], strict=True):
        name, mask, text = EXPECTED[index]
        assert (sample.mask.astype(np.uint8).tobytes(), sample.sentence) == (mask, text)
        assert np.array_equal(sample.image, Image.open(source / "photos" / name))
        assert sample.note.endswith(name)


def test_refs_contain_only_plain_data(source):
    by_id(source, rows_by_id())

    class Plain(pickle.Unpickler):
        def find_class(self, module, name):
            raise AssertionError(f"{module}.{name}")

    with open("data/mine/refs(unc).p", "rb") as file:
        assert len(Plain(file).load()) == 20


def test_words_are_lowercase_and_without_punctuation():
    assert words("The LEFT candle-holder, at 12:00!") == ["the", "left", "candle", "holder", "at", "12", "00"]
    assert words("Bob’s and Ann's Äpfel") == ["bobs", "and", "anns", "äpfel"]


def test_images_in_the_coco_folder_are_not_copied(source):
    coco = Path("data") / COCO_IMAGES
    shutil.copytree(source / "photos", coco)
    write(source / "sentences.csv", table(rows_by_id()))
    files = Source(Path("sentences.csv"), source / coco, instances=Path("coco.json"))
    refer = convert("mine", files, SHARES, Path("data")).refer
    assert not (source / "data/mine/images").exists()
    assert refer.get_image_path(3) == coco / file_name(3)
    assert expressions(refer) == EXPECTED
