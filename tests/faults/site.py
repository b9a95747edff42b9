"""A relay as it runs on a server, with everything around it that a fault may hit.

smtpd, two workers, a broker, PostgreSQL or SQLite, and two QMQP servers. A trial asks for the
features that its fault needs: `proxy` (before PostgreSQL), `disk` (spool and database each on an
ext4 of its own) and `shim` (disk and clock of smtpd and workers, and the clock of PostgreSQL).

What must stay true: nothing here helps the relay; a program that dies stays dead until a fault or
the end of it starts it again.
"""

import os
import random
import shutil
import signal
import smtplib
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from relay.db.engine import connect, reading
from tests.acceptance.stack import relay_environ
from tests.faults.books import Evidence, SentMail, balance
from tests.faults.disks import MountedDisk
from tests.faults.proxy import DatabaseProxy
from tests.faults.servers import Mailbox, MailServer, PlannedReplies
from tests.faults.shim import FaultShim
from tests.faults.traffic import Plan
from tests.services import Broker, Postgres, ServerProcess, free_port
from tests.waiting import until

DATABASE = "relay"
LOGS = "logs"
WORKERS = 2
LEASE = 4.0
ACCEPT_DEADLINE = 5.0
SETTINGS = {
    "LEASE": f"{LEASE:g}s",
    "ACCEPT_DEADLINE": f"{ACCEPT_DEADLINE:g}s",
    "GRACE": "1s",
    "UNCERTAIN_DELAY": "1s",
    "RETRY_MIN": "500ms",
    "RETRY_MAX": "2s",
    "CONNECT_TIMEOUT": "2s",
    "IO_TIMEOUT": "4s",
    "REPLY_TIMEOUT": "4s",
    "DRAIN_TIMEOUT": "3s",
    "SMTP_TIMEOUT": "30s",
    "HOSTNAME": "relay.example.net",
    "LOG_FORMAT": "json",
}
# Deliveries that are not final, or that only an operator can continue.
_UNFINISHED = """SELECT count(*) FROM deliveries
    WHERE state IN ('queued', 'sending', 'deferred', 'held')
    OR (state IN ('bounced', 'expired') AND due_at IS NOT NULL)"""
_STATES = """SELECT state, last_reply, count(*) FROM deliveries
    WHERE state NOT IN ('delivered', 'split') GROUP BY state, last_reply ORDER BY 3 DESC LIMIT 5"""
# Attempts of a recipient's delivery, and of those that it was split from.
_UNCERTAIN = """WITH RECURSIVE line AS (
    SELECT queue_id, address, delivery AS number FROM recipients
    UNION ALL
    SELECT l.queue_id, l.address, d.parent FROM line l
    JOIN deliveries d ON d.queue_id = l.queue_id AND d.number = l.number
    WHERE d.parent IS NOT NULL
) SELECT l.address, count(*) FROM line l
    JOIN attempts a ON a.queue_id = l.queue_id AND a.delivery = l.number
    WHERE a.outcome IN ('uncertain', 'malformed') GROUP BY l.address"""


@dataclass(frozen=True, slots=True)
class Templates:
    """What every trial copies: `directory` has the SQLite file and the data of PostgreSQL, both
    migrated; `programs` are PostgreSQL's, `shim` is the library, if there is a compiler."""

    directory: Path
    programs: Path
    shim: Path | None

    @classmethod
    def load(cls, directory: Path) -> "Templates":
        """Those that `make_templates` made there."""
        shim = directory / "shim.so"
        programs = Path((directory / "programs").read_text())
        return cls(directory, programs, shim if shim.exists() else None)


class RelayProgram(ServerProcess):
    """`qmqp-relay ROLE`."""

    def __init__(self, directory: Path, role: str, environ: dict[str, str]) -> None:
        directory.mkdir()
        super().__init__(directory)
        self.role = role
        self._environ = environ

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "commands.cli.main", self.role]

    def _options(self) -> dict[str, Any]:
        return {"env": self._environ}

    def _answers(self) -> bool:
        """smtpd greets; a worker has touched its heartbeat file."""
        if self.role == "worker":
            return Path(self._environ["RELAY_STATE_DIR"], f"worker-{self.pid}.heartbeat").exists()
        host, _, port = self._environ["RELAY_SMTP_LISTEN"].rpartition(":")
        try:
            smtplib.SMTP(host, int(port), timeout=10).close()
        except (OSError, smtplib.SMTPException):
            return False
        return True

    def children(self, module: str) -> list[int]:
        """The processes that it has started from this module."""
        return [pid for pid in self._members()[1:] if module in _command_line(pid)]


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:  # it has ended
        return ""


class FaultSite:
    """Built by `running_site`."""

    def __init__(
        self,
        directory: Path,
        database: str,
        features: frozenset[str],
        seed: str,
        templates: Templates,
        stack: ExitStack,
    ) -> None:
        self.directory = directory
        self.database = database
        self.plan = Plan(seed)
        self.rng = random.Random(f"{seed} site")
        self.port = free_port()
        self.proxy: DatabaseProxy | None = None
        self.spool = directory / "spool" / "bodies"
        self._never = threading.Event()
        self._templates = templates
        self._stack = stack
        self.spool_disk, self.database_disk = (
            self._mount(name) if "disk" in features else None for name in ("spool", "database")
        )
        self.shim, self.clock_shim = (
            self._shim(name, prefix) if "shim" in features else None
            for name, prefix in (("relay.control", self.spool), ("database.control", directory))
        )
        self.postgres = self._postgres() if database == "postgresql" else None
        self._url = self.postgres.url(DATABASE) if self.postgres else self._sqlite()
        if self.database_disk is not None:
            self.database_disk.sync()  # the copies of the templates are not synced
        relay_url = self._url
        if "proxy" in features and self.postgres is not None:
            self.proxy = self._proxy(self.postgres)
            relay_url = self._url.replace(str(self.postgres.directory), str(self.proxy.directory))
        self._broker_directory().mkdir()
        self.broker = Broker(self._broker_directory())
        self.mailbox = Mailbox(self.plan)
        self.servers = self._mail_servers()
        environ = self._environ(relay_url)
        self.smtpd = RelayProgram(directory / "smtpd", "smtpd", environ)
        self.workers = [
            RelayProgram(directory / f"worker-{number}", "worker", environ)
            for number in range(WORKERS)
        ]

    # Parts

    def _mount(self, name: str) -> MountedDisk:
        """A disk of its own for this directory of the site."""
        disk = MountedDisk(self.directory / f"{name}.img", self.directory / name)
        self._stack.callback(disk.unmount, lazily=True)
        return disk

    def _shim(self, name: str, prefix: Path) -> FaultShim | None:
        if self._templates.shim is None:
            return None
        return FaultShim(self._templates.shim, self.directory / name, prefix)

    def _postgres(self) -> Postgres:
        directory = self.directory / "database"
        directory.mkdir(exist_ok=True)
        template = self._templates.directory / "postgres"
        owner = (template / "data").stat()
        os.chown(directory, owner.st_uid, owner.st_gid)
        subprocess.run(["cp", "-a", template / "data", directory], check=True)
        return Postgres(
            directory,
            programs=self._templates.programs,
            settings={"max_connections": "40", "max_wal_size": "128MB"},
            environ=self.clock_shim.environ if self.clock_shim else {},
        )

    def _sqlite(self) -> str:
        directory = self.directory / "database"
        directory.mkdir(exist_ok=True)
        for file in (self._templates.directory / "sqlite").iterdir():
            shutil.copy(file, directory)
        return f"sqlite:///{directory}/relay.db"

    def _proxy(self, postgres: Postgres) -> DatabaseProxy:
        directory = self.directory / "proxy"
        directory.mkdir()
        proxy = DatabaseProxy(directory, postgres.directory, self.rng)
        self._stack.callback(proxy.close)
        return proxy

    def _broker_directory(self) -> Path:
        return self.directory / "broker"

    def _mail_servers(self) -> list[MailServer]:
        planned, servers = PlannedReplies(), []
        for number in range(2):
            directory = self.directory / f"server-{number}"
            server = MailServer(directory, self.mailbox, planned, self.rng)
            servers.append(server)
        return servers

    def _environ(self, database_url: str) -> dict[str, str]:
        settings = {
            **SETTINGS,
            "STATE_DIR": str(self.directory / "var"),
            "SPOOL_DIR": str(self.spool),
            "DATABASE_URL": database_url,
            "BROKER_URL": self.broker.url,
            "SMTP_LISTEN": f"127.0.0.1:{self.port}",
            "QMQP_SERVERS": ",".join(f"127.0.0.1:{server.port}" for server in self.servers),
        }
        return relay_environ(**settings) | (self.shim.environ if self.shim else {})

    # Processes

    @property
    def programs(self) -> list[ServerProcess]:
        """All but the servers of mail."""
        databases = [self.postgres] if self.postgres else []
        return [*databases, self.broker, self.smtpd, *self.workers]

    def start(self) -> None:
        """Start what does not run, servers of mail excepted; all at once, as after a reboot."""
        with ThreadPoolExecutor(len(self.programs)) as pool:
            for started in [pool.submit(program.start) for program in self.programs]:
                started.result()

    def kill(self) -> None:
        """SIGKILL everything, at once as far as one process can."""
        for program in self.programs[::-1]:
            program.signal(signal.SIGKILL)
        for program in self.programs:
            program.kill()

    def close(self) -> None:
        """End everything. The logs are in the directory LOGS then."""
        for program in self.programs[::-1]:
            program.resume()
            program.kill()
        for server in self.servers:
            server.stop()
        logs = self.directory / LOGS
        logs.mkdir()
        for program in self.programs:
            if program.log.exists():
                shutil.copy(program.log, logs / f"{program.directory.name}.log")

    def wait(self, seconds: float) -> None:
        """Let a fault last."""
        self._never.wait(seconds)

    # The database

    def rows(self, sql: str, **parameters: Any) -> list[Any]:
        """The rows of a SELECT, without the proxy. Leaves no connection open."""
        engine = connect(self._url, pool=1)
        try:
            with reading(engine) as connection:
                return list(connection.execute(text(sql), parameters).all())
        finally:
            engine.dispose()

    def administrate(self, *statements: str) -> None:
        """Run statements on PostgreSQL's own database, as its superuser."""
        assert self.postgres is not None
        with psycopg.connect(
            host=str(self.postgres.directory), user="postgres", dbname="postgres", autocommit=True
        ) as connection:
            for statement in statements:
                connection.execute(statement)

    def disconnect_clients(self) -> None:
        """End every session of the relay's database, as an administrator does."""
        self.administrate(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{DATABASE}'"
        )

    def unfinished(self) -> int:
        """How many deliveries are not final, or held."""
        return int(self.rows(_UNFINISHED)[0][0])

    # The end

    def settle(self, mails: Sequence[SentMail], timeout: float) -> None:
        """Wait until all that was accepted is final, and workers have swept twice since. Returns
        after `timeout` seconds in any case, because the books tell what is missing."""
        deadline = time.monotonic() + timeout
        while not self._settled(mails) and time.monotonic() < deadline:
            self.wait(0.25)

    def _settled(self, mails: Sequence[SentMail]) -> bool:
        try:
            for _ in range(2):
                if self.unfinished() or balance(mails, self.evidence()).lost:
                    return False
                self._sweep()
        except (DBAPIError, OSError, AssertionError):  # the database or a worker is not back yet
            return False
        return True

    def _sweep(self) -> None:
        """Wait until each worker has swept once more."""
        for worker in self.workers:
            heartbeat = self.directory / "var" / f"worker-{worker.pid}.heartbeat"
            before = heartbeat.stat().st_mtime_ns
            until(lambda h=heartbeat, b=before: h.stat().st_mtime_ns != b, 20)  # type: ignore[misc]

    def evidence(self) -> Evidence:
        """What servers and database show now."""
        for server in self.servers:
            server.collect()
        uncertain: Counter[str] = Counter()
        uncertain.update({row[0]: row[1] for row in self.rows(_UNCERTAIN)})
        return Evidence(
            dict(self.mailbox.kept),
            dict(self.mailbox.replied_k),
            uncertain,
            frozenset(self.mailbox.altered),
            self.unfinished(),
        )

    def states_text(self) -> str:
        """The most frequent states of what is not delivered."""
        return "; ".join(f"{count} {state}: {reply}" for state, reply, count in self.rows(_STATES))


@contextmanager
def running_site(
    directory: Path, database: str, features: frozenset[str], seed: str, templates: Templates
) -> Iterator[FaultSite]:
    """A site whose programs and servers run. `directory` is short enough for Unix sockets."""
    directory.chmod(0o755)
    with ExitStack() as stack:
        site = FaultSite(directory, database, features, seed, templates, stack)
        stack.callback(site.close)
        for server in site.servers:
            server.start()
        site.start()
        yield site
