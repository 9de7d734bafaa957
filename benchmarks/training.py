"""Measure a training step: time per sample, share of the matrix rate, GFLOP and memory.

    python -m benchmarks.training                                        # base at 480, on the GPU if there is one
    python -m benchmarks.training --cfg configs/demo.yaml --batch-sizes 8
    python -m benchmarks.training --amp off bf16 --grad_checkpoint --batch-sizes 6
    python -m benchmarks.training --batch-sizes 6 --grad_checkpoint --gpu_memory 24    # does it fit into 24 GB?

A step is lib.engine.loop.optimizer_step (forward, backward, AdamW) on random data. A row is measured in its own
process. On a CPU, the table also contains the memory that autograd keeps for the backward pass. The GFLOP are those of
the forward and backward pass without recomputation, so gradient checkpointing lowers the share.
"""

import itertools
import weakref
from typing import TYPE_CHECKING, Any

from yacs.config import CfgNode

from benchmarks import machine, network, records
from benchmarks.records import GIB, Record, Row
from lib.cli import Parser, run_command
from lib.errors import UserError

if TYPE_CHECKING:
    import torch

    from data.loaders import Batch
    from lib.engine.state import TrainState


def get_parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.training", description=__doc__)
    network.add_arguments(parser, "TRAIN.COMPILE")
    add = parser.add_argument
    add("--amp", nargs="+", choices=tuple(machine.DTYPES), default=["off", "bf16"], help="(default: off bf16)")
    add("--batch-sizes", nargs="+", type=int, default=[2], metavar="N", help="samples of a step (default: 2)")
    add("--grad_checkpoint", action="store_true", help="measure each row also with gradient checkpointing")
    add("--gpu_memory", type=float, default=0, metavar="GB", help="use at most 10⁹ bytes × GB of the GPU's memory")
    records.add_arguments(parser)
    return parser


def main() -> None:
    args = get_parser().parse_args()
    cfg = network.read_config(args)
    earlier = records.check_arguments(args, "training")
    if min(args.batch_sizes) < 1:
        raise UserError("--batch-sizes must be at least 1.")

    from utils import init_distributed

    device = init_distributed(cfg.DEVICE, tf32=cfg.TRAIN.TF32).device
    if args.gpu_memory and device.type == "cpu":
        raise UserError("--gpu_memory limits the memory of a GPU. Drop it, or pass --device cuda.")
    kernels = {amp: machine.MatrixRate(device, amp).kernel for amp in args.amp}
    record = Record("training", f"Training step: {network.describe(cfg)}", machine.machine(device), "sample")
    checkpointing = ("no", "yes") if args.grad_checkpoint else ("no",)
    for batch, amp, used in itertools.product(args.batch_sizes, args.amp, checkpointing):
        case = {"amp": amp, "batch": batch, "gradient checkpointing": used}
        row = machine.run_in_process(measure, cfg, case, args.repeats, kernels[amp], args.gpu_memory)
        record.add(row or Row(case))
    records.finish(record, earlier, args.out)


def measure(cfg: CfgNode, case: dict[str, Any], repeats: int, kernel: str, gpu_memory: float) -> Row | None:
    """Measure a row in this process. None: it does not fit in the GPU's memory, or in ``gpu_memory`` × 10⁹ bytes."""
    import torch

    from lib.criterion import CrossVLTCriterion
    from lib.engine.loop import optimizer_step
    from utils import init_distributed

    device = init_distributed(cfg.DEVICE, tf32=cfg.TRAIN.TF32).device
    if gpu_memory:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gpu_memory * 1e9 / total), device)
    cfg.TRAIN.AMP, cfg.TRAIN.GRAD_CHECKPOINT = case["amp"], case["gradient checkpointing"] == "yes"
    rate, criterion = machine.MatrixRate(device, cfg.TRAIN.AMP, kernel), CrossVLTCriterion(cfg.TRAIN.ALIGNMENT)
    try:
        state, batch = build_state(cfg, device), random_batch(cfg, case["batch"], device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # without the operations of the matrix rate
        timing = machine.time_repeats(
            lambda: optimizer_step(state.model, criterion, [batch], state), device, repeats=repeats, rate=rate
        )
    except torch.OutOfMemoryError:
        return None
    peak, extra = machine.peak_memory(device), {}
    if device.type == "cpu":
        state.optimizer.zero_grad()
        extra["kept for backward"] = f"{kept_for_backward(state, batch) / GIB:.3f} GiB"
    gflop = case["batch"] * count_gflop(cfg)
    return Row(case, timing.seconds, case["batch"], gflop, timing.rates, kernel, peak, extra)


def build_state(cfg: CfgNode, device: "torch.device") -> "TrainState":
    """Return the configured training state with random weights."""
    from lib.engine.state import build_train_state
    from lib.precision import compile_blocks

    model = network.build_network(cfg, device)
    model.set_grad_checkpointing(cfg.TRAIN.GRAD_CHECKPOINT)
    if cfg.TRAIN.COMPILE:
        compile_blocks(model.blocks())
    recipe = cfg.TRAIN.clone()
    recipe.STEPS = 1_000_000
    return build_train_state(model, recipe, steps_per_epoch=recipe.STEPS)


def random_batch(cfg: CfgNode, batch_size: int, device: "torch.device") -> "Batch":
    """Return noise, random token ids, and masks with a square in the middle."""
    import torch

    images, input_ids, attention_mask = network.random_inputs(cfg, batch_size, device)
    size = cfg.DATA.IMG_SIZE
    masks = torch.zeros(batch_size, size, size, dtype=torch.int64, device=device)
    masks[:, size // 4 : -size // 4, size // 4 : -size // 4] = 1
    return {"image": images, "input_ids": input_ids, "attention_mask": attention_mask, "mask": masks}


def count_gflop(cfg: CfgNode) -> float:
    """Return the operations of a forward and backward pass of one sample in units of 10⁹."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from lib.criterion import CrossVLTCriterion

    device = torch.device("meta")
    model, batch = network.build_network(cfg, device), random_batch(cfg, 1, device)
    # Plain matrix products: the formula for fused attention includes what its backward pass recomputes.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(batch["image"], batch["input_ids"], batch["attention_mask"])
        CrossVLTCriterion(cfg.TRAIN.ALIGNMENT)(output, batch["mask"])["loss"].backward()
    return counter.get_total_flops() / 1e9


def kept_for_backward(state: "TrainState", batch: "Batch") -> int:
    """Return the bytes that autograd holds after the forward pass, without weights and buffers; each storage once."""
    import torch

    from lib.criterion import CrossVLTCriterion
    from lib.precision import autocast

    saved = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()  # otherwise the tensor and the graph could refer to each other
        saved.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with autocast(state.recipe.AMP, batch["image"].device):
            output = state.model(batch["image"], batch["input_ids"], batch["attention_mask"])
        losses = CrossVLTCriterion(state.recipe.ALIGNMENT)(output, batch["mask"])
        storages = [tensor.untyped_storage() for tensor in (ref() for ref in saved) if tensor is not None]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    del output, losses  # not earlier, because they refer to the counted tensors
    weights = {t.untyped_storage().data_ptr() for t in (*state.model.parameters(), *state.model.buffers())}
    return sum(size for address, size in sizes.items() if address not in weights)


if __name__ == "__main__":
    run_command(main)
