"""Events reach webhooks at least once, signed, in order for each message, whatever the receiver
does."""

import asyncio
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from relay.events.outbox import EventFilter, FinishedEvent, Outbox, Report
from relay.events.subscriptions import Subscriptions
from relay.events.webhooks import load_webhooks
from relay.queue.outcome import Outcome
from relay.settings import WorkerSettings, load
from tests.integration.harness import QueueHarness
from tests.integration.webhook_receiver import (
    OK,
    OTHER_SECRET,
    SECRET,
    Reply,
    WebhookReceiver,
    running_receiver,
)
from tests.waiting import until
from worker import notifier as module
from worker import webhook_client
from worker.notifier import CONCURRENCY, TRIES, Notifier
from worker.webhook_client import WebhookClient


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses so short that no test waits for one."""
    monkeypatch.setattr(module, "POLL_INTERVAL", 0.02)
    monkeypatch.setattr(module, "GATHER", 0.005)
    monkeypatch.setattr(module, "DELAYS", (0.01,) * (TRIES - 1))
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.02)


class Mail:
    """A queue whose events one webhook gets."""

    def __init__(self, queue: QueueHarness, receiver: WebhookReceiver, directory: Path) -> None:
        self.queue, self.receiver, self.directory = queue, receiver, directory
        self.subscriptions = Subscriptions(queue.database)
        self.outbox = Outbox(queue.database)
        self.use("")

    def use(self, extra: str) -> None:
        """Write the file of webhooks with more keys, and register it as a worker does."""
        file = self.receiver.write_file(self.directory, extra)
        self.webhooks = load_webhooks(load(WorkerSettings, webhooks=file))
        self.subscriptions.register([webhook.subscription for webhook in self.webhooks])

    def deliver(self, count: int = 1) -> list[str]:
        """Accept messages, defer them once and deliver them: three events each."""
        ids = [self.queue.accept() for _ in range(count)]
        for outcome in (Outcome.DEFERRED, Outcome.DELIVERED):
            for claim in self.queue.claim(*ids):
                self.queue.complete(claim, outcome)
            self.queue.change("UPDATE deliveries SET state = 'queued' WHERE state = 'deferred'")
        return ids

    @contextmanager
    def notifying(self) -> Iterator[Notifier]:
        """A notifier of one worker."""
        started = Notifier(
            self.outbox,
            self.subscriptions,
            lambda: [WebhookClient(one, connections=CONCURRENCY) for one in self.webhooks],
        )
        started.start()
        try:
            yield started
        finally:
            started.close()
            started.join(20)
            assert not started.is_alive()

    def pending(self) -> int:
        return int(self.queue.rows("SELECT count(*) AS n FROM notifications")[0]["n"])

    def until_done(self) -> None:
        until(lambda: not self.pending(), 20, what=lambda: str(self.receiver.received[-3:]))

    def subscription(self) -> Any:
        (one,) = self.subscriptions.all()
        return one


@pytest.fixture
def receiver() -> Iterator[WebhookReceiver]:
    with running_receiver() as receiver:
        yield receiver


@pytest.fixture
def mail(queue: QueueHarness, receiver: WebhookReceiver, tmp_path: Path) -> Mail:
    return Mail(queue, receiver, tmp_path)


def by_message(receiver: WebhookReceiver) -> dict[str, list[str]]:
    """The types that each message had, in the order of arrival."""
    found = defaultdict[str, list[str]](list)
    for one in receiver.firsts():
        found[one.data["queue_id"]].append(one.type)
    return found


def test_events_arrive_signed_and_in_order_over_kept_connections(mail: Mail) -> None:
    ids = mail.deliver(20)
    with mail.notifying():
        mail.until_done()
    receiver = mail.receiver
    assert by_message(receiver) == {one: ["accepted", "deferred", "delivered"] for one in ids}
    assert len(receiver.received) == 60
    assert receiver.invalid == receiver.overlapping == []
    assert receiver.connections <= CONCURRENCY
    assert mail.subscription().succeeded_at
    done = REGISTRY.get_sample_value(
        "relay_notifications_total", {"subscription": "billing", "result": "delivered"}
    )
    assert done is not None
    assert done >= 60


def test_one_message_has_one_request_at_a_time_for_several_workers(mail: Mail) -> None:
    pause = threading.Event()
    mail.receiver.answer = lambda _id, _data: (pause.wait(0.002), (200, OK))[1]
    ids = mail.deliver(15)
    with mail.notifying(), mail.notifying(), mail.notifying():
        mail.until_done()
    assert mail.receiver.overlapping == []
    assert by_message(mail.receiver) == {one: ["accepted", "deferred", "delivered"] for one in ids}


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param((500, OK), id="500"),
        pytest.param((404, OK), id="404"),
        pytest.param((302, {"location": "http://127.0.0.1:1/"}), id="302"),
        pytest.param((429, {"retry-after": "0"}), id="429"),
        pytest.param((503, {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}), id="503"),
        pytest.param((503, {"retry-after": "nonsense"}), id="503 nonsense"),
        pytest.param(None, id="closed"),
    ],
)
def test_failed_try_is_repeated_with_the_same_id_and_later_events_wait(
    mail: Mail, failure: Reply | None
) -> None:
    failed = list[str]()

    def fail_first(event_id: str, data: dict[str, Any]) -> Reply | None:
        if data["type"] == "deferred" and len(failed) < 3:
            failed.append(event_id)
            return failure
        return 200, OK

    mail.receiver.answer = fail_first
    (queue_id,) = mail.deliver()
    with mail.notifying():
        mail.until_done()
    assert len(set(failed)) == 1
    assert [one.type for one in mail.receiver.received] == [
        "accepted",
        *["deferred"] * 4,
        "delivered",
    ]
    assert by_message(mail.receiver) == {queue_id: ["accepted", "deferred", "delivered"]}
    assert mail.subscription().failing_at is None


def test_event_that_fails_does_not_stop_other_messages(mail: Mail) -> None:
    bad, good = mail.deliver(2)
    mail.receiver.answer = lambda _id, data: (400 if data["queue_id"] == bad else 200, OK)
    with mail.notifying():
        mail.until_done()
    assert by_message(mail.receiver) == {good: ["accepted", "deferred", "delivered"]}
    tries = [one.type for one in mail.receiver.received if one.data["queue_id"] == bad]
    assert tries == ["accepted"] * TRIES + ["deferred"] * TRIES + ["delivered"] * TRIES


def test_receiver_that_is_gone_is_disabled_until_an_operator_enables_it(mail: Mail) -> None:
    mail.receiver.answer = lambda _id, _data: (410, OK)
    (queue_id,) = mail.deliver()
    with mail.notifying():
        until(lambda: mail.subscription().disabled_at)
        assert "410" in mail.subscription().disabled_reason
        mail.deliver()
        assert mail.pending() == 3, "nothing new is recorded for it"
        mail.receiver.answer = lambda _id, _data: (200, OK)
        mail.subscriptions.enable("billing", actor="me")
        mail.until_done()
    assert by_message(mail.receiver) == {queue_id: ["accepted", "deferred", "delivered"]}


def test_receiver_that_was_down_gets_what_waited_with_the_next_event(
    mail: Mail, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DELAYS", (3600.0,) * (TRIES - 1))
    monkeypatch.setattr(module, "OUTAGE", 0.0)
    mail.receiver.answer = lambda _id, _data: (503, OK)
    mail.deliver(5)
    with mail.notifying():
        until(lambda: len(mail.receiver.received) >= 3)
        until(lambda: mail.subscription().last_error == "HTTP 503")
        mail.receiver.answer = lambda _id, _data: (200, OK)
        mail.queue.accept()
        mail.until_done()
    assert len(mail.receiver.firsts()) == 16


def test_event_that_alone_fails_keeps_its_delays_when_others_arrive(
    mail: Mail, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DELAYS", (3600.0,) * (TRIES - 1))
    monkeypatch.setattr(module, "OUTAGE", 0.0)
    (bad,) = mail.deliver()
    mail.receiver.answer = lambda _id, data: (400 if data["queue_id"] == bad else 200, OK)
    with mail.notifying():
        until(lambda: mail.subscription().last_error == "HTTP 400")
        for _ in range(3):
            mail.queue.accept()
            until(lambda: mail.pending() == 3)
    assert [one.type for one in mail.receiver.received if one.data["queue_id"] == bad] == [
        "accepted"
    ]


def test_one_event_at_a_time_is_tried_while_a_receiver_fails(mail: Mail) -> None:
    mail.receiver.answer = lambda _id, _data: (503, OK)
    mail.deliver(40)
    with mail.notifying():
        until(lambda: len(mail.receiver.received) >= CONCURRENCY + 10)
    mail.receiver.most_at_once = 0
    with mail.notifying():
        until(lambda: mail.receiver.most_at_once)
        seen = len(mail.receiver.received)
        until(lambda: len(mail.receiver.received) > seen + CONCURRENCY)
        mail.receiver.most_at_once = 0
        until(lambda: len(mail.receiver.received) > seen + CONCURRENCY + 5)
    assert mail.receiver.most_at_once == 1


def test_slow_receiver_holds_few_events(mail: Mail) -> None:
    go_on = threading.Event()
    mail.receiver.answer = lambda _id, _data: (go_on.wait(20), (200, OK))[1]
    mail.deliver(2 * CONCURRENCY)
    with mail.notifying():
        until(lambda: mail.receiver.most_at_once == CONCURRENCY)
        claimed = mail.queue.rows("SELECT count(*) AS n FROM notifications WHERE claim IS NOT NULL")
        assert claimed[0]["n"] == CONCURRENCY
        go_on.set()
        mail.until_done()
    assert mail.receiver.most_at_once == CONCURRENCY


def test_receiver_that_does_not_reply_is_given_up_after_the_timeout(
    mail: Mail, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook_client, "TIMEOUT", 0.2)
    go_on, stalled = threading.Event(), list[str]()

    def stall(event_id: str, _data: dict[str, Any]) -> Reply:
        if not stalled:
            stalled.append(event_id)
            go_on.wait(20)
        return 200, OK

    mail.receiver.answer = stall
    mail.queue.accept()
    with mail.notifying():
        mail.until_done()
        go_on.set()
        # A try after the one that stalled may take longer than 0.2 s, too.
        until(lambda: len(mail.receiver.received) >= 2)
    assert {one.id for one in mail.receiver.received} == {*stalled}


def test_claim_of_a_worker_that_died_is_taken_over(
    mail: Mail, monkeypatch: pytest.MonkeyPatch
) -> None:
    (queue_id,) = mail.deliver()
    claimed, _ = mail.outbox.claim("billing", 16)
    assert [str(one.event.type) for one in claimed] == ["accepted"], "the oldest of the message"
    assert mail.outbox.claim("billing", 16)[0] == []
    mail.queue.change("UPDATE notifications SET due_at = @ago(1) WHERE claim IS NOT NULL")
    with mail.notifying():
        mail.until_done()
    assert by_message(mail.receiver) == {queue_id: ["accepted", "deferred", "delivered"]}


def test_event_that_was_posted_and_not_recorded_comes_again_with_its_id(mail: Mail) -> None:
    mail.deliver()
    (claimed,), _ = mail.outbox.claim("billing", 16)

    async def post_and_die() -> None:
        client = WebhookClient(mail.webhooks[0], connections=1)
        assert not (await client.send(claimed.event)).error
        await client.close()

    asyncio.run(post_and_die())
    mail.queue.change("UPDATE notifications SET due_at = @ago(1) WHERE claim IS NOT NULL")
    with mail.notifying():
        mail.until_done()
    ids = [one.id for one in mail.receiver.received]
    assert ids[0] == ids[1] == claimed.event.id
    assert len(ids) == len(set(ids)) + 1 == 4
    late = FinishedEvent(claimed, Report.DONE)
    sum(mail.outbox.replay(EventFilter(), None))
    mail.outbox.finish("billing", [late])
    assert mail.pending() == 3, "what the dead worker reports late changes nothing"


def test_worker_that_stops_gives_its_claims_back(
    mail: Mail, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLOSE_TIME", 0.05)
    go_on = threading.Event()
    mail.receiver.answer = lambda _id, _data: (go_on.wait(20), (200, OK))[1]
    mail.deliver()
    with mail.notifying():
        until(lambda: mail.receiver.most_at_once)
    rows = mail.queue.rows("SELECT tries FROM notifications WHERE claim IS NULL ORDER BY sequence")
    assert [row["tries"] for row in rows] == [0, 0, 0]
    go_on.set()
    with mail.notifying():
        mail.until_done()
    assert len(mail.receiver.firsts()) == 3


def test_secrets_are_rotated_without_a_restart(mail: Mail, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook_client, "SECRETS_CHECKED", 0.0)
    secret = mail.directory / "webhook.secret"
    with mail.notifying():
        mail.deliver()
        mail.until_done()
        secret.write_text(f"{OTHER_SECRET}\n{SECRET}\n")
        mail.deliver()
        mail.until_done()
        mail.receiver.secret = OTHER_SECRET
        mail.deliver()
        mail.until_done()
        secret.write_text("half a sec")  # it is being written
        mail.deliver()
        mail.until_done()
    assert mail.receiver.invalid == []
    assert len(mail.receiver.firsts()) == 12


def test_missing_secret_costs_no_try(mail: Mail) -> None:
    secret = mail.directory / "webhook.secret"
    secret.unlink()
    mail.deliver()
    with mail.notifying():
        until(lambda: "No such file" in (mail.subscription().last_error or ""))
        assert mail.queue.rows("SELECT max(tries) AS n FROM notifications")[0]["n"] == 0
        secret.write_text(f"{SECRET}\n")
        mail.until_done()


def test_what_waited_for_too_long_is_given_up(
    mail: Mail, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "CLEANING", 0.0)
    mail.subscriptions.disable("billing", "410")
    mail.subscriptions.enable("billing", actor="me")
    mail.deliver()
    mail.subscriptions.disable("billing", "410")
    mail.queue.change("UPDATE notifications SET queued_at = @ago(80 * 3600)")
    with mail.notifying():
        mail.until_done()
    assert mail.receiver.received == []
    assert "events given up" in capsys.readouterr().out


def test_replayed_events_have_the_same_ids(mail: Mail) -> None:
    ids = mail.deliver(3)
    with mail.notifying():
        mail.until_done()
        first = {one.id for one in mail.receiver.received}
        assert sum(mail.outbox.replay(EventFilter(), None)) == 9
        mail.until_done()
        assert len(mail.receiver.received) == 18
        assert sum(mail.outbox.replay(EventFilter(queue_id=ids[0]), "billing")) == 3
        assert sum(mail.outbox.replay(EventFilter(), "other")) == 0
        mail.until_done()
    assert len(mail.receiver.received) == 21
    assert {one.id for one in mail.receiver.received} == first


def test_outage_of_the_database_loses_nothing(mail: Mail, monkeypatch: pytest.MonkeyPatch) -> None:
    from sqlalchemy.exc import TimeoutError as PoolTimeout

    finish, left = mail.outbox.finish, [3]

    def finish_later(*arguments: Any) -> None:
        if left[0]:
            left[0] -= 1
            raise PoolTimeout("the database is away")
        finish(*arguments)

    monkeypatch.setattr(mail.outbox, "finish", finish_later)
    (queue_id,) = mail.deliver()
    with mail.notifying():
        mail.until_done()
    assert [one.type for one in mail.receiver.received] == ["accepted", "deferred", "delivered"]
    assert by_message(mail.receiver) == {queue_id: ["accepted", "deferred", "delivered"]}


def test_subscription_that_no_worker_renews_is_removed(mail: Mail) -> None:
    mail.deliver()
    cleaner = Subscriptions(mail.queue.database)
    assert cleaner.remove_stale() == cleaner.remove_stale() == []
    mail.use("")  # a worker renews it
    assert cleaner.remove_stale() == cleaner.remove_stale() == []
    assert cleaner.remove_stale() == ["billing"]
    assert mail.pending() == 0
    mail.queue.accept()
    assert len(mail.outbox.events(EventFilter(), most=9)) == 3
