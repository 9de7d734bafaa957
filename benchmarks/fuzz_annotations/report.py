"""Run the fuzzer over all mutations and report the results as a page of Markdown."""

import os
import platform
import re
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from benchmarks.fuzz_annotations.run import MAX_CALLS, MUTATIONS, Case, Outcome, generate_cases, run_cases
from benchmarks.machine import cpu_name
from lib.files import atomic_write, write_text
from lib.tables import to_markdown

VERDICTS = ("read", "refused", "finding")
Findings = list[tuple[Case, Outcome]]


def fuzz(count: int, seed: int, limit: float, memory: float) -> tuple[str, Findings]:
    """Run ``count`` cases of each file.

    Args:
        count: cases of each file, divided among its mutations.
        seed: seed of the mutations.
        limit: seconds that each call of the reader may take.
        memory: GiB that a process may allocate.

    Returns:
        The page, and the findings.
    """
    started = time.perf_counter()
    findings: Findings = []
    rows = [["file", "mutation", "read", "refused", "findings", "slowest (ms)", "memory (MiB)"]]
    totals, messages = Counter[str](), Counter[str]()
    for file, mutations in MUTATIONS.items():
        for number, mutation in enumerate(mutations):
            verdicts = Counter[str]()
            slowest = allocated = 0.0
            # The counts of all mutations add up to `count`.
            for cases in generate_cases(file, mutation, (count + number) // len(mutations), seed):
                for case, outcome in zip(cases, run_cases(cases, limit, memory), strict=True):
                    verdicts[outcome.verdict] += 1
                    slowest, allocated = max(slowest, outcome.seconds), max(allocated, outcome.memory)
                    if outcome.verdict == "refused":
                        messages[generalize(outcome.message)] += 1
                    elif outcome.verdict == "finding":
                        findings.append((case, outcome))
            totals += verdicts
            counts = [str(verdicts[verdict]) for verdict in VERDICTS]
            rows.append([f"`{file}`", mutation, *counts, f"{1000 * slowest:.0f}", f"{1024 * allocated:.0f}"])
            print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    rows.append(["all", "", *(str(totals[verdict]) for verdict in VERDICTS), "", ""])
    minutes = (time.perf_counter() - started) / 60
    versions = ", ".join(f"{name} {version(name)}" for name in ("hypothesis", "numpy", "pycocotools"))
    page = f"""# Fuzzing the annotation reader: {count} mutated refs and {count} mutated instances.json

`python -m benchmarks.fuzz_annotations --cases {count} --seed {seed}`

Each call of the reader may take {limit:g} s and {memory:g} GiB.

{cpu_name()}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}

{to_markdown(rows, left=(0, 1))}

Duration: {minutes:.0f} min, including the generation of the files. Slowest: one case, of up to {MAX_CALLS} calls of the
reader. Memory: allocated by a process in addition to the libraries.

The most frequent of {len(messages)} error messages (N: a number, '…': a text; the first message of each case):

{_count_table("message", messages, 15)}"""
    if findings:
        problems = Counter(generalize(outcome.message) for _, outcome in findings)
        page += f"\n\nFindings:\n\n{_count_table('problem', problems, 40)}"
    return page, findings


def generalize(message: str) -> str:
    """Replace the parts of a message that differ between files, so that equal messages can be counted."""
    message = re.sub(r"\S*/refcoco/", "", message)
    message = re.sub(r"\(([A-Za-z]+(?:Error|Exception)?): .*\)\. Download", r"(\1: …). Download", message)
    message = re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", "'…'", message)
    return re.sub(r"-?\d+(\.\d+)?", "N", " ".join(message.split()))


def _count_table(title: str, counts: Counter[str], limit: int) -> str:
    rows = [[str(count), text.replace("|", "/")] for text, count in counts.most_common(limit)]
    return to_markdown([["cases", title], *rows], left=(1,))


def save_findings(findings: Findings, folder: Path) -> None:
    """Write the file of each finding, and beside it a text file that describes the problem."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (case, outcome) in enumerate(findings):
        path = folder / f"{number:04d}{Path(case.file).suffix}"
        with atomic_write(path) as temporary:
            temporary.write_bytes(case.data)
        description = f"{case.mutation}\n{outcome.message}\n".encode(errors="replace").decode()
        write_text(path.with_suffix(".txt"), description)
