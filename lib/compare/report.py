"""Write the report of a comparison from its stored predictions."""

from collections.abc import Sequence
from pathlib import Path

from lib.charts import save_png
from lib.compare import charts, table
from lib.compare.cost import costs_of
from lib.compare.gallery import draw_sheet, make_sections
from lib.compare.kinds import groupings
from lib.compare.page import make_page
from lib.compare.plan import Comparison, Run
from lib.compare.results import load_models, pool
from lib.files import write_text
from refer.refer import REFER

Files = dict[str, list[Path]]  # result files of each model, one per seed


def write_report(
    comparison: Comparison, reference: str, files: Files, shuffled: Files, runs: Sequence[Run], folder: Path
) -> list[Path]:
    """Print the table, write all files of the report and return their paths.

    Args:
        comparison: splits, protocol and dataset. Without a dataset, there are no images of expressions.
        reference: name of the model that the others are compared with.
        files: the results; ``shuffled``: those with shuffled sentences, for some or all of the models.
        runs: the trained and evaluated runs, for the costs and the learning curves of the models.
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
    models, refer = pool(results), None
    if comparison.data:
        refer = REFER(comparison.data.DATA.ROOT, comparison.data.DATA.NAME, comparison.data.DATA.SPLIT_BY)
    kinds = charts.draw_kinds({model.name: model.ious for model in models}, groupings(models[0].lines[0], refer))
    figures = {
        "Learning curves: mean and range of the seeds": charts.draw_curves(charts.read_runs(runs), list(files)),
        "Mean IoU by kind of expression, all splits": kinds,
    }
    paths = []
    for name, figure in ((name, figure) for group in figures.values() for name, figure in group.items()):
        paths.append(folder / f"{name}.png")
        save_png(figure, paths[-1], dpi=charts.DPI)
    images = {
        title: {name: (folder / f"{name}.png").read_bytes() for name in group} for title, group in figures.items()
    }
    sections = make_sections(models, reference, refer, comparison.protocol) if refer else []
    for number, section in enumerate(sections, 1):
        paths.append(folder / f"sheet_{number}.png")
        draw_sheet(section).save(paths[-1])
    contents["report.html"] = make_page(rows, reference, images, sections)
    for name, content in contents.items():
        write_text(folder / name, content)
        paths.append(folder / name)
    return paths
