"""Read the images and masks of a dataset from packed files (``--packed``) instead of the image files."""

import os
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image, features

from data.dataset_refer_bert import ImageFiles, ReferDataset
from data.pack.file import PackedFile, header_of, pack_command
from lib.errors import UserError
from refer.refer import REFER
from utils import warn_once


class PackedImages(ImageFiles):
    """Source of a dataset's pixels that needs no image files. The samples are the same as with :class:`ImageFiles`.

    Masks of gt_mask ``union`` and masks at an image's own size are drawn from the annotations.
    """

    def __init__(self, file: PackedFile) -> None:
        self.file = file

    def check_images(self, dataset: ReferDataset) -> None:
        """Raise a UserError if an image file exists and has another size than when it was packed."""
        for image_id, path in dataset.image_paths().items():
            try:
                size = os.stat(path).st_size
            except OSError:
                continue
            packed = self.file.read_source(self.file.image_row(image_id))[1]
            if size != packed:
                raise UserError(
                    f"{path} has changed since {self.file.path} was written: {size} bytes instead of {packed}. Delete "
                    f"the packed file and pack the split again: `{pack_command(self.file.header)}`."
                )

    def load_image(self, dataset: ReferDataset, index: int) -> Image.Image:
        """Return the packed image of a sample, enlarged to the size of the image file, for drawing."""
        segmentation = dataset.segmentation(index)
        pixels = np.ascontiguousarray(self.input_image(dataset, index).permute(1, 2, 0).numpy())
        return Image.fromarray(pixels).resize((segmentation.width, segmentation.height), Image.Resampling.BILINEAR)

    def input_image(self, dataset: ReferDataset, index: int) -> torch.Tensor:
        """Return the image of a sample, resized to uint8 [3, S, S]."""
        image_id, _ = dataset.ids_of(index)
        return torch.from_numpy(self.file.read_image(self.file.image_row(image_id)))

    def resized_mask(self, dataset: ReferDataset, index: int, gt_mask: str) -> torch.Tensor:
        """Return the target mask of a sample, resized to uint8 [S, S] of 0 and 1."""
        if gt_mask != "paper":
            return super().resized_mask(dataset, index, gt_mask)
        _, ann_id = dataset.ids_of(index)
        return torch.from_numpy(self.file.read_mask(self.file.mask_row(ann_id)))


def open_source(paths: Iterable[str], refer: REFER, split: str, img_size: int) -> ImageFiles:
    """Return the packed file that contains a split, or the image files if none of ``paths`` does.

    Args:
        paths: packed files (``--packed``); empty names are ignored.
        refer, split: the split.
        img_size: S.

    Raises:
        UserError: a file is not a packed file, or that of the split is incomplete or was made from other annotations or
            with other settings.
    """
    for file in map(PackedFile, filter(None, paths)):
        if _contents(file) == (refer.dataset, refer.splitBy, split):
            file.check_header(header_of(refer, split, img_size))
            if not file.is_complete():
                raise UserError(f"{file.path} is incomplete. Continue writing it: `{pack_command(file.header)}`.")
            libraries = pixel_libraries()
            if file.header["libraries"] != libraries:
                warn_once(
                    "%s was packed with %s, this is %s: its pixels may differ by rounding from those of the image "
                    "files",
                    file.path,
                    file.header["libraries"],
                    libraries,
                )
            return PackedImages(file)
    return ImageFiles()


def check_packed(paths: Iterable[str], *splits: tuple[str, str, str]) -> None:
    """Raise a UserError if a packed file is of none of the ``splits`` (dataset, splitBy, split), or two are of one."""
    known: dict[tuple[str, str, str], PackedFile] = {}
    for file in map(PackedFile, filter(None, paths)):
        contents = _contents(file)
        title = "split {2} of {0} ({1})".format(*contents)
        if contents not in splits:
            raise UserError(
                f"{file.path} contains {title}, which this command does not read. Drop --packed {file.path}."
            )
        if contents in known:
            raise UserError(f"{known[contents].path} and {file.path} both contain {title}. Pass one of them.")
        known[contents] = file


def pixel_libraries() -> dict[str, str]:
    """Return the versions of the libraries that decode and resize images and draw masks."""
    from importlib.metadata import version

    return {"pillow": version("pillow"), "libjpeg": str(features.version("jpg")), "pycocotools": version("pycocotools")}


def _contents(file: PackedFile) -> tuple[str, str, str]:
    return file.header["dataset"], file.header["split_by"], file.header["split"]
