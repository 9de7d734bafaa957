"""What refer.prepare finds in the tests: a small published set, on a server on this machine."""

import json
import pickle

import pytest
import torch
from commands import run_in_process
from download_server import Server, pack
from PIL import Image

import refer.prepare.__main__
import refer.prepare.images
import refer.prepare.weights
from refer.counts import PUBLISHED_COUNTS, Counts

W, H = 30, 20
IMAGES = (1, 2, 3)
COUNTS = {
    "train": Counts(2, 4, 2), "val": Counts(1, 2, 1), "testA": Counts(1, 2, 1), "testB": Counts(1, 2, 1)
}  # fmt: skip
FOLDER = "images/mscoco/images/train2014"


def picture_name(image_id):
    return f"COCO_train2014_{image_id:012d}.jpg"


def annotation_files():
    """{file name: bytes} of five refs on three pictures, as COUNTS says."""
    rows = [(50, 1, "train"), (10, 1, "val"), (40, 2, "testA"), (20, 2, "testB"), (30, 3, "train")]
    refs = [
        {
            "ref_id": ref, "ann_id": 100 + ref, "image_id": image, "category_id": 1, "split": split,
            "sentences": [{"sent_id": ref * 10 + k, "raw": f"dog {k}", "sent": f"dog {k}"} for k in range(2)],
        }
        for ref, image, split in rows
    ]  # fmt: skip
    instances = {
        "images": [{"id": i, "width": W, "height": H, "file_name": picture_name(i)} for i in (*IMAGES, 4)],
        "annotations": [{"id": 100 + r, "image_id": i, "category_id": 1, "segmentation": []} for r, i, _ in rows],
        "categories": [{"id": 1, "name": "dog"}],
    }
    return {"instances.json": json.dumps(instances).encode(), "refs(unc).p": pickle.dumps(refs, protocol=2)}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """{file name: bytes} of JPEGs that differ."""
    folder, found = tmp_path_factory.mktemp("pictures"), {}
    for i in (*IMAGES, 4):
        Image.effect_noise((W, H), 20 * i).convert("RGB").save(folder / picture_name(i), quality=90)
        found[picture_name(i)] = (folder / picture_name(i)).read_bytes()
    return found


@pytest.fixture
def annotations():
    return annotation_files()


@pytest.fixture
def world(tmp_path, monkeypatch, annotations, pictures):
    """What is published, on a server on this machine: annotations, all pictures and each of them."""
    server = Server()
    monkeypatch.setitem(PUBLISHED_COUNTS, ("refcoco", "unc"), COUNTS)
    publish = lambda name: [f"{server.url}/archive/{name}.zip", f"{server.url}/original/{name}.zip"]  # noqa: E731
    monkeypatch.setattr(refer.prepare.__main__, "annotation_addresses", publish)
    monkeypatch.setattr(refer.prepare.__main__, "COCO_ADDRESS", f"{server.url}/")
    monkeypatch.setattr(refer.prepare.images, "picture_address", lambda name: f"{server.url}/train2014/{name}")
    monkeypatch.setattr(refer.prepare.weights, "weight_addresses", lambda name: [f"{server.url}/{name}"])
    extra = [("__MACOSX/refcoco/._instances.json", b"x"), ("refcoco/refs(other).p", b"x"), ("readme", b"x")]
    members = [(f"refcoco/{name}", data) for name, data in annotations.items()]
    server.files["/archive/refcoco.zip"] = pack(tmp_path / "a.zip", members + extra).read_bytes()
    members = [(f"train2014/{name}", data) for name, data in pictures.items()]
    server.files["/zips/train2014.zip"] = pack(tmp_path / "p.zip", members).read_bytes()
    server.files.update({f"/train2014/{name}": data for name, data in pictures.items()})
    yield server
    server.close()


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys):
    """Run the tool on refcoco in <tmp>/data (other flags replace that), as from the command line."""

    def run(*flags, status=0, dataset="refcoco", quick=("--tries", "2", "--stall", "0.3")):
        given = ["--dataset", dataset] * bool(dataset) + ["--root", tmp_path / "data", *flags]
        given += [] if "--check" in flags else quick
        monkeypatch.setattr("refer.prepare.download.LONGEST_PAUSE", 0.0)
        done = run_in_process(refer.prepare.__main__.main, ["prepare", *given], monkeypatch, capsys)
        assert done.status == status, done.err
        errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == (status == 2)
        assert "Traceback" not in done.err
        return done._replace(err=errors[0] if errors else done.err)

    return run


def asked(server):
    return [one[0] for one in server.asked]


def swin(dim=128):
    return {"model": {"patch_embed.proj.weight": torch.zeros(dim, 3, 4, 4)}}


@pytest.fixture
def weights(world, tmp_path):
    """Small files that pass for the published ones, on the server."""
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
    world.files.update({f"/{name}": data for name, data in files.items()})
    return files
