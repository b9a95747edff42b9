"""The audit: each operation with its actor, reason and filter, and the deliveries that it changed.

An `AuditEntry` walks through the deliveries that match in key order, a chunk a transaction, so that
it never blocks the workers for long and never deadlocks with them. It locks a chunk, checks the
condition again, changes the rows and records them in the same transaction: the first chunk inserts
the row of `audit`, later chunks raise its `matched`, and each delivery gets a row in
`audit_deliveries`. An operation that is interrupted has recorded what it did.

What must stay true: an operator's change and its record are one transaction.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, text

from relay.db.engine import writing
from relay.db.sql import Queries
from relay.ids import dashed, new_id

CHUNK = 500
FIRST = "00000000-0000-0000-0000-000000000000"  # before every id


class Change(NamedTuple):
    """A delivery that an operation changed. `queue_id` has 32 digits, `before` is the old state."""

    queue_id: str
    number: int
    before: str


@dataclass
class AuditEntry:
    """One row of `audit`. It is inserted with the first change. `filter_shown`: the filter as the
    operator would type it."""

    engine: Engine
    actor: str
    verb: str
    reason: str
    filter_shown: str = ""
    action: str = field(default_factory=lambda: dashed(new_id()))

    def through(
        self,
        which: str,
        change: Callable[[Connection, str], object],
        *,
        limit: int | None = None,
        **parameters: Any,
    ) -> Iterator[list[Change]]:
        """Change the deliveries (as d) that the condition `which` matches, the oldest first, at
        most `limit`. Yields the changes of each chunk after its COMMIT.

        `change` gets the keys of a locked chunk, as statements take them in `:keys`. The condition
        is SQL of this database. What a filter matches is known at run time only, so this selection
        is built here and does not stand in a file.
        """
        postgresql = self.engine.dialect.name == "postgresql"
        picked = f"""SELECT d.queue_id, d.number, d.state FROM deliveries d
            WHERE {which} AND (d.queue_id, d.number) > (:after, :number)
            ORDER BY d.queue_id, d.number LIMIT :most"""
        # After FOR UPDATE has waited for a row, PostgreSQL tests the condition again, but only the
        # row itself is new: a view over the same row shows the old values (PostgreSQL manual,
        # 13.2.1, EvalPlanQual). The next statement of the transaction sees the new values. On
        # SQLite the transaction is the only writer from its beginning, so no row can have changed.
        matching = f"""SELECT d.queue_id, d.number, d.state FROM deliveries d
            JOIN json_to_recordset(CAST(:keys AS json)) AS x(queue_id uuid, number int)
            ON d.queue_id = x.queue_id AND d.number = x.number
            WHERE {which} ORDER BY d.queue_id, d.number"""
        parameters |= {"after": FIRST, "number": 0}
        left = sys.maxsize if limit is None else limit
        while left > 0:
            parameters["most"] = min(CHUNK, left)
            with writing(self.engine) as connection:
                lock = " FOR UPDATE OF d" if postgresql else ""
                rows = locked = connection.execute(text(picked + lock), parameters).all()
                if locked and postgresql:
                    again = parameters | {"keys": keys_of(locked)}
                    rows = connection.execute(text(matching), again).all()
                if rows:
                    change(connection, keys_of(rows))
                    self.note_rows(connection, rows)
            if rows:
                yield [
                    Change(str(queue_id).replace("-", ""), number, state)
                    for queue_id, number, state in rows
                ]
            left -= len(rows)
            if len(locked) < parameters["most"]:
                return
            parameters |= {"after": str(locked[-1][0]), "number": locked[-1][1]}

    def note(self, connection: Connection, matched: int, keys: str = "[]") -> None:
        """Record that `matched` deliveries were changed, and their keys."""
        Queries(self.engine, __name__).run(
            connection,
            "record",
            action=self.action,
            actor=self.actor,
            verb=self.verb,
            reason=self.reason,
            filter=self.filter_shown,
            matched=matched,
            keys=keys,
        )

    def note_rows(self, connection: Connection, rows: Sequence[Any]) -> None:
        """Record rows that begin with the key of a delivery; without rows nothing is recorded."""
        if rows:
            self.note(connection, len(rows), keys_of(rows))


def keys_of(rows: Sequence[Sequence[Any]]) -> str:
    """Rows that begin with the key of a delivery, as statements take them in `:keys`."""
    return json.dumps([{"queue_id": str(row[0]), "number": row[1]} for row in rows])
