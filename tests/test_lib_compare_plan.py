"""lib.compare.plan: the file of a comparison, the commands of its runs, and which of them are done."""

import json

import pytest
from conftest import ROOT

from lib.compare.plan import choose_reference, command_lines, plan_runs, read_comparison
from lib.config import flatten, get_parser, load_config
from lib.errors import MissingFileError, UserError
from lib.files import file_sha256
from lib.report.names import settings_path

OUR_COMPARISON = ROOT / "configs" / "compare" / "refshapes.yaml"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Return a function that writes a comparison of two models and returns its path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full.yaml").write_text("DATA: {NAME: refshapes}\nTRAIN: {STEPS: 7}\n")
    (tmp_path / "late.yaml").write_text("_BASE_: full.yaml\nMODEL: {FUSION: late}\n")

    def write(**changes):
        keys = {"MODELS": {"full": "full.yaml", "late": "late.yaml"}, "SPLITS": ["val", "testA"], **changes}
        (tmp_path / "comparison.yaml").write_text(json.dumps(keys))
        return "comparison.yaml"

    return write


@pytest.fixture
def finished(write, tmp_path):
    """A run whose files are those of a finished training and evaluation."""
    run = plan_runs(read_comparison(write()), tmp_path / "out", 1)[0]
    for folder in (run.checkpoint.parent, run.logs, run.results().parent):
        folder.mkdir(parents=True)
    run.checkpoint.write_bytes(b"weights")
    cfg = run.model.cfg.clone()
    cfg.MODEL_ID, cfg.OUTPUT_DIR, cfg.PRETRAINED.TOKENIZER = run.name, "elsewhere", "vocab.txt"  # as train.py saves it
    cfg.TRAIN.GLOBAL_BATCH = 6
    (run.logs / "config.yaml").write_text(cfg.dump())
    settings = {"complete": True, "splits": {"val": 3, "testA": 1}, "protocols": [{"name": "paper"}]}
    settings["checkpoint_sha256"] = file_sha256(run.checkpoint)
    for suffix in ("", "-shuffled"):
        run.results(suffix).write_text("lines\n")
        settings_path(run.results(suffix)).write_text(json.dumps(settings))
    return run


def titles(run):
    return [step.title for step in run.remaining_steps()]


ALL = ["training", "evaluation", "evaluation with shuffled sentences"]


def test_every_model_is_trained_with_every_seed(write, tmp_path):
    runs = plan_runs(read_comparison(write()), tmp_path, 2)
    assert [run.name for run in runs] == ["full-seed0", "late-seed0", "full-seed1", "late-seed1"]
    assert titles(runs[0]) == ALL


def test_commands_are_those_of_train_and_test(write, tmp_path):
    run = plan_runs(read_comparison(write()), tmp_path, 3)[-1]
    train, evaluate, shuffled = (step.command[1:] for step in run.steps())
    parsed = get_parser("train", "", lambda parser: parser.add_argument("--auto_resume", action="store_true"))
    args = parsed.parse_args(train[1:])
    cfg, _ = load_config(args)
    assert args.auto_resume
    assert (cfg.MODEL.FUSION, cfg.SEED, cfg.MODEL_ID, cfg.TRAIN.STEPS) == ("late", 2, "late-seed2", 7)
    folders = [cfg.OUTPUT_DIR, cfg.LOG_DIR]
    assert folders == [str(tmp_path / "checkpoints"), str(tmp_path / "runs")]
    assert evaluate[evaluate.index("--resume") + 1] == str(tmp_path / "checkpoints" / "late-seed2" / "best.pth")
    assert evaluate[evaluate.index("--split") + 1] == "val,testA"
    assert shuffled[-1] == "--shuffle_sentences"
    assert "--seed" not in shuffled  # the sentences of all models are permuted in the same way


def test_dry_run_prints_one_line_per_run(write, tmp_path):
    lines = list(command_lines(plan_runs(read_comparison(write()), tmp_path, 2), threads=3))
    assert len(lines) == 4
    assert lines[0].startswith("OMP_NUM_THREADS=3 python ")
    assert lines[0].count(" && OMP_NUM_THREADS=3 python ") == 2


def test_a_finished_run_is_reused(finished):
    assert titles(finished) == []


def test_a_new_checkpoint_is_evaluated_again(finished):
    finished.checkpoint.write_bytes(b"other weights")
    assert titles(finished) == ALL
    evaluation = finished.steps()[1]
    finished.remove_outdated(evaluation)
    assert not finished.results().exists()
    assert not settings_path(finished.results()).exists()
    assert finished.results("-shuffled").exists()


def test_results_of_the_present_checkpoint_are_kept(finished):
    finished.remove_outdated(finished.steps()[1])
    assert finished.results().exists()


def test_an_unfinished_evaluation_is_continued(finished):
    settings_path(finished.results("-shuffled")).unlink()
    assert titles(finished) == ["training", "evaluation with shuffled sentences"]


@pytest.mark.parametrize("line", ["TRAIN: {STEPS: 8}", "TRAIN: {STEPS: 7, CLIP_GRAD: 1.0}"])
def test_a_changed_configuration_is_trained_again(finished, write, tmp_path, line):
    (tmp_path / "full.yaml").write_text(f"DATA: {{NAME: refshapes}}\n{line}\n")
    run = plan_runs(read_comparison(write()), tmp_path / "out", 1)[0]
    assert titles(run) == ["training"]


def test_other_splits_are_evaluated_again(finished, write, tmp_path):
    run = plan_runs(read_comparison(write(SPLITS=["val"])), tmp_path / "out", 1)[0]
    assert titles(run) == ALL


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MODEL": {}}, "unknown key MODEL. Did you mean MODELS?"),
        ({"MODELS": {}}, "set either MODELS, or DATA for a comparison that trains no models"),
        ({"DATA": "full.yaml"}, "set either MODELS, or DATA"),
        ({"MODELS": {}, "DATA": "nothing.yaml"}, "DATA: there is no configuration file nothing.yaml"),
        ({"MODELS": ["full.yaml"]}, "MODELS must be a dict"),
        ({"MODELS": {"a b": "full.yaml"}}, "must be a name without spaces"),
        ({"MODELS": {"lte": "lte.yaml"}}, "MODELS: lte: there is no configuration file lte.yaml"),
        ({"PROTOCOL": "papr"}, "PROTOCOL papr: choose from paper"),
        ({"SPLITS": "val"}, "SPLITS must be a list"),
    ],
)
def test_mistakes_in_a_comparison(write, changes, message):
    with pytest.raises(UserError) as error:
        read_comparison(write(**changes))
    assert message in str(error.value)


def test_mistyped_key_of_a_model(write, tmp_path):
    (tmp_path / "late.yaml").write_text("MODEL: {FUSIN: late}\n")
    with pytest.raises(UserError, match=r"late.yaml: unknown key MODEL.FUSIN. Did you mean MODEL.FUSION\?"):
        read_comparison(write())


def test_models_need_the_same_data(write, tmp_path):
    (tmp_path / "late.yaml").write_text("_BASE_: full.yaml\nDATA: {IMG_SIZE: 64}\n")
    with pytest.raises(UserError, match=r"late.yaml: DATA.IMG_SIZE is 64, but 480 in full.yaml"):
        read_comparison(write())


def test_reference(write):
    comparison = read_comparison(write(REFERENCE="late"))
    assert choose_reference(comparison, ["full", "late"]) == "late"
    assert choose_reference(comparison, ["full", "late"], "full") == "full"
    assert choose_reference(comparison._replace(reference=""), ["full", "late"]) == "full"
    with pytest.raises(UserError, match=r"--reference ful is none of the models full, late. Did you mean full\?"):
        choose_reference(comparison, ["full", "late"], "ful")
    with pytest.raises(UserError, match="REFERENCE late is none of the models full"):
        choose_reference(comparison, ["full"])


def test_no_comparison(tmp_path):
    with pytest.raises(MissingFileError):
        read_comparison(str(tmp_path / "nothing.yaml"))


def test_models_of_the_shipped_comparison_have_equal_recipes(monkeypatch):
    """They differ only in the network and its losses, so steps, samples and optimization are the same.

    The VLT-style network alone has another learning rate, see docs/vlt.md.
    """
    monkeypatch.chdir(ROOT)
    models = read_comparison(str(OUR_COMPARISON)).models
    first = flatten(models[0].cfg)
    for model in models[1:]:
        different = {key for key, value in flatten(model.cfg).items() if value != first[key]}
        allowed = {"MODEL.NAME", "MODEL.FUSION", "MODEL.TEXT_LAYERS", "TRAIN.ALIGNMENT"}
        if model.cfg.MODEL.NAME == "vlt":
            allowed |= {"MODEL.ALIGN_DIM", "TRAIN.LR"}
        assert different <= allowed
