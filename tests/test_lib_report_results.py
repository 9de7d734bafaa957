"""Result files: begun, gone on with, whole; torn and foreign ones."""

import json

import numpy as np
import pytest

from lib.errors import MissingFileError, UserError
from lib.report.results import ResultFile, read_results
from refer.masks import decode_mask, encode_mask

HEADER = {
    "checkpoint": "a.pth", "checkpoint_sha256": "0", "splits": {"val": 2, "testA": 1},
    "protocols": [{"name": "paper", "threshold": None}, {"name": "original", "threshold": None}],
}  # fmt: skip


def line(split, index, protocol, intersection=1, union=2):
    return {
        "split": split, "index": index, "image_id": 1, "ref_id": 1, "ann_id": 1, "sent_id": index, "sentence": "“é”",
        "protocol": protocol, "intersection": intersection, "union": union, "iou": intersection / union, "mask": None,
    }  # fmt: skip


ORDER = (("val", 0), ("val", 1), ("testA", 0))
LINES = [line(split, index, name) for split, index in ORDER for name in ("paper", "original")]


def whole(path, lines=LINES, header=HEADER):
    file = ResultFile(path, header)
    file.begin()
    file.append(lines)
    file.finish()
    return file


def test_a_whole_file_is_ordered_however_it_came_about(tmp_path):
    whole(tmp_path / "a.jsonl")
    order = np.random.default_rng(0).permutation(len(LINES))
    file = whole(tmp_path / "b.jsonl", [LINES[i] for i in order])
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert not file.partial.exists()
    header, lines = read_results(tmp_path / "a.jsonl")
    assert header == {"format": "crossvlt results 1", "complete": True, **HEADER}
    assert header == json.loads((tmp_path / "a.jsonl.settings.json").read_text())
    assert [json.loads(one) for one in (tmp_path / "a.jsonl").read_text().splitlines()] == LINES
    assert lines == LINES


@pytest.mark.parametrize("tail", [b"", b'{"split": "va', b"\xff\xfe"])
def test_going_on_drops_a_torn_line_only(tmp_path, tail):
    first = ResultFile(tmp_path / "a.jsonl", HEADER)
    first.begin()
    first.append(LINES[:3])
    with open(first.partial, "ab") as file:
        file.write(tail)
    second = ResultFile(tmp_path / "a.jsonl", {**HEADER, "checkpoint": "elsewhere/a.pth"})
    second.begin()
    assert list(second.lines()) == LINES[:3]
    assert read_results(second.partial)[0]["complete"] is False
    assert not second.is_finished()
    second.append(LINES[3:])
    second.finish()
    assert second.is_finished()
    assert read_results(second.path)[1] == LINES


def test_a_file_torn_in_its_header_is_begun_anew(tmp_path):
    file = ResultFile(tmp_path / "a.jsonl", HEADER)
    file.partial.write_bytes(b'{"format": "cross')
    file.begin()
    assert list(file.lines()) == []


def test_another_evaluations_lines_are_never_mixed_in(tmp_path):
    ResultFile(tmp_path / "a.jsonl", HEADER).begin()
    other = ResultFile(tmp_path / "a.jsonl", {**HEADER, "checkpoint_sha256": "1"})
    with pytest.raises(UserError, match=r"a\.jsonl\.partial is left from .* another checkpoint_sha256 \(0, now 1\)"):
        other.begin()
    (tmp_path / "a.jsonl.partial").write_text("something else\n")
    with pytest.raises(UserError, match="doesn't belong to a result file"):
        other.begin()
    finished = whole(tmp_path / "b.jsonl")
    assert finished.is_finished()
    assert not ResultFile(tmp_path / "b.jsonl", {**HEADER, "checkpoint_sha256": "1"}).is_finished()
    finished.partial.touch()  # killed between the last line and the settings
    assert not finished.is_finished()
    finished.partial.unlink()
    finished.settings.write_text("{}\n")
    assert not finished.is_finished()


def test_a_whole_file_is_kept_unless_it_is_to_be_replaced(tmp_path):
    path, other = tmp_path / "a.jsonl", {**HEADER, "checkpoint_sha256": "1"}
    whole(path)
    again = ResultFile(path, {**HEADER, "checkpoint": "elsewhere/a.pth", "batch_size": 3})
    again.begin()
    assert list(again.lines()) == LINES
    again.finish()
    assert read_results(path)[1] == LINES
    with pytest.raises(UserError, match=r"is there already, .* \(another checkpoint_sha256: 0, now 1\): name another"):
        ResultFile(path, other).begin()
    replacing = ResultFile(path, other, replace=True)
    replacing.begin()
    assert read_results(path)[0]["checkpoint_sha256"] == "0"  # until the new one is whole
    replacing.append(LINES)
    replacing.finish()
    assert read_results(path)[0]["checkpoint_sha256"] == "1"
    path.write_text("".join(path.read_text().splitlines(True)[:-1]))
    assert not replacing.is_finished()
    with pytest.raises(UserError, match="lines are missing"):
        ResultFile(path, other).begin()
    replacing.settings.unlink()
    with pytest.raises(UserError, match="it isn't a result file"):
        ResultFile(path, other).begin()


def test_damage_is_named(tmp_path):
    with pytest.raises(MissingFileError, match="no result file"):
        read_results(tmp_path / "none.jsonl")
    path = tmp_path / "a.jsonl"
    file = whole(path)
    settings = file.settings.read_text()
    for content in (b"", b"[1]\n", b"\xff\n", b'{"format": "other"}\n'):
        file.settings.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.jsonl\.settings\.json doesn't belong to a result file"):
            read_results(path)
    file.settings.unlink()
    with pytest.raises(UserError, match="keep them together"):
        read_results(path)
    file.settings.write_text(settings)
    lines = path.read_text().splitlines()
    for change in ({"intersection": 3}, {"union": "2"}, {"index": True}, {"protocol": None}, {"split": 1}):
        damaged = [lines[0], json.dumps({**LINES[1], **change}), *lines[2:]]
        path.write_text("\n".join(damaged) + "\n")
        with pytest.raises(UserError, match="line 2 is damaged"):
            read_results(path)


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    file = ResultFile(tmp_path / "a.jsonl", HEADER)
    file.begin()
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"can't write .*a\.jsonl\.partial: No space left"):
        file.append(LINES)


@pytest.mark.parametrize("size", [(1, 1), (4, 7), (33, 2)])
def test_masks_come_back(size):
    several = np.random.default_rng(0).random((5, *size)) < 0.5
    for mask in (*several, np.zeros(size, bool), np.ones(size, bool)):
        rle = json.loads(json.dumps(encode_mask(mask)))
        assert np.array_equal(decode_mask(rle), mask)
    with pytest.raises(ValueError, match="RLE"):
        decode_mask({**rle, "counts": "~~~"})
