"""Room: how many deliveries of each route may be claimed now.

Nothing is claimed that would have to wait for a connection, so every wish promises connections beforehand, and what
comes back unused is given back. A route has as much room as its servers have places, less what is promised and has no
place yet; together the routes have WORKER_CONNECTIONS.

A route of which every server rests is hopeless: hints are no use there, but a look at the database takes a batch a
second of its mail all the same, so that each message is told why it waits and expires in the end, whatever the length
of the queue. What must stay true: `busy` is what was promised or claimed and has not ended, no more and no less.
"""

import random
from collections import Counter
from collections.abc import Iterable, Mapping

from relay.claims import Claim
from relay.routes import Routes
from worker.servers import Servers


class Room:
    """The connections of one worker; belongs to its loop."""

    def __init__(self, routes: Routes, servers: Servers, connections: int, batch_size: int) -> None:
        self._routes, self._servers = routes, servers
        self._connections, self._batch_size = connections, batch_size
        self.busy = 0  # promised or in use
        self._unplaced: Counter[str] = Counter()  # by route: those of them that hold no place at a server yet

    def offer(self, most: int, *, hopeless: bool = False) -> dict[str, int]:
        """How many deliveries each route may claim, `most` in all; promised until `settle`."""
        left = min(most, self._connections - self.busy)
        places = {name: self._places(name, hopeless) for name in self._routes.names()}
        names = [name for name, count in places.items() if count > 0]
        room: dict[str, int] = {}
        for n, name in enumerate(random.sample(names, len(names)) if len(names) > 1 else names):
            share = min(-(-left // (len(names) - n)), places[name])
            if share > 0:
                room[name] = share
                left -= share
        self._promise(room, 1)
        return room

    def _places(self, name: str, hopeless: bool) -> int:
        if self.hopeless(name):
            return self._batch_size if hopeless else 0
        route = self._routes.get(name)
        return self._servers.room(route) - self._unplaced[name] if route else 0

    def hopeless(self, name: str) -> bool:
        """Whether no server of the route can be tried now, and not because somebody paused it."""
        route = self._routes.get(name)
        return route is not None and not self._servers.paused(route) and self._servers.down(route)

    def settle(self, room: Mapping[str, int], claims: Iterable[Claim]) -> None:
        """A wish with this room came back with these claims: they keep their room, the rest of it is free again."""
        self._promise(room, -1)
        self._promise(Counter(claim.route for claim in claims), 1)

    def placed(self, name: str) -> None:
        """A claim of this route holds a place at a server, or will never need one."""
        self._unplaced[name] -= 1

    def ended(self) -> None:
        """A claim needs its connection no more."""
        self.busy -= 1

    def _promise(self, room: Mapping[str, int], sign: int) -> None:
        for name, count in room.items():
            self.busy += sign * count
            self._unplaced[name] += sign * count
