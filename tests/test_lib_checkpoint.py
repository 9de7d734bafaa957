"""Checkpoint files: every form users have, strict loading, pretrained files, safe loading and saving."""

import argparse
import os
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL
from safetensors.torch import save_file

from CrossVLT import build_crossvlt
from lib.checkpoint import (
    bert_to_crossvlt,
    describe,
    infer_model_config,
    load_pretrained,
    load_weights,
    read_checkpoint,
    rebuild,
    save_checkpoint,
    swin_to_crossvlt,
)
from lib.errors import MissingFileError, UserError
from lib.variants import SWIN_VARIANTS


def with_index_buffers(model):
    """The state dict as the released files have it: with the index buffers."""
    state_dict = model.state_dict()
    for name, module in model.named_modules():
        if hasattr(module, "relative_position_index"):
            state_dict[f"{name}.relative_position_index"] = module.relative_position_index
    return state_dict


def randomized(model):
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return model


def released_form(model, form):
    state_dict = with_index_buffers(model)
    if form.startswith("inference"):
        del state_dict["temp"]
    if form.endswith("module"):
        state_dict = {f"module.{key}": value for key, value in state_dict.items()}
    if form.startswith("training"):
        args = argparse.Namespace(dataset="refcoco", lr=3e-5, window12=True)
        return {"model": state_dict, "epoch": 12, "args": args, "best_oIoU": 73.44}
    return state_dict


@pytest.mark.parametrize("form", ["inference", "training", "inference module", "training module"])
def test_every_form_loads(tmp_path, small_model, form):
    source, target = randomized(small_model()), small_model()
    torch.save(released_form(source, form), tmp_path / "best_refcoco.pth")
    checkpoint = load_weights(target, tmp_path / "best_refcoco.pth")
    for key, value in source.state_dict().items():
        if key != "temp":
            assert torch.equal(target.state_dict()[key], value), key
    if form.startswith("training"):
        assert torch.equal(target.temp, source.temp)
        assert (checkpoint.form, checkpoint.extra["epoch"]) == ("released training", 12)
    else:
        assert torch.equal(target.temp, torch.ones(4))  # stays as it starts
        assert checkpoint.form == "inference"
    assert checkpoint.prefixed == form.endswith("module")


def test_prefix_can_be_insisted_on(tmp_path, small_model):
    torch.save(released_form(small_model(), "inference"), tmp_path / "plain.pth")
    torch.save(released_form(small_model(), "inference module"), tmp_path / "ddp.pth")
    read_checkpoint(tmp_path / "ddp.pth").check_prefix(True)
    with pytest.raises(UserError, match=r"ddp_trained_weights.*plain\.pth"):
        read_checkpoint(tmp_path / "plain.pth").check_prefix(True)


def test_strictness_names_keys(tmp_path, small_model):
    state_dict = released_form(small_model(), "inference")
    del state_dict["classifier.conv1_1.bias"]
    state_dict["backbone.0.norm0.extra"] = torch.zeros(1)
    state_dict["lang_stage2.proj.weight"] = torch.zeros(3, 3)
    torch.save(state_dict, tmp_path / "wrong.pth")
    model = small_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_weights(model, tmp_path / "wrong.pth")
    for told in (
        "wrong.pth", "1 missing (classifier.conv1_1.bias)", "1 unexpected (backbone.0.norm0.extra)",
        "lang_stage2.proj.weight (3, 3) for (16, 32)",
    ):  # fmt: skip
        assert told in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Foreign:
    def __reduce__(self):
        return (os.system, ("touch foreign_code_ran",))


def test_foreign_classes_are_refused_and_do_not_run(tmp_path, small_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": small_model().state_dict(), "args": Foreign()}, "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth refused.*system"):
        read_checkpoint("evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Foreign()))
    with pytest.raises(UserError, match=r"plain\.pth"):
        read_checkpoint("plain.pth")
    assert not (tmp_path / "foreign_code_ran").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"\xff\xd8\xff\xe0 a picture", b"PK\x03\x04" + bytes(100)])
def test_torn_and_foreign_files_are_refused_by_name(tmp_path, content):
    (tmp_path / "torn.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"torn\.pth is torn or not a PyTorch file") as caught:
        read_checkpoint(tmp_path / "torn.pth")
    assert "weights_only" not in str(caught.value)  # PyTorch's advice to run what is in the file


def test_truncated_file(tmp_path, small_model):
    torch.save(small_model().state_dict(), tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"half\.pth is torn"):
        read_checkpoint(tmp_path / "half.pth")


def test_missing_file_and_other_content(tmp_path):
    with pytest.raises(MissingFileError, match=r"no checkpoint file .*nowhere\.pth"):
        read_checkpoint(tmp_path / "nowhere.pth")
    with pytest.raises(MissingFileError, match="is a folder"):
        read_checkpoint(tmp_path)
    for content in ([1, 2], {"model": {"a": 1}}, {}, {"weight": 3}):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(UserError, match="not a checkpoint of a CrossVLT"):
            read_checkpoint(tmp_path / "other.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="keys or shapes don't fit"):
        _ = read_checkpoint(tmp_path / "other.pth").model_config


@pytest.mark.parametrize("fusion", ["cross", "vision", "late"])
def test_model_config_is_read_off_the_shapes(small_model, fusion):
    model = small_model(fusion=fusion)
    config = infer_model_config(model.state_dict())
    unseen = {"drop_path_rate", "text_dropout", "text_heads", "swin_type"}
    assert {k: v for k, v in config.items() if k not in unseen} == {
        k: v for k, v in model.config.items() if k not in unseen
    }


@pytest.mark.parametrize("swin_type", SWIN_VARIANTS)
def test_published_types_are_recognised(swin_type):
    with torch.device("meta"):
        model = build_crossvlt(swin_type, drop_path_rate=0.0)
    config = infer_model_config(model.state_dict())
    assert config == {k: v for k, v in model.config.items() if k not in ("drop_path_rate", "text_dropout")}


def swin_file(model, path, window=None):
    """An ImageNet file of the official repository, made from a model's own shapes."""
    state_dict = {}
    for key, value in with_index_buffers(model).items():
        if key.startswith("backbone.0.patch_embed."):
            state_dict[key.removeprefix("backbone.0.")] = value
        elif key.startswith("backbone.") and (".blocks." in key or ".downsample." in key):
            stage, rest = key.removeprefix("backbone.").split(".layers.")
            state_dict[f"layers.{stage}.{rest}"] = value
    state_dict["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    for name, shape in (("norm.weight", 8), ("norm.bias", 8), ("head.weight", (10, 8)), ("head.bias", 10)):
        state_dict[name] = torch.zeros(shape)
    torch.save({"model": state_dict}, path)
    return path


def test_swin_initialises_the_vision_blocks_only(tmp_path, small_model):
    source, target = randomized(small_model()), small_model()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    load_pretrained(target, swin=swin_file(source, tmp_path / "swin.pth"))
    loaded = set(swin_to_crossvlt(torch.load(tmp_path / "swin.pth")["model"]))
    assert "backbone.2.layers.downsample.reduction.weight" in loaded
    for key, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[key] if key in loaded else before[key]), key


def test_bias_tables_of_another_window_are_resized(tmp_path, small_model):
    source, target = small_model(window_size=4), small_model(window_size=6)
    name = "backbone.1.layers.blocks.1.attn.relative_position_bias_table"
    # A table that is linear in the offsets: a good resize keeps it so in the middle.
    rows, columns = torch.meshgrid(torch.linspace(-3, 3, 7), torch.linspace(-3, 3, 7), indexing="ij")
    heads = source.get_parameter(name).shape[1]
    source.get_parameter(name).data = (rows + 10 * columns).flatten()[:, None].repeat(1, heads)
    load_pretrained(target, swin=swin_file(source, tmp_path / "swin.pth"))
    table = target.get_parameter(name).detach().reshape(11, 11, heads)
    assert table[5, 5].abs().max() < 1e-4
    step = 7 / 11
    torch.testing.assert_close(table[6, 5] - table[5, 5], torch.full((heads,), step), atol=0, rtol=0.1)
    torch.testing.assert_close(table[5, 6] - table[5, 5], torch.full((heads,), 10 * step), atol=0, rtol=0.1)


def bert_file(model, path, *, prefix="bert.", old=False, extra_layers=1):
    state_dict = {}
    for key, value in model.state_dict().items():
        if key.startswith(("lang_stage1.embeddings.", "lang_stage1.encoder.layer.")):
            name = key.removeprefix("lang_stage1.")
            if old:
                name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            state_dict[prefix + name] = value.contiguous()
    count = len(model.lang_stage1.encoder.layer)
    for layer in range(count, count + extra_layers):
        state_dict[f"{prefix}encoder.layer.{layer}.output.dense.bias"] = torch.zeros(3)
    state_dict |= {
        f"{prefix}pooler.dense.weight": torch.zeros(2), f"{prefix}embeddings.position_ids": torch.zeros(1, 512),
        "cls.predictions.bias": torch.zeros(5), "cls.predictions.transform.LayerNorm.gamma": torch.zeros(5),
    }  # fmt: skip
    save_file(state_dict, path) if path.suffix == ".safetensors" else torch.save(state_dict, path)
    return path


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("prefix", ["bert.", ""])
@pytest.mark.parametrize("old", [True, False])
def test_bert_initialises_stage_1(tmp_path, small_model, suffix, prefix, old):
    source, target = randomized(small_model()), small_model()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    load_pretrained(target, bert=bert_file(source, tmp_path / f"bert{suffix}", prefix=prefix, old=old))
    for key, value in target.state_dict().items():
        from_bert = key.startswith(("lang_stage1.embeddings.", "lang_stage1.encoder.layer."))
        assert torch.equal(value, source.state_dict()[key] if from_bert else before[key]), key


def test_wrong_pretrained_files_are_refused(tmp_path, small_model):
    with pytest.raises(UserError, match=r"swin\.pth is not the Swin file for this model: .*missing.*backbone\.2"):
        load_pretrained(small_model(depths=(1, 2, 2, 1)), swin=swin_file(small_model(), tmp_path / "swin.pth"))
    with pytest.raises(UserError, match=r"bert\.bin is not the BERT file.*word_embeddings\.weight \(60, 32\) for \(99"):
        load_pretrained(small_model(vocab_size=99), bert=bert_file(small_model(), tmp_path / "bert.bin"))
    with pytest.raises(UserError, match=r"swin\.pth is not a BERT file: no state dict"):
        load_pretrained(small_model(), bert=tmp_path / "swin.pth")
    torch.save({"something.else": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"missing .*1 unexpected \(lang_stage1\.something\.else\)"):
        load_pretrained(small_model(), bert=tmp_path / "other.pth")
    with pytest.raises(MissingFileError, match=r"nowhere\.pth"):
        load_pretrained(small_model(), swin=tmp_path / "nowhere.pth")


def test_only_the_first_layers_of_bert_are_taken():
    names = bert_to_crossvlt({f"bert.encoder.layer.{i}.output.dense.bias": torch.zeros(1) for i in range(12)}, 6)
    assert list(names) == [f"lang_stage1.encoder.layer.{i}.output.dense.bias" for i in range(6)]


def test_describe_needs_only_the_file(tmp_path, small_model):
    torch.save(released_form(small_model(), "training module"), tmp_path / "trained.pth")
    done = subprocess.run(
        [sys.executable, "-m", "lib.checkpoint", tmp_path / "trained.pth"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.replace("Swin type", "Swin").splitlines())
    assert lines["form"] == "released training, keys prefixed with module."
    assert (lines["window"], lines["epoch"]) == ("4", "12")
    assert lines["temp"] == "1.0000 1.0000 1.0000 1.0000"
    assert "73.44" in done.stdout
    missing = subprocess.run(
        [sys.executable, "-m", "lib.checkpoint", "nowhere.pth"], cwd=ROOT, capture_output=True, text=True
    )
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr.strip() == "error: no checkpoint file nowhere.pth"


def test_own_checkpoints_say_all(tmp_path, small_model):
    model = small_model(fusion="late")
    save_checkpoint(tmp_path / "last.pth", {"model": model.state_dict(), "model_config": model.config, "epoch": 3})
    checkpoint = read_checkpoint(tmp_path / "last.pth")
    assert checkpoint.form == "training"
    assert checkpoint.model_config == model.config
    again = rebuild(checkpoint, build_crossvlt)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert "late" in describe(checkpoint)
    checkpoint.extra["model_config"] = {**model.config, "fusion": "early"}
    with pytest.raises(UserError, match=r"last\.pth: its model_config can't be built"):
        rebuild(checkpoint, build_crossvlt)
    assert SMALL["window_size"] == checkpoint.model_config["window_size"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "last.pth", {"epoch": 1})
    good = (tmp_path / "last.pth").read_bytes()

    def full_disk(content, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match=r"can't write .*last\.pth: No space left"):
        save_checkpoint(tmp_path / "last.pth", {"epoch": 2})
    assert (tmp_path / "last.pth").read_bytes() == good

    def full_disk_as_pytorch_says_it(content, path):
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 9322560 vs 9322448")

    monkeypatch.setattr(torch, "save", full_disk_as_pytorch_says_it)
    with pytest.raises(UserError, match=r"can't write .*last\.pth: is the disk full\?"):
        save_checkpoint(tmp_path / "last.pth", {"epoch": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["last.pth"]
