"""A small set to read, and to spoil: three pictures, 20 x 30 pixels (H x W), and five refs."""

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
    """(ref_id, ann_id, image_id, split): file order is not the order of the ids."""
    rows = [
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
    images = [{"id": one, "width": W, "height": H, "file_name": f"COCO_train2014_{one:012d}.jpg"} for one in (3, 1, 2)]
    owners = {105: 1, 101: 1, 104: 2, 102: 2, 103: 3, 106: 3}
    annotations = [
        {
            "id": one,
            "image_id": image,
            "category_id": 2 if one % 2 else 1,
            "area": 100.0,
            "bbox": [2.0, 2, 10, 10.5],
            "segmentation": [SQUARE],
        }
        for one, image in owners.items()
    ]
    categories = [{"id": 2, "name": "dog"}, {"id": 1, "name": "person"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def write(root, refs=None, instances=None, dataset="refcoco", splitBy="unc"):
    """Files of a set: what is not bytes already is pickled and dumped. Returns the two paths."""
    folder = root / dataset
    folder.mkdir(exist_ok=True)
    refs_path, instances_path = folder / f"refs({splitBy}).p", folder / "instances.json"
    refs = make_refs() if refs is None else refs
    instances = make_instances() if instances is None else instances
    refs_path.write_bytes(refs if isinstance(refs, bytes) else pickle.dumps(refs, protocol=2))
    instances_path.write_bytes(instances if isinstance(instances, bytes) else json.dumps(instances).encode())
    return refs_path, instances_path


def with_segmentation(root, segmentation):
    instances = make_instances()
    instances["annotations"][0]["segmentation"] = segmentation  # ref 50
    write(root, instances=instances)
    return REFER(root)


def edited(value, *path):
    """A copy with path[:-2] walked, and the key path[-2] set to path[-1], or deleted for `del`."""
    value = copy.deepcopy(value)
    *walk, key, new = path
    target = value
    for step in walk:
        target = target[step]
    if new is DELETE:
        del target[key]
    else:
        target[key] = new
    return value


DELETE = object()


def box_mask(*boxes):
    """The number of boxes (x0, y0, x1, y1) over each pixel, int [H, W]."""
    count = np.zeros((H, W), int)
    for x0, y0, x1, y1 in boxes:
        count[y0:y1, x0:x1] += 1
    return count


def python2_pickle(value, protocol):
    """As Python 2's cPickle wrote it: here bytes are its str, str its unicode."""
    puts = iter(range(10**6))

    def put():
        number = next(puts)
        if protocol == 0:
            return b"p%d\n" % number
        return b"q" + bytes([number]) if number < 256 else b"r" + struct.pack("<I", number)

    def dump(one):
        if isinstance(one, list):
            items = [dump(item) for item in one]
            return (
                b"(l" + put() + b"".join(item + b"a" for item in items)
                if protocol == 0
                else (b"]" + put() + b"(" + b"".join(items) + b"e")
            )
        if isinstance(one, dict):
            items = [dump(key.encode()) + dump(item) for key, item in one.items()]
            return (
                b"(d" + put() + b"".join(item + b"s" for item in items)
                if protocol == 0
                else (b"}" + put() + b"(" + b"".join(items) + b"u")
            )
        if isinstance(one, int):
            if protocol == 0:
                return b"I%d\n" % one if one % 2 else b"L%dL\n" % one
            return b"K" + bytes([one]) if one < 256 else b"J" + struct.pack("<i", one)
        if isinstance(one, bytes):
            if protocol == 0:
                return b"S" + repr(one)[1:].encode() + b"\n" + put()
            return (b"U" + bytes([len(one)]) if len(one) < 256 else b"T" + struct.pack("<i", len(one))) + one + put()
        if protocol == 0:
            return b"V" + one.encode("raw-unicode-escape") + b"\n" + put()
        return b"X" + struct.pack("<I", len(one.encode())) + one.encode() + put()

    return (b"\x80\x02" if protocol == 2 else b"") + dump(value) + b"."
