"""The consumer with a real Valkey and a real worker: entries that are no hints do no harm."""

import base64
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from kombu import Connection, Exchange, Queue

from qmqp.sink import running_sink
from relay.hint_entry import Hint, entry_of
from relay.hints import FRESH, Hints
from relay.ids import new_id
from relay.settings import WorkerSettings, load
from tests import services
from tests.integration.test_worker_app import WorkerProcesses, processes
from tests.services import Broker
from tests.waiting import until
from worker.celery_app import celery_app
from worker.consumer import LARGEST, TAKE_EARLY, Transport

__all__ = ["processes"]
LIST = "qmqp-relay:fresh"
PLENTY = {"GRACE": "10m", "LEASE": "1m"}  # so that only a hint can be the reason


def hint(home: WorkerProcesses, ids: list[str]) -> None:
    hints = Hints(home.mail.settings.broker_url, FRESH, 64)
    hints.start()
    hints.offer(ids)
    until(lambda: hints.published == 1, 10)
    hints.close()


def peak(pid: int) -> int:
    """The most memory that a process has had (KiB)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def bomb() -> str:
    """A hint whose body would be 300 MB."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(300)) + packer.flush()
    made = json.loads(entry_of(Hint({"": [new_id()]}), FRESH))
    made["headers"]["compression"] = "application/x-gzip"
    return json.dumps(made | {"body": base64.b64encode(packed).decode()})


def started(home: WorkerProcesses, **given: str) -> Any:
    """A worker that consumes."""
    worker = home.start(**PLENTY, **given)
    first = home.mail.accept()
    hint(home, [first])
    until(lambda: home.mail.state(first) == "delivered", 30, what=home.said)
    return worker


def test_garbage_neither_ends_a_worker_nor_delays_a_hint(
    processes: Callable[..., WorkerProcesses], broker: Broker
) -> None:
    with running_sink() as sink:
        home = processes(sink.port, broker.url, grace=600.0)
        worker = started(home)
        wrong = entry_of(Hint({"": ["x" * 32]}), FRESH).decode()
        many = entry_of(Hint({"": [new_id() for _ in range(65)]}), FRESH).decode()
        kinds = [
            "garbage",
            '{"properties": {}}',
            "[]",
            "[" * 5000,
            wrong,
            many,
            '{"headers": {"task": "x"}}',
        ]
        for start in range(0, 1300, 100):
            broker.ask("LPUSH", LIST, *(kinds[n % len(kinds)] for n in range(start, start + 100)))
        queue_id = home.mail.accept()
        broker.ask("LPUSH", LIST, entry_of(Hint({"": [queue_id]}), FRESH).decode())
        until(lambda: home.mail.state(queue_id) == "delivered", 20, what=home.said)
        assert worker.poll() is None
        assert "hints refused" in home.said()
        assert home.mail.rows("SELECT count(*) AS n FROM workers") == [{"n": 1}]
        assert services.end(worker) == 0


def test_a_compressed_bomb_takes_no_memory(
    processes: Callable[..., WorkerProcesses], broker: Broker
) -> None:
    with running_sink() as sink:
        home = processes(sink.port, broker.url, grace=600.0)
        worker = started(home)
        before = peak(worker.pid)
        broker.ask("LPUSH", LIST, bomb())
        queue_id = home.mail.accept()
        hint(home, [queue_id])
        until(lambda: home.mail.state(queue_id) == "delivered", 10, what=home.said)
        assert peak(worker.pid) - before < 20_000
        assert services.end(worker) == 0


def test_a_consumer_that_fails_starts_again_and_the_engine_goes_on(
    processes: Callable[..., WorkerProcesses], broker: Broker
) -> None:
    """A key of another kind in the place of the list is an error that Celery does not recover from
    by itself."""
    with running_sink() as sink:
        home = processes(sink.port, broker.url)
        worker = started(home)
        broker.ask("SET", LIST, "no list")
        until(lambda: "consumer failed" in home.said(), 20, what=home.said)
        overdue = home.mail.accept()
        home.mail.change("UPDATE deliveries SET due_at = @ago(1) WHERE queue_id = :id", id=overdue)
        until(lambda: home.mail.state(overdue) == "delivered", 10, what=home.said)
        broker.ask("DEL", LIST)
        queue_id = home.mail.accept()
        home.mail.change(
            "UPDATE deliveries SET due_at = @later(600) WHERE queue_id = :id", id=queue_id
        )
        hint(home, [queue_id])
        until(lambda: home.mail.state(queue_id) == "delivered", 20, what=home.said)
        assert worker.poll() is None
        assert services.end(worker) == 0


def test_an_early_hint_is_taken_before_celery_makes_a_task(broker: Broker) -> None:
    """The engine gets it while the entry is read. One that it does not take becomes a task."""
    taken, tasks = list[Hint](), list[Any]()
    ids = [new_id() for _ in range(4)]

    def take(hint: Hint, queue: str) -> bool:
        assert queue == FRESH
        taken.append(hint)
        return hint.ids[""] == [ids[0]]

    options = celery_app(load(WorkerSettings, broker_url=broker.url)).conf.broker_transport_options
    options = options | {LARGEST: 64, TAKE_EARLY: take}
    early = [Hint({"": [queue_id]}, early=True) for queue_id in ids[:2]]
    hints = [*early, Hint({"": ids[2:3]}), Hint({"": ids[3:]})]
    broker.ask("LPUSH", LIST, *(entry_of(hint, FRESH).decode() for hint in hints))
    with Connection(broker.url, transport_options=options) as connection:
        connection.transport_cls = Transport
        queue = Queue(FRESH, exchange=Exchange("mail"), routing_key=FRESH)
        with connection.Consumer(queue, callbacks=[lambda body, _: tasks.append(body)]):
            for _ in hints[1:]:
                connection.drain_events(timeout=10)
    assert taken == early
    assert [body[0] for body in tasks] == [[hint.ids] for hint in hints[1:]]


@pytest.mark.parametrize("allowed", [True, False])
def test_no_remote_command_stops_consuming(
    processes: Callable[..., WorkerProcesses], broker: Broker, allowed: bool
) -> None:
    with running_sink() as sink:
        home = processes(sink.port, broker.url, grace=600.0)
        worker = started(home, REMOTE_CONTROL=str(allowed).lower())
        with Celery(broker=broker.url, set_as_current=False) as app:
            app.conf.broker_transport_options = celery_app(
                home.mail.settings
            ).conf.broker_transport_options
            answers = app.control.cancel_consumer(
                FRESH, reply=True, timeout=10 if allowed else 0.5, limit=1
            )
        assert len(answers) == allowed
        queue_id = home.mail.accept()
        hint(home, [queue_id])
        until(lambda: home.mail.state(queue_id) == "delivered", 10, what=home.said)
        assert ("consumer not cancelled" in home.said()) == allowed
        assert services.end(worker) == 0
