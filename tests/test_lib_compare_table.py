"""lib.compare.results and .table: comparable result files, and the table in its formats."""

import csv
import io

import pytest
from result_files import EXPRESSIONS, with_counts, write_results

from lib.compare import table
from lib.compare.cost import Cost
from lib.compare.results import load_models
from lib.errors import UserError

SPLITS = ("val", "testA")


@pytest.fixture
def files(tmp_path):
    """Result files of two models with two seeds each."""
    counts = {
        "ours-0": ((90, 100), (50, 100), (0, 10), (60, 80)),
        "ours-1": ((80, 100), (40, 100), (1, 10), (64, 80)),
        "late_1-0": ((70, 100), (50, 100), (0, 10), (20, 80)),
        "late_1-1": ((60, 100), (30, 100), (0, 10), (30, 80)),
    }
    files = {}
    for name, pairs in counts.items():
        path = write_results(tmp_path / f"{name}.jsonl", with_counts(*pairs))
        files.setdefault(name.split("-")[0], []).append(path)
    return files


@pytest.fixture
def rows(files):
    return table.make_rows(load_models(files, SPLITS), load_models({"ours": files["ours"]}, SPLITS), "ours")


def test_rows(rows):
    assert [(row.split, row.model, row.seeds) for row in rows] == [
        ("val", "ours", 2), ("val", "late_1", 2), ("testA", "ours", 2), ("testA", "late_1", 2),
    ]  # fmt: skip
    ours, late = rows[:2]
    assert ours.mean.value == pytest.approx(100 * (0.9 + 0.5 + 0 + 0.8 + 0.4 + 0.1) / 6)
    assert ours.difference is None
    assert late.difference.value == pytest.approx(late.mean.value - ours.mean.value)
    assert ours.metrics["oIoU"][0] == pytest.approx(100 * (140 / 210 + 121 / 210) / 2)
    assert ours.shuffled == pytest.approx(ours.mean.value)


def test_costs(files):
    cost = Cost(2_345_678, 0.5, 12.34, "cpu, 2 threads")
    rows = table.make_rows(load_models(files, SPLITS), {}, "ours", {"ours": cost})
    markdown = table.markdown_table(rows, "ours")
    assert "| 2.346 | 0.5 | 12.3 |" in markdown
    assert markdown.count("| – | – | – |") == 4  # no cost of late_1, no difference of ours
    assert "timed on cpu, 2 threads" in markdown
    ours, late, *_ = csv.DictReader(io.StringIO(table.csv_table(rows)))
    assert (ours["parameters"], ours["GFLOP"], late["ms"]) == ("2345678.0", "0.5", "")


def test_formats(rows):
    markdown, latex = table.markdown_table(rows, "ours"), table.latex_table(rows, "ours")
    assert "| val | ours | 45.00 ± 2.36 |" in markdown
    assert r"45.00 $\pm$ 2.36" in latex
    assert r"late\_1" in latex
    assert r"95 \% interval" in latex
    assert markdown.count("\n|") == 5
    for text in (markdown, latex, table.text_table(rows, "ours")):
        assert "paired t-test over images" in " ".join(text.split())
        assert "Holm-corrected for all 2 differences" in " ".join(text.split())


def test_csv(rows):
    ours, late, *_ = csv.DictReader(io.StringIO(table.csv_table(rows)))
    assert (ours["model"], ours["difference"], ours["p Holm"]) == ("ours", "", "")
    assert late["shuffled"] == ""
    assert float(late["difference"]) == rows[1].difference.value
    assert float(late["p Holm"]) >= float(late["p"])


def test_a_single_seed_has_no_standard_deviation(files):
    first = {name: paths[:1] for name, paths in files.items()}
    text = table.text_table(table.make_rows(load_models(first, SPLITS), {}, "ours"), "ours")
    assert "±" not in text
    assert "intervals cover images only" in text
    assert "between seeds" not in text


def test_other_expressions_are_refused(files, tmp_path):
    files["late_1"][1] = write_results(tmp_path / "less.jsonl", EXPRESSIONS[1:])
    with pytest.raises(UserError, match=r"less.jsonl and .*ours-0.jsonl have different expressions of val \(2 and 3\)"):
        load_models(files, SPLITS)


def test_other_protocols_and_partial_files_are_refused(files, tmp_path):
    others = {"ours": files["ours"], "late_1": [write_results(tmp_path / "original.jsonl", protocols="original")]}
    with pytest.raises(UserError, match=r"original.jsonl has protocol original, but .*ours-0.jsonl has paper"):
        load_models(others, SPLITS)
    partial = write_results(tmp_path / "cut.jsonl", splits={"val": 3, "testA": 2}, complete=False)
    with pytest.raises(UserError, match=r"is partial: it has 4 of 5 expressions. Finish its evaluation first"):
        load_models({"ours": [partial]}, SPLITS)
