"""Commands run in the tests' own process, to be quick."""

import sys
from typing import NamedTuple

from utils import run_command


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
