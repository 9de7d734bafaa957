"""lib.engine: signals, journal and preflight checks of a run."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from commands import contents
from PIL import Image

from lib.checkpoint import read_checkpoint
from lib.config import DEFAULTS
from lib.engine import preflight
from lib.engine.folders import check_not_running
from lib.engine.journal import Journal, environment, git_revision, write_environment
from lib.engine.run import Run, format_duration
from lib.engine.signals import StopSignals
from lib.engine.state import build_train_state
from lib.errors import UserError
from utils import LOGGER, STOP_SIGNALS, init_distributed

GIB = 2**30


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signals_are_recorded_and_handlers_restored(number):
    previous = signal.signal(number, signal.SIG_DFL)  # under nohup, SIGHUP is ignored
    try:
        with StopSignals() as signals:
            assert not signals.stop_requested()
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # as torchrun does, which forwards signals: not a second Ctrl-C
            assert signals.received == number.name
            assert signals.stop_requested()
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, previous)


def test_an_ignored_hangup_stays_ignored():
    """As under nohup."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_second_interrupt_ends_at_once(monkeypatch):
    monkeypatch.setattr("lib.engine.signals.SECONDS_BEFORE_SECOND_INTERRUPT", -1.0)
    with StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def begin(folder, step=0, **kwargs):
    journal = Journal(folder)
    journal.begin(step, **kwargs)
    return journal


def read_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def test_metrics_and_event_files_continue_after_the_resumed_step(tmp_path):
    journal = begin(tmp_path)
    for step in (2, 4, 6):
        journal.write("train", step, {"epoch": 1, "loss": 3.0 / step, "skipped": 0})
    journal.write("eval", 6, {"epoch": 1, "split": "val", "oIoU": 12.5})
    journal.close()
    journal = begin(tmp_path, step=4)
    journal.write("train", 6, {"epoch": 1, "loss": 0.25, "skipped": 0})
    journal.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"], line["loss"]) for line in lines] == [
        ("train", 2, 1.5), ("train", 4, 0.75), ("train", 6, 0.25)
    ]  # fmt: skip
    events = read_events(tmp_path / "tensorboard")
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(2, 1.5), (4, 0.75), (6, 0.25)]
    assert "train/epoch" not in events.Tags()["scalars"]


def test_images_are_written_to_the_event_files(tmp_path):
    journal = begin(tmp_path)
    journal.write("eval", 6, {"oIoU": 1.0}, lambda: {"val/0": Image.new("RGB", (20, 10), "red")})
    journal.close()
    (image,) = read_events(tmp_path / "tensorboard").Images("val/0")
    assert (image.step, image.width, image.height) == (6, 20, 10)


@pytest.mark.parametrize(("validated", "kept"), [(True, 2), (False, 1)])
def test_incomplete_lines_and_unfinished_validations_are_deleted(tmp_path, validated, kept):
    lines = [{"kind": "train", "step": 4}, {"kind": "eval", "step": 4}, {"kind": "train", "step": 5}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"kind": "train", "st')
    begin(tmp_path, step=4, validated=validated).close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == lines[:kept]


def test_missing_tensorboard_is_logged_once(tmp_path, monkeypatch, caplog, crossvlt_log):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    caplog.set_level("INFO", logger="crossvlt")
    journal = begin(tmp_path)
    journal.write("eval", 1, {"oIoU": 1.0}, draw=lambda: pytest.fail("images are drawn for TensorBoard only"))
    journal.close()
    assert [record.getMessage() for record in caplog.records] == [
        "No TensorBoard event files: TensorBoard is not installed (requirements-extra.txt)"
    ]
    assert not (tmp_path / "tensorboard").exists()
    assert (tmp_path / "metrics.jsonl").exists()


def test_other_processes_write_no_journal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journal = Journal(None)
    journal.begin()
    journal.write("train", 1, {"loss": 1.0})
    journal.close()
    assert list(tmp_path.iterdir()) == []


def test_the_environment_of_every_start_is_kept(tmp_path):
    path = tmp_path / "environment.json"
    write_environment(path, from_step=0)
    write_environment(path, from_step=7)
    starts = json.loads(path.read_text())
    assert [start["from_step"] for start in starts] == [0, 7]
    assert starts[1]["packages"]["torch"] == torch.__version__.split("+")[0]
    assert starts[1]["command"][1:] == sys.argv
    path.write_text("[incomplete")
    write_environment(path)
    assert len(json.loads(path.read_text())) == 1
    assert environment()["gpus"] == [] or torch.cuda.is_available()


def test_git_revision_is_that_of_the_checkout(tmp_path):
    assert git_revision(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("one")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"], ["tag", "v1"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert git_revision(tmp_path) == head
    (tmp_path / "file").write_text("two")
    assert git_revision(tmp_path) == f"{head}-dirty"


def state_of(model, **changes):
    recipe = DEFAULTS.TRAIN.clone()
    for name, value in changes.items():
        recipe[name] = value
    return build_train_state(model, recipe, steps_per_epoch=1)


def test_a_full_disk_is_reported_before_training(small_model, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage(0, 0, 5 * GIB))
    monkeypatch.setattr(preflight, "checkpoint_bytes", lambda _: (GIB, GIB // 2))
    state = state_of(small_model())
    preflight.check_disk_space(state, tmp_path, keep=2)
    with pytest.raises(UserError, match=r"need 6\.00 GiB more \(1\.00 each\), but only 5\.00 GiB of disk space"):
        preflight.check_disk_space(state, tmp_path, keep=3)
    with open(tmp_path / "step_00000001.pth", "wb") as existing:
        existing.truncate(GIB)  # sparse: it takes no space
    preflight.check_disk_space(state, tmp_path, keep=3)  # existing checkpoints need no more space
    with pytest.raises(UserError, match="Cannot write"):
        preflight.check_disk_space(state, tmp_path / "step_00000001.pth", keep=1)


def test_the_size_of_a_checkpoint_is_estimated(small_model, tmp_path):
    state = state_of(small_model())
    for p in state.model.parameters():
        p.grad = torch.ones_like(p)
    state.optimizer.step()
    torch.save(state.state_dict(), tmp_path / "r.pth")
    torch.save({"model": state.model.state_dict()}, tmp_path / "w.pth")
    resumable, weights = preflight.checkpoint_bytes(state)
    assert resumable == pytest.approx((tmp_path / "r.pth").stat().st_size, rel=0.1)
    assert weights == pytest.approx((tmp_path / "w.pth").stat().st_size, rel=0.1)
    larger = state_of(small_model(), AMSGRAD=True, EMA=0.9)
    assert preflight.checkpoint_bytes(larger)[0] > resumable + 1.9 * weights


def config_of(folder, name="run"):
    cfg = DEFAULTS.clone()
    cfg.OUTPUT_DIR, cfg.LOG_DIR, cfg.MODEL_ID = str(folder / "checkpoints"), str(folder / "models"), name
    return cfg


def open_run(cfg, resumed=None):
    return Run.open(cfg, init_distributed("cpu"), {"share": [1, 1, 1], "model_config": {}, "config": {}}, resumed)


def test_a_second_training_of_the_run_changes_no_file(small_model, tmp_path):
    state, cfg = state_of(small_model()), config_of(tmp_path)
    with open_run(cfg) as run:
        run.begin(state)
        before = contents(tmp_path)
        other_checkpoints = cfg.clone()
        other_checkpoints.OUTPUT_DIR = str(tmp_path / "other")
        for other, folder in ((cfg, "checkpoints"), (other_checkpoints, "models")):
            expected = (
                rf"Another training is writing .*{folder}/run \(process {os.getpid()} on .*choose another --model_id"
            )
            with pytest.raises(UserError, match=expected):
                check_not_running(other)
            with pytest.raises(UserError, match=expected):
                open_run(other)
        assert contents(tmp_path) == before
        run.save(state, ends_epoch=False)
    check_not_running(cfg)


def test_a_run_that_lost_its_lock_writes_nothing(small_model, tmp_path):
    state, cfg = state_of(small_model()), config_of(tmp_path)
    with open_run(cfg) as run:
        run.begin(state)
        (tmp_path / "checkpoints" / "run" / ".lock").unlink()
        before = contents(tmp_path)
        with pytest.raises(UserError, match=r"checkpoints/run/\.lock was deleted\. Another training may be writing"):
            run.save(state, ends_epoch=False)
        LOGGER.info("not written")
        assert contents(tmp_path) == before


def test_a_run_keeps_its_id_and_another_one_is_refused(small_model, tmp_path, capsys):
    def train(name, resumed=None):
        state = state_of(small_model())
        with open_run(config_of(tmp_path, name), resumed) as run:
            run.save(state, ends_epoch=False)
        start = json.loads((tmp_path / "models" / name / "environment.json").read_text())[-1]
        checkpoint = read_checkpoint(tmp_path / "checkpoints" / name / "last.pth")
        assert checkpoint.extra["run_id"] == start["run_id"]
        return checkpoint

    first = train("first")
    assert train("first", first).extra["run_id"] == first.extra["run_id"]
    second = train("second", first)  # --resume first --model_id second
    assert second.extra["run_id"] != first.extra["run_id"]
    folder = first.path.parent
    shutil.copy(second.path, folder / "step_00000009.pth")
    with pytest.raises(UserError, match=r"step_00000009\.pth and step_00000000\.pth are from different runs\. Move"):
        train("first", read_checkpoint(folder / "step_00000009.pth"))
    assert "older version" not in capsys.readouterr().err
    (folder / "step_00000009.pth").unlink()
    for path in (first.path, folder / "step_00000000.pth"):  # older files have no id
        content = torch.load(path, weights_only=True)
        content.pop("run_id", None)
        torch.save(content, path)
    older = read_checkpoint(first.path)
    assert len(train("first", older).extra["run_id"]) == 16
    assert "last.pth has no run id (older version), so it may be from another run" in capsys.readouterr().err


def test_the_log_of_another_run_is_not_shortened(small_model, tmp_path):
    def train(output_dir, resumed=None):
        cfg = config_of(tmp_path)
        cfg.OUTPUT_DIR = str(tmp_path / output_dir)
        state = state_of(small_model())
        with open_run(cfg, resumed) as run:
            run.begin(state)
            run.journal.write("train", 2, {"loss": 1.0})
            run.save(state, ends_epoch=False)
        return read_checkpoint(tmp_path / output_dir / "run" / "last.pth")

    metrics = tmp_path / "models" / "run" / "metrics.jsonl"
    train("a")
    before = metrics.read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl is from another run\. Choose another --model_id or --log_dir"):
        train("b")
    assert metrics.read_bytes() == before
    (tmp_path / "models").rename(tmp_path / "logs_a")
    other = train("b")  # its first step is not saved, so that a resumed run writes it again
    train("b", other)
    before = metrics.read_bytes()
    with pytest.raises(UserError, match=r"metrics\.jsonl is from another run"):
        train("a", read_checkpoint(tmp_path / "a" / "run" / "last.pth"))
    assert metrics.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "message"),
    [("a/b", "must be a plain name"), ("..", "must be a plain name"), ("a\0", "must be a plain name"),
     ("é" * 150, "the name is too long. Use at most 255 bytes")],
)  # fmt: skip
def test_names_that_no_folder_can_have(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        check_not_running(config_of(tmp_path, name))


@pytest.mark.parametrize(("key", "flag"), [("OUTPUT_DIR", "--output-dir"), ("LOG_DIR", "--log_dir")])
def test_a_folder_that_cannot_be_written_needs_another_place(tmp_path, monkeypatch, key, flag):
    (tmp_path / "file").touch()
    cfg = config_of(tmp_path)
    cfg[key] = str(tmp_path / "file")
    with pytest.raises(UserError, match=f"Cannot create the folder .*file/run: Not a directory. Choose another {flag}"):
        open_run(cfg)
    (tmp_path / "read_only" / "run").mkdir(parents=True)
    cfg[key] = str(tmp_path / "read_only")
    monkeypatch.setattr(os, "access", lambda path, _: "read_only" not in str(path))
    with pytest.raises(UserError, match=f"Cannot write into the folder .*read_only/run. Choose another {flag}"):
        open_run(cfg)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.42, "0.4 s"), (42, "42 s"), (119, "119 s"), (150, "2 min"), (3000, "50 min"), (9000, "2.5 h")],
)
def test_durations_are_formatted(seconds, text):
    assert format_duration(seconds) == text
