"""Finds what the rows of a sentence file speak of: annotations in COCO instances, or masks drawn in PNG files.

H, W: height and width of a picture in pixels.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from data.convert.sentences import Row
from data.dataset_refer_bert import DECODING_ERRORS, check_depth
from lib.errors import UserError
from refer.annotations import Record, is_file_below, read_instances
from refer.masks import MAX_PIXELS, MAX_SIDE, encode_mask

ORIENTATION = 0x0112  # of EXIF; 1: as stored, 5 to 8: also with the sides exchanged
ID = re.compile("[0-9]{1,18}")


class Objects(NamedTuple):
    """What a sentence file is about."""

    instances: dict[str, list[Record]]  # images, annotations, categories: the content of an instances.json
    keys: list[tuple[int, int]]  # of each row: the ids of its image and annotation
    warnings: list[str]


class Pictures:
    """The pictures below a folder, each decoded once when first asked for: a damaged one must not stop a training."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rotated: dict[str, int] = {}  # those that programs show otherwise than they are stored
        self._sizes: dict[str, tuple[int, int]] = {}

    def size(self, name: str, where: str) -> tuple[int, int]:
        """Width and height, as stored. UserError: it isn't there, or is damaged."""
        if name not in self._sizes:
            path = self.folder / name
            try:
                with Image.open(path) as image:
                    check_depth(image, path)
                    size, turned = image.size, image.getexif().get(ORIENTATION, 1)
                    image.draft(None, (1, 1))  # a JPEG is still read to its end, but in an eighth of its size
                    image.load()
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
            except FileNotFoundError as error:
                raise UserError(f"{where}: no picture {path}") from error
            except DECODING_ERRORS as error:
                raise UserError(f"{where}: the picture {path} can't be decoded: {error}") from error
            if max(size) > MAX_SIDE or size[0] * size[1] > MAX_PIXELS:
                limits = f"at most {MAX_SIDE} a side and {MAX_PIXELS:,} pixels"
                raise UserError(f"{where}: the picture {path} is {size[0]}×{size[1]}; {limits}")
            if turned in range(2, 9):
                self.rotated[name] = turned
            self._sizes[name] = size
        return self._sizes[name]

    def check_size(self, name: str, size: tuple[int, int], what: str, where: str) -> None:
        """UserError unless ``what`` (a mask, an annotation file) is of the picture's size [W, H]."""
        own = self.size(name, where)
        if own == size:
            return
        told = f"{where}: {what} is {size[0]}×{size[1]}, the picture {name} is {own[0]}×{own[1]}"
        if size == own[::-1] and self.rotated.get(name, 1) >= 5:
            told += (
                " as it is stored, which is how it is used: programs turn it by its EXIF orientation; store it turned, "
                "for example by `exiftran -ai` or `mogrify -auto-orient`"
            )
        raise UserError(told)

    def warnings(self) -> list[str]:
        if not self.rotated:
            return []
        return [
            f"{len(self.rotated)} pictures have an EXIF orientation, {next(iter(self.rotated))} for one, and are used "
            "as they are stored, not as programs show them: see on the sample sheet whether the masks fit"
        ]


def coco_objects(rows: list[Row], instances_path: Path, pictures: Pictures) -> Objects:
    """The rows' images and annotations among COCO instances; of the images used, all annotations are kept.

    UserError: there is no such; an annotation of another image; a picture of another size than the file says.
    """
    everything = read_instances(instances_path)
    images = {image["id"]: image for image in everything["images"]}
    annotations = {annotation["id"]: annotation for annotation in everything["annotations"]}
    by_name: dict[str, list[Record]] = {}
    for image in images.values():
        by_name.setdefault(image["file_name"], []).append(image)
    keys: list[tuple[int, int]] = []
    for row in _progress(rows, "pictures"):
        if ID.fullmatch(row.image):
            named = [images[int(row.image)]] if int(row.image) in images else []
        else:
            named = by_name.get(row.image, [])
        if len(named) != 1:
            found = f"{len(named)} images" if named else "no image"
            raise UserError(f"{row.where}: {found} {row.image} in {instances_path}{_example(images)}")
        image = named[0]
        if not ID.fullmatch(row.object) or int(row.object) not in annotations:
            raise UserError(f"{row.where}: no annotation {row.object} in {instances_path}")
        annotation = annotations[int(row.object)]
        if annotation["image_id"] != image["id"]:
            other = images.get(annotation["image_id"], {}).get("file_name", "an unknown one")
            raise UserError(
                f"{row.where}: annotation {annotation['id']} is on image {annotation['image_id']} ({other}), not on "
                f"{image['id']} ({image['file_name']})"
            )
        size = (image["width"], image["height"])
        pictures.check_size(image["file_name"], size, f"image {image['id']} of {instances_path}", row.where)
        keys.append((image["id"], annotation["id"]))
    used = {image_id for image_id, _ in keys}
    instances = {
        "images": [image for image in everything["images"] if image["id"] in used],
        "annotations": [one for one in everything["annotations"] if one["image_id"] in used],
        "categories": everything["categories"],
    }
    return Objects(instances, keys, pictures.warnings())


def _example(images: dict[int, Record]) -> str:
    image = next(iter(images.values()), None)
    return f", whose first is {image['id']} ({image['file_name']})" if image else ", which has none"


def mask_objects(rows: list[Row], masks: Path, pictures: Pictures) -> Objects:
    """An annotation for each mask file; rows that name none mean the PNG called as their picture.

    UserError: a picture or mask isn't there or is damaged; a mask is empty, or of another size than its picture; an
    object has two categories.
    """
    image_ids: dict[str, int] = {}
    found: dict[tuple[str, str], Record] = {}
    categories: dict[tuple[str, str], str] = {}
    instances: dict[str, list[Record]] = {"images": [], "annotations": [], "categories": []}
    whole: list[str] = []
    large = 0
    keys: list[tuple[int, int]] = []
    for row in _progress(rows, "masks"):
        check_name(row.image, f"{row.where}: image", pictures.folder)
        name = row.object or str(Path(row.image).with_suffix(".png"))
        check_name(name, f"{row.where}: mask", masks)
        width, height = pictures.size(row.image, row.where)
        if row.image not in image_ids:
            image_ids[row.image] = len(image_ids) + 1
            image = {"id": image_ids[row.image], "file_name": row.image, "width": width, "height": height}
            instances["images"].append(image)
        annotation = found.get((row.image, name))
        if annotation is None:
            mask = read_mask(masks / name, row.where)
            pictures.check_size(row.image, mask.shape[::-1], f"the mask {masks / name}", row.where)
            if not mask.any():
                raise UserError(f"{row.where}: the mask {masks / name} is empty (colours count, transparency doesn't)")
            if mask.all():
                whole.append(name)
            large += mask.mean() > 0.5
            annotation = {"id": len(found) + 1, "image_id": image_ids[row.image]}
            annotation |= {"bbox": _box(mask), "area": int(mask.sum()), "iscrowd": 0, "segmentation": encode_mask(mask)}
            found[row.image, name] = annotation
            instances["annotations"].append(annotation)
        if row.category and categories.setdefault((row.image, name), row.category) != row.category:
            raise UserError(f"{row.where}: another category of the mask {name} than in an earlier row")
        keys.append((annotation["image_id"], annotation["id"]))
    numbers: dict[str, int] = {}
    for key, annotation in found.items():
        annotation["category_id"] = numbers.setdefault(categories.get(key, "object"), len(numbers) + 1)
    instances["categories"] = [{"id": number, "name": name} for name, number in numbers.items()]
    told = [f"{len(whole)} masks cover their whole picture, {whole[0]} for one: is 0 outside?"] if whole else []
    if large > len(found) / 2 and not whole:
        told = [f"{large} of {len(found)} masks cover more than half of their picture: is 0 outside?"]
    return Objects(instances, keys, pictures.warnings() + told)


def read_mask(path: Path, where: str) -> np.ndarray:
    """A PNG as bool [H, W]: object where the grey value or palette index isn't 0, or any of the colours; transparency
    is ignored. UserError: it isn't there or isn't a PNG."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            values = np.asarray(image)
            transparent = image.mode in ("LA", "PA", "RGBA")
    except FileNotFoundError as error:
        raise UserError(f"{where}: no mask {path}") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{where}: the mask {path} isn't a PNG; other formats may change pixels") from error
    except DECODING_ERRORS as error:
        raise UserError(f"{where}: the mask {path} can't be decoded: {error}") from error
    if values.ndim == 3:
        values = (values[..., :-1] if transparent else values).any(axis=2)
    return values != 0


def check_name(name: str, what: str, folder: Path) -> None:
    """UserError unless this names a file below a folder, by the rules of an instances.json."""
    if not is_file_below(name):
        hint = "; write / between folders" if "\\" in name else ""
        raise UserError(f"{what} {name!r} is not a file below {folder}{hint}")


def _box(mask: np.ndarray) -> list[int]:
    """[x, y, w, h] of a mask [H, W] that isn't empty."""
    x, y = (np.flatnonzero(mask.any(axis=axis)) for axis in (0, 1))
    return [int(x[0]), int(y[0]), int(x[-1] - x[0] + 1), int(y[-1] - y[0] + 1)]


def _progress(rows: list[Row], what: str) -> Iterable[Row]:
    return tqdm(rows, desc=what, unit="row", disable=None)
