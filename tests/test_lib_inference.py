"""lib.inference: the prepared model computes what the model computes."""

import copy
import gc
import weakref

import pytest
import torch
from golden_cases import golden_inputs, set_golden_weights
from torch import nn

import lib.inference
import lib.kernels
from CrossVLT import build_crossvlt
from lib.fusion import PositionwiseConv
from lib.inference import prepare, warn_if_slower
from lib.kernels import PackedConv2d, WinogradConv2d, pack_conv
from lib.variants import FUSIONS
from lib.vision_encoder import WindowAttention


@pytest.fixture
def model(small_model):
    """A small model whose BatchNorms are not the identity."""
    model = set_golden_weights(small_model(depths=(2, 2, 1, 1), window_size=3)).eval()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_var.uniform_(0.5, 2)
    return model


def difference(one, other):
    maps = [] if one.similarities is None else zip(one.similarities, other.similarities, strict=True)
    return max((a.float() - b.float()).abs().max().item() for a, b in [(one.mask_logits, other.mask_logits), *maps])


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (72, 104)])
def test_the_prepared_model_computes_the_same(small_model, small_inputs, fusion, height, width):
    model = set_golden_weights(small_model(fusion=fusion)).eval()
    images, ids, attention_mask, _ = small_inputs(2, height, width)
    prepared = prepare(model)
    for similarities in (False, True):
        with torch.inference_mode():
            expected = model(images, ids, attention_mask, return_similarities=similarities)
        assert difference(prepared(images, ids, attention_mask, return_similarities=similarities), expected) < 2e-5
    rows = torch.tensor([0, 1, 1])
    encoded = prepared.encode_images(images)[rows]
    segmented = prepared.segment(encoded, ids[rows], attention_mask[rows], size=(height, width))
    assert difference(segmented, type(expected)(expected.mask_logits[rows], None)) < 2e-5


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 6), (2, 7, 9), (1, 1, 1)])
def test_winograd_convolutions_round_like_ordinary_ones(batch, height, width):
    conv = nn.Conv2d(96, 32, 3, padding=1)
    x = torch.randn(batch, 96, height, width)
    packed = pack_conv(conv, "relu", torch.float32)
    assert isinstance(packed, WinogradConv2d)
    with torch.inference_mode():
        exact = copy.deepcopy(conv).double()(x.double()).relu()
        assert (packed(x) - exact).abs().max() <= 2 * (conv(x).relu() - exact).abs().max() + 1e-7
    assert isinstance(pack_conv(nn.Conv2d(96, 32, 3), "relu", torch.float32), PackedConv2d)


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_devices_without_onednn_compute_the_same(model, small_inputs, monkeypatch, amp):
    inputs = small_inputs()[:3]
    expected = prepare(model, amp=amp)(*inputs)
    monkeypatch.setattr(lib.kernels, "has_onednn", lambda device, dtype: False)
    assert difference(prepare(model, amp=amp)(*inputs), expected) < (2e-5 if amp == "off" else 0.05)


def test_an_unused_prepared_model_is_freed_at_once(model, small_inputs):
    prepared = prepare(model)
    prepared(*small_inputs()[:3])
    block = weakref.ref(prepared.model.backbone[0].layers.blocks[0].attn)
    gc.disable()
    try:
        del prepared
        assert block() is None
    finally:
        gc.enable()


def test_the_original_model_stays_as_it_is(model, small_inputs):
    images, ids, attention_mask, _ = small_inputs()
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    prepared = prepare(model)
    assert model.training
    assert not prepared.training
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    prepared(images, ids, attention_mask)
    model(images, ids, attention_mask).mask_logits.sum().backward()


def test_every_layer_is_packed_and_biases_are_computed_once_per_size(model, small_inputs, monkeypatch):
    computed = []
    original = WindowAttention._get_rel_pos_bias
    monkeypatch.setattr(WindowAttention, "_get_rel_pos_bias", lambda self: computed.append(1) or original(self))
    prepared = prepare(model)
    kinds = {type(part) for part in prepared.modules()}
    assert not kinds & {nn.Linear, nn.Conv2d, PositionwiseConv, nn.BatchNorm2d, nn.ReLU, nn.GELU, nn.Tanh}
    blocks = sum(isinstance(part, WindowAttention) for part in prepared.modules())
    for height in (64, 64, 96, 64):
        prepared(*small_inputs(1, height)[:3])
    shifted = sum(len(stage.layers.blocks) // 2 for stage in model.backbone)
    assert len(computed) == blocks + shifted  # shifted blocks once for each of two sizes


@pytest.mark.usefixtures("all_threads")
def test_bf16_is_no_less_accurate_than_autocast():
    model = set_golden_weights(build_crossvlt("tiny")).eval()
    inputs = golden_inputs("eval_tiny_224", 3, 224, 224)[:3]
    with torch.inference_mode():
        exact = model(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = model(*inputs)
    bf16 = prepare(model, amp="bf16")(*inputs)
    assert bf16.mask_logits.dtype == autocast.mask_logits.dtype
    errors = [(output.mask_logits - exact.mask_logits).square().mean().sqrt() for output in (bf16, autocast)]
    assert 0 < errors[0] <= errors[1] < 0.01


def test_a_cpu_on_which_mixed_precision_is_slower_gets_a_warning(monkeypatch):
    rates = {torch.float32: 316e9, torch.bfloat16: 174e9, torch.float16: 400e9}
    warnings = []
    monkeypatch.setattr(lib.inference, "matrix_product_rate", rates.get)
    monkeypatch.setattr(lib.inference, "warn_once", lambda message, *values: warnings.append(message % values))
    for amp in ("off", "fp16", "bf16"):
        warn_if_slower(amp, torch.device("cpu"))
    assert warnings == ["--amp bf16 is slower on this CPU: 174 GFLOP/s, 316 in float32"]


def test_chains_of_a_sequence_are_folded():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4),
    ]
    model = nn.Sequential(*layers, nn.Conv2d(4, 2, 1), nn.Tanh(), nn.Tanh()).eval()
    model.config = {}
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    images = torch.randn(2, 3, 8, 8)
    prepared = prepare(model)
    with torch.inference_mode():
        torch.testing.assert_close(prepared(images), model(images), atol=1e-5, rtol=0)
    kept = [type(part) for part in prepared.model if not isinstance(part, nn.Identity | lib.kernels.PackedConv2d)]
    assert kept == [nn.BatchNorm2d, nn.Tanh]  # after an activation
