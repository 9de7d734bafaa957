"""What one training step costs: time and memory, without and with gradient checkpointing, by batch size and precision.

    python -m benchmarks.train_step                                  # base at 480, on the GPU if there is one
    python -m benchmarks.train_step --swin_type tiny --img_size 224 --batch_sizes 4 --device cpu --out step.md

A step is the project's TrainingStep (forward, backward, AdamW) on random data; every row has a process of its own. On
a GPU also: the share of its measured matrix rate, and whether the published batch fits in 24 GB. On a CPU also: how
many bytes autograd keeps for backward.
"""

import argparse
import itertools
import json
import resource
import signal
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import machine, random_inputs
from CrossVLT import build_crossvlt
from lib.cli import Parser, run_command
from lib.config import DEFAULTS, SMALLEST
from lib.criterion import CrossVLTCriterion
from lib.engine.precision import Precision, compile_blocks
from lib.engine.step import TrainingStep
from lib.errors import EXIT_MISTAKE, UserError
from lib.evaluation import Batch
from lib.files import atomic_write, check_writable
from lib.optim import build_lr_scheduler, build_optimizer, freeze, names_without_gradient
from lib.variants import MAX_TOKENS, SWIN_VARIANTS
from utils import init_distributed

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
SMALL_CARD = 24e9  # bytes, not GiB: the rest of such a card is CUDA's own
MATRIX_SIDE = 8192
WARM_UP = {"cpu": 1, "cuda": 2}  # steps
MODES = {"float32": ("off", False, False), "TF32": ("off", True, False), "bf16": ("bf16", False, False),
         "bf16 + compile": ("bf16", False, True)}  # train.py's --amp, --tf32, --compile  # fmt: skip
NO_FIT = "doesn't fit"
EVERYWHERE = ("float32", "bf16")  # the other modes are ways of GPUs


class Job(NamedTuple):
    """One row's measurement; without a ``mode`` only the machine is looked at."""

    device: str
    swin_type: str = "base"
    img_size: int = 480
    mode: str = ""
    checkpointing: bool = False
    batch_size: int = 1
    steps: int = 1
    most_memory: float = 0  # bytes of the GPU's that may be used; 0: all


class Row(NamedTuple):
    """What was measured; all but ``fits`` may be missing."""

    fits: bool
    seconds: float = 0
    peak: int = 0  # bytes, of the process or of the GPU
    kept: int = 0  # bytes, by autograd between forward and backward; CPU only


def build_step(job: Job, device: torch.device) -> TrainingStep:
    """The published recipe's step on a network with random weights, in the job's precision."""
    amp, _, compiled = MODES[job.mode]
    with device:
        model = build_crossvlt(job.swin_type).train()
    freeze(model, names_without_gradient(model, alignment=True))
    optimizer = build_optimizer(model, DEFAULTS.TRAIN.LR, DEFAULTS.TRAIN.WEIGHT_DECAY)
    model.set_grad_checkpointing(job.checkpointing)
    if compiled:
        compile_blocks(model.blocks())
    scheduler = build_lr_scheduler(optimizer, total_steps=1000)
    return TrainingStep(model, CrossVLTCriterion(), optimizer, scheduler, Precision(amp, device))


def random_batch(batch_size: int, img_size: int, device: torch.device) -> Batch:
    """Noise, ids, and a square object in the middle."""
    images, input_ids, attention_mask = random_inputs(batch_size, img_size, device, torch.float32)
    masks = torch.zeros(batch_size, img_size, img_size, dtype=torch.int64, device=device)
    masks[:, img_size // 4 : -img_size // 4, img_size // 4 : -img_size // 4] = 1
    return {"image": images, "input_ids": input_ids, "attention_mask": attention_mask, "mask": masks}


def flop_per_sample(swin_type: str, img_size: int) -> int:
    """Floating-point operations (a multiply-add is two) of forward and backward, nothing computed twice."""
    device = torch.device("meta")
    step = build_step(Job("meta", swin_type, mode="float32"), device)
    batch = random_batch(1, img_size, device)
    # As plain products: a fused attention's formula counts what its backward computes again.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = step.model(batch["image"], batch["input_ids"], batch["attention_mask"])
        step.criterion(output, batch["mask"])["loss"].backward()
    return counter.get_total_flops()


def matrix_rate(device: torch.device) -> float:
    """FLOP/s of the best of several large bf16 products."""
    a, b = torch.randn(2, MATRIX_SIDE, MATRIX_SIDE, device=device, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(20):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        a @ b
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * MATRIX_SIDE**3 / best


def kept_for_backward(step: TrainingStep, batch: Batch) -> int:
    """Bytes that autograd holds when the loss is known, each storage once; weights and buffers aren't counted."""
    saved = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()  # else it could hold the graph that holds it
        saved.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with step.precision.autocast():
            output = step.model(batch["image"], batch["input_ids"], batch["attention_mask"])
        losses = step.criterion(output, batch["mask"])
        storages = [tensor.untyped_storage() for tensor in (ref() for ref in saved) if tensor is not None]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    del output, losses  # not before: they hold what is counted
    own = {t.untyped_storage().data_ptr() for t in (*step.model.parameters(), *step.model.buffers())}
    return sum(size for address, size in sizes.items() if address not in own)


def look_at_machine(job: Job) -> dict:
    """What the report's head says, and what the speeds of the rows are divided by."""
    device = init_distributed(job.device).device
    gpu = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if gpu else 0
    return {"gpu": gpu, "name": machine(device), "memory": memory, "rate": matrix_rate(device) if gpu else 0}


def measure(job: Job) -> Row:
    """Take the steps of a row, in a process that has done nothing else."""
    device = init_distributed(job.device, tf32=MODES[job.mode][1]).device
    gpu, seconds = device.type == "cuda", []
    warm_up = 0 if job.most_memory else WARM_UP[device.type]
    if job.most_memory:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(job.most_memory / total, device)
    try:
        step, batch = build_step(job, device), random_batch(job.batch_size, job.img_size, device)
        for number in range(warm_up + job.steps):
            if gpu and number == warm_up:
                torch.cuda.reset_peak_memory_stats(device)  # compiling's own trials don't count
            started = time.perf_counter()
            step([batch])
            if gpu:
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
    except (torch.OutOfMemoryError, UserError) as error:  # TrainingStep tells the user
        if not isinstance(error.__cause__ or error, torch.OutOfMemoryError):
            raise
        return Row(fits=False, peak=torch.cuda.max_memory_allocated(device))
    finally:
        if job.most_memory:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    seconds = statistics.median(seconds[warm_up:])
    if gpu:
        return Row(True, seconds, torch.cuda.max_memory_allocated(device))
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step.optimizer.zero_grad()
    return Row(True, seconds, peak, kept_for_backward(step, batch))


def in_own_process(job: Job) -> dict:
    """What a fresh process finds out about a job; one that is killed took more memory than there was."""
    command = [sys.executable, "-m", "benchmarks.train_step", "--one", json.dumps(job._asdict())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGKILL and job.mode:
        return Row(fits=False)._asdict()
    if done.returncode == EXIT_MISTAKE:
        raise UserError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    if done.returncode:
        raise RuntimeError(f"{job} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def report(args: argparse.Namespace) -> Iterator[str]:
    """The report's lines, as they become known."""
    known = in_own_process(Job(args.device))
    gpu, flop = known["gpu"], flop_per_sample(args.swin_type, args.img_size)
    yield f"# Training step of CrossVLT {args.swin_type}, {args.img_size}×{args.img_size}, {MAX_TOKENS} tokens\n"
    yield f"{known['name']}\n"
    yield f"{flop / 1e9:.0f} GFLOP per sample, forward and backward; what is computed again isn't counted."
    if gpu:
        yield f"The GPU's matrix rate: {known['rate'] / 1e12:.0f} TFLOP/s, in bf16 products of {MATRIX_SIDE}³."
    yield f"Median of {args.steps} step(s), after {WARM_UP['cuda' if gpu else 'cpu']} to warm up.\n"
    last = ("peak GPU memory", "share of the matrix rate") if gpu else ("peak of the process", "kept for backward")
    yield f"| batch | precision | checkpointing | s per step | samples/s | {' | '.join(last)} |"
    yield "|---|---|---|---|---|---|---|"
    before, pairs = None, []
    for job in jobs(args, tuple(MODES) if gpu else EVERYWHERE, args.batch_sizes):
        row = Row(**in_own_process(job))
        if not row.fits:
            yield f"{start(job)} {NO_FIT} | | | |"
        else:
            without = before if job.checkpointing and before.fits else row
            share = flop * job.batch_size / (row.seconds * known["rate"]) if gpu else 0
            time_ = compared(f"{row.seconds:.3g}", without.seconds, row.seconds)
            peak = compared(f"{row.peak / GIB:.2f} GiB", without.peak, row.peak)
            kept = compared(f"{row.kept / GIB:.3f} GiB", without.kept, row.kept)
            end = f"{100 * share:.1f} %" if gpu else kept
            yield f"{start(job)} {time_} | {job.batch_size / row.seconds:.3g} | {peak} | {end} |"
            pairs += [(without, row)] if without is not row else []
        before = row
    if gpu and known["memory"] > SMALL_CARD:
        yield f"\nTwo steps with {SMALL_CARD / 1e9:.0f} GB of GPU memory:\n"
        yield "| batch | precision | checkpointing | | peak GPU memory |\n|---|---|---|---|---|"
        for job in jobs(args, EVERYWHERE, [DEFAULTS.BATCH_SIZE]):
            row = Row(**in_own_process(job._replace(steps=2, most_memory=SMALL_CARD)))
            yield f"{start(job)} {'fits' if row.fits else NO_FIT} | {row.peak / GIB:.2f} GiB |"
    if pairs:
        quantities = {"peak": "peak memory", "seconds": "time"} | ({} if gpu else {"kept": "what is kept for backward"})
        told = []
        for field, name in quantities.items():
            ratios = sorted(getattr(row, field) / getattr(without, field) for without, row in pairs)
            told.append(f"{name} {' to '.join(dict.fromkeys((change(ratios[0]), change(ratios[-1]))))}")
        yield f"\nWhat gradient checkpointing changes about a step: {', '.join(told)}."


def jobs(args: argparse.Namespace, modes: tuple[str, ...], batch_sizes: list[int]) -> Iterator[Job]:
    """The rows of a table: of each pair the one without checkpointing first."""
    for batch_size, mode, checkpointing in itertools.product(batch_sizes, modes, (False, True)):
        yield Job(args.device, args.swin_type, args.img_size, mode, checkpointing, batch_size, args.steps)


def start(job: Job) -> str:
    """How a row of a table begins."""
    return f"| {job.batch_size} | {job.mode} | {'yes' if job.checkpointing else 'no'} |"


def compared(value: str, before: float, after: float) -> str:
    """A value and, in brackets, what checkpointing changes about it."""
    return value if before == after else f"{value} ({change(after / before)})"


def change(ratio: float) -> str:
    """``−43 %``."""
    return f"{100 * (ratio - 1):+.0f} %".replace("-", "−")


def get_parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.train_step", description=__doc__)
    parser.add_argument("--swin_type", choices=SWIN_VARIANTS, default="base")
    parser.add_argument("--img_size", type=int, default=480)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 2], metavar="B", help="default: 1 2")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after those to warm up (default: 5)")
    parser.add_argument("--out", metavar="FILE", help="write the report to this file too")
    parser.add_argument("--one", metavar="JSON", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = get_parser().parse_args()
    if args.one:
        job = Job(**json.loads(args.one))
        print(json.dumps(measure(job)._asdict() if job.mode else look_at_machine(job)))
        return
    if min(*args.batch_sizes, args.steps) < 1 or args.img_size <= SMALLEST:
        raise UserError(f"--batch_sizes and --steps must be at least 1, --img_size more than {SMALLEST}")
    if args.out:
        check_writable(args.out)
    lines = []
    for line in report(args):
        print(line, flush=True)
        lines.append(line)
    if args.out:
        with atomic_write(args.out) as aside:
            aside.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
