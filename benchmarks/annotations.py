"""How long a training split's annotations take to read and tokenise, and what its data-loading workers cost in memory.

    python -m benchmarks.annotations                         # a set of RefCOCO train's size, generated
    python -m benchmarks.annotations --bert_tokenizer pretrained/vocab.txt

Prints Markdown with machine and versions; results worth keeping are in benchmarks/results/.
"""

import json
import pickle
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from benchmarks.forward import machine
from bert.tokenization import SPECIAL_TOKENS, load_tokenizer
from data.dataset_refer_bert import ReferDataset
from data.loaders import build_train_loader
from lib.cli import Parser, run_command
from lib.errors import UserError
from lib.files import write_text
from refer.refer import REFER

WIDTH, HEIGHT = 640, 480
BATCH_SIZE = 4
EVERY = 50  # samples between looks at a worker's memory: the system takes long to tell it


class Size(NamedTuple):
    """How large a generated split is."""

    images: int
    annotations: int
    refs: int
    expressions: int


# RefCOCO's train split; instances.json has 196,771 annotations for 19,994 images, of which these are train's.
REFCOCO_TRAIN = Size(16994, 167247, 42404, 120624)
POINTS = 26  # of an outline, on average; COCO's objects have about as many
UNIQUE = 0.75  # share of RefCOCO's sentences that are said once or for the first time


def write_set(root: Path, size: Size, seed: int = 0) -> None:
    """A train split in the REFER layout under ``root``/refcoco, without pictures, and a vocabulary."""
    source = np.random.default_rng(seed)
    folder = root / "refcoco"
    folder.mkdir(parents=True)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(source.choice(letters, source.integers(2, 9))) for _ in range(6000)]
    pieces = [*letters, *("##" + letter for letter in letters)]
    vocabulary = dict.fromkeys([*SPECIAL_TOKENS, *pieces, *words[:5000]])  # the other words are put together
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    images = [
        {"id": i, "file_name": f"COCO_train2014_{i:012d}.jpg", "width": WIDTH, "height": HEIGHT, "license": 1,
         "coco_url": f"http://images.cocodataset.org/train2014/COCO_train2014_{i:012d}.jpg",
         "date_captured": "2013-11-15 02:41:42"}
        for i in range(size.images)
    ]  # fmt: skip
    annotations = []
    for number in range(size.annotations):
        middle, radius = source.uniform((0, 0), (WIDTH, HEIGHT)), source.uniform(5, 120)
        angles = np.linspace(0, 2 * np.pi, source.integers(5, 2 * POINTS - 5), endpoint=False)
        outline = middle + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        outline = np.clip(outline, 0, (WIDTH, HEIGHT)).round(2)
        low, high = outline.min(axis=0), outline.max(axis=0)
        annotations.append(
            {"segmentation": [outline.ravel().tolist()], "area": round(float(np.pi * radius**2), 4), "iscrowd": 0,
             "image_id": number * size.images // size.annotations, "bbox": [*low.tolist(), *(high - low).tolist()],
             "category_id": 1, "id": number}
        )  # fmt: skip
    refs, said, sentences = [], [], 0
    for number in range(size.refs):
        until = (number + 1) * size.expressions // size.refs
        for _ in range(sentences, until):
            again = said and source.random() > UNIQUE
            length = min(1 + source.poisson(2.5), 30)
            said.append(
                said[source.integers(len(said))]
                if again
                else " ".join(words[int(i)] for i in np.minimum(source.geometric(0.005, length), len(words)) - 1)
            )
        annotation = annotations[number * size.annotations // size.refs]
        refs.append(
            {"ref_id": number, "ann_id": annotation["id"], "image_id": annotation["image_id"], "category_id": 1,
             "split": "train", "file_name": images[annotation["image_id"]]["file_name"],
             "sent_ids": list(range(sentences, until)),
             "sentences": [{"sent_id": k, "raw": said[k], "sent": said[k], "tokens": said[k].split()}
                           for k in range(sentences, until)]}
        )  # fmt: skip
        sentences = until
    instances = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "instances.json").write_text(json.dumps(instances), encoding="utf-8")
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=0))


class Looks(Dataset):
    """What a worker needs of a sample's annotations, its picture left out; gives back, now and then, the worker's own
    memory in MiB.

    Args:
        dataset: the samples.
        refer: take them from these records instead, as a dataset would that keeps them.
    """

    def __init__(self, dataset: ReferDataset, refer: REFER | None = None) -> None:
        self.dataset, self.refer = dataset, refer
        self.ref_ids = refer.getRefIds(split="train") if refer else None
        self.looked = 0  # samples of this worker

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, float]:
        if self.refer:
            self.refer.getMask(self.ref_ids[index])
            ref = self.refer.Refs[self.ref_ids[index]]
            self.refer.get_image_path(ref["image_id"])
            [sentence["raw"] for sentence in ref["sentences"]]
        else:
            chosen = self.dataset.expression_of(index)
            self.dataset.full_size_mask(index)
            self.dataset.image_path(index)
            self.dataset.expressions[chosen], self.dataset.input_ids[chosen].long()
        self.looked += 1
        return {"private": own_memory() if self.looked % EVERY == 1 else -1.0}


def own_memory() -> float:
    """MiB that this process shares with no other (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def ready(root: Path, tokenizer_name: str) -> tuple[float, float, REFER, ReferDataset]:
    """Seconds to read and index the annotations, and to select and tokenise the split; and the two."""
    started = time.perf_counter()
    refer = REFER(root)
    read = time.perf_counter()
    dataset = ReferDataset(refer, "train", load_tokenizer(tokenizer_name), img_size=480, draw_sentences=True)
    return read - started, time.perf_counter() - read, refer, dataset


def growth(samples: Looks, workers: int) -> tuple[float, float]:
    """MiB a worker has for itself at its first batch and at its last, the mean over the workers."""
    loader = build_train_loader(samples, batch_size=BATCH_SIZE, workers=workers, rank=0, world_size=1, seed=0)
    loader.multiprocessing_context = "fork"
    found = [value for batch in loader for value in batch["private"].tolist() if value >= 0]
    return statistics.mean(found[:workers]), statistics.mean(found[-workers:])


def get_parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.annotations", description=__doc__)
    parser.add_argument("--bert_tokenizer", metavar="BERT", help="a vocabulary (default: one is generated)")
    parser.add_argument("--repeats", type=int, default=3, help="of the reading (default: 3)")
    parser.add_argument("--workers", type=int, default=4, help="data-loading processes (default: 4)")
    parser.add_argument("--share", type=float, default=1.0, help="of RefCOCO train's size (default: 1)")
    parser.add_argument("--out", metavar="FILE", help="write what is printed into a file too")
    return parser


def main() -> None:
    args = get_parser().parse_args()
    size = Size(*(round(count * args.share) for count in REFCOCO_TRAIN))
    if min(args.repeats, args.workers) < 1 or size.refs < 2 * args.workers * BATCH_SIZE:
        raise UserError("--repeats and --workers must be at least 1, and --share leave each worker two batches")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_set(root, size)
        vocabulary = args.bert_tokenizer or str(root / "refcoco" / "vocab.txt")
        files = sum(path.stat().st_size for path in (root / "refcoco").glob("*[np]")) / 2**20
        times = []
        for _ in range(args.repeats):
            *seconds, refer, dataset = ready(root, vocabulary)
            times.append([*seconds, sum(seconds)])
    lines = ["| | median s | spread |", "|---|---|---|"]
    for name, column in zip(
        ("read and index", "select, tokenise, pack", "both"), zip(*times, strict=True), strict=True
    ):
        lines.append(f"| {name} | {statistics.median(column):.2f} | {min(column):.2f}…{max(column):.2f} |")
    lines += ["", f"An epoch without pictures, {args.workers} forked workers; MiB that each has for itself:"]
    lines += ["", "| samples from | at first | at last | grown by |", "|---|---|---|---|"]
    for name, samples in (("ReferDataset", Looks(dataset)), ("REFER's records", Looks(dataset, refer))):
        first, last = growth(samples, args.workers)
        lines.append(f"| {name} | {first:.0f} | {last:.0f} | {last - first:.0f} |")
    what = f"{size.refs} refs, {size.expressions} expressions, {size.annotations} annotations, {files:.0f} MiB of files"
    text = "\n".join([what, machine(torch.device("cpu")), "", *lines])
    print(text)
    if args.out:
        write_text(args.out, text + "\n")


if __name__ == "__main__":
    run_command(main)
