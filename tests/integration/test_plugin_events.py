"""Plugins get events by the hook `event`, at least once and in order for each message."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from relay.events.outbox import Outbox
from relay.events.subscriptions import Subscriptions
from relay.queue.outcome import Outcome
from tests.integration.harness import QueueHarness
from tests.integration.plugins import plugin_file, plugins
from tests.waiting import until
from worker import notifier as module
from worker.notifier import TRIES, Notifier
from worker.plugin_receiver import receiving


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_INTERVAL", 0.02)
    monkeypatch.setattr(module, "DELAYS", (0.01,) * (TRIES - 1))
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.02)


@contextmanager
def notified(queue: QueueHarness, entries: str) -> Iterator[None]:
    """The plugins of these entries get what becomes of mail meanwhile."""
    loaded = plugins(entries)
    receivers, subscriptions = receiving(loaded), Subscriptions(queue.database)
    subscriptions.register([each.subscription for each in receivers])
    notifier = Notifier(Outbox(queue.database), subscriptions, lambda: receivers, stop=loaded.stop)
    notifier.start()
    try:
        yield
    finally:
        notifier.close()
        notifier.join(20)
        assert not notifier.is_alive()


def deliver(queue: QueueHarness, count: int = 1) -> list[str]:
    ids = [queue.accept() for _ in range(count)]
    for claim in queue.claim(*ids):
        queue.complete(claim, Outcome.DELIVERED, reply="taken")
    return ids


def until_done(queue: QueueHarness) -> None:
    until(lambda: not queue.rows("SELECT 1 FROM notifications"), 20)


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_hook_gets_events_in_order(queue: QueueHarness, tmp_path: Path, kind: str) -> None:
    output = tmp_path / "seen"
    path = plugin_file(
        tmp_path,
        f"""
        @hookimpl
        def register(relay):
            relay.at_stop(stopped)

        @hookimpl
        {kind} event(event: Event):
            with open({str(output)!r}, "a") as file:
                file.write(f"{{event.queue_id}} {{event.type}} {{event.reply}}\\n")

        def stopped():
            with open({str(output)!r}, "a") as file:
                file.write("stopped\\n")
        """,
    )
    with notified(queue, str(path)):
        ids = deliver(queue, 10)
        until_done(queue)
    *lines, last = output.read_text().splitlines()
    seen = defaultdict[str, list[str]](list)
    for line in lines:
        queue_id, _, rest = line.partition(" ")
        seen[queue_id].append(rest)
    assert seen == {queue_id: ["accepted None", "delivered taken"] for queue_id in ids}
    assert last == "stopped"


@pytest.mark.parametrize("fault", ["raise ValueError(1)", "import time; time.sleep(3)"])
def test_hook_that_fails_or_is_late_gets_the_event_again(
    queue: QueueHarness, tmp_path: Path, fault: str
) -> None:
    output = tmp_path / "seen"
    path = plugin_file(
        tmp_path,
        f"""
        seen = []

        @hookimpl
        def event(event):
            seen.append(event.id)
            if len(seen) < 3:
                {fault}
            with open({str(output)!r}, "a") as file:
                file.write(f"{{event.type}} {{seen.count(event.id)}}\\n")
        """,
    )
    with notified(queue, f"{path} timeout=1s fail=open"):
        deliver(queue)
        until_done(queue)
    lines = output.read_text().splitlines()
    assert [line for line in lines if line.startswith("delivered")] == ["delivered 1"]
    assert "accepted 3" in lines


def test_plugin_that_fails_keeps_no_event_from_another(queue: QueueHarness, tmp_path: Path) -> None:
    output = tmp_path / "seen"
    bad = plugin_file(tmp_path, "@hookimpl\ndef event():\n    1 / 0\n", "bad")
    good = plugin_file(
        tmp_path,
        f"""
        @hookimpl
        def event(event):
            with open({str(output)!r}, "a") as file:
                file.write(event.type + "\\n")
        """,
        "good",
    )
    with notified(queue, f"{bad}; {good}"):
        deliver(queue)
        until_done(queue)
    assert output.read_text().splitlines() == ["accepted", "delivered"]
    names = [one.name for one in Subscriptions(queue.database).all()]
    assert names == ["plugin:bad", "plugin:good"]


def test_plugin_without_the_hook_is_no_subscription(tmp_path: Path) -> None:
    path = plugin_file(tmp_path, "@hookimpl\ndef rcpt():\n    return None\n")
    assert receiving(plugins(str(path))) == []
