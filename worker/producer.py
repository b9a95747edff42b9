"""The producer: which deliveries a worker asks the database for, and when.

Two sources take turns. Hints wait in a `HintQueue` for each route, or in one for hints that may be
for any route. The overdue poll asks for overdue deliveries, once a second for each route, and at
once while a route has more. Either becomes a `ClaimRequest` within the `Capacity` of the routes.

What must stay true: at most one request for each hint queue and one poll are under way; reserved
capacity is returned when the claims arrive, whatever they are; only the capacity of its own route
decides what happens to a hint. All but `HintBatch.wait` belongs to the engine's loop.
"""

import itertools
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial

from relay.hints import FRESH, QUEUES
from relay.queue.model import Claim, ClaimRequest
from relay.routes import Route, Routes
from relay.settings import WorkerSettings
from worker.circuit_breaker import ServerPool

POLL_INTERVAL = 1.0  # seconds

type Hint = tuple[str, HintBatch]
type ClaimsHandler = Callable[[Sequence[Claim]], None]
type SharedCapacity = list[tuple[frozenset[str], int]]


class HintBatch:
    """The hints of one task. The task waits until each has become part of a claim request or was
    dropped."""

    __slots__ = ("_done", "_left")

    def __init__(self, size: int) -> None:
        self._left = size
        self._done = threading.Event()
        if not size:
            self.finish()

    def wait(self, timeout: float | None = None) -> bool:
        """True once all hints were used or dropped; False after `timeout` seconds. Thread-safe."""
        return self._done.wait(timeout)

    def use_one(self) -> bool:
        """One hint was used; True when that was the last."""
        self._left -= 1
        if self._left <= 0:
            self.finish()
        return self._left <= 0

    def finish(self) -> None:
        """Release the task."""
        self._done.set()


class HintQueue:
    """The hints of one route that wait for capacity. Fresh mail and retries take turns, so that
    neither is served twice in a row while the other waits."""

    def __init__(self) -> None:
        self._hints: dict[str, deque[Hint]] = {name: deque() for name in QUEUES}
        self._turns = itertools.cycle(QUEUES)
        self.batches: set[HintBatch] = set()  # the unfinished ones
        self.requested = False  # whether a claim request is under way
        self.moved_at = 0.0  # when a hint last left, or came to the empty queue (monotonic)

    def __len__(self) -> int:
        return sum(map(len, self._hints.values()))

    def add(self, batch: HintBatch, ids: Iterable[str], queue: str) -> None:
        """Append hints of one Celery queue; an unknown name counts as fresh mail."""
        if not self:
            self.moved_at = time.monotonic()
        self.batches.add(batch)
        self._hints.get(queue, self._hints[FRESH]).extend((queue_id, batch) for queue_id in ids)

    def take(self, most: int) -> list[Hint]:
        """Remove and return at most so many hints."""
        taken: list[Hint] = []
        while len(taken) < most and len(self):
            if hints := self._hints[next(self._turns)]:
                taken.append(hints.popleft())
        return taken

    def use(self, hints: Iterable[Hint]) -> None:
        """The claim request with these hints was answered."""
        for _, batch in hints:
            if batch.use_one():
                self.batches.discard(batch)

    def drop(self) -> None:
        """Forget all hints. Their deliveries become overdue, and any worker finds them."""
        for hints in self._hints.values():
            hints.clear()
        for batch in self.batches:
            batch.finish()
        self.batches.clear()


class Capacity:
    """How many deliveries of each route may be claimed now, so that no claim waits for a
    connection.

    A route has as much capacity as its servers have free slots, less the slots that are reserved
    for claims without a slot; all routes together have WORKER_CONNECTIONS. `busy` counts the
    deliveries that are reserved or claimed and have not ended.

    Routes may share servers. The slots of a route's servers also serve every route whose servers
    are all among them (its group), and a reservation counts against every group of its route. This
    is exact where routes share all of their servers or none. Where lists overlap in part, or a
    route with its own limit has several servers, a claim may find its slot taken; it is requeued.

    A route has no capacity for hints while all its servers are down. The poll still claims a batch
    of its mail, so that each message records why it waits and expires in the end.
    """

    def __init__(
        self, routes: Routes, servers: ServerPool, connections: int, batch_size: int
    ) -> None:
        self._routes = routes
        self._servers = servers
        self._connections = connections
        self._batch_size = batch_size
        self.busy = 0
        self._without_slot: Counter[str] = Counter()  # the part of `busy` without a slot, by route
        self._known: tuple[Route, ...] = ()
        self._groups: dict[str, frozenset[str]] = {}  # by route: those whose servers it has
        self._groups_of: dict[str, list[str]] = {}  # by route: the groups that it is in

    @property
    def free(self) -> int:
        """How many more deliveries may be claimed, of all routes together."""
        return self._connections - self.busy

    def reserve(
        self, names: Collection[str], most: int, *, overdue: bool = False
    ) -> dict[str, int]:
        """Reserve capacity of these routes for at most so many deliveries in all; by route.

        `settle` returns it. The order of the routes is random, because the first gets all of a
        shared server.
        """
        reserved: dict[str, int] = {}
        for name, share in self._shares(names, most, overdue):
            reserved[name] = share
            self._add({name: share}, 1)
        return reserved

    def reserve_any(self, each: int, most: int) -> tuple[dict[str, int], SharedCapacity]:
        """Reserve capacity for hints that may be for any route: at most `each` by route, `most` in
        all. Routes that share servers get the same slots; how many they may use together is the
        second result."""
        shares = self._shares(self._routes.names(), most, overdue=False)
        reserved = {name: min(each, share) for name, share in shares}
        groups = dict.fromkeys(
            (group.intersection(reserved), self._free_slots(name))
            for name, group in self._groups.items()
        )
        self._add(reserved, 1)
        return reserved, [(group, slots) for group, slots in groups if len(group) > 1]

    def settle(self, reserved: Mapping[str, int], claims: Iterable[Claim]) -> None:
        """A claim request was answered: its claims keep their reservation, the rest is free."""
        self._add(reserved, -1)
        self._add(Counter(claim.route for claim in claims), 1)

    def slot_taken(self, name: str) -> None:
        """A claim of this route has its slot, or does not need one any more."""
        self._without_slot[name] -= 1

    def ended(self) -> None:
        """A claim ended."""
        self.busy -= 1

    def all_servers_down(self, name: str) -> bool:
        """Whether every server of a route that is not paused has an open circuit."""
        route = self._routes.get(name)
        return route is not None and not self._servers.paused(route) and self._servers.down(route)

    def closed(self, name: str) -> bool:
        """Whether hints are useless: the route is gone, paused, or all its servers are down."""
        route = self._routes.get(name)
        return route is None or self._servers.paused(route) or self._servers.down(route)

    def _shares(self, names: Iterable[str], most: int, overdue: bool) -> Iterator[tuple[str, int]]:
        """Divide the free connections equally among the routes that have capacity."""
        self._update_groups()
        names = [name for name in names if self._of(name, overdue) > 0]
        random.shuffle(names)
        left = min(most, self.free)
        for n, name in enumerate(names):
            if (share := min(-(-left // (len(names) - n)), self._of(name, overdue))) > 0:
                left -= share
                yield name, share

    def _update_groups(self) -> None:
        if (routes := self._routes.all()) == self._known:
            return
        self._known = routes
        servers = {route.name: {server.name for server in route.servers} for route in routes}
        self._groups = {
            name: frozenset(other for other, some in servers.items() if some and some <= own)
            for name, own in servers.items()
        }
        self._groups_of = {
            name: [other for other, group in self._groups.items() if name in group]
            for name in servers
        }

    def _of(self, name: str, overdue: bool) -> int:
        if self.all_servers_down(name):
            return self._batch_size if overdue else 0
        if (route := self._routes.get(name)) is None:
            return 0
        own = self._servers.capacity(route) - self._without_slot[name]
        return min([own, *map(self._free_slots, self._groups_of[name])])

    def _free_slots(self, name: str) -> int:
        """The free slots of a route's servers, less those reserved for the routes of its group."""
        route = self._routes.get(name)
        slots = sum(map(self._servers.free, route.servers)) if route else 0
        reserved = [other for other in self._groups[name] if not self.all_servers_down(other)]
        return slots - sum(self._without_slot[other] for other in reserved)

    def _add(self, counts: Mapping[str, int], sign: int) -> None:
        for name, count in counts.items():
            self.busy += sign * count
            self._without_slot[name] += sign * count


class Producer:
    """Makes claim requests. `request` is called with each of them and a function for its claims."""

    def __init__(
        self,
        settings: WorkerSettings,
        routes: Routes,
        servers: ServerPool,
        request: Callable[[ClaimRequest, ClaimsHandler], None],
    ) -> None:
        self._settings = settings
        self._routes = routes
        self._request = request
        self.capacity = Capacity(routes, servers, settings.worker_connections, settings.batch_size)
        self.hints: dict[str, HintQueue] = {}  # by route; "": the route is not known
        self._hints_first = True
        self._polling = False
        self._poll_at: dict[str, float] = {}  # by route, after a poll that found too little

    def add(self, batch: HintBatch, ids: Sequence[str], queue: str, route: str = "") -> None:
        """Queue hints. The broker is not trusted: the name of an unknown route is not kept."""
        route = route if self._routes.get(route) else ""
        self.hints.setdefault(route, HintQueue()).add(batch, ids, queue)

    def drop_hints(self, unless_moved_since: float = float("inf")) -> None:
        """Drop the hints of the queues that have not moved since then."""
        for hints in self.hints.values():
            if hints.batches and hints.moved_at <= unless_moved_since:
                hints.drop()

    def extend_waits(self, seconds: float) -> None:
        """The process was stopped for so long: that time does not count."""
        for hints in self.hints.values():
            hints.moved_at += seconds

    def poll_now(self) -> None:
        """More deliveries have become overdue."""
        self._poll_at.clear()

    def produce(self, worker: str, now: float) -> None:
        """Request as many deliveries as there is capacity; hints and the poll take turns."""
        sources = (self._use_hints, self._poll)
        for source in sources if self._hints_first else sources[::-1]:
            if source(worker, now):
                self._hints_first = source != self._use_hints

    def _use_hints(self, worker: str, now: float) -> bool:
        waiting = [name for name, hints in self.hints.items() if hints and not hints.requested]
        random.shuffle(waiting)
        used = [
            self._use_hints_of(name, -(-self.capacity.free // (len(waiting) - n)), worker, now)
            for n, name in enumerate(waiting)
        ]
        return any(used)

    def _use_hints_of(self, route: str, connections: int, worker: str, now: float) -> bool:
        hints = self.hints[route]
        if route and self.capacity.closed(route):
            hints.drop()  # its tasks would not fetch the hints of other routes meanwhile
            return False
        most = min(len(hints), self._settings.batch_size)
        shared: SharedCapacity = []
        if route:
            reserved = self.capacity.reserve([route], min(most, connections))
        else:
            reserved, shared = self.capacity.reserve_any(most, connections)
        if not reserved:
            return False
        taken = hints.take(min(most, max(reserved.values())))
        hints.requested = True
        hints.moved_at = now
        self._request(
            ClaimRequest(worker, [queue_id for queue_id, _ in taken], reserved, shared),
            partial(self._hints_claimed, hints, taken, reserved),
        )
        return True

    def _hints_claimed(
        self,
        hints: HintQueue,
        taken: Sequence[Hint],
        reserved: Mapping[str, int],
        claims: Sequence[Claim],
    ) -> None:
        self.capacity.settle(reserved, claims)
        hints.requested = False
        hints.use(taken)

    def _poll(self, worker: str, now: float) -> bool:
        due = [name for name in self._routes.names() if now >= self._poll_at.get(name, 0.0)]
        if self._polling or not due:
            return False
        reserved = self.capacity.reserve(due, self._settings.worker_connections, overdue=True)
        if not reserved:
            return False
        self._polling = True
        self._request(ClaimRequest(worker, None, reserved), partial(self._polled, reserved))
        return True

    def _polled(self, reserved: Mapping[str, int], claims: Sequence[Claim]) -> None:
        self.capacity.settle(reserved, claims)
        self._polling = False
        count = Counter(claim.route for claim in claims)
        later = time.monotonic() + min(POLL_INTERVAL, self._settings.grace)
        for name, most in reserved.items():
            more = count[name] >= most and not self.capacity.all_servers_down(name)
            self._poll_at[name] = 0.0 if more else later
