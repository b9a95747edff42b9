"""Opens and removes bodies in threads, because a slow disk must not stop the event loop.

What must stay true: bodies to remove gather while others are being removed, and `close` removes the
rest.
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
        self._loop = loop
        self._spool = spool
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="bodies")
        self._deletable: list[str] = []
        self._removing = False

    def open(self, claims: Sequence[Claim]) -> asyncio.Future[Opened]:
        """The body of each claim, as a file descriptor or the error of opening it."""
        return self._loop.run_in_executor(
            self._threads, lambda: [self._open(claim) for claim in claims]
        )

    def remove(self, queue_id: str) -> None:
        """Remove a body that no delivery needs."""
        self._deletable.append(queue_id)
        if not self._removing:
            self._remove_all()

    def close(self) -> None:
        """Remove what is left. Blocks; the loop has stopped."""
        self._threads.shutdown()
        self._spool_remove(self._deletable)

    def _open(self, claim: Claim) -> int | Exception:
        try:
            return self._spool.open(claim.queue_id, claim.size)
        except (BodyUnsendable, OSError) as error:
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
