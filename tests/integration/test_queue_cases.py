"""The numbered cases of the queue (D, and those of B that need a queue), on both databases.

Many of them have modules of their own too; here each has one short test.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, OperationalError

from qmqp.sink import Answer, Rule, Sink, running_sink
from relay.db.engine import writing
from relay.db.group_commit import CommitThread
from relay.dsn.generator import DsnGenerator
from relay.ids import dashed
from relay.queue.model import Claim, Command, CommandResult
from relay.queue.operations import OPERATIONS, QueueOperations
from relay.queue.outcome import Outcome
from relay.queue.states import UNFINISHED, State, successors
from relay.report.filters import Filter
from relay.spool.store import Spool
from tests.bodies import body_in
from tests.integration.harness import EngineHarness, QueueHarness
from tests.waiting import until
from worker.celery_app import celery_app
from worker.sweeper import BATCH

type Open = Callable[..., EngineHarness]


@pytest.fixture
def harness_with(clean_url: str, spool: Spool, tmp_path: Path) -> Iterator[Open]:
    opened: list[EngineHarness] = []

    def open_(*sinks: Sink | int, **settings: object) -> EngineHarness:
        servers = tuple(f"127.0.0.1:{one if isinstance(one, int) else one.port}" for one in sinks)
        opened.append(EngineHarness(clean_url, spool, tmp_path, qmqp_servers=servers, **settings))
        return opened[-1]

    yield open_
    for one in opened:
        one.close()


def lose_worker(queue: QueueHarness, worker: str) -> None:
    """A worker's lease runs out, and a sweeper has seen it for long enough."""
    queue.pass_time(queue.settings.lease + 1)
    queue.expire_worker(worker)


def wake(queue: QueueHarness, seconds: float = 100.0) -> None:
    """Deferred deliveries become due."""
    queue.pass_time(seconds)
    queue.rescuer.requeue_due(100)


# --- B: cases of the client that only a queue shows
# ------------------------------------------------------


def test_B24_the_first_server_is_down_and_the_second_delivers(harness_with: Open) -> None:
    with running_sink() as gone:
        dead = gone.port
    with running_sink() as sink:
        mail = harness_with(dead, sink)
        queue_id = mail.accept()
        with mail.working() as engine:
            engine.offer([queue_id])
            until(lambda: mail.state(queue_id) == "delivered")
    assert mail.attempts(queue_id) == [
        (f"127.0.0.1:{dead}", "unreachable"),
        (f"127.0.0.1:{sink.port}", "delivered"),
    ]


def test_B11_hostile_replies_are_escaped_everywhere(harness_with: Open) -> None:
    with running_sink(
        Rule(Answer(b"D", b"no\r\nFrom: forged@x\r\n\r\n\0\x1b[31m\xff\xc3\xa9"))
    ) as sink:
        mail = harness_with(sink)
        queue_id = mail.accept()
        with mail.working() as engine:
            engine.offer([queue_id])
            until(lambda: mail.state(queue_id) == "bounced")
    reply = mail.delivery(queue_id)["last_reply"]
    assert reply == r"no\x0d\nFrom: forged@x\x0d\n\x0d\n\x00\x1b[31m\xff\xc3\xa9"
    assert mail.rows("SELECT reply FROM attempts") == [{"reply": reply}]
    (dsn,) = DsnGenerator(
        mail.database, mail.spool, mail.settings, lambda address: "default"
    ).generate(5)
    lines = body_in(mail.spool.path(dsn)).split(b"\n")
    assert not any(line.startswith(b"From: forged") for line in lines)
    assert all(32 <= byte < 127 or byte == 9 for line in lines for byte in line)


def became(mail: EngineHarness, queue_id: str) -> dict[str, str]:
    """The state of each recipient."""
    sql = """SELECT r.address, d.state FROM recipients r JOIN deliveries d
        ON d.queue_id = r.queue_id
        AND d.number = r.delivery WHERE r.queue_id = :id"""
    return {row["address"]: row["state"] for row in mail.rows(sql, id=queue_id)}


@pytest.mark.parametrize(
    "recipient", ["<b@example.org", "b" * 1000, "b\n@example.org", "b\u20ac@example.org"]
)
def test_B29_an_address_that_a_server_would_misread_bounces_alone(
    harness_with: Open, recipient: str
) -> None:
    with running_sink() as sink:
        mail = harness_with(sink)
        queue_id = mail.accept("good@example.org", recipient, "fine@example.org")
        wanted = {
            "good@example.org": "delivered",
            "fine@example.org": "delivered",
            recipient: "bounced",
        }
        with mail.working() as engine:
            engine.offer([queue_id])
            until(lambda: became(mail, queue_id) == wanted)
        (request,) = sink.received
        assert list(request.recipients) == [b"good@example.org", b"fine@example.org"]
    bounced = "SELECT last_outcome, last_reply FROM deliveries WHERE state = 'bounced'"
    (row,) = mail.rows(bounced)
    assert row["last_outcome"] == "unsendable"
    assert row["last_reply"].startswith("QMQP cannot carry the envelope (#5.1.3): ")
    (dsn,) = DsnGenerator(
        mail.database, mail.spool, mail.settings, lambda address: "default"
    ).generate(5)
    wire = body_in(mail.spool.path(dsn)).decode()
    assert wire.count("Final-Recipient") == wire.count("\nStatus: 5.1.3\n") == 1
    assert "It was not sent: no mail server can be given this address." in " ".join(wire.split())
    assert "Diagnostic-Code" not in wire


def test_a_message_of_which_nothing_can_be_sent_bounces_at_once(harness_with: Open) -> None:
    with running_sink() as sink:
        mail = harness_with(sink)
        queue_id = mail.accept("<b@example.org", "<c@example.org")
        with mail.working() as engine:
            engine.offer([queue_id])
            until(lambda: mail.states() == {"bounced"})
        assert sink.connections == 0
    assert len(mail.rows("SELECT 1 FROM deliveries")) == 1
    assert (
        len(
            DsnGenerator(
                mail.database, mail.spool, mail.settings, lambda address: "default"
            ).generate(5)
        )
        == 1
    )


def test_a_sender_that_cannot_be_sent_bounces_without_a_dsn(
    harness_with: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    """A DSN to it could not be sent either. The log says so, and the row."""
    with running_sink() as sink:
        mail = harness_with(sink)
        queue_id = mail.accept("b@example.org", "<c@example.org", sender="<a@example.com")
        with mail.working() as engine:
            engine.offer([queue_id])
            until(lambda: mail.states() == {"bounced"})
        assert sink.connections == 0
    generator = DsnGenerator(mail.database, mail.spool, mail.settings, lambda address: "default")
    assert generator.generate(5) == [] == generator.generate(5)
    row = mail.delivery(queue_id)
    assert (row["due_at"], row["dsn_withheld"]) == (None, "address")
    assert row["last_reply"].startswith("QMQP cannot carry the envelope (#5.1.7): ")
    assert not mail.spool.path(queue_id).exists()
    assert capsys.readouterr().out.count("dsn withheld") == 1


def test_a_message_whose_recipients_are_missing_is_held(harness_with: Open) -> None:
    with running_sink() as sink:
        mail = harness_with(sink)
        queue_id = mail.accept()
        mail.change("DELETE FROM recipients")
        with mail.working() as engine:
            engine.offer([queue_id])
            until(lambda: mail.state(queue_id) == "held")
        assert sink.connections == 0


@pytest.mark.parametrize("body", [b"", b"Subject", b"Subject: test\n\nhello\nmore"])
def test_B37_a_body_of_another_size_than_was_stored_is_put_aside_and_not_sent(
    harness_with: Open, body: bytes
) -> None:
    """The relay knows only the size of a body; changed bytes are found by checksums of the file
    system."""
    with running_sink() as sink:
        mail = harness_with(sink)
        queue_id = mail.accept()
        mail.spool.path(queue_id).write_bytes(body)
        with mail.working() as engine:
            engine.offer([queue_id])
            until(lambda: mail.state(queue_id) == "held")
        assert sink.connections == 0
    assert mail.delivery(queue_id)["last_outcome"] == "unsendable"
    assert mail.spool.path(queue_id).exists()


def test_B39_a_worker_killed_between_the_last_byte_and_the_record(queue: QueueHarness) -> None:
    (claim,) = queue.claim(queue.accept())
    lose_worker(queue, queue.worker)
    row = queue.delivery(claim.queue_id)
    assert (row["state"], row["last_outcome"], row["crash_count"]) == ("deferred", "uncertain", 1)
    assert (
        0
        < row["due_in"] - queue.settings.uncertain_delay + 5
        <= 5 + queue.settings.uncertain_delay / 2
    )
    assert queue.claim(claim.queue_id) == []
    wake(queue)
    (again,) = queue.claim(claim.queue_id, worker=queue.register_worker())
    assert again.crash_count == 1


def test_B41_a_server_that_never_replies(harness_with: Open) -> None:
    """As qmail-qmqpd does about whatever it does not like: only age ends it, and the DSN says
    how it was."""
    with running_sink(Rule(Answer(raw=b""))) as sink:
        mail = harness_with(sink, uncertain_delay=100.0)
        queue_id = mail.accept()
        with mail.working() as engine:
            engine.offer([queue_id])
            until(lambda: mail.state(queue_id) == "deferred")
            mail.change(
                "UPDATE deliveries SET state = 'queued', due_at = @later(60), expires_at = @ago(1)"
            )
            engine.offer([queue_id])
            until(lambda: mail.state(queue_id) == "expired")
    assert {outcome for _, outcome in mail.attempts(queue_id)} == {"uncertain"}
    (dsn,) = DsnGenerator(
        mail.database, mail.spool, mail.settings, lambda address: "default"
    ).generate(5)
    assert "connection closed by the server after the commit point" in " ".join(
        body_in(mail.spool.path(dsn)).decode().split()
    )


def test_B43_D10_no_clock_of_a_worker_matters(
    queue: QueueHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue_id = queue.accept()
    for years in (-5, 5):
        with monkeypatch.context() as skewed:
            now = time.time() + years * 365 * 86400
            skewed.setattr(time, "time", lambda now=now: now)
            (claim,) = queue.claim(queue_id)
            assert queue.renew()
            assert queue.rescuer.expired_leases() == []
            assert queue.complete(claim, Outcome.DEFERRED, delay=30.0).state is State.DEFERRED
        row = queue.delivery(queue_id)
        assert row["due_in"] == pytest.approx(30, abs=20)
        assert row["expires_in"] == pytest.approx(1000, abs=300)
        wake(queue)


def test_B44_busy_for_ever(harness_with: Open) -> None:
    with running_sink(Rule(Answer(b"Z", b"busy for ever"))) as sink:
        mail = harness_with(sink, retry_min=100.0, retry_max=1000.0)
        queue_id = mail.accept()
        waits = []

        def decided(queue_id: str, turn: int) -> bool:
            row = mail.delivery(queue_id)
            return (row["claim_count"], row["state"] == "sending") == (turn, False)

        with mail.working() as engine:
            for turn in range(1, 7):
                engine.offer([queue_id])
                until(partial(decided, queue_id, turn))
                row = mail.rows("SELECT -@since(due_at) AS due_in, state FROM deliveries")[0]
                waits.append(row["due_in"])
                late = ", expires_at = @ago(1)" if turn == 5 else ""
                due = f"due_at = @later(60){late}"
                mail.change(
                    f"UPDATE deliveries SET state = 'queued', {due} WHERE state = 'deferred'"
                )
    for step, wait in enumerate(waits[:5]):
        most = min(1000, 200 * 2**step)
        assert most / 2 - 30 <= wait <= most, "it doubles, with jitter, to the cap"
    row = mail.delivery(queue_id)
    assert (row["state"], row["last_reply"]) == ("expired", "busy for ever")
    (dsn,) = DsnGenerator(
        mail.database, mail.spool, mail.settings, lambda address: "default"
    ).generate(5)
    assert "busy for ever" in body_in(mail.spool.path(dsn)).decode()


# --- D: queue, worker, SQL
# ----------------------------------------------------------------------------------


def test_D1_one_task_delivered_twice_at_once(queue: QueueHarness) -> None:
    ids = [queue.accept() for _ in range(30)]
    barrier = threading.Barrier(2)

    def task(worker: str) -> list[Claim]:
        worker_queue = queue.another_worker_queue()
        barrier.wait(10)
        return queue.claim(*ids, worker=worker, worker_queue=worker_queue)

    with ThreadPoolExecutor(2) as pool:
        both = [
            claim
            for claims in pool.map(task, (queue.register_worker(), queue.register_worker()))
            for claim in claims
        ]
    both += queue.claim(*ids)  # the messages that each of them left to the other
    assert sorted(claim.queue_id for claim in both) == sorted(ids)
    assert {claim.claim for claim in both} == {1}


def test_D2_a_hint_for_an_unknown_or_finished_delivery(harness_with: Open) -> None:
    with running_sink() as sink:
        mail = harness_with(sink)
        done = mail.accept()
        with mail.working() as engine:
            engine.offer([done])
            until(lambda: mail.state(done) == "delivered")
            assert engine.offer([done, "f" * 32]).wait(10)
        assert sink.connections == 1
    assert mail.attempts(done) == [(f"127.0.0.1:{sink.port}", "delivered")]


def test_D3_a_repeated_hint_sends_nothing_again(queue: QueueHarness) -> None:
    queue_id = queue.accept()
    (claim,) = queue.claim(queue_id)
    for _ in range(
        3
    ):  # a visibility timeout does not repeat the task of a session that takes an hour
        queue.pass_time(1200)
        assert queue.renew()
        assert queue.claim(queue_id, worker=queue.register_worker()) == []
    assert queue.complete(claim, Outcome.DELIVERED).state is State.DELIVERED


def test_D3_no_task_waits_for_its_session() -> None:
    """Tasks are acknowledged when they come, so that no visibility timeout applies to a session."""
    from relay.settings import WorkerSettings, load

    conf = celery_app(load(WorkerSettings, broker_url="redis://127.0.0.1:1/0")).conf
    assert not conf.task_acks_late


@pytest.mark.parametrize("ending", ["expired", "stopped"])
def test_D4_deliveries_of_an_expired_worker(queue: QueueHarness, ending: str) -> None:
    (claim,) = queue.claim(queue.accept())
    if ending == "expired":
        lose_worker(queue, queue.worker)
    else:
        queue.change("UPDATE workers SET ended_at = @now, end_reason = 'stopped'")
        assert queue.rescuer.rescue_unowned() == 1
    row = queue.delivery(claim.queue_id)
    assert (row["state"], row["last_outcome"]) == ("deferred", "uncertain"), (
        "how far it was is unknown"
    )


@pytest.mark.parametrize("outcome", list(Outcome))
def test_D5_a_worker_without_its_lease_reports_late(queue: QueueHarness, outcome: Outcome) -> None:
    (old,) = queue.claim(queue.accept())
    stale = queue.worker
    lose_worker(queue, stale)
    wake(queue)
    fresh = queue.register_worker()
    (new,) = queue.claim(old.queue_id, worker=fresh)
    recorded = queue.complete(old, outcome, worker=stale)
    assert (old.claim, 1, outcome) in queue.numbered_attempts(old.queue_id), "what happened is kept"
    if outcome is Outcome.DELIVERED:
        assert recorded.state is State.DELIVERED
        assert queue.complete(new, Outcome.DEFERRED, worker=fresh).state is State.DELIVERED
        wake(queue)
        assert queue.claim(old.queue_id, worker=fresh) == [], "never again after a K"
    else:
        assert recorded.state is None
        assert queue.state(old.queue_id) == "sending"
        assert queue.complete(new, Outcome.DELIVERED, worker=fresh).state is State.DELIVERED


def test_D6_a_k_waits_for_a_database_that_is_locked(queue: QueueHarness) -> None:
    (claim,) = queue.claim(queue.accept())
    held, go_on = threading.Event(), threading.Event()

    def lock() -> None:
        with writing(queue.database) as connection:
            connection.execute(
                text(
                    queue.dialect(
                        "UPDATE deliveries SET pending_operation = pending_operation WHERE"
                        " number = 1"
                    )
                )
            )
            held.set()
            assert go_on.wait(20)

    with ThreadPoolExecutor(2) as pool:
        locking = pool.submit(lock)
        assert held.wait(10)
        recording = pool.submit(queue.complete, claim, Outcome.DELIVERED)
        assert not recording.done()
        go_on.set()
        assert recording.result(20).state is State.DELIVERED
        locking.result(20)


def test_D6_a_k_is_committed_again_until_it_is_recorded(queue: QueueHarness) -> None:
    (claim,) = queue.claim(queue.accept())
    faults = iter(
        [OperationalError("", {}, Exception("deadlock detected"), connection_invalidated=True)] * 2
    )

    def commit(items: Any) -> list[CommandResult]:
        if fault := next(faults, None):
            raise fault
        return queue.worker_queue.commit(items)

    answers: list[Any] = []
    answered = threading.Event()

    def post(call: Callable[[], None]) -> None:
        call()
        answered.set()

    writer: CommitThread[Command, CommandResult] = CommitThread("test", commit, post=post)
    writer.start()
    writer.put(queue.completion(claim, Outcome.DELIVERED), answers.append)
    assert answered.wait(20)
    assert writer.close(10)
    assert answers[0].state is State.DELIVERED
    assert queue.state(claim.queue_id) == "delivered"


@pytest.mark.parametrize("sender", ["", "#@[]"])
def test_D7_mail_from_the_null_sender_makes_no_dsn(queue: QueueHarness, sender: str) -> None:
    (claim,) = queue.claim(queue.accept(sender=sender))
    assert queue.complete(claim, Outcome.REJECTED).state is State.BOUNCED
    row = queue.delivery(claim.queue_id)
    assert row["due_at"] is None
    assert row["last_reply"] == "its words", "a dead letter that `list --state bounced` shows"


@pytest.mark.parametrize(
    ("reply_text", "states"),
    [
        (b"go away (#5.7.1)", {"bounced"}),
        (b"no such mailbox (#5.1.1)", {"split", "bounced"}),
    ],
)
def test_D8_a_d_for_many(harness_with: Open, reply_text: bytes, states: set[str]) -> None:
    with running_sink(Rule(Answer(b"D", reply_text))) as sink:
        mail = harness_with(sink)
        mail.accept("x@example.org", "y@example.org", "z@example.org")
        with mail.working():
            until(lambda: mail.states() == states)
        sql = """SELECT d.state FROM recipients r
            JOIN deliveries d ON d.queue_id = r.queue_id AND d.number = r.delivery"""
        until(lambda: [row["state"] for row in mail.rows(sql)] == ["bounced"] * 3)
        assert sink.count == 1 if states == {"bounced"} else 3 <= sink.count <= 5, (
            "at once, or by halves"
        )


def test_D8_a_route_that_is_not_split(harness_with: Open, tmp_path: Path) -> None:
    file = tmp_path / "routes.toml"
    file.write_text('[default]\nbisect = "off"\n')
    with running_sink(Rule(Answer(b"D", b"no such mailbox (#5.1.1)"), b"bad@")) as sink:
        mail = harness_with(sink, routes=file)
        mail.accept("x@example.org", "bad@example.org")
        with mail.working():
            until(lambda: mail.states() == {"bounced"})
        assert sink.count == 1


def test_D9_the_guard_of_the_tests_refuses_unknown_transitions(
    queue: QueueHarness,
) -> None:
    changes = [(before, after) for before in State for after in State if after is not State.SENDING]
    for before, after in changes:
        queue_id = queue.accept()
        worker = "(SELECT id FROM workers)" if before is State.SENDING else "NULL"
        queue.change(
            f"UPDATE deliveries SET state = :state, worker = {worker} WHERE queue_id = @id(:id)",
            state=before,
            id=queue_id,
        )
        change = "UPDATE deliveries SET state = :state, worker = NULL WHERE queue_id = @id(:id)"
        parameters = {"state": after, "id": dashed(queue_id)}
        named = after is before or after in successors(before)
        refused = nullcontext() if named else pytest.raises(DBAPIError, match="TRANSITIONS")
        with refused, writing(queue.database) as connection:
            connection.execute(text(queue.dialect(change)), parameters)
        assert queue.state(queue_id) == (after if named else before)


def test_D9_operations_make_only_transitions_of_the_table(queue: QueueHarness) -> None:
    operations = QueueOperations(queue.database, sends_dsns=True)
    for operation in OPERATIONS.values():
        for state in State:
            queue_id = queue.accept()
            worker = "(SELECT min(CAST(id AS text)) FROM workers)"
            worker = f"CAST({worker} AS uuid)" if queue.dialect.postgresql else worker
            queue.change(
                f"""UPDATE deliveries SET state = :state,
                worker = {worker if state is State.SENDING else "NULL"}
                WHERE queue_id = @id(:id)""",
                state=state,
                id=queue_id,
            )
            touched, _ = operations.apply(operation, Filter(id=queue_id), actor="me", reason="test")
            after = State(queue.state(queue_id))
            if state is State.SENDING:
                assert after is State.SENDING, "only a pending operation is stored"
                assert queue.delivery(queue_id)["pending_operation"] == (
                    operation.pending if touched else None
                )
            elif touched:
                assert after in successors(state) | {state}
            else:
                assert after is state
            assert not touched or state in UNFINISHED, "what is final stays so"


def test_D12_a_body_that_cannot_be_removed_is_not_sent_again(
    harness_with: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_sink() as sink:
        mail = harness_with(sink)
        queue_id = mail.accept()
        monkeypatch.setattr(mail.spool, "remove", lambda queue_id: False)
        with mail.working() as engine:
            engine.offer([queue_id])
            until(lambda: mail.state(queue_id) == "delivered")
            assert engine.offer([queue_id]).wait(10)
        assert sink.count == 1
    assert mail.spool.path(queue_id).exists()  # the cleaner finds it (test_sweeper.py)


def test_D13_thousands_that_were_being_sent_come_back_in_bounded_batches(
    queue: QueueHarness,
) -> None:
    queue.accept()
    copies = 2000
    dead = dashed(queue.worker)
    key = (
        "printf('00000000-0000-7000-8000-%012x', s.n)",
        "('00000000-0000-7000-8000-' || lpad(to_hex(s.n), 12, '0'))::uuid",
    )
    numbers = (
        (
            f"(WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < {copies})"
            " SELECT n FROM s) AS s"
        ),
        f"generate_series(1, {copies}) AS s(n)",
    )
    one = queue.dialect.postgresql
    queue.change(
        f"""INSERT INTO messages (id, sender, size, received_at, client_address, helo, protocol)
        SELECT {key[one]}, 'a', 1, @now, '', '', '' FROM {numbers[one]}"""
    )
    queue.change(
        f"""INSERT INTO deliveries (queue_id, number, route, state, worker, claim_count, due_at,
        expires_at)
        SELECT {key[one]}, 1, 'default', 'sending', @id(:dead), 1, @later(9000), @later(100000)
        FROM {numbers[one]}""",
        dead=dead,
    )
    lose_worker(queue, queue.worker)
    counts = queue.rows(
        "SELECT state, last_outcome, count(*) AS n FROM deliveries GROUP BY state, last_outcome"
    )
    found = {(row["state"], row["last_outcome"]): row["n"] for row in counts}
    assert found[("deferred", "uncertain")] == copies
    assert queue.rescuer.requeue_due(BATCH) == {}, "not before UNCERTAIN_DELAY"
    queue.pass_time(100)
    assert len(queue.rescuer.requeue_due(BATCH)["default"]) == BATCH, "a batch at a time"
    assert len(queue.claim(capacity={"default": 50}, worker=queue.register_worker())) <= 50


def test_D14_tries_are_counted_before_they_begin(queue: QueueHarness) -> None:
    queue_id = queue.accept()
    for n in range(1, 6):
        worker = queue.register_worker()
        (claim,) = queue.claim(queue_id, worker=worker)
        assert queue.delivery(queue_id)["claim_count"] == claim.claim == n, (
            "in the database before a byte is sent"
        )
        lose_worker(queue, worker)
        assert queue.state(queue_id) == ("held" if n == queue.settings.poison_limit else "deferred")
        wake(queue)


@pytest.mark.parametrize(
    ("sql", "refused"),
    [
        ("UPDATE deliveries SET state = 'held', due_at = NULL", False),
        ("UPDATE deliveries SET state = 'split', due_at = NULL", False),
        ("UPDATE deliveries SET state = 'deferred'", True),
        ("UPDATE deliveries SET state = 'delivered', due_at = NULL", True),
        (
            "INSERT INTO deliveries (queue_id, number, route, state, due_at, expires_at)"
            " SELECT queue_id, 2, route, 'held', NULL, expires_at FROM deliveries",
            False,
        ),
        (
            "INSERT INTO deliveries (queue_id, number, route, state, due_at, expires_at)"
            " SELECT queue_id, 2, route, 'deferred', due_at, expires_at FROM deliveries",
            True,
        ),
    ],
)
def test_the_guard_refuses_what_the_table_does_not_name(
    queue: QueueHarness, sql: str, refused: bool
) -> None:
    queue.accept()
    expected = (
        pytest.raises(DBAPIError, match="TRANSITIONS does not name") if refused else nullcontext()
    )
    with expected, writing(queue.database) as connection:
        connection.execute(text(sql))
