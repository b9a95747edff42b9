"""Changing the queue: what `retry`, `hold`, `release`, `bounce`, `drop`, `pause` and `resume` do
around `relay.queue.operations`.

What must stay true: nothing is touched by an empty filter unless --all says so, nor more than one
delivery unless somebody said yes; every change is recorded with who asked for it and why; who stops
a verb in its middle is told how far it came.
"""

import getpass
import os
import socket
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import typer
from sqlalchemy import Engine

from commands.errors import DONE, INTERRUPTED, NOTHING_MATCHED, WRONG_USE, say
from commands.ops.show import COLUMNS, at_hand, opened, resolved
from commands.output import as_json, counted, write
from relay.db.schema import State
from relay.queue.operations import OPERATIONS, REROUTE, QueueOperations
from relay.report.filters import Filter
from relay.report.queries import QueueReader
from relay.routes import Routes, parse_server
from relay.settings import Settings, load
from relay.spool.store import Spool


@dataclass(frozen=True, slots=True)
class ChangeRequest:
    """What the operator said beside the verb and the filter."""

    everything: bool = False
    dry_run: bool = False
    yes: bool = False
    reason: str = ""
    json_lines: bool = False
    limit: int | None = None  # deliveries, oldest first


def actor() -> str:
    """Who is asking, as `actions` keeps it."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's uid has no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def change(name: str, wanted: Filter, order: ChangeRequest) -> int:
    """Do what a verb does to all that a filter means; the exit status."""
    settings = load(Settings)
    if not wanted.shown() and not order.everything:
        say(f"{name} everything? Give a filter, or --all")
        return WRONG_USE
    with opened(settings) as engine:
        return _change(name, settings, engine, wanted, order)


def _change(
    name: str, settings: Settings, engine: Engine, wanted: Filter, order: ChangeRequest
) -> int:
    queue, verb = QueueReader(engine), OPERATIONS.get(name, REROUTE)
    verbs = QueueOperations(engine, notices=settings.bounces == "dsn")
    wanted = resolved(queue, wanted)
    matched = verbs.matching(verb, wanted)
    if not matched:
        say(f"nothing there to {name}: it takes what is {' or '.join(verb.takes)}")
        return NOTHING_MATCHED
    if order.dry_run:
        write(verbs.touched(verb, wanted, limit=order.limit), COLUMNS, json_lines=order.json_lines)
        say(f"would {name} {_limited(matched, order.limit)}")
        return DONE
    meant = f"{name} {_limited(matched, order.limit)}"
    if (
        min(matched.total(), order.limit or 2) > 1
        and not order.yes
        and (refusal := _refusal(meant)) is not None
    ):
        return refusal
    route_for = Routes.load(settings).route_for if verb is REROUTE else None
    chunks = verbs.in_chunks(
        verb, wanted, actor=actor(), reason=order.reason, route_for=route_for, limit=order.limit
    )
    touched, removed, interrupted = _done(chunks, at_hand(settings, queue))
    if order.json_lines:
        typer.echo(
            as_json(
                {
                    "verb": name,
                    "deliveries": touched.total(),
                    "were": touched,
                    "bodies_removed": removed,
                }
            )
        )
    else:
        typer.echo(
            f"{name}: {_told(touched)}" + (f", bodies removed: {removed}" if removed else "")
        )
    if sending := touched[State.SENDING]:
        wished = f"{name} comes after this try, unless the server accepts"
        say(
            f"{sending} being sent: {wished if verb.wanted else 'not held after this try any more'}"
        )
    if interrupted:
        say(
            f"interrupted after {touched.total()} of {counted(matched.total())}; the rest is as it was"
        )
        return INTERRUPTED
    return DONE if touched else NOTHING_MATCHED


def _done(
    chunks: Iterator[tuple[Counter[str], list[str]]], spool: Spool | None
) -> tuple[Counter[str], int, bool]:
    """Do it, removing bodies meanwhile; the deliveries touched by state, bodies removed, whether it
    was interrupted."""
    touched, removed = Counter[str](), 0
    try:
        for counts, free in chunks:
            touched.update(counts)
            removed += sum(map(spool.remove, free)) if spool else 0
    except KeyboardInterrupt:
        return touched, removed, True
    return touched, removed, False


def _refusal(question: str) -> int | None:
    """Ask on a terminal; the exit status if it is not to be done."""
    if not sys.stdin.isatty():
        say(f"{question}? Say --yes for more than one")
        return WRONG_USE
    return None if typer.confirm(f"{question}?") else NOTHING_MATCHED


def _limited(counts: Mapping[str, int], limit: int | None) -> str:
    """What would be touched, if that is not all of it."""
    return (
        _told(counts)
        if limit is None or limit >= sum(counts.values())
        else f"the oldest {limit} of {_told(counts)}"
    )


def _told(counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    parts = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    return f"{counted(total)} ({parts})" if total else "nothing"


def pause(
    route: str | None, server: str | None, *, reason: str, resume: bool, json_lines: bool = False
) -> int:
    """Pause or resume a route or a server; the exit status."""
    if (route is None) == (server is None):
        say("name one: --route NAME or --server HOST")
        return WRONG_USE
    settings = load(Settings)
    try:
        subject = f"route:{route}" if server is None else f"server:{parse_server(server).name}"
    except ValueError as error:
        say(str(error))
        return WRONG_USE
    with opened(settings) as engine:
        verbs, known = (
            QueueOperations(engine, notices=False),
            _subjects(settings, QueueReader(engine)),
        )
        done = (verbs.resume if resume else verbs.pause)(subject, actor=actor(), reason=reason)
    words = "resumed" if resume else "paused"
    if json_lines:
        typer.echo(
            as_json({"verb": "resume" if resume else "pause", "subject": subject, "done": done})
        )
    if done:
        if not json_lines:
            typer.echo(f"{subject} {words}")
        if not resume and subject not in known:
            say(
                f"not in these settings, nor tried in the last hour; known are {', '.join(sorted(known))}"
            )
        return DONE
    if resume:
        say(f"{subject} is not paused; `qmqp-relay stats` shows what is")
    else:
        say(f"{subject} is paused already")
    return NOTHING_MATCHED


def _subjects(settings: Settings, queue: QueueReader) -> set[str]:
    """What can be paused, as far as our settings and the last hour tell."""
    known = {f"server:{row['server']}" for row in queue.servers() if row["attempts"]}
    for route in Routes.load(settings).all():
        known |= {f"route:{route.name}", *(f"server:{server.name}" for server in route.servers)}
    return known
