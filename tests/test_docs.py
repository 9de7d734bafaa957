"""The documentation: diffs fit the code, links lead to files, documented commands accept their flags."""

import re
import shlex

import pytest
from conftest import ROOT

from lib import config
from lib.cli import Parser

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
def test_documented_diffs_fit_the_code(file, old):
    assert old in (ROOT / file).read_text(encoding="utf-8")


def test_every_documented_change_is_checked():
    assert len(CHANGES) >= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_documented_flags_of_train_and_test_exist(page):
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    known = {"train": set(parser_of("train").option_names()), "test": set(parser_of("test").option_names())}
    for script, arguments in re.findall(r"\b(train|test)\.py ([^\n`#|]*)", text):
        for word in shlex.split(arguments.split(" 2>&1")[0].replace("...", ""), posix=False):
            if word.startswith("--"):
                assert word in known[script], f"{script}.py {word}"


def parser_of(script):
    def add_arguments(parser: Parser) -> None:
        source = (ROOT / f"{script}.py").read_text(encoding="utf-8") + (ROOT / "lib" / "protocols.py").read_text()
        for flag in (*re.findall(r'"(--\w[\w-]*)"', source), "--protocol", "--gt_mask", "--eval_size", "--threshold"):
            if flag not in parser.option_names():
                parser.add_argument(flag)

    return config.get_parser(script, "", add_arguments)
