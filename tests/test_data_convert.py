"""Own data in the REFER layout: what is read back is what was given, and what is stopped leaves nothing half."""

import json
import pickle
import shutil

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
    expressions,
    file_name,
    rows_by_id,
    rows_by_mask,
    run_main,
    table,
    true_mask,
    write,
)
from PIL import Image

from data.convert import __main__ as tool
from data.convert.__main__ import convert
from data.convert.objects import read_mask
from data.convert.sentences import words
from lib.errors import UserError
from refer.datasets import COCO_IMAGES
from refer.masks import decode_mask
from refer.refer import REFER

EXPECTED = [
    (file_name(i), true_mask(box).astype(np.uint8).tobytes(), text)
    for i in range(1, 11)
    for box, texts in enumerate(TEXTS)
    for text in texts
]


def test_coco_objects_come_back_as_they_were(source):
    refer = by_id(source, rows_by_id()).refer
    assert expressions(refer) == EXPECTED
    again = REFER("data", "mine", "unc")
    assert again.data == refer.data
    given = json.loads((source / "coco.json").read_text())
    assert again.data["images"] == given["images"][:10]
    assert again.data["annotations"] == given["annotations"][:30], "also those of no ref"
    assert again.data["categories"] == given["categories"]
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
        original = source / "photos" / image["file_name"]
        assert again.get_image_path(image["id"]).read_bytes() == original.read_bytes()
    assert (source / "data/mine/refs(unc).p").read_bytes()[:2] == b"\x80\x02"


def test_masks_come_back_pixel_by_pixel(source):
    refer = by_mask(source, rows_by_mask()).refer
    assert expressions(refer) == EXPECTED
    annotation = refer.Anns[2]
    left, top, right, bottom = BOXES[1]
    assert annotation["bbox"] == [left, top, right - left, bottom - top]
    assert annotation["area"] == true_mask(1).sum()
    assert annotation["iscrowd"] == 0
    assert np.array_equal(decode_mask(annotation["segmentation"]), true_mask(1))
    assert list(refer.Imgs) == list(range(1, 11))
    assert refer.Cats == {1: "object"}


def test_any_mask_is_read_back_exactly(source):
    noise = np.random.default_rng(1).random((HEIGHT, WIDTH)) < 0.5
    Image.fromarray(noise).save(source / "masks" / "noise.png")
    refer = by_mask(source, [{"image": file_name(3), "mask": "noise.png", "sentence": "dots"}], val_share=0,
                    test_share=0).refer  # fmt: skip
    assert np.array_equal(refer.getMask(0)["mask"], noise)


def test_without_a_mask_column_the_masks_are_called_as_the_pictures(source):
    (source / "photos" / "a").mkdir()
    for i in (1, 2):
        shutil.copy(source / "photos" / file_name(i), source / "photos" / "a" / f"photo.{i}.jpg")
        (source / "masks" / "a").mkdir(exist_ok=True)
        Image.fromarray(true_mask(i)).save(source / "masks" / "a" / f"photo.{i}.png")
    write(source / "sentences.tsv", "Image\tSentence\tsplit\na/photo.1.jpg\tone\ttrain\na/photo.2.jpg\ttwo\tval\n")
    refer = by_mask(source, sentences="sentences.tsv").refer
    assert expressions(refer) == [
        (f"a/photo.{i}.jpg", true_mask(i).astype(np.uint8).tobytes(), text) for i, text in ((1, "one"), (2, "two"))
    ]
    assert refer.get_image_path(1).is_file()


def test_categories_of_masks(source):
    rows = [{**row, "category": category} for row, category in zip(rows_by_mask([1]), ("", "cup", ""), strict=True)]
    refer = by_mask(source, rows, **ONLY_TRAIN).refer
    assert refer.Cats == {1: "cup", 2: "object"}
    assert [annotation["category_id"] for annotation in refer.data["annotations"]] == [1, 2]
    assert [ref["category_id"] for ref in refer.data["refs"]] == [1, 2]
    rows[2]["category"] = "cup"
    assert by_mask(source, rows, **ONLY_TRAIN, force=True).refer.Cats == {1: "cup"}
    rows[0]["category"] = "bowl"
    with pytest.raises(UserError, match=r"^sentences.csv:3: another category of the mask 1/0.png"):
        by_mask(source, rows, force=True)


def test_csv_tsv_and_jsonl_mean_the_same(source):
    rows = [{**row, "split": "val" if i % 9 < 3 else "train"} for i, row in enumerate(rows_by_id())]
    as_json = "".join(json.dumps(row) + "\n\n" for row in rows)
    by_number = "".join(json.dumps({**row, "image": 1 + i // 3}) + "\n" for i, row in enumerate(rows))
    written = {
        "sentences.csv": table(rows),
        "bom.csv": b"\xef\xbb\xbf" + table(rows).replace("\n", "\r\n\r\n").encode(),
        "sentences.tsv": table(rows, "\t"),
        "sentences.jsonl": as_json,
        "numbers.jsonl": by_number,
    }
    sets = []
    for i, (name, content) in enumerate(written.items()):
        write(source / name, content)
        refer = by_id(source, name=f"set{i}", sentences=name).refer
        sets.append(contents(source / "data" / f"set{i}")["refs(unc).p"])
        assert expressions(refer) == EXPECTED, name
    assert len(set(sets)) == 1


@pytest.mark.parametrize(
    ("picture", "values"),
    [
        ("1", {0: 0, 1: 255}), ("L", {0: 0, 1: 1}), ("P", {0: 0, 1: 3}), ("I;16", {0: 0, 1: 256}),
        ("RGB", {0: (0, 0, 0), 1: (0, 0, 1)}), ("RGBA", {0: (0, 0, 0, 255), 1: (9, 0, 0, 0)}),
        ("LA", {0: (0, 255), 1: (1, 0)}),
    ],
)  # fmt: skip
def test_modes_of_masks(tmp_path, picture, values):
    image = Image.new(picture, (WIDTH, HEIGHT), values[0])
    if picture == "P":
        image.putpalette([10, 10, 10, 0, 0, 0] + [0] * 762)  # colours don't count, indices do
    for y, x in np.argwhere(true_mask(0)).tolist():
        image.putpixel((x, y), values[1])
    image.save(tmp_path / "mask.png")
    assert np.array_equal(read_mask(tmp_path / "mask.png", "here"), true_mask(0))


def test_warnings(source):
    rows = rows_by_id()
    assert by_id(source, rows, name="a").warnings == []
    more = [{**row, "split": "train" if i % 3 else "val", "annotator": "x"} for i, row in enumerate(rows)]
    for row in more:
        row["split"] = "train" if row["annotation_id"] % 10 else "val"
    more += [more[0], {**more[2], "sentence": "the first, one!"}, {**more[3], "sentence": "w " * 20}]
    warnings = by_id(source, more, name="b").warnings
    assert warnings[0] == "sentences.csv: not used: annotator"
    assert warnings[1] == "1 rows repeat a sentence about the same object and count once"
    assert warnings[2].startswith(f"LEAK: 10 pictures are in several splits, {file_name(1)} in val and train for one")
    assert warnings[3].startswith("1 sentences have more than 19 words")
    assert warnings[4].startswith(
        f"1 sentences are about several objects of one picture, “the first one” in {file_name(1)}"
    )
    assert len(warnings) == 5
    assert len(REFER("data", "b", "unc").Sents) == 32
    rows = [{**row, "split": "testA" if row["annotation_id"] % 10 else "testB"} for row in rows]
    warnings = by_id(source, rows, name="c").warnings
    assert [w[:12] for w in warnings] == ["10 pictures ", "no split tra", "no split val"]
    assert warnings[0].endswith("none of them in train")
    for path in (source / "masks").rglob("*.png"):
        mask = np.asarray(Image.open(path))
        Image.fromarray(mask == 0).save(path)
    assert by_mask(source, rows_by_mask(), name="inverted").warnings == [
        "20 of 20 masks cover more than half of their picture: is 0 outside?"
    ]
    Image.fromarray(np.ones((HEIGHT, WIDTH), bool)).save(source / "masks/1/0.png")
    assert by_mask(source, rows_by_mask()).warnings == [
        "1 masks cover their whole picture, 1/0.png for one: is 0 outside?"
    ]


def test_one_picture_by_two_ids_or_names_is_one(source):
    rows = [{**row, "split": "train"} for row in rows_by_id()]
    instances = json.loads((source / "coco.json").read_text())
    instances["images"].append({**instances["images"][0], "id": 77})
    instances["annotations"][1]["image_id"] = 77
    (source / "coco.json").write_text(json.dumps(instances))
    two = [{**row, "image": 1} if row["image"] == file_name(1) else row for row in rows]
    second = next(row for row in two if row["annotation_id"] == instances["annotations"][1]["id"])
    second |= {"split": "val", "image": 77}
    (leak,) = by_id(source, two).warnings
    assert leak.startswith(f"LEAK: 1 pictures are in several splits, {file_name(1)} in train and val for one: ")
    (source / "photos" / file_name(3)).write_bytes((source / "photos" / file_name(2)).read_bytes())
    copied = [
        {**row, "split": "val"} if row["image"] == file_name(3) else row for row in rows if "1" not in row["image"][-6:]
    ]
    (leak,) = by_id(source, copied, name="other").warnings
    expected = f"the content of {file_name(2)} in train as {file_name(2)} and val as {file_name(3)} for one: "
    assert leak.startswith(f"LEAK: 1 pictures are in several splits, {expected}")


def splits_by_picture(refer):
    found = {}
    for ref in refer.data["refs"]:
        found.setdefault(refer.Imgs[ref["image_id"]]["file_name"], set()).add(ref["split"])
    assert all(len(splits) == 1 for splits in found.values()), "a picture is in one split only"
    return {name: splits.pop() for name, splits in found.items()}


def test_splits_are_drawn_by_picture_and_stay(source):
    all_of_them = splits_by_picture(by_id(source, rows_by_id(), name="a").refer)
    assert set(all_of_them.values()) == {"train", "val", "test"}
    backwards = splits_by_picture(by_id(source, rows_by_id()[::-1], name="b").refer)
    assert backwards == all_of_them
    more = splits_by_picture(by_id(source, rows_by_id(range(1, 13)), name="c").refer)
    assert {name: more[name] for name in all_of_them} == all_of_them, "more pictures move none"
    drawn = splits_by_picture(by_mask(source, rows_by_mask()).refer)
    assert drawn == all_of_them, "the same however the objects are given"
    other = splits_by_picture(by_id(source, rows_by_id(), name="d", seed=5, val_share=0.4, test_share=0.3).refer)
    assert other != all_of_them
    none = splits_by_picture(by_id(source, rows_by_id(), name="e", **ONLY_TRAIN).refer)
    assert set(none.values()) == {"train"}


def test_an_empty_split_is_told_with_a_seed_that_has_none(source):
    empty = next(
        seed for seed in range(99) if told_by(lambda seed=seed: by_id(source, rows_by_id([1, 2, 3]), seed=seed))
    )
    told = told_by(lambda: by_id(source, rows_by_id([1, 2, 3]), seed=empty))
    assert "of 3 pictures none falls into" in told
    better = int(told.split("; --seed ")[1].split()[0])
    assert f"--seed {better} gives 1 train, 1 val, 1 test" in told
    assert set(splits_by_picture(by_id(source, seed=better).refer).values()) == {"train", "val", "test"}
    told = told_by(lambda: by_id(source, rows_by_id([1, 2]), name="few"))
    assert told.endswith("add a column split, or set --val-share and --test-share")


def told_by(function):
    try:
        function()
    except UserError as error:
        return str(error)
    return ""


def test_splits_of_the_file(source):
    names = ["train", "val", "testA", "testB", "test-hard"]
    rows = [{**row, "split": names[i // 3 % 5]} for i, row in enumerate(rows_by_id())]
    refer = by_id(source, rows).refer
    assert refer.splits() == names
    assert set(splits_by_picture(refer).values()) == set(names)
    assert len(refer.getRefIds(split="testA")) == 4
    assert len(refer.getRefIds(split="test")) == 12


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"name": "refcoco"}, "--name refcoco: that folder is for a published dataset"),
        ({"name": "images"}, "--name images: that folder is for COCO's pictures"),
        ({"name": "a/b"}, "--name 'a/b': use letters"),
        ({"name": ".hidden"}, "--name '.hidden': use letters"),
        ({"name": "a,b"}, "--name 'a,b': use letters"),
        ({"split_by": "a/b"}, "--splitBy 'a/b': use letters"),
        ({"masks": "masks"}, "say with --instances FILE or with --masks DIR"),
        ({"instances": None}, "say with --instances FILE or with --masks DIR"),
        ({"images": "nowhere"}, "--images nowhere: no such folder"),
        ({"instances": None, "masks": "nowhere"}, "--masks nowhere: no such folder"),
        ({"instances": "nowhere.json"}, "nowhere.json is missing"),
        ({"sentences": "nowhere.csv"}, "--sentences nowhere.csv: No such file"),
        ({"sentences": "coco.json"}, "--sentences coco.json: its name must end in .csv, .tsv, .jsonl"),
        ({"val_share": 0.6, "test_share": 0.4}, "--val-share 0.6 and --test-share 0.4: shares of 1"),
        ({"val_share": float("nan")}, "--val-share nan and"),
    ],
)  # fmt: skip
def test_mistakes_of_flags(source, changes, told):
    write(source / "sentences.csv", table(rows_by_id()))
    given = {"name": "mine", "sentences": "sentences.csv", "images": "photos", "instances": "coco.json"}
    with pytest.raises(UserError) as caught:
        convert(data_root="data", **{**given, **changes})
    assert str(caught.value).startswith(told)


def test_samples_are_the_expressions(source):
    refer = by_id(source, rows_by_id()).refer
    for (picture, mask, sentence, note), index in zip(tool.samples(refer, [0, 2, 29]), [0, 2, 29], strict=True):
        name, expected, text = EXPECTED[index]
        assert (mask.astype(np.uint8).tobytes(), sentence) == (expected, text)
        assert np.array_equal(picture, Image.open(source / "photos" / name))
        assert note.endswith(name)


def test_command_line(source, monkeypatch, capsys):
    write(source / "sentences.csv", table(rows_by_id()))
    flags = ["--name", "mine", "--sentences", "sentences.csv", "--images", "photos", "--refer_data_root", "data",
             "--val-share", 0.2, "--test-share", 0.2]  # fmt: skip
    status, out, err = run_main(
        monkeypatch, capsys, *flags, "--instances", "coco.json", "--splitBy", "own", "--samples", 3
    )
    assert (status, err.count("warning")) == (0, 0)
    counts = {line.split()[0]: line.split()[1:] for line in out.splitlines()[:4]}
    assert counts["split"] == ["refs", "expressions", "images"]
    assert np.sum([list(map(int, counts[split])) for split in ("train", "val", "test")], axis=0).tolist() == [
        20,
        30,
        10,
    ]
    with Image.open("data/mine/samples.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 1000
    near = (np.abs(pixels.astype(int) - (0, 158, 115)).max(axis=1) < 25).sum()
    assert near > 2000, "masks in the truth's colour; the tags above them have 675 pixels"
    commands = [line.strip() for line in out.splitlines() if line.startswith("    python")]
    common = "--dataset mine --splitBy own --refer_data_root data"
    assert commands == [
        f"python -m refer.stats {common}",
        f"python train.py {common} --model_id mine",
        f"python test.py {common} --split all --resume ./checkpoints/mine/best.pth",
    ]
    sheet = ["--sheet", "sheets/own.png", "--samples", "2", "--force"]
    status, out, _ = run_main(monkeypatch, capsys, *flags, "--masks", "masks", *sheet)
    assert status == 2
    write(source / "sentences.csv", table(rows_by_mask()))
    status, out, _ = run_main(monkeypatch, capsys, *flags, "--masks", "masks", *sheet)
    assert status == 0
    assert "sheets/own.png" in out
    assert not (source / "data/mine/samples.png").exists()
    with Image.open("sheets/own.png") as small:
        assert small.size[0] > 300
    status, out, _ = run_main(monkeypatch, capsys, *flags, "--masks", "masks", "--samples", "0", "--force")
    assert status == 0
    assert "look at" not in out


TAKES = ["--name", "x", "--sentences", "s.csv", "--images", "photos", "--masks", "masks"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--nane", "x"], "error: unknown flag --nane. Did you mean --name?"),
        (["--name", "x"], "error: --sentences is needed"),
        (["--name", "x", "--sentences", "s.csv", "--images", "i", "--samples", "-1"], "error: --samples -1: from 0"),
        (["--val-share", "x"], "error: argument --val-share: invalid float value: 'x'"),
        ([*TAKES, "--sheet", "coco.json"], "error: cannot write coco.json: the name must end in .png"),
        ([*TAKES, "--sheet", "masks/1/0.png"], "error: cannot write masks/1/0.png: it is one of the input files"),
        ([*TAKES, "--sheet", "x.png", "--samples", "0"], "error: --sheet x.png does nothing with --samples 0"),
    ],
)
def test_mistakes_are_told_in_one_line(source, monkeypatch, capsys, flags, told):
    status, _, err = run_main(monkeypatch, capsys, *flags)
    assert status == 2
    assert err.startswith(told)
    assert len(err.splitlines()) == 1


def test_the_refs_are_plain_data(source):
    by_id(source, rows_by_id())

    class Plain(pickle.Unpickler):
        def find_class(self, module, name):
            raise AssertionError(f"{module}.{name}")

    with open("data/mine/refs(unc).p", "rb") as file:
        assert len(Plain(file).load()) == 20


def test_words():
    assert words("The LEFT candle-holder, at 12:00!") == ["the", "left", "candle", "holder", "at", "12", "00"]
    assert words("Bob’s and Ann's Äpfel") == ["bobs", "and", "anns", "äpfel"]


def test_train_and_evaluate_on_own_data(source, small_config, refshapes_root, run_here):
    by_mask(source, rows_by_mask())
    vocabulary = refshapes_root / "refshapes" / "vocab.txt"
    common = ["--dataset", "drawn", "--refer_data_root", source / "data", "--bert_tokenizer", vocabulary]
    outputs = ["--output-dir", source / "checkpoints", "--log_dir", source / "models", "--model_id", "own"]
    run_here("train.py", "--cfg", small_config, *common, *outputs, "--steps", "3", "--print-freq", "1", check=True)
    logged = [json.loads(line) for line in (source / "models/own/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in logged if line["kind"] == "train"]
    assert len(losses) == 3
    assert np.isfinite(losses).all()
    best = source / "checkpoints/own/best.pth"
    done = run_here("test.py", *common, "--split", "all", "--resume", best, "--device", "cpu", "-j", "0", check=True)
    refer = REFER(source / "data", "drawn", "unc")
    for split in ("val", "test"):
        count = sum(len(refer.Refs[one]["sentences"]) for one in refer.getRefIds(split=split))
        (row,) = [line for line in done.out.splitlines() if line.split()[:1] == [split]][-1:]
        assert row.split()[-1] == str(count)


def test_pictures_in_the_coco_folder_stay_there(source):
    coco = source / "data" / COCO_IMAGES
    shutil.copytree(source / "photos", coco)
    write(source / "sentences.csv", table(rows_by_id()))
    refer = convert("mine", "sentences.csv", coco, instances="coco.json", data_root="data", **SHARES).refer
    assert not (source / "data/mine/images").exists()
    assert refer.get_image_path(3) == coco.relative_to(source) / file_name(3)
    assert expressions(refer) == EXPECTED
