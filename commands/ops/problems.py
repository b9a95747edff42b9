"""`qmqp-relay problems`: what is wrong now, with the next command to type.

`relay.report.problems` reads the database; the disk is that of the spool, if it is mounted here,
and the certificate is in the files that the settings name.
The exit status is 1 if there is a problem. With --nagios the output is one line with performance
data, and the status is that of a Nagios plugin: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict

import typer
from sqlalchemy import Engine

from commands.errors import DONE, explanation, say
from commands.ops.database import opened
from commands.ops.show import disk_of, mounted_spool
from commands.output import Columns, age_or_time, plain, write
from relay.queue.uncommitted import journal_lag
from relay.report.problems import (
    CRITICAL,
    KINDS,
    Problem,
    Problems,
    certificate,
    disk,
    journal,
)
from relay.report.queries import QueueReader
from relay.settings import SmtpdSettings, load
from relay.tls import DAY, WARN_DAYS, CertificateError, load_pair

FOUND = 1
NAGIOS = ("OK", "WARNING", "CRITICAL", "UNKNOWN")
_COLUMNS: Columns = {
    "PROBLEM": lambda row: str(row["kind"]),
    "SUBJECT": lambda row: str(row["subject"]),
    "SINCE": lambda row: age_or_time(row["since"]),
    "COUNT": lambda row: str(row["count"]),
    "TEXT": lambda row: f"{row['text']}. Next: {row['next']}",
}


def show_problems(*, form: str, nagios: bool) -> int:
    """Print every problem; the exit status."""
    if nagios:
        return _nagios()
    found, _ = find_problems()
    write(map(asdict, found), _COLUMNS, form=form)
    if not found:
        say("no problem found")
    return FOUND if found else DONE


def find_problems() -> tuple[list[Problem], int]:
    """Every problem, the most urgent first, and how many deliveries wait."""
    settings = load(SmtpdSettings)
    with opened(settings) as engine:
        return problems_of(engine, settings), Problems(engine).waiting()


def problems_of(engine: Engine, settings: SmtpdSettings) -> list[Problem]:
    """The problems of a database and, if it is mounted here, of its spool."""
    spool = mounted_spool(settings, QueueReader(engine))
    disks = [
        problem
        for row in disk_of(spool)
        for problem in disk(row["directory"], row["free_bytes"], row["total_bytes"])
    ]
    lag = journal_lag(spool, QueueReader(engine).segments()) if spool else None
    behind = journal(lag.messages, lag.seconds) if lag else ()
    found = [*Problems(engine).all(), *disks, *behind, *_certificate(settings)]
    return sorted(found, key=lambda one: KINDS.index(one.kind))


def _certificate(settings: SmtpdSettings) -> Iterator[Problem]:
    file, days, fault = settings.tls_certificate, 0.0, ""
    if file is not None:
        try:
            days = (load_pair(settings, settings.tls_client_ca).expires_at - time.time()) / DAY
        except CertificateError as error:
            fault = str(error)
        yield from certificate(str(file), days, WARN_DAYS, fault)


def _nagios() -> int:
    """Print one line for Nagios; its status."""
    try:
        found, waiting = find_problems()
    except Exception as error:
        status, text = explanation(error)
        if status is None:
            raise
        return _line(3, text, "")
    counts = Counter(problem.kind for problem in found)
    critical = any(problem.kind in CRITICAL for problem in found)
    values = {"problems": len(found), "waiting": waiting} | {kind: counts[kind] for kind in KINDS}
    shown = "; ".join(f"{one.kind} {one.subject} {one.text}".replace("  ", " ") for one in found)
    data = " ".join(f"{name}={value}" for name, value in values.items())
    return _line(2 if critical else min(len(found), 1), shown or "no problem found", data)


def _line(status: int, text: str, data: str) -> int:
    """Print a status and its text. A bar separates the data, so the text has none."""
    shown = f"QMQP-RELAY {NAGIOS[status]} - {plain(text).replace('|', '/')}"
    typer.echo(f"{shown} | {data}" if data else shown)
    return status
