"""Bodies, opened and removed off the loop: a disk may be slow, and connections must not wait for
it.

What must stay true: what is to be removed gathers while others are being removed, and the last of
it goes at `close`.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from relay.queue.model import Claim
from relay.spool.store import BodyUnsendable, Spool

type Opened = list[int | Exception]


class BodyIo:
    """The bodies of one worker; belongs to its loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, spool: Spool) -> None:
        self._loop, self._spool = loop, spool
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="bodies")
        self._unneeded: list[str] = []
        self._removing = False

    def open(self, claims: Sequence[Claim]) -> asyncio.Future[Opened]:
        """The bodies of these claims, as file descriptors or errors."""
        return self._loop.run_in_executor(self._threads, self._open, claims)

    def remove(self, queue_id: str) -> None:
        """Remove a body that nobody needs."""
        self._unneeded.append(queue_id)
        if not self._removing:
            self._remove_all()

    def close(self) -> None:
        """Blocks until everything is done; the loop has stopped."""
        self._threads.shutdown()
        for queue_id in self._unneeded:
            self._spool.remove(queue_id)

    def _open(self, claims: Sequence[Claim]) -> Opened:
        handles: Opened = []
        for claim in claims:
            try:
                handles.append(self._spool.open(claim.queue_id, claim.size))
            except (BodyUnsendable, OSError) as error:
                handles.append(error)
        return handles

    def _remove_all(self, _: object = None) -> None:
        ids, self._unneeded = self._unneeded, []
        self._removing = bool(ids)
        if ids:
            removed = self._loop.run_in_executor(
                self._threads, lambda: [self._spool.remove(i) for i in ids]
            )
            removed.add_done_callback(self._remove_all)
