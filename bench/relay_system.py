"""The relay as a system: a database and a broker of its own, smtpd, workers and QMQP sinks."""

import itertools
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from sqlalchemy import Engine, text

from bench.processes import wait
from bench.services import BenchBroker, BenchPostgres, end, free_port, spawn
from bench.systems import CONCURRENCY, ROOT, SinkProcess, clean_environment
from relay.db import engine as database

SLOW = 0.1  # seconds that the slow sink takes for a message
_PRAGMAS = ("journal_mode", "synchronous")
_SETTINGS = ("server_version", "fsync", "synchronous_commit", "full_page_writes", "wal_sync_method")

# All deliveries that are not finished, each part by an index of its own.
_UNFINISHED = """SELECT 1 FROM deliveries WHERE state = 'queued'
UNION ALL SELECT 1 FROM deliveries WHERE state = 'sending'
UNION ALL SELECT 1 FROM deliveries WHERE state = 'deferred'
UNION ALL SELECT 1 FROM deliveries WHERE state IN ('bounced', 'expired') AND due_at IS NOT NULL
LIMIT 1"""


class RelaySystem:
    """smtpd and workers on one database, `sqlite` or `postgresql`."""

    def __init__(self, kind: str, directory: Path) -> None:
        self.kind = kind
        self.directory = directory / kind
        self.name = "relay, PostgreSQL" if kind == "postgresql" else "relay, SQLite"
        self.smtp_port = free_port()
        self._postgres: BenchPostgres | None = None
        self._workers: list[subprocess.Popen[bytes]] = []
        self._arranged = (0, False)
        self._log_numbers = itertools.count(1)

    def start(self) -> None:
        self.directory.mkdir(mode=0o700)
        self._broker = BenchBroker(self.directory)
        url = f"sqlite:///{self.directory}/relay.db"
        if self.kind == "postgresql":
            self._postgres = BenchPostgres(self.directory.with_name("postgres"))
            self._postgres.execute("CREATE DATABASE relay")
            url = self._postgres.url("relay")
        database.migrate(url)
        self._engine: Engine = database.connect(url)
        self._sinks = {
            slow: SinkProcess("qmqp-sink", self.directory, SLOW if slow else 0.0)
            for slow in (False, True)
        }
        self._environment = clean_environment() | {
            "PYTHONPATH": str(ROOT), "RELAY_STATE_DIR": str(self.directory), "RELAY_DATABASE_URL": url,
            "RELAY_BROKER_URL": self._broker.url, "RELAY_SMTP_LISTEN": f"127.0.0.1:{self.smtp_port}",
            "RELAY_HOSTNAME": "relay.example.net", "RELAY_MAX_CONNECTIONS_PER_CLIENT": "1000",
            "RELAY_LOG_FORMAT": "json", "RELAY_SERVER_CONNECTIONS": str(CONCURRENCY),
        }  # fmt: skip
        (self._smtpd,) = self._start("smtpd", "listening")

    def _start(self, role: str, event: str, count: int = 1) -> list[subprocess.Popen[bytes]]:
        """Start `count` processes of a role, and wait until each has logged `event`."""
        started: list[tuple[subprocess.Popen[bytes], Path]] = []
        for _ in range(count):
            log = self.directory / f"{role}-{next(self._log_numbers)}.log"
            command = [sys.executable, "-m", "commands.cli.main", role]
            with log.open("wb") as lines:
                child = spawn(command, env=self._environment, cwd=ROOT, stdout=lines, stderr=lines)
            started.append((child, log))
        for child, log in started:
            wait(partial(_ready, child, log, event), f"{role} is ready, see {log}")
            if child.poll() is not None:
                raise RuntimeError(f"{role} ended: {log.read_text()[-2000:]}")
        return [child for child, _ in started]

    def stop(self) -> None:
        self.hold()
        end(self._smtpd)
        for sink in self._sinks.values():
            sink.stop()
        self._engine.dispose()
        self._broker.stop()
        if self._postgres is not None:
            self._postgres.stop()

    def arrange(self, workers: int = 1, *, slow: bool = False) -> bool:
        if self._arranged != (workers, slow):
            self.hold()
            self._arranged = workers, slow
            self._environment["RELAY_QMQP_SERVERS"] = f"127.0.0.1:{self._sinks[slow].port}"
            self.release()
        return True

    def processes(self) -> Mapping[str, list[int]]:
        return {
            "smtpd": [self._smtpd.pid],
            "worker": [child.pid for child in self._workers],
            **({"database": [self._postgres.pid]} if self._postgres is not None else {}),
            "broker": [self._broker.pid],
            "sink": [self._sinks[self._arranged[1]].pid],
        }

    def delivered(self) -> int:
        return self._sinks[self._arranged[1]].count()

    def empty(self) -> bool:
        with database.reading(self._engine) as connection:
            return connection.execute(text(_UNFINISHED)).scalar() is None

    def hold(self) -> None:
        # Not by SIGSTOP: on SQLite, a worker that is stopped while it writes would stop smtpd too.
        for child in self._workers:
            end(child)
        self._workers = []

    def release(self) -> None:
        self._workers = self._start("worker", "worker registered", self._arranged[0])

    def flush(self) -> None:
        if self._postgres is not None:
            self._postgres.execute("CHECKPOINT", "relay")
        else:
            with self._engine.connect() as connection:
                connection.exec_driver_sql("COMMIT")
                connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)")
                connection.exec_driver_sql("BEGIN")

    def facts(self) -> dict[str, str]:
        statements = {name: f"PRAGMA {name}" for name in _PRAGMAS}
        if self._postgres is not None:
            statements = {name: f"SHOW {name}" for name in _SETTINGS}
        with database.reading(self._engine) as connection:
            settings = [
                f"{name} {connection.exec_driver_sql(statement).scalar()}"
                for name, statement in statements.items()
            ]
        return {
            "bodies": "fdatasync of the file, fsync of its directory",
            "broker": f"{self._broker.version}, nothing on disk",
            self.name.removeprefix("relay, "): ", ".join(settings),
        }


def _ready(child: subprocess.Popen[bytes], log: Path, event: str) -> bool:
    return event in log.read_text() or child.poll() is not None
