"""Draw time and memory of a forward pass against image size, batch and sentences per image.

    python -m benchmarks.inference --curves --models prepared --amp off --out benchmarks/results/curves_cpu_off.md
    python -m benchmarks.curves benchmarks/results/curves_cpu_*.md --out docs/images/cost_curves.png

Each network and precision of the records is a line. The dotted line of the same color passes through the measurement of
one image and one sentence at the size of the batches, and is proportional to the number of pixels, images or sentences.
Drawing needs matplotlib.
"""

from pathlib import Path
from typing import NamedTuple

from benchmarks.machine import DTYPES
from benchmarks.records import GIB, Row, read_records
from lib.charts import COLORS, save_png, styled_figure
from lib.cli import Parser, run_command
from lib.errors import UserError
from lib.files import Kind, check_writable

SIZE, BATCH, SENTENCES = "image size", "batch", "sentences per image"


class Panel(NamedTuple):
    """A column of the figure: the rows in which one quantity varies and the others have their smallest values."""

    title: str
    label: str
    reference: int  # the value of the row that all columns share
    points: dict[int, Row]  # value of the quantity: row


def get_parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.curves", description=__doc__)
    parser.add_input("records", nargs="+", metavar="FILE", help="written by benchmarks.inference --curves --out")
    parser.add_output("--out", kind=Kind.PNG, metavar="FILE", required=True, help="PNG file")
    return parser


def main() -> None:
    args = get_parser().parse_args()
    check_writable(args.out, Kind.PNG)
    lines: dict[str, list[Row]] = {}
    for record in (record for path in args.records for record in read_records(path)):
        for row in record.rows if record.benchmark == "inference" else ():
            if row.seconds:
                lines.setdefault(f"{row.case['model']}, {DTYPES[row.case['amp']]}", []).append(row)
    if not any(row.case[BATCH] > 1 for rows in lines.values() for row in rows):
        raise UserError("The files contain no record of benchmarks.inference --curves.")
    draw({name: panels(rows) for name, rows in lines.items()}, Path(args.out))


def panels(rows: list[Row]) -> list[Panel]:
    """Return the three columns of a line."""
    size = max(row.case[SIZE] for row in rows if row.case[BATCH] == max(row.case[BATCH] for row in rows))
    by_size = {row.case[SIZE]: row for row in rows if row.case[BATCH] == 1}
    at_size = [row for row in rows if row.case[SIZE] == size]
    by_batch = {row.case[BATCH]: row for row in at_size if row.case[SENTENCES] == 1}
    by_sentences = {row.case[SENTENCES]: row for row in at_size if row.case[SENTENCES] == row.case[BATCH]}
    return [
        Panel("Image size", "side in pixels, spaced by area; one sentence", size, by_size),
        Panel("Batch", f"images of {size}×{size}, one sentence each", 1, by_batch),
        Panel("Sentences per image", f"sentences of one image of {size}×{size}", 1, by_sentences),
    ]


def draw(lines: dict[str, list[Panel]], path: Path) -> None:
    """Write a figure with time (top) and peak memory (bottom) of each line."""
    with styled_figure(8.0, 4.2) as figure:
        axes = figure.subplots(2, 3, sharex="col")
        for color, (name, columns) in zip(COLORS, lines.items(), strict=False):
            for column, panel in enumerate(columns):
                values = sorted(panel.points)
                x = [value**2 if column == 0 else value for value in values]
                seconds = [panel.points[value].median * panel.points[value].count for value in values]
                memory = [panel.points[value].peak / GIB for value in values]
                top, bottom = axes[:, column]
                top.plot(x, seconds, "o-", color=color, label=name)
                start = values.index(panel.reference)
                top.plot(x, [seconds[start] * position / x[start] for position in x], ":", color=color, linewidth=1)
                bottom.plot(x, memory, "o-", color=color)
                top.set_title(panel.title)
                bottom.set_xlabel(panel.label)
                bottom.set_xticks(x, values)
        for axis, label in zip(axes[:, 0], ("seconds", "peak memory in GiB"), strict=True):
            axis.set_ylabel(label)
        for axis in axes.flat:
            axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
        axes[0, 0].legend()
        save_png(figure, path, dpi=160)


if __name__ == "__main__":
    run_command(main)
