"""The database is away, lost, or restored from a backup of this morning: no mail is lost, and none
is sent twice in silence. Everything goes through the commands that people type."""

import os
import re
import shutil
import signal
import sqlite3
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from qmqp.sink import MagicRecipients, Sink, running_sink
from relay.db.engine import connect
from relay.spool.journal.directory import OWNED, JournalDirectory
from relay.spool.journal.format import encode_segment_header
from relay.spool.journal.scan import read_header
from tests.acceptance.installation import Install, Installation, accepted_by
from tests.acceptance.stack import StartUp, command
from tests.services import Postgres, free_port
from tests.waiting import until

REPLY_TIME = 20.0  # seconds


@pytest.fixture
def sink() -> Iterator[Sink]:
    with running_sink(MagicRecipients()) as server:
        yield server


@pytest.fixture
def own_postgres() -> Iterator[Postgres]:
    """A PostgreSQL that this test alone stops."""
    server = Postgres()
    server.start()
    yield server
    server.stop()


def run(relay: Installation, *arguments: str, status: int = 0) -> str:
    """Type a command; what it printed."""
    done = command(*arguments, **relay.settings)
    assert done.returncode == status, f"{arguments}: {done.stdout} {done.stderr}"
    return done.stdout + done.stderr


def test_smtpd_starts_and_accepts_without_the_database(
    start_up: StartUp, own_postgres: Postgres, sink: Sink
) -> None:
    """`up` is started once, and again while PostgreSQL is away."""
    settings = {
        "DATABASE_URL": own_postgres.url(),
        "QMQP_SERVERS": f"127.0.0.1:{sink.port}",
    }
    up = start_up(**settings)
    up.send("first@example.org")
    until(lambda: accepted_by(sink)["first@example.org"], what=up.log_text)
    up.end(signal.SIGINT)
    own_postgres.stop()
    up.start()
    assert "accepting without the database" in up.log_text()
    queue_id = up.send("second@example.org")
    assert up.child("worker") is None, "it follows the migrations"
    own_postgres.start()
    until(lambda: accepted_by(sink)["second@example.org"], 60, what=up.log_text)
    assert queue_id in command("list", "--all", "--json", **up.settings).stdout
    assert accepted_by(sink) == Counter({"first@example.org": 1, "second@example.org": 1})


def test_smtpd_alone_starts_and_accepts_without_the_database(
    own_postgres: Postgres, sink: Sink, tmp_path: Path
) -> None:
    relay = Installation(tmp_path, own_postgres.url(), QMQP_SERVERS=f"127.0.0.1:{sink.port}")
    try:
        run(relay, "migrate")
        smtpd = relay.smtpd()
        relay.worker()
        relay.database.dispose()
        own_postgres.stop()
        relay.end(smtpd)
        relay.smtpd()
        relay.send("b@example.org")
        assert accepted_by(sink) == Counter()
        own_postgres.start()
        until(lambda: accepted_by(sink)["b@example.org"], 60, what=relay.log_text)
        relay.until_state("b@example.org", "delivered")
        assert accepted_by(sink) == Counter({"b@example.org": 1})
    finally:
        relay.close()


def test_the_lag_is_true_without_mail_and_without_the_database(
    own_postgres: Postgres, tmp_path: Path
) -> None:
    """Three messages come while the database is away, and then none; smtpd is started again."""
    listen = f"127.0.0.1:{free_port()}"
    relay = Installation(tmp_path, own_postgres.url(), METRICS_LISTEN=listen)
    try:
        run(relay, "migrate")
        smtpd = relay.smtpd()
        relay.database.dispose()
        own_postgres.stop()
        for recipient in "abc":
            relay.send(f"{recipient}@example.org")
        until(lambda: lag(listen)["seconds"] > 3, 30, what=relay.log_text)
        assert lag(listen)["messages"] == 3
        relay.end(smtpd)
        relay.smtpd()
        until(lambda: lag(listen)["seconds"] > 6, 30, what=relay.log_text)
        assert lag(listen)["messages"] == 3
        own_postgres.start()
        until(lambda: set(lag(listen).values()) == {0}, 60, what=relay.log_text)
        assert relay.count() == 3
    finally:
        relay.close()


def lag(listen: str) -> dict[str, float]:
    """What a scrape says of accepted messages without rows."""
    with urllib.request.urlopen(f"http://{listen}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    return {
        name: float(value)
        for name, value in re.findall(r"(?m)^relay_journal_lag_(\w+) (\S+)$", text)
    }


def copy_of(database: Path, directory: Path) -> Path:
    """A backup of an SQLite database."""
    backup = directory / "backup.db"
    with sqlite3.connect(database) as source, sqlite3.connect(backup) as target:
        source.backup(target)
    source.close()
    target.close()
    return backup


@pytest.mark.timeout(300)  # a dozen programs start, one after the other
@pytest.mark.parametrize("lost", [False, True], ids=["restored", "lost"])
def test_a_database_of_this_morning_costs_nothing(
    install: Install, sink: Sink, tmp_path: Path, lost: bool
) -> None:
    """One message is delivered after the backup, and one waits: both are held by the rebuild, and
    nothing is sent before the release."""
    relay = install("sqlite", QMQP_SERVERS=f"127.0.0.1:{sink.port}", RETRY_MIN="1h", RETRY_MAX="2h")
    smtpd, worker = relay.smtpd(), relay.worker()
    relay.send("before@example.org")
    relay.until_state("before@example.org", "delivered")
    backup = copy_of(relay.directory / "relay.db", tmp_path)
    relay.send("since@example.org")
    relay.until_state("since@example.org", "delivered")
    relay.send("defer-99@example.org")
    relay.until_state("defer-99@example.org", "deferred")
    mark = relay.spool / "journal" / "mark"
    before = int(sqlite_mark(backup))
    until(lambda: int(mark.read_text()) > before + 1, 60, what="the mark rises")
    for child in (smtpd, worker):
        relay.end(child)
    relay.database.dispose()
    for path in relay.directory.glob("relay.db*"):
        path.unlink()
    if lost:
        run(relay, "migrate")
    else:
        shutil.copy(backup, relay.directory / "relay.db")

    smtpd = relay.smtpd()  # it accepts
    later = relay.send("later@example.org")
    worker = relay.worker(wait=False)
    until(lambda: "database older than the spool" in relay.log.read_text(), REPLY_TIME)
    relay.end(worker, signal.SIGKILL)
    assert "--rebuild" in run(relay, "fsck", status=1)
    run(relay, "fsck", "--rebuild", "--yes")
    received = accepted_by(sink)
    worker = relay.worker()
    held = run(relay, "list", "--state", "held", "--json")
    assert "since@example.org" in held
    assert "defer-99@example.org" in held
    assert later in held, "it arrived before the rebuild"
    fresh = relay.send("fresh@example.org")
    relay.until_state("fresh@example.org", "delivered", 90)
    assert fresh
    assert accepted_by(sink) - received == Counter({"fresh@example.org": 1})

    run(relay, "release", "--recipient", "later@example.org", "--yes")
    relay.until_state("later@example.org", "delivered")
    assert accepted_by(sink)["since@example.org"] == 1
    assert accepted_by(sink)["before@example.org"] == 1


def sqlite_mark(database: Path) -> int:
    """The mark in a copy of the database."""
    with sqlite3.connect(database) as connection:
        (mark,) = connection.execute("SELECT mark FROM spool").fetchone()
    connection.close()
    return int(mark)


@pytest.mark.timeout(300)  # several programs start, one after the other
def test_a_standby_that_lacks_the_last_deliveries_sends_nothing_again(
    own_postgres: Postgres, sink: Sink, tmp_path: Path
) -> None:
    """No mail arrives while a worker drains the queue, so the worker alone raises the mark."""
    server = connect(own_postgres.url()).execution_options(isolation_level="AUTOCOMMIT")
    execute(server, "CREATE DATABASE relay")
    relay = Installation(tmp_path, own_postgres.url("relay"), QMQP_SERVERS=f"127.0.0.1:{sink.port}")
    try:
        run(relay, "migrate")
        smtpd = relay.smtpd()
        recipients = [f"{number}@example.org" for number in range(5)]
        for recipient in recipients:
            relay.send(recipient)
        relay.until_rows()
        relay.end(smtpd)
        before = relay.rows("SELECT mark FROM spool")[0].mark
        relay.database.dispose()
        execute(server, "CREATE DATABASE standby TEMPLATE relay")
        relay.worker()
        until(lambda: relay.count("d.state = 'delivered'") == 5, 60, what=relay.log_text)
        mark = relay.spool / "journal" / "mark"
        until(lambda: int(mark.read_text()) > before, 60, what="the mark rises")
        relay.database.dispose()
        fail_over(server)
        until(lambda: "database older than the spool" in relay.log.read_text(), 60)
        run(relay, "fsck", "--rebuild", "--yes")
        until(lambda: relay.count("d.state = 'held'") == 5, 60, what=relay.log_text)
        fresh = relay.smtpd()
        relay.send("fresh@example.org")
        relay.until_state("fresh@example.org", "delivered", 90)
        relay.end(fresh)
        assert accepted_by(sink) == Counter([*recipients, "fresh@example.org"])
    finally:
        relay.close()
        server.dispose()


def fail_over(server: Engine) -> None:
    """The standby takes the place of the database, and all connections break."""
    execute(server, "ALTER DATABASE relay ALLOW_CONNECTIONS false")
    sessions = "FROM pg_stat_activity WHERE datname = 'relay'"
    execute(server, f"SELECT pg_terminate_backend(pid) {sessions}")
    until(lambda: execute(server, f"SELECT 1 {sessions}") == [])
    execute(server, "ALTER DATABASE relay RENAME TO failed")
    execute(server, "ALTER DATABASE standby RENAME TO relay")


def execute(server: Engine, sql: str) -> list[Any]:
    """The rows of a statement that is its own transaction."""
    with server.connect() as connection:
        result = connection.exec_driver_sql(sql)
        return [*result.all()] if result.returns_rows else []


def test_mail_of_a_host_that_is_gone_is_adopted_by_order(
    own_postgres: Postgres, sink: Sink, tmp_path: Path
) -> None:
    """Its smtpd accepted mail while PostgreSQL was away, and never came back."""
    relay = Installation(tmp_path, own_postgres.url(), QMQP_SERVERS=f"127.0.0.1:{sink.port}")
    try:
        run(relay, "migrate")
        smtpd = relay.smtpd()
        relay.database.dispose()
        own_postgres.stop()
        queue_id = relay.send("left@example.org")
        known = command("why", queue_id, **relay.settings)
        assert known.returncode == 3
        assert f"queue_id: {queue_id}" in known.stdout
        spooler = Path(f"/proc/{smtpd.pid}/task/{smtpd.pid}/children").read_text().split()
        relay.end(smtpd, signal.SIGKILL)
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in spooler), REPLY_TIME)
        move_to_host(relay.spool, "gone.example.com")
        own_postgres.start()
        assert "accepted, not yet in the database" in run(relay, "show", queue_id)
        assert "gone.example.com" in run(relay, "fsck", "--adopt", "--yes")
        relay.worker()
        relay.until_state("left@example.org", "delivered")
        assert accepted_by(sink) == Counter({"left@example.org": 1})
    finally:
        relay.close()


def move_to_host(spool: Path, host: str) -> None:
    """Make another host the owner of every segment."""
    handle = os.open(spool, os.O_RDONLY)
    directory = JournalDirectory(handle)
    for _, name in directory.segments(OWNED):
        file = directory.open(name, write=True)
        file.write([encode_segment_header(read_header(file)._replace(host=host))], 0)
        file.close()
    os.close(handle)
