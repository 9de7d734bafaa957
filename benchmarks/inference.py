"""Measure a forward pass: time per expression, share of the matrix rate, GFLOP and peak memory.

    python -m benchmarks.inference                                   # base at 480, on the GPU if there is one
    python -m benchmarks.inference --amp bf16 --batch-sizes 1 2 4
    python -m benchmarks.inference --compare benchmarks/results/inference_cpu.md
    python -m benchmarks.inference --curves --out benchmarks/results/curves_cpu_off.md

A row is measured in its own process. "plain" is the network under autocast, "prepared" the one that
lib.inference.prepare returns. With several sentences per image, the image is encoded once. --curves measures the rows
from which benchmarks.curves draws the cost against image size, batch and sentences per image.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from yacs.config import CfgNode

from benchmarks import machine, network, records
from benchmarks.records import Record, Row
from lib.cli import Parser, run_command
from lib.errors import UserError

if TYPE_CHECKING:
    import torch

CURVE_SIZES, CURVE_BATCHES = (224, 320, 480, 640), (1, 2, 4)


def get_parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.inference", description=__doc__)
    network.add_arguments(parser)
    network.add_inference_arguments(parser)
    add = parser.add_argument
    add("--batch-sizes", nargs="+", type=int, default=[1, 3], metavar="N", help="expressions (default: 1 3)")
    add("--sentences", nargs="+", type=int, default=[1, 3], metavar="N", help="per image (default: 1 3)")
    add("--curves", action="store_true", help="vary image size, batch and sentences per image one at a time")
    records.add_arguments(parser)
    return parser


def main() -> None:
    args = get_parser().parse_args()
    cfg = network.read_config(args)
    earlier = records.check_arguments(args, "inference")
    if min(args.batch_sizes + args.sentences) < 1:
        raise UserError("--batch-sizes and --sentences must be at least 1.")
    kinds = itertools.product(args.models, args.amp)
    if args.curves:
        points = list(curve_points(cfg.DATA.IMG_SIZE))
    else:
        pairs = itertools.product(args.batch_sizes, args.sentences)
        points = [(cfg.DATA.IMG_SIZE, batch, sentences) for batch, sentences in pairs if batch % sentences == 0]
    if not points:
        raise UserError("No row: each of --sentences must divide at least one of --batch-sizes.")

    from utils import init_distributed

    device = init_distributed(cfg.DEVICE, tf32=cfg.TRAIN.TF32).device
    kernels = {amp: machine.MatrixRate(device, amp).kernel for amp in args.amp}
    record = Record("inference", f"Inference: {network.describe(cfg)}", machine.machine(device), "expression")
    for (model, amp), (size, batch, sentences) in itertools.product(kinds, points):
        case = {"model": model, "amp": amp, "image size": size, "batch": batch, "sentences per image": sentences}
        row = machine.run_in_process(measure, cfg, case, args.repeats, kernels[amp])
        record.add(row or Row(case))
    records.finish(record, earlier, args.out)


def curve_points(size: int) -> Iterator[tuple[int, int, int]]:
    """Yield image size, batch and sentences per image of each row of --curves."""
    yield from ((other, 1, 1) for other in sorted({*CURVE_SIZES, size}))
    yield from ((size, batch, sentences) for batch in CURVE_BATCHES[1:] for sentences in (1, batch))


def measure(cfg: CfgNode, case: dict[str, Any], repeats: int, kernel: str) -> Row:
    """Measure a row in this process."""
    import torch

    from utils import init_distributed

    model_name, amp, cfg.DATA.IMG_SIZE, batch, sentences = case.values()
    device = init_distributed(cfg.DEVICE, tf32=cfg.TRAIN.TF32).device
    rate = machine.MatrixRate(device, amp, kernel)
    model, precision = network.for_inference(cfg, model_name, amp, device)
    run = forward(model, cfg, batch, sentences, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # without the operations of the matrix rate
    with torch.inference_mode(), precision:
        timing = machine.time_repeats(run, device, repeats=repeats, rate=rate)
    peak = machine.peak_memory(device)
    return Row(case, timing.seconds, batch, count_gflop(cfg, batch, sentences), timing.rates, kernel, peak)


def forward(
    model: "torch.nn.Module", cfg: CfgNode, batch: int, sentences: int, device: "torch.device"
) -> Callable[[], object]:
    """Return a function that segments random expressions, with each image encoded once."""
    import torch

    images, *text = network.random_inputs(cfg, batch, device, sentences=sentences)
    if sentences == 1:
        return lambda: model(images, *text)
    image_of = torch.arange(batch, device=device) // sentences
    return lambda: model.segment(model.encode_images(images)[image_of], *text, size=images.shape[-2:])


def count_gflop(cfg: CfgNode, batch: int, sentences: int) -> float:
    """Return the operations of a forward pass of the plain network in units of 10⁹."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    device = torch.device("meta")
    run = forward(network.build_network(cfg, device).eval(), cfg, batch, sentences, device)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


if __name__ == "__main__":
    run_command(main)
