"""The queue's metrics equal the tables, on both databases, and report an outage of the database."""

from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, CollectorRegistry
from sqlalchemy import text

from relay import metrics
from relay.db import engine as database
from relay.ids import dashed, new_id
from relay.metrics import QueueMetrics
from relay.queue.accept import Acceptor, NewMessage, NewRecipient
from relay.queue.claim import WorkerQueue
from relay.queue.model import Attempt, ClaimRequest, Completion
from relay.queue.operations import QueueOperations
from relay.queue.outcome import Outcome
from relay.queue.states import State
from relay.settings import Settings, WorkerSettings, load
from relay.spool.store import Spool
from relay.version import running_version
from tests.integration.harness import opened
from tests.services import Postgres
from tests.waiting import until


def scrape(queue: QueueMetrics) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(queue)
    return registry


def message(queue_id: str) -> NewMessage:
    return NewMessage(
        queue_id, "a@example.com", 4, [NewRecipient("b@example.org")], "::1", "c.example", "ESMTP"
    )


def test_metrics_equal_the_tables(database_url: str, tmp_path: Path):
    settings = WorkerSettings(database_url=database_url, grace=0.001)
    engine = database.connect(database_url, hot=True)
    ids = sorted(new_id() for _ in range(6))
    with database.writing(engine) as connection:
        Acceptor(engine, lifetime=1e6, grace=1000).insert(connection, [message(i) for i in ids])
    worker = new_id()
    worker_queue = WorkerQueue(engine, settings)
    worker_queue.register(worker, "host", 1)
    (claims,) = worker_queue.commit([ClaimRequest(worker, ids[:5], {"default": 5})])
    assert isinstance(claims, list)
    wanted = [
        (State.DEFERRED, Outcome.UNCERTAIN, -60.0),
        (State.DEFERRED, Outcome.DEFERRED, 600.0),
        (State.HELD, Outcome.UNSENDABLE, 0.0),
        (State.BOUNCED, Outcome.REJECTED, 0.0),
    ]
    worker_queue.commit(
        [
            Completion(
                worker,
                claim.queue_id,
                claim.number,
                claim.claim,
                state,
                outcome,
                "words",
                delay=delay,
                attempts=[Attempt(1, "mx:628", outcome, "words", 9, 2.0, 1.0)],
            )
            for claim, (state, outcome, delay) in zip(claims[:4], wanted, strict=True)
        ]
    )
    with database.writing(engine) as connection:
        earlier = (
            "received_at - interval '1 hour'"
            if "postgresql" in database_url
            else "received_at - 3600000000"
        )
        connection.execute(
            text(f"UPDATE messages SET received_at = {earlier} WHERE id = :id"),
            {"id": dashed(ids[0])},
        )
    operations = QueueOperations(engine, sends_dsns=True)
    for subject in ("server:mx:628", "route:gone", "route:other"):
        operations.pause(subject, actor="me", reason="")
    operations.resume("route:gone", actor="me", reason="")
    seen = scrape(QueueMetrics(engine, Spool(tmp_path))).get_sample_value

    def by_state(name: str) -> dict[str, float | None]:
        return {
            s: seen(f"relay_{name}", {"state": s})
            for s in ("queued", "sending", "deferred", "held")
        }

    assert seen("relay_database_up") == 1
    assert by_state("deliveries") == {"queued": 1, "sending": 1, "deferred": 2, "held": 1}
    assert by_state("overdue") == {"queued": 0, "sending": 0, "deferred": 1, "held": 0}
    assert by_state("oldest_age_seconds")["deferred"] == pytest.approx(3600, abs=120)
    assert by_state("oldest_age_seconds")["queued"] == pytest.approx(0, abs=120)
    assert seen("relay_deliveries", {"state": "bounced"}) is None
    assert seen("relay_dsns_pending") == 1
    assert seen("relay_workers_alive") == 1
    assert seen("relay_uncertain_attempts") == 1
    paused = [
        seen("relay_paused", {"subject": one})
        for one in ("server:mx:628", "route:other", "route:gone")
    ]
    assert paused == [1, 1, None]
    engine.dispose()


def test_expiring_mail_and_failing_servers_are_counted(database_url: str, tmp_path: Path):
    with opened(database_url) as mail:  # it expires in 1000 seconds
        mail.accept("waits@example.org")
        mail.claim(mail.accept("sent@example.org"))
        mail.rescuer.publish_open_circuits(mail.worker, {"mx:628": "refused"})
        mail.change("UPDATE open_circuits SET since = @ago(600)")
        gone = mail.register_worker()
        mail.rescuer.publish_open_circuits(gone, {"old:628": "refused"})
        mail.worker_queue.retire(gone)
        seen = scrape(QueueMetrics(mail.database, Spool(tmp_path))).get_sample_value
        assert seen("relay_expiring_soon") == 1, "a transfer is not waiting"
        assert seen("relay_failing_seconds", {"server": "mx:628"}) == pytest.approx(660, abs=60)
        assert seen("relay_failing_seconds", {"server": "old:628"}) is None


def test_each_process_tells_its_version(free_port: Callable[[], int]):
    stop = metrics.serve(load(Settings, metrics_listen=f"127.0.0.1:{free_port()}"))
    stop()
    value = REGISTRY.get_sample_value("relay_build_info", {"version": running_version()})
    assert value == 1


def test_empty_queue_has_zeros(database_url: str, tmp_path: Path):
    engine = database.connect(database_url)
    seen = scrape(QueueMetrics(engine, Spool(tmp_path))).get_sample_value
    assert [seen("relay_deliveries", {"state": "held"}), seen("relay_workers_alive")] == [0, 0]
    assert seen("relay_broker_list_length", {"queue": "fresh"}) is None
    engine.dispose()


def test_outage_of_the_database_is_reported(
    postgres_url: str, postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(metrics, "MIN_INTERVAL", 0.0)
    engine = database.connect(postgres_url)
    queue = QueueMetrics(engine, Spool(tmp_path), lambda: {"fresh": 3})

    def says(up: int) -> bool:
        seen = scrape(queue).get_sample_value
        assert seen("relay_broker_list_length", {"queue": "fresh"}) == 3
        return seen("relay_database_up") == up

    until(lambda: says(1))
    postgres.stop()
    until(lambda: says(0))
    assert scrape(queue).get_sample_value("relay_workers_alive") is None
    postgres.start()
    until(lambda: says(1))
    engine.dispose()
