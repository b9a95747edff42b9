"""What is done by hand, and its record: who, what, why, how many, and which deliveries.

How it works: an `AuditEntry` goes through the deliveries that are meant in key order, a chunk a
transaction, so that it never holds up the workers for long and never meets them in another order.
It locks a chunk, and only what is still meant when the rows are locked is changed (`_still`). The
transaction that changes a chunk also notes it: the first one inserts the row of `actions`, later
ones raise its `matched`, and each delivery gets a row in `touched`. So whatever stops an action in
its middle, what it has done until then is on record.

What must stay true: nothing is changed by hand without its record, and nothing is on record that
was not done.
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
# What ends an UPDATE of the deliveries (as d) that were picked.
THESE = "FROM @rows(:keys; queue_id uuid, number int) WHERE d.queue_id = x.queue_id AND d.number = x.number"

_ACTION = """INSERT INTO audit (id, at, actor, verb, reason, filter, matched)
    VALUES (@id(:action), @now, :actor, :verb, :reason, :filter, :matched)
    ON CONFLICT (id) DO UPDATE SET matched = audit.matched + excluded.matched"""
_TOUCHED = f"""INSERT INTO audit_deliveries (queue_id, delivery, action)
    SELECT queue_id, number, @id(:action) FROM ({PICKED}) p WHERE true ON CONFLICT DO NOTHING"""


class AuditEntry:
    """One row of `actions`, which is there as soon as something was done."""

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
        **given: Any,
    ) -> Iterator[list[tuple[str, int, str]]]:
        """Change the deliveries (as d) for which that is so, `limit` of them at most, the oldest
        first; after each chunk (id of 32 digits, number, state it had).

        `change` gets the keys of a chunk, which is locked, as `keys` is in `THESE` and `PICKED`.
        """
        picked = f"""SELECT d.queue_id, d.number, d.state FROM deliveries d
            WHERE {which} AND (d.queue_id, d.number) > (@id(:after), :number)
            ORDER BY d.queue_id, d.number LIMIT :most @locked(d)"""
        given |= {"after": FIRST, "number": 0}
        left = sys.maxsize if limit is None else limit
        while left > 0:
            given["most"] = min(CHUNK, left)
            with writing(self._engine) as connection:
                locked = self._sql.run(connection, picked, **given).all()
                rows = self._still(connection, which, locked, given) if locked else []
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
            if len(locked) < given["most"]:
                return
            given |= {"after": str(locked[-1][0]), "number": locked[-1][1]}

    def _still(
        self, connection: Connection, which: str, locked: list[Any], given: dict[str, Any]
    ) -> list[Any]:
        """Those of the locked deliveries for which `which` is so now that nobody else can change
        them.

        A row that FOR UPDATE has waited for is tested again by PostgreSQL, but only what the
        condition reads of that row itself is new: a view over the same row shows what it was before
        (PostgreSQL, 13.2.1 and EvalPlanQual). The next statement of the transaction sees it as it
        is. On SQLite the transaction is the only writer from its beginning, so nothing can have
        changed.
        """
        if not self._sql.postgresql:
            return locked
        still = f"""SELECT d.queue_id, d.number, d.state FROM deliveries d
            JOIN @rows(:keys; queue_id uuid, number int) ON d.queue_id = x.queue_id AND d.number = x.number
            WHERE {which} ORDER BY d.queue_id, d.number"""
        found: list[Any] = self._sql.run(connection, still, keys=_keys(locked), **given).all()
        return found

    def note(self, connection: Connection, matched: int, keys: str = "") -> None:
        """Record that so much was done, and to which deliveries."""
        self._sql.run(connection, _ACTION, matched=matched, **self._row)
        if keys:
            self._sql.run(connection, _TOUCHED, keys=keys, action=self._row["action"])

    def note_rows(self, connection: Connection, rows: Sequence[Any]) -> None:
        """The same for rows that begin with the key of a delivery; for none of them nothing is
        recorded."""
        if rows:
            self.note(connection, len(rows), _keys(rows))


def _keys(rows: Sequence[Any]) -> str:
    return json.dumps([{"queue_id": str(row[0]), "number": row[1]} for row in rows])
