"""lib.terminal: progress bars on terminals with a width, plain lines everywhere else."""

import fcntl
import logging
import os
import struct
import sys
import termios
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

import lib.collector
from lib.collector import ProgressBar
from lib.terminal import draws_bars
from utils import set_up_logging


@pytest.fixture
def terminal(monkeypatch):
    """Return a function that makes stderr a terminal of some columns, and a function that returns what it shows."""
    main, side = os.openpty()
    with open(side, "w") as stderr, open(main, "rb", buffering=0) as shown:
        os.set_blocking(main, False)

        def use(columns):
            fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
            monkeypatch.setattr(sys, "stderr", stderr)

        yield use, lambda: (stderr.flush(), shown.read() or b"")[1].decode()


@pytest.mark.parametrize(("columns", "expected"), [(80, True), (0, False)])
def test_only_terminals_with_a_width_draw_bars(terminal, columns, expected):
    terminal[0](columns)
    assert draws_bars() is expected


def test_files_and_closed_streams_draw_no_bars(monkeypatch, tmp_path):
    for stream in (open(tmp_path / "a", "w"), SimpleNamespace(), None):  # noqa: SIM115
        monkeypatch.setattr(sys, "stderr", stream)
        assert not draws_bars()


def test_an_evaluation_logs_plain_lines_on_a_terminal_without_a_width(terminal, monkeypatch):
    monkeypatch.setattr(lib.collector, "SECONDS_BETWEEN_LINES", -1)
    empty = SimpleNamespace(
        indices=np.arange(4), counts=np.zeros((1, 4, 2), np.int64), is_earlier=np.zeros((1, 4), bool)
    )
    use, shown = terminal
    for columns, bar in ((80, True), (0, False)):
        use(columns)
        set_up_logging()
        progress = ProgressBar("val", empty, show=True)
        progress.update(2, 1, 4)
        progress.close()
        text = shown()
        assert ("%|" in text) is bar
        assert ("val: 2/4 expressions" in text and "oIoU 25.00 so far" in text) is not bar
    assert "\r" not in text.replace("\r\n", "")
    logging.getLogger("crossvlt").handlers.clear()


def test_every_bar_depends_on_the_terminal():
    """tqdm's own check, disable=None, accepts terminals without a width."""
    for path in ROOT.glob("[!.]*/**/*.py"):
        if path.parent.name != "tests":
            assert "disable=None" not in path.read_text(encoding="utf-8"), path
