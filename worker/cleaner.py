"""The cleaner: removes finished messages and bodies that no delivery needs, one worker at a time.

Every ten minutes it removes the rows of messages that have been finished for RETENTION, and
subscriptions that no worker has (`relay.events.subscriptions`). Every six hours it scans the spool
(`relay.spool.orphans`) for deletable bodies and for files without a row. A file without a row is
moved to `orphans/`, because it may belong to a message whose rows were lost.

What must stay true: nothing without a row is touched before it is ORPHAN_MOVE_AGE old and some row
is newer; only files with names that the relay gives are touched; the body is removed before the
rows, so that a crash in between leaves a row to find it by; a message with a missing row waits for
`fsck`.
"""

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Engine

from relay.db.engine import reading, writing
from relay.db.sql import Queries
from relay.dsn.generator import LIMIT
from relay.events.subscriptions import Subscriptions
from relay.ids import dashed
from relay.log import get_logger
from relay.settings import Settings
from relay.spool.orphans import MIN_ORPHAN_AGE, OrphanScanner
from relay.spool.store import Spool
from worker.periodic import PeriodicThread

log = get_logger(__name__)
INTERVAL = 600.0  # seconds
SPOOL_INTERVAL = 6 * 3600.0  # seconds
ORPHAN_MOVE_AGE = 36 * 3600.0  # seconds
BATCH = 500
LOCK_KEY = 7_126_280_001  # of the advisory lock; any number that nothing else uses


@contextmanager
def exclusive(engine: Engine, key: int, name: str) -> Iterator[bool]:
    """Whether this process has a lock that one process of a database can have: an advisory one on
    PostgreSQL, else a file's."""
    if engine.dialect.name != "postgresql":
        with Path(f"{engine.url.database}.{name}").open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
            else:
                yield True
        return
    with engine.connect() as connection:
        connection.detach()  # the session ends here, and with it the lock
        locked = bool(Queries(engine, __name__).run(connection, "lock", key=key).scalar())
        # The session keeps the lock; an open transaction would keep dead rows.
        connection.commit()
        yield locked


class Cleaner(PeriodicThread):
    """`clean` and `clean_spool` are one turn each. The first turn comes early."""

    def __init__(self, settings: Settings, engine: Engine, spool: Spool) -> None:
        super().__init__("cleaner", INTERVAL / 10)
        self._engine = engine
        self._spool = spool
        self._retention = settings.retention
        self._queries = Queries(
            engine, __name__, retention=settings.retention, limits=2 * LIMIT, most=BATCH
        )
        self._orphans = OrphanScanner(engine, spool)
        self._subscriptions = Subscriptions(engine)
        self._spool_at = 0.0

    def turn(self) -> None:
        """Clean what is due, if no other worker does."""
        self.interval = INTERVAL
        with exclusive(self._engine, LOCK_KEY, "cleaner") as locked:
            if locked:
                self.clean()
                for name in self._subscriptions.remove_stale():
                    log.warning("subscription removed", subscription=name)
            if locked and time.monotonic() >= self._spool_at:
                self.clean_spool()
                self._spool_at = time.monotonic() + SPOOL_INTERVAL

    def clean(self) -> int:
        """Remove the rows and bodies of messages that were finished RETENTION ago; how many."""
        bound = dashed(f"{int((time.time() - self._retention) * 1000) << 80:032x}")
        count = 0
        while not self.closing.is_set():
            with reading(self._engine) as connection:
                finished = self._queries.run(connection, "finished_messages", bound=bound)
                ids = finished.scalars().all()
            for queue_id in ids:
                self._spool.remove(queue_id)
            listed = json.dumps([dashed(queue_id) for queue_id in ids])
            with writing(self._engine) as connection:
                self._queries.run(connection, "delete_messages", ids=listed)
                self._queries.run(connection, "delete_ended")
            count += len(ids)
            if len(ids) < BATCH:
                break
        if count:
            log.info("finished messages removed", messages=count)
        return count

    def clean_spool(self) -> tuple[int, int]:
        """Remove bodies that no delivery needs, move orphans to `orphans/`; how many of each."""
        removed = moved = 0
        # First, so that no file is moved and purged in the same pass.
        purged = self._orphans.purge(self._retention)
        for file in self._orphans.scan(self.closing):
            orphan = file.age >= ORPHAN_MOVE_AGE and file.newer_row_exists
            if file.row:
                removed += self._orphans.remove(file)
            elif orphan and self._orphans.move_to_orphans(file):
                log.error("orphan moved", id=file.name)
                moved += 1
        self._spool.remove_empty_directories(self._orphans.now() - MIN_ORPHAN_AGE)
        if removed or moved or purged:
            log.warning("spool cleaned", deletable_bodies=removed, orphans=moved, purged=purged)
        return removed, moved
