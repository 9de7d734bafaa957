"""Generate mutated annotation files and run the annotation reader on them in child processes."""

import codecs
import faulthandler
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import numpy as np
from hypothesis import strategies as st

from benchmarks.fuzz_annotations.json_files import JSON_MUTATIONS
from benchmarks.fuzz_annotations.mutations import INSTANCES, REFS, valid_instances, valid_refs
from benchmarks.fuzz_annotations.pickles import MARKER, PICKLE_MUTATIONS, is_plain
from lib.errors import UserError
from refer.refer import REFER
from utils import derive_seed

MUTATIONS: dict[str, dict[str, Callable[[st.DrawFn], bytes]]] = {REFS: PICKLE_MUTATIONS, INSTANCES: JSON_MUTATIONS}
SPLITS = ("train", "val", "testA", "testB", "testC", "test", "")
MAX_MESSAGE = 1000  # characters
CASES_PER_PROCESS = 200
MAX_CALLS = 40  # of the reader per case; a process that runs longer than MAX_CALLS × limit is killed
GIB = 2**30
UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class Case(NamedTuple):
    """A mutated file. It is used together with the valid version of the other file."""

    file: str  # REFS or INSTANCES
    mutation: str
    data: bytes


class Outcome(NamedTuple):
    """Result of a case."""

    verdict: str  # "read", "refused" (with a UserError) or "finding"
    message: str  # message of the UserError, or description of the finding
    seconds: float
    memory: float = 0  # peak memory of the process so far in GiB, of this case or an earlier one


def generate_cases(file: str, mutation: str, count: int, seed: int) -> Iterator[list[Case]]:
    """Yield ``count`` cases as lists, one list per process. They depend only on the seed, this code and Hypothesis."""
    for start in range(0, count, CASES_PER_PROCESS):
        expected = min(CASES_PER_PROCESS, count - start)
        cases: list[Case] = []
        while len(cases) < expected:  # Hypothesis stops early when it finds nothing new
            derived = derive_seed(seed, file, mutation, start, len(cases))
            for data in _generate(MUTATIONS[file][mutation], expected - len(cases), derived):
                cases.append(Case(file, mutation, data))
        yield cases


def _generate(mutation: Callable[[st.DrawFn], bytes], count: int, seed: int) -> list[bytes]:
    generated: list[bytes] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        phases=[hypothesis.Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.composite(mutation)())
    def collect(data: bytes) -> None:
        generated.append(data)

    collect()
    return generated[:count]


def run_cases(cases: list[Case], limit: float = 10, memory: float = 4) -> list[Outcome]:
    """Run cases in a child process. If it dies or hangs, that case is a finding, and a new process runs the rest.

    Args:
        cases: the cases to run.
        limit: seconds that each call of the reader may take.
        memory: GiB that the process may allocate.
    """
    context = multiprocessing.get_context("fork")
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="fuzz_") as root:
        while len(outcomes) < len(cases):
            receiver, sender = context.Pipe(duplex=False)
            remaining = cases[len(outcomes) :]
            process = context.Process(target=_run_in_child, args=(remaining, Path(root), limit, memory, sender))
            process.start()
            sender.close()
            try:
                while len(outcomes) < len(cases):
                    if not receiver.poll(MAX_CALLS * limit):
                        process.kill()
                        outcomes.append(Outcome("finding", "the process hung and was killed", MAX_CALLS * limit))
                        break
                    outcomes.append(receiver.recv())
            except EOFError:
                process.join()
                outcomes.append(Outcome("finding", f"the process died with status {process.exitcode}", 0))
            process.join()
    return outcomes


def _run_in_child(cases: list[Case], root: Path, limit: float, memory: float, results: Connection) -> None:
    def raise_timeout(signum: int, frame: Any) -> None:
        raise _TimeoutError(f"more than {limit} s")

    folder = root / "refcoco"
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)  # programs in pickles write their marker here
    faulthandler.disable()  # enabled by pytest; crashes are expected here and reported as findings
    hook = AuditHook(folder)
    signal.signal(signal.SIGALRM, raise_timeout)
    # This run and these imports load modules that could not be loaded while the audit hook is active.
    run_case(Case(REFS, "valid", pickle.dumps(valid_refs())), root, hook, limit)
    for encoding in ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"):
        codecs.lookup(encoding)
    warnings.simplefilter("ignore")  # a warning would open the source file to show a line
    hook.install()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (int(address_space + memory * GIB),) * 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in cases:
        outcome = run_case(case, root, hook, limit)
        allocated = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # in KiB
        results.send(outcome._replace(memory=allocated / 2**20))


class AuditHook:
    """Audit hook that allows nothing but opening the two annotation files while a case runs.

    Python reports imports, compilation, processes, sockets, opened files and the classes in a pickle as audit events.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.active = f"{folder}{os.sep}", False
        self.events: list[str] = []

    def install(self) -> None:
        sys.addaudithook(self._check)

    def _check(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open":
            path, _, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and str(path).startswith(self.folder):
                return
        self.events.append(f"{event} {arguments!r}"[:200])
        raise _ForeignCodeError(self.events[-1])


class _TimeoutError(BaseException):
    """A call of the reader took too long. Not an Exception, which the reader may catch."""


class _ForeignCodeError(BaseException):
    """Raised before the foreign code runs."""


class _WrongResultError(Exception):
    """The reader returned a wrong result or raised an error with a bad message."""


def run_case(case: Case, root: Path, hook: AuditHook, limit: float) -> Outcome:
    """Write the case's file and the valid version of the other one, and use both. Exceptions become outcomes."""
    folder = root / "refcoco"
    files = {REFS: pickle.dumps(valid_refs(), 2), INSTANCES: json.dumps(valid_instances()).encode()}
    for name, data in (files | {case.file: case.data}).items():
        (folder / name).write_bytes(data)
    started = time.perf_counter()
    hook.active, hook.events = True, []
    try:
        refusals = use_dataset(root, limit)
        hook.active = False
        _require(
            case.file == INSTANCES or bool(refusals) or is_plain(case.data),
            "the pickle was read, but does not only contain plain data",
        )
        verdict, message = ("refused", refusals[0]) if refusals else ("read", "")
    except BaseException as error:  # every other exception is a finding
        hook.active = False
        last = traceback.extract_tb(error.__traceback__)[-1]
        verdict = "finding"
        message = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {str(error)[:300]}"
    seconds = time.perf_counter() - started
    if hook.events:  # also if the reader caught the exception of the audit hook
        verdict, message = "finding", f"foreign code: {hook.events[0]}"
    if os.path.lexists(MARKER):
        shutil.rmtree(MARKER) if os.path.isdir(MARKER) else os.unlink(MARKER)
        verdict, message = "finding", "foreign code: a program in a pickle was executed"
    return Outcome(verdict, message, seconds)


def use_dataset(root: Path, limit: float) -> list[str]:
    """Open a dataset and use all of it: splits, records, image paths, boxes, masks.

    Returns:
        The messages of the UserErrors.

    Raises:
        BaseException: anything else is a finding.
    """
    refusals: list[str] = []

    def call(function: Callable[..., Any], *arguments: Any, may_be_absent: bool = False) -> Any:
        started = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, limit)
        try:
            return function(*arguments)
        except UserError as error:
            check_message(str(error), root)
            if not may_be_absent:
                refusals.append(str(error))
            return None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            seconds = time.perf_counter() - started  # a signal does not stop C code
            _require(seconds <= limit, f"{function.__name__} took {seconds:.1f} s")

    refer = call(REFER, root)
    if refer is None:
        return refusals
    for split in SPLITS:
        call(refer.getRefIds, (), (), (), split, may_be_absent=True)
    for split in dict.fromkeys((*refer.splits(), *(call(refer.choose_splits, "all") or ()))):
        _require(type(split) is str and len(refer.getRefIds(split=split)) > 0, f"split {split!r} is empty")
        _require(not set("/\\\0\n") & set(split), f"split {split!r} cannot be part of a file name")
    image_folder = os.path.normpath(refer.image_dir) + os.sep
    for ref in refer.loadRefs(refer.getRefIds()):
        image = refer.loadImgs(ref["image_id"])[0]
        path = os.path.normpath(refer.get_image_path(image["id"]))
        _require(path.startswith(image_folder) and "\0" not in path, f"{path!r} is outside the image folder")
        for sentence in ref["sentences"]:
            text = sentence["raw"] if "raw" in sentence else sentence["sent"]
            _require(type(text) is str and text.encode().decode() == text, "a sentence is not text")
        box = call(refer.getRefBox, ref["ref_id"])
        _require(box is None or bool(np.isfinite(np.array(box, float)).all()), f"box {box} is not finite")
        for mode in ("paper", "union"):
            drawn = call(refer.getMask, ref, mode)
            if drawn is not None:
                mask, area = drawn["mask"], drawn["area"]
                _require(mask.shape == (image["height"], image["width"]), "a mask does not have the image's size")
                _require(
                    mask.max() <= 1 and area == np.count_nonzero(mask),
                    "a mask contains other values than 0 and 1, or its area is wrong",
                )
    return refusals


def check_message(message: str, root: Path) -> None:
    """Raise an exception unless an error message is one short, printable line that names one of the files."""
    start = repr(message[:300])
    _require(bool(message) and not UNPRINTABLE.search(message), f"the message is empty or not one line: {start}")
    files = (str(root / "refcoco" / file) for file in (REFS, INSTANCES))
    _require(any(file in message for file in files), f"the message names no file: {start}")
    _require("MemoryError" not in message, f"no memory was left: {start}")
    _require(len(message) < MAX_MESSAGE, f"the message has {len(message)} characters: {start}")


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise _WrongResultError(problem)
