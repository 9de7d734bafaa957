"""python -m refer.prepare: what it downloads, takes, checks and says, against a server on this machine."""

import json
import os
import pickle
import shutil
import sys

import pytest
import torch
from conftest import Finished
from PIL import Image
from test_refer_download import Server, link, pack

import refer.pictures
import refer.prepare
import refer.weights
from CrossVLT import SWIN_VARIANTS
from refer.counts import PUBLISHED_COUNTS, Counts, counts_of
from refer.hashes import keep_replaced
from refer.refer import REFER
from refer.weights import EMBED_DIMS
from utils import LOGGER, UserError, run_command

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


@pytest.fixture(scope="module")
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
    monkeypatch.setattr(refer.prepare, "annotation_addresses", publish)
    monkeypatch.setattr(refer.prepare, "COCO_ADDRESS", f"{server.url}/")
    monkeypatch.setattr(refer.pictures, "picture_address", lambda name: f"{server.url}/train2014/{name}")
    monkeypatch.setattr(refer.weights, "weight_addresses", lambda name: [f"{server.url}/{name}"])
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
    as_it_was = LOGGER.handlers[:], LOGGER.level, LOGGER.propagate

    def run(*flags, status=0, dataset="refcoco", quick=("--tries", "2", "--stall", "0.3")):
        given = ["--dataset", dataset] * bool(dataset) + ["--root", tmp_path / "data", *flags]
        given += [] if "--check" in flags else quick
        monkeypatch.setattr(sys, "argv", ["prepare", *map(str, given)])
        monkeypatch.setattr("refer.download.LONGEST_PAUSE", 0.0)
        left = 0
        try:
            run_command(refer.prepare.main)
        except SystemExit as error:
            left = error.code
        finally:
            LOGGER.handlers[:], LOGGER.level, LOGGER.propagate = as_it_was
        text = capsys.readouterr()
        assert left == status, text.err
        errors = [line for line in text.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == (status == 2)
        assert "Traceback" not in text.err
        return Finished(left, text.out, errors[0] if errors else text.err)

    return run


def tree(folder):
    """{path: bytes} of all files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def asked(server):
    return [one[0] for one in server.asked]


# ---- downloading ----


def test_one_command_brings_everything(world, prepare, tmp_path, annotations, pictures):
    done = prepare()
    right = {f"refcoco/{name}": data for name, data in annotations.items()}
    right |= {f"{FOLDER}/{name}": data for name, data in pictures.items()}
    there = tree(tmp_path / "data")
    recorded = json.loads(there.pop("hashes.json"))
    assert there == right  # nothing else: no archives, no parts
    assert sorted(recorded) == ["refcoco.zip", "refcoco/instances.json", "refcoco/refs(unc).p", "train2014.zip"]
    assert all(len(one["sha256"]) == 64 and one["size"] > 0 for one in recorded.values())
    rows = [line.split() for line in done.out.splitlines()]
    assert rows[0][:2] == ["dataset", "split"]
    assert [row[2:] for row in rows[1:]] == [
        [split, *map(str, counts), str(counts.images), "as", "published"] for split, counts in COUNTS.items()
    ]
    assert counts_of(REFER(tmp_path / "data")) == COUNTS

    world.asked.clear()
    assert prepare().out == done.out
    assert world.asked == []  # what is there is not fetched again
    assert prepare("--check").out == done.out


def test_pictures_one_by_one(world, prepare, tmp_path, pictures):
    folder = tmp_path / "data" / FOLDER
    folder.mkdir(parents=True)
    (folder / picture_name(1)).write_bytes(pictures[picture_name(1)])
    (folder / picture_name(2)).write_bytes(pictures[picture_name(2)][:-20])
    prepare("--pictures", "needed")
    assert sorted(asked(world)[1:]) == [f"/train2014/{picture_name(i)}" for i in (2, 3)]
    assert tree(folder) == {picture_name(i): pictures[picture_name(i)] for i in IMAGES}
    assert not (tmp_path / "data" / "downloads").exists()


def test_pictures_that_cannot_be_had_are_named(world, prepare, tmp_path, pictures):
    wrong = {picture_name(2): pictures[picture_name(3)][:-30], picture_name(3): b"\xff\xd8 no"}
    world.files.update({f"/train2014/{name}": data for name, data in wrong.items()})
    told = prepare("--pictures", "needed", status=2).err
    assert "2 of 3 pictures can't be had" in told
    assert "cut short" in told
    assert sorted(tree(tmp_path / "data" / FOLDER)) == [picture_name(1)]
    world.files.update({f"/train2014/{name}": pictures[name] for name in pictures})
    prepare("--pictures", "needed")


def test_where_nothing_is_to_be_had_not_every_picture_is_asked_for(world, prepare, monkeypatch):
    monkeypatch.setattr(refer.pictures, "HOPELESS", 2)
    monkeypatch.setattr(refer.pictures, "FETCHERS", 1)
    for name in IMAGES:
        del world.files[f"/train2014/{picture_name(name)}"]
    assert "the rest was not tried" in prepare("--pictures", "needed", status=2).err


def test_without_pictures(world, prepare, tmp_path):
    done = prepare("--pictures", "none")
    assert asked(world) == ["/archive/refcoco.zip"]
    assert done.out.splitlines()[1].split()[2:] == ["train", "2", "4", "2", "0", "as", "published"]


def test_mirrors_go_first_and_the_published_ones_after(world, prepare):
    world.files["/b/refcoco.zip"] = b"<html>"
    world.files["/original/refcoco.zip"] = world.files.pop("/archive/refcoco.zip")
    prepare("--mirror", f"{world.url}/a/", "--mirror", f"{world.url}/b", "--pictures", "none")
    assert asked(world) == ["/a/refcoco.zip", "/b/refcoco.zip", "/archive/refcoco.zip", "/original/refcoco.zip"]


def test_a_broken_download_goes_on_with_the_same_command(world, prepare, tmp_path):
    world.does["/zips/train2014.zip"] = [{"bytes": 1000}, {"bytes": 500, "stall": True}, {}]
    assert "nothing came for 0.3 s" in prepare(status=2).err
    assert (tmp_path / "data/downloads/train2014.zip.part").stat().st_size == 1500
    prepare()
    assert world.asked[-1] == ("/zips/train2014.zip", "bytes=1500-", '"first"')


def test_unpacking_goes_on_after_a_kill(world, prepare, tmp_path, monkeypatch, pictures):
    real, written = refer.archives.Archive.write, []

    def write(self, member, target, **how):
        if len(written) == 4:  # two annotation files, two pictures
            raise SystemExit(137)
        written.append(target)
        return real(self, member, target, **how)

    with monkeypatch.context() as patch:
        patch.setattr(refer.archives.Archive, "write", write)
        prepare(status=137)
    assert len(tree(tmp_path / "data" / FOLDER)) == 2
    world.asked.clear()
    del written[:]
    monkeypatch.setattr(refer.archives.Archive, "write", lambda *a, **k: (written.append(0), real(*a, **k)))
    prepare()
    assert world.asked == []
    assert len(written) == 2
    assert tree(tmp_path / "data" / FOLDER) == pictures


def test_archives_are_kept_when_told(world, prepare, tmp_path):
    for _ in range(2):
        prepare("--keep_zips")
        assert {path.name for path in (tmp_path / "data/downloads").iterdir()} == {"refcoco.zip", "train2014.zip"}
    prepare()
    assert (tmp_path / "data/downloads/train2014.zip").is_file()  # what was not fetched now is not deleted now
    assert asked(world) == ["/archive/refcoco.zip", "/zips/train2014.zip"]
    prepare("--check")
    (tmp_path / "data/downloads/refcoco.zip").write_bytes(b"torn")
    assert "downloads/refcoco.zip has 4 bytes" in prepare("--check", status=2).err


# ---- what is refused ----


def refused(world, prepare, tmp_path, data):
    """What is told of an annotation archive with these bytes; nothing of it is left."""
    world.files["/archive/refcoco.zip"] = data
    told = prepare("--pictures", "none", status=2).err
    assert f"{world.url}/original/refcoco.zip: 404" in told  # it went on to the next place
    assert tree(tmp_path / "data") == {}
    assert set(tmp_path.iterdir()) <= {tmp_path / name for name in ("data", "a.zip", "p.zip", "x.zip")}
    return told


def test_wrong_archives(world, prepare, tmp_path, annotations):
    good = world.files["/archive/refcoco.zip"]
    members = [(f"refcoco/{name}", data) for name, data in annotations.items()]
    other = dict(annotations)
    refs = pickle.loads(other["refs(unc).p"])
    other["refs(unc).p"] = pickle.dumps(refs[:-1], protocol=2)

    def packed(more):
        return pack(tmp_path / "x.zip", more).read_bytes()

    for data, reason in [
        (b"<!DOCTYPE html><title>Wayback Machine</title>", "a web page"),
        (good[: len(good) // 2], "damaged zip file, or none"),
        (good[:200] + bytes([good[200] ^ 255]) + good[201:], "damaged zip file, or none"),
        (packed([*members, ("../evil", b"x")]), "leads out of the folder"),
        (packed([*members, ("/tmp/evil", b"x")]), "not a plain relative name"),
        (packed([*members, link("refcoco/evil", "/etc")]), "link or a device"),
        (packed([("refcoco+/instances.json", b"{}")]), "refcoco/refs(unc).p is missing"),
        (packed([members[0], ("refcoco/refs(unc).p", b"cos\nsystem\n.")]), "asks for 'os.system'"),
        (packed([(f"refcoco/{name}", one) for name, one in other.items()]), "train has 1 refs instead of 2"),
    ]:
        assert reason in refused(world, prepare, tmp_path, data)


def test_a_file_that_differs_from_the_recorded_one(world, prepare, tmp_path, annotations):
    prepare("--pictures", "none")
    shutil.rmtree(tmp_path / "data/refcoco")
    good = world.files["/archive/refcoco.zip"]
    same = [(f"refcoco/{name}", data) for name, data in annotations.items()]
    world.files["/archive/refcoco.zip"] = world.files["/original/refcoco.zip"] = pack(
        tmp_path / "x.zip", same
    ).read_bytes()
    told = prepare("--pictures", "none", status=2).err
    assert "are recorded" in told
    assert f"delete the entry 'refcoco.zip' in {tmp_path}/data/hashes.json" in told
    world.files["/archive/refcoco.zip"] = good
    prepare("--pictures", "none")


def test_a_picture_archive_that_lacks_some(world, prepare, tmp_path, pictures):
    few = [(f"train2014/{name}", data) for name, data in list(pictures.items())[:2]]
    world.files["/zips/train2014.zip"] = pack(tmp_path / "x.zip", few).read_bytes()
    assert f"lacks 1 of the pictures that the annotations need, such as {picture_name(3)}" in prepare(status=2).err


# ---- what is there already ----


def test_a_file_on_the_disk_that_became_another_is_got_again(world, prepare, tmp_path, annotations):
    prepare("--pictures", "none")
    path = tmp_path / "data/refcoco/refs(unc).p"
    changed = annotations["refs(unc).p"].replace(b"dog 0", b"cat 0")
    path.write_bytes(changed)
    prepare("--pictures", "none")
    assert path.read_bytes() == annotations["refs(unc).p"]
    assert path.with_name("refs(unc).p.replaced").read_bytes() == changed


def test_own_files_are_kept_where_nothing_better_is_to_be_had(world, prepare, tmp_path, annotations):
    folder = tmp_path / "data/refcoco"
    folder.mkdir(parents=True)
    for name, data in annotations.items():
        (folder / name).write_bytes(data)
    (folder / "refs(unc).p").write_bytes(b"torn")
    del world.files["/archive/refcoco.zip"]
    prepare("--pictures", "none", status=2)
    assert (folder / "refs(unc).p").read_bytes() == b"torn"


def test_two_at_a_time_do_not_work_in_one_folder(world, prepare, tmp_path):
    with refer.prepare.only_one(tmp_path / "data"):
        assert "another `python -m refer.prepare` is at work" in prepare(status=2).err


def test_a_root_that_cannot_be_written(world, prepare, tmp_path):
    (tmp_path / "file").write_text("")
    assert f"can't write {tmp_path}/file/x" in prepare("--root", tmp_path / "file/x", status=2).err


# ---- --check ----


def test_check_tells_what_is_wrong_and_writes_nothing(world, prepare, tmp_path, pictures, annotations):
    prepare()
    root = tmp_path / "data"
    good = tree(root)
    again = f"`python -m refer.prepare --dataset refcoco --root {root}"
    Image.new("RGB", (H, W)).save(tmp_path / "turned.jpg")
    first = f"{FOLDER}/{picture_name(1)}"
    for name, data, told in [
        (first, None, "1 pictures are missing, such as"),
        (first, pictures[picture_name(1)][:-100], "1 are not right"),
        (first, (tmp_path / "turned.jpg").read_bytes(), "is 20x30, the annotations say 30x20"),
        (first, b"<html>", "cannot identify image file"),
        ("refcoco/refs(unc).p", annotations["refs(unc).p"].replace(b"dog 0", b"cat 0"), "its SHA-256"),
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
    assert f"refs(unc).p is missing: `python -m data.refshapes --root {root}` makes it" in done.err
    (root / "refshapes" / "instances.json").unlink()
    assert "half has no refs(<splitBy>).p" in prepare("--check", dataset=None, status=2).err


@pytest.mark.parametrize(
    "flags",
    [["--from", "."], ["--mirror", "http://x"], ["--download"], ["--again"], ["--keep_zips"], ["--stall", "9"],
     ["--tries", "9"], ["--pictures", "needed"]],
)  # fmt: skip
def test_check_refuses_flags_that_it_would_not_use(prepare, flags):
    assert f"error: {' '.join(flags[:1])}" in prepare("--check", *flags, status=2).err


def test_another_split_system_is_got_again(world, prepare, tmp_path, annotations):
    """The archive of the first time lacked it: the reader then names a command that really brings it."""
    prepare("--pictures", "none")
    root = tmp_path / "data"
    with pytest.raises(UserError, match=r"refs\(google\)\.p is missing: .*--dataset refcoco --root .* --again` brings"):
        REFER(root, "refcoco", "google")
    members = [(f"refcoco/{name}", data) for name, data in annotations.items()]
    members.append(("refcoco/refs(google).p", annotations["refs(unc).p"]))
    world.files["/archive/refcoco.zip"] = pack(tmp_path / "more.zip", members).read_bytes()
    assert "without refs(google).p: --again gets them anew" in prepare("--pictures", "none").err
    (root / "hashes.json").unlink()
    prepare("--pictures", "none", "--again")
    assert REFER(root, "refcoco", "google").getRefIds()


def test_a_picture_that_is_right_stays_whatever_the_archive_has(world, prepare, tmp_path, pictures):
    prepare()
    folder = tmp_path / "data" / FOLDER
    mine = folder / picture_name(1)
    mine.write_bytes(pictures[picture_name(1)] + b"\0\0")  # another size in bytes, and right
    before = mine.read_bytes()
    (folder / picture_name(2)).unlink()
    prepare()
    assert mine.read_bytes() == before
    assert (folder / picture_name(2)).read_bytes() == pictures[picture_name(2)]


def test_only_cocos_pictures_are_taken_from_a_folder(world, prepare, tmp_path, pictures):
    downloads = tmp_path / "Downloads"
    downloads.mkdir()
    more = "COCO_train2014_000000999999.jpg"
    for name, data in {**pictures, "holiday.jpg": pictures[picture_name(1)], more: pictures[picture_name(1)]}.items():
        (downloads / name).write_bytes(data)
    prepare("--from", downloads, "--download")
    there = {path.name for path in (tmp_path / "data" / FOLDER).iterdir()}
    assert there == {*pictures, more}


def test_what_may_be_right_after_all_is_kept(world, prepare, tmp_path, pictures):
    """13 GB that differ from the recorded ones are not thrown away, and every replaced file is kept."""
    prepare()
    root = tmp_path / "data"
    hashes = json.loads((root / "hashes.json").read_text())
    hashes["train2014.zip"]["size"] += 1
    (root / "hashes.json").write_text(json.dumps(hashes))
    (root / FOLDER / picture_name(1)).unlink()
    done = prepare(status=2)
    kept = root / "downloads" / "train2014.refused.zip"
    assert str(kept) in done.err
    assert kept.read_bytes() == world.files["/zips/train2014.zip"]
    prepare("--from", kept)
    assert (root / FOLDER / picture_name(1)).exists()
    for number, name in enumerate(("x.replaced", "x.replaced1", "x.replaced2")):
        (root / "x").write_text(str(number))
        assert keep_replaced(root / "x") == root / name
        assert (root / name).read_text() == str(number)


def test_a_kept_archive_that_differs_is_not_overwritten(world, prepare, tmp_path):
    prepare("--keep_zips")
    root = tmp_path / "data"
    mine = root / "downloads/train2014.zip"
    other = pack(tmp_path / "x.zip", [("train2014/other", b"x")]).read_bytes()
    mine.write_bytes(other)
    (root / FOLDER / picture_name(1)).unlink()
    prepare("--keep_zips")
    assert mine.read_bytes() == world.files["/zips/train2014.zip"]
    assert mine.with_name("train2014.refused.zip").read_bytes() == other


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


def test_swin_weights_are_known_by_their_width():
    assert {name: one["embed_dim"] for name, one in SWIN_VARIANTS.items()} == EMBED_DIMS


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


# ---- --from ----


def test_from_archives(world, prepare, tmp_path, pictures):
    for name, address in (("mine.zip", "/archive/refcoco.zip"), ("coco.zip", "/zips/train2014.zip")):
        (tmp_path / name).write_bytes(world.files[address])
    prepare("--from", tmp_path / "mine.zip", "--from", tmp_path / "coco.zip")
    assert tree(tmp_path / "data" / FOLDER) == pictures
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
    assert tree(linked) == {picture_name(i): pictures[picture_name(i)] for i in IMAGES}
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
    assert tree(tmp_path / "data" / FOLDER) == pictures
    assert (tmp_path / "data" / FOLDER / picture_name(1)).stat().st_nlink == 1


def test_from_tells_why_it_is_not_taken(world, prepare, tmp_path):
    (tmp_path / "x.zip").write_bytes(b"torn")
    assert "x.zip: is a damaged zip file" in prepare("--from", tmp_path / "x.zip", status=2).err
    assert "no such file or folder" in prepare("--from", tmp_path / "absent", status=2).err


# ---- weights ----


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


def test_weights_are_brought_and_checked(world, weights, prepare, tmp_path):
    flags = ("--weights", "swin_base", "bert", "--pretrained", tmp_path / "pre")
    done = prepare(*flags, dataset=None)
    there = tree(tmp_path / "pre")
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
        assert tree(tmp_path / "pre") == {}
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


# ---- flags ----


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((), "say what is wanted"),
        (("--dataset", "refcoc0"), "did you mean refcoco?"),
        (("--dataset", "refshapes"), "python -m data.refshapes"),
        (("--dataset", "refcoco,refcog"), "did you mean refcocog?"),
        (("--weights", "swin_basee"), "did you mean swin_base?"),
        (("--dataset", "refcoco", "--pictuers", "none"), "did you mean --pictures?"),
        (("--dataset", "refcoco", "--pictures", "some"), "invalid choice"),
        (("--dataset", "refcoco", "--mirror", "file:///tmp"), "should begin with http"),
        (("--dataset", "refcoco", "--stall", "0"), "--stall has to be above 0"),
        (("--dataset", "refcoco", "--tries", "0"), "--tries at least 1"),
    ],
)
def test_mistakes_are_told_in_one_line(prepare, flags, told, tmp_path):
    assert told in prepare(*flags, dataset=None, quick=(), status=2).err
    assert not (tmp_path / "data").exists()


def test_help_shows_the_commands(prepare):
    assert "python -m refer.prepare --dataset refcoco refcoco+ refcocog" in prepare("--help").out


def test_a_names_list_has_each_once():
    assert refer.prepare.names_of(["refcoco,refcoco+", "refcoco"], ["refcoco", "refcoco+"], "--dataset") == [
        "refcoco", "refcoco+"
    ]  # fmt: skip


def test_the_published_counts_add_up():
    """To the totals that the datasets' papers give: refs and expressions."""
    totals = {
        one: (sum(c.refs for c in splits.values()), sum(c.expressions for c in splits.values()))
        for one, splits in PUBLISHED_COUNTS.items()
    }
    assert totals == {
        ("refcoco", "unc"): (50000, 142210), ("refcoco+", "unc"): (49856, 141564),
        ("refcocog", "umd"): (49822, 95010), ("refcocog", "google"): (49822, 95010),
    }  # fmt: skip
