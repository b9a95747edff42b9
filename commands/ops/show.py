"""The commands that read the queue: `show`, `why`, `headers`, `body` and `stats`. `list` is in
`commands.ops.listing`.

Everything is read through `relay.report.queries`, from the views that people also query by SQL.
What must stay true: reading takes no lock, changes nothing, and creates no database.
"""

import contextlib
import itertools
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer
from sqlalchemy import Engine

from commands.errors import DONE, NOTHING_MATCHED, OUT_OF_REACH, CommandError, say
from commands.ops import explain
from commands.ops.columns import ID_DIGITS, circuit_of, headed
from commands.ops.database import opened
from commands.ops.uncommitted import NotInDatabase, journal_answers
from commands.output import (
    Columns,
    ago,
    as_json,
    counted,
    folded,
    plain,
    span,
    stamp,
    write,
)
from relay.queue.outcome import Outcome
from relay.queue.states import UNFINISHED
from relay.queue.uncommitted import journal_lag
from relay.report.queries import QueueReader
from relay.report.records import DsnRow, MessageRow
from relay.report.rows import Row
from relay.report.statistics import AGES, Statistics
from relay.settings import Settings, load
from relay.spool.bodies import Bodies
from relay.spool.journal.directory import DIRECTORY, OWNED, JournalDirectory
from relay.spool.journal.format import Place
from relay.spool.segments import SegmentStore
from relay.spool.store import BodyUnsendable, Spool

POSSIBLY_DELIVERED = (Outcome.UNCERTAIN, Outcome.MALFORMED)
MAX_WORKERS = 50  # that a table shows
MAX_HEADER = 64 << 10  # octets of a header that the page shows


_ATTEMPTS: Columns = {
    "TRY": lambda row: f"{row['delivery']}.{row['claim']}.{row['attempt_index']}",
    **headed("AT=started_at"),
    "TOOK": lambda row: f"{(row['finished_at'] - row['started_at']).total_seconds():.3f}s",
    **headed("SERVER BYTES=bytes_sent OUTCOME REPLY"),
}
_WORKERS: Columns = {
    **headed("WORKER=id"),
    "HOST": lambda row: f"{row['host']} {row['pid']}",
    **headed("STARTED=started_at"),
    "LEASE": lambda row: ago(row["lease_expires_at"]) if row["alive"] else "expired",
    **headed("SENDING VERSION"),
}
OUTCOMES = ("delivered", "deferred", "rejected", "unreachable", "interrupted", "uncertain")
_SERVERS: Columns = {
    **headed("SERVER WAITING TRIES=attempts LAST=last_at"),
    "OUTCOMES": lambda row: ", ".join(f"{row[name]} {name}" for name in OUTCOMES if row[name]),
    "NOW": circuit_of,
}
_SUMMARY = headed("STATE ROUTE DELIVERIES BYTES OLDEST=oldest_seconds OVERDUE PAUSED")
_PAUSES = headed("PAUSED=subject SINCE=paused_at BY=actor DELIVERIES REASON")
_JOURNAL = headed("WITHOUT_ROWS=messages BYTES FOR=lag_seconds SEGMENTS DISK LIVE")
_RECEIVED = headed("LAST_MINUTE LAST_HOUR BYTES")
_LIMITED: Columns = {
    "LIMIT": lambda row: f"{row['subject']}-{row['what']}",
    "NAME": lambda row: row["name"] or "(others)",
    **headed("REFUSED LAST=last_at"),
}
_RATES = headed("OUTCOME LAST_MINUTE LAST_HOUR BYTES=bytes_sent MEAN=seconds")
_FLOW = headed("MINUTES IN=received OUT=finished WAITING DRAINED_IN=drain_seconds")
_VERSIONS = headed(
    "VERSION SINCE=started_at WORKERS TRIES=attempts DELIVERED DEFERRED REJECTED FAILED UNCERTAIN"
)
_DISK = headed("FREE=free_bytes SIZE=total_bytes DIRECTORY")
_SLOWEST = headed("ID=queue_id TOOK=seconds SERVER BYTES=bytes_sent OUTCOME REPLY")
_AGES: Columns = {
    **headed(
        f"RECIPIENTS=waiting {' '.join(f'{age.replace("under", "<")}={age}' for age in AGES)} older"
    ),
    "DOMAIN": lambda row: row["domain"] or f"({row['domains']} more)",
}


def mounted_spool(settings: Settings, queue: QueueReader) -> Spool | None:
    """The spool of this database; None if another directory, or none, is mounted here."""
    with contextlib.suppress(OSError):
        spool = Spool(settings.spool_dir)
        if spool.identity and spool.identity == queue.spool_id():
            return spool
    return None


def required_spool(settings: Settings, engine: Engine) -> Spool:
    """The spool of this database, for a command that changes it. Raises CommandError if it is not
    mounted here."""
    spool = mounted_spool(settings, QueueReader(engine))
    if spool is None:
        where = f"the spool of this database is not mounted in {settings.spool_dir}"
        raise CommandError(OUT_OF_REACH, f"{where}: run this command where it is mounted")
    return spool


@dataclass(frozen=True, slots=True)
class MessageReport:
    """A message, the file that has its body (its own, or a segment of the journal), the DSNs about
    it and the reasons for the states of its deliveries. `file_size`: octets of the body in the
    file; None if it cannot be read, and `fault` says why."""

    message: MessageRow
    file: Path
    file_size: int | None
    fault: str
    spool_is_mounted: bool
    dsns: Sequence[DsnRow]
    why: list[dict[str, Any]]

    def as_row(self) -> Row:
        """The row for --json."""
        return asdict(self.message) | {
            "file": str(self.file),
            "file_size": self.file_size,
            "spool_mounted": self.spool_is_mounted,
            "why": self.why,
        }


def find_message(text: str) -> MessageReport:
    """`report_on` in the database that the settings name."""
    settings = load(Settings)
    with journal_answers(settings, text), opened(settings) as engine:
        return report_on(QueueReader(engine), settings, text)


def report_on(queue: QueueReader, settings: Settings, text: str) -> MessageReport:
    """Everything about the message whose id is or ends in this text; raises NoSuchMessage."""
    message = queue.message(queue.resolve(text))
    spool, file_size, fault = mounted_spool(settings, queue), None, ""
    if spool:
        try:
            Bodies(spool, queue.engine).stream(
                message.queue_id, message.size, _place(message)
            ).close()
            file_size = message.size
        except (BodyUnsendable, OSError) as error:
            fault = str(error)
    facts = explain.gather(queue, message, settings)
    why = [
        {"delivery": row.number, "state": row.state, "why": reason}
        for row, reason in explain.sentences(facts)
    ]
    file = _file(Spool(settings.spool_dir), message)
    return MessageReport(message, file, file_size, fault, spool is not None, facts.dsns, why)


def _place(message: MessageRow) -> Place | None:
    if message.segment is None or message.position is None:
        return None
    return Place(message.segment, message.position)


def _file(spool: Spool, message: MessageRow) -> Path:
    """The path of the file that has the body, whether it exists or not."""
    if message.segment is None:
        return spool.path(message.queue_id)
    journal = spool.directory / DIRECTORY
    return next(journal.glob(f"{message.segment}.*"), journal / f"{message.segment}{OWNED}")


def show_message(text: str, *, json_lines: bool) -> int:
    """Print everything about one message; the exit status."""
    try:
        report = find_message(text)
    except NotInDatabase as found:
        return _print_uncommitted(found, json_lines=json_lines)
    if json_lines:
        typer.echo(as_json(report.as_row()))
        return DONE
    for name, value in described(report):
        typer.echo(f"{name:>12}: {_wrapped(plain(value), 14).lstrip()}")
    typer.echo()
    write(map(asdict, report.message.attempts), _ATTEMPTS)
    return DONE


def _print_uncommitted(found: NotInDatabase, *, json_lines: bool) -> int:
    """Print what the journal knows; the exit status is that of an outage while the database may
    know more."""
    for row in found.rows:
        if json_lines:
            typer.echo(as_json(row))
            continue
        for name, value in row.items():
            if value is not None:
                shown = _uncommitted_text(name, value)
                typer.echo(f"{name:>12}: {_wrapped(plain(shown), 14).lstrip()}")
    if found.away:
        say(found.away)
    return OUT_OF_REACH if found.away else DONE


def _uncommitted_text(name: str, value: Any) -> str:
    if name == "recipients":
        return ", ".join(value)
    return f"{span(value)} ago" if name == "seconds" else str(value or "<>")


def described(report: MessageReport) -> list[tuple[str, str]]:
    """The message for people, in order: (name, text)."""
    message = report.message
    lines = [*_envelope(report)]
    for to in message.recipients:
        dsn = f", NOTIFY={to.notify}" if to.notify else ""
        dsn += f", ORCPT={to.orcpt}" if to.orcpt else ""
        lines.append(("recipient", f"{to.address}, delivery {to.delivery}{dsn}"))
    for row in message.deliveries:
        origin = f", split from delivery {row.parent}" if row.parent else ""
        finished = f" {stamp(row.finished_at)}" if row.finished_at else ""
        worker = f" by worker {row.worker[-ID_DIGITS:]}" if row.worker else ""
        to_servers = f" to {row.servers}" if row.servers else ""
        route = f"route {row.route}{to_servers}{origin}, expires {stamp(row.expires_at)}"
        lines.append((f"delivery {row.number}", f"{row.state}{finished}{worker}, {route}"))
    lines += [("why", row["why"]) for row in report.why]
    servers = {
        attempt.server or "any server"
        for attempt in message.attempts
        if attempt.outcome in POSSIBLY_DELIVERED
    }
    if servers:
        keys = " or ".join(filter(None, (message.queue_id, message.header_message_id)))
        text = f"possibly delivered to {', '.join(sorted(servers))}: search there for {keys}"
        lines.append(("duplicate", text))
    return lines


def _envelope(report: MessageReport) -> Iterator[tuple[str, str]]:
    """What smtpd recorded of the message, without what is empty: (name, text)."""
    message = report.message
    file = f"{report.file_size} bytes"
    if not report.spool_is_mounted:
        file = "the spool is not mounted here"
    elif report.file_size is None:
        needed = any(row.state in UNFINISHED for row in message.deliveries)
        exists = needed and report.file.exists()
        file = report.fault if exists else "missing" if needed else "removed"
    if message.segment is not None:
        file = f"at {message.position}, {file}"
    user = f" as {message.auth_user}" if message.auth_user else ""
    name = f" ({message.helo})" if message.helo else ""
    client = f"{message.client_address or 'here'}{name} by {message.protocol}"
    tls = f" ({message.tls})" if message.tls else ""
    received = message.received_at
    values = {
        "id": message.queue_id,
        "sender": message.sender or "<>",
        "received": f"{stamp(received)} ({ago(received)} ago) from {client}{tls}{user}",
        "size": f"{message.size} bytes",
        "Message-ID": message.header_message_id,
        "BODY": message.body_type,
        "RET": message.ret,
        "ENVID": message.envid,
        "DSN of": message.dsn_of and explain.about(message),
        "file": f"{report.file}, {file}",
    }
    return ((name, value) for name, value in values.items() if value)


def show_why(text: str, *, json_lines: bool) -> int:
    """Print why a message is in its state, a sentence for each delivery; the exit status."""
    try:
        report = find_message(text)
    except NotInDatabase as found:
        return _print_uncommitted(found, json_lines=json_lines)
    for row in report.why:
        line = as_json({"queue_id": report.message.queue_id, **row})
        typer.echo(line if json_lines else _wrapped(plain(row["why"])))
    return DONE


def _wrapped(text: str, indent: int = 0) -> str:
    """Text in lines that fit the terminal; unchanged if standard output is no terminal."""
    return folded(text, indent, shutil.get_terminal_size().columns) if sys.stdout.isatty() else text


def show_body(end: str, *, header_only: bool) -> int:
    """Print the stored message or its header: unchanged, but escaped on a terminal; the exit
    status."""
    settings = load(Settings)
    with opened(settings) as engine:
        queue = QueueReader(engine)
        message, spool = queue.message(queue.resolve(end)), mounted_spool(settings, queue)
    if spool is None:
        text = f"the spool of this database is not mounted in {settings.spool_dir}"
        raise CommandError(OUT_OF_REACH, text)
    with opened(settings) as engine:
        try:
            body = Bodies(spool, engine).stream(message.queue_id, message.size, _place(message))
        except BodyUnsendable as error:
            states = ", ".join(sorted({row.state for row in message.deliveries}))
            raise CommandError(NOTHING_MATCHED, f"{error}; its deliveries are {states}") from None
    added = (message.prefix or "").encode().splitlines(keepends=True)
    with body:
        for line in itertools.chain(added, body):
            if header_only and line == b"\n":
                break
            if sys.stdout.isatty():
                shown = line.rstrip(b"\n").decode("utf-8", "backslashreplace").expandtabs()
                typer.echo(plain(shown))
            else:
                sys.stdout.buffer.write(line)
    return DONE


def stored_header(queue: QueueReader, settings: Settings, queue_id: str) -> tuple[list[str], bool]:
    """The lines of the header of a stored message, and whether MAX_HEADER cut it short; raises
    BodyUnsendable, and OSError for a spool that is not mounted here."""
    message, spool = queue.message(queue_id), mounted_spool(settings, queue)
    if spool is None:
        raise FileNotFoundError("the spool is not mounted here")
    lines, octets = list[str](), 0
    with Bodies(spool, queue.engine).stream(
        message.queue_id, message.size, _place(message)
    ) as body:
        for line in body:
            octets += len(line)
            if line == b"\n":
                break
            if octets > MAX_HEADER:
                return lines, True
            lines.append(line.rstrip(b"\n").decode("utf-8", "backslashreplace").expandtabs())
    return lines, False


def journal_rows(settings: Settings, queue: QueueReader) -> list[Row]:
    """The lag and the size of the journal, in one row; none if the spool is not mounted here."""
    spool = mounted_spool(settings, queue)
    if spool is None:
        return []
    lag, (segments, octets) = journal_lag(spool, queue.segments()), spool.journal_usage()
    store = SegmentStore(
        queue.engine, JournalDirectory(spool.handle), spool.identity, settings.retention
    )
    return [
        {
            "messages": lag.messages,
            "bytes": lag.octets,
            "lag_seconds": lag.seconds,
            "segments": segments,
            "disk": octets,
            "live": store.usage()[1],
        }
    ]


def disk_of(spool: Spool | None) -> list[Row]:
    """The free space of the spool, if it is mounted here."""
    if spool is None:
        return []
    disk = os.statvfs(spool.directory)
    free, total = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
    return [{"directory": str(spool.directory), "free_bytes": free, "total_bytes": total}]


def show_stats(*, json_lines: bool) -> int:
    """Print counts, ages, workers, servers, pauses, rates and disk; the exit status."""
    settings = load(Settings)
    with opened(settings) as engine:
        queue = QueueReader(engine)
        statistics = Statistics(engine)
        workers = [asdict(row) for row in queue.workers() if row.ended_at is None]
        parts: tuple[tuple[str, str, Sequence[Row], Columns], ...] = (
            ("queue", "queue", queue.read("summary"), _SUMMARY),
            ("age", "unfinished recipients by age and domain", statistics.ages(), _AGES),
            ("worker", "workers", workers, _WORKERS),
            ("server", "servers", queue.read("servers"), _SERVERS),
            ("pause", "pauses", queue.read("paused"), _PAUSES),
            ("journal", "journal", journal_rows(settings, queue), _JOURNAL),
            ("flow", "deliveries in and out", statistics.read("flow"), _FLOW),
            ("disk", "disk of the spool", disk_of(mounted_spool(settings, queue)), _DISK),
            ("version", "tries of the last day by version", statistics.read("versions"), _VERSIONS),
            ("received", "received messages", [statistics.received()], _RECEIVED),
            (
                "rate_limit",
                "refused by rate limits in the last day",
                statistics.rate_limited(),
                _LIMITED,
            ),
            ("rate", "tries of the last hour", statistics.read("rates"), _RATES),
            (
                "slowest",
                "slowest tries of the last hour",
                statistics.read("slowest", most=5),
                _SLOWEST,
            ),
        )
    for kind, heading, rows, columns in parts:
        if not json_lines:
            typer.echo(f"{'' if kind == 'queue' else chr(10)}{heading}:{'' if rows else ' none'}")
        shown = rows[:MAX_WORKERS] if kind == "worker" and not json_lines else rows
        write([{"kind": kind, **row} for row in shown], columns, json_lines=json_lines)
        if others := rows[len(shown) :]:
            sending = counted(sum(row["sending"] for row in others))
            typer.echo(f"and {len(others)} more workers, which are sending {sending}")
    return DONE
