"""Small datasets for the tests of refer.stats.

Their images have 20 x 30 pixels (H x W). Every word is one token, plus [CLS] and [SEP].
"""

import json
import pickle

from refer.refer import REFER

H, W = 20, 30
SQUARE = [2, 2, 12, 2, 12, 12, 2, 12]  # 10 x 10 pixels
SHIFTED = [8, 8, 18, 8, 18, 18, 8, 18]  # overlaps SQUARE in 4 x 4 pixels
SMALL = [20, 2, 25, 2, 25, 7, 20, 7]  # 5 x 5 pixels, overlaps neither
RLE = {"size": [H, W], "counts": [0, 60, H * W - 60]}
TOKENS_22 = " ".join(["dog"] * 20)
TOKENS_21 = " ".join(["dog"] * 19)

# ann_id, image_id, split, sentences
REFS = [
    (102, 1, "val", ["a cat", "DOG"]),
    (101, 1, "train", ["dog", "the red dog", TOKENS_22]),
    (103, 2, "val", [TOKENS_22]),
    (103, 2, "val", [TOKENS_21]),  # another ref to the same object
    (104, 3, "testA", [" the  dog "]),
]
SEGMENTATIONS = {101: [SQUARE], 102: [SQUARE, SHIFTED], 103: [SMALL, SQUARE], 104: RLE}
AREAS = {101: 100, 102: 200, 103: 126.0, 104: None}  # stored; the masks have 100, 184, 125 and 60 pixels


def write_dataset(root, refs=REFS, dataset="refcoco", split_by="unc", segmentations=SEGMENTATIONS, areas=AREAS):
    """Write annotations with consecutive ref_ids and return their reader."""
    folder = root / dataset
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number, (ann_id, image_id, split, texts) in enumerate(refs):
        sentences = [{"sent_id": 100 * number + i, "raw": text, "sent": "x"} for i, text in enumerate(texts)]
        records.append(
            {"ref_id": number, "ann_id": ann_id, "image_id": image_id, "split": split, "sentences": sentences}
        )
    (folder / f"refs({split_by}).p").write_bytes(pickle.dumps(records, protocol=2))
    pairs = dict.fromkeys((ann_id, image_id) for ann_id, image_id, _, _ in refs)
    annotations = [
        {"id": ann, "image_id": image, "category_id": ann % 2, "segmentation": segmentations[ann], "area": areas[ann]}
        for ann, image in pairs
    ]
    images = [{"id": one, "width": W, "height": H, "file_name": f"{one}.jpg"} for one in {image for _, image in pairs}]
    categories = [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
    (folder / "instances.json").write_text(text)
    return REFER(root, dataset, split_by)


def count_tokens(sentences):
    return [len(sentence.split()) + 2 for sentence in sentences]
