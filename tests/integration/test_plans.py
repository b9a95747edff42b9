"""How many rows the statements of the hot path and of an idle sweep read, beside a long queue.

The database plans them as it does for a worker. A statement that scans a table, or a whole index
that grows with the queue, fails: on PostgreSQL by the rows and pages that it reads, on SQLite by
the steps of its program.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy import Connection, event

from relay import metrics
from relay.dsn.generator import DsnGenerator
from relay.events.model import NewSubscription
from relay.events.outbox import FinishedEvent, Outbox, Report
from relay.events.subscriptions import Subscriptions
from relay.queue.outcome import Outcome
from relay.queue.rescue import Rescuer
from relay.spool.store import Spool
from tests.integration.harness import QueueHarness, new_message

WAITING = 1500  # rows of each kind
FEW = 40  # rows that a statement about one message may read in vain
PAGES = (
    400  # a claim touches up to 45 pages for a delivery, dead index entries included; a scan 1,500
)
STEPS = 6000
IDLE = {"idle": 10}


@pytest.fixture
def crowded(queue: QueueHarness) -> QueueHarness:
    """Overdue mail of a server that is down, retries far in the future, a long history, and `idle`,
    a route without mail."""
    overdue, ahead, done = (
        [new_message(f"dead:{n}@example.org") for n in range(WAITING)] for _ in range(3)
    )
    for messages in (overdue, ahead, done):
        queue.insert(messages)
    queue.change("UPDATE deliveries SET due_at = @ago(3600 * (1 + @chance))")
    for messages, state, due in ((ahead, "deferred", "@later(3000)"), (done, "delivered", "NULL")):
        first, last = messages[0].id, messages[-1].id
        queue.change(
            f"""UPDATE deliveries SET state = '{state}', due_at = {due}, claim_count = 1
            WHERE queue_id >= @id(:id) AND queue_id <= @id(:last)""",
            id=first,
            last=f"{last[:8]}-{last[8:12]}-{last[12:16]}-{last[16:20]}-{last[20:]}",
        )
    queue.change("UPDATE deliveries SET warn_at = @later(3600)")
    queue.change("ANALYZE")
    return queue


@contextmanager
def server_reply(queue: QueueHarness) -> Iterator[list[tuple[str, Any]]]:
    """The statements that run meanwhile, with their parameters."""
    statements: list[tuple[str, Any]] = []

    def record(
        _connection: Connection, _cursor: object, sql: str, parameters: Any, *_: object
    ) -> None:
        if not sql.startswith("BEGIN"):
            statements.append((sql, parameters))

    event.listen(queue.database, "before_cursor_execute", record)
    yield statements
    event.remove(queue.database, "before_cursor_execute", record)


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for below in plan.get("Plans", ()):
        yield from nodes(below)


def scans(queue: QueueHarness, statements: list[tuple[str, Any]]) -> list[str]:
    """The scans in those statements, whose cost grows with the queue."""
    found: list[str] = []
    with queue.database.connect() as connection:
        for sql, parameters in statements:
            scans_of = _scans_of_postgresql if queue.dialect.postgresql else _scans_of_sqlite
            found += scans_of(connection, sql, parameters)
            connection.rollback()
    return found


def _scans_of_postgresql(connection: Connection, sql: str, parameters: Any) -> Iterator[str]:
    explain = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql}"
    (made,) = connection.exec_driver_sql(explain, parameters).scalar_one()
    made = made if isinstance(made, dict) else json.loads(made)
    for node in nodes(made["Plan"]):
        in_vain = node.get("Rows Removed by Filter", 0) + node.get(
            "Rows Removed by Index Recheck", 0
        )
        if in_vain * node.get("Actual Loops", 1) > FEW:
            yield (
                f"{in_vain} rows in vain, {node['Node Type']} {node.get('Index Name', '')}: {sql}"
            )
    if (pages := made["Plan"]["Shared Hit Blocks"] + made["Plan"]["Shared Read Blocks"]) > PAGES:
        yield f"{pages} pages: {sql}"


def _scans_of_sqlite(connection: Connection, sql: str, parameters: Any) -> Iterator[str]:
    database: Any = connection.connection.driver_connection
    steps: list[int] = []
    database.set_progress_handler(lambda: steps.append(100), 100)
    connection.exec_driver_sql(sql, parameters).close()
    database.set_progress_handler(None, 0)
    if sum(steps) > STEPS:
        yield f"{sum(steps)} steps: {sql}"


def test_statements_of_a_message_scan_nothing_before_the_first_analyze(queue: QueueHarness) -> None:
    """Without statistics PostgreSQL may find it cheaper to join the whole queue with a few ids."""
    waiting = [new_message(f"dead:{n}@example.org") for n in range(WAITING)]
    queue.insert(waiting)
    with server_reply(queue) as statements:
        queue_id = queue.accept("idle:b@example.org")
        (claim,) = queue.claim(queue_id, capacity=IDLE)
        queue.complete(claim, Outcome.DELIVERED)
    assert not (found := scans(queue, statements)), "\n".join(found)


def test_statements_of_a_message_scan_nothing(crowded: QueueHarness) -> None:
    with server_reply(crowded) as statements:
        queue_id = crowded.accept("idle:b@example.org")
        (claim,) = crowded.claim(queue_id, capacity=IDLE)
        crowded.complete(claim, Outcome.DEFERRED)
        crowded.pass_time(60, only=[queue_id])
        assert crowded.rescuer.requeue_due(10) == {"idle": [queue_id]}
        (claim,) = crowded.claim(queue_id, capacity=IDLE)
        crowded.complete(claim, Outcome.DELIVERED)
        crowded.renew()
    assert len(statements) > 5
    assert not (found := scans(crowded, statements)), "\n".join(found)


def test_a_poll_of_a_route_without_mail_scans_nothing(crowded: QueueHarness) -> None:
    with server_reply(crowded) as statements:
        for _ in range(2):
            assert crowded.claim(capacity=IDLE) == []
    assert not (found := scans(crowded, statements)), "\n".join(found)


def test_a_poll_of_a_route_with_much_mail_reads_only_what_it_may_claim(
    crowded: QueueHarness,
) -> None:
    with server_reply(crowded) as statements:
        for _ in range(2):  # a claim itself touches some 20 pages
            assert len(crowded.claim(capacity={"dead": 5})) == 5
    assert not (found := scans(crowded, statements)), "\n".join(found)


def test_claim_of_events_reads_only_what_it_looks_at(queue: QueueHarness) -> None:
    """Beside messages whose older events wait for a receiver that is down."""
    Subscriptions(queue.database).register([NewSubscription("down"), NewSubscription("idle")])
    queue.insert([new_message() for _ in range(WAITING)])
    queue.change(
        """INSERT INTO notifications (queue_id, subscription, sequence, queued_at, due_at)
        SELECT queue_id, subscription, sequence + 100000, queued_at, due_at FROM notifications"""
    )
    queue.change("DELETE FROM notifications WHERE subscription = 'idle'")
    queue.change("ANALYZE")
    outbox = Outbox(queue.database)
    with server_reply(queue) as statements:
        claimed, _ = outbox.claim("down", 4)
        assert len(claimed) == 4
        outbox.finish("down", [FinishedEvent(one, Report.DONE) for one in claimed])
        assert outbox.claim("idle", 16) == ([], False)
    assert not (found := scans(queue, statements)), "\n".join(found)


def test_an_idle_sweep_scans_nothing(crowded: QueueHarness, tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.prepare(crowded.database, unsafe=True)
    settings = crowded.settings.model_copy(update={"delay_warning": 4 * 3600.0})
    rescuer, generator = (
        Rescuer(crowded.database, settings),
        DsnGenerator(crowded.database, spool, settings, lambda _: "idle"),
    )
    assert len(crowded.claim(crowded.accept("idle:b@example.org"), capacity=IDLE)) == 1
    with server_reply(crowded) as statements:
        rescuer.paused()
        assert rescuer.bring_near(10, 3600.0, ["dead", "idle"]) == 0
        assert rescuer.requeue_due(10) == {}
        assert rescuer.expire_stuck_transfers() == rescuer.rescue_unowned() == 0
        assert rescuer.expired_leases() == []
        assert generator.generate(10) == generator.warn(10) == []
        lease = str(
            crowded.rows("SELECT CAST(lease_expires_at AS text) AS lease_expires_at FROM workers")[
                0
            ]["lease_expires_at"]
        )
        assert rescuer.expire_worker(crowded.worker, lease) == 1
    assert len(statements) > 7
    assert not (found := scans(crowded, statements)), "\n".join(found)


def test_statements_on_waiting_mail_do_not_read_the_history(crowded: QueueHarness) -> None:
    with server_reply(crowded) as statements:
        assert crowded.rescuer.unknown_routes(["idle"]) == ["dead"]
        list(metrics.QueueMetrics(crowded.database, cast(Any, None)).collect())
    with crowded.database.connect() as connection:
        for sql, parameters in statements:
            explain = "EXPLAIN" if crowded.dialect.postgresql else "EXPLAIN QUERY PLAN"
            plan = str(connection.exec_driver_sql(f"{explain} {sql}", parameters).all())
            assert not re.search(r"Seq Scan on deliveries|SCAN deliveries(?! USING)", plan), plan
