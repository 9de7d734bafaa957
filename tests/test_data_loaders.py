"""data.loaders: worker processes that die."""

import os
import signal

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from data.loaders import DeviceBatches
from lib.errors import LostWorkerError


class Images(Dataset):
    """Images whose ``index`` is the id of the process that loads them. ``prepare`` is called with each index."""

    def __init__(self, prepare):
        self.prepare = prepare

    def __len__(self):
        return 100

    def __getitem__(self, index):
        self.prepare(index)
        return {"image": torch.zeros(3, 8, 8, dtype=torch.uint8), "index": torch.tensor(os.getpid())}


@pytest.fixture
def batches(monkeypatch):
    """Return a function that iterates over images loaded by one worker: ``batches(prepare)``."""
    # The main process looks for lost workers every 5 seconds.
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))

    def iterate(prepare=lambda index: None):
        loader = DataLoader(Images(prepare), batch_size=None, num_workers=1)
        return iter(DeviceBatches(loader, torch.device("cpu")))

    return iterate


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_killed_worker_is_reported_when_its_next_batch_is_needed(batches, number):
    """Nothing is raised before: PyTorch's handler of SIGCHLD would raise an error in the middle of a step."""
    iterator = batches()
    worker = int(next(iterator)["index"])
    os.kill(worker, number)
    os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)
    torch.zeros(3).sum()
    with pytest.raises(LostWorkerError) as caught:
        list(iterator)
    message = str(caught.value)
    assert message.startswith(f"A data-loading worker (process {worker}) was killed by {number.name}. ")
    assert all(part in message for part in ("host memory", "/dev/shm", "--workers (now 1)"))


def test_a_worker_that_exits_is_reported_with_its_status(batches):
    with pytest.raises(LostWorkerError, match=r"ended with exit status 3\. "):
        list(batches(lambda index: os._exit(3)))


def test_other_errors_of_workers_are_not_changed(batches):
    def fail(index):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        list(batches(fail))
