"""The quarantine: exclusive sending of deliveries over which workers crashed.

From the second crash on a delivery is sent while the worker sends nothing else, so that a further
crash harms no other delivery. It waits until everything under way has ended, and nothing new is
claimed meanwhile.

The quarantine must not stop other mail for long. After QUARANTINE_TIMEOUT transfers before their
commit point are closed and requeued, and one quarantined delivery is sent beside those that only
wait for a reply. The rest is deferred, and for QUARANTINE_PAUSE nothing enters the quarantine.
Belongs to the engine's loop.
"""

import time
from collections import deque
from collections.abc import Callable, Collection

from relay.log import get_logger
from relay.queue.model import Completion
from worker.delivery import DeliveryTask

log = get_logger(__name__)
MIN_CRASHES = 2
QUARANTINE_TIMEOUT = 30.0  # seconds
QUARANTINE_PAUSE = 300.0  # seconds


class Quarantine:
    """`send` starts a delivery, `complete` ends one that was not sent."""

    def __init__(
        self,
        send: Callable[[DeliveryTask], None],
        complete: Callable[[DeliveryTask, Completion], None],
    ) -> None:
        self._send = send
        self._complete = complete
        self._waiting: deque[DeliveryTask] = deque()
        self._exclusive: DeliveryTask | None = None  # is being sent
        self._deadline = 0.0
        self._next_at = 0.0

    @property
    def waiting(self) -> int:
        """How many deliveries wait."""
        return len(self._waiting)

    def blocks_claims(self, now: float) -> bool:
        """Whether nothing else may be claimed."""
        return bool(self._waiting) or (self._exclusive is not None and now < self._deadline)

    def add(self, task: DeliveryTask) -> None:
        """Let a delivery wait until it can be sent exclusively, or defer it during the pause."""
        now = time.monotonic()
        if now < self._next_at:
            self._complete(task, task.postponed())
            return
        if not self._waiting and self._exclusive is None:
            self._deadline = now + QUARANTINE_TIMEOUT
        self._waiting.append(task)

    def send_next(self) -> None:
        """Send a delivery that waits; the worker is sending nothing."""
        if self._waiting:
            task = self._exclusive = self._waiting.popleft()
            log.warning(
                "exclusive sending", id=task.claim.queue_id, crash_count=task.claim.crash_count
            )
            self._send(task)

    def ended(self, task: DeliveryTask) -> None:
        """A delivery ended."""
        if task is self._exclusive:
            self._exclusive = None

    def extend(self, seconds: float) -> None:
        """The process was stopped for so long: that time does not count."""
        self._deadline += seconds

    def check_timeout(self, now: float, active: Collection[DeliveryTask]) -> None:
        """End the quarantine if it has lasted too long; `active` are all deliveries under way."""
        if not self._waiting or now < self._deadline:
            return
        self._next_at = now + QUARANTINE_PAUSE
        if self._exclusive is None:
            for task in active:
                task.abort()
            self._deadline = now + QUARANTINE_TIMEOUT
            self.send_next()
        self.release(DeliveryTask.postponed)

    def release(self, completion: Callable[[DeliveryTask], Completion]) -> None:
        """Complete all deliveries that wait."""
        while self._waiting:
            task = self._waiting.popleft()
            self._complete(task, completion(task))
