"""The audit: each operation with its actor, reason and filter, and the deliveries that it changed.

An `AuditEntry` walks through the deliveries that match in key order, a chunk a transaction, so that
it never blocks the workers for long and never deadlocks with them. It locks a chunk, checks the
condition again (`_still_matching`), changes the rows and records them in the same transaction: the
first chunk inserts the row of `audit`, later chunks raise its `matched`, and each delivery gets a
row in `audit_deliveries`. An operation that is interrupted has recorded what it did.

What must stay true: an operator's change and its record are one transaction.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sqlalchemy import Connection, Engine

from relay.db.engine import writing
from relay.db.sql import Statements
from relay.ids import dashed, new_id

CHUNK = 500
FIRST = "00000000-0000-0000-0000-000000000000"  # before every id
PICKED = "SELECT queue_id, number FROM @rows(:keys; queue_id uuid, number int)"
# The end of an UPDATE of the deliveries (as d) in `:keys`.
THESE = "FROM @rows(:keys; queue_id uuid, number int) WHERE d.queue_id = x.queue_id AND d.number = x.number"

_INSERT_AUDIT = """INSERT INTO audit (id, at, actor, verb, reason, filter, matched)
    VALUES (@id(:action), @now, :actor, :verb, :reason, :filter, :matched)
    ON CONFLICT (id) DO UPDATE SET matched = audit.matched + excluded.matched"""
_INSERT_DELIVERIES = f"""INSERT INTO audit_deliveries (queue_id, delivery, action)
    SELECT queue_id, number, @id(:action) FROM ({PICKED}) p WHERE true ON CONFLICT DO NOTHING"""


class AuditEntry:
    """One row of `audit`. It is inserted with the first change."""

    def __init__(
        self,
        engine: Engine,
        sql: Statements,
        *,
        actor: str,
        verb: str,
        reason: str,
        filter_shown: str = "",
    ) -> None:
        self._engine, self._sql = engine, sql
        self._row = {
            "action": dashed(new_id()), "actor": actor, "verb": verb, "reason": reason, "filter": filter_shown
        }  # fmt: skip

    def through(
        self,
        which: str,
        change: Callable[[Connection, str], object],
        *,
        limit: int | None = None,
        **parameters: Any,
    ) -> Iterator[list[tuple[str, int, str]]]:
        """Change the deliveries (as d) that the condition `which` matches, the oldest first, at most
        `limit`. Yields after each chunk its rows: id of 32 digits, number, state before.

        `change` gets the keys of a locked chunk, as `THESE` and `PICKED` take them in `:keys`.
        """
        picked = f"""SELECT d.queue_id, d.number, d.state FROM deliveries d
            WHERE {which} AND (d.queue_id, d.number) > (@id(:after), :number)
            ORDER BY d.queue_id, d.number LIMIT :most @locked(d)"""
        parameters |= {"after": FIRST, "number": 0}
        left = sys.maxsize if limit is None else limit
        while left > 0:
            parameters["most"] = min(CHUNK, left)
            with writing(self._engine) as connection:
                locked = self._sql.run(connection, picked, **parameters).all()
                rows = self._still_matching(connection, which, locked, parameters) if locked else []
                if rows:
                    keys = _keys(rows)
                    change(connection, keys)
                    self.note(connection, len(rows), keys)
            if rows:
                yield [
                    (str(queue_id).replace("-", ""), number, state)
                    for queue_id, number, state in rows
                ]
            left -= len(rows)
            if len(locked) < parameters["most"]:
                return
            parameters |= {"after": str(locked[-1][0]), "number": locked[-1][1]}

    def _still_matching(
        self, connection: Connection, which: str, locked: list[Any], parameters: dict[str, Any]
    ) -> list[Any]:
        """The locked deliveries that still match, now that no other transaction can change them.

        After FOR UPDATE has waited for a row, PostgreSQL tests the condition again, but only the
        row itself is new: a view over the same row shows the old values (PostgreSQL manual, 13.2.1,
        EvalPlanQual). The next statement of the transaction sees the new values. On SQLite the
        transaction is the only writer from its beginning, so no row can have changed.
        """
        if not self._sql.postgresql:
            return locked
        matching = f"""SELECT d.queue_id, d.number, d.state FROM deliveries d
            JOIN @rows(:keys; queue_id uuid, number int) ON d.queue_id = x.queue_id AND d.number = x.number
            WHERE {which} ORDER BY d.queue_id, d.number"""
        rows: list[Any] = self._sql.run(
            connection, matching, keys=_keys(locked), **parameters
        ).all()
        return rows

    def note(self, connection: Connection, matched: int, keys: str = "") -> None:
        """Record that `matched` deliveries were changed, and their keys."""
        self._sql.run(connection, _INSERT_AUDIT, matched=matched, **self._row)
        if keys:
            self._sql.run(connection, _INSERT_DELIVERIES, keys=keys, action=self._row["action"])

    def note_rows(self, connection: Connection, rows: Sequence[Any]) -> None:
        """Record rows that begin with the key of a delivery; without rows nothing is recorded."""
        if rows:
            self.note(connection, len(rows), _keys(rows))


def _keys(rows: Sequence[Any]) -> str:
    return json.dumps([{"queue_id": str(row[0]), "number": row[1]} for row in rows])
