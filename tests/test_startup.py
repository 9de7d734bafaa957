"""--help and a user's mistakes are answered at once: before them, no command imports a package that takes seconds."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT
from test_layers import HEAVY
from test_outputs import find_commands

MISTAKES = (  # found before the heavy imports, unlike those that need the content of a checkpoint or a dataset
    "train.py --cfg nowhere.yaml",
    "train.py --resume nowhere.pth",
    "train.py --dataset refcocoo",
    "train.py --lr -1",
    "train.py --epochs 2 --steps 3",
    "test.py --resume nowhere.pth",
    "test.py --split val",
    "test.py --resume train.py --protocol papr",
    "test.py --table --checkpoints nowhere",
    "test.py --resume train.py --image nowhere.png --sentence dog --out a.png",
    "lib.checkpoint nowhere.pth",
    "lib.compare",
    "lib.compare nowhere.yaml",
    "lib.compare configs/demo.yaml",
    "lib.plot nowhere",
    "lib.rescore nowhere.jsonl",
    "lib.rescore train.py --ids nowhere.txt",
    "refer.prepare --from nowhere --dataset refcoco",
    "refer.stats --dataset nowhere",
    "data.convert --name mine --sentences nowhere.csv --images refer",
    "benchmarks.inference --device-typo cpu",
)
# Runs command lines in one process, and prints the status and the imported packages of each as JSON.
RUN = """
import io, json, runpy, sys
from contextlib import redirect_stderr, redirect_stdout
for line in sys.stdin.read().splitlines():
    loaded, status = set(sys.modules), 0
    name, *arguments = line.split()
    sys.argv = [name, *arguments]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as errors:
        try:
            if name.endswith(".py"):
                runpy.run_path(name, run_name="__main__")
            else:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code or 0
    packages = sorted({module.split(".")[0] for module in set(sys.modules) - loaded})
    print(json.dumps([line, status, packages, errors.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def outcomes():
    """{command line: (exit status, imported packages, stderr)}."""
    names = [f"{command}.py" if command in ("train", "test") else command for command in find_commands()]
    lines = [f"{name} {flag}" for name in names for flag in ("--help", "--mistyped")] + list(MISTAKES)
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(command, cwd=ROOT, input="\n".join(lines), capture_output=True, text=True, check=True)
    return {line: outcome for line, *outcome in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("command", find_commands())
def test_help_and_mistyped_flags_import_no_heavy_package(command, outcomes):
    name = f"{command}.py" if command in ("train", "test") else command
    for flag, expected in (("--help", 0), ("--mistyped", 2)):
        status, packages, errors = outcomes[f"{name} {flag}"]
        assert status == expected, errors
        assert not HEAVY & set(packages)


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_import_no_heavy_package(line, outcomes):
    status, packages, errors = outcomes[line]
    assert (status, errors.count("error: ")) == (2, 1), errors
    assert not HEAVY & set(packages)
