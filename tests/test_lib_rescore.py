"""Result files scored again: against values worked out by hand, and what can't be done ends in one line."""

import json
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

import utils
from lib import rescore
from lib.cli import run_command
from lib.errors import MissingFileError, UserError
from lib.metrics import METRIC_NAMES, SegmentationMetrics, iou
from lib.protocols import choose_protocols
from lib.report.bootstrap import intervals, paired_intervals
from lib.report.results import ResultFile, settings_path
from refer.masks import encode_mask
from refer.refer import REFER

H, W, IMG_SIZE = 20, 30, 16
SQUARE = [2, 2, 12, 2, 12, 12, 2, 12]  # 10 × 10 pixels
SHIFTED = [8, 8, 18, 8, 18, 18, 8, 18]  # overlaps SQUARE in 4 × 4 of them
# split, ref_id, image_id, sent_id, sentence, intersection, union
EXPRESSIONS = [
    ("val", 1, 11, 101, "Left dog", 90, 100),
    ("val", 1, 11, 102, "the dog on the left", 50, 100),
    ("val", 2, 12, 103, "cat", 0, 0),
    ("testA", 3, 11, 104, "a DOG", 60, 80),
]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """``run(*arguments)``: what python -m lib.rescore prints, what it warns of, and what it writes as JSON."""
    monkeypatch.setattr(utils.LOGGER, "handlers", [])
    monkeypatch.setattr(utils.LOGGER, "propagate", True)

    def run(*arguments):
        out = tmp_path / "out.json"
        monkeypatch.setattr(sys, "argv", ["rescore", *map(str, arguments), "--json", str(out), "--draws", "50"])
        rescore.main()
        printed = capsys.readouterr()
        return printed.out, printed.err, json.loads(out.read_text())

    return run


def write(path, expressions=EXPRESSIONS, protocols="paper", splits=None, complete=True, masks=None, **switches):
    """A result file of expressions as in ``EXPRESSIONS``; ``masks``: by sent_id and protocol's name."""
    chosen = choose_protocols(protocols, **switches)
    names = [expression[0] for expression in expressions]
    header = {"dataset": "refcoco", "split_by": "unc", "img_size": IMG_SIZE, "shuffle_sentences": False}
    header["splits"] = splits or {name: names.count(name) for name in names}
    header["protocols"] = [protocol.settings() for protocol in chosen]
    file = ResultFile(path, header, replace=True)
    path.unlink(missing_ok=True)  # one that was begun is gone on with
    file.begin()
    for index, (split, ref_id, image_id, sent_id, sentence, intersection, union) in enumerate(expressions):
        for protocol in chosen:
            line = {"split": split, "index": index, "image_id": image_id, "ref_id": ref_id, "ann_id": 10 * ref_id}
            line |= {"sent_id": sent_id, "sentence": sentence, "protocol": protocol.name}
            line |= {"intersection": intersection, "union": union, "iou": iou(intersection, union)}
            file.append([line | ({"mask": masks[sent_id, protocol.name]} if masks else {})])
    if complete:
        file.finish()
    return path if complete else file.partial


def metrics_of(*pairs):
    metrics = SegmentationMetrics()
    metrics.add(*zip(*pairs, strict=True))
    return metrics.compute()


def scored(report):
    """(split, protocol): how many, and mIoU."""
    return {
        (row["split"], row["protocol"]): (row["num_expressions"], round(row["metrics"]["mIoU"], 6))
        for row in report["results"]
        if row["metrics"]
    }


def test_unchanged_options_give_the_metrics(run, tmp_path):
    file = write(tmp_path / "a.jsonl")
    printed, warned, report = run(file)
    assert not warned
    val, test_a = report["results"]
    assert val["metrics"] == metrics_of((90, 100), (50, 100), (0, 0))
    assert test_a["metrics"] == metrics_of((60, 80))
    assert (val["num_expressions"], val["of"], val["num_images"]) == (3, 3, 2)
    want = intervals([11, 11, 12], np.array([(90, 100), (50, 100), (0, 0)]), draws=50)
    assert {name: tuple(between) for name, between in val["interval_95"].items()} == want
    lines = printed.splitlines()
    assert lines[0] == f"{file}, refcoco (unc)"
    assert lines[1].split() == ["split", "protocol", *METRIC_NAMES, "expressions"]
    assert lines[2].split()[:9] == ["val", "paper", "66.67", "33.33", "33.33", "33.33", "33.33", "46.67", "70.00"]
    assert lines[2].endswith("3 of 3")
    assert lines[3].split() == [f"{want[name][0]:.2f}…{want[name][1]:.2f}" for name in METRIC_NAMES]
    assert lines[4].split()[:3] == ["testA", "paper", "100.00"]
    header = {"dataset": "refcoco", "split_by": "unc", "img_size": IMG_SIZE, "shuffle_sentences": False}
    assert report["files"] == [{"file": str(file), **header}]


def test_several_files_splits_and_protocols(run, tmp_path):
    two = write(tmp_path / "two.jsonl", protocols="paper,original", threshold=0.4)
    one = write(tmp_path / "one.jsonl", EXPRESSIONS[:1])
    *_, report = run(two, one)
    places = [(row["file"], row["split"], row["protocol"]) for row in report["results"]]
    names = ["paper+threshold=0.4", "original+threshold=0.4"]
    assert places == [
        *((str(two), split, name) for split in ("val", "testA") for name in names),
        (str(one), "val", "paper"),
    ]
    *_, report = run(two, "--protocol", "original+threshold=0.4", "--split", "testA")
    assert scored(report) == {("testA", "original+threshold=0.4"): (1, 75)}


def test_the_order_of_lines_changes_nothing(run, tmp_path):
    file = write(tmp_path / "a.jsonl")
    *_, report = run(file)
    file.write_text("".join(reversed(file.read_text().splitlines(True))))
    assert run(file)[2] == report


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        (["--split", "testA"], {"testA": (1, 75)}),
        (["--split", "testA, val"], {"val": (3, 140 / 3), "testA": (1, 75)}),
        (["--sentence", r"\bdog$"], {"val": (1, 90), "testA": (1, 75)}),
        (["--words", "2-5"], {"val": (2, 70), "testA": (1, 75)}),
        (["--words", "3-"], {"val": (1, 50)}),
        (["--sentences", "first"], {"val": (2, 45), "testA": (1, 75)}),
        (["--sentences", "first", "--words", "2-"], {"val": (1, 90), "testA": (1, 75)}),
        (["--words", "1-2", "--sentence", "dog", "--split", "val"], {"val": (1, 90)}),
        # What equals the file's own settings is no change.
        (["--threshold", "0.4", "--eval_size", "resized", "--max_tokens", "21", "--gt_mask", "paper", "--split", "val"],
         {"val": (3, 140 / 3)}),
    ],
)  # fmt: skip
def test_subsets(run, tmp_path, flags, want):
    file = write(tmp_path / "a.jsonl", threshold=0.4)
    printed, _, report = run(file, *flags)
    assert scored(report) == {(split, "paper+threshold=0.4"): (n, round(m, 6)) for split, (n, m) in want.items()}
    assert {row["split"]: row["of"] for row in report["results"]}.items() <= {"val": 3, "testA": 1}.items()
    for split, (number, _) in want.items():
        assert f"{number} of {3 if split == 'val' else 1}\n" in printed


def test_a_subset_by_ids(run, tmp_path):
    ids = tmp_path / "ids.txt"
    ids.write_text("104\n\n 102 \n999\n")
    printed, _, report = run(write(tmp_path / "a.jsonl"), "--ids", ids, "--split", "val")
    assert scored(report) == {("val", "paper"): (1, 50)}
    assert printed.splitlines()[0].endswith(f"--split val --ids {ids}")


def test_other_thresholds_and_strict(run, tmp_path):
    file = write(tmp_path / "a.jsonl")  # IoUs of val: 0.9, 0.5, 0
    *_, report = run(file, "--split", "val", "--precision_at", "0.5,0.55,0.9,0", "--words", "1-9")
    values = report["results"][0]["metrics"]
    assert list(values) == ["P@0.5", "P@0.55", "P@0.9", "P@0.0", "mIoU", "oIoU"]
    assert [round(3 * values[name] / 100, 6) for name in list(values)[:4]] == [2, 1, 1, 3]
    printed, _, report = run(file, "--split", "val", "--precision_at", "0.5,0.55,0.9,0", "--strict")
    strict = report["results"][0]["metrics"]
    assert [round(3 * strict[name] / 100, 6) for name in list(values)[:4]] == [1, 1, 0, 2]
    assert strict["oIoU"] == values["oIoU"]
    assert printed.splitlines()[0].endswith("--strict")


def test_partial_files_are_told(run, tmp_path):
    partial = write(tmp_path / "a.jsonl", EXPRESSIONS[:2], splits={"val": 3, "testA": 1}, complete=False)
    printed, warned, report = run(partial)
    assert warned == f"warning: {partial} is partial: 2 of 4 expressions are there\n"
    assert report["warnings"] == [warned.removeprefix("warning: ").strip()]
    assert scored(report) == {("val", "paper"): (2, 70)}
    assert "2 of 3\n" in printed
    assert [line.split() for line in printed.splitlines() if "testA" in line] == [
        ["testA", "paper", *"–" * 7, "0", "of", "1"]
    ]
    cut = write(tmp_path / "cut.jsonl")  # says that it is complete
    cut.write_text("".join(cut.read_text().splitlines(True)[:-1]))
    assert "cut.jsonl is partial: 3 of 4" in run(cut)[1]


# ---- other true masks

PARTS = {1: [SQUARE, SHIFTED], 2: [SQUARE]}


@pytest.fixture
def data_root(tmp_path):
    """Two objects on images 11 and 12; that of ref 1 is two overlapping polygons."""
    folder = tmp_path / "data" / "refcoco"
    folder.mkdir(parents=True)
    refs = [
        {"ref_id": one, "ann_id": 10 * one, "image_id": 10 + one, "split": "val",
         "sentences": [{"sent_id": 100 * one + k, "raw": f"dog {k}"} for k in range(2)]}
        for one in PARTS
    ]  # fmt: skip
    instances = {
        "images": [{"id": 10 + one, "width": W, "height": H, "file_name": f"{one}.jpg"} for one in PARTS],
        "annotations": [
            {"id": 10 * one, "image_id": 10 + one, "category_id": 1, "segmentation": parts}
            for one, parts in PARTS.items()
        ],
        "categories": [{"id": 1, "name": "dog"}],
    }
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs))
    (folder / "instances.json").write_text(json.dumps(instances))
    return tmp_path / "data"


def true_masks(mode):
    """bool [H, W] of each ref, by hand."""
    first, second = np.zeros((2, H, W), bool)
    first[2:12, 2:12] = second[8:18, 8:18] = True
    return {1: first ^ second if mode == "paper" else first | second, 2: first}


def resized(mask):
    image = Image.fromarray(mask.astype(np.uint8)).resize((IMG_SIZE, IMG_SIZE), Image.Resampling.NEAREST)
    return np.asarray(image).astype(bool)


def judged(path, sizes=("resized",), gt_mask="paper", source_seed=0, **changes):
    """A result file of predictions that miss some pixels, judged against ``gt_mask``; and the predictions."""
    source, masks, pixels = np.random.default_rng(source_seed), {}, {}
    protocols = {"resized": "paper", "original": "original+gt_mask=paper"}
    for ref_id, union in true_masks("union").items():
        for sent_id in (100 * ref_id, 100 * ref_id + 1):
            noisy = union ^ (source.uniform(size=(H, W)) < 0.1)
            for size in sizes:
                pixels[sent_id, size] = resized(noisy) if size == "resized" else noisy
                masks[sent_id, protocols[size]] = encode_mask(pixels[sent_id, size])
    expressions = [("val", sent_id // 100, 10 + sent_id // 100, sent_id, "dog", 0, 1) for sent_id, _ in masks]
    names = ",".join({"resized": "paper", "original": "original"}[size] for size in sizes)
    expressions = list(dict.fromkeys(expressions))
    return write(path, expressions, names, gt_mask=gt_mask, masks=masks | changes.pop("masks", {}), **changes), pixels


def test_union_masks_against_a_direct_computation(run, tmp_path, data_root):
    file, pixels = judged(tmp_path / "a.jsonl", ("resized", "original"))
    for gt_mask, names in (
        ("union", ["paper+gt_mask=union", "original"]),
        ("paper", ["paper", "original+gt_mask=paper"]),
    ):
        truths, want = true_masks(gt_mask), {"resized": [], "original": []}
        for (sent_id, size), predicted in pixels.items():
            truth = resized(truths[sent_id // 100]) if size == "resized" else truths[sent_id // 100]
            want[size].append((int((predicted & truth).sum()), int((predicted | truth).sum())))
        *_, report = run(file, "--gt_mask", gt_mask, "--refer_data_root", data_root)
        assert [row["protocol"] for row in report["results"]] == names
        if gt_mask == "union":
            assert [row["metrics"] for row in report["results"]] == [metrics_of(*pairs) for pairs in want.values()]
        else:  # the file's own: its numbers are taken as they are
            assert scored(report) == {("val", name): (4, 0) for name in names}


def test_the_hole_of_two_polygons(run, tmp_path, data_root):
    """The prediction is the union, 184 pixels, of which 16 are no object in the paper's masks."""
    whole = {(sent_id, "original"): encode_mask(true_masks("union")[1]) for sent_id in (100, 101)}
    file = write(
        tmp_path / "a.jsonl", [("val", 1, 11, one, "dog", 7, 8) for one in (100, 101)], "original", masks=whole
    )
    assert run(file, "--gt_mask", "union", "--refer_data_root", "/nowhere")[2]["results"][0]["metrics"]["oIoU"] == 87.5
    row = run(file, "--gt_mask", "paper", "--refer_data_root", data_root)[2]["results"][0]
    assert row["protocol"] == "original+gt_mask=paper"
    assert row["metrics"]["mIoU"] == row["metrics"]["oIoU"] == pytest.approx(100 * 168 / 184)


def test_each_object_of_the_subset_is_rasterised_once(run, tmp_path, data_root, monkeypatch):
    file, _ = judged(tmp_path / "a.jsonl", ("resized", "original"))
    ids = tmp_path / "ids.txt"
    asked, real = [], REFER.getMask
    monkeypatch.setattr(REFER, "getMask", lambda self, ref, mode: asked.append(ref) or real(self, ref, mode))
    run(file, "--gt_mask", "union", "--refer_data_root", data_root)
    assert asked == [1, 2]
    ids.write_text("200\n201\n")
    run(file, "--gt_mask", "union", "--refer_data_root", data_root, "--ids", ids)
    assert asked == [1, 2, 2]


def test_masks_that_do_not_fit_are_told(run, tmp_path, data_root):
    def refused(match, file):
        with pytest.raises(UserError, match=match):
            run(file, "--gt_mask", "union", "--refer_data_root", data_root)

    refused(r"none\.jsonl: sent_id 101 has no stored mask: .*test\.py --predictions", write(tmp_path / "none.jsonl"))
    wrong = {(100, "original+gt_mask=paper"): encode_mask(np.zeros((W, H), bool))}
    refused(
        r"b\.jsonl: sent_id 100 has a mask of 20×30 on image 11, but .*refs\(unc\)\.p means image 11 at 30×20: give",
        judged(tmp_path / "b.jsonl", ("original",), masks=wrong)[0],
    )
    wrong = {(100, "paper"): encode_mask(np.zeros((H, W), bool))}  # the picture's own size, though it says resized
    refused("sent_id 100 has a mask of 30×20 .* at 20×20: give", judged(tmp_path / "c.jsonl", masks=wrong)[0])
    moved, _ = judged(tmp_path / "d.jsonl")
    moved.write_text(moved.read_text().replace('"image_id": 11', '"image_id": 12'))
    refused(r"sent_id 100 has a mask of 16×16 on image 12, but .* means image 11 at 16×16: give", moved)
    for mask, why in (
        ({"size": [16, 16], "counts": "0"}, "sum to 0"),
        ({"size": [16]}, "not enough values"),
        ({"size": [0, 16], "counts": "0"}, "no picture is 16×0"),
        ({"size": [10**9, 10**9], "counts": "0"}, "no picture is"),
        ("RLE", "string indices"),
    ):
        file = judged(tmp_path / "damaged.jsonl", masks={(101, "paper"): mask})[0]
        refused(rf"damaged\.jsonl: sent_id 101: its mask is damaged \(.*{why}", file)
    other = write(tmp_path / "other.jsonl", [("val", 5, 11, 1, "dog", 1, 2)])
    refused("no ref 5 in", other)


# ---- what is refused


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--threshold", "0.4"], r"--threshold 0.4: .*a\.jsonl has the masks of paper, made with threshold None, and a "
         r"binary mask has no probabilities left: run test\.py --threshold 0\.4$"),
        (["--eval_size", "original"], "can't become the logits at another size: run test.py --eval_size original$"),
        (["--max_tokens", "30"], "max_tokens 21, and sentences .*: run test.py --max_tokens 30$"),
        (["--split", "val,tesTA"], "--split tesTA: .*a.jsonl has val, testA$"),
        (["--split", ","], "--split ',' names nothing"),
        (["--protocol", "original"], "--protocol original: .*a.jsonl has paper$"),
        (["--sentence", "(dog"], r"--sentence \(dog: not a regular expression"),
        (["--words", "3"], "--words 3: give MIN-MAX"),
        (["--words", "3-2"], "--words 3-2: give MIN-MAX"),
        (["--words", "9-"], "the subset leaves none of its 4 expressions"),
        (["--precision_at", "50"], "--precision_at 50: give IoUs from 0 to 1"),
        (["--precision_at", "0.5,"], "--precision_at 0.5,: give IoUs"),
        (["--precision_at", "nan"], "--precision_at nan: give IoUs"),
        (["--most", "-1"], "--most -1: must be at least 0"),
        (["--seed", "-1"], "--seed -1: must be at least 0"),
        (["--gt_mask", "both"], "--gt_mask: invalid choice"),
        (["--gtmask", "union"], "unknown flag --gtmask; did you mean --gt_mask"),
        (["--gt_mask", "union", "--refer_data_root", "/nowhere"], r"/nowhere/refcoco/refs\(unc\)\.p is missing"),
        (["--ids", "/nowhere.txt"], "--ids /nowhere.txt: no such file"),
        (["--ids", __file__], "--ids .*: line 1 is not a sent_id"),
        (["--compare", "a", "b"], "give result files, or two of them with --compare"),
        (["/nowhere.jsonl"], "no result file /nowhere.jsonl"),
        ([__file__], "keep them together"),
    ],
)  # fmt: skip
def test_mistakes_are_told(run, tmp_path, flags, told):
    with pytest.raises(UserError, match=told) as caught:
        run(write(tmp_path / "a.jsonl"), *flags)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, MissingFileError) is any("/nowhere" in flag for flag in flags)


def test_a_mistake_is_one_line_and_a_status(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rescore"])
    monkeypatch.setattr(utils.LOGGER, "handlers", [])
    with pytest.raises(SystemExit) as left:
        run_command(rescore.main)
    assert left.value.code == utils.EXIT_MISTAKE
    assert capsys.readouterr().err == "error: give result files, or two of them with --compare A B; see --help\n"


def test_a_protocol_of_the_file_that_fits_is_named(run, tmp_path):
    file = write(tmp_path / "a.jsonl", protocols="paper,original")
    with pytest.raises(UserError, match=r"made with eval_size resized, .*: choose --protocol original$"):
        run(file, "--eval_size", "original")
    assert list(scored(run(file, "--eval_size", "original", "--protocol", "original")[2])) == [
        ("val", "original"),
        ("testA", "original"),
    ]


def test_damaged_files_and_lost_ones(run, tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl")
    beside = settings_path(file)
    settings, lines = beside.read_text(), file.read_text().splitlines(True)
    no_splits = json.dumps({**json.loads(settings), "splits": [1]})
    for told_settings, content, told in (
        (settings, [*lines, lines[0]], "sent_id 101 of val, paper is there twice"),
        (settings, [lines[0].replace('"paper"', '"other"')], "is of a split or protocol that its settings don't"),
        (settings.replace('"val"', '"wal"'), lines, "is of a split or protocol that its settings don't"),
        (settings.replace("splits", "parts"), lines, "its settings don't say which splits"),
        (no_splits, lines, "its settings don't say which splits"),
        (settings, ["{}\n"], "line 1 is damaged"),
    ):
        beside.write_text(told_settings)
        file.write_text("".join(content))
        with pytest.raises(UserError, match=told):
            run(file)
    monkeypatch.setattr(sys, "argv", ["rescore", str(file), "--json", f"{tmp_path}/../{tmp_path.name}/a.jsonl"])
    with pytest.raises(UserError, match="is a result file: it would be lost"):
        rescore.main()


# ---- two files


def changed(*pairs, names=EXPRESSIONS):
    return [(*row[:5], *pair) for row, pair in zip(names, pairs, strict=True)]


def test_compare_by_hand(run, tmp_path):
    a = write(tmp_path / "a.jsonl")
    b = write(tmp_path / "b.jsonl", changed((95, 100), (70, 100), (0, 0), (20, 80)))
    printed, warned, report = run("--compare", a, b)
    assert not warned
    val, test_a = report["comparison"]
    assert (val["num_expressions"], val["only_in_a"], val["only_in_b"]) == (3, 0, 0)
    assert val["metrics_a"] == metrics_of((90, 100), (50, 100), (0, 0))
    assert val["metrics_b"] == metrics_of((95, 100), (70, 100), (0, 0))
    assert val["difference"]["mIoU"] == pytest.approx(100 * 0.25 / 3)
    assert val["difference"]["oIoU"] == pytest.approx(12.5)
    counts = [np.array([(90, 100), (50, 100), (0, 0)]), np.array([(95, 100), (70, 100), (0, 0)])]
    want = paired_intervals([11, 11, 12], *counts, draws=50)
    assert {name: tuple(val["interval_95"][name]) for name in want} == {name: one[1:] for name, one in want.items()}
    assert val["excludes_0"] == []  # of image 12 nothing has changed, and some draws are of nothing else
    assert test_a["excludes_0"] == ["P@0.5", "P@0.6", "P@0.7", "mIoU", "oIoU"]  # a single image: one value
    assert test_a["difference"]["mIoU"] == -50
    lines = printed.splitlines()
    assert lines[:2] == [f"A: {a}, refcoco (unc)", f"B: {b}, refcoco (unc)"]
    row = next(line.split() for line in lines if line.startswith("testA"))
    assert row == [
        "testA",
        "A",
        "paper",
        "100.00",
        "100.00",
        "100.00",
        "0.00",
        "0.00",
        "75.00",
        "75.00",
        "1",
        "in",
        "both",
    ]
    differences = [line.split() for line in lines if "B − A  " in line][1]
    assert differences[3:10] == ["−100.00*", "−100.00*", "−100.00*", "+0.00", "+0.00", "−50.00*", "−50.00*"]
    assert [(one["sent_id"], round(one["difference"], 6)) for one in report["most_changed"]] == [
        (104, -0.5), (102, 0.2), (101, 0.05)
    ]  # fmt: skip
    assert lines[-4].split() == ["testA", "paper", "75.00", "25.00", "−50.00", "11", "3", "104", "a", "DOG"]
    *_, report = run("--compare", a, b, "--most", "1", "--split", "val")
    assert [one["sent_id"] for one in report["most_changed"]] == [102]
    assert len(report["comparison"]) == 1


def test_compare_marks_a_clear_difference(run, tmp_path):
    """40 images, B better on each: whatever is drawn, the difference is above 0."""
    expressions = [("val", k, k, k, "dog", 50 + k, 100) for k in range(40)]
    a = write(tmp_path / "a.jsonl", expressions)
    b = write(tmp_path / "b.jsonl", [(*row[:5], row[5] + 5, 100) for row in expressions])
    row = run("--compare", a, b)[2]["comparison"][0]
    assert {"mIoU", "oIoU"} <= set(row["excludes_0"])
    assert "P@0.5" not in row["excludes_0"]
    assert row["difference"]["mIoU"] == pytest.approx(5)
    assert row["interval_95"]["oIoU"] == pytest.approx([5, 5])
    assert run("--compare", a, a)[2]["comparison"][0]["excludes_0"] == []


def test_compare_what_both_have(run, tmp_path):
    a = write(tmp_path / "a.jsonl", EXPRESSIONS[:3])
    b = write(tmp_path / "b.jsonl", [*EXPRESSIONS[1:], ("val", 9, 19, 109, "new", 1, 1)])
    printed, warned, report = run("--compare", a, b)
    rows = [
        [row[key] for key in ("split", "num_expressions", "only_in_a", "only_in_b")] for row in report["comparison"]
    ]
    assert rows == [["val", 2, 1, 1], ["testA", 0, 0, 1]]
    assert "difference" not in report["comparison"][1]
    assert "2 in both\n" in printed
    assert "1 in A only\n" in printed
    assert "warning: not the same splits in both: A val (3), B val (3), testA (1)\n" in warned
    assert report["most_changed"] == []
    with pytest.raises(UserError, match="have no expression in common"):
        run("--compare", write(tmp_path / "c.jsonl", EXPRESSIONS[:1]), b)


def test_compare_protocols_of_one_model(run, tmp_path):
    two = write(tmp_path / "two.jsonl", protocols="paper,original")
    other = write(tmp_path / "other.jsonl", changed((90, 100), (50, 100), (0, 0), (20, 80)), "original", threshold=0.3)
    printed, warned, report = run("--compare", two, other, "--protocol", "paper,original+threshold=0.3")
    assert [row["protocols"] for row in report["comparison"]] == [["paper", "original+threshold=0.3"]] * 2
    assert "warning: not the same protocols in both: A paper, B original+threshold=0.3\n" in warned
    assert "warning: not the same gt_mask in both: A paper, B union\n" in warned
    assert "warning: not the same threshold in both: A None, B 0.3\n" in warned
    assert "paper → original+threshold=0.3" in printed
    with pytest.raises(UserError, match="have no expression in common under one protocol"):
        run("--compare", two, other)
    with pytest.raises(UserError, match=r"--protocol original: .*other\.jsonl has original\+threshold=0\.3"):
        run("--compare", two, other, "--protocol", "original")


def test_compare_tells_other_settings(run, tmp_path):
    a, b = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl")
    settings = settings_path(b).read_text()
    settings = settings.replace('"img_size": 16', '"img_size": 32').replace('"max_tokens": 21', '"max_tokens": 9')
    settings_path(b).write_text(settings)
    _, warned, report = run("--compare", a, b)
    assert warned == (
        "warning: not the same img_size in both: A 16, B 32\n"
        "warning: not the same max_tokens of paper in both: A 21, B 9\n"
    )
    assert len(report["warnings"]) == 2
    moved = write(tmp_path / "moved.jsonl", [(*row[:2], 99, *row[3:]) for row in EXPRESSIONS])
    with pytest.raises(UserError, match="ref_id 1, sent_id 101 is on image 11 in A and on 99 in B"):
        run("--compare", a, moved)


def test_compare_against_other_true_masks(run, tmp_path, data_root):
    a, _ = judged(tmp_path / "a.jsonl")
    b, _ = judged(tmp_path / "b.jsonl", source_seed=1)
    alone = [run(file, "--gt_mask", "union", "--refer_data_root", data_root)[2]["results"][0] for file in (a, b)]
    *_, report = run("--compare", a, b, "--gt_mask", "union", "--refer_data_root", data_root)
    row = report["comparison"][0]
    assert [row["metrics_a"], row["metrics_b"]] == [one["metrics"] for one in alone]
    assert row["protocols"] == ["paper+gt_mask=union"] * 2
