"""`qmqp-relay check`: whether the relay can work here, and what to do where it cannot.

Each check returns results and does not raise for a fault of what it checks. Nothing is changed, and
QMQP servers are asked as `probe` asks them, which delivers nothing. What must stay true: a result
that is not `ok` says what to do.
"""

import asyncio
import contextlib
import os
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from redis import Redis, RedisError
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import Engine, text
from sqlalchemy.exc import SQLAlchemyError

from commands.errors import DONE, OUT_OF_REACH, WRONG_USE
from commands.ops.database import opened
from commands.ops.show import mounted_spool
from commands.output import size, span, write
from commands.standalone import valkey
from plugins.loader import load as load_plugins
from qmqp.probe import probe
from reception.policy import Policy, qmqp_networks
from relay.db import engine as database
from relay.db import schema
from relay.events.webhooks import SecretError, load_webhooks, read_secrets
from relay.hints import QUEUES
from relay.log import escaped, first_line
from relay.queue.uncommitted import journal_lag
from relay.redaction import redacted
from relay.report.queries import QueueReader
from relay.routes import Routes, Server
from relay.settings import Settings, SettingsError, SmtpdSettings, WorkerSettings, load
from relay.spool.journal.directory import JournalDirectory
from relay.spool.mark import SpoolMark
from relay.spool.store import file_system
from relay.tls import DAY, WARN_DAYS, CertificateError, load_pair

type Verdict = Literal["ok", "warn", "fail", "away"]
TIMEOUT = 5.0  # seconds for a connection, and for a reply
LATE_ROWS = 60.0  # seconds
SHOWN = 5  # files in the text about many


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What was checked, the verdict, and what to do. `away` is a failure because a service is out
    of reach, which has an exit status of its own."""

    what: str
    verdict: Verdict
    words: str
    remedy: str = ""


_COLUMNS = {
    "CHECK": lambda row: row["what"],
    "": lambda row: "fail" if row["verdict"] == "away" else row["verdict"],
    "RESULT": lambda row: row["words"] + (f"; {row['remedy']}" if row["remedy"] else ""),
}


def run(*, json_lines: bool) -> int:
    """Check everything and print the results; the exit status."""
    results = list(check_all())
    write(map(asdict, results), _COLUMNS, json_lines=json_lines)
    verdicts = {result.verdict for result in results}
    return OUT_OF_REACH if "away" in verdicts else WRONG_USE if "fail" in verdicts else DONE


def check_all() -> Iterator[CheckResult]:
    """Every result, the most important first."""
    try:
        smtpd, settings = load(SmtpdSettings), load(WorkerSettings)
        Policy(smtpd)
        qmqp_networks(smtpd)
        routes = Routes.load(settings)
    except SettingsError as error:
        faults = "; ".join(str(error).splitlines())
        yield CheckResult("settings", "fail", faults, "correct these variables")
        return
    yield CheckResult("settings", "ok", f"RELAY_STATE_DIR = {settings.state_dir}")
    yield from _database(settings)
    yield from _file_modes(settings)
    yield from check_webhooks(settings)
    yield from check_certificate(smtpd)
    yield from check_plugins(smtpd)
    yield _broker(settings)
    yield from check_routes(routes)
    servers = [server for route in routes.all() for server in route.servers]
    yield from asyncio.run(_servers(dict.fromkeys(servers)))
    if not servers:
        yield CheckResult(
            "QMQP server",
            "warn",
            "no server is configured, so mail is accepted and waits (a demo has its own server)",
            "set RELAY_QMQP_SERVERS",
        )


def _database(settings: Settings) -> Iterator[CheckResult]:
    url = redacted(settings.database_url)
    try:
        with opened(settings) as engine:
            with database.reading(engine) as connection:
                revision = connection.scalar(text("SELECT version_num FROM alembic_version"))
            faults, spool_id = database.check_durable(engine), QueueReader(engine).spool_id()
            current = revision == schema.REVISION
            journal = list(_journal(settings, engine)) if spool_id and current else []
    except database.DatabaseError as error:
        remedy = "correct RELAY_DATABASE_URL, or run `qmqp-relay migrate`"
        yield CheckResult("database", "fail", str(error), remedy)
        return
    except SQLAlchemyError as error:
        fault = first_line(getattr(error, "orig", error))
        verdict: Verdict = "away"
        remedy = "start the database, or correct RELAY_DATABASE_URL"
        if "alembic_version" in fault:
            verdict, remedy = "fail", "run `qmqp-relay migrate`"
        yield CheckResult("database", verdict, f"{url}: {fault}", remedy)
        return
    if revision != schema.REVISION:
        fault = f"the schema is at {revision}, this program needs {schema.REVISION}"
        yield CheckResult("database", "fail", fault, "run `qmqp-relay migrate`")
    elif faults:
        yield CheckResult(
            "database",
            "warn" if settings.unsafe_durability else "fail",
            f"a power failure can lose mail: {', '.join(faults)}",
            "change these settings of the database",
        )
    else:
        yield CheckResult("database", "ok", f"{url} at revision {revision}, durable")
    yield CheckResult("spool", *_spool(settings, spool_id))
    yield from journal


def _spool(settings: Settings, known: str | None) -> tuple[Verdict, str, str]:
    """Verdict, text and remedy. `known` is the identity of the spool that the database names."""
    directory = settings.spool_dir
    marker = directory / "spool-id"
    identity = marker.read_text().strip() if os.access(marker, os.R_OK) else None
    if identity != known:
        text = f"{directory} is spool {identity}, the database belongs to spool {known}"
        return "fail", text, "set RELAY_SPOOL_DIR to the spool of this database"
    if not known:
        return "ok", f"{directory}: smtpd or the worker will create it", ""
    if not os.access(directory, os.W_OK | os.X_OK):
        return "fail", f"{directory} is not writable", "chown it to the relay's user"
    if (kind := file_system(directory)) in {"tmpfs", "ramfs"}:
        return "warn", f"{directory} is on {kind}, which a restart empties", "put it on a disk"
    disk = os.statvfs(directory)
    return "ok", f"{directory}, {size(disk.f_bavail * disk.f_frsize)} free", ""


def _journal(settings: Settings, engine: Engine) -> Iterator[CheckResult]:
    """The journal: mark, lag, and segments that only an operator can adopt."""
    queue, what = QueueReader(engine), "journal"
    spool = mounted_spool(settings, queue)
    if spool is None:
        return  # the result for the spool says it
    mark, known = queue.mark(), SpoolMark(JournalDirectory(spool.handle), spool.identity).known
    if mark < known:
        text = f"the database has the mark {mark}, the spool {known}: the database is older"
        remedy = "run `qmqp-relay fsck --rebuild`; until then mail is accepted, and none is sent"
        yield CheckResult(what, "fail", text, remedy)
    lag = journal_lag(spool, queue.segments())
    if lag.seconds > LATE_ROWS:
        text = f"{lag.messages} messages have no rows yet, the oldest for {span(lag.seconds)}"
        yield CheckResult(what, "warn", text, "start smtpd, or read its log")
    elif mark >= known:
        segments, octets = spool.journal_usage()
        text = f"{segments} segments, {size(octets)}, mark {mark}"
        yield CheckResult(what, "ok", text)
    if others := sorted(lag.foreign_hosts):
        text = f"segments of other hosts are not sealed: {', '.join(others)}"
        remedy = "if a host is gone for good, run `qmqp-relay fsck --adopt`"
        yield CheckResult(what, "warn", text, remedy)


def _file_modes(settings: Settings) -> Iterator[CheckResult]:
    """Files that other users of this machine may read or change. The umask 077 protects only files
    that the relay has created."""
    directory = settings.state_dir
    files = {*directory.glob("*"), settings.spool_dir, *settings.spool_dir.glob("*")}
    if settings.database_url.startswith("sqlite:///"):
        path = settings.database_url.removeprefix("sqlite:///")
        files |= {Path(path + end) for end in ("", "-wal", "-shm", ".lock", ".cleaner")}
    exposed = list[str]()
    for file in sorted(files):
        with contextlib.suppress(OSError):
            if file.stat().st_mode & stat.S_IRWXO and file.parent.stat().st_mode & stat.S_IXOTH:
                exposed.append(str(file))
    if exposed:
        more = " ..." if len(exposed) > SHOWN else ""
        yield CheckResult(
            "files",
            "warn",
            f"other users have access to: {', '.join(exposed[:SHOWN])}{more}",
            f"run chmod -R o-rwx {directory}, and the same for files elsewhere",
        )
    elif directory.is_dir():
        yield CheckResult("files", "ok", "other users have no access")


def check_webhooks(settings: Settings) -> Iterator[CheckResult]:
    """Whether the secrets of each webhook can be read."""
    for webhook in load_webhooks(settings):
        what = f"webhook {webhook.name}"
        try:
            secrets = read_secrets(webhook.secret_file)
        except SecretError as error:
            yield CheckResult(what, "fail", str(error))
        else:
            found = "1 secret" if len(secrets) == 1 else f"{len(secrets)} secrets"
            yield CheckResult(what, "ok", f"{found}; `webhooks test {webhook.name}` posts an event")


def check_certificate(settings: SmtpdSettings) -> Iterator[CheckResult]:
    """Whether smtpd could use the files of the certificate now, and until when."""
    if settings.tls_certificate is None:
        return
    try:
        pair = load_pair(settings, settings.tls_client_ca)
    except CertificateError as error:
        remedy = "correct the files; a running smtpd keeps the pair that it has"
        yield CheckResult("certificate", "fail", str(error), remedy)
        return
    days = (pair.expires_at - time.time()) / DAY
    text = f"{settings.tls_certificate} ends in {days:.0f} days"
    if days < 0:
        text = f"{settings.tls_certificate} ended {-days:.0f} days ago"
    verdict: Verdict = "fail" if days < 0 else "warn" if days < WARN_DAYS else "ok"
    yield CheckResult("certificate", verdict, text, "" if verdict == "ok" else "renew it")
    key = settings.tls_key or settings.tls_certificate
    if key.stat().st_mode & stat.S_IROTH:
        text = f"other users can read the key in {key}"
        yield CheckResult("certificate", "warn", text, f"run chmod o-r {key}")


def check_plugins(settings: Settings) -> Iterator[CheckResult]:
    """Whether every plugin can be loaded and registered."""
    try:
        loaded = load_plugins(settings)
    except SettingsError as error:
        yield CheckResult("plugins", "fail", str(error), "correct it; until then nothing starts")
        return
    if loaded is not None:
        names = ", ".join(plugin.name for plugin in loaded.loaded)
        yield CheckResult("plugins", "ok", f"loaded in this order: {names}")


def _broker(settings: Settings) -> CheckResult:
    url = redacted(_broker_url(settings))
    try:
        _redis(settings).ping()
    except (RedisError, OSError, ValueError) as error:
        remedy = "start it, or correct RELAY_BROKER_URL; without it mail is some seconds late"
        return CheckResult("broker", "away", f"{url}: {first_line(error)}", remedy)
    return CheckResult("broker", "ok", url)


def broker_lists(settings: Settings) -> dict[str, int]:
    """How many hints wait at the broker, by list; empty when the broker is out of reach."""
    try:
        client = _redis(settings)
        return {name: int(client.llen(f"qmqp-relay:{name}")) for name in QUEUES}
    except (RedisError, OSError, ValueError):
        return {}


def _broker_url(settings: Settings) -> str:
    return valkey.url(settings) or settings.broker_url


def _redis(settings: Settings) -> Redis:
    url = _broker_url(settings).replace("redis+socket://", "unix://")
    return Redis.from_url(url, socket_timeout=TIMEOUT, retry=Retry(NoBackoff(), 0))


def check_routes(routes: Routes) -> Iterator[CheckResult]:
    """Each route with its recipients and servers, in the order in which they are tried."""
    for route in routes.all():
        servers = ", ".join(server.name for server in route.servers) or "no server"
        recipients = ", ".join(route.recipients) or "everything else"
        yield CheckResult(f"route {route.name}", "ok", f"{recipients} -> {servers}")


async def _servers(servers: Iterable[Server]) -> list[CheckResult]:
    """All servers at once: a Postfix that refuses us replies only after a second
    (qmqpd_error_delay)."""
    return await asyncio.gather(*map(_server, servers))


async def _server(server: Server) -> CheckResult:
    """Whether a server accepts our mail. One that accepts the connection and then closes it, or
    refuses us, does not."""
    what = f"QMQP server {server.name}"
    result = await probe(
        host=server.host, port=server.port, path=server.path, connect=TIMEOUT, reply=TIMEOUT
    )
    if not result.reachable:
        remedy = "mail for it waits; start it, or configure another server"
        return CheckResult(what, "away", result.words, remedy)
    if not result.allowed:
        reply = f" ({escaped(result.said)})" if result.said else ""
        remedy = "allow this machine in its configuration, or configure another server"
        return CheckResult(what, "fail", result.words + reply, remedy)
    return CheckResult(what, "ok", f"accepts connections from this machine ({result.family})")
