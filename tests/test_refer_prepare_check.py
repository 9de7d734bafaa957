"""python -m refer.prepare --check: which problems it finds, and that it changes nothing."""

import json
import pickle
import shutil

import pytest
from commands import contents
from PIL import Image
from published_set import COUNTS, FOLDER, H, W, image_name

from refer.datasets import PUBLISHED_COUNTS, Counts


def test_problems_are_reported_and_nothing_is_written(server, prepare, tmp_path, image_files, annotations):
    prepare()
    root = tmp_path / "data"
    good = contents(root)
    command = f"`python -m refer.prepare --dataset refcoco --root {root}"
    Image.new("RGB", (H, W)).save(tmp_path / "turned.jpg")
    first = f"{FOLDER}/{image_name(1)}"
    changed = annotations["refs(unc).p"].replace(b"dog 0", b"cat 0")
    for name, data, message in [
        (first, None, f"1 missing image(s); for example, {image_name(1)}"),
        (first, image_files[image_name(1)][:-100], "1 invalid image(s)"),
        (first, (tmp_path / "turned.jpg").read_bytes(), "has 20x30 pixels instead of 30x20"),
        (first, b"<html>", "is not an image"),
        ("refcoco/refs(unc).p", changed, "has SHA-256"),
        ("refcoco/refs(unc).p", annotations["refs(unc).p"][:-50], "refs(unc).p is "),
        ("refcoco/instances.json", None, "instances.json is missing"),
        ("hashes.json", b"corrupt", "hashes.json is corrupt. Delete it"),
    ]:
        (root / name).unlink() if data is None else (root / name).write_bytes(data)
        before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
        server.requests.clear()
        done = prepare("--check", status=2)
        assert message in done.err
        assert command in done.err or name == "hashes.json"
        assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
        assert server.requests == []
        (root / name).write_bytes(good[name])
    prepare("--check")


def test_datasets_that_share_images_are_checked_together(server, prepare, tmp_path, annotations):
    prepare()
    root = tmp_path / "data"
    only_train = [ref for ref in pickle.loads(annotations["refs(unc).p"]) if ref["split"] == "train"]
    (root / "own").mkdir()
    (root / "own" / "instances.json").write_bytes(annotations["instances.json"])
    (root / "own" / "refs(unc).p").write_bytes(pickle.dumps(only_train))
    (root / FOLDER / image_name(2)).unlink()  # used by the test splits of refcoco only
    done = prepare("--check", dataset="refcoco,own", status=2)
    rows = {tuple(line.split()[i] for i in (0, 2)): line.split()[5:7] for line in done.out.splitlines()[1:]}
    assert rows["refcoco", "testA"] == ["1", "0"]
    assert rows["refcoco", "train"] == rows["own", "train"] == ["2", "2"]
    assert f"`python -m refer.prepare --dataset refcoco --root {root} --images needed`" in done.err
    done = prepare("--check", "--images", "none", dataset="refcoco,own")
    assert done.out.count("not checked") == len(rows)


def test_the_suggested_command_covers_the_images_of_published_datasets(server, prepare, tmp_path, annotations):
    prepare()
    root = tmp_path / "data"
    shutil.copytree(root / "refcoco", root / "own")
    (root / FOLDER / image_name(2)).unlink()
    command = f"`python -m refer.prepare --dataset refcoco --root {root} --images needed`"
    assert f"To download the images of refcoco: {command}" in prepare("--check", dataset=None, status=2).err
    instances = json.loads(annotations["instances.json"])
    instances["images"][0]["file_name"] = "mine.jpg"
    (root / "own/instances.json").write_text(json.dumps(instances))
    error = prepare("--check", dataset=None, status=2).err
    assert "2 missing image(s)" in error
    assert f"To download the images of refcoco: {command}" in error


@pytest.mark.parametrize("names", [None, "half,refshapes,refcoco"])
def test_incomplete_folders_do_not_hide_other_datasets(server, prepare, tmp_path, annotations, names):
    prepare()
    root = tmp_path / "data"
    for name in ("half", ".half.part", "refshapes"):
        (root / name).mkdir()
        (root / name / "instances.json").write_bytes(annotations["instances.json"])
    done = prepare("--check", dataset=names, status=2)
    assert "refcoco (unc)" in done.out
    assert "2 problem(s) found" in done.err
    assert f"`python -m data.refshapes --root {root}`" in done.err
    assert "half has no refs(<splitBy>).p" in done.err


@pytest.mark.parametrize(
    "flags",
    [["--from", "."], ["--mirror", "http://x"], ["--download"], ["--again"], ["--keep_zips"], ["--stall", "9"],
     ["--tries", "9"], ["--images", "needed"]],
)  # fmt: skip
def test_flags_without_effect_are_rejected(prepare, flags):
    assert f"error: {flags[0]}" in prepare("--check", *flags, status=2).err


def test_a_missing_optional_split_system_is_mentioned(server, prepare):
    prepare()
    assert "data/refcoco: refs(google).p is not installed. To download it, use --again." in prepare("--check").err


def test_a_jpeg_with_bytes_after_its_end_is_valid(server, prepare, tmp_path, image_files):
    prepare()
    (tmp_path / "data" / FOLDER / image_name(1)).write_bytes(image_files[image_name(1)] + b"\0\0")
    prepare("--check")


def test_counts_that_differ_from_the_published_ones_are_shown(server, prepare, tmp_path, monkeypatch):
    prepare()
    monkeypatch.setitem(PUBLISHED_COUNTS, ("refcoco", "unc"), {**COUNTS, "val": Counts(3, 2), "testC": Counts(9, 9, 9)})
    done = prepare("--check", status=2)
    rows = {line.split()[2]: line for line in done.out.splitlines()[1:]}
    assert rows["train"].endswith("as published")
    assert rows["val"].endswith("1 refs instead of 3")
    assert rows["testC"].endswith("0  0 refs instead of 9, 0 expressions instead of 9, 0 images instead of 9")
    assert "val has 1 refs instead of 3; testC has 0 refs instead of 9" in done.err


def test_own_and_absent_datasets(prepare, refshapes_root, tmp_path):
    done = prepare("--check", "--root", refshapes_root, dataset=None)
    assert "refshapes (unc)" in done.out
    assert "no published counts" in done.out
    assert "none contains no dataset" in prepare("--check", "--root", tmp_path / "none", dataset=None, status=2).err
    assert "Did you mean refcoco?" in prepare("--check", dataset="refcoc", status=2).err


def test_the_suggested_command_leaves_out_images_that_were_not_checked(server, prepare, tmp_path):
    prepare("--images", "none")
    (tmp_path / "data/refcoco/instances.json").unlink()
    error = prepare("--check", "--images", "none", status=2).err
    assert f"`python -m refer.prepare --dataset refcoco --root {tmp_path}/data --images none`" in error
