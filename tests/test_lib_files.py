"""lib.files: atomic writes and checks of output files."""

import itertools
import os

import pytest
from commands import contents

from lib.errors import UserError
from lib.files import (
    Kind,
    atomic_folder,
    atomic_write,
    check_writable,
    kind_of,
    open_to_append,
    protect,
    protecting_inputs,
    release,
)


def test_atomic_write_is_all_or_nothing(tmp_path):
    target = tmp_path / "new" / "file.txt"
    with atomic_write(target) as temporary:
        temporary.write_text("first")
        assert not target.exists()
    assert target.read_text() == "first"

    def fail_halfway():
        with atomic_write(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert target.read_text() == "first"
    assert [path.name for path in target.parent.iterdir()] == ["file.txt"]


def test_the_error_names_an_unwritable_path(tmp_path):
    (tmp_path / "file").write_text("")

    def write():
        with atomic_write(tmp_path / "file" / "below.txt") as temporary:
            temporary.write_text("")

    with pytest.raises(UserError, match=r"Cannot write .*below\.txt"):
        write()


def test_check_writable_rejects_folders_and_other_suffixes(tmp_path):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "fifo")
    check_writable(tmp_path / "new" / "b.png", Kind.PNG)
    for path, kind, message in (
        (tmp_path, None, "it is a folder"),
        (tmp_path / "b.txt", Kind.PNG, r"the name must end in \.png"),
        (tmp_path / "file" / "b.png", None, "Cannot write"),
        (tmp_path / "fifo", None, "it is not a regular file"),
        (tmp_path / "file", Kind.FOLDER, "it is a file, not a folder"),
        (tmp_path / ("a" * 300), None, "File name too long"),
    ):
        with pytest.raises(UserError, match=message):
            check_writable(path, kind)


CONTENTS = {  # kind → contents of files of this kind
    Kind.PNG: (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",),
    Kind.JSON_LIST: (b"[\n {\n", b'[{"split": "val"}]', b"[]", b'["a"]', b"[1, 2]"),
    Kind.JSON_OBJECT: (b'{\n "a": 1\n}\n', b'{"images": [', b'{"images": []}', b"{}"),
    Kind.JSON_LINES: (b'{"a": 1}\n', b'{"a": 1}\n{"a": 2}\n', b'{"a": 1}\n{"a'),
    Kind.TEXT: (b"[PAD]\n[UNK]\n", b"DATA: {NAME: refcoco}\n", b"{DATA: {NAME: a}}\n", b"101\n", "§ä\n".encode()),
    Kind.BINARY: (b"PK\x03\x04\0\0", b"\x80\x02]q\x01}", b"\xff\xd8\xff\xe0\0", b"(lp0\n(dp1\n", "ä".encode("utf-16")),
    None: (b"",),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_the_kind_of_a_file_is_that_of_its_content(tmp_path, kind):
    for content in CONTENTS[kind]:
        (tmp_path / "file").write_bytes(content)
        assert kind_of(tmp_path / "file") is kind, content
    assert kind_of(tmp_path / "missing") is None
    assert kind_of(tmp_path) is Kind.FOLDER


def test_a_file_of_another_kind_is_not_replaced(tmp_path):
    path = tmp_path / "file.png"
    for old, new in itertools.permutations([kind for kind in CONTENTS if kind], 2):
        path.write_bytes(CONTENTS[old][0])
        with pytest.raises(UserError, match=f"file.png: it exists and is {old.value}, not {new.value}"):
            check_writable(path, new)
        check_writable(path, old)
        path.write_bytes(b"")
        check_writable(path, new)


@pytest.fixture
def inputs(tmp_path):
    """Files and a folder of images that the running command reads, and other names of the same files."""
    for name in ("a.json", "images/b.png", "elsewhere/c.png", "hard.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(CONTENTS[Kind.JSON_LIST if name == "a.json" else Kind.PNG][0])
    (tmp_path / "images" / "below").mkdir()
    (tmp_path / "images" / "below" / "c.png").symlink_to(tmp_path / "elsewhere" / "c.png")
    (tmp_path / "images" / "d.png").hardlink_to(tmp_path / "hard.png")
    (tmp_path / "link.json").symlink_to("a.json")
    (tmp_path / "same.json").hardlink_to(tmp_path / "a.json")
    (tmp_path / "folder").symlink_to("images")
    with protecting_inputs():
        protect(tmp_path / "a.json", tmp_path / "missing.json", tmp_path / "images")
        yield tmp_path


def test_an_input_is_replaced_under_none_of_its_names(inputs):
    before = contents(inputs)
    for name in ("a.json", "link.json", "same.json", "folder/../a.json", "images/b.png", "folder/b.png",
                 "elsewhere/c.png", "hard.png"):  # fmt: skip
        for write_file in (check_writable, lambda path: write(path, before["a.json"]), append):
            with pytest.raises(UserError, match=r"Cannot write .* input"):
                write_file(inputs / name)
    assert contents(inputs) == before
    assert (inputs / "link.json").is_symlink()
    for name in ("images/new.png", "new.json", "missing.json"):
        write(inputs / name, before["a.json"])


def test_a_folder_with_an_input_is_not_replaced(inputs):
    before = contents(inputs)
    protect(inputs / "elsewhere" / "c.png")
    for name in ("elsewhere", "images", "folder"):
        with pytest.raises(UserError, match="which would be replaced"), atomic_folder(inputs / name):
            pass
    assert contents(inputs) == before


def test_a_command_may_replace_what_it_continues_and_what_earlier_commands_read(inputs):
    release(inputs)
    write(inputs / "a.json", b"[1]")
    with pytest.raises(UserError, match="it is one of the input files"):
        check_writable(inputs / "images" / "b.png", Kind.PNG)
    with protecting_inputs():
        protect(inputs / "a.json")
    write(inputs / "a.json", b"[2]")


def write(path, content):
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def append(path):
    with open_to_append(path) as file:
        file.write(b"more")
