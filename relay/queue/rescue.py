"""The operations of a sweeper: requeue due deliveries, and make the deliveries of expired
workers uncertain.

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
from relay.db.sql import Queries
from relay.ids import dashed
from relay.queue.audit import keys_of
from relay.queue.claim import longest_claim
from relay.settings import WorkerSettings

JITTER = 0.5  # a retry of an uncertain delivery waits longer by up to this share
SLACK = 60.0  # seconds that slow statements and commits may add to a wait
# The statements that find lost deliveries, and the replies of their attempts.
_LOST = {
    "sending_by_worker": "the lease of the worker expired while it was sending",
    "sending_too_long": "the transfer took longer than any session may",
    "sending_unowned": "the worker stopped while it was sending",
}
_BRING_NEAR = ("bring_near_queued", "bring_near_deferred", "bring_near_sending")


class Rescuer:
    """The operations of one sweeper on the queue."""

    def __init__(self, engine: Engine, settings: WorkerSettings) -> None:
        self._engine = engine
        self._queries = Queries(
            engine,
            __name__,
            grace=settings.grace,
            sends_dsns=settings.bounces == "dsn",
            delay=settings.uncertain_delay,
            jitter=JITTER,
            hold=settings.uncertain == "hold",
            poison=settings.poison_limit,
            far=longest_claim(settings),
            slack=SLACK,
        )

    def expired_leases(self) -> list[tuple[str, str]]:
        """Workers whose lease has run out: (id, the lease's end, as an opaque text).

        A living worker whose lease ends too far ahead, because the clock was set back, renews it
        before it is seen twice.
        """
        with writing(self._engine) as connection:
            return [
                (worker, until) for worker, until in self._queries.run(connection, "expired_leases")
            ]

    def expire_worker(
        self,
        worker: str,
        until: str,
        note: Callable[[Connection, Sequence[Any]], object] | None = None,
    ) -> int | None:
        """End a worker and make its deliveries `uncertain`; None if it renewed its lease.

        `note` is called in the same transaction, with the keys of the deliveries.
        """
        with writing(self._engine) as connection:
            expired = self._queries.run(
                connection, "expire_worker", worker=dashed(worker), until=until
            )
            if not expired.rowcount:
                return None
            lost = self._rescue(connection, "sending_by_worker", worker=dashed(worker))
            if note:
                note(connection, lost)
            return len(lost)

    def expire_stuck_transfers(self) -> int:
        """Make transfers `uncertain` that have taken longer than any session may; how many there
        were."""
        with writing(self._engine) as connection:
            return len(self._rescue(connection, "sending_too_long"))

    def rescue_unowned(self) -> int:
        """Make deliveries of ended workers `uncertain`; the number of deliveries."""
        with writing(self._engine) as connection:
            return len(self._rescue(connection, "sending_unowned"))

    def publish_open_circuits(self, worker: str, circuits: Mapping[str, str]) -> None:
        """Publish the open circuits of a worker: the reason by server (`server_health`)."""
        self._publish("publish_open_circuits", worker, circuits=json.dumps(dict(circuits)))

    def publish_routes(self, worker: str, routes: Mapping[str, Sequence[str]]) -> None:
        """Publish the routes of a worker with their servers. `why` may run with other settings."""
        self._publish("publish_routes", worker, routes=json.dumps(routes))

    def paused(self) -> frozenset[str]:
        """The paused subjects: `route:NAME` and `server:NAME`."""
        with reading(self._engine) as connection:
            return frozenset(self._queries.run(connection, "pauses").scalars())

    def unknown_routes(self, known: Sequence[str]) -> list[str]:
        """Routes that waiting mail is for, and that are neither `known` nor any other living
        worker's."""
        with reading(self._engine) as connection:
            waiting = set(self._queries.run(connection, "routes_of_waiting_mail").scalars())
            others = self._queries.run(connection, "routes_of_workers").scalars()
            return sorted(waiting.difference(known, *map(json.loads, others)))

    def bring_near(self, limit: int, longest: float, routes: Sequence[str]) -> int:
        """Make rows due that were written before the clock was set back; the number of deliveries.

        `longest`: the most seconds that a deferred delivery waits. `routes`: those whose queued
        mail is checked, by name, because their index leads with it.
        """
        parameters = {"most": limit, "longest": longest, "routes": json.dumps(list(routes))}
        with writing(self._engine) as connection:
            return sum(
                self._queries.run(connection, name, **parameters).rowcount for name in _BRING_NEAR
            )

    def waiting(self, routes: Iterable[str]) -> list[str]:
        """Those of the routes that deferred mail waits for."""
        with reading(self._engine) as connection:
            listed = json.dumps(list(routes))
            return list(self._queries.run(connection, "waiting_routes", routes=listed).scalars())

    def wake(self, route: str, most: int) -> int:
        """Make mail that waits for a route `queued` and overdue, so that any worker with a free
        connection takes it; how many deliveries that were.

        `most` is how much of the route may be overdue at a time: mail becomes due as connections
        take it, and mail that the server does not get stays deferred.
        """
        with writing(self._engine) as connection:
            return len(self._queries.run(connection, "wake", route=route, most=most).all())

    def requeue_due(self, limit: int) -> dict[str, list[str]]:
        """Make deferred deliveries whose time has come `queued`, longest due first; the ids of
        their messages by route."""
        by_route: dict[str, list[str]] = {}
        with writing(self._engine) as connection:
            for route, queue_id in self._queries.run(connection, "requeue_due", most=limit):
                by_route.setdefault(route, []).append(queue_id)
        return by_route

    def mark_uncertain(self, connection: Connection, keys: str, why: str) -> None:
        """Make deliveries in flight `uncertain`; `keys`: JSON, a list of queue_id and number."""
        self._queries.run(connection, "mark_uncertain", keys=keys, why=why)

    def _rescue(self, connection: Connection, which: str, **parameters: Any) -> Sequence[Any]:
        """Make the deliveries `uncertain` that a statement of `_LOST` locks; their keys."""
        lost: Sequence[Any] = self._queries.run(connection, which, **parameters).all()
        if lost:
            self.mark_uncertain(connection, keys_of(lost), _LOST[which])
        return lost

    def _publish(self, name: str, worker: str, **parameters: str) -> None:
        with writing(self._engine) as connection:
            self._queries.run(connection, name, worker=dashed(worker), **parameters)
