"""Demand: what a worker asks the database for, and when.

Hints wait here for room; and once a second, or at once again while there is more, the database is
asked for what is overdue, hint or no hint. Either becomes a `ClaimRequest` that says how many
deliveries each route has room for, so that nothing is ever claimed that must wait for a connection.
One wish for hints of each route and one look are on their way at most: what comes meanwhile goes
into the next. Each route has its own hints: whether they wait, are asked for or are left to the
database is decided by its own room, whatever other routes have. Hints of which nobody said the
route are another such group, and may be for any.

What must stay true: room that was promised in a wish is returned when its claims come back,
whatever they are; hints and looks take turns, so that neither starves the other. Belongs to the
engine's loop.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from relay.queue.model import Claim, ClaimRequest
from relay.routes import Routes
from relay.settings import WorkerSettings
from worker.capacity import Capacity
from worker.hint_queue import Hint, HintBatch, HintQueue

LOOK_EVERY = 1.0

type Done = Callable[[Sequence[Claim]], None]


class Producer:
    """`ask` calls `put` with each wish and what to do with its claims."""

    def __init__(
        self,
        settings: WorkerSettings,
        routes: Routes,
        room: Capacity,
        put: Callable[[ClaimRequest, Done], None],
    ) -> None:
        self._settings, self._routes, self._room, self._put = settings, routes, room, put
        self._lanes: dict[str, HintQueue] = {}  # by route; empty: not known
        self._moved: dict[str, float] = {}  # by route: when a hint last found room
        self._wishing = set[str]()  # routes
        self._looking = False
        self._hints_first = True
        self._look_at: dict[
            str, float
        ] = {}  # by route: after a look that found less than there was room for

    def hint(self, ticket: HintBatch, ids: Sequence[str], lane: str, route: str = "") -> None:
        """Let these messages wait for room."""
        route = (
            route if self._routes.get(route) else ""
        )  # a name comes from the broker: only our own are kept
        lanes = self._lanes.setdefault(route, HintQueue())
        if not lanes:
            self._moved[route] = time.monotonic()
        lanes.add(ticket, ids, lane)

    def drop_hints(self, unless_moved_since: float = float("inf")) -> None:
        """Leave them to the database, where whoever has a free connection finds them overdue."""
        for route, lanes in self._lanes.items():
            if lanes.tickets and self._moved[route] <= unless_moved_since:
                lanes.clear()

    def stood_still(self, seconds: float) -> None:
        """This process was stopped for so long."""
        for route in self._moved:
            self._moved[route] += seconds

    def look_now(self) -> None:
        """More has become overdue."""
        self._look_at.clear()

    def ask(self, worker: str, now: float) -> None:
        """Ask for as many deliveries as there is room for: hints and the database by turns."""
        asks = (self._ask_hints, self._look) if self._hints_first else (self._look, self._ask_hints)
        for ask in asks:
            if ask(worker, now):
                self._hints_first = ask != self._ask_hints

    def _ask_hints(self, worker: str, now: float) -> bool:
        waiting = [
            route for route, lanes in self._lanes.items() if lanes and route not in self._wishing
        ]
        random.shuffle(waiting)
        asked = [
            self._ask_route(worker, now, route, len(waiting) - n) for n, route in enumerate(waiting)
        ]
        return any(asked)

    def _ask_route(self, worker: str, now: float, route: str, sharing: int) -> bool:
        lanes = self._lanes[route]
        if route and self._room.closed(route):
            lanes.clear()  # or they would keep the tasks that hold them from bringing the hints of other routes
            return False
        most = min(len(lanes), self._settings.batch_size)
        room, together = self._room.offer(most, route, sharing)
        if not room:
            return False
        hints = lanes.take(min(most, max(room.values())))
        self._wishing.add(route)
        self._moved[route] = now
        self._put(
            ClaimRequest(worker, [queue_id for queue_id, _ in hints], room, together),
            partial(self._hints_claimed, route, room, hints),
        )
        return True

    def _look(self, worker: str, now: float) -> bool:
        """Claim what is overdue, straight from the database: of each route at once again while it
        has more."""
        due = [name for name in self._routes.names() if now >= self._look_at.get(name, 0.0)]
        if (
            self._looking
            or not due
            or not (room := self._room.look(self._settings.worker_connections, due))
        ):
            return False
        self._looking = True
        self._put(ClaimRequest(worker, None, room), partial(self._look_claimed, room))
        return True

    def _hints_claimed(
        self, route: str, room: Mapping[str, int], hints: Sequence[Hint], claims: Sequence[Claim]
    ) -> None:
        self._room.settle(room, claims)
        self._wishing.discard(route)
        self._lanes[route].settle(hints)

    def _look_claimed(self, room: Mapping[str, int], claims: Sequence[Claim]) -> None:
        self._room.settle(room, claims)
        self._looking = False
        got = Counter(claim.route for claim in claims)
        later = time.monotonic() + min(LOOK_EVERY, self._settings.grace)
        for name, places in room.items():
            full = got[name] >= places and not self._room.all_servers_down(name)
            self._look_at[name] = 0.0 if full else later
