"""Test the annotation reader with thousands of corrupt and hostile files.

    python -m benchmarks.fuzz_annotations --cases 10000 --out benchmarks/results/fuzz_annotations.md

Valid annotation files (refs(unc).p and instances.json) are mutated at random. Each mutated file is opened together with
the valid version of the other file, and then used as programs do: splits, records, boxes, image paths, masks. The
reader must either read it or refuse it by a UserError, whose message is one short line that names a file.

Everything else is a finding, which makes the command fail: another exception, a crash, too much time or memory, a path
outside of the image folder, or any sign that code in the file is executed (an import, another file, a process, …).

The mutations are made by Hypothesis. They are the same for the same --seed, version of Hypothesis and code.
"""

import tempfile
from pathlib import Path

from lib.cli import Parser, run_command
from lib.errors import UserError
from lib.files import check_writable, write_text


def get_parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.fuzz_annotations", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="number of mutations of each file (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the mutations (default: 0)")
    parser.add_argument(
        "--limit", type=float, default=10, help="seconds that a call of the reader may take (default: 10)"
    )
    parser.add_argument("--memory", type=float, default=4, help="GiB that a process may allocate (default: 4)")
    parser.add_argument("--keep", metavar="DIR", help="folder for the files of findings (default: a temporary folder)")
    parser.add_argument("--out", metavar="FILE", help="also write the report to this file")
    return parser


def main() -> None:
    args = get_parser().parse_args()
    from benchmarks.fuzz_annotations.report import fuzz, save_findings

    if args.cases < 1 or min(args.limit, args.memory) <= 0:
        raise UserError("--cases, --limit and --memory must be positive")
    if args.out:
        check_writable(args.out)
    page, findings = fuzz(args.cases, args.seed, args.limit, args.memory)
    print(page)
    if args.out:
        write_text(args.out, page + "\n")
    if findings:
        folder = Path(args.keep or tempfile.mkdtemp(prefix="fuzz_findings_"))
        save_findings(findings, folder)
        raise UserError(f"{len(findings)} findings. Their files are in {folder}.")


if __name__ == "__main__":
    run_command(main)
