"""What a sweeper does: due rows, dead workers, its tick; and housekeeping."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from relay.db.engine import writing
from relay.dsn.generator import DsnGenerator
from relay.hints import Hints
from relay.ids import dashed, new_id
from relay.queue.model import ClaimRequest
from relay.queue.operations import QueueOperations
from relay.routes import Route, Routes, parse_server
from relay.settings import Settings, WorkerSettings, load
from relay.spool.store import Spool
from tests.integration.mailroom import BODY, Mailroom
from tests.waiting import until
from worker.circuit_breaker import ServerPool
from worker.cleaner import YOUNG, Cleaner
from worker.rerouter import EVERY, LOOK_EVERY, PATIENCE, Rerouter
from worker.sweeper import LeaseMonitor, Sweeper, heartbeat_file

HOUR = 3600.0
DAY = 24 * HOUR


class Clock:
    """A clock that we turn."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakeHints(Hints):
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.offered: list[str] = []

    def offer(self, ids: object, route: str = "") -> None:
        assert isinstance(ids, list)
        self.offered += ids


class FakeEngine:
    """As much of an engine as a sweeper looks at."""

    waiting: list[str]
    window = looks = 0

    def __init__(self, worker: str) -> None:
        self.worker, self.renewed, self.heartbeat = worker, float("inf"), time.monotonic()

    def pause(self, subjects: frozenset[str]) -> None:
        self.paused = subjects

    def routes(self) -> tuple[str, ...]:
        return ("default",)

    def awaited(self, names: list[str]) -> dict[str, int]:
        self.waiting = names
        return {name: self.window for name in names if self.window}

    def look(self) -> None:
        self.looks += 1

    def renewed_since(self, moment: float) -> bool:
        return self.renewed >= moment


class Scene:
    def __init__(self, mail: Mailroom) -> None:
        self.mail, self.clock, self.hints = mail, Clock(), FakeHints()
        self.engine = FakeEngine(self.worker())
        debts = DsnGenerator(mail.database, mail.spool, mail.settings, lambda address: "default")
        self.sweeper = Sweeper(
            mail.settings,
            mail.sweeps,
            debts,
            self.engine,  # type: ignore[arg-type]
            self.hints,
            clock=self.clock,
        )

    def worker(self) -> str:
        worker = new_id()
        self.mail.ledger.register(worker, "host", 1)
        return worker

    def sending(self, worker: str) -> str:
        queue_id = self.mail.accept()
        self.mail.ledger.commit([ClaimRequest(worker, [queue_id], {"default": 1})])
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
def mail(database_url: str, spool: Spool, tmp_path: Path) -> Iterator[Mailroom]:
    made = Mailroom(database_url, spool, tmp_path)
    yield made
    made.close()


@pytest.fixture
def scene(mail: Mailroom) -> Scene:
    return Scene(mail)


def test_due_mail_is_queued_and_hinted_at(scene: Scene) -> None:
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


def test_mail_does_not_wait_for_a_clock_that_was_set_back(scene: Scene) -> None:
    ids = [scene.mail.accept() for _ in range(3)]
    for queue_id, state in zip(ids, ("deferred", "deferred", "queued"), strict=True):
        change = (
            f"UPDATE deliveries SET state = '{state}', due_at = @later(7200) WHERE queue_id = :id"
        )
        scene.mail.change(change, id=queue_id)
    scene.mail.change("UPDATE deliveries SET due_at = @later(3600) WHERE queue_id = :id", id=ids[1])
    slow = Route("slow", (), retry_max=3000.0)
    scene.sweeper._routes = lambda: (slow, Route("default", ()))
    scene.sweeper.sweep()
    assert scene.hints.offered == [ids[0]], (
        "an hour is what the slow route may wait, with its spread"
    )
    (claims,) = scene.mail.ledger.commit([ClaimRequest(scene.engine.worker, None, {"default": 5})])
    assert isinstance(claims, list)
    assert len(claims) == 1


def test_what_waits_for_a_route_becomes_due_in_order_as_the_queue_has_room(scene: Scene) -> None:
    ids = [scene.mail.accept() for _ in range(5)]
    defer = "UPDATE deliveries SET state = 'deferred', due_at = @later(:wait), waiting_for = :what WHERE queue_id = :id"
    for queue_id, wait in zip(ids, (50, 30, 40, 20, 10), strict=True):
        what = "route:default" if queue_id != ids[4] else None
        scene.mail.change(defer, wait=wait, what=what, id=queue_id)
    queued = (
        "SELECT queue_id FROM deliveries WHERE state = 'queued' AND due_at <= @now ORDER BY due_at"
    )

    def overdue() -> list[str]:
        return [str(row["queue_id"]).replace("-", "") for row in scene.mail.rows(queued)]

    scene.sweeper.sweep()
    assert (scene.engine.waiting, overdue(), scene.engine.looks) == (["default"], [], 0)
    scene.engine.window = 2
    scene.sweeper.sweep()
    scene.sweeper.sweep()
    assert (overdue(), scene.engine.looks) == ([ids[3], ids[1]], 1), (
        "no more than the window is overdue at a time"
    )
    scene.engine.window = 10
    scene.sweeper.sweep()
    assert set(overdue()) == set(ids[:4])
    scene.sweeper.sweep()
    assert (scene.engine.waiting, scene.mail.state(ids[4])) == ([], "deferred")
    assert scene.hints.offered == []


def test_a_dead_worker_is_buried_after_two_looks_a_lease_apart(scene: Scene) -> None:
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


def test_a_sweeper_that_was_stopped_expires_no_worker_for_that_time(scene: Scene) -> None:
    """What stopped it may have stopped the others too: they get their time to renew."""
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


def test_a_worker_that_renews_between_the_looks_lives(scene: Scene) -> None:
    slow = scene.worker()
    queue_id = scene.sending(slow)
    scene.run_out(slow)
    scene.sweeper.sweep()
    scene.watch(scene.mail.settings.lease - 1)
    scene.mail.change(
        "UPDATE workers SET lease_expires_at = @ago(0.5) WHERE id = :id", id=slow
    )  # another lease, run out as well
    scene.watch(2)
    assert scene.mail.state(queue_id) == "sending"


def test_nobody_is_buried_for_an_outage(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = scene.worker()
    scene.run_out(slow)
    scene.sweeper.sweep()
    with monkeypatch.context() as away:
        away.setattr(scene.mail.sweeps, "requeue_due", lambda limit: 1 / 0)
        scene.sweeper.sweep()
    scene.engine.renewed = scene.clock.now - 1
    scene.clock.now += scene.mail.settings.lease + 1
    due = scene.mail.accept()
    scene.mail.change(
        "UPDATE deliveries SET state = 'deferred', due_at = @ago(1) WHERE queue_id = :id", id=due
    )
    scene.sweeper.sweep()
    assert scene.mail.state(due) == "deferred"  # our own engine has not renewed yet
    scene.engine.renewed = scene.clock.now
    scene.sweeper.sweep()
    assert scene.mail.state(due) == "queued"
    assert scene.mail.rows("SELECT ended_at FROM workers WHERE id = :id", id=slow) == [
        {"ended_at": None}
    ]


def test_server_health_shows_what_is_left_alone_and_what_is_paused(scene: Scene) -> None:
    servers, mx = ServerPool(5), parse_server("mx.example.net")
    scene.sweeper._resting = servers.open_circuits
    QueueOperations(scene.mail.database, notices=True).pause(
        "server:other:628", actor="me", reason=""
    )
    shown = "SELECT server, attempts, circuit_open_workers AS by, circuit_open_reason AS why, paused_at FROM server_health"

    def health() -> dict[str, tuple[object, ...]]:
        scene.sweeper.sweep()
        rows = scene.mail.rows(f"{shown} ORDER BY server")
        return {
            row["server"]: (row["attempts"], row["by"], row["why"], row["paused_at"] is not None)
            for row in rows
        }

    paused = {"other:628": (0, 0, None, True)}
    assert health() == paused
    servers.failed(mx, "not authorized to use this service", at_once=True)
    assert (
        health()
        == {"mx.example.net:628": (0, 1, "not authorized to use this service", False)} | paused
    )
    assert health() == health(), "nothing is said twice"
    servers.succeeded(mx)
    assert health() == paused
    servers.failed(mx, "again", at_once=True)
    assert len(health()) == 2
    scene.mail.change("UPDATE workers SET ended_at = @now, end_reason = 'stopped'")
    assert health() == paused, "whoever has ended leaves nothing alone"


def test_a_worker_says_which_routes_it_knows_and_how_long_a_claim_is_for(scene: Scene) -> None:
    routes: dict[str, tuple[str, ...]] = {"default": ("mx.example.net:628",)}
    scene.sweeper._known = routes.copy
    shown = "SELECT routes, claim_seconds AS far FROM workers"
    settings = scene.mail.settings
    (row,) = scene.mail.rows(shown)
    assert row == {"routes": None, "far": 2 * settings.session_timeout + 2 * settings.lease}
    scene.sweeper.sweep()
    routes["bulk"] = ()
    assert json.loads(scene.mail.rows(shown)[0]["routes"]) == {"default": ["mx.example.net:628"]}
    scene.sweeper.sweep()
    assert json.loads(scene.mail.rows(shown)[0]["routes"]) == {
        "default": ["mx.example.net:628"],
        "bulk": [],
    }
    scene.engine.worker = scene.worker()  # declared dead, and there again under another id
    scene.sweeper.sweep()
    assert all("bulk" in row["routes"] for row in scene.mail.rows(shown))


def test_a_notice_that_is_owed_is_made_and_hinted_at(scene: Scene) -> None:
    queue_id = scene.mail.accept()
    scene.mail.change(
        "UPDATE deliveries SET state = 'bounced', due_at = @ago(1), finished_at = @ago(1) WHERE true"
    )
    scene.sweeper.sweep()
    (notice,) = scene.hints.offered
    assert scene.mail.state(notice) == "queued"
    assert scene.mail.delivery(queue_id)["due_at"] is None


def test_a_full_spool_keeps_only_notices_waiting(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    owing = scene.mail.accept()
    scene.mail.change(
        "UPDATE deliveries SET state = 'bounced', due_at = @ago(1), finished_at = @ago(1) WHERE true"
    )
    due = scene.mail.accept()
    monkeypatch.setattr(scene.mail.spool, "store", lambda queue_id, parts: 1 / 0)
    scene.mail.change(
        "UPDATE deliveries SET state = 'deferred', due_at = @ago(1) WHERE queue_id = :id", id=due
    )
    scene.sweeper.sweep()
    assert (scene.mail.state(due), scene.hints.offered) == ("queued", [due])
    assert scene.mail.delivery(owing)["due_at"] is not None


def test_no_worker_buries_itself() -> None:
    clock = Clock()
    watch = LeaseMonitor(10.0, clock)
    leases = [("own", "1"), ("other", "1")]
    assert watch.look(leases, "own") == []
    found = []
    for _ in range(4):
        clock.now += 2.5
        found = watch.look(leases, "own")
    assert found == [("other", "1")]
    watch.forget()
    assert watch.look(leases, "own") == []


def test_a_stuck_transfer_becomes_uncertain(scene: Scene) -> None:
    queue_id = scene.sending(scene.engine.worker)
    scene.mail.change("UPDATE deliveries SET due_at = @ago(1) WHERE queue_id = :id", id=queue_id)
    scene.sweeper.sweep()
    assert scene.mail.delivery(queue_id)["last_outcome"] == "uncertain"


def test_the_tick_file_tells_that_both_threads_turn(scene: Scene) -> None:
    tick = heartbeat_file(scene.mail.settings)
    assert tick == scene.mail.settings.state_dir / f"worker-{os.getpid()}.tick"
    scene.engine.heartbeat = time.monotonic() + HOUR
    scene.sweeper.start()
    until(tick.exists)
    scene.sweeper.close()
    assert not tick.exists()
    scene.engine.heartbeat -= 2 * HOUR
    scene.sweeper._tick()
    assert not tick.exists()


def test_the_tick_file_may_be_elsewhere(tmp_path: Path) -> None:
    assert (
        heartbeat_file(load(WorkerSettings, health_file=tmp_path / "health")) == tmp_path / "health"
    )


# Housekeeping


@pytest.fixture
def keeper(mail: Mailroom) -> Cleaner:
    return Cleaner(mail.settings, mail.database, mail.spool)


@pytest.fixture
def finished(mail: Mailroom) -> Callable[..., str]:
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
            "UPDATE deliveries SET state = 'delivered', due_at = NULL, finished_at = @ago(:age) WHERE queue_id = :id",
            id=old, age=age,
        )  # fmt: skip
        mail.change("UPDATE messages SET received_at = @ago(:age) WHERE id = :id", id=old, age=age)
        return old

    return make


def test_finished_messages_go_after_their_retention(
    mail: Mailroom, keeper: Cleaner, finished: Callable[..., str]
) -> None:
    old, young, waiting = finished(age=31 * DAY), finished(age=29 * DAY), mail.accept()
    assert keeper.clean() == 1
    assert {row["id"] for row in mail.rows("SELECT @hex(id) AS id FROM messages")} == {
        young,
        waiting,
    }
    for table in ("recipients", "deliveries"):
        assert mail.rows(f"SELECT 1 FROM {table} WHERE queue_id = :id", id=old) == []
    assert not mail.spool.path(old).exists()


def test_old_mail_that_is_not_finished_stays(
    mail: Mailroom, keeper: Cleaner, finished: Callable[..., str]
) -> None:
    old = finished(age=31 * DAY)
    mail.change("UPDATE deliveries SET state = 'held' WHERE queue_id = :id", id=old)
    assert keeper.clean() == 0


def _aged(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_bodies_that_nobody_needs_are_removed(
    mail: Mailroom, keeper: Cleaner, finished: Callable[..., str]
) -> None:
    done, fresh, waiting = finished(age=2 * DAY), finished(age=2 * DAY), mail.accept()
    _aged(mail.spool.path(done), 2 * HOUR)
    _aged(mail.spool.path(waiting), 40 * DAY)
    assert keeper.clean_spool() == (1, 0)
    assert [mail.spool.path(i).exists() for i in (done, fresh, waiting)] == [False, True, True]


@pytest.mark.parametrize("lost", ["deliveries", "deliveries and recipients", "one delivery of two"])
def test_a_message_with_a_row_missing_keeps_its_body(
    mail: Mailroom, keeper: Cleaner, finished: Callable[..., str], lost: str
) -> None:
    old = finished(age=31 * DAY)
    if lost == "one delivery of two":
        mail.change("UPDATE recipients SET delivery = 2 WHERE queue_id = :id", id=old)
    for table in ("deliveries", "recipients"):
        if table in lost:
            mail.change(f"DELETE FROM {table} WHERE queue_id = :id", id=old)
    _aged(mail.spool.path(old), 31 * DAY)
    assert (keeper.clean(), keeper.clean_spool()) == (0, (0, 0))
    assert mail.spool.path(old).exists()


def test_orphans_are_put_aside_once_a_newer_message_proves_the_database(
    mail: Mailroom, keeper: Cleaner
) -> None:
    orphan, young = new_id(), new_id()
    for one, age in ((orphan, YOUNG + 60), (young, YOUNG - 60)):
        mail.spool.store(one, [b"x"])
        _aged(mail.spool.path(one), age)
    assert keeper.clean_spool() == (0, 0)  # no row at all: a database that was restored, perhaps
    restored = mail.accept()
    mail.change(
        "UPDATE messages SET received_at = @ago(:age) WHERE id = :id", id=restored, age=YOUNG + 120
    )
    assert keeper.clean_spool() == (0, 0)
    mail.accept()
    assert keeper.clean_spool() == (0, 1)
    assert (mail.spool.directory / "orphans" / orphan).read_bytes() == b"x"
    assert mail.spool.path(young).exists()


@pytest.mark.parametrize("wrong", ["the worker's", "the file system's", "the database's"])
def test_one_clock_that_is_wrong_takes_no_body(
    mail: Mailroom, keeper: Cleaner, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """It is 40 days ahead, while a message is received and another one is there to prove the
    database."""
    mail.spool.store(received := new_id(), [b"x"])
    mail.accept()
    now, clock, macros = time.time, mail.spool.clock, keeper._strays._sql._dialect.macros
    if wrong == "the worker's":
        monkeypatch.setattr(time, "time", lambda: now() + 40 * DAY)
    elif wrong == "the file system's":
        monkeypatch.setattr(mail.spool, "clock", lambda: clock() + 40 * DAY)
    else:
        monkeypatch.setitem(macros, "now", lambda _: macros["later"](str(40 * DAY)))
    assert keeper.clean_spool() == (0, 0)
    assert mail.spool.path(received).exists()


def test_what_is_put_aside_is_purged_by_a_later_pass(mail: Mailroom) -> None:
    keeper = Cleaner(
        mail.settings.model_copy(update={"retention": -1.0}), mail.database, mail.spool
    )
    mail.spool.store(orphan := new_id(), [b"x"])
    _aged(mail.spool.path(orphan), 40 * DAY)
    mail.accept()
    assert keeper.clean_spool() == (0, 1)
    assert (mail.spool.directory / "orphans" / orphan).exists()
    assert keeper.clean_spool() == (0, 0)
    assert not (mail.spool.directory / "orphans" / orphan).exists()


def test_the_wait_of_what_is_put_aside_begins_with_the_move(
    mail: Mailroom, keeper: Cleaner
) -> None:
    mail.spool.store(orphan := new_id(), [b"x"])
    _aged(mail.spool.path(orphan), 400 * DAY)
    mail.accept()
    assert [keeper.clean_spool() for _ in range(2)] == [(0, 1), (0, 0)]
    assert (mail.spool.directory / "orphans" / orphan).exists()


def test_what_a_row_needs_is_not_purged_and_can_be_sent(mail: Mailroom) -> None:
    """Its row came when it was put aside already."""
    keeper = Cleaner(
        mail.settings.model_copy(update={"retention": -1.0}), mail.database, mail.spool
    )
    queue_id = mail.accept()
    mail.spool.move_to_orphans(queue_id)
    keeper.clean_spool()
    os.close(mail.spool.open(queue_id, len(BODY)))


def test_only_directories_of_bodies_are_removed(mail: Mailroom, keeper: Cleaner) -> None:
    ours, theirs = mail.spool.directory / "01a2b3c4", mail.spool.directory / "lost+found"
    for directory in (ours, theirs):
        directory.mkdir()
        _aged(directory, 2 * HOUR)
    keeper.clean_spool()
    assert [ours.exists(), theirs.exists()] == [False, True]


def test_only_one_keeps_house_at_a_time(mail: Mailroom, keeper: Cleaner) -> None:
    other = Cleaner(mail.settings, mail.database, mail.spool)
    with keeper._alone() as first, other._alone() as second:
        assert (first, second) == (True, False)
    with other._alone() as second:
        assert second


# --- rerouting


def rerouting(mail: Mailroom, routes: Routes, clock: Callable[[], float]) -> Rerouter:
    return Rerouter(mail.sweeps, QueueOperations(mail.database, notices=True), routes, clock=clock)


def test_mail_for_a_route_that_is_gone_gets_the_one_of_today(mail: Mailroom) -> None:
    queue_id = mail.accept()
    with writing(mail.database) as connection:
        connection.execute(text("UPDATE deliveries SET route = 'gone'"))
    now = [0.0]
    rerouter = rerouting(mail, Routes([Route("default", ())]), lambda: now[0])
    assert rerouter.turn() == 0, "it may come back"
    now[0] += PATIENCE
    assert rerouter.turn() == 1
    assert mail.rows("SELECT route FROM deliveries WHERE queue_id = @id(:id)", id=queue_id) == [
        {"route": "default"}
    ]
    assert [row["verb"] for row in mail.rows("SELECT verb FROM audit")] == ["reroute"]
    assert rerouter.turn() == 0


def test_a_route_that_comes_back_keeps_its_mail(mail: Mailroom, tmp_path: Path) -> None:
    """A file that is cut off for a moment is a file without routes."""
    file, now = tmp_path / "routes.toml", [100.0]
    whole = '[bulk]\nrecipients = ["lists.test"]\nservers = ["a"]\n'
    file.write_text(whole)
    routes = Routes.load(load(Settings, routes=file), clock=lambda: now[0])
    mail.accept()
    mail.change("UPDATE deliveries SET route = 'bulk'")
    rerouter = rerouting(mail, routes, lambda: now[0])

    def turns(seconds: float) -> int:
        moved = 0
        for _ in range(round(seconds / LOOK_EVERY)):
            now[0] += LOOK_EVERY
            moved += rerouter.turn()
        return moved

    for _ in range(3):
        file.write_text("")
        assert turns(PATIENCE - 10) == 0
        assert routes.names() == ("default",)
        file.write_text(whole)
        assert turns(20) == 0
    file.write_text("")
    assert turns(PATIENCE + 10) == 1
    assert mail.rows("SELECT route FROM deliveries") == [{"route": "default"}]


def test_a_route_that_another_worker_knows_is_not_gone(mail: Mailroom) -> None:
    mail.accept()
    mail.change("UPDATE deliveries SET route = 'bulk'")
    worker, known = new_id(), json.dumps({"bulk": ["a:628"], "default": []})
    for one in (worker, new_id()):
        mail.ledger.register(one, "elsewhere", 1)
    mail.change("UPDATE workers SET routes = :known WHERE id = @id(:id)", id=worker, known=known)
    now = [0.0]
    rerouter = rerouting(mail, Routes([Route("default", ())]), lambda: now[0])

    def turn_later() -> int:
        now[0] += EVERY
        return rerouter.turn()

    assert [turn_later() for _ in range(3)] == [0, 0, 0]
    mail.change("UPDATE workers SET ended_at = @now WHERE id = @id(:id)", id=worker)
    assert [turn_later() for _ in range(2)] == [0, 1]
