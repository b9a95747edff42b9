"""The database is away, lost, or restored from a backup of this morning: no mail is lost, and none
is sent twice in silence. Everything goes through the commands that people type."""

import shutil
import signal
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmqp.sink import MagicRecipients, Sink, running_sink
from tests.acceptance.installation import Install, Installation, accepted_by
from tests.acceptance.stack import StartUp, command
from tests.services import Postgres
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


def copy_of(database: Path, directory: Path) -> Path:
    """A backup of an SQLite database."""
    backup = directory / "backup.db"
    with sqlite3.connect(database) as source, sqlite3.connect(backup) as target:
        source.backup(target)
    source.close()
    target.close()
    return backup


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
