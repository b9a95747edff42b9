"""Our relay as a system: a database and a broker of its own, smtpd, workers, and QMQP sinks."""

import itertools
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import Engine, text
from sqlalchemy.engine import make_url

from bench.processes import wait
from bench.systems import CONCURRENCY, ROOT, SinkProcess
from relay.db import engine as database
from tests.services import Broker, Postgres, end, free_port, spawn, temporary_directory

SLOW = 0.1  # seconds that the slow sink takes for a message
_PRAGMAS = ("journal_mode", "synchronous")
_SETTINGS = ("server_version", "fsync", "synchronous_commit", "full_page_writes", "wal_sync_method")


# Anything that is to be done, in parts that have an index each.
_LEFT = " UNION ALL ".join(
    f"SELECT 1 FROM deliveries WHERE {where}"
    for where in (
        "state = 'queued'", "state = 'sending'", "state = 'deferred'",
        "state IN ('bounced', 'expired') AND due_at IS NOT NULL",
    )
)  # fmt: skip


class RelaySystem:
    """smtpd and workers on one database, `sqlite` or `postgresql`."""

    def __init__(self, kind: str, directory: Path) -> None:
        self.kind, self.directory = kind, directory / kind
        self.name = "relay, PostgreSQL" if kind == "postgresql" else "relay, SQLite"
        self.smtp_port = free_port()
        self._postgres: Postgres | None = None
        self._engine: Engine
        self._environment: dict[str, str] = {}
        self._workers: list[subprocess.Popen[Any]] = []
        self._arranged = (0, False)
        self._numbers = itertools.count(1)

    def start(self) -> None:
        self.directory.mkdir(mode=0o700)
        self._broker = Broker(temporary_directory())
        self._broker.start()
        url = self._database()
        database.migrate(url)
        self._engine = database.connect(url)
        self._sinks = {
            slow: SinkProcess("qmqp-sink", self.directory, SLOW if slow else 0.0)
            for slow in (False, True)
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
        self._environment = kept | {
            "PYTHONPATH": str(ROOT), "RELAY_STATE_DIR": str(self.directory), "RELAY_DATABASE_URL": url,
            "RELAY_BROKER_URL": self._broker.url, "RELAY_SMTP_LISTEN": f"127.0.0.1:{self.smtp_port}",
            "RELAY_HOSTNAME": "relay.example.net", "RELAY_MAX_CONNECTIONS_PER_CLIENT": "1000",
            "RELAY_LOG_FORMAT": "json", "RELAY_SERVER_CONNECTIONS": str(CONCURRENCY),
        }  # fmt: skip
        (self._smtpd,) = self._commands("smtpd", "listening")

    def _database(self) -> str:
        if self.kind == "sqlite":
            return f"sqlite:///{self.directory}/relay.db"
        self._postgres = Postgres()
        self._postgres.start()
        with psycopg.connect(_plain(self._postgres.url()), autocommit=True) as connection:
            connection.execute("CREATE DATABASE relay")
        return self._postgres.url("relay")

    def _commands(self, role: str, ready: str, count: int = 1) -> list[subprocess.Popen[Any]]:
        """Start processes of a role, all at once, and wait until each has said in its log that it
        is ready."""
        started: list[tuple[subprocess.Popen[Any], Path]] = []
        for _ in range(count):
            log = self.directory / f"{role}-{next(self._numbers)}.log"
            command = [sys.executable, "-m", "commands.cli.main", role]
            with log.open("wb") as lines:
                child = spawn(command, env=self._environment, cwd=ROOT, stdout=lines, stderr=lines)
            started.append((child, log))
        for child, log in started:
            wait(partial(_ready, child, log, ready), f"{role} is ready, see {log}")
            if child.poll() is not None:
                raise RuntimeError(f"{role} ended: {log.read_text()[-2000:]}")
        return [child for child, _ in started]

    def stop(self) -> None:
        self._dismiss()
        end(self._smtpd)
        for sink in self._sinks.values():
            sink.stop()
        self._engine.dispose()
        self._broker.stop()
        if self._postgres is not None:
            self._postgres.stop()

    def arrange(self, workers: int = 1, *, slow: bool = False) -> bool:
        if self._arranged != (workers, slow):
            self._dismiss()
            self._arranged = workers, slow
            self._environment["RELAY_QMQP_SERVERS"] = f"127.0.0.1:{self._sinks[slow].port}"
            self.release()
        return True

    def _dismiss(self) -> None:
        for child in self._workers:
            end(child)
        self._workers.clear()

    def processes(self) -> Mapping[str, list[int]]:
        found = {"smtpd": [self._smtpd.pid], "worker": [child.pid for child in self._workers]}
        if self._postgres is not None:
            found["database"] = [self._postgres.pid]
        return found | {"broker": [self._broker.pid], "sink": [self._sinks[self._arranged[1]].pid]}

    def delivered(self) -> int:
        return self._sinks[self._arranged[1]].count()

    def empty(self) -> bool:
        with database.reading(self._engine) as connection:
            return connection.execute(text(f"{_LEFT} LIMIT 1")).scalar() is None

    def hold(self) -> None:
        # Not by SIGSTOP: on SQLite a worker that is stopped in its turn to write would stop smtpd
        # too.
        self._dismiss()

    def release(self) -> None:
        self._workers = self._commands("worker", "worker registered", self._arranged[0])

    def rest(self) -> None:
        if self._postgres is not None:
            with psycopg.connect(
                _plain(self._postgres.url("relay")), autocommit=True
            ) as connection:
                connection.execute("CHECKPOINT")
        else:
            with self._engine.connect() as connection:
                connection.exec_driver_sql("COMMIT")
                connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)")
                connection.exec_driver_sql("BEGIN")

    def facts(self) -> dict[str, str]:
        version = self._broker.ask("INFO", "server").decode(errors="replace")
        said = {
            "bodies": "fdatasync of the file, fsync of its directory",
            "broker": _broker_version(version),
        }
        if self._postgres is None:
            with database.reading(self._engine) as connection:
                found = [
                    f"{p} {connection.exec_driver_sql(f'PRAGMA {p}').scalar()}" for p in _PRAGMAS
                ]
            return said | {"SQLite": ", ".join(found)}
        with psycopg.connect(_plain(self._postgres.url())) as connection:
            rows = connection.execute(
                "SELECT name, setting FROM pg_settings WHERE name = ANY(%s)", [list(_SETTINGS)]
            )
            settings: dict[str, str] = dict(rows.fetchall())
        return said | {"PostgreSQL": ", ".join(f"{name} {settings[name]}" for name in _SETTINGS)}


def _ready(child: subprocess.Popen[Any], log: Path, word: str) -> bool:
    return word in log.read_text() or child.poll() is not None


def _plain(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def _broker_version(info: str) -> str:
    for name in ("valkey", "redis"):
        if found := info.partition(f"{name}_version:")[2]:
            return f"{name.capitalize()} {found.split()[0]}, nothing on disk"
    return "unknown version, nothing on disk"
