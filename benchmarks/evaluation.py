"""Measure evaluation: the speedup of encoding each image once, and memory over a whole split.

    python -m benchmarks.evaluation              # base at 480, batches of 1 and 8: images encoded once or per sentence
    python -m benchmarks.evaluation --scale      # a split as large as RefCOCO val, a small model at 64 px
    python -m benchmarks.evaluation --scale --packed     # the same with images from a packed file

Both generate a dataset: random images of 640×480 with rectangles as objects. The output is Markdown with machine and
versions; selected results are kept in benchmarks/results/.
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
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import machine
from bert.tokenization import SPECIAL_TOKENS, read_vocabulary
from CrossVLT import CrossVLT, CrossVLTOutput, build_crossvlt
from data.dataset_refer_bert import ReferDataset
from data.image_batches import ImageBatches
from data.pack.source import open_source
from data.pack.writing import pack_split
from data.transforms import normalize_images
from lib.cli import Parser, run_command
from lib.errors import UserError
from lib.evaluation import EvalSetup, evaluate
from lib.files import Kind, write_text
from lib.protocols import PAPER
from lib.report.results import ResultFile
from lib.variants import SWIN_VARIANTS
from refer.datasets import COCO_IMAGES
from refer.refer import REFER
from utils import Distributed, init_distributed

WIDTH, HEIGHT = 640, 480
WORDS = ("the", "a", "left", "right", "red", "tall", "man", "dog", "cup", "near", "behind", "window", "in", "front")
SMALL_MODEL = {
    "embed_dim": 32, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "window_size": 4, "text_dim": 32,
    "text_layers": 1, "text_heads": 2, "vocab_size": 60, "align_dim": 16,
}  # fmt: skip


class Size(NamedTuple):
    """Size of a generated split."""

    images: int
    refs: int
    expressions: int


REFCOCO_VAL = Size(1500, 3811, 10834)
# About as many refs per image and expressions per ref as in RefCOCO.
SMALL_SPLIT = Size(2, 5, 15)


def write_set(root: Path, size: Size, seed: int = 0) -> None:
    """Write a split named val in the REFER layout under ``root``/refcoco, with its images and a vocabulary."""
    source = np.random.default_rng(seed)
    folder, image_folder = root / "refcoco", root / COCO_IMAGES
    folder.mkdir(parents=True)
    image_folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *WORDS]) + "\n", encoding="utf-8")
    images = [
        {"id": i, "file_name": f"COCO_train2014_{i:012d}.jpg", "width": WIDTH, "height": HEIGHT}
        for i in range(size.images)
    ]
    for image in images:
        coarse = Image.fromarray(source.integers(0, 256, (HEIGHT // 20, WIDTH // 20, 3), dtype=np.uint8))
        coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(image_folder / image["file_name"])
    annotations, refs, sentences = [], [], 0
    for number in range(size.refs):
        x, y = int(source.integers(0, WIDTH // 2)), int(source.integers(0, HEIGHT // 2))
        w, h = int(source.integers(20, WIDTH // 2)), int(source.integers(20, HEIGHT // 2))
        image_id = number * size.images // size.refs
        outline = [x, y, x + w, y, x + w, y + h, x, y + h]
        annotations.append(
            {
                "id": number,
                "image_id": image_id,
                "category_id": 1,
                "area": w * h,
                "bbox": [x, y, w, h],
                "segmentation": [outline],
            }
        )
        until = (number + 1) * size.expressions // size.refs
        texts = [" ".join(source.choice(WORDS, source.integers(1, 8)).tolist()) for _ in range(sentences, until)]
        refs.append(
            {
                "ref_id": number,
                "ann_id": number,
                "image_id": image_id,
                "category_id": 1,
                "split": "val",
                "file_name": images[image_id]["file_name"],
                "sent_ids": list(range(sentences, until)),
                "sentences": [
                    {"sent_id": sentences + k, "raw": t, "sent": t, "tokens": t.split()} for k, t in enumerate(texts)
                ],
            }
        )
        sentences = until
    categories = [{"id": 1, "name": "thing"}]
    instances = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(instances), encoding="utf-8")
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))


def open_set(root: Path, img_size: int, *, packed: bool = False) -> ReferDataset:
    """Return the split. Its images are read from a new packed file if ``packed``."""
    refer, tokenizer = REFER(root), read_vocabulary(root / "refcoco" / "vocab.txt")
    files = [str(pack_split(refer, "val", img_size, root))] if packed else []
    source = open_source(files, refer, "val", img_size)
    return ReferDataset(refer, "val", tokenizer, img_size=img_size, source=source)


class EncodePerSentence(nn.Module):
    """A model with the interface that evaluate() uses. It encodes the image again for every sentence."""

    def __init__(self, model: CrossVLT) -> None:
        super().__init__()
        self.model = model

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def segment(self, images: torch.Tensor, *text: torch.Tensor, size: tuple[int, int]) -> CrossVLTOutput:
        return self.model(images, *text)


def measure_sharing(
    model: CrossVLT, dataset: ReferDataset, dist: Distributed, batch_sizes: list[int], repeats: int
) -> list[str]:
    """Return a table of expressions per second by batch size, with images encoded per sentence or once."""

    def rate(batch_size: int, shared: bool) -> float:
        evaluated = model if shared else EncodePerSentence(model)
        # At a batch size of 1, the image is also loaded again for each sentence.
        parts = [None] if shared or batch_size > 1 else [[index] for index in range(len(dataset))]
        started = time.perf_counter()
        for indices in parts:
            evaluate(evaluated, dataset, [PAPER], EvalSetup(dist, batch_size), indices=indices)
        return len(dataset) / (time.perf_counter() - started)

    rate(1, True)  # warm-up
    rates: dict[tuple[int, bool], list[float]] = {
        (size, shared): [] for size in batch_sizes for shared in (False, True)
    }
    for _ in range(
        repeats
    ):  # alternate between the cases, so that other load on the machine affects all of them equally
        for case, values in rates.items():
            values.append(rate(*case))
    lines = [
        "| batch | image encoded | expressions/s (median) | range | once ÷ per sentence |",
        "|---|---|---|---|---|",
    ]
    for (size, shared), values in rates.items():
        ratios = [a / b for a, b in zip(values, rates[size, False], strict=True)]
        ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}…{max(ratios):.3f})" if shared else ""
        encoded = "once" if shared else "per sentence" + (", and loaded" if size == 1 else "")
        spread = f"{min(values):.3f}…{max(values):.3f}"
        lines.append(f"| {size} | {encoded} | {statistics.median(values):.3f} | {spread} | {ratio} |")
    return [*lines, "", describe_shared_part(model, dataset)]


def describe_shared_part(model: CrossVLT, dataset: ReferDataset) -> str:
    """Return a sentence about the fraction of the computation that the sentences of an image share."""
    sample = dataset[0]
    inputs = (normalize_images(sample["image"])[None], sample["input_ids"][None], sample["attention_mask"][None])
    model, gflop = model.cpu(), []
    with torch.inference_mode():
        for forward in (lambda: model(*inputs), lambda: model.encode_images(inputs[0])):
            with FlopCounterMode(display=False) as counter:
                forward()
            gflop.append(counter.get_total_flops() / 1e9)
    total, shared = gflop
    return (
        f"{shared:.1f} of {total:.1f} GFLOP per expression ({shared / total:.1%}) are spent in the first vision "
        "stage, which is computed once per image."
    )


def resident_mib() -> float:
    """Return the resident memory of this process (Linux)."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


def measure_scale(
    model: CrossVLT, dataset: ReferDataset, dist: Distributed, batch_size: int, folder: Path
) -> list[str]:
    """Return a table of memory and time after each tenth of a split. All predicted masks are written to a file."""
    file = ResultFile(folder / "results.jsonl", {"splits": {"val": len(dataset)}, "protocols": [PAPER.settings()]})
    done = np.cumsum([0, *map(len, ImageBatches(dataset, batch_size).batches)]).tolist()  # before each batch
    marks: list[tuple[int, float, float]] = []  # expressions, memory in MiB, seconds
    started = time.perf_counter()

    def mark() -> bool:
        marks.append((done[len(marks)], resident_mib(), time.perf_counter() - started))
        return False

    with file:
        results = evaluate(model, dataset, [PAPER], EvalSetup(dist, batch_size, stop_requested=mark), sink=file)
    mark()
    lines = ["| expressions done | memory of the process | time |", "|---|---|---|"]
    for tenth in range(1, 11):
        count, memory, seconds = min(marks, key=lambda item: abs(item[0] - tenth * len(dataset) / 10))
        lines.append(f"| {count} | {memory:.0f} MiB | {seconds:.0f} s |")
    written = file.path.stat().st_size / 2**20
    overall = results["paper"].metrics["oIoU"]
    return [*lines, f"\nThe result file with all masks: {written:.1f} MiB; oIoU of the untrained model {overall:.2f}."]


def get_parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.evaluation", description=__doc__)
    parser.add_argument("--swin_type", choices=SWIN_VARIANTS, default="base")
    parser.add_argument("--img_size", type=int, default=480)
    parser.add_argument(
        "--batch_sizes",
        type=int,
        nargs="+",
        default=[1, 8],
        help="batch sizes; --scale uses the last one (default: 1 8)",
    )
    parser.add_argument("--repeats", type=int, default=3, help="number of timed runs (default: 3)")
    parser.add_argument(
        "--scale", action="store_true", help="measure memory and time on a split as large as RefCOCO val"
    )
    parser.add_argument(
        "--images", type=int, default=REFCOCO_VAL.images, help="for --scale: number of images (default: 1500)"
    )
    parser.add_argument("--packed", action="store_true", help="load images from a packed file (python -m data.pack)")
    parser.add_argument("--device", default="auto")
    parser.add_output("--out", kind=Kind.TEXT, metavar="FILE", help="also write the output to this file")
    return parser


def main() -> None:
    args = get_parser().parse_args()
    if min(args.images, args.repeats, *args.batch_sizes) < 1:
        raise UserError("--images, --repeats and --batch_sizes must be at least 1.")
    dist = init_distributed(args.device)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        if args.scale:
            factor = args.images / REFCOCO_VAL.images
            size = Size(args.images, round(REFCOCO_VAL.refs * factor), round(REFCOCO_VAL.expressions * factor))
            model, img_size, name = build_crossvlt("tiny", **SMALL_MODEL), 64, "a small model"
        else:
            size, img_size, name = SMALL_SPLIT, args.img_size, f"CrossVLT {args.swin_type}"
            model = build_crossvlt(args.swin_type)
        write_set(Path(folder), size)
        dataset = open_set(Path(folder), img_size, packed=args.packed)
        model = model.to(dist.device).eval()
        if args.scale:
            lines = measure_scale(model, dataset, dist, args.batch_sizes[-1], Path(folder))
        else:
            lines = measure_sharing(model, dataset, dist, args.batch_sizes, args.repeats)
    split = f"{size.expressions} expressions, {size.refs} refs, {size.images} images of {WIDTH}×{HEIGHT}"
    text = "\n".join([f"{name} at {img_size}×{img_size}: {split}", machine(dist.device), "", *lines])
    print(text)
    if args.out:
        write_text(args.out, text + "\n")


if __name__ == "__main__":
    run_command(main)
