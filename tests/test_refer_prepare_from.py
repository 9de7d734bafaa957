"""python -m refer.prepare: files that the user has already (--from), and weights."""

import json
import os
import shutil

import pytest
import torch
from commands import contents
from published_set import FOLDER, IMAGES, asked, picture_name, swin

from lib.variants import SWIN_VARIANTS
from refer.prepare.weights import EMBED_DIMS


def test_refused_weights_can_be_given_as_the_message_says(world, weights, prepare, tmp_path):
    flags = ("--weights", "swin_base", "--pretrained", tmp_path / "pre")
    prepare(*flags, dataset=None)
    name, recorded = "swin_base_patch4_window12_384_22k.pth", tmp_path / "pre/hashes.json"
    hashes = json.loads(recorded.read_text())
    hashes[name]["size"] += 1
    recorded.write_text(json.dumps(hashes))
    (tmp_path / "pre" / name).unlink()
    kept = tmp_path / "pre/downloads" / name.replace(".pth", ".refused.pth")
    assert f"it is kept as {kept}, to be given by --from" in prepare(*flags, dataset=None, status=2).err
    del hashes[name]
    recorded.write_text(json.dumps(hashes))
    world.asked.clear()
    prepare(*flags, "--from", kept, dataset=None)
    assert (tmp_path / "pre" / name).read_bytes() == weights[name]
    assert world.asked == []


def test_either_file_of_bert_is_taken_from_a_folder(world, weights, prepare, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "vocab.txt").write_bytes(weights["vocab.txt"])
    torch.save({"bert.embeddings.word_embeddings.weight": torch.zeros(30522, 1)}, mine / "pytorch_model.bin")
    prepare("--weights", "bert", "--pretrained", tmp_path / "pre", "--from", mine, dataset=None)
    assert {path.name for path in (tmp_path / "pre").iterdir()} == {"vocab.txt", "pytorch_model.bin", "hashes.json"}


def test_swin_weights_are_known_by_their_width():
    assert {name: one["embed_dim"] for name, one in SWIN_VARIANTS.items()} == EMBED_DIMS


# ---- --from ----


def test_from_archives(world, prepare, tmp_path, pictures):
    for name, address in (("mine.zip", "/archive/refcoco.zip"), ("coco.zip", "/zips/train2014.zip")):
        (tmp_path / name).write_bytes(world.files[address])
    prepare("--from", tmp_path / "mine.zip", "--from", tmp_path / "coco.zip")
    assert contents(tmp_path / "data" / FOLDER) == pictures
    assert world.asked == []
    assert (tmp_path / "mine.zip").is_file()


@pytest.mark.parametrize("layout", ["above", "the folder itself", "by another name", "an archive in it"])
def test_from_folders(world, prepare, tmp_path, annotations, pictures, layout):
    above = tmp_path / "mine"
    folder = above / ("somewhere" if layout == "by another name" else "refcoco")
    folder.mkdir(parents=True)
    for name, data in annotations.items():
        (folder / name).write_bytes(data)
    if layout == "an archive in it":
        shutil.rmtree(folder)
        (above / "refcoco.zip").write_bytes(world.files["/archive/refcoco.zip"])
    place = above if layout in ("above", "an archive in it") else folder
    (tmp_path / "photos/train2014").mkdir(parents=True)
    for name, data in pictures.items():
        (tmp_path / "photos/train2014" / name).write_bytes(data)
    prepare("--from", place, "--from", tmp_path / "photos", "--pictures", "needed")
    linked = tmp_path / "data" / FOLDER
    assert contents(linked) == {picture_name(i): pictures[picture_name(i)] for i in IMAGES}
    assert (linked / picture_name(1)).stat().st_nlink == 2
    assert world.asked == []


def test_from_takes_no_wrong_picture_and_downloads_when_told(world, prepare, tmp_path, pictures):
    photos = tmp_path / "train2014"
    photos.mkdir()
    for name, data in pictures.items():
        (photos / name).write_bytes(data)
    (photos / picture_name(2)).write_bytes(pictures[picture_name(2)][:-40])
    assert "has no right annotations of refcoco; --download" in prepare("--from", photos, status=2).err
    prepare("--from", photos, "--download", "--pictures", "needed")
    assert asked(world) == ["/archive/refcoco.zip", f"/train2014/{picture_name(2)}"]
    prepare("--check")


def test_from_another_disk_copies(world, prepare, tmp_path, pictures, monkeypatch):
    (tmp_path / "train2014").mkdir()
    for name, data in pictures.items():
        (tmp_path / "train2014" / name).write_bytes(data)
    prepare("--pictures", "none")
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("another disk")))
    prepare("--from", tmp_path / "train2014")
    assert contents(tmp_path / "data" / FOLDER) == pictures
    assert (tmp_path / "data" / FOLDER / picture_name(1)).stat().st_nlink == 1


def test_from_tells_why_it_is_not_taken(world, prepare, tmp_path):
    (tmp_path / "x.zip").write_bytes(b"torn")
    assert "x.zip: is a damaged zip file" in prepare("--from", tmp_path / "x.zip", status=2).err
    assert "no such file or folder" in prepare("--from", tmp_path / "absent", status=2).err


# ---- weights ----


def test_weights_are_brought_and_checked(world, weights, prepare, tmp_path):
    flags = ("--weights", "swin_base", "bert", "--pretrained", tmp_path / "pre")
    done = prepare(*flags, dataset=None)
    there = contents(tmp_path / "pre")
    assert sorted(json.loads(there.pop("hashes.json"))) == sorted(weights)
    assert there == weights
    assert done.out.splitlines() == [str(tmp_path / "pre" / name) for name in weights if "swin" in name] + [
        str(tmp_path / "pre" / name) for name in ("vocab.txt", "model.safetensors")
    ]
    world.asked.clear()
    prepare(*flags, dataset=None)
    assert world.asked == []
    prepare(*flags, "--check", dataset=None)
    (tmp_path / "pre/vocab.txt").write_bytes(weights["vocab.txt"].replace(b"w7\n", b"x7\n"))
    (tmp_path / "pre/model.safetensors").write_bytes(weights["model.safetensors"][:-9])
    told = prepare(*flags, "--check", dataset=None, status=2)
    assert "2 things are wrong" in told.err
    assert "model.safetensors is cut short, damaged" in told.err
    prepare(*flags, dataset=None)
    prepare(*flags, "--check", dataset=None)


def test_the_vocabulary_alone(world, weights, prepare, tmp_path):
    flags = ("--weights", "bert_vocabulary", "--pretrained", tmp_path / "pre")
    prepare(*flags, dataset=None)
    assert (tmp_path / "pre/vocab.txt").read_bytes() == weights["vocab.txt"]
    assert asked(world) == ["/vocab.txt"]
    prepare(*flags, "--check", dataset=None)


def test_wrong_weights_are_refused(world, weights, prepare, tmp_path):
    name = "swin_base_patch4_window12_384_22k.pth"
    torch.save(swin(96), tmp_path / "tiny.pth")
    torch.save({"model": swin}, tmp_path / "code.pth")
    for data, reason in [
        ((tmp_path / "tiny.pth").read_bytes(), "has no patch_embed.proj.weight of Swin base"),
        ((tmp_path / "code.pth").read_bytes(), "damaged or no file of weights"),
        (weights[name][:-100], "damaged or no file of weights"),
        (b"<html>", "a web page"),
    ]:
        world.files[f"/{name}"] = data
        told = prepare("--weights", "swin_base", "--pretrained", tmp_path / "pre", dataset=None, status=2).err
        assert reason in told
        assert contents(tmp_path / "pre") == {}
    world.files[f"/{name}"] = (tmp_path / "old.pth").read_bytes()  # as torch.save wrote years ago
    prepare("--weights", "swin_base", "--pretrained", tmp_path / "pre", dataset=None)


def test_weights_from_a_folder(world, weights, prepare, tmp_path):
    (tmp_path / "mine").mkdir()
    for name, data in weights.items():
        (tmp_path / "mine" / name).write_bytes(data)
    flags = ("--weights", "bert", "--pretrained", tmp_path / "pre", "--from", tmp_path / "mine")
    prepare(*flags, dataset=None)
    assert world.asked == []
    assert "swin_tiny_patch4_window7_224.pth is not in what --from names" in prepare(
        *flags, "--weights", "swin_tiny", dataset=None, status=2
    ).err  # fmt: skip


def test_the_other_file_of_bert_will_do(world, weights, prepare, tmp_path):
    (tmp_path / "pre").mkdir()
    word = {"embeddings.word_embeddings.weight": torch.zeros(30522, 1)}
    torch.save(word, tmp_path / "pre/pytorch_model.bin")
    prepare("--weights", "bert", "--pretrained", tmp_path / "pre", dataset=None)
    assert asked(world) == ["/vocab.txt"]
