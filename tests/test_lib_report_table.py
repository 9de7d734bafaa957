"""lib.report.table and lib.report.published: published rows, their checkpoints, and our numbers in four formats."""

import csv
import io
import json

import pytest

from lib.errors import MissingFileError, UserError
from lib.metrics import METRIC_NAMES
from lib.report.published import PUBLISHED, choose_rows, find_checkpoints
from lib.report.table import MeasuredRow, latex_table, markdown_table, measured_rows, text_table, write_tables

FIRST, LAST = PUBLISHED[0], PUBLISHED[-1]


@pytest.fixture
def rows():
    better = dict(zip(METRIC_NAMES, (value + 0.5 for value in FIRST.values), strict=True))
    worse = {name: 10.0 for name in METRIC_NAMES}
    spans = {name: (value - 1, value + 1) for name, value in better.items()}
    return [
        MeasuredRow(FIRST, "paper", better, spans, 10834, "best_refcoco.pth"),
        MeasuredRow(FIRST, "original", worse, spans, 10834, "best_refcoco.pth"),
        MeasuredRow(LAST, reason="no checkpoint for refcocog"),
    ]


def test_published_numbers():
    assert [(row.title, row.values[-1]) for row in PUBLISHED] == [
        ("RefCOCO val", 73.44), ("RefCOCO testA", 76.16), ("RefCOCO testB", 70.15), ("RefCOCO+ val", 63.60),
        ("RefCOCO+ testA", 69.10), ("RefCOCO+ testB", 55.23), ("G-Ref (umd) val", 62.68), ("G-Ref (umd) test", 63.75),
    ]  # fmt: skip
    for row in PUBLISHED:
        assert len(row.values) == len(METRIC_NAMES)
        assert list(row.values[:5]) == sorted(row.values[:5], reverse=True)
    assert [row.title for row in PUBLISHED if row.doubtful] == ["G-Ref (umd) test"]
    assert "oIoU" not in LAST.doubtful


def test_the_text_table_has_our_and_published_numbers_and_the_difference(rows):
    text = text_table(rows, "paper")
    lines = text.splitlines()
    assert lines[1].split() == ["RefCOCO", "val", "ours", *(f"{value + 0.5:.2f}" for value in FIRST.values)]
    assert lines[2].split() == ["paper", *(f"{value:.2f}" for value in FIRST.values)]
    assert lines[3].split() == ["difference", *["+0.50"] * 7]
    assert lines[4].split() == ["G-Ref", "(umd)", "test", "ours", *["–"] * 7]
    assert lines[5].split() == ["paper", *(f"{value:.2f}†" for value in LAST.values[:-1]), "63.75"]
    assert len({line.index(cell) + len(cell) for line in lines[1:3] for cell in line.split()[-1:]}) == 1
    assert "† equals the value published for another method" in text
    assert "G-Ref (umd) test: no checkpoint for refcocog" in text
    other = text_table(rows, "original")
    assert "−63.44" in other
    assert "differences come from both protocol and model" in other
    assert "differences come" not in text


def test_written_tables_agree(rows, tmp_path):
    paths = write_tables(rows, tmp_path / "new")
    assert [path.name for path in paths] == ["table.md", "table.tex", "table.csv", "table.json"]
    markdown, latex, table, entries = (path.read_text(encoding="utf-8") for path in paths)
    assert markdown.count("| RefCOCO val | ours |") == 2  # under each protocol
    assert markdown == "\n".join(markdown_table(rows, name) for name in ("paper", "original"))
    columns = {line.count("|") for line in markdown.splitlines() if line.startswith("|")}
    assert columns == {len(METRIC_NAMES) + 3}
    assert all(latex_table(rows, name) in latex for name in ("paper", "original"))
    assert latex.index(r"\usepackage{booktabs}") < latex.index(r"\begin{document}") < latex.index("tabular")
    body = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert {line.count("&") for line in body} == {len(METRIC_NAMES) + 1}
    assert r"71.54\textsuperscript{\dag}" in latex
    assert "$-$63.44" in latex
    assert r"\textsuperscript{\dag} equals the value" in latex
    assert not set("−–†") & set("\n".join(body))
    lines = list(csv.DictReader(io.StringIO(table)))
    assert len(lines) == 3 * len(METRIC_NAMES)
    assert lines[6] == {
        "dataset": "refcoco", "split_by": "unc", "split": "val", "protocol": "paper", "metric": "oIoU",
        "ours": "73.9400", "low": "72.9400", "high": "74.9400", "paper": "73.44", "difference": "0.5000",
        "doubtful": "0", "expressions": "10834", "published_expressions": "10834",
    }  # fmt: skip
    assert (lines[-2]["ours"], lines[-2]["doubtful"], lines[-1]["doubtful"]) == ("", "1", "0")
    first, _, last = json.loads(entries)
    assert first["difference"]["mIoU"] == pytest.approx(0.5)
    assert (last["ours"], last["not_measured"]) == (None, "no checkpoint for refcocog")


def test_rows_with_another_number_of_expressions_are_marked(rows, tmp_path):
    note = "RefCOCO val has 10833 expressions here, but 10834 as published"
    assert "‡" not in text_table(rows, "paper")
    other = [rows[0]._replace(num_expressions=10833), *rows[1:]]
    assert "RefCOCO val‡ " in text_table(other, "paper")
    assert f"‡ {note}" in text_table(other, "paper")
    assert "‡" not in text_table(other, "original")
    markdown, latex, table, entries = (path.read_text(encoding="utf-8") for path in write_tables(other, tmp_path))
    assert markdown.count("‡") == latex.count(r"\ddag") == 2
    assert note in latex
    first = next(csv.DictReader(io.StringIO(table)))
    assert (first["expressions"], first["published_expressions"]) == ("10833", "10834")
    assert [entry["published_expressions"] for entry in json.loads(entries)] == [10834, 10834, 9602]


def test_a_table_without_measured_rows_is_an_error(rows, tmp_path):
    with pytest.raises(UserError, match="no row can be measured: no checkpoint for refcocog"):
        write_tables(rows[2:], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_row_is_read_from_its_result_file(tmp_path):
    names, path = ("paper", "original"), tmp_path / "a.jsonl"
    header = {"format": "crossvlt results 1", "complete": True, "checkpoint": "a.pth"}
    header |= {"splits": {"val": 2}, "protocols": [{"name": name} for name in names]}
    (tmp_path / "a.jsonl.settings.json").write_text(json.dumps(header))
    lines = [
        {
            "split": "val", "index": index, "image_id": index, "ref_id": index, "sent_id": index, "sentence": "a",
            "protocol": name, "intersection": counts[0] if name == "paper" else 0, "union": counts[1],
        }
        for index, counts in enumerate(((1, 2), (3, 3)))
        for name in names
    ]  # fmt: skip
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    paper, original = measured_rows(FIRST, path)
    assert (paper.protocol, paper.num_expressions, paper.metrics["mIoU"]) == ("paper", 2, pytest.approx(75))
    assert paper.metrics["oIoU"] == pytest.approx(80)
    assert paper.intervals["mIoU"] == (50, 100)
    assert paper.checkpoint == "a.pth"
    assert set(original.metrics.values()) == {0.0}


def test_checkpoints_are_found_in_a_folder(tmp_path):
    with pytest.raises(MissingFileError, match=r"no best_<dataset>\.pth for any of refcoco, refcoco\+, refcocog"):
        find_checkpoints(tmp_path)
    (tmp_path / "refcocog").mkdir()
    for name in ("best_refcoco.pth", "refcoco.pth", "best_refcoco+.pth", "refcocog/best.pth"):
        (tmp_path / name).touch()
    found = {name: str(path.relative_to(tmp_path)) for name, path in find_checkpoints(tmp_path).items()}
    assert found == {"refcoco": "best_refcoco.pth", "refcoco+": "best_refcoco+.pth", "refcocog": "refcocog/best.pth"}


def test_checkpoints_are_listed_in_a_yaml_file(tmp_path):
    (tmp_path / "a.pth").touch()
    listed = tmp_path / "sets.yaml"
    listed.write_text("refcoco+: a.pth\n")
    assert find_checkpoints(listed) == {"refcoco+": tmp_path / "a.pth"}
    for content, message in (
        ("refcoc: a.pth", "unknown dataset 'refcoc'\\. Did you mean refcoco"),
        ("refcoco: b.pth", "refcoco: no file"),
        ("- a.pth", "is not a YAML file with lines `dataset: file`"),
        ("refcoco: [1]", "is not a YAML file with lines `dataset: file`"),
        ("a: b: c", "is not a YAML file with lines `dataset: file`"),
        ("refcoco: " + "9" * 5000, "is not a YAML file with lines `dataset: file`"),
        ("", "is not a YAML file with lines `dataset: file`"),
    ):
        listed.write_text(content)
        with pytest.raises(UserError, match=message):
            find_checkpoints(listed)
    with pytest.raises(MissingFileError, match="no such folder or file"):
        find_checkpoints(tmp_path / "none")


def test_flags_select_rows():
    assert choose_rows(None, None, None) == list(PUBLISHED)
    assert [row.title for row in choose_rows("refcocog", None, " test")] == ["G-Ref (umd) test"]
    assert [row.split for row in choose_rows("refcoco", "unc", "testB, val")] == ["val", "testB"]
    for flags, message in (
        (("refcocog", "google", None), "none with this --dataset and --splitBy"),
        (("refcoco", None, "val,tstA"), "no published row has split 'tstA'"),
        (("refshapes", None, "all"), "none with this"),
    ):
        with pytest.raises(UserError, match=message):
            choose_rows(*flags)
