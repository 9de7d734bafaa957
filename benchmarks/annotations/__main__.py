"""Measure how long the annotations of a training split take to load, and how much memory DataLoader workers need.

    python -m benchmarks.annotations                                              # a generated split of RefCOCO's size
    python -m benchmarks.annotations --bert_tokenizer pretrained/vocab.txt

The output is Markdown with machine and versions; benchmarks/results/annotations_cpu.md is a recorded run.
"""

import tempfile
from pathlib import Path

from lib.cli import Parser, run_command
from lib.errors import UserError
from lib.files import Kind, write_text


def get_parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.annotations", description=__doc__)
    parser.add_input("--bert_tokenizer", metavar="BERT", help="vocabulary (default: a generated one)")
    parser.add_argument("--repeats", type=int, default=3, help="number of times to load the annotations (default: 3)")
    parser.add_argument("--workers", type=int, default=4, help="data-loading processes (default: 4)")
    parser.add_argument("--share", type=float, default=1.0, help="size relative to RefCOCO's train split (default: 1)")
    parser.add_output("--out", kind=Kind.TEXT, metavar="FILE", help="also write the output to this file")
    return parser


def main() -> None:
    args = get_parser().parse_args()
    from benchmarks.annotations.generate import REFCOCO_TRAIN, Size, generate_dataset
    from benchmarks.annotations.measure import BATCH_SIZE, report

    size = Size._make(round(count * args.share) for count in REFCOCO_TRAIN)
    if min(args.repeats, args.workers) < 1 or size.refs < 2 * args.workers * BATCH_SIZE:
        raise UserError(
            "--repeats and --workers must be at least 1, and --share large enough for 2 batches per worker."
        )
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = generate_dataset(Path(folder), size)
        text = report(Path(folder), args.bert_tokenizer or str(vocabulary), args.repeats, args.workers)
    print(text)
    if args.out:
        write_text(args.out, text + "\n")


if __name__ == "__main__":
    run_command(main)
