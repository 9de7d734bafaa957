"""Kill trainings at random moments, resume them, and compare them with an uninterrupted one.

    python -m benchmarks.stress --kills 20          (make stress)

Each run trains with two processes (or --processes) on a small RefShapes dataset. It is killed once with SIGKILL and
resumed with --auto_resume; every third run is killed while it writes a checkpoint. A run passes if the final weights,
optimizer state, metrics and all logged numbers are bitwise identical to those of the uninterrupted run.
"""

import json
import os
import platform
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from data.refshapes.dataset import write_refshapes
from lib.cli import Parser, run_command
from lib.errors import UserError
from lib.files import Kind, write_text

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


class Kill(NamedTuple):
    """When to kill a run: after some seconds, or while it writes its n-th checkpoint. The other field is None."""

    seconds: float | None
    checkpoint: int | None

    def __str__(self) -> str:
        return f"after {self.seconds:.1f} s" if self.checkpoint is None else f"writing checkpoint {self.checkpoint}"


class Experiment:
    """Runs of one configuration in one folder."""

    def __init__(self, folder: Path, train_images: int = 24, processes: int = 2) -> None:
        self.folder, self.processes = folder, processes
        write_refshapes(folder / "data", train_images=train_images, val_images=7, testA_images=3, testB_images=3)
        (folder / "config.yaml").write_text(CONFIG.format(root=folder / "data"))

    def checkpoints(self, name: str) -> Path:
        return self.folder / "checkpoints" / name

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
        with socket.socket() as free:
            free.bind(("localhost", 0))
            master = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        environment = {**os.environ, **master, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(self.processes)}
        command = [sys.executable, *self.command(name)]
        with open(self.folder / f"{name}.txt", "a") as output:
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
                    self._wait_for(kill, name, processes)
                    finished = any(process.poll() is not None for process in processes)
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

    def _wait_for(self, kill: Kill, name: str, processes: list[subprocess.Popen]) -> None:
        started, launched = self.folder / "models" / name / "environment.json", time.time()
        deadline = time.monotonic() + TIMEOUT
        running_since, num_checkpoints = None, 0
        is_writing = True  # a file left half written by an earlier kill does not count
        while time.monotonic() < deadline and all(process.poll() is None for process in processes):
            if running_since is None and started.exists() and started.stat().st_mtime > launched:
                running_since = time.monotonic()
            if kill.seconds is not None:
                if running_since and time.monotonic() - running_since >= kill.seconds:
                    return
            else:
                parts = any(self.checkpoints(name).glob(".step_*.part"))
                num_checkpoints += parts and not is_writing
                is_writing = parts
                if num_checkpoints >= kill.checkpoint:
                    return
            time.sleep(0.001)

    def seconds(self, name: str) -> float:
        """Return the time from the start of the log to the last checkpoint."""
        log, last = self.folder / "models" / name / "environment.json", self.checkpoints(name) / "last.pth"
        return last.stat().st_mtime - log.stat().st_mtime

    def result(self, name: str) -> dict:
        """Return the final checkpoint and the logged numbers of a run."""
        content = torch.load(self.checkpoints(name) / "last.pth", weights_only=True)
        config = {key: value for key, value in content.pop("config").items() if key != "MODEL_ID"}
        lines = (self.folder / "models" / name / "metrics.jsonl").read_text().splitlines()
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
        kill = Kill(None, rng.randint(1, 10)) if while_writing else Kill(rng.uniform(0, 0.85 * seconds), None)
        finished = experiment.train(name, kill)
        unfinished = list(experiment.checkpoints(name).glob(".*.part"))
        experiment.train(name)
        starts = json.loads((folder / "models" / name / "environment.json").read_text())
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
