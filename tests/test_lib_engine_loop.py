"""lib.engine.loop: the arithmetic of one optimizer step, its division among processes, precision, compilation."""

import math
import subprocess
import sys

import pytest
import torch
from conftest import PROCESS_ENVIRONMENT, ROOT

from lib.config import DEFAULTS
from lib.criterion import CrossVLTCriterion
from lib.engine import loop
from lib.engine.loop import optimizer_step
from lib.engine.preflight import time_training
from lib.engine.run import NonFiniteError
from lib.engine.state import build_train_state
from lib.errors import UserError
from lib.fusion import LanguageToVisionFusion
from lib.inference import prepare
from lib.precision import compile_blocks


def build_state(model, **recipe):
    """Return a TrainState of ten steps; ``recipe`` changes entries of the TRAIN section."""
    changed = DEFAULTS.TRAIN.clone()
    for name, value in {"LR": 1e-3, "WEIGHT_DECAY": 0.0, "STEPS": 10, **recipe}.items():
        changed[name] = value
    return build_train_state(model, changed, steps_per_epoch=10)


def step(state, *micro_batches):
    """Do one optimizer step without DistributedDataParallel."""
    return optimizer_step(state.model, CrossVLTCriterion(), micro_batches, state)


def as_batch(images, ids, text_mask, masks):
    index = torch.arange(len(ids))
    return {"image": images, "input_ids": ids, "attention_mask": text_mask, "mask": masks, "index": index}


def split(batch, size):
    return [{name: value[i : i + size] for name, value in batch.items()} for i in range(0, len(batch["index"]), size)]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def furthest(first, second):
    """Return the largest distance between two gradients of the same name, relative to the norm of all gradients."""
    assert first.keys() == second.keys()
    total = torch.cat([value.flatten() for value in first.values()]).norm()
    return max(((first[name] - second[name]).norm() / total).item() for name in first)


@pytest.fixture
def plain_model(small_model):
    """Build a small model without dropout, in training mode."""

    def build():
        return small_model(drop_path_rate=0.0, text_dropout=0.0).train()

    return build


def test_a_step_clips_gradients_and_reports(plain_model, small_inputs):
    batch = as_batch(*small_inputs())
    state = build_state(plain_model())
    values = step(state, batch)
    assert values["loss"] == pytest.approx(
        2 * values["segmentation"] + sum(values[f"alignment{i}"] for i in (1, 2, 3, 4)), rel=1e-5
    )
    assert values["lr"] == 1e-3
    assert state.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.9**0.9)
    clipped = build_state(plain_model(), CLIP_GRAD=0.5 * values["grad_norm"])
    assert step(clipped, batch)["grad_norm"] == pytest.approx(values["grad_norm"], rel=1e-5)  # before clipping
    norm = torch.stack([value.norm() for value in gradients(clipped.model).values()]).norm()
    assert norm.item() == pytest.approx(0.5 * values["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_loss_stops_before_the_update(plain_model, small_inputs, bad):
    batch = as_batch(*small_inputs())
    batch["image"] = batch["image"] * bad
    state = build_state(plain_model())
    before = [p.detach().clone() for p in state.model.parameters()]
    with pytest.raises(NonFiniteError, match="the loss is nan") as caught:
        step(state, batch)
    assert caught.value.caused_here
    assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))
    assert state.scheduler.last_epoch == 0


def test_a_non_finite_gradient_stops_as_well(plain_model, small_inputs):
    state = build_state(plain_model())
    weight = next(state.model.classifier.parameters())
    weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(NonFiniteError, match=r"the gradient norm is (inf|nan)") as caught:
        step(state, as_batch(*small_inputs()))
    assert not caught.value.caused_here


def fix_batch_norm(model):
    """Let BatchNorm use running statistics, because batch statistics depend on how the batch is divided."""
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.eval()
    return model


def one_step(model, micro_batches, *, global_norm=False):
    values = step(build_state(fix_batch_norm(model.double()), GLOBAL_NORM=global_norm), *micro_batches)
    return values, gradients(model)


DIVIDED = """
import sys
import torch
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, "tests")
from test_lib_engine_loop import build_state, fix_batch_norm, gradients
from CrossVLT import build_crossvlt
from conftest import SMALL
from lib.criterion import CrossVLTCriterion
from lib.engine.loop import optimizer_step
from lib.cli import run_command
from utils import init_distributed

def main():
    distributed = init_distributed("cpu")
    content, results = torch.load(sys.argv[1], weights_only=True), []
    for batches, global_norm in content["cases"]:
        model = build_crossvlt("tiny", **SMALL, drop_path_rate=0.0, text_dropout=0.0).double().train()
        model.load_state_dict(content["model"])
        state = build_state(fix_batch_norm(model), GLOBAL_NORM=global_norm)
        share = batches[distributed.rank :: 2]
        values = optimizer_step(DistributedDataParallel(model), CrossVLTCriterion(), share, state)
        results.append((values, gradients(model)))
    if distributed.is_main:
        torch.save(results, sys.argv[2])

run_command(main)
"""


def test_gradients_do_not_depend_on_the_division(plain_model, small_inputs, tmp_path):
    batch = as_batch(*small_inputs(4, dtype=torch.float64))
    batch["mask"][0] = 0  # different numbers of object pixels, so that normalizers differ
    pairs, singles = split(batch, 2), split(batch, 1)
    (tmp_path / "divided.py").write_text(DIVIDED)
    # 2 processes × 2 and 2 processes × 1 × 2 accumulated, with one normalizer and with the published ones
    cases = [(batches, global_norm) for global_norm in (True, False) for batches in (pairs, singles)]
    torch.save({"model": plain_model().double().state_dict(), "cases": cases}, tmp_path / "in.pt")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         tmp_path / "divided.py", tmp_path / "in.pt", tmp_path / "out.pt"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, env={**PROCESS_ENVIRONMENT, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = torch.load(tmp_path / "out.pt", weights_only=True)
    for global_norm, two_by_two, two_by_one_by_two in ((True, *results[:2]), (False, *results[2:])):
        together, in_one = one_step(plain_model(), [batch], global_norm=global_norm)
        accumulated, in_two = one_step(plain_model(), pairs, global_norm=global_norm)
        assert furthest(in_two, two_by_two[1]) < 1e-13
        assert two_by_two[0] == pytest.approx(accumulated, rel=1e-12)
        if global_norm:
            assert furthest(in_one, in_two) < 1e-13
            assert furthest(in_one, two_by_one_by_two[1]) < 1e-13
            assert two_by_one_by_two[0] == pytest.approx(together, rel=1e-12)
        else:  # published: one normalizer per forward pass, so a batch of 4 is not the mean of two of 2
            assert 1e-6 < furthest(in_one, in_two) < 1e-2


def test_one_batch_is_the_same_with_either_normalizer(plain_model, small_inputs):
    batch = as_batch(*small_inputs(dtype=torch.float64))
    published, first = one_step(plain_model(), [batch])
    shared, second = one_step(plain_model(), [batch], global_norm=True)
    assert shared == pytest.approx(published, rel=1e-13)
    assert furthest(first, second) < 1e-14


@pytest.mark.parametrize("fusion", ["cross", "vision", "late"])
def test_gradient_checkpointing_changes_no_gradient(small_model, small_inputs, fusion):
    def run(enable):
        model = small_model(fusion=fusion, drop_path_rate=0.3, text_dropout=0.2).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)  # the same dropout, which the recomputation repeats
        values = step(build_state(model), as_batch(*small_inputs()))
        return values, gradients(model)

    (plain_values, plain), (values, checkpointed) = run(False), run(True)
    assert values == pytest.approx(plain_values, rel=1e-6)
    assert furthest(plain, checkpointed) < 1e-6


def test_gradient_checkpointing_stores_less(small_model, small_inputs):
    def stored_bytes(enable):
        model = small_model().train()
        model.set_grad_checkpointing(enable)
        weights, sizes = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def record(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        batch = as_batch(*small_inputs())
        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            output = model(batch["image"], batch["input_ids"], batch["attention_mask"])
        assert output.mask_logits.requires_grad
        return sum(sizes.values())

    assert stored_bytes(True) < 0.65 * stored_bytes(False)


def test_bf16_is_close_and_float32_is_exact(plain_model, small_inputs):
    batch = as_batch(*small_inputs())
    off, bf16 = build_state(plain_model()), build_state(plain_model(), AMP="bf16")
    values, rounded = step(off, batch), step(bf16, batch)
    assert rounded["loss"] == pytest.approx(values["loss"], rel=2e-2)
    assert rounded["loss"] != values["loss"]
    exact, approximate = (torch.cat([g.flatten() for g in gradients(state.model).values()]) for state in (off, bf16))
    assert torch.nn.functional.cosine_similarity(exact, approximate, dim=0) > 0.9
    assert all(p.dtype == torch.float32 for p in bf16.model.parameters())
    plain = plain_model()
    CrossVLTCriterion()(plain(batch["image"], batch["input_ids"], batch["attention_mask"]), batch["mask"])[
        "loss"
    ].backward()
    expected = gradients(plain)
    assert all(torch.equal(value, expected[name]) for name, value in gradients(off.model).items())


def test_bf16_keeps_a_nearly_constant_map():
    """InstanceNorm must not amplify rounding errors where all positions attend to the words almost alike."""
    torch.manual_seed(0)
    fusion = LanguageToVisionFusion(32, 64, 16)
    with torch.no_grad():
        fusion.l_q.weight.mul_(1e-2)  # so that every position attends to all words almost alike
    v, text, mask = torch.randn(2, 50, 32), torch.randn(2, 6, 16), torch.ones(2, 6)
    exact = fusion(v, text, mask)
    with torch.autocast("cpu", torch.bfloat16):
        approximate = fusion(v, text, mask)
    assert approximate.dtype == torch.bfloat16
    assert (approximate - exact).norm() < 0.03 * exact.norm()


def test_fp16_scales_the_loss_and_skips_overflows(plain_model, small_inputs, monkeypatch):
    batch = as_batch(*small_inputs())
    state = build_state(plain_model(), AMP="fp16", CLIP_GRAD=1.0)
    exact = step(build_state(plain_model()), batch)
    values = step(state, batch)
    assert values["loss"] == pytest.approx(exact["loss"], rel=2e-2)
    assert values["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.1)  # of the unscaled gradient
    norm = torch.stack([value.norm() for value in gradients(state.model).values()]).norm()
    assert norm.item() == pytest.approx(1.0, rel=1e-3)
    scale, before = state.scaler.get_scale(), [p.detach().clone() for p in state.model.parameters()]
    statistics = [buffer.clone() for buffer in state.model.buffers()]
    overflowing = {**batch, "image": batch["image"] * math.inf}
    assert step(state, overflowing) == {"skipped": 1.0}
    assert state.scaler.get_scale() == scale / 2
    assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(statistics, state.model.buffers(), strict=True))
    assert state.scheduler.last_epoch == 2  # a skipped step counts
    assert "loss" in step(state, batch)
    monkeypatch.setattr(loop, "MAX_CONSECUTIVE_SKIPS", 2)
    step(state, overflowing)
    with pytest.raises(UserError, match="fp16 overflowed in 2 steps in a row"):
        step(state, overflowing)


def test_the_moving_average_is_updated_after_a_step(plain_model, small_inputs):
    state = build_state(plain_model(), EMA=0.75)
    start = {name: value.clone() for name, value in state.model.state_dict().items()}
    step(state, as_batch(*small_inputs()))
    averaged, moved = state.ema.module.state_dict(), []
    for name, value in state.model.state_dict().items():
        expected = 0.75 * start[name] + 0.25 * value if value.is_floating_point() else value
        torch.testing.assert_close(averaged[name], expected)
        moved += [name] if not torch.equal(start[name], value) else []
    assert len(moved) > 50
    assert {"classifier.bn1_4.running_mean", "classifier.bn1_4.num_batches_tracked"} <= {*moved}
    assert state.eval_model is state.ema.module


@pytest.mark.parametrize("trained", [False, True])
def test_temperatures_are_trained_on_request(plain_model, small_inputs, trained):
    state = build_state(plain_model(), TRAIN_TEMPERATURE=trained)
    step(state, as_batch(*small_inputs()))
    assert torch.equal(state.model.temp.detach(), torch.ones(4)) is not trained


def test_compiled_blocks_give_the_same_numbers(plain_model, small_inputs, monkeypatch):
    batch = as_batch(*small_inputs())
    model = plain_model()
    names = list(model.state_dict())
    compiled = []
    original = torch.nn.Module.compile

    def trace_only(self, **kwargs):  # generating code would need a C++ compiler and minutes
        compiled.append(self)
        original(self, backend="aot_eager", **kwargs)

    monkeypatch.setattr(torch.nn.Module, "compile", trace_only)
    compile_blocks(model.blocks())
    assert len(compiled) == sum((1, 2, 1, 1)) + 1 + 3  # Swin blocks, BERT layers of stage 1 and of stages 2–4
    assert list(model.state_dict()) == names
    reference = build_state(plain_model())
    assert step(build_state(model), batch) == pytest.approx(step(reference, batch), rel=1e-4)
    assert furthest(gradients(reference.model), gradients(model)) < 1e-4
    with torch.compiler.set_stance("fail_on_recompile"):  # validation runs no compiled block
        prepare(model.eval())(batch["image"], batch["input_ids"], batch["attention_mask"])


def test_timing_a_step_changes_nothing(small_model, small_inputs):
    model, batch = small_model().train(False), as_batch(*small_inputs())
    before, random_state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert time_training(model, CrossVLTCriterion(), batch, "off") > 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
