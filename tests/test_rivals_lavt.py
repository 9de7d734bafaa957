"""lib.rivals.lavt: recorded numbers of the published network, state dict, sizes, gradients."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL
from fake_gpu import GPU, fake_gpu, move_to_gpu
from golden_cases import check_golden_updates, golden_inputs, golden_value, set_golden_weights, without_dropout
from torch import nn

from lib.config import DEFAULTS
from lib.criterion import CrossVLTCriterion
from lib.engine.loop import optimizer_step
from lib.engine.state import TrainState
from lib.fusion import PositionwiseConv, padding_bias
from lib.inference import prepare
from lib.models import NETWORKS
from lib.optim import build_lr_scheduler, build_optimizer, group_parameter_names, names_without_gradient
from lib.precision import autocast, build_scaler
from lib.rivals.lavt import build_lavt
from lib.rivals.lavt_layers import PixelWordAttention
from lib.vision_encoder import SwinBlock

DATA = ROOT / "tests" / "data"
SMALL_LAVT = {name: size for name, size in SMALL.items() if name != "align_dim"}


@pytest.fixture
def small_lavt():
    """Return a function that builds a small LAVT: ``small_lavt(mha=…)``."""

    def build(**changes):
        torch.manual_seed(0)
        return build_lavt("tiny", **{**SMALL_LAVT, **changes})

    return build


@pytest.fixture
def model(small_lavt):
    """A small LAVT in which every branch matters, with two heads in the fusion of the last stage."""
    return set_golden_weights(small_lavt(mha="1-1-1-2")).eval()


def test_golden_inputs_and_weights_have_the_recorded_checksums():
    for key, shape, first, total in (
        ("backbone.patch_embed.proj.weight", (128, 3, 4, 4), 0.2943161, 0.835972),
        ("text_encoder.encoder.layer.0.output.dense.weight", (768, 3072), 0.0037981, -0.152202),
        ("text_encoder.encoder.layer.0.attention.self.query.weight", (768, 768), 0.0216294, 6.820214),
    ):
        value = golden_value(key, torch.empty(shape))
        assert value.flatten()[0].item() == pytest.approx(first, abs=1e-7)
        assert value.double().sum().item() == pytest.approx(total, abs=1e-4)
    inputs = golden_inputs("eval_lavt_tiny_224", 3, 224, 224, tokens=20)
    assert inputs.images.sum().item() == pytest.approx(-4647.2160, abs=0.02)
    assert inputs.input_ids.sum() == 706407
    assert inputs.attention_mask.sum(1).tolist() == [20, 15, 14]
    assert inputs.masks.sum((1, 2)).tolist() == [7268, 6984, 5310]


@pytest.mark.usefixtures("all_threads")
@pytest.mark.parametrize(
    ("name", "mha", "size", "batch"),
    [("tiny_224", "", 224, 3), ("tiny_heads_224", "2-4-8-16", 224, 2), ("base_480", "", 480, 2)],
)
def test_logits_equal_the_published_ones(name, mha, size, batch):
    golden = np.load(DATA / "golden" / f"eval_lavt_{name}.npz")
    model = set_golden_weights(build_lavt(name.split("_")[0], mha=mha)).eval()
    inputs = golden_inputs(f"eval_lavt_{name}", batch, size, size, tokens=20)
    for network in (model, prepare(model)):
        with torch.inference_mode():
            logits = network(*inputs[:3]).mask_logits.numpy()
        # A looser bound could not distinguish GELU's approximation by tanh from the exact function.
        assert np.abs(logits[:, :, ::8, ::8] - golden["logits"]).max() <= 2e-5
        differing = np.unpackbits(golden["mask"]) != (logits[:, 1] + golden["shift"] > logits[:, 0]).ravel()
        assert differing.mean() <= 1e-4
        assert logits.mean() == pytest.approx(golden["mean"], abs=2e-5)
        assert logits.std() == pytest.approx(golden["std"], abs=2e-5)


@pytest.mark.usefixtures("all_threads")
def test_three_training_steps_equal_the_published_ones():
    golden = json.loads((DATA / "golden" / "train_lavt_tiny_224.json").read_text())
    recorded = np.load(DATA / "golden" / "train_lavt_tiny_224.npz")
    model = without_dropout(set_golden_weights(build_lavt("tiny")).double().train())
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, lr=5e-5, weight_decay=1e-2)
    scheduler = build_lr_scheduler(optimizer, total_steps=10)
    scaler = build_scaler("off", torch.device("cpu"))
    state = TrainState(model, optimizer, scheduler, scaler, None, DEFAULTS.TRAIN, total_steps=10, steps_per_epoch=10)
    criterion = CrossVLTCriterion(alignment=False, segmentation_weight=1.0)
    backbone, features, logits = model.backbone, [], []
    for norm in (backbone.norm0, backbone.norm1, backbone.norm2, backbone.norm3):
        norm.register_forward_hook(lambda *call: features.append(call[-1].detach()))
    model.register_forward_hook(lambda *call: logits.append(call[-1].mask_logits.detach()))
    for number, expected in enumerate(golden["steps"]):
        inputs = golden_inputs(f"train_lavt_tiny_224:step{number}", 2, 224, 224, tokens=20)
        batch = {"image": inputs.images.double(), "input_ids": inputs.input_ids, "mask": inputs.masks}
        batch["attention_mask"] = inputs.attention_mask
        values = optimizer_step(model, criterion, [batch], state)
        assert values["loss"] == pytest.approx(expected["loss"], rel=1e-7)
        assert values["lr"] == pytest.approx(expected["lr"], rel=1e-12)
        assert values["grad_norm"] == pytest.approx(expected["grad_norm_optimized"], rel=1e-6)
        if number == 0:
            assert np.abs(logits[0].numpy()[:, :, ::8, ::8] - recorded["logits"]).max() < 1e-7
            for stage, (feature, stride) in enumerate(zip(features, (8, 4, 2, 1), strict=True), 1):
                strided = feature.permute(0, 3, 1, 2).numpy()[:, :4, ::stride, ::stride]
                assert np.abs(strided - recorded[f"feature{stage}"]).max() < 1e-7
            norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
            assert set(norms) == {name for name, norm in golden["grad_norms_step0"].items() if norm is not None}
            for name, norm in norms.items():
                if golden["updates_end"][name]["grad_rms"] > 1e-9:
                    assert norm == pytest.approx(golden["grad_norms_step0"][name], rel=1e-6), name
    check_golden_updates(model, start, golden["updates_end"])


def test_state_dict_of_base_equals_the_released_one():
    released = json.loads((DATA / "state_dict_lavt_base.json").read_text())
    parts = [sum(key.startswith(part) for key in released) for part in ("backbone.", "classifier.", "text_encoder.")]
    assert (len(released), parts) == (648, [413, 38, 197])
    with torch.device("meta"):
        model = build_lavt("base")
    buffers = {key for key in released if key.endswith("relative_position_index")}  # computed, not stored
    assert set(model.state_dict()) == set(released) - buffers
    for key, entry in model.state_dict().items():
        shape, dtype = released[key]
        assert (list(entry.shape), str(entry.dtype)) == (shape, f"torch.{dtype}"), key
    assert len(list(model.parameters())) == 606
    indices = {
        f"{name}.attn.relative_position_index": list(block.attn.relative_position_index.shape)
        for name, block in model.named_modules()
        if isinstance(block, SwinBlock)
    }
    assert indices == {key: released[key][0] for key in buffers}


@pytest.mark.parametrize(("swin_type", "counts"), [("tiny", [337, 76, 37]), ("base", [433, 136, 37])])
def test_parameter_groups_are_the_published_ones(swin_type, counts):
    with torch.device("meta"):
        model = build_lavt(swin_type)
    names = [name for name, _ in model.named_parameters()]
    groups = group_parameter_names(names, network=NETWORKS["lavt"])
    assert [len(group) for group in groups] == counts
    assert all(name.startswith("backbone.") for name in groups.no_decay)
    for name, decays in (
        ("backbone.layers.0.blocks.0.attn.relative_position_bias_table", False),
        ("backbone.norm3.weight", False),
        ("backbone.layers.1.downsample.norm.bias", False),
        ("backbone.layers.0.fusion.image_lang_att.f_query.0.bias", True),
        ("text_encoder.encoder.layer.9.output.LayerNorm.weight", True),
        ("classifier.bn1_4.weight", True),
    ):
        assert (name in groups.decay, name in groups.no_decay) == (decays, not decays), name
    assert {name.split(".")[1] for name in groups.not_optimized} == {"embeddings", "encoder"}


def test_names_without_gradient_are_exact(small_lavt, small_inputs):
    images, ids, attention_mask, masks = small_inputs()
    model = small_lavt(text_layers=12).train()
    frozen = names_without_gradient(model, alignment=False)
    CrossVLTCriterion(alignment=False)(model(images, ids, attention_mask), masks)["loss"].backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {f"backbone.layers.3.res_gate.{i}.weight" for i in (0, 2)}
    not_optimized = ("text_encoder.embeddings.", *(f"text_encoder.encoder.layer.{i}." for i in (10, 11)))
    assert set(frozen) - without == {name for name, _ in model.named_parameters() if name.startswith(not_optimized)}


@pytest.mark.parametrize("heads", [1, 4])
def test_fusion_in_float64_equals_plain_arithmetic(heads):
    torch.manual_seed(0)
    fusion = PixelWordAttention(16, 12, heads, dropout=0.0).double()
    x, words = torch.randn(2, 3, 4, 16).double(), torch.randn(2, 5, 12).double()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    attention = fusion.image_lang_att

    def conv(layer, value):
        return value @ layer[0].weight[..., 0].T + layer[0].bias

    def normed(value):
        return (value - value.mean(1, keepdim=True)) / (value.var(1, correction=0, keepdim=True) + 1e-5).sqrt()

    positions = x.flatten(1, 2)
    query, key, value = normed(conv(attention.f_query, positions)), conv(attention.f_key, words), words
    value, attended = conv(attention.f_value, value), []
    for head in torch.arange(16).chunk(heads):
        scores = query[..., head] @ key[..., head].transpose(1, 2) / 4  # √C, not the square root of a head's width
        attended.append((scores + (1e4 * mask - 1e4)[:, None, :]).softmax(-1) @ value[..., head])
    w = normed(conv(attention.W, torch.cat(attended, -1)))
    gelu = nn.functional.gelu
    expected = gelu(conv(fusion.project_mm, gelu(conv(fusion.vis_project, positions)) * w)).unflatten(1, (3, 4))
    torch.testing.assert_close(fusion(x, words, padding_bias(mask, torch.float64)), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("size", [(64, 64), (33, 32), (70, 101)])
def test_any_image_size_and_any_batch_size(model, small_inputs, size):
    images, ids, attention_mask, _ = small_inputs(3, *size)
    with torch.inference_mode():
        together = model(images, ids, attention_mask, return_similarities=True)
        assert together.mask_logits.shape == (3, 2, *size)
        assert together.similarities is None
        for b in range(3):  # results do not depend on the rest of the batch
            alone = model(images[b : b + 1], ids[b : b + 1], attention_mask[b : b + 1])
            torch.testing.assert_close(alone.mask_logits[0], together.mask_logits[b], atol=2e-5, rtol=0)


def test_too_small_images_are_rejected(model, small_inputs):
    with pytest.raises(ValueError, match="An image of 32×32 pixels is too small"):
        model(*small_inputs(1, 32, 32)[:3])


def test_padding_tokens_do_not_change_the_logits(model, small_inputs):
    images, ids, attention_mask, _ = small_inputs(tokens=7)
    longer = [nn.functional.pad(x, (0, 6), value=0) for x in (ids, attention_mask)]
    with torch.inference_mode():
        short, long = model(images, ids, attention_mask), model(images, *longer)
    torch.testing.assert_close(short.mask_logits, long.mask_logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_the_prepared_model_computes_the_same(model, small_inputs, amp):
    images, ids, attention_mask, _ = small_inputs(2, 72, 104)
    rows = torch.tensor([0, 1, 1])
    with torch.inference_mode():
        expected = model(images[rows], ids[rows], attention_mask[rows]).mask_logits
    prepared = prepare(model, amp=amp)
    packed = {type(part) for part in prepared.modules()}
    assert not packed & {nn.Linear, nn.Conv2d, PositionwiseConv, nn.BatchNorm2d, nn.GELU, nn.ReLU, nn.Tanh}
    found = prepared.segment(prepared.encode_images(images)[rows], ids[rows], attention_mask[rows], size=(72, 104))
    error = (found.mask_logits - expected).abs()
    assert error.max() < (2e-5 if amp == "off" else 0.2)
    assert error.mean() < 0.05 * expected.std()
    if amp == "bf16":
        fusion = prepared.model.backbone.layers[0].fusion
        weights = {name: getattr(layer, "weight", None) for name, layer in fusion.named_modules()}
        dtypes = {name: weight.dtype for name, weight in weights.items() if weight is not None}
        float32 = {name for name, dtype in dtypes.items() if dtype == torch.float32}
        assert float32 == {f"image_lang_att.{name}.0" for name in ("f_key", "f_value", "W")}
        assert set(dtypes) - float32 == {"vis_project.0", "image_lang_att.f_query.0", "project_mm.0"}


def test_the_fusion_stays_in_float32_in_mixed_precision(model, small_inputs):
    """If the words are nearly equal, InstanceNorm amplifies differences that bf16 cannot represent."""
    fusion = model.backbone.layers[0].fusion.image_lang_att
    torch.manual_seed(0)
    x, words = torch.randn(1, 64, 32), torch.randn(1, 1, 32) + 0.03 * torch.randn(1, 5, 32)
    bias = padding_bias(torch.ones(1, 5), torch.float32)
    with torch.inference_mode():
        expected = fusion(x, words, bias)
        with torch.autocast("cpu", torch.bfloat16):
            found = fusion(x, words, bias)
    assert found.dtype == torch.float32
    assert (found - expected).abs().mean() < 0.05 * expected.std()


@pytest.mark.parametrize(("amp", "training"), [("off", False), ("bf16", False), ("bf16", True)])
def test_on_a_gpu(small_lavt, monkeypatch, amp, training):
    """No operation works on CPU tensors, and the host never waits for the GPU."""
    model = small_lavt(mha="1-2-2-4").train(training)
    with fake_gpu(monkeypatch) as watched:
        move_to_gpu(model)
        images, ids = torch.ones(2, 3, 64, 64, device=GPU), torch.ones(2, 7, dtype=torch.long, device=GPU)
        masks = torch.ones(2, 64, 64, dtype=torch.long, device=GPU)
        with watched() as watch:
            with autocast(amp, GPU):
                output = model(images, ids, torch.ones_like(ids))
            if training:
                CrossVLTCriterion(alignment=False, segmentation_weight=1.0)(output, masks)
            else:
                output = prepare(model, amp=amp)(images, ids, torch.ones_like(ids))
    assert (watch.fetches, watch.uploads) == (0, 0)
    assert output.mask_logits.device == GPU


def test_checkpointing_keeps_the_gradients(small_lavt, small_inputs):
    images, ids, attention_mask, masks = small_inputs()
    gradients = []
    for checkpointing in (False, True):
        model = small_lavt(drop_path_rate=0.0, text_dropout=0.0).train()
        model.set_grad_checkpointing(checkpointing)
        CrossVLTCriterion(alignment=False)(model(images, ids, attention_mask), masks)["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_initialization_is_the_published_one():
    torch.manual_seed(0)
    model = build_lavt("tiny", depths=(1, 1, 1, 1), text_layers=1)
    word_embeddings = model.text_encoder.embeddings.word_embeddings.weight
    assert word_embeddings[0].std().item() == pytest.approx(0.02, rel=0.1)  # that of [PAD], too
    for conv in (model.backbone.patch_embed.proj, model.backbone.layers[2].fusion.vis_project[0]):
        bound = conv.weight[0].numel() ** -0.5  # PyTorch's default is uniform
        assert 0.9 * bound < conv.weight.abs().max() <= bound
        assert 0.5 * bound < conv.bias.abs().max() <= bound
    linear = model.backbone.layers[1].blocks[0].mlp.fc1
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not linear.bias.any()


def test_defaults_are_the_published_ones():
    with torch.device("meta"):
        config = build_lavt("tiny").config
        assert build_lavt(**config).config == config
        assert build_lavt("tiny", mha=(2, 4, 8, 16)).config["mha"] == "2-4-8-16"
    assert config == {
        "swin_type": "tiny",
        "window_size": 7,
        "drop_path_rate": 0.3,
        "mha": "1-1-1-1",
        "fusion_drop": 0.0,
        "embed_dim": 96,
        "depths": [2, 2, 6, 2],
        "num_heads": [3, 6, 12, 24],
        "text_dim": 768,
        "text_layers": 12,
        "text_heads": 12,
        "text_dropout": 0.1,
        "vocab_size": 30522,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"swin_type": "huge"}, "tiny, small, base, large"),
        ({"mha": "2-4-8"}, "mha must be 4 numbers of heads"),
        ({"mha": "2-4-8-x"}, "mha must be 4 numbers of heads"),
        ({"mha": (1, 1, 1, 0)}, "mha must be 4 numbers of heads"),
        ({"mha": "1-1-1-7"}, "768 channels of stage 3 cannot be divided into 7"),
        ({"fusion_drop": 1.0}, "fusion_drop must be at least 0 and below 1"),
        ({"text_heads": 7}, "7 equal heads"),
    ],
)
def test_invalid_sizes_are_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        build_lavt(**{"swin_type": "tiny", **changes})


def test_fusion_dropout_follows_both_activations(small_lavt):
    fusion = small_lavt(fusion_drop=0.25).backbone.layers[1].fusion
    for branch in (fusion.vis_project, fusion.project_mm):
        assert [type(layer) for layer in branch] == [PositionwiseConv, nn.GELU, nn.Dropout]
        assert branch[2].p == 0.25
