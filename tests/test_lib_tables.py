"""The three formats of a table, compared with tables written by hand."""

import re
import shutil
import subprocess

import pytest

from lib.tables import latex_document, to_latex, to_markdown, to_text

ROWS = [["split", "", "mIoU"], ["a_b", "ours", "−1.00†"], ["", "paper", "–"], ["c", "ours", "5 %"]]


def test_text_columns_are_aligned():
    assert to_text(ROWS).splitlines() == [
        "split           mIoU",
        "a_b     ours  −1.00†",
        "       paper       –",
        "c       ours     5 %",
    ]
    assert to_text(ROWS, left=(0, 1, 2)).splitlines()[2] == "       paper  –"


def test_markdown():
    assert to_markdown(ROWS, left=(0, 1)).splitlines() == [
        "| split |  | mIoU |",
        "|---|---|---:|",
        "| a_b | ours | −1.00† |",
        "|  | paper | – |",
        "| c | ours | 5 % |",
    ]


def test_latex_escapes_symbols_and_separates_groups_by_rules():
    assert to_latex(ROWS, left=(0, 1), notes=["† 50 % of $x_1$"]).splitlines() == [
        r"\begin{tabular}{llr}",
        r"\toprule",
        r"split &  & mIoU \\",
        r"\midrule",
        r"a\_b & ours & $-$1.00\textsuperscript{\dag} \\",
        r" & paper & \textendash{} \\",
        r"\midrule",
        r"c & ours & 5 \% \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\par\smallskip{\footnotesize\raggedright\parindent0pt",
        r"\textsuperscript{\dag} 50 \% of \$x\_1\$\par",
        r"}",
    ]


ASCII = "".join(map(chr, range(32, 127)))


def test_latex_escapes_everything_that_it_cannot_print():
    def escaped(text):
        return to_latex([["a"], ["", text][1:]]).splitlines()[-3].removesuffix(r" \\")

    assert escaped(r"{50~^\}") == r"\{50\textasciitilde{}\textasciicircum{}\textbackslash{}\}"
    assert escaped("[a] * b") == "{[}a] {*} b"  # LaTeX would read an argument of the previous line's end
    assert escaped("--table ''") == "-{}-table '{}'"
    assert escaped('<"|">') == r"\textless{}\textquotedbl{}\textbar{}\textquotedbl{}\textgreater{}"
    assert escaped("é狗\n \t÷ \0") == "éU+72D7 U+00F7 U+0000"
    body = re.sub(r"\\[a-z]+(\{\})?|\\[&%#_${}]|\{[\[*]?\}", "", escaped(ASCII))
    assert not set(r"\&%#_${}~^<>|") & set(body)


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="needs pdflatex")
def test_a_latex_document_compiles_as_it_is(tmp_path):
    texts = [*ASCII, ASCII, *map(chr, range(0xA0, 0x180)), "−–…†‡×", "狗🐶", "[a]", "*", "\\begin{document}", "x" * 300]
    tables = [to_latex([["a", "b"], *([text, "1"] for text in texts)], notes=texts)]
    tables += [to_latex([[text, "b"], ["", text]]) for text in ("[", "*", "")]
    (tmp_path / "a.tex").write_text(latex_document([(ASCII, table) for table in tables]), "utf-8")
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "a.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "Missing character" not in (tmp_path / "a.log").read_text(errors="replace")


def test_rows_of_different_lengths_are_an_error():
    with pytest.raises(ValueError, match="shorter"):
        to_text([["a", "b"], ["c"]])


def test_long_notes_are_wrapped():
    note = "one note " * 40
    lines = to_latex([["a"]], notes=[note]).splitlines()
    assert max(map(len, lines)) <= 100
    assert " ".join(lines).count("one note") == 40
