"""Files of LAVT: the released forms, pretrained encoders, and runs of train.py and test.py."""

import argparse
import json
import shutil

import pytest
import torch
from conftest import SMALL
from golden_cases import set_golden_weights
from PIL import Image
from test_lib_checkpoint import bert_file, swin_file, with_index_buffers

from lib.checkpoint import describe, load_pretrained, load_weights, read_checkpoint, rebuild, save_checkpoint
from lib.errors import UserError
from lib.report.published import TABLES, choose_rows, find_checkpoints
from lib.report.results import read_results
from lib.rivals.lavt import build_lavt
from lib.state_dict import join_bert

SIZES = {name: size for name, size in SMALL.items() if name != "align_dim"}
# Options of the published training script, with the names and the types that argparse gives them.
OPTIONS = {
    "amsgrad": True, "batch_size": 8, "bert_tokenizer": "bert-base-uncased", "ck_bert": "bert-base-uncased",
    "dataset": "refcoco", "ddp_trained_weights": False, "device": "cuda:0", "epochs": 40, "fusion_drop": 0.0,
    "img_size": 480, "local_rank": 0, "lr": 5e-5, "mha": "", "model": "lavt", "model_id": "refcoco",
    "output_dir": "./checkpoints/", "pin_mem": True, "pretrained_swin_weights": "", "print_freq": 10,
    "refer_data_root": "./refer/data/", "resume": "", "split": "test", "splitBy": "unc", "swin_type": "base",
    "weight_decay": 0.01, "window12": True, "workers": 8,
}  # fmt: skip
PREFIX = "text_encoder."


def small_lavt(**changes):
    torch.manual_seed(0)
    return set_golden_weights(build_lavt("tiny", **{**SIZES, **changes})).eval()


def released(path, model, form, *, prefix="", extra_bert=(), **options):
    """Write a file as the published training does."""
    state_dict = with_index_buffers(model)
    bert = {key.removeprefix(PREFIX): value for key, value in state_dict.items() if key.startswith(PREFIX)}
    bert |= dict(extra_bert)
    if form == "lavt":
        parts = {"model": {key: value for key, value in state_dict.items() if not key.startswith(PREFIX)}}
        parts["bert_model"] = bert
    else:
        parts = {"model": state_dict | {PREFIX + key: value for key, value in bert.items()}}
    parts = {name: {prefix + key: value for key, value in part.items()} for name, part in parts.items()}
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / 10) ** 0.9)
    args = argparse.Namespace(**{**OPTIONS, "model": form, **options})
    state = {"optimizer": optimizer.state_dict(), "lr_scheduler": schedule.state_dict(), "epoch": 39, "args": args}
    torch.save({**parts, **state}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("form", ["lavt", "lavt_one"])
def test_both_released_forms_load(tmp_path, small_inputs, form, prefix):
    model, inputs = small_lavt(mha="1-2-4-8"), small_inputs()[:3]
    unused = {"pooler.dense.weight": torch.ones(3, 3), "pooler.dense.bias": torch.ones(3),
              "embeddings.position_ids": torch.arange(5)[None]}  # fmt: skip
    path = released(tmp_path / "refcoco.pth", model, form, prefix=prefix, extra_bert=unused, mha="1-2-4-8")
    checkpoint = read_checkpoint(path)
    assert (checkpoint.form, checkpoint.model_name, checkpoint.prefixed) == ("released training", form, bool(prefix))
    assert checkpoint.state_dict.keys() == model.state_dict().keys()
    assert not checkpoint.is_resumable
    rebuilt = rebuild(checkpoint).eval()
    sizes = ("window_size", "embed_dim", "depths", "num_heads", "text_dim", "text_layers", "vocab_size", "mha")
    assert {name: rebuilt.config[name] for name in sizes} == {name: model.config[name] for name in sizes}
    with torch.inference_mode():
        # The heads of BERT are visible in no shape; those of a small BERT are not 64 wide.
        found = rebuild(checkpoint, lambda **config: build_lavt(**{**config, "text_heads": 2})).eval()(*inputs)
        torch.testing.assert_close(found.mask_logits, model(*inputs).mask_logits, atol=1e-5, rtol=0)
    text = describe(checkpoint)
    for line in ("model      LAVT", "form       released training", "fusion     1-2-4-8 heads", "epoch      39"):
        assert line in text


def test_the_key_map_of_the_earlier_form():
    one, two = torch.zeros(1), torch.ones(1)
    joined = join_bert({"backbone.norm0.bias": one}, {"encoder.layer.0.output.dense.bias": two})
    assert joined == {"backbone.norm0.bias": one, "text_encoder.encoder.layer.0.output.dense.bias": two}


def test_the_heads_default_to_one_and_must_fit(tmp_path):
    model = small_lavt()
    assert read_checkpoint(released(tmp_path / "a.pth", model, "lavt")).model_config["mha"] == "1-1-1-1"
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    assert read_checkpoint(tmp_path / "bare.pth").model_config["mha"] == "1-1-1-1"
    with pytest.raises(UserError, match=r"cannot build a model from its model_config: mha 1-1-1-5"):
        rebuild(read_checkpoint(released(tmp_path / "b.pth", model, "lavt", mha="1-1-1-5")))


@pytest.mark.parametrize("key", ["foo.weight", "cls.predictions.bias", "encoder.layer.0.foo", "norm.weight"])
@pytest.mark.parametrize("form", ["lavt", "lavt_one"])
def test_unknown_keys_are_an_error(tmp_path, form, key):
    path = released(tmp_path / "a.pth", small_lavt(), form, extra_bert={key: torch.ones(1)})
    with pytest.raises(UserError, match=rf"a\.pth does not fit the model\. Keys: 1 unexpected \({PREFIX}{key}\)"):
        rebuild(read_checkpoint(path))


def test_files_of_another_network_are_refused_by_name(tmp_path, small_model):
    for form, message in (
        ("lavt", r"lavt\.pth is a checkpoint of LAVT, not of CrossVLT\. Use it\."),
        ("lavt_one", r"lavt_one\.pth is a checkpoint of LAVT, not of CrossVLT"),
    ):
        checkpoint = read_checkpoint(released(tmp_path / f"{form}.pth", small_lavt(), form))
        for name in ("lavt", "lavt_one"):
            checkpoint.check_network(name, hint="")
        with pytest.raises(UserError, match=message):
            checkpoint.check_network("crossvlt", hint="Use it.")
    torch.save(small_model().state_dict(), tmp_path / "c.pth")
    for name in ("lavt", "lavt_one"):
        with pytest.raises(UserError, match=r"c\.pth is a checkpoint of CrossVLT, not of LAVT"):
            read_checkpoint(tmp_path / "c.pth").check_network(name, hint="")
    with pytest.raises(UserError, match=r"c\.pth is a checkpoint of CrossVLT, not of LAVT"):
        load_weights(small_lavt(), tmp_path / "c.pth")
    save_checkpoint(tmp_path / "d.pth", {"model": small_model().state_dict(), "model_config": {}, "model_name": "lavt"})
    with pytest.raises(UserError, match=r"model_name is 'lavt', but its weights are those of CrossVLT"):
        _ = read_checkpoint(tmp_path / "d.pth").model_config


def test_pretrained_files_initialize_swin_and_bert(tmp_path, small_model):
    """The files are those from which CrossVLT starts. Bias tables are resized to the window."""
    source, model = set_golden_weights(small_model(window_size=6)), small_lavt(window_size=4)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    load_pretrained(model, swin_file(source, tmp_path / "swin.pth"), bert_file(source, tmp_path / "bert.bin"))
    for key, value in source.state_dict().items():
        if key.startswith(("lang_stage1.embeddings.", "lang_stage1.encoder.layer.")):
            expected[key.replace("lang_stage1.", PREFIX)] = value
        elif ".blocks." in key or ".downsample." in key:
            _, stage, _, rest = key.split(".", 3)
            expected[f"backbone.layers.{stage}.{rest}"] = value
        elif ".patch_embed." in key:
            expected[key.replace("backbone.0.", "backbone.")] = value
    assert expected.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        if key.endswith("relative_position_bias_table"):
            assert value.shape[0] == 49
            assert value.std() == pytest.approx(expected[key].std(), rel=0.5)
        else:
            assert torch.equal(value, expected[key]), key


@pytest.fixture(scope="module")
def lavt_config(small_config, tmp_path_factory):
    """A YAML file of a LAVT that trains in seconds on the small RefShapes dataset."""
    path = tmp_path_factory.mktemp("config") / "lavt.yaml"
    path.write_text(f"_BASE_: {small_config}\nMODEL: {{NAME: lavt, MHA: 1-1-2-2, TEXT_LAYERS: 2, TEXT_HEADS: 1}}\n")
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return folder, ("--output-dir", folder / "checkpoints", "--log_dir", folder / "models", "--model_id", "run")


def test_a_resumed_run_equals_an_uninterrupted_one(lavt_config, folders, run_here):
    """In bf16 and with gradient checkpointing."""
    flags = ["--steps", 6, "--save_steps", 1, "--keep", 9, "--amp", "bf16", "--grad_checkpoint", *folders[1]]
    run_here("train.py", "--cfg", lavt_config, *flags, check=True)
    run = folders[0] / "checkpoints" / "run"
    end = torch.load(run / "last.pth", weights_only=True)
    assert (end["model_name"], end["model_config"]["mha"]) == ("lavt", "1-1-2-2")
    assert (end["config"]["DATA.MAX_TOKENS"], end["config"]["MODEL.TEXT_DROPOUT"]) == (20, 0.0)
    assert (end["config"]["TRAIN.SEGMENTATION_WEIGHT"], end["config"]["TRAIN.ALIGNMENT"]) == (1.0, False)
    for path in [run / "last.pth", *run.glob("step_*")]:
        if path.name == "last.pth" or int(path.name[5:13]) > 3:
            path.unlink()
    run_here("train.py", "--cfg", lavt_config, *flags, "--auto_resume", check=True)
    resumed = torch.load(run / "last.pth", weights_only=True)
    assert all(torch.equal(value, resumed["model"][key]) for key, value in end["model"].items())
    failed = run_here("train.py", "--model", "crossvlt", "--resume", run / "last.pth", "--steps", 7, *folders[1][:4])
    assert "MODEL.NAME is 'lavt' in its recipe, not 'crossvlt'" in failed.err


def test_evaluation_of_a_released_file(lavt_config, small_config, folders, run_here, tmp_path):
    """test.py recognizes the network by its keys, and chooses LAVT's protocol."""
    trained = rebuild(read_checkpoint(folders[0] / "checkpoints" / "run" / "best.pth"))
    metrics = read_checkpoint(folders[0] / "checkpoints" / "run" / "best.pth").extra["metrics"]
    path = released(tmp_path / "refcoco.pth", trained, "lavt", mha="1-1-2-2")
    cfg = tmp_path / "test.yaml"  # without the network's sizes, which are read from the file
    data = small_config.read_text().splitlines()[1]
    cfg.write_text(f"{data}\nBATCH_SIZE: 4\nWORKERS: 0\nDEVICE: cpu\n")
    outputs = ["--json", tmp_path / "out.json", "--predictions", tmp_path / "out.jsonl", "--vis", tmp_path / "vis"]
    run_here("test.py", "--cfg", cfg, "--resume", path, *outputs, "--vis_num", 1, check=True)
    result = json.loads((tmp_path / "out.json").read_text())[0]
    assert result["protocol"] == "lavt"
    assert {name: result["metrics"][name] for name in metrics} == pytest.approx(metrics, abs=0.02)
    header, _ = read_results(tmp_path / "out.jsonl")
    assert (header["model"], header["window_size"], header["protocols"][0]["max_tokens"]) == ("lavt", 4, 20)
    flags = ["--image", next((tmp_path / "vis").glob("*.png")), "--sentence", "red circle", "--out", tmp_path / "o.png"]
    run_here("test.py", "--cfg", cfg, "--resume", path, "--model", "lavt_one", *flags, check=True)
    assert Image.open(tmp_path / "o_mask.png").size == Image.open(tmp_path / "o.png").size
    for flags, message in (
        (["--model", "crossvlt"], "is a checkpoint of LAVT, not of CrossVLT. Pass --model lavt, or"),
        (["--vis", tmp_path / "maps", "--vis_maps"], "is a checkpoint of LAVT, which has no alignment maps"),
    ):
        failed = run_here("test.py", "--cfg", cfg, "--resume", path, *flags)
        assert failed.status == 2
        assert message in failed.err


def test_lavts_table(folders, refshapes_root, run_here, tmp_path):
    """Rows of LAVT's paper with a checkpoint under its released name; another network's checkpoint is refused."""
    root, source = tmp_path / "data", refshapes_root / "refshapes"
    (root / "images/mscoco/images").mkdir(parents=True)
    (root / "images/mscoco/images/train2014").symlink_to(source / "images")
    (root / "refcocog").mkdir()
    shutil.copy(source / "instances.json", root / "refcocog")
    shutil.copy(source / "refs(unc).p", root / "refcocog" / "refs(google).p")
    trained = rebuild(read_checkpoint(folders[0] / "checkpoints" / "run" / "best.pth"))
    released(tmp_path / "gref_google.pth", trained, "lavt", mha="1-1-2-2")
    flags = ["--checkpoints", tmp_path, "--refer_data_root", root, "--bert_tokenizer", source, "--device", "cpu"]
    flags += ["--table_dir", tmp_path / "table", "-j", 0]
    done = run_here("test.py", "--table", "--model", "lavt", *flags, check=True)
    assert "lavt protocol" in done.out
    assert "paper uses another protocol" not in done.out
    assert "RefCOCO val: no checkpoint for refcoco in" in done.out
    entries = json.loads((tmp_path / "table" / "table.json").read_text())
    measured = [entry for entry in entries if entry["ours"]]
    assert [(entry["title"], entry["protocol"]) for entry in measured] == [("G-Ref (google) val", "lavt")]
    assert measured[0]["difference"]["oIoU"] == measured[0]["ours"]["oIoU"] - 60.50
    (tmp_path / "gref_google.pth").rename(tmp_path / "refcocog.pth")
    failed = run_here("test.py", "--table", *flags)
    assert failed.status == 2
    assert "is a checkpoint of LAVT, not of CrossVLT. Pass --model lavt, or another checkpoint" in failed.err


def test_initial_weights_determine_the_heads(lavt_config, folders, run_here, tmp_path):
    path = released(tmp_path / "a.pth", small_lavt(**rebuilt_sizes(folders), mha="1-2-2-4"), "lavt_one", mha="1-2-2-4")
    flags = ["--init_from", path, "--no-from_scratch", "--steps", 1, *folders[1][:4], "--model_id", "fine-tuned"]
    failed = run_here("train.py", "--cfg", lavt_config, *flags)
    assert (failed.status, "was trained with mha 1-2-2-4, not 1-1-2-2" in failed.err) == (2, True)
    failed = run_here("train.py", "--cfg", lavt_config, "--model", "crossvlt", "--mha", "", *flags)
    assert "is a checkpoint of LAVT, not of CrossVLT. Pass --model lavt_one" in failed.err
    run_here("train.py", "--cfg", lavt_config, "--mha", "", *flags, check=True)
    end = read_checkpoint(folders[0] / "checkpoints" / "fine-tuned" / "last.pth")
    assert end.model_config["mha"] == end.extra["config"]["MODEL.MHA"] == "1-2-2-4"


def rebuilt_sizes(folders):
    """Return the sizes of the trained model."""
    config = read_checkpoint(folders[0] / "checkpoints" / "run" / "best.pth").model_config
    return {name: config[name] for name in SIZES}


def test_rows_of_lavts_table(tmp_path):
    assert [row.title for row in TABLES["lavt"]][-2:] == ["G-Ref (umd) test", "G-Ref (google) val"]
    assert all(row.protocol == "lavt" for row in TABLES["lavt"])
    assert choose_rows("refcocog", "google", None, "lavt")[0].values[-1] == 60.50
    assert choose_rows("refcocog", "google", None, "lavt_one")[0].num_expressions == 9536
    with pytest.raises(UserError, match="--table has no published rows of --model vlt"):
        choose_rows(None, None, None, "vlt")
    for name in ("refcoco", "gref_umd", "gref_google"):
        (tmp_path / f"{name}.pth").touch()
    found = {name: path.name for name, path in find_checkpoints(tmp_path, "lavt").items()}
    assert found == {"refcoco": "refcoco.pth", "refcocog": "gref_umd.pth", "refcocog_google": "gref_google.pth"}
