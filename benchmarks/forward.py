"""Measure a forward pass: time per expression, peak memory and GFLOP, by batch size and dtype.

    python -m benchmarks.forward                                    # base at 480, on the GPU if there is one
    python -m benchmarks.forward --swin_type tiny --img_size 224 --batch-sizes 1,4 --dtypes float32,bfloat16

The output is a Markdown table with machine and versions; selected results are kept in benchmarks/results/.
"""

import multiprocessing
import resource
import statistics
import time

from lib.cli import Parser, did_you_mean, run_command
from lib.errors import UserError
from lib.variants import IMG_SIZE, MAX_TOKENS, SWIN_VARIANTS

DTYPES = ("float32", "bfloat16", "float16")


def get_parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.forward", description=__doc__)
    add = parser.add_argument
    add("--swin_type", choices=SWIN_VARIANTS, default="base")
    add("--img_size", type=int, default=IMG_SIZE, metavar="PIXELS", help="(default: %(default)s)")
    add("--batch-sizes", default="1,2,4", metavar="N,…", help="comma-separated (default: %(default)s)")
    add("--dtypes", default="float32,bfloat16", metavar="DTYPE,…", help="comma-separated (default: %(default)s)")
    add("--repeats", type=int, default=5, metavar="N", help="timed passes after the warm-up (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    return parser


def main() -> None:
    args = get_parser().parse_args()
    dtypes, batch_sizes = args.dtypes.split(","), args.batch_sizes.split(",")
    check_lists(dtypes, batch_sizes, args.repeats)

    from benchmarks.machine import machine
    from utils import init_distributed

    device = init_distributed(args.device).device
    work = gflop(args.swin_type, args.img_size)
    print(f"CrossVLT {args.swin_type}, {args.img_size}×{args.img_size}, {MAX_TOKENS} tokens: {work:.1f} GFLOP each")
    print(f"{machine(device)}\n")
    memory = "peak GPU memory" if device.type == "cuda" else "peak memory of the process"
    print(f"| dtype | batch | ms per expression (median) | spread | GFLOP/s | {memory} |\n|---|---|---|---|---|---|")
    for dtype in dtypes:
        for batch_size in map(int, batch_sizes):
            row = (args.swin_type, args.img_size, dtype, batch_size, args.repeats, args.device)
            with multiprocessing.get_context("spawn").Pool(1) as pool:  # each row has its own peak memory
                times, peak = pool.apply(measure, row)
            median, spread = statistics.median(times), f"{min(times):.0f}…{max(times):.0f}"
            rate = 1000 * work / median
            print(f"| {dtype} | {batch_size} | {median:.0f} | {spread} | {rate:.0f} | {peak:.2f} GiB |", flush=True)


def check_lists(dtypes: list[str], batch_sizes: list[str], repeats: int) -> None:
    """Raise a UserError if an item of the comma-separated lists is invalid."""
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise UserError(f"--dtypes: no such dtype {dtype!r}.{did_you_mean(dtype, DTYPES)}")
    if repeats < 1 or not all(size.isdecimal() and int(size) > 0 for size in batch_sizes):
        raise UserError("--batch-sizes and --repeats must be positive integers.")


def gflop(swin_type: str, img_size: int) -> float:
    """Return the floating-point operations of one expression in units of 10⁹; a multiply-add counts as two."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.machine import random_inputs
    from CrossVLT import build_crossvlt

    with torch.device("meta"), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model = build_crossvlt(swin_type).eval()
        model(*random_inputs(1, img_size, torch.device("meta"), torch.float32))
    return counter.get_total_flops() / 1e9


def measure(
    swin_type: str, img_size: int, dtype_name: str, batch_size: int, repeats: int, device_name: str
) -> tuple[list[float], float]:
    """Return the milliseconds per expression of each repeat, and the peak memory in GiB."""
    import torch

    from benchmarks.machine import random_inputs
    from CrossVLT import build_crossvlt
    from utils import init_distributed

    device, dtype = init_distributed(device_name).device, getattr(torch, dtype_name)
    model = build_crossvlt(swin_type).to(device, dtype).eval()
    batch = random_inputs(batch_size, img_size, device, dtype)
    times = []
    with torch.inference_mode():
        for repeat in range(repeats + 1):
            start = time.perf_counter()
            model(*batch)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat > 0:  # the first pass is the warm-up
                times.append(1000 * (time.perf_counter() - start) / batch_size)
    if device.type == "cuda":
        return times, torch.cuda.max_memory_allocated(device) / 2**30
    return times, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    run_command(main)
