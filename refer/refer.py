"""Reads REFER annotations: which expressions mean which object of which picture.

    refer = REFER("refer/data", dataset="refcoco", splitBy="unc")
    for ref in refer.loadRefs(refer.getRefIds(split="val")):
        mask = refer.getMask(ref)["mask"]              # uint8 [H, W]
        texts = [sentence["raw"] for sentence in ref["sentences"]]

Files, splits and where to get them: refer/README.md. H, W: height and width of the picture in pixels.
The files come from the internet, so nothing in them is trusted: what is wrong ends in a UserError that names the
file and the record.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import UserError
from refer.annotations import Record, read_instances, read_refs
from refer.datasets import COCO_DATASETS, check_dataset, image_folder
from refer.masks import Shape, is_number
from utils import gc_paused

Ids = int | Iterable[int]

SPLIT_ORDER = ("val", "testA", "testB", "testC", "test")
# COCO_train2014_000000000009.jpg, as the 2014 sets name it, or 000000000009.jpg, as those of 2017 do.
COCO_NAME = re.compile(r"(COCO_(?:train|val|test)\d{4}_)?(\d{12})\.jpg", re.ASCII)


def _coco_name(image: Record) -> re.Match[str] | None:
    """The name of its file as COCO_NAME's parts: what stands before the number, if anything does, and the number."""
    return COCO_NAME.fullmatch(image["file_name"].rpartition("/")[2])


class REFER:
    """One dataset under one split system, read and checked in full when constructed; pictures are not needed.

    `data`: refs, images, annotations, categories, each a list in file order. Indexes by integer id: `Refs`,
    `Anns`, `Imgs`, `Sents` give the record, `Cats` the category's name, `imgToRefs`, `imgToAnns`, `catToRefs`
    lists of records, `refToAnn`, `annToRef`, `sentToRef` one record. A ref's category is its annotation's.
    Filters take one id or several; an empty one lets everything pass, an id that nothing has matches nothing.

    Raises:
        UserError: unknown dataset or splitBy; a malformed file; a ref whose annotation or image is absent.
        MissingFileError: an annotation file is not there.
    """

    def __init__(self, data_root: str | Path, dataset: str = "refcoco", splitBy: str = "unc") -> None:
        check_dataset(data_root, dataset, splitBy)
        self.dataset, self.splitBy = dataset, splitBy
        folder = Path(data_root, dataset)
        self.instances_path, self.refs_path = folder / "instances.json", folder / f"refs({splitBy}).p"
        self.image_dir = image_folder(data_root, dataset)
        with gc_paused():
            refs = read_refs(self.refs_path)
            self.data: dict[str, list[Record]] = {"refs": refs, **read_instances(self.instances_path)}
            self._build_indexes()

    def _build_indexes(self) -> None:
        self.Refs: dict[int, Record] = {ref["ref_id"]: ref for ref in self.data["refs"]}
        self.Anns: dict[int, Record] = {annotation["id"]: annotation for annotation in self.data["annotations"]}
        self.Imgs: dict[int, Record] = {image["id"]: image for image in self.data["images"]}
        self.Cats: dict[int, str] = {one["id"]: one["name"] for one in self.data["categories"]}
        self.imgToRefs, self.imgToAnns, self.catToRefs = {}, {}, {}
        self.refToAnn, self.annToRef, self.Sents, self.sentToRef = {}, {}, {}, {}
        for annotation in self.data["annotations"]:
            self.imgToAnns.setdefault(annotation["image_id"], []).append(annotation)
        for ref_id, ref in self.Refs.items():
            where, ann_id, image_id = f"{self.refs_path}: ref {ref_id}", ref["ann_id"], ref["image_id"]
            for name, one, index in (("annotation", ann_id, self.Anns), ("image", image_id, self.Imgs)):
                if one not in index:
                    raise UserError(
                        f"{where} needs {name} {one}, which {self.instances_path} does not have; "
                        "take both files from the same download"
                    )
            annotation = self.Anns[ann_id]
            if annotation["image_id"] != image_id:
                raise UserError(
                    f"{where} is on image {image_id}, but its annotation {ann_id} is on image "
                    f"{annotation['image_id']} in {self.instances_path}"
                )
            self.imgToRefs.setdefault(image_id, []).append(ref)
            self.catToRefs.setdefault(annotation["category_id"], []).append(ref)
            self.refToAnn[ref_id], self.annToRef[ann_id] = annotation, ref
            for sentence in ref["sentences"]:
                self.Sents[sentence["sent_id"]], self.sentToRef[sentence["sent_id"]] = sentence, ref
        self._splits = list(dict.fromkeys(ref["split"] for ref in self.data["refs"]))
        self._ref_row, self._ann_row, self._img_row = (
            {one: row for row, one in enumerate(index)} for index in (self.Refs, self.Anns, self.Imgs)
        )

    def splits(self) -> list[str]:
        """The split values that occur in the refs file, in the order of their first ref."""
        return list(self._splits)

    def choose_splits(self, asked: str) -> list[str]:
        """``val,testA`` or ``all`` → names of splits this file has; all: every one but train, in the usual order.

        UserError: there is no such split, or none but train.
        """
        if asked == "all":
            known = [split for split in SPLIT_ORDER if split in self._splits]
            known += sorted(set(self._splits) - {"train", *known})
            if not known:
                raise UserError(f"--split all: {self.refs_path} has a train split only")
            return known
        names = [name.strip() for name in asked.split(",") if name.strip()]
        if not names:
            raise UserError(f"--split {asked!r} names no split; {self.refs_path} has {_listed(self._splits)}")
        for name in names:
            self.getRefIds(split=name)
        return list(dict.fromkeys(names))

    def getRefIds(self, image_ids: Ids = (), cat_ids: Ids = (), ref_ids: Ids = (), split: str = "") -> list[int]:
        """Ids of the refs that pass every filter, in file order.

        `split`: "testA", "testB" and "testC" take each ref whose split contains that letter, "test" each whose
        split contains "test", "" all; other names are compared as they are. UserError: the file has no such.
        """
        images, categories, wanted = set(_ids(image_ids)), set(_ids(cat_ids)), set(_ids(ref_ids))
        part = {"testA": "A", "testB": "B", "testC": "C", "test": "test", "": ""}.get(split)
        splits = {value for value in self._splits if (value == split if part is None else part in value)}
        if not splits:
            raise UserError(f"no split {split!r} in {self.refs_path}: it has {_listed(self._splits)}")
        refs = _candidates(wanted, self.Refs, images, self.imgToRefs, self.data["refs"])
        found = [
            ref["ref_id"]
            for ref in refs
            if ref["split"] in splits
            and (not images or ref["image_id"] in images)
            and (not categories or self.refToAnn[ref["ref_id"]]["category_id"] in categories)
        ]
        return sorted(found, key=self._ref_row.__getitem__)

    def getAnnIds(self, image_ids: Ids = (), cat_ids: Ids = (), ref_ids: Ids = ()) -> list[int]:
        """Ids of the annotations that pass every filter, in file order, those of no ref among them."""
        images, categories, wanted = set(_ids(image_ids)), set(_ids(cat_ids)), set(_ids(ref_ids))
        candidates = _candidates(wanted, self.refToAnn, images, self.imgToAnns, self.data["annotations"])
        found = {
            one["id"]
            for one in candidates
            if (not images or one["image_id"] in images) and (not categories or one["category_id"] in categories)
        }
        return sorted(found, key=self._ann_row.__getitem__)

    def getImgIds(self, ref_ids: Ids = ()) -> list[int]:
        """Ids of these refs' images, each once, in file order; without a filter of all images."""
        wanted = set(_ids(ref_ids))
        found = {self.Refs[one]["image_id"] for one in wanted & self.Refs.keys()} if wanted else self.Imgs
        return sorted(found, key=self._img_row.__getitem__)

    def getCatIds(self) -> list[int]:
        """Ids of all categories, in file order."""
        return list(self.Cats)

    def loadRefs(self, ref_ids: Ids) -> list[Record]:
        """The refs with these ids, in the order asked for. UserError: an unknown id."""
        return _look_up(self.Refs, ref_ids, "ref", self.refs_path)

    def loadAnns(self, ann_ids: Ids) -> list[Record]:
        """The annotations with these ids, in the order asked for. UserError: an unknown id."""
        return _look_up(self.Anns, ann_ids, "annotation", self.instances_path)

    def loadImgs(self, image_ids: Ids) -> list[Record]:
        """The image records with these ids, in the order asked for. UserError: an unknown id."""
        return _look_up(self.Imgs, image_ids, "image", self.instances_path)

    def loadCats(self, cat_ids: Ids) -> list[str]:
        """The names of the categories with these ids, in the order asked for. UserError: an unknown id."""
        return _look_up(self.Cats, cat_ids, "category", self.instances_path)

    def getRefBox(self, ref_id: int) -> list[float]:
        """The object's box [x, y, w, h] in pixels from its top left corner. UserError: it has no such box."""
        annotation = self.refToAnn[self.loadRefs([ref_id])[0]["ref_id"]]
        box = annotation.get("bbox")
        if type(box) is not list or len(box) != 4 or not all(is_number(side, -1e9, 1e9) for side in box):
            raise UserError(
                f"{self.instances_path}: annotation {annotation['id']} of ref {ref_id}: "
                "bbox is not four numbers [x, y, w, h]"
            )
        return list(box)

    def get_image_path(self, image_id: int) -> Path:
        """Where this image's picture belongs, whether or not it is there. UserError: an unknown id."""
        return self.image_dir / self.loadImgs([image_id])[0]["file_name"]

    def image_keys(self) -> dict[int, str]:
        """What tells each image's picture from any other, by image id.

        Two images, of this set or of two, are the same picture if they are the same file, or if their names carry the
        same COCO number (COCO_train2014_000000000009.jpg, 000000000009.jpg), wherever they lie.
        """
        folder, keys = os.path.realpath(self.image_dir), {}
        for image_id, image in self.Imgs.items():
            coco = _coco_name(image)
            keys[image_id] = coco[2] if coco else os.path.realpath(os.path.join(folder, image["file_name"]))
        return keys

    def is_coco(self, image_id: int) -> bool:
        """Whether this image is COCO's for certain: its set is one of COCO's, or its name is not only a number."""
        coco = _coco_name(self.Imgs[image_id])
        return coco is not None and (self.dataset in COCO_DATASETS or coco[1] is not None)

    def getMask(self, ref: Mapping[str, Any] | int, mode: str = "paper") -> dict[str, Any]:
        """The object's mask at the picture's size, for a ref or its id; `mode`: see :meth:`refer.masks.Shape.draw`.

        Returns:
            {"mask": uint8 [H, W] of 0 and 1, "area": int, its number of ones in pixels}
        Raises:
            UserError: unknown mode or ref; a segmentation that cannot be a mask of this picture.
        """
        ref_id = ref.get("ref_id") if isinstance(ref, Mapping) else ref
        mask = self.get_shape(self.loadRefs([ref_id])[0]["ref_id"]).draw(mode)
        return {"mask": mask, "area": int(np.count_nonzero(mask))}

    def get_shape(self, ref_id: int) -> Shape:
        """What a ref's mask is drawn from. UserError: an unknown id."""
        ref = self.loadRefs([ref_id])[0]
        annotation, image = self.refToAnn[ref_id], self.Imgs[ref["image_id"]]
        where = f"{self.instances_path}: annotation {annotation['id']} of ref {ref_id}"
        return Shape(where, image["height"], image["width"], annotation.get("segmentation"))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _ids(ids: Ids) -> list[int]:
    several = list(ids) if isinstance(ids, Iterable) else [ids]
    for one in several:
        if not isinstance(one, int | np.integer) or isinstance(one, bool):
            raise UserError(f"ids are integers, not {one!r}")
    return [int(one) for one in several]


def _candidates(
    ids: set[int],
    by_id: dict[int, Record],
    images: set[int],
    by_image: dict[int, list[Record]],
    everything: list[Record],
) -> list[Record]:
    """The records that can pass the filters; not a walk through the whole file where an index leads there."""
    if ids:
        return [by_id[one] for one in ids & by_id.keys()]
    return [record for one in images for record in by_image.get(one, ())] if images else everything


def _look_up(index: dict[int, Any], ids: Ids, name: str, path: Path) -> list[Any]:
    several = _ids(ids)
    for one in several:
        if one not in index:
            raise UserError(f"no {name} {one} in {path}")
    return [index[one] for one in several]
