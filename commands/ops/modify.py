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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress

import typer
from sqlalchemy import Engine

from commands.errors import DONE, INTERRUPTED, NOTHING_MATCHED, WRONG_USE, CommandError, say
from commands.ops.columns import COLUMNS
from commands.ops.database import opened, resolved
from commands.ops.show import mounted_spool
from commands.ops.uncommitted import journal_answers
from commands.output import as_json, counted, write
from relay.queue.operations import OPERATIONS, REROUTE, Operation, QueueOperations
from relay.queue.states import State
from relay.report.filters import Filter
from relay.report.queries import QueueReader
from relay.routes import Routes, parse_server
from relay.settings import Settings, load


def actor() -> str:
    """The user who runs the command, as `audit` records it."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # the uid of a container may have no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def confirmed(summary: str, *, yes: bool) -> bool:
    """Whether the operator agrees. Without a terminal to ask on, CommandError names --yes."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise CommandError(WRONG_USE, f"{summary}? Add --yes to do it")
    return typer.confirm(f"{summary}?")


def change(
    name: str,
    filter_: Filter,
    *,
    everything: bool = False,
    dry_run: bool = False,
    yes: bool = False,
    reason: str = "",
    limit: int | None = None,
    newest: bool = False,
    json_lines: bool = False,
) -> int:
    """Apply an operation to the deliveries that the filter matches, at most `limit` of them: the
    oldest or the `newest`; the exit status."""
    settings = load(Settings)
    if not filter_.shown() and not everything:
        raise CommandError(WRONG_USE, "no filter: add one, or --all")
    with opened(settings) as engine:
        queue, operation = QueueReader(engine), OPERATIONS.get(name, REROUTE)
        operations = QueueOperations(engine, sends_dsns=settings.bounces == "dsn")
        with journal_answers(settings, filter_.id):
            filter_ = resolved(queue, filter_)
        matched = operations.matching(operation, filter_)
        if not matched:
            states = " or ".join(operation.takes)
            raise CommandError(
                NOTHING_MATCHED, f"nothing to {name}: it applies to {states} deliveries"
            )
        summary = f"{name} {share_text(matched.total(), limit, newest)}{counts_text(matched)}"
        if dry_run:
            rows = operations.matching_rows(operation, filter_, limit=limit, newest=newest)
            write(rows, COLUMNS, json_lines=json_lines)
            say(f"would {summary}")
            return DONE
        if min(matched.total(), limit or 2) > 1 and not confirmed(summary, yes=yes):
            return NOTHING_MATCHED
        changed, removed, interrupted = until_interrupted(
            changing(
                engine,
                settings,
                operation,
                filter_,
                actor=actor(),
                reason=reason,
                limit=limit,
                newest=newest,
            )
        )
    report(name, operation, changed, removed, json_lines=json_lines)
    if interrupted:
        total = counted(matched.total())
        text = f"interrupted after {changed.total()} of {total}; the others are unchanged"
        raise CommandError(INTERRUPTED, text)
    return DONE if changed else NOTHING_MATCHED


def until_interrupted(
    chunks: Iterable[tuple[Counter[str], int]],
) -> tuple[Counter[str], int, bool]:
    """Take chunks up to the last one or to Ctrl-C: the deliveries that changed, by the state
    before, the bodies that were removed, and whether it was Ctrl-C."""
    changed, removed = Counter[str](), 0
    with suppress(KeyboardInterrupt):
        for counts, bodies in chunks:
            changed.update(counts)
            removed += bodies
        return changed, removed, False
    return changed, removed, True


def report(
    name: str, operation: Operation, changed: Counter[str], removed: int, *, json_lines: bool
) -> None:
    """Print what an operation has done."""
    text = changed_text(name, changed, removed)
    if json_lines:
        row = {"verb": name, "deliveries": changed.total(), "were": changed}
        text = as_json(row | {"bodies_removed": removed})
    typer.echo(text)
    if sending := changed[State.SENDING]:
        say(f"{sending} being sent: {after_sending(name, operation)}")


def changing(
    engine: Engine,
    settings: Settings,
    operation: Operation,
    filter_: Filter,
    *,
    actor: str,
    reason: str,
    limit: int | None = None,
    newest: bool = False,
) -> Iterator[tuple[Counter[str], int]]:
    """Change the deliveries chunk by chunk, and remove the bodies that are needed no longer: after
    each COMMIT the deliveries by the state before, and the number of bodies."""
    spool = mounted_spool(settings, QueueReader(engine))
    chunks = QueueOperations(engine, sends_dsns=settings.bounces == "dsn").in_chunks(
        operation,
        filter_,
        actor=actor,
        reason=reason,
        limit=limit,
        newest=newest,
        route_for=Routes.load(settings).route_for if operation is REROUTE else None,
    )
    for counts, bodies in chunks:
        yield counts, sum(map(spool.remove, bodies)) if spool else 0


def changed_text(name: str, changed: Mapping[str, int], removed: int) -> str:
    """What an operation has done: `drop: 2 deliveries (2 held), bodies removed: 2`."""
    return f"{name}: {counts_text(changed)}" + (f", bodies removed: {removed}" if removed else "")


def after_sending(name: str, operation: Operation) -> str:
    """What becomes of deliveries that are being sent."""
    if operation.pending:
        return f"{name} follows after this attempt, unless the server accepts"
    return "they are no longer held after this attempt"


def share_text(matched: int, limit: int | None, newest: bool) -> str:
    """`the oldest 5 of ` if not all that match are meant."""
    if limit is None or limit >= matched:
        return ""
    return f"the {'newest' if newest else 'oldest'} {limit} of "


def counts_text(counts: Mapping[str, int]) -> str:
    """`3 deliveries (1 held, 2 queued)`."""
    parts = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    return f"{counted(sum(counts.values()))} ({parts})" if parts else "nothing"


def pause(
    route: str | None, server: str | None, *, reason: str, resume: bool, json_lines: bool = False
) -> int:
    """Pause or resume a route or a server; the exit status."""
    settings = load(Settings)
    try:
        subject = subject_of(route, server)
    except ValueError as error:
        raise CommandError(WRONG_USE, str(error)) from None
    verb, after = ("resume", "resumed") if resume else ("pause", "paused")
    with opened(settings) as engine:
        operations = QueueOperations(engine, sends_dsns=False)
        known = _subjects(settings, QueueReader(engine))
        operation = operations.resume if resume else operations.pause
        done = operation(subject, actor=actor(), reason=reason)
    if json_lines:
        typer.echo(as_json({"verb": verb, "subject": subject, "done": done}))
    elif done:
        typer.echo(f"{subject} {after}")
    if not done:
        text = "not paused; `qmqp-relay stats` shows what is" if resume else "already paused"
        raise CommandError(NOTHING_MATCHED, f"{subject} is {text}")
    if not resume and subject not in known:
        names = ", ".join(sorted(known))
        say(f"{subject} is not configured, and was not tried in the last hour; known are {names}")
    return DONE


def subject_of(route: str | None, server: str | None) -> str:
    """What a pause is about, `route:NAME` or `server:NAME`; raises ValueError."""
    if bool(route) == bool(server):
        raise ValueError("name one: --route NAME or --server HOST")
    return f"server:{parse_server(server).name}" if server else f"route:{route}"


def _subjects(settings: Settings, queue: QueueReader) -> set[str]:
    """The routes and servers that our settings name, and the servers that were tried lately."""
    known = {f"server:{row['server']}" for row in queue.read("servers") if row["attempts"]}
    for route in Routes.load(settings).all():
        known |= {f"route:{route.name}", *(f"server:{server.name}" for server in route.servers)}
    return known
