"""Tables as text for a terminal, as Markdown and as LaTeX. Imports no torch.

A table is a list of rows, and a row is a list of cells (strings). All rows have the same length.
"""

from collections.abc import Collection, Iterable, Sequence

Rows = Sequence[Sequence[str]]
LATEX_SYMBOLS = {
    "−": "$-$", "–": "--", "†": r"\textsuperscript{\dag}", "±": r"$\pm$", "…": r"\ldots{}", "<": "$<$",
} | {symbol: f"\\{symbol}" for symbol in "&%#_$"}  # fmt: skip


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
    """Return the rows as a LaTeX tabular (package booktabs) with special characters escaped.

    Args:
        rows: the table; its first row is the header. A row whose first cell is not empty starts a group of rows, with
            a rule above it.
        left: as for :func:`to_text`.
        notes: lines below the table, in footnote size.
    """
    header, *body = rows
    columns = "".join("l" if i in left else "r" for i in range(len(header)))
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _latex_row(header)]
    for row in body:
        if row[0]:
            lines.append(r"\midrule")
        lines.append(_latex_row(row))
    lines += [rf"\multicolumn{{{len(header)}}}{{l}}{{\footnotesize {_escape_latex(note)}}} \\" for note in notes]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _latex_row(row: Sequence[str]) -> str:
    return " & ".join(map(_escape_latex, row)) + r" \\"


def _escape_latex(text: str) -> str:
    return "".join(LATEX_SYMBOLS.get(character, character) for character in text)
