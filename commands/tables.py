"""How rows are printed: a table for people at a terminal, tab-separated text for pipes, NDJSON for programs.

Nothing waits for the last row: a table takes its widths from the first SAMPLE rows and goes on with them. Only the
table shortens anything. What must stay true: no byte of a peer reaches a terminal as anything but itself.
"""

import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from itertools import chain, islice
from typing import Any

type Row = Mapping[str, Any]
type Columns = Mapping[str, Callable[[Row], str]]
SAMPLE = 200


def cut(address: str, width: int) -> str:
    """An address in at most `width` columns: the domain and the beginning of the local part say most."""
    if len(address) <= width:
        return address
    tail = min(len(address) - max(address.rfind("@"), 0), width * 2 // 3)
    return f"{address[: width - tail - 1]}…{address[len(address) - tail :]}"


def span(seconds: float | None) -> str:
    """A length of time in its two largest units: `45s`, `3m 20s`, `2d 4h`; empty for none."""
    if seconds is None:
        return ""
    rest, words = max(0, round(seconds)), list[str]()
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
    return "".join(c if c.isprintable() else "".join(f"\\x{b:02x}" for b in c.encode("utf-8", "replace")) for c in text)


def as_json(row: Row) -> str:
    """A row on one line; times in UTC."""
    return _encode({name: _plain(value) if type(value) is datetime else value for name, value in row.items()})


_encode = json.JSONEncoder(default=lambda value: _plain(value)).encode


def write(rows: Iterable[Row], columns: Columns, *, json_lines: bool = False) -> int:
    """Print rows, and count them. `columns` are the table's: a heading, and what stands below it."""
    if sys.stdout.isatty() and not json_lines:
        return _table(iter(rows), columns)
    count = 0
    for count, row in enumerate(rows, 1):
        if json_lines:
            sys.stdout.write(as_json(row) + "\n")
            continue
        if count == 1:
            sys.stdout.write("\t".join(row) + "\n")
        sys.stdout.write("\t".join(plain(str(_plain(value)).replace("\t", " ")) for value in row.values()) + "\n")
    return count


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="milliseconds")
    return "" if value is None else value


def _table(rows: Iterator[Row], columns: Columns) -> int:
    """Columns as wide as the first rows want them; the last one is folded into what is left of the line."""
    shown = ([plain(of(row)) for of in columns.values()] for row in rows)
    sample = list(islice(shown, SAMPLE))
    if not sample:
        return 0
    widths = [max(map(len, column)) for column in zip(columns, *sample, strict=True)][:-1]
    indent = sum(widths) + 2 * len(widths)
    room = max(shutil.get_terminal_size().columns - indent, 20)
    count = -1
    for cells in chain([list(columns)], sample, shown):
        count += 1
        line = "".join(f"{cell:{width}}  " for cell, width in zip(cells, widths, strict=False))
        folded = textwrap.wrap(cells[-1], room) or [""]
        sys.stdout.write(line.rstrip() + "\n" if not cells[-1] else line + f"\n{' ' * indent}".join(folded) + "\n")
    return count
