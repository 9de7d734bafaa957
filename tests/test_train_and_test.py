"""train.py and test.py as a user runs them, end to end on generated data."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROCESS_ENVIRONMENT, ROOT
from PIL import Image

from lib.metrics import METRIC_NAMES, SegmentationMetrics


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_config):
    """Two epochs of two processes: the folder and the finished process."""
    folder = tmp_path_factory.mktemp("trained")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py",
         "--cfg", small_config, "--epochs", "2", "--print-freq", "2", "--model_id", "run",
         "--output-dir", folder / "checkpoints", "--log_dir", folder / "models"],
        cwd=ROOT, capture_output=True, text=True, timeout=600, env=PROCESS_ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture
def train_flags(tmp_path, small_config):
    """Flags for a run of a few seconds whose outputs land in tmp_path."""
    return ["--cfg", small_config, "--output-dir", tmp_path / "checkpoints", "--log_dir", tmp_path / "models"]


def entries(path):
    return torch.load(path, weights_only=True)


def losses_of(log):
    return [float(line.split("loss ")[1].split()[0]) for line in log.splitlines() if " step " in line]


def test_training_writes_what_the_readme_says(trained):
    folder, done = trained
    last, best = (entries(folder / "checkpoints" / "run" / name) for name in ("last.pth", "best.pth"))
    assert last["epoch"] == 2
    assert {"model", "model_config", "config", "optimizer", "scheduler", "best_oIoU"} <= set(last)
    assert "optimizer" not in best
    assert best["best_oIoU"] == best["metrics"]["oIoU"] <= last["best_oIoU"]
    assert not any(key.startswith("module.") for key in last["model"])
    log = (folder / "models" / "run" / "train.log").read_text()
    assert "global batch 8 = 2 process(es) × 4 × 1 accumulated on cpu" in log
    assert "rank 0's running statistics" in log
    assert log.count("INFO epoch") == 2
    assert last["step"] == int(log.split("steps 0…")[1].split(",")[0])
    assert "\r" not in done.stderr  # plain lines into a pipe, no bar
    losses = losses_of(log)
    assert len(losses) >= 4
    assert losses[-1] < losses[0]
    assert not list(folder.rglob("*.part"))


def test_saved_config_trains_the_same_again(trained, run_script, tmp_path):
    folder, _ = trained
    saved = folder / "models" / "run" / "config.yaml"
    run_script("train.py", "--cfg", saved, "--model_id", "again", "--steps", 2, "--log_dir", tmp_path / "models")
    assert entries(tmp_path / "checkpoints" / "again" / "last.pth")["step"] == 2


def test_old_launcher(run_script, train_flags, tmp_path):
    run_script("train.py", *train_flags, "--steps", 1, "--model_id", "old", processes=2, launcher="launch")
    assert (tmp_path / "checkpoints" / "old" / "best.pth").exists()


def test_default_model_id_says_what_it_is(run_script, train_flags, tmp_path):
    run_script("train.py", *train_flags, "--steps", 1)
    (run,) = (tmp_path / "checkpoints").iterdir()
    assert run.name.startswith("refshapes_unc_tiny_2")
    assert (tmp_path / "models" / run.name / "train.log").exists()


def test_initialising_from_weights(trained, run_script, train_flags, tmp_path):
    best = trained[0] / "checkpoints" / "run" / "best.pth"
    model = {f"module.{key}": value for key, value in entries(best)["model"].items()}
    torch.save(model, tmp_path / "released.pth")
    flags = ["--cfg", tmp_path / "init.yaml", *train_flags[2:], "--steps", 1, "--lr", 1e-30, "--wd", 0]
    text = Path(train_flags[1]).read_text().replace("{FROM_SCRATCH: true}", f"{{INIT_FROM: {tmp_path}/released.pth}}")
    (tmp_path / "init.yaml").write_text(text)
    run_script("train.py", *flags, "--model_id", "init", "--ddp_trained_weights")
    started = entries(tmp_path / "checkpoints" / "init" / "last.pth")
    assert started["step"] == 1
    for key, value in started["model"].items():
        if "running_" not in key and "num_batches" not in key:
            torch.testing.assert_close(value, model[f"module.{key}"], atol=1e-7, rtol=0)


def test_results_do_not_depend_on_batches_or_processes(trained, run_script, refshapes_root, tmp_path):
    checkpoint = trained[0] / "checkpoints" / "run" / "best.pth"
    data = ["--dataset", "refshapes", "--refer_data_root", refshapes_root, "-j", 0, "--device", "cpu"]
    rows = {}
    for batch_size, processes in ((1, 1), (4, 1), (4, 2)):
        out = tmp_path / f"{batch_size}_{processes}.jsonl"
        run_script(
            "test.py", *data, "--resume", checkpoint, "-b", batch_size, "--predictions", out, processes=processes
        )
        rows[batch_size, processes] = [json.loads(line) for line in out.read_text().splitlines()]
    first = rows[1, 1]
    assert len({(row["ref_id"], row["sent_id"]) for row in first}) == len(first)
    for other in (rows[4, 1], rows[4, 2]):
        for a, b in zip(first, other, strict=True):
            assert (a["ref_id"], a["sent_id"], a["sentence"]) == (b["ref_id"], b["sent_id"], b["sentence"])
            assert abs(a["intersection"] - b["intersection"]) <= 2
            assert abs(a["union"] - b["union"]) <= 2


def test_all_outputs_of_an_evaluation(trained, run_script, refshapes_root, tmp_path):
    checkpoint = trained[0] / "checkpoints" / "run" / "best.pth"
    done = run_script(
        "test.py", "--dataset", "refshapes", "--refer_data_root", refshapes_root, "--split", "all",
        "--resume", checkpoint, "-j", 0, "--json", tmp_path / "out.json", "--predictions", tmp_path / "out.jsonl",
        "--vis", tmp_path / "vis", "--vis-num", 3, "--baselines", "--lr", "0.1",
    )  # fmt: skip
    assert "not used in evaluation: --lr" in done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row["split"] for row in report] == ["val", "testA", "testB"]
    predictions = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for row in report:
        own = [line for line in predictions if line["split"] == row["split"]]
        assert (row["dataset"], row["split_by"], row["num_expressions"]) == ("refshapes", "unc", len(own))
        metrics = SegmentationMetrics()
        metrics.add([line["intersection"] for line in own], [line["union"] for line in own])
        assert row["metrics"] == metrics.compute()
        assert set(row["metrics"]) == set(METRIC_NAMES)
        assert row["settings"]["img_size"] == 64  # as trained, though the flag's default is 480
        assert 0 < row["baselines"]["all foreground"]["mIoU"] < row["baselines"]["best object"]["mIoU"] < 100
        assert f"{row['metrics']['oIoU']:.2f}" in done.stdout
        pictures = sorted((tmp_path / "vis").glob(f"{row['split']}_*.png"))
        assert len(pictures) == 4
        for picture in pictures:
            assert np.asarray(Image.open(picture)).std() > 10
    assert len(predictions) == sum(row["num_expressions"] for row in report)


def test_shuffling_is_told(trained, run_script, refshapes_root, tmp_path):
    checkpoint = trained[0] / "checkpoints" / "run" / "best.pth"
    done = run_script(
        "test.py", "--dataset", "refshapes", "--refer_data_root", refshapes_root, "--resume", checkpoint, "-j", 0,
        "--shuffle_sentences", "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert "sentences shuffled" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())[0]["settings"]["shuffle_sentences"] is True


def test_own_picture(trained, run_script, refshapes_root, tmp_path):
    checkpoint = trained[0] / "checkpoints" / "run" / "best.pth"
    Image.effect_noise((123, 77), 80).convert("RGB").save(tmp_path / "own.jpg")
    done = run_script(
        "test.py", "--image", tmp_path / "own.jpg", "--sentence", "the red circle", "--out", tmp_path / "own.png",
        "--resume", checkpoint, "--bert_tokenizer", refshapes_root / "refshapes",
    )  # fmt: skip
    overlay, mask = Image.open(tmp_path / "own.png"), np.asarray(Image.open(tmp_path / "own_mask.png"))
    assert overlay.size == (123, 77)
    assert mask.shape == (77, 123)
    assert set(np.unique(mask)) <= {0, 255}
    assert f"{(mask > 0).mean():.1%} of the picture" in done.stdout


@pytest.mark.parametrize(
    ("script", "flags", "told"),
    [
        ("train.py", ["--epoch", "3"], "unknown flag --epoch; did you mean --epochs?"),
        ("train.py", ["--resume", "{best}"], "start a new one from its weights with --init_from"),
        ("train.py", ["--resume", "{last}", "--lr", "0.5"], "TRAIN.LR is 0.001, not 0.5"),
        ("train.py", ["--resume", "{last}", "--auto_resume"], "give one of them"),
        ("train.py", ["--cfg", "{cfg}", "--auto_resume"], "--auto_resume needs --model_id"),
        ("train.py", ["--cfg", "{cfg}", "--global_batch", "6"], "a global batch of 6 can't be divided among 1 process"),
        ("train.py", ["--cfg", "{cfg}", "--train_temperature", "--no_alignment"], "only the alignment losses train"),
        ("train.py", ["--cfg", "{cfg}", "--ema", "1"], "--ema 1.0: must be below 1"),
        ("train.py", ["--cfg", "{cfg}", "--keep", "0"], "--keep 0: must be above 0"),
        ("train.py", ["--resume", "{last}", "-b", "8"], "has all its 28 steps done"),
        ("train.py", ["--resume", "{tmp}/torn.pth"], "torn.pth is torn or not a PyTorch file"),
        ("train.py", ["--cfg", "{cfg}", "--model_id", "run", "--output-dir", "{checkpoints}"], "already holds a run"),
        ("train.py", ["--cfg", "{cfg}", "--split", "testC"], "no split 'testC'"),
        ("train.py", ["--cfg", "{cfg}", "-b", "1000"], "1000 × 1 accumulated: lower --batch-size"),
        ("train.py", ["--cfg", "{cfg}", "--device", "gpu"], "--device gpu: use auto, cpu, cuda or cuda:N"),
        ("train.py", ["--cfg", "{cfg}", "--init_from", "{best}"], "contradict each other"),
        ("train.py", ["--cfg", "{cfg}", "--model_id", ".."], "must be a plain name"),
        ("train.py", ["--cfg", "{cfg}", "--ddp_trained_weights"], "give --init_from or --resume too"),
        ("train.py", ["--resume", "{last}", "--window12"], "MODEL.WINDOW_SIZE is 4, not 12"),
        ("train.py", ["--cfg", "{cfg}", "--warmup_steps", "10000"], "--warmup_steps 10000"),
        ("train.py", ["--cfg", "{cfg}", "--log_dir", "{tmp}/torn.pth"], "can't make the folder"),
        ("train.py", ["--dataset", "refcoco"], "swin_base_patch4_window12_384_22k.pth: download https://"),
        ("train.py", ["--dataset", "refcoco"], "or train with --from_scratch"),
        ("train.py", ["--dataset", "refcoc"], "did you mean refcoco"),
        ("test.py", [], "--resume"),
        ("test.py", ["--resume", "nowhere.pth"], "no checkpoint file nowhere.pth"),
        ("test.py", ["--resume", "{best}", "--swin_type", "base"], "trained with swin_type tiny, not base"),
        ("test.py", ["--resume", "{best}", "--window12"], "trained with window_size 4, not 12"),
        ("test.py", ["--resume", "{best}", "--ddp_trained_weights"], "don't begin with module."),
        ("test.py", ["--resume", "{best}", "--refer_data_root", "{tmp}"], "refs(unc).p is missing"),
        ("test.py", ["--resume", "{best}", "{data}", "--split", "val,tset"], "no split 'tset'"),
        ("test.py", ["--resume", "{best}", "{data}", "--json", "{tmp}/torn.pth/x.json"], "can't write"),
        ("test.py", ["--resume", "{best}", "{data}", "--predictions", "{tmp}"], "it is a folder"),
        ("test.py", ["--resume", "{best}", "{data}", "--bert_tokenizer", "{tmp}/other"], "another one (99 tokens"),
        ("test.py", ["--resume", "{best}", "{data}", "--bert_tokenizer", "{tmp}/big"], "300 tokens"),
        ("test.py", ["--resume", "{best}", "{data}", "--bert_tokenizer", "{tmp}/none"], "no such file or folder"),
        ("test.py", ["--resume", "{best}", "{data}", "--image", "a.jpg"], "--sentence TEXT and --out PNG"),
        ("test.py", ["--resume", "{best}", "{data}", "--image", "no.jpg", "--sentence", "a", "--out", "o.png"],
         "--image no.jpg: no such file"),
        ("test.py", ["--resume", "{best}", "{data}", "--image", "{tmp}/torn.pth", "--sentence", "a", "--out", "o.png"],
         "torn.pth can't be decoded"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_clear_line(
    trained, small_config, refshapes_root, tmp_path, monkeypatch, capsys, script, flags, told
):
    """In this process, to be quick: what ``python train.py …`` runs is exactly run_command(main)."""
    import importlib.util

    from utils import run_command

    checkpoints = trained[0] / "checkpoints"
    (tmp_path / "torn.pth").write_bytes(b"torn")
    (tmp_path / "big").mkdir()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (tmp_path / "big" / "vocab.txt").write_text("\n".join(special + [f"w{i}" for i in range(295)]))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "vocab.txt").write_text("\n".join(special + [f"w{i}" for i in range(94)]))
    places = {"best": checkpoints / "run/best.pth", "last": checkpoints / "run/last.pth", "tmp": tmp_path,
              "cfg": small_config, "checkpoints": checkpoints}  # fmt: skip
    data = ["--dataset", "refshapes", "--refer_data_root", str(refshapes_root), "-j", "0"]
    given = [part for flag in flags for part in (data if flag == "{data}" else [flag.format(**places)])]
    if script == "test.py" and "{data}" not in flags and told.startswith("refs"):
        given += ["--dataset", "refshapes", "--bert_tokenizer", str(refshapes_root / "refshapes")]
    if script == "train.py" and "--output-dir" not in given:
        given += ["--output-dir", str(tmp_path / "checkpoints")]
    before = sorted((path, path.stat().st_mtime_ns) for path in checkpoints.rglob("*"))

    spec = importlib.util.spec_from_file_location(f"{script[:-3]}_script", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)  # nothing of the checkout's own pretrained files or data
    monkeypatch.setattr(sys, "argv", [script, *given])
    with pytest.raises(SystemExit) as left:
        run_command(module.main)
    assert left.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert told in lines[0]
    assert sorted((path, path.stat().st_mtime_ns) for path in checkpoints.rglob("*")) == before


def test_help_needs_nothing():
    for script in ("train.py", "test.py"):
        done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert "--swin_type" in done.stdout
        assert "--local_rank" not in done.stdout
