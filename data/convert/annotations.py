"""Find the objects that the rows of a sentence file refer to: COCO annotations, or masks in PNG files.

Shapes: H, W height and width of an image in pixels.
"""

import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data.convert.sentences import Row, located
from data.transforms import check_depth, open_image_file
from lib.errors import UserError
from lib.terminal import draws_bars
from refer.annotations import Record, is_file_below, read_instances
from refer.masks import MAX_PIXELS, MAX_SIDE, encode_mask

ORIENTATION = 0x0112  # EXIF tag; 1: as stored, 2 to 8: viewers flip or rotate the image
SWAPPED_SIDES = range(5, 9)  # orientations that exchange width and height


class Objects(NamedTuple):
    """The objects of a sentence file."""

    instances: dict[str, list[Record]]  # images, annotations and categories, as in instances.json
    annotation_ids: list[int]  # one per row of the sentence file
    warnings: list[str]


class ImageSizes:
    """Sizes of the images in a folder. Each image is decoded once, which finds corrupt files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._sizes: dict[str, tuple[int, int]] = {}
        self._orientations: dict[str, int] = {}  # of images that viewers flip or rotate

    def __getitem__(self, name: str) -> tuple[int, int]:
        """Return an image's width and height as stored. Raise a UserError if it is missing, corrupt or too large."""
        if name not in self._sizes:
            self._sizes[name] = self._read(name)
        return self._sizes[name]

    def _read(self, name: str) -> tuple[int, int]:
        path = self.folder / name
        with open_image_file(path) as image:
            check_depth(image, path)
            size, orientation = image.size, image.getexif().get(ORIENTATION, 1)
            image.draft(None, (1, 1))  # for a JPEG: read the whole file, but decode it at an eighth of its size
            image.load()
        if max(size) > MAX_SIDE or size[0] * size[1] > MAX_PIXELS:
            limits = f"{MAX_SIDE} pixels per side and {MAX_PIXELS:,} in total"
            raise UserError(f"the image {path} is {size[0]}×{size[1]}. At most {limits} are supported.")
        if orientation in range(2, 9):
            self._orientations[name] = orientation
        return size

    def check(self, name: str, size: tuple[int, int], source: str) -> None:
        """Raise a UserError if the image differs in size (width, height) from ``source``, a mask or an annotation."""
        actual = self[name]
        if actual == size:
            return
        problem = f"{source} is {size[0]}×{size[1]}, but the image {name} is {actual[0]}×{actual[1]}"
        if size == actual[::-1] and self._orientations.get(name) in SWAPPED_SIDES:
            raise UserError(
                f"{problem} as stored. Its EXIF orientation, which viewers apply, is ignored. Rotate the stored image, "
                "for example with `exiftran -ai` or `mogrify -auto-orient`."
            )
        raise UserError(f"{problem}.")

    def warnings(self) -> list[str]:
        """Return a warning if images that were read have an EXIF orientation."""
        if not self._orientations:
            return []
        count, example = len(self._orientations), next(iter(self._orientations))
        return [
            f"images with an EXIF orientation, which is ignored: {count}, for example {example}. Check on the contact "
            "sheet that the masks fit."
        ]


def coco_objects(rows: list[Row], instances_path: Path, sizes: ImageSizes) -> Objects:
    """Look up the annotations that the rows refer to. Keep all annotations of the images in the rows.

    Raises:
        UserError: an image or annotation does not exist; an annotation belongs to another image; an image does not have
            the size recorded in the file.
    """
    coco = read_instances(instances_path)
    images = {image["id"]: image for image in coco["images"]}
    annotations = {annotation["id"]: annotation for annotation in coco["annotations"]}
    images_by_name: dict[str, list[Record]] = defaultdict(list)
    for image in coco["images"]:
        images_by_name[image["file_name"]].append(image)
    annotation_ids, used = [], set()
    for row in tqdm(rows, "images", unit="row", disable=not draws_bars()):
        with located(row.location):
            if _is_id(row.image):
                matches = [images[int(row.image)]] if int(row.image) in images else []
            else:
                matches = images_by_name[row.image]
            if len(matches) != 1:
                count = f"{len(matches)} images" if matches else "no image"
                example = f" Its first image is {coco['images'][0]['file_name']}." if images else ""
                raise UserError(f"{instances_path} has {count} {row.image}.{example}")
            image = matches[0]
            if not _is_id(row.object) or int(row.object) not in annotations:
                raise UserError(f"{instances_path} has no annotation {row.object}.")
            annotation = annotations[int(row.object)]
            if annotation["image_id"] != image["id"]:
                other = images.get(annotation["image_id"], {}).get("file_name", "unknown")
                raise UserError(
                    f"annotation {annotation['id']} belongs to image {annotation['image_id']} ({other}), not to image "
                    f"{image['id']} ({image['file_name']})."
                )
            source = f"image {image['id']} in {instances_path}"
            sizes.check(image["file_name"], (image["width"], image["height"]), source)
        annotation_ids.append(annotation["id"])
        used.add(image["id"])
    instances = {
        "images": [image for image in coco["images"] if image["id"] in used],
        "annotations": [annotation for annotation in coco["annotations"] if annotation["image_id"] in used],
        "categories": coco["categories"],
    }
    return Objects(instances, annotation_ids, sizes.warnings())


def mask_objects(rows: list[Row], masks: Path, sizes: ImageSizes) -> Objects:
    """Create an annotation for each mask. The default mask of a row is the PNG with the name of its image.

    Raises:
        UserError: an image or mask is missing or corrupt; a mask is empty or differs in size from its image; an
            object has two categories.
    """
    images: dict[str, Record] = {}
    annotations: dict[tuple[str, str], Record] = {}  # by image and mask
    categories: dict[int, str] = {}  # by annotation id
    coverage: dict[str, float] = {}  # fraction of the image that each mask covers
    annotation_ids = []
    for row in tqdm(rows, "masks", unit="row", disable=not draws_bars()):
        mask_name = row.object or str(Path(row.image).with_suffix(".png"))
        with located(row.location):
            _check_file_name(row.image, "image", sizes.folder)
            _check_file_name(mask_name, "mask", masks)
            width, height = sizes[row.image]
            if row.image not in images:
                image_id = len(images) + 1
                images[row.image] = {"id": image_id, "file_name": row.image, "width": width, "height": height}
            if (row.image, mask_name) not in annotations:
                mask = read_mask(masks / mask_name)
                sizes.check(row.image, mask.shape[::-1], f"the mask {masks / mask_name}")
                coverage[mask_name] = float(mask.mean())
                annotations[row.image, mask_name] = {
                    "id": len(annotations) + 1,
                    "image_id": images[row.image]["id"],
                    "bbox": _bounding_box(mask),
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": encode_mask(mask),
                }
            annotation_id = annotations[row.image, mask_name]["id"]
            if row.category and categories.setdefault(annotation_id, row.category) != row.category:
                other = categories[annotation_id]
                raise UserError(
                    f"the category of the mask {mask_name} is {row.category}, but {other} in an earlier row."
                )
        annotation_ids.append(annotation_id)
    category_ids: dict[str, int] = {}
    for annotation in annotations.values():
        category = categories.get(annotation["id"], "object")
        annotation["category_id"] = category_ids.setdefault(category, len(category_ids) + 1)
    instances = {
        "images": list(images.values()),
        "annotations": list(annotations.values()),
        "categories": [{"id": number, "name": name} for name, number in category_ids.items()],
    }
    return Objects(instances, annotation_ids, sizes.warnings() + _coverage_warnings(coverage))


def read_mask(path: Path) -> np.ndarray:
    """Read a PNG as a mask, bool [H, W].

    A pixel belongs to the object if its gray value, palette index or any color value is not 0. Transparency is ignored.
    Other formats are rejected, because their compression may change pixel values.

    Raises:
        UserError: the file is missing, is not a PNG, or contains no object.
    """
    with open_image_file(path, "mask", formats=("PNG",)) as image:
        values = np.asarray(image)
        has_alpha = image.mode in ("LA", "PA", "RGBA")
    if values.ndim == 3:
        values = (values[..., :-1] if has_alpha else values).any(axis=2)
    if not values.any():
        raise UserError(f"the mask {path} is empty: all gray values or colors are 0. Transparency is ignored.")
    return values != 0


def _coverage_warnings(coverage: dict[str, float]) -> list[str]:
    """Return a warning if the masks seem to be inverted."""
    whole = [name for name, share in coverage.items() if share == 1]
    large = [name for name, share in coverage.items() if share > 0.5]
    if whole:
        return [f"masks that cover the whole image: {len(whole)}, for example {whole[0]}. Is the background 0?"]
    if len(large) > len(coverage) / 2:
        return [f"masks that cover more than half of the image: {len(large)} of {len(coverage)}. Is the background 0?"]
    return []


def _check_file_name(name: str, column: str, folder: Path) -> None:
    if not is_file_below(name):
        hint = " Separate folders by /." if "\\" in name else ""
        raise UserError(f"{column} {name!r} is not a file below {folder}.{hint}")


def _bounding_box(mask: np.ndarray) -> list[int]:
    """Return [x, y, w, h] of a mask [H, W] that is not empty."""
    x, y = (np.flatnonzero(mask.any(axis=axis)) for axis in (0, 1))
    return [int(x[0]), int(y[0]), int(x[-1] - x[0] + 1), int(y[-1] - y[0] + 1)]


def _is_id(text: str) -> bool:
    return re.fullmatch("[0-9]{1,18}", text) is not None
