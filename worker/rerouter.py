"""The rerouter: mail of a route that is gone gets the route that its recipients have today.

No worker claims mail of a route that no settings name; it would wait until it expires. Each worker
looks for such mail when it starts, whenever the names of its routes change, and every ten minutes.
It reroutes mail whose route has been gone for MIN_GONE: a route may be missing for a moment, while
its file is being edited, and rerouting cannot be undone.

What must stay true: only waiting deliveries are rerouted, by the same operation that operators use,
and the audit records it; a route that another living worker knows is not gone.
"""

import time
from collections.abc import Callable

from relay.log import get_logger
from relay.queue.operations import REROUTE, QueueOperations
from relay.queue.rescue import Rescuer
from relay.report.filters import Filter
from relay.routes import Routes
from worker.periodic import PeriodicThread

log = get_logger(__name__)
CHECK_INTERVAL = 2.0  # seconds: for a change of the routes' names
SCAN_INTERVAL = 600.0  # seconds: for mail that others accepted under old names
MIN_GONE = 300.0  # seconds


class Rerouter(PeriodicThread):
    """Looks for mail of routes that are gone."""

    def __init__(
        self,
        rescuer: Rescuer,
        operations: QueueOperations,
        routes: Routes,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__("rerouter", CHECK_INTERVAL)
        self._rescuer = rescuer
        self._operations = operations
        self._routes = routes
        self._clock = clock
        self._names: tuple[str, ...] = ()
        self._next_at = 0.0
        self._gone_since: dict[str, float] = {}  # by route, if mail waits for it

    def turn(self) -> int:
        """Reroute mail whose route is gone, if a scan is due; the number of deliveries."""
        names = self._routes.names()
        now = self._clock()
        if names == self._names and now < self._next_at:
            return 0
        unknown = self._rescuer.unknown_routes(names)
        self._gone_since = {route: self._gone_since.get(route, now) for route in unknown}
        rerouted = 0
        self._next_at = now + SCAN_INTERVAL
        for route, since in self._gone_since.items():
            left = since + MIN_GONE - now
            if left <= 0:
                rerouted += self._reroute(route)
            else:
                log.warning("route gone", route=route, seconds=round(left))
                self._next_at = min(self._next_at, now + left)
        self._names = names
        return rerouted

    def _reroute(self, route: str) -> int:
        changed, _ = self._operations.apply(
            REROUTE,
            Filter(route=route),
            actor="worker",
            reason=f"the route {route} is gone",
            route_for=self._routes.route_for,
        )
        log.warning("rerouted", route=route, deliveries=changed.total())
        return changed.total()
