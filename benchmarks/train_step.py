"""Measure time and memory of a training step, by batch size and precision, with and without gradient checkpointing.

    python -m benchmarks.train_step                                  # base at 480, on the GPU if there is one
    python -m benchmarks.train_step --swin_type tiny --img_size 224 --batch_sizes 4 --device cpu --out step.md

A step is lib.engine.loop.optimizer_step (forward, backward, AdamW) on random data. Each row is measured in its own
process. On a GPU, the report also contains the fraction of the measured matrix rate, and whether the published batch
fits in 24 GB. On a CPU, it contains the number of bytes that autograd keeps for the backward pass.
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
from data.loaders import Batch
from lib.cli import Parser, run_command
from lib.config import DEFAULTS
from lib.criterion import CrossVLTCriterion
from lib.engine.loop import optimizer_step
from lib.engine.precision import autocast, compile_blocks
from lib.engine.state import TrainState, build_train_state
from lib.errors import EXIT_MISTAKE, UserError
from lib.files import Kind, check_writable, write_text
from lib.options import MIN_IMAGE_SIZE
from lib.variants import MAX_TOKENS, SWIN_VARIANTS
from utils import init_distributed

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
SMALL_GPU = 24e9  # bytes, not GiB: CUDA itself needs the rest of such a card
MATRIX_SIDE = 8192
WARM_UP_STEPS = {"cpu": 1, "cuda": 2}
MODES = {  # train.py's --amp, --tf32, --compile
    "float32": ("off", False, False),
    "TF32": ("off", True, False),
    "bf16": ("bf16", False, False),
    "bf16 + compile": ("bf16", False, True),
}
NO_FIT = "does not fit"
CPU_MODES = ("float32", "bf16")


class Job(NamedTuple):
    """Settings of one row. If ``mode`` is empty, the machine is described instead."""

    device: str
    swin_type: str = "base"
    img_size: int = 480
    mode: str = ""
    checkpointing: bool = False
    batch_size: int = 1
    steps: int = 1
    max_memory: float = 0  # bytes of GPU memory that may be used; 0: all


class Row(NamedTuple):
    """Measured values."""

    fits: bool
    seconds: float = 0
    peak: int = 0  # bytes, of the process or of the GPU
    kept: int = 0  # bytes kept by autograd for the backward pass; CPU only


def build_state(job: Job, device: torch.device) -> TrainState:
    """Return the published recipe's training state with random weights, in the job's precision."""
    amp, _, compiled = MODES[job.mode]
    recipe = DEFAULTS.TRAIN.clone()
    recipe.AMP, recipe.STEPS = amp, 1000
    with device:
        model = build_crossvlt(job.swin_type).train()
    model.set_grad_checkpointing(job.checkpointing)
    if compiled:
        compile_blocks(model.blocks())
    return build_train_state(model, recipe, steps_per_epoch=1000)


def random_batch(batch_size: int, img_size: int, device: torch.device) -> Batch:
    """Return noise, random token ids, and masks with a square in the middle."""
    images, input_ids, attention_mask = random_inputs(batch_size, img_size, device, torch.float32)
    masks = torch.zeros(batch_size, img_size, img_size, dtype=torch.int64, device=device)
    masks[:, img_size // 4 : -img_size // 4, img_size // 4 : -img_size // 4] = 1
    return {"image": images, "input_ids": input_ids, "attention_mask": attention_mask, "mask": masks}


def flop_per_sample(swin_type: str, img_size: int) -> int:
    """Return the floating-point operations (a multiply-add counts as two) of a forward and backward pass."""
    device = torch.device("meta")
    model, batch = build_state(Job("meta", swin_type, mode="float32"), device).model, random_batch(1, img_size, device)
    # Plain matrix products: the formula for fused attention includes what its backward pass recomputes.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(batch["image"], batch["input_ids"], batch["attention_mask"])
        CrossVLTCriterion()(output, batch["mask"])["loss"].backward()
    return counter.get_total_flops()


def matrix_rate(device: torch.device) -> float:
    """Return the FLOP/s of the fastest of several large bf16 matrix products."""
    a, b = torch.randn(2, MATRIX_SIDE, MATRIX_SIDE, device=device, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(20):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        a @ b
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * MATRIX_SIDE**3 / best


def kept_for_backward(state: TrainState, batch: Batch) -> int:
    """Return the bytes that autograd holds after the forward pass, without weights and buffers; each storage once."""
    saved = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()  # otherwise the tensor and the graph could refer to each other
        saved.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with autocast(state.recipe.AMP, batch["image"].device):
            output = state.model(batch["image"], batch["input_ids"], batch["attention_mask"])
        losses = CrossVLTCriterion()(output, batch["mask"])
        storages = [tensor.untyped_storage() for tensor in (ref() for ref in saved) if tensor is not None]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    del output, losses  # not earlier, because they refer to the counted tensors
    weights = {t.untyped_storage().data_ptr() for t in (*state.model.parameters(), *state.model.buffers())}
    return sum(size for address, size in sizes.items() if address not in weights)


def describe_machine(job: Job) -> dict:
    """Return name, GPU memory and matrix rate of the machine."""
    device = init_distributed(job.device).device
    gpu = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if gpu else 0
    return {"gpu": gpu, "name": machine(device), "memory": memory, "rate": matrix_rate(device) if gpu else 0}


def measure(job: Job) -> Row:
    """Measure the steps of a row in this process."""
    device = init_distributed(job.device, tf32=MODES[job.mode][1]).device
    gpu, seconds = device.type == "cuda", []
    warm_up = 0 if job.max_memory else WARM_UP_STEPS[device.type]
    if job.max_memory:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(job.max_memory / total, device)
    try:
        state, batch = build_state(job, device), random_batch(job.batch_size, job.img_size, device)
        for number in range(warm_up + job.steps):
            if gpu and number == warm_up:
                torch.cuda.reset_peak_memory_stats(device)  # exclude memory used by the compiler
            started = time.perf_counter()
            optimizer_step(state.model, CrossVLTCriterion(), [batch], state)
            if gpu:
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
    except torch.OutOfMemoryError:
        return Row(fits=False, peak=torch.cuda.max_memory_allocated(device))
    finally:
        if job.max_memory:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    seconds = statistics.median(seconds[warm_up:])
    if gpu:
        return Row(True, seconds, torch.cuda.max_memory_allocated(device))
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    state.optimizer.zero_grad()
    return Row(True, seconds, peak, kept_for_backward(state, batch))


def run_in_process(job: Job) -> dict:
    """Run a job in a new process. If the process is killed, the job did not fit in memory."""
    command = [sys.executable, "-m", "benchmarks.train_step", "--job", json.dumps(job._asdict())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGKILL and job.mode:
        return Row(fits=False)._asdict()
    if done.returncode == EXIT_MISTAKE:
        raise UserError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    if done.returncode:
        raise RuntimeError(f"{job} ended with status {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def report(args: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of the report as they are measured."""
    machine_info = run_in_process(Job(args.device))
    gpu, flop = machine_info["gpu"], flop_per_sample(args.swin_type, args.img_size)
    yield f"# Training step of CrossVLT {args.swin_type}, {args.img_size}×{args.img_size}, {MAX_TOKENS} tokens\n"
    yield f"{machine_info['name']}\n"
    yield f"{flop / 1e9:.0f} GFLOP per sample, forward and backward, without recomputation."
    if gpu:
        yield f"Matrix rate of the GPU: {machine_info['rate'] / 1e12:.0f} TFLOP/s, bf16 products of {MATRIX_SIDE}³."
    yield f"Median of {args.steps} step(s), after {WARM_UP_STEPS['cuda' if gpu else 'cpu']} warm-up steps.\n"
    last = ("peak GPU memory", "share of the matrix rate") if gpu else ("peak of the process", "kept for backward")
    yield f"| batch | precision | checkpointing | s per step | samples/s | {' | '.join(last)} |"
    yield "|---|---|---|---|---|---|---|"
    before, pairs = None, []
    for job in jobs(args, tuple(MODES) if gpu else CPU_MODES, args.batch_sizes):
        row = Row(**run_in_process(job))
        if not row.fits:
            yield f"{first_cells(job)} {NO_FIT} | | | |"
        else:
            without = before if job.checkpointing and before.fits else row
            share = flop * job.batch_size / (row.seconds * machine_info["rate"]) if gpu else 0
            time_ = with_change(f"{row.seconds:.3g}", without.seconds, row.seconds)
            peak = with_change(f"{row.peak / GIB:.2f} GiB", without.peak, row.peak)
            kept = with_change(f"{row.kept / GIB:.3f} GiB", without.kept, row.kept)
            end = f"{100 * share:.1f} %" if gpu else kept
            yield f"{first_cells(job)} {time_} | {job.batch_size / row.seconds:.3g} | {peak} | {end} |"
            pairs += [(without, row)] if without is not row else []
        before = row
    if gpu and machine_info["memory"] > SMALL_GPU:
        yield f"\nTwo steps with {SMALL_GPU / 1e9:.0f} GB of GPU memory:\n"
        yield "| batch | precision | checkpointing | | peak GPU memory |\n|---|---|---|---|---|"
        for job in jobs(args, CPU_MODES, [DEFAULTS.BATCH_SIZE]):
            row = Row(**run_in_process(job._replace(steps=2, max_memory=SMALL_GPU)))
            yield f"{first_cells(job)} {'fits' if row.fits else NO_FIT} | {row.peak / GIB:.2f} GiB |"
    if pairs:
        quantities = {"peak": "peak memory", "seconds": "time"} | ({} if gpu else {"kept": "memory kept for backward"})
        changes = []
        for field, name in quantities.items():
            ratios = sorted(getattr(row, field) / getattr(without, field) for without, row in pairs)
            changes.append(
                f"{name} {' to '.join(dict.fromkeys((format_change(ratios[0]), format_change(ratios[-1]))))}"
            )
        yield f"\nGradient checkpointing changes a step by: {', '.join(changes)}."


def jobs(args: argparse.Namespace, modes: tuple[str, ...], batch_sizes: list[int]) -> Iterator[Job]:
    """Yield the rows of a table in pairs, without and with checkpointing."""
    for batch_size, mode, checkpointing in itertools.product(batch_sizes, modes, (False, True)):
        yield Job(args.device, args.swin_type, args.img_size, mode, checkpointing, batch_size, args.steps)


def first_cells(job: Job) -> str:
    """Return the first cells of a row."""
    return f"| {job.batch_size} | {job.mode} | {'yes' if job.checkpointing else 'no'} |"


def with_change(value: str, before: float, after: float) -> str:
    """Return a value, followed by the change through checkpointing in parentheses."""
    return value if before == after else f"{value} ({format_change(after / before)})"


def format_change(ratio: float) -> str:
    """Return a ratio as a change in percent, such as ``−43 %``."""
    return f"{100 * (ratio - 1):+.0f} %".replace("-", "−")


def get_parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.train_step", description=__doc__)
    parser.add_argument("--swin_type", choices=SWIN_VARIANTS, default="base")
    parser.add_argument("--img_size", type=int, default=480)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 2], metavar="B", help="default: 1 2")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--steps", type=int, default=5, help="timed steps (default: 5)")
    parser.add_output("--out", kind=Kind.TEXT, metavar="FILE", help="also write the report to this file")
    parser.add_argument("--job", metavar="JSON", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = get_parser().parse_args()
    if args.job:
        job = Job(**json.loads(args.job))
        print(json.dumps(measure(job)._asdict() if job.mode else describe_machine(job)))
        return
    if min(*args.batch_sizes, args.steps) < 1 or args.img_size < MIN_IMAGE_SIZE:
        raise UserError(f"--batch_sizes and --steps must be at least 1, --img_size at least {MIN_IMAGE_SIZE}.")
    if args.out:
        check_writable(args.out, Kind.TEXT)
    lines = []
    for line in report(args):
        print(line, flush=True)
        lines.append(line)
    if args.out:
        write_text(args.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    run_command(main)
