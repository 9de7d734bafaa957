"""Draw the curves of training runs: losses, learning rate, gradient norm, speed and evaluation metrics.

python -m lib.plot models/mine                                   # writes models/mine/curves.png
python -m lib.plot models/mine models/other --out curves.png     # compares runs

Drawing needs matplotlib (requirements-extra.txt).
"""

import sys
from pathlib import Path

from lib.cli import Parser, run_command
from lib.errors import UserError
from lib.files import Kind, check_writable


def get_parser() -> Parser:
    parser = Parser(prog="python -m lib.plot", description=__doc__)
    parser.add_input(
        "runs", nargs="+", metavar="RUN", help="folder of a run, such as models/<model_id>, or its metrics.jsonl"
    )
    parser.add_output(
        "--out", kind=Kind.PNG, metavar="FILE", help="the PNG (default for a single run: curves.png in its folder)"
    )
    return parser


def main() -> None:
    args = get_parser().parse_args(sys.argv[1:])

    from lib.charts import save_png
    from lib.report.curves import DPI, draw_curves, find_metrics_file, read_metrics, run_names

    files = [find_metrics_file(run) for run in args.runs]
    if not args.out and len(files) > 1:
        raise UserError("Several runs were given. Choose the file of their figure with --out FILE.")
    out = Path(args.out) if args.out else files[0].with_name("curves.png")
    runs = {name: read_metrics(file) for name, file in zip(run_names(files), files, strict=True)}
    check_writable(out, Kind.PNG)
    save_png(draw_curves(runs), out, dpi=DPI)
    print(out)


if __name__ == "__main__":
    run_command(main)
