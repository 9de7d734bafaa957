"""CPU threads: how they wait, how many there are, and that a resumed run uses the saved number."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from lib import threads
from lib.cli import run_command
from utils import init_distributed


@pytest.fixture
def environment(monkeypatch, one_thread):
    """Environment variables that a test may change, without a number of threads; torch's number is restored."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "GOMP_", "KMP_"))}
    monkeypatch.setattr(os, "environ", kept)
    yield kept
    torch.set_num_threads(1)


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "9"}, {"KMP_BLOCKTIME": "1"}])
def test_waiting_threads_soon_sleep_unless_the_environment_says_how_they_wait(environment, given):
    """main() imports torch; OpenMP reads its variables at that moment."""
    environment |= given
    before, seen = dict(environment), []
    run_command(lambda: seen.append(dict(environment)))
    before |= {"THP_MEM_ALLOC_ENABLE": "1"}
    assert seen == [before if given else {**before, "GOMP_SPINCOUNT": "10000"}]


def test_freed_memory_is_kept_and_reused(environment):
    """glibc would return 64 MiB to the system at once. The process's resident memory shows whether it has."""
    program = "import sys; from lib.threads import keep_freed_memory as keep; sys.argv[1:] and keep()\n" + (
        "block = bytearray(b'x') * 2**26; del block\n"
        "print(next(int(line.split()[1]) // 1024 for line in open('/proc/self/status') if line.startswith('VmRSS')))"
    )
    default, kept = (
        int(subprocess.run([sys.executable, "-c", program, *flags], cwd=ROOT, capture_output=True, check=True).stdout)
        for flags in ([], ["keep"])
    )
    assert default < 64 <= kept


def test_the_default_number_is_that_of_the_cores_of_each_process(environment, monkeypatch):
    monkeypatch.setattr(threads, "available_cores", lambda: 6)
    assert threads.default_number() == 6
    for processes, number in ((2, 3), (4, 1), (8, 1)):
        environment["LOCAL_WORLD_SIZE"] = str(processes)
        assert threads.default_number() == number


def test_cores_are_physical_ones_within_the_quota(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 4, 5})
    assert threads.available_cores(tmp_path) == 5  # the system does not describe its cores
    for cpu in range(8):
        folder = tmp_path / "devices/system/cpu" / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    assert threads.available_cores(tmp_path) == 3  # 0 and 4, 1 and 5, 2
    quota = tmp_path / "fs/cgroup/cpu.max"
    quota.parent.mkdir(parents=True)
    for text, number in (("max 100000", 3), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 3)):
        quota.write_text(text)
        assert threads.available_cores(tmp_path) == number


def test_systems_without_cpu_sets_use_all_cores(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    assert threads.available_cores() == 10


def test_a_resumed_run_uses_the_saved_number(environment, monkeypatch, caplog, crossvlt_log):
    monkeypatch.setattr(threads, "available_cores", lambda: 2)
    for saved, number in ((None, 2), (3, 3), (1, 1)):
        init_distributed("cpu", saved_threads=saved)
        assert torch.get_num_threads() == number
    assert not caplog.records


@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_the_environment_sets_the_number_and_a_resumed_run_reports_it(environment, variable, caplog, crossvlt_log):
    environment[variable] = "2"
    torch.set_num_threads(2)  # as torch does when it is imported
    for saved in (None, 2, 3):
        assert not caplog.records
        init_distributed("cpu", saved_threads=saved)
        assert torch.get_num_threads() == 2
    assert "continues with 2 CPU thread(s), but was saved with 3" in caplog.text
    assert "OMP_NUM_THREADS=3" in caplog.text
