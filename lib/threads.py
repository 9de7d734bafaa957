"""CPU threads of a process: how many, and how they wait for each other; and how it allocates. Imports no torch."""

import ctypes
import os
from pathlib import Path

NUMBER_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's options of mallopt
SPIN_COUNT = "10000"
WAITING_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


def shorten_waiting() -> None:
    """Let waiting threads spin for about 0.1 ms and then sleep, unless the environment sets how they wait.

    OpenMP's threads spin for milliseconds at the end of every parallel region. If other programs use the same cores,
    the spinning thread takes the core of the thread that it waits for. Call this function before torch is imported.
    """
    if not any(name in os.environ for name in WAITING_VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def keep_freed_memory() -> None:
    """Let the process reuse freed memory instead of returning it to the system, and use large pages for tensors.

    Otherwise every large tensor is new memory, whose pages the system clears first: a few percent of a step on a CPU.
    Call this function before torch is imported. It changes nothing without glibc.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def number_is_given() -> bool:
    """Return whether the user or the launcher has set the number of threads. torchrun sets one per process."""
    return any(os.environ.get(name) for name in NUMBER_VARIABLES)


def default_number() -> int:
    """Return the number of physical cores that this process may use, divided by the node's number of processes."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, available_cores() // processes)


def available_cores(system: Path = Path("/sys")) -> int:
    """Return the number of physical cores in the process's CPU set, at most the CPU quota of its container."""
    if not hasattr(os, "sched_getaffinity"):  # only Linux has CPU sets
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    topology = [system / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list" for cpu in cpus]
    cores = {_read(file) or str(file) for file in topology}  # the threads of a core have the same siblings
    quota, _, period = _read(system / "fs/cgroup/cpu.max").partition(" ")
    limit = int(quota) // int(period) if quota.isdecimal() else len(cores)
    return max(1, min(len(cores), limit))


def _read(file: Path) -> str:
    """Return the text of a file of the kernel, empty if there is none."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
