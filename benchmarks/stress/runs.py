"""Training runs that are killed at a chosen moment and resumed (Linux only)."""

import ctypes
import json
import os
import re
import select
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed import TCPStore

from data.refshapes.dataset import write_refshapes
from lib.files import METRICS_FILE

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
DATA: {{NAME: refshapes, IMG_SIZE: 64, ROOT: "{root}"}}
MODEL: {{SWIN_TYPE: tiny, WINDOW_SIZE: 4, EMBED_DIM: 32, DEPTHS: [1, 1, 1, 1], NUM_HEADS: [1, 2, 4, 8],
        TEXT_DIM: 32, TEXT_LAYERS: 1, TEXT_HEADS: 2, VOCAB_SIZE: 200, ALIGN_DIM: 16}}
PRETRAINED: {{FROM_SCRATCH: true}}
TRAIN: {{LR: 1.0e-3, CLIP_GRAD: 1.0, EPOCHS: 2, EMA: 0.9, SAVE_STEPS: 3}}
PRINT_FREQ: 2
BATCH_SIZE: 4
WORKERS: 0
DEVICE: cpu
"""
VARYING = ("samples_per_second", "memory_gib")  # logged values that differ between any two runs
TIMEOUT = 300  # seconds


IN_CLOSE_WRITE, IN_CREATE = 0x8, 0x100  # of inotify


class Kill(NamedTuple):
    """When to kill a run, counted from its start: ``delay`` seconds after it has written a number of log entries, or
    when it begins to write a checkpoint."""

    entry: int | None = None
    delay: float = 0.0
    checkpoint: int | None = None

    def __str__(self) -> str:
        if self.checkpoint is not None:
            return f"writing checkpoint {self.checkpoint}"
        return f"{self.delay:.2f} s after log entry {self.entry}"


@contextmanager
def count_events(folder: Path, mask: int, name: str) -> Iterator[Callable[[int, list[subprocess.Popen]], bool]]:
    """Count the events of files in a folder, with Linux's inotify.

    Args:
        folder: is created if it does not exist.
        mask: kinds of events, ``IN_CREATE`` or ``IN_CLOSE_WRITE``.
        name: regular expression of the file name.

    Yields:
        a function that waits until a number of events has occurred since this call. It returns False if one of the
        given processes ends before, or after ``TIMEOUT`` seconds without an event.
    """
    folder.mkdir(parents=True, exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    inotify = libc.inotify_init1(os.O_CLOEXEC)
    if inotify < 0 or libc.inotify_add_watch(inotify, os.fsencode(folder), mask) < 0:
        raise OSError(ctypes.get_errno(), "inotify cannot watch the folder", str(folder))
    count = 0

    def wait(number: int, processes: list[subprocess.Popen]) -> bool:
        nonlocal count
        while count < number:
            if _wait_for_any(processes, [inotify], TIMEOUT) != [inotify]:
                return False
            events = os.read(inotify, 1 << 16)
            while events:
                _, _, _, length = struct.unpack_from("iIII", events)
                file = events[16 : 16 + length].rstrip(b"\0").decode()
                count += re.fullmatch(name, file) is not None
                events = events[16 + length :]
        return True

    try:
        yield wait
    finally:
        os.close(inotify)


def _wait_for_any(processes: list[subprocess.Popen], descriptors: list[int], seconds: float) -> list[int]:
    """Wait until a process has ended or a descriptor is readable, at most some seconds. Return their descriptors."""
    with ExitStack() as stack:
        ended = [os.pidfd_open(process.pid) for process in processes]  # readable when the process has ended
        for descriptor in ended:
            stack.callback(os.close, descriptor)
        return select.select([*ended, *descriptors], [], [], seconds)[0]


class Experiment:
    """Runs of one configuration in one folder."""

    def __init__(self, folder: Path, train_images: int = 24, processes: int = 2) -> None:
        self.folder, self.processes = folder, processes
        write_refshapes(folder / "data", train_images=train_images, val_images=7, testA_images=3, testB_images=3)
        (folder / "config.yaml").write_text(CONFIG.format(root=folder / "data"))

    def checkpoints(self, name: str) -> Path:
        return self.folder / "checkpoints" / name

    def logs(self, name: str) -> Path:
        return self.folder / "models" / name

    def command(self, name: str, *flags: str) -> list[str]:
        """Return the arguments that start or resume the run ``name``."""
        return [
            "train.py",
            "--cfg",
            str(self.folder / "config.yaml"),
            "--model_id",
            name,
            "--auto_resume",
            "--output-dir",
            str(self.folder / "checkpoints"),
            "--log_dir",
            str(self.folder / "models"),
            *flags,
        ]

    def train(self, name: str, kill: Kill | None = None) -> bool:
        """Start or resume the run ``name``, and kill it as requested. Return whether it finished.

        Raises:
            RuntimeError: it failed.
            subprocess.TimeoutExpired: it did not finish in time.
        """
        # As with torchrun, the launching process hosts the store. The kernel chooses its port.
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        environment = {
            **os.environ,
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(self.processes),
        }
        command = [sys.executable, *self.command(name)]
        with open(self.folder / f"{name}.txt", "a") as output, self._watch(kill, name) as wait_for_kill:
            processes = [
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    stdout=output,
                    stderr=output,
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                )
                for rank in range(self.processes)
            ]
            try:
                if kill is not None:
                    finished = not wait_for_kill(processes)
                    for process in processes:
                        process.kill()
                    if not finished:
                        return False
                statuses = [process.wait(TIMEOUT) for process in processes]
            finally:
                for process in processes:
                    process.kill()
                    process.wait()
        if kill is None and any(statuses):
            raise RuntimeError(f"{name} ended with statuses {statuses}:\n{(self.folder / f'{name}.txt').read_text()}")
        return True

    @contextmanager
    def _watch(self, kill: Kill | None, name: str) -> Iterator[Callable[[list[subprocess.Popen]], bool]]:
        """Start to count the events that ``kill`` refers to.

        Yield a function that waits for them; it returns False if one of the given processes ends first.
        """
        if kill is None:
            yield lambda processes: True
        elif kill.checkpoint is not None:
            with count_events(self.checkpoints(name), IN_CREATE, r"\.step_.*\.part") as wait:
                yield lambda processes: wait(kill.checkpoint, processes)
        else:
            with count_events(self.logs(name), IN_CLOSE_WRITE, re.escape(METRICS_FILE)) as wait:
                yield lambda processes: wait(kill.entry, processes) and not _wait_for_any(processes, [], kill.delay)

    def seconds(self, name: str) -> float:
        """Return the time from the start of the log to the last checkpoint."""
        log, last = self.logs(name) / "environment.json", self.checkpoints(name) / "last.pth"
        return last.stat().st_mtime - log.stat().st_mtime

    def result(self, name: str) -> dict:
        """Return the final checkpoint and the logged numbers of a run."""
        content = torch.load(self.checkpoints(name) / "last.pth", weights_only=True)
        del content["run_id"]
        config = {key: value for key, value in content.pop("config").items() if key != "MODEL_ID"}
        lines = (self.logs(name) / METRICS_FILE).read_text().splitlines()
        logged = [{k: v for k, v in json.loads(line).items() if k not in VARYING} for line in lines]
        return {"checkpoint": content, "config": config, "logged": logged}


def difference(first: object, second: object, path: str = "") -> str | None:
    """Return the path of the first difference between two nested results, or None if they are bitwise identical."""
    if isinstance(first, torch.Tensor):
        same = isinstance(second, torch.Tensor) and torch.equal(first, second)
        return None if same else path
    if type(first) is not type(second):
        return path
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return f"{path}: keys"
        return next(filter(None, (difference(first[key], second[key], f"{path}/{key}") for key in first)), None)
    if isinstance(first, list | tuple):
        if len(first) != len(second):
            return f"{path}: length"
        pairs = enumerate(zip(first, second, strict=True))
        return next(filter(None, (difference(a, b, f"{path}/{i}") for i, (a, b) in pairs)), None)
    return None if first == second else path
