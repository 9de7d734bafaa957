"""Parameter groups, frozen parameters and the learning rate schedule."""

import itertools
import json

import pytest
import torch
from conftest import ROOT

from CrossVLT import build_crossvlt
from lib.criterion import CrossVLTCriterion
from lib.optim import build_lr_scheduler, build_optimizer, freeze, group_parameter_names, names_without_gradient

EMBEDDINGS = {
    f"lang_stage1.embeddings.{name}"
    for name in (
        "word_embeddings.weight",
        "position_embeddings.weight",
        "token_type_embeddings.weight",
        "LayerNorm.weight",
        "LayerNorm.bias",
    )
}


def test_groups_of_base_equal_the_published_ones():
    released = json.loads((ROOT / "tests" / "data" / "state_dict_base.json").read_text())
    buffers = ("running_mean", "running_var", "num_batches_tracked", "relative_position_index")
    names = [key for key in released if not key.endswith(buffers)]
    assert len(names) == 651
    groups = group_parameter_names(names)
    assert [len(group) for group in groups] == [509, 136, 6]
    assert set(groups.not_optimized) == {"temp"} | EMBEDDINGS
    assert all(name.startswith("backbone.") for name in groups.no_decay)
    for name, decays in (
        ("backbone.2.layers.blocks.17.attn.relative_position_bias_table", False),
        ("backbone.0.patch_embed.norm.bias", False),
        ("backbone.1.norm1.weight", False),
        ("backbone.1.layers.downsample.norm.weight", False),
        ("backbone.1.layers.blocks.0.attn.qkv.bias", True),
        ("backbone.3.layers.linear1.0.weight", True),
        ("classifier.bn1_4.weight", True),
        ("lang_stage2.output.LayerNorm.weight", True),
    ):
        assert (name in groups.decay, name in groups.no_decay) == (decays, not decays), name


def test_optimizer_has_one_param_group_per_decay(small_model):
    model = small_model()
    optimizer = build_optimizer(model, lr=3e-5, weight_decay=1e-2, amsgrad=True)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = group_parameter_names(list(name_of.values()))
    assert isinstance(optimizer, torch.optim.AdamW)
    names = {group["weight_decay"]: {name_of[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    assert names == {1e-2: set(groups.decay), 0.0: set(groups.no_decay)}
    assert all(group["lr"] == 3e-5 and group["amsgrad"] for group in optimizer.param_groups)
    assert all(group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8 for group in optimizer.param_groups)


@pytest.mark.parametrize(("fusion", "alignment"), list(itertools.product(("cross", "vision", "late"), (True, False))))
def test_names_without_gradient_are_exact(small_model, small_inputs, fusion, alignment):
    images, ids, text_mask, masks = small_inputs()
    model = small_model(fusion=fusion).train()
    CrossVLTCriterion(alignment)(model(images, ids, text_mask), masks)["loss"].backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    named = set(names_without_gradient(model, alignment=alignment))
    not_optimized = EMBEDDINGS | ({"temp"} if alignment else set())  # they have a gradient, but no optimizer
    assert named - without == not_optimized
    assert without - named == set()

    model = small_model(fusion=fusion).train()
    freeze(model, list(named))
    CrossVLTCriterion(alignment)(model(images, ids, text_mask), masks)["loss"].backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == named


def scheduled(total, warmup=0, steps=None):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-5)
    scheduler = build_lr_scheduler(optimizer, total, warmup)
    rates = []
    for _ in range(steps or total + 2):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_schedule_is_a_polynomial_decay():
    assert scheduled(10) == pytest.approx([3e-5 * (1 - min(s, 10) / 10) ** 0.9 for s in range(12)], rel=1e-12)


def test_warm_up_increases_linearly_to_the_curve():
    plain, warm = scheduled(10), scheduled(10, warmup=3)
    assert [w / p for w, p in zip(warm[:10], plain[:10], strict=True)] == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 7)


def test_impossible_schedules_are_rejected():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    for total, warmup in ((0, 0), (5, 6), (5, -1)):
        with pytest.raises(ValueError, match="warmup_steps"):
            build_lr_scheduler(optimizer, total, warmup)


def test_every_parameter_of_tiny_is_in_one_group():
    names = [name for name, _ in build_crossvlt("tiny").named_parameters()]
    assert sum(map(len, group_parameter_names(names))) == len(names)
