"""Files of the spool that stand there for nobody: bodies that no delivery needs, and files without
a message.

Housekeeping and `fsck` go through the spool with the same eyes. A crash between an outcome and the
removal of its body leaves the one; a crash before the COMMIT that would have made a message leaves
the other, or the loss of its rows does.

What must stay true: each file is looked at again before it is touched; one without a row is never
removed but moved to `orphans/`, and `newer_row_exists` says whether some message is newer than it:
in a database restored from last week every file of this week looks like an orphan.

Ages are counted by two clocks, and the smaller age counts. The database's alone would make a file
old that a machine stamped whose clock is behind; the file system's alone one that was stamped
before that clock was set forward. This process' own clock does not matter: it may be that of a
machine which wrote none of the files.
"""

import itertools
import json
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine

from relay.db.engine import reading
from relay.db.sql import Statements
from relay.ids import dashed
from relay.spool.retention import body_deletable
from relay.spool.store import Spool

SETTLED = 3600.0  # a body this old is not just being accepted (seconds)
LATE = 900.0  # who ended a delivery has removed its body by then (seconds)
BATCH = 500

_FILES = f"""SELECT @hex(x.queue_id), EXISTS (SELECT 1 FROM messages m WHERE m.id = x.queue_id)
        OR EXISTS (SELECT 1 FROM deliveries d WHERE d.queue_id = x.queue_id)
        OR EXISTS (SELECT 1 FROM recipients r WHERE r.queue_id = x.queue_id),
    {body_deletable("x.queue_id")} AND NOT EXISTS (
        SELECT 1 FROM deliveries d WHERE d.queue_id = x.queue_id AND d.finished_at > @ago(:late))
    FROM @rows(:ids; queue_id uuid)"""


@dataclass(frozen=True, slots=True)
class OrphanFile:
    """A file that nobody needs, written `age` seconds ago; `row`: something of its message is in
    the database."""

    name: str
    path: Path
    age: float
    row: bool
    newer_row_exists: bool


class OrphanScanner:
    """`found` looks; `remove` and `move_to_orphans` look again, and answer whether it was still so
    and is done."""

    def __init__(self, engine: Engine, spool: Spool) -> None:
        self._engine, self._spool, self._sql = engine, spool, Statements(engine, late=LATE)

    def found(self, stopping: threading.Event | None = None) -> Iterator[OrphanFile]:
        """Go through the spool, a batch of files a statement."""
        now = self.now()
        settled = (
            (name, age)
            for name, found in self._spool.ids()
            if (age := now - found.st_mtime) >= SETTLED
        )
        for batch in itertools.batched(settled, BATCH):
            if stopping is not None and stopping.is_set():
                return
            known, newest = self._known(name for name, _ in batch), self._newest_age()
            for name, age in batch:
                row, free = known[name]
                if (free or not row) and (path := self._spool.path(name)).exists():
                    yield OrphanFile(name, path, age, row, newest < age)

    def remove(self, stray: OrphanFile) -> bool:
        """Remove a body that nobody needs."""
        return self._known([stray.name])[stray.name][1] and self._spool.remove(stray.name)

    def move_to_orphans(self, stray: OrphanFile) -> bool:
        """Move a file without a message to `orphans/`."""
        if self._known([stray.name])[stray.name][0]:
            return False
        self._spool.move_to_orphans(stray.name)
        return True

    def purge(self, wait: float) -> int:
        """Remove what was put aside `wait` seconds ago and is needed by no message; how many files
        that were.

        What a pass puts aside is purged by a later one at the earliest: the move, not the file's
        age, begins the wait.
        """
        now, count = self.now(), 0
        old = (name for name, found in self._spool.orphans() if now - found.st_ctime >= wait)
        for batch in itertools.batched([*old], BATCH):
            known = self._known(batch)
            count += sum(
                self._spool.remove_orphan(name)
                for name, (row, free) in known.items()
                if free or not row
            )
        return count

    def now(self) -> float:
        """The earlier of the file system's time and the database's (seconds since 1970)."""
        with reading(self._engine) as connection:
            micros = int(self._sql.run(connection, "SELECT @micros(@now)").scalar())
        return min(self._spool.clock(), micros / 1e6)

    def _known(self, names: Iterable[str]) -> dict[str, tuple[bool, bool]]:
        """For each id: is there a row of its message, and is its body free."""
        rows = json.dumps([{"queue_id": dashed(name)} for name in names])
        with reading(self._engine) as connection:
            return {
                row[0]: (bool(row[1]), bool(row[2]))
                for row in self._sql.run(connection, _FILES, ids=rows)
            }

    def _newest_age(self) -> float:
        """Seconds since the newest message came."""
        with reading(self._engine) as connection:
            newest = "SELECT @since(received_at) FROM messages ORDER BY id DESC LIMIT 1"
            age = self._sql.run(connection, newest).scalar()
        return float("inf") if age is None else float(age)
