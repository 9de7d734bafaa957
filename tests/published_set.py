"""Fixtures for refer.prepare: a small published dataset on a local server, and the command that installs it."""

import json
import pickle

import pytest
import torch
from commands import run_in_process
from download_server import Server, pack
from PIL import Image

from refer.datasets import PUBLISHED_COUNTS, Counts
from refer.prepare.__main__ import main

W, H = 30, 20
IMAGES = (1, 2, 3)
COUNTS = {
    "train": Counts(2, 4, 2), "val": Counts(1, 2, 1), "testA": Counts(1, 2, 1), "testB": Counts(1, 2, 1)
}  # fmt: skip
FOLDER = "images/mscoco/images/train2014"


def image_name(image_id):
    return f"COCO_train2014_{image_id:012d}.jpg"


def annotation_files():
    """Return {file name: bytes} of five refs on three images, with COUNTS."""
    rows = [(50, 1, "train"), (10, 1, "val"), (40, 2, "testA"), (20, 2, "testB"), (30, 3, "train")]
    refs = [
        {
            "ref_id": ref, "ann_id": 100 + ref, "image_id": image, "category_id": 1, "split": split,
            "sentences": [{"sent_id": ref * 10 + k, "raw": f"dog {k}", "sent": f"dog {k}"} for k in range(2)],
        }
        for ref, image, split in rows
    ]  # fmt: skip
    instances = {
        "images": [{"id": i, "width": W, "height": H, "file_name": image_name(i)} for i in (*IMAGES, 4)],
        "annotations": [{"id": 100 + r, "image_id": i, "category_id": 1, "segmentation": []} for r, i, _ in rows],
        "categories": [{"id": 1, "name": "dog"}],
    }
    return {"instances.json": json.dumps(instances).encode(), "refs(unc).p": pickle.dumps(refs, protocol=2)}


@pytest.fixture(scope="session")
def image_files(tmp_path_factory):
    """{file name: bytes} of different JPEGs. The last one is not needed by the annotations."""
    folder, found = tmp_path_factory.mktemp("images"), {}
    for i in (*IMAGES, 4):
        Image.effect_noise((W, H), 20 * i).convert("RGB").save(folder / image_name(i), quality=90)
        found[image_name(i)] = (folder / image_name(i)).read_bytes()
    return found


@pytest.fixture
def annotations():
    return annotation_files()


@pytest.fixture
def server(tmp_path, monkeypatch, annotations, image_files):
    """A local server in place of the published addresses: annotations, the archive of all images, and each image."""
    server = Server()
    monkeypatch.setitem(PUBLISHED_COUNTS, ("refcoco", "unc"), COUNTS)
    urls = lambda name: [f"{server.url}/archive/{name}.zip", f"{server.url}/original/{name}.zip"]  # noqa: E731 (short)
    monkeypatch.setattr("refer.prepare.install.annotation_urls", urls)
    monkeypatch.setattr("refer.prepare.images.COCO_URL", f"{server.url}/")
    monkeypatch.setattr("refer.prepare.weights.weights_url", lambda name: f"{server.url}/{name}")
    monkeypatch.setattr("refer.prepare.download.MAX_PAUSE", 0.0)
    extra = [("__MACOSX/refcoco/._instances.json", b"x"), ("refcoco/refs(other).p", b"x"), ("readme", b"x")]
    members = [(f"refcoco/{name}", data) for name, data in annotations.items()]
    server.files["/archive/refcoco.zip"] = pack(tmp_path / "a.zip", members + extra).read_bytes()
    members = [(f"train2014/{name}", data) for name, data in image_files.items()]
    server.files["/zips/train2014.zip"] = pack(tmp_path / "p.zip", members).read_bytes()
    server.files.update({f"/train2014/{name}": data for name, data in image_files.items()})
    yield server
    server.close()


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys):
    """Run ``python -m refer.prepare`` in this process, by default with RefCOCO and the data root <tmp>/data.

    ``err`` of the result is the error line if there is one.
    """

    def run(*flags, status=0, dataset="refcoco", retry=("--tries", "2", "--stall", "0.3")):
        command = ["prepare", *(["--dataset", dataset] if dataset else []), "--root", tmp_path / "data", *flags]
        command += [] if "--check" in flags else retry
        done = run_in_process(main, command, monkeypatch, capsys)
        assert done.status == status, done.err
        assert "Traceback" not in done.err
        assert done.err.count("error: ") == (status == 2)
        return done

    return run


def requested(server):
    """Return the paths of all requests."""
    return [request[0] for request in server.requests]


def swin(dim=128):
    return {"model": {"patch_embed.proj.weight": torch.zeros(dim, 3, 4, 4)}}


@pytest.fixture
def weights(server, tmp_path):
    """Small files that have the properties of the published weights, on the server."""
    from safetensors.torch import save_file

    torch.save(swin(), tmp_path / "zip.pth")
    torch.save(swin(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file({"bert.embeddings.word_embeddings.weight": torch.zeros(30522, 1)}, tmp_path / "b.safetensors")
    vocabulary = "\n".join(["[PAD]", *(f"w{i}" for i in range(30521))]) + "\n"
    files = {
        "swin_base_patch4_window12_384_22k.pth": (tmp_path / "zip.pth").read_bytes(),
        "model.safetensors": (tmp_path / "b.safetensors").read_bytes(),
        "vocab.txt": vocabulary.encode(),
    }
    server.files.update({f"/{name}": data for name, data in files.items()})
    return files
