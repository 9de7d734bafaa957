"""Read the two annotation files of a REFER dataset, refs(splitBy).p and instances.json, and check every record.

The files are downloaded from the internet, so their content is not trusted. Any problem is reported as a UserError that
names the file and the record.
"""

import io
import json
import pickle
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib.errors import MissingFileError, UserError
from refer.datasets import COCO_DATASETS, DATASETS
from refer.masks import MAX_PIXELS, MAX_SIDE

Record = dict[str, Any]
Check = Callable[[Any], str]  # returns what is wrong with a value, or ""

MAX_SPLIT_LENGTH = 100  # characters; a split's name becomes part of file names
CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029]")  # characters that break a line or control a terminal
DOWNLOAD_AGAIN = "Download it again; see refer/README.md."


def is_file_below(name: str) -> bool:
    """Return whether a file name in an annotation file stays inside its folder and is safe to print."""
    return not (set("\\:") & set(name) or CONTROL.search(name) or {"", ".", ".."} & set(name.split("/")))


def _integer(value: Any) -> str:
    if type(value) is not int:  # a bool is not an id
        return _wrong_type("int", value)
    return "" if -(2**63) <= value < 2**63 else "does not fit into 64 bits"


def _side(value: Any) -> str:
    return _integer(value) or ("" if 1 <= value <= MAX_SIDE else f"must be between 1 and {MAX_SIDE}, not {value}")


def _text(value: Any) -> str:
    if type(value) is not str:
        return _wrong_type("str", value)
    return "" if value.isascii() or not re.search("[\ud800-\udfff]", value) else "is not valid Unicode"


def _split_name(value: Any) -> str:
    if problem := _text(value):
        return problem
    is_name = len(value) <= MAX_SPLIT_LENGTH and not set("/\\") & set(value) and not CONTROL.search(value)
    return "" if is_name else f"{_quoted(value)} is not a valid name"


def _file_name(value: Any) -> str:
    return _text(value) or ("" if is_file_below(value) else f"{_quoted(value)} is not a path below the image folder")


def _filled_list(value: Any) -> str:
    if type(value) is not list:
        return _wrong_type("list", value)
    return "" if value else "is empty"


def _wrong_type(expected: str, value: Any) -> str:
    return f"must be {expected}, not {type(value).__name__}"


# The fields that each kind of record must have. The first one is its id, which must be unique. A segmentation and a
# bbox are checked when they are used.
FIELDS: dict[str, dict[str, Check]] = {
    "refs": {
        "ref_id": _integer,
        "ann_id": _integer,
        "image_id": _integer,
        "split": _split_name,
        "sentences": _filled_list,
    },
    "sentences": {"sent_id": _integer, "raw": _text},
    "sentences without raw": {"sent_id": _integer, "sent": _text},
    "images": {"id": _integer, "width": _side, "height": _side, "file_name": _file_name},
    "annotations": {"id": _integer, "image_id": _integer, "category_id": _integer},
    "categories": {"id": _integer, "name": _text},
}


def read_refs(path: Path) -> list[Record]:
    """Read the refs of a refs(splitBy).p.

    Raises:
        UserError: the file is corrupt, or a record is malformed.
        MissingFileError: there is no such file.
    """
    data = _read(path)
    try:
        refs = _PlainUnpickler(path, _plain_opcodes(data)).load()
    except UserError:
        raise
    except Exception as error:  # a corrupt pickle can raise almost any exception
        raise _corrupt(path, error) from error
    if type(refs) is not list or not refs:
        raise UserError(f"{path}: must be a list of at least one ref")
    ref_ids: set[int] = set()
    sent_ids: set[int] = set()
    for row, ref in enumerate(refs):
        _check_record(ref, FIELDS["refs"], ref_ids, f"{path}: refs[{row}]")
        for k, sentence in enumerate(ref["sentences"]):
            has_raw = type(sentence) is dict and "raw" in sentence
            fields = FIELDS["sentences" if has_raw else "sentences without raw"]
            _check_record(sentence, fields, sent_ids, f"{path}: refs[{row}] (ref_id {ref['ref_id']}) sentences[{k}]")
    return refs


def read_instances(path: Path) -> dict[str, list[Record]]:
    """Read the images, annotations and categories of an instances.json.

    Raises:
        UserError: the file is corrupt, or a record is malformed.
        MissingFileError: there is no such file.
    """
    data = _read(path)
    try:
        instances = json.loads(data)
    except Exception as error:  # JSONDecodeError, UnicodeDecodeError, RecursionError, …
        raise _corrupt(path, error) from error
    parts = ("images", "annotations", "categories")
    if type(instances) is not dict or any(type(instances.get(part)) is not list for part in parts):
        raise UserError(f"{path}: must be a dict with the lists {', '.join(parts)}")
    for part in parts:
        ids: set[int] = set()
        for row, record in enumerate(instances[part]):
            _check_record(record, FIELDS[part], ids, f"{path}: {part}[{row}]")
    for image in instances["images"]:
        W, H = image["width"], image["height"]
        if W * H > MAX_PIXELS:
            raise UserError(f"{path}: image {image['id']} has {W}x{H} pixels. At most {MAX_PIXELS:,} are supported.")
    return {part: instances[part] for part in parts}


def remedy(path: Path) -> str:
    """Return a sentence that says how to get a missing annotation file."""
    dataset, root = path.parent.name, shlex.quote(str(path.parent.parent))
    if dataset in COCO_DATASETS:
        installed_by_default = ("instances.json", f"refs({DATASETS[dataset][0]}).p")
        again = "" if path.name in installed_by_default else " --again"
        return f"Run `python -m refer.prepare --dataset {dataset} --root {root}{again}`."
    if dataset in DATASETS:
        return f"Run `python -m data.{dataset} --root {root}`."
    return "See docs/custom_data.md."


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFileError(f"{path} is missing. {remedy(path)}") from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}") from error


def _quoted(text: str) -> str:
    """Return text from a file in a form for error messages: quoted, on one line, at most 200 characters."""
    quoted = repr(text)
    return quoted if len(quoted) <= 200 else f"{quoted[:200]}…"


def _corrupt(path: Path, error: Exception) -> UserError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return UserError(f"{path} is corrupt or in another format ({reason}). {DOWNLOAD_AGAIN}")


def _check_record(record: Any, fields: dict[str, Check], ids: set[int], where: str) -> None:
    """Check a record's fields and add its id to ``ids``.

    Args:
        fields: field name to check; the first field is the record's id.
        ids: of the preceding records.
        where: file, list and row, for error messages.

    Raises:
        UserError: the record is not a dict, a field is missing or not valid, or its id is already in ``ids``.
    """
    if type(record) is not dict:
        raise UserError(f"{where}: {_wrong_type('dict', record)}")
    id_name = next(iter(fields))
    for name, check in fields.items():
        problem = check(record[name]) if name in record else "is missing"
        if problem:
            which = "" if name == id_name else f" ({id_name} {record[id_name]})"
            raise UserError(f"{where}{which}: {name} {problem}")
    if record[id_name] in ids:
        raise UserError(f"{where}: {id_name} {record[id_name]} occurs twice")
    ids.add(record[id_name])


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler for lists, dicts, text and numbers that refuses everything else. Python 2's str is decoded as UTF-8."""

    def __init__(self, path: Path, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        raise UserError(
            f"{self.path} was not loaded: it refers to the Python object {_quoted(f'{module}.{name}')}, but refs "
            f"consist only of lists, dicts, text and numbers. {DOWNLOAD_AGAIN}"
        )

    def persistent_load(self, pid: Any) -> Any:
        raise UserError(
            f"{self.path} was not loaded: it refers to an object outside the file (a persistent id). {DOWNLOAD_AGAIN}"
        )


# Opcodes of plain data with their arguments; memo indices are below 2**24. The number of repetitions is limited because
# the matcher allocates memory for each repetition.
_PLAIN_RUN = re.compile(
    rb"(?:[N\x88\x89(\]ael}dsu\x94]|[\x80Khq].|M..|[Jj]....|G.{8}|r...\x00|"
    rb"[SVF][^\n]*\n|[ILg][^\n]{0,22}\n|p\d{1,7}\n){0,500}",
    re.DOTALL,
)
# Opcodes of text and long integers, with the number of bytes that their length takes.
_LENGTH_PREFIXED = {b"U": 1, b"\x8a": 1, b"\x8c": 1, b"T": 4, b"X": 4, b"\x8b": 4, b"\x8d": 8}
_FRAME = b"\x95"
_LAST = {b".", b"c", b"\x93", b"i", b"P", b"Q"}  # the end of the pickle, and the opcodes that _PlainUnpickler refuses
MAX_LONG_INTEGERS = 1000  # integers beyond 64 bits; valid refs have none


def _plain_opcodes(data: bytes) -> bytes:
    """Return a pickle without its frames, after checking that its opcodes build only plain data.

    Refusing all classes in ``find_class`` is not enough:

    - a memo index of four bytes makes the unpickler allocate up to 64 GiB;
    - hashing thousands of nested tuples crashes the interpreter;
    - large integers can be chosen to have equal hashes, and as keys of a dict each is compared with all others.

    Frames only suggest how far to read ahead. They are removed because Python's unpickler skips the rest of
    a frame that ends within an argument, so it would not execute the opcodes that were checked.

    Raises:
        ValueError: an opcode is not plain data, unless it follows the end or an opcode that _PlainUnpickler refuses.
    """
    position = copied = long_integers = 0
    parts = []
    while True:
        start, position = position, _PLAIN_RUN.match(data, position).end()
        opcode = data[position : position + 1]
        if opcode in _LENGTH_PREFIXED:
            content = position + 1 + _LENGTH_PREFIXED[opcode]
            length = int.from_bytes(data[position + 1 : content], "little")
            position = content + length
            long_integers += opcode in b"\x8a\x8b" and length > 8
            if long_integers > MAX_LONG_INTEGERS:
                raise ValueError("too many integers beyond 64 bits")
        elif opcode == _FRAME:
            parts.append(data[copied:position])
            position = copied = position + 9
        elif opcode in _LAST:
            return b"".join([*parts, data[copied:]])
        elif position == start:
            raise ValueError(f"truncated, or not plain data, at byte {position}")
