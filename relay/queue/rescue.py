"""What a sweeper does to the queue: wake what is due, and end what expired workers were sending.

Workers sweep side by side: each takes rows that are not locked, in bounded batches, longest due
first. A worker is expired when a sweeper has seen the same lease run out for long enough by its own
clock; its deliveries become `uncertain` in a transaction that fails if the worker renewed. A
`due_at` further ahead than any wait was written before the clock was set back, and counts as due
(`bring_near`). A delivery with `waiting_for` is woken when a server of its route works (`wake`).

What must stay true: an outage of the database expires no worker; a delivery that was in flight gets
an attempt with the outcome `uncertain` (attempt_index 0) before it is sent again.
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

_IN_FLIGHT = f"""SELECT d.queue_id, d.number, d.claim_count, d.worker, :delay * (1 + @chance / 2) AS delay,
    -- event: worker lost
    CASE WHEN d.pending_operation IS NOT NULL THEN {WANTED} WHEN d.crash_count + 1 >= :poison OR :hold THEN 'held'
         WHEN d.expires_at <= @now THEN 'expired' ELSE 'deferred' END AS final
    FROM deliveries d @by(deliveries_sending) WHERE d.state = 'sending' AND"""
_UNCERTAIN_SET = f"""-- event: worker lost, pending operation
    SET state = p.final, due_at = {DUE}, finished_at = {FINISHED}, worker = NULL, pending_operation = NULL,
    pending_reason = NULL, crash_count = d.crash_count + 1, last_outcome = 'uncertain', {REASON.format(reply=":why", source="'relay'")}"""
_UNCERTAIN_ATTEMPT = """INSERT INTO attempts (queue_id, delivery, claim, attempt_index, worker, server, started_at, finished_at,
        outcome, reply, bytes_sent)
    SELECT queue_id, number, claim_count, 0, worker, NULL, @now, @now, 'uncertain', :why, 0 FROM"""


SLACK = 60.0  # seconds that slow statements and commits may add to a wait
_TOO_FAR_AHEAD = {
    "queued": "route IN (SELECT route FROM @rows(:routes; route text)) AND due_at > @later(:grace + :slack)",
    "deferred": "due_at > @later(:longest + :slack)",
    "sending": "due_at > @later(:far + :slack)",
}


class Rescuer:
    """The operations of one sweeper on the queue."""

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
        self, connection: Connection, where: str, why: str, **parameters: Any
    ) -> Sequence[Any]:
        """Make deliveries in flight `uncertain`; rows of queue id and number, in the database's
        types."""
        lost = f"{_IN_FLIGHT} {where} ORDER BY d.queue_id, d.number"
        if self._sql.postgresql:
            sql = f"""WITH p AS MATERIALIZED ({lost} @locked(d)), a AS ({_UNCERTAIN_ATTEMPT} p ON CONFLICT DO NOTHING)
                UPDATE deliveries d {_UNCERTAIN_SET} FROM p WHERE {KEYS} RETURNING d.queue_id, d.number"""
            return list(self._sql.run(connection, sql, why=why, **parameters))
        self._sql.run(
            connection,
            f"{_UNCERTAIN_ATTEMPT} ({lost}) WHERE true ON CONFLICT DO NOTHING",
            why=why,
            **parameters,
        )
        sql = f"UPDATE deliveries AS d {_UNCERTAIN_SET} FROM ({lost}) AS p WHERE {KEYS} RETURNING queue_id, number"
        return list(self._sql.run(connection, sql, why=why, **parameters))

    def expired_leases(self) -> list[tuple[str, str]]:
        """Workers whose lease has run out: (id, the lease's end, as an opaque text).

        No lease is longer than half of what its worker gives itself for a claim. One that ends
        later than that was written before the clock was set back: a living worker renews it before
        it is seen twice.
        """
        with writing(self._engine) as connection:
            rows = self._sql.run(
                connection,
                "SELECT @hex(id), CAST(lease_expires_at AS text) FROM workers"
                " WHERE ended_at IS NULL AND (lease_expires_at < @now OR lease_expires_at > @later(claim_seconds / 2))",
            )
            return [(worker, until) for worker, until in rows]

    def expire_worker(
        self,
        worker: str,
        until: str,
        note: Callable[[Connection, Sequence[Any]], object] | None = None,
    ) -> int | None:
        """End a worker and make what it was sending `uncertain`; None if it renewed its lease.

        `note` is called in the same transaction, with the rows of `mark_uncertain`.
        """
        with writing(self._engine) as connection:
            expired = self._sql.run(
                connection,
                "UPDATE workers SET ended_at = @now, end_reason = 'vanished'"
                " WHERE id = :worker AND ended_at IS NULL AND CAST(lease_expires_at AS text) = :until",
                worker=dashed(worker), until=until,
            ).rowcount  # fmt: skip
            if not expired:
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
        """Make `uncertain` what a worker was sending that has ended; the number of deliveries."""
        with writing(self._engine) as connection:
            ended = (
                "EXISTS (SELECT 1 FROM workers w WHERE w.id = d.worker AND w.ended_at IS NOT NULL)"
            )
            return len(
                self.mark_uncertain(connection, ended, "the worker stopped while it was sending")
            )

    def publish_open_circuits(self, worker: str, circuits: Mapping[str, str]) -> None:
        """Publish the open circuits of a worker, by server, with their reasons (`server_health`)."""
        with writing(self._engine) as connection:
            self._sql.run(
                connection,
                "DELETE FROM open_circuits WHERE worker = :worker",
                worker=dashed(worker),
            )
            add = "INSERT INTO open_circuits (worker, server, why) VALUES (:worker, :server, :why)"
            for server, why in circuits.items():
                self._sql.run(connection, add, worker=dashed(worker), server=server, why=why)

    def publish_routes(self, worker: str, routes: Mapping[str, Sequence[str]]) -> None:
        """Publish the routes of a worker with their servers. `why` may run with other settings."""
        with writing(self._engine) as connection:
            sql = "UPDATE workers SET routes = :routes WHERE id = :worker"
            self._sql.run(connection, sql, worker=dashed(worker), routes=json.dumps(routes))

    def paused(self) -> frozenset[str]:
        """The paused subjects: `route:NAME` and `server:NAME`."""
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
            rows = {row[0] for row in self._sql.run(connection, sql)} - set(known)
            return sorted(
                rows.difference(*(json.loads(row[0]) for row in self._sql.run(connection, others)))
            )

    def bring_near(self, limit: int, longest: float, routes: Sequence[str]) -> int:
        """Make due what was written before the clock was set back; the number of deliveries.

        `longest`: the most seconds that a deferred delivery waits. `routes`: those whose queued
        mail is looked at, by name, because their index leads with it. What is being sent gets the
        time of a new claim: its worker may live.
        """
        routes_json, moved = json.dumps([{"route": route} for route in routes]), 0
        parameters = {"most": limit, "longest": longest, "routes": routes_json}
        with writing(self._engine) as connection:
            for state, ahead in _TOO_FAR_AHEAD.items():
                due = "@later(:far)" if state == "sending" else "@now"
                picked = f"SELECT queue_id, number FROM deliveries WHERE state = '{state}' AND {ahead} LIMIT :most"
                if self._sql.postgresql:
                    sql = f"""WITH p AS MATERIALIZED ({picked} @skip_locked) UPDATE deliveries d SET due_at = {due}
                        FROM p WHERE {KEYS}"""
                else:
                    sql = f"UPDATE deliveries SET due_at = {due} WHERE (queue_id, number) IN ({picked})"
                moved += self._sql.run(connection, sql, **parameters).rowcount
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

    def requeue_due(self, limit: int) -> dict[str, list[str]]:
        """Make deferred deliveries whose time has come `queued`, longest due first; the ids of
        their messages by route."""
        picked = """SELECT queue_id, number FROM deliveries WHERE state = 'deferred' AND due_at <= @now
            ORDER BY due_at LIMIT :most"""
        with writing(self._engine) as connection:
            if self._sql.postgresql:
                sql = f"""WITH p AS MATERIALIZED ({picked} @skip_locked) UPDATE deliveries d
                    -- event: due
                    SET state = 'queued', due_at = @later(:grace) FROM p WHERE {KEYS}
                    RETURNING d.route, @hex(d.queue_id)"""
            else:
                sql = f"""-- event: due
                    UPDATE deliveries SET state = 'queued', due_at = @later(:grace)
                    WHERE (queue_id, number) IN ({picked}) RETURNING route, @hex(queue_id)"""
            ids: dict[str, list[str]] = {}
            for route, queue_id in self._sql.run(connection, sql, most=limit):
                ids.setdefault(route, []).append(queue_id)
            return ids
