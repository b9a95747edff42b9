"""What operators do to the queue: retry, hold, release, bounce, drop, reroute, pause and resume.

An operation goes through the deliveries that a filter matches in chunks, each with its record
(`relay.queue.audit`). A delivery in flight is not changed under its worker: the operation becomes
its `pending_operation`, which takes effect after every outcome except a K. `release` cancels a
pending hold.

What must stay true: an operation follows its rows in `states.TRANSITIONS`; every operation that
changed something has a row in `audit`; a filter on recipients selects the whole delivery that
carries them.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine

from relay.db.engine import reading, writing
from relay.db.schema import DSN_PENDING, words
from relay.db.sql import Statements
from relay.log import escaped
from relay.queue.audit import PICKED, THESE, AuditEntry
from relay.queue.split import Splitter
from relay.queue.states import TRANSITIONS, State
from relay.report.filters import Filter
from relay.report.queries import QueueReader
from relay.spool.retention import deletable_bodies


@dataclass(frozen=True, slots=True)
class Operation:
    """What an operator may do to deliveries. `name` is also the event of the transition.

    `takes`: the states that it applies to; `state`: the state after it; `sets`: SQL expressions by
    column. `wanted`: the pending operation that a delivery gets which is being sent; `cancels`: the
    pending operation that it loses.
    """

    name: str
    takes: tuple[State, ...]
    state: State
    sets: dict[str, str]
    wanted: str | None = None
    cancels: str | None = None


def _operation(
    name: str, sets: dict[str, str], wanted: str | None = None, cancels: str | None = None
) -> Operation:
    """An operation that takes each delivery along the rows of its name in `TRANSITIONS`."""
    rows = [row for row in TRANSITIONS if row.event == name]
    takes = tuple(row.before for row in rows if row.before)
    return Operation(name, takes, rows[0].after, sets, wanted, cancels)


_REASON = {"last_reply": ":why", "reason_source": "'operator'"}
OPERATIONS = {
    operation.name: operation
    for operation in (
        _operation("retry", {"due_at": "@now", "backoff_step": "0"}, "retry"),
        _operation("hold", {"due_at": "NULL"} | _REASON, "hold"),
        _operation(
            "release",
            {"due_at": "@now", "backoff_step": "0", "crash_count": "0"},
            cancels="hold",
        ),
        _operation(
            "bounce",
            {
                "due_at": DSN_PENDING,
                "finished_at": "@now",
                "last_outcome": "coalesce(d.last_outcome, 'rejected')",
            }
            | _REASON,
            "bounce",
        ),
        _operation("drop", {"due_at": "NULL", "finished_at": "@now"} | _REASON, "drop"),
    )
}
# A route is chosen when a message is accepted. This chooses again, with the routes of today. What
# is not held is tried at once.
REROUTE = Operation(
    "reroute",
    (State.QUEUED, State.DEFERRED, State.HELD),
    State.QUEUED,
    {
        "state": "CASE WHEN d.state = 'held' THEN d.state ELSE 'queued' END",
        "due_at": "CASE WHEN d.state <> 'held' THEN @now END",
        "backoff_step": "0",
    },
)


class QueueOperations:
    """The operations of an operator on the queue."""

    def __init__(self, engine: Engine, *, notices: bool) -> None:
        self._engine, self._queue = engine, QueueReader(engine)
        self._sql = Statements(engine, notices=notices)
        self._splitter = Splitter(self._sql)

    def matching(self, operation: Operation, wanted: Filter) -> Counter[str]:
        """How many deliveries the operation would change, by state. It changes nothing."""
        where, parameters = _condition(operation, wanted, self._engine.dialect.name)
        sql = f"SELECT d.state, count(*) FROM deliveries d WHERE {where} GROUP BY d.state"
        with reading(self._engine) as connection:
            return Counter(dict(self._sql.run(connection, sql, **parameters).all()))

    def touched(
        self, operation: Operation, wanted: Filter, *, limit: int | None = None
    ) -> Iterator[dict[str, Any]]:
        """Rows of `mail_history` that the operation would touch, all recipients of a delivery among
        them; streamed.

        `limit`: those of the oldest so many deliveries.
        """
        where, parameters = _condition(operation, wanted, self._engine.dialect.name)
        if limit is not None:
            oldest = f"SELECT d.queue_id, d.number FROM deliveries d WHERE {where} ORDER BY 1, 2 LIMIT :limit"
            where, parameters = (
                f"(d.queue_id, d.number) IN ({oldest})",
                parameters | {"limit": limit},
            )
        return self._queue.select(
            f"""SELECT v.* FROM mail_history v WHERE EXISTS (SELECT 1 FROM deliveries d WHERE
                d.queue_id = v.queue_uuid AND d.number = v.delivery AND {where}) ORDER BY v.queue_uuid, v.position""",
            parameters,
        )

    def apply(
        self, operation: Operation, wanted: Filter, *, actor: str, reason: str,
        route_for: Callable[[str], str] | None = None, limit: int | None = None,
    ) -> tuple[Counter[str], list[str]]:  # fmt: skip
        """Change the deliveries; their number by the state before, and the ids of messages whose body
        can be deleted.

        `route_for` gives each delivery the route that its recipients have today, or divides it if
        they have several. `limit`: at most so many deliveries, the oldest first.
        """
        all_touched: Counter[str] = Counter()
        free: list[str] = []
        chunks = self.in_chunks(
            operation, wanted, actor=actor, reason=reason, route_for=route_for, limit=limit
        )
        for touched, ids in chunks:
            all_touched.update(touched)
            free += ids
        return all_touched, free

    def in_chunks(
        self, operation: Operation, wanted: Filter, *, actor: str, reason: str,
        route_for: Callable[[str], str] | None = None, limit: int | None = None,
    ) -> Iterator[tuple[Counter[str], list[str]]]:  # fmt: skip
        """Change the deliveries as `apply` does, chunk by chunk; the result of each after its
        COMMIT."""
        where, parameters = _condition(operation, wanted, self._engine.dialect.name)
        change, why = (
            f"-- event: {operation.name}\nUPDATE deliveries AS d SET {_sets(operation)} {THESE}",
            _reason(operation, actor, reason),
        )

        def do(connection: Connection, keys: str) -> None:
            self._sql.run(connection, change, keys=keys, why=why)
            if route_for:
                self._reroute(connection, keys, route_for)

        shown = wanted.shown() if limit is None else f"{wanted.shown()} --limit {limit}".lstrip()
        entry = AuditEntry(
            self._engine,
            self._sql,
            actor=actor,
            verb=operation.name,
            reason=reason,
            filter_shown=shown,
        )
        for rows in entry.through(where, do, limit=limit, **parameters):
            ended = {queue_id for queue_id, _, was in rows if was != State.SENDING}
            free = (
                deletable_bodies(self._engine, self._sql, ended)
                if operation.state in (State.DROPPED, State.BOUNCED)
                else []
            )
            yield Counter(was for _, _, was in rows), free

    def pause(self, subject: str, *, actor: str, reason: str) -> bool:
        """Send nothing to `route:NAME` or `server:NAME` until `resume`; False if it is paused
        already."""
        with writing(self._engine) as connection:
            sql = """INSERT INTO pauses (subject, since, actor, reason) VALUES (:subject, @now, :actor, :reason)
                ON CONFLICT DO NOTHING"""
            done = bool(
                self._sql.run(connection, sql, subject=subject, actor=actor, reason=reason).rowcount
            )
            if done:
                entry = AuditEntry(
                    self._engine, self._sql, actor=actor, verb=f"pause {subject}", reason=reason
                )
                entry.note(connection, 1)
        return done

    def resume(self, subject: str, *, actor: str, reason: str) -> bool:
        """End a pause; False if there was none."""
        with writing(self._engine) as connection:
            sql = "DELETE FROM pauses WHERE subject = :subject"
            done = bool(self._sql.run(connection, sql, subject=subject).rowcount)
            if done:
                entry = AuditEntry(
                    self._engine, self._sql, actor=actor, verb=f"resume {subject}", reason=reason
                )
                entry.note(connection, 1)
        return done

    def _reroute(self, connection: Connection, keys: str, route_for: Callable[[str], str]) -> None:
        """Give these deliveries, which the caller has locked, the routes that their recipients have
        today."""
        addressed = """SELECT position, address FROM recipients WHERE queue_id = @id(:id) AND delivery = :number
            ORDER BY position"""
        for queue_id, number in self._sql.run(connection, PICKED, keys=keys).all():
            ways: dict[str, list[int]] = {}
            for position, address in self._sql.run(
                connection, addressed, id=str(queue_id), number=number
            ):
                ways.setdefault(route_for(address), []).append(position)
            if ways:
                self._splitter.divide(connection, str(queue_id), number, ways)


def _condition(operation: Operation, wanted: Filter, database: str) -> tuple[str, dict[str, Any]]:
    """The condition for deliveries (as d) that a filter matches and the operation applies to."""
    where, parameters = wanted.where(database)
    takes = f"d.state IN ({words(operation.takes)})"
    if operation.wanted or operation.cancels:
        pending = f" AND d.pending_operation = '{operation.cancels}'" if operation.cancels else ""
        takes = f"({takes} OR d.state = 'sending'{pending})"
    by_id = (
        " AND d.queue_id = :id" if wanted.id is not None else ""
    )  # without it SQLite scans every delivery
    meant = f"""{takes} AND EXISTS (
        SELECT 1 FROM mail_history h WHERE h.queue_uuid = d.queue_id AND h.delivery = d.number AND {where}){by_id}"""
    return meant, parameters


def _reason(operation: Operation, actor: str, reason: str) -> str:
    """The reason in `last_reply`. The DSN of a bounce quotes it, so it does not name the operator."""
    by = "an operator" if operation.state is State.BOUNCED else actor
    done = "retried" if operation.state is State.QUEUED else operation.state
    return escaped(f"{done} by {by}" + (f": {reason}" if reason else ""))


def _sets(operation: Operation) -> str:
    """The SET list. A delivery in flight only gets or loses its pending operation."""
    values = {"state": f"'{operation.state}'"} | operation.sets
    if not (operation.wanted or operation.cancels):
        return ", ".join(f"{column} = {value}" for column, value in values.items())
    pending = (
        {"pending_operation": f"'{operation.wanted}'", "pending_reason": ":why"}
        if operation.wanted
        else {}
    )
    kept = {column: f"d.{column}" for column in values} | {
        c: pending.get(c, "NULL") for c in ("pending_operation", "pending_reason")
    }
    return ", ".join(
        f"{column} = CASE WHEN d.state = 'sending' THEN {while_sending} ELSE {values.get(column, 'NULL')} END"
        for column, while_sending in kept.items()
    )
