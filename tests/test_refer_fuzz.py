"""The annotation reader under benchmarks.fuzz_annotations: some hundred cases, regressions, and that the fuzzer works.

Results of a run with many more cases: benchmarks/results/fuzz_annotations.md.
"""

import io
import json
import os
import pickle
import signal
import sys
import time

import pytest

from benchmarks.fuzz_annotations import __main__ as command
from benchmarks.fuzz_annotations.mutations import INSTANCES, REFS, valid_instances, valid_refs
from benchmarks.fuzz_annotations.pickles import MARKER, colliding_keys, hide_behind_frame, valid_pickles
from benchmarks.fuzz_annotations.run import MUTATIONS, Case, check_message, generate_cases, run_cases
from lib.errors import UserError
from refer.annotations import MAX_LONG_INTEGERS, MAX_SPLIT_LENGTH, read_refs
from refer.masks import MAX_OUTLINE
from refer.refer import REFER

CASES = 200  # of each file
VALID = {REFS: pickle.dumps(valid_refs()), INSTANCES: json.dumps(valid_instances()).encode()}


def valid_case(file):
    return Case(file, "valid", VALID[file])


@pytest.mark.parametrize("file", [REFS, INSTANCES])
def test_mutated_files_are_read_or_refused(file):
    mutations = [
        name for name in MUTATIONS[file] if name != "image sizes"
    ]  # takes seconds: up to 10,000 × 10,000 pixels
    cases = [
        case
        for number, mutation in enumerate(mutations)
        for chunk in generate_cases(file, mutation, (CASES + number) // len(mutations), seed=1)
        for case in chunk
    ]
    outcomes = run_cases(cases)
    assert len(outcomes) == len(cases) == CASES
    pairs = zip(cases, outcomes, strict=True)
    assert not [(case.mutation, outcome.message) for case, outcome in pairs if outcome.verdict == "finding"]
    assert {outcome.verdict for outcome in outcomes} == {"read", "refused"}  # otherwise nothing would be tested


def test_the_same_seed_generates_the_same_cases():
    def generated(seed):
        return [case for chunk in generate_cases(REFS, "bytes", 10, seed) for case in chunk]

    assert generated(3) == generated(3) != generated(4)


def test_valid_files_are_read():
    cases = [Case(REFS, "valid", data) for data in valid_pickles()] + [valid_case(INSTANCES)]
    assert {outcome.verdict for outcome in run_cases(cases)} == {"read"}


# ---- unsafe readers are detected ----


class Call:
    """Calls a function when unpickled."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class UnsafeUnpickler(pickle.Unpickler):
    """Allows every class. Because find_class is overridden, Python reports no audit event for the class itself."""

    def find_class(self, module, name):
        return getattr(sys.modules[module], name)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (os.mkfifo, (MARKER,), "foreign code: a program in a pickle was executed"),
        (os.system, (f"touch {MARKER}",), "foreign code: os.system"),
        (exec, (f"open('{MARKER}', 'w')",), "foreign code: compile"),
        (open, (MARKER, "w"), "foreign code: open"),
        (__import__, ("this",), "foreign code: import"),
        (os._exit, (0,), "the process died with status 0"),
        (os.kill, (0, signal.SIGTERM), "foreign code: os.kill"),
        (sys.exit, (), "SystemExit at "),
        (time.sleep, (100,), "_WrongResultError at run.py"),  # after the time limit
        (bytearray, (2**40,), "MemoryError at "),
    ],
)
def test_a_reader_that_executes_programs(monkeypatch, function, arguments, message):
    monkeypatch.setattr("refer.refer.read_refs", lambda path: UnsafeUnpickler(io.BytesIO(path.read_bytes())).load())
    cases = [Case(REFS, "", pickle.dumps(Call(function, *arguments))), valid_case(REFS)]
    finding, after = run_cases(cases, limit=0.5)
    assert (finding.verdict, finding.message[: len(message)]) == ("finding", message)
    assert after.verdict == "read"  # the next case is not affected


def test_a_reader_that_allows_classes(monkeypatch):
    """Even a harmless class is a finding, and also if the reader catches the audit hook's exception."""

    def read(path):
        try:
            return pickle.loads(path.read_bytes())
        except BaseException:
            return valid_refs()

    monkeypatch.setattr("refer.refer.read_refs", read)
    (finding,) = run_cases([Case(REFS, "", pickle.dumps(Call(list)))])
    assert finding.message.startswith("foreign code: pickle.find_class")


def test_a_reader_that_allows_other_opcodes(monkeypatch):
    monkeypatch.setattr("refer.refer.read_refs", lambda path: pickle.loads(path.read_bytes()))
    (finding,) = run_cases([Case(REFS, "", VALID[REFS][:-1] + b"20.")])  # DUP, POP
    assert "the pickle was read, but does not only contain plain data" in finding.message


def raises(error):
    def read(path):
        raise error

    return read


def refuses(message):
    def read(path):
        raise UserError(message.format(path))

    return read


def is_slow_in_c(path):
    """No signal interrupts this; the time is checked afterwards."""
    sum(range(2 * 10**7))


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (raises(KeyError("id")), "KeyError at "),
        (raises(RecursionError("deep")), "RecursionError at "),
        (refuses(""), "_WrongResultError at run.py"),
        (refuses("{} is\nwrong"), "_WrongResultError at run.py"),
        (refuses("{} is \x1b[31mwrong"), "_WrongResultError at run.py"),
        (refuses("{} is " + "wrong" * 200), "_WrongResultError at run.py"),
        (refuses("a file is wrong"), "_WrongResultError at run.py"),
        (lambda path: os.kill(os.getpid(), signal.SIGSEGV), "the process died with status -11"),
        (is_slow_in_c, "_WrongResultError at run.py"),
    ],
)
def test_a_reader_that_fails(monkeypatch, read, message):
    monkeypatch.setattr("refer.refer.read_instances", read)
    (finding,) = run_cases([valid_case(INSTANCES)], limit=0.1)
    assert (finding.verdict, finding.message[: len(message)]) == ("finding", message)


def test_a_reader_that_allows_paths_outside_of_the_image_folder(monkeypatch):
    instances = valid_instances()
    instances["images"][0]["file_name"] = "a/../../b.jpg"
    monkeypatch.setattr("refer.refer.read_instances", lambda path: instances)
    (finding,) = run_cases([valid_case(INSTANCES)])
    assert "is outside the image folder" in finding.message


def test_the_command_saves_findings_and_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(MUTATIONS, REFS, {"truncated": MUTATIONS[REFS]["truncated"]})
    monkeypatch.delitem(MUTATIONS, INSTANCES)
    flags = ["--cases", "2", "--keep", str(tmp_path / "findings"), "--out", str(tmp_path / "page.md")]
    monkeypatch.setattr(sys, "argv", ["fuzz_annotations", *flags])
    command.main()
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == page
    assert "| all |  | 0 | 2 | 0 |" in page
    assert not (tmp_path / "findings").exists()
    monkeypatch.setattr("refer.refer.read_refs", raises(KeyError("id")))
    with pytest.raises(UserError, match=r"^2 findings\. Their files are in .*findings\.$"):
        command.main()
    assert "| all |  | 0 | 0 | 2 |" in (tmp_path / "page.md").read_text(encoding="utf-8")
    assert sorted(path.suffix for path in (tmp_path / "findings").iterdir()) == [".p", ".p", ".txt", ".txt"]
    monkeypatch.setattr(sys, "argv", ["fuzz_annotations", "--cases", "0"])
    with pytest.raises(UserError, match="must be positive"):
        command.main()


# ---- regressions: what the fuzzer found ----


def error_message(root, refs=None, instances=None):
    """The message of the UserError when a dataset is opened and the mask of ref 0 is drawn."""
    folder = root / "refcoco"
    folder.mkdir(exist_ok=True)
    (folder / REFS).write_bytes(refs if isinstance(refs, bytes) else pickle.dumps(refs or valid_refs()))
    (folder / INSTANCES).write_text(json.dumps(instances or valid_instances()))
    with pytest.raises(UserError) as caught:
        REFER(root).getMask(0)
    check_message(str(caught.value), root)
    return str(caught.value)


@pytest.mark.parametrize("opcodes", [b"}K\x01" + b"\x85" * 200_000 + b"K\x01s", b"r\xff\xff\xff\x7f", b"20"])
def test_frames_do_not_hide_opcodes(opcodes):
    """The first ones crashed the interpreter, the second ones allocated 32 GiB."""
    hidden, valid = hide_behind_frame(opcodes), pickle.dumps(valid_refs(), 2)
    alone, before = run_cases([Case(REFS, "", data) for data in (hidden + b".", valid[:2] + hidden + valid[2:])])
    assert alone.verdict == "refused"
    assert before.verdict == ("read" if opcodes == b"20" else "refused")  # without frames, b"20" is plain text


def test_a_persistent_id_hidden_by_a_frame(tmp_path):
    data = pickle.dumps(valid_refs(), 2)[2:-1]
    length = (len(data) + 6).to_bytes(8, "little")
    path = tmp_path / "refs.p"
    path.write_bytes(b"\x80\x04\x95" + length + data + b"X\x04\0\0\0thisQ0.")  # the frame ends within "this"
    with pytest.raises(UserError, match="refers to an object outside the file"):
        read_refs(path)


@pytest.mark.parametrize("protocol", [4, 5])
def test_valid_frames_are_read(tmp_path, protocol):
    refs = valid_refs()
    refs[0]["sent_ids"] = list(range(100_000))
    data = pickle.dumps(refs, protocol)
    assert data.count(b"\x95") > 3
    (tmp_path / "refs.p").write_bytes(data)
    assert read_refs(tmp_path / "refs.p") == refs


@pytest.mark.parametrize("form", ["binary", "text"])
def test_keys_with_one_hash(tmp_path, form):
    message = error_message(tmp_path, b"\x80\x02]" + colliding_keys(60_000, form) + b"a.")
    assert "too many integers beyond 64 bits" in message or "not plain data" in message


def test_a_few_large_integers_are_read(tmp_path):
    refs = valid_refs()
    refs[0]["sent_ids"] = [2**70] * MAX_LONG_INTEGERS
    (tmp_path / "refs.p").write_bytes(pickle.dumps(refs, 2))
    assert read_refs(tmp_path / "refs.p") == refs


@pytest.mark.parametrize("split", ["a\nb", "\x1b[31mred", "../../x", "..\\x", "a" * (MAX_SPLIT_LENGTH + 1), "\u2028"])
def test_invalid_names_of_splits(tmp_path, split):
    refs = valid_refs()
    refs[1]["split"] = split
    message = error_message(tmp_path, refs)
    assert "refs[1] (ref_id 1): split '" in message
    assert message.endswith(" is not a valid name")


@pytest.mark.parametrize("name", ["a\nb.jpg", "\x1b[31m.jpg", "../" + "a" * 100_000, "\x85.jpg"])
def test_messages_with_invalid_file_names(tmp_path, name):
    instances = valid_instances()
    instances["images"][0]["file_name"] = name
    assert error_message(tmp_path, None, instances).endswith(" is not a path below the image folder")


def test_long_names_are_truncated_in_messages(tmp_path):
    assert "Python object 'aaa" in error_message(tmp_path, b"c" + b"a" * 100_000 + b"\nb\n.")


def test_limits_of_the_work_per_object(tmp_path):
    """Many polygons on a large image, long polygons on a small image, and an image of too many pixels."""
    instances = valid_instances()
    image, annotation = instances["images"][0], instances["annotations"][0]
    square = annotation["segmentation"][0]
    image["width"] = image["height"] = 10_000
    annotation["segmentation"] = [square] * 11
    assert error_message(tmp_path, None, instances).endswith(
        "11 polygons and RLEs are too many for an image of 10000x10000"
    )
    image["width"] = 10_001
    assert error_message(tmp_path, None, instances).endswith(
        "has 10001x10000 pixels. At most 100,000,000 are supported."
    )
    image["width"] = image["height"] = 640
    annotation["segmentation"] = [[0, 0, 639, 639] * 1000] * 4
    assert error_message(tmp_path, None, instances).endswith(
        f"the outline of the polygons is longer than {MAX_OUTLINE} pixels"
    )
