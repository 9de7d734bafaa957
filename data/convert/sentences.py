"""Read a sentence file: one row per sentence, with the image and the object that it refers to.

The first line of a CSV or TSV file names the columns. Each line of a JSONL file is an object with these names as keys.
Every error message starts with file and line: ``sentences.csv:17: …``.
"""

import csv
import difflib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from lib.errors import MissingFileError, UserError
from refer.annotations import Record

DELIMITERS = {".csv": ",", ".tsv": "\t"}
COLUMNS = {  # by the column that identifies the object
    "annotation_id": ("image", "annotation_id", "sentence", "split"),
    "mask": ("image", "mask", "sentence", "split", "category"),
}
REQUIRED_COLUMNS = ("image", "annotation_id", "sentence")
MAX_LINE = 1_000_000  # bytes; a file without line breaks must not fill the memory
MAX_SENTENCE = 20_000  # characters
SPLIT_NAME = re.compile(r"train|val|test([ABC]{1,3}|[a-z0-9_-]*)")  # names that REFER.getRefIds accepts
CONTROL_CHARACTER = re.compile("[\0-\x1f\x7f\ud800-\udfff]")


class Row(NamedTuple):
    """A sentence and the object that it refers to. Texts are stripped; a missing value is an empty text."""

    location: str  # file and line, for messages
    image: str  # file name or COCO id
    object: str  # annotation id or file name of the mask
    sentence: str
    split: str
    category: str


def read_sentences(path: Path, object_column: str) -> tuple[list[Row], list[str]]:
    """Read all rows in file order.

    Args:
        path: a .csv, .tsv or .jsonl file in UTF-8.
        object_column: the column that identifies the object: ``annotation_id``, or ``mask``, which is optional.

    Returns:
        The rows, and the names of unused columns.

    Raises:
        UserError: the file is missing or has another suffix; a row is invalid.
    """
    suffix = path.suffix.lower()
    if suffix in DELIMITERS:
        records = _read_table(path, DELIMITERS[suffix], object_column)
    elif suffix == ".jsonl":
        records = _read_json_lines(path, object_column)
    else:
        raise UserError(f"--sentences {path}: the name must end in .csv, .tsv or .jsonl.")
    rows: list[Row] = []
    unused: set[str] = set()
    for location, record in records:
        with located(location):
            rows.append(_row(location, record, object_column))
        unused |= record.keys() - set(COLUMNS[object_column])
    if not rows:
        raise UserError(f"{path} contains no sentences.")
    _check_complete(object_column, {row.location: row.object for row in rows})
    _check_complete("split", {row.location: row.split for row in rows})
    return rows, sorted(unused)


@contextmanager
def located(location: str) -> Iterator[None]:
    """Prefix the message of a UserError in this block with the file and line of a row."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{location}: {error}") from error


def words(sentence: str) -> list[str]:
    """Return the lowercase words of a sentence without punctuation, as REFER stores them in ``tokens``."""
    return re.findall(r"\w+", re.sub("['’]", "", sentence.lower()))


def _read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the location (file and line) and the text of each line."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise MissingFileError(f"--sentences {path}: {error.strerror}") from error
    with file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            location = f"{path}:{number}"
            if len(line) > MAX_LINE:
                raise UserError(f"{location}: the line is longer than {MAX_LINE} bytes.")
            if b"\0" in line:
                raise UserError(f"{location}: the line contains a NUL byte. Save the file as UTF-8 text.")
            try:
                yield location, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{location}: byte {error.start + 1} is not UTF-8. Save the file as UTF-8.") from error


def _read_table(path: Path, delimiter: str, object_column: str) -> Iterator[tuple[str, Record]]:
    """Yield the location and the fields of each row of a CSV or TSV file. Empty lines are skipped."""
    columns: list[str] = []
    for location, line in _read_lines(path):
        try:
            fields = next(csv.reader([line], delimiter=delimiter, strict=True))
        except csv.Error as error:
            hint = "Check the quotation marks; a sentence cannot contain a line break."
            raise UserError(f"{location}: {error}. {hint}") from error
        if not any(field.strip() for field in fields):
            continue
        if not columns:
            columns = [name.strip().lower() for name in fields]
            if len(columns) == 1 and (separators := set(columns[0]) & set(",;\t|")):
                raise UserError(
                    f"{location}: the columns are separated by {min(separators)!r}. Use commas in .csv and tabs in "
                    ".tsv files."
                )
            with located(location):
                _check_columns(tuple(columns), object_column)
        elif len(fields) != len(columns):
            raise UserError(
                f"{location}: {len(fields)} fields, but the first line names {len(columns)} columns. A sentence that "
                "contains a comma needs quotation marks."
            )
        else:
            yield location, dict(zip(columns, fields, strict=True))


def _read_json_lines(path: Path, object_column: str) -> Iterator[tuple[str, Record]]:
    """Yield the location and the fields of each line of a JSONL file. Empty lines are skipped."""
    for location, line in _read_lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=_record)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{location}: invalid JSON ({' '.join(str(error).split())[:100]}).") from error
        if not isinstance(record, dict):
            raise UserError(f"{location}: must be a JSON object, not {type(record).__name__}.")
        with located(location):
            _check_columns(tuple(record), object_column)
        yield location, record


def _record(pairs: list[tuple[str, Any]]) -> Record:
    """Return the keys and values of a JSON object as a dict. Raise a ValueError if a key occurs twice."""
    record: Record = {}
    for key, value in pairs:
        name = key.strip().lower()
        if name in record:
            raise ValueError(f"key {listed([name])} occurs twice")
        record[name] = value
    return record


@lru_cache(maxsize=100)  # most lines of a JSONL file have the same keys
def _check_columns(columns: tuple[str, ...], object_column: str) -> None:
    """Raise a UserError if a column is repeated, missing or probably misspelled."""
    repeated = [name for name in columns if name and columns.count(name) > 1]
    if repeated:
        raise UserError(f"the column {listed(repeated[:1])} occurs twice.")
    known = COLUMNS[object_column]
    missing = [name for name in known if name in REQUIRED_COLUMNS and name not in columns]
    if missing:
        raise UserError(f"no column {', '.join(missing)}. Found: {listed(columns)}.")
    absent = [name for name in known if name not in columns]
    for name in columns:
        close = difflib.get_close_matches(name, absent, n=1, cutoff=0.75) if name not in known else []
        # Ids of other things, such as image_id, are common and no mistake.
        if close and (not name.endswith("_id") or close[0] == "annotation_id"):
            raise UserError(f"unknown column {listed([name])}. Did you mean {close[0]}?")


def listed(columns: Iterable[str]) -> str:
    """Return the names of columns for a message, shortened and on one line."""
    names = (" ".join(name.split())[:50] or "(unnamed)" for name in columns)
    return ", ".join(names)[:300] or "nothing"


def _row(location: str, record: Record, object_column: str) -> Row:
    """Check the values of a row. Messages of a UserError do not contain the location."""
    texts = {column: _text(column, record.get(column)) for column in COLUMNS[object_column]}
    for column in ("image", "sentence"):
        if not texts[column]:
            raise UserError(f"{column} is empty.")
    sentence, split = texts["sentence"], texts["split"]
    if len(sentence) > MAX_SENTENCE:
        raise UserError(f"the sentence is longer than {MAX_SENTENCE} characters.")
    if not words(sentence):
        raise UserError(f"the sentence {sentence!r} contains no words.")
    if split and not SPLIT_NAME.fullmatch(split):
        close = [name for name in ("train", "val", "test") if split.lower().startswith(name)]
        names = "Use train, val, test, testA, testB, testC or a name such as test-hard."
        raise UserError(f"unknown split {split!r}. " + (f"Did you mean {close[0]}?" if close else names))
    return Row(location, texts["image"], texts[object_column], sentence, split, texts.get("category", ""))


def _text(column: str, value: Any) -> str:
    """Return a value as stripped text. Raise a UserError if it is not text or contains control characters."""
    if type(value) is int and column in ("image", "annotation_id"):
        value = str(value)
    if value is not None and type(value) is not str:
        raise UserError(f"{column} must be text, not {type(value).__name__}.")
    text = (value or "").strip()
    if CONTROL_CHARACTER.search(text):
        raise UserError(f"{column} contains a line break, a tab or another control character.")
    return text


def _check_complete(column: str, values: dict[str, str]) -> None:
    """Raise a UserError if a required column is empty in any row, or an optional column in some but not all rows.

    Args:
        column: name of the column.
        values: its value in each row, by the location of the row.
    """
    if any(values.values()) or column in REQUIRED_COLUMNS:
        for location, value in values.items():
            if not value:
                raise UserError(f"{location}: {column} is empty.")
