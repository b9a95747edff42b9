"""The relay as it is measured: everything between an SMTP port and a sink.

It has a database and a broker of its own, smtpd, workers and QMQP sinks. The peers beside it are in
`postfix` and `nullmailer`, and have the same methods.
"""

import itertools
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import services
from bench.services import free_port, listens, running
from relay.db.engine import connect, migrate, reading

# Deliveries to one server at once: the default of RELAY_SERVER_CONNECTIONS, for Postfix too.
CONCURRENCY = 50
SLOW = 0.1  # seconds that the slow sink takes for a message
_DURABILITY = {
    "sqlite": {name: f"PRAGMA {name}" for name in ("journal_mode", "synchronous")},
    "postgresql": {
        name: f"SHOW {name}"
        for name in (
            "server_version",
            "fsync",
            "synchronous_commit",
            "full_page_writes",
            "wal_sync_method",
        )
    },
}
_CHECKPOINT = {"sqlite": "PRAGMA wal_checkpoint(PASSIVE)", "postgresql": "CHECKPOINT"}
# All deliveries that are not finished, each part by an index of its own.
_UNFINISHED = """SELECT 1 FROM deliveries WHERE state = 'queued'
UNION ALL SELECT 1 FROM deliveries WHERE state = 'sending'
UNION ALL SELECT 1 FROM deliveries WHERE state = 'deferred'
UNION ALL SELECT 1 FROM deliveries WHERE state IN ('bounced', 'expired') AND due_at IS NOT NULL
LIMIT 1"""


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Deliver with so many workers, and each of them on so many connections at once, to the fast
    sink or to the slow one."""

    workers: int = 1
    connections: int = CONCURRENCY
    slow: bool = False


class RelaySystem:
    """smtpd and workers on one database, `sqlite` or `postgresql`, until `stack` is closed.

    `name` is its column in the tables; `roles` are the process ids of each role; `sink` is the sink
    of the current arrangement; `facts` are versions and durability settings.
    """

    def __init__(self, kind: str, directory: Path, stack: ExitStack) -> None:
        self._kind = kind
        self.name = "relay, PostgreSQL" if kind == "postgresql" else "relay, SQLite"
        self.directory = directory / kind
        self.directory.mkdir(mode=0o700)
        self.smtp_port = free_port()
        broker, broker_url, broker_version = stack.enter_context(services.broker(self.directory))
        self.roles = {"broker": [broker]}
        url = f"sqlite:///{self.directory}/relay.db"
        if kind == "postgresql":
            database, url = stack.enter_context(services.postgresql(directory / "postgres"))
            self.roles["database"] = [database]
        migrate(url)
        self._engine = connect(url, timeout=300.0)
        stack.callback(self._engine.dispose)
        self._sinks = {
            slow: stack.enter_context(services.sink("qmqp-sink", self.directory, SLOW * slow))
            for slow in (False, True)
        }
        self._environment = services.clean_environment() | {
            "PYTHONPATH": str(services.ROOT),
            "RELAY_STATE_DIR": str(self.directory),
            "RELAY_DATABASE_URL": url,
            "RELAY_BROKER_URL": broker_url,
            "RELAY_SMTP_LISTEN": f"127.0.0.1:{self.smtp_port}",
            "RELAY_HOSTNAME": "relay.example.net",
            "RELAY_MAX_CONNECTIONS_PER_CLIENT": "1000",
            "RELAY_LOG_FORMAT": "json",
        }
        self._log_numbers = itertools.count(1)
        self._start("smtpd", self.directory / "smtpd.log", lambda: listens(self.smtp_port), stack)
        self._workers = stack.enter_context(ExitStack())
        self._arranged = Arrangement(workers=0)
        with reading(self._engine) as connection:
            settings = [
                f"{name} {connection.exec_driver_sql(statement).scalar()}"
                for name, statement in _DURABILITY[kind].items()
            ]
        self.facts = {
            "bodies": "fdatasync of the file, fsync of its directory",
            "broker": f"{broker_version}, nothing on disk",
            self.name.removeprefix("relay, "): ", ".join(settings),
        }

    def _start(self, role: str, log: Path, ready: Callable[[], bool], stack: ExitStack) -> None:
        command = (*services.RELAY, role)
        child = running(command, log, ready, env=self._environment, cwd=services.ROOT)
        self.roles.setdefault(role, []).append(stack.enter_context(child).pid)

    def arrange(self, arrangement: Arrangement) -> bool:
        """Deliver in this way from now on; False: not supported."""
        if self._arranged != arrangement:
            self.hold()
            self._arranged = arrangement
            self.sink = self._sinks[arrangement.slow]
            self.roles["sink"] = [self.sink.pid]
            self._environment |= {
                "RELAY_QMQP_SERVERS": f"127.0.0.1:{self.sink.port}",
                "RELAY_SERVER_CONNECTIONS": str(arrangement.connections),
                "RELAY_WORKER_CONNECTIONS": str(max(128, arrangement.connections)),
            }
            self.release()
        return True

    def empty(self) -> bool:
        """Whether the queue is empty and all outcomes are committed."""
        with reading(self._engine) as connection:
            return connection.exec_driver_sql(_UNFINISHED).scalar() is None

    def hold(self) -> None:
        """Accept messages without delivering them."""
        # Not by SIGSTOP: on SQLite, a worker that is stopped while it writes would stop smtpd too.
        self._workers.close()
        self.roles["worker"] = []

    def release(self) -> None:
        """Deliver again."""
        logs = [
            self.directory / f"worker-{next(self._log_numbers)}.log"
            for _ in range(self._arranged.workers)
        ]
        for log in logs:
            # They start at the same time: the last one is ready when all are.
            waits_for = logs if log == logs[-1] else []
            self._start("worker", log, partial(_registered, waits_for), self._workers)

    def flush(self) -> None:
        """Write dirty pages to the disk, so that a later write-back is not part of a
        measurement."""
        # Without a transaction, which a checkpoint of SQLite would wait for.
        with closing(self._engine.raw_connection()) as connection:
            connection.cursor().execute(_CHECKPOINT[self._kind])


def _registered(logs: list[Path]) -> bool:
    return all("worker registered" in log.read_text() for log in logs)
