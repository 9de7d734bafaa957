"""A user's images, objects and sentences, which the tests pass to data.convert."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import run_in_process
from PIL import Image

from data.convert import __main__ as tool
from data.convert.dataset import Source, convert
from data.convert.splits import SplitShares

WIDTH, HEIGHT = 40, 30
IMAGES = 12  # the last two have no sentence
BOXES = (
    (2, 3, 12, 20),
    (18, 4, 30, 14),
    (5, 22, 35, 28),
)  # left, top, right, bottom; no sentence refers to the third box
TEXTS = (("Bob's red box, left", "the first one"), ("the box at the right",))
SHARES = SplitShares(val=0.2, test=0.2)
ONLY_TRAIN = SplitShares(val=0, test=0)


def file_name(image_id):
    return f"COCO_train2014_{image_id:012d}.jpg"


def annotation_id(image_id, box):
    return 10 * image_id + box


def expected_mask(box):
    left, top, right, bottom = BOXES[box]
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top:bottom, left:right] = True
    return mask


def rows_by_id(images=range(1, 11)):
    return [
        {"image": file_name(i), "annotation_id": annotation_id(i, box), "sentence": text}
        for i in images
        for box, texts in enumerate(TEXTS)
        for text in texts
    ]


def rows_by_mask(images=range(1, 11)):
    return [
        {"image": file_name(i), "mask": f"{i}/{box}.png", "sentence": text}
        for i in images
        for box, texts in enumerate(TEXTS)
        for text in texts
    ]


@pytest.fixture(scope="session")
def made_source(tmp_path_factory):
    source = tmp_path_factory.mktemp("own")
    (source / "photos").mkdir()
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(1, IMAGES + 1):
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(source / "photos" / file_name(i))
        images.append({"id": i, "file_name": file_name(i), "width": WIDTH, "height": HEIGHT, "license": 3})
        (source / "masks" / str(i)).mkdir(parents=True)
        for box, (left, top, right, bottom) in enumerate(BOXES):
            polygon = [left, top, right, top, right, bottom, left, bottom]
            annotations.append({
                "id": annotation_id(i, box), "image_id": i, "category_id": 7 + box, "segmentation": [polygon],
                "bbox": [left, top, right - left, bottom - top], "area": 1.5, "iscrowd": 0,
            })  # fmt: skip
            Image.fromarray(expected_mask(box)).save(source / "masks" / str(i) / f"{box}.png")
    categories = [{"id": 7 + box, "name": f"box {box}", "supercategory": "boxes"} for box in range(len(BOXES))]
    instances = {"images": images, "annotations": annotations, "categories": categories}
    (source / "coco.json").write_text(json.dumps(instances))
    return source


@pytest.fixture
def source(made_source, tmp_path, monkeypatch):
    """A copy of the user's files, which is the current folder."""
    folder = shutil.copytree(made_source, tmp_path / "own")
    monkeypatch.chdir(folder)
    return folder


def table(rows, delimiter=","):
    columns = list(rows[0])
    lines = [columns, *([row[column] for column in columns] for row in rows)]

    def cell(value):
        text = str(value)
        return '"' + text.replace('"', '""') + '"' if delimiter in text or '"' in text else text

    return "".join(delimiter.join(map(cell, line)) + "\n" for line in lines)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def by_id(source, rows=None, name="mine", sentences="sentences.csv", shares=SHARES, **options):
    """Convert rows that refer to annotations in coco.json."""
    if rows is not None:
        write(source / sentences, table(rows))
    files = Source(Path(sentences), Path("photos"), instances=Path("coco.json"))
    return convert(name, files, shares, Path("data"), **options)


def by_mask(source, rows=None, name="drawn", sentences="sentences.csv", shares=SHARES, **options):
    """Convert rows that refer to mask files."""
    if rows is not None:
        write(source / sentences, table(rows))
    files = Source(Path(sentences), Path("photos"), masks=Path("masks"))
    return convert(name, files, shares, Path("data"), **options)


def expressions(refer):
    """Return file name, mask and sentence of every expression, as read by REFER."""
    return [
        (refer.Imgs[ref["image_id"]]["file_name"], refer.getMask(ref)["mask"].tobytes(), sentence["raw"])
        for ref in refer.data["refs"]
        for sentence in ref["sentences"]
    ]


def run_main(monkeypatch, capsys, *flags):
    """Run `python -m data.convert` in this process."""
    return run_in_process(tool.main, ["convert", *flags], monkeypatch, capsys)
