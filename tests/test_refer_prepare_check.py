"""python -m refer.prepare --check: what it finds, and that it changes nothing."""

import json
import pickle
import shutil

import pytest
from commands import contents
from PIL import Image
from published_set import COUNTS, FOLDER, H, W, picture_name

from refer.counts import PUBLISHED_COUNTS, Counts


def test_check_tells_what_is_wrong_and_writes_nothing(world, prepare, tmp_path, pictures, annotations):
    prepare()
    root = tmp_path / "data"
    good = contents(root)
    again = f"`python -m refer.prepare --dataset refcoco --root {root}"
    Image.new("RGB", (H, W)).save(tmp_path / "turned.jpg")
    first = f"{FOLDER}/{picture_name(1)}"
    for name, data, told in [
        (first, None, "1 pictures are missing, such as"),
        (first, pictures[picture_name(1)][:-100], "1 are not right"),
        (first, (tmp_path / "turned.jpg").read_bytes(), "is 20x30, the annotations say 30x20"),
        (first, b"<html>", "is no picture"),
        ("refcoco/refs(unc).p", annotations["refs(unc).p"].replace(b"dog 0", b"cat 0"), "has the SHA-256"),
        ("refcoco/refs(unc).p", annotations["refs(unc).p"][:-50], "refs(unc).p is damaged"),
        ("refcoco/instances.json", None, "instances.json is missing"),
        ("hashes.json", b"torn", "hashes.json is damaged: delete it"),
    ]:
        (root / name).unlink() if data is None else (root / name).write_bytes(data)
        before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
        world.asked.clear()
        done = prepare("--check", status=2)
        assert told in done.err
        assert again in done.err or "hashes.json" in name
        assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
        assert world.asked == []
        (root / name).write_bytes(good[name])
    prepare("--check")


def test_check_of_two_sets_with_the_same_pictures(world, prepare, tmp_path, annotations):
    prepare()
    root = tmp_path / "data"
    (root / "own").mkdir()
    refs = pickle.loads(annotations["refs(unc).p"])
    only_train = [ref for ref in refs if ref["split"] == "train"]
    (root / "own" / "instances.json").write_bytes(annotations["instances.json"])
    (root / "own" / "refs(unc).p").write_bytes(pickle.dumps(only_train))
    (root / FOLDER / picture_name(2)).unlink()  # only the first set has it, in its test splits
    done = prepare("--check", dataset="refcoco,own", status=2)
    rows = {tuple(line.split()[i] for i in (0, 2)): line.split()[5:7] for line in done.out.splitlines()[1:]}
    assert rows["refcoco", "testA"] == ["1", "0"]
    assert rows["refcoco", "train"] == rows["own", "train"] == ["2", "2"]
    assert f"`python -m refer.prepare --dataset refcoco --root {root} --pictures needed`" in done.err
    done = prepare("--check", "--pictures", "none", dataset="refcoco,own")
    assert done.out.count("not looked at") == len(rows)


def test_check_goes_on_after_a_folder_that_is_no_dataset(world, prepare, tmp_path, annotations):
    prepare()
    root = tmp_path / "data"
    for name in ("half", ".half.part"):
        (root / name).mkdir()
        (root / name / "instances.json").write_bytes(annotations["instances.json"])
    (root / "refshapes").mkdir()
    (root / "refshapes" / "instances.json").write_bytes(annotations["instances.json"])
    done = prepare("--check", dataset=None, status=2)
    assert "refcoco (unc)" in done.out
    assert "2 things are wrong" in done.err
    assert f"refs(unc).p is missing. Run `python -m data.refshapes --root {root}`." in done.err
    (root / "refshapes" / "instances.json").unlink()
    assert "half has no refs(<splitBy>).p" in prepare("--check", dataset=None, status=2).err


@pytest.mark.parametrize(
    "flags",
    [["--from", "."], ["--mirror", "http://x"], ["--download"], ["--again"], ["--keep_zips"], ["--stall", "9"],
     ["--tries", "9"], ["--pictures", "needed"]],
)  # fmt: skip
def test_check_refuses_flags_that_it_would_not_use(prepare, flags):
    assert f"error: {' '.join(flags[:1])}" in prepare("--check", *flags, status=2).err


def test_check_names_what_brings_pictures_that_an_own_set_shares(world, prepare, tmp_path, annotations):
    prepare()
    root = tmp_path / "data"
    shutil.copytree(root / "refcoco", root / "own")
    (root / FOLDER / picture_name(2)).unlink()
    command = f"`python -m refer.prepare --dataset refcoco --root {root} --pictures needed`"
    assert f"To get them: {command}" in prepare("--check", dataset=None, status=2).err
    instances = json.loads(annotations["instances.json"])
    instances["images"][0]["file_name"] = "mine.jpg"
    (root / "own/instances.json").write_text(json.dumps(instances))
    told = prepare("--check", dataset=None, status=2).err
    assert "2 pictures are missing" in told
    assert f"To get those of refcoco: {command}" in told


def test_check_of_a_named_folder_that_is_no_dataset_goes_on(world, prepare, tmp_path, annotations):
    prepare()
    (tmp_path / "data/half").mkdir()
    (tmp_path / "data/half/instances.json").write_bytes(annotations["instances.json"])
    done = prepare("--check", dataset="half,refcoco", status=2)
    assert "refcoco (unc)" in done.out
    assert "half has no refs(<splitBy>).p" in done.err


def test_check_mentions_a_split_system_that_is_not_there(world, prepare):
    prepare()
    assert "data/refcoco: without refs(google).p: --again gets them anew" in prepare("--check").err


def test_a_jpeg_with_something_after_its_end_is_whole(world, prepare, tmp_path, pictures):
    prepare()
    (tmp_path / "data" / FOLDER / picture_name(1)).write_bytes(pictures[picture_name(1)] + b"\0\0")
    prepare("--check")


def test_check_shows_counts_that_were_not_published(world, prepare, tmp_path, monkeypatch):
    prepare()
    monkeypatch.setitem(PUBLISHED_COUNTS, ("refcoco", "unc"), {**COUNTS, "val": Counts(3, 2), "testC": Counts(9, 9, 9)})
    done = prepare("--check", status=2)
    rows = {line.split()[2]: line for line in done.out.splitlines()[1:]}
    assert rows["train"].endswith("as published")
    assert rows["val"].endswith("published: 3 refs, 2 expressions")
    assert rows["testC"].endswith("0  published: 9 refs, 9 expressions, 9 images")
    assert "val has 1 refs instead of 3, and testC differ too" in done.err


def test_check_of_an_own_set_and_of_nothing(prepare, refshapes_root, tmp_path):
    done = prepare("--check", "--root", refshapes_root, dataset=None)
    assert "refshapes (unc)" in done.out
    assert "no published counts" in done.out
    assert "no dataset in" in prepare("--check", "--root", tmp_path / "none", dataset=None, status=2).err
    assert "did you mean refcoco" in prepare("--check", dataset="refcoc", status=2).err


def test_the_command_that_repairs_brings_no_pictures_where_none_were_looked_at(world, prepare, tmp_path):
    prepare("--pictures", "none")
    (tmp_path / "data/refcoco/instances.json").unlink()
    told = prepare("--check", "--pictures", "none", status=2).err
    assert told.endswith(f"`python -m refer.prepare --dataset refcoco --root {tmp_path}/data --pictures none`")
