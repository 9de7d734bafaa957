"""What a model costs: parameters, floating-point operations and time, measured once per checkpoint."""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lib.checkpoint import Checkpoint, read_checkpoint, rebuild
from lib.compare.plan import Run
from lib.files import file_sha256, write_text
from lib.inference import prepare
from lib.variants import IMG_SIZE, MAX_TOKENS
from utils import init_distributed

FILE = "costs.json"  # in the folder of the comparison
REPEATS = 7


@dataclass(frozen=True)
class Cost:
    """Cost of segmenting one expression of one image. The sentence fills the token limit."""

    parameters: int
    gflop: float  # 10⁹ operations; a multiply-add counts as two
    ms: float  # median; of the model that is prepared for inference, in the precision of its training
    device: str


def costs_of(runs: Sequence[Run], folder: Path) -> dict[str, Cost]:
    """Return the cost of each model by its name. Measurements are kept in ``FILE`` and not repeated.

    Args:
        runs: the runs of all models; the checkpoint of a model's first run is measured.
        folder: of the comparison.
    """
    path = folder / FILE
    stored, costs = _read(path), {}
    for run in runs:
        if run.model.name not in costs and run.checkpoint.is_file():
            digest = file_sha256(run.checkpoint)
            if digest not in stored:
                stored[digest] = asdict(measure(read_checkpoint(run.checkpoint)))
                write_text(path, json.dumps(stored, indent=1) + "\n")
            costs[run.model.name] = Cost(**stored[digest])
    return costs


def _read(path: Path) -> dict[str, Any]:
    """Return the stored costs by the SHA-256 of the checkpoint; {} if there are none."""
    fields = set(Cost.__dataclass_fields__)
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {digest: cost for digest, cost in stored.items() if set(cost) == fields}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def measure(checkpoint: Checkpoint) -> Cost:
    """Measure a checkpoint on the device of its training."""
    config = checkpoint.extra.get("config", {})
    device = init_distributed(config.get("DEVICE", "auto")).device
    model = rebuild(checkpoint).eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size, tokens = config.get("DATA.IMG_SIZE", IMG_SIZE), config.get("DATA.MAX_TOKENS", MAX_TOKENS)
    shape = (size, tokens, checkpoint.model_config["vocab_size"])
    prepared = prepare(model.to(device), amp=config.get("TRAIN.AMP", "off"))
    ms = _milliseconds(prepared, _inputs(*shape, device), device)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return Cost(parameters, _gflop(model.to("meta"), _inputs(*shape, "meta")), ms, f"{device}{threads}")


def _inputs(size: int, tokens: int, vocab_size: int, device: torch.device | str) -> tuple[torch.Tensor, ...]:
    """Return a random image [1, 3, size, size], and token ids and attention mask [1, tokens]."""
    ids = torch.randint(vocab_size, (1, tokens), device=device)
    return torch.randn(1, 3, size, size, device=device), ids, torch.ones_like(ids)


def _gflop(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> float:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops() / 1e9


def _milliseconds(model: nn.Module, inputs: tuple[torch.Tensor, ...], device: torch.device) -> float:
    """Return the median time of a call, without the first one."""
    seconds = []
    with torch.inference_mode():
        for _ in range(1 + REPEATS):
            started = time.perf_counter()
            model(*inputs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds[1:])
