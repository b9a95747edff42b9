"""The outbox as deliverers use it: claim notifications, finish them, read and replay events.

A notification is an event that a subscription has not got yet. `claim` takes those that are due, of
each message only the oldest, so the events of a message arrive in their order; a younger one waits
for it. A claim lasts CLAIM_SECONDS and has a random token: if a worker dies, another one claims the
notification again, and what the first one reports later changes nothing.

What must stay true: a notification is deleted only when it was delivered or given up; of a message
and a subscription at most one notification is claimed; no statement reads all that waits, but
`pending` and `expire`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine

from relay.db.engine import reading, writing
from relay.db.sql import Queries
from relay.events.model import EventType, MailEvent
from relay.ids import dashed, new_id
from relay.report.queries import as_rows

CLAIM_SECONDS = 120.0  # more than any delivery of an event takes
# Due notifications that a claim looks at; those that wait for an older one are put off.
SCANNED = 32
CHUNK = 500  # events that one transaction replays


class Report(StrEnum):
    """What to do with a claimed notification."""

    DONE = "done"
    RETRY = "retry"  # it failed, and counts as a try
    RETURN = "return"  # it was not tried


class ClaimedEvent(NamedTuple):
    """An event that was claimed for a subscription; `tries` were made before."""

    event: MailEvent
    tries: int
    claim: str


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """The end of a claim; `delay`: seconds until the next try."""

    claimed: ClaimedEvent
    report: Report
    delay: float = 0.0


class EventFilter(NamedTuple):
    """Which events are read or replayed. `seconds`: those that are not older; `queue_id`: those
    of a message."""

    types: Sequence[EventType] = tuple(EventType)
    seconds: float = 1e9  # longer than any row is kept
    queue_id: str | None = None


class Outbox:
    """The tables `events` and `notifications`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queries = Queries(engine, __name__, lease=CLAIM_SECONDS, scanned=SCANNED)

    def claim(self, subscription: str, free: int) -> tuple[list[ClaimedEvent], bool]:
        """Claim at most `free` events for a subscription, and whether more may be due.

        Without any that is due nothing is written.
        """
        with reading(self._engine) as connection:
            if not self._queries.run(connection, "is_due", subscription=subscription).scalar():
                return [], False
        token = dashed(new_id())
        with writing(self._engine) as connection:
            rows = self._queries.run(
                connection, "claim", subscription=subscription, free=free, token=token
            ).all()
        claimed = {row.sequence: row for row in rows if row.claimed}
        if not claimed:
            return [], bool(rows)
        events = self._read("by_sequence", sequences=json.dumps(list(claimed)))
        found = [ClaimedEvent(event, claimed[event.sequence].tries, token) for event in events]
        return found, True

    def finish(self, subscription: str, finished: Sequence[FinishedEvent]) -> None:
        """Record the end of claims. After one that is done the next event of its message is due."""
        rows = [
            {
                "queue_id": dashed(one.claimed.event.queue_id),
                "sequence": one.claimed.event.sequence,
                "claim": one.claimed.claim,
                "report": str(one.report),
                "delay": one.delay,
            }
            for one in finished
        ]
        with writing(self._engine) as connection:
            self._queries.run(
                connection, "finish", subscription=subscription, finished=json.dumps(rows)
            )

    def wake(self, subscription: str, most: int) -> int:
        """Make events due now that failed before; how many."""
        with writing(self._engine) as connection:
            woken = self._queries.run(connection, "wake", subscription=subscription, most=most)
            return int(woken.rowcount)

    def expire(self, subscription: str, seconds: float, most: int) -> int:
        """Give up notifications that have waited for so long; how many."""
        with writing(self._engine) as connection:
            expired = self._queries.run(
                connection, "expire", subscription=subscription, seconds=seconds, most=most
            )
            return int(expired.rowcount)

    def events(self, filter_: EventFilter, *, most: int) -> list[MailEvent]:
        """The newest events that match, the oldest of them first."""
        return self._read("newest", **_parameters(filter_), most=most)[::-1]

    def events_after(self, filter_: EventFilter, sequence: int, *, most: int) -> list[MailEvent]:
        """Events that match and are behind `sequence`, in order."""
        return self._read("after", **_parameters(filter_), after=sequence, most=most)

    def replay(self, filter_: EventFilter, subscription: str | None) -> Iterator[int]:
        """Notify a subscription (None: each that is not disabled) of events again; yields for each
        transaction how many notifications it made."""
        after = 0
        while True:
            with writing(self._engine) as connection:
                sequences = self._sequences(connection, filter_, after)
                if not sequences:
                    return
                made = self._queries.run(
                    connection,
                    "replay",
                    sequences=json.dumps(sequences),
                    subscription=subscription,
                )
                count = int(made.rowcount)
            yield count
            after = sequences[-1]

    def _sequences(self, connection: Connection, filter_: EventFilter, after: int) -> list[int]:
        rows = self._queries.run(
            connection, "sequences", **_parameters(filter_), after=after, most=CHUNK
        )
        return list(rows.scalars())

    def _read(self, name: str, **parameters: Any) -> list[MailEvent]:
        with reading(self._engine) as connection:
            rows = list(as_rows(self._queries.run(connection, name, **parameters)))
        return [_event(row) for row in rows]


def _parameters(filter_: EventFilter) -> dict[str, Any]:
    return {
        "types": json.dumps([str(kind) for kind in filter_.types]),
        "seconds": filter_.seconds,
        "queue_id": dashed(filter_.queue_id) if filter_.queue_id else None,
    }


def _event(row: dict[str, Any]) -> MailEvent:
    """A row; SQLite has no arrays, so there the recipients are JSON."""
    listed = row["recipients"]
    recipients = json.loads(listed) if isinstance(listed, str) else listed or ()
    when: datetime = row["event_at"]
    return MailEvent(
        **{
            **row,
            "event_at": when,
            "type": EventType(row["type"]),
            "recipients": tuple(recipients),
        }
    )
