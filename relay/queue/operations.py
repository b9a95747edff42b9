"""The operations on the queue: retry, hold, release, bounce, drop, reroute, pause and resume.

An operation goes through the deliveries that a filter matches in key order, a chunk with its record
(`relay.queue.audit`) a transaction, so that it never blocks the workers for long and never
deadlocks with them. A delivery in flight is not changed under its worker: the operation becomes
its `pending_operation`, which takes effect after every outcome except a K. `release` cancels a
pending hold.

What must stay true: an operation follows its rows in `states.TRANSITIONS`; every operation that
changed something has a row in `audit`; a filter on recipients selects the whole delivery that
carries them.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, text

from relay.db.engine import reading, writing
from relay.db.schema import literals
from relay.db.sql import Queries
from relay.log import escaped
from relay.queue.audit import CHUNK, FIRST, AuditEntry, keys_of
from relay.queue.split import Splitter
from relay.queue.states import PENDING_STATES, TRANSITIONS, State
from relay.report.filters import Filter
from relay.report.queries import QueueReader
from relay.spool.retention import deletable_bodies


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation on deliveries. `name` is also the event of the transition, and the
    statement.

    `takes`: the states that it applies to; `state`: the state after it. A delivery that is being
    sent gets the pending operation `pending`, or loses the pending operation `cancels`.
    """

    name: str
    takes: tuple[State, ...]
    state: State
    pending: str | None = None
    cancels: str | None = None


def _takes(event: str) -> tuple[State, ...]:
    return tuple(row.before for row in TRANSITIONS if row.event == event and row.before)


OPERATIONS = {
    name: Operation(name, _takes(name), state, pending=name)
    for name, state in PENDING_STATES.items()
}
OPERATIONS["release"] = Operation("release", _takes("release"), State.QUEUED, cancels="hold")
# A route is chosen when a message is accepted. This chooses again, with the routes of today.
REROUTE = Operation("reroute", (State.QUEUED, State.DEFERRED, State.HELD), State.QUEUED)


class QueueOperations:
    """The operations of an operator on the queue. `sends_dsns`: BOUNCES is not off."""

    def __init__(self, engine: Engine, *, sends_dsns: bool) -> None:
        self._engine = engine
        self._queries = Queries(engine, __name__, sends_dsns=sends_dsns)
        self._splitter = Splitter(engine, sends_dsns=sends_dsns)

    def matching(self, operation: Operation, filter_: Filter) -> Counter[str]:
        """How many deliveries the operation would change, by state. It changes nothing."""
        where, parameters = self._condition(operation, filter_)
        sql = f"SELECT d.state, count(*) FROM deliveries d WHERE {where} GROUP BY d.state"
        with reading(self._engine) as connection:
            return Counter(dict(connection.execute(text(sql), parameters).all()))

    def matching_rows(
        self,
        operation: Operation,
        filter_: Filter,
        *,
        limit: int | None = None,
        newest: bool = False,
    ) -> Iterator[dict[str, Any]]:
        """Rows of `mail_history` that the operation would change, with all recipients of each
        delivery; streamed.

        `limit`: those of so many deliveries, the oldest or the `newest`.
        """
        where, parameters = self._condition(operation, filter_)
        if limit is not None:
            parameters["limit"] = limit
            order = "1 DESC, 2 DESC" if newest else "1, 2"
            where = f"""(d.queue_id, d.number) IN (SELECT d.queue_id, d.number FROM deliveries d
                WHERE {where} ORDER BY {order} LIMIT :limit)"""
        return QueueReader(self._engine).select(
            f"""SELECT v.* FROM mail_history v WHERE EXISTS (SELECT 1 FROM deliveries d
                WHERE d.queue_id = v.queue_uuid AND d.number = v.delivery AND {where})
            ORDER BY v.queue_uuid, v.position""",
            parameters,
        )

    def apply(
        self,
        operation: Operation,
        filter_: Filter,
        *,
        actor: str,
        reason: str,
        route_for: Callable[[str], str] | None = None,
        limit: int | None = None,
    ) -> tuple[Counter[str], list[str]]:
        """Change the deliveries; their number by the state before, and the ids of messages whose
        body can be deleted.

        `route_for` gives each delivery the route that its recipients have today, or divides it if
        they have several. `limit`: at most so many deliveries, the oldest first.
        """
        chunks = list(
            self.in_chunks(
                operation, filter_, actor=actor, reason=reason, route_for=route_for, limit=limit
            )
        )
        changed = sum((counts for counts, _ in chunks), Counter[str]())
        return changed, [queue_id for _, ids in chunks for queue_id in ids]

    def in_chunks(
        self,
        operation: Operation,
        filter_: Filter,
        *,
        actor: str,
        reason: str,
        route_for: Callable[[str], str] | None = None,
        limit: int | None = None,
        newest: bool = False,
    ) -> Iterator[tuple[Counter[str], list[str]]]:
        """Change the deliveries as `apply` does, chunk by chunk; the result of each after its
        COMMIT.

        `newest`: the newest `limit` of them, also in the order of their keys.
        """
        where, parameters = self._condition(operation, filter_)
        why = _reason(operation, actor, reason)
        shown = filter_.shown() if limit is None else f"{filter_.shown()} --limit {limit}".lstrip()
        if newest and limit is not None:
            shown += " --newest"
            where, parameters = self._from_newest(where, parameters, limit)
        entry = AuditEntry(self._engine, actor, operation.name, reason, shown)
        parameters |= {"after": FIRST, "number": 0}
        left = sys.maxsize if limit is None else limit
        while left > 0:
            parameters["most"] = min(CHUNK, left)
            with writing(self._engine) as connection:
                locked, rows = self._lock(connection, where, parameters)
                if rows:
                    self._queries.run(connection, operation.name, keys=keys_of(rows), why=why)
                    if route_for:
                        self._reroute(connection, rows, route_for)
                    entry.note_rows(connection, rows)
            if rows:
                free: list[str] = []
                if operation.state in (State.DROPPED, State.BOUNCED):
                    ended = {str(key) for key, _, state in rows if state != State.SENDING}
                    free = deletable_bodies(self._engine, (key.replace("-", "") for key in ended))
                yield Counter(state for _, _, state in rows), free
            left -= len(rows)
            if len(locked) < parameters["most"]:
                return
            parameters |= {"after": str(locked[-1][0]), "number": locked[-1][1]}

    def _from_newest(
        self, where: str, parameters: dict[str, Any], limit: int
    ) -> tuple[str, dict[str, Any]]:
        """The condition for the newest `limit` of the deliveries, which can be locked in key
        order: it begins with the oldest of them."""
        sql = f"""SELECT d.queue_id, d.number FROM deliveries d WHERE {where}
            ORDER BY d.queue_id DESC, d.number DESC LIMIT 1 OFFSET :beyond"""
        with reading(self._engine) as connection:
            row = connection.execute(text(sql), parameters | {"beyond": limit - 1}).first()
        if row is None:
            return where, parameters
        first = {"first_id": str(row[0]), "first_number": row[1]}
        return f"({where}) AND (d.queue_id, d.number) >= (:first_id, :first_number)", (
            parameters | first
        )

    def _lock(
        self, connection: Connection, where: str, parameters: dict[str, Any]
    ) -> tuple[Sequence[Any], Sequence[Any]]:
        """Lock the next chunk in key order; its rows (id, number, state), and those of them that
        still match now that no other transaction can change them.

        After FOR UPDATE has waited for a row, PostgreSQL tests the condition again, but only the
        row itself is new: a view over the same row shows the old values (PostgreSQL manual, 13.2.1,
        EvalPlanQual). The next statement of the transaction sees the new values. On SQLite the
        transaction is the only writer from its beginning, so no row can have changed.
        """
        picked = f"""SELECT d.queue_id, d.number, d.state FROM deliveries d
            WHERE {where} AND (d.queue_id, d.number) > (:after, :number)
            ORDER BY d.queue_id, d.number LIMIT :most"""
        if self._engine.dialect.name == "sqlite":
            rows = connection.execute(text(picked), parameters).all()
            return rows, rows
        locked = connection.execute(text(f"{picked} FOR UPDATE OF d"), parameters).all()
        matching = f"""SELECT d.queue_id, d.number, d.state FROM deliveries d
            JOIN json_to_recordset(CAST(:keys AS json)) AS x(queue_id uuid, number int)
            ON d.queue_id = x.queue_id AND d.number = x.number
            WHERE {where} ORDER BY d.queue_id, d.number"""
        again = parameters | {"keys": keys_of(locked)}
        return locked, connection.execute(text(matching), again).all()

    def pause(self, subject: str, *, actor: str, reason: str) -> bool:
        """Send nothing to `route:NAME` or `server:NAME` until `resume`; False if it is paused
        already."""
        return self._switch("pause", subject, actor, reason)

    def resume(self, subject: str, *, actor: str, reason: str) -> bool:
        """End a pause; False if there was none."""
        return self._switch("resume", subject, actor, reason)

    def _switch(self, verb: str, subject: str, actor: str, reason: str) -> bool:
        with writing(self._engine) as connection:
            parameters = {"subject": subject, "actor": actor, "reason": reason}
            done = bool(self._queries.run(connection, verb, **parameters).rowcount)
            if done:
                AuditEntry(self._engine, actor, f"{verb} {subject}", reason).note(connection, 1)
        return done

    def _reroute(
        self, connection: Connection, rows: Sequence[Any], route_for: Callable[[str], str]
    ) -> None:
        """Give these deliveries, which the caller has locked, the routes that their recipients have
        today."""
        for key, number, _ in rows:
            ways: dict[str, list[int]] = {}
            for position, address in self._splitter.recipients(
                connection, str(key), number
            ).items():
                ways.setdefault(route_for(address), []).append(position)
            if ways:
                self._splitter.divide(connection, str(key), number, ways)

    def _condition(self, operation: Operation, filter_: Filter) -> tuple[str, dict[str, Any]]:
        """The condition for deliveries (as d) that a filter matches and the operation applies to.

        A filter is known at run time only, so this is put together here and does not stand in a
        file.
        """
        where, parameters = filter_.where(self._engine.dialect.name)
        takes = f"d.state IN ({literals(operation.takes)})"
        if operation.pending:
            takes = f"({takes} OR d.state = 'sending')"
        elif operation.cancels:
            pending = f"d.pending_operation = '{operation.cancels}'"
            takes = f"({takes} OR d.state = 'sending' AND {pending})"
        # Without it SQLite scans every delivery.
        by_id = "AND d.queue_id = :id" if filter_.id is not None else ""
        return (
            f"""{takes} {by_id} AND EXISTS (SELECT 1 FROM mail_history h
            WHERE h.queue_uuid = d.queue_id AND h.delivery = d.number
            AND {where})""",
            parameters,
        )


def _reason(operation: Operation, actor: str, reason: str) -> str:
    """The reason in `last_reply`. The DSN of a bounce quotes it, so it names no operator."""
    by = "an operator" if operation.state is State.BOUNCED else actor
    done = "retried" if operation.state is State.QUEUED else operation.state
    return escaped(f"{done} by {by}" + (f": {reason}" if reason else ""))
