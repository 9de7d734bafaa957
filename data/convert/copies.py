"""Finds pictures that are there twice, by other names."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from lib.files import file_sha256

Thing = TypeVar("Thing")


def grouped(things: Iterable[Thing], trait: Callable[[Thing], object]) -> tuple[list[list[Thing]], list[Thing]]:
    """Those that share a trait, two or more; and those whose file can't be read."""
    groups: dict[object, list[Thing]] = defaultdict(list)
    absent = []
    for thing in things:
        try:
            groups[trait(thing)].append(thing)
        except OSError:
            absent.append(thing)
    return [group for group in groups.values() if len(group) > 1], absent


def first_names(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """{file name: the first name of the same content}; only files of equal size are read."""
    first = {name: name for name in names}
    for group in grouped(first, lambda name: (folder / name).stat().st_size)[0]:
        for copies in grouped(group, lambda name: file_sha256(folder / name))[0]:
            first |= dict.fromkeys(copies, copies[0])
    return first
