"""Looking at the queue: `list`, `show`, `why`, `headers`, `body` and `stats`.

Everything is read through `relay.report.queries`, from the views that people also query by SQL.
What must stay true: looking takes no lock, changes nothing, and makes no database where there is
none.
"""

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import typer
from sqlalchemy import Engine

from commands.errors import DONE, NOTHING_MATCHED, OUT_OF_REACH, explanation, say
from commands.ops import explain as why
from commands.output import (
    Columns,
    Row,
    ago,
    as_json,
    cut,
    folded,
    plain,
    size,
    span,
    stamp,
    write,
    write_lines,
)
from relay.db import engine as database
from relay.db.schema import UNFINISHED, Outcome
from relay.report.filters import Filter
from relay.report.queries import NoSuchMessage, QueueReader
from relay.report.statistics import AGES, Statistics
from relay.settings import Settings, load
from relay.spool.store import BodyUnsendable, Spool

SHORT = 12  # digits of an id's end that a table shows: they are chance, and find it again
TWINS = (Outcome.UNCERTAIN, Outcome.MALFORMED)


def _due(when: datetime) -> str:
    words = ago(when)
    return words if words.startswith("in ") else f"{words} late"


_SHOWN: dict[str, Callable[[Any], str]] = {
    **dict.fromkeys(("sender", "recipient"), lambda address: cut(address, 28)),
    **dict.fromkeys(("id", "queue_id"), lambda queue_id: str(queue_id[-SHORT:])),
    **dict.fromkeys(("size", "bytes", "bytes_sent"), size),
    **dict.fromkeys((*AGES, "older"), lambda count: str(count or "")),
    "next_at": _due, "started_at": stamp, "oldest_seconds": span, "seconds": "{:.3f}s".format,
}  # fmt: skip


def _shown(name: str) -> Callable[[Row], str]:
    """What tables show of a row in the column of that name."""
    none = "<>" if name == "sender" else ""
    shown = _SHOWN.get(name, ago if name.endswith("_at") else str)

    def cell(row: Row) -> str:
        value = row[name]
        return none if value is None or value == "" else shown(value)

    return cell


def _columns(headings: str) -> Columns:
    """Columns from `HEADING=name` words; the name is left out where it is the heading in small
    letters."""
    pairs = (word.partition("=")[::2] for word in headings.split())
    return {heading.replace("_", " "): _shown(name or heading.lower()) for heading, name in pairs}


COLUMNS = _columns(
    "ID=queue_id STATE AGE=received_at SIZE SENDER RECIPIENT TRIES=attempts NEXT=next_at REASON"
)
LISTED = "queue_id, state, received_at, size, sender, recipient, attempts, next_at, reason"  # which these are made of
_TRIES: Columns = {
    "TRY": lambda row: f"{row['delivery']}.{row['claim']}.{row['attempt_index']}",
    **_columns("AT=started_at"),
    "TOOK": lambda row: f"{(row['finished_at'] - row['started_at']).total_seconds():.3f}s",
    **_columns("SERVER BYTES=bytes_sent OUTCOME REPLY"),
}
_SUMMARY = _columns("STATE ROUTE DELIVERIES BYTES OLDEST=oldest_seconds OVERDUE")
_WORKERS: Columns = {
    **_columns("WORKER=id"),
    "HOST": lambda row: f"{row['host']} {row['pid']}",
    **_columns("STARTED=started_at"),
    "LEASE": lambda row: ago(row["lease_expires_at"]) if row["alive"] else "run out",
    **_columns("SENDING"),
}
_OUTCOMES = ("delivered", "deferred", "rejected", "unreachable", "interrupted", "uncertain")
_SERVERS: Columns = {
    **_columns("SERVER TRIES=attempts LAST=last_at"),
    "OUTCOMES": lambda row: ", ".join(
        f"{row[outcome]} {outcome}" for outcome in _OUTCOMES if row[outcome]
    ),
    "NOW": lambda row: _now(row),
}


def _now(row: Row) -> str:
    """Why nothing is sent to a server for now, if so."""
    if row["paused_at"]:
        return f"paused for {ago(row['paused_at'])}"
    return f"left alone: {row['circuit_open_reason']}" if row["circuit_open_workers"] else ""


_PAUSES = _columns("PAUSED=subject SINCE=since_at BY=actor REASON")
_RATES = _columns("OUTCOME LAST_MINUTE LAST_HOUR BYTES=bytes_sent MEAN=seconds")
_SLOWEST = _columns("ID=queue_id TOOK=seconds SERVER BYTES=bytes_sent OUTCOME REPLY")
_RECEIVED = _columns("LAST_MINUTE LAST_HOUR BYTES")
_AGES: Columns = {
    **_columns(
        f"RECIPIENTS=waiting {' '.join(f'{age.replace("under", "<")}={age}' for age in AGES)} older"
    ),
    "DOMAIN": lambda row: row["domain"] or f"({row['domains']} more)",
}
MANY = 50  # workers that a table shows


@contextlib.contextmanager
def opened(settings: Settings) -> Iterator[Engine]:
    """The database, as long as it is needed; raises DatabaseError where there is none yet."""
    url = database.normalized(settings.database_url)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
        raise database.DatabaseError(
            f"there is no database {url.database} yet: `qmqp-relay up` or `migrate` makes it"
        )
    engine = database.connect(settings.database_url)
    try:
        yield engine
    finally:
        engine.dispose()


def at_hand(settings: Settings, queue: QueueReader) -> Spool | None:
    """The spool of this database, if it is mounted here."""
    with contextlib.suppress(OSError):
        spool = Spool(settings.spool_dir)
        if spool.identity and spool.identity == queue.spool_id():
            return spool
    return None


def resolved(queue: QueueReader, wanted: Filter) -> Filter:
    """The filter with its id in full; raises NoSuchMessage."""
    return replace(wanted, id=queue.resolve(wanted.id)) if wanted.id is not None else wanted


def watched(
    every: float | None, look: Callable[[], int], pause: Callable[[float], None] = time.sleep
) -> int:
    """Look once, or every so many seconds until Ctrl-C, on a screen that is cleared; the exit
    status.

    A database that is away while somebody watches is said, and looked at again.
    """
    status = DONE
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            if every and sys.stdout.isatty():
                typer.echo("\x1b[H\x1b[2J", nl=False)
            try:
                status = look()
            except Exception as error:
                known, words = explanation(error)
                if not every or known != OUT_OF_REACH:
                    raise
                status = known
                say(words)
            if not every:
                return status
            sys.stdout.flush()
            pause(every)
    return status


def list_queue(wanted: Filter, *, everything: bool, limit: int | None, json_lines: bool) -> int:
    """Print what matches, a row a recipient; the exit status."""
    with opened(load(Settings)) as engine:
        queue = QueueReader(engine)
        wanted = resolved(queue, wanted)
        if sys.stdout.isatty() and not json_lines:
            count = write(
                queue.rows(wanted, limit=limit, finished=everything, columns=LISTED), COLUMNS
            )
        else:
            lines = queue.lines(wanted, limit=limit, finished=everything, objects=json_lines)
            count = write_lines(lines, json_lines=json_lines)
        if not count:
            say(_nothing(wanted, everything=everything or wanted.is_history()))
        return DONE if count else NOTHING_MATCHED


def _nothing(wanted: Filter, *, everything: bool) -> str:
    if not wanted.shown():
        return "no mail is kept" if everything else "the queue is empty"
    return "nothing like that" + ("" if everything else " is unfinished; --all looks further")


def looked_up(text: str) -> dict[str, Any]:
    """`everything_about` a message of the database that the settings name."""
    settings = load(Settings)
    with opened(settings) as engine:
        return everything_about(QueueReader(engine), settings, text)


def everything_about(queue: QueueReader, settings: Settings, text: str) -> dict[str, Any]:
    """A message with its rows, its file and why it is where it is; raises NoSuchMessage."""
    message = queue.message(queue.resolve(text))
    if message is None:
        raise NoSuchMessage("it was removed this moment")
    spool, file_size = at_hand(settings, queue), None
    with contextlib.suppress(OSError):
        file_size = spool.path(message["queue_id"]).stat().st_size if spool else None
    reasons = list(why.sentences(message, why.gather(queue, message["queue_id"], settings)))
    return message | {
        "file": str(Spool(settings.spool_dir).path(message["queue_id"])),
        "file_size": file_size,
        "spool_at_hand": spool is not None,
        "why": [
            {"delivery": row["number"], "state": row["state"], "why": words}
            for row, words in reasons
        ],
    }


def show_message(text: str, *, json_lines: bool) -> int:
    """Print all that is known about one message; the exit status."""
    message = looked_up(text)
    if json_lines:
        typer.echo(as_json(message))
    else:
        for name, value in facts(message):
            typer.echo(f"{name:>12}: {_readable(plain(value), 14).lstrip()}")
        typer.echo()
        write(message["attempts"], _TRIES)
    return DONE


def facts(message: dict[str, Any]) -> list[tuple[str, str]]:
    """What there is to say about a message, in order: (name, words)."""
    needed = any(row["state"] in UNFINISHED for row in message["deliveries"])
    held = (
        ("missing" if needed else "gone")
        if message["spool_at_hand"]
        else "the spool is not at hand"
    )
    user = f" as {message['auth_user']}" if message["auth_user"] else ""
    client = (
        f"{message['client_address'] or 'here'} ({message['helo']}) by {message['protocol']}{user}"
    )
    told = {
        "id": message["queue_id"],
        "sender": message["sender"] or "<>",
        "received": f"{stamp(message['received_at'])} ({ago(message['received_at'])} ago) from {client}",
        "size": f"{message['size']} bytes",
        "Message-ID": message["header_message_id"],
        "BODY": message["body_type"],
        "RET": message["ret"],
        "ENVID": message["envid"],
        "notice of": message["dsn_of"] and why.about(message),
        "file": f"{message['file']}, "
        + (held if message["file_size"] is None else f"{message['file_size']} bytes"),
    }
    lines = [(name, value) for name, value in told.items() if value]
    for row in message["recipients"]:
        asked = "".join(
            f", {name.upper()}={row[name]}" for name in ("notify", "orcpt") if row[name]
        )
        lines.append(("recipient", f"{row['address']}, delivery {row['delivery']}{asked}"))
    for row in message["deliveries"]:
        origin = f", from delivery {row['parent']}" if row["parent"] else ""
        ended = f" {stamp(row['finished_at'])}" if row["finished_at"] else ""
        worker = f" by worker {row['worker'][-SHORT:]}" if row["worker"] else ""
        words = f"{row['state']}{ended}{worker}, route {row['route']}{origin}, expires {stamp(row['expires_at'])}"
        lines.append((f"delivery {row['number']}", words))
    lines += [("why", row["why"]) for row in message["why"]]
    doubtful = {
        row["server"] or "any server" for row in message["attempts"] if row["outcome"] in TWINS
    }
    if doubtful:
        keys = " or ".join(filter(None, (message["queue_id"], message["header_message_id"])))
        lines.append(("twin", f"perhaps on {', '.join(sorted(doubtful))}: look there for {keys}"))
    return lines


def show_why(text: str, *, json_lines: bool) -> int:
    """Print why a message is where it is, a sentence for each delivery; the exit status."""
    message = looked_up(text)
    for row in message["why"]:
        typer.echo(
            as_json({"queue_id": message["queue_id"], **row})
            if json_lines
            else _readable(plain(row["why"]))
        )
    return DONE


def _readable(words: str, indent: int = 0) -> str:
    """Words in lines that fit a terminal; as they are for anybody else."""
    return (
        folded(words, indent, shutil.get_terminal_size().columns) if sys.stdout.isatty() else words
    )


def show_body(text: str, *, header_only: bool) -> int:
    """Print the stored message or its header: as it is, but on a terminal harmless; the exit
    status."""
    settings = load(Settings)
    with opened(settings) as engine:
        queue = QueueReader(engine)
        message, spool = queue.message(queue.resolve(text)), at_hand(settings, queue)
    if message is None or spool is None:
        say(f"the spool of this database is not at hand in {settings.spool_dir}")
        return OUT_OF_REACH
    try:
        handle = spool.open(message["queue_id"], message["size"])
    except BodyUnsendable as error:
        say(
            f"{error}; its deliveries are {', '.join(sorted({row['state'] for row in message['deliveries']}))}"
        )
        return NOTHING_MATCHED
    with os.fdopen(handle, "rb") as body:
        for line in body:
            if header_only and line == b"\n":
                break
            if sys.stdout.isatty():
                typer.echo(
                    plain(line.rstrip(b"\n").decode("utf-8", "backslashreplace").expandtabs())
                )
            else:
                sys.stdout.buffer.write(line)
    return DONE


_HEADINGS = {
    "queue": "queue",
    "age": "waiting, by age and domain",
    "received": "came in",
    "rate": "tries of the last hour",
    "slowest": "the slowest of them",
}


def show_stats(*, json_lines: bool) -> int:
    """Print the queue by state and age, workers, servers, pauses, and how quick it goes; the exit
    status."""
    with opened(load(Settings)) as engine:
        queue = QueueReader(engine)
        figures = Statistics(queue)
        workers = [row for row in queue.workers() if row["ended_at"] is None]
        parts: tuple[tuple[str, Sequence[Row], Columns], ...] = (
            ("queue", queue.summary(), _SUMMARY),
            ("age", figures.ages(), _AGES),
            ("worker", workers, _WORKERS),
            ("server", queue.servers(), _SERVERS),
            ("pause", queue.pauses(), _PAUSES),
            ("received", [figures.received()], _RECEIVED),
            ("rate", figures.rates(), _RATES),
            ("slowest", figures.slowest(), _SLOWEST),
        )
    for kind, rows, columns in parts:
        if not json_lines:
            heading = _HEADINGS.get(kind, f"{kind}s")
            typer.echo(
                f"{'' if kind == 'queue' else chr(10)}{heading}:" + ("" if rows else " none")
            )
        shown = rows[:MANY] if kind == "worker" and not json_lines else rows
        write([{"kind": kind, **row} for row in shown], columns, json_lines=json_lines)
        if others := rows[len(shown) :]:
            typer.echo(
                f"and {len(others)} more, which are sending {sum(row['sending'] for row in others)}"
            )
    return DONE
