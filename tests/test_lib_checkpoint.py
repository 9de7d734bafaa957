"""Checkpoint files: all supported forms, pretrained files, safe loading and saving."""

import argparse
import os
import pickle
import re

import pytest
import torch
from commands import run_in_process
from safetensors.torch import save_file

from CrossVLT import build_crossvlt
from lib.checkpoint import describe, load_pretrained, load_weights, main, read_checkpoint, rebuild, save_checkpoint
from lib.errors import MissingFileError, UserError
from lib.state_dict import repair_keys
from lib.variants import RELEASED_HINT


def with_index_buffers(model):
    """Return the state dict with index buffers, as in the released files."""
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
def test_all_forms_can_be_loaded(tmp_path, small_model, form):
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
        assert torch.equal(target.temp, torch.ones(4))  # keeps its initial value
        assert checkpoint.form == "inference"
    assert checkpoint.prefixed == form.endswith("module")


def test_a_missing_prefix_is_reported_if_expected(tmp_path, small_model):
    torch.save(released_form(small_model(), "inference"), tmp_path / "plain.pth")
    torch.save(released_form(small_model(), "inference module"), tmp_path / "ddp.pth")
    read_checkpoint(tmp_path / "ddp.pth").check_prefix(True)
    with pytest.raises(UserError, match=r"ddp_trained_weights.*plain\.pth"):
        read_checkpoint(tmp_path / "plain.pth").check_prefix(True)


class Malicious:
    def __reduce__(self):
        return (os.system, ("touch malicious_code_ran",))


def test_code_in_files_is_rejected_and_not_executed(tmp_path, small_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": small_model().state_dict(), "args": Malicious()}, "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth is rejected.*system"):
        read_checkpoint("evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(UserError, match=r"plain\.pth"):
        read_checkpoint("plain.pth")
    assert not (tmp_path / "malicious_code_ran").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"\xff\xd8\xff\xe0 an image", b"PK\x03\x04" + bytes(100)])
def test_corrupt_and_other_files_are_rejected(tmp_path, content):
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.pth is corrupt or not a PyTorch file") as caught:
        read_checkpoint(tmp_path / "bad.pth")
    assert "weights_only" not in str(caught.value)  # PyTorch recommends disabling it


def test_truncated_files_are_rejected(tmp_path, small_model):
    torch.save(small_model().state_dict(), tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"half\.pth is corrupt"):
        read_checkpoint(tmp_path / "half.pth")


def test_missing_files_and_files_without_a_model_are_rejected(tmp_path):
    with pytest.raises(MissingFileError, match=r"Checkpoint file .*nowhere\.pth does not exist"):
        read_checkpoint(tmp_path / "nowhere.pth")
    with pytest.raises(MissingFileError, match="is a folder"):
        read_checkpoint(tmp_path)
    for content in ([1, 2], {"model": {"a": 1}}, {}, {"weight": 3}):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(UserError, match="contains no state dict of tensors"):
            read_checkpoint(tmp_path / "other.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="keys or shapes do not fit"):
        _ = read_checkpoint(tmp_path / "other.pth").model_config


def swin_file(model, path):
    """Write the weights of a model as an ImageNet file of the official Swin repository."""
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


def test_a_swin_file_initializes_the_swin_blocks_only(tmp_path, small_model):
    source, target = randomized(small_model()), small_model()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    load_pretrained(target, swin=swin_file(source, tmp_path / "swin.pth"))
    loaded = set(repair_keys(torch.load(tmp_path / "swin.pth")["model"]))
    assert "backbone.2.layers.downsample.reduction.weight" in loaded
    for key, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[key] if key in loaded else before[key]), key


def bert_file(model, path, *, prefix="bert.", original_names=False, extra_layers=1):
    """Write stage 1 of a model as a BERT file, with more layers than the model has."""
    state_dict = {}
    for key, value in model.state_dict().items():
        if key.startswith(("lang_stage1.embeddings.", "lang_stage1.encoder.layer.")):
            name = key.removeprefix("lang_stage1.")
            if original_names:
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
@pytest.mark.parametrize("original_names", [True, False])
def test_a_bert_file_initializes_language_stage_1_only(tmp_path, small_model, suffix, prefix, original_names):
    source, target = randomized(small_model()), small_model()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    load_pretrained(
        target, bert=bert_file(source, tmp_path / f"bert{suffix}", prefix=prefix, original_names=original_names)
    )
    for key, value in target.state_dict().items():
        from_bert = key.startswith(("lang_stage1.embeddings.", "lang_stage1.encoder.layer."))
        assert torch.equal(value, source.state_dict()[key] if from_bert else before[key]), key


def test_a_swin_file_of_another_window_is_resized(tmp_path, small_model):
    source, target = randomized(small_model(window_size=4)), small_model(window_size=6)
    load_pretrained(target, swin=swin_file(source, tmp_path / "swin.pth"))
    table = "backbone.1.layers.blocks.1.attn.relative_position_bias_table"
    assert target.get_parameter(table).min() > 0.4
    bias = "backbone.0.patch_embed.proj.bias"
    assert torch.equal(target.get_parameter(bias), source.get_parameter(bias))


def test_pretrained_files_of_another_model_are_rejected(tmp_path, small_model):
    swin, bert = swin_file(small_model(), tmp_path / "swin.pth"), bert_file(small_model(), tmp_path / "bert.bin")
    with pytest.raises(UserError, match=r"Swin file .*swin\.pth does not fit the model.*missing.*backbone\.2"):
        load_pretrained(small_model(depths=(1, 2, 2, 1)), swin=swin)
    with pytest.raises(UserError, match=r"BERT file .*bert\.bin .*embeddings\.weight: \(60, 32\) instead of \(99,"):
        load_pretrained(small_model(vocab_size=99), bert=bert)
    with pytest.raises(UserError, match=r"BERT file .*swin\.pth does not fit the model.*missing.*unexpected"):
        load_pretrained(small_model(), bert=swin)
    torch.save({"something.else": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"missing .*1 unexpected \(something\.else\)"):
        load_pretrained(small_model(), bert=tmp_path / "other.pth")
    with pytest.raises(MissingFileError, match=r"nowhere\.pth"):
        load_pretrained(small_model(), swin=tmp_path / "nowhere.pth")


def test_the_command_describes_a_file(tmp_path, small_model, monkeypatch, capsys):
    torch.save(released_form(small_model(), "training module"), tmp_path / "trained.pth")
    finished = run_in_process(main, ["lib.checkpoint", tmp_path / "trained.pth"], monkeypatch, capsys)
    assert finished.status == 0, finished.err
    lines = {line[:10].strip(): line[11:] for line in finished.out.splitlines()}
    assert lines["form"] == "released training, keys prefixed with module."
    assert (lines["window"], lines["fusion"], lines["epoch"]) == ("4", "cross", "12")
    assert (lines["temp"], lines["best oIoU"]) == ("1.0000 1.0000 1.0000 1.0000", "73.44")
    missing = run_in_process(main, ["lib.checkpoint", "nowhere.pth"], monkeypatch, capsys)
    assert missing == (2, "", f"error: nowhere.pth: no such file or folder. {RELEASED_HINT}\n")


def test_a_saved_checkpoint_can_be_rebuilt_and_described(tmp_path, small_model):
    model = small_model(fusion="late")
    save_checkpoint(tmp_path / "last.pth", {"model": model.state_dict(), "model_config": model.config, "epoch": 3})
    checkpoint = read_checkpoint(tmp_path / "last.pth")
    assert checkpoint.form == "training"
    assert checkpoint.model_config == model.config
    rebuilt = rebuild(checkpoint, build_crossvlt)
    assert all(torch.equal(value, rebuilt.state_dict()[key]) for key, value in model.state_dict().items())
    assert "fusion     late" in describe(checkpoint)
    checkpoint.extra["model_config"] = {**model.config, "fusion": "early"}
    with pytest.raises(UserError, match=r"last\.pth: cannot build a model from its model_config: fusion must"):
        rebuild(checkpoint, build_crossvlt)
    checkpoint.extra["model_config"] = {"hidden_size": 3}
    with pytest.raises(UserError, match=r"last\.pth is not a checkpoint of CrossVLT"):
        rebuild(checkpoint, build_crossvlt)


def test_a_flipped_bit_in_a_saved_checkpoint_is_detected(tmp_path):
    weight = torch.full((1000,), 1.5)
    save_checkpoint(tmp_path / "last.pth", {"model": {"weight": weight}, "model_config": {}})
    content = bytearray((tmp_path / "last.pth").read_bytes())
    content[content.index(weight.numpy().tobytes()) + 2] ^= 1
    (tmp_path / "last.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"last\.pth is corrupt: wrong checksum of its entry .*data/0"):
        read_checkpoint(tmp_path / "last.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weight: weight.flatten()[0].fill_(float("nan")), r"1 NaN or infinite \(backbone\.0\.norm0\.weight\)"),
        (lambda weight: weight.flatten()[0].fill_(-float("inf")), r"1 NaN or infinite \(backbone\.0\.norm0\.weight\)"),
        (lambda weight: weight.to(torch.int8), r"1 not floating-point \(backbone\.0\.norm0\.weight: torch\.int8\)"),
        (lambda weight: weight.bool(), r"1 not floating-point \(backbone\.0\.norm0\.weight: torch\.bool\)"),
    ],
)  # fmt: skip
def test_unusable_weights_are_named(tmp_path, small_model, monkeypatch, capsys, change, message):
    model = small_model()
    state_dict = {key: value.clone() for key, value in model.state_dict().items()}
    changed = change(state_dict["backbone.0.norm0.weight"])
    if not changed.is_floating_point():
        state_dict["backbone.0.norm0.weight"] = changed
    path = tmp_path / "bad.pth"
    save_checkpoint(path, {"model": state_dict, "model_config": model.config})
    with pytest.raises(UserError, match=rf"bad\.pth has unusable weights: {message}\.$"):
        load_weights(model, path)
    with pytest.raises(UserError, match=message):
        rebuild(read_checkpoint(path), build_crossvlt)
    described = run_in_process(main, ["lib.checkpoint", path], monkeypatch, capsys)
    assert re.search(rf"^weights    {message}$", described.out, re.MULTILINE)


def test_half_precision_weights_can_be_loaded(tmp_path, small_model):
    torch.save({key: value.half() for key, value in small_model().state_dict().items()}, tmp_path / "half.pth")
    load_weights(small_model(), tmp_path / "half.pth")


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse_coo"),
        (lambda: torch.eye(3).to_sparse_csr(), "sparse_csr"),
        (lambda: torch.zeros(3, device="meta"), "without values"),
    ],
)
def test_tensors_of_other_kinds_are_rejected(tmp_path, tensor, kind):
    weight = {"model": {"weight": torch.zeros(3)}}
    for content, name in (
        ({"weight": tensor()}, "weight"),
        ({**weight, "optimizer": {"state": {0: [tensor()]}}}, r"optimizer\.state\.0\.0"),
    ):
        torch.save(content, tmp_path / "other.pth")
        message = rf"other\.pth is rejected: its entry {name} is a tensor of an unsupported kind \({kind}\)\.$"
        with pytest.raises(UserError, match=message):
            read_checkpoint(tmp_path / "other.pth")


def test_a_list_that_contains_itself_can_be_read(tmp_path):
    recursive = []
    recursive.append(recursive)
    torch.save({"model": {"weight": torch.zeros(3)}, "metrics": recursive}, tmp_path / "recursive.pth")
    assert read_checkpoint(tmp_path / "recursive.pth").state_dict["weight"].shape == (3,)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("depths", 1e9), ("depths", [10**9] * 4), ("depths", [1, -2, 1, 1]), ("depths", "1111"), ("embed_dim", -32),
        ("embed_dim", 10**12), ("num_heads", []), ("window_size", 10**9), ("text_dim", 1.5), ("text_layers", 10**9),
        ("vocab_size", -1), ("align_dim", {}), ("embed_dim", torch.zeros(3)),
    ],
)  # fmt: skip
def test_a_model_config_that_contradicts_the_weights_is_rejected(tmp_path, small_model, name, value):
    model = small_model()
    torch.save({"model": model.state_dict(), "model_config": {**model.config, name: value}}, tmp_path / "last.pth")
    with pytest.raises(UserError, match=rf"last\.pth is corrupt: its model_config has {name} .*, but its weights have"):
        rebuild(read_checkpoint(tmp_path / "last.pth"), build_crossvlt)


@pytest.mark.parametrize(
    ("name", "value"),
    [("text_heads", -2), ("text_heads", None), ("drop_path_rate", -1.0), ("text_dropout", float("nan")),
     ("fusion", []), ("swin_type", 3), ("drop_path_rate", "0.3")],
)  # fmt: skip
def test_a_model_config_with_other_wrong_values_is_rejected(tmp_path, small_model, name, value):
    model = small_model()
    torch.save({"model": model.state_dict(), "model_config": {**model.config, name: value}}, tmp_path / "last.pth")
    with pytest.raises(UserError, match=r"last\.pth: cannot build a model from its model_config: "):
        rebuild(read_checkpoint(tmp_path / "last.pth"), build_crossvlt)


def test_other_errors_while_saving_are_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    def fail(content, path):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match=r"killed by signal"):
        save_checkpoint(tmp_path / "last.pth", {"epoch": 2})


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "last.pth", {"epoch": 1})
    before = (tmp_path / "last.pth").read_bytes()

    def full_disk(content, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    def full_disk_in_pytorch(content, path):
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 9322560 vs 9322448")

    for save, message in ((full_disk, "No space left on device"), (full_disk_in_pytorch, "Is the disk full?")):
        monkeypatch.setattr(torch, "save", save)
        with pytest.raises(UserError) as caught:
            save_checkpoint(tmp_path / "last.pth", {"epoch": 2})
        assert str(caught.value).startswith(f"Cannot write {tmp_path}/last.pth")
        assert message in str(caught.value)
        assert (tmp_path / "last.pth").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["last.pth"]
