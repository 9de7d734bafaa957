"""Packed files: samples as from the image files, interrupted packing, and the files that are refused."""

import json
import os
import pickle
import shutil
import signal

import h5py
import numpy as np
import pytest
import torch
from commands import run_in_process
from PIL import Image
from torch.utils.data import DataLoader

from bert.tokenization import read_vocabulary
from data.dataset_refer_bert import ReferDataset
from data.image_batches import ImageBatches
from data.mixed import mix
from data.pack import __main__ as command
from data.pack import writing
from data.pack.file import PackedFile
from data.pack.source import check_packed, open_source
from data.pack.writing import pack_split
from lib.baselines import baseline_metrics
from lib.errors import MissingFileError, UserError
from lib.protocols import PROTOCOLS
from refer.masks import resize_mask
from refer.refer import REFER

SIZE = 45  # 45·45 is not divisible by 8
SPLITS = ("train", "val")
KINDS = [(gt_mask, eval_size) for gt_mask in ("paper", "union") for eval_size in ("resized", "original")]


@pytest.fixture(scope="module")
def packed_folder(refshapes_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    for split in SPLITS:
        pack_split(REFER(refshapes_root, "refshapes"), split, SIZE, folder)
    return folder


@pytest.fixture
def packed(packed_folder, tmp_path):
    """A copy of the packed files, in the order of SPLITS."""
    shutil.copytree(packed_folder, tmp_path / "packed")
    return [str(tmp_path / "packed" / f"refshapes_unc_{split}_{SIZE}.h5") for split in SPLITS]


@pytest.fixture
def root(refshapes_root, tmp_path):
    """A data root that may be changed."""
    return shutil.copytree(refshapes_root, tmp_path / "data")


@pytest.fixture
def without_images(root):
    """A data root without image files."""
    shutil.rmtree(root / "refshapes" / "images")
    return root


def open_split(root, split, paths=(), **kwargs):
    refer = REFER(root, "refshapes")
    tokenizer = read_vocabulary(root / "refshapes" / "vocab.txt")
    source = open_source(paths, refer, split, SIZE)
    return ReferDataset(refer, split, tokenizer, img_size=SIZE, source=source, **kwargs)


def assert_equal(actual, expected):
    assert type(actual) is type(expected)
    if isinstance(actual, torch.Tensor):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        assert torch.equal(actual, expected)
    elif isinstance(actual, dict):
        assert list(actual) == list(expected)
        for name, value in actual.items():
            assert_equal(value, expected[name])
    else:
        for item, other in zip(actual, expected, strict=True):
            assert_equal(item, other)


def test_training_samples_of_two_epochs_equal_those_of_the_image_files(refshapes_root, without_images, packed):
    plain = open_split(refshapes_root, "train", draw_seed=0)
    dataset = open_split(without_images, "train", packed, draw_seed=0)
    dataset.check_images()
    assert len(dataset) == len(plain) > 24
    for epoch in (0, 1):
        plain.set_epoch(epoch)
        dataset.set_epoch(epoch)
        for index in range(len(plain)):
            assert_equal(dataset[index], plain[index])


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batches_of_every_protocol_equal_those_of_the_image_files(refshapes_root, without_images, packed, batch_size):
    plain, dataset = open_split(refshapes_root, "val"), open_split(without_images, "val", packed)
    expected, actual = (ImageBatches(each, batch_size, KINDS) for each in (plain, dataset))
    assert len(actual) == len(expected) > 1
    for number in range(len(expected)):
        assert_equal(actual[number], expected[number])
    for protocol in PROTOCOLS.values():
        assert baseline_metrics(dataset, protocol) == baseline_metrics(plain, protocol)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_the_file_that_the_main_process_has_open(without_images, packed, method):
    dataset = open_split(without_images, "val", packed)
    expected = [dataset[index] for index in range(len(dataset))]
    in_worker = pickle.loads(pickle.dumps(dataset)) if method == "spawn" else dataset
    loader = DataLoader(in_worker, batch_size=None, num_workers=2 if method == "fork" else 0)
    for sample, other in zip(loader, expected, strict=True):
        assert_equal(sample, other)


def test_images_are_drawn_at_their_own_size_without_the_image_files(refshapes_root, without_images, packed):
    plain, dataset = open_split(refshapes_root, "val"), open_split(without_images, "val", packed)
    expected, actual = plain.load_image(3), dataset.load_image(3)
    assert (actual.size, actual.mode) == (expected.size, "RGB")
    difference = np.asarray(actual, np.float32) - np.asarray(expected, np.float32)
    assert abs(difference).mean() < 8  # of 255; the image was reduced to 45×45 and enlarged


def test_a_mixture_reads_packed_files_without_the_images_that_it_leaves_out(root, packed):
    shutil.copytree(root / "refshapes", root / "other", symlinks=True)
    refers = [REFER(root, "refshapes"), REFER(root, "other", "unc")]
    refs = refers[1].data["refs"]
    train_images = sorted({ref["image_id"] for ref in refs if ref["split"] == "train"})
    for ref in refs:  # "other" evaluates on two training images of refshapes
        ref["split"] = "val" if ref["image_id"] in train_images[:2] else ref["split"]
    tokenizer = read_vocabulary(root / "refshapes" / "vocab.txt")

    def mixed(paths):
        def make(refer, excluded_images):
            source = open_source(paths, refer, "train", SIZE)
            kwargs = {"img_size": SIZE, "draw_seed": 0, "excluded_images": excluded_images, "source": source}
            return ReferDataset(refer, "train", tokenizer, **kwargs)

        return mix(refers, make)

    (expected, _), (actual, report) = mixed([]), mixed(packed[:1])
    assert report.parts[0].removed.images == 2
    for index in range(len(expected)):
        assert_equal(actual[index], expected[index])


def test_each_image_and_mask_is_stored_once_as_plain_hdf5(refshapes_root, packed):
    refer = REFER(refshapes_root, "refshapes")
    refs = refer.loadRefs(refer.getRefIds(split="train"))
    with h5py.File(packed[0]) as file:
        assert json.loads(file.attrs["header"])["split"] == "train"
        assert sorted(file["image_ids"]) == sorted({ref["image_id"] for ref in refs})
        assert sorted(file["ann_ids"]) == sorted({ref["ann_id"] for ref in refs})
        assert file["images"].shape == (24, 3, SIZE, SIZE)
        assert file["images"].chunks is None  # contiguous
        row = list(file["ann_ids"]).index(refs[5]["ann_id"])
        mask = np.unpackbits(file["masks"][row])[: SIZE * SIZE].reshape(SIZE, SIZE)
    assert np.array_equal(mask, resize_mask(refer.getMask(refs[5])["mask"], SIZE))


def count_reads(monkeypatch, stop_at=None, stop=None):
    """Return a list of the images that are decoded from now on; ``stop`` is called before one of them."""
    read, read_image = [], writing.read_image

    def counted(path):
        if len(read) == stop_at:
            stop()
        read.append(path)
        return read_image(path)

    monkeypatch.setattr(writing, "read_image", counted)
    return read


def test_packing_that_is_killed_is_continued(root, packed, tmp_path, monkeypatch):
    refer, folder = REFER(root, "refshapes"), tmp_path / "new"
    child = os.fork()
    if not child:
        count_reads(monkeypatch, 9, lambda: os.kill(os.getpid(), signal.SIGKILL))
        pack_split(refer, "train", SIZE, folder)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (partial,) = folder.glob("*.partial")
    file = PackedFile(partial)
    assert not file.is_complete()
    assert [file.is_intact(row) for row in range(24)] == [True] * 9 + [False] * 15
    with pytest.raises(
        UserError, match=r"partial is incomplete\. Continue writing it: `python -m data\.pack --dataset"
    ):
        open_source([str(partial)], refer, "train", SIZE)

    overwrite(partial, "images", 2)
    changed = refer.get_image_path(int(file.image_ids[4]))
    pixels = Image.open(changed).convert("RGB")
    pixels.save(changed, quality=30)
    read = count_reads(monkeypatch)
    path = pack_split(refer, "train", SIZE, folder)
    assert len(read) == 15 + 2
    assert changed in read
    assert [entry.name for entry in folder.iterdir()] == [path.name]
    assert all(PackedFile(path).is_intact(row) for row in range(24))

    pack_split(refer, "train", SIZE, tmp_path / "whole")
    assert (tmp_path / "whole" / path.name).read_bytes() == path.read_bytes()


def test_a_complete_file_is_verified(root, packed, tmp_path):
    refer, path = REFER(root, "refshapes"), tmp_path / "packed" / f"refshapes_unc_val_{SIZE}.h5"
    before = path.read_bytes()
    assert pack_split(refer, "val", SIZE, path.parent) == path
    assert path.read_bytes() == before
    overwrite(path, "masks", 1)
    with pytest.raises(UserError, match=r"val_45\.h5 is damaged, or .*\.jpg has changed since it was packed\. Delete"):
        pack_split(refer, "val", SIZE, path.parent)
    path.write_bytes(before)
    image = refer.get_image_path(int(PackedFile(path).image_ids[0]))
    Image.new("RGB", Image.open(image).size).save(image)
    with pytest.raises(UserError, match=rf"is damaged, or .*{image.name} has changed"):
        pack_split(refer, "val", SIZE, path.parent)
    with pytest.raises(UserError, match=rf"{image.name} has changed since .*\.h5 was written: \d+ bytes instead of"):
        open_split(root, "val", [path]).check_images()


def overwrite(path, name, row):
    """Damage a row of an HDF5 dataset."""
    with h5py.File(path, "r+") as file:
        file[name][row] = 255 - file[name][row]


def edit(path, **changes):
    """Change entries of a packed file's header."""
    with h5py.File(path, "r+") as file:
        file.attrs["header"] = json.dumps({**json.loads(file.attrs["header"]), **changes})


def refused(root, paths, split="val", img_size=SIZE):
    with pytest.raises(UserError) as caught:
        open_source(paths, REFER(root, "refshapes"), split, img_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_of_other_data_or_settings_are_refused(root, packed):
    repack_command = "python -m data.pack --dataset refshapes --splitBy unc --split val --img_size"
    repack = f"Delete it and pack the split again: `{repack_command}"
    assert refused(root, packed, img_size=64) == f"{packed[1]} was packed with img_size 45, not 64. {repack} 64`."
    refs = root / "refshapes" / "refs(unc).p"
    refs.write_bytes(pickle.dumps(REFER(root, "refshapes").data["refs"], protocol=4))
    assert refused(root, packed) == (
        f"{packed[1]} was packed from other annotation files than those that are installed. {repack} 45`."
    )
    edit(packed[1], version=7)
    assert refused(root, packed) == (
        f"{packed[1]} is a file of format 'CrossVLT packed split', version 7; this code reads 'CrossVLT packed split', "
        "version 1. Write it again with `python -m data.pack`."
    )


@pytest.mark.parametrize("kept", [0, 100, 5000, -1])
def test_truncated_files_are_refused(root, packed, kept):
    with open(packed[1], "r+b") as file:
        file.truncate(kept % os.path.getsize(packed[1]))
    assert refused(root, packed) == (
        f"{packed[1]} is not a packed file, or it is truncated. Write it with `python -m data.pack`."
    )


def test_a_file_that_is_truncated_while_it_is_read_is_reported(root, packed):
    dataset = open_split(root, "val", packed)
    with open(packed[1], "r+b") as file:
        file.truncate(5000)
    with pytest.raises(UserError, match=r"val_45\.h5 is truncated\. Write it again with"):
        dataset[0]


def test_missing_and_foreign_files_are_refused(root, packed, tmp_path):
    with pytest.raises(MissingFileError, match=r"^No such packed file: nowhere\.h5\. Write it with"):
        open_source(["nowhere.h5"], REFER(root, "refshapes"), "val", SIZE)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["images"] = np.zeros(3)
    assert "other.h5 is not a packed file" in refused(root, [tmp_path / "other.h5"])
    train, val = (("refshapes", "unc", split) for split in SPLITS)
    check_packed(packed, train, val)
    check_packed(["", packed[1]], val)
    with pytest.raises(UserError) as caught:
        check_packed(packed, val)
    assert str(caught.value) == (
        f"{packed[0]} contains split train of refshapes (unc), which this command does not read. Drop --packed "
        f"{packed[0]}."
    )
    copy = shutil.copy(packed[1], tmp_path / "copy.h5")
    with pytest.raises(UserError, match=r"val_45\.h5 and .*copy\.h5 both contain split val of refshapes \(unc\)"):
        check_packed([packed[1], copy], val)


def test_a_file_made_by_another_version_of_pillow_is_read_with_a_warning(root, packed, caplog):
    edit(packed[1], libraries={"pillow": "1.0"})
    open_split(root, "val", packed)
    assert "val_45.h5 was packed with {'pillow': '1.0'}, this is {'pillow': " in caplog.text


def test_an_image_that_is_missing_or_of_another_size_is_reported(root, tmp_path):
    refer = REFER(root, "refshapes")
    image = refer.get_image_path(refer.loadRefs(refer.getRefIds(split="val"))[-1]["image_id"])
    image.unlink()
    with pytest.raises(UserError, match=rf"^No such image: .*{image.name}\.$"):
        pack_split(refer, "val", SIZE, tmp_path)
    Image.new("RGB", (7, 9)).save(image)
    with pytest.raises(UserError, match=rf"{image.name} is 7×9, but its annotation says"):
        pack_split(refer, "val", SIZE, tmp_path)


def test_the_command_packs_several_splits(refshapes_root, tmp_path, monkeypatch, capsys):
    flags = ["pack", "--dataset", "refshapes", "--refer_data_root", refshapes_root, "--out", tmp_path / "out"]
    done = run_in_process(command.main, [*flags, "--split", "all", "--img_size", 40], monkeypatch, capsys)
    assert done.status == 0, done.err
    files = [tmp_path / "out" / f"refshapes_unc_{split}_40.h5" for split in ("val", "testA", "testB")]
    assert [line.split(": ")[0] for line in done.out.splitlines()] == list(map(str, files))
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == sorted(file.name for file in files)
    done = run_in_process(command.main, [*flags, "--img_size", 32], monkeypatch, capsys)
    assert (done.status, done.err) == (2, "error: --img_size 32: must be at least 33.\n")


def test_training_and_evaluation_with_packed_files(trained, small_config, root, tmp_path, run_here):
    """The same weights and metrics as with the image files, which are deleted in between."""
    refer = REFER(root, "refshapes")
    files = [pack_split(refer, split, 64, tmp_path / "packed") for split in ("train", "val")]
    flags = [flag for file in files for flag in ("--packed", file)]
    common = ["--cfg", small_config, "--refer_data_root", root]
    best = trained[0] / "checkpoints" / "run" / "best.pth"

    def run(name, *packed):
        folders = ["--output-dir", tmp_path / "checkpoints", "--log_dir", tmp_path / "models", "--model_id", name]
        run_here("train.py", *common, *folders, "--steps", 2, *packed, check=True)
        evaluation = [
            "--resume",
            best,
            "--split",
            "val",
            "--protocol",
            "paper,original",
            "--json",
            tmp_path / f"{name}.json",
        ]
        drawing = ["--vis", tmp_path / f"{name}_vis", "--vis-num", 2]
        run_here("test.py", *common, *evaluation, *drawing, *packed[-2:], check=True)
        checkpoint = torch.load(tmp_path / "checkpoints" / name / "last.pth", weights_only=True)
        return checkpoint["model"], json.loads((tmp_path / f"{name}.json").read_text())

    weights, metrics = run("plain")
    shutil.rmtree(root / "refshapes" / "images")
    packed_weights, packed_metrics = run("packed", *flags)
    assert all(torch.equal(packed_weights[name], value) for name, value in weights.items())
    assert packed_metrics == metrics
    assert len(list((tmp_path / "packed_vis").glob("val_0*.png"))) == 2
    unused = run_here("test.py", *common, "--resume", best, "--split", "val", *flags)
    assert (unused.status, "contains split train of refshapes (unc)" in unused.err) == (2, True)
