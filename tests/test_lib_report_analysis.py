"""lib.report.analysis through python -m lib.rescore: --gt_mask and --compare, against values computed directly."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image
from result_files import EXPRESSIONS, IMG_SIZE, scores, with_counts, write_results

from lib.errors import UserError
from lib.metrics import compute_metrics
from lib.report.intervals import Scoring, paired_intervals
from lib.report.results import settings_path
from refer.masks import encode_mask
from refer.refer import REFER

H, W = 20, 30
SQUARE = [2, 2, 12, 2, 12, 12, 2, 12]  # 10 × 10 pixels
SHIFTED = [8, 8, 18, 8, 18, 18, 8, 18]  # overlaps SQUARE in 4 × 4 pixels
PARTS = {1: [SQUARE, SHIFTED], 2: [SQUARE]}  # by ref_id
NAMES = {"resized": "paper", "original": "original+gt_mask=paper"}  # protocols with eval_size and gt_mask=paper


@pytest.fixture
def data_root(tmp_path):
    """Two objects on images 11 and 12; that of ref 1 consists of two overlapping polygons."""
    folder = tmp_path / "data" / "refcoco"
    folder.mkdir(parents=True)
    refs = [
        {
            "ref_id": ref_id,
            "ann_id": 10 * ref_id,
            "image_id": 10 + ref_id,
            "split": "val",
            "sentences": [{"sent_id": 100 * ref_id + k, "raw": f"dog {k}"} for k in range(2)],
        }
        for ref_id in PARTS
    ]
    instances = {
        "images": [{"id": 10 + ref_id, "width": W, "height": H, "file_name": f"{ref_id}.jpg"} for ref_id in PARTS],
        "annotations": [
            {"id": 10 * ref_id, "image_id": 10 + ref_id, "category_id": 1, "segmentation": parts}
            for ref_id, parts in PARTS.items()
        ],
        "categories": [{"id": 1, "name": "dog"}],
    }
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs))
    (folder / "instances.json").write_text(json.dumps(instances))
    return tmp_path / "data"


def target_masks(mode):
    """Return the mask of each ref, bool [H, W], without the annotations."""
    first, second = np.zeros((2, H, W), bool)
    first[2:12, 2:12] = second[8:18, 8:18] = True
    return {1: first ^ second if mode == "paper" else first | second, 2: first}


def resized(mask):
    image = Image.fromarray(mask.astype(np.uint8)).resize((IMG_SIZE, IMG_SIZE), Image.Resampling.NEAREST)
    return np.asarray(image).astype(bool)


def write_masks(path, sizes=("resized",), seed=0, replaced=None):
    """Write a result file with a noisy prediction for each sentence, as evaluated with gt_mask=paper.

    Returns:
        its path, and the predictions by (sent_id, size).
    """
    generator, masks, predictions = np.random.default_rng(seed), {}, {}
    for ref_id, union in target_masks("union").items():
        for sent_id in (100 * ref_id, 100 * ref_id + 1):
            noisy = union ^ (generator.uniform(size=(H, W)) < 0.1)
            for size in sizes:
                predictions[sent_id, size] = resized(noisy) if size == "resized" else noisy
                masks[sent_id, NAMES[size]] = encode_mask(predictions[sent_id, size])
    sent_ids = dict.fromkeys(sent_id for sent_id, _ in masks)
    expressions = [("val", sent_id // 100, 10 + sent_id // 100, sent_id, "dog", 0, 1) for sent_id in sent_ids]
    protocols = ",".join({"resized": "paper", "original": "original"}[size] for size in sizes)
    file = write_results(path, expressions, protocols, gt_mask="paper", masks=masks | (replaced or {}))
    return file, predictions


def test_union_masks_against_a_direct_computation(run_rescore, tmp_path, data_root):
    file, predictions = write_masks(tmp_path / "a.jsonl", ("resized", "original"))
    *_, report = run_rescore(file, "--gt_mask", "union", "--refer_data_root", data_root)
    assert [row["protocol"] for row in report["results"]] == ["paper+gt_mask=union", "original"]
    targets, counts = target_masks("union"), {"resized": [], "original": []}
    for (sent_id, size), predicted in predictions.items():
        target = resized(targets[sent_id // 100]) if size == "resized" else targets[sent_id // 100]
        counts[size].append(((predicted & target).sum(), (predicted | target).sum()))
    assert [row["metrics"] for row in report["results"]] == [compute_metrics(pairs) for pairs in counts.values()]


def test_the_target_masks_of_the_file_itself_change_nothing(run_rescore, tmp_path, data_root):
    file, _ = write_masks(tmp_path / "a.jsonl", ("resized", "original"))
    *_, report = run_rescore(file, "--gt_mask", "paper", "--refer_data_root", data_root)
    assert scores(report) == {("val", name): (4, 0) for name in NAMES.values()}


def test_overlapping_polygons_are_a_hole_in_paper_masks(run_rescore, tmp_path, data_root):
    """The prediction is the union, 184 pixels, of which 16 are background in the paper's masks."""
    whole = {(sent_id, "original"): encode_mask(target_masks("union")[1]) for sent_id in (100, 101)}
    expressions = [("val", 1, 11, sent_id, "dog", 7, 8) for sent_id in (100, 101)]
    file = write_results(tmp_path / "a.jsonl", expressions, "original", masks=whole)
    assert (
        run_rescore(file, "--gt_mask", "union", "--refer_data_root", "/nowhere")[2]["results"][0]["metrics"]["oIoU"]
        == 87.5
    )
    row = run_rescore(file, "--gt_mask", "paper", "--refer_data_root", data_root)[2]["results"][0]
    assert row["protocol"] == "original+gt_mask=paper"
    assert row["metrics"]["mIoU"] == row["metrics"]["oIoU"] == pytest.approx(100 * 168 / 184)


def test_each_selected_object_is_rasterized_once(run_rescore, tmp_path, data_root, monkeypatch):
    file, _ = write_masks(tmp_path / "a.jsonl", ("resized", "original"))
    ids = tmp_path / "ids.txt"
    rasterized, real = [], REFER.getMask
    monkeypatch.setattr(REFER, "getMask", lambda self, ref, mode: rasterized.append(ref) or real(self, ref, mode))
    run_rescore(file, "--gt_mask", "union", "--refer_data_root", data_root)
    assert rasterized == [1, 2]
    ids.write_text("200\n201\n")
    run_rescore(file, "--gt_mask", "union", "--refer_data_root", data_root, "--ids", ids)
    assert rasterized == [1, 2, 2]


def test_masks_that_do_not_match_the_annotations_are_refused(run_rescore, tmp_path, data_root):
    def check_message(match, file):
        with pytest.raises(UserError, match=match):
            run_rescore(file, "--gt_mask", "union", "--refer_data_root", data_root)

    without_masks = write_results(tmp_path / "none.jsonl")
    check_message(r"none\.jsonl: sent_id 101 has no stored mask\. .*test\.py --predictions", without_masks)
    transposed = {(100, NAMES["original"]): encode_mask(np.zeros((W, H), bool))}
    check_message(
        r"b\.jsonl: sent_id 100 has a mask of 20×30 pixels on image 11, but in .*refs\(unc\)\.p it is on image 11 "
        r"with 30×20 pixels\. Use",
        write_masks(tmp_path / "b.jsonl", ("original",), replaced=transposed)[0],
    )
    full_size = {(100, "paper"): encode_mask(np.zeros((H, W), bool))}  # though the file says resized
    check_message(
        "sent_id 100 has a mask of 30×20 pixels .* with 20×20 pixels",
        write_masks(tmp_path / "c.jsonl", replaced=full_size)[0],
    )
    moved, _ = write_masks(tmp_path / "d.jsonl")
    moved.write_text(moved.read_text().replace('"image_id": 11', '"image_id": 12'))
    check_message(r"100 has a mask of 16×16 pixels on image 12, but .* on image 11 with 16×16 pixels", moved)
    check_message("No ref 5 in", write_results(tmp_path / "e.jsonl", [("val", 5, 11, 1, "dog", 1, 2)]))


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        ({"size": [16, 16], "counts": "0"}, "sum to 0"),
        ({"size": [16]}, "not enough values"),
        ({"size": [0, 16], "counts": "0"}, "16×0"),
        ({"size": [10**9, 10**9], "counts": "0"}, "1000000000×1000000000"),
        ("RLE", "string indices"),
    ],
)
def test_corrupt_masks_are_refused(run_rescore, tmp_path, data_root, mask, reason):
    file = write_masks(tmp_path / "a.jsonl", replaced={(101, "paper"): mask})[0]
    with pytest.raises(UserError, match=rf"a\.jsonl: sent_id 101: the stored mask is corrupt \(.*{reason}"):
        run_rescore(file, "--gt_mask", "union", "--refer_data_root", data_root)


def test_compare_against_values_computed_by_hand(run_rescore, tmp_path):
    a = write_results(tmp_path / "a.jsonl")
    b = write_results(tmp_path / "b.jsonl", with_counts((95, 100), (70, 100), (0, 0), (20, 80)))
    printed, warnings, report = run_rescore("--compare", a, b)
    assert not warnings
    val, test_a = report["comparison"]
    assert (val["num_expressions"], val["only_in_a"], val["only_in_b"]) == (3, 0, 0)
    counts = [[(90, 100), (50, 100), (0, 0)], [(95, 100), (70, 100), (0, 0)]]
    assert [val["metrics_a"], val["metrics_b"]] == [compute_metrics(pairs) for pairs in counts]
    assert val["difference"]["mIoU"] == pytest.approx(100 * 0.25 / 3)
    assert val["difference"]["oIoU"] == pytest.approx(12.5)
    expected = paired_intervals([11, 11, 12], *map(np.array, counts), Scoring(draws=50))
    assert {name: tuple(bounds) for name, bounds in val["interval_95"].items()} == expected
    assert val["excludes_0"] == []  # image 12 has not changed, and some draws contain no other image
    assert test_a["excludes_0"] == ["P@0.5", "P@0.6", "P@0.7", "mIoU", "oIoU"]  # a single image: one value
    assert test_a["difference"]["mIoU"] == -50
    lines = printed.splitlines()
    assert lines[:2] == [f"A: {a}, refcoco (unc), float32", f"B: {b}, refcoco (unc), float32"]
    row = next(line for line in lines if line.startswith("testA")).split()
    assert row == ["testA", "A", "paper", *["100.00"] * 3, *["0.00"] * 2, *["75.00"] * 2, "1", "in", "both"]
    differences = [line.split() for line in lines if "B − A  " in line][1]
    assert differences[3:10] == ["−100.00*", "−100.00*", "−100.00*", "+0.00", "+0.00", "−50.00*", "−50.00*"]
    assert [(change["sent_id"], round(change["difference"], 6)) for change in report["most_changed"]] == [
        (104, -0.5),
        (102, 0.2),
        (101, 0.05),
    ]
    assert lines[-4].split() == ["testA", "paper", "75.00", "25.00", "−50.00", "11", "3", "104", "a", "DOG"]
    *_, report = run_rescore("--compare", a, b, "--most", "1", "--split", "val")
    assert [change["sent_id"] for change in report["most_changed"]] == [102]
    assert len(report["comparison"]) == 1


def test_compare_marks_a_clear_difference(run_rescore, tmp_path):
    """B is better on each of 40 images, so the difference is above 0 in every draw."""
    expressions = [("val", k, k, k, "dog", 50 + k, 100) for k in range(40)]
    a = write_results(tmp_path / "a.jsonl", expressions)
    b = write_results(tmp_path / "b.jsonl", [(*row[:5], row[5] + 5, 100) for row in expressions])
    row = run_rescore("--compare", a, b)[2]["comparison"][0]
    assert {"mIoU", "oIoU"} <= set(row["excludes_0"])
    assert "P@0.5" not in row["excludes_0"]
    assert row["difference"]["mIoU"] == pytest.approx(5)
    assert row["interval_95"]["oIoU"] == pytest.approx([5, 5])
    assert run_rescore("--compare", a, a)[2]["comparison"][0]["excludes_0"] == []


def test_compare_uses_the_expressions_that_both_files_have(run_rescore, tmp_path):
    a = write_results(tmp_path / "a.jsonl", EXPRESSIONS[:3])
    b = write_results(tmp_path / "b.jsonl", [*EXPRESSIONS[1:], ("val", 9, 19, 109, "new", 1, 1)])
    printed, warnings, report = run_rescore("--compare", a, b)
    keys = ("split", "num_expressions", "only_in_a", "only_in_b")
    assert [[row[key] for key in keys] for row in report["comparison"]] == [["val", 2, 1, 1], ["testA", 0, 0, 1]]
    assert "difference" not in report["comparison"][1]
    assert "2 in both\n" in printed
    assert "1 in A only\n" in printed
    assert "warning: The files differ in splits: A val (3), B val (3), testA (1).\n" in warnings
    assert report["most_changed"] == []
    with pytest.raises(UserError, match="have no expression in common"):
        run_rescore("--compare", write_results(tmp_path / "c.jsonl", EXPRESSIONS[:1]), b)


def test_compare_protocols_of_one_model(run_rescore, tmp_path):
    two = write_results(tmp_path / "two.jsonl", protocols="paper,original")
    counts = with_counts((90, 100), (50, 100), (0, 0), (20, 80))
    other = write_results(tmp_path / "other.jsonl", counts, "original", threshold=0.3)
    printed, warnings, report = run_rescore("--compare", two, other, "--protocol", "paper,original+threshold=0.3")
    assert [row["protocols"] for row in report["comparison"]] == [["paper", "original+threshold=0.3"]] * 2
    assert "warning: The files differ in protocols: A paper, B original+threshold=0.3.\n" in warnings
    assert "warning: The files differ in gt_mask: A paper, B union.\n" in warnings
    assert "warning: The files differ in threshold: A None, B 0.3.\n" in warnings
    assert "paper → original+threshold=0.3" in printed
    with pytest.raises(UserError, match="have no expression in common under the same protocol"):
        run_rescore("--compare", two, other)
    with pytest.raises(UserError, match=r"--protocol original: not in .*other\.jsonl, which has original\+threshold"):
        run_rescore("--compare", two, other, "--protocol", "original")


def test_compare_reports_different_settings_and_annotations(run_rescore, tmp_path):
    a, b = write_results(tmp_path / "a.jsonl"), write_results(tmp_path / "b.jsonl")
    settings = settings_path(b).read_text()
    settings = settings.replace('"img_size": 16', '"img_size": 32').replace('"max_tokens": 21', '"max_tokens": 9')
    settings_path(b).write_text(settings)
    _, warnings, report = run_rescore("--compare", a, b)
    assert warnings == (
        "warning: The files differ in img_size: A 16, B 32.\n"
        "warning: The files differ in max_tokens of paper: A 21, B 9.\n"
    )
    assert len(report["warnings"]) == 2
    moved = write_results(tmp_path / "moved.jsonl", [(*row[:2], 99, *row[3:]) for row in EXPRESSIONS])
    with pytest.raises(UserError, match="ref_id 1, sent_id 101 is on image 11 in A, but on image 99 in B"):
        run_rescore("--compare", a, moved)


def test_compare_with_other_target_masks(run_rescore, tmp_path, data_root):
    files = [write_masks(tmp_path / f"{seed}.jsonl", seed=seed)[0] for seed in (0, 1)]
    flags = ("--gt_mask", "union", "--refer_data_root", data_root)
    single = [run_rescore(file, *flags)[2]["results"][0]["metrics"] for file in files]
    (row,) = run_rescore("--compare", *files, *flags)[2]["comparison"]
    assert [row["metrics_a"], row["metrics_b"]] == single
    assert row["protocols"] == ["paper+gt_mask=union"] * 2
