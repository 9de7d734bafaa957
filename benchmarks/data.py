"""Measure loading: samples per second of the image files and of a packed file, by number of workers.

    python -m benchmarks.data                                          # a generated set of 60 images of 640×480
    python -m benchmarks.data --refer_data_root DIR --dataset refcoco --split val --bert_tokenizer vocab.txt
    python -m benchmarks.data --filters ...                            # instead: layouts and filters of HDF5

A sample is an image, its target mask and its token ids; a batch has 6. Windows of the two kinds alternate, so that
other load on the machine slows both down. With 0 workers, this process loads the samples: that is the rate per core.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import machine, records
from benchmarks.records import Record, Row
from lib.cli import Parser, run_command
from lib.errors import UserError
from lib.variants import IMG_SIZE

if TYPE_CHECKING:
    import numpy as np

    from data.dataset_refer_bert import ReferDataset

BATCH_SIZE = 6
WINDOW_SECONDS = 1.0
GENERATED = (60, 150, 425)  # images, refs, expressions
FILTERS: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "one chunk per image": {},
    "lzf": {"compression": "lzf"},
    "shuffle, lzf": {"compression": "lzf", "shuffle": True},
    "gzip 1": {"compression": "gzip", "compression_opts": 1},
    "gzip 4": {"compression": "gzip", "compression_opts": 4},
    "shuffle, gzip 4": {"compression": "gzip", "compression_opts": 4, "shuffle": True},
}


def get_parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_input("--refer_data_root", metavar="DIR", help="folder of the datasets (default: a generated set)")
    parser.add_argument("--dataset", default="refcoco", help="name of the dataset (%(default)s)")
    parser.add_argument("--split", default="val", help="split to load (%(default)s)")
    parser.add_argument("--img_size", type=int, default=IMG_SIZE, metavar="S", help="(%(default)s)")
    tokenizer_help = "a vocab.txt, a folder or a Hub name (default: of the generated set)"
    parser.add_input("--bert_tokenizer", metavar="BERT", help=tokenizer_help)
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2, 4], metavar="N", help="(default: 0 1 2 4)")
    parser.add_argument("--filters", action="store_true", help="measure layouts and filters of HDF5 instead")
    records.add_arguments(parser)
    return parser


def main() -> None:
    args = get_parser().parse_args()
    earlier = records.check_arguments(args, "data")
    if min(args.workers) < 0:
        raise UserError("--workers must be at least 0.")

    import torch

    from benchmarks.generated_split import Size, write_set
    from bert.tokenization import load_tokenizer
    from data.dataset_refer_bert import ReferDataset
    from data.pack.source import open_source
    from data.pack.writing import pack_split
    from refer.datasets import parse_datasets
    from refer.refer import REFER

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root = Path(args.refer_data_root or folder / "data")
        if not args.refer_data_root:
            write_set(root, Size(*GENERATED))
        tokenizer = load_tokenizer(args.bert_tokenizer or str(root / args.dataset / "vocab.txt"))
        refer = REFER(root, *parse_datasets(root, args.dataset, "")[0])
        packed_file = str(pack_split(refer, args.split, args.img_size, folder))
        plain, packed = (
            ReferDataset(
                refer,
                args.split,
                tokenizer,
                img_size=args.img_size,
                draw_seed=0,
                source=open_source(files, refer, args.split, args.img_size),
            )
            for files in ([], [packed_file])
        )
        title = f"Loading: {len(plain.image_paths())} images of {args.dataset} {args.split} at {args.img_size}"
        record = Record("data", title, machine.machine(torch.device("cpu")), "image" if args.filters else "sample")
        for row in measure_filters(plain, folder, args.repeats) if args.filters else ():
            record.add(row)
        for workers in () if args.filters else args.workers:
            for row in measure_loading({"image files": plain, "packed": packed}, workers, args.repeats):
                record.add(row)
        records.finish(record, earlier, args.out)


def endless_batches(dataset: "ReferDataset", workers: int) -> Iterator[dict[str, Any]]:
    """Yield batches in random order without end."""
    import torch
    from torch.utils.data import DataLoader

    generator = torch.Generator().manual_seed(0)

    def indices() -> Iterator[list[int]]:
        while True:
            yield torch.randint(len(dataset), (BATCH_SIZE,), generator=generator).tolist()

    yield from DataLoader(dataset, batch_sampler=indices(), num_workers=workers)


def measure_loading(datasets: dict[str, "ReferDataset"], workers: int, repeats: int) -> list[Row]:
    """Return a row for each dataset. A repeat loads as many batches as take about a second."""
    streams = {name: endless_batches(dataset, workers) for name, dataset in datasets.items()}
    rows, cpu_seconds = {}, {name: [] for name in streams}
    for name, stream in streams.items():
        for _ in itertools.islice(stream, 4 * workers + 4):  # start the workers
            pass
        started, batches = time.perf_counter(), 0
        while time.perf_counter() - started < WINDOW_SECONDS:
            next(stream)
            batches += 1
        rows[name] = Row({"source": name, "workers": workers}, [], BATCH_SIZE * batches)
    for _ in range(repeats):
        for name, stream in streams.items():
            batches = rows[name].count // BATCH_SIZE
            started, cpu_started = time.perf_counter(), time.process_time()
            for _ in itertools.islice(stream, batches):
                pass
            cpu_seconds[name].append(time.process_time() - cpu_started)
            rows[name].seconds.append(time.perf_counter() - started)
            # The workers refill their queues (two batches each) before the other dataset is measured.
            time.sleep(2 * workers * rows[name].seconds[-1] / batches)
    plain = next(iter(rows.values()))
    for name, row in rows.items():
        ratios = [a / plain.count / (b / row.count) for a, b in zip(plain.seconds, row.seconds, strict=True)]
        row.extra["speed ÷ image files"] = f"{statistics.median(ratios):.1f}× ({min(ratios):.1f}…{max(ratios):.1f})"
        if not workers:
            row.extra["CPU time per sample"] = records.format_seconds(statistics.median(cpu_seconds[name]) / row.count)
    return list(rows.values())


def measure_filters(dataset: "ReferDataset", folder: Path, repeats: int) -> Iterator[Row]:
    """Yield the time per image and the size of each layout and filter, read with h5py in random order."""
    import h5py
    import numpy as np

    index_of = {dataset.ids_of(index)[0]: index for index in range(len(dataset))}
    images = np.stack([dataset.input_image(index) for index in index_of.values()])
    order = np.random.default_rng(0).permutation(len(images))
    for name, options in FILTERS.items():
        path = folder / "filters.h5"
        options = options if name == "contiguous" else {**options, "chunks": (1, *images.shape[1:])}
        with h5py.File(path, "w") as file:
            file.create_dataset("images", data=images, **options)
        with h5py.File(path, "r") as file:
            row = Row({"layout or filter": name}, [read_all(file, order) for _ in range(repeats + 1)][1:], len(order))
        row.extra["size"] = f"{path.stat().st_size / images.nbytes:.1%}"
        yield row


def read_all(file: Any, order: "np.ndarray") -> float:
    """Return the seconds in which all images are read."""
    images, started = file["images"], time.perf_counter()
    for row in order:
        images[row]
    return time.perf_counter() - started


if __name__ == "__main__":
    run_command(main)
