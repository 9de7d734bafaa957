"""python -m refer.prepare: what it downloads, keeps, replaces and rejects, and its messages."""

import json
import pickle
import shutil

import pytest
from commands import contents
from download_server import link, pack
from PIL import Image
from published_set import COUNTS, FOLDER, IMAGES, H, W, image_name, requested

from lib.errors import UserError
from lib.locks import lock
from refer.prepare.archives import Archive
from refer.refer import REFER

ZIPS = ["/archive/refcoco.zip", "/zips/train2014.zip"]

# ---- downloading ----


def test_one_command_installs_everything(server, prepare, tmp_path, annotations, image_files):
    done = prepare()
    installed = contents(tmp_path / "data")
    recorded = json.loads(installed.pop("hashes.json"))
    expected = {f"refcoco/{name}": data for name, data in annotations.items()}
    expected |= {f"{FOLDER}/{name}": data for name, data in image_files.items()}
    assert installed == expected  # nothing else: no archives, no parts
    assert sorted(recorded) == ["refcoco.zip", "refcoco/instances.json", "refcoco/refs(unc).p", "train2014.zip"]
    assert all(len(entry["sha256"]) == 64 and entry["size"] > 0 for entry in recorded.values())
    rows = [line.split() for line in done.out.splitlines()]
    assert rows[0][:2] == ["dataset", "split"]
    assert [row[2:] for row in rows[1:]] == [
        [split, *map(str, counts), str(counts.images), "as", "published"] for split, counts in COUNTS.items()
    ]
    assert REFER(tmp_path / "data").counts() == COUNTS

    server.requests.clear()
    assert prepare().out == done.out
    assert server.requests == []  # nothing is downloaded again
    assert prepare("--check").out == done.out


def test_only_the_missing_images_are_downloaded(server, prepare, tmp_path, image_files):
    folder = tmp_path / "data" / FOLDER
    folder.mkdir(parents=True)
    (folder / image_name(1)).write_bytes(image_files[image_name(1)])
    (folder / image_name(2)).write_bytes(image_files[image_name(2)][:-20])
    prepare("--images", "needed")
    assert sorted(requested(server)[1:]) == [f"/train2014/{image_name(i)}" for i in (2, 3)]
    assert contents(folder) == {image_name(i): image_files[image_name(i)] for i in IMAGES}
    assert not (tmp_path / "data" / "downloads").exists()


def test_images_that_cannot_be_downloaded_are_named(server, prepare, tmp_path, image_files):
    for name, data in ((image_name(2), image_files[image_name(3)][:-30]), (image_name(3), b"\xff\xd8 no")):
        server.files[f"/train2014/{name}"] = data
    error = prepare("--images", "needed", status=2).err
    assert "2 of 3 images could not be downloaded" in error
    assert f"{image_name(2)}: is truncated or corrupt" in error
    assert sorted(contents(tmp_path / "data" / FOLDER)) == [image_name(1)]
    server.files |= {f"/train2014/{name}": image_files[name] for name in image_files}
    prepare("--images", "needed")


def test_servers_that_deliver_nothing_are_given_up(server, prepare, monkeypatch, tmp_path):
    monkeypatch.setattr("refer.prepare.images.MAX_FAILURES", 2)
    monkeypatch.setattr("refer.prepare.images.THREADS", 1)
    del server.files[f"/train2014/{image_name(1)}"], server.files[f"/train2014/{image_name(2)}"]
    error = prepare("--images", "needed", "--mirror", f"{server.url}/mirror", status=2).err
    assert "3 of 3 images could not be downloaded, 1 of them not tried after 2 failures in a row" in error
    assert sorted(requested(server)[2:]) == [
        f"{place}/train2014/{image_name(i)}" for place in ("/mirror", "") for i in (1, 2)
    ]


def test_images_can_be_left_out(server, prepare):
    done = prepare("--images", "none")
    assert requested(server) == ["/archive/refcoco.zip"]
    assert done.out.splitlines()[1].split()[2:] == ["train", "2", "4", "2", "0", "as", "published"]


def test_mirrors_are_tried_before_the_published_addresses(server, prepare):
    server.files["/b/refcoco.zip"] = b"<html>"
    server.files["/original/refcoco.zip"] = server.files.pop("/archive/refcoco.zip")
    prepare("--mirror", f"{server.url}/a/", "--mirror", f"{server.url}/b", "--images", "none")
    assert requested(server) == ["/a/refcoco.zip", "/b/refcoco.zip", "/archive/refcoco.zip", "/original/refcoco.zip"]


def test_an_interrupted_download_is_resumed_by_the_same_command(server, prepare, tmp_path):
    server.faults["/zips/train2014.zip"] = [{"bytes": 1000}, {"bytes": 500, "stall": True}]
    assert "no data for 0.3 s" in prepare(status=2).err
    assert (tmp_path / "data/downloads/train2014.zip.part").stat().st_size == 1500
    prepare()
    assert server.requests[-1] == ("/zips/train2014.zip", "bytes=1500-", '"first"')
    assert not (tmp_path / "data/downloads").exists()


def kill_after(count, monkeypatch):
    """End the command as by a signal when it unpacks another member after ``count``; return the list of members."""
    extract, unpacked = Archive.extract, []

    def counting_extract(archive, member, target):
        if len(unpacked) == count:
            raise SystemExit(137)
        unpacked.append(member.filename)
        extract(archive, member, target)

    monkeypatch.setattr(Archive, "extract", counting_extract)
    return unpacked


@pytest.mark.parametrize("images_before", [0, 2])
def test_unpacking_resumes_after_a_kill(server, prepare, tmp_path, monkeypatch, image_files, images_before):
    with monkeypatch.context() as patch:
        kill_after(len(("instances.json", "refs(unc).p")) + images_before, patch)
        prepare(status=137)
    assert len(contents(tmp_path / "data" / FOLDER)) == images_before
    assert (tmp_path / "data/downloads/train2014.zip").is_file()
    unpacked = kill_after(None, monkeypatch)
    prepare()
    assert len(unpacked) == len(image_files) - images_before
    assert requested(server) == ZIPS
    assert contents(tmp_path / "data" / FOLDER) == image_files
    assert not (tmp_path / "data" / "downloads").exists()  # the archive was downloaded by the first command


def test_archives_are_kept_on_request(server, prepare, tmp_path):
    for flags in (["--keep_zips"], ["--keep_zips"], []):  # what was kept once is not deleted later
        prepare(*flags)
        assert {path.name for path in (tmp_path / "data/downloads").iterdir()} == {"refcoco.zip", "train2014.zip"}
    assert requested(server) == ZIPS
    prepare("--check")
    (tmp_path / "data/downloads/refcoco.zip").write_bytes(b"corrupt")
    assert "downloads/refcoco.zip has 7 bytes" in prepare("--check", status=2).err


@pytest.mark.parametrize("origin", ["kept earlier", "put there by the user"])
def test_existing_archives_are_used_and_not_deleted(server, prepare, tmp_path, origin):
    downloads = tmp_path / "data/downloads"
    if origin == "kept earlier":
        prepare("--keep_zips")
        (tmp_path / "data" / FOLDER / image_name(1)).unlink()
        (tmp_path / "data/refcoco/instances.json").unlink()
        (tmp_path / "data/hashes.json").unlink()
    else:
        downloads.mkdir(parents=True)
        for path in ZIPS:
            (downloads / path.rpartition("/")[2]).write_bytes(server.files[path])
    server.requests.clear()
    prepare()
    assert server.requests == []
    assert {path.name for path in downloads.iterdir()} == {"refcoco.zip", "train2014.zip"}
    prepare("--check")


# ---- what is rejected ----


def test_wrong_annotation_archives_leave_nothing(server, prepare, tmp_path, annotations):
    good = server.files["/archive/refcoco.zip"]
    members = [(f"refcoco/{name}", data) for name, data in annotations.items()]
    fewer_refs = pickle.dumps(pickle.loads(annotations["refs(unc).p"])[:-1], protocol=2)

    def packed(*members):
        return pack(tmp_path / "x.zip", members).read_bytes()

    for data, reason in [
        (b"<!DOCTYPE html><title>Wayback Machine</title>", "a web page"),
        (good[: len(good) // 2], "corrupt or not a zip file"),
        (good[:200] + bytes([good[200] ^ 255]) + good[201:], "corrupt or not a zip file"),
        (packed(*members, ("../evil", b"x")), "is outside the folder"),
        (packed(*members, ("/tmp/evil", b"x")), "is not a plain relative name"),
        (packed(*members, link("refcoco/evil", "/etc")), "is a link or a device"),
        (packed(("refcoco+/instances.json", b"{}")), "refcoco/instances.json is missing"),
        (packed(members[0], ("refcoco/refs(unc).p", b"cos\nsystem\n.")), "'os.system'"),
        (packed(members[0], ("refcoco/refs(unc).p", fewer_refs)), "train has 1 refs instead of 2"),
    ]:
        server.files["/archive/refcoco.zip"] = data
        error = prepare("--images", "none", status=2).err
        assert reason in error
        assert f"{server.url}/original/refcoco.zip: 404" in error  # the next address was tried
        assert contents(tmp_path / "data") == {}
        assert set(tmp_path.iterdir()) <= {tmp_path / name for name in ("data", "a.zip", "p.zip", "x.zip")}


def test_an_image_archive_that_lacks_needed_images_is_rejected(server, prepare, tmp_path, image_files):
    few = [(f"train2014/{name}", data) for name, data in list(image_files.items())[:2]]
    server.files["/zips/train2014.zip"] = pack(tmp_path / "x.zip", few).read_bytes()
    assert f"1 needed images are not in it, for example {image_name(3)}" in prepare(status=2).err


def test_a_download_that_differs_from_the_recorded_hash_is_kept_for_the_user(server, prepare, tmp_path):
    """It may be the right file, and took long to download."""
    prepare("--images", "none")
    shutil.rmtree(tmp_path / "data/refcoco")
    hashes = json.loads((tmp_path / "data/hashes.json").read_text())
    hashes["refcoco.zip"]["size"] += 1
    (tmp_path / "data/hashes.json").write_text(json.dumps(hashes))
    kept = tmp_path / "data/downloads/refcoco.zip"
    for _ in range(2):
        error = prepare("--images", "none", status=2).err
        assert f"{kept} has {hashes['refcoco.zip']['size'] - 1} bytes instead of the recorded" in error
        assert f"delete the entry 'refcoco.zip' in {tmp_path}/data/hashes.json. Otherwise, delete refcoco.zip" in error
        assert kept.read_bytes() == server.files["/archive/refcoco.zip"]
    assert requested(server) == ["/archive/refcoco.zip"] * 2
    del hashes["refcoco.zip"]
    (tmp_path / "data/hashes.json").write_text(json.dumps(hashes))
    prepare("--images", "none")
    assert requested(server) == ["/archive/refcoco.zip"] * 2
    assert not kept.exists()


def test_annotations_that_differ_from_the_recorded_hash_are_rejected(server, prepare, tmp_path, annotations):
    prepare("--images", "none")
    hashes = json.loads((tmp_path / "data/hashes.json").read_text())
    del hashes["refcoco.zip"]
    (tmp_path / "data/hashes.json").write_text(json.dumps(hashes))
    shutil.rmtree(tmp_path / "data/refcoco")
    changed = annotations | {"refs(unc).p": annotations["refs(unc).p"].replace(b"dog 0", b"cat 0")}
    members = [(f"refcoco/{name}", data) for name, data in changed.items()]
    server.files["/archive/refcoco.zip"] = pack(tmp_path / "x.zip", members).read_bytes()
    assert "refcoco/refs(unc).p has SHA-256" in prepare("--images", "none", status=2).err
    assert not (tmp_path / "data/refcoco").exists()


# ---- what is already installed ----


def test_a_changed_annotation_file_is_installed_again_and_kept(server, prepare, tmp_path, annotations):
    prepare("--images", "none")
    path = tmp_path / "data/refcoco/refs(unc).p"
    for number, name in ((0, ".replaced"), (1, ".replaced1"), (2, ".replaced2")):
        changed = annotations["refs(unc).p"].replace(b"dog 0", b"cat %d" % number)
        path.write_bytes(changed)
        done = prepare("--images", "none")
        assert path.read_bytes() == annotations["refs(unc).p"]
        assert path.with_name(f"refs(unc).p{name}").read_bytes() == changed
        assert f"The previous file was kept as refs(unc).p{name}" in done.err


def test_the_users_files_stay_if_nothing_better_can_be_downloaded(server, prepare, tmp_path, annotations):
    folder = tmp_path / "data/refcoco"
    folder.mkdir(parents=True)
    mine = annotations | {"refs(unc).p": b"corrupt"}
    for name, data in mine.items():
        (folder / name).write_bytes(data)
    del server.files["/archive/refcoco.zip"]
    prepare("--images", "none", status=2)
    assert contents(folder) == mine


def test_an_optional_split_system_can_be_installed_later(server, prepare, tmp_path, annotations):
    prepare("--images", "none")
    root = tmp_path / "data"
    with pytest.raises(UserError, match=r"refs\(google\)\.p .*`python -m refer\.prepare --dataset refcoco .* --again`"):
        REFER(root, "refcoco", "google")
    members = [(f"refcoco/{name}", data) for name, data in annotations.items()]
    members.append(("refcoco/refs(google).p", annotations["refs(unc).p"]))
    server.files["/archive/refcoco.zip"] = pack(tmp_path / "more.zip", members).read_bytes()
    assert "refs(google).p is not installed. To download it, use --again." in prepare("--images", "none").err
    (root / "hashes.json").unlink()
    prepare("--images", "none", "--again")
    assert REFER(root, "refcoco", "google").getRefIds()


def test_intact_images_of_the_user_are_never_lost(server, prepare, tmp_path, image_files):
    """An image that is not needed stays, and so does a valid one whose file differs from the archive's. An image of
    another size than the annotations say is kept under another name. Corrupt images are replaced."""
    folder = tmp_path / "data" / FOLDER
    folder.mkdir(parents=True)
    Image.new("RGB", (W, H)).save(folder / image_name(4))
    Image.new("RGB", (W + 1, H)).save(folder / image_name(1))
    (folder / image_name(2)).write_bytes(b"corrupt")
    (folder / image_name(3)).write_bytes(image_files[image_name(3)] + b"\0\0")
    before = contents(folder)
    done = prepare()
    kept = f"{image_name(1)}.replaced"
    assert f"The previous file was kept as {kept}" in done.err
    unchanged = {name: before[name] for name in (image_name(3), image_name(4))}
    assert contents(folder) == {**image_files, **unchanged, kept: before[image_name(1)]}
    prepare("--check")


def test_two_commands_do_not_work_in_the_same_folder(server, prepare, tmp_path):
    (tmp_path / "data").mkdir()
    with lock(tmp_path / "data" / ".lock", "busy"):
        assert f"Another process is writing {tmp_path}/data" in prepare(status=2).err


def test_a_root_that_cannot_be_written_is_reported(server, prepare, tmp_path):
    (tmp_path / "file").write_text("")
    assert f"Cannot write {tmp_path}/file/x" in prepare("--root", tmp_path / "file/x", status=2).err


# ---- flags ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "Pass --dataset refcoco refcoco+ refcocog or --weights swin_base bert crossvlt."),
        (["--dataset", "refcoc0"], "Did you mean refcoco?"),
        (["--dataset", "refshapes"], "python -m data.refshapes"),
        (["--dataset", "refcoco,refcog"], "Did you mean refcocog?"),
        (["--weights", "swin_basee"], "Did you mean swin_base?"),
        (["--dataset", "refcoco", "--imags", "none"], "Did you mean --images?"),
        (["--dataset", "refcoco", "--images", "some"], "invalid choice"),
        (["--dataset", "refcoco", "--mirror", "file:///tmp"], "--mirror file:///tmp must start with http"),
        (["--dataset", "refcoco", "--from", "/absent"], "--from /absent: no such file or folder"),
        (["--dataset", "refcoco", "--stall", "0"], "--stall must be above 0"),
        (["--dataset", "refcoco", "--tries", "0"], "--tries must be at least 1"),
        (["--dataset", "refcoco", "--stall", "1e10"], "at most 86400"),
        (["--weights", "bert", "--again"], "--again has no effect without --dataset"),
        (["--weights", "bert", "--images", "needed"], "--images has no effect without --dataset"),
    ],
)
def test_mistakes_are_reported_before_anything_is_created(prepare, flags, message, tmp_path):
    assert message in prepare(*flags, dataset=None, retry=(), status=2).err
    assert not (tmp_path / "data").exists()


def test_help_shows_the_commands(prepare):
    assert "python -m refer.prepare --dataset refcoco refcoco+ refcocog" in prepare("--help").out


def test_names_are_separated_by_spaces_or_commas(server, prepare):
    done = prepare("--dataset", "refcoco,refcoco", "refcoco", "--images", "none")
    assert len(done.out.splitlines()) == 1 + len(COUNTS)
