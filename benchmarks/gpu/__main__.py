"""Check the project on a GPU and run the benchmarks there, in at most nine minutes: ``make gpu``.

    make gpu                             # with the packages of .venv, which is created if it is missing
    make gpu PYTHON=/usr/bin/python3     # with the packages of that Python; needs no network
    python -m benchmarks.gpu --device cpu --out /tmp/gpu_dry_run.md    # dry run of the command itself, small sizes

Writes benchmarks/results/gpu_NAME.md for a card called NAME. Each section runs in its own process and has a time limit;
sections that did not fit are listed. Benchmarks that use no GPU, such as benchmarks.startup, do not run.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lib.cli import Parser, run_command
from lib.errors import EXIT_BUG, UserError
from lib.files import Kind, check_writable, write_text

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SECONDS = 500  # of all sections; start and end of the command fit into the rest of nine minutes
MIN_SECONDS = 5  # a section is not started with less time left
PACKAGES = {
    "torch": "torch", "torchvision": "torchvision", "timm": "timm", "transformers": "transformers", "numpy": "numpy",
    "PIL": "pillow", "pycocotools": "pycocotools", "yacs": "yacs", "h5py": "h5py", "tqdm": "tqdm",
    "termcolor": "termcolor",
}  # fmt: skip
# Benchmarks: arguments on a GPU, arguments of a dry run, and limit in seconds.
SMALL = ("--swin_type", "tiny", "--img_size", "64")
BENCHMARKS: dict[str, tuple[tuple[str, ...], tuple[str, ...], int]] = {
    "inference": (
        ("--amp", "off", "bf16", "fp16", "--batch-sizes", "1", "16", "--sentences", "1"),
        (*SMALL, "--amp", "off", "--models", "plain", "--batch-sizes", "1", "--sentences", "1", "--repeats", "1"),
        150,
    ),
    "training": (
        ("--amp", "off", "bf16", "--batch-sizes", "8"),
        (*SMALL, "--amp", "off", "--batch-sizes", "1", "--repeats", "1"),
        90,
    ),
    "evaluation": (
        ("--models", "prepared", "--amp", "bf16", "--batch-sizes", "32", "--sources", "packed", "--repeats", "3"),
        (*SMALL, "--models", "plain", "--amp", "off", "--images", "3", "--repeats", "1"),
        150,
    ),
    "data": (("--workers", "0", "4"), ("--workers", "0", "--repeats", "1"), 45),
}
CHECK_SECONDS = 45


class Section(NamedTuple):
    """A part of the report, computed by a command."""

    name: str
    command: list[str]
    limit: int  # seconds
    out: Path | None = None  # the file that the command writes, if it is not its output


class Outcome(NamedTuple):
    """How a section ended."""

    result: str
    seconds: float
    text: str


def get_parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu for a dry run (default: cuda)")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="time of all sections (default: %(default)s)")
    parser.add_output("--out", kind=Kind.TEXT, metavar="FILE", help="(default: benchmarks/results/gpu_NAME.md)")
    parser.add_argument("--check", metavar="NAME", help="run only this check in this process, and write no file")
    return parser


def main() -> None:
    args = get_parser().parse_args()
    missing = [name for module, name in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise UserError(f"{sys.executable} lacks {', '.join(missing)}. Install the packages of requirements.txt.")

    import torch

    from utils import init_distributed

    dry_run = args.device == "cpu"
    if not dry_run and not torch.cuda.is_available():
        raise UserError("PyTorch finds no CUDA GPU on this machine. `make gpu` needs one.")
    if dry_run and not (args.out or args.check):
        raise UserError("--device cpu is a dry run whose numbers are not results. Pass --out FILE.")
    device = init_distributed(args.device).device
    if args.check:
        print(run_check(args.check, device))
        return
    out = Path(args.out) if args.out else RESULTS / f"gpu_{card_name(device)}.md"
    check_writable(out, Kind.TEXT)
    deadline, outcomes = time.monotonic() + args.seconds, {}
    with tempfile.TemporaryDirectory() as folder:
        for section in sections(args.device, Path(folder)):
            outcomes[section.name] = outcome = run(section, deadline - time.monotonic())
            print(f"{section.name}: {outcome.result} ({outcome.seconds:.0f} s)", flush=True)
    write_text(out, report(describe(device), outcomes, dry_run=dry_run))
    print(f"Written to {out}")
    if any(outcome.result == "failed" for outcome in outcomes.values()):
        sys.exit(EXIT_BUG)


def run_check(name: str, device: "torch.device") -> str:
    """Run a check by name. UserError: there is no such check."""
    from benchmarks.gpu.checks import CHECKS

    if name not in CHECKS:
        raise UserError(f"--check {name}: no such check. Choose one of: {'; '.join(CHECKS)}.")
    return CHECKS[name](device)


def sections(device: str, folder: Path) -> list[Section]:
    """Return all sections: checks first, then the benchmarks, whose records are written to ``folder``."""
    from benchmarks.gpu.checks import CHECKS

    found = [Section(name, ["benchmarks.gpu", "--device", device, "--check", name], CHECK_SECONDS) for name in CHECKS]
    for number, (name, (on_gpu, small, limit)) in enumerate(BENCHMARKS.items()):
        out = folder / f"{number}.md"
        flags = small if device == "cpu" else on_gpu
        if name != "data":  # it uses only the CPU
            flags = (*flags, "--device", device)
        found.append(Section(name, [f"benchmarks.{name}", *flags, "--out", str(out)], limit, out))
    return found


def run(section: Section, seconds_left: float) -> Outcome:
    """Run a section with its limit, or what is left of all sections' time if that is less."""
    if seconds_left < MIN_SECONDS:
        return Outcome("not run: no time left", 0.0, "")
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", *section.command],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # to end its worker processes as well
    )
    try:
        out, err = process.communicate(timeout=min(section.limit, seconds_left))
        result = "failed" if process.returncode else "done"
    except subprocess.TimeoutExpired:
        result = f"not finished in {min(section.limit, seconds_left):.0f} s"
        out = err = ""
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if result == "failed":
        text = f"```\n{err.strip()}\n```"
    elif result == "done" and section.out:
        text = section.out.read_text(encoding="utf-8").strip()
    else:
        text = out.strip()
    return Outcome(result, time.monotonic() - started, text)


def report(machine: str, outcomes: dict[str, Outcome], *, dry_run: bool) -> str:
    """Return the report: machine, a table of the sections, and what each of them printed."""
    title = "# Dry run on a CPU: no results" if dry_run else "# Checks and benchmarks on a GPU"
    lines = [title, "", machine, "", "| section | result | time |", "|---|---|---:|"]
    lines += [f"| {name} | {outcome.result} | {outcome.seconds:.0f} s |" for name, outcome in outcomes.items()]
    for name, outcome in outcomes.items():
        if outcome.text:
            lines += ["", f"## {name}", "", outcome.text]
    return "\n".join(lines) + "\n"


def card_name(device: "torch.device") -> str:
    """Return the card's name as part of a file name: ``nvidia_h100_80gb_hbm3``."""
    import torch

    return re.sub(r"\W+", "_", torch.cuda.get_device_name(device).lower()).strip("_")


def describe(device: "torch.device") -> str:
    """Return card, driver, and versions of CUDA, the libraries and this project."""
    import torch

    from benchmarks.machine import machine
    from benchmarks.records import git_revision

    text = f"{machine(device)}; commit {git_revision()}"
    if device.type == "cpu":
        return text
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={device.index}"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        driver = "unknown"
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    return (
        f"{text}; {memory:.0f} GiB; driver {driver}; CUDA {torch.version.cuda}; cuDNN {torch.backends.cudnn.version()}"
    )


if __name__ == "__main__":
    run_command(main)
