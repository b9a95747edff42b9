"""Removes and compacts segments of the journal, one worker at a time (`relay.spool.segments`)."""

import time
from collections.abc import Callable

from sqlalchemy import Engine

from relay.log import get_logger
from relay.settings import Settings
from relay.spool.journal.directory import JournalDirectory
from relay.spool.segments import SegmentStore
from relay.spool.store import Spool
from worker.cleaner import exclusive
from worker.periodic import PeriodicThread

log = get_logger(__name__)
INTERVAL = 10.0  # seconds
COPIES_INTERVAL = 3600.0  # seconds between two searches for copies that are not used
LOCK_KEY = 7_126_280_002  # of the advisory lock; any number that nothing else uses


class SegmentCleaner(PeriodicThread):
    """`turn` is one turn."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        spool: Spool,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__("segments", INTERVAL)
        self._engine, self._spool = engine, spool
        self._store = SegmentStore(
            engine, JournalDirectory(spool.handle), spool.identity, settings.retention
        )
        self._clock = clock
        self._search_copies_at = clock()

    def turn(self) -> None:
        """Look at the segments that are due, if no other worker does."""
        with exclusive(self._engine, LOCK_KEY, "segments") as locked:
            if not locked:
                return
            self._spool.checked_handle()
            if (now := self._clock()) >= self._search_copies_at:
                self._store.remove_unused_copies()
                self._search_copies_at = now + COPIES_INTERVAL
            turn = self._store.turn()
        if turn.removed or turn.copied:
            log.info("segments removed", segments=turn.removed, copied=turn.copied)
