"""Result files: one line of JSON per expression and protocol, and a second file with the settings of the evaluation.

A line of ``out.jsonl`` is one expression under one protocol:

    {"dataset": "refcoco", "split_by": "unc", "split": "val", "protocol": "paper", "index": 0, "image_id": 9,
     "ref_id": 3, "ann_id": 7, "sent_id": 5, "sentence": "left dog", "intersection": 90, "union": 120, "iou": 0.75,
     "mask": {"size": [480, 480], "counts": "…"}}

Lines are sorted by split, expression and protocol. ``mask`` is the predicted mask as COCO RLE, at the size at which it
was compared. ``out.jsonl.settings.json`` holds the checkpoint and its SHA-256, ``splits`` with their numbers of
expressions, and ``protocols`` with all their settings. While an evaluation runs, its lines are in
``out.jsonl.partial``, in the order of computation, below a first line with the settings and ``"complete": false``.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.dataset_refer_bert import ReferDataset
from lib.collector import ExpressionResult, ResultSink
from lib.errors import MissingFileError, UserError
from lib.files import Kind, atomic_write, check_replaceable, open_to_append, translate_write_errors, write_text
from lib.metrics import iou

FORMAT = "crossvlt results 1"
PARTIAL = ".partial"
# Settings that may differ when an evaluation is continued. The checkpoint is identified by its SHA-256, not its path,
# and the batch size may be lowered after running out of memory.
IGNORED_SETTINGS = ("checkpoint", "batch_size")
INTEGER_FIELDS = ("index", "image_id", "ref_id", "sent_id", "intersection", "union")
TEXT_FIELDS = ("split", "sentence", "protocol")
Line = dict[str, Any]


class ResultFile(ResultSink):
    """Writes a result file such that an interrupted evaluation can be continued.

    Call :meth:`open` before the evaluation. The last result completes the file.

    Args:
        path: of the result file.
        header: the settings. Results with other settings are never mixed in.
        replace: whether a complete file with other settings is replaced once this evaluation is complete; otherwise it
            is an error.
    """

    def __init__(self, path: str | Path, header: dict[str, Any], *, replace: bool = False) -> None:
        self.replace = replace
        self.path, self.partial, self.settings = Path(path), Path(f"{path}{PARTIAL}"), settings_path(path)
        # Converted as JSON converts it, so that it can be compared with the header of a file.
        self.header = json.loads(json.dumps({"format": FORMAT, "complete": False, **header}))
        self.num_results = sum(self.header["splits"].values()) * len(self.header["protocols"])
        self.num_written = 0
        self.resume_hint = f"{self.partial} holds the results so far. Run the same command again to continue."

    def is_complete(self) -> bool:
        """Return whether the complete file of an evaluation with these settings exists."""
        return self.path.exists() and not self.partial.exists() and not self._difference(self.path)

    def open(self) -> None:
        """Start a partial file, or continue the existing one.

        Raises:
            UserError: it cannot be written, or an existing file belongs to another evaluation.
        """
        if self.is_complete():
            return
        check_replaceable(self.settings, Kind.JSON_OBJECT)
        with translate_write_errors(self.partial):
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            if self.partial.exists() and _remove_truncated_line(self.partial):
                self._check(self.partial)
                self.num_written = sum(1 for _ in _lines(self.partial))
            else:
                if self.path.exists() and not self.replace:
                    self._check(self.path)
                self._append([self.header])
        self._finish_if_complete()

    def earlier_results(self, split: str) -> Iterator[ExpressionResult]:
        """Yield the stored results of a split."""
        for _, line in _lines(self.partial if self.partial.exists() else self.path):
            if line["split"] == split:
                values = (line[name] for name in ("index", "protocol", "intersection", "union"))
                yield ExpressionResult(*values, line.get("mask"))

    def write(self, dataset: ReferDataset, results: Sequence[ExpressionResult]) -> None:
        """Append results and flush them to the disk. UserError: the disk is full."""
        if not results:  # a complete file has no partial one to append to
            return
        with translate_write_errors(self.partial):
            self._append(_make_line(dataset, result) for result in results)
        self.num_written += len(results)
        self._finish_if_complete()

    def _append(self, lines: Iterable[Line]) -> None:
        with open_to_append(self.partial) as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _finish_if_complete(self) -> None:
        """Write the complete, sorted file once the partial one has all results."""
        if self.num_written < self.num_results:
            return
        splits, protocols = list(self.header["splits"]), [settings["name"] for settings in self.header["protocols"]]
        positions = sorted(
            (splits.index(line["split"]), line["index"], protocols.index(line["protocol"]), offset)
            for offset, line in _lines(self.partial)
        )
        with atomic_write(self.path) as temporary, open(temporary, "wb") as whole, open(self.partial, "rb") as partial:
            for *_, offset in positions:  # one line in memory at a time
                partial.seek(offset)
                whole.write(partial.readline())
        write_text(self.settings, json.dumps(self.header | {"complete": True}, indent=1, ensure_ascii=False) + "\n")
        self.partial.unlink()

    def _check(self, path: Path) -> None:
        difference = self._difference(path)
        if difference:
            raise UserError(f"{path} {difference}. Choose another file name or delete it.")

    def _difference(self, path: Path) -> str:
        """Return how an existing (partial or complete) file differs from this evaluation's, or an empty string."""
        try:
            found = read_header(path)
        except UserError:
            return "is not a result file"
        key = next(
            (
                key
                for key in {**found, **self.header}
                if key not in (*IGNORED_SETTINGS, "complete") and found.get(key) != self.header.get(key)
            ),
            None,
        )
        if key == "checkpoint_sha256":
            return (
                f"was written by another checkpoint ({str(found.get(key))[:8]}…, this one is {self.header[key][:8]}…)"
            )
        if key is not None:
            before, now = (_describe(header.get(key)) for header in (found, self.header))
            return f"was written with other settings ({key}: {before}, now {now})"
        if path == self.path:
            with open(path, "rb") as file:
                count = sum(1 for _ in file)
            if count != self.num_results:
                return f"has {count} lines instead of {self.num_results}"
        return ""


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
    return {
        "dataset": dataset.name,
        "split_by": dataset.split_by,
        "split": dataset.split,
        "protocol": result.protocol,
        "index": result.index,
        "image_id": expression.image_id,
        "ref_id": expression.ref_id,
        "ann_id": expression.ann_id,
        "sent_id": expression.sent_id,
        "sentence": expression.sentence,
        "intersection": result.intersection,
        "union": result.union,
        "iou": iou(result.intersection, result.union),
        "mask": result.mask,
    }


def counts_of(lines: Sequence[Line]) -> np.ndarray:
    """Return intersections and unions of lines, int64 [n, 2]."""
    return np.array([(line["intersection"], line["union"]) for line in lines], dtype=np.int64)


def settings_path(path: str | Path) -> Path:
    """Return the path of a result file's settings."""
    return Path(f"{path}.settings.json")


def read_results(path: str | Path) -> tuple[dict[str, Any], list[Line]]:
    """Return the settings and lines of a complete or partial result file.

    Raises:
        MissingFileError: no such file.
        UserError: not a result file, or corrupt.
    """
    path = Path(path)
    return read_header(path), [line for _, line in _lines(path)]


def read_header(path: Path) -> dict[str, Any]:
    """Return the settings of a result file: from the file beside it, or from the first line of a partial one.

    Raises:
        MissingFileError, UserError: as for :func:`read_results`.
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
    return header


def _remove_truncated_line(path: Path) -> bool:
    """Cut off what follows the last newline: a process was killed while writing it. Return whether any line is left."""
    end, position = 0, 0
    with open(path, "rb") as file:
        for line in file:
            position += len(line)
            if line.endswith(b"\n"):
                end = position
    os.truncate(path, end)
    return end > 0


def _lines(path: Path) -> Iterator[tuple[int, Line]]:
    """Yield each checked line with its offset in the file; the header and a truncated last line are skipped."""
    with open(path, "rb") as file:
        offset = 0
        for number, text in enumerate(file, 1):
            is_header = path.suffix == PARTIAL and number == 1
            is_truncated = path.suffix == PARTIAL and not text.endswith(b"\n")
            if not (is_header or is_truncated):
                line = _parse_line(text)
                if line is None:
                    raise UserError(f"{path} is corrupt: line {number} is not a result.")
                yield offset, line
            offset += len(text)


def _parse_line(text: bytes) -> Line | None:
    """Return a line of a result file, or None if it is not valid."""
    try:
        line = json.loads(text)
        valid = all(type(line[name]) is int for name in INTEGER_FIELDS)
        valid = valid and all(type(line[name]) is str for name in TEXT_FIELDS)
        return line if valid and 0 <= line["intersection"] <= line["union"] else None
    except (ValueError, KeyError, TypeError):
        return None
