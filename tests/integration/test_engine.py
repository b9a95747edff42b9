"""The engine on real databases, against a scriptable QMQP server."""

import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

import worker.engine
import worker.producer
from qmqp import client
from qmqp.body import BodyFile
from qmqp.reply import ReplyParser
from qmqp.sink import Answer, Rule, Sink, running_sink
from relay.ids import new_id
from relay.queue.claim import WorkerQueue
from relay.queue.model import ClaimRequest, Command, CommandResult
from relay.routes import NO_SERVER
from relay.spool.store import Spool
from tests.integration.gated_server import gated_server
from tests.integration.harness import BODY, EngineHarness
from tests.services import Postgres
from tests.waiting import until
from worker import circuit_breaker

type Open = Callable[..., EngineHarness]


@pytest.fixture
def harness_with(clean_url: str, spool: Spool, tmp_path: Path) -> Iterator[Open]:
    opened: list[EngineHarness] = []

    def open_(*sinks: Sink | int, **settings: object) -> EngineHarness:
        servers = tuple(f"127.0.0.1:{one if isinstance(one, int) else one.port}" for one in sinks)
        opened.append(EngineHarness(clean_url, spool, tmp_path, qmqp_servers=servers, **settings))
        return opened[-1]

    yield open_
    for mail in opened:
        mail.close()


@pytest.fixture
def sink() -> Iterator[Sink]:
    with running_sink() as running:
        yield running


@pytest.fixture
def dead_port() -> Iterator[int]:
    """A port that refuses connections: bound, without a listener."""
    with socket.socket() as taken:
        taken.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # so that a sink may listen there
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@contextmanager
def answering(*answers: Answer | Rule) -> Iterator[Sink]:
    with running_sink(*(one if isinstance(one, Rule) else Rule(one) for one in answers)) as running:
        yield running


def test_a_hint_is_enough_to_deliver(harness_with: Open, sink: Sink) -> None:
    mail = harness_with(sink, grace=60.0)
    with mail.working() as engine:
        queue_id = mail.accept("b@example.org", "c@example.org")
        assert engine.offer([queue_id]).wait(10)
        until(lambda: mail.state(queue_id) == "delivered")
    got = sink.received[0]
    assert (got.sender, got.recipients) == (b"a@example.com", (b"b@example.org", b"c@example.org"))
    assert (got.size, got.sha256) == (len(BODY), hashlib.sha256(BODY).hexdigest())
    assert mail.attempts(queue_id) == [(f"127.0.0.1:{sink.port}", "delivered")]
    assert not mail.spool.path(queue_id).exists()


@pytest.fixture
def hinted_claims(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many deliveries each claim request with hints got."""
    claimed = list[int]()
    commit = WorkerQueue.commit

    def counting(queue: WorkerQueue, items: Sequence[Command]) -> list[CommandResult]:
        results = commit(queue, items)
        for item, result in zip(items, results, strict=True):
            if isinstance(item, ClaimRequest) and item.ids is not None:
                assert isinstance(result, list)
                claimed.append(len(result))
        return results

    monkeypatch.setattr(WorkerQueue, "commit", counting)
    return claimed


def test_an_early_hint_is_enough_to_deliver(
    harness_with: Open,
    sink: Sink,
    hinted_claims: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its rows come later than the first claims; no other hint names the message."""
    monkeypatch.setattr(worker.producer, "EARLY_SEARCH", 60.0)
    mail = harness_with(sink, grace=60.0)
    with mail.working() as engine:
        late = new_id()
        batch = engine.offer([late, there := mail.accept()], early=True)
        until(lambda: mail.state(there) == "delivered", what="nothing waits for the other message")
        until(lambda: hinted_claims.count(0) >= 3)
        assert not batch.is_set()
        mail.accept(queue_id=late)
        assert batch.wait(10)
        until(lambda: mail.state(late) == "delivered")
    assert [*filter(None, hinted_claims)] == [1, 1]


@pytest.mark.parametrize("stale", [False, True])
def test_an_early_hint_connects_while_it_claims(
    harness_with: Open, sink: Sink, monkeypatch: pytest.MonkeyPatch, stale: bool
) -> None:
    """The server sees the connection before the claim is committed, and another one only if that
    has waited for too long."""
    monkeypatch.setattr(worker.producer, "EARLY_SEARCH", 60.0)
    if stale:
        monkeypatch.setattr("qmqp.connection.PRECONNECTION_LIFE", 0.0)
    claiming, go_on = threading.Event(), threading.Event()
    commit = WorkerQueue.commit

    def slow(queue: WorkerQueue, items: Sequence[Command]) -> list[CommandResult]:
        if any(isinstance(item, ClaimRequest) and item.early for item in items):
            claiming.set()
            assert go_on.wait(20)
        return commit(queue, items)

    monkeypatch.setattr(WorkerQueue, "commit", slow)
    mail = harness_with(sink, grace=60.0)
    with mail.working() as engine:
        queue_id = mail.accept()
        engine.offer([queue_id], early=True)
        assert claiming.wait(20)
        until(lambda: sink.connections == 1)
        assert sink.count == 0
        go_on.set()
        until(lambda: mail.state(queue_id) == "delivered")
    assert (sink.count, sink.connections) == (1, 1 + stale)


def test_an_early_hint_without_its_message_leaves_no_connection(
    harness_with: Open, sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.producer, "EARLY_SEARCH", 1.0)
    mail = harness_with(sink, grace=60.0)
    with mail.working() as engine:
        assert engine.offer([new_id()], early=True).wait(10)
        until(lambda: sink.connections == 1 and not sink.open)
        queue_id = mail.accept()
        assert engine.offer([queue_id]).wait(10)
        until(lambda: mail.state(queue_id) == "delivered")
    assert sink.connections == 2, "it was tried once, however often it was claimed"


def test_claims_for_an_early_hint_end_without_its_message(
    harness_with: Open, sink: Sink, hinted_claims: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    mail = harness_with(sink, grace=60.0)
    with mail.working() as engine:
        assert engine.offer([new_id()]).wait(10)
        assert hinted_claims == [0], "another hint is not early"
        monkeypatch.setattr(worker.producer, "EARLY_SEARCH", 1.0)
        assert engine.offer([new_id()], early=True).wait(10)
    assert len(hinted_claims) <= 60, "the pauses grow: else there would be hundreds"


def test_an_early_hint_does_not_wait_for_a_tick(
    harness_with: Open, sink: Sink, hinted_claims: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pause ends by itself; other claims come by the tick alone, four times a second."""
    monkeypatch.setattr(worker.producer, "EARLY_SEARCH", 1e6)
    monkeypatch.setattr(worker.engine.Engine, "_tick", lambda _: None)
    mail = harness_with(sink, grace=60.0)
    with mail.working() as engine:
        engine.offer([late := new_id()], early=True)
        until(lambda: len(hinted_claims) >= 5)
        mail.accept(queue_id=late)
        until(lambda: mail.state(late) == "delivered")


def test_slots_gather_before_the_next_claim(
    harness_with: Open, sink: Sink, hinted_claims: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.engine, "GATHER", 1e6)
    mail = harness_with(sink, grace=60.0, server_connections=10)
    ids = [mail.accept() for _ in range(60)]
    with mail.working() as engine:
        engine.offer(ids)
        until(lambda: mail.states() == {"delivered"}, what="no slot waits when none is in use")
    assert sum(hinted_claims) == 60
    assert len(hinted_claims) <= 8, "ten at once, and not one for each slot that becomes free"


def test_outcomes_are_logged_with_recipients_route_and_attempt(harness_with: Open) -> None:
    once = [Rule(Answer(b"Z", b"later"), times=1), Rule(Answer(b"K"), times=1)]
    with answering(*once, Answer(b"D", b"no")) as sink, capture_logs() as logs:
        mail = harness_with(sink, grace=60.0, retry_min=0.1, retry_max=0.1)
        with mail.working() as engine:
            many = [f"r{n}@example.org" for n in range(12)]
            queue_id = mail.accept(*many)
            engine.offer([queue_id])
            until(lambda: mail.state(queue_id) == "deferred")
            mail.pass_time(3600, only=[queue_id])
            mail.rescuer.requeue_due(9)
            engine.offer([queue_id])
            until(lambda: mail.state(queue_id) == "delivered")
            other = mail.accept("x@example.org")
            engine.offer([other])
            until(lambda: mail.state(other) == "bounced")
    outcomes = [log for log in logs if log["event"] in ("deferred", "delivered", "bounced")]
    assert [(log["event"], log["attempt"], log["recipients"]) for log in outcomes] == [
        ("deferred", 1, 12),
        ("delivered", 2, 12),
        ("bounced", 1, 1),
    ]
    assert outcomes[0]["to"] == outcomes[1]["to"] == many[:10]
    assert outcomes[2]["to"] == ["x@example.org"]
    assert {log["route"] for log in outcomes} == {"default"}
    for outcome in ("deferred", "delivered", "rejected"):
        labels = {"route": "default", "outcome": outcome}
        assert (REGISTRY.get_sample_value("relay_outcomes_total", labels) or 0) >= 1


def test_hints_get_capacity_of_any_route(harness_with: Open, sink: Sink, tmp_path: Path) -> None:
    mail = harness_with(
        sink, grace=60.0, routes=two_more_routes(tmp_path, sink)
    )  # nothing is overdue within the test
    with mail.working() as engine:
        for recipient in (
            "a@one.test",
            "b@two.test",
            "c@example.org",
        ):  # one at a time
            engine.offer([mail.accept(recipient)])
            until(lambda: mail.states() == {"delivered"}, what=recipient)


def test_a_route_with_little_capacity_is_emptied_without_a_pause(
    harness_with: Open, sink: Sink, tmp_path: Path
) -> None:
    mail = harness_with(
        sink, grace=1.0, server_connections=2, routes=two_more_routes(tmp_path, sink)
    )
    for _ in range(60):
        mail.accept("a@one.test")
    with mail.working():  # other routes have capacity and nothing to send
        until(lambda: mail.states() == {"delivered"}, 25, what="all is delivered")
    (took,) = mail.rows(
        "SELECT @micros(max(started_at)) - @micros(min(started_at)) AS micros FROM attempts"
    )
    assert took["micros"] < 20_000_000  # two a second would take half a minute


def two_more_routes(directory: Path, sink: Sink) -> Path:
    path = directory / "routes.toml"
    table = '[{0}]\nrecipients = ["{0}.test"]\nservers = ["127.0.0.1:{1}"]\n'
    path.write_text(table.format("one", sink.port) + table.format("two", sink.port))
    return path


def test_overdue_mail_is_claimed_without_hints(harness_with: Open, sink: Sink) -> None:
    mail = harness_with(sink)
    ids = [mail.accept() for _ in range(100)]
    with mail.working():
        until(lambda: mail.states() == {"delivered"}, 20)
    assert sink.count == len(ids)


def test_stale_doubled_and_unknown_hints_are_harmless(harness_with: Open, sink: Sink) -> None:
    mail = harness_with(sink, grace=60.0)
    ids = [mail.accept() for _ in range(20)]
    with mail.working() as engine:
        batchs = [engine.offer([*ids, "0" * 32], lane) for lane in ("fresh", "retry", "fresh")]
        assert all(batch.wait(10) for batch in batchs)
        until(lambda: mail.states() == {"delivered"})
        assert engine.offer(ids).wait(10)
    assert sink.count == len(ids)


def test_hints_are_kept_while_the_worker_is_stopped(
    harness_with: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gated_server() as gate:  # the only slot is taken meanwhile
        mail = harness_with(gate.port, grace=3.0, server_connections=1, reply_timeout=60.0)
        with mail.working() as engine:
            engine.offer([mail.accept()])
            assert gate.reached.wait(30)
            batch = engine.offer([mail.accept()])
            stalled = threading.Event()

            def stall() -> None:
                time.sleep(4)
                stalled.set()

            with monkeypatch.context() as patch:  # runs on the engine's loop
                patch.setattr(engine.producer, "poll_now", stall)
                engine.poll_now()
                assert stalled.wait(10)
            assert not batch.wait(1.5), "the time in which the worker was stopped counted"
            engine.servers.pauses = frozenset({f"server:127.0.0.1:{gate.port}"})
            gate.open.set()


def test_two_workers_send_no_duplicates(harness_with: Open, sink: Sink) -> None:
    mail = harness_with(sink)
    ids = [mail.accept() for _ in range(60)]
    other = harness_with(sink)
    with mail.working() as one, other.working() as two:
        one.offer(ids)
        two.offer(ids)
        until(lambda: mail.states() == {"delivered"}, 20)
    assert sink.count == len(ids)


def test_each_attempt_has_a_row(harness_with: Open) -> None:
    with answering(Rule(Answer(b"Z", b"later"), times=1)) as sink:
        mail = harness_with(sink)
        queue_id = mail.accept()
        with mail.working():
            until(lambda: mail.state(queue_id) == "deferred")
            assert mail.delivery(queue_id)["last_reply"] == "later"
            until(lambda: mail.rescuer.requeue_due(10) == {"default": [queue_id]})
            until(lambda: mail.state(queue_id) == "delivered")
    assert [outcome for _, outcome in mail.attempts(queue_id)] == ["deferred", "delivered"]


def test_a_rejection_bounces_with_the_servers_reply(harness_with: Open) -> None:
    with answering(Answer(b"D", b"no \xff such mailbox")) as sink:
        mail = harness_with(sink)
        queue_id = mail.accept()
        with mail.working():
            until(lambda: mail.state(queue_id) == "bounced")
    found = mail.delivery(queue_id)
    assert (found["last_outcome"], found["last_reply"]) == ("rejected", "no \\xff such mailbox")
    assert found["due_at"] is not None  # a DSN is pending


def test_an_unauthorized_relay_defers_the_mail(harness_with: Open) -> None:
    reply = b"Error: relay.example[192.0.2.1] is not authorized to use this service"
    with answering(Answer(b"D", reply)) as sink:
        mail = harness_with(sink)
        queue_id = mail.accept()
        with mail.working():
            until(lambda: mail.state(queue_id) == "deferred")
    assert mail.attempts(queue_id) == [(f"127.0.0.1:{sink.port}", "rejected")]


def test_a_dead_server_is_passed_over_and_both_attempts_are_kept(
    harness_with: Open, sink: Sink, dead_port: int
) -> None:
    mail = harness_with(dead_port, sink, grace=60.0)
    queue_id = mail.accept()
    with mail.working() as engine:
        engine.offer([queue_id])
        until(lambda: mail.state(queue_id) == "delivered")
    assert [outcome for _, outcome in mail.attempts(queue_id)] == ["unreachable", "delivered"]


def test_B19_a_connection_that_breaks_early_fails_over(harness_with: Open, sink: Sink) -> None:
    with answering(Answer(raw=b"", at=1)) as rude:
        mail = harness_with(rude, sink)
        queue_id = mail.accept(body=b"x" * 30_000_000)
        with mail.working():
            until(lambda: mail.state(queue_id) == "delivered")
    assert [outcome for _, outcome in mail.attempts(queue_id)] == ["interrupted", "delivered"]


def test_B13_a_lost_reply_is_uncertain_and_never_fails_over(harness_with: Open, sink: Sink) -> None:
    with answering(Answer(raw=b"")) as silent:
        mail = harness_with(silent, sink)
        queue_id = mail.accept()
        with mail.working():
            until(lambda: mail.state(queue_id) == "deferred")
    assert mail.attempts(queue_id) == [(f"127.0.0.1:{silent.port}", "uncertain")]
    assert sink.count == 0


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (Answer(b"Z", b"busy"), "deferred"),
        (Answer(b"D", b"relay.example is not authorized to use this"), "rejected"),
    ],
)
def test_a_server_that_accepts_nothing_is_passed_over_in_the_same_claim(
    harness_with: Open, sink: Sink, answer: Answer, outcome: str
) -> None:
    with answering(answer) as unwilling:
        mail = harness_with(unwilling, sink, grace=60.0)
        queue_id = mail.accept()
        with mail.working() as engine:
            engine.offer([queue_id])
            until(lambda: mail.state(queue_id) == "delivered")
    assert mail.attempts(queue_id) == [
        (f"127.0.0.1:{unwilling.port}", outcome),
        (f"127.0.0.1:{sink.port}", "delivered"),
    ]
    assert mail.delivery(queue_id)["claim_count"] == 1


def test_a_Z_is_recorded_rather_than_an_unreachable_server(
    harness_with: Open, dead_port: int
) -> None:
    """In either order: only the Z says something about the mail."""
    with answering(Answer(b"Z", b"busy")) as busy:
        for servers in ((busy, dead_port), (dead_port, busy)):
            mail = harness_with(*servers, retry_min=100.0, retry_max=200.0)
            queue_id = mail.accept()
            with mail.working():
                until(
                    partial(
                        mail.rows,
                        "SELECT 1 FROM deliveries WHERE queue_id = :id AND claim_count = 1"
                        " AND state = 'deferred'",
                        id=queue_id,
                    )
                )
            found = mail.delivery(queue_id)
            assert {outcome for _, outcome in mail.attempts(queue_id)} == {
                "unreachable",
                "deferred",
            }
            assert (found["last_outcome"], found["last_reply"], found["deferrals"]) == (
                "deferred",
                "busy",
                1,
            )
            assert found["last_server"] == f"127.0.0.1:{busy.port}"


def test_a_Z_waits_although_the_next_server_has_no_slot(harness_with: Open) -> None:
    """Otherwise the first server would get the message again and again."""
    with answering(Answer(b"Z", b"busy")) as busy, running_sink() as good:
        mail = harness_with(busy, good, retry_min=100.0, retry_max=200.0)
        queue_id, engine = mail.accept(), mail.engine()
        engine.servers.pauses = frozenset({f"server:127.0.0.1:{good.port}"})
        engine.start()
        until(lambda: mail.state(queue_id) == "deferred")
        assert engine.drain(5)
    assert (busy.count, good.count) == (1, 0)


def test_a_server_that_closes_before_it_reads_is_unreachable(
    harness_with: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As tcpserver does where its rules deny. From the second time on the worker knows it before
    the commit point."""
    # On a busy machine a moment may take seconds.
    monkeypatch.setattr(client, "_AT_ONCE", 30.0)
    monkeypatch.setattr(circuit_breaker, "MAX_HOLD_BACK", 30.0)
    with denying() as port:
        mail = harness_with(port, grace=60.0, uncertain_delay=1000.0)
        first, second = mail.accept(), mail.accept()
        with mail.working() as engine:
            engine.offer([first])
            until(lambda: mail.state(first) == "deferred")
            engine.offer([second])
            until(lambda: mail.state(second) == "deferred")
    assert mail.attempts(first) == [(f"127.0.0.1:{port}", "uncertain")]
    assert mail.attempts(second) == [(f"127.0.0.1:{port}", "unreachable")]


@contextmanager
def denying() -> Iterator[int]:
    """The port of a server that accepts connections and closes them, as tcprules deny: the first
    one after a while, so that the later ones are sooner than that however busy the machine is."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError):
                with listener.accept()[0]:
                    time.sleep(0.5)
                while True:
                    listener.accept()[0].close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_uncertain_mail_is_held_by_setting(harness_with: Open) -> None:
    with answering(Answer(raw=b"7:garbage,")) as sink:
        mail = harness_with(sink, uncertain="hold")
        queue_id = mail.accept()
        with mail.working():
            until(lambda: mail.state(queue_id) == "held")
    assert mail.delivery(queue_id)["last_outcome"] == "malformed"


def test_without_a_server_mail_waits_with_its_reason(harness_with: Open, sink: Sink) -> None:
    mail = harness_with()
    queue_id = mail.accept()
    with mail.working():
        until(lambda: mail.state(queue_id) == "deferred")
    assert mail.delivery(queue_id)["last_reply"] == NO_SERVER
    assert mail.attempts(queue_id) == []
    later = harness_with(sink)
    with later.working():
        until(lambda: later.rescuer.requeue_due(10) == {"default": [queue_id]})
        until(lambda: later.state(queue_id) == "delivered")


def test_a_server_that_is_down_delays_mail_until_it_is_up(
    harness_with: Open, dead_port: int
) -> None:
    mail = harness_with(dead_port)
    ids = [mail.accept() for _ in range(10)]
    with mail.working():
        open_circuits = partial(
            REGISTRY.get_sample_value, "relay_circuit_open", {"server": f"127.0.0.1:{dead_port}"}
        )
        until(lambda: open_circuits() == 1)
        until(lambda: mail.states() == {"deferred"})
        assert "ECONNREFUSED" in mail.delivery(ids[-1])["last_reply"]
        with running_sink(port=dead_port) as sink:

            def delivered() -> bool:
                mail.rescuer.requeue_due(10)
                return mail.states() == {"delivered"}

            until(delivered, 20)
            assert sink.count == len(ids)
            assert open_circuits() == 0


def test_a_tarpit_holds_only_its_share_of_connections(harness_with: Open, sink: Sink) -> None:
    with answering(Answer(raw=b"", end="stay")) as tarpit:
        mail = harness_with(
            tarpit, sink, server_connections=3, worker_connections=8, drain_timeout=0.1
        )
        for _ in range(40):
            mail.accept()
        engine = mail.engine()
        engine.start()
        until(lambda: sink.count == 37)
        assert mail.states() == {"sending", "delivered"}
        assert engine.drain(0.1)
    held = mail.rows("SELECT state, last_outcome FROM deliveries WHERE state <> 'delivered'")
    assert [tuple(row.values()) for row in held] == [("deferred", "uncertain")] * 3


def test_a_defect_after_the_last_byte_is_recorded_as_uncertain(
    harness_with: Open, sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReplyParser, "feed", lambda *_: 1 // 0)
    mail = harness_with(sink, uncertain_delay=60.0)
    queue_id = mail.accept()
    with mail.working():
        until(lambda: mail.state(queue_id) == "deferred")
    assert mail.delivery(queue_id)["last_outcome"] == "uncertain"
    assert [outcome for _, outcome in mail.attempts(queue_id)] == ["uncertain"]


def test_B38_draining_requeues_what_is_before_its_commit_point(harness_with: Open) -> None:
    with answering(Answer(read_size=1024, read_pause=5.0)) as slow:
        mail = harness_with(slow)
        queue_id = mail.accept(body=b"x" * 20_000_000)
        engine = mail.engine()
        engine.start()
        until(lambda: slow.connections == 1)
        assert engine.drain(5)
    assert (mail.state(queue_id), mail.delivery(queue_id)["last_outcome"]) == ("queued", None)
    assert mail.rows("SELECT end_reason FROM workers") == [{"end_reason": "stopped"}]
    assert engine.offer([queue_id]).wait(0)


def test_B36_a_missing_body_is_held_and_never_bounced(harness_with: Open, sink: Sink) -> None:
    mail = harness_with(sink)
    missing, cut, good = mail.accept(stored=False), mail.accept(), mail.accept()
    mail.spool.path(cut).write_bytes(BODY[:-1])
    with mail.working():
        until(lambda: mail.state(good) == "delivered")
        until(lambda: mail.states() == {"held", "delivered"})
    assert {mail.delivery(i)["last_outcome"] for i in (missing, cut)} == {"unsendable"}


def test_B36_a_local_fault_does_not_count_against_the_mail(harness_with: Open, sink: Sink) -> None:
    mail = harness_with(sink)
    queue_id = mail.accept()
    body = mail.spool.path(queue_id)
    aside = body.rename(body.with_suffix(".aside"))
    body.symlink_to(body)  # ELOOP: the body is there, but this machine cannot read it
    with mail.working():
        until(
            lambda: mail.delivery(queue_id)["claim_count"] == 1 and mail.state(queue_id) == "queued"
        )
        body.unlink()
        aside.rename(body)
        until(lambda: mail.state(queue_id) == "delivered", 20)
    assert mail.attempts(queue_id) == [(f"127.0.0.1:{sink.port}", "delivered")]


def test_no_commit_point_is_passed_without_a_fresh_lease(
    harness_with: Open, sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    mail = harness_with(sink)
    engine = mail.engine()
    look_up = mail.spool.open

    def stall(queue_id: str, size: int) -> BodyFile:
        engine.lease.renewed_at = float("-inf")  # as if no renewal had succeeded for a LEASE
        return look_up(queue_id, size)

    monkeypatch.setattr(mail.spool, "open", stall)
    engine.start()
    queue_id = mail.accept()
    until(lambda: mail.attempts(queue_id) == [(f"127.0.0.1:{sink.port}", "interrupted")])
    assert (mail.state(queue_id), sink.count) == ("queued", 0)
    monkeypatch.undo()
    until(lambda: mail.state(queue_id) == "delivered")
    assert engine.drain(5)


def test_outcomes_wait_while_the_database_is_away(
    postgres: Postgres, postgres_url: str, spool: Spool, tmp_path: Path
) -> None:
    with answering(Answer(delay=1.0)) as slow:
        mail = EngineHarness(
            postgres_url, spool, tmp_path, qmqp_servers=(f"127.0.0.1:{slow.port}",), lease=60.0
        )
        queue_id = mail.accept()
        with mail.working():
            until(lambda: slow.connections == 1)
            postgres.kill()
            assert slow.wait_for(1, 10)
            postgres.start()
            mail.database.dispose()  # the test's own connections have ended with the server
            until(lambda: mail.state(queue_id) == "delivered", 20)
        assert mail.attempts(queue_id) == [(f"127.0.0.1:{slow.port}", "delivered")]
        mail.close()


def test_one_bad_recipient_bounces_and_the_others_get_their_mail(harness_with: Open) -> None:
    with answering(Rule(Answer(b"D", b"no such mailbox (#5.1.1)"), b"bad@")) as sink:
        mail = harness_with(sink)
        queue_id = mail.accept("b@example.org", "bad@example.org", "c@example.org")
        with mail.working():
            until(lambda: mail.states() == {"split", "bounced", "delivered"}, 20)
    sql = """SELECT r.address, d.state FROM recipients r JOIN deliveries d
        ON d.queue_id = r.queue_id AND d.number = r.delivery WHERE r.queue_id = :id"""
    states = {row["address"]: row["state"] for row in mail.rows(sql, id=queue_id)}
    assert states == {
        "b@example.org": "delivered",
        "bad@example.org": "bounced",
        "c@example.org": "delivered",
    }


def two_at_most(recipients: Sequence[bytes] | None, digest: str) -> Answer | None:
    """A server that takes two recipients."""
    too_many = recipients is not None and len(recipients) > 2
    return Answer(b"D", b"too many recipients (#5.5.3)") if too_many else None


def test_too_many_recipients_are_sent_in_parts(harness_with: Open) -> None:
    with running_sink(two_at_most) as sink:
        mail = harness_with(sink)
        names = [f"{n}@example.org" for n in range(7)]
        mail.accept(*names)
        with mail.working():
            until(lambda: mail.states() == {"split", "delivered"}, 20)
        taken = [
            name
            for request in sink.received
            for name in request.recipients
            if len(request.recipients) <= 2
        ]
        assert sorted(taken) == [name.encode() for name in names]


def test_a_message_that_is_rejected_for_all_recipients_costs_three_sends(
    harness_with: Open,
) -> None:
    with answering(Answer(b"D", b"your list is not welcome (#5.1.8)")) as sink:
        mail = harness_with(sink, worker_connections=1)
        mail.accept(
            "b@example.org", "c@example.org", "d@example.org"
        )  # one half has a single recipient
        with mail.working():
            until(lambda: mail.states() == {"split", "bounced"}, 20)
        assert sink.count == 3


def test_nothing_is_sent_to_a_paused_route(harness_with: Open, sink: Sink) -> None:
    mail = harness_with(sink)
    queue_id = mail.accept()
    engine = mail.engine()
    engine.servers.pauses = frozenset({"route:default"})
    engine.start()
    assert engine.offer([queue_id]).wait(10)  # dropped; the delivery waits in the database
    assert (mail.state(queue_id), sink.connections) == ("queued", 0)
    engine.servers.pauses = frozenset()
    until(lambda: mail.state(queue_id) == "delivered")
    assert engine.drain(5)


def test_an_expired_worker_registers_under_another_id(harness_with: Open, sink: Sink) -> None:
    mail = harness_with(sink, lease=0.4)
    with mail.working() as engine:
        first = engine.lease.worker
        mail.change("UPDATE workers SET ended_at = @now, end_reason = 'expired'")
        until(lambda: engine.lease.worker not in ("", first))
        queue_id = mail.accept()
        until(lambda: mail.state(queue_id) == "delivered")
    assert mail.rows("SELECT count(*) AS n FROM workers") == [{"n": 2}]


def test_quarantined_mail_is_delivered(harness_with: Open, sink: Sink) -> None:
    mail = harness_with(sink)
    ids = [mail.accept() for _ in range(5)]
    mail.change("UPDATE deliveries SET crash_count = 2 WHERE queue_id = :id", id=ids[2])
    mail.change("UPDATE deliveries SET crash_count = 2 WHERE queue_id = :id", id=ids[3])
    with mail.working():
        until(lambda: mail.states() == {"delivered"}, 20)
    assert sink.count == 5
