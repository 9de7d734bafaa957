"""Give the annotation reader damaged and hostile files, thousands of them, and look at what becomes of each.

    python -m benchmarks.fuzz_annotations --cases 10000 --out benchmarks/results/fuzz_annotations.md

So many pickles of refs and so many instances.json are mutated, each is put beside the other file in its valid form,
opened, and used as a user does: splits, records, boxes, paths, masks. Each must be read or refused by a UserError
that is one short line and names a file. Anything else is a finding and makes this fail: another exception, a process
that dies, too much time or memory, a path out of the image folder, and whatever hints at foreign code (an import, a
file opened, a program started; see Watch). The mutations are Hypothesis's: the same for the same --seed, as long as it
and the code, from which it takes numbers and texts, are the same.
"""

import codecs
import collections
import faulthandler
import json
import multiprocessing
import os
import pickle
import platform
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import numpy as np
from hypothesis import strategies as st

from benchmarks.forward import cpu_name
from benchmarks.fuzz_json import json_kinds
from benchmarks.fuzz_pickles import is_plain, pickle_kinds, pickles
from benchmarks.fuzz_sets import INSTANCES, MARKER, REFS, sets
from lib.cli import Parser, run_command
from lib.errors import UserError
from lib.files import check_writable, write_text
from refer.refer import REFER
from utils import derive_seed

SPLITS = ("train", "val", "testA", "testB", "testC", "test", "")
MAX_MESSAGE = 1000  # characters
CHUNK = 200  # cases that a process runs, one after the other
CALLS = 40  # of the reader in a case, at most: so many limits until its process is killed
GIB = 2**30


class Case(NamedTuple):
    """One mutated file, to be put beside the other file of its set."""

    file: str
    kind: str
    base: str
    data: bytes


class Outcome(NamedTuple):
    """`verdict`: read, refused or finding. `told`: the refusal, or what is wrong."""

    verdict: str
    told: str
    seconds: float
    memory: float = 0  # GiB that the process has taken at most since it began, with this case or an earlier one


def cases_of(file: str, kind: str, count: int, seed: int) -> Iterator[list[Case]]:
    """That many cases of a kind, in chunks; the same for the same seed, code and version of Hypothesis."""
    strategy = (pickle_kinds() if file == REFS else json_kinds())[kind]
    for start in range(0, count, CHUNK):
        wanted = min(CHUNK, count - start)
        found: list[Case] = []
        while len(found) < wanted:  # Hypothesis ends early where it finds nothing new
            drawn = _drawn(strategy, wanted - len(found), derive_seed(seed, file, kind, start, len(found)))
            found += [Case(file, kind, *one) for one in drawn]
        yield found


def _drawn(strategy: st.SearchStrategy[Any], most: int, seed: int) -> list[Any]:
    found = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=most,
        phases=[hypothesis.Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def collect(one: Any) -> None:
        found.append(one)

    collect()
    return found[:most]


class _TimeUpError(BaseException):
    """Not an Exception, which a reader may catch."""


class _ForeignCodeError(BaseException):
    """Raised where it would begin, so that it does not."""


class _FaultError(Exception):
    """What was read or refused, but not as it should be."""


class Watch:
    """An audit hook: while a case is under way, its two files may be opened for reading, and nothing else be done that
    Python tells of: imports, compiling, programs, sockets, other files, a pickle's classes."""

    def __init__(self) -> None:
        self.folder, self.seen = "", []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.folder:
            return
        if event == "open":
            path, _, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and str(path).startswith(self.folder + os.sep):
                return
        self.seen.append(f"{event} {arguments!r}"[:200])
        raise _ForeignCodeError(self.seen[-1])


def use(root: Path, limit: float) -> list[str]:
    """Open a set and call everything that a user calls, each for `limit` seconds at most.

    Returns:
        What was refused on the way.
    Raises:
        Whatever is a finding.
    """
    told: list[str] = []

    def call(function: Callable[..., Any], *arguments: Any, absent: bool = False) -> Any:
        started = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, limit)
        try:
            return function(*arguments)
        except UserError as error:
            fault = fault_of(str(error), root)
            _must(not fault, f"{fault}: {str(error)[:300]!r}")
            if not absent:
                told.append(str(error))
            return None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            seconds = time.perf_counter() - started
            _must(seconds <= limit, f"{function.__name__} took {seconds:.1f} s")  # C code does not stop for a signal

    refer = call(REFER, root)
    if refer is None:
        return told
    for split in SPLITS:
        call(refer.getRefIds, (), (), (), split, absent=True)
    for split in dict.fromkeys((*refer.splits(), *(call(refer.choose_splits, "all") or ()))):
        _must(type(split) is str and len(refer.getRefIds(split=split)) > 0, f"nothing in split {split!r}")
        _must(not set("/\\\0\n") & set(split), f"split {split!r} cannot be part of a file's name")
    top = os.path.normpath(refer.image_dir)
    for ref in refer.loadRefs(refer.getRefIds()):
        image = refer.loadImgs(ref["image_id"])[0]
        path = os.path.normpath(refer.get_image_path(image["id"]))
        _must(path.startswith(top + os.sep) and "\0" not in path, f"{path!r} is out of the image folder")
        for sentence in ref["sentences"]:
            text = sentence["raw"] if "raw" in sentence else sentence["sent"]
            _must(type(text) is str and text.encode().decode() == text, "a sentence that is not text")
        box = call(refer.getRefBox, ref["ref_id"])
        _must(box is None or bool(np.isfinite(np.array(box, float)).all()), f"a box {box}")
        for mode in ("paper", "union"):
            drawn = call(refer.getMask, ref, mode)
            if drawn is not None:
                mask, area = drawn["mask"], drawn["area"]
                right = mask.shape == (image["height"], image["width"]) and mask.max() <= 1
                _must(right and area == np.count_nonzero(mask), "a mask that is none of the picture")
    return told


def _must(right: bool, fault: str) -> None:
    if not right:
        raise _FaultError(fault)


def fault_of(message: str, root: Path) -> str:
    """What is wrong with a refusal's message, or nothing."""
    if not message or re.search("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", message):
        return "a message that is empty, of several lines, or has control characters"
    if not any(str(root / "refcoco" / file) in message for file in (REFS, INSTANCES)):
        return "a message that names no file"
    if "MemoryError" in message:
        return "a message that memory ran out"
    return "" if len(message) < MAX_MESSAGE else f"a message of {len(message)} characters"


def judge(case: Case, root: Path, watch: Watch, limit: float) -> Outcome:
    """Use the set with the case's file in it; whatever is raised becomes an outcome."""
    folder = root / "refcoco"
    refs, instances = sets()[case.base]
    files = {REFS: pickle.dumps(refs, 2), INSTANCES: json.dumps(instances).encode(), case.file: case.data}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    verdict, told = "finding", ""
    started = time.perf_counter()
    try:
        watch.folder, watch.seen = str(folder), []
        refused = use(root, limit)
        verdict, told = ("refused", refused[0]) if refused else ("read", "")
        watch.folder = ""
        _must(case.file == INSTANCES or bool(refused) or is_plain(case.data), "read, though not only plain data")
    except BaseException as error:  # all of them are what is looked for
        watch.folder = ""
        last = traceback.extract_tb(error.__traceback__)[-1]
        told = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {str(error)[:300]}"
    finally:
        watch.folder = ""
    seconds = time.perf_counter() - started
    if watch.seen:  # also where a reader has caught what the hook raises
        verdict, told = "finding", f"foreign code: {watch.seen[0]}"
    if os.path.lexists(MARKER):
        os.rmdir(MARKER) if os.path.isdir(MARKER) else os.unlink(MARKER)
        verdict, told = "finding", "foreign code: a pickle's program has left its marker"
    return Outcome(verdict, told, seconds)


def _run(cases: list[Case], root: str, limit: float, memory: float, results: Connection) -> None:
    """In a process of its own: judge cases, in the folder that their pickles' programs would write to."""

    def time_up(signum: int, frame: Any) -> None:
        raise _TimeUpError(f"more than {limit} s")

    warnings.simplefilter("ignore")  # to show one, Python opens the source file
    for name in ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"):
        codecs.lookup(name)  # which imports it: JSON may be written in any of them
    watch = Watch()
    folder = Path(root, "refcoco")
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    faulthandler.disable()  # pytest enables it, and a crash that is looked for is no news
    signal.signal(signal.SIGALRM, time_up)
    judge(Case(REFS, "valid", "realistic", pickles("realistic")[0]), Path(root), watch, limit)  # what is imported late
    sys.addaudithook(watch)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (int(used + memory * GIB),) * 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in cases:
        outcome = judge(case, Path(root), watch, limit)
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        results.send(outcome._replace(memory=taken / 2**20))


def outcomes(cases: list[Case], limit: float = 10, memory: float = 4) -> list[Outcome]:
    """Judge cases in child processes; a child that dies or hangs costs the case it was at, another goes on.

    Args:
        limit: seconds that a call of the reader may take.
        memory: GiB that a case may allocate.
    """
    context = multiprocessing.get_context("fork")
    found: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="fuzz_") as root:
        while len(found) < len(cases):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(cases[len(found) :], root, limit, memory, theirs))
            process.start()
            theirs.close()
            try:
                while len(found) < len(cases):
                    if not ours.poll(CALLS * limit):
                        process.kill()
                        found.append(Outcome("finding", "the process hung and was killed", CALLS * limit))
                        break
                    found.append(ours.recv())
            except EOFError:
                process.join()
                found.append(Outcome("finding", f"the process died with status {process.exitcode}", 0))
            process.join()
    return found


def category(told: str) -> str:
    """A message without what differs from file to file."""
    told = re.sub(r"\S*/refcoco/", "", told)
    told = re.sub(r"\(([A-Za-z]+(?:Error|Exception)?): .*\): get it", r"(\1: …): get it", told)
    told = re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", "'…'", told)
    return re.sub(r"-?\d+(\.\d+)?", "N", told)


def report(args: Any) -> tuple[list[str], list[tuple[Case, Outcome]]]:
    """The page's lines, and the findings."""
    started, findings, rows, messages = time.perf_counter(), [], [], collections.Counter()
    totals: collections.Counter[str] = collections.Counter()
    for file, kinds in ((REFS, pickle_kinds()), (INSTANCES, json_kinds())):
        for row, kind in enumerate(kinds):
            count = (args.cases + row) // len(kinds)  # which sum to --cases
            tally: collections.Counter[str] = collections.Counter()
            slowest, taken = 0.0, 0.0
            for cases in cases_of(file, kind, count, args.seed):
                for case, outcome in zip(cases, outcomes(cases, args.limit, args.memory), strict=True):
                    tally[outcome.verdict] += 1
                    slowest, taken = max(slowest, outcome.seconds), max(taken, outcome.memory)
                    if outcome.verdict == "refused":
                        messages[category(outcome.told)] += 1
                    elif outcome.verdict == "finding":
                        findings.append((case, outcome))
            totals += tally
            numbers = " | ".join(str(tally[verdict]) for verdict in ("read", "refused", "finding"))
            rows.append(f"| `{file}` | {kind} | {numbers} | {1000 * slowest:.0f} | {1024 * taken:.0f} |")
            print(rows[-1], file=sys.stderr, flush=True)
    seconds = time.perf_counter() - started
    versions = ", ".join(f"{name} {version(name)}" for name in ("hypothesis", "numpy", "pycocotools"))
    numbers = " | ".join(str(totals[verdict]) for verdict in ("read", "refused", "finding"))
    lines = [
        f"# {args.cases} mutated refs and {args.cases} mutated instances.json",
        "",
        f"`python -m benchmarks.fuzz_annotations --cases {args.cases} --seed {args.seed}`; a call of "
        f"the reader may take {args.limit:g} s and {args.memory:g} GiB.",
        "",
        f"{cpu_name()}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}",
        "",
        "| file | mutation | read | refused clearly | findings | slowest (ms) | most memory (MiB) |",
        "|---|---|---|---|---|---|---|",
        *rows,
        f"| all | | {numbers} | | |",
        "",
        f"{seconds / 60:.0f} min, with the time that the mutations take. Slowest: a case, of up to {CALLS} calls. "
        "Memory: what a process takes in addition to the libraries.",
        "",
        "The refusals told most often (N: a number, '…': a text, first message of a case):",
        "",
        "| cases | message |",
        "|---|---|",
        *(f"| {count} | {message.replace('|', '/')} |" for message, count in messages.most_common(15)),
        "",
        f"{len(messages)} different messages in all.",
    ]
    if findings:
        kinds = collections.Counter(category(outcome.told) for _, outcome in findings)
        lines += ["", "Findings:", "", "| cases | what |", "|---|---|"]
        lines += [f"| {count} | {' '.join(told.split()).replace('|', '/')} |" for told, count in kinds.most_common(40)]
    return lines, findings


def keep(findings: list[tuple[Case, Outcome]], folder: Path) -> None:
    """Write the failing files, and beside each what it did."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (case, outcome) in enumerate(findings):
        stem = folder / f"{number:04d}_{case.base}"
        stem.with_suffix(Path(case.file).suffix).write_bytes(case.data)
        stem.with_suffix(".txt").write_text(f"{case.kind}\n{outcome.told}\n", encoding="utf-8", errors="replace")


def get_parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.fuzz_annotations", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="of each file (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (default: 0)")
    parser.add_argument(
        "--limit", type=float, default=10, help="seconds that a call of the reader may take (default: 10)"
    )
    parser.add_argument("--memory", type=float, default=4, help="GiB that a case may allocate (default: 4)")
    parser.add_argument("--keep", metavar="DIR", help="where failing files are kept (default: a new temporary folder)")
    parser.add_argument("--out", metavar="FILE", help="write the page to this file too")
    return parser


def main() -> None:
    args = get_parser().parse_args()
    if args.cases < 1 or min(args.limit, args.memory) <= 0:
        raise UserError("--cases, --limit and --memory must be positive")
    if args.out:
        check_writable(args.out)
    lines, findings = report(args)
    print("\n".join(lines))
    if args.out:
        write_text(args.out, "\n".join(lines) + "\n")
    if findings:
        folder = Path(args.keep or tempfile.mkdtemp(prefix="fuzz_findings_"))
        keep(findings, folder)
        raise UserError(f"{len(findings)} findings; the files are in {folder}")


if __name__ == "__main__":
    run_command(main)
