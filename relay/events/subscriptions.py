"""Subscriptions: who gets events, and how that goes.

Each worker registers the webhooks of its settings (and the plugins with an `event` hook) when it
starts, and renews them every RENEWAL. From its first registration on events are recorded for a
subscription, also while no worker runs. What three turns of a cleaner, which are longer apart,
found without a renewal is removed with its notifications. (A process that was stopped and runs
again may clean before it renews; so two turns are not enough.)

What must stay true: types and routes are those of the worker that registered last; a disabled
subscription gets no new events until an operator enables it.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Engine

from relay.db.engine import reading, writing
from relay.db.sql import Queries
from relay.events.model import NewSubscription
from relay.queue.audit import AuditEntry
from relay.report.queries import as_rows

RENEWAL = 60.0  # seconds
TURNS = 3
CHUNK = 5000  # notifications that one transaction removes


@dataclass(frozen=True, slots=True)
class Subscription:
    """A row of `subscriptions`, with what waits for it. `oldest_at`: since when."""

    name: str
    types: tuple[str, ...]
    routes: tuple[str, ...]
    seen_at: datetime
    disabled_at: datetime | None
    disabled_reason: str | None
    failing_at: datetime | None
    last_error: str | None
    succeeded_at: datetime | None
    pending: int
    oldest_at: datetime | None


class Subscriptions:
    """The table of subscriptions."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queries = Queries(engine, __name__)
        self._unchanged: dict[str, tuple[str, int]] = {}  # when it was renewed, in how many turns

    def register(self, subscriptions: Iterable[NewSubscription]) -> None:
        """Insert or renew subscriptions."""
        rows = [
            {
                "name": one.name,
                "types": [str(kind) for kind in one.types] or None,
                "routes": list(one.routes) or None,
            }
            for one in subscriptions
        ]
        with writing(self._engine) as connection:
            self._queries.run(connection, "register", subscriptions=json.dumps(rows))

    def all(self) -> list[Subscription]:
        """Every subscription by name, with what waits for it."""
        with reading(self._engine) as connection:
            rows = list(as_rows(self._queries.run(connection, "all")))
        return [
            Subscription(
                **{
                    **row,
                    "types": tuple(json.loads(row["types"] or "[]")),
                    "routes": tuple(json.loads(row["routes"] or "[]")),
                }
            )
            for row in rows
        ]

    def note_success(self, name: str) -> None:
        """Record that events arrive."""
        with writing(self._engine) as connection:
            self._queries.run(connection, "note_success", subscription=name)

    def note_failure(self, name: str, error: str) -> None:
        """Record that an event did not arrive."""
        with writing(self._engine) as connection:
            self._queries.run(connection, "note_failure", subscription=name, error=error)

    def disable(self, name: str, reason: str) -> bool:
        """Record no events for it until `enable`; False if it is disabled already."""
        with writing(self._engine) as connection:
            done = self._queries.run(connection, "disable", subscription=name, reason=reason)
            return bool(done.rowcount)

    def enable(self, name: str, *, actor: str, reason: str = "") -> bool:
        """Record events for it again; what waited is due. False if it is not disabled."""
        entry = AuditEntry(self._engine, actor, f"webhooks enable {name}", reason)
        with writing(self._engine) as connection:
            done = bool(self._queries.run(connection, "enable", subscription=name).rowcount)
            if done:
                entry.note(connection, 1)
        return done

    def remove_stale(self) -> list[str]:
        """Remove those that TURNS calls in a row found without a renewal; their names."""
        with reading(self._engine) as connection:
            now = dict(self._queries.run(connection, "seen").all())
        before = self._unchanged
        self._unchanged = {
            name: (seen, before[name][1] + 1 if before.get(name, ("", 0))[0] == seen else 1)
            for name, seen in now.items()
        }
        stale = [name for name, (_, turns) in self._unchanged.items() if turns >= TURNS]
        return [name for name in stale if self._remove(name, now[name])]

    def _remove(self, name: str, seen: str) -> bool:
        """Remove one and its notifications; False if it was renewed meanwhile."""
        with writing(self._engine) as connection:
            if not self._queries.run(connection, "remove", subscription=name, seen=seen).rowcount:
                return False
        count = CHUNK
        while count == CHUNK:
            with writing(self._engine) as connection:
                parameters = {"subscription": name, "most": CHUNK}
                removed = self._queries.run(connection, "remove_notifications", **parameters)
                count = int(removed.rowcount)
        return True
