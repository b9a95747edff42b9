"""Files of the spool that no delivery needs, and files without a message.

A crash between an outcome and the removal of its body leaves the first kind. A crash before the
COMMIT that inserts a message, or the loss of its rows, leaves the second. The cleaner and `fsck`
use one scanner for both. Two clocks measure an age, the database's and the file system's, and the
smaller age counts, because either clock may be wrong. The clock of this process is not used.

What must stay true: each file is checked again before it is touched; a file without a row is never
removed but moved to `orphans/`. `newer_row_exists` is False in a database that was restored from a
backup, in which every newer file looks like an orphan.
"""

import itertools
import json
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import Engine

from relay.db.engine import reading
from relay.db.sql import Queries
from relay.ids import dashed
from relay.spool.store import Spool

MIN_ORPHAN_AGE = 3600.0  # a younger file may belong to a message that is being accepted (seconds)
REMOVAL_GRACE = 900.0  # a worker that finished a delivery has removed its body by then (seconds)
BATCH = 500


class FileState(NamedTuple):
    """Whether the database has a row of a file's message, and whether the body may be deleted."""

    row: bool
    deletable: bool


@dataclass(frozen=True, slots=True)
class OrphanFile:
    """A file that no delivery needs, written `age` seconds ago.

    `row`: the database has a row of its message; `newer_row_exists`: it has a message that is newer
    than the file.
    """

    name: str
    path: Path
    age: float
    row: bool
    newer_row_exists: bool


class OrphanScanner:
    """Finds orphans, and removes or moves them after another check."""

    def __init__(self, engine: Engine, spool: Spool) -> None:
        self._engine = engine
        self._spool = spool
        self._queries = Queries(engine, __name__, grace=REMOVAL_GRACE)

    def scan(self, stopping: threading.Event | None = None) -> Iterator[OrphanFile]:
        """Every orphan of the spool; a statement for each BATCH of files."""
        now = self.now()
        files = ((name, now - status.st_mtime) for name, status in self._spool.ids())
        old = ((name, age) for name, age in files if age >= MIN_ORPHAN_AGE)
        for batch in itertools.batched(old, BATCH):
            if stopping is not None and stopping.is_set():
                return
            states = self._states(name for name, _ in batch)
            newest = self._seconds("newest_age")  # infinite without messages
            for name, age in batch:
                row, deletable = states[name]
                path = self._spool.path(name)
                if (deletable or not row) and path.exists():
                    yield OrphanFile(name, path, age, row, newest < age)

    def remove(self, orphan: OrphanFile) -> bool:
        """Remove a body that no delivery needs; False if one needs it now, or the body is gone."""
        deletable = self._states([orphan.name])[orphan.name].deletable
        return deletable and self._spool.remove(orphan.name)

    def move_to_orphans(self, orphan: OrphanFile) -> bool:
        """Move a file without a message to `orphans/`; False if it has a message now."""
        if self._states([orphan.name])[orphan.name].row:
            return False
        self._spool.move_to_orphans(orphan.name)
        return True

    def purge(self, wait: float) -> int:
        """Remove files that were moved to `orphans/` at least `wait` seconds ago and that no
        message needs; the number of files."""
        now = self.now()
        # ctime is the time of the move; the age of the file does not matter.
        old = [name for name, status in self._spool.orphans() if now - status.st_ctime >= wait]
        return sum(
            self._spool.remove(name)
            for batch in itertools.batched(old, BATCH)
            for name, (row, deletable) in self._states(batch).items()
            if deletable or not row
        )

    def now(self) -> float:
        """The earlier of the file system's time and the database's (seconds since 1970)."""
        return min(self._spool.clock(), self._seconds("clock"))

    def _states(self, names: Iterable[str]) -> dict[str, FileState]:
        """The state of each file, by id."""
        ids = json.dumps([dashed(name) for name in names])
        with reading(self._engine) as connection:
            rows = self._queries.run(connection, "file_states", ids=ids)
            return {name: FileState(bool(row), bool(free)) for name, row, free in rows}

    def _seconds(self, name: str) -> float:
        with reading(self._engine) as connection:
            value = self._queries.run(connection, name).scalar()
        return float("inf") if value is None else float(value)
