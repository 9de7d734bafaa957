"""lib.files: atomic writes and checks of output files."""

import pytest

from lib.errors import UserError
from lib.files import atomic_write, check_writable


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


def test_check_writable_rejects_folders_inputs_and_other_suffixes(tmp_path):
    image = tmp_path / "images" / "a.png"
    image.parent.mkdir()
    image.write_bytes(b"image")
    check_writable(tmp_path / "new" / "b.png", suffix=".png", inputs=[image])
    for path, suffix, message in (
        (tmp_path, "", "it is a folder"),
        (tmp_path / "b.txt", ".png", r"the name must end in \.png"),
        (image, "", "it is one of the input files"),
        (image / "b.png", "", "Cannot write"),
    ):
        with pytest.raises(UserError, match=message):
            check_writable(path, suffix=suffix, inputs=[tmp_path / "images"])
