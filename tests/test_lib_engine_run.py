"""What a run keeps and goes on from: progress, random states, checkpoints, signals, the journal, the look ahead."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image

from lib import journal as journal_module
from lib.checkpoint import RESUMABLE, read_checkpoint
from lib.engine import preflight
from lib.engine.checkpoints import CheckpointFolder, numbered
from lib.engine.control import Control
from lib.engine.progress import Progress, random_states, restore_random_states, seed_everything
from lib.engine.resume import find_resumed, for_share, newest_good
from lib.errors import UserError
from lib.journal import Journal, environment, git_revision, write_environment


def content_at(step, epoch=0, epoch_step=0, share=(2, 4, 1)):
    return {
        **dict.fromkeys(RESUMABLE), "model": {"weight": torch.full((50,), float(step))}, "model_config": {},
        "config": {}, "step": step, "epoch": epoch, "epoch_step": epoch_step, "share": list(share),
    }  # fmt: skip


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_progress_survives_a_checkpoint(tmp_path):
    progress = Progress(epoch=2, epoch_step=3, step=31, best_oIoU=41.5, metrics={"oIoU": 40.0}, skipped=1)
    progress.recent.add({"loss": 0.1, "lr": 0.3})
    progress.whole.add({"loss": 0.7})
    progress.whole.add({"skipped": 1.0})
    torch.save(progress.state_dict(), tmp_path / "p.pth")
    again = Progress.from_state_dict({**torch.load(tmp_path / "p.pth", weights_only=True), "model": None})
    assert again == progress
    again.whole.add({"loss": 0.9})
    assert again.whole.means() == {"loss": (0.7 + 0.9) / 2, "skipped": 1.0}  # each over the steps that had it
    assert progress.whole.means()["loss"] == 0.7  # not the same object


def test_random_states_survive_a_checkpoint(tmp_path):
    def draw():
        return (
            torch.rand(3).tolist(),
            np.random.rand(3).tolist(),
            np.random.randn(),
            random.random(),
            random.gauss(0, 1),
        )

    seed_everything(5)
    draw()
    torch.save(random_states(), tmp_path / "r.pth")
    wanted = draw()
    assert draw() != wanted
    restore_random_states(torch.load(tmp_path / "r.pth", weights_only=True))
    assert draw() == wanted


def test_the_newest_checkpoints_stay(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step, epoch, ends in ((0, 0, True), (3, 0, False), (6, 0, False), (8, 1, True), (9, 1, False), (12, 1, False)):
        folder.save(content_at(step, epoch, 0 if ends else step), ends_epoch=ends)
        assert torch.load(tmp_path / "last.pth", weights_only=True)["step"] == step
    kept = ["last.pth", "step_00000008_epoch_001.pth", "step_00000009.pth", "step_00000012.pth"]
    assert names(tmp_path) == kept
    assert (tmp_path / "last.pth").samefile(tmp_path / "step_00000012.pth")
    assert (tmp_path / "last.pth").stat().st_nlink == 2
    (tmp_path / "step_mine.pth").touch()  # not one of ours
    (tmp_path / "best.pth").touch()
    resumed = CheckpointFolder(tmp_path, keep=2, from_step=8)  # gone back: what came after is another run's future
    resumed.save(content_at(10, 1, 2), ends_epoch=False)
    assert names(tmp_path) == [
        "best.pth",
        "last.pth",
        "step_00000008_epoch_001.pth",
        "step_00000010.pth",
        "step_mine.pth",
    ]


def test_a_torn_checkpoint_does_not_push_out_a_good_one(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (3, 6, 9):
        folder.save(content_at(step), ends_epoch=False)
    (tmp_path / "step_00000009.pth").write_bytes(b"torn")
    resumed = newest_good(tmp_path)
    assert resumed.extra["step"] == 6
    CheckpointFolder(tmp_path, keep=2, from_step=6).save(content_at(11), ends_epoch=False)
    assert [path.name for path in numbered(tmp_path)] == ["step_00000011.pth", "step_00000006.pth"]


def test_killed_between_a_checkpoint_and_its_second_name(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    folder.save(content_at(6), ends_epoch=False)
    torch.save(content_at(9), tmp_path / "step_00000009.pth")
    assert newest_good(tmp_path).extra["step"] == 9
    for path in numbered(tmp_path):
        path.unlink()
    assert newest_good(tmp_path).path.name == "last.pth"


@pytest.mark.parametrize("where", ["data", "tables"])
def test_flipped_bits_are_refused(tmp_path, where):
    torch.save(content_at(6), tmp_path / "c.pth")
    content = (tmp_path / "c.pth").read_bytes()
    source = random.Random(0)
    data = content.find(np.full(50, 6.0, np.float32).tobytes())
    outcomes = set()
    for _ in range(40):
        at = data + source.randrange(200) if where == "data" else source.randrange(len(content) * 3 // 4, len(content))
        flipped = bytearray(content)
        flipped[at] ^= 1 << source.randrange(8)
        (tmp_path / "c.pth").write_bytes(flipped)
        try:
            read_checkpoint(tmp_path / "c.pth")
            outcomes.add("read")  # a byte that means nothing, such as a time stamp
        except UserError:
            outcomes.add("refused")
    assert outcomes == {"refused"} if where == "data" else "refused" in outcomes


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    CheckpointFolder(tmp_path, keep=1).save(content_at(4), ends_epoch=False)
    assert torch.load(tmp_path / "last.pth", weights_only=True)["step"] == 4


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    (tmp_path / ".step_00000003.pth.77.part").write_bytes(b"half")
    (tmp_path / "last.pth").touch()
    CheckpointFolder(tmp_path, keep=1).clean()
    assert names(tmp_path) == ["last.pth"]


def test_a_torn_checkpoint_is_named_and_the_one_before_it_used(tmp_path, caplog):
    run = tmp_path / "run"
    run.mkdir()
    folder = CheckpointFolder(run, keep=3)
    for step in (3, 6, 9):
        folder.save(content_at(step), ends_epoch=False)
    assert newest_good(run).extra["step"] == 9
    whole = (run / "last.pth").read_bytes()
    (run / "last.pth").write_bytes(whole[: len(whole) // 2])  # and with it its other name
    caplog.set_level("WARNING", logger="crossvlt")
    caplog.handler.setFormatter(None)
    assert find_resumed(None, True, str(tmp_path), "run").extra["step"] == 6
    flipped = bytearray((run / "step_00000006.pth").read_bytes())
    at = flipped.find(np.full(50, 6.0, np.float32).tobytes())
    flipped[at + 100] ^= 1
    (run / "step_00000006.pth").write_bytes(flipped)
    assert newest_good(run).extra["step"] == 3
    torch.save({"model": {"weight": torch.zeros(1)}}, run / "step_00000003.pth")
    assert newest_good(run) is None
    with pytest.raises(UserError, match=r"no checkpoint in .*run can be read; move them away"):
        find_resumed(None, True, str(tmp_path), "run")
    with pytest.raises(UserError, match="corrupt or not a PyTorch file"):
        find_resumed(str(run / "last.pth"), False, "", "")


def test_auto_resume_begins_where_there_is_nothing(tmp_path):
    assert find_resumed(None, True, str(tmp_path), "new") is None
    assert find_resumed(None, False, str(tmp_path), "new") is None
    with pytest.raises(UserError, match="--auto_resume needs --model_id"):
        find_resumed(None, True, str(tmp_path), "")
    with pytest.raises(UserError, match="both say where to go on"):
        find_resumed("last.pth", True, str(tmp_path), "new")


def test_another_division_goes_on_between_epochs(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(content_at(10, epoch=1), ends_epoch=True)
    folder.save(content_at(13, epoch=1, epoch_step=3), ends_epoch=False)
    inside, between = read_checkpoint(tmp_path / "last.pth"), read_checkpoint(tmp_path / "step_00000010_epoch_001.pth")
    assert for_share(inside, (2, 4, 1)) is inside
    assert for_share(inside, (1, 4, 2)).extra["step"] == 10
    assert for_share(between, (1, 4, 2)) is between
    between.path.unlink()
    with pytest.raises(UserError, match=r"saved by 2 process\(es\) × 4 × 1 accumulated, now 1 process\(es\) × 4 × 2"):
        for_share(inside, (1, 4, 2))


def test_only_the_boundary_before_a_checkpoint_counts(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(content_at(13, epoch=1, epoch_step=3), ends_epoch=False)
    kept = shutil.copy(tmp_path / "last.pth", tmp_path / "mine.pth")
    folder.save(content_at(20, epoch=2), ends_epoch=True)
    with pytest.raises(UserError, match="no checkpoint between two epochs"):
        for_share(read_checkpoint(kept), (1, 4, 2))


def test_numbered_ignores_what_is_not_a_runs(tmp_path):
    for name in (
        "step_00000002.pth",
        "step_00000010_epoch_001.pth",
        "step_1.pth",
        "step_00000003.pth.part",
        "best.pth",
    ):
        (tmp_path / name).touch()
    assert [path.name for path in numbered(tmp_path)] == ["step_00000010_epoch_001.pth", "step_00000002.pth"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_are_noticed_and_handlers_put_back(number):
    before = signal.getsignal(number)
    with Control(0, 0) as control:
        assert control.after_step(1, is_main=True) == (False, False)
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # torchrun passes the terminal's on: the second isn't impatience
        assert control.received == number.name
        assert control.after_step(2, is_main=True) == (True, False)
    assert signal.getsignal(number) is before


def test_an_impatient_second_interrupt_ends_at_once(monkeypatch):
    monkeypatch.setattr("lib.engine.control.SECONDS_UNTIL_IMPATIENT", 0.0)
    with Control(0, 0):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_checkpoints_are_due_by_steps_and_by_the_clock():
    with Control(3, 0) as control:
        assert [control.after_step(step, is_main=True)[1] for step in range(1, 7)] == [False, False, True] * 2
    with Control(0, 0.0005) as control:
        assert not control.after_step(1, is_main=False)[1]
        time.sleep(0.04)
        assert control.after_step(2, is_main=True)[1]
        control.saved()
        assert not control.after_step(3, is_main=True)[1]


def begun(folder, step=0, **how):
    journal = Journal(folder)
    journal.begin(step, **how)
    return journal


def events_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def test_the_journal_is_read_back_by_the_real_readers(tmp_path):
    journal = begun(tmp_path)
    assert journal.accepts_images
    for step in (2, 4, 6):
        journal.write("train", step, {"epoch": 1, "loss": 3.0 / step, "skipped": 0})
    journal.write("eval", 6, {"epoch": 1, "split": "val", "oIoU": 12.5})
    journal.draw("val/0", Image.new("RGB", (20, 10), "red"), 6)
    journal.close()
    journal = begun(tmp_path, step=4)  # resumed: what came after is written anew
    journal.write("train", 6, {"epoch": 1, "loss": 0.25, "skipped": 0})
    journal.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"], line["loss"]) for line in lines] == [
        ("train", 2, 1.5), ("train", 4, 0.75), ("train", 6, 0.25)
    ]  # fmt: skip
    events = events_of(tmp_path / "tensorboard")
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(2, 1.5), (4, 0.75), (6, 0.25)]
    assert "train/epoch" not in events.Tags()["scalars"]


def test_overlays_reach_the_event_files(tmp_path):
    journal = begun(tmp_path)
    journal.draw("val/0", Image.new("RGB", (20, 10), "red"), 6)
    journal.close()
    (image,) = events_of(tmp_path / "tensorboard").Images("val/0")
    assert (image.step, image.width, image.height) == (6, 20, 10)


def test_the_journal_drops_a_torn_line_and_an_unfinished_validation(tmp_path):
    lines = [{"kind": "train", "step": 4}, {"kind": "eval", "step": 4}, {"kind": "train", "step": 5}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for validated, kept in ((True, 2), (False, 1)):
        (tmp_path / "metrics.jsonl").write_text(text + '{"kind": "train", "st')
        begun(tmp_path, step=4, validated=validated).close()
        assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == lines[:kept]


def test_without_tensorboard_one_line_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr(journal_module.LOG, "propagate", True)
    caplog.set_level("INFO", logger="crossvlt")
    journal = begun(tmp_path)
    journal.write("train", 1, {"loss": 1.0})
    journal.draw("val/0", Image.new("RGB", (2, 2)), 1)
    journal.close()
    assert not journal.accepts_images
    assert [record.getMessage() for record in caplog.records] == [
        "no TensorBoard event files: TensorBoard isn't installed (requirements-extra.txt)"
    ]
    assert not (tmp_path / "tensorboard").exists()
    assert (tmp_path / "metrics.jsonl").exists()


def test_other_processes_write_no_journal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journal = Journal(None)
    journal.begin()
    journal.write("train", 1, {"loss": 1.0})
    journal.draw("x", Image.new("RGB", (2, 2)), 1)
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
    path.write_text("[torn")
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


def test_a_disk_without_room_is_found_before_training(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage(0, 0, 5 * 2**30))
    gib = 2**30
    assert preflight.check_space(tmp_path, gib, gib // 2, keep=2) == 5 * gib
    with pytest.raises(UserError, match=r"need another 6\.00 GiB \(1\.00 each\), but the disk has 5\.00 left"):
        preflight.check_space(tmp_path, gib, gib // 2, keep=3)
    with open(tmp_path / "step_00000001.pth", "wb") as there:
        there.truncate(gib)  # sparse: it takes no space here
    assert preflight.check_space(tmp_path, gib, gib // 2, keep=3)  # what is there needn't be found again
    with pytest.raises(UserError, match="can't write"):
        preflight.check_space(tmp_path / "step_00000001.pth", gib, gib, keep=1)


def test_the_size_of_a_checkpoint_is_known_beforehand(small_model, tmp_path):
    model = small_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "r.pth")
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    resumable, weights = preflight.checkpoint_bytes(model, amsgrad=False, ema=False)
    assert resumable == pytest.approx((tmp_path / "r.pth").stat().st_size, rel=0.1)
    assert weights == pytest.approx((tmp_path / "w.pth").stat().st_size, rel=0.1)
    assert preflight.checkpoint_bytes(model, amsgrad=True, ema=True)[0] > resumable + 1.9 * weights


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.42, "0.4 s"), (42, "42 s"), (119, "119 s"), (150, "2 min"), (3000, "50 min"), (9000, "2.5 h")],
)
def test_durations(seconds, told):
    assert preflight.duration(seconds) == told
