"""Compare models: train each with several seeds, evaluate all under one protocol, and report the differences.

    python -m data.refshapes --level full --train-images 1600 --root refer/data/full
    python -m lib.compare configs/compare/refshapes.yaml --seeds 3 --jobs 2       # writes models/compare
    python -m lib.compare configs/compare/refshapes.yaml --seeds 3 --dry-run      # prints the commands of all runs
    python -m lib.compare configs/compare/refshapes.yaml --from other.pth masks.jsonl     # with further models
    python -m lib.compare --from results/*.jsonl --out models/comparison                  # result files only

Interrupt it at any time: the same command continues. Finished runs are kept, and the report is written again from the
stored predictions. The commands of --dry-run can also be run elsewhere, for example on a cluster. lib/compare/plan.py
describes the YAML file, lib/compare/sources.py the files of --from.
"""

import sys
from pathlib import Path

from lib.charts import check_matplotlib
from lib.cli import Parser, run_command
from lib.errors import UserError
from lib.files import Kind, check_writable


def get_parser() -> Parser:
    parser = Parser(prog="python -m lib.compare", description=__doc__)
    add = parser.add_argument
    config_help = "the comparison, such as configs/compare/refshapes.yaml"
    parser.add_input("config", must_exist=True, nargs="?", metavar="YAML", help=config_help)
    add("--seeds", type=int, default=3, metavar="N", help="train each model with the seeds 0 to N - 1 (%(default)s)")
    out_help = "folder of the runs and the report (%(default)s)"
    parser.add_output("--out", kind=Kind.FOLDER, default="models/compare", metavar="DIR", help=out_help)
    add("--jobs", type=int, default=1, metavar="N", help="number of runs at a time; they share the cores (%(default)s)")
    add("--dry-run", action="store_true", help="only print the commands of the runs, one line per run")
    from_help = "further models: checkpoints, result files of test.py --predictions, or files of predicted masks"
    parser.add_input("--from", dest="sources", must_exist=True, nargs="+", default=[], metavar="FILE", help=from_help)
    add("--reference", metavar="NAME", help="the model that the others are compared with (default: that of the YAML)")
    return parser


def main() -> None:
    args = get_parser().parse_args(sys.argv[1:])
    for name in ("seeds", "jobs"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1.")
    if not args.config and not args.sources:
        raise UserError("Give the YAML file of a comparison, or files with --from. See --help.")

    from lib.compare.jobs import execute, threads_per_job
    from lib.compare.plan import choose_reference, command_lines, plan_runs, read_comparison
    from lib.compare.sources import comparison_of, evaluate_masks_of, read_sources, runs_of
    from lib.locks import lock
    from refer.datasets import check_dataset

    folder, comparison = Path(args.out), read_comparison(args.config) if args.config else None
    sources = read_sources(args.sources, [model.name for model in comparison.models] if comparison else [])
    comparison = comparison or comparison_of(sources)
    runs = plan_runs(comparison, folder, args.seeds) + runs_of(sources, comparison, folder)
    names = list(dict.fromkeys([*(run.model.name for run in runs), *(source.model for source in sources)]))
    reference = choose_reference(comparison, names, args.reference)
    if args.dry_run:
        print("\n".join(command_lines(runs, threads_per_job(args.jobs))))
        return
    check_matplotlib("The report of a comparison")
    if comparison.data:
        data = comparison.data.DATA
        check_dataset(data.ROOT, data.NAME, data.SPLIT_BY)
    check_writable(folder, Kind.FOLDER)
    busy = f"Another comparison is writing {folder}"
    with lock(folder / ".lock", busy, "Wait until it has finished, stop it, or choose another --out."):
        execute(runs, args.jobs)

        from lib.compare.report import write_report  # after the runs, which need the memory
        from lib.compare.results import result_files

        evaluate_masks_of(sources, comparison, folder)
        files, shuffled = (result_files(runs, sources, folder, suffix) for suffix in ("", "-shuffled"))
        for path in write_report(comparison, reference, files, shuffled, runs, folder):
            print(path)


if __name__ == "__main__":
    run_command(main)
