"""refer.refer under benchmarks.fuzz_annotations: a few hundred of its cases, that it can fail, and what it has found.

The recorded run, of many more cases: benchmarks/results/fuzz_annotations.md.
"""

import io
import json
import os
import pickle
import signal
import sys
import time

import pytest

from benchmarks import fuzz_annotations as fuzz
from benchmarks.fuzz_annotations import Case
from benchmarks.fuzz_json import json_kinds
from benchmarks.fuzz_pickles import behind_a_frame, colliding, pickle_kinds, pickles
from benchmarks.fuzz_sets import INSTANCES, MARKER, REFS, realistic_set, small_set
from lib.errors import UserError
from refer.annotations import MAX_LONG_INTEGERS, MAX_SPLIT_LENGTH
from refer.annotations import read_refs as read_refs_right
from refer.masks import MAX_OUTLINE
from refer.refer import REFER

CASES = 200  # of each file


@pytest.mark.parametrize("file", [REFS, INSTANCES])
def test_mutated_files_are_read_or_refused(file):
    kinds = list(pickle_kinds() if file == REFS else json_kinds())
    if file == INSTANCES:
        kinds.remove("pictures' sizes")  # up to 10,000 × 10,000 pixels, which takes seconds
    cases = [
        case
        for row, kind in enumerate(kinds)
        for chunk in fuzz.cases_of(file, kind, (CASES + row) // len(kinds), seed=1)
        for case in chunk
    ]
    outcomes = fuzz.outcomes(cases)
    assert len(outcomes) == len(cases) == CASES
    found = [(case.kind, case.base, outcome.told) for case, outcome in zip(cases, outcomes, strict=True)
             if outcome.verdict == "finding"]  # fmt: skip
    assert not found
    assert {outcome.verdict for outcome in outcomes} == {"read", "refused"}  # else nothing would be tried


def test_the_same_seed_gives_the_same_cases():
    def drawn(seed):
        return [case for chunk in fuzz.cases_of(REFS, "bytes changed", 10, seed) for case in chunk]

    assert drawn(3) == drawn(3) != drawn(4)


def test_valid_files_are_read():
    refs, instances = realistic_set()
    cases = [Case(REFS, "valid", base, data) for base in ("small", "realistic") for data in pickles(base)]
    cases.append(Case(INSTANCES, "valid", "realistic", json.dumps(instances).encode()))
    assert {outcome.verdict for outcome in fuzz.outcomes(cases)} == {"read"}
    assert len(refs) == len(instances["annotations"])


class Calls:
    """Calls something when unpickled."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class AnyClass(pickle.Unpickler):
    """What refer.annotations must not be. It asks nobody, so that no hook is told of the class itself."""

    def find_class(self, module, name):
        return getattr(sys.modules[module], name)


@pytest.mark.parametrize(
    ("function", "arguments", "told"),
    [
        (os.mkfifo, (MARKER,), "foreign code: a pickle's program has left its marker"),
        (os.system, (f"touch {MARKER}",), "foreign code: os.system"),
        (exec, (f"open('{MARKER}', 'w')",), "foreign code: compile"),
        (open, (MARKER, "w"), "foreign code: open"),
        (__import__, ("this",), "foreign code: import"),
        (os._exit, (0,), "the process died with status 0"),
        (os.kill, (0, signal.SIGTERM), "foreign code: os.kill"),
        (sys.exit, (), "SystemExit at "),
        (time.sleep, (100,), "_FaultError at "),  # after the limit
        (bytearray, (2**40,), "MemoryError at "),
    ],
)
def test_a_reader_that_runs_programs_is_found(monkeypatch, function, arguments, told):
    monkeypatch.setattr("refer.refer.read_refs", lambda path: AnyClass(io.BytesIO(path.read_bytes())).load())
    cases = [Case(REFS, "", "small", pickle.dumps(Calls(function, *arguments))), valid(REFS)]
    found, after = fuzz.outcomes(cases, limit=0.5)
    assert (found.verdict, found.told[: len(told)]) == ("finding", told)
    assert after.verdict == "read"  # whatever has become of the process


def valid(file):
    refs, instances = small_set()
    return Case(file, "valid", "small", pickle.dumps(refs) if file == REFS else json.dumps(instances).encode())


def test_a_reader_that_allows_classes_is_found(monkeypatch):
    """The most harmless of all; and where the reader catches what the hook raises, it is found too."""

    def read(path):
        try:
            return pickle.loads(path.read_bytes())
        except BaseException:
            return small_set()[0]

    monkeypatch.setattr("refer.refer.read_refs", read)
    (found,) = fuzz.outcomes([Case(REFS, "", "small", pickle.dumps(Calls(list)))])
    assert found.told.startswith("foreign code: pickle.find_class")


def test_plain_data_only_is_held_to_its_word(monkeypatch):
    monkeypatch.setattr("refer.refer.read_refs", lambda path: pickle.loads(path.read_bytes()))
    (found,) = fuzz.outcomes([Case(REFS, "", "small", valid(REFS).data[:-1] + b"20.")])  # DUP, POP
    assert "read, though not only plain data" in found.told


def wrong(what):
    def read(path):
        raise what

    return read


def too_slow(path):
    """In C, which no signal stops: the time is looked at afterwards."""
    sum(range(2 * 10**7))


@pytest.mark.parametrize(
    ("read", "told"),
    [
        (wrong(KeyError("id")), "KeyError at "),
        (wrong(RecursionError("deep")), "RecursionError at "),
        (wrong(UserError("")), "_FaultError at fuzz_annotations.py"),
        (lambda path: wrong(UserError(f"{path} is\nwrong"))(path), "_FaultError at fuzz_annotations.py"),
        (lambda path: wrong(UserError(f"{path} is \x1b[31mwrong"))(path), "_FaultError at fuzz_annotations.py"),
        (lambda path: wrong(UserError(f"{path} is {'wrong' * 200}"))(path), "_FaultError at fuzz_annotations.py"),
        (wrong(UserError("a file is wrong")), "_FaultError at fuzz_annotations.py"),
        (lambda path: os.kill(os.getpid(), signal.SIGSEGV), "the process died with status -11"),
        (too_slow, "_FaultError at fuzz_annotations.py"),
    ],
)
def test_a_reader_that_fails_is_found(monkeypatch, read, told):
    monkeypatch.setattr("refer.refer.read_instances", read)
    (found,) = fuzz.outcomes([valid(INSTANCES)], limit=0.1)
    assert (found.verdict, found.told[: len(told)]) == ("finding", told)


def test_a_path_out_of_the_image_folder_is_found(monkeypatch):
    instances = small_set()[1]
    instances["images"][0]["file_name"] = "a/../../b.jpg"
    monkeypatch.setattr("refer.refer.read_instances", lambda path: instances)
    (found,) = fuzz.outcomes([valid(INSTANCES)])
    assert "is out of the image folder" in found.told


def test_findings_are_kept_and_end_the_benchmark(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "json_kinds", lambda: {})
    monkeypatch.setattr(fuzz, "pickle_kinds", lambda: {"cut": pickle_kinds()["cut"]})
    flags = ["--cases", "2", "--keep", str(tmp_path / "kept"), "--out", str(tmp_path / "page.md")]
    monkeypatch.setattr(sys, "argv", ["fuzz_annotations", *flags])
    fuzz.main()
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == page
    assert "| all | | 0 | 2 | 0 |" in page
    assert not (tmp_path / "kept").exists()
    monkeypatch.setattr("refer.refer.read_refs", wrong(KeyError("id")))
    with pytest.raises(UserError, match=r"2 findings; the files are in .*kept"):
        fuzz.main()
    assert "| all | | 0 | 0 | 2 |" in (tmp_path / "page.md").read_text(encoding="utf-8")
    assert sorted(path.suffix for path in (tmp_path / "kept").iterdir()) == [".p", ".p", ".txt", ".txt"]
    monkeypatch.setattr(sys, "argv", ["fuzz_annotations", "--cases", "0"])
    with pytest.raises(UserError, match="must be positive"):
        fuzz.main()


def told(root, refs=None, instances=None, ref_id=1):
    """What is told of a set, or of one mask of it."""
    folder = root / "refcoco"
    folder.mkdir(exist_ok=True)
    right = small_set()
    (folder / REFS).write_bytes(refs if isinstance(refs, bytes) else pickle.dumps(refs or right[0]))
    (folder / INSTANCES).write_text(json.dumps(instances or right[1]))
    with pytest.raises(UserError) as caught:
        REFER(root).getMask(ref_id)
    message = str(caught.value)
    assert not fuzz.fault_of(message, root)
    return message


@pytest.mark.parametrize("hidden", [b"}K\x01" + b"\x85" * 200_000 + b"K\x01s", b"r\xff\xff\xff\x7f", b"20"])
def test_frames_do_not_hide_opcodes(hidden):
    """The first one crashed the interpreter, the second one asked for 32 GiB."""
    hiding, right = behind_a_frame(hidden), valid(REFS).data
    cases = [Case(REFS, "", "small", data) for data in (hiding + b".", right[:2] + hiding + right[2:])]
    alone, before = fuzz.outcomes(cases)
    assert alone.verdict == "refused"
    assert before.verdict == ("read" if hidden == b"20" else "refused")  # it is text, and then a good one


def test_a_program_hidden_by_a_frame_is_refused(tmp_path):
    data = pickle.dumps(small_set()[0], 2)[2:-1]
    ends = (len(data) + 6).to_bytes(8, "little")
    path = tmp_path / "refs.p"
    path.write_bytes(b"\x80\x04\x95" + ends + data + b"X\x04\0\0\0thisQ0.")  # the frame ends in "this"
    with pytest.raises(UserError, match="refers to an object outside the file"):
        read_refs_right(path)


@pytest.mark.parametrize("protocol", [4, 5])
def test_frames_are_read(tmp_path, protocol):
    refs = small_set()[0]
    refs[0]["sent_ids"] = list(range(100_000))
    data = pickle.dumps(refs, protocol)
    assert data.count(b"\x95") > 3
    (tmp_path / "refs.p").write_bytes(data)
    assert read_refs_right(tmp_path / "refs.p") == refs


@pytest.mark.parametrize("form", ["binary", "text"])
def test_keys_of_one_hash(tmp_path, form):
    keys = colliding(60_000, form)
    message = told(tmp_path, b"\x80\x02]" + keys + b"a.")
    assert "too many integers beyond 64 bits" in message or "not plain data" in message


def test_few_large_integers_are_read(tmp_path):
    refs = small_set()[0]
    refs[0]["sent_ids"] = [2**70] * MAX_LONG_INTEGERS
    (tmp_path / "refs.p").write_bytes(pickle.dumps(refs, 2))
    assert read_refs_right(tmp_path / "refs.p") == refs


@pytest.mark.parametrize("split", ["a\nb", "\x1b[31mred", "../../x", "..\\x", "a" * (MAX_SPLIT_LENGTH + 1), "\u2028"])
def test_splits_are_names(tmp_path, split):
    refs = small_set()[0]
    refs[1]["split"] = split
    message = told(tmp_path, refs)
    assert "refs[1] (ref_id 2): split '" in message
    assert message.endswith(" is not a valid name")


@pytest.mark.parametrize("name", ["a\nb.jpg", "\x1b[31m.jpg", "../" + "a" * 100_000, "\x85.jpg"])
def test_file_names_do_not_break_messages(tmp_path, name):
    instances = small_set()[1]
    instances["images"][0]["file_name"] = name
    assert told(tmp_path, None, instances).endswith(" is not a path below the image folder")


def test_long_names_are_cut_in_messages(tmp_path):
    assert "Python object 'aaa" in told(tmp_path, b"c" + b"a" * 100_000 + b"\nb\n.")


def test_work_on_an_object_is_bounded(tmp_path):
    """Many small polygons of a large picture, many long ones of a small, and more pixels than a picture has."""
    instances = small_set()[1]
    image, annotation = instances["images"][0], instances["annotations"][0]
    square = annotation["segmentation"][0]
    image["width"] = image["height"] = 10_000
    annotation["segmentation"] = [square] * 11
    assert told(tmp_path, None, instances).endswith("11 polygons and RLEs are too many for an image of 10000x10000")
    image["width"] = 10_001
    assert told(tmp_path, None, instances).endswith("has 10001x10000 pixels. At most 100,000,000 are supported.")
    image["width"] = image["height"] = 640
    annotation["segmentation"] = [[0, 0, 639, 639] * 1000] * 4
    assert told(tmp_path, None, instances).endswith(f"the outline of the polygons is longer than {MAX_OUTLINE} pixels")
