"""Kill trainings at random moments, resume them, and compare them with an uninterrupted one (Linux only).

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
import tempfile
from pathlib import Path

from lib.cli import Parser, run_command
from lib.errors import UserError
from lib.files import Kind, write_text


def get_parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.stress", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="number of runs to kill (default: 20)")
    parser.add_argument("--processes", type=int, default=2, help="processes per run (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the kills (default: 0)")
    parser.add_output("--out", kind=Kind.TEXT, metavar="FILE", help="also write the table to this file")
    return parser


def main() -> None:
    args = get_parser().parse_args()

    import torch

    from benchmarks.stress.runs import Experiment, Kill, difference

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
