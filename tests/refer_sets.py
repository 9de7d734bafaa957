"""A small dataset for tests: five refs on three images of 20 x 30 pixels (H x W), and ways to modify it."""

import copy
import json
import pickle
import struct

import numpy as np

from refer.refer import REFER

H, W = 20, 30
SQUARE = [2, 2, 12, 2, 12, 12, 2, 12]  # 10 x 10 pixels
SHIFTED = [8, 8, 18, 8, 18, 18, 8, 18]  # overlaps SQUARE in 4 x 4 of them
HUGE = 10**400


def make_refs():
    """Return five refs. The order in the file is not the order of the ids."""
    rows = [  # ref_id, ann_id, image_id, split
        (50, 105, 1, "train"),
        (10, 101, 1, "val"),
        (40, 104, 2, "testA"),
        (20, 102, 2, "testB"),
        (30, 103, 3, "train"),
    ]
    return [
        {
            "ref_id": ref_id,
            "ann_id": ann_id,
            "image_id": image_id,
            "category_id": 99,
            "split": split,
            "file_name": f"COCO_train2014_{image_id}_{ref_id}.jpg",
            "sent_ids": [ref_id * 10, ref_id * 10 + 1],
            "sentences": [
                {
                    "sent_id": ref_id * 10 + k,
                    "raw": f"Naïve dog {k}",
                    "sent": f"naive dog {k}",
                    "tokens": ["naive", "dog", str(k)],
                }
                for k in range(2)
            ],
        }
        for ref_id, ann_id, image_id, split in rows
    ]


def make_instances():
    images = [
        {"id": image_id, "width": W, "height": H, "file_name": f"COCO_train2014_{image_id:012d}.jpg"}
        for image_id in (3, 1, 2)
    ]
    image_of = {105: 1, 101: 1, 104: 2, 102: 2, 103: 3, 106: 3}
    annotations = [
        {
            "id": ann_id,
            "image_id": image_id,
            "category_id": 2 if ann_id % 2 else 1,
            "area": 100.0,
            "bbox": [2.0, 2, 10, 10.5],
            "segmentation": [SQUARE],
        }
        for ann_id, image_id in image_of.items()
    ]
    categories = [{"id": 2, "name": "dog"}, {"id": 1, "name": "person"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def write(root, refs=None, instances=None, dataset="refcoco", splitBy="unc"):
    """Write the two files of a dataset and return their paths. Bytes are written unchanged."""
    folder = root / dataset
    folder.mkdir(exist_ok=True)
    refs_path, instances_path = folder / f"refs({splitBy}).p", folder / "instances.json"
    refs = make_refs() if refs is None else refs
    instances = make_instances() if instances is None else instances
    refs_path.write_bytes(refs if isinstance(refs, bytes) else pickle.dumps(refs, protocol=2))
    instances_path.write_bytes(instances if isinstance(instances, bytes) else json.dumps(instances).encode())
    return refs_path, instances_path


def with_segmentation(root, segmentation):
    """Write and open a dataset in which the object of ref 50 has this segmentation."""
    instances = make_instances()
    instances["annotations"][0]["segmentation"] = segmentation
    write(root, instances=instances)
    return REFER(root)


def edited(value, *path):
    """Return a copy of nested lists and dicts with one change.

    Args:
        path: keys of the containers, the key to change, and its new value or DELETE.
    """
    value = copy.deepcopy(value)
    *outer_keys, key, new = path
    container = value
    for outer_key in outer_keys:
        container = container[outer_key]
    if new is DELETE:
        del container[key]
    else:
        container[key] = new
    return value


DELETE = object()


def box_mask(*boxes):
    """Return how many of the boxes (x0, y0, x1, y1) cover each pixel, int [H, W]."""
    count = np.zeros((H, W), int)
    for x0, y0, x1, y1 in boxes:
        count[y0:y1, x0:x1] += 1
    return count


def python2_pickle(value, protocol):
    """Pickle a value like Python 2's cPickle: bytes as its str, and str as its unicode."""
    puts = iter(range(10**6))

    def put():
        number = next(puts)
        if protocol == 0:
            return b"p%d\n" % number
        return b"q" + bytes([number]) if number < 256 else b"r" + struct.pack("<I", number)

    def dump(item):
        if isinstance(item, list):
            items = [dump(part) for part in item]
            if protocol == 0:
                return b"(l" + put() + b"".join(part + b"a" for part in items)
            return b"]" + put() + b"(" + b"".join(items) + b"e"
        if isinstance(item, dict):
            items = [dump(key.encode()) + dump(part) for key, part in item.items()]
            if protocol == 0:
                return b"(d" + put() + b"".join(part + b"s" for part in items)
            return b"}" + put() + b"(" + b"".join(items) + b"u"
        if isinstance(item, int):
            if protocol == 0:
                return b"I%d\n" % item if item % 2 else b"L%dL\n" % item
            return b"K" + bytes([item]) if item < 256 else b"J" + struct.pack("<i", item)
        if isinstance(item, bytes):
            if protocol == 0:
                return b"S" + repr(item)[1:].encode() + b"\n" + put()
            length = b"U" + bytes([len(item)]) if len(item) < 256 else b"T" + struct.pack("<i", len(item))
            return length + item + put()
        if protocol == 0:
            return b"V" + item.encode("raw-unicode-escape") + b"\n" + put()
        return b"X" + struct.pack("<I", len(item.encode())) + item.encode() + put()

    return (b"\x80\x02" if protocol == 2 else b"") + dump(value) + b"."
