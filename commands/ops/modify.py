"""The commands that change the queue: `retry`, `hold`, `release`, `bounce`, `drop`, `pause` and
`resume`, around `relay.queue.operations`.

What must stay true: an empty filter changes nothing without --all; more than one delivery changes
only after a confirmation or with --yes; every change is recorded with its actor and reason; after
Ctrl-C the command says how many deliveries it changed.
"""

import getpass
import os
import socket
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import typer
from sqlalchemy import Engine

from commands.errors import DONE, INTERRUPTED, NOTHING_MATCHED, WRONG_USE, say
from commands.ops.show import COLUMNS, mounted_spool, opened, resolved
from commands.output import as_json, counted, write
from relay.queue.operations import OPERATIONS, REROUTE, QueueOperations
from relay.queue.states import State
from relay.report.filters import Filter
from relay.report.queries import QueueReader
from relay.routes import Routes, parse_server
from relay.settings import Settings, load


@dataclass(frozen=True, slots=True)
class ChangeRequest:
    """The options of a command beside its filter."""

    everything: bool = False
    dry_run: bool = False
    yes: bool = False
    reason: str = ""
    json_lines: bool = False
    limit: int | None = None  # deliveries, oldest first


def actor() -> str:
    """The user who runs the command, as `audit` records it."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # the uid of a container may have no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def change(name: str, filter_: Filter, request: ChangeRequest) -> int:
    """Apply an operation to the deliveries that the filter matches; the exit status."""
    settings = load(Settings)
    if not filter_.shown() and not request.everything:
        say(f"{name} everything? Give a filter, or --all")
        return WRONG_USE
    with opened(settings) as engine:
        return _change(name, settings, engine, filter_, request)


def _change(
    name: str, settings: Settings, engine: Engine, filter_: Filter, request: ChangeRequest
) -> int:
    queue, operation = QueueReader(engine), OPERATIONS.get(name, REROUTE)
    operations = QueueOperations(engine, notices=settings.bounces == "dsn")
    filter_ = resolved(queue, filter_)
    matched = operations.matching(operation, filter_)
    if not matched:
        say(f"no delivery to {name}: it takes what is {' or '.join(operation.takes)}")
        return NOTHING_MATCHED
    limit = request.limit
    summary = f"{name} {_counts(matched)}"
    if limit is not None and limit < matched.total():
        summary = f"{name} the oldest {limit} of {_counts(matched)}"
    if request.dry_run:
        rows = operations.touched(operation, filter_, limit=limit)
        write(rows, COLUMNS, json_lines=request.json_lines)
        say(f"would {summary}")
        return DONE
    if min(matched.total(), limit or 2) > 1 and not request.yes:
        if not sys.stdin.isatty():
            say(f"{summary}? Add --yes to change more than one")
            return WRONG_USE
        if not typer.confirm(f"{summary}?"):
            return NOTHING_MATCHED
    chunks = operations.in_chunks(
        operation,
        filter_,
        actor=actor(),
        reason=request.reason,
        limit=limit,
        route_for=Routes.load(settings).route_for if operation is REROUTE else None,
    )
    spool, changed, removed, interrupted = mounted_spool(settings, queue), Counter[str](), 0, True
    with suppress(KeyboardInterrupt):
        for counts, bodies in chunks:
            changed.update(counts)
            removed += sum(map(spool.remove, bodies)) if spool else 0
        interrupted = False
    if request.json_lines:
        row = {"verb": name, "deliveries": changed.total(), "were": changed}
        typer.echo(as_json(row | {"bodies_removed": removed}))
    else:
        typer.echo(
            f"{name}: {_counts(changed)}" + (f", bodies removed: {removed}" if removed else "")
        )
    if sending := changed[State.SENDING]:
        after = "they are no longer held after this try"
        if operation.wanted:
            after = f"{name} follows after this try, unless the server accepts"
        say(f"{sending} being sent: {after}")
    if interrupted:
        total = counted(matched.total())
        say(f"interrupted after {changed.total()} of {total}; the others are unchanged")
        return INTERRUPTED
    return DONE if changed else NOTHING_MATCHED


def _counts(counts: Mapping[str, int]) -> str:
    parts = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    return f"{counted(sum(counts.values()))} ({parts})" if parts else "nothing"


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
        operations = QueueOperations(engine, notices=False)
        known = _subjects(settings, QueueReader(engine))
        operation = operations.resume if resume else operations.pause
        done = operation(subject, actor=actor(), reason=reason)
    if json_lines:
        row = {"verb": "resume" if resume else "pause", "subject": subject, "done": done}
        typer.echo(as_json(row))
    elif done:
        typer.echo(f"{subject} {'resumed' if resume else 'paused'}")
    if not done and resume:
        say(f"{subject} is not paused; `qmqp-relay stats` shows what is")
    elif not done:
        say(f"{subject} is already paused")
    elif not resume and subject not in known:
        names = ", ".join(sorted(known))
        say(f"{subject} is not configured, and was not tried in the last hour; known are {names}")
    return DONE if done else NOTHING_MATCHED


def _subjects(settings: Settings, queue: QueueReader) -> set[str]:
    """The routes and servers that our settings name, and the servers that were tried lately."""
    known = {f"server:{row['server']}" for row in queue.servers() if row["attempts"]}
    for route in Routes.load(settings).all():
        known |= {f"route:{route.name}", *(f"server:{server.name}" for server in route.servers)}
    return known
