"""Each outcome writes its event, in the transaction that makes it, and only for who wants it."""

import json
from dataclasses import replace
from typing import Any

import pytest

from relay.dsn.generator import DsnGenerator
from relay.events.model import EventType, NewSubscription
from relay.events.outbox import EventFilter, Outbox
from relay.events.subscriptions import Subscriptions
from relay.queue.model import Attempt, Claim
from relay.queue.operations import OPERATIONS, QueueOperations
from relay.queue.outcome import Outcome
from relay.queue.states import State
from relay.report.filters import Filter
from relay.spool.store import Spool
from tests.integration.harness import QueueHarness, new_message
from tests.integration.test_cost_of_a_message import counted

ALL = NewSubscription("billing")


@pytest.fixture
def heard(queue: QueueHarness) -> QueueHarness:
    """A queue with one subscription, which wants all."""
    Subscriptions(queue.database).register([ALL])
    return queue


@pytest.fixture
def operations(queue: QueueHarness) -> QueueOperations:
    return QueueOperations(queue.database, sends_dsns=True)


def recorded(queue: QueueHarness) -> list[tuple[str, int]]:
    """Type and delivery of every event, in order."""
    return [(str(one.type), one.delivery) for one in events(queue)]


def events(queue: QueueHarness) -> list[Any]:
    return Outbox(queue.database).events(EventFilter(), most=1000)


def types(queue: QueueHarness) -> list[str]:
    return [kind for kind, _ in recorded(queue)]


def operate(operations: QueueOperations, name: str, queue_id: str) -> None:
    operations.apply(OPERATIONS[name], Filter(id=queue_id), actor="me@host", reason="because")


def give_back(queue: QueueHarness, claim: Claim) -> None:
    """End a claim without an attempt, as a worker that stops does."""
    completion = queue.completion(claim, Outcome.DEFERRED, state=State.QUEUED, attempts=[])
    queue.worker_queue.commit([replace(completion, outcome=None)])


def test_nothing_is_written_without_a_subscription(queue: QueueHarness) -> None:
    claim = queue.claim(queue.accept())[0]
    queue.complete(claim, Outcome.DELIVERED)
    assert queue.rows("SELECT * FROM events") == queue.rows("SELECT * FROM notifications") == []


def test_event_has_what_programs_need(heard: QueueHarness) -> None:
    queue_id = heard.accept(
        "b@example.org",
        "c@example.org",
        header_message_id="<1@example.com>",
        auth_user="ann",
        size=321,
    )
    claim = heard.claim(queue_id)[0]
    heard.complete(claim, Outcome.DEFERRED, reply="busy", delay=60.0)
    accepted, deferred = events(heard)
    assert accepted.id == f"{queue_id}-1"
    payload = deferred.payload()
    assert payload["type"] == "deferred"
    assert payload["timestamp"].endswith("Z")
    data = payload["data"]
    assert json.loads(json.dumps(payload)) == payload
    expected = {
        "version": 1,
        "queue_id": queue_id,
        "delivery": 1,
        "message_id": "<1@example.com>",
        "sender": "a@example.com",
        "recipients": ["b@example.org", "c@example.org"],
        "route": "default",
        "server": "qmqp.example.net:628",
        "attempt": 1,
        "outcome": "deferred",
        "reply": "busy",
        "reason_source": "server",
        "size": 321,
        "user": "ann",
        "client_address": "192.0.2.1",
    }
    assert {name: data[name] for name in expected} == expected
    assert data["next_attempt_at"] > data["received_at"]
    assert accepted.payload()["data"]["attempt"] is None


@pytest.mark.parametrize(
    ("outcome", "written"),
    [
        (Outcome.DELIVERED, ["delivered"]),
        (Outcome.DEFERRED, ["deferred"]),
        (Outcome.REJECTED, ["bounced"]),
        (Outcome.UNREACHABLE, ["deferred"]),
        (Outcome.UNCERTAIN, ["uncertain"]),
        (Outcome.UNSENDABLE, ["held"]),
    ],
)
def test_outcome_of_an_attempt(heard: QueueHarness, outcome: Outcome, written: list[str]) -> None:
    heard.complete(heard.claim(heard.accept())[0], outcome)
    assert types(heard) == ["accepted", *written]


@pytest.mark.parametrize(("sent", "written"), [(99, "deferred"), (100, "uncertain")])
def test_malformed_reply_is_uncertain_after_the_whole_request(
    heard: QueueHarness, sent: int, written: str
) -> None:
    attempt = Attempt(1, "mx:628", Outcome.MALFORMED, "what", sent, 0.5, 0.1)
    claim = heard.claim(heard.accept())[0]
    heard.complete(claim, Outcome.MALFORMED, attempts=[attempt])
    assert types(heard) == ["accepted", written]


def test_uncertain_attempt_that_is_held_or_expires_is_two_events(heard: QueueHarness) -> None:
    heard.complete(heard.claim(heard.accept())[0], Outcome.UNCERTAIN, state=State.HELD)
    queue_id = heard.accept()
    heard.pass_time(2000.0, only=[queue_id])
    heard.complete(heard.claim(queue_id)[0], Outcome.UNCERTAIN)
    assert types(heard) == ["accepted", "uncertain", "held", "accepted", "uncertain", "expired"]


def test_failure_after_the_lifetime_is_expired(heard: QueueHarness) -> None:
    queue_id = heard.accept()
    heard.pass_time(2000.0, only=[queue_id])
    heard.complete(heard.claim(queue_id)[0], Outcome.DEFERRED)
    assert types(heard) == ["accepted", "expired"]


def test_delivery_of_a_lost_worker_is_uncertain(heard: QueueHarness) -> None:
    heard.claim(heard.accept())
    heard.pass_time(100.0)
    heard.expire_worker(heard.worker)
    assert types(heard) == ["accepted", "uncertain"]


def test_requeued_delivery_is_no_event(heard: QueueHarness) -> None:
    claim = heard.claim(heard.accept())[0]
    give_back(heard, claim)
    heard.claim(claim.queue_id)
    assert types(heard) == ["accepted"]


@pytest.mark.parametrize(
    ("names", "written"),
    [(["hold", "release"], ["held"]), (["bounce"], ["bounced"]), (["drop"], ["dropped"])],
)
def test_operation_of_an_operator(
    heard: QueueHarness, operations: QueueOperations, names: list[str], written: list[str]
) -> None:
    queue_id = heard.accept()
    for name in names:
        operate(operations, name, queue_id)
    assert types(heard) == ["accepted", *written]
    assert events(heard)[1].reason_source == "operator"


@pytest.mark.parametrize(
    ("name", "written"), [("hold", "held"), ("drop", "dropped"), ("bounce", "bounced")]
)
def test_pending_operation_writes_its_event_when_it_applies(
    heard: QueueHarness, operations: QueueOperations, name: str, written: str
) -> None:
    claim = heard.claim(heard.accept())[0]
    operate(operations, name, claim.queue_id)
    assert types(heard) == ["accepted"]
    heard.complete(claim, Outcome.DEFERRED)
    assert types(heard) == ["accepted", written]


def test_retry_of_an_uncertain_delivery_is_uncertain_all_the_same(
    heard: QueueHarness, operations: QueueOperations
) -> None:
    claim = heard.claim(heard.accept())[0]
    operate(operations, "retry", claim.queue_id)
    heard.complete(claim, Outcome.UNCERTAIN)
    assert heard.state(claim.queue_id) == "queued"
    again = heard.claim(claim.queue_id)[0]
    operate(operations, "hold", claim.queue_id)
    give_back(heard, again)
    assert types(heard) == ["accepted", "uncertain", "held"], "once for each attempt"


def test_late_K_is_delivered(heard: QueueHarness) -> None:
    claim = heard.claim(heard.accept())[0]
    heard.pass_time(100.0)
    heard.expire_worker(heard.worker)
    heard.complete(claim, Outcome.DELIVERED)
    assert types(heard) == ["accepted", "uncertain", "delivered"]


def test_split_is_written_once_with_the_recipients_of_then(heard: QueueHarness) -> None:
    claim = heard.claim(heard.accept("a@x.test", "b@x.test", "c@x.test"))[0]
    heard.complete(claim, Outcome.REJECTED, state=State.SPLIT, reply="5.1.1 no")
    for child in heard.claim(claim.queue_id):
        heard.complete(child, Outcome.DELIVERED)
    assert recorded(heard) == [
        ("accepted", 1),
        ("split", 1),
        ("delivered", 2),
        ("delivered", 3),
    ]
    recipients = [one.recipients for one in events(heard)]
    whole = ("a@x.test", "b@x.test", "c@x.test")
    assert recipients == [whole, whole, whole[:2], whole[2:]]


def test_delivery_that_cannot_be_split_only_bounces(heard: QueueHarness) -> None:
    claim = heard.claim(heard.accept("a@x.test"))[0]
    heard.complete(claim, Outcome.REJECTED, state=State.SPLIT, reply="5.1.1 no")
    assert types(heard) == ["accepted", "bounced"]


def test_message_with_two_routes_is_accepted_for_each(heard: QueueHarness) -> None:
    heard.accept("one:a@x.test", "two:b@x.test", "one:c@x.test")
    found = [(one.route, one.recipients) for one in events(heard)]
    assert found == [("one", ("a@x.test", "c@x.test")), ("two", ("b@x.test",))]


def test_message_that_is_accepted_on_hold_is_also_held(heard: QueueHarness) -> None:
    from relay.db.engine import writing
    from relay.queue.accept import EncodedMessage, encode

    message = EncodedMessage(encode(new_message()))
    with writing(heard.database) as connection:
        heard.acceptor.insert_held(connection, [message], None, age=0.0, reason="a plugin")
    assert types(heard) == ["accepted", "held"]
    assert events(heard)[1].reply == "a plugin"


def test_delay_warning_is_an_event(queue: QueueHarness, spool: Spool) -> None:
    url = queue.database.url.render_as_string(hide_password=False)
    late = QueueHarness(url, delay_warning="10s", spool_dir=spool.directory)
    Subscriptions(late.database).register([ALL])
    spool.prepare(late.database, unsafe=True)
    generator = DsnGenerator(late.database, spool, late.settings, lambda _: "default")
    late.accept("b@example.org")
    silent = late.accept("c@example.org", client_trusted=False, sender="list-@host-@[]")
    late.pass_time(20.0)
    assert len(generator.warn(10)) == 1
    found = [(str(one.type), one.queue_id == silent) for one in events(late)]
    assert found == [
        ("accepted", False),
        ("accepted", True),
        ("accepted", False),  # the warning itself
        ("warned", False),
    ]
    late.close()


def test_subscription_gets_its_types_and_routes_alone(queue: QueueHarness) -> None:
    bounced, far, everything = (EventType.BOUNCED,), ("far",), ()
    Subscriptions(queue.database).register(
        [
            NewSubscription("bounces", bounced),
            NewSubscription("far", everything, far),
            NewSubscription("far bounces", bounced, far),
        ]
    )
    near, distant = queue.accept("b@x.test"), queue.accept("far:b@x.test")
    capacity = {"default": 9, "far": 9}
    for claim in queue.claim(near, distant, capacity=capacity):
        queue.complete(claim, Outcome.REJECTED)
    rows = queue.rows(
        """SELECT n.subscription, e.type, e.route FROM notifications n
        JOIN events e ON e.sequence = n.sequence ORDER BY 1, 2, 3"""
    )
    assert [tuple(row.values()) for row in rows] == [
        ("bounces", "bounced", "default"),
        ("bounces", "bounced", "far"),
        ("far", "accepted", "far"),
        ("far", "bounced", "far"),
        ("far bounces", "bounced", "far"),
    ]
    assert types(queue) == ["accepted", "bounced", "bounced"], "what none wants is not recorded"


def test_disabled_subscription_gets_nothing_new(heard: QueueHarness) -> None:
    subscriptions = Subscriptions(heard.database)
    heard.accept()
    assert subscriptions.disable("billing", "410")
    heard.accept()
    assert len(types(heard)) == 1
    assert subscriptions.enable("billing", actor="me")
    heard.accept()
    assert len(types(heard)) == 2


def test_events_cost_no_statement_and_no_commit(heard: QueueHarness) -> None:
    messages = [new_message() for _ in range(8)]
    statements = 1 if heard.database.dialect.name == "postgresql" else 4
    with counted(heard.database) as counts:
        heard.insert(messages)
    assert counts == {"statements": statements, "commits": 1}
    claims = heard.claim(*(message.id for message in messages))
    completions = [heard.completion(claim, Outcome.DELIVERED) for claim in claims]
    with counted(heard.database) as counts:
        heard.worker_queue.commit(completions)
    assert counts == {"statements": 1 if statements == 1 else 2, "commits": 1}
    assert sorted(types(heard)) == ["accepted"] * 8 + ["delivered"] * 8


def test_event_of_a_transaction_that_fails_is_not_written(heard: QueueHarness) -> None:
    from relay.db.engine import writing

    def insert_and_fail() -> None:
        with writing(heard.database) as connection:
            heard.acceptor.insert(connection, [new_message()])
            raise ValueError("after the statement")

    with pytest.raises(ValueError, match="after"):
        insert_and_fail()
    assert types(heard) == []
