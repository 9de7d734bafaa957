"""Training on several datasets, without the images of their evaluation splits."""

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
    """Two datasets that divide the same images differently: `refshapes`' testA is in `other`'s train split."""
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
def make_train(root):
    tokenizer = read_vocabulary(root / "refshapes" / "vocab.txt")

    def make(refer, excluded_images=()):
        kwargs = {"img_size": 48, "draw_seed": 0, "excluded_images": excluded_images}
        return ReferDataset(refer, "train", tokenizer, **kwargs)

    return make


def image_files(dataset):
    return {dataset.image_path(index).resolve() for index in range(len(dataset))}


def test_no_image_of_an_evaluation_split_is_in_training(root, make_train):
    refers = [REFER(root, "refshapes"), REFER(root, "other", "own")]
    evaluated = {
        refer.get_image_path(ref["image_id"]).resolve()
        for refer in refers for ref in refer.data["refs"] if ref["split"] in ("val", "testA", "testB", "test")
    }  # fmt: skip
    overlapping = [image_files(make_train(refer)) & evaluated for refer in refers]
    assert [len(files) for files in overlapping] == [4, 10]  # otherwise there would be nothing to remove
    mixed, report = mix(refers, make_train)
    trained = set().union(*map(image_files, mixed.datasets))
    assert trained
    assert not trained & evaluated
    assert (report.trained, report.evaluated, report.in_both) == (20, 17, 0)
    assert [(part.kept.images, part.removed.images) for part in report.parts] == [(20, 4), (20, 10)]
    for part, refer, dataset in zip(report.parts, refers, mixed.datasets, strict=True):
        whole = make_train(refer)
        assert part.kept[:2] == (len(dataset), len(dataset.expressions))
        assert part.removed[:2] == (len(whole) - len(dataset), len(whole.expressions) - len(dataset.expressions))
    assert report.lines()[-1].startswith("20 images are in training, 17 in an evaluation split, 0 in both (")
    head, _, other = (line.split() for line in report.lines()[:3])
    assert head == ["dataset", "refs", "removed", "expressions", "removed", "images", "removed"]
    assert other[:2] + other[-2:] == ["other", "(own)", "20", "10"]


def test_samples_equal_those_of_the_single_datasets(root, make_train):
    mixed, _ = mix([REFER(root, "refshapes"), REFER(root, "other", "own")], make_train)
    first, second = mixed.datasets
    assert len(mixed) == len(first) + len(second)
    for epoch in (0, 1):
        mixed.set_epoch(epoch)
        for index, dataset, local in (
            (0, first, 0),
            (len(first), second, 0),
            (len(mixed) - 1, second, len(second) - 1),
        ):
            sample, expected = mixed[index], dataset[local]
            assert int(sample.pop("index")) == index
            assert all(torch.equal(value, expected[name]) for name, value in sample.items())
    second.image_dir = root / "nowhere"
    with pytest.raises(UserError, match=r"20 of the 20 images of split train are missing"):
        mixed.check_images()


def test_images_are_equal_by_file_or_by_coco_number(root, tmp_path):
    """Links are followed. Files of the same name in two folders are different images, except for COCO images."""

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
    other = keys("elsewhere", True, "photo.jpg", "12.jpg")
    assert not set(other) & set(copied)
    shared = keys("shared", False, "odd.jpg")
    assert shared == keys("also_shared", False, "odd.jpg")
    assert REFER(root, "refshapes").image_keys() == REFER(root, "other", "own").image_keys()


def test_every_split_except_train_is_an_evaluation_split(root):
    refer = REFER(root, "refshapes")
    images = {
        split: {refer.Refs[ref_id]["image_id"] for ref_id in refer.getRefIds(split=split)} for split in refer.splits()
    }
    assert evaluation_images(refer) == images["val"] | images["testA"] | images["testB"]


def test_train_py_logs_the_mixture(root, small_config, tmp_path, run_here):
    flags = ["--cfg", small_config, "--refer_data_root", root, "--dataset", "refshapes, other", "--steps", "2",
             "--bert_tokenizer", root / "refshapes/vocab.txt", "--output-dir", tmp_path / "checkpoints"]  # fmt: skip
    done = run_here("train.py", *flags, "--model_id", "mix", "--log_dir", tmp_path / "models", check=True)
    log = (tmp_path / "models/mix/train.log").read_text()
    for text in (done.err, log):
        assert "20 images are in training, 17 in an evaluation split, 0 in both" in text
        assert next(line for line in text.splitlines() if "other (own)" in line).split()[-2:] == ["20", "10"]
    assert "are also in train" not in log
    config = (tmp_path / "models/mix/config.yaml").read_text()
    assert "NAME: refshapes,other" in config
    assert "SPLIT_BY: unc,own" in config

    run = tmp_path / "checkpoints/mix/last.pth"
    resumed = run_here("train.py", "--resume", run, "--steps", "3", "--log_dir", tmp_path / "models", check=True)
    assert "0 in both" in resumed.err
    failed = run_here("test.py", "--resume", run, "--dataset", "refshapes,other", "--refer_data_root", root)
    assert (failed.status, failed.err.count("\n")) == (2, 1)
    assert "'refshapes,other' names several datasets. Pass one." in failed.err


def test_train_py_warns_if_evaluation_images_are_in_train(root, small_config, tmp_path, run_here):
    refs = REFER(root, "refshapes").data["refs"]
    moved = next(ref for ref in refs if ref["split"] == "train")
    moved["split"] = "val"
    folder = tmp_path / "leaks"
    shutil.copytree(root / "other", folder, symlinks=True)
    (folder / "refs(own).p").write_bytes(pickle.dumps(refs, protocol=2))
    flags = ["--cfg", small_config, "--refer_data_root", tmp_path, "--dataset", "leaks", "--steps", "1"]
    flags += ["--bert_tokenizer", root / "refshapes/vocab.txt", "--log_dir", tmp_path / "models"]
    flags += ["--output-dir", tmp_path / "checkpoints"]
    done = run_here("train.py", *flags, check=True)
    assert "1 of the 8 images of split val are also in train" in done.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "refshapes,refshapes"], "names a dataset twice"),
        (["--dataset", "refshapes,other", "--splitBy", "unc"], "names 2 dataset\\(s\\). Pass a split system for each"),
        (["--dataset", "refshapes", "--splitBy", "unc,own"], "names 1 dataset\\(s\\)"),
        (["--dataset", "refshapes,other", "--splitBy", "own,unc"], "refshapes has no splitBy 'own'. Choose unc."),
        (["--dataset", "refshapes,othr"], "No such dataset 'othr'. Did you mean other\\?"),
        (["--dataset", "refshapes,"], "No such dataset ''"),
        (["--dataset", "refshapes,two"], "--splitBy first or --splitBy own\\. .* --splitBy unc,first"),
    ],
)
def test_mistakes_are_reported_in_one_line(root, small_config, tmp_path, run_here, flags, message):
    done = run_here("train.py", "--cfg", small_config, "--refer_data_root", root, "--output-dir", tmp_path, *flags)
    assert done.status == 2
    assert done.err.count("\n") == 1
    assert re.search(message, done.err), done.err


@pytest.mark.parametrize("form", ["{}.png", "{:012d}.jpg"])
def test_copies_of_an_image_under_other_names_are_recognized(root, make_train, tmp_path, form):
    """The datasets have their own copies of the same images, in one case with names like those of COCO images."""
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
    _, report = mix([REFER(tmp_path, "refshapes"), REFER(tmp_path, "copied", "own")], make_train)
    assert (report.trained, report.evaluated, report.in_both) == (20, 17, 0)
    assert [(part.kept.images, part.removed.images) for part in report.parts] == [(20, 4), (20, 10)]


def test_copies_with_other_numbers_are_recognized_by_content(root, make_train, tmp_path):
    """The contents are compared, and evaluation images whose files are missing are reported."""
    for name, first in (("refshapes", 0), ("copied", 500)):
        folder = tmp_path / name
        (folder / "images").mkdir(parents=True)
        original = "refshapes" if first == 0 else "other"
        instances = json.loads((root / original / "instances.json").read_text())
        for number, image in enumerate(instances["images"], first):
            shutil.copy(root / "refshapes/images" / image["file_name"], folder / f"images/{number:012d}.jpg")
            image["file_name"] = f"{number:012d}.jpg"
        (folder / "instances.json").write_text(json.dumps(instances))
        for refs in (root / original).glob("refs(*).p"):
            shutil.copy(refs, folder)
    refers = [REFER(tmp_path, "refshapes"), REFER(tmp_path, "copied", "own")]
    _, report = mix(refers, make_train)
    assert (report.trained, report.evaluated, report.in_both, report.by_name_only) == (20, 17, 0, 0)
    assert len(report.lines()) == 4
    for image_id in list(evaluation_images(refers[0]))[:3]:
        refers[0].get_image_path(image_id).unlink()
    _, report = mix(refers, make_train)
    assert report.by_name_only == 3
    assert report.lines()[-1].startswith("The files of 3 evaluation images are missing")


def test_a_mixture_without_training_images_is_reported(root, make_train, tmp_path):
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
    with pytest.raises(
        UserError, match=r"^No training image is left: all .* refshapes \(unc\) and swapped \(unc\) are in"
    ):
        mix([REFER(tmp_path, "refshapes"), REFER(tmp_path, "swapped")], make_train)
