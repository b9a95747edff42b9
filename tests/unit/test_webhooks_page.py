"""docs/webhooks.md has the types, the keys and the waits of the code."""

import re
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path

from qmqp_relay import Event
from relay.events.model import VERSION, EventType, MailEvent
from relay.events.webhooks import KEYS
from worker.notifier import CONCURRENCY, DELAYS, TRIES
from worker.webhook_client import TIMEOUT

PAGE = (Path(__file__).parents[2] / "docs" / "webhooks.md").read_text()
NOW = datetime(2026, 11, 27, 16, 50, 0, 123456, tzinfo=UTC)
EVENT = MailEvent(
    sequence=1,
    id="1",
    event_at=NOW,
    type=EventType.DELIVERED,
    queue_id="0" * 32,
    delivery=1,
    route="default",
    attempt=1,
    server="mx:628",
    outcome="delivered",
    reply="ok",
    reason_source="server",
    next_at=None,
    message_id=None,
    sender="",
    size=1,
    received_at=NOW,
    auth_user=None,
    client_address="192.0.2.1",
    recipients=("b@example.org",),
)


def table(heading: str) -> list[str]:
    """The first cells of the rows of a table."""
    _, _, rest = PAGE.partition(f"| {heading} |")
    rows = rest.partition("\n\n")[0]
    return re.findall(r"^\| `(\w+)` \|", rows, re.MULTILINE)


def test_every_type_is_described() -> None:
    assert set(table("type | when")) == set(EventType)


def test_every_key_of_the_payload_is_described() -> None:
    payload = EVENT.payload()
    assert list(payload) == ["type", "timestamp", "data"]
    assert payload["timestamp"] == "2026-11-27T16:50:00.123456Z"
    _, _, data = PAGE.partition("The keys of `data`")
    assert re.findall(r"^\| `(\w+)` \|", data.partition("| type |")[0], re.MULTILINE) == list(
        payload["data"]
    )
    assert f"The keys of `data`, version {VERSION}." in PAGE


def test_event_of_a_plugin_has_the_same_keys() -> None:
    expected = {"type", "timestamp", *EVENT.payload()["data"]} - {"version"}
    assert {field.name for field in fields(Event)} == expected


def test_every_key_of_the_file_is_described() -> None:
    _, _, keys = PAGE.partition("| key | meaning |")
    assert set(re.findall(r"^\| `(\w+)` \|", keys.partition("\n\n")[0], re.MULTILINE)) == set(KEYS)


def test_page_says_how_often_and_how_long_is_tried() -> None:
    waits = re.search(r"tries again after (.+?),\s+which are 75 hours", PAGE, re.DOTALL)
    assert waits
    units = {"s": 1, "min": 60, "h": 3600}
    found = re.findall(r"(\d+) (s|min|h)\b", waits[1])
    assert tuple(float(int(number) * units[unit]) for number, unit in found) == DELAYS
    assert (TRIES, int(sum(DELAYS) // 3600)) == (10, 75)
    assert f"no reply in {TIMEOUT:.0f} seconds" in PAGE
    assert f"up to {CONCURRENCY} requests of each worker" in PAGE
