"""What operators do to the queue: retry, hold, release, bounce, drop, reroute, and pause what it is
sent to.

How it works: a verb goes through the deliveries that a filter means in chunks, each with its record
(`relay.queue.audit`). What is being sent cannot be changed under its worker: the row is told what
is `wanted`, by whom and why, and whatever becomes of the transfer but a K honours it. `release`
takes such a wish back.

What must stay true: only transitions of `schema.TRANSITIONS` happen; every verb that changed
something leaves a row in `actions`; a filter on recipients acts on the whole delivery that carries
them.
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
    """The queue as an operator changes it."""

    def __init__(self, engine: Engine, *, notices: bool) -> None:
        self._engine, self._queue = engine, QueueReader(engine)
        self._sql = Statements(engine, notices=notices)
        self._splitter = Splitter(self._sql)

    def matching(self, verb: Operation, wanted: Filter) -> Counter[str]:
        """How many deliveries the verb would touch, by state; nothing is changed."""
        where, given = _meant(verb, wanted)
        sql = f"SELECT d.state, count(*) FROM deliveries d WHERE {where} GROUP BY d.state"
        with reading(self._engine) as connection:
            return Counter(dict(self._sql.run(connection, sql, **given).all()))

    def touched(
        self, verb: Operation, wanted: Filter, *, limit: int | None = None
    ) -> Iterator[dict[str, Any]]:
        """Rows of `mail_history` that the verb would touch, all recipients of a delivery among
        them; streamed.

        `limit`: those of the oldest so many deliveries.
        """
        where, given = _meant(verb, wanted)
        if limit is not None:
            oldest = f"SELECT d.queue_id, d.number FROM deliveries d WHERE {where} ORDER BY 1, 2 LIMIT :limit"
            where, given = f"(d.queue_id, d.number) IN ({oldest})", given | {"limit": limit}
        return self._queue.select(
            f"""SELECT v.* FROM mail_history v WHERE EXISTS (SELECT 1 FROM deliveries d WHERE
                d.queue_id = v.queue_uuid AND d.number = v.delivery AND {where}) ORDER BY v.queue_uuid, v.position""",
            given,
        )

    def apply(
        self, verb: Operation, wanted: Filter, *, actor: str, reason: str,
        route_for: Callable[[str], str] | None = None, limit: int | None = None,
    ) -> tuple[Counter[str], list[str]]:  # fmt: skip
        """Do it; the deliveries touched by the state they were in, and the ids of messages that
        need no body now.

        `route_for` gives each delivery the route that its recipients have today, or divides it if
        they have several. `limit`: so many deliveries, the oldest first.
        """
        all_touched: Counter[str] = Counter()
        free: list[str] = []
        chunks = self.in_chunks(
            verb, wanted, actor=actor, reason=reason, route_for=route_for, limit=limit
        )
        for touched, ids in chunks:
            all_touched.update(touched)
            free += ids
        return all_touched, free

    def in_chunks(
        self, verb: Operation, wanted: Filter, *, actor: str, reason: str,
        route_for: Callable[[str], str] | None = None, limit: int | None = None,
    ) -> Iterator[tuple[Counter[str], list[str]]]:  # fmt: skip
        """Do it as `apply` does, while it is iterated: what each chunk came to, when that is
        committed."""
        where, given = _meant(verb, wanted)
        change, why = (
            f"-- event: {verb.name}\nUPDATE deliveries AS d SET {_sets(verb)} {THESE}",
            _why(verb, actor, reason),
        )

        def do(connection: Connection, keys: str) -> None:
            self._sql.run(connection, change, keys=keys, why=why)
            if route_for:
                self._move(connection, keys, route_for)

        shown = wanted.shown() if limit is None else f"{wanted.shown()} --limit {limit}".lstrip()
        action = AuditEntry(
            self._engine, self._sql, actor=actor, verb=verb.name, reason=reason, filter_shown=shown
        )
        for rows in action.through(where, do, limit=limit, **given):
            ended = {queue_id for queue_id, _, was in rows if was != State.SENDING}
            free = (
                deletable_bodies(self._engine, self._sql, ended)
                if verb.state in (State.DROPPED, State.BOUNCED)
                else []
            )
            yield Counter(was for _, _, was in rows), free

    def pause(self, subject: str, *, actor: str, reason: str) -> bool:
        """Send nothing to `route:NAME` or `server:NAME` until `resume`; False if that is so
        already."""
        with writing(self._engine) as connection:
            sql = """INSERT INTO pauses (subject, since, actor, reason) VALUES (:subject, @now, :actor, :reason)
                ON CONFLICT DO NOTHING"""
            done = bool(
                self._sql.run(connection, sql, subject=subject, actor=actor, reason=reason).rowcount
            )
            if done:
                action = AuditEntry(
                    self._engine, self._sql, actor=actor, verb=f"pause {subject}", reason=reason
                )
                action.note(connection, 1)
        return done

    def resume(self, subject: str, *, actor: str, reason: str) -> bool:
        """Send there again; False if it was not paused."""
        with writing(self._engine) as connection:
            sql = "DELETE FROM pauses WHERE subject = :subject"
            done = bool(self._sql.run(connection, sql, subject=subject).rowcount)
            if done:
                action = AuditEntry(
                    self._engine, self._sql, actor=actor, verb=f"resume {subject}", reason=reason
                )
                action.note(connection, 1)
        return done

    def _move(self, connection: Connection, keys: str, route_for: Callable[[str], str]) -> None:
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


def _meant(verb: Operation, wanted: Filter) -> tuple[str, dict[str, Any]]:
    """The deliveries (as d) that a filter means and the verb may touch."""
    where, given = wanted.where()
    takes = f"d.state IN ({words(verb.takes)})"
    if verb.wanted or verb.cancels:
        wish = f" AND d.pending_operation = '{verb.cancels}'" if verb.cancels else ""
        takes = f"({takes} OR d.state = 'sending'{wish})"
    one = (
        " AND d.queue_id = @id(:id)" if wanted.id is not None else ""
    )  # else SQLite looks at every delivery
    meant = f"""{takes} AND EXISTS (
        SELECT 1 FROM mail_history h WHERE h.queue_uuid = d.queue_id AND h.delivery = d.number AND {where}){one}"""
    return meant, given


def _why(verb: Operation, actor: str, reason: str) -> str:
    """What stands in `last_reply` of a delivery that an operator has stopped; the sender of a
    bounce reads it too."""
    who = "an operator" if verb.state is State.BOUNCED else actor
    done = "retried" if verb.state is State.QUEUED else verb.state
    return escaped(f"{done} by {who}" + (f": {reason}" if reason else ""))


def _sets(verb: Operation) -> str:
    """The SET list: what is being sent is only told what is wanted of it, or no longer wanted."""
    values = {"state": f"'{verb.state}'"} | verb.sets
    if not (verb.wanted or verb.cancels):
        return ", ".join(f"{column} = {value}" for column, value in values.items())
    wish = (
        {"pending_operation": f"'{verb.wanted}'", "pending_reason": ":why"} if verb.wanted else {}
    )
    kept = {column: f"d.{column}" for column in values} | {
        c: wish.get(c, "NULL") for c in ("pending_operation", "pending_reason")
    }
    return ", ".join(
        f"{column} = CASE WHEN d.state = 'sending' THEN {while_sending} ELSE {values.get(column, 'NULL')} END"
        for column, while_sending in kept.items()
    )
