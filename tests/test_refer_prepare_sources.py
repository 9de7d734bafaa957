"""python -m refer.prepare: weights, and files that the user already has (--from)."""

import json
import os
import shutil

import pytest
import torch
from commands import contents
from published_set import FOLDER, IMAGES, image_name, requested, swin

SWIN = "swin_base_patch4_window12_384_22k.pth"

# ---- --from ----


def test_archives_of_the_user_are_used(server, prepare, tmp_path, image_files):
    for name, path in (("mine.zip", "/archive/refcoco.zip"), ("coco.zip", "/zips/train2014.zip")):
        (tmp_path / name).write_bytes(server.files[path])
    prepare("--from", tmp_path / "mine.zip", "--from", tmp_path / "coco.zip")
    assert contents(tmp_path / "data" / FOLDER) == image_files
    assert server.requests == []
    assert (tmp_path / "mine.zip").is_file()


@pytest.mark.parametrize("layout", ["parent folder", "the folder itself", "another name", "archive in a folder"])
def test_folders_of_the_user_are_used(server, prepare, tmp_path, annotations, image_files, layout):
    parent = tmp_path / "mine"
    folder = parent / ("somewhere" if layout == "another name" else "refcoco")
    folder.mkdir(parents=True)
    for name, data in annotations.items():
        (folder / name).write_bytes(data)
    if layout == "archive in a folder":
        shutil.rmtree(folder)
        (parent / "refcoco.zip").write_bytes(server.files["/archive/refcoco.zip"])
    source = parent if layout in ("parent folder", "archive in a folder") else folder
    (tmp_path / "photos/train2014").mkdir(parents=True)
    for name, data in image_files.items():
        (tmp_path / "photos/train2014" / name).write_bytes(data)
    prepare("--from", source, "--from", tmp_path / "photos", "--images", "needed")
    installed = tmp_path / "data" / FOLDER
    assert contents(installed) == {image_name(i): image_files[image_name(i)] for i in IMAGES}
    assert (installed / image_name(1)).stat().st_nlink == 2
    assert server.requests == []


def test_only_images_of_coco_are_taken_from_a_folder(server, prepare, tmp_path, image_files):
    downloads = tmp_path / "Downloads"
    downloads.mkdir()
    extra = "COCO_train2014_000000999999.jpg"
    for name, data in {
        **image_files,
        "holiday.jpg": image_files[image_name(1)],
        extra: image_files[image_name(1)],
    }.items():
        (downloads / name).write_bytes(data)
    prepare("--from", downloads, "--download")
    assert {path.name for path in (tmp_path / "data" / FOLDER).iterdir()} == {*image_files, extra}


def test_corrupt_images_are_not_installed_and_download_completes_them(server, prepare, tmp_path, image_files):
    photos = tmp_path / "train2014"
    photos.mkdir()
    for name, data in image_files.items():
        (photos / name).write_bytes(data)
    (photos / image_name(2)).write_bytes(image_files[image_name(2)][:-40])
    error = prepare("--from", photos, status=2).err
    assert "--from contains no valid refcoco.zip. Add --download to download it." in error
    done = prepare("--from", photos, "--download", "--images", "needed")
    assert f"{photos}: {image_name(2)} is truncated or corrupt" in done.err
    assert requested(server) == ["/archive/refcoco.zip", f"/train2014/{image_name(2)}"]
    prepare("--check")


def test_images_on_another_disk_are_copied(server, prepare, tmp_path, image_files, monkeypatch):
    (tmp_path / "train2014").mkdir()
    for name, data in image_files.items():
        (tmp_path / "train2014" / name).write_bytes(data)
    prepare("--images", "none")
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("another disk")))
    prepare("--from", tmp_path / "train2014")
    assert contents(tmp_path / "data" / FOLDER) == image_files
    assert (tmp_path / "data" / FOLDER / image_name(1)).stat().st_nlink == 1


def test_the_reason_is_given_for_each_rejected_file(server, prepare, tmp_path):
    (tmp_path / "x.zip").write_bytes(b"corrupt")
    error = prepare("--from", tmp_path / "x.zip", status=2).err
    assert "--from contains no valid refcoco.zip" in error
    assert "x.zip: corrupt or not a zip file" in error


# ---- weights ----


def test_weights_are_downloaded_and_verified(server, weights, prepare, tmp_path):
    folder = tmp_path / "pre"
    flags = ("--weights", "swin_base", "bert", "--pretrained", folder)
    done = prepare(*flags, dataset=None)
    installed = contents(folder)
    assert sorted(json.loads(installed.pop("hashes.json"))) == sorted(weights)
    assert installed == weights
    assert done.out.splitlines() == [str(folder / name) for name in (SWIN, "vocab.txt", "model.safetensors")]
    server.requests.clear()
    prepare(*flags, dataset=None)
    assert server.requests == []
    prepare(*flags, "--check", dataset=None)
    (folder / "vocab.txt").write_bytes(weights["vocab.txt"].replace(b"w7\n", b"x7\n"))
    (folder / "model.safetensors").write_bytes(weights["model.safetensors"][:-9])
    done = prepare(*flags, "--check", dataset=None, status=2)
    assert "2 problem(s) found" in done.err
    assert "vocab.txt has SHA-256" in done.err
    assert "model.safetensors is truncated, corrupt" in done.err
    prepare(*flags, dataset=None)
    prepare(*flags, "--check", dataset=None)


def test_the_vocabulary_alone(server, weights, prepare, tmp_path):
    flags = ("--weights", "bert_vocabulary", "--pretrained", tmp_path / "pre")
    prepare(*flags, dataset=None)
    assert (tmp_path / "pre/vocab.txt").read_bytes() == weights["vocab.txt"]
    assert requested(server) == ["/vocab.txt"]
    prepare(*flags, "--check", dataset=None)


def test_wrong_weights_are_rejected(server, weights, prepare, tmp_path):
    torch.save(swin(96), tmp_path / "tiny.pth")
    torch.save({"model": swin}, tmp_path / "code.pth")
    for data, reason in [
        ((tmp_path / "tiny.pth").read_bytes(), "has no patch_embed.proj.weight of Swin base"),
        ((tmp_path / "code.pth").read_bytes(), "corrupt or not a weights file"),
        (weights[SWIN][:-100], "corrupt or not a weights file"),
        (b"<html>", "a web page"),
    ]:
        server.files[f"/{SWIN}"] = data
        assert reason in prepare("--weights", "swin_base", "--pretrained", tmp_path / "pre", dataset=None, status=2).err
        assert contents(tmp_path / "pre") == {}
    server.files[f"/{SWIN}"] = (tmp_path / "old.pth").read_bytes()  # as torch.save wrote years ago
    prepare("--weights", "swin_base", "--pretrained", tmp_path / "pre", dataset=None)


def test_weights_are_taken_from_a_folder(server, weights, prepare, tmp_path):
    (tmp_path / "mine").mkdir()
    for name, data in weights.items():
        (tmp_path / "mine" / name).write_bytes(data)
    flags = ("--weights", "bert", "--pretrained", tmp_path / "pre", "--from", tmp_path / "mine")
    prepare(*flags, dataset=None)
    assert server.requests == []
    error = prepare(*flags, "--weights", "swin_tiny", dataset=None, status=2).err
    assert "--from contains no valid swin_tiny_patch4_window7_224.pth. Add --download" in error


@pytest.mark.parametrize("place", ["pretrained", "--from"])
def test_either_file_of_bert_is_accepted(server, weights, prepare, tmp_path, place):
    folder, mine = tmp_path / "pre", tmp_path / "mine"
    folder.mkdir()
    mine.mkdir()
    embeddings = {"bert.embeddings.word_embeddings.weight": torch.zeros(30522, 1)}
    torch.save(embeddings, (folder if place == "pretrained" else mine) / "pytorch_model.bin")
    (mine / "vocab.txt").write_bytes(weights["vocab.txt"])
    prepare("--weights", "bert", "--pretrained", folder, "--from", mine, dataset=None)
    assert {path.name for path in folder.iterdir()} == {"vocab.txt", "pytorch_model.bin", "hashes.json"}
    assert server.requests == []


def test_a_download_that_differs_from_the_recorded_weights_is_kept_for_the_user(server, weights, prepare, tmp_path):
    folder = tmp_path / "pre"
    flags = ("--weights", "swin_base", "--pretrained", folder)
    prepare(*flags, dataset=None)
    hashes = json.loads((folder / "hashes.json").read_text())
    hashes[SWIN]["size"] += 1
    (folder / "hashes.json").write_text(json.dumps(hashes))
    (folder / SWIN).unlink()
    kept = folder / "downloads" / SWIN
    assert (
        f"{kept} has {kept.stat().st_size if kept.exists() else len(weights[SWIN])} bytes instead of the recorded"
        in (prepare(*flags, dataset=None, status=2).err)
    )
    assert kept.read_bytes() == weights[SWIN]
    (folder / "hashes.json").write_text("{}")
    server.requests.clear()
    prepare(*flags, dataset=None)
    assert (folder / SWIN).read_bytes() == weights[SWIN]
    assert server.requests == []
