"""Write a dataset in the REFER layout from the user's own images, objects and sentences."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from bert.tokenization import build_vocabulary
from data.convert.annotations import ImageSizes, Objects, coco_objects, mask_objects
from data.convert.refs import build_refs, find_problems
from data.convert.sentences import Row, listed, located, read_sentences
from data.convert.splits import SplitShares, assign_splits
from lib.errors import MissingFileError, UserError
from lib.files import atomic_folder, protect, protecting_inputs
from lib.terminal import draws_bars
from refer.annotations import Record, read_instances
from refer.datasets import BERT_VOCABULARY, COCO_IMAGES, DATASETS, ROOT
from refer.refer import REFER

INFO_FILE, SHEET_FILE = "convert.json", "samples.png"
MADE_BY = "python -m data.convert"
RESERVED_NAMES = {"images": "the COCO images", "downloads": "the downloads of `python -m refer.prepare`"}
VALID_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_+.-]{0,99}")


@dataclass(frozen=True)
class Source:
    """The user's files. The objects are given either as COCO annotations or as masks."""

    sentences: Path
    images: Path  # folder
    instances: Path | None = None  # COCO file
    masks: Path | None = None  # folder

    def check(self) -> None:
        """Protect the files. UserError: the objects are not given exactly once, or a folder is missing."""
        if (self.instances is None) == (self.masks is None):
            raise UserError("Pass the objects with either --instances FILE or --masks DIR.")
        for flag, folder in (("--images", self.images), ("--masks", self.masks)):
            if folder is not None and not folder.is_dir():
                raise MissingFileError(f"{flag} {folder}: no such folder.")
        protect(*(path for path in (self.sentences, self.images, self.instances, self.masks) if path is not None))


class Converted(NamedTuple):
    """A finished dataset."""

    refer: REFER
    folder: Path
    warnings: list[str]


@protecting_inputs()
def convert(
    name: str,
    source: Source,
    shares: SplitShares,
    data_root: Path = ROOT,
    *,
    split_by: str = "unc",
    link: bool = False,
    force: bool = False,
) -> Converted:
    """Check the user's files and write the dataset <data_root>/<name>, as a whole or not at all.

    Args:
        name: name of the dataset.
        source: the user's files. Images in COCO's folder below ``data_root`` are not copied.
        shares: sizes of the splits if the sentence file has no column ``split``.
        data_root: folder of all datasets.
        split_by: name of the split system.
        link: create symbolic links to the images instead of copies.
        force: replace an existing dataset that was written by this function.

    Raises:
        UserError: a file or the folder is invalid. Messages about a row start with file and line.
    """
    _check_name(name, split_by)
    source.check()
    folder = data_root / name
    with atomic_folder(folder) as new:
        _check_replaceable(folder, force)
        object_column = "mask" if source.instances is None else "annotation_id"
        rows, unused_columns = read_sentences(source.sentences, object_column)
        warnings = [f"{source.sentences}: unused columns: {listed(unused_columns)}."] if unused_columns else []
        objects = _find_objects(rows, source)
        images = dict.fromkeys(image["file_name"] for image in objects.instances["images"])
        split_of_image = {} if rows[0].split else assign_splits(images, shares)
        refs, ref_warnings = build_refs(rows, objects, split_of_image)
        warnings += [*objects.warnings, *ref_warnings, *find_problems(refs, objects, source.images)]

        instances = {"info": {"description": f"{name}, made by {MADE_BY}"}, **objects.instances}
        (new / "instances.json").write_text(json.dumps(instances), encoding="utf-8")
        (new / f"refs({split_by}).p").write_bytes(pickle.dumps(refs, protocol=2))
        vocabulary = build_vocabulary(row.sentence for row in rows)
        (new / BERT_VOCABULARY).write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
        _check_masks(REFER(data_root, new.name, split_by), rows, objects, source)
        if (data_root / COCO_IMAGES).resolve() != source.images.resolve():
            _copy_images(images, source.images, new / "images", link)
        info: Record = {"made_by": MADE_BY, "splitBy": split_by, "sentences": str(source.sentences)}
        info["objects"] = str(source.instances or source.masks)
        if split_of_image:
            info |= {"val_share": shares.val, "test_share": shares.test, "seed": shares.seed}
        (new / INFO_FILE).write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
    return Converted(REFER(data_root, name, split_by), folder, warnings)


def _check_name(name: str, split_by: str) -> None:
    if name in DATASETS:
        raise UserError(f"--name {name}: this is a published dataset. Choose another name.")
    if name in RESERVED_NAMES:
        raise UserError(f"--name {name}: this folder is reserved for {RESERVED_NAMES[name]}. Choose another name.")
    for flag, value in (("--name", name), ("--splitBy", split_by)):
        if not VALID_NAME.fullmatch(value):
            raise UserError(f"{flag} {value!r}: use letters, digits, _, -, + and ., and do not start with -, + or .")


def _check_replaceable(folder: Path, force: bool) -> None:
    """Raise a UserError if the folder exists, unless ``force`` is set and it contains only a converted dataset."""
    if not os.path.lexists(folder):
        return
    info = _read_info(folder)
    if folder.is_symlink() or not info:
        raise UserError(f"{folder} exists and was not made by `{MADE_BY}`. Choose another --name, or move it.")
    if not force:
        raise UserError(f"{folder} exists. Replace it with --force, or choose another --name.")
    known = {INFO_FILE, SHEET_FILE, BERT_VOCABULARY, "instances.json", "images", f"refs({info.get('splitBy')}).p"}
    unfinished_sheet = f".{SHEET_FILE}.*.part"  # left by a process that was killed
    others = {path.name for path in folder.iterdir() if not path.match(unfinished_sheet)} - known
    if (folder / "images").is_dir():
        images = {image["file_name"] for image in read_instances(folder / "instances.json")["images"]}
        files = (path for path in (folder / "images").rglob("*") if path.is_symlink() or not path.is_dir())
        names = {str(path.relative_to(folder / "images")) for path in files}
        others |= {f"images/{name}" for name in names - images}
    if others:
        raise UserError(f"{folder} also contains {min(others)}, which was not made by `{MADE_BY}`. Move it first.")


def _read_info(folder: Path) -> Record:
    """Return the content of a converted dataset's convert.json, or {} if the folder is not a converted dataset."""
    try:
        info = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) and info.get("made_by") == MADE_BY else {}


def _find_objects(rows: list[Row], source: Source) -> Objects:
    sizes = ImageSizes(source.images)
    if source.instances is not None:
        return coco_objects(rows, source.instances, sizes)
    return mask_objects(rows, source.masks, sizes)


def _check_masks(refer: REFER, rows: list[Row], objects: Objects, source: Source) -> None:
    """Decode every mask from the written files. Raise a UserError that names the row if one is invalid or empty."""
    first_rows: dict[int, Row] = {}
    for row, annotation_id in zip(rows, objects.annotation_ids, strict=True):
        first_rows.setdefault(annotation_id, row)
    for annotation_id, row in tqdm(first_rows.items(), "verifying", unit="ref", disable=not draws_bars()):
        with located(f"{row.location}: annotation {annotation_id} of {source.instances or source.masks}"):
            try:
                area = refer.getMask(refer.annToRef[annotation_id])["area"]
            except UserError as error:
                # The cause describes the problem without the path of the temporary folder.
                raise UserError(str(error.__cause__ or error)) from error
            if not area:
                raise UserError("the mask is empty. Pixels in which two of its polygons overlap do not count.")


def _copy_images(names: Iterable[str], source: Path, target: Path, link: bool) -> None:
    for name in tqdm(names, "linking" if link else "copying", unit="image", disable=not draws_bars()):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if link:
            os.symlink(os.path.abspath(source / name), target / name)
        else:
            shutil.copyfile(source / name, target / name)
