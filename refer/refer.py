"""Read REFER annotations: expressions, the objects that they refer to, and their masks.

    refer = REFER("refer/data", dataset="refcoco", splitBy="unc")
    for ref in refer.loadRefs(refer.getRefIds(split="val")):
        mask = refer.getMask(ref)["mask"]              # uint8 [H, W]
        texts = [sentence["raw"] for sentence in ref["sentences"]]

The methods are those of the field's usual REFER class. Files, splits and where to download them: refer/README.md.

Shapes: H×W height and width of an image in pixels.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import UserError
from lib.files import protect
from refer.annotations import Record, read_instances, read_refs
from refer.datasets import COCO_DATASETS, PUBLISHED_COUNTS, Counts, check_dataset, image_folder
from refer.masks import Segmentation, is_number
from utils import gc_paused

Ids = int | Iterable[int]

SPLIT_ORDER = ("train", "val", "testA", "testB", "testC", "test")  # other splits follow in alphabetical order
# COCO_train2014_000000000009.jpg in the sets of 2014, 000000000009.jpg in those of 2017.
COCO_NAME = re.compile(r"(COCO_(?:train|val|test)\d{4}_)?(\d{12})\.jpg", re.ASCII)


class REFER:
    """One dataset under one split system. Both annotation files are read and checked completely; no image is needed.

    Attributes:
        data: ``refs``, ``images``, ``annotations`` and ``categories``, each a list of records in file order.
        Refs, Anns, Imgs, Sents: record by id.
        Cats: category name by id.
        imgToRefs, imgToAnns, catToRefs: list of records by id. A ref's category is that of its annotation.
        refToAnn, annToRef, sentToRef: record by id.

    The filters of the get methods take one or several ids. An empty filter matches everything, an unknown id matches
    nothing.

    Raises:
        UserError: unknown dataset or splitBy, a malformed file, or a ref whose annotation or image does not exist.
        MissingFileError: an annotation file does not exist.
    """

    def __init__(self, data_root: str | Path, dataset: str = "refcoco", splitBy: str = "unc") -> None:
        check_dataset(data_root, dataset, splitBy)
        self.dataset, self.splitBy = dataset, splitBy
        folder = Path(data_root, dataset)
        self.instances_path, self.refs_path = folder / "instances.json", folder / f"refs({splitBy}).p"
        self.image_dir = image_folder(data_root, dataset)
        protect(self.instances_path, self.refs_path, self.image_dir)
        with gc_paused():
            refs = read_refs(self.refs_path)
            self.data: dict[str, list[Record]] = {"refs": refs, **read_instances(self.instances_path)}
            self._build_indexes()

    def _build_indexes(self) -> None:
        self.Refs: dict[int, Record] = {ref["ref_id"]: ref for ref in self.data["refs"]}
        self.Anns: dict[int, Record] = {annotation["id"]: annotation for annotation in self.data["annotations"]}
        self.Imgs: dict[int, Record] = {image["id"]: image for image in self.data["images"]}
        self.Cats: dict[int, str] = {category["id"]: category["name"] for category in self.data["categories"]}
        self.imgToRefs, self.imgToAnns, self.catToRefs = {}, {}, {}
        self.refToAnn, self.annToRef, self.Sents, self.sentToRef = {}, {}, {}, {}
        for annotation in self.data["annotations"]:
            self.imgToAnns.setdefault(annotation["image_id"], []).append(annotation)
        for ref_id, ref in self.Refs.items():
            annotation = self._annotation_of(ref)
            self.imgToRefs.setdefault(ref["image_id"], []).append(ref)
            self.catToRefs.setdefault(annotation["category_id"], []).append(ref)
            self.refToAnn[ref_id], self.annToRef[annotation["id"]] = annotation, ref
            for sentence in ref["sentences"]:
                self.Sents[sentence["sent_id"]], self.sentToRef[sentence["sent_id"]] = sentence, ref
        self._splits = sorted({ref["split"] for ref in self.data["refs"]}, key=_split_position)
        # Position in the file by id, for sorting.
        self._ref_rows, self._ann_rows, self._img_rows = (
            {record_id: row for row, record_id in enumerate(index)} for index in (self.Refs, self.Anns, self.Imgs)
        )

    def _annotation_of(self, ref: Record) -> Record:
        """Return a ref's annotation. UserError: it or the image is not in instances.json, or they do not match."""
        ann_id, image_id, where = ref["ann_id"], ref["image_id"], f"{self.refs_path}: ref {ref['ref_id']}"
        for name, record_id, index in (("annotation", ann_id, self.Anns), ("image", image_id, self.Imgs)):
            if record_id not in index:
                raise UserError(
                    f"{where} needs {name} {record_id}, which is not in {self.instances_path}. "
                    "Use both files of the same download."
                )
        annotation = self.Anns[ann_id]
        if annotation["image_id"] != image_id:
            raise UserError(
                f"{where} is on image {image_id}, but its annotation {ann_id} is on image {annotation['image_id']} in "
                f"{self.instances_path}. Use both files of the same download."
            )
        return annotation

    def splits(self) -> list[str]:
        """Return the splits in the refs file: train, val, testA, testB, testC, test, then others by name."""
        return list(self._splits)

    def choose_splits(self, names: str) -> list[str]:
        """Return the splits of a ``--split`` flag: a list such as ``val,testA``, or ``all`` for all but train.

        Raises:
            UserError: the file has no such split, or only train.
        """
        if names == "all":
            chosen = [split for split in self._splits if split != "train"]
            if not chosen:
                raise UserError(f"--split all: {self.refs_path} has only a train split.")
            return chosen
        chosen = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
        if not chosen:
            raise UserError(f"--split {names!r} is empty. {self.refs_path} has the splits {_listed(self._splits)}.")
        for name in chosen:
            self.getRefIds(split=name)
        return chosen

    def counts(self) -> dict[str, Counts]:
        """Return the size of each split, of those in the refs file and of the published ones.

        Splits are selected as by :meth:`getRefIds`, so a ref marked ``testAB`` counts for testA and for testB.
        """
        counts = {}
        published = PUBLISHED_COUNTS.get((self.dataset, self.splitBy), {})
        for split in sorted({*self._splits, *published}, key=_split_position):
            try:
                refs = self.loadRefs(self.getRefIds(split=split))
            except UserError:  # published, but not in this refs file
                continue
            expressions = sum(len(ref["sentences"]) for ref in refs)
            counts[split] = Counts(len(refs), expressions, len({ref["image_id"] for ref in refs}))
        return counts

    def getRefIds(self, image_ids: Ids = (), cat_ids: Ids = (), ref_ids: Ids = (), split: str = "") -> list[int]:
        """Return the ids of the refs that match all filters, in file order.

        Args:
            split: as in the original REFER class, "testA", "testB" and "testC" match each split with that letter in its
                name, "test" each with "test" in its name, and "" all. Any other name matches only itself.

        Raises:
            UserError: the file has no such split.
        """
        images, categories, ids = set(_as_ids(image_ids)), set(_as_ids(cat_ids)), set(_as_ids(ref_ids))
        part = {"testA": "A", "testB": "B", "testC": "C", "test": "test", "": ""}.get(split)
        splits = {value for value in self._splits if (value == split if part is None else part in value)}
        if not splits:
            raise UserError(f"No split {split!r} in {self.refs_path}. It has {_listed(self._splits)}.")
        found = [
            ref["ref_id"]
            for ref in _candidates(ids, self.Refs, images, self.imgToRefs)
            if ref["split"] in splits
            and (not images or ref["image_id"] in images)
            and (not categories or self.refToAnn[ref["ref_id"]]["category_id"] in categories)
        ]
        return sorted(found, key=self._ref_rows.__getitem__)

    def getAnnIds(self, image_ids: Ids = (), cat_ids: Ids = (), ref_ids: Ids = ()) -> list[int]:
        """Return the ids of the annotations that match all filters, in file order, including those without a ref."""
        images, categories, ids = set(_as_ids(image_ids)), set(_as_ids(cat_ids)), set(_as_ids(ref_ids))
        found = {
            annotation["id"]
            for annotation in _candidates(ids, self.refToAnn if ids else self.Anns, images, self.imgToAnns)
            if (not images or annotation["image_id"] in images)
            and (not categories or annotation["category_id"] in categories)
        }
        return sorted(found, key=self._ann_rows.__getitem__)

    def getImgIds(self, ref_ids: Ids = ()) -> list[int]:
        """Return the ids of these refs' images, each once, in file order; without a filter those of all images."""
        ids = set(_as_ids(ref_ids))
        found = {self.Refs[ref_id]["image_id"] for ref_id in ids & self.Refs.keys()} if ids else self.Imgs
        return sorted(found, key=self._img_rows.__getitem__)

    def getCatIds(self) -> list[int]:
        """Return the ids of all categories, in file order."""
        return list(self.Cats)

    def loadRefs(self, ref_ids: Ids) -> list[Record]:
        """Return the refs with these ids, in the order of the ids. UserError: an unknown id."""
        return _look_up(self.Refs, ref_ids, "ref", self.refs_path)

    def loadAnns(self, ann_ids: Ids) -> list[Record]:
        """Return the annotations with these ids, in the order of the ids. UserError: an unknown id."""
        return _look_up(self.Anns, ann_ids, "annotation", self.instances_path)

    def loadImgs(self, image_ids: Ids) -> list[Record]:
        """Return the image records with these ids, in the order of the ids. UserError: an unknown id."""
        return _look_up(self.Imgs, image_ids, "image", self.instances_path)

    def loadCats(self, cat_ids: Ids) -> list[str]:
        """Return the names of the categories with these ids, in the order of the ids. UserError: an unknown id."""
        return _look_up(self.Cats, cat_ids, "category", self.instances_path)

    def getRefBox(self, ref_id: int) -> list[float]:
        """Return the object's box [x, y, w, h] in pixels; x, y is its top left corner. UserError: it has no box."""
        annotation = self.refToAnn[self.loadRefs([ref_id])[0]["ref_id"]]
        box = annotation.get("bbox")
        if type(box) is not list or len(box) != 4 or not all(is_number(side, -1e9, 1e9) for side in box):
            raise UserError(f"{self._source(ref_id)}: bbox must be four numbers [x, y, w, h]")
        return list(box)

    def getMask(self, ref: Mapping[str, Any] | int, mode: str = "paper") -> dict[str, Any]:
        """Draw the mask of the object that a ref refers to.

        Args:
            ref: a ref or its id.
            mode: ``paper`` or ``union``, see :meth:`refer.masks.Segmentation.draw`.

        Returns:
            {"mask": uint8 [H, W] of 0 and 1, "area": int, number of pixels of the object}

        Raises:
            UserError: unknown mode or ref, or a segmentation that is not valid for this image.
        """
        ref_id = ref.get("ref_id") if isinstance(ref, Mapping) else ref
        mask = self.get_segmentation(ref_id).draw(mode)
        return {"mask": mask, "area": int(np.count_nonzero(mask))}

    def get_segmentation(self, ref_id: int) -> Segmentation:
        """Return the segmentation of a ref's object, from which its mask is drawn. UserError: an unknown id."""
        ref = self.loadRefs([ref_id])[0]
        annotation, image = self.refToAnn[ref["ref_id"]], self.Imgs[ref["image_id"]]
        return Segmentation(self._source(ref_id), image["height"], image["width"], annotation.get("segmentation"))

    def _source(self, ref_id: int) -> str:
        """Return where a ref's annotation is, for error messages."""
        return f"{self.instances_path}: annotation {self.refToAnn[ref_id]['id']} of ref {ref_id}"

    def get_image_path(self, image_id: int) -> Path:
        """Return the path of an image's file, whether or not the file exists. UserError: an unknown id."""
        return self.image_dir / self.loadImgs([image_id])[0]["file_name"]

    def image_keys(self) -> dict[int, str]:
        """Return {image id: key}. Equal images have equal keys, also across datasets.

        Two images are equal if they are the same file, or if their names contain the same COCO number
        (COCO_train2014_000000000009.jpg, 000000000009.jpg), wherever the files are.
        """
        folder, keys = os.path.realpath(self.image_dir), {}
        for image_id, image in self.Imgs.items():
            coco = _match_coco_name(image)
            keys[image_id] = coco[2] if coco else os.path.realpath(os.path.join(folder, image["file_name"]))
        return keys

    def is_coco(self, image_id: int) -> bool:
        """Return whether an image is certainly one of COCO's.

        Its file name has the prefix COCO_, or in the COCO datasets may also be only a number. Other datasets may number
        their images in the same way.
        """
        coco = _match_coco_name(self.Imgs[image_id])
        return coco is not None and (self.dataset in COCO_DATASETS or coco[1] is not None)


def _match_coco_name(image: Record) -> re.Match[str] | None:
    """Match an image's file name with COCO_NAME. Group 1 is the prefix, None without one; group 2 is the number."""
    return COCO_NAME.fullmatch(image["file_name"].rpartition("/")[2])


def _split_position(name: str) -> tuple[int, str]:
    """Return a sort key for splits."""
    return SPLIT_ORDER.index(name) if name in SPLIT_ORDER else len(SPLIT_ORDER), name


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _as_ids(ids: Ids) -> list[int]:
    values = list(ids) if isinstance(ids, Iterable) else [ids]
    for value in values:
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            raise UserError(f"Ids must be integers, not {value!r}.")
    return [int(value) for value in values]


def _candidates(
    ids: set[int], by_id: dict[int, Record], images: set[int], by_image: dict[int, list[Record]]
) -> Iterable[Record]:
    """Return the records that can match the filters, if possible through an index instead of all records."""
    if ids:
        return [by_id[record_id] for record_id in ids & by_id.keys()]
    return [record for image in images for record in by_image.get(image, ())] if images else by_id.values()


def _look_up(index: dict[int, Any], ids: Ids, name: str, path: Path) -> list[Any]:
    ids = _as_ids(ids)
    for record_id in ids:
        if record_id not in index:
            raise UserError(f"No {name} {record_id} in {path}.")
    return [index[record_id] for record_id in ids]
