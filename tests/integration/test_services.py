"""The servers of the tests: their faults really happen, and they leave nothing behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from tests.services import Broker, Postgres
from tests.waiting import until


def connect(server: Postgres) -> psycopg.Connection:
    return psycopg.connect(
        host=str(server.directory), user="postgres", autocommit=True, connect_timeout=2
    )


def test_postgres_keeps_what_was_committed_when_killed(postgres: Postgres) -> None:
    with connect(postgres) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS kept (n int)")
        connection.execute("INSERT INTO kept VALUES (1)")
        assert connection.execute("SHOW fsync").fetchone() == ("on",)
    postgres.kill()
    with pytest.raises(psycopg.OperationalError):
        connect(postgres)
    postgres.start()
    with connect(postgres) as connection:
        assert connection.execute("SELECT n FROM kept").fetchall() == [(1,)]
        connection.execute("DROP TABLE kept")


def test_paused_postgres_is_silent_and_comes_back(postgres: Postgres) -> None:
    postgres.pause()
    with pytest.raises(psycopg.OperationalError, match="timeout"):
        connect(postgres)
    postgres.resume()
    connect(postgres).close()


def test_broker_forgets_when_killed_and_is_silent_when_paused(broker: Broker) -> None:
    assert broker.ask("SET", "a", "1") == b"+OK"
    broker.kill()
    with pytest.raises(ConnectionRefusedError):
        broker.ask("PING")
    broker.start()
    assert broker.ask("GET", "a") == b"$-1"
    broker.pause()
    with pytest.raises(TimeoutError):
        broker.ask("PING", timeout=0.2)
    broker.resume()
    assert broker.ask("PING") == b"+PONG"


def test_nothing_outlives_a_killed_run() -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", KILLED_RUN],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )
    with run:
        assert run.stdout is not None
        pid, directory = run.stdout.readline().split()
        assert Path(directory).is_dir()
        os.kill(run.pid, signal.SIGKILL)
    until(lambda: not Path(directory).exists(), what="its directory is removed")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


KILLED_RUN = """
import signal
from tests.services import Broker, temporary_directory
broker = Broker(temporary_directory())
broker.start()
broker.pause()
print(broker.pid, broker.directory, flush=True)
signal.pause()
"""
