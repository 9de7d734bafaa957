"""Mistakes in one's own data are named with file and line, and leave nothing behind."""

import json

import numpy as np
import pytest
from commands import contents
from own_data import HEIGHT, WIDTH, by_id, by_mask, file_name, rows_by_id, rows_by_mask, true_mask, write
from PIL import Image

from lib.errors import UserError

HEADER = "image,annotation_id,sentence"
ONE = f"{file_name(1)},10"
COCO_MISTAKES = {  # what the file says, what is told
    "missing column": (f"image,ann,sentence\n{ONE},a box", "s.csv:1: no column annotation_id; found image, ann"),
    "two missing": (f"image,ann\n{ONE}", "s.csv:1: no column sentence, annotation_id; found image, ann"),
    "misspelt split": (f"{HEADER},spilt\n{ONE},a box,val", "s.csv:1: unknown column spilt; did you mean split?"),
    "column twice": (f"{HEADER},Image\n{ONE},a,b", "s.csv:1: column image is there twice"),
    "semicolons": (f"image;annotation_id;sentence\n{ONE};a box", "s.csv:1: columns are divided by ';' here"),
    "too many fields": (f"{HEADER}\n\n{ONE},a box, red", "s.csv:3: 4 fields where the first line names 3 columns"),
    "too few fields": (f"{HEADER}\n{ONE}", "s.csv:2: 2 fields where"),
    "quote not closed": (f'{HEADER}\n{ONE},"a box\n{ONE},b\n', "s.csv:2: unexpected end of data; look at"),
    "quote within": (f'{HEADER}\n{ONE},"a" box\n', "s.csv:2: ',' expected after '\"'"),
    "line break": (f'{HEADER}\n{ONE},a\n{ONE},"a\nbox"\n', "s.csv:3: a line break within quotation marks"),
    "empty sentence": (f"{HEADER}\n{ONE},a box\n{ONE},  ", "s.csv:3: sentence is empty"),
    "no word": (f"{HEADER}\n{ONE},?!", "s.csv:2: no word in sentence '?!'"),
    "empty image": (f"{HEADER}\n,10,a box", "s.csv:2: image is empty"),
    "empty annotation": (f"{HEADER}\n{file_name(1)},,a box", "s.csv:2: annotation_id is empty"),
    "some annotations": (f"{HEADER}\n{ONE},a\n{file_name(1)},,a box", "s.csv:3: annotation_id is empty, but other"),
    "longer line": (f"{HEADER}\n{ONE},a{'b' * 1_000_000}", "s.csv:2: longer than 1000000 bytes"),
    "long line": (f"{HEADER}\n{ONE},a{'b' * 30000}", "s.csv:2: longer than 20000 letters"),
    "NUL": (f"{HEADER}\n{ONE},a\0", "s.csv:2: a NUL byte"),
    "UTF-16": (HEADER.encode("utf-16"), "s.csv:1: a NUL byte, so this isn't text in UTF-8"),
    "Latin-1": (f"{HEADER}\n{ONE},ä".encode("latin-1"), "s.csv:2: byte 36 isn't UTF-8"),
    "unknown image": (f"{HEADER}\nx.jpg,10,a", "s.csv:2: no image x.jpg in coco.json, whose first is 1 ("),
    "unknown id": (f"{HEADER}\n99,10,a", "s.csv:2: no image 99 in coco.json"),
    "unknown annotation": (f"{HEADER}\n1,5,a", "s.csv:2: no annotation 5 in coco.json"),
    "annotation a float": (f"{HEADER}\n1,10.0,a", "s.csv:2: no annotation 10.0 in coco.json"),
    "other image": (f"{HEADER}\n2,10,a", f"s.csv:2: annotation 10 is on image 1 ({file_name(1)}), not on 2"),
    "unknown split": (f"{HEADER},split\n{ONE},a,validation", "s.csv:2: unknown split 'validation'; did you mean val?"),
    "split by letter": (f"{HEADER},split\n{ONE},a,Bad", "s.csv:2: unknown split 'Bad'"),
    "split missing": (f"{HEADER},split\n{ONE},a,val\n{ONE},b,", "s.csv:3: split is empty, but other rows have one"),
    "two splits": (f"{HEADER},split\n{ONE},a,val\n{ONE},b,train", "s.csv:3: split train, but the same object"),
    "nothing": ("", "s.csv: no sentence in it"),
    "header only": (f"{HEADER}\n", "s.csv: no sentence in it"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", list(COCO_MISTAKES))
def test_a_mistake_is_named_with_its_line(source, mistake):
    content, told = COCO_MISTAKES[mistake]
    write(source / "s.csv", content)
    with pytest.raises(UserError) as caught:
        by_id(source, sentences="s.csv")
    assert str(caught.value).startswith(told)
    assert contents(source / "data") == {}
    assert list((source / "data").iterdir()) == []


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "s.jsonl:2: not JSON ("),
        ("[1]", "s.jsonl:2: should be an object with keys, is list"),
        ("[" * 15000, "s.jsonl:2: not JSON ("),
        ('{"image": 1, "annotation_id": 10, "sentence": "a", "Image": 2}', "s.jsonl:2: key image is there twice"),
        ('{"image": 1, "annotation_id": 10, "sentence": {"a": 1}}', "s.jsonl:2: sentence should be text, is dict"),
        ('{"image": 1, "annotation_id": 10}', "s.jsonl:2: no column sentence; found image, annotation_id"),
        ('{"image": 1, "annotation_id": 10, "sentence": ["a"]}', "s.jsonl:2: sentence should be text, is list"),
        ('{"image": 1, "annotation_id": 10.0, "sentence": "a"}', "s.jsonl:2: annotation_id should be text, is float"),
        ('{"image": true, "annotation_id": 10, "sentence": "a"}', "s.jsonl:2: image should be text, is bool"),
        ('{"image": 1, "annotation_id": 10, "sentence": null}', "s.jsonl:2: sentence is empty"),
        ('{"image": 1, "annotation_id": 10, "sentence": "\\ud800"}', "s.jsonl:2: sentence holds a line"),
        ('{"image": "a\\nb", "annotation_id": 10, "sentence": "a"}', "s.jsonl:2: image holds a line break"),
        ('{"image": 1, "annotation_id": 10, "sent\\nence": "a"}', "s.jsonl:2: no column sentence; found image"),
        ('{"image": 1, "annotation_id": 10, "sentence": "b", "splits": "val"}', "s.jsonl:2: unknown column splits"),
    ],
)  # fmt: skip
def test_a_mistake_in_jsonl_is_named_with_its_line(source, line, told):
    write(source / "s.jsonl", '{"image": 1, "annotation_id": 10, "sentence": "a"}\n' + line + "\n")
    with pytest.raises(UserError) as caught:
        by_id(source, sentences="s.jsonl")
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)


def spoil_picture(source):
    path = source / "photos" / file_name(1)
    path.write_bytes(path.read_bytes()[:-300])


def spoil_mask(mask, name="1/0.png"):
    return lambda source: Image.fromarray(mask).save(source / "masks" / name)


@pytest.mark.parametrize(
    ("spoil", "row", "told"),
    [
        (lambda source: (source / "photos" / file_name(1)).unlink(), {}, f"no picture photos/{file_name(1)}"),
        (spoil_picture, {}, f"the picture photos/{file_name(1)} can't be decoded: image file is truncated"),
        (
            lambda source: Image.fromarray(np.full((HEIGHT, WIDTH), 999, np.uint16)).save(
                source / "photos" / file_name(1), "PNG"
            ),
            {},
            f"photos/{file_name(1)} is a 16-bit image (mode I;16). Convert it to 8 bits per channel.",
        ),
        (spoil_mask(np.zeros((HEIGHT, WIDTH), bool)), {}, "the mask masks/1/0.png is empty"),
        (spoil_mask(np.ones((HEIGHT, WIDTH + 1), bool)), {}, "the mask masks/1/0.png is 41×30, the picture"),
        (lambda source: (source / "masks/1/0.png").write_bytes(b"P5"), {}, "the mask masks/1/0.png isn't a PNG"),
        (lambda source: Image.new("L", (WIDTH, HEIGHT), 1).save(source / "masks/1/0.png", "JPEG"), {}, "the mask"),
        (lambda source: None, {"mask": "x.png"}, "no mask masks/x.png"),
        (lambda source: None, {"mask": "../masks/1/0.png"}, "mask '../masks/1/0.png' is not a file below masks"),
        (lambda source: None, {"image": "/etc/a.jpg"}, "image '/etc/a.jpg' is not a file below photos"),
        (lambda source: None, {"image": "a\\b.jpg"}, "image 'a\\\\b.jpg' is not a file below photos; write /"),
        (lambda source: None, {"mask": ""}, "mask is empty, but other rows have one"),
    ],
)  # fmt: skip
def test_a_mistake_of_a_picture_or_mask_is_named_with_its_line(source, spoil, row, told):
    spoil(source)
    rows = [*rows_by_mask([2]), {**rows_by_mask([1])[0], **row}]
    with pytest.raises(UserError) as caught:
        by_mask(source, rows)
    assert str(caught.value).startswith(f"sentences.csv:5: {told}")
    assert list((source / "data").iterdir()) == []


def test_coco_instances_that_do_not_fit(source):
    instances = json.loads((source / "coco.json").read_text())

    def told(change):
        spoilt = json.loads(json.dumps(instances))
        change(spoilt)
        (source / "coco.json").write_text(json.dumps(spoilt))
        with pytest.raises(UserError) as caught:
            by_id(source, rows_by_id())
        return str(caught.value)

    assert told(lambda one: one["images"][1].update(width=41)).startswith(
        f"sentences.csv:5: image 2 of coco.json is 41×30, the picture {file_name(2)} is 40×30"
    )
    assert told(lambda one: one["annotations"][3].update(segmentation=[[1, 2]])).startswith(
        "sentences.csv:5: annotation 20 of coco.json: a polygon must be"
    )
    assert told(lambda one: one["annotations"][4].update(segmentation=[[0.1, 0.1, 0.2, 0.1, 0.2, 0.2]])).startswith(
        "sentences.csv:7: annotation 21 of coco.json: its mask is empty"
    )
    twice = [instances["annotations"][0]["segmentation"][0]] * 2
    assert told(lambda one: one["annotations"][0].update(segmentation=twice)).startswith(
        "sentences.csv:2: annotation 10 of coco.json: its mask is empty"
    )
    assert told(lambda one: one["images"].append({**one["images"][0], "id": 77})).startswith(
        f"sentences.csv:2: 2 images {file_name(1)} in coco.json"
    )


def test_a_turned_picture_is_told(source):
    path = source / "photos" / file_name(1)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path, exif=exif)
    given = by_mask(source, rows_by_mask(), name="stored")
    assert [w for w in given.warnings if "1 pictures have an EXIF orientation, " + file_name(1) in w]
    Image.fromarray(true_mask(0).T.copy()).save(source / "masks/1/0.png")
    with pytest.raises(
        UserError, match=r"sentences.csv:2: the mask masks/1/0.png is 30×40, .* is 40×30 as it is stored"
    ):
        by_mask(source)
