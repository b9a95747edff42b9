"""The spool keeper: a thread in every worker that keeps the worker's view of the spool correct.

It raises the mark of the spool (`relay.spool.mark`), so that a database that lacks what this worker
recorded is noticed: within a second after an outcome, and every ten seconds without one. In the
other seconds it reads the mark, because a database may be overwritten under living connections. And
it closes the segments that were unlinked: their space comes back only then.
"""

import time
from collections.abc import Callable

from sqlalchemy import Engine

from relay.log import first_line, get_logger
from relay.spool.mark import SpoolMark
from relay.spool.store import Spool
from worker.periodic import PeriodicThread

log = get_logger(__name__)
INTERVAL = 1.0  # seconds
IDLE_INTERVAL = 10.0  # seconds


class SpoolKeeper(PeriodicThread):
    """`engine` is guarded by the mark. `outcomes`: how many outcomes this worker has recorded."""

    def __init__(
        self, engine: Engine, spool: Spool, mark: SpoolMark, outcomes: Callable[[], int]
    ) -> None:
        super().__init__("spool keeper", INTERVAL)
        self._engine = engine
        self._spool = spool
        self._mark = mark
        self._outcomes = outcomes
        self._covered = 0  # outcomes that a mark follows
        self._idle_at = 0.0

    def turn(self) -> None:
        """Close first, because the database may be away."""
        now = time.monotonic()
        idle = now >= self._idle_at
        if idle:
            self._idle_at = now + IDLE_INTERVAL
            self._spool.segments.close_unlinked()
        try:
            if idle or self._outcomes() > self._covered:
                self._advance()
            else:
                self._mark.check(self._engine)
        except Exception:
            if idle:  # an outage is logged every ten seconds, and tried every second
                raise

    def finish(self) -> None:
        """End after the engine: its last outcomes get a mark too."""
        self.close()
        try:
            if self._outcomes() > self._covered:
                self._advance()
        except Exception as error:
            log.warning("task failed", task=self.name, reason=first_line(error))

    def _advance(self) -> None:
        outcomes = self._outcomes()  # what is recorded meanwhile needs a mark of its own
        self._mark.advance(self._engine)
        self._covered = outcomes
