"""Write the packed file of a split, continue an interrupted one, or verify a complete one."""

from pathlib import Path

from tqdm import tqdm

from data.pack.file import PackedFile, create, header_of
from data.pack.source import pixel_libraries
from data.transforms import check_image_size, read_image, resize_image
from lib.errors import UserError
from lib.files import file_sha256, fsync, open_to_append, translate_write_errors
from lib.locks import lock
from lib.terminal import draws_bars
from refer.masks import resize_mask
from refer.refer import REFER

PARTIAL = ".partial"


def pack_split(refer: REFER, split: str, img_size: int, folder: Path) -> Path:
    """Write ``<dataset>_<splitBy>_<split>_<img_size>.h5`` with the images and masks of a split.

    While it is written, the file is called ``….h5.partial``. If that exists, only images that are missing, damaged or
    made from image files that have changed since are written. A complete file is verified.

    Returns:
        path of the file.

    Raises:
        UserError: an image cannot be read, the file cannot be written, is damaged, or was made from other annotations,
            image files or settings.
    """
    path = folder / f"{refer.dataset}_{refer.splitBy}_{split}_{img_size}.h5"
    partial = path.with_name(f"{path.name}{PARTIAL}")
    expected = header_of(refer, split, img_size) | {"libraries": pixel_libraries()}
    ref_of = {ref["ann_id"]: ref for ref in refer.loadRefs(refer.getRefIds(split=split))}  # each object once
    objects: dict[int, list[int]] = {}
    for ann_id, ref in ref_of.items():
        objects.setdefault(ref["image_id"], []).append(ann_id)
    with lock(path.with_name(f".{path.name}.lock"), f"Another process is writing {path}"):
        if path.exists():
            file = PackedFile(path)
            file.check_header(expected)
            for row in tqdm(range(len(objects)), desc=f"verifying {split}", disable=not draws_bars(), leave=False):
                if not _is_current(file, row, refer):
                    image = refer.get_image_path(int(file.image_ids[row]))
                    raise UserError(
                        f"{path} is damaged, or {image} has changed since it was packed. Delete {path} and run this "
                        "command again."
                    )
            return path
        if not partial.exists():
            create(partial, expected, objects)
        file = PackedFile(partial)
        file.check_header(expected)
        with open_to_append(partial, must_exist=True) as out:
            for row, image_id in enumerate(
                tqdm(objects, desc=split, disable=not draws_bars(), leave=False, unit="image")
            ):
                if _is_current(file, row, refer):
                    continue
                source = refer.get_image_path(image_id)
                image = read_image(source)
                masks = []
                for ann_id in objects[image_id]:
                    segmentation = refer.get_segmentation(ref_of[ann_id]["ref_id"])
                    check_image_size(image, source, segmentation)
                    masks.append(resize_mask(segmentation.draw("paper"), img_size))
                file.write(out, row, resize_image(image, img_size).numpy(), masks, source)
        with translate_write_errors(path):
            fsync(partial)
            for row in range(len(objects)):
                if not file.is_intact(row):
                    raise UserError(f"{partial} was not written correctly: image {file.image_ids[row]} is damaged.")
            partial.rename(path)
            fsync(path.parent)
    return path


def _is_current(file: PackedFile, row: int, refer: REFER) -> bool:
    """Return whether an image is intact in the file, and its image file, if it exists, is the one that was packed."""
    if not file.is_intact(row):
        return False
    source = refer.get_image_path(int(file.image_ids[row]))
    return not source.is_file() or file_sha256(source) == file.read_source(row)[0]
