"""python -m refer.stats: the table, the JSON report, the figure, and the messages for mistakes."""

import json
import re
import sys

import numpy as np
import pytest
from commands import run_in_process
from matplotlib.colors import to_hex
from PIL import Image
from stats_datasets import REFS, SEGMENTATIONS, count_tokens, write_dataset

from lib.charts import COLORS
from refer.refer import REFER
from refer.stats.__main__ import main
from refer.stats.figure import draw_statistics
from refer.stats.statistics import statistics_of


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "red", "dog", "a", "cat"]) + "\n")
    return path


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """``run("--flag", …)`` runs the command in a new folder and returns exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    return lambda *flags: run_in_process(main, ["stats", *flags], monkeypatch, capsys)


def rows_of(output):
    """{label: cells} of the first table of an output."""
    rows = [re.split(r" {2,}", line) for line in output.split("\n\n")[0].splitlines()]
    return {label: cells for label, *cells in rows}


def test_the_table_and_the_json_report_have_the_same_numbers(tmp_path, run, vocabulary):
    refer = write_dataset(tmp_path)
    status, out, _ = run("--refer_data_root", ".", "--bert_tokenizer", vocabulary, "--json", "a/stats.json")
    assert status == 0
    assert out.startswith("refcoco (unc), refcoco/refs(unc).p\n")
    assert out.splitlines()[-2:] == ["a/stats.json", "models/stats/refcoco_unc.png"]
    report = json.loads((tmp_path / "a/stats.json").read_text())
    assert report["max_tokens"] == 21
    assert report["tokenizers"]["refcoco"].startswith("10 tokens, sha256 ")
    assert report["shared_images"] == [{"splits": ["train", "val"], "images": 1, "expressions": [3, 2], "leak": True}]
    assert report["splits"] == [one.summary for one in statistics_of(refer, count_tokens)]
    rows, splits = rows_of(out), report["splits"]
    assert rows[""] == [row["split"] for row in splits] == ["train", "val", "testA"]
    for label, key in (
        ("refs", "refs"),
        ("expressions", "expressions"),
        ("images", "images"),
        ("objects", "objects"),
        ("categories", "categories"),
        ("objects with an empty mask", "empty_masks"),
    ):
        assert rows[label] == [str(row[key]) for row in splits]
    for label, key in (
        ("expressions with more than 21 tokens", "cut"),
        ("expressions used for several objects", "ambiguous"),
        ("objects with several parts", "several_parts"),
        ("objects with overlapping parts", "overlap"),
    ):
        assert rows[label] == [f"{row[key]['count']} ({row[key]['percent']:.2f} %)" for row in splits]
    assert rows["stored areas that differ by over 1 %"] == ["0 (0.00 %)", "1 (50.00 %)", "–"]
    assert rows["pixels lost by overlaps in paper mode"] == ["–", "8.70 %", "–"]
    for label, key in (
        ("expressions per ref", "expressions_per_ref"),
        ("words", "words"),
        ("tokens with [CLS] and [SEP]", "tokens"),
        ("object size in % of the image", "size_percent"),
    ):
        for name, statistic in (("mean", "mean"), ("5 %", "p5"), ("median", "median"), ("maximum", "maximum")):
            assert rows[f"{label}: {name}"] == [f"{row[key][statistic]:.2f}" for row in splits]


def test_refshapes_has_its_own_vocabulary(refshapes_root, run):
    status, out, err = run("--dataset", "refshapes", "--refer_data_root", refshapes_root, "--json", "stats.json")
    assert (status, err) == (0, "")
    refer, rows = REFER(refshapes_root, "refshapes", "unc"), rows_of(out)
    assert rows[""] == ["train", "val", "testA", "testB"]
    for column, split in enumerate(rows[""]):
        refs = refer.loadRefs(refer.getRefIds(split=split))
        expected = len(refs), sum(len(ref["sentences"]) for ref in refs), len({ref["image_id"] for ref in refs})
        assert tuple(int(rows[label][column]) for label in ("refs", "expressions", "images")) == expected
        # All words are in its vocabulary, so that there are two tokens more than words.
        words, tokens = (float(rows[f"{label}: mean"][column]) for label in ("words", "tokens with [CLS] and [SEP]"))
        assert tokens == pytest.approx(words + 2, abs=0.011)
        assert rows["stored areas that differ by over 1 %"][column] == "0 (0.00 %)"
    assert "\nNo image is in two splits (same file or same COCO number).\n" in out
    assert out.splitlines()[-1] == "models/stats/refshapes_unc.png"


def test_without_a_vocabulary_words_are_counted(tmp_path, run):
    write_dataset(tmp_path)
    status, out, err = run("--refer_data_root", ".")
    assert status == 0
    (warning,) = err.splitlines()
    assert "Sentence lengths are counted in words only: " in warning
    assert "tokens" not in out
    assert rows_of(out)["words: mean"] == ["8.00", "10.50", "2.00"]
    assert (tmp_path / "models/stats/refcoco_unc.png").exists()
    status, _, err = run("--refer_data_root", ".", "--bert_tokenizer", "absent/vocab.txt")
    assert status == 2
    assert err.startswith("error: --bert_tokenizer absent/vocab.txt: ")
    assert len(err.splitlines()) == 1


def test_without_matplotlib_there_is_no_figure(tmp_path, run, vocabulary, monkeypatch):
    write_dataset(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    status, out, err = run("--refer_data_root", ".", "--bert_tokenizer", vocabulary, "--json", "stats.json")
    assert status == 0
    (warning,) = err.splitlines()
    assert "No figure: Drawing needs matplotlib. Run: pip install -r requirements-extra.txt" in warning
    assert rows_of(out)["refs"] == ["1", "3", "1"]
    assert (tmp_path / "stats.json").exists()
    assert list(tmp_path.rglob("*.png")) == []


def test_invalid_masks_are_left_out_and_the_first_is_reported(tmp_path, run, vocabulary):
    write_dataset(tmp_path, segmentations=SEGMENTATIONS | {102: [[1, 2]], 104: []})
    status, out, err = run("--refer_data_root", ".", "--bert_tokenizer", vocabulary, "--json", "stats.json")
    assert status == 2
    (line,) = err.splitlines()
    assert line.startswith("error: 2 objects have invalid masks and were left out. The first: refcoco/instances.json: ")
    assert "annotation 102 of ref 0: a polygon" in line
    val, test_a = json.loads((tmp_path / "stats.json").read_text())["splits"][1:]
    assert val["undrawable"]["count"] == 1
    assert val["size_percent"]["maximum"] == pytest.approx(100 * 125 / 600)
    assert test_a["size_percent"] is None
    rows = rows_of(out)
    assert rows["objects"] == ["1", "2", "1"]
    assert rows["objects with several parts"] == ["0 (0.00 %)", "1 (100.00 %)", "–"]
    assert rows["object size in % of the image: mean"][2] == "–"
    assert (tmp_path / "models/stats/refcoco_unc.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "refcocoo"], "'refcocoo'.* refcoco"),
        (["--splitBy", "umd"], "refcoco has no splitBy 'umd'"),
        (["--dataset", "refcoco,refcocog", "--splitBy", "umd"], "refcoco has no splitBy 'umd'"),
        (
            ["--dataset", "refcoco,refcocog", "--splitBy", "unc,umd,google"],
            "--splitBy unc,umd,google: 3 names for 2 datasets. Pass one for each",
        ),
        (["--dataset", ","], "--dataset ',' contains no name"),
        (["--dataset", "refcocog"], r"refcocog/refs\(umd\)\.p .*`python -m refer\.prepare --dataset refcocog"),
        (["--max_tokens", "0"], "--max_tokens 0: must be above 0"),
        (["--split_by", "unc"], r"Unknown flag --split_by\. Did you mean --splitBy\?"),
        (["--out", "refcoco"], "Cannot write refcoco: it is a folder"),
        (["--out", "refcoco/instances.json"], "Cannot write refcoco/instances.json: the name must end in .png"),
        (["--json", "refcoco/instances.json"], "Cannot write refcoco/instances.json: it is one of the input files"),
        (["--json", "refcoco/instances.json/x"], "Cannot write refcoco/instances.json/x: "),
    ],
)
def test_messages_of_mistakes(tmp_path, run, vocabulary, flags, message):
    write_dataset(tmp_path)
    status, out, err = run("--refer_data_root", ".", "--bert_tokenizer", vocabulary, *flags)
    assert status == 2
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert re.search(message, err), err
    assert out == ""


def test_the_figure_is_written_and_not_blank(tmp_path, run, vocabulary):
    write_dataset(tmp_path)
    assert run("--refer_data_root", ".", "--bert_tokenizer", vocabulary, "--out", "b/stats.png")[0] == 0
    with Image.open(tmp_path / "b/stats.png") as image:
        assert (image.format, image.size) == ("PNG", (1600, 1088))
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for color in COLORS[:3]:  # of train, val and testA
        rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == rgb).all(1).sum() > 1000, color
    assert not (tmp_path / "models").exists()


def panels(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def test_the_figure_shows_the_numbers(tmp_path):
    shown = panels(draw_statistics([statistics_of(write_dataset(tmp_path), count_tokens)]))
    assert list(shown) == ["Sentence lengths", "Object sizes", "Expressions per ref", "Parts"]
    lengths = shown["Sentence lengths"]
    lines = {line.get_label(): line for line in lengths.lines}
    val = lines["val: 25.00 % cut"]
    assert to_hex(val.get_color()) == COLORS[1]
    values = dict(zip(val.get_xdata().tolist(), val.get_ydata().tolist(), strict=True))
    assert {x: y for x, y in values.items() if y} == {3: 25, 4: 25, 21: 25, 22: 25}
    assert {"train: 33.33 % cut", "testA: 0.00 % cut"} < set(lines)
    assert [line.get_xdata()[0] for line in lengths.lines if line.get_linestyle() == "--"] == [21.5]
    assert [text.get_text() for text in lengths.texts] == ["cut at 21"]
    sizes = shown["Object sizes"]
    assert sizes.get_xscale() == "log"
    for patch in sizes.patches:
        assert patch.get_data().values.sum() == pytest.approx(100)
    heights = [[bar.get_height() for bar in group] for group in shown["Expressions per ref"].containers]
    assert heights == [[0, 0, 100], [pytest.approx(200 / 3), pytest.approx(100 / 3), 0], [100, 0, 0]]
    heights = [[bar.get_height() for bar in group] for group in shown["Parts"].containers]
    assert heights == [[100, 0], [0, 100], [100, 0]]
    texts = [text.get_text() for text in shown["Parts"].get_legend().get_texts()]
    assert texts == ["train: 0.00 % overlap", "val: 50.00 % overlap", "testA: 0.00 % overlap"]


def test_many_parts_share_the_last_bars_and_every_dataset_has_four_panels(tmp_path):
    many = [[x, 0, x + 1, 0, x + 1, 1, x, 1] for x in range(0, 24, 2)]
    empty = {"size": [20, 30], "counts": [600]}
    first = statistics_of(write_dataset(tmp_path, segmentations=SEGMENTATIONS | {101: many, 104: empty}), count_tokens)
    second = statistics_of(write_dataset(tmp_path, REFS, dataset="$a{$"))
    figure = draw_statistics([first, second])
    assert len(figure.axes) == 8
    assert [label.get_text() for label in figure.axes[3].get_xticklabels()] == [*"1234567", "8+"]
    assert figure.axes[3].containers[0][7].get_height() == 100
    assert figure.axes[4].get_xlabel() == "words"
    assert len(figure.axes[4].texts) == 0  # no cut
    figure.draw_without_rendering()  # $a{$ is not parsed as a formula
