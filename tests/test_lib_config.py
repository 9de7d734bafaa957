"""lib.config and lib.options: precedence, the published flags, messages about mistakes."""

from pathlib import Path

import pytest
from conftest import ROOT

from lib import config
from lib.errors import MissingFileError, UserError
from lib.options import OPTIONS


def parse(script, *flags):
    return config.get_parser(script, "", lambda parser: None).parse_args([str(flag) for flag in flags])


def resolved(*flags, script="train", base=None):
    return config.load_config(parse(script, *flags), base)


def test_defaults_are_the_published_recipe():
    cfg, given = resolved()
    assert given == {}
    assert (cfg.DATA.NAME, cfg.DATA.SPLIT_BY, cfg.DATA.SPLIT, cfg.DATA.IMG_SIZE) == ("refcoco", "unc", "val", 480)
    assert (cfg.TRAIN.EPOCHS, cfg.BATCH_SIZE, cfg.TRAIN.LR, cfg.TRAIN.WEIGHT_DECAY) == (40, 6, 3e-5, 1e-2)
    assert (cfg.TRAIN.WARMUP_STEPS, cfg.TRAIN.CLIP_GRAD) == (0, 0.0)
    assert (cfg.TRAIN.AMSGRAD, cfg.TRAIN.ALIGNMENT) == (False, True)
    assert (cfg.WORKERS, cfg.PRINT_FREQ, cfg.DEVICE) == (2, 10, "auto")
    assert (cfg.DATA.ROOT, cfg.OUTPUT_DIR, cfg.LOG_DIR) == ("./refer/data", "./checkpoints", "./models")


def test_every_published_flag_of_train_sets_its_key():
    cfg, _ = resolved(
        "--dataset", "refcocog", "--splitBy", "umd", "--split", "test", "--swin_type", "large", "--img_size", 384,
        "-b", 3, "--epochs", 7, "-j", 5, "--lr", "1e-4", "--wd", "0.05", "--amsgrad", "--print-freq", 9,
        "--output-dir", "out", "--model_id", "mine", "--refer_data_root", "data", "--bert_tokenizer", "tok",
        "--ck_bert", "bert", "--pretrained_swin_weights", "swin.pth", "--ddp_trained_weights", "--window12",
        "--pin_mem", "--seed", 4, "--device", "cpu", "--local_rank", 1,
    )  # fmt: skip
    keys = {
        "DATA.NAME": "refcocog", "DATA.SPLIT_BY": "umd", "DATA.SPLIT": "test", "MODEL.SWIN_TYPE": "large",
        "DATA.IMG_SIZE": 384, "BATCH_SIZE": 3, "TRAIN.EPOCHS": 7, "WORKERS": 5, "TRAIN.LR": 1e-4,
        "TRAIN.WEIGHT_DECAY": 0.05, "TRAIN.AMSGRAD": True, "PRINT_FREQ": 9, "OUTPUT_DIR": "out", "MODEL_ID": "mine",
        "DATA.ROOT": "data", "PRETRAINED.TOKENIZER": "tok", "PRETRAINED.BERT": "bert", "PRETRAINED.SWIN": "swin.pth",
        "PRETRAINED.DDP_TRAINED": True, "MODEL.WINDOW_SIZE": 12, "PIN_MEM": True, "SEED": 4, "DEVICE": "cpu",
    }  # fmt: skip
    assert {key: config.lookup(cfg, key) for key in keys} == keys
    assert resolved("--batch-size", 2, "--workers", 1, "--weight-decay", "0.1", "--local-rank", 0)[0].BATCH_SIZE == 2


def test_flags_override_the_yaml_and_the_yaml_overrides_the_base(tmp_path):
    (tmp_path / "c.yaml").write_text("DATA: {IMG_SIZE: 320, MAX_TOKENS: 15}\nTRAIN: {LR: 1, WEIGHT_DECAY: 1e-3}\n")
    cfg, given = resolved(
        "--cfg", tmp_path / "c.yaml", "--img_size", 224, base={"DATA.IMG_SIZE": 64, "DATA.MAX_TOKENS": 9, "SEED": 5}
    )
    assert (cfg.DATA.IMG_SIZE, cfg.DATA.MAX_TOKENS, cfg.SEED) == (224, 15, 5)
    assert (cfg.TRAIN.LR, cfg.TRAIN.WEIGHT_DECAY) == (1.0, 1e-3)  # YAML reads 1e-3 as text
    path = str(tmp_path / "c.yaml")
    from_yaml = dict.fromkeys(("DATA.MAX_TOKENS", "TRAIN.LR", "TRAIN.WEIGHT_DECAY"), path)
    assert given == {"DATA.IMG_SIZE": "--img_size", **from_yaml}
    assert config.DEFAULTS.DATA.IMG_SIZE == 480


def test_repeated_flags_are_a_list_that_replaces_the_saved_one(tmp_path):
    (tmp_path / "c.yaml").write_text("DATA: {PACKED: [c.h5, d.h5]}\n")
    saved = {"DATA.PACKED": ["saved.h5"]}
    yaml = ("--cfg", tmp_path / "c.yaml")
    assert resolved()[0].DATA.PACKED == []
    assert resolved(base=saved)[0].DATA.PACKED == ["saved.h5"]
    assert resolved(*yaml, base=saved)[0].DATA.PACKED == ["c.h5", "d.h5"]
    assert resolved(*yaml, "--packed", "a.h5", "--packed", "b,c.h5", base=saved)[0].DATA.PACKED == ["a.h5", "b,c.h5"]
    assert config.DEFAULTS.DATA.PACKED == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batchsize", "3"], "Unknown flag --batchsize. Did you mean --batch-size? See --help."),
        (["--datset", "refcoco"], "Did you mean --dataset?"),
        (["--img-size=3"], "Did you mean --img_size?"),
        (["--data", "refcoco"], "Unknown flag --data"),  # an abbreviation
        (["--lr", "fast"], "invalid float value: 'fast'"),
        (["--swin_type", "huge"], "choose from"),
        (["--batch-size", "0"], "--batch-size 0: must be above 0"),
        (["--lr", "nan"], "--lr nan: must be above 0"),
        (["--clip_grad", "-1"], "--clip_grad -1.0: must be at least 0."),
        (["--img_size", "32"], "--img_size 32: must be at least 33"),
        (["--max_tokens", "600"], "--max_tokens 600: must be at most 512"),
        (["--dataset", "refcocog"], "--splitBy umd or --splitBy google"),
        (["--cfg", "nowhere.yaml"], "--cfg nowhere.yaml: no such file"),
    ],
)
def test_messages_of_mistakes_in_flags(flags, message):
    with pytest.raises(UserError) as caught:
        resolved(*flags)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TRAIN: {LEARNING_RATE: 1}", "unknown key TRAIN.LEARNING_RATE"),
        ("TRIAN: {LR: 1}", "unknown key TRIAN.LR. Did you mean TRAIN.LR?"),
        ("BATCH_SIZE: many", "BATCH_SIZE must be of type int, not 'many'"),
        ("MODEL: {DEPTHS: [1, x]}", "MODEL.DEPTHS must be of type list of int"),
        ("DATA: {PACKED: [1]}", "DATA.PACKED must be of type list of str"),
        ("MODEL: {SWIN_TYPE: huge}", "c.yaml: MODEL.SWIN_TYPE 'huge': choose one of tiny, small, base, large"),
        ("MODEL: {DROP_PATH_RATE: 1.5}", "MODEL.DROP_PATH_RATE 1.5: must be below 1"),
        ("TRAIN: {AMSGRAD: 1}", "TRAIN.AMSGRAD must be of type bool"),
        ("a: [", "not valid YAML"),
        ("a: " + "[" * 10_000, "not valid YAML"),
        ("x: 2024-13-45", "not valid YAML"),
        ("BATCH_SIZE: " + "9" * 5000, "not valid YAML"),
        ("TRAIN: {LR: " + "9" * 400 + "}", "TRAIN.LR must be of type float"),
        ("TRAIN: &a {LR: 1, OTHER: *a}", "unknown key TRAIN.OTHER"),
        ("DATA: &a {ROOT: *a}", "DATA.ROOT must be of type str, not {'ROOT'"),
        ("_BASE_: &a [*a]", "_BASE_ must be a file name, not [[["),
        ('MODEL_ID: "a\\0b"', "MODEL_ID contains a NUL character"),
        ("just text", "contains no configuration keys"),
    ],
)
def test_messages_of_mistakes_in_yaml_files(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        resolved("--cfg", tmp_path / "c.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_value_that_aliases_make_exponentially_long_is_shortened(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    (tmp_path / "c.yaml").write_text("\n".join(["DATA:", *(f"  {line}" for line in lines), "MODEL_ID: *a11"]))
    base = config.read_config_file(str(tmp_path / "c.yaml"))
    with pytest.raises(UserError, match=r"MODEL_ID must be of type str, not \[\[") as caught:
        config.load_config(parse("train"), {"MODEL_ID": base["MODEL_ID"][0]})
    assert len(str(caught.value)) < 200


def test_a_missing_yaml_file_raises_missing_file_error():
    with pytest.raises(MissingFileError):
        resolved("--cfg", "nowhere.yaml")


def test_training_flags_of_test_py_are_accepted_and_reported_as_unused():
    args = parse("test", "--lr", "0.1", "--ck_bert", "bert-base-uncased", "--amsgrad", "--split", "val")
    assert sorted(config.unused_flags(args)) == ["--amsgrad", "--ck_bert", "--lr"]
    assert config.unused_flags(parse("train", "--lr", "0.1")) == []


def test_tokenizer_follows_the_dataset():
    assert config.tokenizer_name(resolved()[0], 30522) == "bert-base-uncased"
    cfg = resolved("--dataset", "refshapes", "--refer_data_root", "d")[0]
    assert config.tokenizer_name(cfg, 200) == "d/refshapes/vocab.txt"
    assert config.tokenizer_name(cfg, 30522) == "bert-base-uncased"  # as many as BERT's entries
    scratch = resolved("--dataset", "refshapes", "--refer_data_root", "d", "--from_scratch")[0]
    assert config.tokenizer_name(scratch, 30522) == "d/refshapes/vocab.txt"
    assert config.tokenizer_name(resolved("--dataset", "refshapes", "--bert_tokenizer", "x")[0], 200) == "x"


def test_epochs_flag_overrides_steps_of_the_yaml(tmp_path):
    (tmp_path / "c.yaml").write_text("TRAIN: {STEPS: 100, EPOCHS: 40}")
    assert resolved("--cfg", tmp_path / "c.yaml")[0].TRAIN.STEPS == 100
    cfg = resolved("--cfg", tmp_path / "c.yaml", "--epochs", 3)[0]
    assert (cfg.TRAIN.EPOCHS, cfg.TRAIN.STEPS) == (3, 0)
    with pytest.raises(UserError, match="--epochs conflicts with --steps"):
        resolved("--epochs", 3, "--steps", 5)


def test_unknown_keys_of_a_checkpoint_are_reported():
    with pytest.raises(UserError, match=r"saved configuration: unknown key TRAIN\.LEARN"):
        resolved(base={"TRAIN.LEARN": 3})


def test_model_keywords_build_the_configured_model(small_config):
    from CrossVLT import build_crossvlt

    cfg, _ = resolved("--cfg", small_config)
    built = build_crossvlt(**config.model_keywords(cfg, cfg.MODEL.WINDOW_SIZE)).config
    assert (built["embed_dim"], built["depths"], built["window_size"], built["vocab_size"]) == (32, [1] * 4, 4, 200)
    with_defaults = config.model_keywords(resolved("--swin_type", "tiny")[0], 0)
    assert build_crossvlt(**with_defaults).config == build_crossvlt("tiny").config


RECIPES = {
    "refcoco": ("refcoco", "unc"),
    "refcoco+": ("refcoco+", "unc"),
    "refcocog_umd": ("refcocog", "umd"),
    "refcocog_google": ("refcocog", "google"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_published_recipes_are_the_defaults(name):
    cfg, _ = resolved("--cfg", ROOT / "configs" / f"{name}.yaml")
    assert RECIPES[name] == (cfg.DATA.NAME, cfg.DATA.SPLIT_BY)
    assert config.divide_batch(cfg, {}, world_size=2) == 1
    assert cfg.TRAIN.GLOBAL_BATCH == 12
    defaults = config.flatten(config.DEFAULTS)
    changed = {key for key, value in config.flatten(cfg).items() if value != defaults[key]}
    assert changed <= {"DATA.NAME", "DATA.SPLIT_BY", "TRAIN.GLOBAL_BATCH"}


LAVT = {
    "DATA.MAX_TOKENS": 20, "TRAIN.LR": 5e-5, "TRAIN.SEGMENTATION_WEIGHT": 1.0, "TRAIN.ALIGNMENT": False,
    "MODEL.TEXT_LAYERS": 12,
}  # fmt: skip


@pytest.mark.parametrize(("name", "published"), [("lavt", {**LAVT, "MODEL.TEXT_DROPOUT": 0.0}), ("lavt_one", LAVT)])
def test_a_network_brings_its_published_defaults(tmp_path, name, published):
    defaults = config.flatten(config.DEFAULTS)
    for flags in (("--model", name), ("--model", name, "--cfg", ROOT / "configs" / "refcoco.yaml")):
        changed = {key: value for key, value in config.flatten(resolved(*flags)[0]).items() if value != defaults[key]}
        assert changed.pop("TRAIN.GLOBAL_BATCH", 12) == 12
        changed.pop("DATA.SPLIT_BY")
        assert changed == {"MODEL.NAME": name, **published}
    (tmp_path / "c.yaml").write_text(f"MODEL: {{NAME: {name}, TEXT_DROPOUT: 0.3}}\nTRAIN: {{LR: 1e-4}}")
    cfg, _ = resolved("--cfg", tmp_path / "c.yaml", "--segmentation_weight", 2, base={"DATA.MAX_TOKENS": 9})
    train = cfg.TRAIN
    assert (train.LR, train.SEGMENTATION_WEIGHT, train.ALIGNMENT) == (1e-4, 2.0, False)
    assert (cfg.MODEL.TEXT_DROPOUT, cfg.MODEL.TEXT_LAYERS, cfg.DATA.MAX_TOKENS) == (0.3, 12, 9)
    assert resolved("--cfg", tmp_path / "c.yaml", "--model", "crossvlt")[0].TRAIN.ALIGNMENT is True


def test_the_recipe_of_lavt():
    cfg, _ = resolved("--cfg", ROOT / "configs" / "lavt.yaml")
    assert (cfg.MODEL.NAME, config.divide_batch(cfg, {}, world_size=4), cfg.TRAIN.GLOBAL_BATCH) == ("lavt", 1, 32)


def test_settings_of_another_network_are_mistakes(tmp_path):
    (tmp_path / "c.yaml").write_text("MODEL: {FUSION: late, ALIGN_DIM: 32}")
    for flags, message in (
        (["--model", "lavt", "--alignment"], "--alignment does not apply to LAVT (--model lavt), only to crossvlt."),
        (["--model", "lavt_one", "--cfg", tmp_path / "c.yaml"], "MODEL.FUSION of .* does not apply to LAVT"),
        (["--mha", "2-4-8-16"], "--mha does not apply to CrossVLT (--model crossvlt), only to lavt, lavt_one"),
    ):
        pattern = message.replace("(", r"\(").replace(")", r"\)")
        with pytest.raises(UserError, match=pattern):
            resolved(*flags)
    cfg, _ = resolved("--cfg", tmp_path / "c.yaml", "--model", "lavt", "--fusion", "cross", "--mha", "2-4-8-16")
    keywords = config.model_keywords(cfg, 0)  # a file may contain sizes that a network does not have
    assert keywords["mha"] == "2-4-8-16"
    assert not {"fusion", "align_dim"} & set(keywords)
    (tmp_path / "d.yaml").write_text("MODEL: {NAME: lavtt}")
    with pytest.raises(UserError, match=r"MODEL\.NAME 'lavtt': choose one of crossvlt, lavt"):
        resolved("--cfg", tmp_path / "d.yaml")


def test_variants_of_the_published_recipe_change_one_option():
    published = config.flatten(resolved("--cfg", ROOT / "configs" / "published.yaml")[0])
    for name, differing in {"one_24gb_gpu": {"TRAIN.GRAD_CHECKPOINT": True}, "bf16": {"TRAIN.AMP": "bf16"}}.items():
        keys = config.flatten(resolved("--cfg", ROOT / "configs" / f"{name}.yaml")[0])
        assert {key: value for key, value in keys.items() if value != published[key]} == differing


def test_every_config_file_has_a_working_command_in_its_comment():
    for path in (ROOT / "configs").glob("*.yaml"):
        commands = [
            line[1:].split("train.py")[1].split() for line in path.read_text().splitlines() if "train.py" in line
        ]
        assert commands, path
        cfg, _ = resolved(*commands[0])
        assert cfg.DATA.NAME in ("refcoco", "refcoco+", "refcocog", "refshapes")
        assert str(path.relative_to(ROOT)) in commands[0]


def test_base_files_are_relative_and_can_be_chained(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "c.yaml").write_text("_BASE_: ../b.yaml\nTRAIN: {LR: 0.5}\n")
    (tmp_path / "b.yaml").write_text("_BASE_: d.yaml\nTRAIN: {LR: 0.1, EPOCHS: 3}\n")
    (tmp_path / "d.yaml").write_text("TRAIN: {EPOCHS: 1, AMP: bf16}\n")
    cfg, given = resolved("--cfg", tmp_path / "a" / "c.yaml")
    assert (cfg.TRAIN.LR, cfg.TRAIN.EPOCHS, cfg.TRAIN.AMP) == (0.5, 3, "bf16")
    assert [path.name for path in map(Path, given.values())] == ["b.yaml", "d.yaml", "c.yaml"]
    (tmp_path / "d.yaml").write_text("_BASE_: a/c.yaml\nSEED: 1\n")
    with pytest.raises(UserError, match=r"c\.yaml: the file includes itself through _BASE_"):
        resolved("--cfg", tmp_path / "a" / "c.yaml")
    (tmp_path / "d.yaml").write_text("_BASE_: [1]\n")
    with pytest.raises(UserError, match="must be a file name"):
        resolved("--cfg", tmp_path / "b.yaml")
    (tmp_path / "d.yaml").unlink()
    with pytest.raises(MissingFileError, match=r"d\.yaml: No such file"):
        resolved("--cfg", tmp_path / "b.yaml")


@pytest.mark.parametrize(
    ("flags", "world_size", "accum_steps", "total"),
    [
        (["-b", 6], 2, 1, 12), (["-b", 6, "--accum-steps", 2], 1, 2, 12), (["-b", 6, "--global_batch", 12], 1, 2, 12),
        (["-b", 3, "--global_batch", 12, "--accum-steps", 2], 2, 2, 12), (["-b", 1, "--global_batch", 12], 3, 4, 12),
    ],
)  # fmt: skip
def test_the_global_batch_is_divided(flags, world_size, accum_steps, total):
    cfg, given = resolved(*flags)
    assert config.divide_batch(cfg, given, world_size) == accum_steps
    assert total == cfg.TRAIN.GLOBAL_BATCH
    # When the run is resumed with another number of processes, the global batch stays the same.
    resumed, given = resolved("-b", 1, base=config.flatten(cfg))
    assert config.divide_batch(resumed, given, 1) == total


def test_an_impossible_global_batch_is_rejected():
    for flags, message in (
        (["-b", 5, "--global_batch", 12], "A global batch of 12 is not divisible by 1 process"),
        (
            ["-b", 6, "--global_batch", 12, "--accum-steps", 4],
            r"--global_batch is 12, but --accum-steps 4 × batch size 6 × 1 process\(es\) = 24",
        ),
    ):
        cfg, given = resolved(*flags)
        with pytest.raises(UserError, match=message):
            config.divide_batch(cfg, given, 1)
    cfg, given = resolved("-b", 2, "--accum-steps", 3, base={"TRAIN.GLOBAL_BATCH": 12})  # of a resumed run
    assert (config.divide_batch(cfg, given, 1), cfg.TRAIN.GLOBAL_BATCH) == (3, 6)


def test_the_message_of_a_conflict_names_the_flag_and_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.pth").touch()
    path = tmp_path / "try.yaml"
    path.write_text("PRETRAINED: {FROM_SCRATCH: true}\nTRAIN: {GLOBAL_BATCH: 12}\n")
    with pytest.raises(UserError) as caught:
        resolved("--cfg", path, "--init_from", "a.pth")
    assert str(caught.value) == (
        f"{path} sets PRETRAINED.FROM_SCRATCH, which conflicts with --init_from. "
        "Pass --no-from_scratch or drop one of them."
    )
    cfg, _ = resolved("--cfg", path, "--init_from", "a.pth", "--no-from_scratch")
    assert (cfg.PRETRAINED.FROM_SCRATCH, cfg.PRETRAINED.INIT_FROM) == (False, "a.pth")
    with pytest.raises(UserError, match=r"--from_scratch conflicts with --init_from\. Drop one of them\."):
        resolved("--from_scratch", "--init_from", "a.pth")
    with pytest.raises(UserError, match="--train_temperature conflicts with --no_alignment"):
        resolved("--train_temperature", "--no_alignment")
    path.write_text("PRETRAINED: {INIT_FROM: a.pth}\nTRAIN: {GLOBAL_BATCH: 12}\n")
    with pytest.raises(
        UserError, match=r"^--from_scratch conflicts with PRETRAINED\.INIT_FROM of .*try\.yaml\. Drop one"
    ):
        resolved("--cfg", path, "--from_scratch")
    cfg, given = resolved("--cfg", path, "--accum-steps", 4)
    with pytest.raises(UserError, match=r"TRAIN\.GLOBAL_BATCH of .*try\.yaml is 12, but --accum-steps 4"):
        config.divide_batch(cfg, given, 1)


def test_every_boolean_can_be_unset_by_a_flag():
    for option in OPTIONS:
        if isinstance(option.default, bool):
            flag = "--no_alignment" if option.key == "TRAIN.ALIGNMENT" else f"--no-{option.flag_names[-1][2:]}"
            cfg, _ = resolved(flag, base={option.key: True})
            assert config.lookup(cfg, option.key) is False
    assert resolved("--alignment", base={"TRAIN.ALIGNMENT": False})[0].TRAIN.ALIGNMENT


def test_the_options_page_is_up_to_date():
    """docs/options.md is generated by `make docs`."""
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == config.options_table()
