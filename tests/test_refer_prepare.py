"""python -m refer.prepare: what it downloads, replaces and refuses, and what it says."""

import json
import pickle
import shutil

import pytest
from commands import contents
from download_server import link, pack
from PIL import Image
from published_set import COUNTS, FOLDER, IMAGES, H, W, asked, picture_name

import refer.prepare.__main__
import refer.prepare.images
import refer.prepare.weights
from lib.errors import UserError
from refer.counts import PUBLISHED_COUNTS, counts_of
from refer.prepare.hashes import keep_replaced
from refer.refer import REFER

# ---- downloading ----


def test_one_command_brings_everything(world, prepare, tmp_path, annotations, pictures):
    done = prepare()
    right = {f"refcoco/{name}": data for name, data in annotations.items()}
    right |= {f"{FOLDER}/{name}": data for name, data in pictures.items()}
    there = contents(tmp_path / "data")
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
    assert contents(folder) == {picture_name(i): pictures[picture_name(i)] for i in IMAGES}
    assert not (tmp_path / "data" / "downloads").exists()


def test_pictures_that_cannot_be_had_are_named(world, prepare, tmp_path, pictures):
    wrong = {picture_name(2): pictures[picture_name(3)][:-30], picture_name(3): b"\xff\xd8 no"}
    world.files.update({f"/train2014/{name}": data for name, data in wrong.items()})
    told = prepare("--pictures", "needed", status=2).err
    assert "2 of 3 pictures can't be had" in told
    assert f"{picture_name(2)}: is cut short" in told
    assert sorted(contents(tmp_path / "data" / FOLDER)) == [picture_name(1)]
    world.files.update({f"/train2014/{name}": pictures[name] for name in pictures})
    prepare("--pictures", "needed")


def test_where_nothing_is_to_be_had_not_every_picture_is_asked_for(world, prepare, monkeypatch):
    monkeypatch.setattr(refer.prepare.images, "HOPELESS", 2)
    monkeypatch.setattr(refer.prepare.images, "FETCHERS", 1)
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
    real, written = refer.prepare.archives.Archive.write, []

    def write(self, member, target, **how):
        if len(written) == 4:  # two annotation files, two pictures
            raise SystemExit(137)
        written.append(target)
        return real(self, member, target, **how)

    with monkeypatch.context() as patch:
        patch.setattr(refer.prepare.archives.Archive, "write", write)
        prepare(status=137)
    assert len(contents(tmp_path / "data" / FOLDER)) == 2
    world.asked.clear()
    del written[:]
    monkeypatch.setattr(refer.prepare.archives.Archive, "write", lambda *a, **k: (written.append(0), real(*a, **k)))
    prepare()
    assert world.asked == []
    assert len(written) == 2
    assert contents(tmp_path / "data" / FOLDER) == pictures


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


@pytest.mark.parametrize("put", ["kept earlier", "by hand"])
def test_archives_that_were_there_are_not_deleted(world, prepare, tmp_path, put):
    downloads = tmp_path / "data/downloads"
    if put == "kept earlier":
        prepare("--keep_zips")
        (tmp_path / "data" / FOLDER / picture_name(1)).unlink()
        (tmp_path / "data/refcoco/instances.json").unlink()
        (tmp_path / "data/hashes.json").unlink()
    else:
        downloads.mkdir(parents=True)
        for name, address in (("refcoco.zip", "/archive/refcoco.zip"), ("train2014.zip", "/zips/train2014.zip")):
            (downloads / name).write_bytes(world.files[address])
    world.asked.clear()
    prepare()
    assert world.asked == []
    assert {path.name for path in downloads.iterdir()} == {"refcoco.zip", "train2014.zip"}
    prepare("--check")


def test_an_archive_of_a_killed_run_is_deleted_when_it_is_unpacked(world, prepare, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise SystemExit(137)

    with monkeypatch.context() as patch:
        patch.setattr(refer.prepare, "take_picture_zip", killed)
        prepare(status=137)
    assert (tmp_path / "data/downloads/train2014.zip").is_file()
    prepare()
    assert not (tmp_path / "data/downloads").exists()
    assert asked(world) == ["/archive/refcoco.zip", "/zips/train2014.zip"]


# ---- what is refused ----


def refused(world, prepare, tmp_path, data):
    """What is told of an annotation archive with these bytes; nothing of it is left."""
    world.files["/archive/refcoco.zip"] = data
    told = prepare("--pictures", "none", status=2).err
    assert f"{world.url}/original/refcoco.zip: 404" in told  # it went on to the next place
    assert contents(tmp_path / "data") == {}
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
        (packed([members[0], ("refcoco/refs(unc).p", b"cos\nsystem\n.")]), "refers to the Python object 'os.system'"),
        (packed([(f"refcoco/{name}", one) for name, one in other.items()]), "train has 1 refs instead of 2"),
    ]:
        assert reason in refused(world, prepare, tmp_path, data)


def test_a_file_that_differs_from_the_recorded_one(world, prepare, tmp_path, annotations):
    prepare("--pictures", "none")
    shutil.rmtree(tmp_path / "data/refcoco")
    good = world.files["/archive/refcoco.zip"]
    same = [(f"refcoco/{name}", data) for name, data in annotations.items()]
    for number, place in enumerate(("/archive", "/original")):
        world.files[f"{place}/refcoco.zip"] = pack(tmp_path / "x.zip", [*same, ("readme", b"x" * number)]).read_bytes()
    told = prepare("--pictures", "none", status=2).err
    for place, name in (("/archive", "refcoco.refused.zip"), ("/original", "refcoco.refused1.zip")):
        kept = tmp_path / "data/downloads" / name
        assert kept.read_bytes() == world.files[f"{place}/refcoco.zip"]
        assert f"it is kept as {kept}, to be given by --from" in told
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


def test_another_split_system_is_got_again(world, prepare, tmp_path, annotations):
    """The archive of the first time lacked it: the reader then names a command that really brings it."""
    prepare("--pictures", "none")
    root = tmp_path / "data"
    with pytest.raises(UserError, match=r"refs\(google\)\.p is missing. Run .*--dataset refcoco --root .* --again`"):
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


def test_whole_pictures_of_the_users_are_never_lost(world, prepare, tmp_path):
    """One that isn't needed stays, one of another size than the annotations say is kept by another name; what is
    damaged is replaced."""
    folder = tmp_path / "data" / FOLDER
    folder.mkdir(parents=True)
    Image.new("RGB", (W, H)).save(folder / picture_name(4))
    Image.new("RGB", (W + 1, H)).save(folder / picture_name(1))
    (folder / picture_name(2)).write_bytes(b"torn")
    unneeded, other = ((folder / picture_name(one)).read_bytes() for one in (4, 1))
    done = prepare()
    assert (folder / picture_name(4)).read_bytes() == unneeded
    kept = folder / f"{picture_name(1)}.replaced"
    assert kept.read_bytes() == other
    assert f"what was there is kept as {kept.name}" in done.err
    assert {path.name for path in folder.iterdir()} == {*map(picture_name, (1, 2, 3, 4)), kept.name}
    prepare("--check")


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
        (("--dataset", "refcoco", "--stall", "1e10"), "at most 86400"),
        (("--weights", "bert", "--again"), "--again does nothing without --dataset"),
        (("--weights", "bert", "--pictures", "needed"), "--pictures does nothing without --dataset"),
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
