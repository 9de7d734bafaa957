"""train.py and test.py as a user runs them, end to end on generated data."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from data.dataset_refer_bert import ReferDataset
from lib import threads


@pytest.fixture
def train_flags(tmp_path, small_config):
    """Flags for a run of a few seconds whose outputs land in tmp_path."""
    return ["--cfg", small_config, "--output-dir", tmp_path / "checkpoints", "--log_dir", tmp_path / "models"]


def entries(path):
    return torch.load(path, weights_only=True)


def losses_of(log):
    return [float(line.split("loss ")[1].split()[0]) for line in log.splitlines() if " step " in line]


def test_training_writes_the_documented_files(trained):
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
    assert last["step"] == int(log.split("steps 0 to ")[1].split(",")[0])
    assert "\r" not in done.stderr  # plain lines into a pipe, no bar
    losses = losses_of(log)
    assert len(losses) >= 4
    assert losses[-1] < losses[0]
    assert not list(folder.rglob("*.part"))


def test_the_saved_config_can_be_trained_again(trained, run_here, tmp_path):
    folder, _ = trained
    saved = folder / "models" / "run" / "config.yaml"
    folders = ["--output-dir", tmp_path / "checkpoints", "--log_dir", tmp_path / "models"]
    run_here("train.py", "--cfg", saved, "--model_id", "again", "--steps", 2, *folders, check=True)
    assert entries(tmp_path / "checkpoints" / "again" / "last.pth")["step"] == 2


def test_training_with_torch_distributed_launch(run_script, train_flags, tmp_path):
    run_script("train.py", *train_flags, "--steps", 1, "--model_id", "old", processes=2, launcher="launch")
    assert (tmp_path / "checkpoints" / "old" / "best.pth").exists()


@pytest.mark.parametrize(("saved", "number"), [(2, 2), (None, 1)])
def test_a_resumed_run_uses_and_records_the_saved_number_of_threads(
    trained, run_here, tmp_path, monkeypatch, saved, number
):
    """Checkpoints of older versions have no such entry."""
    content = entries(trained[0] / "checkpoints" / "run" / "last.pth")
    assert content.pop("threads") == 1
    torch.save(content | ({"threads": saved} if saved else {}), tmp_path / "saved.pth")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(threads, "available_cores", lambda: 1)
    folders = ["--output-dir", tmp_path / "checkpoints", "--log_dir", tmp_path / "models", "--model_id", "resumed"]
    run_here("train.py", "--resume", tmp_path / "saved.pth", "-b", 8, "--steps", 29, *folders, check=True)
    torch.set_num_threads(1)
    assert entries(tmp_path / "checkpoints" / "resumed" / "last.pth")["threads"] == number
    (start,) = json.loads((tmp_path / "models" / "resumed" / "environment.json").read_text())
    assert start["cpu_threads"] == number


def test_a_lost_worker_ends_the_training_saved(run_here, train_flags, tmp_path, monkeypatch):
    main_process, load_image = os.getpid(), ReferDataset.load_image

    def load_or_die(dataset, index):
        if os.getpid() != main_process and dataset.draw_seed is not None and int(dataset._epoch) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return load_image(dataset, index)

    flags = [*train_flags, "--workers", 1, "--model_id", "lost", "--epochs", 2]
    monkeypatch.setattr(ReferDataset, "load_image", load_or_die)
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))
    lost = run_here("train.py", *flags)
    step = entries(tmp_path / "checkpoints" / "lost" / "last.pth")["step"]
    assert step > 0
    (line,) = [line for line in lost.err.splitlines() if line.startswith("error: ")]
    assert (lost.status, "was killed by SIGKILL" in line) == (2, True)
    assert f"Everything up to step {step} is saved in {tmp_path}/checkpoints/lost: continue with --auto_resume." in line


def test_default_model_id_names_dataset_and_model(run_here, train_flags, tmp_path):
    run_here("train.py", *train_flags, "--steps", 1, check=True)
    (run,) = (tmp_path / "checkpoints").iterdir()
    assert run.name.startswith("refshapes_unc_tiny_2")
    assert (tmp_path / "models" / run.name / "train.log").exists()


def test_init_from_starts_from_the_weights_of_a_checkpoint(trained, run_here, train_flags, tmp_path):
    best = trained[0] / "checkpoints" / "run" / "best.pth"
    model = {f"module.{key}": value for key, value in entries(best)["model"].items()}
    torch.save(model, tmp_path / "released.pth")
    flags = ["--cfg", tmp_path / "init.yaml", *train_flags[2:], "--steps", 1, "--lr", 1e-30, "--wd", 0]
    text = Path(train_flags[1]).read_text().replace("{FROM_SCRATCH: true}", f"{{INIT_FROM: {tmp_path}/released.pth}}")
    (tmp_path / "init.yaml").write_text(text)
    run_here("train.py", *flags, "--model_id", "init", "--ddp_trained_weights", check=True)
    started = entries(tmp_path / "checkpoints" / "init" / "last.pth")
    assert started["step"] == 1
    for key, value in started["model"].items():
        if "running_" not in key and "num_batches" not in key:
            torch.testing.assert_close(value, model[f"module.{key}"], atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epoch", "3"], "Unknown flag --epoch. Did you mean --epochs? See --help."),
        (["--resume", "{best}"], "has no optimizer state. Use --init_from"),
        (["--resume", "{last}", "--lr", "0.5"], "TRAIN.LR is 0.001 in its recipe, not 0.5"),
        (["--resume", "{last}", "--auto_resume"], "--resume conflicts with --auto_resume. Drop one of them."),
        (["--cfg", "{cfg}", "--auto_resume"], "--auto_resume requires --model_id"),
        (["--cfg", "{cfg}", "--global_batch", "6"], "A global batch of 6 is not divisible by 1 process"),
        (["--cfg", "{cfg}", "--train_temperature", "--no_alignment"], "conflicts with --no_alignment"),
        (["--cfg", "{cfg}", "--ema", "1"], "--ema 1.0: must be below 1"),
        (["--cfg", "{cfg}", "--keep", "0"], "--keep 0: must be above 0"),
        (["--resume", "{last}", "-b", "8"], "All 28 steps of this run are done. Pass a larger --epochs"),
        (["--resume", "{tmp}/corrupt.pth"], "corrupt.pth is corrupt or not a PyTorch file"),
        (["--cfg", "{cfg}", "--model_id", "run", "--output-dir", "{checkpoints}"], "already contains a run"),
        (["--cfg", "{cfg}", "--split", "testC"], "No split 'testC'"),
        (["--cfg", "{cfg}", "-b", "1000"], "1000 × 1 accumulated. Lower --batch-size"),
        (["--cfg", "{cfg}", "--device", "gpu"], "--device gpu: use auto, cpu, cuda or cuda:N"),
        (["--cfg", "{cfg}", "--init_from", "{best}"], "PRETRAINED.FROM_SCRATCH, which conflicts with --init_from"),
        (["--cfg", "{cfg}", "--model_id", ".."], "must be a plain name"),
        (["--cfg", "{cfg}", "--ddp_trained_weights"], "--ddp_trained_weights requires a checkpoint"),
        (["--resume", "{last}", "--window12"], "MODEL.WINDOW_SIZE is 4 in its recipe, not 12"),
        (["--cfg", "{cfg}", "--warmup_steps", "10000"], "--warmup_steps 10000"),
        (["--cfg", "{cfg}", "--log_dir", "{tmp}/corrupt.pth"], "corrupt.pth: it is a file, not a folder"),
        (["--dataset", "refcoco"], "not found. Download them with `python -m refer.prepare --weights swin_base` (from https://"),
        (["--dataset", "refcoco"], "--pretrained_swin_weights none or, both encoders, --from_scratch."),
        (["--dataset", "refcoc"], "Did you mean refcoco?"),
    ],
)  # fmt: skip
def test_a_mistake_is_reported_in_one_line(error_line, flags, message):
    assert message in error_line("train.py", *flags)


def test_help_works_without_files(run_here):
    for script in ("train.py", "test.py"):
        done = run_here(script, "--help", check=True)
        assert "--swin_type" in done.out
        assert "--local_rank" not in done.out
