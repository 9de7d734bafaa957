"""train.py: runs that are killed, stopped, resumed, and distributed over nodes."""

import fcntl
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
import torch
from commands import contents
from conftest import PROCESS_ENVIRONMENT, ROOT

from benchmarks.stress.runs import Experiment, Kill, difference
from lib.report.curves import read_metrics

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TWO = [*TORCHRUN, "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Runs of two processes and two epochs, which take seconds each. The run ``whole`` is not interrupted."""
    runs = Experiment(tmp_path_factory.mktemp("runs"), train_images=14)
    runs.train("whole")
    return runs


class Started:
    """A command of its own process group whose output, stderr included, is read line by line."""

    def __init__(self, command, **kwargs):
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | kwargs
        self.process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=PROCESS_ENVIRONMENT, start_new_session=True, **streams
        )
        self.output = ""
        self._deadline = threading.Timer(300, self.signal, [signal.SIGKILL])
        self._deadline.start()

    def wait_for(self, text):
        """Wait until a line of the output contains ``text``."""
        line = ""
        while text not in line:
            line = self.process.stdout.readline()
            self.output += line
            assert line, self.output

    def signal(self, number):
        """Send a signal to all processes of the group, as a terminal does."""
        os.killpg(self.process.pid, number)

    def finish(self):
        """Return the exit status and the whole output."""
        if self.process.stdout and not self.process.stdout.closed:
            self.output += self.process.stdout.read()
        status = self.process.wait()
        self._deadline.cancel()
        return status, self.output


def run(command, **kwargs):
    return Started(command, **kwargs).finish()


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ranks_of(torchrun):
    """The training processes of a launcher, by rank."""
    started = {}
    for pid in children(torchrun.pid):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        started |= {int(entry[5:]): pid for entry in environment if entry.startswith(b"RANK=")}
    return [started[0], started[1]]


def saved(experiment, name, file="last.pth"):
    return torch.load(experiment.checkpoints(name) / file, weights_only=True)


def saved_step(experiment, name):
    """The newest step of a run's checkpoints."""
    return max((int(path.name[5:13]) for path in experiment.checkpoints(name).glob("step_*.pth")), default=-1)


def test_a_run_writes_its_files(experiment):
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
    evaluated = [line for line in lines if line["kind"] == "eval"]
    assert [line["step"] for line in evaluated] == [per_epoch, steps]
    assert evaluated[-1]["oIoU"] == content["metrics"]["oIoU"]
    assert saved(experiment, "whole", "best.pth")["best_oIoU"] == max(line["oIoU"] for line in evaluated)
    assert {"loss", "alignment4", "lr", "grad_norm", "samples_per_second", "memory_gib", "skipped"} <= set(lines[0])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == trained
    assert [event.value for event in events.Scalars("val/oIoU")] == pytest.approx([line["oIoU"] for line in evaluated])
    assert len(events.Tags()["images"]) == 4
    log = (folder / "train.log").read_text()
    assert "Expected per epoch: " in log
    assert "GiB" in log
    assert json.loads((folder / "environment.json").read_text())[0]["processes"] == 2
    assert content["ema"] is not None  # the moving average is validated and saved as best.pth
    best = saved(experiment, "whole", "best.pth")["model"]
    assert difference(best, content["model"]) is not None


def test_three_kills_change_nothing(experiment):
    ended = [experiment.train("killed", kill) for kill in (Kill(checkpoint=1), Kill(checkpoint=2), Kill(checkpoint=3))]
    ended.append(experiment.train("killed"))
    assert ended == [False, False, False, True]
    assert difference(experiment.result("whole"), experiment.result("killed")) is None
    starts = json.loads((experiment.folder / "models" / "killed" / "environment.json").read_text())
    assert len(starts) == 4
    assert starts[-1]["from_step"] > 0
    assert not list(experiment.checkpoints("killed").glob(".*.part"))


@pytest.mark.parametrize(("number", "launcher"), [(signal.SIGTERM, [sys.executable]), (signal.SIGINT, TWO)])
def test_signals_save_and_stop(experiment, number, launcher):
    """Schedulers and Ctrl-C send the signal to the whole process group, data-loading workers included."""
    name = f"signal{int(number)}"
    flags = ["-j", 1, "--save_steps", 0, *(["--global_batch", 8] if launcher is not TWO else [])]
    started = Started([*launcher, *experiment.command(name, *flags)])
    started.wait_for("step 2/")
    started.signal(number)
    status, output = started.finish()
    assert status == (75 if launcher is not TWO else 1), output  # torchrun has its own status
    assert f"{number.name}: stopped at step " in output
    content = saved(experiment, name)
    assert content["step"] >= 2
    assert f"stopped at step {content['step']}, everything is saved in" in output
    assert 'train.py", line' not in output  # no traceback of ours
    if launcher is TWO:
        experiment.train(name)  # with other flags for saving and workers, which may change
        expected, result = experiment.result("whole"), experiment.result(name)
        for part in ("checkpoint", "logged"):
            assert difference(expected[part], result[part]) is None


def test_a_killed_worker_is_restarted_by_the_launcher(experiment):
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", "--max-restarts", "1"]
    started = Started([*command, *experiment.command("elastic")])
    started.wait_for("step 8/")  # after the checkpoint of step 6
    os.kill(ranks_of(started.process)[1], signal.SIGKILL)
    status, output = started.finish()
    assert status == 0, output
    starts = json.loads((experiment.folder / "models" / "elastic" / "environment.json").read_text())
    assert len(starts) == 2
    assert starts[1]["from_step"] >= 3
    assert difference(experiment.result("whole"), experiment.result("elastic")) is None


def test_two_nodes_give_the_result_of_one(experiment):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        ports = ["--master_addr", "localhost", "--master_port", free.getsockname()[1]]
    nodes = [
        Started([*TORCHRUN, "--nnodes", 2, "--node_rank", rank, "--nproc_per_node", 1, *ports,
               *experiment.command("nodes")])
        for rank in (0, 1)
    ]  # fmt: skip
    for status, output in [node.finish() for node in nodes]:
        assert status == 0, output
    assert difference(experiment.result("whole"), experiment.result("nodes")) is None


def test_another_number_of_processes_resumes_at_the_end_of_an_epoch(experiment):
    """A run of two processes is killed within the second epoch. One process resumes it from the start of that epoch."""
    assert not experiment.train("smaller", Kill(checkpoint=6))
    at, boundary = saved_step(experiment, "smaller"), saved(experiment, "whole")["step"] // 2
    assert boundary < at
    status, output = run([sys.executable, *experiment.command("smaller")])
    assert status == 0, output
    assert "saved with 2 process(es) × 4 × 1 accumulated, now 1 process(es) × 4 × 2 accumulated" in output
    assert f"Returning from step {at} to the end of epoch 1, step {boundary}" in output
    assert "global batch 8 = 1 process(es) × 4 × 2 accumulated" in output
    assert saved(experiment, "smaller")["step"] == 2 * boundary
    lines = read_metrics(experiment.folder / "models" / "smaller")
    steps = [(line["kind"], line["step"]) for line in lines]
    assert len(steps) == len(set(steps))  # no step is logged twice


def test_the_first_error_is_printed_first(experiment):
    """An image that one process cannot read ends both processes, and its message is printed first."""
    image = sorted((experiment.folder / "data" / "refshapes" / "images").iterdir())[0]
    whole = image.read_bytes()
    try:
        image.write_bytes(whole[: len(whole) // 2])
        status, output = run([*TWO, *experiment.command("broken", "--save_steps", 0)])
    finally:
        image.write_bytes(whole)
    assert status != 0
    assert f"error: Cannot decode image {image}" in output
    others = [output.find(line) for line in ("ended, because another", "Traceback", "ChildFailedError")]
    assert all(at < 0 or at > output.index("Cannot decode image") for at in others)


def test_a_non_finite_loss_is_reported_with_its_samples(experiment):
    flags = ["--lr", "1e18", "--clip_grad", 0]
    status, output = run([sys.executable, *experiment.command("nan", *flags)])
    assert status == 2
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "nan on samples [" in line or "inf on samples [" in line
    (path,) = (experiment.folder / "models" / "nan").glob("non_finite_step_*_rank_0.pt")
    assert str(path) in line
    content = torch.load(path, weights_only=True)
    assert f"step {content['step']}: " in line
    assert str([i for batch in content["batches"] for i in batch["index"].tolist()]) in line
    assert content["batches"][0]["image"].shape == (4, 3, 64, 64)
    assert set(content["model"]) == set(saved(experiment, "nan")["model"])


def test_a_full_disk_loses_no_earlier_checkpoint(experiment):
    small = (experiment.checkpoints("whole") / "best.pth").stat().st_size
    limit = int(2.5 * small)  # the first checkpoint fits, one with the optimizer's state does not

    def no_large_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    status, output = run([sys.executable, *experiment.command("full")], preexec_fn=no_large_files)
    assert status == 2, output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "Cannot write" in line
    assert saved(experiment, "full")["step"] == 0
    assert not list(experiment.checkpoints("full").glob(".*.part"))


def test_resuming_into_another_folder_starts_a_new_best(experiment, tmp_path):
    """best.pth of the new folder does not depend on the best result of the old one."""
    torch.save({**saved(experiment, "whole"), "best_oIoU": 99.0}, tmp_path / "other.pth")
    command = [part for part in experiment.command("moved") if part != "--auto_resume"]
    status, output = run([*TWO, *command, "--resume", tmp_path / "other.pth", "--epochs", 3])
    assert status == 0, output
    best, last = saved(experiment, "moved", "best.pth"), saved(experiment, "moved")
    assert last["epoch"] == 3
    assert best["best_oIoU"] == last["best_oIoU"] == last["metrics"]["oIoU"] < 99
    assert last["run_id"] != saved(experiment, "whole")["run_id"]  # a new run


def test_a_finished_run_does_nothing(experiment):
    status, output = run([sys.executable, *experiment.command("whole", "--global_batch", "8")])
    assert status == 0
    assert "steps of this run are done" in output


def assert_same_result(experiment, name):
    """Resume a run if necessary. Its final state is that of the uninterrupted run."""
    experiment.train(name)
    expected, result = experiment.result("whole"), experiment.result(name)
    for part in ("checkpoint", "logged"):
        assert difference(expected[part], result[part]) is None


def test_training_continues_without_the_reader_of_its_output(experiment):
    """`train.py 2>&1 | tee log`, and tee dies."""
    started = Started([*TWO, *experiment.command("tee")])
    started.wait_for("step 2/")
    started.process.stdout.close()
    status, _ = started.finish()
    assert status == 0
    log = (experiment.logs("tee") / "train.log").read_text()
    assert log.count("WARNING stderr: Broken pipe. Its further output is discarded; the program continues.") == 1
    assert "Done. Best oIoU" in log
    assert_same_result(experiment, "tee")


def test_a_closed_terminal_saves_and_stops(experiment):
    terminal, inside = os.openpty()
    started = Started(
        [*TWO, *experiment.command("terminal")], stdin=inside, stdout=inside, stderr=inside,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(inside)
    shown = b""
    while b"loss " not in shown:  # the progress bar
        shown += os.read(terminal, 1000)
    os.close(terminal)
    started.finish()
    assert "ERROR SIGHUP: stopped at step " in (experiment.logs("terminal") / "train.log").read_text()
    assert 0 < saved(experiment, "terminal")["step"] < saved(experiment, "whole")["step"]
    assert_same_result(experiment, "terminal")


def test_processes_that_outlive_their_launcher_keep_the_run_locked(experiment, run_here):
    command = experiment.command("locked")
    started = Started([*TWO, *experiment.command("locked", "-j", 1)])
    started.wait_for("step 4/")
    ranks = ranks_of(started.process)
    workers = [worker for rank in ranks for worker in children(rank)]
    exits = [os.pidfd_open(rank) for rank in ranks]
    for number, pids in ((signal.SIGSTOP, [*ranks, *workers]), (signal.SIGKILL, [started.process.pid])):
        for pid in pids:
            os.kill(pid, number)
    before = contents(experiment.logs("locked")), contents(experiment.checkpoints("locked"))
    refused = run_here(*command)
    assert refused.status == 2
    assert f"Another training is writing {experiment.checkpoints('locked')} (process {ranks[0]} on " in refused.err
    assert (contents(experiment.logs("locked")), contents(experiment.checkpoints("locked"))) == before
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    for descriptor in exits:
        select.select([descriptor], [], [])
        os.close(descriptor)
    assert len(workers) == 2  # data-loading workers, which are still alive
    assert_same_result(experiment, "locked")
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    started.finish()
