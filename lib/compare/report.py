"""Write the report of a comparison from its stored predictions."""

from collections.abc import Sequence
from pathlib import Path

from lib.compare import table
from lib.compare.plan import Comparison, Run
from lib.compare.results import finished_files, load_models
from lib.files import write_text


def write_report(comparison: Comparison, runs: Sequence[Run], folder: Path) -> list[Path]:
    """Print the table, write all files of the report and return their paths. UserError: a file cannot be used."""
    results = load_models(finished_files(runs), comparison.splits)
    shuffled = load_models(finished_files(runs, "-shuffled"), comparison.splits)
    rows = table.make_rows(results, shuffled, comparison.reference)
    print(f"\n{table.text_table(rows, comparison.reference)}\n")
    contents = {
        "table.md": table.markdown_table(rows, comparison.reference),
        "table.tex": table.latex_table(rows, comparison.reference),
        "table.csv": table.csv_table(rows),
    }
    for name, content in contents.items():
        write_text(folder / name, content)
    return [folder / name for name in contents]
