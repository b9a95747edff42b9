"""The lease of this worker: its row in `workers`, renewed every LEASE / 4.

Other workers expire a worker whose lease ran out. What it was sending becomes uncertain, and the
worker registers again under another id.

What must stay true: `may_commit` is true only while the request for the last successful renewal is
younger than LEASE less a quarter, and only for the id of the worker that holds the claim. Belongs
to the engine's loop; `worker`, `registered` and `renewed_at` may be read from other threads.
"""

import asyncio
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable

from relay.ids import new_id
from relay.log import first_line, get_logger
from relay.queue.claim import WorkerQueue
from relay.queue.model import CommandResult, Renewal

log = get_logger(__name__)
MIN_RETRY, MAX_RETRY = 0.1, 2.0  # seconds between attempts to register
NEVER = float("-inf")


class Lease:
    """Run `hold` as a task. `renew` gives the result of a renewal, or the error that it met."""

    def __init__(
        self,
        queue: WorkerQueue,
        duration: float,
        renew: Callable[[Renewal], Awaitable[CommandResult | Exception]],
    ) -> None:
        self._queue = queue
        self._duration = duration
        self._renew = renew
        self.worker = ""  # the id of our row in `workers`; empty before registration
        self.registered = threading.Event()
        self.renewed_at = NEVER  # when the last successful renewal was requested (monotonic)

    def may_commit(self, worker: str) -> bool:
        """Whether a claim of this worker may pass its commit point now."""
        fresh = time.monotonic() - self.renewed_at < self._duration * 0.75
        return fresh and worker == self.worker

    async def hold(self, registered: Callable[[], None], lost: Callable[[], None]) -> None:
        """Register and renew until cancelled. Calls `registered` when there is a new row, `lost`
        when another worker has ended it."""
        while True:
            await self._register()
            registered()
            await self._renew_until_lost()
            log.critical("own lease lost", worker=self.worker)
            self.worker = ""
            self.renewed_at = NEVER
            self.registered.clear()
            lost()

    def retire(self) -> None:
        """End the row of a worker that has recorded everything. Blocks."""
        if self.worker:
            try:
                self._queue.retire(self.worker)
            except Exception as error:
                log.warning("worker not retired", worker=self.worker, reason=first_line(error))

    async def _register(self) -> None:
        worker, pause = new_id(), MIN_RETRY
        while not self.worker:
            asked = time.monotonic()
            try:
                await asyncio.to_thread(
                    self._queue.register, worker, socket.gethostname(), os.getpid()
                )
            except Exception as error:
                log.warning("worker not registered", reason=first_line(error))
                await asyncio.sleep(pause)
                pause = min(MAX_RETRY, pause * 2)
            else:
                self.worker = worker
                self.renewed_at = asked
        self.registered.set()
        log.info("worker registered", worker=worker)

    async def _renew_until_lost(self) -> None:
        asked, renewed = time.monotonic(), True
        while renewed is not False:
            await asyncio.sleep(asked + self._duration / 4 - time.monotonic())
            asked = time.monotonic()
            result = await self._renew(Renewal(self.worker))
            renewed = result is not False
            if result is True:
                self.renewed_at = asked
