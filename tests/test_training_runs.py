"""Runs that are killed, stopped, restarted and spread over nodes, as they happen to a lab."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import PROCESS_ENVIRONMENT, ROOT

from benchmarks.stress import Experiment, Kill, difference
from lib.report.curves import read_metrics

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TWO = [*TORCHRUN, "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Runs of two processes and of two epochs, each of which takes seconds; ``whole`` is trained without a break."""
    made = Experiment(tmp_path_factory.mktemp("runs"), train_images=14)
    made.train("whole")
    return made


def start(command, **how):
    return subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=PROCESS_ENVIRONMENT, **how,
    )  # fmt: skip


def finish(process, timeout=300):
    output, errors = process.communicate(timeout=timeout)
    return process.returncode, output + errors


def wait_for(condition, process, timeout=120):
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def saved(experiment, name, file="last.pth"):
    return torch.load(experiment.checkpoints(name) / file, weights_only=True)


def saved_step(experiment, name):
    """The newest step that a run has a checkpoint of."""
    return max((int(path.name[5:13]) for path in experiment.checkpoints(name).glob("step_*.pth")), default=-1)


def test_what_a_run_leaves(experiment):
    content, folder = saved(experiment, "whole"), experiment.folder / "models" / "whole"
    assert content["epoch"] == 2
    assert content["epoch_step"] == 0
    steps = content["step"]
    lines = read_metrics(folder)
    trained = [line["step"] for line in lines if line["kind"] == "train"]
    per_epoch = steps // 2
    assert trained == sorted(
        {*range(2, per_epoch + 1, 2), per_epoch} | {per_epoch + s for s in (*range(2, per_epoch + 1, 2), per_epoch)}
    )
    judged = [line for line in lines if line["kind"] == "eval"]
    assert [line["step"] for line in judged] == [per_epoch, steps]
    assert judged[-1]["oIoU"] == content["metrics"]["oIoU"]
    assert saved(experiment, "whole", "best.pth")["best_oIoU"] == max(line["oIoU"] for line in judged)
    assert {"loss", "alignment4", "lr", "grad_norm", "samples_per_second", "memory_gib", "skipped"} <= set(lines[0])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == trained
    assert [event.value for event in events.Scalars("val/oIoU")] == pytest.approx([line["oIoU"] for line in judged])
    assert len(events.Tags()["images"]) == 4
    log = (folder / "train.log").read_text()
    assert "expected: " in log
    assert "GiB" in log
    assert json.loads((folder / "environment.json").read_text())[0]["processes"] == 2
    assert content["ema"] is not None  # what is validated and kept as best
    best = saved(experiment, "whole", "best.pth")["model"]
    assert difference(best, content["model"]) is not None


def test_three_kills_change_nothing(experiment):
    ended = [experiment.train("killed", kill) for kill in (Kill(None, 1), Kill(1.5, None), Kill(None, 3))]
    ended.append(experiment.train("killed"))
    assert ended == [False, False, False, True]
    assert difference(experiment.result("whole"), experiment.result("killed")) is None
    starts = json.loads((experiment.folder / "models" / "killed" / "environment.json").read_text())
    assert len(starts) == 4
    assert starts[-1]["from_step"] > 0
    assert not list(experiment.checkpoints("killed").glob(".*.part"))


@pytest.mark.parametrize(("number", "launcher"), [(signal.SIGTERM, [sys.executable]), (signal.SIGINT, TWO)])
def test_signals_save_and_leave(experiment, number, launcher):
    """A scheduler signals the whole group, workers too; Ctrl-C at a terminal does as well."""
    name = f"signal{int(number)}"
    flags = ["-j", 1, "--save_steps", 0, *(["--global_batch", 8] if launcher is not TWO else [])]
    process = start([*launcher, *experiment.command(name, *flags)], start_new_session=True)
    log = experiment.folder / "models" / name / "train.log"
    wait_for(lambda: log.exists() and "step 2/" in log.read_text(), process)
    os.killpg(process.pid, number)
    status, told = finish(process)
    assert status == (75 if launcher is not TWO else 1), told  # torchrun has a status of its own
    assert f"{number.name}: stopped at step " in told
    content = saved(experiment, name)
    assert content["step"] >= 2
    assert f"stopped at step {content['step']} with everything saved" in told
    assert 'train.py", line' not in told  # no traceback of ours
    if launcher is TWO:
        experiment.train(name)  # goes on with other flags for saving and workers, which are no part of the recipe
        wanted, got = experiment.result("whole"), experiment.result(name)
        for part in ("checkpoint", "logged"):
            assert difference(wanted[part], got[part]) is None


def test_a_killed_worker_is_restarted_by_the_launcher(experiment):
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", "--max-restarts", "1"]
    process = start([*command, *experiment.command("elastic")])
    wait_for(lambda: saved_step(experiment, "elastic") >= 6, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(pid) for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    status, told = finish(process)
    assert status == 0, told
    starts = json.loads((experiment.folder / "models" / "elastic" / "environment.json").read_text())
    assert len(starts) == 2
    assert starts[1]["from_step"] >= 3
    assert difference(experiment.result("whole"), experiment.result("elastic")) is None


def test_two_nodes_are_one(experiment):
    ports = ["--master_addr", "localhost", "--master_port", str(20000 + os.getpid() % 20000)]
    nodes = [
        start([*TORCHRUN, "--nnodes", 2, "--node_rank", rank, "--nproc_per_node", 1, *ports,
               *experiment.command("nodes")])
        for rank in (0, 1)
    ]  # fmt: skip
    for status, told in [finish(node) for node in nodes]:
        assert status == 0, told
    assert difference(experiment.result("whole"), experiment.result("nodes")) is None


def test_another_number_of_processes_goes_on_between_epochs(experiment):
    """From inside the second epoch of two processes back to its beginning, on one, with the same global batch."""
    assert not experiment.train("smaller", Kill(None, 6))
    at, boundary = saved_step(experiment, "smaller"), saved(experiment, "whole")["step"] // 2
    assert boundary < at
    status, told = finish(start([sys.executable, *experiment.command("smaller")]))
    assert status == 0, told
    assert "saved by 2 process(es) × 4 × 1 accumulated, now 1 process(es) × 4 × 2 accumulated" in told
    assert f"going back from step {at} to the end of epoch 1, step {boundary}" in told
    assert "global batch 8 = 1 process(es) × 4 × 2 accumulated" in told
    assert saved(experiment, "smaller")["step"] == 2 * boundary
    lines = read_metrics(experiment.folder / "models" / "smaller")
    steps = [(line["kind"], line["step"]) for line in lines]
    assert len(steps) == len(set(steps))  # what was logged after the boundary is there once


def test_the_first_error_is_the_one_that_is_told(experiment):
    """A picture that one process can't read ends both, with that line first."""
    picture = sorted((experiment.folder / "data" / "refshapes" / "images").iterdir())[0]
    whole = picture.read_bytes()
    try:
        picture.write_bytes(whole[: len(whole) // 2])
        status, told = finish(start([*TWO, *experiment.command("broken", "--save_steps", 0)]))
    finally:
        picture.write_bytes(whole)
    assert status != 0
    assert f"error: Cannot decode image {picture}" in told
    others = [told.find(line) for line in ("ended, because another", "Traceback", "ChildFailedError")]
    assert all(at < 0 or at > told.index("Cannot decode image") for at in others)


def test_a_loss_that_blows_up_is_told_with_its_samples(experiment):
    flags = ["--lr", "1e18", "--clip_grad", 0]
    status, told = finish(start([sys.executable, *experiment.command("nan", *flags)]))
    assert status == 2
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert "nan on samples [" in line or "inf on samples [" in line
    (path,) = (experiment.folder / "models" / "nan").glob("non_finite_step_*_rank_0.pt")
    assert str(path) in line
    content = torch.load(path, weights_only=True)
    assert f"step {content['step']}: " in line
    assert str([i for batch in content["batches"] for i in batch["index"].tolist()]) in line
    assert content["batches"][0]["image"].shape == (4, 3, 64, 64)
    assert set(content["model"]) == set(saved(experiment, "nan")["model"])


def test_a_disk_that_fills_up_loses_nothing_that_was_saved(experiment):
    small = (experiment.checkpoints("whole") / "best.pth").stat().st_size
    limit = int(2.5 * small)  # the first checkpoint (weights and average) fits, one with the optimizer doesn't

    def no_large_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start([sys.executable, *experiment.command("full")], preexec_fn=no_large_files)
    status, told = finish(process)
    assert status == 2, told
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert "can't write" in line
    assert saved(experiment, "full")["step"] == 0
    assert not list(experiment.checkpoints("full").glob(".*.part"))


def test_going_on_into_another_folder_keeps_the_best_of_that(experiment, tmp_path):
    """Its first validation is the best there, whatever the other folder's was."""
    torch.save({**saved(experiment, "whole"), "best_oIoU": 99.0}, tmp_path / "other.pth")
    command = [part for part in experiment.command("moved") if part != "--auto_resume"]
    status, told = finish(start([*TWO, *command, "--resume", tmp_path / "other.pth", "--epochs", 3]))
    assert status == 0, told
    best, last = saved(experiment, "moved", "best.pth"), saved(experiment, "moved")
    assert last["epoch"] == 3
    assert best["best_oIoU"] == last["best_oIoU"] == last["metrics"]["oIoU"] < 99


def test_a_finished_run_has_nothing_left_to_do(experiment):
    status, told = finish(start([sys.executable, *experiment.command("whole", "--global_batch", "8")]))
    assert status == 0
    assert "steps done" in told
