"""Generate the annotation files of a training split."""

import json
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bert.tokenization import SPECIAL_TOKENS

WIDTH, HEIGHT = 640, 480
MEAN_POINTS = 26  # mean number of a polygon's points, about as in COCO
NEW_SENTENCES = 0.75  # fraction of sentences that are not repetitions, about as in RefCOCO


class Size(NamedTuple):
    """Size of a split."""

    images: int
    annotations: int
    refs: int
    expressions: int


# RefCOCO's train split. Its instances.json has 196,771 annotations for 19,994 images of all splits.
REFCOCO_TRAIN = Size(16994, 167247, 42404, 120624)


def generate_dataset(root: Path, size: Size, seed: int = 0) -> Path:
    """Write a dataset named refcoco with a train split and no images. Return the path of its vocabulary."""
    generator = np.random.default_rng(seed)
    folder = root / "refcoco"
    folder.mkdir(parents=True)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(generator.choice(letters, generator.integers(2, 9))) for _ in range(6000)]
    word_pieces = [*letters, *("##" + letter for letter in letters)]  # of the words that are not in the vocabulary
    vocabulary = dict.fromkeys([*SPECIAL_TOKENS, *word_pieces, *words[:5000]])
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    images = [
        {
            "id": i,
            "file_name": f"COCO_train2014_{i:012d}.jpg",
            "width": WIDTH,
            "height": HEIGHT,
            "license": 1,
            "coco_url": f"http://images.cocodataset.org/train2014/COCO_train2014_{i:012d}.jpg",
            "date_captured": "2013-11-15 02:41:42",
        }
        for i in range(size.images)
    ]
    annotations = [_annotation(i, i * size.images // size.annotations, generator) for i in range(size.annotations)]
    sentences = _sentences(words, size.expressions, generator)
    refs = []
    for i in range(size.refs):
        annotation = annotations[i * size.annotations // size.refs]
        sent_ids = range(i * size.expressions // size.refs, (i + 1) * size.expressions // size.refs)
        refs.append(
            {
                "ref_id": i,
                "ann_id": annotation["id"],
                "image_id": annotation["image_id"],
                "category_id": 1,
                "split": "train",
                "file_name": images[annotation["image_id"]]["file_name"],
                "sent_ids": list(sent_ids),
                "sentences": [
                    {"sent_id": k, "raw": sentences[k], "sent": sentences[k], "tokens": sentences[k].split()}
                    for k in sent_ids
                ],
            }
        )
    instances = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "instances.json").write_text(json.dumps(instances), encoding="utf-8")
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=0))
    return folder / "vocab.txt"


def _annotation(ann_id: int, image_id: int, generator: np.random.Generator) -> dict[str, Any]:
    center, radius = generator.uniform((0, 0), (WIDTH, HEIGHT)), generator.uniform(5, 120)
    angles = np.linspace(0, 2 * np.pi, generator.integers(5, 2 * MEAN_POINTS - 5), endpoint=False)
    polygon = center + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    polygon = np.clip(polygon, 0, (WIDTH, HEIGHT)).round(2)
    low, high = polygon.min(axis=0), polygon.max(axis=0)
    return {
        "id": ann_id,
        "image_id": image_id,
        "category_id": 1,
        "iscrowd": 0,
        "segmentation": [polygon.ravel().tolist()],
        "area": round(float(np.pi * radius**2), 4),
        "bbox": [*low.tolist(), *(high - low).tolist()],
    }


def _sentences(words: list[str], count: int, generator: np.random.Generator) -> list[str]:
    sentences: list[str] = []
    for _ in range(count):
        if sentences and generator.random() > NEW_SENTENCES:
            sentences.append(sentences[generator.integers(len(sentences))])
        else:
            length = min(1 + generator.poisson(2.5), 30)
            ranks = np.minimum(generator.geometric(0.005, length), len(words)) - 1  # a few words are frequent
            sentences.append(" ".join(words[rank] for rank in ranks))
    return sentences
