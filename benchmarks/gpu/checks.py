"""Checks of the project on a GPU. Each is a function that returns a sentence with the measured difference, or fails.

On a CPU (dry run), they check only themselves: the device is compared with itself.
"""

import copy
import importlib
import io
import itertools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.generated_split import Size, open_set, write_set
from CrossVLT import CrossVLT, build_crossvlt
from data.loaders import Batch
from lib.config import DEFAULTS
from lib.criterion import CrossVLTCriterion
from lib.engine.loop import compute_losses, optimizer_step
from lib.engine.preflight import time_training
from lib.engine.state import TrainState, build_train_state, random_states, restore_random_states
from lib.errors import CommonError, UserError
from lib.evaluation import EvalSetup, evaluate
from lib.optim import build_optimizer
from lib.protocols import PROTOCOLS
from lib.rivals.lavt import build_lavt
from utils import Distributed

TESTS = Path(__file__).resolve().parents[2] / "tests"
NOT_ON_CPU = "needs a GPU"
MAX_PIXELS = 2
SMALL_MODEL = {
    "embed_dim": 32, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 4, 8), "window_size": 4, "text_dim": 32,
    "text_layers": 1, "text_heads": 2, "vocab_size": 60, "align_dim": 16,
}  # fmt: skip


def golden_cases() -> ModuleType:
    """Import the generator of the golden weights and inputs from the tests."""
    sys.path.insert(0, str(TESTS))
    return importlib.import_module("golden_cases")


def check_golden_numbers(device: torch.device) -> str:
    """The logits of the published CrossVLT and LAVT, in float32 without TF32."""
    golden, found = golden_cases(), []
    cases = (("", build_crossvlt, 21), ("lavt_", build_lavt, 20))
    for (prefix, build, tokens), (swin_type, size, batch) in itertools.product(
        cases, (("tiny", 224, 3), ("base", 480, 2))
    ):
        if swin_type == "base" and device.type == "cpu":
            continue
        name = f"eval_{prefix}{swin_type}_{size}"
        recorded = np.load(TESTS / "data" / "golden" / f"{name}.npz")
        inputs = golden.golden_inputs(name, batch, size, size, tokens)
        model = golden.set_golden_weights(build(swin_type)).to(device).eval()
        with torch.inference_mode():
            logits = model(*(x.to(device) for x in inputs[:3])).mask_logits.cpu().numpy()
        error = np.abs(logits[:, :, ::8, ::8] - recorded["logits"]).max()
        assert error <= 2e-4, f"{name}: the logits differ by {error:.1e}"
        shift = recorded.get("shift", 0)
        differing = (np.unpackbits(recorded["mask"]) != (logits[:, 1] + shift > logits[:, 0]).ravel()).mean()
        assert differing <= 1e-4, f"{name}: {differing:.1e} of the pixels differ"
        found.append(f"{prefix}{swin_type} {error:.1e}")
    return f"largest difference of a logit: {', '.join(found)} (at most 2e-4)"


def check_golden_training(device: torch.device) -> str:
    """The losses and gradient norms of three training steps of the published network, in float64."""
    golden = golden_cases()
    steps = json.loads((TESTS / "data" / "golden" / "train_tiny_224.json").read_text(encoding="utf-8"))["steps"]
    model = without_dropout(golden.set_golden_weights(build_crossvlt("tiny")).double().to(device))
    state, worst = train_state(model, LR=3e-5, WEIGHT_DECAY=1e-2), 0.0
    for number, expected in enumerate(steps):
        inputs = golden.golden_inputs(f"train_tiny_224:step{number}", 2, 224, 224)
        batch = dict(zip(("image", "input_ids", "attention_mask", "mask"), (x.to(device) for x in inputs), strict=True))
        batch["image"] = batch["image"].double()
        values = optimizer_step(model, CrossVLTCriterion(), [batch], state)
        for name, recorded in (("loss", "loss"), ("grad_norm", "grad_norm_optimized")):
            worst = max(worst, abs(values[name] / expected[recorded] - 1))
    assert worst <= 1e-6, f"a loss or gradient norm differs by {worst:.1e}"
    return f"largest relative difference of a loss or gradient norm: {worst:.1e} (at most 1e-6)"


def check_one_process(device: torch.device) -> str:
    """The gradients under DistributedDataParallel, and with SyncBatchNorm, in one NCCL process."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=dist.HashStore(), rank=0, world_size=1, device_id=device if backend == "nccl" else None
    )
    try:
        batch, expected = random_batch(device), small_model(device)
        wrapped = DistributedDataParallel(
            prepared_copy(expected), device_ids=[device.index] if device.type == "cuda" else None
        )
        models = {"DistributedDataParallel": (wrapped, wrapped.module)}
        if device.type == "cuda":
            synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(prepared_copy(expected))
            models["SyncBatchNorm"] = (synchronized, synchronized)
        reference, found = gradients(expected, expected, batch), []
        for name, (called, model) in models.items():
            error = furthest(reference, gradients(called, model, batch))
            assert error <= 1e-4, f"{name}: a gradient differs by {error:.1e} of the total norm"
            found.append(f"{name} {error:.1e}")
    finally:
        dist.destroy_process_group()
    return f"{backend}: largest difference of a gradient, relative to the total norm: {', '.join(found)} (at most 1e-4)"


def check_fused_adamw(device: torch.device) -> str:
    """Five steps of the fused optimizer and of the plain one with the same gradients."""
    first, second = small_model(device), small_model(device)
    fused, plain = (build_optimizer(model, lr=1e-3, weight_decay=1e-2) for model in (first, second))
    for group in plain.param_groups:
        group["fused"], group["foreach"] = False, False
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for p, q in zip(first.parameters(), second.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(device)
            q.grad = p.grad.clone()
        fused.step()
        plain.step()
    error = largest_difference(first, second)
    assert error <= 1e-6, f"a weight differs by {error:.1e}"
    return f"fused: {fused.param_groups[0]['fused']}; largest difference of a weight {error:.1e} (at most 1e-6)"


def check_resume(device: torch.device) -> str:
    """A resumed training is as close to an uninterrupted one as a repetition of it, which is 0 if kernels repeat."""

    def train(state: TrainState, numbers: range) -> TrainState:
        for number in numbers:
            optimizer_step(state.model, CrossVLTCriterion(), [random_batch(device, seed=number)], state)
        return state

    def start() -> TrainState:
        torch.manual_seed(0)
        return train_state(small_model(device))

    torch.use_deterministic_algorithms(True, warn_only=True)
    uninterrupted, repeated = (train(start(), range(4)).model for _ in range(2))
    saved, half = io.BytesIO(), train(start(), range(2))
    torch.save({"state": half.state_dict(), "random": random_states()}, saved)
    torch.manual_seed(5)
    resumed = train_state(small_model(device))
    saved.seek(0)
    content = torch.load(saved, map_location="cpu", weights_only=True)
    resumed.model.load_state_dict(content["state"]["model"])
    for name in ("optimizer", "scheduler", "scaler"):
        getattr(resumed, name).load_state_dict(content["state"][name])
    restore_random_states(content["random"])
    train(resumed, range(2, 4))
    repetition, error = (largest_difference(uninterrupted, model) for model in (repeated, resumed.model))
    assert error <= 4 * repetition, f"a weight differs by {error:.1e}, after a repetition by {repetition:.1e}"
    return "bit-exact" if error == 0 else f"a weight differs by {error:.1e}, after a repetition by {repetition:.1e}"


def check_out_of_memory(device: torch.device) -> str:
    """The error messages of a training step and of an evaluation that do not fit into the GPU's memory."""
    if device.type == "cpu":
        return NOT_ON_CPU
    model, criterion, batch = small_model(device), CrossVLTCriterion(), random_batch(device, batch=64, size=1024)
    torch.cuda.set_per_process_memory_fraction(0.02, device)
    message = message_of_error(UserError, lambda: time_training(model, criterion, batch, "off"))
    assert "The GPU's memory is too small for a batch of 64" in message, message
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        write_set(Path(folder), Size(1, 2, 256))
        dataset, setup = open_set(Path(folder), 1024), EvalSetup(Distributed(0, 0, 1, device), 256)
        message = message_of_error(CommonError, lambda: evaluate(model, dataset, [PROTOCOLS["paper"]], setup))
    assert "256 expressions do not fit into the GPU's memory" in message, message
    return "both messages name the batch size"


def check_evaluation(device: torch.device) -> str:
    """Intersections and unions of a generated split under all protocols, compared with those of the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        write_set(Path(folder), Size(8, 20, 57))
        dataset, protocols = open_set(Path(folder), 64), list(PROTOCOLS.values())
        counts = []
        for place in (torch.device("cpu"), device):
            setup = EvalSetup(Distributed(0, 0, 1, place), batch_size=8)
            results = evaluate(small_model(place), dataset, protocols, setup)
            counts.append(np.stack([result.counts for result in results.values()]))
    error = int(np.abs(counts[0] - counts[1]).max())
    assert error <= MAX_PIXELS, f"a count differs by {error} pixels"
    return f"{len(dataset)} expressions, {len(protocols)} protocols: a count differs by at most {error} pixels"


CHECKS: dict[str, Callable[[torch.device], str]] = {
    "golden numbers": check_golden_numbers,
    "golden training steps": check_golden_training,
    "one NCCL process, SyncBatchNorm": check_one_process,
    "fused AdamW": check_fused_adamw,
    "resume": check_resume,
    "out of memory": check_out_of_memory,
    "evaluation as on the CPU": check_evaluation,
}


def message_of_error(kind: type[Exception], function: Callable[[], object]) -> str:
    """Call a function that must raise an error, and return the message; empty if it raises none."""
    try:
        function()
    except kind as error:
        return str(error)
    return ""


def small_model(device: torch.device) -> CrossVLT:
    """Return a small model with the same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_crossvlt("tiny", **SMALL_MODEL).to(device)


def without_dropout(model: nn.Module) -> nn.Module:
    """Disable dropout and drop path, in training mode."""
    for part in model.train().modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif hasattr(part, "drop_prob"):
            part.drop_prob = 0.0
    return model


def prepared_copy(model: CrossVLT) -> CrossVLT:
    """Return a copy whose parameters without influence on the loss are frozen, as in training."""
    return train_state(copy.deepcopy(model)).model


def train_state(model: CrossVLT, **changes: float) -> TrainState:
    """Return the state of a training of ten steps."""
    recipe = DEFAULTS.TRAIN.clone()
    recipe.STEPS = 10
    for name, value in changes.items():
        recipe[name] = value
    return build_train_state(model.train(), recipe, steps_per_epoch=10)


def random_batch(device: torch.device, *, batch: int = 2, size: int = 64, seed: int = 0) -> Batch:
    """Return noise, random token ids and random masks."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, SMALL_MODEL["vocab_size"], (batch, 7), generator=generator).to(device)
    masks = (torch.rand(batch, size, size, generator=generator) < 0.3).long().to(device)
    images = torch.randn(batch, 3, size, size, generator=generator).to(device)
    return {"image": images, "input_ids": ids, "attention_mask": torch.ones_like(ids), "mask": masks}


def gradients(called: nn.Module, model: CrossVLT, batch: Batch) -> dict[str, torch.Tensor]:
    """Return the gradients of a training step without dropout. ``called`` is the model, possibly wrapped."""
    without_dropout(model)
    compute_losses(called, CrossVLTCriterion(), batch, "off")["loss"].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def furthest(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Return the largest distance of a gradient in ``second`` from that in ``first``, relative to the total norm."""
    total = torch.stack([gradient.norm() for gradient in first.values()]).norm()
    return max(float((first[name] - gradient).norm() / total) for name, gradient in second.items())


def largest_difference(first: nn.Module, second: nn.Module) -> float:
    """Return the largest difference of a value in two models' state dicts."""
    other = second.state_dict()
    return max(float((value - other[name]).abs().max()) for name, value in first.state_dict().items())
