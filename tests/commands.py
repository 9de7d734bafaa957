"""Commands run in the tests' own process, to be quick, and what they leave on the disk."""

import sys
from typing import NamedTuple

from lib.cli import run_command


class Finished(NamedTuple):
    """What became of it."""

    status: int
    out: str
    err: str


def run_in_process(main, command, monkeypatch, capsys):
    """Run what the command line ``command`` runs, which is ``run_command(main)``."""
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    status = 0
    try:
        run_command(main)
    except SystemExit as left:
        status = left.code
    return Finished(status, *capsys.readouterr())


def contents(folder):
    """Every file below a folder, hidden ones too: {relative path: bytes}."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
