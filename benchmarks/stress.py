"""Kill a training at random moments, go on with it, and compare with one that nobody killed.

    python -m benchmarks.stress --kills 20          (make stress)

Each run is trained by two processes (or --processes) on a small RefShapes set, killed once with SIGKILL, every third
one while it writes a checkpoint, and gone on with by --auto_resume. It passes where the final weights, optimizer
state, metrics and every logged number are bit for bit those of the uninterrupted run.
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
from lib.files import atomic_write

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
UNTIMED = ("samples_per_second", "memory_gib")  # what no two runs have alike
SECONDS_TO_END = 300


class Kill(NamedTuple):
    """When a run is killed: ``after`` so many seconds of it, or while its checkpoint no. ``written`` is written."""

    after: float | None
    written: int | None

    def __str__(self) -> str:
        return f"{self.after:.1f} s into it" if self.written is None else f"writing its checkpoint no. {self.written}"


class Experiment:
    """Runs of one configuration in a folder of their own."""

    def __init__(self, folder: Path, train_images: int = 24, processes: int = 2) -> None:
        self.folder, self.processes = folder, processes
        write_refshapes(folder / "data", train_images=train_images, val_images=7, testA_images=3, testB_images=3)
        (folder / "config.yaml").write_text(CONFIG.format(root=folder / "data"))

    def checkpoints(self, name: str) -> Path:
        return self.folder / "checkpoints" / name

    def command(self, name: str, *flags: str) -> list[str]:
        """What trains the run ``name``, or goes on with it."""
        return [
            "train.py", "--cfg", str(self.folder / "config.yaml"), "--model_id", name, "--auto_resume",
            "--output-dir", str(self.folder / "checkpoints"), "--log_dir", str(self.folder / "models"), *flags,
        ]  # fmt: skip

    def train(self, name: str, kill: Kill | None = None) -> bool:
        """Train the run ``name``, or go on with it, and kill it if asked to; gives back whether it came to its end.

        Raises:
            RuntimeError: it ended by itself, but not well, or not in time.
        """
        with socket.socket() as free:
            free.bind(("localhost", 0))
            meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        environment = {**os.environ, **meeting, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(self.processes)}
        command = [sys.executable, *self.command(name)]
        with open(self.folder / f"{name}.txt", "a") as output:
            processes = [
                subprocess.Popen(
                    command, cwd=ROOT, stdout=output, stderr=output,
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                )
                for rank in range(self.processes)
            ]  # fmt: skip
            try:
                if kill is not None:
                    self._wait_for(kill, name, processes)
                    ended = any(process.poll() is not None for process in processes)
                    for process in processes:
                        process.kill()
                    if not ended:
                        return False
                statuses = [process.wait(SECONDS_TO_END) for process in processes]
            finally:
                for process in processes:
                    process.kill()
                    process.wait()
        if kill is None and any(statuses):
            raise RuntimeError(f"{name} ended with {statuses}:\n{(self.folder / f'{name}.txt').read_text()}")
        return True

    def _wait_for(self, kill: Kill, name: str, processes: list[subprocess.Popen]) -> None:
        started, launched = self.folder / "models" / name / "environment.json", time.time()
        deadline = time.monotonic() + SECONDS_TO_END
        begun, written = None, 0
        writing = True  # what an earlier kill left half written is not counted
        while time.monotonic() < deadline and all(process.poll() is None for process in processes):
            if begun is None and started.exists() and started.stat().st_mtime > launched:
                begun = time.monotonic()
            if kill.after is not None:
                if begun and time.monotonic() - begun >= kill.after:
                    return
            else:
                parts = any(self.checkpoints(name).glob(".step_*.part"))
                written += parts and not writing
                writing = parts
                if written >= kill.written:
                    return
            time.sleep(0.001)

    def seconds(self, name: str) -> float:
        """From the log's first line to the last checkpoint."""
        log, last = self.folder / "models" / name / "environment.json", self.checkpoints(name) / "last.pth"
        return last.stat().st_mtime - log.stat().st_mtime

    def result(self, name: str) -> dict:
        """The final checkpoint and the logged numbers of a run."""
        content = torch.load(self.checkpoints(name) / "last.pth", weights_only=True)
        config = {key: value for key, value in content.pop("config").items() if key != "MODEL_ID"}
        lines = (self.folder / "models" / name / "metrics.jsonl").read_text().splitlines()
        logged = [{k: v for k, v in json.loads(line).items() if k not in UNTIMED} for line in lines]
        return {"checkpoint": content, "config": config, "logged": logged}


def difference(first: object, second: object, where: str = "") -> str | None:
    """The first place where two nested results differ in any bit; None where they don't."""
    if isinstance(first, torch.Tensor):
        same = isinstance(second, torch.Tensor) and torch.equal(first, second)
        return None if same else where
    if type(first) is not type(second):
        return where
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return f"{where}: its keys"
        return next(filter(None, (difference(first[key], second[key], f"{where}/{key}") for key in first)), None)
    if isinstance(first, list | tuple):
        if len(first) != len(second):
            return f"{where}: its length"
        pairs = enumerate(zip(first, second, strict=True))
        return next(filter(None, (difference(a, b, f"{where}/{i}") for i, (a, b) in pairs)), None)
    return None if first == second else where


def get_parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.stress", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="runs to kill (default: 20)")
    parser.add_argument("--processes", type=int, default=2, help="that train together (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--out", metavar="FILE", help="write the table to this file too")
    return parser


def main() -> None:
    args = get_parser().parse_args()
    moments = random.Random(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="stress_"))
    experiment = Experiment(folder, processes=args.processes)
    experiment.train("whole")
    wanted, seconds = experiment.result("whole"), experiment.seconds("whole")
    lines = [
        f"# {args.kills} kills of {args.processes} processes",
        "",
        f"{wanted['checkpoint']['step']} steps, {seconds:.0f} s uninterrupted.",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}",
        "",
        "| run | killed | went on from step | final state |",
        "|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    passed = 0
    for number in range(args.kills):
        name = f"run{number}"
        writing = number % 3 == 2
        kill = Kill(None, moments.randint(1, 10)) if writing else Kill(moments.uniform(0, 0.85 * seconds), None)
        ended = experiment.train(name, kill)
        unfinished = list(experiment.checkpoints(name).glob(".*.part"))
        experiment.train(name)
        starts = json.loads((folder / "models" / name / "environment.json").read_text())
        differs = difference(wanted, experiment.result(name))
        passed += differs is None and not ended
        told = "not killed: it was faster" if ended else "identical" if differs is None else f"differs at {differs}"
        left = ", file half written" if unfinished else ""
        lines.append(f"| {number + 1} | {kill}{left} | {starts[-1]['from_step']} | {told} |")
        print(lines[-1], flush=True)
        shutil.rmtree(experiment.checkpoints(name))
    lines += ["", f"{passed} of {args.kills} end with bitwise the uninterrupted run's state and numbers."]
    print("\n".join(lines[-2:]))
    if args.out:
        with atomic_write(args.out) as aside:
            aside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if passed < args.kills:
        raise UserError(f"{args.kills - passed} of {args.kills} runs are not what they should be; see {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    run_command(main)
