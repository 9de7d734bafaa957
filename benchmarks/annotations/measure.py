"""Measure the loading time of a training split's annotations and the memory of the workers that use them."""

import statistics
import time
from pathlib import Path

import torch
from torch.utils.data import Dataset

from benchmarks.machine import machine
from bert.tokenization import load_tokenizer
from data.dataset_refer_bert import ReferDataset
from data.loaders import build_train_loader
from lib.tables import to_markdown
from refer.refer import REFER

BATCH_SIZE = 4
SAMPLES_PER_READING = 50  # reading the memory of a process is slow
NOT_READ = -1.0


class AnnotationsOnly(Dataset):
    """The samples of a training split without their images. A sample is the worker's private memory in MiB.

    Args:
        dataset: the split.
        refer: if given, annotations are read from its records, as in a dataset without shared memory.
    """

    def __init__(self, dataset: ReferDataset, refer: REFER | None = None) -> None:
        self.dataset, self.refer = dataset, refer
        self.ref_ids = refer.getRefIds(split="train") if refer else []
        self.samples = 0  # of this worker

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> float:
        if self.refer:
            ref = self.refer.loadRefs(self.ref_ids[index])[0]
            self.refer.getMask(ref)
            self.refer.get_image_path(ref["image_id"])
            [sentence["raw"] for sentence in ref["sentences"]]
        else:
            expression = self.dataset.expression_of(index)
            self.dataset.full_size_mask(index)
            self.dataset.image_path(index)
            self.dataset.expressions[expression], self.dataset.input_ids[expression].long()
        self.samples += 1
        return private_memory() if self.samples % SAMPLES_PER_READING == 1 else NOT_READ


def private_memory() -> float:
    """Return the memory that this process does not share with other processes, in MiB (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def memory_growth(samples: AnnotationsOnly, workers: int) -> tuple[float, float]:
    """Return the private memory of a worker at its first and at its last batch, in MiB, averaged over the workers."""
    loader = build_train_loader(
        samples,
        torch.device("cpu"),
        batch_size=BATCH_SIZE,
        accum_steps=1,
        workers=workers,
        rank=0,
        world_size=1,
        seed=0,
    ).loader
    loader.multiprocessing_context = "fork"
    readings = [value for batch in loader for value in batch.tolist() if value != NOT_READ]
    return statistics.mean(readings[:workers]), statistics.mean(readings[-workers:])


def report(root: Path, tokenizer_name: str, repeats: int, workers: int) -> str:
    """Measure everything and return the results as Markdown."""
    times: dict[str, list[float]] = {"read and index": [], "select, tokenize, pack": [], "both": []}
    for _ in range(repeats):
        start = time.perf_counter()
        refer = REFER(root)
        middle = time.perf_counter()
        dataset = ReferDataset(refer, "train", load_tokenizer(tokenizer_name), img_size=480, draw_seed=0)
        end = time.perf_counter()
        for values, seconds in zip(times.values(), (middle - start, end - middle, end - start), strict=True):
            values.append(seconds)
    time_rows = [["", "median s", "spread"]]
    for name, values in times.items():
        time_rows.append([name, f"{statistics.median(values):.2f}", f"{min(values):.2f}…{max(values):.2f}"])
    memory_rows = [["annotations from", "first batch", "last batch", "growth"]]
    for name, samples in (
        ("ReferDataset", AnnotationsOnly(dataset)),
        ("records of REFER", AnnotationsOnly(dataset, refer)),
    ):
        first, last = memory_growth(samples, workers)
        memory_rows.append([name, *(f"{value:.0f}" for value in (first, last, last - first))])
    file_mib = sum(path.stat().st_size for path in (refer.refs_path, refer.instances_path)) / 2**20
    return f"""\
{len(refer.Refs)} refs, {len(refer.Sents)} expressions, {len(refer.Anns)} annotations, {file_mib:.0f} MiB of files
{machine(torch.device("cpu"))}

{to_markdown(time_rows)}

An epoch without images, {workers} forked workers; private memory of a worker in MiB:

{to_markdown(memory_rows)}"""
