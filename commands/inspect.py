"""Looking at the queue: `list`, `show` and `stats`.

Everything is read through `relay.queue`, from the views that people also query by SQL. What must stay true: looking
takes no lock, changes nothing, and makes no database where there is none.
"""

from pathlib import Path
from typing import Any

import typer
from sqlalchemy import Engine

from commands.tables import Columns, Row, ago, as_json, cut, size, span, stamp, write
from relay import database
from relay.bodies import Spool
from relay.queue import Filter, NoSuchMessage, Queue
from relay.schema import State
from relay.settings import Settings, load

DONE, NOTHING_MATCHED, WRONG_USE = range(3)
SHORT = 12  # digits of an id's end that a table shows: they are chance, and find it again

_LIST: Columns = {
    "ID": lambda row: row["queue_id"][-SHORT:],
    "STATE": lambda row: row["state"],
    "AGE": lambda row: ago(row["received_at"]),
    "SIZE": lambda row: size(row["size"]),
    "SENDER": lambda row: cut(row["sender"] or "<>", 28),
    "RECIPIENT": lambda row: cut(row["recipient"], 28),
    "TRIES": lambda row: str(row["attempts"]),
    "NEXT": lambda row: ago(row["next_at"]),
    "REASON": lambda row: row["reason"] or "",
}
_TRIES: Columns = {
    "TRY": lambda row: f"{row['delivery']}.{row['claim']}.{row['hop']}",
    "AT": lambda row: stamp(row["started_at"]),
    "TOOK": lambda row: f"{(row['finished_at'] - row['started_at']).total_seconds():.3f}s",
    "SERVER": lambda row: row["server"] or "",
    "BYTES": lambda row: size(row["bytes_sent"]),
    "OUTCOME": lambda row: row["outcome"],
    "REPLY": lambda row: row["reply"],
}
_SUMMARY: Columns = {
    "STATE": lambda row: row["state"],
    "ROUTE": lambda row: row["route"],
    "DELIVERIES": lambda row: str(row["deliveries"]),
    "BYTES": lambda row: size(row["bytes"]),
    "OLDEST": lambda row: span(row["oldest_seconds"]),
    "OVERDUE": lambda row: str(row["overdue"]),
}
_WORKERS: Columns = {
    "WORKER": lambda row: row["id"][-SHORT:],
    "HOST": lambda row: f"{row['host']} {row['pid']}",
    "STARTED": lambda row: stamp(row["started_at"]),
    "LEASE": lambda row: ago(row["until"]) if row["alive"] else "run out",
    "SENDING": lambda row: str(row["sending"]),
}
_OUTCOMES = ("accepted", "deferred", "rejected", "unreachable", "interrupted", "uncertain")
_SERVERS: Columns = {
    "SERVER": lambda row: row["server"],
    "TRIES": lambda row: str(row["attempts"]),
    "OUTCOMES": lambda row: ", ".join(f"{row[outcome]} {outcome}" for outcome in _OUTCOMES if row[outcome]),
    "LAST": lambda row: ago(row["last_at"]),
}


def opened(settings: Settings) -> Engine:
    """The database, for looking; raises DatabaseError where there is none yet."""
    url = database.normalized(settings.database_url)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
        raise database.DatabaseError(f"there is no database {url.database} yet: `qmqp-relay up` or `migrate` makes it")
    return database.connect(settings.database_url)


def list_queue(wanted: Filter, *, everything: bool, limit: int | None, json_lines: bool) -> int:
    """Print what matches, a row a recipient; the exit status."""
    if unknown := set(wanted.states) - set(State):
        typer.echo(f"qmqp-relay: no state {', '.join(sorted(unknown))}: there are {', '.join(State)}", err=True)
        return WRONG_USE
    rows = Queue(opened(load(Settings))).rows(wanted, limit=limit, finished=everything)
    return DONE if write(rows, _LIST, json_lines=json_lines) else NOTHING_MATCHED


def show_message(text: str, *, json_lines: bool) -> int:
    """Print all that is known about one message; the exit status."""
    settings = load(Settings)
    queue = Queue(opened(settings))
    try:
        message = queue.message(queue.resolve(text))
    except NoSuchMessage as error:
        typer.echo(f"qmqp-relay: {error}", err=True)
        return NOTHING_MATCHED
    if message is None:  # removed since
        return NOTHING_MATCHED
    path = Spool(settings.spool_dir).path(message["queue_id"])
    message |= {"file": str(path), "file_size": path.stat().st_size if path.exists() else None}
    if json_lines:
        typer.echo(as_json(message))
    else:
        _print_message(message)
    return DONE


def _print_message(message: dict[str, Any]) -> None:
    known = "gone" if message["file_size"] is None else f"{message['file_size']} bytes"
    client = f"{message['client_address']} ({message['helo']}) by {message['protocol']}"
    facts = {
        "id": message["queue_id"],
        "sender": message["sender"] or "<>",
        "received": f"{stamp(message['received_at'])} from {client}",
        "size": f"{message['size']} bytes",
        "Message-ID": message["header_message_id"],
        "notice of": message["notice_of"],
        "file": f"{message['file']}, {known}",
    }
    deliveries: dict[int, Row] = {row["number"]: row for row in message["deliveries"]}
    lines = [(name, value) for name, value in facts.items() if value]
    lines += [("recipient", f"{row['address']}, delivery {row['delivery']}") for row in message["recipients"]]
    for number, row in deliveries.items():
        due = f", due {ago(row['due_at'])}" if row["state"] in ("queued", "deferred") else ""
        lines.append((f"delivery {number}", f"{row['state']}{due}  {row['last_reply'] or ''}".rstrip()))
    for name, value in lines:
        typer.echo(f"{name:>12}: {value}")
    if message["attempts"]:
        typer.echo()
        write(message["attempts"], _TRIES)


def show_stats(*, json_lines: bool) -> int:
    """Print the queue by state, the workers, and the servers of the last hour; the exit status."""
    queue = Queue(opened(load(Settings)))
    workers = [row for row in queue.workers() if row["ended_at"] is None]
    parts = (("queue", queue.summary(), _SUMMARY), ("worker", workers, _WORKERS), ("server", queue.servers(), _SERVERS))
    for kind, rows, columns in parts:
        if not json_lines:
            typer.echo(f"{kind}s:" if rows else f"{kind}s: none")
        write([{"kind": kind, **row} for row in rows], columns, json_lines=json_lines)
    return DONE
