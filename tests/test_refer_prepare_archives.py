"""refer.prepare.archives: unsafe and corrupt archives are rejected before anything of them is used."""

import os
from contextlib import nullcontext

import pytest
from download_server import link, pack

from refer.prepare.archives import open_archive
from refer.prepare.files import RejectedError


def test_the_files_of_a_folder_are_unpacked(tmp_path):
    members = [
        ("refcoco/", b""),
        ("x/refcoco/a", b"A" * 5000),
        ("__MACOSX/refcoco/a", b"x"),
        ("refcoco/.DS_Store", b""),
    ]
    with open_archive(pack(tmp_path / "x.zip", members)) as archive:
        files = archive.files("refcoco")
        assert list(files) == ["a"]
        archive.extract(files["a"], tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"A" * 5000


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (("../refcoco/b", b"x"), "is outside the folder"),
        (("refcoco/../../b", b"x"), "is outside the folder"),
        (("/tmp/b", b"x"), "is not a plain relative name"),
        (("C:/b", b"x"), "is not a plain relative name"),
        (("..\\b", b"x"), "is not a plain relative name"),
        (link("refcoco/b", "/etc/passwd"), "is a link or a device"),
        (("refcoco/a", b"again"), "occurs twice"),
    ],
)
def test_one_unsafe_member_rejects_the_archive(tmp_path, member, reason):
    with pytest.warns(UserWarning, match="Duplicate") if reason == "occurs twice" else nullcontext():
        path = pack(tmp_path / "x.zip", [("refcoco/a", b"A"), member])
    with pytest.raises(RejectedError, match=f"unsafe archive: member .* {reason}"), open_archive(path):
        pass


def test_two_files_of_the_same_name_are_rejected(tmp_path):
    path = pack(tmp_path / "x.zip", [("refcoco/a", b"A"), ("x/refcoco/a", b"B")])
    with open_archive(path) as archive, pytest.raises(RejectedError, match="two files are named refcoco/a"):
        archive.files("refcoco")


def test_the_strongest_compression_of_deflate_is_accepted(tmp_path):
    with open_archive(pack(tmp_path / "x.zip", [("a/zeros", b"0" * 40_000_000)])) as archive:
        assert list(archive.files("a")) == ["zeros"]


def with_field(data, signature, offset, value):
    """Return an archive's bytes with four bytes of the last record of this kind replaced."""
    at = data.rindex(signature) + offset
    return data[:at] + value.to_bytes(4, "little") + data[at + 4 :]


@pytest.mark.parametrize(
    ("offset", "value", "reason"), [(24, 3_000_000_000, "member 'a' claims to unpack"), (20, 5000, "its members claim")]
)
def test_impossible_sizes_reject_the_archive(tmp_path, offset, value, reason):
    data = pack(tmp_path / "x.zip", [("a", os.urandom(1000))]).read_bytes()
    (tmp_path / "y.zip").write_bytes(with_field(data, b"PK\x01\x02", offset, value))
    with pytest.raises(RejectedError, match=reason), open_archive(tmp_path / "y.zip"):
        pass


@pytest.mark.parametrize("size", [1500, 2500])
def test_no_more_is_written_than_the_archive_announces(tmp_path, size):
    data = pack(tmp_path / "x.zip", [("x/a", bytes(1000) + os.urandom(1000))]).read_bytes()
    (tmp_path / "y.zip").write_bytes(with_field(data, b"PK\x01\x02", 24, size))
    with open_archive(tmp_path / "y.zip") as archive, pytest.raises(RejectedError):
        archive.extract(archive.files("x")["a"], tmp_path / "a")
    assert (tmp_path / "a").stat().st_size <= size


def test_corrupt_archives_are_rejected(tmp_path):
    data = pack(tmp_path / "x.zip", [("x/a", os.urandom(5000))]).read_bytes()
    for corrupt in (b"", data[:2500], data[:-10], b"not a zip file" * 50):
        (tmp_path / "y.zip").write_bytes(corrupt)
        with pytest.raises(RejectedError, match="corrupt or not a zip file"), open_archive(tmp_path / "y.zip"):
            pass
    (tmp_path / "y.zip").write_bytes(data[:2500] + bytes([data[2500] ^ 1]) + data[2501:])
    with open_archive(tmp_path / "y.zip") as archive, pytest.raises(RejectedError, match="Bad CRC-32"):
        archive.extract(archive.files("x")["a"], tmp_path / "a")
