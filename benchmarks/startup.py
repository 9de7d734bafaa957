"""Measure how long every command takes to print --help and to report a usage error.

python -m benchmarks.startup
python -m benchmarks.startup --commands train.py lib.plot
"""

import subprocess
import sys
import time

from benchmarks import machine, records
from benchmarks.records import ROOT, Record, Row
from lib.cli import Parser, did_you_mean, run_command
from lib.errors import EXIT_MISTAKE, UserError

CASES = {"--help": 0, "--no_such_flag": EXIT_MISTAKE}  # flag: expected exit status


def get_parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--commands", nargs="+", metavar="NAME", help="(default: all)")
    records.add_arguments(parser)
    return parser


def main() -> None:
    args = get_parser().parse_args()
    earlier = records.check_arguments(args, "startup")
    commands = find_commands()
    for name in args.commands or ():
        if name not in commands:
            raise UserError(f"--commands: no such command {name!r}.{did_you_mean(name, commands)}")

    import torch

    cpu = torch.device("cpu")
    record = Record("startup", "Start-up: --help and a usage error of every command", machine.machine(cpu))
    for name in args.commands or commands:
        call = [name] if name.endswith(".py") else ["-m", name]
        for flag, status in CASES.items():
            seconds = [time_command([sys.executable, *call, flag], status) for _ in range(args.repeats + 1)]
            record.add(Row({"command": name, "flag": flag}, seconds[1:]))  # the first call reads files from the disk
    records.finish(record, earlier, args.out)


def find_commands() -> list[str]:
    """Return the scripts and modules that call run_command, as they are passed to Python."""
    commands = []
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("[!.]*/**/*.py")]):
        if "\n    run_command(main)\n" in path.read_text(encoding="utf-8"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            commands.append(path.name if len(parts) == 1 else ".".join(parts).removesuffix(".__main__"))
    return commands


def time_command(command: list[str], status: int) -> float:
    """Return the seconds that a command takes. RuntimeError: it ends with another exit status."""
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode != status:
        raise RuntimeError(f"{command} ended with exit status {done.returncode}:\n{done.stderr}")
    return seconds


if __name__ == "__main__":
    run_command(main)
