"""Result files: a line of JSON per expression and protocol, and beside it how they came about.

A line of ``out.jsonl`` is one expression under one protocol:

    {"dataset": "refcoco", "split_by": "unc", "split": "val", "protocol": "paper", "index": 0, "image_id": 9,
     "ref_id": 3, "ann_id": 7, "sent_id": 5, "sentence": "left dog", "intersection": 90, "union": 120, "iou": 0.75,
     "mask": {"size": [480, 480], "counts": "…"}}

ordered by split, expression, protocol; ``mask`` is the prediction as COCO RLE at the size it was judged at.
``out.jsonl.settings.json`` has the checkpoint and its SHA-256, ``splits`` with their numbers of expressions, and
``protocols`` with everything they settle. While an evaluation runs, its lines are in ``out.jsonl.partial``, in the
order they were done, under a first line with the settings, which says ``"complete": false``.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import MissingFileError, UserError
from lib.files import atomic_write, translate_write_errors, write_text

FORMAT = "crossvlt results 1"
PARTIAL = ".partial"
# Where the checkpoint lies doesn't matter, its SHA-256 says which it is; a batch that turned out too large may be
# followed by smaller ones.
INFORMATIVE = ("checkpoint", "batch_size")
Line = dict[str, Any]
NUMBERS = ("index", "image_id", "ref_id", "sent_id", "intersection", "union")


class ResultFile:
    """Writes a result file so that an evaluation which was stopped can go on.

    Args:
        path: of the lines.
        header: the settings; another evaluation's lines are never mixed in.
        replace: what to do with another evaluation's whole file: False: refuse, True: replace it in the end.
    """

    def __init__(self, path: str | Path, header: dict[str, Any], *, replace: bool = False) -> None:
        self.replace = replace
        self.path, self.partial, self.settings = Path(path), Path(f"{path}{PARTIAL}"), settings_path(path)
        self.header = json.loads(json.dumps({"format": FORMAT, "complete": False, **header}))  # as it is read back

    def is_finished(self) -> bool:
        """Whether the file is there already, whole, and of an evaluation with these settings."""
        if not self.path.exists() or self.partial.exists():
            return False
        try:
            header = _header_of(self.path)
        except UserError:
            return False
        with open(self.path, "rb") as file:
            number = sum(1 for _ in file)
        whole = sum(self.header["splits"].values()) * len(self.header["protocols"])
        return _differing(header, self.header | {"complete": True}) is None and number == whole

    def begin(self) -> None:
        """Begin the partial file, or go on with the one that is there: :meth:`lines` are what it has.

        Raises:
            UserError: it can't be written; what is there is another evaluation's.
        """
        if self.is_finished():
            return
        with translate_write_errors(self.partial):
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            if not self.partial.exists() or not _drop_torn_line(self.partial):
                if self.path.exists() and not self.replace:
                    raise UserError(
                        f"{self.path} is there already, and not this evaluation's ({self._why()}): name another file, "
                        "or delete it"
                    )
                self._append([self.header])
                return
        found = _header_of(self.partial)
        other = _differing(found, self.header)
        if other:
            raise UserError(
                f"{self.partial} is left from an evaluation with another {other} ({found.get(other)}, now "
                f"{self.header.get(other)}): go on with that one, name another file, or delete it"
            )

    def _why(self) -> str:
        """How the whole file that is there differs from this evaluation's."""
        try:
            found = _header_of(self.path)
        except UserError:
            return "it isn't a result file"
        other = _differing(found, self.header | {"complete": True})
        return f"another {other}: {found.get(other)}, now {self.header.get(other)}" if other else "lines are missing"

    def lines(self) -> Iterator[Line]:
        """What is done so far: of the partial file in the order it was done, or of the whole one."""
        return (line for _, line in _lines(self.partial if self.partial.exists() else self.path))

    def append(self, lines: Iterable[Line]) -> None:
        """Add lines, so that they outlive this process. UserError: the disk is full."""
        lines = list(lines)
        if lines:  # else there may be no partial file: a finished evaluation has nothing to add
            with translate_write_errors(self.partial):
                self._append(lines)

    def _append(self, lines: Iterable[Line]) -> None:
        with open(self.partial, "ab") as file:
            for line in lines:
                file.write(_encoded(line))
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Make the whole, ordered file of the partial one; nothing, where it is whole already."""
        if not self.partial.exists():
            return
        splits, protocols = list(self.header["splits"]), [one["name"] for one in self.header["protocols"]]
        places = sorted(
            (splits.index(line["split"]), line["index"], protocols.index(line["protocol"]), offset)
            for offset, line in _lines(self.partial)
        )
        with atomic_write(self.path) as aside, open(aside, "wb") as whole, open(self.partial, "rb") as partial:
            for *_, offset in places:  # one line in memory at a time
                partial.seek(offset)
                whole.write(partial.readline())
        write_text(self.settings, json.dumps(self.header | {"complete": True}, indent=1, ensure_ascii=False) + "\n")
        self.partial.unlink()


def counts_of(lines: Sequence[Line]) -> np.ndarray:
    """Intersections and unions of lines, int64 [n, 2]."""
    return np.array([(line["intersection"], line["union"]) for line in lines], dtype=np.int64)


def settings_path(path: str | Path) -> Path:
    """Where the settings of a result file are."""
    return Path(f"{path}.settings.json")


def read_results(path: str | Path) -> tuple[dict[str, Any], list[Line]]:
    """A result file's settings and lines; a partial one's too.

    Raises:
        MissingFileError: no such file.
        UserError: not a result file, or damaged.
    """
    path = Path(path)
    return _header_of(path), [line for _, line in _lines(path)]


def _differing(a: dict[str, Any], b: dict[str, Any]) -> str | None:
    """A setting that two headers don't share, of those that tell evaluations apart."""
    return next((key for key in {**a, **b} if key not in INFORMATIVE and a.get(key) != b.get(key)), None)


def _encoded(line: dict[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def _drop_torn_line(path: Path) -> bool:
    """Cut off what follows the last newline: a process was killed while writing it. Whether any line is left."""
    content_end, position = 0, 0
    with open(path, "rb") as file:
        for line in file:
            position += len(line)
            if line.endswith(b"\n"):
                content_end = position
    os.truncate(path, content_end)
    return content_end > 0


def _header_of(path: Path) -> dict[str, Any]:
    """The settings of a result file: beside it, or a partial one's first line."""
    if not path.is_file():
        raise MissingFileError(f"no result file {path}")
    source = path if path.suffix == PARTIAL else settings_path(path)
    try:
        with open(source, "rb") as file:
            header = json.loads(file.readline() if path.suffix == PARTIAL else file.read())
    except FileNotFoundError as error:
        raise UserError(f"{source} is missing: it says how {path} came about, keep them together") from error
    except OSError as error:
        raise UserError(f"can't read {source}: {error.strerror}") from error
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise UserError(f"{source} doesn't belong to a result file of test.py --predictions")
    return header


def _lines(path: Path) -> Iterator[tuple[int, Line]]:
    """Every line, checked, with its position in the file; a partial file's first line is its header."""
    with open(path, "rb") as file:
        offset = 0
        for number, text in enumerate(file, 1):
            if path.suffix == PARTIAL and (number == 1 or not text.endswith(b"\n")):
                offset += len(text)  # the header, or a line that is being written or torn
                continue
            try:
                line = json.loads(text)
                numbers = [line[name] for name in NUMBERS]
                good = all(type(n) is int for n in numbers) and 0 <= line["intersection"] <= line["union"]
                good = good and all(type(line[name]) is str for name in ("split", "sentence", "protocol"))
            except (ValueError, KeyError, TypeError):
                good = False
            if not good:
                raise UserError(f"{path}: line {number} is damaged")
            yield offset, line
            offset += len(text)
