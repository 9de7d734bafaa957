"""Records of benchmarks: a Markdown table for people, and the same measurements as JSON for ``--compare``.

A file holds one record or several: each is a table followed by a block of JSON. Imports no torch.
"""

import json
import re
import shlex
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lib.cli import Parser
from lib.errors import UserError
from lib.files import Kind, check_writable, write_text
from lib.tables import to_markdown

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
MIN_REPEATS = 5  # fewer say nothing about the spread


@dataclass
class Row:
    """Measured values of one case.

    Attributes:
        case: what was measured; one cell of the table for each entry.
        seconds: time of each repeat. Empty if the case does not fit in memory.
        count: number of units, such as expressions, of a repeat.
        gflop: 10⁹ floating-point operations of a repeat; a multiply-add counts as two.
        rates: the machine's matrix rate before each repeat, in GFLOP/s.
        kernel: the operation with which the matrix rate was measured.
        peak: highest use of memory, in bytes.
        extra: more cells.
    """

    case: dict[str, Any]
    seconds: list[float] = field(default_factory=list)
    count: int = 1
    gflop: float = 0
    rates: list[float] = field(default_factory=list)
    kernel: str = ""
    peak: int = 0
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Median time of a unit, in seconds."""
        return statistics.median(self.seconds) / self.count

    @property
    def share(self) -> float | None:
        """The share of the matrix rate, if both are known."""
        if not self.gflop or not self.rates:
            return None
        return statistics.median(self.gflop / s / rate for s, rate in zip(self.seconds, self.rates, strict=True))


@dataclass
class Record:
    """The result of a benchmark.

    Attributes:
        benchmark: name of the script.
        title: what was measured.
        machine: hardware and versions.
        unit: what ``Row.count`` counts, such as ``expression``; empty if a repeat is one run.
        rows: the measurements.
        notes: sentences below the table.
    """

    benchmark: str
    title: str
    machine: str
    unit: str = ""
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    command: str = field(default_factory=lambda: shlex.join(sys.argv[1:]))
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d"))
    revision: str = field(default_factory=lambda: git_revision())

    def add(self, row: Row) -> None:
        """Append a row, and print it to stderr."""
        self.rows.append(row)
        name = ", ".join(f"{key} {value}" for key, value in row.case.items())
        print(f"{name}: {format_seconds(row.median) if row.seconds else 'does not fit'}", file=sys.stderr, flush=True)

    def to_markdown(self, earlier: "Record | None" = None) -> str:
        """Return title, machine, matrix rates, table and notes; with the speed-up over an earlier record, if given."""
        command = f"python -m benchmarks.{self.benchmark} {self.command}".strip()
        lines = [f"# {self.title}\n", f"`{command}`, {self.date}, revision {self.revision}\n", f"{self.machine}\n"]
        lines += [f"{text}\n" for text in self._matrix_rates()]
        if earlier:
            lines.append(f"Compared with {earlier.date}, revision {earlier.revision}, {earlier.machine}\n")
        before = {tuple(row.case.items()): row for row in earlier.rows} if earlier else {}
        cells = [self._cells(row, before.get(tuple(row.case.items()))) for row in self.rows]
        columns = [name for name in dict.fromkeys(name for row in cells for name in row)]
        columns = [name for name in columns if any(row.get(name) for row in cells)]
        table = [columns, *([row.get(name, "") for name in columns] for row in cells)]
        return "\n".join([*lines, to_markdown(table), *(f"\n{note}" for note in self.notes)]) + "\n"

    def _matrix_rates(self) -> list[str]:
        rates: dict[str, list[float]] = {}
        for row in self.rows:
            if row.rates:
                rates.setdefault(row.kernel, []).extend(row.rates)
        items = [f"{name} {statistics.median(r):.0f} ({min(r):.0f}…{max(r):.0f}) GFLOP/s" for name, r in rates.items()]
        return [f"Matrix rate: {'; '.join(items)}"] if items else []

    def _cells(self, row: Row, before: Row | None) -> dict[str, str]:
        cells = {name: str(value) for name, value in row.case.items()}
        time_column = f"time per {self.unit}" if self.unit else "time"
        if not row.seconds:
            return cells | {time_column: "does not fit"}
        fastest, slowest = (format_seconds(bound(row.seconds) / row.count) for bound in (min, max))
        cells[time_column] = f"{format_seconds(row.median)} ({fastest}…{slowest})"
        cells[f"{self.unit}s/s"] = f"{1 / row.median:.3g}" if self.unit else ""
        cells["GFLOP"] = f"{row.gflop / row.count:.4g}" if row.gflop else ""
        cells["share of the matrix rate"] = "" if row.share is None else f"{100 * row.share:.0f} %"
        cells["peak memory"] = f"{row.peak / GIB:.2f} GiB" if row.peak else ""
        cells |= row.extra
        cells["speed-up"] = f"{before.median / row.median:.2f}×" if before and before.seconds else ""
        return cells

    def to_json(self) -> str:
        """Return the record as JSON with one line per row."""
        fields = asdict(self)
        rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in fields.pop("rows"))
        return f'{json.dumps(fields, ensure_ascii=False)[:-1]}, "rows": [\n{rows}\n]}}'


def format_seconds(seconds: float) -> str:
    """Return a duration with three significant digits."""
    value, unit = (
        (seconds, "s") if seconds >= 1 else (1e3 * seconds, "ms") if seconds >= 1e-3 else (1e6 * seconds, "µs")
    )
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"


def git_revision() -> str:
    """Return the checked-out commit; ``unknown`` outside of a repository."""
    from lib.engine.journal import git_revision  # imports torch

    return git_revision(ROOT) or "unknown"


def read_records(path: str | Path) -> list[Record]:
    """Return the records in a file. UserError: it cannot be read or contains none."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        records = [json.loads(block) for block in re.findall(r"^```json\n(.*?)\n```$", text, re.DOTALL | re.MULTILINE)]
        records = [Record(**{**record, "rows": [Row(**row) for row in record["rows"]]}) for record in records]
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: a block of JSON is not a record of a benchmark ({error}).") from error
    if not records:
        raise UserError(f"{path} contains no record. Pass a file that a benchmark wrote with --out.")
    return records


def add_arguments(parser: Parser, *, repeats: int = MIN_REPEATS) -> None:
    """Add the flags that all benchmarks have."""
    parser.add_argument("--repeats", type=int, default=repeats, help="timed repeats (default: %(default)s)")
    parser.add_output("--out", kind=Kind.TEXT, metavar="FILE", help="write the table and the measurements to this file")
    parser.add_input("--compare", metavar="FILE", help="print the speed-up over this earlier record")


def check_arguments(args: Any, benchmark: str) -> Record | None:
    """Check the flags of :func:`add_arguments`, and return the record to compare with."""
    if args.repeats < 1:
        raise UserError("--repeats must be at least 1.")
    if args.out:
        check_writable(args.out, Kind.TEXT)
    if not args.compare:
        return None
    records = [record for record in read_records(args.compare) if record.benchmark == benchmark]
    if not records:
        raise UserError(f"--compare {args.compare}: it contains no record of benchmarks.{benchmark}.")
    return records[-1]


def finish(record: Record, earlier: Record | None, out: str | None) -> None:
    """Print the table, and write the record to the file ``out`` if it is given."""
    text = record.to_markdown(earlier)
    print(text, end="")
    if out:
        write_text(
            out, f"{text}\n<details><summary>Measurements</summary>\n\n```json\n{record.to_json()}\n```\n</details>\n"
        )
