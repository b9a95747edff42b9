"""A disk that cannot read one place of the journal, under real processes: smtpd starts, the mail of
other places gets its rows and is delivered, and fsck names the place."""

import signal
import sqlite3
from pathlib import Path

import pytest

from qmqp.sink import running_sink
from relay.spool.journal.format import BLOCK
from tests.acceptance.installation import Install, Installation
from tests.acceptance.stack import command, processes_of
from tests.faults.shim import FaultShim, compile_shim, why_no_shim
from tests.waiting import until


@pytest.fixture
def shim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FaultShim:
    """It belongs to every program that the test starts."""
    if why := why_no_shim():
        pytest.skip(why)
    library = compile_shim(tmp_path)
    assert library is not None
    shim = FaultShim(library, tmp_path / "control", tmp_path)
    for name, value in shim.environ.items():
        monkeypatch.setenv(name, value)
    return shim


def sent_and_sealed(relay: Installation) -> Path:
    """A message is accepted and smtpd stops; its segment."""
    smtpd = relay.smtpd()
    relay.send("bad@example.org")
    relay.to("bad@example.org")
    relay.end(smtpd)
    (row,) = relay.rows("SELECT @hex(segment) AS segment FROM messages")
    return relay.spool / "journal" / str(row.segment)


def sent_without_rows(relay: Installation, *recipients: str) -> None:
    """Messages are accepted while the database is locked, and smtpd is killed."""
    smtpd = relay.smtpd()
    lock = sqlite3.connect(relay.directory / "relay.db", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    for recipient in recipients:
        relay.send(recipient)
    relay.end(smtpd, signal.SIGKILL)
    until(lambda: not processes_of(relay.directory / "var"), 30, what=relay.log_text)
    lock.execute("ROLLBACK")
    lock.close()


def test_one_bad_place_stops_nothing_else(install: Install, shim: FaultShim) -> None:
    with running_sink() as sink:
        relay = install("sqlite", QMQP_SERVERS=f"127.0.0.1:{sink.port}")
        segment = sent_and_sealed(relay)
        sent_without_rows(relay, "one@example.org", "two@example.org")
        with shim.bad_place(segment, 0, 2 * BLOCK):
            relay.smtpd()
            relay.send("new@example.org")
            relay.worker()
            for name in ("one", "two", "new"):
                relay.until_state(f"{name}@example.org", "delivered")
            row = relay.until_state("bad@example.org", "deferred")
            assert row.last_reply.startswith("the disk cannot read the body"), row.last_reply
            found = command("fsck", "--json", **relay.settings)
            assert found.returncode == 1, found.stderr
            assert segment.name in found.stdout
            assert "cannot read" in found.stdout
        assert shim.hits
        assert command("fsck", **relay.settings).returncode == 0
    assert sink.count == 3
