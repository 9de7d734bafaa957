"""Write a split in the REFER layout: random images of 640×480 with rectangles as objects."""

import json
import pickle
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from bert.tokenization import SPECIAL_TOKENS, read_vocabulary
from data.dataset_refer_bert import ReferDataset
from data.pack.source import open_source
from refer.datasets import COCO_IMAGES
from refer.refer import REFER

WIDTH, HEIGHT = 640, 480
WORDS = ("the", "a", "left", "right", "red", "tall", "man", "dog", "cup", "near", "behind", "window", "in", "front")


class Size(NamedTuple):
    """Size of a generated split."""

    images: int
    refs: int
    expressions: int


REFCOCO_VAL = Size(1500, 3811, 10834)


def like_refcoco(images: int) -> Size:
    """Return the size of a split with as many refs per image and expressions per ref as RefCOCO val."""
    return Size(*(round(count * images / REFCOCO_VAL.images) for count in REFCOCO_VAL))


def write_set(root: Path, size: Size, seed: int = 0) -> None:
    """Write a split named val in the REFER layout under ``root``/refcoco, with its images and a vocabulary."""
    source = np.random.default_rng(seed)
    folder, image_folder = root / "refcoco", root / COCO_IMAGES
    folder.mkdir(parents=True)
    image_folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *WORDS]) + "\n", encoding="utf-8")
    images = [
        {"id": i, "file_name": f"COCO_train2014_{i:012d}.jpg", "width": WIDTH, "height": HEIGHT}
        for i in range(size.images)
    ]
    for image in images:
        coarse = Image.fromarray(source.integers(0, 256, (HEIGHT // 20, WIDTH // 20, 3), dtype=np.uint8))
        coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(image_folder / image["file_name"])
    annotations, refs, sentences = [], [], 0
    for number in range(size.refs):
        x, y = int(source.integers(0, WIDTH // 2)), int(source.integers(0, HEIGHT // 2))
        w, h = int(source.integers(20, WIDTH // 2)), int(source.integers(20, HEIGHT // 2))
        image_id = number * size.images // size.refs
        outline = [x, y, x + w, y, x + w, y + h, x, y + h]
        annotations.append(
            {
                "id": number,
                "image_id": image_id,
                "category_id": 1,
                "area": w * h,
                "bbox": [x, y, w, h],
                "segmentation": [outline],
            }
        )
        until = (number + 1) * size.expressions // size.refs
        texts = [" ".join(source.choice(WORDS, source.integers(1, 8)).tolist()) for _ in range(sentences, until)]
        refs.append(
            {
                "ref_id": number,
                "ann_id": number,
                "image_id": image_id,
                "category_id": 1,
                "split": "val",
                "file_name": images[image_id]["file_name"],
                "sent_ids": list(range(sentences, until)),
                "sentences": [
                    {"sent_id": sentences + k, "raw": t, "sent": t, "tokens": t.split()} for k, t in enumerate(texts)
                ],
            }
        )
        sentences = until
    categories = [{"id": 1, "name": "thing"}]
    instances = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(instances), encoding="utf-8")
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))


def open_set(root: Path, img_size: int, packed_file: str = "") -> ReferDataset:
    """Return the split that :func:`write_set` has written, with the images of ``packed_file`` if it is given."""
    refer, tokenizer = REFER(root), read_vocabulary(root / "refcoco" / "vocab.txt")
    source = open_source([packed_file], refer, "val", img_size)
    return ReferDataset(refer, "val", tokenizer, img_size=img_size, source=source)
