"""State dicts: renaming keys of the supported files, strict loading, inferring sizes from shapes."""

import pytest
import torch

from CrossVLT import build_crossvlt
from lib.errors import UserError
from lib.state_dict import adapt_to_model, infer_model_config, load_strictly, repair_keys
from lib.variants import SWIN_VARIANTS


@pytest.mark.parametrize(
    ("key", "repaired"),
    [
        # CrossVLT
        ("temp", "temp"),
        ("backbone.0.norm0.weight", "backbone.0.norm0.weight"),
        ("backbone.0.patch_embed.norm.weight", "backbone.0.patch_embed.norm.weight"),
        ("lang_stage1.encoder.layer.0.output.LayerNorm.weight", "lang_stage1.encoder.layer.0.output.LayerNorm.weight"),
        ("backbone.0.layers.blocks.0.attn.relative_position_index", None),
        # Swin
        ("patch_embed.proj.weight", "backbone.0.patch_embed.proj.weight"),
        ("layers.2.blocks.17.norm1.bias", "backbone.2.layers.blocks.17.norm1.bias"),
        ("layers.0.downsample.reduction.weight", "backbone.0.layers.downsample.reduction.weight"),
        ("layers.0.blocks.1.attn_mask", None),
        ("layers.0.blocks.1.attn.relative_position_index", None),
        ("norm.weight", None),
        ("head.bias", None),
        # BERT
        ("bert.embeddings.word_embeddings.weight", "lang_stage1.embeddings.word_embeddings.weight"),
        ("embeddings.LayerNorm.gamma", "lang_stage1.embeddings.LayerNorm.weight"),
        ("bert.encoder.layer.0.output.LayerNorm.beta", "lang_stage1.encoder.layer.0.output.LayerNorm.bias"),
        ("encoder.layer.11.output.dense.bias", "lang_stage1.encoder.layer.11.output.dense.bias"),
        ("bert.embeddings.position_ids", None),
        ("bert.pooler.dense.weight", None),
        ("pooler.dense.weight", None),
        ("cls.predictions.transform.LayerNorm.gamma", None),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_keys_of_all_supported_files_are_repaired(key, repaired, prefix):
    value = torch.zeros(1)
    assert repair_keys({prefix + key: value}) == ({} if repaired is None else {repaired: value})


def test_a_prefix_that_not_all_keys_have_is_kept():
    assert list(repair_keys({"module.temp": torch.ones(4), "classifier.bn1_4.bias": torch.ones(4)})) == [
        "module.temp",
        "classifier.bn1_4.bias",
    ]


def test_repairing_keeps_the_state_dict_of_crossvlt(small_model):
    state_dict = small_model().state_dict()
    assert repair_keys(state_dict) == state_dict


def test_differences_are_reported_by_key(small_model):
    model = small_model()
    state_dict = {key: value + 1 for key, value in model.state_dict().items()}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    del state_dict["classifier.conv1_1.bias"]
    state_dict["backbone.0.norm0.extra"] = torch.zeros(1)
    state_dict["lang_stage2.proj.weight"] = torch.zeros(3, 3)
    with pytest.raises(UserError) as caught:
        load_strictly(model, state_dict, "wrong.pth")
    assert str(caught.value) == (
        "wrong.pth does not fit the model. Keys: 1 missing (classifier.conv1_1.bias); "
        "1 unexpected (backbone.0.norm0.extra); "
        "1 of another shape (lang_stage2.proj.weight: (3, 3) instead of (16, 32))."
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_only_the_temperature_may_be_missing(small_model):
    model = small_model()
    state_dict = model.state_dict()
    load_strictly(model, {key: value for key, value in state_dict.items() if key != "temp"}, "a.pth")
    for key in state_dict:
        if key != "temp":
            with pytest.raises(UserError, match="1 missing"):
                load_strictly(model, {name: value for name, value in state_dict.items() if name != key}, "a.pth")
    with pytest.raises(UserError, match=r"temp: \(3,\) instead of \(4,\)"):
        load_strictly(model, {**state_dict, "temp": torch.ones(3)}, "a.pth")


def test_only_the_first_layers_of_bert_are_used(small_model):
    model = small_model(text_layers=6)
    layers = {f"lang_stage1.encoder.layer.{i}.output.dense.bias": torch.zeros(1) for i in range(12)}
    assert list(adapt_to_model(layers, model)) == list(layers)[:6]


def test_bias_tables_of_another_window_are_resized(small_model):
    model = small_model(window_size=6)
    key = "backbone.1.layers.blocks.1.attn.relative_position_bias_table"
    heads = model.get_parameter(key).shape[1]
    # A table that is linear in the offsets stays linear in its center.
    rows, columns = torch.meshgrid(torch.linspace(-3, 3, 7), torch.linspace(-3, 3, 7), indexing="ij")
    table = (rows + 10 * columns).flatten()[:, None].repeat(1, heads)
    resized = adapt_to_model({key: table}, model)[key].reshape(11, 11, heads)
    assert resized[5, 5].abs().max() < 1e-4
    step = 7 / 11
    torch.testing.assert_close(resized[6, 5] - resized[5, 5], torch.full((heads,), step), atol=0, rtol=0.1)
    torch.testing.assert_close(resized[5, 6] - resized[5, 5], torch.full((heads,), 10 * step), atol=0, rtol=0.1)
    fitting = model.state_dict()[key]
    assert torch.equal(adapt_to_model({key: fitting}, model)[key], fitting)


@pytest.mark.parametrize("fusion", ["cross", "vision", "late"])
def test_model_config_is_inferred_from_shapes(small_model, fusion):
    model = small_model(fusion=fusion)
    config = infer_model_config(model.state_dict())
    not_inferred = {"drop_path_rate", "text_dropout", "text_heads", "swin_type"}
    assert {k: v for k, v in config.items() if k not in not_inferred} == {
        k: v for k, v in model.config.items() if k not in not_inferred
    }


@pytest.mark.parametrize("swin_type", SWIN_VARIANTS)
def test_published_models_are_recognized(swin_type):
    with torch.device("meta"):
        model = build_crossvlt(swin_type, drop_path_rate=0.0)
    config = infer_model_config(model.state_dict())
    assert config == {k: v for k, v in model.config.items() if k not in ("drop_path_rate", "text_dropout")}
