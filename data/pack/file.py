"""A packed file: the images and masks of one split in HDF5.

Its HDF5 datasets are contiguous, so an image is one read at a known offset. h5py writes the structure of the file and
reads it when the file is opened. Rows are then read and written at their offsets by the operating system: forked
workers can share the open file, and a process that is killed while it writes rows cannot damage the structure.

Shapes: I images, R objects, S img_size.
"""

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lib.errors import MissingFileError, UserError
from lib.files import atomic_write, file_sha256
from refer.refer import REFER

FORMAT, VERSION = "CrossVLT packed split", 1
HEADER = "header"  # attribute of the file: JSON
EMPTY = bytes(32)  # digest of an image that is not written yet


def header_of(refer: REFER, split: str, img_size: int) -> dict[str, Any]:
    """Return what determines the content of a packed file, besides the image files."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "dataset": refer.dataset,
        "split_by": refer.splitBy,
        "split": split,
        "img_size": img_size,
        "annotations_sha256": {path.name: file_sha256(path) for path in (refer.refs_path, refer.instances_path)},
    }


def pack_command(header: Mapping[str, Any]) -> str:
    """Return the command that writes a packed file with this header."""
    names = f"--dataset {header['dataset']} --splitBy {header['split_by']} --split {header['split']}"
    return f"python -m data.pack {names} --img_size {header['img_size']}"


class PackedFile:
    """An open packed file.

    HDF5 datasets:
        ``images``: uint8 [I, 3, S, S], resized.
        ``masks``: uint8 [R, ceil(S·S / 8)], resized masks of gt_mask ``paper``, one bit per pixel (numpy.packbits).
        ``image_ids``: int64 [I].
        ``ann_ids``: int64 [R]. Image i has the objects from ``first_object[i]`` up to ``first_object[i + 1]``.
        ``first_object``: int64 [I + 1].
        ``sources``: uint8 [I, 40], SHA-256 of each image file (32 bytes) and its size in bytes (int64).
        ``digests``: uint8 [I, 32], SHA-256 of an image's rows in ``images``, ``masks`` and ``sources``; 0: not written.

    Attributes:
        header: see :func:`header_of`, and the versions of the libraries that made the pixels.
        image_ids, ann_ids, first_object: arrays.

    Args:
        path: of the file.

    Raises:
        MissingFileError: there is no such file.
        UserError: it is not a packed file, has another format version or is truncated.
    """

    def __init__(self, path: str | Path) -> None:
        import h5py  # only needed for packed files

        self.path = Path(path)
        if not self.path.is_file():
            raise MissingFileError(
                f"No such packed file: {path}. Write it with `python -m data.pack`, or pass --packed '' to read the "
                "image files."
            )
        try:
            with h5py.File(path, "r") as file:
                self.header: dict[str, Any] = json.loads(file.attrs[HEADER])
                found = self.header["format"], self.header["version"]
                if found == (FORMAT, VERSION):
                    names = ("images", "masks", "sources", "digests")
                    self._offsets = {name: file[name].id.get_offset() for name in names}
                    self.image_ids, self.ann_ids = file["image_ids"][:], file["ann_ids"][:]
                    self.first_object, self._digests = file["first_object"][:], file["digests"][:]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is not a packed file, or it is truncated. Write it with `python -m data.pack`."
            ) from error
        if found != (FORMAT, VERSION):
            raise UserError(
                f"{path} is a file of format {found[0]!r}, version {found[1]}; this code reads {FORMAT!r}, version "
                f"{VERSION}. Write it again with `python -m data.pack`."
            )
        side = self.header["img_size"]
        self._shapes = {"images": (3, side, side), "masks": (-(-side * side // 8),), "sources": (40,), "digests": (32,)}
        self._file: io.FileIO | None = None
        self._image_order, self._object_order = np.argsort(self.image_ids), np.argsort(self.ann_ids)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_file": None}  # spawned workers open the file themselves

    def check_header(self, expected: Mapping[str, Any]) -> None:
        """Raise a UserError if the file was packed from other annotations or with other settings than ``expected``."""
        for name, value in expected.items():
            if self.header.get(name) != value:
                if name == "annotations_sha256":
                    reason = "from other annotation files than those that are installed"
                else:
                    reason = f"with {name} {self.header.get(name)!r}, not {value!r}"
                raise UserError(
                    f"{self.path} was packed {reason}. Delete it and pack the split again: `{pack_command(expected)}`."
                )

    def is_complete(self) -> bool:
        """Return whether all images had been written when the file was opened."""
        return bool(self._digests.any(axis=1).all())

    def image_row(self, image_id: int) -> int:
        """Return the row of an image. KeyError: it is not in the file."""
        return _find(self.image_ids, self._image_order, image_id)

    def mask_row(self, ann_id: int) -> int:
        """Return the row of an annotation's mask. KeyError: it is not in the file."""
        return _find(self.ann_ids, self._object_order, ann_id)

    def read_image(self, row: int) -> np.ndarray:
        """Return an image, uint8 [3, S, S]."""
        return self._read("images", row)

    def read_mask(self, row: int) -> np.ndarray:
        """Return a mask, uint8 [S, S] of 0 and 1."""
        side = self.header["img_size"]
        return np.unpackbits(self._read("masks", row), count=side * side).reshape(side, side)

    def read_source(self, row: int) -> tuple[str, int]:
        """Return the SHA-256 (in hexadecimal) and the size in bytes of the file of an image."""
        content = self._read("sources", row).tobytes()
        return content[:32].hex(), int.from_bytes(content[32:], "little")

    def is_intact(self, row: int) -> bool:
        """Return whether an image, its masks and its source are as they were written. Reads all of them."""
        masks = [self._read("masks", k) for k in range(*self.first_object[row : row + 2])]
        digest = _digest(self._read("images", row), masks, self._read("sources", row))
        return self._read("digests", row).tobytes() == digest != EMPTY

    def write(self, out: BinaryIO, row: int, image: np.ndarray, masks: Sequence[np.ndarray], source: Path) -> None:
        """Write the rows of an image.

        Args:
            out: the file, opened for writing.
            row: of the image.
            image: uint8 [3, S, S].
            masks: uint8 [S, S] of 0 and 1, one for each object of the image, in the order of ``ann_ids``.
            source: the image file.
        """
        packed = [np.packbits(mask) for mask in masks]
        content = bytes.fromhex(file_sha256(source)) + source.stat().st_size.to_bytes(8, "little")
        origin = np.frombuffer(content, np.uint8)
        self._write(out, "images", row, image)
        for k, mask in zip(range(*self.first_object[row : row + 2]), packed, strict=True):
            self._write(out, "masks", k, mask)
        self._write(out, "sources", row, origin)
        self._write(out, "digests", row, np.frombuffer(_digest(image, packed, origin), np.uint8))  # last

    def _position(self, name: str, row: int) -> int:
        return self._offsets[name] + row * int(np.prod(self._shapes[name]))

    def _read(self, name: str, row: int) -> np.ndarray:
        if self._file is None:
            self._file = io.FileIO(self.path)
        content = np.empty(self._shapes[name], np.uint8)
        if os.preadv(self._file.fileno(), [content], self._position(name, row)) != content.nbytes:
            raise UserError(f"{self.path} is truncated. Write it again with `{pack_command(self.header)}`.")
        return content

    def _write(self, out: BinaryIO, name: str, row: int, content: np.ndarray) -> None:
        assert (content.dtype, content.shape) == (np.uint8, self._shapes[name]), (name, content.dtype, content.shape)
        view, position = memoryview(content.tobytes()), self._position(name, row)
        while view:
            written = os.pwrite(out.fileno(), view, position)
            view, position = view[written:], position + written


def create(path: Path, header: Mapping[str, Any], objects: Mapping[int, Sequence[int]]) -> None:
    """Write the structure of a packed file, without images and masks.

    Args:
        path: of the new file.
        header: stored in the file.
        objects: the annotation ids of the objects in each image, by image id.
    """
    import h5py

    side, count = header["img_size"], sum(map(len, objects.values()))
    ann_ids = [ann_id for of_image in objects.values() for ann_id in of_image]
    with atomic_write(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs[HEADER] = json.dumps(header)
        file["image_ids"], file["ann_ids"] = np.array(list(objects), np.int64), np.array(ann_ids, np.int64)
        file["first_object"] = np.cumsum([0, *map(len, objects.values())], dtype=np.int64)
        file["digests"] = np.zeros((len(objects), 32), np.uint8)
        # Space is reserved at once, without writing zeros to it: rows are written without h5py.
        reserve = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        reserve.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        reserve.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        for name, shape in (
            ("sources", (len(objects), 40)),
            ("masks", (count, -(-side * side // 8))),
            ("images", (len(objects), 3, side, side)),
        ):
            file.create_dataset(name, shape, np.uint8, dcpl=reserve.copy())


def _digest(image: np.ndarray, masks: Sequence[np.ndarray], source: np.ndarray) -> bytes:
    digest = hashlib.sha256(np.ascontiguousarray(image))
    for part in (*masks, source):
        digest.update(np.ascontiguousarray(part))
    return digest.digest()


def _find(ids: np.ndarray, order: np.ndarray, wanted: int) -> int:
    """Return the position of an id. ``order`` sorts ``ids``."""
    position = int(np.searchsorted(ids, wanted, sorter=order))
    if position == len(ids) or ids[order[position]] != wanted:
        raise KeyError(wanted)
    return int(order[position])
