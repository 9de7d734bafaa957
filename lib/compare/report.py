"""Write the report of a comparison from its stored predictions."""

from collections.abc import Sequence
from pathlib import Path

from lib.compare import table
from lib.compare.cost import costs_of
from lib.compare.plan import Comparison, Run
from lib.compare.results import load_models
from lib.files import write_text

Files = dict[str, list[Path]]  # result files of each model, one per seed


def write_report(
    comparison: Comparison, reference: str, files: Files, shuffled: Files, runs: Sequence[Run], folder: Path
) -> list[Path]:
    """Print the table, write all files of the report and return their paths.

    Args:
        comparison: splits and protocol.
        reference: name of the model that the others are compared with.
        files: the results; ``shuffled``: those with shuffled sentences, for some or all of the models.
        runs: the trained and evaluated runs, for the costs of the models.
        folder: where the report is written.

    Raises:
        UserError: a result file cannot be used.
    """
    results = load_models(files, comparison.splits)
    controls = load_models(shuffled, comparison.splits) if shuffled else {}
    rows = table.make_rows(results, controls, reference, costs_of(runs, folder))
    print(f"\n{table.text_table(rows, reference)}\n")
    contents = {
        "table.md": table.markdown_table(rows, reference),
        "table.tex": table.latex_table(rows, reference),
        "table.csv": table.csv_table(rows),
    }
    for name, content in contents.items():
        write_text(folder / name, content)
    return [folder / name for name in contents]
