"""The QMQP servers of a route, as one worker sees them: order, health, connection limits.

The servers of a route are tried in the order of its list. Each has as many places as a worker may
hold connections to it, whatever for (SERVER_CONNECTIONS), and a route may have a limit of its own,
which counts what is sent its way alone (`connections`): what others do there must not use it up. A
server without a free place, or that an operator paused, is passed over for the next.

Failures in a row open a server's breaker: nothing is sent to it for a time that doubles up to a
minute, then one transfer may probe it, and its end closes the breaker or opens it for longer. Any
whole reply, also Z or D, is a sign of health: it is the server that is judged here, not what it
thinks of the mail. While mail waits for the server (`awaited`), a probe comes after REST_AWAITED at
the latest.

A server that refuses us is there, and trying it soon again changes nothing. Its breaker stays open
for longer than any mail waits that it has refused as often: for the longest backoff of that step
and up to half as much again. So the mail that it refused finds it closed, and goes to the next
server of the route.

What must stay true: a place that was taken is given back exactly once (`ConnectionSlot.release`),
whatever became of the transfer; no I/O, and no clock but the one handed in. All of it belongs to
the engine's loop, but the sweeper sets `pauses` and `awaited`, and reports what it finds refused
(`failed`): neither may find anything half done.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from relay.routes import Route, Server

FAILURES_TO_OPEN = 3
OPEN_MIN = 1.0
OPEN_MAX = 60.0
# Less than 5 s, within which mail is to be on its way after the server is back: a sweep and a look
# take a second each.
REST_AWAITED = 3.0
MAX_WOKEN = 1024  # deliveries of a route that may be due and not claimed yet
FRESH = 5.0  # so long a whole reply tells that a server works (seconds)
HELD_BACK_LEAST, HELD_BACK_MOST = 0.01, 1.0  # seconds


@dataclass(slots=True)
class CircuitBreaker:
    """What is known of one server. `open_until` is None while the breaker is closed;
    `awaited_until` is when the rest ends if mail waits for the server. `closed_after`: the seconds
    after which it closed the last connection that it closed without a reply, or 0 if it has replied
    since."""

    used: Counter[str] = field(default_factory=Counter)  # by route
    failures: int = 0
    trips: int = 0
    open_until: float | None = None
    awaited_until: float = 0.0
    refuses: bool = False
    replied_at: float = float("-inf")
    closed_after: float = 0.0
    probing: bool = False
    why: str = ""


@dataclass(slots=True)
class ConnectionSlot:
    """The right to hold one connection to `server`, until it is released."""

    server: Server
    route: str
    health: CircuitBreaker
    probe: bool
    _held: bool = field(default=True)

    def release(self) -> None:
        if self._held:
            self._held = False
            self.health.used[self.route] -= 1
            if self.probe:
                self.health.probing = False


class ServerPool:
    """The health of every server that this worker has met, by name: routes that share a server
    share its places."""

    def __init__(
        self,
        limit: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
        routed: Callable[[], Collection[str]] | None = None,
        backoff: tuple[float, float] = (30.0, 3600.0),
    ) -> None:
        self._limit = limit
        self._clock = clock
        self._draw = draw
        self._routed = routed  # the names of all servers that are in a route
        self._known: dict[str, CircuitBreaker] = {}
        self._backoff = backoff  # RETRY_MIN and RETRY_MAX
        self.pauses: frozenset[str] = (
            frozenset()
        )  # `route:NAME` and `server:NAME`, as operators set them
        self.awaited: frozenset[str] = frozenset()  # the names of servers that mail waits for

    def health(self, server: Server) -> CircuitBreaker:
        return self._known.get(server.name) or self._known.setdefault(server.name, CircuitBreaker())

    def free(self, server: Server, route: Route | None = None) -> int:
        """How many more connections may be opened to `server` now, by a route or by any that has no
        limit of its own: one while it is to be probed, none at rest."""
        known = self.health(server)
        places = self._limit - known.used.total()
        if route is not None and route.connections is not None:
            places = min(places, route.connections - known.used[route.name])
        places = max(0, places)
        if self._is_paused(server):
            return 0
        if known.open_until is None:
            return places
        return min(1, places) if self._may_probe(server.name, known) else 0

    def room(self, route: Route) -> int:
        """How many transfers the servers of a route have places for."""
        return (
            0 if self.paused(route) else sum(self.free(server, route) for server in route.servers)
        )

    def paused(self, route: Route) -> bool:
        """Whether an operator wants nothing sent this way."""
        return f"route:{route.name}" in self.pauses

    def down(self, route: Route, tried: Collection[str] = ()) -> bool:
        """True when all its servers rest (but those `tried`): none is merely full or paused, and
        waiting is all."""
        return all(self._rests(server) for server in route.servers if server.name not in tried)

    def take(self, route: Route, tried: Collection[str] = ()) -> ConnectionSlot | None:
        """A place on the first server that is not among the names `tried` and has one free; None
        when none has."""
        for server in route.servers:
            if server.name not in tried and self.free(server, route):
                known = self.health(server)
                known.used[route.name] += 1
                probe = known.open_until is not None
                known.probing = known.probing or probe
                return ConnectionSlot(server, route.name, known, probe)
        return None

    def wake_limits(self, routes: Collection[Route]) -> dict[str, int]:
        """How many deferred deliveries of each route may be made due now: many where a server works,
        one where a server may be probed. From now on these servers are probed sooner. Thread-safe."""
        self.awaited = frozenset(server.name for route in routes for server in route.servers)
        limits = {
            route.name: MAX_WOKEN if self.works(route) else min(1, self.room(route))
            for route in routes
        }
        return {name: limit for name, limit in limits.items() if limit}

    def works(self, route: Route) -> bool:
        """Whether one of its servers has just given a whole reply, and none of them is paused or
        has failed since. Thread-safe."""
        if self.paused(route):
            return False
        found = [
            known
            for one in route.servers
            if not self._is_paused(one) and (known := self._known.get(one.name))
        ]
        return any(not one.failures and self._clock() - one.replied_at < FRESH for one in found)

    def succeeded(self, server: Server) -> bool:
        """A whole reply came. True when that ended a rest."""
        known = self.health(server)
        recovered = known.open_until is not None
        known.failures = known.trips = 0
        known.open_until = None
        known.refuses = False
        known.replied_at = self._clock()
        known.closed_after = 0.0
        known.why = ""
        return recovered

    def failed(self, server: Server, why: str, *, at_once: bool = False) -> float | None:
        """No connection, or no whole reply (or, `at_once`, one that says we are not wanted).

        Gives the seconds that the server is left alone when this opened its breaker, else None: a
        failure during a rest comes from a transfer that began before it and says nothing new.
        """
        known = self.health(server)
        known.failures += 1
        known.why = why
        now = self._clock()
        news = at_once and not known.refuses  # also during a rest
        if known.open_until is not None and now < self._rest_end(server.name, known) and not news:
            return None
        if known.open_until is None and known.failures < FAILURES_TO_OPEN and not at_once:
            return None
        if news:
            known.trips = 0
        doublings, share = 2.0 ** min(known.trips, 16), self._draw() / 2
        if at_once:
            least, most = self._backoff
            rest = soon = min(most, 2 * least * doublings) * (1 + share)
        else:
            rest = min(OPEN_MAX, OPEN_MIN * doublings) * (0.5 + share)
            soon = min(rest, REST_AWAITED * (0.5 + share))
        known.trips += 1
        known.refuses = at_once
        known.open_until, known.awaited_until = now + rest, now + soon
        return rest

    def closed(self, server: Server, seconds: float) -> None:
        """It closed a connection without a reply, so many seconds after it was asked for one."""
        self.health(server).closed_after = seconds

    def holds_back(self, server: Server) -> float:
        """For how many seconds after the connection is made the last byte of a request to `server`
        is held back.

        One that refuses us by closing (tcprules deny) does so a moment after the connection was
        made, and a small request has left as a whole by then: nothing would tell this from a server
        that took it and failed. Where the last connection ended like this, the next request waits
        with its last byte, its commit point, for twice as long as that took and a little more.
        Anywhere else it waits for nothing.
        """
        after = self.health(server).closed_after
        return min(HELD_BACK_MOST, HELD_BACK_LEAST + 2 * after) if after else 0.0

    def open_circuits(self) -> dict[str, str]:
        """The servers that are left alone for now, and why; forgets those that are in no route.
        Thread-safe."""
        if self._routed is not None:
            routed = self._routed()
            for name, known in list(self._known.items()):
                if name not in routed and not known.used.total():
                    self._known.pop(name, None)
        return {name: known.why for name, known in list(self._known.items()) if self.rests(name)}

    def rests(self, name: str) -> bool:
        """Whether the server of that name is left alone: until its rest has run out, and while
        somebody tries. Who has nothing for it does not try, and so does not leave it alone.
        Thread-safe."""
        known = self._known.get(name)
        if known is None or known.open_until is None:
            return False
        return known.probing or self._clock() < self._rest_end(name, known)

    def why(self, route: Route) -> str:
        """Why the first server that rests does so, in words for an operator."""
        for server in route.servers:
            if self.health(server).open_until is not None:
                return f"{server.name} is left alone for a while: {self.health(server).why}"
        return ""

    def _is_paused(self, server: Server) -> bool:
        return bool(self.pauses) and f"server:{server.name}" in self.pauses

    def _rests(self, server: Server) -> bool:
        known = self.health(server)
        open_circuits = known.open_until is not None and not self._may_probe(server.name, known)
        return open_circuits and not self._is_paused(server)

    def _may_probe(self, name: str, known: CircuitBreaker) -> bool:
        return (
            not known.probing
            and known.open_until is not None
            and self._clock() >= self._rest_end(name, known)
        )

    def _rest_end(self, name: str, known: CircuitBreaker) -> float:
        rest_end: float = known.awaited_until if name in self.awaited else known.open_until or 0.0
        return rest_end
