"""How a table of deliveries or of figures shows a value: its column decides by its name.

`list` and the commands that change the queue have the same columns, COLUMNS.
"""

from collections.abc import Callable
from typing import Any

from commands.output import Columns, age_or_time, ago, cut, due_or_time, size, span, stamp
from relay.report.rows import Row
from relay.report.statistics import AGES

ID_DIGITS = 12  # a table shows the end of an id: these digits are random, and find the message
_CELLS: dict[str, Callable[[Any], str]] = {
    **dict.fromkeys(("sender", "recipient"), lambda address: cut(address, 28)),
    **dict.fromkeys(("id", "queue_id"), lambda queue_id: str(queue_id[-ID_DIGITS:])),
    **dict.fromkeys(
        ("size", "bytes", "bytes_sent", "disk", "live", "free_bytes", "total_bytes"), size
    ),
    **dict.fromkeys((*AGES, "older"), lambda count: str(count or "")),
    **dict.fromkeys(("started_at", "acted_at"), stamp),
    **dict.fromkeys(("oldest_seconds", "lag_seconds", "drain_seconds"), span),
    "seconds": "{:.3f}s".format,
}


def _cell(name: str) -> Callable[[Row], str]:
    """How a table shows the value of that name."""
    empty = "<>" if name == "sender" else ""
    form = _CELLS.get(name, age_or_time if name.endswith("_at") else str)
    return lambda row: empty if row[name] in (None, "") else form(row[name])


def headed(headings: str) -> Columns:
    """Columns from words `HEADING=name`; a name that equals its heading in lower case is left
    out."""
    pairs = (word.partition("=")[::2] for word in headings.split())
    return {heading.replace("_", " "): _cell(name or heading.lower()) for heading, name in pairs}


def columns_of(*names: str) -> Columns:
    """Columns with the names of the values in capitals."""
    return {name.removesuffix("_at").replace("_", " ").upper(): _cell(name) for name in names}


def circuit_of(row: Row) -> str:
    """Why nothing is sent to a server now; empty when it is sent to."""
    if row["paused_at"]:
        return f"paused for {ago(row['paused_at'])}"
    return f"circuit open: {row['circuit_open_reason']}" if row["circuit_open_workers"] else ""


def _next(row: Row) -> str:
    """When a delivery is tried next, or for how long it has waited behind a pause."""
    if row["paused_at"]:
        return f"paused {age_or_time(row['paused_at'])}"
    return due_or_time(row["next_at"])


COLUMNS: Columns = {
    **headed("ID=queue_id STATE AGE=received_at SIZE SENDER RECIPIENT FOR=servers TRIES=attempts"),
    "NEXT": _next,
    **headed("REASON"),
}
LOCAL_COLUMNS: Columns = {
    "RECEIVED" if heading == "AGE" else heading: cell for heading, cell in COLUMNS.items()
}
# The columns of the view that both show.
LISTED = (
    "queue_id, state, received_at, size, sender, recipient, servers, attempts, next_at, paused_at,"
    " reason"
)
