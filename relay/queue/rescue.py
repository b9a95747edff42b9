"""What a sweeper does to the queue: wake what is due, and find out who is gone.

Any number of workers sweep at once: each takes what nobody else has locked, in bounded batches,
longest due first. A worker is dead when its lease has run out, and a sweeper has seen that same
lease run out for long enough by its own clock (`expire_worker`); then whatever it was sending
becomes `uncertain`, in one transaction that fails if the worker renewed.

Every `due_at` is the database's time when it was written and a wait. If the clock of the database
is set back, what was written before is further ahead than any wait: then it is no answer to when,
and counts as due (`bring_near`). What is deferred only because no server of its route could be
reached has `waiting_for` set to `route:NAME`. It becomes due before its time when a server of the
route answers again, the route gets one, or a pause ends (`wake`).

What must stay true: nobody is declared dead because the database was away; what was in flight when
a worker was lost is never quietly sent again: it gets an attempt of outcome `uncertain` first
(attempt_index 0).
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Engine

from relay.db.engine import reading, writing
from relay.db.sql import Statements
from relay.ids import dashed
from relay.queue.claim import DUE, FINISHED, KEYS, REASON, WANTED, longest_claim
from relay.queue.model import waits_for
from relay.settings import WorkerSettings

_LOST = f"""SELECT d.queue_id, d.number, d.claim_count, d.worker, :delay * (1 + @chance / 2) AS delay,
    -- event: worker lost
    CASE WHEN d.pending_operation IS NOT NULL THEN {WANTED} WHEN d.crash_count + 1 >= :poison OR :hold THEN 'held'
         WHEN d.expires_at <= @now THEN 'expired' ELSE 'deferred' END AS final
    FROM deliveries d @by(deliveries_sending) WHERE d.state = 'sending' AND"""
_LOST_SET = f"""-- event: worker lost, pending operation
    SET state = p.final, due_at = {DUE}, finished_at = {FINISHED}, worker = NULL, pending_operation = NULL,
    pending_reason = NULL, crash_count = d.crash_count + 1, last_outcome = 'uncertain', {REASON.format(reply=":why", source="'relay'")}"""
_LOST_ATTEMPT = """INSERT INTO attempts (queue_id, delivery, claim, attempt_index, worker, server, started_at, finished_at,
        outcome, reply, bytes_sent)
    SELECT queue_id, number, claim_count, 0, worker, NULL, @now, @now, 'uncertain', :why, 0 FROM"""


SLACK = (
    60.0  # seconds by which a wait may be longer than it was meant to be: statements, slow commits
)
_TURNED_BACK = {
    "queued": "route IN (SELECT route FROM @rows(:routes; route text)) AND due_at > @later(:grace + :slack)",
    "deferred": "due_at > @later(:longest + :slack)",
    "sending": "due_at > @later(:far + :slack)",
}


class Rescuer:
    """The queue as one sweeper uses it."""

    def __init__(self, engine: Engine, settings: WorkerSettings) -> None:
        self._engine = engine
        self._sql = Statements(
            engine,
            grace=settings.grace,
            notices=settings.bounces == "dsn",
            delay=settings.uncertain_delay,
            hold=settings.uncertain == "hold",
            poison=settings.poison_limit,
            far=longest_claim(settings),
            slack=SLACK,
        )

    def mark_uncertain(
        self, connection: Connection, where: str, why: str, **given: Any
    ) -> Sequence[Any]:
        """Turn what somebody was sending into `uncertain`; rows of message id and number, as the
        database has them."""
        lost = f"{_LOST} {where} ORDER BY d.queue_id, d.number"
        if self._sql.postgresql:
            sql = f"""WITH p AS MATERIALIZED ({lost} @locked(d)), a AS ({_LOST_ATTEMPT} p ON CONFLICT DO NOTHING)
                UPDATE deliveries d {_LOST_SET} FROM p WHERE {KEYS} RETURNING d.queue_id, d.number"""
            return list(self._sql.run(connection, sql, why=why, **given))
        self._sql.run(
            connection,
            f"{_LOST_ATTEMPT} ({lost}) WHERE true ON CONFLICT DO NOTHING",
            why=why,
            **given,
        )
        sql = f"UPDATE deliveries AS d {_LOST_SET} FROM ({lost}) AS p WHERE {KEYS} RETURNING queue_id, number"
        return list(self._sql.run(connection, sql, why=why, **given))

    def expired_leases(self) -> list[tuple[str, str]]:
        """Workers whose lease has run out: (id, the lease's end, as an opaque text).

        No lease is longer than half of what its worker gives itself for a claim. One that ends
        later than that was written before the clock was set back: a living worker renews it before
        it is seen twice.
        """
        with writing(self._engine) as connection:
            found = self._sql.run(
                connection,
                "SELECT @hex(id), CAST(lease_expires_at AS text) FROM workers"
                " WHERE ended_at IS NULL AND (lease_expires_at < @now OR lease_expires_at > @later(claim_seconds / 2))",
            )
            return [(worker, until) for worker, until in found]

    def expire_worker(
        self,
        worker: str,
        until: str,
        note: Callable[[Connection, Sequence[Any]], object] | None = None,
    ) -> int | None:
        """Declare a worker dead and make what it was sending `uncertain`; None if it renewed its
        lease after all.

        `note` is called in the same transaction, with what `mark_uncertain` answered.
        """
        with writing(self._engine) as connection:
            dead = self._sql.run(
                connection,
                "UPDATE workers SET ended_at = @now, end_reason = 'vanished'"
                " WHERE id = :worker AND ended_at IS NULL AND CAST(lease_expires_at AS text) = :until",
                worker=dashed(worker), until=until,
            ).rowcount  # fmt: skip
            if not dead:
                return None
            why = "the worker vanished while it was sending"
            lost = self.mark_uncertain(connection, "d.worker = :worker", why, worker=dashed(worker))
            if note:
                note(connection, lost)
            return len(lost)

    def expire_stuck_transfers(self) -> int:
        """Make transfers `uncertain` that have taken longer than any session may; how many there
        were."""
        with writing(self._engine) as connection:
            return len(
                self.mark_uncertain(
                    connection, "d.due_at <= @now", "the transfer took longer than any session may"
                )
            )

    def rescue_unowned(self) -> int:
        """Make `uncertain` what a worker that has ended was still sending; how many there were."""
        with writing(self._engine) as connection:
            gone = (
                "EXISTS (SELECT 1 FROM workers w WHERE w.id = d.worker AND w.ended_at IS NOT NULL)"
            )
            return len(
                self.mark_uncertain(connection, gone, "the worker stopped while it was sending")
            )

    def publish_open_circuits(self, worker: str, rests: Mapping[str, str]) -> None:
        """Say which servers a worker leaves alone for now, and why: for those who look at
        `server_health`."""
        with writing(self._engine) as connection:
            self._sql.run(
                connection,
                "DELETE FROM open_circuits WHERE worker = :worker",
                worker=dashed(worker),
            )
            add = "INSERT INTO open_circuits (worker, server, why) VALUES (:worker, :server, :why)"
            for server, why in rests.items():
                self._sql.run(connection, add, worker=dashed(worker), server=server, why=why)

    def publish_routes(self, worker: str, routes: Mapping[str, Sequence[str]]) -> None:
        """Say which routes a worker knows, with their servers: `why` has the settings of who looks,
        and not these."""
        with writing(self._engine) as connection:
            sql = "UPDATE workers SET routes = :routes WHERE id = :worker"
            self._sql.run(connection, sql, worker=dashed(worker), routes=json.dumps(routes))

    def paused(self) -> frozenset[str]:
        """What nothing is to be sent to: `route:NAME` and `server:NAME`."""
        with reading(self._engine) as connection:
            return frozenset(
                row[0] for row in self._sql.run(connection, "SELECT subject FROM pauses")
            )

    def unknown_routes(self, known: Sequence[str]) -> list[str]:
        """Routes that waiting mail is for, and that are neither `known` nor any other living
        worker's."""
        waiting = "SELECT route FROM deliveries WHERE state = '{}'"
        sql = f"{waiting.format('queued')} UNION {waiting.format('deferred')}"
        others = "SELECT routes FROM workers WHERE ended_at IS NULL AND routes IS NOT NULL"
        with reading(self._engine) as connection:
            found = {row[0] for row in self._sql.run(connection, sql)} - set(known)
            return sorted(
                found.difference(*(json.loads(row[0]) for row in self._sql.run(connection, others)))
            )

    def bring_near(self, limit: int, longest: float, routes: Sequence[str]) -> int:
        """Make due what the clock, set back, has put off; how many there were.

        `longest`: the most seconds that a deferred delivery waits. `routes`: those whose queued
        mail is looked at, by name, because their index leads with it. What is being sent gets the
        time of a new claim: its worker may live.
        """
        names, moved = json.dumps([{"route": route} for route in routes]), 0
        given = {"most": limit, "longest": longest, "routes": names}
        with writing(self._engine) as connection:
            for state, ahead in _TURNED_BACK.items():
                due = "@later(:far)" if state == "sending" else "@now"
                picked = f"SELECT queue_id, number FROM deliveries WHERE state = '{state}' AND {ahead} LIMIT :most"
                if self._sql.postgresql:
                    sql = f"""WITH p AS MATERIALIZED ({picked} @skip_locked) UPDATE deliveries d SET due_at = {due}
                        FROM p WHERE {KEYS}"""
                else:
                    sql = f"UPDATE deliveries SET due_at = {due} WHERE (queue_id, number) IN ({picked})"
                moved += self._sql.run(connection, sql, **given).rowcount
        return moved

    def waiting(self, routes: Iterable[str]) -> list[str]:
        """Those of the routes that deferred mail waits for."""
        sql = """SELECT substr(x.subject, 7) FROM @rows(:subjects; subject text) WHERE (SELECT 1 FROM deliveries d
            WHERE d.state = 'deferred' AND d.waiting_for = x.subject LIMIT 1) IS NOT NULL"""
        subjects = json.dumps([{"subject": waits_for(route)} for route in routes])
        with reading(self._engine) as connection:
            return [row[0] for row in self._sql.run(connection, sql, subjects=subjects)]

    def wake(self, route: str, most: int) -> int:
        """Make mail that waits for a route `queued` and overdue, so that any worker with a free
        connection takes it; how many deliveries that were.

        Longest due first, and the same order stands in `due_at` afterwards. `most` is how much of
        the route may be overdue at a time: mail becomes due as connections take it, and what the
        server does not get stays deferred.
        """
        sql = f"""WITH w AS MATERIALIZED (SELECT queue_id, number, due_at FROM deliveries
                WHERE state = 'deferred' AND waiting_for = :subject ORDER BY due_at
                LIMIT (SELECT :most - count(*) FROM (SELECT 1 FROM deliveries
                    WHERE state = 'queued' AND route = :route AND due_at <= @now LIMIT :most) q) @skip_locked),
            p AS MATERIALIZED (SELECT queue_id, number, row_number() OVER (ORDER BY due_at) AS rank FROM w)
            -- event: route available
            UPDATE deliveries AS d SET state = 'queued', due_at = @ago((:most - p.rank) / 1000.0) FROM p WHERE {KEYS}
            RETURNING 1"""
        with writing(self._engine) as connection:
            return len(
                self._sql.run(
                    connection, sql, route=route, subject=waits_for(route), most=most
                ).all()
            )

    def requeue_due(self, limit: int) -> list[str]:
        """Make deferred deliveries whose time has come `queued`, longest due first; the ids of
        their messages."""
        picked = """SELECT queue_id, number FROM deliveries WHERE state = 'deferred' AND due_at <= @now
            ORDER BY due_at LIMIT :most"""
        with writing(self._engine) as connection:
            if self._sql.postgresql:
                sql = f"""WITH p AS MATERIALIZED ({picked} @skip_locked) UPDATE deliveries d
                    -- event: due
                    SET state = 'queued', due_at = @later(:grace) FROM p WHERE {KEYS} RETURNING @hex(d.queue_id)"""
            else:
                sql = f"""-- event: due
                    UPDATE deliveries SET state = 'queued', due_at = @later(:grace)
                    WHERE (queue_id, number) IN ({picked}) RETURNING @hex(queue_id)"""
            return list(dict.fromkeys(row[0] for row in self._sql.run(connection, sql, most=limit)))
