"""What operators do to the queue: retry, hold, release, bounce, drop, reroute, and pause what it is sent to.

How it works: a verb goes through the deliveries that a filter means in key order, a chunk a transaction, so that it
never holds up the workers for long and never meets them in another order. What is being sent cannot be changed under
its worker: the row is told what is `wanted`, and whatever becomes of the transfer but a K honours it.

What must stay true: only transitions of `schema.TRANSITIONS` happen; every verb that changed something leaves a row in
`actions`; a filter on recipients acts on the whole delivery that carries them.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine

from relay.database import Statements, reading, writing
from relay.filters import Filter
from relay.ids import dashed, new_id
from relay.log import escaped
from relay.queue import Queue
from relay.schema import NEEDS_BODY, OWED, State

CHUNK = 500
_FIRST = "00000000-0000-0000-0000-000000000000"


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb: the states that it takes a delivery from, the state it makes of them, and what else it sets."""

    name: str
    takes: tuple[State, ...]
    state: State
    sets: dict[str, str]
    wanted: str | None = None  # what a delivery is told that is being sent


_WAITING = (State.QUEUED, State.DEFERRED)
VERBS = {
    verb.name: verb
    for verb in (
        Verb("retry", (State.DEFERRED,), State.QUEUED, {"due_at": "@now", "backoff_step": "0"}, "retry"),
        Verb("hold", _WAITING, State.HELD, {"due_at": "NULL", "last_reply": ":why"}, "hold"),
        Verb("release", (State.HELD,), State.QUEUED, {"due_at": "@now", "backoff_step": "0", "vanished": "0"}),
        Verb(
            "bounce",
            (*_WAITING, State.HELD),
            State.BOUNCED,
            {
                "due_at": OWED.replace("deliveries.", "d."),
                "finished_at": "@now",
                "last_reply": ":why",
                "last_outcome": "coalesce(d.last_outcome, 'rejected')",
            },
            "bounce",
        ),
        Verb(
            "drop",
            (*_WAITING, State.HELD),
            State.DROPPED,
            {"due_at": "NULL", "finished_at": "@now", "last_reply": ":why"},
            "drop",
        ),
    )
}
# Routes are given when a message is accepted; who has corrected them since has these. The one leaves all else as it is,
# the other tries at once what is not held.
_MOVE = Verb("reroute", (*_WAITING, State.HELD), State.QUEUED, {"state": "d.state"})
REROUTE = Verb(
    "reroute",
    (*_WAITING, State.HELD),
    State.QUEUED,
    {
        "state": "CASE WHEN d.state = 'held' THEN d.state ELSE 'queued' END",
        "due_at": "CASE WHEN d.state <> 'held' THEN @now END",
        "backoff_step": "0",
    },
)


class Verbs:
    """The queue as an operator changes it."""

    def __init__(self, engine: Engine, *, notices: bool) -> None:
        self._engine, self._queue = engine, Queue(engine)
        self._sql = Statements(engine, notices=notices, most=CHUNK)

    def matching(self, verb: Verb, wanted: Filter) -> Counter[str]:
        """How many deliveries the verb would touch, by state; nothing is changed."""
        where, given = _meant(verb, wanted)
        sql = f"SELECT d.state, count(*) FROM deliveries d WHERE {where} GROUP BY d.state"
        with reading(self._engine) as connection:
            return Counter(dict(self._sql.run(connection, sql, **given).all()))

    def touched(self, verb: Verb, wanted: Filter) -> Iterator[dict[str, Any]]:
        """Rows of `mail_history` that the verb would touch, all recipients of a delivery among them; streamed."""
        where, given = _meant(verb, wanted)
        return self._queue.select(
            f"""SELECT v.* FROM mail_history v WHERE EXISTS (SELECT 1 FROM deliveries d WHERE
                d.message_id = v.message_id AND d.number = v.delivery AND {where}) ORDER BY v.message_id, v.position""",
            given,
        )

    def apply(
        self, verb: Verb, wanted: Filter, *, actor: str, reason: str, route_for: Callable[[str], str] | None = None
    ) -> tuple[Counter[str], list[str]]:
        """Do it; the deliveries touched by the state they were in, and the ids of messages that need no body now.

        `route_for` gives each delivery the route that its first recipient has today.
        """
        touched: Counter[str] = Counter()
        ids: set[str] = set()
        for rows in self._chunks(verb, wanted, _why(verb, actor, reason), route_for):
            touched.update(state for _, state in rows)
            ids.update(message_id for message_id, state in rows if state != State.SENDING)
        with writing(self._engine) as connection:
            if touched:
                self._record(connection, verb.name, wanted, actor, reason, touched.total())
            free = self._unneeded(connection, ids) if verb.state in (State.DROPPED, State.BOUNCED) else []
        return touched, free

    def _chunks(
        self, verb: Verb, wanted: Filter, why: str, route_for: Callable[[str], str] | None
    ) -> Iterator[list[tuple[str, str]]]:
        """Change a chunk at a time; (message id, state it had) of each delivery."""
        where, given = _meant(verb, wanted)
        picked = f"""SELECT d.message_id, d.number, d.state AS was FROM deliveries d
            WHERE {where} AND (d.message_id, d.number) > (@id(:after), :number)
            ORDER BY d.message_id, d.number LIMIT :most"""
        keys = "SELECT message_id, number, was FROM p"
        change = f"""UPDATE deliveries AS d SET {_sets(verb)} FROM p
            WHERE d.message_id = p.message_id AND d.number = p.number"""
        given |= {"after": _FIRST, "number": 0, "why": why}
        while True:
            with writing(self._engine) as connection:
                if self._sql.postgresql:
                    sql = f"""WITH p AS MATERIALIZED ({picked} FOR UPDATE OF d), c AS ({change}) {keys}
                        ORDER BY message_id, number"""
                    rows = self._sql.run(connection, sql, **given).all()
                else:
                    rows = self._sql.run(connection, picked, **given).all()
                    self._sql.run(connection, f"WITH p AS ({picked}) {change}", **given)
                if route_for:
                    self._move(connection, [(str(message_id), number) for message_id, number, _ in rows], route_for)
            if rows:
                yield [(str(message_id).replace("-", ""), was) for message_id, _, was in rows]
                given |= {"after": str(rows[-1][0]), "number": rows[-1][1]}
            if len(rows) < CHUNK:
                return

    def _record(self, connection: Connection, verb: str, wanted: Filter, actor: str, reason: str, matched: int) -> None:
        self._sql.run(
            connection,
            "INSERT INTO actions (id, at, actor, verb, reason, filter, matched)"
            " VALUES (@id(:id), @now, :actor, :verb, :reason, :filter, :matched)",
            id=dashed(new_id()), actor=actor, verb=verb, reason=reason, filter=wanted.shown(), matched=matched,
        )  # fmt: skip

    def _unneeded(self, connection: Connection, ids: set[str]) -> list[str]:
        sql = f"SELECT 1 FROM deliveries WHERE message_id = @id(:id) AND {NEEDS_BODY} LIMIT 1"
        return [i for i in sorted(ids) if self._sql.run(connection, sql, id=dashed(i)).first() is None]

    def reroute(self, wanted: Filter, route_for: Callable[[str], str], *, actor: str, reason: str) -> int:
        """Give waiting deliveries the route that their first recipient has today; how many there were."""
        return self.apply(_MOVE, wanted, actor=actor, reason=reason, route_for=route_for)[0].total()

    def pause(self, subject: str, *, actor: str, reason: str) -> bool:
        """Send nothing to `route:NAME` or `server:NAME` until `resume`; False if that is so already."""
        with writing(self._engine) as connection:
            sql = """INSERT INTO pauses (subject, since, actor, reason) VALUES (:subject, @now, :actor, :reason)
                ON CONFLICT DO NOTHING"""
            done = bool(self._sql.run(connection, sql, subject=subject, actor=actor, reason=reason).rowcount)
            if done:
                self._record(connection, f"pause {subject}", Filter(), actor, reason, 1)
        return done

    def resume(self, subject: str, *, actor: str, reason: str) -> bool:
        """Send there again; False if it was not paused."""
        with writing(self._engine) as connection:
            sql = "DELETE FROM pauses WHERE subject = :subject"
            done = bool(self._sql.run(connection, sql, subject=subject).rowcount)
            if done:
                self._record(connection, f"resume {subject}", Filter(), actor, reason, 1)
        return done

    def _move(self, connection: Connection, keys: list[tuple[str, int]], route_for: Callable[[str], str]) -> None:
        """Give these deliveries, which the caller has locked, the route that their first recipient has today."""
        address = """SELECT address FROM recipients WHERE message_id = @id(:id) AND delivery = :one
            ORDER BY position LIMIT 1"""
        move = "UPDATE deliveries SET route = :route WHERE message_id = @id(:id) AND number = :one"
        for message_id, number in keys:
            found = self._sql.run(connection, address, id=message_id, one=number).scalar()
            if found is not None:
                self._sql.run(connection, move, id=message_id, one=number, route=route_for(found))


def _meant(verb: Verb, wanted: Filter) -> tuple[str, dict[str, Any]]:
    """The deliveries (as d) that a filter means and the verb may touch."""
    where, given = wanted.where()
    takes = (*verb.takes, State.SENDING) if verb.wanted else verb.takes
    states = ", ".join(f"'{state}'" for state in takes)
    one = " AND d.message_id = @id(:id)" if wanted.id is not None else ""  # else SQLite looks at every delivery
    meant = f"""d.state IN ({states}) AND EXISTS (
        SELECT 1 FROM mail_history h WHERE h.message_id = d.message_id AND h.delivery = d.number AND {where}){one}"""
    return meant, given


def _why(verb: Verb, actor: str, reason: str) -> str:
    """What stands in `last_reply` of a delivery that an operator has stopped; the sender of a bounce reads it too."""
    who = "an operator" if verb.state is State.BOUNCED else actor
    return escaped(f"{verb.state} by {who}" + (f": {reason}" if reason else ""))


def _sets(verb: Verb) -> str:
    """The SET list: what is being sent is only told what is wanted of it."""
    values = {"state": f"'{verb.state}'"} | verb.sets
    if verb.wanted is None:
        return ", ".join(f"{column} = {value}" for column, value in values.items())
    kept = [
        f"{column} = CASE WHEN d.state = 'sending' THEN d.{column} ELSE {value} END" for column, value in values.items()
    ]
    return ", ".join([*kept, f"wanted = CASE WHEN d.state = 'sending' THEN '{verb.wanted}' END"])
