"""Rerouting: mail that waits for a route which has gone gets the one that its recipients have
today.

Nobody claims for a route that no settings name, so such mail would wait until it expires. At its
start, whenever the names of the routes change, and every ten minutes for what others have accepted
under the old names, each worker looks for such mail. It moves what has been without a route for
PATIENCE: a route that is missing for a moment, from a file that was cut off or is being put right,
is no reason to send its mail elsewhere, and there is no way back.

What must stay true: only waiting deliveries move, by the same chunked verb that operators use, and
it is recorded among their actions; a route that another living worker says it knows is not gone.
"""

import threading
import time
from collections.abc import Callable

from relay.log import first_line, get_logger
from relay.queue.operations import REROUTE, QueueOperations
from relay.queue.rescue import Rescuer
from relay.report.filters import Filter
from relay.routes import Routes

log = get_logger(__name__)
LOOK_EVERY = 2.0
EVERY = 600.0
PATIENCE = 300.0


class Rerouter:
    """`start`, then `close`; `turn` is one look."""

    def __init__(
        self,
        sweeps: Rescuer,
        verbs: QueueOperations,
        routes: Routes,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sweeps, self._verbs, self._routes, self._clock = sweeps, verbs, routes, clock
        self._names: tuple[str, ...] = ()
        self._at = 0.0
        self._gone: dict[str, float] = {}  # routes that mail waits for and nobody knows: since when
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rerouting", daemon=True)

    def start(self) -> None:
        """Start looking."""
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._closing.set()

    def _run(self) -> None:
        while not self._closing.wait(LOOK_EVERY):
            try:
                self.turn()
            except Exception as error:
                log.warning("rerouting put off", reason=first_line(error))

    def turn(self) -> int:
        """Move what waits for a route that is gone, if it is time to look; how many deliveries that
        were."""
        names, now = self._routes.names(), self._clock()
        if names == self._names and now < self._at:
            return 0
        self._gone = {
            route: self._gone.get(route, now) for route in self._sweeps.unknown_routes(names)
        }
        due = [route for route, since in self._gone.items() if now - since >= PATIENCE]
        moved = sum(map(self._move, due))
        for route in self._gone.keys() - set(due):
            log.warning(
                "route gone", route=route, seconds=round(PATIENCE + self._gone[route] - now)
            )
        self._names = names
        self._at = min(
            [
                now + EVERY,
                *(since + PATIENCE for route, since in self._gone.items() if route not in due),
            ]
        )
        return moved

    def _move(self, gone: str) -> int:
        reason = f"the route {gone} is gone"
        touched, _ = self._verbs.apply(
            REROUTE,
            Filter(route=gone),
            actor="worker",
            reason=reason,
            route_for=self._routes.route_for,
        )
        log.warning("rerouted", route=gone, deliveries=touched.total())
        return touched.total()
