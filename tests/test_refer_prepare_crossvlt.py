"""python -m refer.prepare --weights crossvlt, and the messages that say where the released weights are."""

import argparse
import io
import json
import sys
import types

import pytest
import torch
from commands import contents, run_in_process

import lib.checkpoint
from lib.checkpoint import load_pretrained, read_checkpoint
from lib.errors import MissingFileError
from lib.report.published import find_checkpoints
from lib.variants import RELEASED_FILES, RELEASED_URL
from refer.datasets import weights_url
from refer.prepare import drive

NAMES = tuple(RELEASED_FILES.values())
FOLDER_ID = "1zEAuhntMjH13rhzSYibw_xXLvp-4xB_v"


def as_bytes(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.fixture
def released(small_model):
    """{file name: bytes} of small models in the three released forms."""
    state_dict = small_model().state_dict()
    without_temp = {key: value for key, value in state_dict.items() if key != "temp"}
    prefixed = {f"module.{key}": value for key, value in without_temp.items()}
    training = {"model": state_dict, "epoch": 3, "args": argparse.Namespace(lr=3e-5), "best_oIoU": 50.0}
    return dict(zip(NAMES, map(as_bytes, (without_temp, prefixed, training)), strict=True))


@pytest.fixture
def gdown(monkeypatch, released):
    """A stand-in for gdown. ``gdown.files`` is the folder's content, ``gdown.calls`` the downloaded names."""
    module = types.SimpleNamespace(files=dict(released), calls=[], error=None)

    def download_folder(*, id, output, skip_download, quiet, use_cookies, timeout):
        assert (id, skip_download) == (FOLDER_ID, True)
        if module.error:
            raise module.error
        return [types.SimpleNamespace(id=f"id of {name}", path=f"CrossVLT/{name}") for name in module.files]

    def download(*, id, output, resume, retries, quiet, use_cookies, timeout):
        name = id.removeprefix("id of ")
        module.calls.append(name)
        with open(output, "wb") as file:
            file.write(module.files[name])

    module.download, module.download_folder = download, download_folder
    monkeypatch.setitem(sys.modules, "gdown", module)
    drive._list_folder.cache_clear()
    return module


@pytest.fixture
def install(prepare, tmp_path):
    """Run ``refer.prepare --weights crossvlt`` into <tmp>/checkpoints."""
    flags = ("--weights", "crossvlt", "--checkpoints", tmp_path / "checkpoints")
    return lambda *more, status=0: prepare(*flags, *more, dataset=None, status=status)


def test_released_weights_are_downloaded_and_recorded(gdown, install, tmp_path, released):
    gdown.files["readme.txt"] = b"not needed"
    done = install()
    folder = tmp_path / "checkpoints"
    installed = contents(folder)
    assert sorted(json.loads(installed.pop("hashes.json"))) == sorted(NAMES)
    assert installed == released
    assert done.out.splitlines() == [str(folder / name) for name in NAMES]
    install()
    assert gdown.calls == list(NAMES)
    install("--check")
    (folder / NAMES[0]).write_bytes(released[NAMES[0]][:-1000])
    assert f"{NAMES[0]} is corrupt or not a PyTorch file" in install("--check", status=2).err


def test_the_gdown_package_is_called_as_it_expects(server, install, tmp_path, released, monkeypatch):
    """gdown itself, on a local copy of the pages of Google Drive that it reads."""
    pytest.importorskip("gdown")
    requests = pytest.importorskip("requests")
    monkeypatch.setattr("refer.prepare.weights.weights_url", weights_url)
    drive._list_folder.cache_clear()
    ids = {name: f"{number}{'x' * 30}" for number, name in enumerate(NAMES)}
    links = "".join(f'<a href="https://drive.google.com/file/d/{ids[name]}/view">{name}</a>' for name in NAMES)
    page = f"<html><head><title>CrossVLT</title></head><body>{links}</body></html>"
    server.files[f"/embeddedfolderview?id={FOLDER_ID}"] = page.encode()
    for name in NAMES:
        path = f"/uc?id={ids[name]}"
        server.files[path] = released[name]
        disposition = f'attachment; filename="{name}"'
        server.faults[path] = [{"headers": {"Content-Type": "x/y", "Content-Disposition": disposition}, "etag": False}]
    get = requests.Session.get

    def get_locally(session, url, **kwargs):
        assert url.startswith("https://drive.google.com/")
        return get(session, url.replace("https://drive.google.com", server.url), **kwargs)

    monkeypatch.setattr(requests.Session, "get", get_locally)
    install()
    assert {name: (tmp_path / "checkpoints" / name).read_bytes() for name in NAMES} == released
    assert not (tmp_path / "checkpoints/downloads").exists()


def test_where_to_click_if_the_download_fails(gdown, install, tmp_path, monkeypatch):
    def expect(reason):
        error = install(status=2).err
        assert reason in error
        assert f"Open {RELEASED_URL} in a browser" in error
        assert all(name in error for name in NAMES)
        assert "--from" in error
        drive._list_folder.cache_clear()

    gdown.error = type("ConnectionError", (OSError,), {"__module__": "requests.exceptions"})("Network is unreachable")
    expect("Network is unreachable")
    gdown.error = None
    gdown.files = {"best_refcoco_v2.pth": b""}
    expect("the folder has no best_refcoco.pth, but best_refcoco_v2.pth")
    gdown.files = dict.fromkeys(NAMES, b"<html>Too many users have viewed or downloaded this file recently.")
    expect("is corrupt or not a PyTorch file")
    monkeypatch.setitem(sys.modules, "gdown", None)
    expect("needs gdown. Run: pip install -r requirements-extra.txt")
    assert contents(tmp_path / "checkpoints") == {}


def test_files_that_are_no_crossvlt_are_rejected(gdown, install, tmp_path, released, small_model):
    state_dict = small_model().state_dict()
    cut = dict(list(state_dict.items())[:-1])
    infinite = state_dict | {"classifier.conv1_1.bias": torch.tensor([0.0, float("inf")])}
    for content, reason in [
        ({"bert.embeddings.word_embeddings.weight": torch.zeros(3, 2)}, "is not a checkpoint of CrossVLT"),
        (cut, "does not fit the model"),
        (infinite, "has unusable weights"),
        ({"model": type(small_model())}, "is rejected: it contains an object of class CrossVLT.CrossVLT"),
    ]:
        gdown.files[NAMES[1]] = as_bytes(content)
        assert f"{RELEASED_URL}/{NAMES[1]}: {reason}" in install(status=2).err
    assert sorted(contents(tmp_path / "checkpoints")) == [NAMES[0], "hashes.json"]


def test_files_of_the_user_are_used(gdown, install, tmp_path, released):
    (tmp_path / "mine").mkdir()
    for name, data in released.items():
        (tmp_path / "mine" / name).write_bytes(data)
    install("--from", tmp_path / "mine")
    assert gdown.calls == []


def test_a_mirror_is_tried_first(gdown, server, install, released):
    server.files |= {f"/m/{name}": data for name, data in released.items()}
    install("--mirror", f"{server.url}/m")
    assert gdown.calls == []


# ---- messages ----


def test_messages_about_a_missing_checkpoint_say_where_the_weights_are(run_here, monkeypatch, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    messages = [
        run_here("test.py", "--resume", "checkpoints/best_refcoco.pth").err,
        run_here("test.py", "--table", "--checkpoints", "checkpoints").err,
        run_here("train.py", "--init_from", "checkpoints/best_refcoco.pth").err,
        run_in_process(lib.checkpoint.main, ["lib.checkpoint", "best_refcoco.pth"], monkeypatch, capsys).err,
    ]
    for call in (lambda: read_checkpoint("best_refcoco.pth"), lambda: find_checkpoints("empty")):
        with pytest.raises(MissingFileError) as caught:
            call()
        messages.append(str(caught.value))
    for message in messages:
        assert "`python -m refer.prepare --weights crossvlt`" in message
        assert RELEASED_URL in message
        assert all(name in message for name in NAMES)


def test_missing_pretrained_files_have_their_own_hint(small_model):
    with pytest.raises(MissingFileError, match=r"refer\.prepare --weights swin_base bert") as caught:
        load_pretrained(small_model(), swin="nowhere.pth")
    assert "crossvlt" not in str(caught.value)


def test_both_berts_are_named(weights, prepare, tmp_path):
    error = prepare("--weights", "bert", "--pretrained", tmp_path / "pre", dataset=None).err
    assert "BERT: bert-base-uncased, the default of --ck_bert" in error
    assert "google/bert_uncased_L-12_H-768_A-12" in error
