"""What a run writes about itself besides its log: metrics.jsonl, TensorBoard's event files, its environment."""

import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lib.files import translate_write_errors, write_text

LOG = logging.getLogger("crossvlt")
METRICS_FILE = "metrics.jsonl"
PACKAGES = ("torch", "torchvision", "timm", "transformers", "numpy", "pillow", "pycocotools")
TAGS = {"train": "train", "eval": "val"}  # kind of a line → what its TensorBoard names begin with


class Journal:
    """A line of JSON per logged step and per validation, and the same as TensorBoard scalars, where that is installed.

    Args:
        folder: of the run's logs; None: nothing is written (processes other than the main one).
    """

    def __init__(self, folder: Path | None) -> None:
        self.path = folder / METRICS_FILE if folder else None
        self._events = None

    def begin(self, step: int = 0, *, validated: bool = True) -> None:
        """Go on after ``step``: what is written of later ones is dropped, so that nothing is there twice.

        Args:
            step: done so far.
            validated: whether the validation after that step is done.

        Raises:
            UserError: the files can't be written.
        """
        if self.path is None:
            return
        _drop_after(self.path, step, validated)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            LOG.info("no TensorBoard event files: TensorBoard isn't installed (requirements-extra.txt)")
            return
        folder = self.path.with_name("tensorboard")
        with translate_write_errors(folder):
            self._events = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Write one line: ``kind`` (train, eval), ``step`` and the values.

        Raises:
            UserError: it can't be written.
        """
        if self.path is None:
            return
        with translate_write_errors(self.path):
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            if self._events is not None:
                for name, value in values.items():
                    if isinstance(value, float):
                        self._events.add_scalar(f"{TAGS[kind]}/{name}", value, step)
                self._events.flush()

    @property
    def accepts_images(self) -> bool:
        """Whether :meth:`draw` leads anywhere."""
        return self._events is not None

    def draw(self, name: str, picture: Image.Image, step: int) -> None:
        """Add an RGB picture to the event files."""
        if self._events is not None:
            with translate_write_errors(self.path.with_name("tensorboard")):
                self._events.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        """Write out what is still buffered."""
        if self._events is not None:
            self._events.close()


def _drop_after(path: Path, step: int, validated: bool) -> None:
    """Take the lines out of a metrics file that come after ``step``, and a last one that a kill has torn."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        done = entry["step"] < step or (entry["step"] == step and (validated or entry["kind"] == "train"))
        if line.endswith("\n") and done:
            kept.append(line)
    write_text(path, "".join(kept))


def write_environment(path: Path, **more: Any) -> None:
    """Add this start of the run to a JSON list of its starts: versions, device, git revision, command, and ``more``."""
    starts = []
    if path.exists():
        try:
            starts = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            LOG.warning("%s is not valid JSON: written anew", path)
    write_text(path, json.dumps([*starts, {**environment(), **more}], indent=1))


def environment() -> dict[str, Any]:
    """Versions, devices, the checkout's git revision and the command of this process."""
    cuda = torch.cuda.is_available()
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": [Path(sys.executable).name, *sys.argv],
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "cuda": torch.version.cuda if cuda else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "git_revision": git_revision(Path(__file__).parent.parent),
    }


def git_revision(folder: Path) -> str | None:
    """The commit a checkout is at, ``-dirty`` where tracked files differ from it; None where it is no checkout."""
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
