"""Tables as text for a terminal, as Markdown and as LaTeX. Imports no torch.

A table is a list of rows, and a row is a list of cells (strings). All rows have the same length.
"""

import re
import textwrap
from collections.abc import Collection, Iterable, Sequence
from functools import partial

Rows = Sequence[Sequence[str]]
# How LaTeX writes characters that have a meaning there, at the beginning of a row ([ and *), or are not in its fonts.
LATEX_SYMBOLS = {
    **{symbol: f"\\{symbol}" for symbol in "&%#_${}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "[": "{[}", "*": "{*}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}"},
    **{"−": "$-$", "×": r"$\times$", "±": r"$\pm$", "–": r"\textendash{}", "…": r"\dots{}"},
    **{"†": r"\textsuperscript{\dag}", "‡": r"\textsuperscript{\ddag}"},
}
LATEX_LIGATURES = "-'`,"  # two of these would become one character
LATEX_PREAMBLE = r"""\documentclass{article}
\usepackage[T1]{fontenc}
\usepackage[utf8]{inputenc}
\usepackage{booktabs}"""


def to_text(rows: Rows, *, left: Collection[int] = (0,)) -> str:
    """Return the rows, header rows included, as lines with aligned columns.

    Args:
        rows: the table.
        left: indices of the columns that are aligned left; the others are aligned right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(widths[i]) if i in left else cell.rjust(widths[i]) for i, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def to_markdown(rows: Rows, *, left: Collection[int] = (0,)) -> str:
    """Return the rows as a Markdown table. The first row is the header; ``left`` as for :func:`to_text`."""
    header, *body = (f"| {' | '.join(row)} |" for row in rows)
    ruler = "|".join("---" if i in left else "---:" for i in range(len(rows[0])))
    return "\n".join([header, f"|{ruler}|", *body])


def to_latex(rows: Rows, *, left: Collection[int] = (0,), notes: Iterable[str] = ()) -> str:
    """Return the rows as a LaTeX tabular, and notes below it. It needs the packages of ``LATEX_PREAMBLE``.

    Characters that are special in LaTeX are escaped. A character that is neither ASCII nor a letter of Latin-1 nor in
    ``LATEX_SYMBOLS`` is written as its code point (``U+72D7``), because LaTeX would refuse it.

    Args:
        rows: the table; its first row is the header. A row whose first cell is not empty starts a group of rows, with
            a rule above it.
        left: as for :func:`to_text`.
        notes: paragraphs below the table, in footnote size.
    """
    header, *body = rows
    columns = "".join("l" if i in left else "r" for i in range(len(header)))
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _latex_row(header)]
    for row in body:
        if row[0]:
            lines.append(r"\midrule")
        lines.append(_latex_row(row))
    lines += [r"\bottomrule", r"\end{tabular}"]
    # Without splitting words, whose parts LaTeX would separate by a space.
    wrap = partial(textwrap.wrap, width=100, break_long_words=False, break_on_hyphens=False)
    paragraphs = [line for note in notes for line in wrap(rf"{_escape_latex(note)}\par")]
    if paragraphs:
        lines += [r"\par\smallskip{\footnotesize\raggedright\parindent0pt", *paragraphs, "}"]
    return "\n".join(lines)


def latex_document(parts: Iterable[tuple[str, str]]) -> str:
    """Return a LaTeX document of tables (title and tabular) that compiles as it is."""
    lines = ["% To use a table elsewhere, copy it, and the lines of the packages that it needs.", LATEX_PREAMBLE, ""]
    lines += [r"\begin{document}", r"\small\setlength{\tabcolsep}{3pt}"]
    for title, table in parts:
        lines += [rf"\noindent\textbf{{{_escape_latex(title)}}}", "", r"\medskip\noindent", table, ""]
    return "\n".join([*lines, r"\end{document}", ""])


def _latex_row(row: Sequence[str]) -> str:
    return " & ".join(map(_escape_latex, row)) + r" \\"


def _escape_latex(text: str) -> str:
    escaped = "".join(map(_latex_symbol, " ".join(text.split())))
    return re.sub(rf"([{LATEX_LIGATURES}])(?=\1)", r"\1{}", escaped)


def _latex_symbol(character: str) -> str:
    is_letter = "À" <= character <= "ÿ" and character != "÷"
    if character in LATEX_SYMBOLS or is_letter or " " <= character <= "~":
        return LATEX_SYMBOLS.get(character, character)
    return f"U+{ord(character):04X}"
