"""Room: how many deliveries of each route may be claimed now.

Nothing is claimed that would have to wait for a connection, so every wish promises connections
beforehand, and what comes back unused is given back. A route has as much room as its servers have
places, less what is promised and has no place yet; together the routes have WORKER_CONNECTIONS.

Routes may share servers. The places of a route's servers also have to do for all routes whose
servers are among them, its *company*: whoever is promised a place counts against every company that
it is in. That is exact where routes share all of their servers or none; where lists merely overlap,
or a route with a limit of its own has several servers, a claim may find its place taken, and is
handed back. A hint mostly says its route, and what that route has room for is promised to it alone.
Where it does not, a wish promises each route all that its company has, and says what the company
may have together.

A route of which every server rests is hopeless: hints are no use there, but a look at the database
takes a batch a second of its mail all the same, so that each message is told why it waits and
expires in the end, whatever the length of the queue. What must stay true: `busy` is what was
promised or claimed and has not ended, no more and no less.
"""

import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from relay.queue.model import Claim
from relay.routes import Route, Routes
from worker.circuit_breaker import ServerPool

type Together = list[tuple[frozenset[str], int]]


class Capacity:
    """The connections of one worker; belongs to its loop."""

    def __init__(
        self, routes: Routes, servers: ServerPool, connections: int, batch_size: int
    ) -> None:
        self._routes, self._servers = routes, servers
        self._connections, self._batch_size = connections, batch_size
        self.busy = 0  # promised or in use
        self._known: tuple[Route, ...] = ()
        self._sharing: dict[
            str, frozenset[str]
        ] = {}  # by route: whose servers are all among its own
        self._shared_by: dict[str, list[str]] = {}  # by route: in whose company it is
        self._unplaced: Counter[str] = (
            Counter()
        )  # by route: those of them that hold no place at a server yet

    def look(self, most: int, names: Collection[str]) -> dict[str, int]:
        """How many deliveries each of these routes may claim of what is overdue; promised until
        `settle`.

        `most` in all. The first takes what there is: their order is chance.
        """
        room: dict[str, int] = {}
        found = [name for name in self._with_places(look=True) if name in names]
        left = min(most, self._connections - self.busy)
        for n, name in enumerate(found):
            share = min(-(-left // (len(found) - n)), self._places(name, look=True))
            if share > 0:
                room[name] = share
                left -= share
                self._promise({name: share}, 1)
        return room

    def offer(self, most: int, name: str = "", sharing: int = 1) -> tuple[dict[str, int], Together]:
        """How many deliveries of `most` hinted messages each route (or this one) may claim, and
        some of them together; promised until `settle`. So many routes are `sharing` the connections
        that are free."""
        found = [one for one in self._with_places(look=False) if name in ("", one)]
        left = min(most * len(found), -(-(self._connections - self.busy) // sharing))
        room: dict[str, int] = {}
        for n, name in enumerate(found):
            if (share := min(-(-left // (len(found) - n)), self._places(name, look=False))) > 0:
                room[name] = share
                left -= share
        companies = [
            (company.intersection(room), self._left(name))
            for name, company in self._sharing.items()
        ]
        self._promise(room, 1)
        return room, [
            (company, places) for company, places in dict.fromkeys(companies) if len(company) > 1
        ]

    def _with_places(self, *, look: bool) -> list[str]:
        """The names of routes with room, shuffled."""
        if (routes := self._routes.all()) != self._known:
            self._known = routes
            self._find_shared_servers(
                {route.name: {server.name for server in route.servers} for route in routes}
            )
        names = [name for name in self._sharing if self._places(name, look=look) > 0]
        return random.sample(names, len(names))

    def _find_shared_servers(self, servers: Mapping[str, set[str]]) -> None:
        """Who is in whose company, now that the routes have changed."""
        self._sharing = {
            name: frozenset(other for other, some in servers.items() if some and some <= mine)
            for name, mine in servers.items()
        }
        self._shared_by = {
            name: [other for other, company in self._sharing.items() if name in company]
            for name in servers
        }

    def _places(self, name: str, *, look: bool) -> int:
        if self.all_servers_down(name):
            return self._batch_size if look else 0
        if (route := self._routes.get(name)) is None:
            return 0
        return min(
            [
                self._servers.room(route) - self._unplaced[name],
                *map(self._left, self._shared_by[name]),
            ]
        )

    def _left(self, name: str) -> int:
        """The places of a route's servers that nobody in its company is promised."""
        route = self._routes.get(name)
        places = sum(map(self._servers.free, route.servers)) if route else 0
        return places - sum(
            self._unplaced[other]
            for other in self._sharing[name]
            if not self.all_servers_down(other)
        )

    def all_servers_down(self, name: str) -> bool:
        """Whether no server of the route can be tried now, and not because somebody paused it."""
        route = self._routes.get(name)
        return route is not None and not self._servers.paused(route) and self._servers.down(route)

    def closed(self, name: str) -> bool:
        """Whether hints are no use to the route: an operator paused it, or no server of its can be
        tried now."""
        route = self._routes.get(name)
        return route is None or self._servers.paused(route) or self._servers.down(route)

    def settle(self, room: Mapping[str, int], claims: Iterable[Claim]) -> None:
        """A wish with this room came back with these claims: they keep their room, the rest of it
        is free again."""
        self._promise(room, -1)
        self._promise(Counter(claim.route for claim in claims), 1)

    def slot_taken(self, name: str) -> None:
        """A claim of this route holds a place at a server, or will never need one."""
        self._unplaced[name] -= 1

    def ended(self) -> None:
        """A claim needs its connection no more."""
        self.busy -= 1

    def _promise(self, room: Mapping[str, int], sign: int) -> None:
        for name, count in room.items():
            self.busy += sign * count
            self._unplaced[name] += sign * count
