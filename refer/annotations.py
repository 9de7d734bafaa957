"""Reads the two files of a REFER dataset and trusts nothing in them: what is wrong ends in a UserError that names the
file and the record."""

import io
import json
import pickle
import re
import shlex
from pathlib import Path
from typing import Any

from lib.errors import MissingFileError, UserError
from refer.datasets import COCO_DATASETS, DATASETS
from refer.masks import MAX_PIXELS, MAX_SIDE

Record = dict[str, Any]

FIELDS: dict[str, dict[str, type]] = {  # what each record must have, its id first
    "refs": {"ref_id": int, "ann_id": int, "image_id": int, "split": str, "sentences": list},
    "images": {"id": int, "width": int, "height": int, "file_name": str},
    "annotations": {"id": int, "image_id": int, "category_id": int},
    "categories": {"id": int, "name": str},
}
MAX_SPLIT = 100  # characters of a split's name, which becomes part of a file's where pictures are drawn
CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029]")  # what would break a line, or steer a terminal


def read_refs(path: Path) -> list[Record]:
    """The refs of a refs(splitBy).p, each checked by itself. UserError, MissingFileError: as REFER."""
    data = _read(path)
    try:
        refs = _PlainUnpickler(path, _plain_opcodes(data)).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise _damaged(path, error) from error
    if type(refs) is not list or not refs:
        raise UserError(f"{path}: should be a list of refs, and not empty")
    ref_ids: set[int] = set()
    sent_ids: set[int] = set()
    for row, ref in enumerate(refs):
        _check(ref, FIELDS["refs"], ref_ids, f"{path}: refs[{row}]")
        where = f"{path}: refs[{row}] (ref_id {ref['ref_id']})"
        if len(ref["split"]) > MAX_SPLIT or set("/\\") & set(ref["split"]) or CONTROL.search(ref["split"]):
            raise UserError(f"{where}: split {_shown(ref['split'])} is not a name")
        if not ref["sentences"]:
            raise UserError(f"{where}: sentences is empty")
        for sentence in ref["sentences"]:
            text = "raw" if type(sentence) is dict and "raw" in sentence else "sent"
            _check(sentence, {"sent_id": int, text: str}, sent_ids, where)
    return refs


def read_instances(path: Path) -> dict[str, list[Record]]:
    """images, annotations and categories of an instances.json, checked but for each bbox and segmentation, which
    getRefBox and getMask check. UserError, MissingFileError: as REFER."""
    data = _read(path)
    try:
        instances = json.loads(data)
    except Exception as error:  # JSONDecodeError, UnicodeDecodeError, RecursionError, …
        raise _damaged(path, error) from error
    parts = ("images", "annotations", "categories")
    if type(instances) is not dict or any(type(instances.get(part)) is not list for part in parts):
        raise UserError(f"{path}: should be a dict with the lists {', '.join(parts)}")
    for part in parts:
        known: set[int] = set()
        for row, record in enumerate(instances[part]):
            _check(record, FIELDS[part], known, f"{path}: {part}[{row}]")
    for image in instances["images"]:
        where, name = f"{path}: image {image['id']}", image["file_name"]
        W, H = image["width"], image["height"]
        if not (1 <= W <= MAX_SIDE and 1 <= H <= MAX_SIDE and W * H <= MAX_PIXELS):
            raise UserError(f"{where}: {W}x{H} is not a picture's size")
        if not is_file_below(name):
            raise UserError(f"{where}: file_name {_shown(name)} is not a file below the image folder")
    return {part: instances[part] for part in parts}


def remedy(path: Path) -> str:
    """Where an annotation file is to be had that isn't there."""
    dataset, root = path.parent.name, shlex.quote(str(path.parent.parent))
    if dataset in COCO_DATASETS:
        needed = ("instances.json", f"refs({DATASETS[dataset][0]}).p")
        again = "" if path.name in needed else " --again"
        return f"`python -m refer.prepare --dataset {dataset} --root {root}{again}` brings it"
    return f"`python -m data.{dataset} --root {root}` makes it" if dataset in DATASETS else "see docs/custom_data.md"


def is_file_below(name: str) -> bool:
    """Whether a name from a file is that of a file in a folder or its subfolders, and fit to be shown."""
    return not (set("\\:") & set(name) or CONTROL.search(name) or {"", ".", ".."} & set(name.split("/")))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFileError(f"{path} is missing: {remedy(path)}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _shown(text: str) -> str:
    """A text from the file as it may stand in a message: quoted, on one line, not longer than others."""
    quoted = repr(text)
    return quoted if len(quoted) <= 200 else f"{quoted[:200]}…"


def _damaged(path: Path, error: Exception) -> UserError:
    told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return UserError(f"{path} is damaged or of another format ({told}): get it again, see refer/README.md")


def _check(record: Any, fields: dict[str, type], known: set[int], where: str) -> None:
    """UserError unless the record has these fields of exactly these types (a bool is not an int), and an id, the
    first of them, that is not yet among `known`, to which it is added."""
    if type(record) is not dict:
        raise UserError(f"{where}: should be a dict, is {type(record).__name__}")
    id_name = next(iter(fields))
    for name, kind in fields.items():
        value = record.get(name)
        if type(value) is not kind:
            found = type(value).__name__ if name in record else "missing"
        elif kind is int and not -(2**63) <= value < 2**63:
            found = "beyond 64 bits"
        elif kind is str and not value.isascii() and re.search("[\ud800-\udfff]", value):
            found = "not Unicode"
        else:
            continue
        whose = "" if name == id_name else f" ({id_name} {record[id_name]})"
        raise UserError(f"{where}{whose}: {name} should be {kind.__name__}, is {found}")
    if record[id_name] in known:
        raise UserError(f"{where}: {id_name} {record[id_name]} is there twice")
    known.add(record[id_name])


class _PlainUnpickler(pickle.Unpickler):
    """Makes lists, dicts, text and numbers, refuses all else. Python 2's byte strings are read as UTF-8."""

    def __init__(self, path: Path, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        raise UserError(
            f"{self.path} asks for {_shown(f'{module}.{name}')}, but refs are only lists, dicts, text and numbers: "
            "not loaded; get it again, see refer/README.md"
        )

    def persistent_load(self, pid: Any) -> Any:
        raise UserError(
            f"{self.path} asks for an object outside the file (a persistent id): "
            "not loaded; get it again, see refer/README.md"
        )


# Opcodes of plain data with their arguments; memo numbers below 2**24. Bounded, for re keeps a state per step.
_PLAIN_RUN = re.compile(
    rb"(?:[N\x88\x89(\]ael}dsu\x94]|[\x80Khq].|M..|[Jj]....|G.{8}|r...\x00|"
    rb"[SVF][^\n]*\n|[ILg][^\n]{0,22}\n|p\d{1,7}\n){0,500}",
    re.DOTALL,
)
# Text and long integers, by the bytes their length takes; the end and what the unpickler refuses by name.
_COUNTED = {b"U": 1, b"\x8a": 1, b"\x8c": 1, b"T": 4, b"X": 4, b"\x8b": 4, b"\x8d": 8}
_LAST = {b".", b"c", b"\x93", b"i", b"P", b"Q"}
MAX_LONG = 1000  # integers beyond 64 bits; refs have none


def _plain_opcodes(data: bytes) -> bytes:
    """The pickle without its frames, which are but hints for reading ahead: where one ends within an argument, Python's
    unpickler goes on behind bytes that it never read, and would run others than those checked here.

    ValueError unless only plain data comes before the end, or before what _PlainUnpickler refuses by name.

    A find_class that refuses everything is not enough: a memo number of four bytes makes the unpickler allocate up
    to 64 GiB, and thousands of nested tuples crash the interpreter when hashed. Nor may there be many large integers:
    a dict that has them as keys compares each with all before, if they are chosen to have one hash.
    """
    at = kept = long = 0
    parts = []
    while True:
        start, at = at, _PLAIN_RUN.match(data, at).end()
        opcode = data[at : at + 1]
        if opcode in _COUNTED:
            text = at + 1 + _COUNTED[opcode]
            length = int.from_bytes(data[at + 1 : text], "little")
            at = text + length
            long += opcode in b"\x8a\x8b" and length > 8
            if long > MAX_LONG:
                raise ValueError("too many integers beyond 64 bits")
        elif opcode == b"\x95":
            parts.append(data[kept:at])
            at = kept = at + 9
        elif opcode in _LAST:
            return b"".join([*parts, data[kept:]])
        elif at == start:
            raise ValueError(f"cut short, or not plain data at byte {at}")
