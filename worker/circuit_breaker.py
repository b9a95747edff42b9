"""The QMQP servers of the routes, as one worker sees them: order, connection limits, circuits.

A route tries its servers in the order of its list and passes over those that have no free slot, are
paused or have an open circuit. Failures in a row open the circuit of a server for a time that
doubles up to a minute, or to a few seconds while mail waits for the server. Then one transfer tests
it and closes the circuit or opens it for longer. Any whole reply is a success, also Z or D: the
circuit is about the server and not about the mail. A server to which no connection came about and
for which mail waits is probed by connections alone (`worker.prober`), and gets its transfer when
one of them came about.

What must stay true: a slot is released exactly once; nothing waits, and no clock counts but the one
given. All of it belongs to the engine's loop, but the sweeper's thread sets `pauses` and `awaited`
and reports failures, so no state may be half done in between.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from qmqp.connection import Preconnection
from relay.routes import Route, Server

FAILURES_TO_OPEN = 3
OPEN_MIN = 1.0  # seconds
OPEN_MAX = 60.0  # seconds
# Mail must be on its way within 5 s of the return of its server; a sweep and a poll take 1 s each.
# So this is the most seconds between the beginnings of two connection probes, and the longest that
# a circuit stays open while mail waits for a server that accepts connections and then fails.
MAX_PROBE_INTERVAL = 3.0
MAX_WOKEN = 1024  # deliveries of a route that may be due and not claimed yet
WORKING_TIME = 5.0  # seconds for which a whole reply proves that a server works
MIN_HOLD_BACK = 0.01  # seconds
MAX_HOLD_BACK = 1.0  # seconds


@dataclass(slots=True)
class CircuitBreaker:
    """The failures of a server since its last whole reply. Times are monotonic."""

    failures: int = 0
    trips: int = 0  # how often the circuit opened
    open_until: float | None = None  # None: closed
    unauthorized: bool = False
    unreachable: bool = False  # no connection came about at the last failure
    connected: bool = False  # a connection probe came about after that
    probe_at: float = 0.0  # no connection probe begins before
    reason: str = ""
    closed_after: float = 0.0  # seconds after which it last closed a connection without a reply
    replied_at: float = float("-inf")


@dataclass(slots=True)
class ServerState:
    """The connections to one server and its circuit breaker."""

    used: Counter[str] = field(default_factory=Counter)  # slots by route, the reserved ones too
    reserved: int = 0
    testing: bool = False
    breaker: CircuitBreaker = field(default_factory=CircuitBreaker)


@dataclass(slots=True)
class ConnectionSlot:
    """The right to open one connection to `server`, until it is released. `reserved`: for a
    delivery that is not claimed yet; `test`: the circuit of the server is open; `preconnection`: it
    is being opened already, and is closed with the slot unless somebody takes it."""

    server: Server
    route: str
    state: ServerState
    reserved: bool
    test: bool
    preconnection: Preconnection | None = None
    _held: bool = True

    def take_preconnection(self) -> Preconnection | None:
        """The connection that is being opened. The caller closes it."""
        taken, self.preconnection = self.preconnection, None
        return taken

    def release(self) -> None:
        """Return the slot; a second call does nothing."""
        if preconnection := self.take_preconnection():
            preconnection.close()
        if self._held:
            self._held = False
            self.state.used[self.route] -= 1
            self.state.reserved -= self.reserved
            if self.test:
                self.state.testing = False


class ServerPool:
    """The state of every server that this worker has met, by name. Routes share it.

    `limit` is SERVER_CONNECTIONS, `backoff` RETRY_MIN and RETRY_MAX; `routed` gives the names of
    all servers that are in a route.
    """

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
        self._routed = routed
        self._backoff = backoff
        self._states: dict[str, ServerState] = {}
        self.pauses: frozenset[str] = frozenset()  # `route:NAME` and `server:NAME`
        self.awaited: Mapping[str, Server] = {}  # the servers that mail waits for, by name

    # Slots

    def free(self, server: Server, route: Route | None = None) -> int:
        """How many more connections to a server may be opened now, by this route or by a route
        without a limit of its own. One while the server may be tested, none while its circuit is
        open."""
        if self._paused(server):
            return 0
        state = self.state(server)
        slots = self._limit - sum(state.used.values())
        if route is not None and route.connections is not None:
            slots = min(slots, route.connections - state.used[route.name])
        if state.breaker.open_until is not None:
            slots = min(slots, self._may_test(server.name, state) - state.reserved)
        return max(0, slots)

    def capacity(self, route: Route) -> int:
        """How many more connections may be opened for a route now."""
        if self.paused(route):
            return 0
        return sum(self.free(server, route) for server in route.servers)

    def take(
        self, route: Route, tried: Collection[str] = (), *, reserve: bool = False
    ) -> ConnectionSlot | None:
        """A slot at the first server with a free one that is not among the names `tried`.
        `reserve`: for a delivery that is to be claimed, which releases it and takes one again."""
        for server in route.servers:
            if server.name not in tried and self.free(server, route):
                state = self.state(server)
                test = state.breaker.open_until is not None and not reserve
                state.used[route.name] += 1
                state.reserved += reserve
                state.testing = state.testing or test
                return ConnectionSlot(server, route.name, state, reserve, test)
        return None

    # What a route can expect

    def paused(self, route: Route) -> bool:
        """Whether an operator paused the route."""
        return f"route:{route.name}" in self.pauses

    def down(self, route: Route, tried: Collection[str] = ()) -> bool:
        """Whether all servers of the route but those `tried` have an open circuit; none is only
        full or paused, and neither is the route."""
        return not self.paused(route) and all(
            self.circuit_open(server.name) and not self._paused(server)
            for server in route.servers
            if server.name not in tried
        )

    def works(self, route: Route) -> bool:
        """Whether a server of the route that is not paused gave a whole reply in the last seconds
        and has not failed since. Thread-safe."""
        breakers = [
            self.state(server).breaker for server in route.servers if not self._paused(server)
        ]
        return not self.paused(route) and any(
            not breaker.failures and self._clock() - breaker.replied_at < WORKING_TIME
            for breaker in breakers
        )

    def wake_limits(self, routes: Collection[Route]) -> dict[str, int]:
        """How many deferred deliveries of each route may be made due now: many where a server
        works, one where a server may be tried. From now on these servers are probed by connections
        while they cannot be reached. Thread-safe."""
        routes = [route for route in routes if not self.paused(route)]
        self.awaited = {server.name: server for route in routes for server in route.servers}
        limits = {
            route.name: MAX_WOKEN if self.works(route) else int(self._may_try(route))
            for route in routes
        }
        return {name: limit for name, limit in limits.items() if limit}

    def _may_try(self, route: Route) -> bool:
        # A poll reserves every slot for a moment; it must not hide from the sweeper that a server
        # may be tried. A server that cannot be reached is not tried before its circuit opens,
        # either: each try would be a claim.
        return any(
            (self.free(server, route) or self.state(server).reserved)
            and not self._needs_connection(server.name, self.state(server).breaker)
            for server in route.servers
        )

    def open_reason(self, route: Route) -> str:
        """Why the circuit of the first server that has an open one is open, for operators."""
        breakers = ((server.name, self.state(server).breaker) for server in route.servers)
        return next(
            (
                f"the circuit of {name} is open: {breaker.reason}"
                for name, breaker in breakers
                if breaker.open_until is not None
            ),
            "",
        )

    # Circuits

    def record_success(self, server: Server) -> bool:
        """A whole reply came. True when that closed an open circuit."""
        state = self.state(server)
        was_open = state.breaker.open_until is not None
        state.breaker = CircuitBreaker(replied_at=self._clock())
        return was_open

    def record_failure(
        self,
        server: Server,
        reason: str,
        *,
        unauthorized: bool = False,
        unreachable: bool = False,
    ) -> float | None:
        """No connection (`unreachable`), or no whole reply, or (`unauthorized`) a D about this
        relay.

        Returns the seconds for which this opened the circuit. None if it did not: a failure while
        the circuit is open comes from a transfer that began earlier and proves nothing new.

        A server that does not authorize this relay opens its circuit at once, and for longer than
        the backoff of the mail that it rejected, so that the retry goes to the next server. A
        server that fails after a connection probe came about gets mail after this time only: it
        accepts connections, so more connections would prove nothing. While mail waits for it, that
        is after a few seconds.
        """
        breaker = self.state(server).breaker
        breaker.failures += 1
        breaker.reason = reason
        now = self._clock()
        changed = unauthorized and not breaker.unauthorized
        is_open = breaker.open_until is not None
        if is_open and not changed and not self._may_transfer(server.name, breaker):
            return None
        breaker.unreachable = unreachable and not breaker.connected
        breaker.connected = False
        if not is_open and breaker.failures < FAILURES_TO_OPEN and not unauthorized:
            return None
        if changed:
            breaker.trips = 0
        doublings = 2.0 ** min(breaker.trips, 16)
        share = self._draw() / 2
        if unauthorized:
            least, most = self._backoff
            seconds = min(most, 2 * least * doublings) * (1 + share)
        else:
            most = MAX_PROBE_INTERVAL if server.name in self.awaited else OPEN_MAX
            seconds = min(most, OPEN_MIN * doublings) * (0.5 + share)
        breaker.trips += 1
        breaker.unauthorized = unauthorized
        breaker.open_until = now + seconds
        return seconds

    def record_close(self, server: Server, seconds: float) -> None:
        """The server closed a connection without a reply, so many seconds after the connection was
        requested."""
        self.state(server).breaker.closed_after = seconds

    def hold_back(self, server: Server) -> float:
        """For how many seconds after the connection was made the last byte of a request waits.

        A server that refuses connections by closing them (tcprules deny) does so a moment after the
        connection was made. By then a small request has left as a whole, and the close looks like
        that of a server that took the message and failed. Where the last connection ended like
        this, the last byte of the next request, its commit point, waits for twice as long and a
        little more.
        """
        after = self.state(server).breaker.closed_after
        return min(MAX_HOLD_BACK, MIN_HOLD_BACK + 2 * after) if after else 0.0

    def preconnect(self, slot: ConnectionSlot, seconds: float) -> None:
        """Begin to open the connection of a slot, in so many seconds, if the server works as far as
        we know."""
        server = slot.server
        if self.closed(server) and not self.hold_back(server):
            slot.preconnection = Preconnection(server.host or "", server.port, server.path, seconds)

    def closed(self, server: Server) -> bool:
        """Whether the circuit of the server is closed. One that may be tested is not."""
        return self.state(server).breaker.open_until is None

    # Connection probes

    def take_probes(self) -> list[Server]:
        """The servers to which a connection probe is to begin now. Each comes again after the next
        interval."""
        now, servers = self._clock(), []
        for name, server in self.awaited.items():
            breaker = self.state(server).breaker
            due = self._needs_connection(name, breaker) and now >= breaker.probe_at
            if due and not self._paused(server):
                breaker.probe_at = now + MAX_PROBE_INTERVAL * (0.5 + self._draw() / 2)
                servers.append(server)
        return servers

    def record_connection(self, server: Server) -> None:
        """A connection probe came about, so the server may get a transfer."""
        breaker = self.state(server).breaker
        breaker.connected = breaker.unreachable

    # For operators

    def circuit_open(self, name: str) -> bool:
        """Whether the circuit of the server of that name is open: until it may be tested, and while
        it is tested. Without traffic an open circuit counts as closed after its time.
        Thread-safe."""
        state = self._states.get(name)
        if state is None or state.breaker.open_until is None:
            return False
        return not self._may_test(name, state)

    def open_circuits(self) -> dict[str, str]:
        """The servers with an open circuit, and why. Forgets idle servers that are in no route.
        Thread-safe."""
        states = dict(self._states)
        if self._routed is not None:
            routed = self._routed()
            for name, state in states.items():
                if name not in routed and not state.used.total():
                    self._states.pop(name, None)
        return {name: s.breaker.reason for name, s in states.items() if self.circuit_open(name)}

    def state(self, server: Server) -> ServerState:
        """The state of a server; a new one when the worker has not met it yet."""
        return self._states.get(server.name) or self._states.setdefault(server.name, ServerState())

    def _paused(self, server: Server) -> bool:
        return bool(self.pauses) and f"server:{server.name}" in self.pauses

    def _may_test(self, name: str, state: ServerState) -> bool:
        return not state.testing and self._may_transfer(name, state.breaker)

    def _may_transfer(self, name: str, breaker: CircuitBreaker) -> bool:
        """Whether an open circuit allows a transfer."""
        if breaker.connected:
            return True
        passed = self._clock() >= (breaker.open_until or 0.0)
        return passed and not self._needs_connection(name, breaker)

    def _needs_connection(self, name: str, breaker: CircuitBreaker) -> bool:
        """Whether a connection probe must come about before the next transfer."""
        return name in self.awaited and breaker.unreachable and not breaker.connected
