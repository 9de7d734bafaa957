"""The statistics that python -m refer.stats prints, against numbers computed by hand; images shared between splits."""

import re

import numpy as np
import pytest
from stats_datasets import AREAS, REFS, SEGMENTATIONS, SQUARE, H, W, count_tokens, write_dataset

from lib.errors import MissingFileError, UserError
from refer.datasets import select_datasets
from refer.refer import REFER
from refer.stats.statistics import shared_images, statistics_of
from refer.stats.tables import sharing_table, split_table


def test_numbers_by_hand(tmp_path):
    train, val, test_a = statistics_of(write_dataset(tmp_path), count_tokens)
    assert [one.name for one in (train, val, test_a)] == ["train", "val", "testA"]
    row = val.summary
    assert {name: row[name] for name in ("refs", "expressions", "images", "categories", "objects")} == {
        "refs": 3,
        "expressions": 4,
        "images": 2,
        "categories": 2,
        "objects": 2,
    }
    assert row["expressions_per_ref"]["mean"] == pytest.approx(4 / 3)
    assert row["words"] == {"mean": 10.5, "minimum": 1, "p5": 1, "median": 2, "p95": 20, "maximum": 20}
    assert row["tokens"] == {"mean": 12.5, "minimum": 3, "p5": 3, "median": 4, "p95": 22, "maximum": 22}
    assert row["cut"] == {"count": 1, "percent": 25}  # 21 tokens are kept, 22 are cut
    assert row["ambiguous"] == {"count": 1, "percent": 25}  # train has "dog" for another object of the same image
    assert row["size_percent"]["minimum"] == pytest.approx(100 * 125 / 600)
    assert row["size_percent"]["maximum"] == pytest.approx(100 * 184 / 600)
    assert row["several_parts"] == {"count": 2, "percent": 100}
    assert row["overlap"] == {"count": 1, "percent": 50, "pixels_lost_percent": pytest.approx(100 * 16 / 184)}
    assert row["stored_area_off"] == {"count": 1, "percent": 50}  # 200 instead of 184; 126 of 125 is within 1 %
    assert row["empty_masks"] == 0
    assert row["undrawable"] == {"count": 0, "first": None}
    assert train.summary["ambiguous"] == {"count": 1, "percent": pytest.approx(100 / 3)}
    row = test_a.summary
    assert row["size_percent"]["median"] == 10
    assert row["several_parts"]["count"] == 0
    assert row["overlap"] == {"count": 0, "percent": 0, "pixels_lost_percent": None}
    assert row["stored_area_off"] == {"count": 0, "percent": None}  # no area is stored
    assert row["ambiguous"]["count"] == 0  # the same sentence on another image does not count


@pytest.mark.parametrize(("stored", "off"), [(101, 0), (101.1, 1), (99, 0), (98.9, 1), ("100", None), (None, None)])
def test_a_stored_area_may_differ_by_one_percent(tmp_path, stored, off):
    (train,) = statistics_of(write_dataset(tmp_path, REFS[1:2], areas={101: stored}))
    assert train.summary["stored_area_off"] == {"count": off or 0, "percent": None if off is None else 100 * off}


def test_empty_masks_and_equal_parts(tmp_path):
    empty = {"size": [H, W], "counts": [H * W]}
    segmentations = SEGMENTATIONS | {101: empty, 102: [SQUARE, SQUARE]}
    splits = statistics_of(write_dataset(tmp_path, segmentations=segmentations, areas=AREAS | {101: 0}))
    train, val = splits[0].summary, splits[1].summary
    assert train["empty_masks"] == 1
    assert train["size_percent"]["maximum"] == 0
    assert train["stored_area_off"]["count"] == 0
    assert val["overlap"] == {"count": 1, "percent": 50, "pixels_lost_percent": 100}


def test_the_number_of_kept_tokens_is_an_argument(tmp_path):
    refer = write_dataset(tmp_path)
    cuts = [statistics_of(refer, count_tokens, max_tokens=kept)[1].summary["cut"] for kept in (2, 3, 20, 21, 22)]
    assert [cut["count"] for cut in cuts] == [4, 3, 2, 1, 0]
    assert "expressions with more than 20 tokens" in split_table(statistics_of(refer, count_tokens, max_tokens=20))
    assert statistics_of(refer)[1].summary["cut"] is None


def test_the_splits_of_the_file_in_the_usual_order(tmp_path):
    names = ["odd", "test", "testB", "testAB", "val", "train", "testA"]
    splits = statistics_of(write_dataset(tmp_path, [(101, 1, name, ["dog"]) for name in names]))
    assert [one.name for one in splits] == ["train", "val", "testA", "testB", "test", "odd", "testAB"]
    assert [one.summary["refs"] for one in splits] == [1] * 7


def test_no_mask_is_rasterized_twice(tmp_path, monkeypatch):
    refer, other = write_dataset(tmp_path), write_dataset(tmp_path, split_by="google")
    rasterized, get_mask = [], REFER.getMask

    def counting_get_mask(self, ref, mode="paper"):
        rasterized.append((ref["ann_id"], mode))
        return get_mask(self, ref, mode)

    monkeypatch.setattr(REFER, "getMask", counting_get_mask)
    known_objects = {}
    first = statistics_of(refer, known_objects=known_objects)
    second = statistics_of(other, known_objects=known_objects)
    assert sorted(rasterized) == [
        (101, "union"),
        (102, "paper"),
        (102, "union"),
        (103, "paper"),
        (103, "union"),
        (104, "union"),
    ]
    assert [one.summary["overlap"] for one in first] == [one.summary["overlap"] for one in second]


def test_a_leak_is_reported_with_its_size(tmp_path):
    splits = statistics_of(write_dataset(tmp_path))
    shared = shared_images(splits)
    assert [(pair.first.name, pair.second.name, pair.images, pair.expressions) for pair in shared] == [
        ("train", "val", 1, (3, 2))
    ]
    assert sharing_table(splits, shared).splitlines() == [
        "images in both  (1)  (2)  (3)",
        "(1) train         1    1    0",
        "(2) val           1    2    0",
        "(3) testA         0    0    1",
        "leak: 1 of 2 val images (2 of 4 expressions, 50.0 %) are also in train",
    ]


def test_without_a_leak(tmp_path):
    splits = statistics_of(write_dataset(tmp_path, [REFS[1], *REFS[2:]]))
    assert shared_images(splits) == []
    assert sharing_table(splits, []) == "No image is in two splits (same file or same COCO number)."
    splits = statistics_of(write_dataset(tmp_path, [(101, 1, "testA", ["dog"]), (102, 1, "testB", ["a"]), REFS[2]]))
    assert [pair.is_leak for pair in shared_images(splits)] == [False]
    assert sharing_table(splits, shared_images(splits)).endswith("\nNo image of train is in another split.")


def test_records_with_one_file_name_are_the_same_image(tmp_path):
    refer = write_dataset(tmp_path)
    refer.Imgs[3]["file_name"] = refer.Imgs[1]["file_name"]
    assert {(pair.first.name, pair.second.name) for pair in shared_images(statistics_of(refer))} == {
        ("train", "val"),
        ("train", "testA"),
        ("val", "testA"),
    }


def test_datasets_share_the_images_of_a_common_folder(tmp_path):
    first = statistics_of(write_dataset(tmp_path, [REFS[1], REFS[4]]))
    second = statistics_of(write_dataset(tmp_path, [(101, 3, "train", ["dog"]), REFS[2]], "refcocog", "umd"))
    (tmp_path / "mine" / "images").mkdir(parents=True)
    third = statistics_of(write_dataset(tmp_path, [REFS[4]], "mine"))
    splits = [*first, *second, *third]
    lines = sharing_table(splits, shared_images(splits)).splitlines()
    assert [line for line in lines if line.startswith("leak")] == [
        "leak: 1 of 1 refcoco (unc) testA images (1 of 1 expressions, 100.0 %) are also in refcocog (umd) train"
    ]
    assert lines[4].split() == ["(4)", "refcocog", "(umd)", "val", "0", "0", "0", "1", "0"]


def test_a_dataset_s_own_leaks_come_first_and_a_wide_table_is_left_out(tmp_path):
    splits = []
    for number in range(8):
        splits += statistics_of(write_dataset(tmp_path, dataset=f"dataset{number}"))
    shared = shared_images(splits)
    lines = sharing_table(splits, shared).splitlines()
    assert lines[0] == f"{len(shared)} pairs of the 24 splits have images in common (--json lists them)."
    datasets = [re.search(r"(dataset\d).* in (dataset\d)", line) for line in lines[1:]]
    assert [found[1] == found[2] for found in datasets] == [True] * 8 + [False] * 56


def test_select_datasets(tmp_path):
    write_dataset(tmp_path)
    assert select_datasets(tmp_path, "refcoco") == [("refcoco", "unc")]  # google is not installed
    write_dataset(tmp_path, split_by="google")
    write_dataset(tmp_path, dataset="mine", split_by="a")
    both = [("refcoco", "unc"), ("refcoco", "google")]
    assert select_datasets(tmp_path, "refcoco") == both
    assert select_datasets(tmp_path, "refcoco,refcoco", "google") == both[1:]
    assert select_datasets(tmp_path, "refcoco", "unc,google") == both
    assert select_datasets(tmp_path, " refcoco , mine ", "google,a") == [both[1], ("mine", "a")]
    assert select_datasets(tmp_path, "mine,refcoco") == [("mine", "a"), *both]
    with pytest.raises(UserError, match="mine has no splitBy 'unc'"):
        select_datasets(tmp_path, "mine,refcoco", "unc")
    with pytest.raises(MissingFileError):  # a dataset that is not installed is not skipped
        REFER(tmp_path, *select_datasets(tmp_path, "refcoco+")[0])


def test_the_table_of_the_largest_numbers_fits_a_terminal(tmp_path):
    (train,) = statistics_of(write_dataset(tmp_path, REFS[1:2]), count_tokens)
    wide = {"count": 120624, "percent": 100.0, "pixels_lost_percent": 100.0}
    train.summary.update({"refs": 42404, "expressions": 120624, "ambiguous": wide, "cut": wide, "overlap": wide})
    lines = split_table([train] * 4).splitlines()
    assert max(map(len, lines)) <= 120
    assert np.ptp([len(line) for line in lines]) == 0
