"""How rows are printed: a table for people at a terminal, tab-separated text for pipes, NDJSON for programs.

Only the table shortens anything, and only it waits for the last row: a long queue can be piped as it is read.
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

type Row = Mapping[str, Any]
type Columns = Mapping[str, Callable[[Row], str]]


def cut(address: str, width: int) -> str:
    """An address in at most `width` columns: the domain and the beginning of the local part say most."""
    if len(address) <= width:
        return address
    tail = min(len(address) - max(address.rfind("@"), 0), width * 2 // 3)
    return f"{address[: width - tail - 1]}…{address[len(address) - tail :]}"


def span(seconds: float) -> str:
    """A length of time in its two largest units: `45s`, `3m 20s`, `2d 4h`."""
    rest, words = max(0, round(seconds)), list[str]()
    for unit, letter in ((86400, "d"), (3600, "h"), (60, "m"), (1, "s")):
        count, rest = divmod(rest, unit)
        if count or words:
            words.append(f"{count}{letter}" if count else "")
    return " ".join(filter(None, words[:2])) or "0s"


def size(count: float) -> str:
    """Bytes as `812`, `4.1K`, `25.0M`."""
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


def as_json(row: Row) -> str:
    """A row on one line; times in UTC."""
    return json.dumps(dict(row), default=_plain)


def write(rows: Iterable[Row], columns: Columns, *, json_lines: bool = False) -> int:
    """Print rows, and count them. `columns` are the table's: a heading, and what stands below it."""
    if sys.stdout.isatty() and not json_lines:
        return _table(rows, columns)
    count = 0
    for count, row in enumerate(rows, 1):
        if json_lines:
            sys.stdout.write(as_json(row) + "\n")
            continue
        if count == 1:
            sys.stdout.write("\t".join(row) + "\n")
        sys.stdout.write("\t".join(str(_plain(value)).replace("\t", " ") for value in row.values()) + "\n")
    return count


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="milliseconds")
    return "" if value is None else value


def _table(rows: Iterable[Row], columns: Columns) -> int:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in columns:
        table.add_column(heading, no_wrap=heading not in list(columns)[-1:], overflow="fold")
    for row in rows:
        table.add_row(*(Text(shown(row)) for shown in columns.values()))
    if table.row_count:
        Console(highlight=False).print(table)
    return table.row_count
