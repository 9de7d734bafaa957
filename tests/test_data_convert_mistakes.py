"""Mistakes in the user's files are reported with file and line, and nothing is written."""

import json

import numpy as np
import pytest
from commands import contents
from own_data import HEIGHT, WIDTH, by_id, by_mask, expected_mask, file_name, rows_by_id, rows_by_mask, write
from PIL import Image

from lib.errors import UserError

HEADER = "image,annotation_id,sentence"
ONE = f"{file_name(1)},10"
CSV_MISTAKES = {  # content of the file, start of the message
    "missing column": (f"image,ann,sentence\n{ONE},a box", "s.csv:1: no column annotation_id. Found: image, ann"),
    "two missing": (f"image,ann\n{ONE}", "s.csv:1: no column annotation_id, sentence. Found: image, ann."),
    "misspelled split": (f"{HEADER},spilt\n{ONE},a box,val", "s.csv:1: unknown column spilt. Did you mean split?"),
    "column twice": (f"{HEADER},Image\n{ONE},a,b", "s.csv:1: the column image occurs twice."),
    "semicolons": (f"image;annotation_id;sentence\n{ONE};a box", "s.csv:1: the columns are separated by ';'."),
    "too many fields": (f"{HEADER}\n\n{ONE},a box, red", "s.csv:3: 4 fields, but the first line names 3 columns."),
    "too few fields": (f"{HEADER}\n{ONE}", "s.csv:2: 2 fields, but"),
    "quote not closed": (f'{HEADER}\n{ONE},"a box\n{ONE},b\n', "s.csv:2: unexpected end of data. Check the quotation"),
    "quote within": (f'{HEADER}\n{ONE},"a" box\n', "s.csv:2: ',' expected after '\"'"),
    "line break": (f'{HEADER}\n{ONE},a\n{ONE},"a\nbox"\n', "s.csv:3: unexpected end of data. Check the quotation"),
    "empty sentence": (f"{HEADER}\n{ONE},a box\n{ONE},  ", "s.csv:3: sentence is empty."),
    "no word": (f"{HEADER}\n{ONE},?!", "s.csv:2: the sentence '?!' contains no words."),
    "empty image": (f"{HEADER}\n,10,a box", "s.csv:2: image is empty."),
    "empty annotation": (f"{HEADER}\n{file_name(1)},,a box", "s.csv:2: annotation_id is empty."),
    "some annotations": (f"{HEADER}\n{ONE},a\n{file_name(1)},,a box", "s.csv:3: annotation_id is empty."),
    "long line": (f"{HEADER}\n{ONE},a{'b' * 1_000_000}", "s.csv:2: the line is longer than 1000000 bytes."),
    "long sentence": (f"{HEADER}\n{ONE},a{'b' * 30000}", "s.csv:2: the sentence is longer than 20000 characters."),
    "NUL": (f"{HEADER}\n{ONE},a\0", "s.csv:2: the line contains a NUL byte."),
    "UTF-16": (HEADER.encode("utf-16"), "s.csv:1: the line contains a NUL byte. Save the file as UTF-8 text."),
    "Latin-1": (f"{HEADER}\n{ONE},ä".encode("latin-1"), "s.csv:2: byte 36 is not UTF-8."),
    "unknown image": (f"{HEADER}\nx.jpg,10,a", "s.csv:2: coco.json has no image x.jpg. Its first image is COCO_train"),
    "unknown id": (f"{HEADER}\n99,10,a", "s.csv:2: coco.json has no image 99."),
    "unknown annotation": (f"{HEADER}\n1,5,a", "s.csv:2: coco.json has no annotation 5."),
    "annotation a float": (f"{HEADER}\n1,10.0,a", "s.csv:2: coco.json has no annotation 10.0."),
    "other image": (f"{HEADER}\n2,10,a", f"s.csv:2: annotation 10 belongs to image 1 ({file_name(1)}), not to image 2"),
    "unknown split": (f"{HEADER},split\n{ONE},a,validation", "s.csv:2: unknown split 'validation'. Did you mean val?"),
    "split by letter": (f"{HEADER},split\n{ONE},a,Bad", "s.csv:2: unknown split 'Bad'. Use train, val"),
    "split missing": (f"{HEADER},split\n{ONE},a,val\n{ONE},b,", "s.csv:3: split is empty."),
    "two splits": (f"{HEADER},split\n{ONE},a,val\n{ONE},b,train", "s.csv:3: the object is in split train here, but in"),
    "nothing": ("", "s.csv contains no sentences."),
    "header only": (f"{HEADER}\n", "s.csv contains no sentences."),
}  # fmt: skip
JSON_MISTAKES = {  # second line of the file, start of the message
    "{": "invalid JSON (",
    "[1]": "must be a JSON object, not list.",
    "[" * 15000: "invalid JSON (",
    '{"image": 1, "annotation_id": 10, "sentence": "a", "Image": 2}': "invalid JSON (key image occurs twice).",
    '{"image": 1, "annotation_id": 10, "sentence": {"a": 1}}': "sentence must be text, not dict.",
    '{"image": 1, "annotation_id": 10}': "no column sentence. Found: image, annotation_id",
    '{"image": 1, "annotation_id": 10, "sentence": ["a"]}': "sentence must be text, not list.",
    '{"image": 1, "annotation_id": 10.0, "sentence": "a"}': "annotation_id must be text, not float.",
    '{"image": true, "annotation_id": 10, "sentence": "a"}': "image must be text, not bool.",
    '{"image": 1, "annotation_id": 10, "sentence": null}': "sentence is empty.",
    '{"image": 1, "annotation_id": 10, "sentence": "\\ud800"}': "sentence contains a line break, a tab or another",
    '{"image": "a\\nb", "annotation_id": 10, "sentence": "a"}': "image contains a line break",
    '{"image": 1, "annotation_id": 10, "sent\\nence": "a"}': "no column sentence. Found: image",
    '{"image": 1, "annotation_id": 10, "sentence": "b", "splits": "val"}': "unknown column splits. Did you mean split?",
}


@pytest.mark.parametrize("mistake", CSV_MISTAKES)
def test_mistakes_in_csv(source, mistake):
    content, message = CSV_MISTAKES[mistake]
    write(source / "s.csv", content)
    with pytest.raises(UserError) as caught:
        by_id(source, sentences="s.csv")
    assert str(caught.value).startswith(message)
    assert contents(source / "data") == {}
    assert list((source / "data").iterdir()) == []


@pytest.mark.parametrize("line", JSON_MISTAKES, ids=[line[-40:] for line in JSON_MISTAKES])
def test_mistakes_in_jsonl(source, line):
    write(source / "s.jsonl", '{"image": 1, "annotation_id": 10, "sentence": "a"}\n' + line + "\n")
    with pytest.raises(UserError) as caught:
        by_id(source, sentences="s.jsonl")
    assert str(caught.value).startswith(f"s.jsonl:2: {JSON_MISTAKES[line]}")
    assert "\n" not in str(caught.value)


def delete_image(source):
    (source / "photos" / file_name(1)).unlink()


def truncate_image(source):
    path = source / "photos" / file_name(1)
    path.write_bytes(path.read_bytes()[:-300])


def write_16_bit_image(source):
    Image.fromarray(np.full((HEIGHT, WIDTH), 999, np.uint16)).save(source / "photos" / file_name(1), "PNG")


def write_mask(image, file_format="PNG"):
    return lambda source: image.save(source / "masks/1/0.png", file_format)


EMPTY_MASK = Image.fromarray(np.zeros((HEIGHT, WIDTH), bool))
WIDER_MASK = Image.fromarray(np.ones((HEIGHT, WIDTH + 1), bool))
GRAY_MASK = Image.new("L", (WIDTH, HEIGHT), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (delete_image, f"No such image: photos/{file_name(1)}."),
        (truncate_image, f"Cannot decode image photos/{file_name(1)}: image file is truncated"),
        (write_16_bit_image, f"photos/{file_name(1)} is a 16-bit image (mode I;16). Convert it to 8 bits per channel."),
        (write_mask(EMPTY_MASK), "the mask masks/1/0.png is empty"),
        (write_mask(WIDER_MASK), f"the mask masks/1/0.png is 41×30, but the image {file_name(1)} is 40×30."),
        (
            lambda source: (source / "masks/1/0.png").write_bytes(b"P5"),
            "Cannot decode mask masks/1/0.png: it is not a PNG",
        ),
        (write_mask(GRAY_MASK, "JPEG"), "Cannot decode mask masks/1/0.png: it is not a PNG file."),
    ],
)
def test_mistakes_in_images_and_masks(source, change, message):
    change(source)
    with pytest.raises(UserError) as caught:
        by_mask(source, [*rows_by_mask([2]), rows_by_mask([1])[0]])
    place, text = str(caught.value).split(": ", 1)
    assert place == "sentences.csv:5"
    assert message in text
    assert list((source / "data").iterdir()) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"mask": "x.png"}, "No such mask: masks/x.png."),
        ({"mask": "../masks/1/0.png"}, "mask '../masks/1/0.png' is not a file below masks."),
        ({"image": "/etc/a.jpg"}, "image '/etc/a.jpg' is not a file below photos."),
        ({"image": "a\\b.jpg"}, "image 'a\\\\b.jpg' is not a file below photos. Separate folders by /."),
        ({"mask": ""}, "mask is empty."),
    ],
)
def test_invalid_file_names(source, row, message):
    with pytest.raises(UserError) as caught:
        by_mask(source, [*rows_by_mask([2]), {**rows_by_mask([1])[0], **row}])
    assert str(caught.value) == f"sentences.csv:5: {message}"
    assert list((source / "data").iterdir()) == []


def two_identical_polygons(coco):
    coco["annotations"][0]["segmentation"] *= 2


COCO_MISTAKES = [
    (lambda coco: coco["images"][1].update(width=41),
     f"sentences.csv:5: image 2 in coco.json is 41×30, but the image {file_name(2)} is 40×30."),
    (lambda coco: coco["annotations"][3].update(segmentation=[[1, 2]]),
     "sentences.csv:5: annotation 20 of coco.json: "),
    (lambda coco: coco["annotations"][4].update(segmentation=[[0.1, 0.1, 0.2, 0.1, 0.2, 0.2]]),
     "sentences.csv:7: annotation 21 of coco.json: the mask is empty."),
    (two_identical_polygons, "sentences.csv:2: annotation 10 of coco.json: the mask is empty."),
    (lambda coco: coco["images"].append({**coco["images"][0], "id": 77}),
     f"sentences.csv:2: coco.json has 2 images {file_name(1)}."),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), COCO_MISTAKES, ids=[message[:60] for _, message in COCO_MISTAKES])
def test_mistakes_in_coco_annotations(source, change, message):
    coco = json.loads((source / "coco.json").read_text())
    change(coco)
    (source / "coco.json").write_text(json.dumps(coco))
    with pytest.raises(UserError) as caught:
        by_id(source, rows_by_id())
    assert str(caught.value).startswith(message)


def test_an_exif_orientation_is_reported(source):
    path = source / "photos" / file_name(1)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path, exif=exif)
    (warning,) = by_mask(source, rows_by_mask(), name="stored").warnings
    assert warning.startswith(f"images with an EXIF orientation, which is ignored: 1, for example {file_name(1)}.")
    Image.fromarray(expected_mask(0).T.copy()).save(source / "masks/1/0.png")
    with pytest.raises(UserError, match=r"sentences.csv:2: the mask masks/1/0.png is 30×40, .* is 40×30 as stored"):
        by_mask(source)
