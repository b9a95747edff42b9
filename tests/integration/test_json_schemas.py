"""The JSON of every command, on both databases, against the schemas of docs/schemas.

A property that a schema does not name is an error here, so that each is described."""

import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, FormatChecker

from relay.events.model import NewSubscription
from relay.events.subscriptions import Subscriptions
from relay.queue.operations import QueueOperations
from relay.queue.outcome import Outcome
from relay.spool.store import Spool
from tests.acceptance.console import scenario
from tests.integration.harness import QueueHarness
from tests.integration.typed import Typed, lines, typed_at
from tests.integration.webhook_receiver import running_receiver
from tests.unit.test_usage import COMMANDS

ROOT = Path(__file__).parents[2]
SCHEMAS = {
    path.stem: json.loads(path.read_text()) for path in (ROOT / "docs" / "schemas").glob("*.json")
}


def closed(schema: Any) -> Any:
    """The schema, that allows no property that it does not name."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: closed(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and "required" in schema and "type" in schema:
        strict["additionalProperties"] = False
    return strict


FORMATS = FormatChecker(())


@FORMATS.checks("date-time", raises=ValueError)
def has_a_zone(value: object) -> bool:
    """Whether a text is a time with its zone."""
    return not isinstance(value, str) or datetime.fromisoformat(value).tzinfo is not None


VALIDATORS = {
    name: Draft202012Validator(closed(schema), format_checker=FORMATS)
    for name, schema in SCHEMAS.items()
}


def check(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The rows, of which each fits the schema; there must be one."""
    assert rows, name
    for row in rows:
        faults = [fault.message for fault in VALIDATORS[name].iter_errors(row)]
        assert faults == [], f"{name}: {row}"
    return rows


@pytest.fixture
def typed(queue: QueueHarness, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> Typed:
    return typed_at(queue, spool, monkeypatch)


def test_every_schema_is_one() -> None:
    for schema in SCHEMAS.values():
        Draft202012Validator.check_schema(schema)


def test_the_page_is_made_from_the_schemas() -> None:
    script = ROOT / "scripts" / "json_page.py"
    done = subprocess.run([sys.executable, script, "--check"], check=False)
    assert done.returncode == 0, "run python scripts/json_page.py"


def test_every_command_with_json_has_a_schema() -> None:
    titles = " ".join(schema["title"] for schema in SCHEMAS.values()).replace("|", " ")
    with_json = [
        words
        for words, command in COMMANDS.items()
        if any("--json" in parameter.opts for parameter in command.params)
    ]
    assert [words for words in with_json if words.split()[-1] not in titles.split()] == []


def test_rows_of_the_queue(queue: QueueHarness, spool: Spool, typed: Typed) -> None:
    created = scenario(queue, spool)
    QueueOperations(queue.database, sends_dsns=True).pause(
        "route:default", actor="ann@host", reason="ticket 812"
    )
    queue.change(
        "INSERT INTO rate_refusals (subject, what, name, hour, refused, last_at)"
        " VALUES ('client', 'messages', '198.51.100.7', @ago(60), 3, @ago(50))"
    )
    check(lines(typed("list", "--all", "--json")), "list")
    for key in ("reason", "sender", "domain", "server", "route", "client"):
        check(lines(typed("list", "--count-by", key, "--json")), "count")
    for state, ids in created.ids.items():
        check(lines(typed("show", ids[0], "--json")), "show")
        assert check(lines(typed("why", ids[0], "--json")), "why")[0]["queue_id"] == ids[0], state
    kinds = {row["kind"] for row in check(lines(typed("stats", "--json")), "stats")}
    assert kinds >= {"queue", "age", "worker", "server", "pause", "journal", "flow", "disk"}
    assert kinds >= {"version", "received", "rate_limit", "rate", "slowest"}
    check(lines(typed("problems", "--json", status=1)), "problems")
    check(lines(typed("actions", "--json")), "actions")
    check(lines(typed("actions", created.ids["dropped"][0], "--json")), "actions")


def test_changes_of_the_queue(queue: QueueHarness, spool: Spool, typed: Typed) -> None:
    queue_id = queue.accept("x@example.org")
    spool.store(queue_id, [b"x"])
    (dry,) = lines(typed("hold", queue_id, "--dry-run", "--json"))
    assert set(dry) <= set(SCHEMAS["list"]["properties"])
    for verb in ("hold", "release", "hold", "retry --reroute", "bounce"):
        check(lines(typed(*verb.split(), queue_id, "--json")), "operation")
    for verb in ("pause", "resume"):
        check(lines(typed(verb, "--route", "default", "--json")), "pause")
        check(lines(typed(verb, "--route", "default", "--json", status=1)), "pause")


def test_checks(queue: QueueHarness, spool: Spool, typed: Typed) -> None:
    check(lines(typed("check", "--json", status=None)), "check")
    check(lines(typed("probe", "unix:/nowhere", "--json", status=3)), "probe")
    queue.accept("x@example.org", sender="")
    check(lines(typed("fsck", "--json", status=None)), "fsck")


def test_users(queue: QueueHarness, typed: Typed, tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("a long password of the tests\n")
    file = ("--password-file", str(password))
    check(lines(typed("user", "add", "ann", *file, "--json")), "user")
    check(lines(typed("user", "passwd", "ann", *file, "--json")), "user")
    for verb in ("disable", "enable"):
        check(lines(typed("user", verb, "ann", "--json")), "user")
    check(lines(typed("user", "list", "--json")), "user-list")
    check(lines(typed("user", "remove", "ann", "--json")), "user")


def test_events_and_webhooks(
    queue: QueueHarness, typed: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subscriptions = Subscriptions(queue.database)
    subscriptions.register([NewSubscription("billing")])
    queue.complete(queue.claim(queue.accept("x@example.org"))[0], Outcome.DELIVERED)
    check(lines(typed("events", "--json")), "event")
    check(lines(typed("events", "replay", "--all", "--json")), "replay")
    check(lines(typed("webhooks", "list", "--json")), "webhook-list")
    subscriptions.disable("billing", "HTTP 410")
    check(lines(typed("webhooks", "enable", "billing", "--json")), "webhook")
    with running_receiver() as receiver:
        monkeypatch.setenv("RELAY_WEBHOOKS", str(receiver.write_file(tmp_path)))
        check(lines(typed("webhooks", "test", "billing", "--json")), "webhook-test")


def test_plugins(typed: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from qmqp_relay import hookimpl\n\n@hookimpl\ndef connect(session):\n    pass\n"
    )
    monkeypatch.setenv("RELAY_PLUGINS", str(plugin))
    check(lines(typed("plugins", "--json")), "plugin")
