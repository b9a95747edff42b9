"""Hints with a real broker: in batches, up to a limit, and without delay in an outage of the
broker."""

import base64
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from redis.connection import AbstractConnection

from relay.hint_entry import TASK
from relay.hints import FRESH, RETRY, WINDOW, Hints
from relay.ids import new_id
from relay.settings import Settings, load
from tests.services import Broker
from tests.waiting import until
from worker.celery_app import celery_app

BATCH = 8
KEY = "qmqp-relay:{}".format


@pytest.fixture
def hints(broker: Broker) -> Iterator[Callable[..., Hints]]:
    """Starts publishers to the broker, with ids that were offered before; they are closed at the
    end."""
    started: list[Hints] = []

    def start(queue: str = FRESH, *offers: tuple[list[str], str]) -> Hints:
        made = Hints(broker.url, queue, BATCH)
        for ids, route in offers:
            made.offer(ids, route)
        made.start()
        started.append(made)
        return made

    yield start
    broker.resume()
    for one in started:
        one.close()


def length(broker: Broker, queue: str = FRESH) -> int:
    return int(broker.ask("LLEN", KEY(queue))[1:])


def offered(publisher: Hints, queue_id: str, *, early: bool = False) -> bool:
    publisher.offer([queue_id], early=early)
    return True


def hinted(broker: Broker, queue: str = FRESH) -> list[list[str]]:
    """The ids of each hint in the list, the oldest first."""
    found = []
    for n in reversed(range(length(broker, queue))):
        raw = broker.ask("LINDEX", KEY(queue), str(n)).partition(b"\r\n")[2]
        message: dict[str, Any] = json.loads(raw)
        assert message["headers"]["task"] == TASK
        assert message["headers"].get("eta") is None, "nothing is scheduled in the broker"
        args, _, _ = json.loads(base64.b64decode(message["body"]))
        found.append(args[0][""])
    return found


def test_ids_offered_together_are_one_hint(broker: Broker, hints: Callable[..., Hints]) -> None:
    ids = [new_id() for _ in range(20)]
    publisher = hints()
    publisher.offer(ids)
    until(lambda: publisher.published == 3)
    assert hinted(broker) == [ids[:8], ids[8:16], ids[16:]]


def test_hint_groups_ids_by_route(broker: Broker, hints: Callable[..., Hints]) -> None:
    ids = [new_id() for _ in range(4)]
    publisher = hints(FRESH, (ids[:3], "default"), (ids[2:], "bulk"))
    until(lambda: publisher.published == 1)
    raw = broker.ask("LINDEX", KEY(FRESH), "0").partition(b"\r\n")[2]
    args, options, _ = json.loads(base64.b64decode(json.loads(raw)["body"]))
    assert args == [{"default": ids[:3], "bulk": ids[2:]}]
    assert options == {}
    publisher.offer(ids[:1], early=True)
    until(lambda: publisher.published == 2)
    raw = broker.ask("LINDEX", KEY(FRESH), "0").partition(b"\r\n")[2]
    _, options, _ = json.loads(base64.b64decode(json.loads(raw)["body"]))
    assert options == {"early": True}


def test_an_early_hint_is_sent_by_the_caller_if_nothing_else_is_under_way(
    broker: Broker, hints: Callable[..., Hints], monkeypatch: pytest.MonkeyPatch
) -> None:
    senders = list[str]()
    send = AbstractConnection.send_packed_command

    def noting(connection: AbstractConnection, command: Any, **options: Any) -> None:
        if any(b"LPUSH" in part for part in command):
            senders.append(threading.current_thread().name)
        send(connection, command, **options)  # type: ignore[no-untyped-call]

    monkeypatch.setattr("relay.broker._ANSWER_TIMEOUT", 60.0)
    monkeypatch.setattr(AbstractConnection, "send_packed_command", noting)
    publisher = hints()
    until(lambda: offered(publisher, new_id(), early=True) and "MainThread" in senders)
    broker.pause()
    before, ids = len(senders), [new_id() for _ in range(3 * BATCH)]
    for queue_id in ids:
        publisher.offer([queue_id], early=True)
    assert len(senders) <= before + 1, "no second one before an answer"
    broker.resume()
    until(lambda: {*ids} <= {*itertools.chain(*hinted(broker))})


def test_queues_are_separate(broker: Broker, hints: Callable[..., Hints]) -> None:
    one, two = new_id(), new_id()
    hints(FRESH).offer([one])
    hints(RETRY).offer([two])
    until(lambda: length(broker, FRESH) == length(broker, RETRY) == 1)
    assert (hinted(broker, FRESH), hinted(broker, RETRY)) == ([[one]], [[two]])


def test_long_list_stops_hints_until_it_is_shorter(
    broker: Broker, hints: Callable[..., Hints]
) -> None:
    broker.ask("RPUSH", KEY(FRESH), *("x" for _ in range(WINDOW + 1)))
    publisher = hints()
    until(lambda: publisher.full)
    publisher.offer([new_id()])
    broker.ask("DEL", KEY(FRESH))
    until(lambda: not publisher.full)
    assert length(broker) == 0, "what was offered meanwhile is left to SQL"
    publisher.offer([new_id()])
    until(lambda: length(broker) == 1)


@pytest.mark.parametrize("early", [False, True])
def test_refusing_broker_is_given_up_and_used_again(
    broker: Broker, hints: Callable[..., Hints], early: bool
) -> None:
    publisher = hints()
    publisher.offer([new_id()])
    until(lambda: publisher.published == 1)
    broker.kill()
    until(lambda: offered(publisher, new_id(), early=early) and publisher.away)
    many = [new_id() for _ in range(100_000)]
    began = time.monotonic()
    publisher.offer(many)
    assert time.monotonic() - began < 1.0
    broker.start()
    until(lambda: not publisher.away)
    last = new_id()
    until(lambda: offered(publisher, last) and (publisher.published > 1))
    until(lambda: any(last in batch for batch in hinted(broker)))


@pytest.mark.parametrize("early", [False, True])
def test_silent_broker_is_given_up_in_seconds(
    broker: Broker, hints: Callable[..., Hints], early: bool
) -> None:
    publisher = hints()
    publisher.offer([new_id()])
    until(lambda: publisher.published == 1)
    broker.pause()
    began = time.monotonic()
    publisher.offer([new_id()], early=early)
    assert time.monotonic() - began < 1.0, "offer does not wait"
    until(lambda: publisher.away)
    assert time.monotonic() - began < 6
    broker.resume()
    until(lambda: not publisher.away)
    until(lambda: offered(publisher, new_id()) and (publisher.published > 1))


def test_broker_may_start_later(broker: Broker, hints: Callable[..., Hints]) -> None:
    broker.stop()
    publisher = hints()
    until(lambda: publisher.away)
    broker.start()
    until(lambda: not publisher.away)
    until(lambda: offered(publisher, new_id()) and publisher.published)


def test_close_does_not_wait_for_a_silent_broker(
    broker: Broker, hints: Callable[..., Hints]
) -> None:
    publisher = hints()
    publisher.offer([new_id()])
    until(lambda: publisher.published == 1)
    broker.pause()
    publisher.offer([new_id()])
    began = time.monotonic()
    publisher.close()
    assert time.monotonic() - began < 2


def test_error_of_the_broker_does_not_end_hints(
    broker: Broker, hints: Callable[..., Hints]
) -> None:
    """A list of the wrong type, a broker out of memory: it answers, but with an error."""
    broker.ask("SET", KEY(FRESH), "not a list")
    publisher = hints()
    until(lambda: publisher.away)
    broker.ask("DEL", KEY(FRESH))
    until(lambda: not publisher.away)
    until(lambda: offered(publisher, new_id()) and publisher.published)
    assert length(broker) >= 1


def test_application_connects_only_on_use(broker: Broker) -> None:
    app = celery_app(load(Settings, broker_url="redis+socket:///nowhere/broker.sock"))
    assert app.conf.task_default_queue == FRESH
    assert not app.conf.task_acks_late
    assert app.conf.accept_content == ["json"]
