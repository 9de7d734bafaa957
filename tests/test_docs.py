"""The documentation: diffs match the code, links lead to files, documented flags exist."""

import re
import shlex

import pytest
from conftest import ROOT

PAGES = sorted([ROOT / "README.md", *ROOT.glob("*/README.md"), *ROOT.glob("docs/*.md")])


def hunks(page):
    """Yield (file, old text) of each hunk of the page's diffs."""
    for block in re.findall(r"```diff\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for file, body in re.findall(r"^\+\+\+ b/(\S+)\n(.*?)(?=^--- |\Z)", block, re.DOTALL | re.MULTILINE):
            for hunk in re.split(r"^@@\n", body, flags=re.MULTILINE)[1:]:
                old = [line[1:] for line in hunk.splitlines() if not line.startswith("+")]
                yield file, "\n".join(old)


CHANGES = list(hunks(ROOT / "docs" / "changing_things.md"))


@pytest.mark.parametrize(("file", "old"), CHANGES, ids=[file for file, _ in CHANGES])
def test_documented_diffs_match_the_code(file, old):
    assert old in (ROOT / file).read_text(encoding="utf-8")


def test_every_documented_change_is_checked():
    assert len(CHANGES) >= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.fixture
def known_flags(run_here):
    """The flags of train.py and of test.py, from the lines of --help that describe them."""
    texts = {script: run_here(f"{script}.py", "--help", check=True).out for script in ("train", "test")}
    lines = {script: re.findall(r"^  (-.*)", text, re.MULTILINE) for script, text in texts.items()}
    return {script: set(re.findall(r"--[\w-]+", "\n".join(lines[script]))) for script in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_documented_flags_of_train_and_test_exist(page, known_flags):
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    for script, arguments in re.findall(r"\b(train|test)\.py ([^\n`#|]*)", text):
        for word in shlex.split(arguments.split(" 2>&1")[0].replace("...", ""), posix=False):
            if word.startswith("--"):
                assert word in known_flags[script], f"{script}.py {word}"
