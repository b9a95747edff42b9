"""The relay as a system: a database and a broker of its own, smtpd, workers and QMQP sinks."""

import itertools
from contextlib import ExitStack, closing
from pathlib import Path

from bench import services
from bench.processes import free_port, running
from relay.db.engine import connect, migrate, reading

# Deliveries to one server at once: the default of RELAY_SERVER_CONNECTIONS, for Postfix too.
CONCURRENCY = 50
SLOW = 0.1  # seconds that the slow sink takes for a message
_DURABILITY = {
    "sqlite": {name: f"PRAGMA {name}" for name in ("journal_mode", "synchronous")},
    "postgresql": {
        name: f"SHOW {name}"
        for name in (
            "server_version", "fsync", "synchronous_commit", "full_page_writes", "wal_sync_method",
        )
    },
}  # fmt: skip
_CHECKPOINT = {"sqlite": "PRAGMA wal_checkpoint(PASSIVE)", "postgresql": "CHECKPOINT"}
# All deliveries that are not finished, each part by an index of its own.
_UNFINISHED = """SELECT 1 FROM deliveries WHERE state = 'queued'
UNION ALL SELECT 1 FROM deliveries WHERE state = 'sending'
UNION ALL SELECT 1 FROM deliveries WHERE state = 'deferred'
UNION ALL SELECT 1 FROM deliveries WHERE state IN ('bounced', 'expired') AND due_at IS NOT NULL
LIMIT 1"""


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
        broker = stack.enter_context(services.broker(self.directory))
        self.roles = {"worker": list[int](), "broker": [broker.pid]}
        url = f"sqlite:///{self.directory}/relay.db"
        if kind == "postgresql":
            server = stack.enter_context(services.postgresql(directory / "postgres"))
            self.roles["database"] = [server.pid]
            url = server.url
        migrate(url)
        self._engine = connect(url, timeout=300.0)
        stack.callback(self._engine.dispose)
        self._sinks = {
            slow: stack.enter_context(services.sink("qmqp-sink", self.directory, SLOW * slow))
            for slow in (False, True)
        }
        self._environment = services.clean_environment() | {
            "PYTHONPATH": str(services.ROOT), "RELAY_STATE_DIR": str(self.directory), "RELAY_DATABASE_URL": url,
            "RELAY_BROKER_URL": broker.url, "RELAY_SMTP_LISTEN": f"127.0.0.1:{self.smtp_port}",
            "RELAY_HOSTNAME": "relay.example.net", "RELAY_MAX_CONNECTIONS_PER_CLIENT": "1000",
            "RELAY_LOG_FORMAT": "json", "RELAY_SERVER_CONNECTIONS": str(CONCURRENCY),
        }  # fmt: skip
        self._log_numbers = itertools.count(1)
        self._start("smtpd", "listening", stack)
        self._workers = stack.enter_context(ExitStack())
        self._arranged = (0, False)
        self.facts = self._read_facts() | {"broker": f"{broker.version}, nothing on disk"}

    def _start(self, role: str, event: str, stack: ExitStack) -> None:
        """Start a process of a role, and wait until it has logged `event`."""
        log = self.directory / f"{role}-{next(self._log_numbers)}.log"
        command = (*services.RELAY, role)
        child = running(
            command, log, lambda: event in log.read_text(), env=self._environment, cwd=services.ROOT
        )
        self.roles.setdefault(role, []).append(stack.enter_context(child).pid)

    def _read_facts(self) -> dict[str, str]:
        with reading(self._engine) as connection:
            settings = [
                f"{name} {connection.exec_driver_sql(statement).scalar()}"
                for name, statement in _DURABILITY[self._kind].items()
            ]
        return {
            "bodies": "fdatasync of the file, fsync of its directory",
            self.name.removeprefix("relay, "): ", ".join(settings),
        }

    def arrange(self, workers: int, *, slow: bool) -> bool:
        """Deliver with so many workers to the fast or the slow sink; False: not supported."""
        if self._arranged != (workers, slow):
            self.hold()
            self._arranged = (workers, slow)
            self.sink = self._sinks[slow]
            self.roles["sink"] = [self.sink.pid]
            self._environment["RELAY_QMQP_SERVERS"] = f"127.0.0.1:{self.sink.port}"
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
        for _ in range(self._arranged[0]):
            self._start("worker", "worker registered", self._workers)

    def flush(self) -> None:
        """Write out what a later write-back would otherwise add to a measurement."""
        # Without a transaction, which a checkpoint of SQLite would wait for.
        with closing(self._engine.raw_connection()) as connection:
            connection.cursor().execute(_CHECKPOINT[self._kind])
