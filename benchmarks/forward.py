"""What one forward pass costs: ms per expression, peak memory and GFLOP, by batch size and dtype.

    python -m benchmarks.forward                                    # base at 480, on the GPU if there is one
    python -m benchmarks.forward --swin_type tiny --img_size 224 --batch-sizes 1,4 --dtypes float32,bfloat16

Prints a Markdown table with machine and versions; results worth keeping are in benchmarks/results/.
"""

import argparse
import multiprocessing
import platform
import resource
import statistics
import time

import timm
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from CrossVLT import CrossVLT, build_crossvlt
from lib.variants import SWIN_VARIANTS

NUM_TOKENS = 21


def machine(device: torch.device) -> str:
    """Where and with what this was measured."""
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = f"{cpu_name()}, {torch.get_num_threads()} threads"
    return (
        f"{where}; Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}, "
        f"transformers {transformers.__version__}"
    )


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def inputs(batch_size: int, img_size: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Random pictures and sentences of full length."""
    images = torch.randn(batch_size, 3, img_size, img_size, device=device, dtype=dtype)
    input_ids = torch.randint(1000, 30000, (batch_size, NUM_TOKENS), device=device)
    return images, input_ids, torch.ones_like(input_ids)


def gflop(model: CrossVLT, img_size: int) -> float:
    """Floating-point operations (a multiply-add is two) of one expression."""
    with FlopCounterMode(display=False) as counter:
        model(*inputs(1, img_size, torch.device("cpu"), torch.float32))
    return counter.get_total_flops() / 1e9


@torch.inference_mode()
def measure(swin_type: str, img_size: int, dtype_name: str, batch_size: int, repeats: int, where: str) -> tuple:
    """Milliseconds per expression of each repeat, and peak memory in GiB. Runs in a process of its own."""
    device, dtype = torch.device(where), getattr(torch, dtype_name)
    model = build_crossvlt(swin_type).to(device, dtype).eval()
    batch = inputs(batch_size, img_size, device, dtype)
    times = []
    for repeat in range(repeats + 1):
        started = time.perf_counter()
        model(*batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat:  # the first warms up
            times.append(1000 * (time.perf_counter() - started) / batch_size)
    if device.type == "cuda":
        return times, torch.cuda.max_memory_allocated(device) / 2**30
    return times, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.forward", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--swin_type", choices=SWIN_VARIANTS, default="base")
    parser.add_argument("--img_size", type=int, default=480)
    parser.add_argument("--batch-sizes", default="1,2,4", help="comma-separated (default: %(default)s)")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="comma-separated (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes after one to warm up (default: 5)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main() -> None:
    args = get_parser().parse_args()
    device = torch.device(args.device)
    with torch.inference_mode():
        work = gflop(build_crossvlt(args.swin_type).eval(), args.img_size)
    print(f"CrossVLT {args.swin_type}, {args.img_size}×{args.img_size}, {NUM_TOKENS} tokens: {work:.1f} GFLOP each")
    print(f"{machine(device)}\n")
    memory = "peak GPU memory" if device.type == "cuda" else "peak memory of the process"
    print(f"| dtype | batch | ms per expression (median) | spread | GFLOP/s | {memory} |\n|---|---|---|---|---|---|")
    for dtype in args.dtypes.split(","):
        for batch_size in map(int, args.batch_sizes.split(",")):
            row = (args.swin_type, args.img_size, dtype, batch_size, args.repeats, args.device)
            with multiprocessing.get_context("spawn").Pool(1) as fresh:  # else a peak would hide the later ones
                times, peak = fresh.apply(measure, row)
            median, spread = statistics.median(times), f"{min(times):.0f}…{max(times):.0f}"
            rate = 1000 * work / median
            print(f"| {dtype} | {batch_size} | {median:.0f} | {spread} | {rate:.0f} | {peak:.2f} GiB |", flush=True)


if __name__ == "__main__":
    main()
