"""Remembers which bodies did not verify, because one look proves too little to stop a message.

Memory, a cable or a network file system can give wrong octets once, and a disk may fail to read a
place for a while. So a delivery whose body does not verify, or cannot be read, is deferred for
RECHECK seconds, and held only if the body at the same place is no better then. A rejected DSN that
cannot be read is given up in the same way. Each worker trusts its own look: with many workers a
damaged body may be read a few times more. An object belongs to one thread.
"""

import time

from relay.spool.journal.format import Place

RECHECK = 60.0  # seconds
_FORGET = 3600.0  # seconds


class DamagedBodies:
    """The bodies that did not verify in the last hour."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Place | None, float]] = {}

    def confirmed(self, queue_id: str, place: Place | None) -> bool:
        """Note that a body does not verify at its place (None: in its file); whether it was so at
        least RECHECK seconds ago."""
        now = time.monotonic()
        known = self._seen.get(queue_id)
        if known is not None and known[0] == place:
            return now - known[1] >= RECHECK
        self._seen.pop(queue_id, None)  # so that the order is that of the times
        self._seen[queue_id] = place, now
        self._forget(now)
        return False

    def _forget(self, now: float) -> None:
        """Drop the oldest ones."""
        while self._seen and now - self._seen[oldest := next(iter(self._seen))][1] >= _FORGET:
            del self._seen[oldest]
