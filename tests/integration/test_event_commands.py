"""The commands about events and webhooks, and what metrics and `problems` say of them."""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from commands.ops.check import check_webhooks
from commands.output import write
from relay.events.model import EventType, NewSubscription
from relay.events.subscriptions import Subscriptions
from relay.metrics import QueueMetrics
from relay.queue.outcome import Outcome
from relay.settings import Settings, load
from relay.spool.store import Spool
from tests.integration.harness import QueueHarness
from tests.integration.typed import Typed, lines, typed_at
from tests.integration.webhook_receiver import OK, WebhookReceiver, running_receiver
from tests.waiting import until


@pytest.fixture
def typed(queue: QueueHarness, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> Typed:
    return typed_at(queue, spool, monkeypatch)


@pytest.fixture
def heard(queue: QueueHarness) -> QueueHarness:
    Subscriptions(queue.database).register([NewSubscription("billing")])
    return queue


def delivered(queue: QueueHarness) -> str:
    claim = queue.claim(queue.accept(sender="me@example.com"))[0]
    queue.complete(claim, Outcome.DELIVERED)
    return claim.queue_id


def test_events_are_shown_as_webhooks_get_them(heard: QueueHarness, typed: Typed) -> None:
    first, second = delivered(heard), delivered(heard)
    shown = lines(typed("events", "--json"))
    assert [(row["type"], row["data"]["queue_id"]) for row in shown] == [
        ("accepted", first),
        ("delivered", first),
        ("accepted", second),
        ("delivered", second),
    ]
    assert [row["type"] for row in lines(typed("events", "--json", "--limit", "1"))] == [
        "delivered"
    ]
    typed_rows = lines(typed("events", "--json", "--type", "accepted", "--id", first[-12:]))
    assert [row["data"]["queue_id"] for row in typed_rows] == [first]
    table = typed("events").stdout
    assert "delivered" in table
    assert "me@example.com" in table
    heard.change("UPDATE events SET at = @ago(3600)")
    assert typed("events", "--since", "30m", status=1).stderr == "qmqp-relay: no event matches\n"
    assert "no type sent" in typed("events", "--type", "sent", status=2).stderr


def test_a_table_of_events_has_local_times_if_they_are_wanted(
    heard: QueueHarness, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivered(heard)
    monkeypatch.setattr("commands.ops.events.write", partial(write, form="table"))
    monkeypatch.setenv("TZ", "Etc/GMT-2")
    time.tzset()
    try:
        shown = {local: typed("events", *local).stdout for local in ((), ("--local",))}
    finally:
        monkeypatch.undo()
        time.tzset()
    assert re.search(r"^[-\d]+ [:\d]+Z +delivered ", shown[()], re.M)
    assert re.search(r"^[-\d]+ [:\d]+\+02:00 +delivered ", shown["--local",], re.M)


def test_events_without_a_subscription_say_why_there_are_none(typed: Typed) -> None:
    assert "there is no webhook" in typed("events", status=1).stderr


def test_followed_events_are_shown_once_as_they_come(
    heard: QueueHarness, typed: Typed, spawn: Callable[..., subprocess.Popen[Any]], tmp_path: Path
) -> None:
    first, output = delivered(heard), tmp_path / "followed"
    with output.open("w") as file:
        command = [sys.executable, "-m", "commands.cli.start", "events", "--follow", "--json"]
        spawn(command, stdout=file, cwd=Path(__file__).parents[2])
    until(lambda: output.read_text().count("\n") == 2, 30)
    second = delivered(heard)
    until(lambda: output.read_text().count("\n") == 4, 30)
    text = output.read_text()
    assert text.count(f'"queue_id": "{first}"') == text.count(f'"queue_id": "{second}"') == 2


def test_replay_makes_notifications_again(heard: QueueHarness, typed: Typed) -> None:
    queue_id = delivered(heard)
    heard.change("DELETE FROM notifications")
    assert "say which events" in typed("events", "replay", status=2).stderr
    assert (
        "no worker has registered x"
        in typed("events", "replay", "--all", "--webhook", "x", status=1).stderr
    )
    (row,) = lines(typed("events", "replay", "--id", queue_id, "--type", "delivered", "--json"))
    assert row == {"verb": "replay", "webhook": None, "events": 1}
    typed("events", "replay", "--since", "1h", "--webhook", "billing")
    assert heard.rows("SELECT count(*) AS n FROM notifications")[0]["n"] == 2
    Subscriptions(heard.database).disable("billing", "410")
    disabled = typed("events", "replay", "--all", "--webhook", "billing", status=1).stderr
    assert "`qmqp-relay webhooks enable billing`" in disabled


def test_webhooks_are_listed_and_enabled(heard: QueueHarness, typed: Typed) -> None:
    subscriptions = Subscriptions(heard.database)
    subscriptions.register([NewSubscription("bounces", (EventType.BOUNCED,), ("far",))])
    delivered(heard)
    subscriptions.note_failure("billing", "HTTP 500")
    table = typed("webhooks", "list").stdout
    assert "HTTP 500" in table
    rows = {row["name"]: row for row in lines(typed("webhooks", "list", "--json"))}
    assert rows["billing"]["pending"] == 2
    assert (rows["bounces"]["types"], rows["bounces"]["routes"]) == (["bounced"], ["far"])
    assert typed("webhooks", "enable", "billing", status=1).stderr.endswith("is not disabled\n")
    subscriptions.disable("billing", "HTTP 410")
    assert "disabled" in typed("webhooks", "list").stdout
    assert typed("webhooks", "enable", "billing", "--reason", "back").stdout == (
        "webhook billing enabled\n"
    )
    assert "webhooks enable billing" in typed("actions").stdout
    assert "no worker has registered x" in typed("webhooks", "enable", "x", status=1).stderr


def test_webhook_is_tested_with_a_signed_event(
    queue: QueueHarness, typed: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "names no webhook billing" in typed("webhooks", "test", "billing", status=2).stderr
    with running_receiver() as receiver:
        monkeypatch.setenv("RELAY_WEBHOOKS", str(receiver.write_file(tmp_path)))
        assert "took the event" in typed("webhooks", "test", "billing").stdout
        assert [one.type for one in receiver.received] == ["test"]
        receiver.answer = lambda _id, _data: (404, OK)
        assert typed("webhooks", "test", "billing", status=3).stderr == (
            "qmqp-relay: billing did not take the event: HTTP 404\n"
        )
        unregistered = typed("webhooks", "list", status=1).stderr
    assert "no worker has registered billing yet" in unregistered


def test_check_reads_the_secrets_of_webhooks(tmp_path: Path) -> None:
    file = WebhookReceiver(port=1).write_file(tmp_path)
    settings = load(Settings, webhooks=file)
    (result,) = check_webhooks(settings)
    assert (result.what, result.verdict) == ("webhook billing", "ok")
    (tmp_path / "webhook.secret").unlink()
    (result,) = check_webhooks(settings)
    assert result.verdict == "fail"
    assert "No such file" in result.words
    assert "openssl rand" in result.words


def test_late_events_are_a_problem_with_the_next_command(heard: QueueHarness, typed: Typed) -> None:
    delivered(heard)
    assert typed("problems", "--json", status=None).stdout.count('"webhook"') == 0
    heard.change("UPDATE notifications SET queued_at = @ago(400)")
    Subscriptions(heard.database).note_failure("billing", "HTTP 500")
    (late,) = [
        row
        for row in lines(typed("problems", "--json", status=1))
        if "next" in row and row["kind"] == "webhook"
    ]
    assert late["subject"] == "billing"
    assert late["count"] == 2
    assert "HTTP 500" in late["text"]
    assert late["next"] == "qmqp-relay webhooks test billing"
    Subscriptions(heard.database).disable("billing", "HTTP 410")
    (late,) = [
        row for row in lines(typed("problems", "--json", status=1)) if row["kind"] == "webhook"
    ]
    assert late["next"] == "qmqp-relay webhooks enable billing"


def test_metrics_show_what_waits(heard: QueueHarness, spool: Spool) -> None:
    spool.prepare(heard.database, unsafe=True)
    delivered(heard)
    heard.change("UPDATE notifications SET queued_at = @ago(100)")
    registry = CollectorRegistry()
    registry.register(QueueMetrics(heard.database, spool))
    labels = {"subscription": "billing"}
    assert registry.get_sample_value("relay_notifications_pending", labels) == 2
    lag = registry.get_sample_value("relay_notification_lag_seconds", labels)
    assert lag is not None
    assert 99 < lag < 130
    assert registry.get_sample_value("relay_subscription_disabled", labels) == 0
