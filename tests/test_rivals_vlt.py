"""lib.rivals.vlt: the VLT-style network."""

import json

import pytest
import torch
from conftest import SMALL
from fake_gpu import GPU, fake_gpu, move_to_gpu
from golden_cases import set_golden_weights
from torch import nn

from lib.checkpoint import load_pretrained, read_checkpoint, rebuild
from lib.criterion import CrossVLTCriterion
from lib.fusion import padding_bias
from lib.inference import prepare
from lib.models import NETWORKS, recognize
from lib.optim import group_parameter_names, names_without_gradient
from lib.precision import AMP_DTYPES, autocast
from lib.rivals.vlt import build_vlt
from lib.rivals.vlt_layers import TransformerLayer, sinusoidal_positions


@pytest.fixture
def small_vlt():
    """Return a function that builds a small network: ``small_vlt(text_layers=…)``."""

    def build(**changes):
        torch.manual_seed(0)
        return build_vlt("tiny", **{**SMALL, **changes})

    return build


@pytest.fixture
def model(small_vlt):
    """A small network in which every branch matters: BatchNorms are not the identity."""
    model = set_golden_weights(small_vlt()).eval()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("size", [(64, 64), (32, 32), (5, 30), (70, 101), (50, 130)])
def test_any_image_size_and_any_batch_size(model, small_inputs, size):
    images, ids, attention_mask, _ = small_inputs(3, *size)
    with torch.inference_mode():
        together = model(images, ids, attention_mask)
        assert together.mask_logits.shape == (3, 2, *size)
        assert together.similarities is None
        assert together.confidences.shape == (3, 16)
        for b in range(3):  # results do not depend on the rest of the batch
            alone = model(images[b : b + 1], ids[b : b + 1], attention_mask[b : b + 1])
            torch.testing.assert_close(alone.mask_logits[0], together.mask_logits[b], atol=2e-5, rtol=0)


def test_a_single_small_image_can_be_trained(small_vlt, small_inputs):
    images, ids, attention_mask, masks = small_inputs(1, 64, 64)
    model = small_vlt().train()
    loss = CrossVLTCriterion(alignment=False)(model(images, ids, attention_mask), masks)["loss"]
    assert loss.isfinite()


def test_padding_tokens_do_not_change_the_logits(model, small_inputs):
    images, ids, attention_mask, _ = small_inputs(tokens=7)
    longer = [nn.functional.pad(x, (0, 6), value=0) for x in (ids, attention_mask)]
    others = ids * attention_mask + 3 * (1 - attention_mask)  # other tokens behind the mask
    with torch.inference_mode():
        expected = model(images, ids, attention_mask)
        for output in (model(images, *longer), model(images, others, attention_mask)):
            torch.testing.assert_close(output.mask_logits, expected.mask_logits, atol=2e-5, rtol=0)
            torch.testing.assert_close(output.confidences, expected.confidences, atol=2e-5, rtol=0)


def test_sentence_and_image_change_logits_and_confidences(model, small_inputs):
    images, ids, attention_mask, _ = small_inputs()
    with torch.inference_mode():
        expected = model(images, ids, attention_mask)
        others = model(images, ids.flip(1), attention_mask), model(images.flip(0), ids, attention_mask)
    assert ((expected.confidences > 0) & (expected.confidences < 1)).all()
    for other in others:
        assert (other.mask_logits - expected.mask_logits).abs().max() > 1e-2
        assert (other.confidences - expected.confidences).abs().max() > 1e-4


def test_several_sentences_of_an_image_share_its_encoding(model, small_inputs):
    images, ids, attention_mask, _ = small_inputs(3)
    rows = torch.tensor([1, 0, 1])
    with torch.inference_mode():
        shared = model.segment(model.encode_images(images[:2])[rows], ids, attention_mask, size=(64, 64))
        separate = model(images[rows], ids, attention_mask)
    torch.testing.assert_close(shared.mask_logits, separate.mask_logits, atol=2e-5, rtol=0)


def test_gradients_reach_every_parameter_and_checkpointing_keeps_them(small_vlt, small_inputs):
    images, ids, attention_mask, masks = small_inputs()
    gradients = []
    for checkpointing in (False, True):
        model = small_vlt(drop_path_rate=0.0, text_dropout=0.0).train()
        model.set_grad_checkpointing(checkpointing)
        CrossVLTCriterion(alignment=False)(model(images, ids, attention_mask), masks)["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    biases = ("key.bias", "relative_position_bias_table")  # softmax ignores the former; windows of one position
    assert all(g.abs().max() > 0 for name, g in gradients[0].items() if not name.endswith(biases))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_queries_have_no_order_and_no_causal_mask():
    """Permuting the queries permutes the responses; with a causal mask, the first ones would not change."""
    torch.manual_seed(0)
    layer = TransformerLayer(16, 0.0, cross_attention=True).double()
    queries, memory = torch.randn(2, 5, 16).double(), torch.randn(2, 9, 16).double()
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(layer(queries[:, order], memory), layer(queries, memory)[:, order])
    changed = torch.cat([queries[:, :4], torch.randn(2, 1, 16).double()], dim=1)
    assert ((layer(changed, memory) - layer(queries, memory)).abs().amax(2) > 1e-6).all()


@pytest.mark.parametrize("cross_attention", [False, True])
def test_transformer_layers_equal_those_of_pytorch(cross_attention):
    torch.manual_seed(0)
    ours = TransformerLayer(32, 0.1, cross_attention=cross_attention).double().eval()
    theirs = nn.TransformerDecoderLayer if cross_attention else nn.TransformerEncoderLayer
    theirs = theirs(32, 8, 128, batch_first=True).double().eval()
    pairs = [(theirs.self_attn, ours.attention), (theirs.linear1, ours.mlp.fc1), (theirs.linear2, ours.mlp.fc2)]
    if cross_attention:
        pairs += [(theirs.multihead_attn, ours.cross_attention)]
    for target, source in pairs:
        if isinstance(target, nn.MultiheadAttention):
            parts = (source.query, source.key, source.value)
            state = {f"in_proj_{kind}": torch.cat([getattr(p, kind) for p in parts]) for kind in ("weight", "bias")}
            target.load_state_dict(state | {f"out_proj.{key}": value for key, value in source.out.state_dict().items()})
        else:
            target.load_state_dict(source.state_dict())
    x, memory = torch.randn(2, 5, 32).double(), torch.randn(2, 9, 32).double()
    expected = theirs(x, memory) if cross_attention else theirs(x)
    torch.testing.assert_close(ours(x, memory), expected)


def test_spatial_dynamic_fusion_multiplies_by_attended_words(model):
    """Equals plain arithmetic in float64; padded words are not attended to."""
    fusion = model.double().fusion
    x, words = torch.randn(1, 16, 2, 3).double(), torch.randn(1, 5, 32).double()
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    positions = x[0].flatten(1).T
    scores = fusion.attention.query(positions) @ fusion.attention.key(words[0, :3]).T / 4
    attended = fusion.attention.out(scores.softmax(1) @ fusion.attention.value(words[0, :3]))
    product = attended * (positions @ fusion.project.weight[:, :, 0, 0].T + fusion.project.bias)
    expected = nn.functional.gelu(fusion.norm(product.T.reshape(1, 16, 2, 3)))
    torch.testing.assert_close(fusion(x, words, padding_bias(mask, x.dtype)), expected)


def test_positions_have_distinct_embeddings_that_do_not_depend_on_the_map_size():
    small, large = (sinusoidal_positions(torch.empty(1, 32, *size)) for size in ((3, 4), (6, 9)))
    assert torch.equal(large.unflatten(0, (6, 9))[:3, :4].flatten(0, 1), small)
    assert torch.cdist(large, large).fill_diagonal_(1).min() > 0.1


@pytest.mark.parametrize("size", [(64, 64), (72, 104)])
def test_the_prepared_model_computes_the_same(model, small_inputs, size):
    images, ids, attention_mask, _ = small_inputs(2, *size)
    prepared = prepare(model)
    rows = torch.tensor([0, 1, 1])
    with torch.inference_mode():
        expected = model(images, ids, attention_mask)
    segmented = prepared.segment(prepared.encode_images(images)[rows], ids[rows], attention_mask[rows], size=size)
    for output, wanted in ((prepared(images, ids, attention_mask), slice(None)), (segmented, rows)):
        torch.testing.assert_close(output.mask_logits, expected.mask_logits[wanted], atol=2e-5, rtol=0)
        torch.testing.assert_close(output.confidences, expected.confidences[wanted], atol=2e-5, rtol=0)
    kinds = [type(part) for part in prepared.modules()]
    assert not {nn.Linear, nn.Conv2d, nn.ReLU} & set(kinds)
    assert kinds.count(nn.BatchNorm2d) == 1  # that of the fusion, which follows a product


def test_bf16_is_close_to_float32(model, small_inputs):
    inputs = small_inputs()[:3]
    with torch.inference_mode():
        expected = model(*inputs).mask_logits
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(*inputs).mask_logits
    for logits in (mixed, prepare(model, amp="bf16")(*inputs).mask_logits):
        assert 0 < (logits.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_a_few_steps_lower_the_loss(small_vlt, small_inputs):
    images, ids, attention_mask, masks = small_inputs(2)
    masks[:] = 0
    masks[0, :32, :32] = masks[1, 20:, 40:] = 1
    model, criterion = small_vlt(text_dropout=0.0, drop_path_rate=0.0).train(), CrossVLTCriterion(alignment=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(25):
        loss = criterion(model(images, ids, attention_mask), masks)["segmentation"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]


def test_sizes_at_the_published_scale():
    with torch.device("meta"):
        model = build_vlt("base")
        output = model(torch.empty(2, 3, 480, 480), torch.empty(2, 21).long(), torch.empty(2, 21).long())
        encoded = model.encode_images(torch.empty(1, 3, 480, 480))
    assert output.mask_logits.shape == (2, 2, 480, 480)
    assert encoded.shape == (1, 256, 30, 30)
    assert len(model.text_encoder.encoder.layer) == 12
    assert sum(p.numel() for p in model.parameters()) == 206_656_651
    assert len(model.blocks()) == 24 + 12 + 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"swin_type": "huge"}, "tiny, small, base, large"),
        ({"align_dim": 12}, "align_dim 12 cannot be divided into 8 equal heads"),
        ({"text_heads": 7}, "7 equal heads"),
        ({"text_dim": None}, "text_dim must be an integer"),
        ({"text_dropout": 1.0}, "text_dropout must be at least 0 and below 1"),
    ],
)
def test_invalid_sizes_are_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        build_vlt(**{"swin_type": "tiny", **changes})


@pytest.mark.parametrize(("amp", "training"), [("off", False), ("bf16", False), ("bf16", True)])
def test_on_a_gpu(small_vlt, monkeypatch, amp, training):
    """No operation works on CPU tensors, and the host never waits for the GPU."""
    model = small_vlt().train(training)
    with fake_gpu(monkeypatch) as watched:
        move_to_gpu(model)
        images, ids = torch.ones(2, 3, 64, 64, device=GPU), torch.ones(2, 7, dtype=torch.long, device=GPU)
        masks = torch.ones(2, 64, 64, dtype=torch.long, device=GPU)
        with watched() as watch:
            with autocast(amp, GPU):
                output = model(images, ids, torch.ones_like(ids))
            if training:
                CrossVLTCriterion(alignment=False)(output, masks)
            else:
                output = prepare(model, amp=amp)(images, ids, torch.ones_like(ids))
    assert (watch.fetches, watch.uploads) == (0, 0)
    assert {output.mask_logits.device, output.confidences.device} == {GPU}
    assert output.confidences.dtype == (AMP_DTYPES[amp] or torch.float32)


def test_parameter_groups(small_vlt):
    model = small_vlt()
    names = [name for name, _ in model.named_parameters()]
    groups = group_parameter_names(names, network=NETWORKS["vlt"])
    assert sum(map(len, groups)) == len(names)
    assert all(name.startswith("text_encoder.embeddings.") for name in groups.not_optimized)
    assert len(groups.not_optimized) == 5
    assert all(name.startswith("backbone.") for name in groups.no_decay)
    assert {"fusion.norm.weight", "text_encoder.encoder.layer.0.output.LayerNorm.weight"} <= set(groups.decay)
    assert names_without_gradient(model, alignment=False) == groups.not_optimized


def test_the_configuration_follows_from_the_shapes(small_vlt, tmp_path):
    model = small_vlt(text_dim=128, text_layers=3)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    checkpoint = read_checkpoint(tmp_path / "bare.pth")
    assert checkpoint.model_name == recognize(model.state_dict()) == "vlt"
    names = (*NETWORKS["vlt"].inferred, "text_heads")
    assert checkpoint.model_config == {"swin_type": "base"} | {name: model.config[name] for name in names}
    rebuilt = rebuild(checkpoint).state_dict()
    assert all(torch.equal(rebuilt[key], value) for key, value in model.state_dict().items())


def test_pretrained_files_initialize_both_encoders(small_vlt, tmp_path):
    source = {key: torch.rand_like(value) for key, value in small_vlt().state_dict().items() if value.ndim}
    swin = {
        key.replace("backbone.0.patch_embed", "patch_embed").replace("backbone.", "layers.").replace(".layers.", "."): v
        for key, v in source.items()
        if "patch_embed" in key or ".blocks." in key or ".downsample." in key
    }
    bert = {key.replace("text_encoder.", "bert."): v for key, v in source.items() if key.startswith("text_encoder.")}
    torch.save({"model": swin}, tmp_path / "swin.pth")
    torch.save(bert, tmp_path / "bert.pth")
    model, before = small_vlt(), small_vlt().state_dict()
    load_pretrained(model, tmp_path / "swin.pth", tmp_path / "bert.pth")
    for key, value in model.state_dict().items():
        encoder = key.startswith("text_encoder.") or "patch_embed" in key or ".blocks." in key or ".downsample." in key
        assert torch.equal(value, source[key] if encoder else before[key]), key


def test_training_resuming_and_evaluation(small_config, tmp_path, run_here):
    folders = ["--output-dir", tmp_path / "checkpoints", "--log_dir", tmp_path / "models", "--model_id", "run"]
    run_here("train.py", "--cfg", small_config, "--model", "vlt", "--steps", 2, *folders, check=True)
    last = tmp_path / "checkpoints" / "run" / "last.pth"
    run_here("train.py", "--resume", last, "--steps", 3, *folders, check=True)
    assert (read_checkpoint(last).model_name, read_checkpoint(last).extra["step"]) == ("vlt", 3)
    best = last.with_name("best.pth")
    vis = ["--vis", tmp_path / "vis", "--vis_num", 1]
    run_here("test.py", "--cfg", small_config, "--resume", best, "--json", tmp_path / "out.json", *vis, check=True)
    result = json.loads((tmp_path / "out.json").read_text())[0]
    metrics = read_checkpoint(best).extra["metrics"]
    assert {name: result["metrics"][name] for name in metrics} == pytest.approx(metrics, abs=0.02)
    image = next((tmp_path / "vis").rglob("*.png"))
    flags = ["--image", image, "--sentence", "red circle", "--out", tmp_path / "overlay.png"]
    run_here("test.py", "--cfg", small_config, "--resume", best, *flags, check=True)
    assert (tmp_path / "overlay.png").exists()
    failed = run_here("test.py", "--cfg", small_config, "--resume", best, *vis, "--vis_maps")
    assert failed.status == 2
    assert "--vis_maps" in failed.err
    assert "has no alignment maps" in failed.err
