"""How rows are printed: a table on a terminal, tab-separated text in a pipe, or as --format says.

Rows are printed as they come: a table takes its widths from the first SAMPLE rows. Only the table
shortens values. A time has its zone: UTC, or within `local_times` that of this machine. What must
stay true: no text of a peer controls the terminal.
"""

import csv
import functools
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from itertools import chain, islice

from commands.terminal import BOLD, decorator, in_colour, takes_colours
from relay.report.rows import Row

type Columns = Mapping[str, Callable[[Row], str]]
SAMPLE = 200
OPTIONAL = ("SIZE", "SENDER")  # columns that a narrow terminal omits, in this order
SPARE = "FOR"  # a column that is shown only where it does not push the last one below the others
# The last column goes below the others if it would have fewer columns than this, and needs more.
MIN_LAST = 20
UNLIMITED = 1 << 16  # columns of a table that is not folded
_LOCAL = ContextVar("local times", default=False)
BATCH = 50  # rows of a table written at once: a write costs more than a row


def cut(address: str, width: int) -> str:
    """An address in at most `width` columns: its domain and the beginning of its local part."""
    if len(address) <= width:
        return address
    tail = min(len(address) - max(address.rfind("@"), 0), width * 2 // 3)
    return f"{address[: width - tail - 1]}…{address[len(address) - tail :]}"


def counted(count: int) -> str:
    """`1 delivery`, `2 deliveries`."""
    return f"{count} {'delivery' if count == 1 else 'deliveries'}"


def span(seconds: float | None) -> str:
    """A length of time in its two largest units: `45s`, `3m 20s`, `2d 4h`; empty for None."""
    return "" if seconds is None else _span(max(0, round(seconds)))


@functools.lru_cache(4096)  # in a long table most ages are the same
def _span(rest: int) -> str:
    parts = list[str]()
    for unit, letter in ((86400, "d"), (3600, "h"), (60, "m"), (1, "s")):
        count, rest = divmod(rest, unit)
        if count or parts:
            parts.append(f"{count}{letter}" if count else "")
    return " ".join(filter(None, parts[:2])) or "0s"


def size(count: float | None) -> str:
    """Bytes as `812`, `4.1K`, `25.0M`; empty for None."""
    if count is None:
        return ""
    for unit in ("", "K", "M", "G"):
        if count < 1024:
            return f"{count:.1f}{unit}" if unit else str(count)
        count /= 1024
    return f"{count:.1f}T"


def ago(when: datetime | None) -> str:
    """How long since (`3m`) or until (`in 20s`), by this machine's clock; empty for None."""
    if when is None:
        return ""
    seconds = (datetime.now(UTC) - when).total_seconds()
    return span(seconds) if seconds >= 0 else f"in {span(-seconds)}"


def due(when: datetime | None) -> str:
    """How long until then (`in 20s`), or how late it is (`3m late`); empty for None."""
    text = ago(when)
    return f"{text} late" if text and not text.startswith("in ") else text


@contextmanager
def local_times(wanted: bool) -> Iterator[None]:
    """Within it times for people have the zone of this machine, and tables show times instead of
    ages, if that is wanted."""
    before = _LOCAL.set(wanted)
    try:
        yield
    finally:
        _LOCAL.reset(before)


def stamp(when: datetime | None) -> str:
    """A time to the second with its zone: `2026-11-22 19:49:00Z`, or local as
    `2026-11-22 20:49:00+01:00`; empty for None."""
    if when is None:
        return ""
    if _LOCAL.get():
        return when.astimezone().isoformat(" ", "seconds")
    return _in_utc(when, " ", "seconds")


def age_or_time(when: datetime | None) -> str:
    """How long since or until, as `ago` says it; within `local_times` the time."""
    return stamp(when) if _LOCAL.get() else ago(when)


def due_or_time(when: datetime | None) -> str:
    """How long until then, as `due` says it; within `local_times` the time."""
    return stamp(when) if _LOCAL.get() else due(when)


def _in_utc(when: datetime, separator: str, timespec: str) -> str:
    return when.astimezone(UTC).isoformat(separator, timespec).removesuffix("+00:00") + "Z"


def plain(text: str) -> str:
    """Text that is safe on a terminal: a character that cannot be printed becomes `\\xNN`."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else "".join(f"\\x{b:02x}" for b in c.encode("utf-8", "replace"))
        for c in text
    )


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return _in_utc(value, "T", "milliseconds")
    if isinstance(value, Mapping):
        return as_json(value)
    return "" if value is None else value


# A row as JSON on one line; times in UTC.
as_json: Callable[[Row], str] = json.JSONEncoder(default=_plain).encode


def write(
    rows: Iterable[Row], columns: Columns, *, json_lines: bool = False, form: str | None = None
) -> int:
    """Print rows and return their number. `columns` are those of the table.

    `form`: table, json, csv or tsv; without it a table on a terminal, and tsv elsewhere.
    """
    form = form or ("json" if json_lines else "table" if sys.stdout.isatty() else "tsv")
    if form == "table":
        return _table(iter(rows), columns)
    count = 0
    if form == "csv":
        for line in csv_lines(rows):
            sys.stdout.write(line)
            count += 1
        return max(0, count - 1)  # the first has the names
    for count, row in enumerate(rows, 1):
        if form == "json":
            sys.stdout.write(as_json(row) + "\n")
            continue
        if count == 1:
            sys.stdout.write("\t".join(row) + "\n")
        sys.stdout.write("\t".join(_cells_of(row)) + "\n")
    return count


def csv_lines(rows: Iterable[Row]) -> Iterator[str]:
    """Rows as lines of CSV, after a line of names; without rows no line."""
    line = io.StringIO()
    csv_writer = csv.writer(line, lineterminator="\n")
    for number, row in enumerate(rows):
        if number == 0:
            yield ",".join(row) + "\n"
        line.seek(0)
        line.truncate()
        csv_writer.writerow(_cells_of(row))
        yield line.getvalue()


def _cells_of(row: Row) -> list[str]:
    return [plain(str(_plain(value)).replace("\t", " ")) for value in row.values()]


def write_lines(batches: Iterable[Sequence[str]], *, json_lines: bool) -> int:
    """Print rows that are text already and return their number. Without --json the first line names
    the columns."""
    count = 0 if json_lines else -1
    for lines in batches:
        count += len(lines)
        text = "\n".join(lines)
        if not text.isascii() or text.encode().translate(None, _PRINTABLE):
            escape = (lambda line: json.dumps(json.loads(line))) if json_lines else _plain_cells
            text = "\n".join(map(escape, lines))
        sys.stdout.write(text + "\n")
    return max(count, 0)


_PRINTABLE = bytes((*b"\t\n", *range(32, 127)))


def _plain_cells(line: str) -> str:
    return "\t".join(map(plain, line.split("\t")))


def _table(rows: Iterator[Row], columns: Columns) -> int:
    """Print columns as wide as the first rows need. The last column is folded into the rest of the
    line, or below it. A terminal that is too narrow omits the columns in OPTIONAL."""
    first = list(islice(rows, SAMPLE))
    if not first:
        return 0
    width = _width()
    widest = {
        name: max(len(name), *(len(plain(of(row))) for row in first)) + 2
        for name, of in columns.items()
    }
    *fixed, last = columns
    least = min(MIN_LAST, widest[last] - 2)
    if sum(widest[name] for name in fixed) + least > width:
        fixed = [name for name in fixed if name != SPARE]
    for optional in OPTIONAL:
        if sum(widest[name] for name in fixed) > width:
            fixed = [name for name in fixed if name != optional]
    indent = sum(widest[name] for name in fixed)
    below = indent + least > width
    cells = "".join(f"%-{widest[name]}s" for name in fixed)
    forms = [columns[name] for name in fixed]
    heading = (cells % tuple(fixed) + last).rstrip()
    decorate = decorator(fixed, [widest[name] for name in fixed])
    count, lines = 0, [in_colour(heading, BOLD) if takes_colours(sys.stdout) else heading]
    for count, row in enumerate(chain(first, rows), 1):
        texts = [of(row) for of in forms]
        line = cells % tuple(texts)
        if not line.isprintable():
            texts = [plain(text) for text in texts]
            line = cells % tuple(texts)
        if decorate:
            line = decorate(row, texts)
        text = plain(columns[last](row))
        if text and below:
            line = f"{line.rstrip()}\n{folded(text, 4, width)}"
        elif text:
            line += folded(text, indent, width)[indent:]
        lines.append(line.rstrip())
        if not count % BATCH:
            sys.stdout.write("\n".join(lines) + "\n")
            lines.clear()
    if lines:
        sys.stdout.write("\n".join(lines) + "\n")
    return count


def _width() -> int:
    """The columns of the terminal. Without one a table is not folded, so that a row is a line."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else UNLIMITED


def folded(text: str, indent: int, width: int) -> str:
    """Text in indented lines of at most `width`. A word is broken only if it is longer than a
    line."""
    space, size, lines = " " * indent, max(1, width - indent), list[str]()
    while len(text) > size:
        end = text.rfind(" ", 1, size + 1)
        if end <= 0:
            end = size
        lines.append(text[:end].rstrip())
        text = text[end:].lstrip()
    return "\n".join([space + line for line in (*lines, text)])
