"""python -m lib.rescore on one or several files: metrics, filters, and the messages for mistakes."""

import json

import numpy as np
import pytest
from commands import run_in_process
from result_files import EXPRESSIONS, SETTINGS, scores, write_results

from lib import rescore
from lib.errors import EXIT_MISTAKE, MissingFileError, UserError
from lib.metrics import METRIC_NAMES, compute_metrics
from lib.report.intervals import Scoring, intervals
from lib.report.results import settings_path


def test_without_flags_the_metrics_are_those_of_the_evaluation(run_rescore, tmp_path):
    file = write_results(tmp_path / "a.jsonl")
    printed, warnings, report = run_rescore(file)
    assert not warnings
    val, test_a = report["results"]
    counts = [(90, 100), (50, 100), (0, 0)]
    assert val["metrics"] == compute_metrics(counts)
    assert test_a["metrics"] == compute_metrics([(60, 80)])
    assert (val["num_expressions"], val["of"], val["num_images"]) == (3, 3, 2)
    expected = intervals([11, 11, 12], np.array(counts), Scoring(draws=50))
    assert {name: tuple(bounds) for name, bounds in val["interval_95"].items()} == expected
    lines = printed.splitlines()
    assert lines[0] == f"{file}, refcoco (unc), float32"
    assert lines[1].split() == ["split", "protocol", *METRIC_NAMES, "expressions"]
    assert lines[2].split()[:9] == ["val", "paper", "66.67", "33.33", "33.33", "33.33", "33.33", "46.67", "70.00"]
    assert lines[2].endswith("3 of 3")
    assert lines[3].split() == [f"{expected[name][0]:.2f}…{expected[name][1]:.2f}" for name in METRIC_NAMES]
    assert lines[4].split()[:3] == ["testA", "paper", "100.00"]
    assert report["files"] == [{"file": str(file), **SETTINGS}]


def test_several_files_splits_and_protocols(run_rescore, tmp_path):
    first = write_results(tmp_path / "two.jsonl", protocols="paper,original", threshold=0.4)
    second = write_results(tmp_path / "one.jsonl", EXPRESSIONS[:1])
    *_, report = run_rescore(first, second)
    names = ["paper+threshold=0.4", "original+threshold=0.4"]
    assert [(row["file"], row["split"], row["protocol"]) for row in report["results"]] == [
        *((str(first), split, name) for split in ("val", "testA") for name in names),
        (str(second), "val", "paper"),
    ]
    *_, report = run_rescore(first, "--protocol", "original+threshold=0.4", "--split", "testA")
    assert scores(report) == {("testA", "original+threshold=0.4"): (1, 75)}


def test_the_order_of_lines_has_no_effect(run_rescore, tmp_path):
    file = write_results(tmp_path / "a.jsonl")
    *_, report = run_rescore(file)
    file.write_text("".join(reversed(file.read_text().splitlines(True))))
    assert run_rescore(file)[2] == report


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--split", "testA"], {"testA": (1, 75)}),
        (["--split", "testA, val"], {"val": (3, 140 / 3), "testA": (1, 75)}),
        (["--sentence", r"\bdog$"], {"val": (1, 90), "testA": (1, 75)}),
        (["--words", "2-5"], {"val": (2, 70), "testA": (1, 75)}),
        (["--words", "3-"], {"val": (1, 50)}),
        (["--sentences", "first"], {"val": (2, 45), "testA": (1, 75)}),
        (["--sentences", "first", "--words", "2-"], {"val": (1, 90), "testA": (1, 75)}),
        (["--words", "1-2", "--sentence", "dog", "--split", "val"], {"val": (1, 90)}),
        # the settings of the file
        (
            ["--threshold", "0.4", "--eval_size", "resized", "--max_tokens", "21"],
            {"val": (3, 140 / 3), "testA": (1, 75)},
        ),
        (["--gt_mask", "paper", "--split", "val"], {"val": (3, 140 / 3)}),
    ],
)
def test_filters(run_rescore, tmp_path, flags, expected):
    file = write_results(tmp_path / "a.jsonl", threshold=0.4)
    printed, _, report = run_rescore(file, *flags)
    assert scores(report) == {(split, "paper+threshold=0.4"): (n, round(m, 6)) for split, (n, m) in expected.items()}
    assert {row["split"]: row["of"] for row in report["results"]}.items() <= {"val": 3, "testA": 1}.items()
    for split, (number, _) in expected.items():
        assert f"{number} of {3 if split == 'val' else 1}\n" in printed


def test_filter_by_ids(run_rescore, tmp_path):
    ids = tmp_path / "ids.txt"
    ids.write_text("104\n\n 102 \n999\n")
    printed, _, report = run_rescore(write_results(tmp_path / "a.jsonl"), "--ids", ids, "--split", "val")
    assert scores(report) == {("val", "paper"): (1, 50)}
    assert printed.splitlines()[0].endswith(f"--split val --ids {ids}")


def test_other_thresholds_and_strict(run_rescore, tmp_path):
    file = write_results(tmp_path / "a.jsonl")  # IoUs of val: 0.9, 0.5, 0
    *_, report = run_rescore(file, "--split", "val", "--precision_at", "0.5,0.55,0.9,0", "--words", "1-9")
    values = report["results"][0]["metrics"]
    assert list(values) == ["P@0.5", "P@0.55", "P@0.9", "P@0.0", "mIoU", "oIoU"]
    assert [round(3 * values[name] / 100, 6) for name in list(values)[:4]] == [2, 1, 1, 3]
    printed, _, report = run_rescore(file, "--split", "val", "--precision_at", "0.5,0.55,0.9,0", "--strict")
    strict = report["results"][0]["metrics"]
    assert [round(3 * strict[name] / 100, 6) for name in list(values)[:4]] == [1, 1, 0, 2]
    assert strict["oIoU"] == values["oIoU"]
    assert printed.splitlines()[0].endswith("--strict")


def test_partial_files_are_reported(run_rescore, tmp_path):
    partial = write_results(tmp_path / "a.jsonl", EXPRESSIONS[:2], splits={"val": 3, "testA": 1}, complete=False)
    printed, warnings, report = run_rescore(partial)
    assert warnings == f"warning: {partial} is partial: it has 2 of 4 expressions.\n"
    assert report["warnings"] == [warnings.removeprefix("warning: ").strip()]
    assert scores(report) == {("val", "paper"): (2, 70)}
    assert "2 of 3\n" in printed
    assert [line.split() for line in printed.splitlines() if "testA" in line] == [
        ["testA", "paper", *"–" * 7, "0", "of", "1"]
    ]
    cut = write_results(tmp_path / "cut.jsonl")  # complete according to its settings
    cut.write_text("".join(cut.read_text().splitlines(True)[:-1]))
    assert "cut.jsonl is partial: it has 3 of 4" in run_rescore(cut)[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--threshold", "0.4"],
            r"--threshold 0.4: .*a\.jsonl has masks of protocol paper, which were made with "
            r"threshold None, and a binary mask has no probabilities\. Run test\.py --threshold 0\.4\.$",
        ),
        (["--eval_size", "original"], r"to the logits at another size\. Run test.py --eval_size original\.$"),
        (["--max_tokens", "30"], r"max_tokens 21, and the model .*\. Run test.py --max_tokens 30\.$"),
        (["--split", "val,tesTA"], r"--split tesTA: not in .*a.jsonl, which has val, testA\. Did you mean testA\?$"),
        (["--split", ","], r"--split ',' contains no name\.$"),
        (["--protocol", "original"], r"--protocol original: not in .*a.jsonl, which has paper\.$"),
        (["--sentence", "(dog"], r"--sentence \(dog: not a regular expression"),
        (["--words", "3"], "--words 3: not a range. Give MIN-MAX"),
        (["--words", "3-2"], "--words 3-2: not a range. Give MIN-MAX"),
        (["--words", "9-"], r"a\.jsonl: No expression matches these filters \(0 of 4\)\.$"),
        (["--precision_at", "50"], "--precision_at 50: not a list of IoUs from 0 to 1"),
        (["--precision_at", "0.5,"], "--precision_at 0.5,: not a list of IoUs"),
        (["--precision_at", "nan"], "--precision_at nan: not a list of IoUs"),
        (["--most", "-1"], "--most -1: must be at least 0"),
        (["--seed", "-1"], "--seed -1: must be at least 0"),
        (["--gt_mask", "both"], "--gt_mask: invalid choice"),
        (["--gtmask", "union"], r"Unknown flag --gtmask\. Did you mean --gt_mask\?"),
        (["--gt_mask", "union", "--refer_data_root", "/nowhere"], r"/nowhere/refcoco/refs\(unc\)\.p is missing"),
        (["--ids", "/nowhere.txt"], r"--ids /nowhere.txt: no such file or folder\.$"),
        (["--ids", __file__], "--ids .*: line 1 is not a sent_id"),
        (["--compare", __file__, __file__], "Pass result files, or two of them with --compare"),
        (["/nowhere.jsonl"], "/nowhere.jsonl"),
        ([__file__], r"test_lib_rescore\.py is corrupt: line 1 is not a result\."),
    ],
)
def test_messages_of_mistakes(run_rescore, tmp_path, flags, message):
    with pytest.raises(UserError, match=message) as caught:
        run_rescore(write_results(tmp_path / "a.jsonl"), *flags)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, MissingFileError) is any("/nowhere" in flag for flag in flags)


def test_a_mistake_is_reported_in_one_line_with_status_2(monkeypatch, capsys):
    finished = run_in_process(rescore.main, ["rescore"], monkeypatch, capsys)
    message = "error: Pass result files, or two of them with --compare A B. See --help.\n"
    assert finished == (EXIT_MISTAKE, "", message)


def test_the_message_names_the_protocol_of_the_file_that_has_the_requested_setting(run_rescore, tmp_path):
    file = write_results(tmp_path / "a.jsonl", protocols="paper,original")
    with pytest.raises(UserError, match=r"made with eval_size resized, .*\. Choose --protocol original\.$"):
        run_rescore(file, "--eval_size", "original")
    assert list(scores(run_rescore(file, "--eval_size", "original", "--protocol", "original")[2])) == [
        ("val", "original"),
        ("testA", "original"),
    ]


def test_corrupt_files_are_reported(run_rescore, tmp_path):
    file = write_results(tmp_path / "a.jsonl")
    settings_file = settings_path(file)
    settings, lines = settings_file.read_text(), file.read_text().splitlines(True)
    without_splits = json.dumps({**json.loads(settings), "splits": [1]})
    for written_settings, content, message in (
        (settings, [*lines, lines[0]], r"line 5 \(split val, index 0, protocol paper\) repeats line 1\."),
        (settings, [*lines, lines[0].replace('"index": 0', '"index": 2')], "line 5 .* repeats line 3"),
        (settings, [lines[0].replace('"paper"', '"other"')], "line 1 .* does not belong to this evaluation"),
        (settings.replace('"val"', '"wal"'), lines, "line 1 .* does not belong to this evaluation"),
        (settings.replace("splits", "parts"), lines, "it does not name the splits and protocols"),
        (without_splits, lines, "it does not name the splits and protocols"),
        (settings, ["{}\n"], "line 1"),
    ):
        settings_file.write_text(written_settings)
        file.write_text("".join(content))
        with pytest.raises(UserError, match=message):
            run_rescore(file)


def test_a_file_without_settings_is_accepted_with_a_note(run_rescore, tmp_path):
    """For example, predictions of another program."""
    file = write_results(tmp_path / "a.jsonl")
    *_, expected = run_rescore(file)
    settings_path(file).unlink()
    printed, warnings, report = run_rescore(file)
    note = f"{file} has no settings ({settings_path(file).name} is missing): its model is unknown, and whether it is"
    assert warnings == f"warning: {note} complete.\n"
    assert scores(report) == scores(expected)
    assert printed.splitlines()[0] == str(file)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match=r"empty\.jsonl contains no results\."):
        run_rescore(tmp_path / "empty.jsonl")
