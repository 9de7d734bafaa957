"""The records of a run: metrics.jsonl, TensorBoard event files, environment.json."""

import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lib.files import METRICS_FILE, open_to_append, translate_write_errors, write_text

LOG = logging.getLogger("crossvlt")
PACKAGES = ("torch", "torchvision", "timm", "transformers", "numpy", "pillow", "pycocotools")
ENVIRONMENT_FILE = "environment.json"
TENSORBOARD_TAGS = {"train": "train", "eval": "val"}  # kind of an entry → prefix of its TensorBoard names


class Journal:
    """One line of JSON per logged step and per validation, and the same values as TensorBoard scalars if installed.

    Args:
        folder: folder of the run's logs; None on all processes but the main one, which write nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.path = folder / METRICS_FILE if folder else None
        self._events = None

    def begin(self, step: int = 0, *, validated: bool = True) -> None:
        """Continue after ``step``: entries of later steps are deleted, so that no step occurs twice.

        Args:
            step: number of steps done.
            validated: whether the validation after that step is done.

        Raises:
            UserError: the files cannot be written.
        """
        if self.path is None:
            return
        _delete_after(self.path, step, validated)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            LOG.info("No TensorBoard event files: TensorBoard is not installed (requirements-extra.txt)")
            return
        folder = self.path.with_name("tensorboard")
        with translate_write_errors(folder):
            self._events = SummaryWriter(str(folder), purge_step=step + 1)

    def write(
        self, kind: str, step: int, values: dict[str, Any], draw: Callable[[], dict[str, Image.Image]] | None = None
    ) -> None:
        """Write an entry.

        Args:
            kind: ``train`` or ``eval``.
            step: number of steps done.
            values: floats become TensorBoard scalars.
            draw: returns RGB images for TensorBoard by name; only called if TensorBoard is installed.

        Raises:
            UserError: the files cannot be written.
        """
        if self.path is None:
            return
        with translate_write_errors(self.path):
            with open_to_append(self.path) as file:
                file.write(json.dumps({"kind": kind, "step": step, **values}).encode() + b"\n")
            if self._events is None:
                return
            for name, value in values.items():
                if isinstance(value, float):
                    self._events.add_scalar(f"{TENSORBOARD_TAGS[kind]}/{name}", value, step)
            for name, image in (draw() if draw else {}).items():
                self._events.add_image(name, np.asarray(image), step, dataformats="HWC")
            self._events.flush()

    def close(self) -> None:
        """Write buffered TensorBoard events."""
        if self._events is not None:
            self._events.close()


def _delete_after(path: Path, step: int, validated: bool) -> None:
    """Delete the entries of a metrics file that come after ``step``, and an incomplete last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        is_done = entry["step"] < step or (entry["step"] == step and (validated or entry["kind"] == "train"))
        if line.endswith("\n") and is_done:
            kept.append(line)
    write_text(path, "".join(kept))


def write_environment(path: Path, **details: Any) -> None:
    """Append an entry to a JSON list with one entry per start of the run: :func:`environment` and ``details``."""
    write_text(path, json.dumps([*_read_starts(path), {**environment(), **details}], indent=1))


def read_run_ids(path: Path) -> list[str]:
    """Return the run id of every entry of :func:`write_environment` that has one, the newest last."""
    return [start["run_id"] for start in _read_starts(path) if "run_id" in start]


def _read_starts(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        LOG.warning("%s is not valid JSON and is overwritten", path)
        return []


def environment() -> dict[str, Any]:
    """Return versions, devices, the git revision of the checkout and the command of this process."""
    cuda = torch.cuda.is_available()
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": [Path(sys.executable).name, *sys.argv],
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "cuda": torch.version.cuda if cuda else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "git_revision": git_revision(Path(__file__).parents[2]),
    }


def git_revision(folder: Path) -> str | None:
    """Return the commit of a checkout, with ``-dirty`` if tracked files are modified; None outside a checkout."""
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
