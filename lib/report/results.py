"""Result files: one line of JSON per expression and protocol, and a second file with the settings of the evaluation.

A line of ``out.jsonl`` is one expression under one protocol:

    {"dataset": "refcoco", "split_by": "unc", "split": "val", "protocol": "paper", "index": 0, "image_id": 9,
     "file_name": "COCO_train2014_000000000009.jpg", "ref_id": 3, "ann_id": 7, "sent_id": 5, "sentence": "left dog",
     "intersection": 90, "union": 120, "iou": 0.75,
     "mask": {"size": [480, 480], "counts": "…"}, "crc32": "9b2d71c4"}

Lines are sorted by split, expression and protocol. ``mask`` is the predicted mask as COCO RLE, at the size at which it
was compared. ``crc32`` is the checksum of the other fields, so that an edited line is detected; lines without it are
accepted. ``out.jsonl.settings.json`` holds the checkpoint and its SHA-256, ``splits`` with their numbers of
expressions, and ``protocols`` with all their settings. While an evaluation runs, its lines are in
``out.jsonl.partial``, in the order of computation, below a first line with the settings and ``"complete": false``, and
the process holds the lock ``.out.jsonl.lock``.
"""

import json
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from data.dataset_refer_bert import ReferDataset
from lib.collector import ExpressionResult, ResultSink
from lib.errors import MissingFileError, UserError
from lib.files import Kind, atomic_write, check_replaceable, open_to_append, translate_write_errors, write_text
from lib.locks import lock
from lib.metrics import iou
from lib.protocols import PROTOCOLS
from lib.report.names import PARTIAL, settings_path
from utils import on_main

FORMAT = "crossvlt results 1"
# Settings that are not compared when an evaluation is continued. The checkpoint is identified by its SHA-256, not by
# its path and network, and the batch size may be lowered after running out of memory.
IGNORED_SETTINGS = ("checkpoint", "model", "batch_size")
DEFAULT_SETTINGS = {"precision": "float32"}  # of files written before these settings existed
INTEGER_FIELDS = ("index", "image_id", "ref_id", "sent_id", "intersection", "union")
TEXT_FIELDS = ("split", "sentence", "protocol")
Line = dict[str, Any]
Key = tuple[str, int, str]  # split, index, protocol


class ResultFile(ResultSink):
    """Writes a result file such that an interrupted evaluation can be continued.

    Use it as a context manager, on all processes; only the main process accesses the files. The last result completes
    the file.

    Args:
        path: of the result file.
        header: the settings. Results with other settings are never mixed in.
        replace: whether a complete file with other settings is replaced once this evaluation is complete; otherwise it
            is an error.

    Raises:
        UserError: on entering; the file cannot be written, another process is writing it, it belongs to another
            evaluation, or it is corrupt. Existing files are then left as they are.
    """

    def __init__(self, path: str | Path, header: dict[str, Any], *, replace: bool = False) -> None:
        self.replace = replace
        self.path, self.partial, self.settings = Path(path), Path(f"{path}{PARTIAL}"), settings_path(path)
        # Converted as JSON converts it, so that it can be compared with the header of a file.
        self.header = json.loads(json.dumps({"format": FORMAT, "complete": False, **header}))
        self.num_results = sum(self.header["splits"].values()) * len(self.header["protocols"])
        self.resume_hint = f"{self.partial} holds the results so far. Run the same command again to continue."
        self._stored: set[Key] = set()  # on the main process
        self._lock = ExitStack()

    def __enter__(self) -> "ResultFile":
        on_main(self._open)
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.close()

    def is_complete(self) -> bool:
        """Return whether the file has all results. Only valid on the main process."""
        return len(self._stored) == self.num_results

    def _open(self) -> None:
        """Lock the file. Start a partial file, continue an existing one, or use the complete file."""
        with ExitStack() as stack, translate_write_errors(self.path):
            lock_path = self.path.with_name(f".{self.path.name}.lock")
            busy = f"Cannot write {self.path}: another evaluation is writing it"
            stack.enter_context(lock(lock_path, busy, "Wait until it has finished, or choose another file name."))
            if self.partial.exists() and not self._is_cut_in_header():
                self._check_settings(self.partial)
                _remove_truncated_line(self.partial)
                self._stored = {key_of(line) for _, line in _lines(self.partial, self.header)}
                self._finish_if_complete()
            elif self.path.exists() and self._check_settings(self.path):
                self._stored = {key_of(line) for _, line in _lines(self.path, self.header)}
                self._check_complete(self.path)
            else:
                self._stored = set()
                check_replaceable(self.settings, Kind.JSON_OBJECT)
                write_text(self.partial, _to_text(self.header))
            self._lock = stack.pop_all()

    def earlier_results(self, split: str) -> Iterator[ExpressionResult]:
        """Yield the stored results of a split."""
        for _, line in _lines(self.path if self.is_complete() else self.partial, self.header):
            if line["split"] == split:
                values = (line[name] for name in ("index", "protocol", "intersection", "union"))
                yield ExpressionResult(*values, line.get("mask"))

    def write(self, dataset: ReferDataset, results: Sequence[ExpressionResult]) -> None:
        """Append results and flush them to the disk. UserError: the disk is full."""
        if not results:  # a complete file has no partial one to append to
            return
        with open_to_append(self.partial, must_exist=True) as file:  # it would lack the header otherwise
            file.write("".join(_to_text(_make_line(dataset, result)) for result in results).encode())
            file.flush()
            os.fsync(file.fileno())
        self._stored.update((dataset.split, result.index, result.protocol) for result in results)
        self._finish_if_complete()

    def _finish_if_complete(self) -> None:
        """Write the complete, sorted file once the partial one has all results."""
        if not self.is_complete():
            return
        splits, protocols = list(self.header["splits"]), [settings["name"] for settings in self.header["protocols"]]
        positions = []
        self._stored.clear()
        for offset, line in _lines(self.partial, self.header):
            self._stored.add(key_of(line))
            positions.append((splits.index(line["split"]), line["index"], protocols.index(line["protocol"]), offset))
        self._check_complete(self.partial)
        with atomic_write(self.path) as temporary, open(temporary, "wb") as whole, open(self.partial, "rb") as partial:
            for *_, offset in sorted(positions):  # one line in memory at a time
                partial.seek(offset)
                whole.write(partial.readline())
        write_text(self.settings, json.dumps(self.header | {"complete": True}, indent=1, ensure_ascii=False) + "\n")
        self.partial.unlink()

    def _is_cut_in_header(self) -> bool:
        """Return whether the partial file is an incomplete header, from a process that was killed while writing it."""
        header = _to_text(self.header).encode()
        with open(self.partial, "rb") as file:
            beginning = file.read(len(header))
        return beginning != header and header.startswith(beginning)

    def _check_complete(self, path: Path) -> None:
        """Raise a UserError if ``path``, whose keys are ``_stored``, lacks a result."""
        missing = [key for key in _expected_keys(self.header) if key not in self._stored]
        if missing:
            count = f"{len(missing)} of {self.num_results} results are missing"
            raise _corrupt(path, f"{count}, such as {_name(missing[0])}")

    def _check_settings(self, path: Path) -> bool:
        """Return whether an existing file was written by an evaluation with these settings.

        Raises:
            UserError: it was not, and must not be replaced.
        """
        try:
            found = read_header(path)
        except UserError as error:
            raise UserError(f"Cannot continue {path}: {error} Choose another file name.") from error
        key = next(
            (
                key
                for key in {**found, **self.header}
                if key not in (*IGNORED_SETTINGS, "complete") and found.get(key) != self.header.get(key)
            ),
            None,
        )
        if key is None:
            return True
        if self.replace and path == self.path:
            return False
        if key == "checkpoint_sha256":
            difference = f"by another checkpoint ({str(found.get(key))[:8]}…, this one is {self.header[key][:8]}…)"
        else:
            before, now = (_describe(header.get(key)) for header in (found, self.header))
            difference = f"with other settings ({key}: {before}, now {now})"
        raise UserError(f"{path} was written {difference}. Choose another file name or delete it.")


def _describe(value: Any) -> str:
    """Return a setting for a message: protocols by name, splits with their sizes, anything else as it is."""
    if isinstance(value, list) and all(isinstance(item, dict) and "name" in item for item in value):
        return ", ".join(str(item["name"]) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)


def _make_line(dataset: ReferDataset, result: ExpressionResult) -> Line:
    """Return a result as its line in a result file."""
    expression = dataset.expressions[result.index]
    line = {
        "dataset": dataset.name,
        "split_by": dataset.split_by,
        "split": dataset.split,
        "protocol": result.protocol,
        "index": result.index,
        "image_id": expression.image_id,
        "file_name": dataset.file_name(result.index),
        "ref_id": expression.ref_id,
        "ann_id": expression.ann_id,
        "sent_id": expression.sent_id,
        "sentence": expression.sentence,
        "intersection": result.intersection,
        "union": result.union,
        "iou": iou(result.intersection, result.union),
        "mask": result.mask,
    }
    return {**line, "crc32": checksum(line)}


def checksum(line: Line) -> str:
    """Return the CRC-32 of a line's fields other than ``crc32``, as JSON with sorted keys."""
    fields = {name: value for name, value in line.items() if name != "crc32"}
    return f"{zlib.crc32(json.dumps(fields, sort_keys=True).encode()):08x}"


def _to_text(line: Line) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def key_of(line: Line) -> Key:
    """Return what identifies a line: split, index and protocol."""
    return line["split"], line["index"], line["protocol"]


def _name(key: Key) -> str:
    return "split {}, index {}, protocol {}".format(*key)


def _expected_keys(header: dict[str, Any]) -> Iterator[Key]:
    """Yield the keys of a complete file."""
    for split, count in header["splits"].items():
        for index in range(count):
            yield from ((split, index, settings["name"]) for settings in header["protocols"])


def counts_of(lines: Sequence[Line]) -> np.ndarray:
    """Return intersections and unions of lines, int64 [n, 2]."""
    return np.array([(line["intersection"], line["union"]) for line in lines], dtype=np.int64)


def read_results(path: str | Path) -> tuple[dict[str, Any], list[Line]]:
    """Return the settings and lines of a complete or partial result file.

    The settings of a complete file without a settings file are derived from its lines, and ``complete`` is None.

    Raises:
        MissingFileError: no such file.
        UserError: not a result file, or corrupt.
    """
    path = Path(path)
    if path.is_file() and path.suffix != PARTIAL and not settings_path(path).exists():
        lines = [line for _, line in _lines(path, None)]
        if not lines:
            raise UserError(f"{path} contains no results.")
        return _derive_header(lines), lines
    header = read_header(path)
    return header, [line for _, line in _lines(path, header)]


def _derive_header(lines: Sequence[Line]) -> dict[str, Any]:
    """Return what the lines of a file say about its settings."""
    header: dict[str, Any] = {"format": FORMAT, "complete": None}
    header |= {name: lines[0].get(name) for name in ("dataset", "split_by")}
    protocols = dict.fromkeys(line["protocol"] for line in lines)
    header["protocols"] = [PROTOCOLS[name].settings() if name in PROTOCOLS else {"name": name} for name in protocols]
    indices: dict[str, set[int]] = {}
    for line in lines:
        indices.setdefault(line["split"], set()).add(line["index"])
    return header | {"splits": {split: len(found) for split, found in indices.items()}}


def read_header(path: Path) -> dict[str, Any]:
    """Return the settings of a result file: from the file beside it, or from the first line of a partial one.

    Raises:
        MissingFileError, UserError: as for :func:`read_results`. UserError also if there are no settings.
    """
    if not path.is_file():
        raise MissingFileError(f"Result file {path} does not exist.")
    source = path if path.suffix == PARTIAL else settings_path(path)
    try:
        with open(source, "rb") as file:
            header = json.loads(file.readline() if path.suffix == PARTIAL else file.read())
    except FileNotFoundError as error:
        raise UserError(f"{source} is missing. It holds the settings of {path}; keep both files together.") from error
    except OSError as error:
        raise UserError(f"Cannot read {source}: {error.strerror}.") from error
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise UserError(f"{source} was not written by test.py --predictions.")
    try:
        valid = all(type(count) is int for count in header["splits"].values())
        valid = valid and all(type(settings["name"]) is str for settings in header["protocols"])
    except (KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise UserError(f"{source} is corrupt: it does not name the splits and protocols.")
    return header | {name: value for name, value in DEFAULT_SETTINGS.items() if name not in header}


def _remove_truncated_line(path: Path) -> None:
    """Cut off what follows the last newline: a process was killed while writing it."""
    end, position = 0, 0
    with open(path, "rb") as file:
        for line in file:
            position += len(line)
            if line.endswith(b"\n"):
                end = position
    if end < position:
        os.truncate(path, end)


def _lines(path: Path, header: dict[str, Any] | None) -> Iterator[tuple[int, Line]]:
    """Yield each line with its offset in the file; the header and a truncated last line of a partial file are skipped.

    Args:
        path: of the result file.
        header: the settings that the lines must fit; None: any.

    Raises:
        UserError: a line is not a result, was edited, occurs twice, or does not belong to the evaluation.
    """
    names = {settings["name"] for settings in header["protocols"]} if header else set()
    first: dict[Key, int] = {}  # number of the line with this key
    with open(path, "rb") as file:
        offset = 0
        for number, text in enumerate(file, 1):
            is_header = path.suffix == PARTIAL and number == 1
            is_truncated = path.suffix == PARTIAL and not text.endswith(b"\n")
            if not (is_header or is_truncated):
                line = _parse_line(text)
                if line is None:
                    raise _corrupt(path, f"line {number} is not a result")
                key = key_of(line)
                if "crc32" in line and line["crc32"] != checksum(line):
                    raise _corrupt(path, f"line {number} ({_name(key)}) was edited: its checksum is wrong")
                size = header["splits"].get(line["split"], 0) if header else math.inf
                if not (0 <= line["index"] < size and (header is None or line["protocol"] in names)):
                    raise _corrupt(path, f"line {number} ({_name(key)}) does not belong to this evaluation")
                if key in first:
                    raise _corrupt(path, f"line {number} ({_name(key)}) repeats line {first[key]}")
                first[key] = number
                yield offset, line
            offset += len(text)


def _corrupt(path: Path, problem: str) -> UserError:
    remedy = "Restore the file from a copy, or delete it and evaluate again."
    if path.suffix == PARTIAL:
        remedy = "Delete the line, so that the same test.py command evaluates its expression again."
    return UserError(f"{path} is corrupt: {problem}. {remedy}")


def _parse_line(text: bytes) -> Line | None:
    """Return a line of a result file, or None if it is not valid."""
    try:
        line = json.loads(text)
        valid = all(type(line[name]) is int for name in INTEGER_FIELDS)
        valid = valid and all(type(line[name]) is str for name in TEXT_FIELDS)
        return line if valid and 0 <= line["intersection"] <= line["union"] else None
    except (ValueError, KeyError, TypeError):
        return None
