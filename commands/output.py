"""How rows are printed: a table for people at a terminal, tab-separated text for pipes, NDJSON for
programs.

Nothing waits for the last row: a table takes its widths from the first SAMPLE rows and goes on with
them. Only the table shortens anything. What must stay true: no byte of a peer reaches a terminal as
anything but itself.
"""

import functools
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain, islice
from typing import Any

type Row = Mapping[str, Any]
type Columns = Mapping[str, Callable[[Row], str]]
SAMPLE = 200
SPARED = ("SIZE", "SENDER")  # columns that a narrow terminal does without, in this order
LEAST = (
    20  # columns of a terminal that the last one wants beside the others, if it is as wide as that
)
AT_ONCE = 50  # rows of a table that go to a terminal together: each write of its own costs more than its row


def cut(address: str, width: int) -> str:
    """An address in at most `width` columns: the domain and the beginning of the local part say
    most."""
    if len(address) <= width:
        return address
    tail = min(len(address) - max(address.rfind("@"), 0), width * 2 // 3)
    return f"{address[: width - tail - 1]}…{address[len(address) - tail :]}"


def counted(count: int) -> str:
    """So many deliveries, in words."""
    return f"{count} {'delivery' if count == 1 else 'deliveries'}"


def span(seconds: float | None) -> str:
    """A length of time in its two largest units: `45s`, `3m 20s`, `2d 4h`; empty for none."""
    return "" if seconds is None else _span(max(0, round(seconds)))


@functools.lru_cache(4096)  # in a long table most ages are the same
def _span(rest: int) -> str:
    words = list[str]()
    for unit, letter in ((86400, "d"), (3600, "h"), (60, "m"), (1, "s")):
        count, rest = divmod(rest, unit)
        if count or words:
            words.append(f"{count}{letter}" if count else "")
    return " ".join(filter(None, words[:2])) or "0s"


def size(count: float | None) -> str:
    """Bytes as `812`, `4.1K`, `25.0M`; empty for none."""
    if count is None:
        return ""
    for unit in ("", "K", "M", "G"):
        if count < 1024:
            return f"{count:.1f}{unit}" if unit else str(count)
        count /= 1024
    return f"{count:.1f}T"


def ago(when: datetime | None) -> str:
    """How long since (`3m`) or until (`in 20s`), by this machine's clock; empty for never."""
    if when is None:
        return ""
    seconds = (datetime.now(UTC) - when).total_seconds()
    return span(seconds) if seconds >= 0 else f"in {span(-seconds)}"


def stamp(when: datetime | None) -> str:
    """A time as people read it: local, to the second; empty for never."""
    return when.astimezone().strftime("%Y-%m-%d %H:%M:%S") if when else ""


def plain(text: str) -> str:
    """Text that moves no cursor: what cannot be printed is shown as `\\xNN`."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else "".join(f"\\x{b:02x}" for b in c.encode("utf-8", "replace"))
        for c in text
    )


def as_json(row: Row) -> str:
    """A row on one line; times in UTC."""
    return _encode(
        {name: _plain(value) if type(value) is datetime else value for name, value in row.items()}
    )


_encode = json.JSONEncoder(default=lambda value: _plain(value)).encode


def write(rows: Iterable[Row], columns: Columns, *, json_lines: bool = False) -> int:
    """Print rows, and count them. `columns` are the table's: a heading, and what stands below
    it."""
    if sys.stdout.isatty() and not json_lines:
        return _table(iter(rows), columns)
    count = 0
    for count, row in enumerate(rows, 1):
        if json_lines:
            sys.stdout.write(as_json(row) + "\n")
            continue
        if count == 1:
            sys.stdout.write("\t".join(row) + "\n")
        sys.stdout.write(
            "\t".join(plain(str(_plain(value)).replace("\t", " ")) for value in row.values()) + "\n"
        )
    return count


def write_lines(batches: Iterable[Sequence[str]], *, json_lines: bool) -> int:
    """Print rows that are text already, and count them; the first line names columns if they are no
    JSON."""
    count = 0 if json_lines else -1
    for lines in batches:
        count += len(lines)
        text = "\n".join(lines)
        if not text.isascii() or text.encode().translate(None, _HARMLESS):
            harmless = (lambda line: json.dumps(json.loads(line))) if json_lines else _plain_cells
            text = "\n".join(map(harmless, lines))
        sys.stdout.write(text + "\n")
    return max(count, 0)


_HARMLESS = bytes((*b"\t\n", *range(32, 127)))


def _plain_cells(line: str) -> str:
    return "\t".join(map(plain, line.split("\t")))


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="milliseconds")
    if isinstance(value, Mapping):
        return _encode(value)
    return "" if value is None else value


def _table(rows: Iterator[Row], columns: Columns) -> int:
    """Columns as wide as the first rows want them; the last one is folded into what is left of the
    line, or below it.

    Where that is not enough, a terminal does without the columns in SPARED.
    """
    first = list(islice(rows, SAMPLE))
    if not first:
        return 0
    width, spared = shutil.get_terminal_size().columns, list(SPARED)
    widest = {
        name: max(len(name), *(len(plain(of(row))) for row in first)) + 2
        for name, of in columns.items()
    }
    *fixed, last = columns
    while spared and sum(widest[name] for name in fixed) > width:
        fixed = [name for name in fixed if name != spared[0]]
        del spared[0]
    indent = sum(widest[name] for name in fixed)
    below = indent + min(LEAST, widest[last] - 2) > width
    cells, forms = (
        "".join(f"%-{widest[name]}s" for name in fixed),
        [columns[name] for name in fixed],
    )
    count, lines = 0, [(cells % tuple(fixed) + last).rstrip()]
    for count, row in enumerate(chain(first, rows), 1):
        line = cells % tuple([of(row) for of in forms])
        if not line.isprintable():
            line = cells % tuple([plain(of(row)) for of in forms])
        if words := plain(columns[last](row)):
            line = (
                f"{line.rstrip()}\n{folded(words, 4, width)}"
                if below
                else line + folded(words, indent, width)[indent:]
            )
        lines.append(line.rstrip())
        if not count % AT_ONCE:
            sys.stdout.write("\n".join(lines) + "\n")
            lines.clear()
    if lines:
        sys.stdout.write("\n".join(lines) + "\n")
    return count


def folded(words: str, indent: int, width: int) -> str:
    """Words in lines of at most `width`, each indented, whose addresses and ids stay whole where
    they can."""
    space, room, lines = " " * indent, max(1, width - indent), list[str]()
    while len(words) > room:
        end = words.rfind(" ", 1, room + 1)
        lines.append(words[: end if end > 0 else room].rstrip())
        words = words[end if end > 0 else room :].lstrip()
    return "\n".join([space + line for line in (*lines, words)])
