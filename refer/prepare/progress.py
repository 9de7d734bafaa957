"""Tells how far something is, how big it is, and whether there is room for it on the disk."""

import shutil
import sys
import time
from pathlib import Path

from tqdm import tqdm

from lib.errors import UserError
from utils import LOGGER

LINE_EVERY = 15.0  # seconds between the lines of progress where there is no terminal


class Progress:
    """How far something is, in bytes or in things: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, name: str, total: int | None, *, start: int = 0, unit: str = "B") -> None:
        self.name, self.total, self.unit, self.at = name, total, unit, start
        self.told, self.told_at = time.monotonic(), start
        in_bytes = {"unit": "B", "unit_scale": True} if unit == "B" else {"unit": f" {unit}"}
        self.bar = tqdm(
            total=total, initial=start, desc=name, disable=not sys.stderr.isatty(), dynamic_ncols=True, **in_bytes
        )

    def add(self, count: int) -> None:
        self.at += count
        self.bar.update(count)
        now = time.monotonic()
        if now - self.told >= LINE_EVERY:
            speed = (self.at - self.told_at) / (now - self.told)
            shown = (lambda n: human(int(n))) if self.unit == "B" else (lambda n: f"{n:.0f}")
            of = f" of {shown(self.total)}" if self.total else ""
            LOGGER.debug(f"{self.name}: {shown(self.at)}{of} {'' if self.unit == 'B' else self.unit}".rstrip()
                         + f", {shown(speed)}/s")  # fmt: skip
            self.told, self.told_at = now, self.at

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def human(count: int) -> str:
    """13510573713 → ``13.5 GB``."""
    for factor, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


def check_room(folder: Path, needed: int, what: str) -> None:
    """UserError unless ``needed`` bytes are free where ``folder`` is, or will be."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(f"{what} needs {human(needed)} in {folder}, and {human(free)} are free: make room there")
