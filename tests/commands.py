"""Run commands in the tests' own process, which is faster, and list the files they write."""

import sys
from typing import NamedTuple

from lib.cli import run_command


class Finished(NamedTuple):
    """Exit status and output of a command."""

    status: int
    out: str
    err: str


def run_in_process(main, command, monkeypatch, capsys):
    """Run ``main`` as the command line ``command`` would."""
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    status = 0
    try:
        run_command(main)
    except SystemExit as error:
        status = error.code
    return Finished(status, *capsys.readouterr())


def contents(folder):
    """Return {relative path: bytes} of all files below a folder, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
