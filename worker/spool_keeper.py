"""The spool keeper: a thread in every worker that keeps the worker's view of the spool correct.

Every ten seconds it raises the mark of the spool (`relay.spool.mark`), so that a database that was
restored from a backup is noticed although no mail was accepted since. And it closes the segments
that were unlinked: their space comes back only then.
"""

from sqlalchemy import Engine

from relay.spool.mark import SpoolMark
from relay.spool.store import Spool
from worker.periodic import PeriodicThread

INTERVAL = 10.0  # seconds


class SpoolKeeper(PeriodicThread):
    """`engine` is guarded by the mark."""

    def __init__(self, engine: Engine, spool: Spool, mark: SpoolMark) -> None:
        super().__init__("spool keeper", INTERVAL)
        self._engine = engine
        self._spool = spool
        self._mark = mark

    def turn(self) -> None:
        """Close first, because the database may be away."""
        self._spool.segments.close_unlinked()
        self._mark.advance(self._engine)
