"""Any process may be killed while mail flows: no message that was answered 250 is lost or stuck,
and only an uncertain attempt leads to a duplicate.

Clients send all the time and note what was accepted. Two workers deliver it to a server that
replies after a tenth of a second, so that at any moment some transfers are before their commit
point and some after it. One more message goes to a server that hardly reads: its transfer stays
before the commit point, and shows which worker to kill. The requests that the servers received
decide what arrived.
"""

import fcntl
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from qmqp.sink import Answer, Rule, Sink, running_sink
from tests.acceptance.installation import (
    Feeder,
    Install,
    Installation,
    accepted_by,
    assert_none_lost,
)
from tests.acceptance.stack import command
from tests.services import Postgres
from tests.waiting import stands_still, until

pytestmark = pytest.mark.timeout(300)  # an adoption may be ten seconds away
LEASE = 2.0
SETTINGS = {
    "LEASE": f"{LEASE:g}s",
    "GRACE": "1s",
    "UNCERTAIN_DELAY": "1s",
    "RETRY_MIN": "200ms",
    "RETRY_MAX": "400ms",
    "DRAIN_TIMEOUT": "3s",
    "ACCEPT_DEADLINE": "5s",
}
LONG = (
    b"Subject: long\n\n" + (b"z" * 990 + b"\n") * 12_000
)  # more than the kernel buffers for a peer that does not read


@dataclass(slots=True)
class KillScenario:
    """`example.org` goes to `sink`; `long.test` to `slow`, which hardly reads connections that open
    while `SlowReader.slow` is set."""

    relay: Installation
    sink: Sink
    slow: Sink
    reader: "SlowReader"
    smtpd: subprocess.Popen[Any]
    workers: list[subprocess.Popen[Any]]
    accepted: set[str] = field(default_factory=set)
    ignored: set[str] = field(default_factory=set)  # bodies that the cleaner removes later

    def hold(self, name: str) -> subprocess.Popen[Any]:
        """Send one message to `slow`; the worker whose transfer hangs. Any worker may connect
        before a claim, so the server stays slow until the test lets it read."""
        self.reader.slow = True
        recipient = f"{name}@long.test"
        self.relay.send(recipient, body=LONG)
        self.accepted.add(recipient)
        sending = """SELECT w.pid FROM deliveries d JOIN workers w ON w.id = d.worker
            WHERE d.route = 'long' AND d.state = 'sending'"""
        pid = until(lambda: self.relay.rows(sending), 20, what=self.relay.log_text)[0][0]
        return next(worker for worker in self.workers if worker.pid == pid)

    def replace(self, worker: subprocess.Popen[Any]) -> None:
        """Start a worker for one that has ended."""
        self.workers.remove(worker)
        self.workers.append(self.relay.worker(wait=False))

    def finish(self, feeder: Feeder, *, killed: int = 0, orphans: bool = False) -> None:
        """Stop the clients, wait until all is delivered, and compare.

        No body may remain, except those that the cleaner removes: bodies that the worker `killed`
        (a pid) delivered and did not remove, and, with `orphans`, bodies without a row.
        """
        feeder.stop()
        self.accepted |= feeder.accepted
        relay = self.relay
        relay.until_all_recorded()
        assert_none_lost(relay, self.accepted, self.sink, self.slow)
        known = {row[0] for row in relay.rows("SELECT @hex(id) FROM messages")}
        of_killed = {
            row[0]
            for row in relay.rows(
                "SELECT @hex(a.queue_id) FROM attempts a JOIN workers w ON w.id = a.worker WHERE"
                " w.pid = :pid",
                pid=killed,
            )
        }

        def remaining() -> set[str]:
            return {body.name for body in relay.bodies()} - of_killed - self.ignored

        until(
            lambda: remaining() <= (remaining() - known if orphans else set()),
            what=lambda: f"bodies remain: {remaining()}",
        )
        self.ignored |= {body.name for body in relay.bodies()}


@dataclass(slots=True)
class SlowReader:
    """A rule of the sink: it hardly reads the connections that open meanwhile."""

    slow: bool = False

    def __call__(self, recipients: object, digest: str) -> Answer | None:
        if recipients is not None or not self.slow:
            return None
        return Answer(read_size=1024, read_pause=0.2)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def scene(
    request: pytest.FixtureRequest, install: Install, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[KillScenario]:
    reader = SlowReader()
    with (
        running_sink(Rule(Answer(delay=0.1))) as sink,
        running_sink(reader, receive_buffer=4096) as slow,
    ):
        routes = tmp_path_factory.mktemp("routes") / "routes.toml"
        routes.write_text(
            f'[long]\nrecipients = ["long.test"]\nservers = ["127.0.0.1:{slow.port}"]\n'
        )
        relay = install(
            request.param, QMQP_SERVERS=f"127.0.0.1:{sink.port}", ROUTES=str(routes), **SETTINGS
        )
        workers = [relay.worker(wait=False) for _ in range(2)]
        smtpd = relay.smtpd()
        for worker in workers:
            relay.until_registered(worker)
        yield KillScenario(relay, sink, slow, reader, smtpd, workers)


def until_expired(relay: Installation, pid: int) -> float:
    """Wait until the worker of that process is expired; the seconds since its last renewal."""
    sql = """SELECT @micros(ended_at) - @micros(lease_expires_at) FROM workers WHERE pid = :pid
        AND end_reason = 'expired'"""
    late = until(lambda: relay.rows(sql, pid=pid), 30, what=relay.log_text)[0][0]
    return float(late) / 1_000_000 + LEASE


def stop_outside_transactions(relay: Installation, worker: subprocess.Popen[Any]) -> None:
    """SIGSTOP, but not within a transaction, whose locks would stop all other processes."""

    def stopped() -> bool:
        worker.send_signal(signal.SIGSTOP)
        until(lambda: stands_still(worker.pid))
        try:
            until(lambda: not writing(relay), 0.5)
        except AssertionError:
            worker.send_signal(signal.SIGCONT)
            return False
        return True

    until(stopped, what="it is stopped outside transactions")


def writing(relay: Installation) -> bool:
    """Whether a transaction is open."""
    if relay.database.dialect.name == "postgresql":
        return bool(
            relay.rows(
                "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND pid <>"
                " pg_backend_pid()"
                " AND xact_start IS NOT NULL"
            )
        )
    with (relay.directory / "relay.db.lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_mail_of_a_killed_worker_is_delivered(scene: KillScenario) -> None:
    with Feeder(scene.relay.port, name="worker-") as feeder:
        victim = scene.hold("killed")
        feeder.until_accepted(50)
        scene.relay.end(victim, signal.SIGKILL)
        scene.reader.slow = False
        scene.replace(victim)
        assert until_expired(scene.relay, victim.pid) < 3 * LEASE
        feeder.until_accepted(50)
        scene.finish(feeder, killed=victim.pid)
    assert [what for _, what, _ in scene.relay.attempts("killed@long.test")] == [
        "uncertain",
        "delivered",
    ]


def test_a_worker_that_sleeps_past_its_lease_sends_nothing_twice(scene: KillScenario) -> None:
    with Feeder(scene.relay.port, name="still-") as feeder:
        victim = scene.hold("still")
        feeder.until_accepted(50)
        stop_outside_transactions(scene.relay, victim)
        scene.reader.slow = False
        try:
            assert until_expired(scene.relay, victim.pid) < 3 * LEASE
        finally:
            victim.send_signal(signal.SIGCONT)
        scene.relay.until_registered(victim)  # with another id
        feeder.until_accepted(50)
        scene.finish(feeder)
    outcomes = [what for _, what, _ in scene.relay.attempts("still@long.test")]
    assert outcomes.count("uncertain") == outcomes.count("delivered") == 1
    # It was stopped before its commit point, and did not pass that point after it woke up without
    # its lease.
    assert accepted_by(scene.slow)["still@long.test"] == 1


def test_a_worker_that_stops_within_a_transfer_requeues_it(scene: KillScenario) -> None:
    with Feeder(scene.relay.port, name="stop-") as feeder:
        victim = scene.hold("stopped")
        feeder.until_accepted(50)
        scene.reader.slow = False
        assert scene.relay.end(victim, signal.SIGTERM) == 0
        scene.replace(victim)
        feeder.until_accepted(50)
        scene.finish(feeder)
    # It was before its commit point, so the attempt is not uncertain, and no lease has to expire.
    assert "uncertain" not in [what for _, what, _ in scene.relay.attempts("stopped@long.test")]
    last = "SELECT end_reason FROM workers WHERE pid = :pid ORDER BY started_at DESC LIMIT 1"
    assert scene.relay.rows(last, pid=victim.pid) == [("stopped",)]


def test_accepted_mail_survives_a_killed_smtpd(scene: KillScenario) -> None:
    with Feeder(scene.relay.port, name="smtpd-") as feeder:
        feeder.until_accepted(50)
        scene.relay.end(scene.smtpd, signal.SIGKILL)
        scene.smtpd = scene.relay.smtpd()
        feeder.until_accepted(50)
        scene.finish(feeder, orphans=True)


def test_C25_accepted_mail_survives_a_killed_spooler(scene: KillScenario) -> None:
    children = Path(f"/proc/{scene.smtpd.pid}/task/{scene.smtpd.pid}/children")
    with Feeder(scene.relay.port, name="spooler-") as feeder:
        for _ in range(3):
            feeder.until_accepted(50)
            (spooler,) = map(int, children.read_text().split())
            os.kill(spooler, signal.SIGKILL)
        feeder.until_accepted(50)
        scene.finish(feeder, orphans=True)


@pytest.mark.parametrize("scene", ["sqlite"], indirect=True)
def test_mail_is_delivered_when_the_broker_is_killed(scene: KillScenario) -> None:
    with Feeder(scene.relay.port, name="broker-") as feeder:
        feeder.until_accepted(50)
        scene.relay.broker.kill()
        feeder.until_accepted(50)
        scene.relay.broker.start()
        feeder.until_accepted(50)
        scene.finish(feeder)


@pytest.mark.parametrize("scene", ["postgresql"], indirect=True)
def test_accepted_mail_survives_a_killed_database(scene: KillScenario, postgres: Postgres) -> None:
    with Feeder(scene.relay.port, name="database-") as feeder:
        feeder.until_accepted(50)
        postgres.kill()
        postgres.start()
        scene.relay.database.dispose()  # the connections of the test are broken too
        feeder.until_accepted(50)
        scene.finish(feeder, orphans=True)


@pytest.mark.parametrize("scene", ["sqlite"], indirect=True)
@pytest.mark.parametrize("role", ["smtpd", "worker"])
def test_a_wrong_spool_directory_is_refused(scene: KillScenario, tmp_path: Path, role: str) -> None:
    spool = tmp_path / "spool"
    spool.mkdir(mode=0o700)
    settings = {**scene.relay.settings, "SPOOL_DIR": str(spool), "SMTP_LISTEN": "127.0.0.1:0"}
    refused = command(role, **settings)
    assert refused.returncode != 0
    assert str(spool) in refused.stderr
    assert "spool" in refused.stderr.splitlines()[-1]
    assert list(spool.iterdir()) == []
