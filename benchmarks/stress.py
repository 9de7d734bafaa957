"""Kill trainings at random moments, resume them, and compare them with an uninterrupted one (Linux only).

    python -m benchmarks.stress --kills 20          (make stress)

Each run trains with two processes (or --processes) on a small RefShapes dataset. It is killed once with SIGKILL and
resumed with --auto_resume; every third run is killed while it writes a checkpoint. A run passes if the final weights,
optimizer state, metrics and all logged numbers are bitwise identical to those of the uninterrupted run.
"""

import ctypes
import json
import os
import platform
import random
import re
import select
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed import TCPStore

from data.refshapes.dataset import write_refshapes
from lib.cli import Parser, run_command
from lib.errors import UserError
from lib.files import METRICS_FILE, Kind, write_text

ROOT = Path(__file__).resolve().parent.parent
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


def get_parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.stress", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="number of runs to kill (default: 20)")
    parser.add_argument("--processes", type=int, default=2, help="processes per run (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the kills (default: 0)")
    parser.add_output("--out", kind=Kind.TEXT, metavar="FILE", help="also write the table to this file")
    return parser


def main() -> None:
    args = get_parser().parse_args()
    rng = random.Random(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="stress_"))
    experiment = Experiment(folder, processes=args.processes)
    experiment.train("uninterrupted")
    expected, seconds = experiment.result("uninterrupted"), experiment.seconds("uninterrupted")
    entries = len(expected["logged"])
    lines = [
        f"# {args.kills} kills of {args.processes} processes",
        "",
        f"{expected['checkpoint']['step']} steps, {seconds:.0f} s uninterrupted.",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}",
        "",
        "| run | killed | resumed from step | final state |",
        "|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    passed = 0
    for number in range(args.kills):
        name = f"run{number}"
        while_writing = number % 3 == 2
        if while_writing:
            kill = Kill(checkpoint=rng.randint(1, 10))
        else:
            kill = Kill(entry=rng.randint(1, int(0.85 * entries)), delay=rng.uniform(0, seconds / entries))
        finished = experiment.train(name, kill)
        unfinished = list(experiment.checkpoints(name).glob(".*.part"))
        experiment.train(name)
        starts = json.loads((experiment.logs(name) / "environment.json").read_text())
        differs = difference(expected, experiment.result(name))
        passed += differs is None and not finished
        state = "finished before the kill" if finished else "identical" if differs is None else f"differs at {differs}"
        partial = ", file half written" if unfinished else ""
        lines.append(f"| {number + 1} | {kill}{partial} | {starts[-1]['from_step']} | {state} |")
        print(lines[-1], flush=True)
        shutil.rmtree(experiment.checkpoints(name))
    lines += ["", f"{passed} of {args.kills} runs end bitwise identical to the uninterrupted one."]
    print("\n".join(lines[-2:]))
    if args.out:
        write_text(args.out, "\n".join(lines) + "\n")
    if passed < args.kills:
        raise UserError(
            f"{args.kills - passed} of {args.kills} runs were not killed in time or differ from the uninterrupted one. "
            f"See {folder}."
        )
    shutil.rmtree(folder)


if __name__ == "__main__":
    run_command(main)
