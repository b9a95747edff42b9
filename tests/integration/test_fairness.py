"""Fairness: fresh mail and retries, a hundred thousand due at once, tarpits, the quarantine, routes
that share a server, and pauses."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from qmqp.sink import Answer, Rule, Sink, running_sink
from relay.queue.operations import QueueOperations
from relay.queue.outcome import Outcome
from relay.queue.states import State
from relay.spool.store import Spool
from tests.integration.harness import EngineHarness, QueueHarness
from tests.services import free_port
from tests.waiting import until
from worker import quarantine
from worker.sweeper import BATCH, BATCHES

type Open = Callable[..., EngineHarness]


@pytest.fixture
def harness_with(clean_sqlite_url: str, spool: Spool, tmp_path: Path) -> Iterator[Open]:
    opened: list[EngineHarness] = []

    def open_(*sinks: Sink, **settings: object) -> EngineHarness:
        servers = tuple(f"127.0.0.1:{sink.port}" for sink in sinks)
        opened.append(
            EngineHarness(clean_sqlite_url, spool, tmp_path, qmqp_servers=servers, **settings)
        )
        return opened[-1]

    yield open_
    for one in opened:
        one.close()


def arrived(sink: Sink) -> list[str]:
    """The first letters of the recipients, in the order in which they came."""
    return [received.recipients[0][:1].decode() for received in sink.received]


def test_free_connections_alternate_between_fresh_mail_and_retries(harness_with: Open) -> None:
    with running_sink() as sink:
        mail = harness_with(sink, grace=60.0, worker_connections=1, batch_size=1)
        fresh = [mail.accept(f"f{n}@example.org") for n in range(8)]
        retries = [mail.accept(f"r{n}@example.org") for n in range(8)]
        engine = mail.engine()
        engine.offer(fresh, "fresh")
        engine.offer(retries, "retry")
        engine.start()
        until(lambda: mail.states() == {"delivered"}, 20)
        assert engine.drain(5)
    assert arrived(sink) in (["f", "r"] * 8, ["r", "f"] * 8)


def test_hints_and_overdue_deliveries_alternate(harness_with: Open) -> None:
    with running_sink() as sink:
        mail = harness_with(sink, grace=60.0, worker_connections=1, batch_size=1)
        overdue = [mail.accept(f"o{n}@example.org") for n in range(8)]
        mail.change("UPDATE deliveries SET due_at = @ago(100)")
        hinted = [mail.accept(f"h{n}@example.org") for n in range(8)]
        engine = mail.engine()
        engine.offer(hinted)
        engine.start()
        until(lambda: mail.states() == {"delivered"}, 20)
        assert engine.drain(5)
    order = arrived(sink)
    assert len(order) == len(overdue) + len(hinted)
    assert all("o" in order[n : n + 4] and "h" in order[n : n + 4] for n in range(10)), order


# --- D11: a hundred thousand due at once
# --------------------------------------------------------------------

MANY = 100_000
_KEY = {
    "postgresql": "('00000000-0000-7000-8000-' || lpad(to_hex({n}), 12, '0'))::uuid",
    "sqlite": "printf('00000000-0000-7000-8000-%012x', {n})",
}
_NUMBERS = {
    "postgresql": "generate_series(1, :many) AS s(n)",
    "sqlite": (
        "(WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < :many) SELECT n"
        " FROM s) AS s"
    ),
}


def fill(queue: QueueHarness) -> None:
    """MANY deferred deliveries, due in another order than that of their ids: the higher n * 7919 %
    MANY, the longer.

    Only those that will be queued have a message and a recipient, because writing them takes most
    of the time.
    """
    name = queue.database.dialect.name
    key, numbers = _KEY[name].format(n="s.n"), _NUMBERS[name]
    messages = """INSERT INTO messages (id, sender, size, received_at, client_address, helo,
        protocol)
        SELECT {key}, 'a', 1, @now, '', '', '' FROM {numbers}
        WHERE s.n * 7919 % :many >= :many - :looked_at"""
    recipients = """INSERT INTO recipients (queue_id, position, address, delivery)
        SELECT {key}, 1, 'b', 1 FROM {numbers} WHERE s.n * 7919 % :many >= :many - :looked_at"""
    deliveries = """INSERT INTO deliveries (queue_id, number, route, state, due_at, expires_at)
        SELECT {key}, 1, 'default', 'deferred', @ago(1 + s.n * 7919 % :many * 0.1), @later(100000)
        FROM {numbers}"""
    for sql in (messages, recipients, deliveries):
        given = {"many": MANY} | ({"looked_at": BATCH * BATCHES} if ":looked_at" in sql else {})
        queue.change(sql.format(key=key, numbers=numbers), **given)
    if name == "postgresql":
        queue.change("ANALYZE")


def rank(queue_id: str) -> int:
    return int(queue_id, 16) % (1 << 48) * 7919 % MANY


def test_D11_a_hundred_thousand_due_at_once_go_in_due_order_in_bounded_batches(
    queue: QueueHarness,
) -> None:
    fill(queue)
    fresh = queue.accept()
    began = time.monotonic()
    woken: list[str] = []
    for _ in range(BATCHES):
        batch = queue.rescuer.requeue_due(BATCH)["default"]
        assert len(batch) == BATCH
        woken += batch
    ranks = [rank(queue_id) for queue_id in woken]
    assert sorted(ranks, reverse=True) == list(range(MANY - 1, MANY - 1 - BATCH * BATCHES, -1)), (
        "the longest due"
    )
    for start in range(0, len(ranks), BATCH):
        assert min(ranks[start : start + BATCH]) > max(
            ranks[start + BATCH : start + 2 * BATCH], default=-1
        )
    (claim,) = queue.claim(fresh)
    assert claim.queue_id == fresh, "fresh mail waits for none of them"
    queue.pass_time(queue.settings.grace + 1)
    taken = queue.claim(capacity={"default": 50})
    assert len(taken) == 50, "as many as there are connections"
    for one in taken:
        assert queue.complete(one, Outcome.DELIVERED).state is State.DELIVERED
    left = queue.rows("SELECT state, count(*) AS n FROM deliveries GROUP BY state")
    assert {row["state"]: row["n"] for row in left} == {
        "deferred": MANY - BATCH * BATCHES,
        "queued": BATCH * BATCHES - 50,
        "delivered": 50,
        "sending": 1,
    }
    assert time.monotonic() - began < 30


def overdue(queue: QueueHarness, claims: int) -> None:
    """All of them are queued, overdue, and were claimed so often."""
    sql = (
        "UPDATE deliveries SET state = 'queued', claim_count = :claim_count WHERE state ="
        " 'deferred'"
    )
    assert queue.change(sql, claim_count=claims) == MANY
    if queue.dialect.postgresql:
        queue.change("ANALYZE")


@pytest.mark.parametrize("backlog", ["retries", "fresh mail"])
def test_D11_without_hints_neither_kind_waits_for_all_of_the_other(
    queue: QueueHarness, backlog: str
) -> None:
    """So much is due at once when the broker is away or its list is long."""
    fill(queue)
    overdue(queue, 3 if backlog == "retries" else 0)
    other = {"claim_count": 0 if backlog == "retries" else 3}

    def one_more() -> str:
        queue_id = queue.accept()
        queue.change(
            "UPDATE deliveries SET due_at = @now, claim_count = :claim_count WHERE queue_id ="
            " @id(:id)",
            id=queue_id,
            **other,
        )
        return queue_id

    for _ in range(3):
        queue_id = one_more()
        claims = queue.claim(capacity={"default": 4})
        assert len(claims) == 4, "the backlog fills what the other kind leaves"
        assert queue_id in [claim.queue_id for claim in claims]


def test_without_hints_a_single_connection_is_shared_by_fresh_mail_and_retries(
    harness_with: Open,
) -> None:
    with running_sink() as sink:
        mail = harness_with(sink, grace=0.2, worker_connections=1, batch_size=1)
        for _ in range(60):
            mail.accept("r@example.org")
        mail.change("UPDATE deliveries SET claim_count = 3, deferrals = 3, due_at = @ago(5)")
        fresh = [mail.accept("f@example.org") for _ in range(5)]
        mail.change("UPDATE deliveries SET due_at = @now WHERE claim_count = 0")
        with mail.working():
            until(lambda: mail.states() == {"delivered"}, 60)
    assert max(n for n, one in enumerate(arrived(sink), 1) if one == "f") <= 2 * len(fresh) + 1


# --- tarpits
# ------------------------------------------------------------------------------------------------

TARPITS = {
    "accepts and never reads": Answer(raw=b"", at=0, end="stay"),
    "reads a byte a second": Answer(read_size=1, read_pause=1.0),
    "never replies": Answer(raw=b"", end="stay"),
}


@pytest.mark.parametrize("kind", TARPITS)
def test_B20_B21_B22_a_tarpit_delays_no_other_server(harness_with: Open, kind: str) -> None:
    with running_sink() as good, ExitStack() as open_for_now:
        tarpit = open_for_now.enter_context(running_sink(Rule(TARPITS[kind]), receive_buffer=4096))
        mail = harness_with(
            tarpit,
            good,
            server_connections=2,
            worker_connections=6,
            reply_timeout=60.0,
            uncertain_delay=0.1,
        )
        ids = [mail.accept(f"m{n}@example.org", body=b"x" * 6_000_000) for n in range(2)]
        with mail.working() as engine:
            until(lambda: tarpit.connections == 2)
            engine.offer([mail.accept(f"s{n}@example.org") for n in range(30)])
            assert good.wait_for(30, 30), "every message that the tarpit does not hold"
            assert [mail.state(queue_id) for queue_id in ids] == ["sending", "sending"]
            assert tarpit.connections == 2, "ever"
            open_for_now.close()

            def through() -> bool:
                """Its messages go to the other server."""
                mail.rescuer.requeue_due(10)
                return mail.states() == {"delivered"}

            until(through, 45, what=lambda: f"{kind}: {mail.states()}")
    sizes = Counter(received.size for received in good.received)
    assert sizes[6_000_000] == 2, "each once"


# --- poison
# -------------------------------------------------------------------------------------------------


class ConcurrencyCounter:
    """Counts the connections beside a transfer to the recipient `exclusive`, which is answered
    late."""

    def __init__(self, exclusive: bytes) -> None:
        self.exclusive, self.sink = exclusive, Sink()
        self.connections: list[int] = []
        self.busy_until = 0.0
        self.intruders = 0

    def __call__(self, recipients: Sequence[bytes] | None, digest: str) -> Answer | None:
        if recipients is None:
            self.intruders += time.monotonic() < self.busy_until
            return None
        if recipients[0] != self.exclusive:
            return Answer(delay=0.05)
        self.connections.append(len(self.sink.open))
        self.busy_until = time.monotonic() + 0.3
        return Answer(delay=0.35)


def test_D14_a_delivery_that_crashed_two_workers_is_sent_exclusively(harness_with: Open) -> None:
    counter = ConcurrencyCounter(b"poison@example.org")
    with running_sink(counter) as sink:
        counter.sink = sink
        mail = harness_with(sink)
        ids = [mail.accept() for _ in range(20)]
        poison = mail.accept("poison@example.org")
        ids += [mail.accept() for _ in range(20)]
        mail.change("UPDATE deliveries SET crash_count = 2 WHERE queue_id = @id(:id)", id=poison)
        with mail.working() as engine:
            engine.offer([*ids[:20], poison, *ids[20:]])
            until(lambda: mail.states() == {"delivered"}, 20)
    assert counter.connections == [1], "no other transfer was under way"
    assert counter.intruders == 0, "no other transfer began meanwhile"
    assert mail.delivery(poison)["crash_count"] == 0


def test_D14_a_tarpit_does_not_block_the_quarantine_nor_the_quarantine_other_mail(
    harness_with: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "QUARANTINE_TIMEOUT", 0.5)
    monkeypatch.setattr(quarantine, "QUARANTINE_PAUSE", 0.5)
    with running_sink(Rule(Answer(raw=b"", end="stay"), b"tarpit@")) as sink:
        mail = harness_with(sink, retry_min=0.1, retry_max=0.2)
        tarpit = mail.accept("tarpit@example.org")
        with mail.working() as engine:
            engine.offer([tarpit])
            until(lambda: sink.count == 1)
            quarantined = [mail.accept("quarantined@example.org") for _ in range(3)]
            mail.change(
                "UPDATE deliveries SET crash_count = 2 WHERE queue_id <> @id(:id)", id=tarpit
            )
            engine.offer(quarantined)

            def sent() -> bool:
                mail.rescuer.requeue_due(10)
                return all(mail.state(queue_id) == "delivered" for queue_id in quarantined)

            until(sent, 20)
            engine.offer([fresh := mail.accept()])
            until(lambda: mail.state(fresh) == "delivered")
            assert mail.state(tarpit) == "sending"


def test_D14_one_crash_does_not_quarantine(harness_with: Open) -> None:
    with running_sink(Rule(Answer(delay=1.0))) as sink:
        mail = harness_with(sink)
        for _ in range(3):
            mail.accept()
        mail.change("UPDATE deliveries SET crash_count = 1")
        with mail.working():
            until(lambda: len(sink.open) == 3)


def test_D14_a_delivery_is_held_at_the_poison_limit(clean_sqlite_url: str) -> None:
    queue = QueueHarness(clean_sqlite_url, poison_limit=4)
    queue_id = queue.accept()
    states = []
    for _ in range(4):
        worker = queue.register_worker()
        (claim,) = queue.claim(queue_id, worker=worker)
        queue.pass_time(100)
        queue.renew()
        queue.expire_worker(worker)
        states.append((claim.crash_count, queue.state(queue_id)))
        queue.pass_time(100)
        queue.rescuer.requeue_due(10)
    assert states == [(0, "deferred"), (1, "deferred"), (2, "deferred"), (3, "held")]
    assert "expired" in queue.delivery(queue_id)["last_reply"]
    assert queue.claim(queue_id, worker=queue.register_worker()) == []
    queue.database.dispose()


# --- routes that share a server
# -----------------------------------------------------------------------------


def routes_to(sink: Sink, directory: Path, count: int, more: str = "") -> Path:
    """A file of routes r0, r1, ... that all go to one server."""
    file = directory / "routes.toml"
    file.write_text(
        "".join(
            f'[r{n}]\nrecipients = ["r{n}.test"]\nservers = ["127.0.0.1:{sink.port}"]\n{more}'
            for n in range(count)
        )
    )
    return file


@pytest.mark.parametrize("hinted", [False, True])
def test_no_delivery_is_claimed_for_slots_of_another_route(
    harness_with: Open, tmp_path: Path, hinted: bool
) -> None:
    """Eight routes, one server, four slots: each message is claimed once."""
    with running_sink(Rule(Answer(delay=0.02))) as sink:
        mail = harness_with(
            sink,
            routes=routes_to(sink, tmp_path, 8),
            server_connections=4,
            grace=60.0 if hinted else 0.2,
        )
        ids = [mail.accept(f"a@r{n % 8}.test") for n in range(120)]
        with mail.working() as engine:
            if hinted:
                engine.offer(ids)
            until(lambda: mail.states() == {"delivered"}, 30)
    (claims,) = mail.rows(
        "SELECT sum(claim_count) AS all_of_them, max(claim_count) AS most FROM deliveries"
    )
    assert claims == {"all_of_them": 120, "most": 1}


def test_a_route_with_a_limit_gets_its_share_of_a_busy_server(
    harness_with: Open, tmp_path: Path
) -> None:
    """It does not wait until the other route has nothing left to send."""
    with running_sink(Rule(Answer(delay=0.05))) as sink:
        routes = routes_to(sink, tmp_path, 1, "connections = 2\n")
        mail = harness_with(sink, routes=routes, server_connections=8, grace=0.2)
        for _ in range(200):
            mail.accept("o@example.org")
        small = [mail.accept("s@r0.test") for _ in range(4)]
        mail.change("UPDATE deliveries SET due_at = @ago(50)")
        with mail.working():
            until(lambda: mail.states() == {"delivered"}, 60)
    assert max(n for n, one in enumerate(arrived(sink)) if one == "s") < 100, len(small)


# --- what is paused
# -----------------------------------------------------------------------------------------


def test_servers_and_routes_are_paused_and_resumed_while_mail_flows(harness_with: Open) -> None:
    with running_sink() as first, running_sink() as second:
        mail = harness_with(first, second)
        operations = QueueOperations(mail.database, sends_dsns=True)

        def apply_pauses(engine: Any) -> None:
            engine.servers.pauses = mail.rescuer.paused()  # as the sweeper does at each turn

        with mail.working() as engine:
            assert operations.pause(
                f"server:127.0.0.1:{first.port}", actor="me", reason="maintenance"
            )
            assert not operations.pause(
                f"server:127.0.0.1:{first.port}", actor="me", reason="again"
            )
            apply_pauses(engine)
            ids = [mail.accept() for _ in range(5)]
            engine.offer(ids)
            assert second.wait_for(5, 10)
            assert first.connections == 0
            operations.pause("route:default", actor="me", reason="all of it")
            apply_pauses(engine)
            waiting = mail.accept()
            mail.change(
                "UPDATE deliveries SET due_at = @ago(10) WHERE queue_id = @id(:id)", id=waiting
            )
            assert engine.offer([waiting]).wait(10)
            assert mail.state(waiting) == "queued", "a paused delivery is not claimed"
            assert operations.resume("route:default", actor="me", reason="")
            apply_pauses(engine)
            until(lambda: mail.state(waiting) == "delivered")
            assert first.connections == 0
            assert operations.resume(f"server:127.0.0.1:{first.port}", actor="me", reason="")
            assert not operations.resume(f"server:127.0.0.1:{first.port}", actor="me", reason="")
            apply_pauses(engine)
            engine.offer([mail.accept()])
            assert first.wait_for(1, 10)
    said = [
        row["operation"].split()[0]
        for row in mail.rows("SELECT operation FROM audit ORDER BY at, id")
    ]
    assert said == ["pause", "pause", "resume", "resume"], (
        "an operation that changes nothing is not recorded"
    )


def test_a_pause_does_not_interrupt_transfers_under_way(harness_with: Open) -> None:
    gate = threading.Event()

    def slow(recipients: Sequence[bytes] | None, digest: str) -> Answer | None:
        gate.set()
        return Answer(delay=0.3) if recipients is None else None

    with running_sink(slow) as sink:
        mail = harness_with(sink)
        queue_id = mail.accept()
        with mail.working() as engine:
            engine.offer([queue_id])
            assert gate.wait(10)
            engine.servers.pauses = frozenset({f"server:127.0.0.1:{sink.port}"})
            until(lambda: mail.state(queue_id) == "delivered")


# --- uncertain
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "state"), [("retry", "deferred"), ("hold", "held")])
def test_the_policy_for_uncertain_deliveries(harness_with: Open, policy: str, state: str) -> None:
    with running_sink(Rule(Answer(raw=b""))) as sink, running_sink() as other:
        mail = harness_with(sink, other, uncertain=policy, uncertain_delay=500.0)
        queue_id = mail.accept()
        with mail.working() as engine:
            engine.offer([queue_id])
            until(lambda: mail.state(queue_id) == state)
        assert other.connections == 0
    row = mail.rows("SELECT last_outcome, -@since(due_at) AS due_in FROM deliveries")[0]
    assert row["last_outcome"] == "uncertain"
    assert (row["due_in"] is None) if policy == "hold" else 440 < row["due_in"] <= 750


# --- hints of one route beside another
# ---------------------------------------------------------------------


@pytest.fixture
def beside(harness_with: Open, tmp_path: Path) -> Callable[..., EngineHarness]:
    """Two routes: `default`, of whose server two connections may be used, and `other`, with this
    server."""

    def open_(sink: Sink, other: int) -> EngineHarness:
        file = tmp_path / "routes.toml"
        file.write_text(
            f'[other]\nrecipients = ["other.example"]\nservers = ["127.0.0.1:{other}"]\n'
        )
        return harness_with(sink, routes=file, grace=600.0, server_connections=2)

    return open_


def latencies(mail: EngineHarness) -> list[float]:
    """Seconds from the acceptance of each message to the reply of its server."""
    rows = mail.rows(
        """SELECT (@micros(d.finished_at) - @micros(m.received_at)) / 1000000.0 AS s
        FROM deliveries d
        JOIN messages m ON m.id = d.queue_id WHERE d.state = 'delivered'"""
    )
    return [float(row["s"]) for row in rows]


def test_an_idle_route_takes_no_hints_from_another(beside: Callable[..., EngineHarness]) -> None:
    """If a hint is lost the mail waits for the overdue poll after GRACE, which is ten minutes
    away."""
    with running_sink() as sink, running_sink() as idle:
        mail = beside(sink, idle.port)
        with mail.working() as engine:
            ids = [mail.accept() for _ in range(40)]
            engine.offer(ids, route="default")
            until(lambda: mail.states() == {"delivered"}, 20)
        assert max(latencies(mail)) < 5


def test_hints_of_a_dead_route_block_no_task_and_no_other_route(
    beside: Callable[..., EngineHarness],
) -> None:
    with running_sink() as sink:
        mail = beside(sink, free_port())
        with mail.working() as engine:
            mail.change("UPDATE deliveries SET due_at = @ago(1)")
            dead = [mail.accept(f"d{n}@other.example") for n in range(8)]
            for queue_id in dead:  # until the circuit of its server is open
                engine.offer([queue_id], route="other").wait(5)
            until(lambda: engine.producer.capacity.closed("other"), 10)
            assert engine.offer([mail.accept("d@other.example")], route="other").wait(20)
            ids = [mail.accept() for _ in range(20)]
            engine.offer(ids, route="default")
            until(lambda: len(latencies(mail)) == len(ids), 10)
        assert max(latencies(mail)) < 5


def test_a_hint_of_an_unknown_route_may_be_for_any(beside: Callable[..., EngineHarness]) -> None:
    with running_sink() as sink:
        mail = beside(sink, free_port())
        with mail.working() as engine:
            engine.offer([mail.accept()], route="of another settings file")
            until(lambda: mail.states() == {"delivered"}, 10)
            assert set(engine.producer.hints) == set(engine.routes.names()), "its name is not kept"
