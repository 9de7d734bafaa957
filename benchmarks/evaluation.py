"""Measure the evaluation of a whole split: time per expression, share of the matrix rate, GFLOP and memory.

    python -m benchmarks.evaluation --cfg configs/demo.yaml      # a split as large as RefCOCO val, a small model
    python -m benchmarks.evaluation --cfg configs/demo.yaml --sources files packed
    python -m benchmarks.evaluation --images 2                   # base at 480, 14 expressions

The split is generated. A repeat loads its images, computes and compares the masks, and writes them to a result file, as
test.py does. The matrix rate is measured before each repeat only, so the share is less exact than that of
benchmarks.inference.
"""

import itertools
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yacs.config import CfgNode

from benchmarks import inference, machine, network, records
from benchmarks.records import GIB, Record, Row
from lib.cli import Parser, run_command
from lib.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from data.dataset_refer_bert import ReferDataset


def get_parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.evaluation", description=__doc__)
    network.add_arguments(parser, "WORKERS")
    network.add_inference_arguments(parser)
    add = parser.add_argument
    add("--batch-sizes", nargs="+", type=int, default=[8], metavar="N", help="expressions (default: 8)")
    add("--images", type=int, default=1500, metavar="N", help="size of the split (default: 1500, as RefCOCO val)")
    add("--sources", nargs="+", choices=("files", "packed"), default=["files"], help="of images (default: files)")
    records.add_arguments(parser)
    return parser


def main() -> None:
    args = get_parser().parse_args()
    cfg = network.read_config(args)
    earlier = records.check_arguments(args, "evaluation")
    if min(args.images, *args.batch_sizes) < 1:
        raise UserError("--images and --batch-sizes must be at least 1.")

    from benchmarks.generated_split import like_refcoco, write_set
    from data.pack.writing import pack_split
    from refer.refer import REFER
    from utils import init_distributed

    device = init_distributed(cfg.DEVICE, tf32=cfg.TRAIN.TF32).device
    kernels = {amp: machine.MatrixRate(device, amp).kernel for amp in args.amp}
    size = like_refcoco(args.images)
    record = Record("evaluation", f"Evaluation: {network.describe(cfg)}", machine.machine(device), "expression")
    record.notes.append(f"{size.expressions} expressions of {size.refs} objects in {size.images} images of 640×480.")
    with tempfile.TemporaryDirectory() as folder:
        write_set(Path(folder), size)
        packed = (
            str(pack_split(REFER(folder), "val", cfg.DATA.IMG_SIZE, Path(folder))) if "packed" in args.sources else ""
        )
        for model, amp, batch, source in itertools.product(args.models, args.amp, args.batch_sizes, args.sources):
            case = {"model": model, "amp": amp, "batch": batch, "images": source}
            split = (folder, packed if source == "packed" else "")
            row = machine.run_in_process(measure, cfg, case, args.repeats, kernels[amp], split)
            record.add(row or Row(case))
    records.finish(record, earlier, args.out)


def measure(cfg: CfgNode, case: dict[str, Any], repeats: int, kernel: str, split: tuple[str, str]) -> Row:
    """Measure a row in this process, on a generated split: its folder and its packed file, if that is used."""
    from benchmarks.generated_split import open_set
    from lib.evaluation import EvalSetup
    from utils import init_distributed

    distributed = init_distributed(cfg.DEVICE, tf32=cfg.TRAIN.TF32)
    model, precision = network.for_inference(cfg, case["model"], case["amp"], distributed.device)
    dataset = open_set(Path(split[0]), cfg.DATA.IMG_SIZE, split[1])
    rate = machine.MatrixRate(distributed.device, case["amp"], kernel)
    setup = EvalSetup(distributed, case["batch"], cfg.WORKERS, cfg.PIN_MEM)
    seconds, rates = [], []
    with precision:
        for number in range(-1, repeats):
            before = rate()
            started = time.perf_counter()
            memory = evaluate_split(model, dataset, setup, count=len(dataset) if number >= 0 else case["batch"])
            if number >= 0:  # the first batch is the warm-up
                seconds.append(time.perf_counter() - started)
                rates.append(before)
    single, pair = (inference.count_gflop(cfg, sentences, sentences) for sentences in (1, 2))
    images = len({expression.image_id for expression in dataset.expressions})
    gflop = len(dataset) * (pair - single) + images * (2 * single - pair)
    extra = {}
    if memory:
        extra = {"memory after a tenth": f"{memory[len(memory) // 10]:.3f} GiB", "at the end": f"{memory[-1]:.3f} GiB"}
    return Row(case, seconds, len(dataset), gflop, rates, kernel, machine.peak_memory(distributed.device), extra)


def evaluate_split(model: "nn.Module", dataset: "ReferDataset", setup: Any, *, count: int) -> list[float]:
    """Evaluate the first ``count`` expressions. Return the memory of this process before each batch, in GiB."""
    from dataclasses import replace

    from lib.evaluation import evaluate
    from lib.protocols import PAPER
    from lib.report.results import ResultFile

    memory: list[float] = []

    def mark() -> bool:
        memory.append(resident_bytes() / GIB)
        return False

    settings = {"splits": {"val": len(dataset)}, "protocols": [PAPER.settings()]}
    with tempfile.TemporaryDirectory() as folder, ResultFile(Path(folder) / "results.jsonl", settings) as file:
        setup = replace(setup, stop_requested=mark)
        evaluate(model, dataset, [PAPER], setup, indices=range(count), sink=file)
    return memory


def resident_bytes() -> int:
    """Return the resident memory of this process (Linux)."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


if __name__ == "__main__":
    run_command(main)
