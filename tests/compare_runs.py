"""Runs for the tests of lib.compare that execute small programs. Imports no torch."""

import sys
from pathlib import Path
from typing import NamedTuple

from lib.compare.plan import Step

# A command that saves its state when it is stopped, as train.py does.
STOPPABLE = """
import pathlib, signal, sys, time
def stop(*_):
    pathlib.Path(sys.argv[1] + ".saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
pathlib.Path(sys.argv[1] + ".started").touch()
time.sleep(60)
"""


class FakeRun(NamedTuple):
    """A run whose steps are Python programs."""

    name: str
    folder: Path
    programs: tuple[str, ...]

    @property
    def output(self):
        return self.folder / f"{self.name}.txt"

    @property
    def locks(self):
        return [self.folder / f"{self.name}.lock"]

    def remaining_steps(self):
        file = str(self.folder / self.name)
        return [Step("training", [sys.executable, "-c", program, file], None) for program in self.programs]

    def remove_outdated(self, step):
        pass
