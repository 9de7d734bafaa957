"""Sizes and SHA-256 sums of the files that were found right, in ``hashes.json``, so that another file is noticed later.

Nobody publishes sums of these files. So the first ones that pass every check are written down, and what comes later,
or what is on the disk later, is compared with them.
"""

import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.errors import UserError
from lib.files import file_sha256, write_text

HASHES_FILE = "hashes.json"


def keep_replaced(path: Path) -> Path:
    """Rename a file that another will replace to a name that none has yet, and give that back."""
    kept = free_name(f"{path}.replaced")
    path.replace(kept)
    return kept


def free_name(start: str, end: str = "") -> Path:
    """The path ``<start><end>``, or the first ``<start><number><end>``, that nothing has yet."""
    names = (f"{start}{number or ''}{end}" for number in itertools.count())
    return Path(next(name for name in names if not os.path.lexists(name)))


class Hashes:
    """The ``hashes.json`` of a folder. UserError: it is damaged."""

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder, HASHES_FILE)
        self.known: dict[str, dict[str, Any]] = {}
        try:
            known = json.loads(self.path.read_text(encoding="utf-8"))
            self.known = {
                str(name): {"size": int(one["size"]), "sha256": str(one["sha256"])} for name, one in known.items()
            }
        except FileNotFoundError:
            pass
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}") from error
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise UserError(f"{self.path} is damaged: delete it, and hashes are recorded anew") from error

    def difference(self, name: str, path: Path) -> str:
        """How a file differs from the one recorded by this name; empty if it does not, or if none is."""
        recorded = self.known.get(name)
        if recorded is None:
            return ""
        size, remedy = path.stat().st_size, f"delete the entry {name!r} in {self.path} if the new file is right"
        if size != recorded["size"]:
            return f"has {size} bytes, {recorded['size']} are recorded: {remedy}"
        sha256 = file_sha256(path)
        if sha256 != recorded["sha256"]:
            return f"has the SHA-256 {sha256[:12]}…, {recorded['sha256'][:12]}… is recorded: {remedy}"
        return ""

    def record(self, files: Mapping[str, Path]) -> None:
        """Write down those that are not recorded yet: {name: file}. UserError: it can't be written."""
        new = {name: path for name, path in files.items() if name not in self.known}
        for name, path in new.items():
            self.known[name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
        if new:
            write_text(self.path, json.dumps(self.known, indent=2, sort_keys=True) + "\n")
