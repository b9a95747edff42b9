"""Whatever is killed in mid-flow, nothing that was answered 250 is lost or stuck, and only doubt
doubles.

Mail flows all the time from clients who note what was accepted, through two workers, to a server
that takes a tenth of a second to reply, so that at any moment some is before its commit point and
some after it. One more message is on its way to a server that has all but stopped reading: that one
is held before its commit point by whoever sends it, and is how a test finds a worker that has
something to lose. The oracle is what the servers received.
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
from tests.acceptance.installation import Feeder, Install, Installation, reckon, taken
from tests.acceptance.stack import command
from tests.services import Postgres
from tests.waiting import stands_still, until

LEASE = 2.0
SETTINGS = {
    "LEASE": f"{LEASE:g}s", "GRACE": "1s", "UNCERTAIN_DELAY": "1s", "RETRY_MIN": "200ms", "RETRY_MAX": "400ms",
    "DRAIN_TIMEOUT": "3s", "ACCEPT_DEADLINE": "5s",
}  # fmt: skip
LONG = (
    b"Subject: long\n\n" + (b"z" * 990 + b"\n") * 12_000
)  # more than the kernel keeps for a peer that does not read


@dataclass(slots=True)
class Scene:
    """`example.org` goes to `sink`; `long.test` to `mire`, which as long as `Mire.deep` hardly
    reads at all."""

    relay: Installation
    sink: Sink
    mire: Sink
    depth: "Mire"
    smtpd: subprocess.Popen[Any]
    workers: list[subprocess.Popen[Any]]
    accepted: set[str] = field(default_factory=set)
    forgiven: set[str] = field(default_factory=set)  # bodies that were left for the housekeeper

    def hold(self, name: str) -> subprocess.Popen[Any]:
        """Send one message into the mire; the worker that is stuck with it."""
        self.depth.deep, connections = True, self.mire.connections
        recipient = f"{name}@long.test"
        self.relay.send(recipient, body=LONG)
        self.accepted.add(recipient)
        until(lambda: self.mire.connections > connections, 20, what=self.relay.said)
        self.depth.deep = False  # for whoever comes next
        pid = self.relay.rows(
            "SELECT w.pid FROM deliveries d JOIN workers w ON w.id = d.worker WHERE d.route = 'long'"
        )[0][0]
        return next(worker for worker in self.workers if worker.pid == pid)

    def replace(self, worker: subprocess.Popen[Any]) -> None:
        """Another worker for one that has ended."""
        self.workers.remove(worker)
        self.workers.append(self.relay.worker(wait=False))

    def settle(self, feeder: Feeder, *, killed: int = 0, orphans: bool = False) -> None:
        """Stop the flow, wait until all is delivered, and reckon.

        No body may be left but those that are the housekeeper's: of messages that the worker
        `killed` (a pid) delivered and had no time to remove, and, if there may be `orphans`,
        without a row.
        """
        feeder.stop()
        self.accepted |= feeder.accepted
        relay = self.relay
        until(lambda: not relay.count("d.state <> 'delivered'"), 60, what=relay.unfinished)
        reckon(relay, self.accepted, self.sink, self.mire)
        known = {row[0] for row in relay.rows("SELECT @hex(id) FROM messages")}
        his = {row[0] for row in relay.rows(
            "SELECT @hex(a.queue_id) FROM attempts a JOIN workers w ON w.id = a.worker WHERE w.pid = :pid", pid=killed
        )}  # fmt: skip

        def left() -> set[str]:
            return {body.name for body in relay.bodies()} - his - self.forgiven

        until(
            lambda: left() <= (left() - known if orphans else set()),
            what=lambda: f"bodies left: {left()}",
        )
        self.forgiven |= {body.name for body in relay.bodies()}


@dataclass(slots=True)
class Mire:
    """A rule: how a connection that is opened now will be read."""

    deep: bool = False

    def opening(self) -> Answer | None:
        return Answer(read_size=1024, read_pause=0.2) if self.deep else None

    def answer(self, recipients: object, digest: str) -> Answer | None:
        return None


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def scene(
    request: pytest.FixtureRequest, install: Install, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scene]:
    depth = Mire()
    with (
        running_sink(Rule(Answer(delay=0.1))) as sink,
        running_sink(depth, receive_buffer=4096) as mire,
    ):
        routes = tmp_path_factory.mktemp("routes") / "routes.toml"
        routes.write_text(
            f'[long]\nrecipients = ["long.test"]\nservers = ["127.0.0.1:{mire.port}"]\n'
        )
        relay = install(
            request.param, QMQP_SERVERS=f"127.0.0.1:{sink.port}", ROUTES=str(routes), **SETTINGS
        )
        workers = [relay.worker(wait=False) for _ in range(2)]
        smtpd = relay.smtpd()
        for worker in workers:
            relay.until_signed_on(worker)
        yield Scene(relay, sink, mire, depth, smtpd, workers)


def buried(relay: Installation, pid: int) -> float:
    """Wait until the worker of that process is declared dead; seconds from its last renewal to
    that."""
    sql = """SELECT @micros(ended_at) - @micros(lease_expires_at) FROM workers WHERE pid = :pid AND end_reason = 'vanished'"""
    late = until(lambda: relay.rows(sql, pid=pid), 30, what=relay.said)[0][0]
    return float(late) / 1_000_000 + LEASE


def stop_between_rounds(relay: Installation, worker: subprocess.Popen[Any]) -> None:
    """SIGSTOP, but not in the middle of a transaction: what it has locked then nobody else gets
    at."""

    def stopped() -> bool:
        worker.send_signal(signal.SIGSTOP)
        until(lambda: stands_still(worker.pid))
        try:
            until(lambda: not writing(relay), 0.5)
        except AssertionError:
            worker.send_signal(signal.SIGCONT)
            return False
        return True

    until(stopped, what="it stands still between two rounds")


def writing(relay: Installation) -> bool:
    """Whether somebody has a transaction open."""
    if relay.database.dialect.name == "postgresql":
        return bool(relay.rows(
            "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            " AND xact_start IS NOT NULL"
        ))  # fmt: skip
    with (relay.directory / "relay.db.lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_worker_is_killed(scene: Scene) -> None:
    with Feeder(scene.relay.port, name="worker-") as feeder:
        victim = scene.hold("killed")
        feeder.until_accepted(50)
        scene.relay.end(victim, signal.SIGKILL)
        scene.replace(victim)
        assert buried(scene.relay, victim.pid) < 3 * LEASE
        feeder.until_accepted(50)
        scene.settle(feeder, killed=victim.pid)
    assert [what for _, what, _ in scene.relay.attempts("killed@long.test")] == [
        "uncertain",
        "delivered",
    ]


def test_a_worker_stands_still_past_its_lease_and_wakes_up(scene: Scene) -> None:
    with Feeder(scene.relay.port, name="still-") as feeder:
        victim = scene.hold("still")
        feeder.until_accepted(50)
        stop_between_rounds(scene.relay, victim)
        try:
            assert buried(scene.relay, victim.pid) < 3 * LEASE
        finally:
            victim.send_signal(signal.SIGCONT)
        scene.relay.until_signed_on(victim)  # under another id
        feeder.until_accepted(50)
        scene.settle(feeder)
    outcomes = [what for _, what, _ in scene.relay.attempts("still@long.test")]
    assert outcomes.count("uncertain") == outcomes.count("delivered") == 1
    # It was not past its commit point when it stood still, and did not pass it when it woke up
    # without its lease.
    assert taken(scene.mire)["still@long.test"] == 1


def test_a_worker_is_told_to_stop_in_mid_transfer(scene: Scene) -> None:
    with Feeder(scene.relay.port, name="stop-") as feeder:
        victim = scene.hold("stopped")
        feeder.until_accepted(50)
        assert scene.relay.end(victim, signal.SIGTERM) == 0
        scene.replace(victim)
        feeder.until_accepted(50)
        scene.settle(feeder)
    # It is not past its commit point, so nobody is in doubt about it and nobody waits for a lease.
    assert "uncertain" not in [what for _, what, _ in scene.relay.attempts("stopped@long.test")]
    last = "SELECT end_reason FROM workers WHERE pid = :pid ORDER BY started_at DESC LIMIT 1"
    assert scene.relay.rows(last, pid=victim.pid) == [("stopped",)]


def test_smtpd_is_killed(scene: Scene) -> None:
    with Feeder(scene.relay.port, name="smtpd-") as feeder:
        feeder.until_accepted(50)
        scene.relay.end(scene.smtpd, signal.SIGKILL)
        scene.smtpd = scene.relay.smtpd()
        feeder.until_accepted(50)
        scene.settle(feeder, orphans=True)


def test_the_keeper_is_killed(scene: Scene) -> None:
    children = Path(f"/proc/{scene.smtpd.pid}/task/{scene.smtpd.pid}/children")
    with Feeder(scene.relay.port, name="keeper-") as feeder:
        for _ in range(3):
            feeder.until_accepted(50)
            (keeper,) = map(int, children.read_text().split())
            os.kill(keeper, signal.SIGKILL)
        feeder.until_accepted(50)
        scene.settle(feeder, orphans=True)


@pytest.mark.parametrize("scene", ["sqlite"], indirect=True)
def test_the_broker_is_killed(scene: Scene) -> None:
    with Feeder(scene.relay.port, name="broker-") as feeder:
        feeder.until_accepted(50)
        scene.relay.broker.kill()
        feeder.until_accepted(50)
        scene.relay.broker.start()
        feeder.until_accepted(50)
        scene.settle(feeder)


@pytest.mark.parametrize("scene", ["postgresql"], indirect=True)
def test_the_database_is_killed(scene: Scene, postgres: Postgres) -> None:
    with Feeder(scene.relay.port, name="database-") as feeder:
        feeder.until_accepted(50)
        postgres.kill()
        postgres.start()
        scene.relay.database.dispose()  # our own connections are gone as well
        feeder.until_accepted(50)
        scene.settle(feeder, orphans=True)


@pytest.mark.parametrize("scene", ["sqlite"], indirect=True)
@pytest.mark.parametrize("role", ["smtpd", "worker"])
def test_a_wrong_spool_directory_is_refused(scene: Scene, tmp_path: Path, role: str) -> None:
    spool = tmp_path / "spool"
    spool.mkdir(mode=0o700)
    settings = {**scene.relay.settings, "SPOOL_DIR": str(spool), "SMTP_LISTEN": "127.0.0.1:0"}
    refused = command(role, **settings)
    assert refused.returncode != 0
    assert str(spool) in refused.stderr
    assert "spool" in refused.stderr.splitlines()[-1]
    assert list(spool.iterdir()) == []
