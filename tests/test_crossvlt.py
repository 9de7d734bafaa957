"""The network: recorded numbers of the published one, state dict, image sizes, dtypes and ablations."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL
from golden_cases import check_golden_updates, golden_inputs, golden_value, set_golden_weights, without_dropout
from timm.layers import DropPath

from CrossVLT import build_crossvlt
from lib.config import DEFAULTS
from lib.criterion import CrossVLTCriterion
from lib.engine.loop import optimizer_step
from lib.engine.state import TrainState
from lib.fusion import FUSION_LAYERS
from lib.inference import prepare
from lib.optim import build_lr_scheduler, build_optimizer, group_parameter_names
from lib.precision import build_scaler
from lib.variants import FUSIONS, SWIN_VARIANTS

GOLDEN = ROOT / "tests" / "data" / "golden"


def test_golden_inputs_and_weights_have_the_recorded_checksums():
    proj = golden_value("backbone.0.patch_embed.proj.weight", torch.empty(128, 3, 4, 4))
    assert proj.flatten()[0].item() == pytest.approx(0.0446475, abs=1e-7)
    assert proj.sum().item() == pytest.approx(1.97962, abs=1e-4)
    inputs = golden_inputs("eval_base_480", 2, 480, 480)
    assert inputs.images.sum().item() == pytest.approx(-33379.5408, abs=0.02)
    assert inputs.input_ids.sum() == 388964
    assert inputs.attention_mask.sum(1).tolist() == [21, 8]
    assert inputs.masks.sum((1, 2)).tolist() == [34632, 25864]


@pytest.mark.usefixtures("all_threads")
@pytest.mark.parametrize(("swin_type", "size", "batch"), [("tiny", 224, 3), ("base", 480, 2)])
def test_logits_equal_the_published_ones(swin_type, size, batch):
    name = f"eval_{swin_type}_{size}"
    golden = np.load(GOLDEN / f"{name}.npz")
    model = set_golden_weights(build_crossvlt(swin_type)).eval()
    inputs = golden_inputs(name, batch, size, size)
    for network in (model, prepare(model)):
        with torch.inference_mode():
            output = network(inputs.images, inputs.input_ids, inputs.attention_mask)
        assert output.similarities is None
        logits = output.mask_logits.numpy()
        assert np.abs(logits[:, :, ::8, ::8] - golden["logits"]).max() <= 2e-4
        differing = np.unpackbits(golden["mask"]) != logits.argmax(1).ravel()
        assert differing.mean() <= 1e-4
        assert logits.mean() == pytest.approx(golden["mean"], abs=2e-4)
        assert logits.std() == pytest.approx(golden["std"], abs=2e-4)


@pytest.mark.usefixtures("all_threads")
def test_three_training_steps_equal_the_published_ones():
    golden = json.loads((GOLDEN / "train_tiny_224.json").read_text())
    recorded = np.load(GOLDEN / "train_tiny_224.npz")
    model = without_dropout(set_golden_weights(build_crossvlt("tiny")).double().train())
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    skipped = group_parameter_names(list(start)).not_optimized
    optimizer = build_optimizer(model, lr=3e-5, weight_decay=1e-2)
    scheduler = build_lr_scheduler(optimizer, total_steps=10)
    scaler = build_scaler("off", torch.device("cpu"))
    state = TrainState(model, optimizer, scheduler, scaler, None, DEFAULTS.TRAIN, total_steps=10, steps_per_epoch=10)
    for number, expected in enumerate(golden["steps"]):
        inputs = golden_inputs(f"train_tiny_224:step{number}", 2, 224, 224)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([expected["lr"]] * 2, rel=1e-12)
        batch = {"image": inputs.images.double(), "input_ids": inputs.input_ids, "mask": inputs.masks}
        batch["attention_mask"] = inputs.attention_mask
        if number == 0:
            with torch.no_grad():
                output = model(batch["image"], batch["input_ids"], batch["attention_mask"])
        values = optimizer_step(model, CrossVLTCriterion(), [batch], state)
        assert values["loss"] == pytest.approx(expected["loss"], rel=1e-7)
        assert values["segmentation"] == pytest.approx(expected["seg"], rel=1e-7)
        assert [values[f"alignment{i}"] for i in (1, 2, 3, 4)] == pytest.approx(expected["align"], rel=1e-7)
        assert (values["lr"], values["grad_norm"]) == pytest.approx(
            (expected["lr"], expected["grad_norm_optimized"]), rel=1e-6
        )
        norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
        total = np.linalg.norm([norm for name, norm in norms.items() if name not in skipped])
        assert total == pytest.approx(expected["grad_norm_optimized"], rel=1e-6)
        if number == 0:
            logits = output.mask_logits.numpy()
            assert np.abs(logits[:, :, ::8, ::8] - recorded["logits"]).max() < 1e-7
            for stage, (similarity, stride) in enumerate(zip(output.similarities, (8, 4, 2, 1), strict=True), 1):
                strided = similarity.numpy()[:, :, ::stride, ::stride]
                assert np.abs(strided - recorded[f"sim{stage}"]).max() < 1e-7
            assert set(norms) == {name for name, norm in golden["grad_norms_step0"].items() if norm is not None}
            for name, norm in norms.items():
                if golden["updates_end"][name]["grad_rms"] > 1e-9:
                    assert norm == pytest.approx(golden["grad_norms_step0"][name], rel=1e-6), name
    check_golden_updates(model, start, golden["updates_end"])


def test_output_shapes_on_the_meta_device():
    """The model runs on the meta device, where tools count operations and estimate memory."""
    with torch.device("meta"):
        model = build_crossvlt("base")
        output = model(torch.empty(2, 3, 480, 480), torch.empty(2, 21).long(), torch.empty(2, 21).long())
    assert output.mask_logits.shape == (2, 2, 480, 480)
    assert [tuple(s.shape) for s in output.similarities] == [(2, 1, side, side) for side in (120, 60, 30, 15)]


def test_state_dict_of_base_equals_the_released_one():
    released = json.loads((ROOT / "tests" / "data" / "state_dict_base.json").read_text())
    assert len(released) == 693
    ours = build_crossvlt("base").state_dict()
    buffers = {key for key in released if key.endswith("relative_position_index")}  # computed, not stored
    assert len(buffers) == sum(SWIN_VARIANTS["base"]["depths"])
    assert set(ours) == set(released) - buffers
    for key, entry in ours.items():
        shape, dtype = released[key]
        assert list(entry.shape) == shape, key
        assert str(entry.dtype) == f"torch.{dtype}", key


@pytest.mark.parametrize("size", [(64, 64), (33, 32), (32, 33), (70, 101), (50, 130)])
def test_any_image_size_and_any_batch_size(small_model, small_inputs, size):
    model = small_model().eval()
    images, ids, text_mask, _ = small_inputs(3, *size)
    with torch.inference_mode():
        together = model(images, ids, text_mask, return_similarities=True)
        assert together.mask_logits.shape == (3, 2, *size)
        stages = [(-(-size[0] // s), -(-size[1] // s)) for s in (4, 8, 16, 32)]
        assert [tuple(s.shape) for s in together.similarities] == [(3, 1, *stage) for stage in stages]
        for b in range(3):  # results do not depend on the rest of the batch
            alone = model(images[b : b + 1], ids[b : b + 1], text_mask[b : b + 1])
            torch.testing.assert_close(alone.mask_logits[0], together.mask_logits[b], atol=2e-5, rtol=0)


@pytest.mark.parametrize("size", [(32, 32), (5, 30), (1, 1)])
def test_too_small_images_are_rejected(small_model, small_inputs, size):
    with pytest.raises(ValueError, match=rf"An image of {size[0]}×{size[1]} pixels is too small.*longer than 32"):
        small_model()(*small_inputs(1, *size)[:3])


def test_padding_tokens_do_not_change_the_logits(small_model, small_inputs):
    model = small_model().eval()
    images, ids, text_mask, _ = small_inputs(tokens=7)
    longer_ids = torch.nn.functional.pad(ids, (0, 6), value=0)
    longer_mask = torch.nn.functional.pad(text_mask, (0, 6), value=0)
    with torch.inference_mode():
        short, long = model(images, ids, text_mask), model(images, longer_ids, longer_mask)
    torch.testing.assert_close(short.mask_logits, long.mask_logits, atol=2e-5, rtol=0)


def test_float64_float32_and_bfloat16_agree(small_model, small_inputs):
    double = small_model().double().eval()
    inputs = small_inputs(dtype=torch.float64)[:3]
    with torch.inference_mode():
        expected = double(*inputs).mask_logits
        single = small_model().eval()(inputs[0].float(), *inputs[1:]).mask_logits
        half = small_model().bfloat16().eval()(inputs[0].bfloat16(), *inputs[1:]).mask_logits
    assert (expected.dtype, single.dtype, half.dtype) == (torch.float64, torch.float32, torch.bfloat16)
    torch.testing.assert_close(single.double(), expected, atol=1e-4, rtol=0)
    assert (half.double() - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_fusion_layer_in_float64_equals_plain_arithmetic(small_model, small_inputs):
    """A mask of another dtype than the query would give wrong values on CPU without an error."""
    fusion = small_model().double().backbone[0].layers.attn1
    v = torch.randn(2, 12, 32, dtype=torch.float64)
    text = torch.randn(2, 5, 32, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    normed = lambda x: (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()  # noqa: E731
    query = normed(v @ fusion.v_q[0].weight[..., 0].T + fusion.v_q[0].bias)
    scores = query @ fusion.l_q(text).transpose(1, 2) / 8 + (1e4 * mask - 1e4)[:, None, :]
    attended = scores.softmax(-1) @ fusion.values_l(text)
    w = normed(attended @ fusion.w_v[0].weight[..., 0].T + fusion.w_v[0].bias)
    expected = torch.nn.functional.gelu((w + v) @ fusion.project_mm[0].weight[..., 0].T + fusion.project_mm[0].bias)
    torch.testing.assert_close(fusion(v, text, mask), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("fusion", "language_depends_on_the_image", "first_stage_depends_on_the_sentence"),
    [("cross", True, True), ("vision", False, True), ("late", False, False)],
)
def test_ablations_cut_the_right_connections(
    small_model, small_inputs, fusion, language_depends_on_the_image, first_stage_depends_on_the_sentence
):
    images, ids, text_mask, _ = small_inputs()
    other_ids = (ids + 1) % SMALL["vocab_size"]
    model = small_model(fusion=fusion).eval()
    words, features = [], []
    model.lang_stage4.register_forward_hook(lambda module, inputs, output: words.append(output))
    model.backbone[0].register_forward_hook(lambda module, inputs, output: features.append(output.decoder_feature))
    with torch.inference_mode():
        model(images, ids, text_mask)
        model(images.flip(0), ids, text_mask)
        model(images, other_ids, text_mask)
    assert torch.equal(words[0], words[1]) != language_depends_on_the_image
    assert torch.equal(features[0], features[2]) != first_stage_depends_on_the_sentence


def test_every_fusion_has_a_layer():
    assert list(FUSION_LAYERS) == list(FUSIONS)


def test_similarities_are_computed_only_on_request(small_model, small_inputs):
    model, computed = small_model(), []
    for projection in [stage.layers.proj for stage in model.backbone] + [stage.proj for stage in model.language_stages]:
        projection.register_forward_hook(lambda *_: computed.append(1))
    images, ids, text_mask, _ = small_inputs()
    for training, requested, expected in (
        (True, None, True), (False, None, False), (True, False, False), (False, True, True),
    ):  # fmt: skip
        computed.clear()
        output = model.train(training)(images, ids, text_mask, return_similarities=requested)
        assert (output.similarities is not None, len(computed)) == (expected, 8 if expected else 0)


def test_ablations_have_no_unused_modules(small_model):
    cross, vision, late = (set(small_model(fusion=f).state_dict()) for f in ("cross", "vision", "late"))
    assert not any("crossattention" in key for key in vision | late)
    fusion_parts = ("attn1.", "attn2.", "linear1.", "linear2.")
    early = {key for key in cross if key.startswith(("backbone.0.", "backbone.1.", "backbone.2."))}
    assert {key for key in early if any(part in key for part in fusion_parts)} == vision - late
    assert late < vision


def test_defaults_are_the_published_ones():
    assert build_crossvlt("tiny").config == {
        "swin_type": "tiny",
        "window_size": 7,
        "drop_path_rate": 0.3,
        "fusion": "cross",
        "embed_dim": 96,
        "depths": [2, 2, 6, 2],
        "num_heads": [3, 6, 12, 24],
        "text_dim": 768,
        "text_layers": 6,
        "text_heads": 12,
        "text_dropout": 0.1,
        "vocab_size": 30522,
        "align_dim": 256,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"swin_type": "huge"}, "tiny, small, base, large"),
        ({"fusion": "early"}, "cross, vision, late"),
        ({"num_heads": (5, 6, 12, 24)}, "stage 0 cannot be divided"),
        ({"depths": (2, 2)}, "4 entries"),
        ({"depths": (2, 2, 10**9, 2)}, "depths must be integers from 1 to"),
        ({"embed_dim": 10**12}, "embed_dim must be an integer from 1 to"),
        ({"text_dim": -1}, "text_dim must be an integer from 1 to"),
        ({"text_dropout": 1.5}, "text_dropout must be at least 0 and below 1"),
        ({"text_heads": 7}, "7 equal heads"),
        ({"window_size": 1}, "window_size"),
        ({"embed_dim": 116, "num_heads": (4, 4, 4, 4)}, "multiple of 32"),
    ],
)
def test_invalid_sizes_are_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        build_crossvlt(**{"swin_type": "tiny", **changes})


def test_drop_path_increases_linearly(small_model):
    rates = [m.drop_prob for m in small_model(drop_path_rate=0.4).modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
