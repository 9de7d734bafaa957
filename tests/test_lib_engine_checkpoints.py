"""lib.engine.checkpoints: which checkpoints are kept, and which one a run resumes from."""

import os
import random
import shutil

import numpy as np
import pytest
import torch

from lib.checkpoint import RESUMABLE, read_checkpoint
from lib.engine.checkpoints import CheckpointFolder, find_resumed, match_division, newest_usable, numbered
from lib.errors import UserError


def content_at(step, epoch=0, epoch_step=0, division=(2, 4, 1)):
    return {
        **dict.fromkeys(RESUMABLE), "model": {"weight": torch.full((50,), float(step))}, "model_config": {},
        "config": {}, "step": step, "epoch": epoch, "epoch_step": epoch_step, "share": list(division),
    }  # fmt: skip


def file_names(folder):
    return sorted(path.name for path in folder.iterdir())


def save_steps(folder, steps, keep):
    checkpoints = CheckpointFolder(folder, keep=keep)
    for step in steps:
        checkpoints.save(content_at(step), ends_epoch=False)


def flip_bit(path, offset, bit=0):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def test_the_newest_checkpoints_and_the_last_epoch_end_are_kept(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step, epoch, ends in ((0, 0, True), (3, 0, False), (6, 0, False), (8, 1, True), (9, 1, False), (12, 1, False)):
        folder.save(content_at(step, epoch, 0 if ends else step), ends_epoch=ends)
        assert torch.load(tmp_path / "last.pth", weights_only=True)["step"] == step
    kept = ["last.pth", "step_00000008_epoch_001.pth", "step_00000009.pth", "step_00000012.pth"]
    assert file_names(tmp_path) == kept
    assert (tmp_path / "last.pth").samefile(tmp_path / "step_00000012.pth")
    assert (tmp_path / "last.pth").stat().st_nlink == 2


def test_checkpoints_newer_than_the_resumed_one_are_deleted(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    folder.save(content_at(8, 1), ends_epoch=True)
    for step in (9, 12):
        folder.save(content_at(step, 1, step), ends_epoch=False)
    unrelated = ("best.pth", "step_mine.pth")
    for name in unrelated:
        (tmp_path / name).touch()
    CheckpointFolder(tmp_path, keep=2, from_step=8).save(content_at(10, 1, 2), ends_epoch=False)
    assert file_names(tmp_path) == sorted([*unrelated, "last.pth", "step_00000008_epoch_001.pth", "step_00000010.pth"])


def test_a_corrupt_checkpoint_does_not_displace_a_good_one(tmp_path):
    save_steps(tmp_path, (3, 6, 9), keep=2)
    (tmp_path / "step_00000009.pth").write_bytes(b"corrupt")
    assert newest_usable(tmp_path).extra["step"] == 6
    CheckpointFolder(tmp_path, keep=2, from_step=6).save(content_at(11), ends_epoch=False)
    assert [path.name for path in numbered(tmp_path)] == ["step_00000011.pth", "step_00000006.pth"]


def test_a_kill_between_a_checkpoint_and_its_link_loses_nothing(tmp_path):
    save_steps(tmp_path, (6,), keep=2)
    torch.save(content_at(9), tmp_path / "step_00000009.pth")
    assert newest_usable(tmp_path).extra["step"] == 9
    for path in numbered(tmp_path):
        path.unlink()
    assert newest_usable(tmp_path).path.name == "last.pth"


@pytest.mark.parametrize("where", ["data", "tables"])
def test_flipped_bits_are_detected(tmp_path, where):
    path = tmp_path / "c.pth"
    torch.save(content_at(6), path)
    original = path.read_bytes()
    source = random.Random(0)
    data = original.find(np.full(50, 6.0, np.float32).tobytes())
    outcomes = set()
    first, end = (data, data + 200) if where == "data" else (len(original) * 3 // 4, len(original))
    for _ in range(40):
        flip_bit(path, source.randrange(first, end), source.randrange(8))
        try:
            read_checkpoint(path)
            outcomes.add("read")  # a byte without meaning, such as a time stamp
        except UserError:
            outcomes.add("refused")
        path.write_bytes(original)
    assert outcomes == {"refused"} if where == "data" else "refused" in outcomes


def test_without_hard_links_last_is_a_copy(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no hard links")

    monkeypatch.setattr(os, "link", refuse)
    save_steps(tmp_path, (4,), keep=1)
    assert torch.load(tmp_path / "last.pth", weights_only=True)["step"] == 4


def test_partial_files_of_killed_processes_are_deleted(tmp_path):
    (tmp_path / ".step_00000003.pth.77.part").write_bytes(b"half")
    (tmp_path / "last.pth").touch()
    CheckpointFolder(tmp_path, keep=1).delete_partial_files()
    assert file_names(tmp_path) == ["last.pth"]


def test_auto_resume_skips_corrupt_checkpoints(tmp_path, caplog):
    run = tmp_path / "run"
    run.mkdir()
    save_steps(run, (3, 6, 9), keep=3)
    assert newest_usable(run).extra["step"] == 9
    intact = (run / "last.pth").read_bytes()
    (run / "last.pth").write_bytes(intact[: len(intact) // 2])  # also truncates step 9, the same file
    assert find_resumed(None, True, str(tmp_path), "run").extra["step"] == 6
    data = (run / "step_00000006.pth").read_bytes().find(np.full(50, 6.0, np.float32).tobytes())
    flip_bit(run / "step_00000006.pth", data + 100)
    assert newest_usable(run).extra["step"] == 3
    torch.save({"model": {"weight": torch.zeros(1)}}, run / "step_00000003.pth")  # no optimizer state
    assert newest_usable(run) is None
    with pytest.raises(UserError, match=r"none of the checkpoints in .*run is readable"):
        find_resumed(None, True, str(tmp_path), "run")
    with pytest.raises(UserError, match=r"last\.pth is .*corrupt"):
        find_resumed(str(run / "last.pth"), False, "", "")


def test_auto_resume_starts_a_run_that_does_not_exist(tmp_path):
    assert find_resumed(None, True, str(tmp_path), "new") is None
    assert find_resumed(None, False, str(tmp_path), "new") is None
    with pytest.raises(UserError, match="--auto_resume requires --model_id"):
        find_resumed(None, True, str(tmp_path), "")
    with pytest.raises(UserError, match="--resume conflicts with --auto_resume"):
        find_resumed("last.pth", True, str(tmp_path), "new")


def test_another_division_of_the_batch_resumes_at_the_end_of_an_epoch(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(content_at(10, epoch=1), ends_epoch=True)
    folder.save(content_at(13, epoch=1, epoch_step=3), ends_epoch=False)
    within, between = read_checkpoint(tmp_path / "last.pth"), read_checkpoint(tmp_path / "step_00000010_epoch_001.pth")
    assert match_division(within, (2, 4, 1)) is within
    assert match_division(within, (1, 4, 2)).extra["step"] == 10
    assert match_division(between, (1, 4, 2)) is between
    between.path.unlink()
    with pytest.raises(UserError, match=r"saved with 2 process\(es\) × 4 × 1 accumulated, now 1 process\(es\) × 4 × 2"):
        match_division(within, (1, 4, 2))


def test_match_division_ignores_later_epoch_ends(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(content_at(13, epoch=1, epoch_step=3), ends_epoch=False)
    kept = shutil.copy(tmp_path / "last.pth", tmp_path / "mine.pth")
    folder.save(content_at(20, epoch=2), ends_epoch=True)
    with pytest.raises(UserError, match="has no checkpoint from the end of an epoch"):
        match_division(read_checkpoint(kept), (1, 4, 2))


def test_numbered_ignores_other_files(tmp_path):
    expected = ["step_00000010_epoch_001.pth", "step_00000002.pth"]
    for name in (*expected, "step_1.pth", "step_00000003.pth.part", "best.pth"):
        (tmp_path / name).touch()
    assert [path.name for path in numbered(tmp_path)] == expected
