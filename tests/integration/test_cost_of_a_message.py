"""The cost of a message in statements, commits, syncs and hints, in batches of 1 and of 64.

These counts do not depend on the machine, as times do. A batch costs the same number of statements
whatever its size, so a change that turns one statement a batch into one a message fails here.
"""

import os
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, Engine, event

from qmqp.sink import running_sink
from reception.spooler import Spooler
from reception.spooler_protocol import FrameDecoder, SpoolerReply, StoreRequest, frame
from relay.db.engine import reading
from relay.hints import FRESH, Hints
from relay.ids import new_id
from relay.queue.accept import NewMessage, encode
from relay.queue.model import Attempt, ClaimRequest, Completion
from relay.queue.outcome import Outcome
from relay.queue.states import State
from relay.settings import Settings, load
from relay.spool.journal.directory import JournalDirectory
from relay.spool.mark import SpoolMark
from relay.spool.store import Spool
from tests.integration.harness import EngineHarness, QueueHarness, new_message
from tests.services import Broker
from tests.waiting import until

ROUNDS = (1, 64)
ACCEPT = {"postgresql": 1, "sqlite": 4}
CLAIM = {"postgresql": 1, "sqlite": 1}
RECORD = {"postgresql": 1, "sqlite": 2}
"""Statements a round on each database, BEGIN and COMMIT not counted."""


@contextmanager
def counted(engine: Engine) -> Iterator[Counter[str]]:
    """Statements and commits on an engine meanwhile. With psycopg itself, statements of a pipeline
    have one COMMIT, and another one is its own."""
    counts = Counter[str]()
    execute, pipeline = psycopg.Connection.execute, psycopg.Connection.pipeline

    def statement(_connection: Connection, _cursor: object, sql: str, *_: object) -> None:
        counts["statements"] += not sql.startswith("BEGIN")

    def commit(_connection: object) -> None:
        counts["commits"] += 1

    def executed(connection: Any, *query: Any, **options: Any) -> Any:
        alone = connection.pgconn.pipeline_status == psycopg.pq.PipelineStatus.OFF
        counts["statements"] += connection.autocommit  # a new connection is prepared without it
        counts["commits"] += connection.autocommit and alone
        return execute(connection, *query, **options)

    def in_pipeline(connection: Any) -> Any:
        counts["commits"] += 1
        return pipeline(connection)

    event.listen(engine, "before_cursor_execute", statement)
    event.listen(engine, "commit", commit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psycopg.Connection, "execute", executed)
        patch.setattr(psycopg.Connection, "pipeline", in_pipeline)
        yield counts
    event.remove(engine, "before_cursor_execute", statement)
    event.remove(engine, "commit", commit)


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Calls of fsync and fdatasync that this process makes itself (SQLite's own are not seen)."""
    counts = Counter[str]()
    for name in ("fsync", "fdatasync"):
        real = getattr(os, name)

        def counting(handle: int, *, name: str = name, real: object = real) -> None:
            counts[name] += 1
            assert callable(real)
            real(handle)

        monkeypatch.setattr(os, name, counting)
    return counts


def kind(queue: QueueHarness) -> str:
    return queue.database.dialect.name


def accepted(queue: QueueHarness, count: int) -> list[str]:
    messages = [new_message() for _ in range(count)]
    queue.insert(messages)
    return [message.id for message in messages]


@pytest.mark.parametrize("size", ROUNDS)
def test_cost_of_accepting(queue: QueueHarness, size: int) -> None:
    messages = [new_message("b@example.org", "c@example.org") for _ in range(size)]
    with counted(queue.database) as counts:
        queue.insert(messages)
    assert counts == {"statements": ACCEPT[kind(queue)], "commits": 1}


@pytest.mark.parametrize("size", ROUNDS)
def test_claim(queue: QueueHarness, size: int) -> None:
    ids = accepted(queue, size)
    with counted(queue.database) as counts:
        assert len(queue.claim(*ids)) == size
    assert counts == {"statements": CLAIM[kind(queue)], "commits": 1}


def test_a_claim_alone_is_one_round_trip(queue: QueueHarness) -> None:
    """On PostgreSQL the message waits for no answer to BEGIN or COMMIT, and an early one for none
    to the statement that waits for its rows."""
    (queue_id,) = accepted(queue, 1)
    transactions: list[Connection] = []
    event.listen(queue.database, "commit", note := transactions.append)
    request = ClaimRequest(queue.worker, [queue_id], {"default": 1}, early=True)
    with counted(queue.database) as counts:
        (claims,) = queue.worker_queue.commit([request])
    event.remove(queue.database, "commit", note)
    assert isinstance(claims, list)
    assert [claim.queue_id for claim in claims] == [queue_id]
    assert len(transactions) == (kind(queue) == "sqlite")
    assert counts == {"statements": 1 + (kind(queue) == "postgresql"), "commits": 1}


@pytest.mark.parametrize("size", ROUNDS)
def test_record(queue: QueueHarness, size: int) -> None:
    claims = queue.claim(*accepted(queue, size))
    records = [queue.completion(claim, Outcome.DELIVERED) for claim in claims]
    with counted(queue.database) as counts:
        queue.worker_queue.commit(records)
    assert counts == {"statements": RECORD[kind(queue)], "commits": 1}


@pytest.mark.parametrize("size", ROUNDS)
def test_outcomes_and_the_next_claims_share_a_commit(queue: QueueHarness, size: int) -> None:
    claims, ids = queue.claim(*accepted(queue, size)), accepted(queue, size)
    items: list[Completion | ClaimRequest] = [
        queue.completion(claim, Outcome.DELIVERED) for claim in claims
    ]
    items.append(ClaimRequest(queue.worker, ids, {"default": size}))
    with counted(queue.database) as counts:
        claimed = queue.worker_queue.commit(items)[-1]
    assert isinstance(claimed, list)
    assert len(claimed) == size
    assert counts == {"statements": CLAIM[kind(queue)] + RECORD[kind(queue)], "commits": 1}


def test_failures_cost_no_more_statements_than_successes(queue: QueueHarness) -> None:
    claims = queue.claim(*accepted(queue, 64))
    outcomes = (Outcome.DELIVERED, Outcome.DEFERRED, Outcome.REJECTED, Outcome.UNCERTAIN)
    tries = [
        Attempt(
            attempt_index, f"mx{attempt_index}.example:628", Outcome.UNREACHABLE, "no", 0, 1.0, 0.5
        )
        for attempt_index in (1, 2, 3)
    ]
    records = [
        queue.completion(claim, outcomes[n % 4], attempts=tries) for n, claim in enumerate(claims)
    ]
    with counted(queue.database) as counts:
        queue.worker_queue.commit(records)
    assert counts == {"statements": RECORD[kind(queue)], "commits": 1}
    assert set(queue.states_of(claim.queue_id for claim in claims)) == {
        State.DELIVERED,
        State.DEFERRED,
        State.BOUNCED,
    }


@pytest.mark.parametrize("size", ROUNDS)
def test_a_spooler_syncs_and_commits_a_batch_as_one(
    queue: QueueHarness,
    spool: Spool,
    syncs: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
    size: int,
) -> None:
    """As in production: requests come over a socket, are appended and synced together, and one
    COMMIT makes their rows. The first batch opens the segment and raises the mark, which each
    second does, so the second batch is counted. The first one has two messages: after a message
    that comes alone a query follows the mark."""
    monkeypatch.setattr("reception.committer.MARK_INTERVAL", 1e9)
    spool.prepare(queue.database, unsafe=True)
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    mark = SpoolMark(JournalDirectory(spool.handle), spool.identity)
    spooler = Spooler(theirs, spool, queue.acceptor, queue.database, mark, segment_size=4 << 20)
    thread = threading.Thread(target=spooler.run)
    thread.start()
    frames, messages = FrameDecoder(), [new_message() for _ in range(size + 2)]

    def store(batch: list[NewMessage]) -> None:
        requests = [
            StoreRequest(n, one.id, encode(one), ("default",), 20, [b"Subject: test\n", b"\nhi\n"])
            for n, one in enumerate(batch)
        ]
        ours.sendall(b"".join(map(frame, requests)))
        results = rows = 0
        while results < len(batch) or rows < len(batch):
            for values in frames.feed(ours.recv(1 << 16)):
                reply = SpoolerReply(*values)
                results, rows = results + len(reply.results), rows + reply.messages

    store(messages[:2])
    until(lambda: syncs["fsync"] >= 4)  # two segments and their names
    until((spool.directory / "journal" / "mark").exists)  # the mark is known before it is synced
    syncs.clear()
    with counted(queue.database) as counts:
        store(messages[2:])
    synced = syncs["fdatasync"]
    ours.close()
    thread.join(10)
    theirs.close()
    assert counts == {"statements": ACCEPT[kind(queue)], "commits": 1}
    assert synced == 1


def test_hot_statements_scan_no_table_however_it_grows(postgres_url: str) -> None:
    """psycopg prepares them after a few executions, when the tables are empty: a plan that scans
    would stay."""
    queue = QueueHarness(postgres_url)
    for _ in range(12):  # prepared, and planned once for all
        for claim in queue.claim(*accepted(queue, 1)):
            queue.complete(claim, Outcome.DELIVERED)
        queue.rescuer.waiting(["default"])
        queue.rescuer.wake("default", 64)
    before = scans(queue)
    for _ in range(12):
        for claim in queue.claim(*accepted(queue, 1)):
            queue.complete(claim, Outcome.DELIVERED)
        queue.rescuer.requeue_due(64)
        queue.rescuer.waiting(["default"])
        queue.rescuer.wake("default", 64)
        queue.claim()
    assert scans(queue) == before
    queue.database.dispose()


def scans(queue: QueueHarness) -> dict[str, int]:
    """How often each table was read from end to end."""
    with reading(queue.database) as connection:
        connection.exec_driver_sql("SELECT pg_stat_force_next_flush()")
    sql = (
        "SELECT relname, seq_scan FROM pg_stat_user_tables WHERE relname IN ('messages',"
        " 'recipients', 'deliveries')"
    )
    with reading(queue.database) as connection:
        return {row.relname: row.seq_scan for row in connection.exec_driver_sql(sql)}


def _neighbour(queue_id: str) -> str:
    """Another id whose body lies in the same directory."""
    return queue_id[:-1] + ("0" if queue_id[-1] != "0" else "1")


def test_a_streamed_body_is_synced_every_8_mib(spool: Spool, syncs: Counter[str]) -> None:
    spool.store(first := new_id(), [b"x"])
    syncs.clear()
    body = spool.create(_neighbour(first))
    for _ in range(20 * 16):
        body.append(bytes(1 << 16))
    body.finish(b"")
    assert syncs == {"fdatasync": 20 // 8 + 1, "fsync": 1}


def test_delivering_syncs_nothing(
    database_url: str, spool: Spool, tmp_path: Path, syncs: Counter[str]
) -> None:
    with running_sink() as sink:
        mail = EngineHarness(
            database_url, spool, tmp_path, qmqp_servers=(f"127.0.0.1:{sink.port}",), grace=60.0
        )
        ids = [mail.accept() for _ in range(64)]
        syncs.clear()
        with mail.working() as engine:
            assert engine.offer(ids).wait(20)
            until(lambda: mail.states() == {"delivered"})
            until(lambda: not any(mail.spool.path(queue_id).exists() for queue_id in ids))
        mail.close()
    assert not syncs


@pytest.mark.parametrize(("count", "published"), [(1, 1), (64, 1), (65, 2)])
def test_one_hint_for_all_that_waits(broker: Broker, count: int, published: int) -> None:
    settings = load(Settings, broker_url=broker.url)
    hints = Hints(settings.broker_url, FRESH, settings.batch_size)
    hints.offer(new_id() for _ in range(count))
    hints.start()
    until(lambda: hints.published == published)
    hints.close()
    assert broker.ask("LLEN", f"qmqp-relay:{FRESH}") == b":%d" % published
