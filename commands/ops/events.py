"""The commands that show and replay events, and those for webhooks, around `relay.events`.

What must stay true: reading changes nothing; what is replayed keeps its ids; no URL and no secret
of a webhook is printed.
"""

import asyncio
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import typer

from commands.errors import DONE, NOTHING_MATCHED, OUT_OF_REACH, WRONG_USE, CommandError, say
from commands.ops.database import opened
from commands.ops.modify import actor
from commands.output import Columns, ago, as_json, cut, plain, stamp, write
from relay.events.model import EventType, MailEvent, instant
from relay.events.outbox import EventFilter, Outbox
from relay.events.subscriptions import Subscriptions
from relay.events.webhooks import load_webhooks
from relay.ids import new_id
from relay.report.queries import QueueReader
from relay.report.rows import Row
from relay.settings import Settings, load

FOLLOW_INTERVAL = 1.0  # seconds
FOLLOWED = 1000  # new events that one read gives
# Transactions that began earlier may commit later, with smaller numbers: so many events are read
# again.
OVERLAP = 2000
_COLUMNS: Columns = {
    "AT": lambda row: stamp(row["event_at"]),
    "TYPE": lambda row: str(row["type"]),
    "ID": lambda row: str(row["queue_id"])[-12:],
    "ROUTE": lambda row: str(row["route"]),
    "SENDER": lambda row: cut(str(row["sender"]), 28) or "<>",
    "RECIPIENTS": lambda row: _addresses(row["recipients"]),
    "REPLY": lambda row: str(row["reply"] or ""),
}
_WEBHOOKS: Columns = {
    "NAME": lambda row: str(row["name"]),
    "PENDING": lambda row: str(row["pending"]),
    "OLDEST": lambda row: ago(row["oldest_at"]),
    "LAST OK": lambda row: ago(row["succeeded_at"]),
    "STATE": lambda row: _state(row),
    "TYPES": lambda row: " ".join(row["types"]) or "all",
    "ROUTES": lambda row: " ".join(row["routes"]) or "all",
}


def event_filter(
    kinds: Sequence[str] | None, seconds: float | None, queue_id: str | None
) -> EventFilter:
    """The filter that the options mean; raises BadParameter."""
    for kind in kinds or ():
        if kind not in list(EventType):
            raise typer.BadParameter(f"no type {kind}: choose one of {', '.join(EventType)}")
    filter_ = EventFilter(queue_id=queue_id)
    if kinds:
        filter_ = filter_._replace(types=[EventType(kind) for kind in kinds])
    return filter_ if seconds is None else filter_._replace(seconds=seconds)


def show_events(filter_: EventFilter, *, limit: int, json_lines: bool) -> int:
    """Print the newest events that match; the exit status."""
    with opened(load(Settings)) as engine:
        outbox = Outbox(engine)
        found = outbox.events(_resolved(filter_, QueueReader(engine)), most=limit)
        subscribed = bool(Subscriptions(engine).all())
    if _print(found, json_lines=json_lines):
        return DONE
    if subscribed:
        say("no event matches")
    else:
        say("no events are recorded: there is no webhook, and no plugin with an event hook")
    return NOTHING_MATCHED


def follow_events(filter_: EventFilter, *, limit: int, json_lines: bool) -> int:
    """Print events, and go on with what comes until Ctrl-C; the exit status."""
    with opened(load(Settings)) as engine:
        outbox = Outbox(engine)
        filter_ = _resolved(filter_, QueueReader(engine))
        found = outbox.events(filter_, most=limit)
        seen: dict[int, None] = {}
        try:
            while True:
                _print(found, json_lines=json_lines, follow=True)
                seen |= dict.fromkeys(event.sequence for event in found)
                for old in list(seen)[: -2 * OVERLAP]:
                    del seen[old]
                if len(found) < FOLLOWED:
                    time.sleep(FOLLOW_INTERVAL)
                behind = max(seen, default=0) - OVERLAP
                newer = outbox.events_after(filter_, behind, most=FOLLOWED + OVERLAP)
                first = min(seen, default=0)
                found = [
                    event
                    for event in newer
                    if event.sequence not in seen and event.sequence > first
                ]
        except KeyboardInterrupt:
            return DONE


def replay_events(filter_: EventFilter, webhook: str | None, *, json_lines: bool) -> int:
    """Deliver events again; the exit status."""
    with opened(load(Settings)) as engine:
        named = {one.name: one for one in Subscriptions(engine).all()}
        if webhook is not None and webhook not in named:
            raise _no_webhook(webhook)
        if webhook is not None and named[webhook].disabled_at:
            raise CommandError(
                NOTHING_MATCHED,
                f"{webhook} is disabled: `qmqp-relay webhooks enable {webhook}` comes first",
            )
        outbox = Outbox(engine)
        count = sum(outbox.replay(_resolved(filter_, QueueReader(engine)), webhook))
    if json_lines:
        typer.echo(as_json({"verb": "replay", "webhook": webhook, "events": count}))
    else:
        say(f"{count} events are delivered again" if count else "no event matches")
    return DONE if count else NOTHING_MATCHED


def list_webhooks(*, json_lines: bool) -> int:
    """Print the subscriptions, and webhooks of the settings that no worker has registered; the exit
    status."""
    settings = load(Settings)
    with opened(settings) as engine:
        rows: list[Row] = [asdict(one) for one in Subscriptions(engine).all()]
    known = {row["name"] for row in rows}
    unknown = [one.name for one in load_webhooks(settings) if one.name not in known]
    for name in unknown:
        say(f"no worker has registered {name} yet: restart the workers with this RELAY_WEBHOOKS")
    if write(rows, _WEBHOOKS, json_lines=json_lines):
        return DONE
    if not unknown:
        say("there is no webhook: docs/webhooks.md says how to add one")
    return NOTHING_MATCHED


def post_test_event(name: str, *, json_lines: bool) -> int:
    """Post a test event; the exit status."""
    from worker.webhook_client import WebhookClient

    webhook = next((one for one in load_webhooks(load(Settings)) if one.name == name), None)
    if webhook is None:
        raise CommandError(
            WRONG_USE, f"RELAY_WEBHOOKS names no webhook {name}; `qmqp-relay webhooks list`"
        )
    event_id = new_id()
    text = json.dumps(
        {
            "type": "test",
            "timestamp": instant(datetime.now(UTC)),
            "data": {"version": 1, "id": event_id},
        }
    )

    async def post() -> str:
        client = WebhookClient(webhook, connections=1)
        try:
            return (await client.post(event_id, text)).error
        finally:
            await client.close()

    began = time.monotonic()
    error = asyncio.run(post())
    seconds = round(time.monotonic() - began, 3)
    if json_lines:
        row = {"webhook": name, "id": event_id, "ok": not error, "error": error or None}
        typer.echo(as_json(row | {"seconds": seconds}))
    elif error:
        say(f"{name} did not take the event: {error}")
    else:
        typer.echo(f"{name} took the event {event_id} in {seconds} s")
    return OUT_OF_REACH if error else DONE


def enable_webhook(name: str, *, reason: str, json_lines: bool) -> int:
    """Record events for a webhook again; the exit status."""
    with opened(load(Settings)) as engine:
        subscriptions = Subscriptions(engine)
        if name not in {one.name for one in subscriptions.all()}:
            raise _no_webhook(name)
        done = subscriptions.enable(name, actor=actor(), reason=reason)
    if json_lines:
        typer.echo(as_json({"verb": "enable", "webhook": name, "done": done}))
    elif done:
        typer.echo(f"webhook {name} enabled")
    else:
        say(f"webhook {name} is not disabled")
    return DONE if done else NOTHING_MATCHED


def _resolved(filter_: EventFilter, queue: QueueReader) -> EventFilter:
    """The filter with the whole id of its message."""
    if filter_.queue_id is None:
        return filter_
    return filter_._replace(queue_id=queue.resolve(filter_.queue_id))


def _print(events: Iterable[MailEvent], *, json_lines: bool, follow: bool = False) -> int:
    if json_lines:
        lines = [json.dumps(event.payload()) for event in events]
        for line in lines:
            typer.echo(line)
        return len(lines)
    rows = [asdict(event) for event in events]
    if follow:
        for row in rows:
            typer.echo(plain("  ".join(cell(row) for cell in _COLUMNS.values()).rstrip()))
        return len(rows)
    return write(rows, _COLUMNS)


def _addresses(recipients: Sequence[str]) -> str:
    first = cut(recipients[0], 28) if recipients else ""
    return f"{first} +{len(recipients) - 1}" if len(recipients) > 1 else first


def _state(row: Mapping[str, Any]) -> str:
    if row["disabled_at"]:
        return f"disabled {ago(row['disabled_at'])}: {row['disabled_reason']}"
    if row["last_error"]:
        return f"failing {ago(row['failing_at'])}: {row['last_error']}"
    return "ok"


def _no_webhook(name: str) -> CommandError:
    return CommandError(
        NOTHING_MATCHED, f"no worker has registered {name}; `qmqp-relay webhooks list`"
    )
