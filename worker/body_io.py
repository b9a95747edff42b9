"""Gets the bodies of claims, and removes body files.

A body of the journal that lies in the page cache is read by the event loop, which takes less time
than another thread needs to begin. All other bodies of a batch are opened by one call in a thread,
because a slow disk must not stop the loop.

What must stay true: `open` gives every claim a body or an error; files to remove gather while
others are being removed, and `close` removes the rest.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from qmqp.body import Body
from relay.queue.model import Claim
from relay.spool.bodies import Bodies
from relay.spool.store import Spool

MAX_CACHED = 1 << 20
"""Octets of a batch that the loop reads; more would delay the other connections."""

type Opened = list[Body | Exception]


class BodyIo:
    """The bodies of one worker; belongs to its loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, spool: Spool, bodies: Bodies) -> None:
        self._loop = loop
        self._spool = spool
        self._bodies = bodies
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="bodies")
        self._deletable: list[str] = []
        self._removing = False

    def open(self, claims: Sequence[Claim], opened: Callable[[Opened], object]) -> None:
        """Open the body of each claim. `opened` gets them, or the error instead of one: at once if
        no disk need be waited for."""
        cached = self._cached(claims)
        if len(cached) == len(claims):
            opened([*cached.values()])
            return
        opening = self._loop.run_in_executor(self._threads, self._open_all, claims, cached)
        opening.add_done_callback(lambda future: opened(future.result()))

    async def disk_reads(self) -> bool:
        """Whether the disk of the spool can be read."""
        try:
            await self._loop.run_in_executor(self._threads, self._spool.check_disk)
        except OSError:
            return False
        return True

    def remove(self, queue_id: str) -> None:
        """Remove a body file that no delivery needs."""
        self._deletable.append(queue_id)
        if not self._removing:
            self._remove_all()

    def close(self) -> None:
        """Remove what is left. Blocks; the loop has stopped."""
        self._threads.shutdown()
        self._spool_remove(self._deletable)

    def _cached(self, claims: Sequence[Claim]) -> dict[int, bytes]:
        """The bodies that can be had without waiting for the disk, by the index of the claim."""
        cached: dict[int, bytes] = {}
        rest = MAX_CACHED
        for index, claim in enumerate(claims):
            rest -= claim.size
            if rest < 0:
                break
            body = self._bodies.cached(claim.size, claim.place)
            if body is not None:
                cached[index] = body
        return cached

    def _open_all(self, claims: Sequence[Claim], cached: dict[int, bytes]) -> Opened:
        return [
            cached[index] if index in cached else self._open(claim)
            for index, claim in enumerate(claims)
        ]

    def _open(self, claim: Claim) -> Body | Exception:
        try:
            return self._bodies.open(claim.queue_id, claim.size, claim.place)
        except Exception as error:  # the claim must not be forgotten, whatever happened
            return error

    def _spool_remove(self, ids: Sequence[str]) -> None:
        for queue_id in ids:
            self._spool.remove(queue_id)

    def _remove_all(self, _: object = None) -> None:
        ids, self._deletable = self._deletable, []
        self._removing = bool(ids)
        if ids:
            removed = self._loop.run_in_executor(self._threads, self._spool_remove, ids)
            removed.add_done_callback(self._remove_all)
