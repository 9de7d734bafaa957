"""One optimizer step: what it does, on whatever processes and micro-batches, and in which precision."""

import math
import subprocess
import sys

import pytest
import torch
from conftest import PROCESS_ENVIRONMENT, ROOT
from timm.utils import ModelEmaV3

from lib.criterion import CrossVLTCriterion
from lib.engine import step as step_module
from lib.engine.precision import Precision, compile_blocks
from lib.engine.preflight import time_training
from lib.engine.step import NonFiniteError, TrainingStep
from lib.errors import UserError
from lib.fusion import LanguageToVisionFusion
from lib.optim import build_lr_scheduler, build_optimizer, freeze, names_without_gradient

CPU = torch.device("cpu")


def build_step(model, *, amp="off", lr=1e-3, train_temperature=False, **how):
    freeze(model, names_without_gradient(model, alignment=True, train_temperature=train_temperature))
    optimizer = build_optimizer(model, lr=lr, weight_decay=0.0, train_temperature=train_temperature)
    scheduler = build_lr_scheduler(optimizer, 10)
    return TrainingStep(model, CrossVLTCriterion(), optimizer, scheduler, Precision(amp, CPU), **how)


def as_batch(images, ids, text_mask, masks):
    index = torch.arange(len(ids))
    return {"image": images, "input_ids": ids, "attention_mask": text_mask, "mask": masks, "index": index}


def split(batch, size):
    return [{name: value[i : i + size] for name, value in batch.items()} for i in range(0, len(batch["index"]), size)]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def furthest(first, second):
    """The largest relative distance of two sets of gradients, each against its own norm."""
    assert first.keys() == second.keys()
    total = torch.cat([value.flatten() for value in first.values()]).norm()
    return max(((first[name] - second[name]).norm() / total).item() for name in first)


@pytest.fixture
def plain_model(small_model):
    def build(**how):
        return small_model(drop_path_rate=0.0, text_dropout=0.0, **how).train()

    return build


def test_a_step_clips_and_reports(plain_model, small_inputs):
    batch = as_batch(*small_inputs())
    step = build_step(plain_model())
    values = step([batch])
    assert values["loss"] == pytest.approx(
        2 * values["segmentation"] + sum(values[f"alignment{i}"] for i in (1, 2, 3, 4)), rel=1e-5
    )
    assert values["lr"] == 1e-3
    assert step.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.9**0.9)
    clipped = build_step(plain_model(), clip_grad=0.5 * values["grad_norm"])
    again = clipped([batch])
    assert again["grad_norm"] == pytest.approx(values["grad_norm"], rel=1e-5)  # told before clipping
    norm = torch.stack([value.norm() for value in gradients(clipped.model).values()]).norm()
    assert norm.item() == pytest.approx(0.5 * values["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_update(plain_model, small_inputs, bad):
    batch = as_batch(*small_inputs())
    batch["image"] = batch["image"] * bad
    step = build_step(plain_model())
    before = [p.detach().clone() for p in step.model.parameters()]
    with pytest.raises(NonFiniteError, match="the loss is nan") as caught:
        step([batch])
    assert caught.value.own
    assert all(torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))
    assert step.scheduler.last_epoch == 0


def test_a_gradient_that_is_not_finite_stops_too(plain_model, small_inputs):
    step = build_step(plain_model())
    weight = step.model.classifier.get_parameter(next(name for name, _ in step.model.classifier.named_parameters()))
    weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(NonFiniteError, match=r"the gradient's norm is (inf|nan)") as caught:
        step([as_batch(*small_inputs())])
    assert not caught.value.own


def no_batch_norm(model):
    """BatchNorm by its running statistics: those of a batch depend on how it is divided."""
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.eval()
    return model


def one_step(model, batches, **how):
    values = build_step(no_batch_norm(model.double()), **how)(batches)
    return values, gradients(model)


DIVIDED = """
import sys
import torch
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, "tests")
from test_lib_engine_step import build_step, gradients, no_batch_norm
from CrossVLT import build_crossvlt
from conftest import SMALL
from lib.cli import run_command
from utils import init_distributed

def main():
    processes = init_distributed("cpu")
    content, results = torch.load(sys.argv[1], weights_only=True), []
    for batches, global_norm in content["cases"]:
        model = build_crossvlt("tiny", **SMALL, drop_path_rate=0.0, text_dropout=0.0).double().train()
        model.load_state_dict(content["model"])
        step = build_step(no_batch_norm(model), global_norm=global_norm)
        step.model = DistributedDataParallel(model)
        values = step(batches[processes.rank :: 2])
        results.append((values, gradients(model)))
    if processes.is_main:
        torch.save(results, sys.argv[2])

run_command(main)
"""


def test_gradients_do_not_depend_on_the_division(plain_model, small_inputs, tmp_path):
    batch = as_batch(*small_inputs(4, dtype=torch.float64))
    batch["mask"][0] = 0  # shares with different numbers of object pixels: their normalisers differ
    pairs, singles = split(batch, 2), split(batch, 1)
    (tmp_path / "divided.py").write_text(DIVIDED)
    # 2 processes × 2 and 2 processes × 1 × 2 accumulated, with one normaliser and with the published ones
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
        else:  # published: each forward pass has its own normaliser, so a batch of 4 isn't the mean of two of 2
            assert 1e-6 < furthest(in_one, in_two) < 1e-2


def test_one_batch_is_the_same_with_either_normaliser(plain_model, small_inputs):
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
        torch.manual_seed(3)  # the same drawing of dropout, which is repeated in the second computation
        values = build_step(model)([as_batch(*small_inputs())])
        return values, gradients(model)

    (plain_values, plain), (values, checkpointed) = run(False), run(True)
    assert values == pytest.approx(plain_values, rel=1e-6)
    assert furthest(plain, checkpointed) < 1e-6


def test_gradient_checkpointing_keeps_less(small_model, small_inputs):
    def kept(enable):
        model = small_model().train()
        model.set_grad_checkpointing(enable)
        weights, sizes = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def note(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        batch = as_batch(*small_inputs())
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = model(batch["image"], batch["input_ids"], batch["attention_mask"])
        assert output.mask_logits.requires_grad
        return sum(sizes.values())

    assert kept(True) < 0.65 * kept(False)


def test_bf16_is_near_and_float32_is_untouched(plain_model, small_inputs):
    batch = as_batch(*small_inputs())
    off, bf16 = build_step(plain_model()), build_step(plain_model(), amp="bf16")
    values, rounded = off([batch]), bf16([batch])
    assert rounded["loss"] == pytest.approx(values["loss"], rel=2e-2)
    assert rounded["loss"] != values["loss"]
    exact, near = (torch.cat([g.flatten() for g in gradients(s.model).values()]) for s in (off, bf16))
    assert torch.nn.functional.cosine_similarity(exact, near, dim=0) > 0.9
    assert all(p.dtype == torch.float32 for p in bf16.model.parameters())
    plain = plain_model()
    CrossVLTCriterion()(plain(batch["image"], batch["input_ids"], batch["attention_mask"]), batch["mask"])[
        "loss"
    ].backward()
    wanted = gradients(plain)
    assert all(torch.equal(value, wanted[name]) for name, value in gradients(off.model).items())


def test_a_nearly_constant_map_survives_bf16():
    """InstanceNorm must not make a signal of what rounding leaves where the words hardly differ."""
    torch.manual_seed(0)
    fusion = LanguageToVisionFusion(32, 64, 16)
    with torch.no_grad():
        fusion.l_q.weight.mul_(1e-2)  # so that every position attends to all words almost alike
    v, text, mask = torch.randn(2, 50, 32), torch.randn(2, 6, 16), torch.ones(2, 6)
    exact = fusion(v, text, mask)
    with torch.autocast("cpu", torch.bfloat16):
        near = fusion(v, text, mask)
    assert near.dtype == torch.bfloat16
    assert (near - exact).norm() < 0.03 * exact.norm()


def test_fp16_scales_skips_and_counts(plain_model, small_inputs, monkeypatch):
    batch = as_batch(*small_inputs())
    step = build_step(plain_model(), amp="fp16", clip_grad=1.0)
    plain = build_step(plain_model())([batch])
    values = step([batch])
    assert values["loss"] == pytest.approx(plain["loss"], rel=2e-2)
    assert values["grad_norm"] == pytest.approx(plain["grad_norm"], rel=0.1)  # of the unscaled gradient
    norm = torch.stack([value.norm() for value in gradients(step.model).values()]).norm()
    assert norm.item() == pytest.approx(1.0, rel=1e-3)
    scale, before = step.precision.scaler.get_scale(), [p.detach().clone() for p in step.model.parameters()]
    statistics = [buffer.clone() for buffer in step.model.buffers()]
    broken = {**batch, "image": batch["image"] * math.inf}
    assert step([broken]) == {"skipped": 1.0}
    assert step.precision.scaler.get_scale() == scale / 2
    assert all(torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))
    # Nor does anything of it stay in BatchNorm's running statistics.
    assert all(torch.equal(a, b) for a, b in zip(statistics, step.model.buffers(), strict=True))
    assert step.scheduler.last_epoch == 2  # it counts as a step
    assert "loss" in step([batch])
    monkeypatch.setattr(step_module, "MOST_SKIPPED", 2)
    step([broken])
    with pytest.raises(UserError, match="fp16 overflowed in 2 steps in a row"):
        step([broken])


def test_moving_average_follows(plain_model, small_inputs):
    model = plain_model()
    ema = ModelEmaV3(model, 0.75)
    step = build_step(model, ema=ema)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    step([as_batch(*small_inputs())])
    averaged, moved = dict(ema.module.named_parameters()), 0
    for name, p in model.named_parameters():
        torch.testing.assert_close(averaged[name], 0.75 * start[name] + 0.25 * p.detach())
        moved += not torch.equal(start[name], p)
    assert moved > 50


def test_temperature_moves_only_where_it_is_trained(plain_model, small_inputs):
    for trained in (False, True):
        step = build_step(plain_model(), train_temperature=trained)
        step([as_batch(*small_inputs())])
        assert torch.equal(step.model.temp.detach(), torch.ones(4)) is not trained


def test_compiled_blocks_give_the_same_numbers(plain_model, small_inputs, monkeypatch):
    batch = as_batch(*small_inputs())
    model = plain_model()
    names = list(model.state_dict())
    compiled = []
    real = torch.nn.Module.compile
    # Tracing is what can go wrong here; generating code would need a compiler and minutes.
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: (compiled.append(self), real(self, backend="aot_eager", **how))
    )
    compile_blocks(model.blocks())
    assert len(compiled) == sum((1, 2, 1, 1)) + 1 + 3  # Swin blocks, BERT layers of stage 1 and of stages 2–4
    assert list(model.state_dict()) == names
    step, plain = build_step(model), build_step(plain_model())
    assert step([batch]) == pytest.approx(plain([batch]), rel=1e-4)
    assert furthest(gradients(plain.model), gradients(model)) < 1e-4
    with torch.compiler.set_stance("force_eager"), torch.inference_mode():
        model.eval()(batch["image"], batch["input_ids"], batch["attention_mask"])


def test_timing_a_step_leaves_no_trace(small_model, small_inputs):
    model, batch = small_model().train(False), as_batch(*small_inputs())
    before, drawn = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    seconds = time_training(model, CrossVLTCriterion(), Precision("off", CPU), batch)
    assert seconds > 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(drawn, torch.get_rng_state())
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
