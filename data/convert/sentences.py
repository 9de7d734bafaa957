"""Reads the sentence file of one's own data: a row per sentence, with the picture and the object it is about.

CSV and TSV name their columns in the first line, JSONL has them as keys of an object per line. What is wrong ends in
a UserError that begins with file and line, as compilers do: ``sentences.csv:17: …``.
"""

import csv
import difflib
import json
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lib.errors import MissingFileError, UserError

DELIMITERS = {".csv": ",", ".tsv": "\t", ".jsonl": ""}
READ = {  # what says which object is meant: the columns that are read with it
    "annotation_id": {"image", "annotation_id", "sentence", "split"},
    "mask": {"image", "mask", "sentence", "split", "category"},
}
Check = Callable[[str, Collection[str]], None]  # of the columns at a place
NUMBERS = ("image", "annotation_id")  # which JSON may hold as numbers
MAX_LINE = 1_000_000  # bytes: a file without line ends must not fill the memory
MAX_SENTENCE = 20_000  # letters
# Which part of the data each split's name means when it is asked for: see refer/README.md.
SPLIT_NAME = re.compile(r"train|val|test([ABC]{1,3}|[a-z0-9_-]*)")


class Row(NamedTuple):
    """A sentence; texts are stripped, and empty where the file has none."""

    where: str  # file and line, for messages
    image: str  # the picture's file name, or its COCO id
    object: str  # the annotation's id, or the mask's file name
    sentence: str
    split: str
    category: str


def read_sentences(path: Path, object_column: str) -> tuple[list[Row], list[str]]:
    """All rows, in file order, and what the user should know of.

    Args:
        path: of a .csv, .tsv or .jsonl file, UTF-8.
        object_column: what says which object is meant: ``annotation_id`` or ``mask``. The latter may be missing.

    Raises:
        MissingFileError, UserError: no such file, another ending; a row that can't be understood.
    """
    if path.suffix.lower() not in DELIMITERS:
        raise UserError(f"--sentences {path}: its name must end in {', '.join(DELIMITERS)}")
    delimiter = DELIMITERS[path.suffix.lower()]
    rows: list[Row] = []
    seen: set[frozenset[str]] = set()
    ignored: dict[str, None] = {}

    def check(where: str, found: Collection[str]) -> None:
        if frozenset(found) not in seen:
            seen.add(frozenset(found))
            ignored.update(dict.fromkeys(_check_columns(where, found, object_column)))

    for where, record in _table(path, delimiter, check) if delimiter else _records(path, check):
        rows.append(_row(where, record, object_column))
    if not rows:
        raise UserError(f"{path}: no sentence in it")
    for field, column in (("split", "split"), ("object", object_column)):
        _check_all_or_none(rows, field, column)
    return rows, [f"{path}: not used: {_listed(ignored)}"] if ignored else []


def _lines(path: Path) -> Iterator[str]:
    """The lines as text, each with its end, so that the csv module counts them as editors do."""
    try:
        opened = path.open("rb")
    except OSError as error:
        raise MissingFileError(f"--sentences {path}: {error.strerror}") from error
    with opened as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > MAX_LINE:
                raise UserError(f"{where}: longer than {MAX_LINE} bytes, which no row is")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if b"\0" in line:
                raise UserError(f"{where}: a NUL byte, so this isn't text in UTF-8")
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: byte {error.start + 1} isn't UTF-8; save the file as UTF-8") from error


def _table(path: Path, delimiter: str, check: Check) -> Iterator[tuple[str, dict[str, str]]]:
    """Place and fields by column of each row of a CSV or TSV that isn't blank."""
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    names: list[str] = []
    while True:
        where = f"{path}:{reader.line_num + 1}"
        first = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{where}: {error}; look at the quotation marks") from error
        if reader.line_num > first:
            raise UserError(f"{where}: a line break within quotation marks; is one of them not closed?")
        if not any(map(str.strip, fields)):
            continue
        if not names:
            names = [name.strip().lower() for name in fields]
            twice = next((name for name in names if name and names.count(name) > 1), None)
            if twice:
                raise UserError(f"{where}: column {_listed([twice])} is there twice")
            _check_delimiter(where, names)
            check(where, names)
            continue
        if len(fields) != len(names):
            raise UserError(
                f"{where}: {len(fields)} fields where the first line names {len(names)} columns; a sentence with a "
                "comma needs quotation marks around it"
            )
        yield where, dict(zip(names, fields, strict=True))


def _check_delimiter(where: str, names: list[str]) -> None:
    if len(names) == 1 and (found := set(names[0]) & set(",;\t|")):
        raise UserError(f"{where}: columns are divided by {min(found)!r} here; a .csv has ',', a .tsv tabs")


class _Pairs(list):
    """Keys and values of a JSON object, as they are there: a dict would keep the last of two alike."""


def _records(path: Path, check: Check) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and fields of each line of a JSONL that isn't blank."""
    for number, line in enumerate(_lines(path), 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=_Pairs)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({' '.join(str(error).split())[:100]})") from error
        if not isinstance(record, _Pairs):
            raise UserError(f"{where}: should be an object with keys, is {type(record).__name__}")
        names = [key.strip().lower() for key, _ in record]
        if twice := next((name for name in names if names.count(name) > 1), ""):
            raise UserError(f"{where}: key {_listed([twice])} is there twice")
        record = dict(zip(names, (value for _, value in record), strict=True))
        check(where, record)
        yield where, record


def _check_columns(where: str, found: Collection[str], object_column: str) -> list[str]:
    """UserError where a needed column is missing or one seems misspelt; gives back those that nothing reads."""
    read = READ[object_column]
    needed = ["image", "sentence"] + (["annotation_id"] if object_column == "annotation_id" else [])
    missing = [name for name in needed if name not in found]
    if missing:
        raise UserError(f"{where}: no column {', '.join(missing)}; found {_listed(found)}")
    ignored = [name for name in found if name not in read]
    for name in ignored:
        # A misspelt split would otherwise be no split. Ids of other things are common and harmless.
        close = difflib.get_close_matches(name, read - set(found), n=1, cutoff=0.75)
        if close and not (name.endswith("_id") and close[0] != "annotation_id"):
            raise UserError(f"{where}: unknown column {_listed([name])}; did you mean {close[0]}?")
    return ignored


def _listed(columns: Collection[str]) -> str:
    names = (" ".join(name.split())[:50] or "(unnamed)" for name in columns)
    return ", ".join(names)[:300] or "nothing"


def _row(where: str, record: dict[str, Any], object_column: str) -> Row:
    """A record, checked by itself."""
    texts = dict.fromkeys(("category", *READ[object_column]), "")
    for column, value in record.items():
        if column not in READ[object_column]:
            continue
        if column in NUMBERS and type(value) is int:
            value = str(value)
        if value is not None and type(value) is not str:
            raise UserError(
                f"{where}: {column} should be text, is {'dict' if isinstance(value, _Pairs) else type(value).__name__}"
            )
        texts[column] = (value or "").strip()
        if re.search("[\0-\x1f\x7f\ud800-\udfff]", texts[column]):
            raise UserError(f"{where}: {column} holds a line break, tab or other control character")
    for column in ("image", "sentence"):
        if not texts[column]:
            raise UserError(f"{where}: {column} is empty")
    if len(texts["sentence"]) > MAX_SENTENCE:
        raise UserError(f"{where}: longer than {MAX_SENTENCE} letters, which no sentence is")
    if not words(texts["sentence"]):
        raise UserError(f"{where}: no word in sentence {texts['sentence']!r}")
    if texts["split"] and not SPLIT_NAME.fullmatch(texts["split"]):
        close = next((name for name in ("train", "val", "test") if texts["split"].lower().startswith(name)), "")
        hint = f"; did you mean {close}?" if close else ""
        raise UserError(
            f"{where}: unknown split {texts['split']!r}{hint} (train, val, test, testA, testB, testC, or test and "
            "small letters)"
        )
    return Row(
        where, texts["image"], texts[object_column], *(texts[name] for name in ("sentence", "split", "category"))
    )


def _check_all_or_none(rows: list[Row], field: str, column: str) -> None:
    """Such a column is given in all rows or in none: in between, what it means without would be a guess."""
    without = [row for row in rows if not getattr(row, field)]
    if without and len(without) < len(rows):
        raise UserError(f"{without[0].where}: {column} is empty, but other rows have one")
    if without and column == "annotation_id":
        raise UserError(f"{without[0].where}: {column} is empty")


def words(sentence: str) -> list[str]:
    """The words of a sentence in small letters, without punctuation: what a ref keeps as its tokens."""
    return re.findall(r"\w+", re.sub("['’]", "", sentence.lower()))
