"""The sweeper, the cleaner and the rerouter, one pass at a time."""

import json
import os
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest
from sqlalchemy import event, text

from relay.db.engine import writing
from relay.dsn.generator import DsnGenerator
from relay.hints import Hints
from relay.ids import dashed, new_id
from relay.queue.model import ClaimRequest
from relay.queue.operations import QueueOperations
from relay.routes import Route, Routes, parse_server
from relay.settings import Settings, WorkerSettings, load
from relay.spool.store import Spool
from tests.bodies import body_in
from tests.integration.harness import BODY, EngineHarness
from tests.waiting import SetClock, until
from worker.circuit_breaker import ServerPool
from worker.cleaner import ORPHAN_MOVE_AGE, Cleaner, exclusive
from worker.lease import Lease
from worker.rerouter import CHECK_INTERVAL, MIN_GONE, SCAN_INTERVAL, Rerouter
from worker.sweeper import LeaseMonitor, Sweeper, heartbeat_file

HOUR = 3600.0
DAY = 24 * HOUR


class FakeHints(Hints):
    """Keeps the ids that were offered."""

    def __init__(self) -> None:
        self.offered: list[str] = []

    def offer(self, ids: object, route: str = "", early: bool = False) -> None:
        assert isinstance(ids, list)
        self.offered += ids


class FakeServers(ServerPool):
    """Servers of which the test says how much may be woken."""

    waiting: list[str]
    limit = 0

    def wake_limits(self, routes: Collection[Route]) -> dict[str, int]:
        self.waiting = [route.name for route in routes]
        return {name: self.limit for name in self.waiting if self.limit}


class FakeEngine:
    """As much of an engine as a sweeper uses."""

    polls = 0

    def __init__(self, mail: EngineHarness) -> None:
        self.lease = Lease(mail.worker_queue, mail.settings.lease, NotImplemented)
        self.lease.renewed_at = float("inf")
        self.heartbeat = time.monotonic()
        self.routes = Routes([Route("default", ())])
        self.servers = FakeServers(5)

    def poll_now(self) -> None:
        self.polls += 1


class SweeperHarness:
    def __init__(self, mail: EngineHarness) -> None:
        self.mail, self.clock, self.hints = mail, SetClock(), FakeHints()
        self.engine = FakeEngine(mail)
        self.engine.lease.worker = self.worker()
        generator = DsnGenerator(
            mail.database, mail.spool, mail.settings, lambda address: "default"
        )
        self.sweeper = Sweeper(
            mail.settings,
            mail.rescuer,
            generator,
            self.engine,  # type: ignore[arg-type]
            self.hints,
            clock=self.clock,
        )

    def worker(self) -> str:
        worker = new_id()
        self.mail.worker_queue.register(worker, "host", 1)
        return worker

    def sending(self, worker: str) -> str:
        queue_id = self.mail.accept()
        self.mail.worker_queue.commit([ClaimRequest(worker, [queue_id], {"default": 1})])
        assert self.mail.state(queue_id) == "sending"
        return queue_id

    def watch(self, seconds: float) -> None:
        """Sweep now and then, for so long."""
        end = self.clock.now + seconds
        while self.clock.now < end:
            self.clock.now = min(end, self.clock.now + self.mail.settings.lease / 8)
            self.sweeper.sweep()

    def run_out(self, worker: str) -> None:
        assert (
            self.mail.change(
                "UPDATE workers SET lease_expires_at = @ago(1) WHERE id = :id", id=worker
            )
            == 1
        )


@pytest.fixture
def mail(clean_url: str, spool: Spool, tmp_path: Path) -> Iterator[EngineHarness]:
    made = EngineHarness(clean_url, spool, tmp_path)
    yield made
    made.close()


@pytest.fixture
def scene(mail: EngineHarness) -> SweeperHarness:
    return SweeperHarness(mail)


def test_due_mail_is_queued_and_hints_are_published(scene: SweeperHarness) -> None:
    due, later = scene.mail.accept(), scene.mail.accept()
    scene.mail.change(
        "UPDATE deliveries SET state = 'deferred', due_at = @ago(1) WHERE queue_id = :id", id=due
    )
    scene.mail.change(
        "UPDATE deliveries SET state = 'deferred', due_at = @later(60) WHERE queue_id = :id",
        id=later,
    )
    scene.sweeper.sweep()
    assert scene.hints.offered == [due]
    assert (scene.mail.state(due), scene.mail.state(later)) == ("queued", "deferred")


def test_mail_does_not_wait_for_a_clock_that_was_set_back(scene: SweeperHarness) -> None:
    ids = [scene.mail.accept() for _ in range(3)]
    for queue_id, state in zip(ids, ("deferred", "deferred", "queued"), strict=True):
        change = (
            f"UPDATE deliveries SET state = '{state}', due_at = @later(7200) WHERE queue_id = :id"
        )
        scene.mail.change(change, id=queue_id)
    scene.mail.change("UPDATE deliveries SET due_at = @later(3600) WHERE queue_id = :id", id=ids[1])
    slow = Route("slow", (), retry_max=3000.0)
    scene.engine.routes = Routes([slow, Route("default", ())])
    scene.sweeper.sweep()
    assert scene.hints.offered == [ids[0]], "the slow route may wait an hour, with jitter"
    (claims,) = scene.mail.worker_queue.commit(
        [ClaimRequest(scene.engine.lease.worker, None, {"default": 5})]
    )
    assert isinstance(claims, list)
    # The first may be overdue too by now: GRACE is short here.
    assert ids[2] in [claim.queue_id for claim in claims]


def test_mail_that_waits_for_a_route_is_woken_in_due_order_up_to_the_limit(
    scene: SweeperHarness,
) -> None:
    ids = [scene.mail.accept() for _ in range(5)]
    defer = (
        "UPDATE deliveries SET state = 'deferred', due_at = @later(:wait), waiting_for = :what"
        " WHERE queue_id = :id"
    )
    for queue_id, wait in zip(ids, (50, 30, 40, 20, 10), strict=True):
        what = "route:default" if queue_id != ids[4] else None
        scene.mail.change(defer, wait=wait, what=what, id=queue_id)
    queued = (
        "SELECT queue_id FROM deliveries WHERE state = 'queued' AND due_at <= @now ORDER BY due_at"
    )

    def overdue() -> list[str]:
        return [str(row["queue_id"]).replace("-", "") for row in scene.mail.rows(queued)]

    scene.sweeper.sweep()
    assert (scene.engine.servers.waiting, overdue(), scene.engine.polls) == (["default"], [], 0)
    scene.engine.servers.limit = 2
    scene.sweeper.sweep()
    scene.sweeper.sweep()
    assert (overdue(), scene.engine.polls) == ([ids[3], ids[1]], 1), (
        "no more than the limit is overdue at a time"
    )
    scene.engine.servers.limit = 10
    scene.sweeper.sweep()
    assert set(overdue()) == set(ids[:4])
    scene.sweeper.sweep()
    assert (scene.engine.servers.waiting, scene.mail.state(ids[4])) == ([], "deferred")
    assert scene.hints.offered == []


def test_a_dead_worker_is_expired_after_its_lease_was_seen_expired_for_a_lease(
    scene: SweeperHarness,
) -> None:
    dead = scene.worker()
    queue_id = scene.sending(dead)
    scene.run_out(dead)
    scene.sweeper.sweep()
    scene.watch(scene.mail.settings.lease - 0.1)
    assert scene.mail.state(queue_id) == "sending"
    scene.watch(0.2)
    found = scene.mail.delivery(queue_id)
    assert (found["state"], found["last_outcome"], found["crash_count"]) == (
        "deferred",
        "uncertain",
        1,
    )
    assert scene.mail.attempts(queue_id) == [(None, "uncertain")]


def test_a_sweeper_that_was_stopped_expires_no_worker_for_that_time(scene: SweeperHarness) -> None:
    """The others may have been stopped with it; they get time to renew."""
    slow = scene.worker()
    queue_id = scene.sending(slow)
    scene.run_out(slow)
    scene.sweeper.sweep()
    scene.clock.now += 100 * scene.mail.settings.lease
    scene.sweeper.sweep()
    scene.watch(scene.mail.settings.lease * 0.7)
    assert scene.mail.state(queue_id) == "sending"
    scene.watch(scene.mail.settings.lease * 0.1)
    assert scene.mail.state(queue_id) == "deferred"


def test_a_worker_that_renews_in_between_is_not_expired(scene: SweeperHarness) -> None:
    slow = scene.worker()
    queue_id = scene.sending(slow)
    scene.run_out(slow)
    scene.sweeper.sweep()
    scene.watch(scene.mail.settings.lease - 1)
    scene.mail.change(
        "UPDATE workers SET lease_expires_at = @ago(0.5) WHERE id = :id", id=slow
    )  # another expired lease
    scene.watch(2)
    assert scene.mail.state(queue_id) == "sending"


def test_an_outage_of_the_database_expires_no_worker(
    scene: SweeperHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = scene.worker()
    scene.run_out(slow)
    scene.sweeper.sweep()
    with monkeypatch.context() as away:
        away.setattr(scene.mail.rescuer, "requeue_due", lambda limit: 1 / 0)
        scene.sweeper.sweep()
    scene.engine.lease.renewed_at = scene.clock.now - 1
    scene.clock.now += scene.mail.settings.lease + 1
    due = scene.mail.accept()
    scene.mail.change(
        "UPDATE deliveries SET state = 'deferred', due_at = @ago(1) WHERE queue_id = :id", id=due
    )
    scene.sweeper.sweep()
    assert scene.mail.state(due) == "deferred"  # the engine of the test has not renewed yet
    scene.engine.lease.renewed_at = scene.clock.now
    scene.sweeper.sweep()
    assert scene.mail.state(due) == "queued"
    assert scene.mail.rows("SELECT ended_at FROM workers WHERE id = :id", id=slow) == [
        {"ended_at": None}
    ]


def test_server_health_shows_open_circuits_and_pauses(scene: SweeperHarness) -> None:
    servers, mx = scene.engine.servers, parse_server("mx.example.net")
    QueueOperations(scene.mail.database, sends_dsns=True).pause(
        "server:other:628", actor="me", reason=""
    )
    shown = (
        "SELECT server, attempts, circuit_open_workers AS by, circuit_open_reason AS why,"
        " paused_at FROM server_health"
    )

    def health() -> dict[str, tuple[object, ...]]:
        scene.sweeper.sweep()
        rows = scene.mail.rows(f"{shown} ORDER BY server")
        return {
            row["server"]: (row["attempts"], row["by"], row["why"], row["paused_at"] is not None)
            for row in rows
        }

    paused = {"other:628": (0, 0, None, True)}
    assert health() == paused
    servers.record_failure(mx, "not authorized to use this service", unauthorized=True)
    assert (
        health()
        == {"mx.example.net:628": (0, 1, "not authorized to use this service", False)} | paused
    )
    assert health() == health(), "nothing is written twice"
    servers.record_success(mx)
    assert health() == paused
    servers.record_failure(mx, "again", unauthorized=True)
    assert len(health()) == 2
    scene.mail.change("UPDATE workers SET ended_at = @now, end_reason = 'stopped'")
    assert health() == paused, "a worker that has ended has no open circuits"


def test_a_worker_publishes_its_routes_and_how_long_a_claim_lasts(scene: SweeperHarness) -> None:
    default = Route("default", (parse_server("mx.example.net"),))
    scene.engine.routes = Routes([default])
    shown = "SELECT routes, claim_seconds AS far FROM workers"
    settings = scene.mail.settings
    (row,) = scene.mail.rows(shown)
    assert row == {"routes": None, "far": 2 * settings.session_timeout + 2 * settings.lease}
    scene.sweeper.sweep()
    scene.engine.routes = Routes([Route("bulk", ()), default])
    assert json.loads(scene.mail.rows(shown)[0]["routes"]) == {"default": ["mx.example.net:628"]}
    scene.sweeper.sweep()
    assert json.loads(scene.mail.rows(shown)[0]["routes"]) == {
        "default": ["mx.example.net:628"],
        "bulk": [],
    }
    scene.engine.lease.worker = scene.worker()  # expired, and registered under another id
    scene.sweeper.sweep()
    assert all("bulk" in row["routes"] for row in scene.mail.rows(shown))


def test_a_pending_dsn_is_generated_and_its_hint_published(scene: SweeperHarness) -> None:
    queue_id = scene.mail.accept()
    scene.mail.change(
        "UPDATE deliveries SET state = 'bounced', due_at = @ago(1), finished_at = @ago(1)"
        " WHERE true"
    )
    scene.sweeper.sweep()
    (notice,) = scene.hints.offered
    assert scene.mail.state(notice) == "queued"
    assert scene.mail.delivery(queue_id)["due_at"] is None


def test_a_full_spool_delays_only_dsns(
    scene: SweeperHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    owing = scene.mail.accept()
    scene.mail.change(
        "UPDATE deliveries SET state = 'bounced', due_at = @ago(1), finished_at = @ago(1)"
        " WHERE true"
    )
    due = scene.mail.accept()
    monkeypatch.setattr(scene.mail.spool, "store", lambda queue_id, parts: 1 / 0)
    scene.mail.change(
        "UPDATE deliveries SET state = 'deferred', due_at = @ago(1) WHERE queue_id = :id", id=due
    )
    scene.sweeper.sweep()
    assert (scene.mail.state(due), scene.hints.offered) == ("queued", [due])
    assert scene.mail.delivery(owing)["due_at"] is not None


def test_no_worker_expires_itself() -> None:
    clock = SetClock()
    monitor = LeaseMonitor(10.0, clock)
    leases = [("own", "1"), ("other", "1")]
    assert monitor.observe(leases, "own") == []
    found = []
    for _ in range(4):
        clock.now += 2.5
        found = monitor.observe(leases, "own")
    assert found == [("other", "1")]
    monitor.reset()
    assert monitor.observe(leases, "own") == []


def test_a_stuck_transfer_becomes_uncertain(scene: SweeperHarness) -> None:
    queue_id = scene.sending(scene.engine.lease.worker)
    scene.mail.change("UPDATE deliveries SET due_at = @ago(1) WHERE queue_id = :id", id=queue_id)
    scene.sweeper.sweep()
    assert scene.mail.delivery(queue_id)["last_outcome"] == "uncertain"


def test_the_heartbeat_file_exists_while_both_threads_run(scene: SweeperHarness) -> None:
    heartbeat = heartbeat_file(scene.mail.settings)
    assert heartbeat == scene.mail.settings.state_dir / f"worker-{os.getpid()}.heartbeat"
    scene.engine.heartbeat = time.monotonic() + HOUR
    scene.sweeper.start()
    until(heartbeat.exists)
    scene.sweeper.close()
    assert not heartbeat.exists()
    scene.engine.heartbeat -= 2 * HOUR
    scene.sweeper.touch_heartbeat()
    assert not heartbeat.exists()


def test_the_heartbeat_file_may_be_elsewhere(tmp_path: Path) -> None:
    assert (
        heartbeat_file(load(WorkerSettings, health_file=tmp_path / "health")) == tmp_path / "health"
    )


# The cleaner


@pytest.fixture
def cleaner(mail: EngineHarness) -> Cleaner:
    return Cleaner(mail.settings, mail.database, mail.spool)


@pytest.fixture
def finished(mail: EngineHarness) -> Callable[..., str]:
    def make(*, age: float) -> str:
        queue_id = mail.accept()
        old = (
            f"{int((time.time() - age) * 1000):012x}" + queue_id[12:]
        )  # ids sort by the time they were made
        for table, key in (
            ("messages", "id"),
            ("recipients", "queue_id"),
            ("deliveries", "queue_id"),
        ):
            mail.change(
                f"UPDATE {table} SET {key} = :new WHERE {key} = :id", id=queue_id, new=dashed(old)
            )
        mail.spool.path(old).parent.mkdir(exist_ok=True)
        mail.spool.path(queue_id).rename(mail.spool.path(old))
        mail.change(
            "UPDATE deliveries SET state = 'delivered', due_at = NULL, finished_at = @ago(:age)"
            " WHERE queue_id = :id",
            id=old,
            age=age,
        )
        mail.change("UPDATE messages SET received_at = @ago(:age) WHERE id = :id", id=old, age=age)
        return old

    return make


def test_finished_messages_are_removed_after_their_retention(
    mail: EngineHarness, cleaner: Cleaner, finished: Callable[..., str]
) -> None:
    old, young, waiting = finished(age=31 * DAY), finished(age=29 * DAY), mail.accept()
    assert cleaner.clean() == 1
    assert {row["id"] for row in mail.rows("SELECT @hex(id) AS id FROM messages")} == {
        young,
        waiting,
    }
    for table in ("recipients", "deliveries"):
        assert mail.rows(f"SELECT 1 FROM {table} WHERE queue_id = :id", id=old) == []
    assert not mail.spool.path(old).exists()


def test_old_unfinished_mail_stays(
    mail: EngineHarness, cleaner: Cleaner, finished: Callable[..., str]
) -> None:
    old = finished(age=31 * DAY)
    mail.change("UPDATE deliveries SET state = 'held' WHERE queue_id = :id", id=old)
    assert cleaner.clean() == 0


def _aged(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_deletable_bodies_are_removed(
    mail: EngineHarness, cleaner: Cleaner, finished: Callable[..., str]
) -> None:
    done, fresh, waiting = finished(age=2 * DAY), finished(age=2 * DAY), mail.accept()
    _aged(mail.spool.path(done), 2 * HOUR)
    _aged(mail.spool.path(waiting), 40 * DAY)
    assert cleaner.clean_spool() == (1, 0)
    assert [mail.spool.path(i).exists() for i in (done, fresh, waiting)] == [False, True, True]


@pytest.mark.parametrize("lost", ["deliveries", "deliveries and recipients", "one delivery of two"])
def test_a_message_with_a_missing_row_keeps_its_body(
    mail: EngineHarness, cleaner: Cleaner, finished: Callable[..., str], lost: str
) -> None:
    old = finished(age=31 * DAY)
    if lost == "one delivery of two":
        mail.change("UPDATE recipients SET delivery = 2 WHERE queue_id = :id", id=old)
    for table in ("deliveries", "recipients"):
        if table in lost:
            mail.change(f"DELETE FROM {table} WHERE queue_id = :id", id=old)
    _aged(mail.spool.path(old), 31 * DAY)
    assert (cleaner.clean(), cleaner.clean_spool()) == (0, (0, 0))
    assert mail.spool.path(old).exists()


def test_orphans_are_moved_once_a_newer_row_exists(mail: EngineHarness, cleaner: Cleaner) -> None:
    orphan, young = new_id(), new_id()
    for one, age in ((orphan, ORPHAN_MOVE_AGE + 60), (young, ORPHAN_MOVE_AGE - 60)):
        mail.spool.store(one, [b"x"])
        _aged(mail.spool.path(one), age)
    assert cleaner.clean_spool() == (0, 0)  # no row at all: a database that was restored, perhaps
    restored = mail.accept()
    mail.change(
        "UPDATE messages SET received_at = @ago(:age) WHERE id = :id",
        id=restored,
        age=ORPHAN_MOVE_AGE + 120,
    )
    assert cleaner.clean_spool() == (0, 0)
    mail.accept()
    assert cleaner.clean_spool() == (0, 1)
    assert body_in(mail.spool.directory / "orphans" / orphan) == b"x"
    assert mail.spool.path(young).exists()


def _forty_days_ahead(
    _connection: object, _cursor: object, sql: str, parameters: object, *_: object
) -> tuple[str, object]:
    """The same statement, on a database whose clock is 40 days ahead."""
    sql = sql.replace("now()", "(now() + interval '40 days')")
    ahead = f"(SELECT now + {40 * DAY * 1_000_000:.0f} AS now FROM clock)"
    return sql.replace("FROM clock", f"FROM {ahead}"), parameters


@pytest.mark.parametrize("wrong", ["the worker's", "the file system's", "the database's"])
def test_one_wrong_clock_removes_no_body(
    mail: EngineHarness, cleaner: Cleaner, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """It is 40 days ahead, while one message is being received and a newer row exists."""
    mail.spool.store(received := new_id(), [b"x"])
    mail.accept()
    now, clock = time.time, mail.spool.clock
    if wrong == "the worker's":
        monkeypatch.setattr(time, "time", lambda: now() + 40 * DAY)
    elif wrong == "the file system's":
        monkeypatch.setattr(mail.spool, "clock", lambda: clock() + 40 * DAY)
    else:
        event.listen(mail.database, "before_cursor_execute", _forty_days_ahead, retval=True)
    assert cleaner.clean_spool() == (0, 0)
    assert mail.spool.path(received).exists()


def test_a_moved_orphan_is_purged_by_a_later_pass(mail: EngineHarness) -> None:
    cleaner = Cleaner(
        mail.settings.model_copy(update={"retention": -1.0}), mail.database, mail.spool
    )
    mail.spool.store(orphan := new_id(), [b"x"])
    _aged(mail.spool.path(orphan), 40 * DAY)
    mail.accept()
    assert cleaner.clean_spool() == (0, 1)
    assert (mail.spool.directory / "orphans" / orphan).exists()
    assert cleaner.clean_spool() == (0, 0)
    assert not (mail.spool.directory / "orphans" / orphan).exists()


def test_the_retention_of_an_orphan_begins_with_the_move(
    mail: EngineHarness, cleaner: Cleaner
) -> None:
    mail.spool.store(orphan := new_id(), [b"x"])
    _aged(mail.spool.path(orphan), 400 * DAY)
    mail.accept()
    assert [cleaner.clean_spool() for _ in range(2)] == [(0, 1), (0, 0)]
    assert (mail.spool.directory / "orphans" / orphan).exists()


def test_a_moved_body_with_a_row_is_not_purged_and_can_be_sent(mail: EngineHarness) -> None:
    """Its row came after the move."""
    cleaner = Cleaner(
        mail.settings.model_copy(update={"retention": -1.0}), mail.database, mail.spool
    )
    queue_id = mail.accept()
    mail.spool.move_to_orphans(queue_id)
    cleaner.clean_spool()
    mail.spool.open(queue_id, len(BODY)).close()


def test_only_directories_of_bodies_are_removed(mail: EngineHarness, cleaner: Cleaner) -> None:
    ours, theirs = mail.spool.directory / "01a2b3c4", mail.spool.directory / "lost+found"
    for directory in (ours, theirs):
        directory.mkdir()
        _aged(directory, 2 * HOUR)
    cleaner.clean_spool()
    assert [ours.exists(), theirs.exists()] == [False, True]


def test_only_one_worker_cleans_at_a_time(mail: EngineHarness) -> None:
    with exclusive(mail.database, 1, "test") as first:
        with exclusive(mail.database, 1, "test") as second:
            assert (first, second) == (True, False)
        with exclusive(mail.database, 2, "other") as other:
            assert other
    with exclusive(mail.database, 1, "test") as second:
        assert second


# The rerouter


def rerouting(mail: EngineHarness, routes: Routes, clock: Callable[[], float]) -> Rerouter:
    return Rerouter(
        mail.rescuer, QueueOperations(mail.database, sends_dsns=True), routes, clock=clock
    )


def test_mail_of_a_gone_route_is_rerouted(mail: EngineHarness) -> None:
    queue_id = mail.accept()
    with writing(mail.database) as connection:
        connection.execute(text("UPDATE deliveries SET route = 'gone'"))
    now = [0.0]
    rerouter = rerouting(mail, Routes([Route("default", ())]), lambda: now[0])
    assert rerouter.turn() == 0, "the route may come back"
    now[0] += MIN_GONE
    assert rerouter.turn() == 1
    assert mail.rows("SELECT route FROM deliveries WHERE queue_id = @id(:id)", id=queue_id) == [
        {"route": "default"}
    ]
    assert [row["operation"] for row in mail.rows("SELECT operation FROM audit")] == ["reroute"]
    assert rerouter.turn() == 0


def test_a_route_that_comes_back_keeps_its_mail(mail: EngineHarness, tmp_path: Path) -> None:
    """A file that is cut off for a moment has no routes."""
    file, now = tmp_path / "routes.toml", [100.0]
    whole = '[bulk]\nrecipients = ["lists.test"]\nservers = ["a"]\n'
    file.write_text(whole)
    routes = Routes.load(load(Settings, routes=file), clock=lambda: now[0])
    mail.accept()
    mail.change("UPDATE deliveries SET route = 'bulk'")
    rerouter = rerouting(mail, routes, lambda: now[0])

    def turns(seconds: float) -> int:
        moved = 0
        for _ in range(round(seconds / CHECK_INTERVAL)):
            now[0] += CHECK_INTERVAL
            moved += rerouter.turn()
        return moved

    for _ in range(3):
        file.write_text("")
        assert turns(MIN_GONE - 10) == 0
        assert routes.names() == ("default",)
        file.write_text(whole)
        assert turns(20) == 0
    file.write_text("")
    assert turns(MIN_GONE + 10) == 1
    assert mail.rows("SELECT route FROM deliveries") == [{"route": "default"}]


def test_a_route_that_another_worker_knows_is_not_gone(mail: EngineHarness) -> None:
    mail.accept()
    mail.change("UPDATE deliveries SET route = 'bulk'")
    worker, known = new_id(), json.dumps({"bulk": ["a:628"], "default": []})
    for one in (worker, new_id()):
        mail.worker_queue.register(one, "elsewhere", 1)
    mail.change("UPDATE workers SET routes = :known WHERE id = @id(:id)", id=worker, known=known)
    now = [0.0]
    rerouter = rerouting(mail, Routes([Route("default", ())]), lambda: now[0])

    def turn_later() -> int:
        now[0] += SCAN_INTERVAL
        return rerouter.turn()

    assert [turn_later() for _ in range(3)] == [0, 0, 0]
    mail.change("UPDATE workers SET ended_at = @now WHERE id = @id(:id)", id=worker)
    assert [turn_later() for _ in range(2)] == [0, 1]
