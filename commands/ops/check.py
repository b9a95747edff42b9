"""`qmqp-relay check`: whether the relay can work here, and what to do where it cannot.

Each check is a function that answers with findings and never raises for what it looks at; nothing
is changed, and QMQP servers are asked as `probe` asks them, which delivers nothing. What must stay
true: a finding that is not `ok` names its remedy.
"""

import asyncio
import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from commands import output as tables
from commands.errors import DONE, OUT_OF_REACH, WRONG_USE
from commands.ops import show as inspect
from commands.standalone import valkey
from qmqp.probe import probe
from reception.policy import PolicyError, client_networks
from relay.db import engine as database
from relay.db import schema
from relay.log import escaped, first_line
from relay.report.queries import QueueReader
from relay.routes import Routes, Server
from relay.settings import Settings, SettingsError, SmtpdSettings, WorkerSettings, load, redacted
from relay.spool.store import file_system

if TYPE_CHECKING:
    from redis import Redis

PATIENCE = 5.0  # seconds for a connection
SHOWN = 5  # files in a finding about many


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What was looked at, how it is, and what mends it. `away`: out of reach, so `fail` with
    another exit status."""

    what: str
    verdict: Literal["ok", "warn", "fail", "away"]
    words: str
    remedy: str = ""


_COLUMNS = {
    "CHECK": lambda row: row["what"],
    "": lambda row: "fail" if row["verdict"] == "away" else row["verdict"],
    "FOUND": lambda row: row["words"] + (f"; {row['remedy']}" if row["remedy"] else ""),
}


def run(*, json_lines: bool) -> int:
    """Look at everything and print it; the exit status."""
    findings = list(look())
    tables.write(map(asdict, findings), _COLUMNS, json_lines=json_lines)
    verdicts = {finding.verdict for finding in findings}
    return OUT_OF_REACH if "away" in verdicts else WRONG_USE if "fail" in verdicts else DONE


def look() -> Iterator[CheckResult]:
    """Every finding, in the order in which they matter."""
    try:
        smtpd, settings = load(SmtpdSettings), load(WorkerSettings)
        client_networks(smtpd.client_networks, smtpd.publish)
        routes = Routes.load(settings)
    except (SettingsError, PolicyError) as error:
        yield CheckResult(
            "settings", "fail", "; ".join(str(error).splitlines()), "mend the variables named"
        )
        return
    yield CheckResult("settings", "ok", f"RELAY_STATE_DIR = {settings.state_dir}")
    yield from _database(settings)
    yield from _open(settings)
    yield _broker(settings)
    yield from _routes(routes)
    servers = [server for route in routes.all() for server in route.servers]
    yield from asyncio.run(_servers(list(dict.fromkeys(servers))))
    if not servers:
        words = "none is named: mail is kept and waits (but a demo brings its own)"
        yield CheckResult("QMQP server", "warn", words, "set RELAY_QMQP_SERVERS")


def _database(settings: Settings) -> Iterator[CheckResult]:
    what, url = "database", redacted(settings.database_url)
    try:
        with inspect.opened(settings) as engine:
            with database.reading(engine) as connection:
                revision = connection.execute(
                    text("SELECT version_num FROM alembic_version")
                ).scalar()
            faults, spool_id = database.check_durable(engine), QueueReader(engine).spool_id()
    except database.DatabaseError as error:
        yield CheckResult(what, "away", str(error), "")
        return
    except SQLAlchemyError as error:
        words = first_line(getattr(error, "orig", error))
        missing = "alembic_version" in words
        remedy = (
            "run `qmqp-relay migrate`" if missing else "start it, or correct RELAY_DATABASE_URL"
        )
        yield CheckResult(what, "fail" if missing else "away", f"{url}: {words}", remedy)
        return
    if revision != schema.REVISION:
        words = f"schema is at {revision}, this program needs {schema.REVISION}"
        yield CheckResult(what, "fail", words, "run `qmqp-relay migrate`")
    elif faults:
        verdict: Literal["warn", "fail"] = "warn" if settings.unsafe_durability else "fail"
        yield CheckResult(
            what, verdict, f"would lose mail at a power cut: {', '.join(faults)}", "turn that on"
        )
    else:
        yield CheckResult(what, "ok", f"{url} at revision {revision}, durable")
    yield _spool(settings, spool_id)


def _spool(settings: Settings, known: str | None) -> CheckResult:
    what, directory = "spool", settings.spool_dir
    marker = directory / "spool-id"
    found = marker.read_text().strip() if os.access(marker, os.R_OK) else None
    if found != known:
        words = f"{directory} says {found or 'nothing'}, the database knows {known or 'none'}"
        return CheckResult(
            what, "fail", words, "it is not the spool of this database: set RELAY_SPOOL_DIR"
        )
    if not known:
        return CheckResult(what, "ok", f"{directory}: smtpd or worker will make it")
    if not os.access(directory, os.W_OK | os.X_OK):
        return CheckResult(
            what, "fail", f"{directory} is not writable", "chown it to the relay's user"
        )
    if (kind := file_system(directory)) in {"tmpfs", "ramfs"}:
        return CheckResult(
            what, "warn", f"{directory} is on {kind}, which forgets mail", "choose a disk"
        )
    room = os.statvfs(directory)
    return CheckResult(
        what, "ok", f"{directory}, {tables.size(room.f_bavail * room.f_frsize)} free"
    )


def _open(settings: Settings) -> Iterator[CheckResult]:
    """Our files that others on this machine may read or change: umask 077 closes only what is made
    from now on."""
    directory, found = settings.state_dir, list[str]()
    files = {*directory.glob("*"), settings.spool_dir, *settings.spool_dir.glob("*")}
    url = settings.database_url
    if url.startswith("sqlite:///"):
        files |= {
            Path(url.removeprefix("sqlite:///") + end)
            for end in ("", "-wal", "-shm", ".lock", ".housekeeping")
        }
    for file in sorted(files):
        with contextlib.suppress(OSError):
            if file.stat().st_mode & stat.S_IRWXO and file.parent.stat().st_mode & stat.S_IXOTH:
                found.append(str(file))
    if found:
        words = f"open to others: {', '.join(found[:SHOWN])}" + (" ..." if found[SHOWN:] else "")
        yield CheckResult(
            "files", "warn", words, f"chmod -R o-rwx {directory}, and what of them stands elsewhere"
        )
    elif directory.is_dir():
        yield CheckResult("files", "ok", "closed to others")


def _broker(settings: Settings) -> CheckResult:
    from redis import RedisError

    url = redacted(_broker_url(settings))
    try:
        _redis(settings).ping()
    except (RedisError, OSError, ValueError) as error:
        remedy = "start it, or correct RELAY_BROKER_URL; mail is delivered without it, some seconds later"
        return CheckResult("broker", "away", f"{url}: {first_line(error)}", remedy)
    return CheckResult("broker", "ok", url)


def broker_lists(settings: Settings) -> dict[str, int]:
    """How many hints wait at the broker, by list; empty when it is away, which stops no mail."""
    from redis import RedisError

    from relay.hints import QUEUES

    try:
        client = _redis(settings)
        return {name: int(client.llen(f"qmqp-relay:{name}")) for name in QUEUES}
    except (RedisError, OSError, ValueError):
        return {}


def _broker_url(settings: Settings) -> str:
    return valkey.url(settings) or settings.broker_url


def _redis(settings: Settings) -> "Redis":
    from redis import Redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    url = _broker_url(settings).replace("redis+socket://", "unix://")
    return Redis.from_url(url, socket_timeout=PATIENCE, retry=Retry(NoBackoff(), 0))


def _routes(routes: Routes) -> Iterator[CheckResult]:
    """What goes where, in the order in which routes are asked; the last one takes the rest."""
    for route in routes.all():
        servers = ", ".join(server.name for server in route.servers) or "no server"
        taken = ", ".join(route.recipients) or "everything else"
        yield CheckResult(f"route {route.name}", "ok", f"{taken} -> {servers}")


async def _servers(servers: Sequence[Server]) -> list[CheckResult]:
    """All servers at once: a Postfix that refuses us says so after a second only
    (qmqpd_error_delay)."""
    return await asyncio.gather(*map(_server, servers))


async def _server(server: Server) -> CheckResult:
    """Whether a server lets us in. One that takes the connection and closes it, or says no, takes
    no mail of ours."""
    what = f"QMQP server {server.name}"
    found = await probe(
        host=server.host, port=server.port, path=server.path, connect=PATIENCE, reply=PATIENCE
    )
    if not found.reachable:
        return CheckResult(what, "away", found.words, "mail for it waits; start it or name another")
    if not found.allowed:
        said = f" ({escaped(found.said)})" if found.said else ""
        return CheckResult(
            what, "fail", found.words + said, "have it let this machine in, or name another"
        )
    return CheckResult(what, "ok", f"takes connections from us ({found.family})")
