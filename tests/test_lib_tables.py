"""The three formats of a table, compared with tables written by hand."""

import pytest

from lib.tables import to_latex, to_markdown, to_text

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
        r" & paper & -- \\",
        r"\midrule",
        r"c & ours & 5 \% \\",
        r"\multicolumn{3}{l}{\footnotesize \textsuperscript{\dag} 50 \% of \$x\_1\$} \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_rows_of_different_lengths_are_an_error():
    with pytest.raises(ValueError, match="shorter"):
        to_text([["a", "b"], ["c"]])
