"""Training on several datasets: their union, without a picture that any of them is evaluated on."""

import json
import pickle
import re
import shutil

import pytest
import torch

from bert.tokenization import read_vocabulary
from data.dataset_refer_bert import ReferDataset
from data.mixed import evaluation_images, mix
from lib.errors import UserError
from refer.refer import REFER


@pytest.fixture(scope="module")
def root(refshapes_root, tmp_path_factory):
    """Two sets of the same pictures, which they divide differently: some of `other`'s train is `refshapes`' testA."""
    root = tmp_path_factory.mktemp("mixed")
    (root / "refshapes").symlink_to(refshapes_root / "refshapes")
    (root / "other").mkdir()
    (root / "other" / "images").symlink_to(refshapes_root / "refshapes" / "images")
    shutil.copy(refshapes_root / "refshapes" / "instances.json", root / "other")
    refs = REFER(refshapes_root, "refshapes").data["refs"]
    moved = {"val": "train", "testA": "train", "testB": "test"}
    trained = sorted({ref["image_id"] for ref in refs if ref["split"] == "train"})
    for ref in refs:
        ref["split"] = "val" if ref["image_id"] in trained[:4] else moved.get(ref["split"], ref["split"])
    (root / "other" / "refs(own).p").write_bytes(pickle.dumps(refs, protocol=2))
    shutil.copytree(root / "other", root / "two", symlinks=True)
    shutil.copy(root / "two" / "refs(own).p", root / "two" / "refs(first).p")
    return root


@pytest.fixture
def make(root):
    tokenizer = read_vocabulary(root / "refshapes" / "vocab.txt")

    def make_train(refer, excluded_images=()):
        how = {"img_size": 48, "draw_sentences": True}
        return ReferDataset(refer, "train", tokenizer, excluded_images=excluded_images, **how)

    return make_train


def names_of_pictures(dataset):
    return {dataset.image_path(index).resolve() for index in range(len(dataset))}


def test_no_evaluation_picture_is_trained_on(root, make):
    refers = [REFER(root, "refshapes"), REFER(root, "other", "own")]
    evaluated = {
        refer.get_image_path(ref["image_id"]).resolve()
        for refer in refers for ref in refer.data["refs"] if ref["split"] in ("val", "testA", "testB", "test")
    }  # fmt: skip
    overlapping = [names_of_pictures(make(refer)) & evaluated for refer in refers]
    assert [len(pictures) for pictures in overlapping] == [4, 10]  # else there were nothing to remove
    mixed, proof = mix(refers, make)
    shown = set().union(*map(names_of_pictures, mixed.datasets))
    assert shown
    assert not shown & evaluated
    assert (proof.trained, proof.evaluated, proof.in_both) == (20, 17, 0)
    assert [(part.images, part.removed_images) for part in proof.parts] == [(20, 4), (20, 10)]
    for part, refer, dataset in zip(proof.parts, refers, mixed.datasets, strict=True):
        whole = make(refer)
        assert (part.refs, part.expressions) == (len(dataset), len(dataset.expressions))
        assert (part.refs + part.removed_refs, part.expressions + part.removed_expressions) == (
            len(whole), len(whole.expressions)
        )  # fmt: skip
    assert proof.lines()[-1].startswith("20 pictures are trained on, 17 are in an evaluation split, 0 are in both (")
    assert "other (own)" in proof.lines()[2]


def test_samples_are_those_of_the_parts(root, make):
    mixed, _ = mix([REFER(root, "refshapes"), REFER(root, "other", "own")], make)
    first, second = mixed.datasets
    assert len(mixed) == len(first) + len(second)
    for epoch in (0, 1):
        mixed.set_epoch(epoch)
        for index, (part, own) in {0: (first, 0), len(first): (second, 0), len(mixed) - 1: (second, -1)}.items():
            sample, want = mixed[index], part[range(len(part))[own]]
            assert int(sample.pop("index")) == index
            assert all(torch.equal(value, want[name]) for name, value in sample.items())
    second.image_dir = root / "nowhere"
    with pytest.raises(UserError, match=r"20 of the 20 pictures of split train are missing"):
        mixed.check_images()


def test_which_pictures_are_the_same(root, tmp_path):
    """By file, through links too, or by the COCO number in the name; not by another name they happen to share."""

    def keys(name, own_images, *file_names):
        folder = tmp_path / name
        folder.mkdir()
        if own_images:
            (folder / "images").mkdir()
        images = [{"id": i, "width": 9, "height": 9, "file_name": file} for i, file in enumerate(file_names)]
        annotations = [{"id": 0, "image_id": 0, "category_id": 1}]
        instances = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
        (folder / "instances.json").write_text(json.dumps(instances))
        refs = [{"ref_id": 0, "ann_id": 0, "image_id": 0, "split": "train", "sentences": [{"sent_id": 0, "raw": "x"}]}]
        (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
        return list(REFER(tmp_path, name).image_keys().values())

    coco = keys("refcoco", False, "COCO_train2014_000000000009.jpg", "COCO_train2014_000000000025.jpg")
    copied = keys("copied", True, "part/000000000009.jpg", "COCO_val2014_000000000034.jpg", "photo.jpg", "a/photo.jpg")
    assert copied[0] == coco[0]
    assert len(set(coco + copied)) == 5
    elsewhere = keys("elsewhere", True, "photo.jpg", "12.jpg")
    assert not set(elsewhere) & set(copied)
    shared = keys("shared", False, "odd.jpg")
    assert shared == keys("also_shared", False, "odd.jpg")
    assert REFER(root, "refshapes").image_keys() == REFER(root, "other", "own").image_keys()


def test_every_split_but_train_is_an_evaluation_split(root):
    refer = REFER(root, "refshapes")
    images = {split: {refer.Refs[one]["image_id"] for one in refer.getRefIds(split=split)} for split in refer.splits()}
    assert evaluation_images(refer) == images["val"] | images["testA"] | images["testB"]


def test_train_py_trains_on_the_union_and_logs_the_proof(root, small_config, tmp_path, run_here):
    flags = ["--cfg", small_config, "--refer_data_root", root, "--dataset", "refshapes, other", "--steps", "2",
             "--bert_tokenizer", root / "refshapes/vocab.txt", "--output-dir", tmp_path / "checkpoints"]  # fmt: skip
    done = run_here("train.py", *flags, "--model_id", "mix", "--log_dir", tmp_path / "models", check=True)
    log = (tmp_path / "models/mix/train.log").read_text()
    for text in (done.err, log):
        assert "20 pictures are trained on, 17 are in an evaluation split, 0 are in both" in text
        assert next(line for line in text.splitlines() if "other (own)" in line).split()[-2:] == ["20", "10"]
    assert "are in train too" not in log
    config = (tmp_path / "models/mix/config.yaml").read_text()
    assert "NAME: refshapes,other" in config
    assert "SPLIT_BY: unc,own" in config

    run = tmp_path / "checkpoints/mix/last.pth"
    more = run_here("train.py", "--resume", run, "--steps", "3", "--log_dir", tmp_path / "models", check=True)
    assert "0 are in both" in more.err
    told = run_here("test.py", "--resume", run, "--dataset", "refshapes,other", "--refer_data_root", root)
    assert (told.status, told.err.count("\n")) == (2, 1)
    assert "'refshapes,other' names several datasets: give one here" in told.err


def test_a_split_system_that_leaks_is_told(root, small_config, tmp_path, run_here):
    refs = REFER(root, "refshapes").data["refs"]
    one = next(ref for ref in refs if ref["split"] == "train")
    one["split"] = "val"
    folder = tmp_path / "leaks"
    shutil.copytree(root / "other", folder, symlinks=True)
    (folder / "refs(own).p").write_bytes(pickle.dumps(refs, protocol=2))
    flags = ["--cfg", small_config, "--refer_data_root", tmp_path, "--dataset", "leaks", "--steps", "1"]
    flags += ["--bert_tokenizer", root / "refshapes/vocab.txt", "--log_dir", tmp_path / "models"]
    flags += ["--output-dir", tmp_path / "checkpoints"]
    done = run_here("train.py", *flags, check=True)
    assert "1 of the 8 pictures of split val are in train too" in done.err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--dataset", "refshapes,refshapes"], "names a dataset twice"),
        (["--dataset", "refshapes,other", "--splitBy", "unc"], "names 2 dataset\\(s\\); give a split system for each"),
        (["--dataset", "refshapes", "--splitBy", "unc,own"], "names 1 dataset\\(s\\)"),
        (["--dataset", "refshapes,other", "--splitBy", "own,unc"], "unknown splitBy 'own': refshapes has unc"),
        (["--dataset", "refshapes,othr"], "unknown dataset 'othr' \\(did you mean other\\?\\)"),
        (["--dataset", "refshapes,"], "unknown dataset ''"),
        (
            ["--dataset", "refshapes,two"],
            "--splitBy first or --splitBy own; .* in the same order, such as .* unc,first",
        ),
    ],
)
def test_mistakes(root, small_config, tmp_path, run_here, flags, told):
    done = run_here("train.py", "--cfg", small_config, "--refer_data_root", root, "--output-dir", tmp_path, *flags)
    assert done.status == 2
    assert done.err.count("\n") == 1
    assert re.search(told, done.err), done.err


@pytest.mark.parametrize("form", ["{}.png", "{:012d}.jpg"])
def test_copies_under_other_names_are_the_same_pictures(root, make, tmp_path, form):
    """Two sets that were made of the same photos, each with copies of its own; some are called as COCO calls its."""
    (tmp_path / "refshapes").symlink_to(root / "refshapes")
    folder = tmp_path / "copied"
    (folder / "images").mkdir(parents=True)
    shutil.copy(root / "other" / "refs(own).p", folder)
    instances = json.loads((root / "other" / "instances.json").read_text())
    for number, image in enumerate(instances["images"]):
        name = form.format(number)
        shutil.copy(root / "refshapes" / "images" / image["file_name"], folder / "images" / name)
        image["file_name"] = name
    (folder / "instances.json").write_text(json.dumps(instances))
    _, proof = mix([REFER(tmp_path, "refshapes"), REFER(tmp_path, "copied", "own")], make)
    assert (proof.trained, proof.evaluated, proof.in_both) == (20, 17, 0)
    assert [(part.images, part.removed_images) for part in proof.parts] == [(20, 4), (20, 10)]


def test_only_numbers_in_both_sets(root, make, tmp_path):
    """Two ways to number the same photos; and evaluated pictures that aren't there are told, as nobody can compare."""
    for name, first in (("refshapes", 0), ("copied", 500)):
        folder = tmp_path / name
        (folder / "images").mkdir(parents=True)
        whose = "refshapes" if first == 0 else "other"
        instances = json.loads((root / whose / "instances.json").read_text())
        for number, image in enumerate(instances["images"], first):
            shutil.copy(root / "refshapes/images" / image["file_name"], folder / f"images/{number:012d}.jpg")
            image["file_name"] = f"{number:012d}.jpg"
        (folder / "instances.json").write_text(json.dumps(instances))
        for refs in (root / whose).glob("refs(*).p"):
            shutil.copy(refs, folder)
    refers = [REFER(tmp_path, "refshapes"), REFER(tmp_path, "copied", "own")]
    _, proof = mix(refers, make)
    assert (proof.trained, proof.evaluated, proof.in_both, proof.by_name_only) == (20, 17, 0, 0)
    assert "aren't there" not in "".join(proof.lines())
    for image_id in list(evaluation_images(refers[0]))[:3]:
        refers[0].get_image_path(image_id).unlink()
    _, proof = mix(refers, make)
    assert proof.by_name_only == 3
    assert proof.lines()[-1].startswith("but 3 of those evaluated aren't there: copies of them")


def test_nothing_left_to_train_on(root, make, tmp_path):
    (tmp_path / "refshapes").symlink_to(root / "refshapes")
    refs = REFER(root, "refshapes").data["refs"]
    for name, train in (("refshapes", True), ("swapped", False)):
        folder = tmp_path / name
        if train:
            folder.unlink()
        shutil.copytree(root / "other", folder, symlinks=True)
        (folder / "refs(own).p").unlink()
        (folder / "refs(unc).p").write_bytes(
            pickle.dumps([{**ref, "split": "train" if (ref["split"] == "train") is train else "val"} for ref in refs])
        )
    with pytest.raises(UserError, match=r"nothing is left to train on: .* refshapes \(unc\) and swapped \(unc\) is in"):
        mix([REFER(tmp_path, "refshapes"), REFER(tmp_path, "swapped")], make)
