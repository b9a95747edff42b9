"""The producer: which deliveries a worker asks the database for, and when.

Two sources take turns. Hints wait in a `HintQueue` for each route; those that may be for any route
wait in all of them. The overdue poll asks for overdue deliveries, once a second for each route, and
at once while a route has more. Either becomes a `ClaimRequest` within the `Capacity` of the routes.

What must stay true: at most one request for each hint queue and one poll are under way; reserved
slots are released when the claims arrive, whatever they are; only the capacity of its own route
decides what happens to a hint. All but waiting for a `HintBatch` belongs to the engine's loop.
"""

import itertools
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from relay.hint_entry import EARLY_SEARCH
from relay.hints import FRESH, QUEUES
from relay.queue.model import Claim, ClaimRequest
from relay.routes import Route, Routes
from relay.settings import WorkerSettings
from worker.circuit_breaker import ConnectionSlot, ServerPool

POLL_INTERVAL = 1.0  # seconds
EARLY_PAUSE = 0.001
"""Seconds between two claims for an early hint; half of the time that has passed, when that is
longer."""

type HintedId = tuple[str, HintBatch]
type Slots = list[ConnectionSlot | None]  # None: for a claim that needs no connection
type ClaimsHandler = Callable[[Sequence[Claim]], Slots]


class HintBatch(threading.Event):
    """The hints of one task. It is set, and the task ends, when the claim requests with their ids
    were answered, or the ids were dropped. `early`: the rows may be there a little later."""

    def __init__(self, *, early: bool = False) -> None:
        super().__init__()
        self.left = 0
        self._received = time.monotonic()
        self._until = self._received + EARLY_SEARCH if early else 0.0
        self.preconnected = False

    def may_be_early(self, requested: float) -> bool:
        """Whether a claim that was requested then (monotonic) may have come before the rows."""
        return requested < self._until

    def pause(self, now: float) -> float:
        """Seconds until the next claim for an early hint; the last begins when the time ends."""
        growing = (now - self._received) / 2
        return max(EARLY_PAUSE, min(growing, self._until - now))


class HintQueue:
    """The hints of one route that wait for capacity. Fresh mail and retries take turns, so that
    neither is served twice in a row while the other waits."""

    def __init__(self) -> None:
        self._hints: dict[str, deque[HintedId]] = {name: deque() for name in QUEUES}
        self._turns = itertools.cycle(QUEUES)
        self.batches: set[HintBatch] = set()  # the unfinished ones
        self.requested = False  # whether a claim request is under way
        self.moved_at = 0.0  # when a hint last left, or came to the empty queue (monotonic)

    def __len__(self) -> int:
        return sum(map(len, self._hints.values()))

    def add(self, batch: HintBatch, ids: Sequence[str], queue: str) -> None:
        """Append hints of one Celery queue; an unknown name counts as fresh mail."""
        if not self:
            self.moved_at = time.monotonic()
        batch.left += len(ids)
        self.batches.add(batch)
        self._hints.get(queue, self._hints[FRESH]).extend((queue_id, batch) for queue_id in ids)

    def take(self, most: int) -> list[HintedId]:
        """Remove and return at most so many hints."""
        taken: list[HintedId] = []
        while len(taken) < most and len(self):
            if hints := self._hints[next(self._turns)]:
                taken.append(hints.popleft())
        return taken

    def put_back(self, hints: Sequence[HintedId]) -> None:
        """Return hints whose messages were not there, unless they were dropped meanwhile; they come
        first."""
        if not self:
            self.moved_at = time.monotonic()
        kept = [hint for hint in hints if hint[1] in self.batches]
        self._hints[FRESH].extendleft(reversed(kept))

    def use(self, hints: Iterable[HintedId]) -> None:
        """The claim request with these ids was answered."""
        for _, batch in hints:
            batch.left -= 1
            if not batch.left:
                batch.set()
                self.batches.discard(batch)

    def drop(self) -> None:
        """Forget all hints. Their deliveries become overdue, and any worker finds them."""
        for hints in self._hints.values():
            hints.clear()
        for batch in self.batches:
            batch.set()
        self.batches.clear()


class Capacity:
    """How many deliveries may be claimed now, so that no claim waits for a connection.

    A delivery is claimed only with a connection slot that was reserved for its route, so this is
    exact however the routes share servers. A slot whose delivery was not found is released. All
    routes together have WORKER_CONNECTIONS; `busy` counts the deliveries that are reserved or
    claimed and have not ended.

    A route has no capacity for hints while all its servers are down. The poll still claims a batch
    of its mail, without slots, so that each message records why it waits and expires in the end.
    """

    def __init__(
        self, routes: Routes, servers: ServerPool, connections: int, batch_size: int
    ) -> None:
        self._routes = routes
        self._servers = servers
        self._connections = connections
        self._batch_size = batch_size
        self.busy = 0

    @property
    def free(self) -> int:
        """How many more deliveries may be claimed, of all routes together."""
        return self._connections - self.busy

    def reserve(
        self, names: Iterable[str], most: int, *, overdue: bool = False
    ) -> dict[str, Slots]:
        """Reserve slots for at most so many deliveries of these routes in all.

        The free connections are divided equally among the routes that have capacity. Their order is
        random, because the first gets all slots of a shared server. `release_unclaimed` takes the
        result.
        """
        routes = [
            route
            for name in names
            if (route := self._routes.get(name))
            and (self._servers.capacity(route) or (overdue and self._servers.down(route)))
        ]
        random.shuffle(routes)
        left = min(most, self.free)
        reserved: dict[str, Slots] = {}
        for n, route in enumerate(routes):
            share = -(-left // (len(routes) - n))
            if slots := self._slots(route, share):
                reserved[route.name] = slots
                left -= len(slots)
        self.busy += sum(map(len, reserved.values()))
        return reserved

    def release_unclaimed(self, reserved: Mapping[str, Slots], claims: Iterable[Claim]) -> Slots:
        """A claim request was answered: the slots of its claims. The others are released."""
        slots = [reserved[claim.route].pop() for claim in claims]
        for unused in itertools.chain.from_iterable(reserved.values()):
            self.busy -= 1
            if unused is not None:
                unused.release()
        return slots

    def ended(self) -> None:
        """A claim ended."""
        self.busy -= 1

    def closed(self, name: str) -> bool:
        """Whether hints are useless: the route is gone, paused, or all its servers are down."""
        route = self._routes.get(name)
        return route is None or self._servers.paused(route) or self._servers.down(route)

    def _slots(self, route: Route, count: int) -> Slots:
        """At most so many slots of a route that has capacity, or whose servers are all down."""
        if self._servers.down(route):
            return [None] * min(count, self._batch_size)
        slots = (self._servers.take(route, reserve=True) for _ in range(count))
        return list(itertools.takewhile(bool, slots))


class Producer:
    """Makes claim requests. `request` is called with each of them and a function for its claims;
    `call_in` calls a function in so many seconds, and then `produce`."""

    def __init__(
        self,
        settings: WorkerSettings,
        routes: Routes,
        servers: ServerPool,
        request: Callable[[ClaimRequest, ClaimsHandler], None],
        call_in: Callable[[float, Callable[[], None]], None],
    ) -> None:
        self._settings = settings
        self._routes = routes
        self._servers = servers
        self._request = request
        self._call_in = call_in
        self.capacity = Capacity(routes, servers, settings.worker_connections, settings.batch_size)
        self.hints: dict[str, HintQueue] = {}  # by route
        self._hints_first = True
        self._polling = False
        self._poll_at: dict[str, float] = {}  # by route, after a poll that found too little

    def add(self, batch: HintBatch, ids: Sequence[str], queue: str, route: str) -> None:
        """Queue hints. Those of a route that is not known may be for any."""
        for name in [route] if self._routes.get(route) else self._routes.names():
            self.hints.setdefault(name, HintQueue()).add(batch, ids, queue)

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
        waiting = [name for name, hints in self.hints.items() if not hints.requested and hints]
        random.shuffle(waiting)
        used = [
            self._use_hints_of(name, -(-self.capacity.free // (len(waiting) - n)), worker, now)
            for n, name in enumerate(waiting)
        ]
        return any(used)

    def _use_hints_of(self, route: str, connections: int, worker: str, now: float) -> bool:
        hints = self.hints[route]
        if self.capacity.closed(route):
            hints.drop()  # its tasks would not fetch the hints of other routes meanwhile
            return False
        most = min(len(hints), self._settings.batch_size, connections)
        reserved = self.capacity.reserve([route], most)
        if not reserved:
            return False
        taken = hints.take(len(reserved[route]))
        hints.requested = True
        hints.moved_at = now
        early = len(taken) == 1 and taken[0][1].may_be_early(now)
        if early:
            self._preconnect(taken[0][1], reserved[route])
        self._request(
            ClaimRequest(worker, [queue_id for queue_id, _ in taken], _counts(reserved), early),
            partial(self._hints_claimed, hints, taken, reserved, now),
        )
        return True

    def _preconnect(self, batch: HintBatch, slots: Slots) -> None:
        """Have a lone message wait for its claim and its connection at the same time. Without rows
        the connection is closed, so there is only one."""
        (slot,) = slots
        if slot is not None and not batch.preconnected:
            batch.preconnected = True
            self._servers.preconnect(slot, self._settings.connect_timeout)

    def _hints_claimed(
        self,
        hints: HintQueue,
        taken: Sequence[HintedId],
        reserved: Mapping[str, Slots],
        requested: float,
        claims: Sequence[Claim],
    ) -> Slots:
        hints.requested = False
        early = _too_early(taken, claims, requested)
        if early:
            now = time.monotonic()
            pause = min(batch.pause(now) for _, batch in early)
            self._call_in(pause, partial(hints.put_back, early))
        hints.use(hint for hint in taken if hint not in early)
        return self.capacity.release_unclaimed(reserved, claims)

    def _poll(self, worker: str, now: float) -> bool:
        if self._polling:
            return False
        due = [name for name in self._routes.names() if now >= self._poll_at.get(name, 0.0)]
        if not due:
            return False
        reserved = self.capacity.reserve(due, self._settings.worker_connections, overdue=True)
        if not reserved:
            return False
        self._polling = True
        counts = _counts(reserved)
        self._request(ClaimRequest(worker, None, counts), partial(self._polled, counts, reserved))
        return True

    def _polled(
        self, counts: Mapping[str, int], reserved: Mapping[str, Slots], claims: Sequence[Claim]
    ) -> Slots:
        self._polling = False
        found = Counter(claim.route for claim in claims)
        later = time.monotonic() + min(POLL_INTERVAL, self._settings.grace)
        for name, most in counts.items():
            more = found[name] >= most and not self.capacity.closed(name)
            self._poll_at[name] = 0.0 if more else later
        return self.capacity.release_unclaimed(reserved, claims)


def _too_early(
    taken: Sequence[HintedId], claims: Sequence[Claim], requested: float
) -> list[HintedId]:
    """The hints without a claim whose messages may have had no rows yet."""
    claimed = {claim.queue_id for claim in claims}
    return [hint for hint in taken if hint[0] not in claimed and hint[1].may_be_early(requested)]


def _counts(reserved: Mapping[str, Slots]) -> dict[str, int]:
    return {name: len(slots) for name, slots in reserved.items()}
