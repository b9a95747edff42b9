"""Housekeeping: what nobody needs any more, removed slowly and by one worker at a time.

Every ten minutes whoever gets the lock (an advisory one on PostgreSQL, a file's on SQLite) removes, in bounded batches,
the rows of messages that have been finished for longer than RETENTION and of workers that ended as long ago. Every few
hours it goes through the spool as well: a body that no delivery needs is what a crash left between an outcome and its
removal; a file without a row is what a crash left before its COMMIT, or all that is left of a message whose rows were
lost, and therefore only moved to `orphans/`, for RETENTION.

What must stay true: a file is young until it has been there for 36 h, and nothing without a row is touched unless some
row is newer than it: in a database restored from last week every file of this week looks like an orphan. The body goes
before the rows, so that a crash between the two leaves something to be found again.
"""

import fcntl
import itertools
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, text

from relay.bodies import Spool
from relay.database import dialect_of, reading, writing
from relay.ids import dashed
from relay.log import first_line, get_logger
from relay.schema import NEEDS_BODY
from relay.settings import Settings

log = get_logger(__name__)
EVERY = 600.0
SPOOL_EVERY = 6 * 3600.0
YOUNG = 36 * 3600.0
SETTLED = 3600.0  # a body this old is not just being accepted or removed (seconds)
BATCH = 500
_LOCK = 7_126_280_001

_NEEDED = f"EXISTS (SELECT 1 FROM deliveries d WHERE d.message_id = x.message_id AND {NEEDS_BODY})"
_FILES = f"""SELECT @hex(x.message_id), m.id IS NOT NULL, {_NEEDED}
    FROM @rows(:ids; message_id uuid) LEFT JOIN messages m ON m.id = x.message_id"""
_FINISHED = f"""SELECT @hex(m.id) FROM messages m WHERE m.id < :bound AND m.received_at < @ago(:retention)
    AND NOT EXISTS (SELECT 1 FROM deliveries d WHERE d.message_id = m.id
        AND ({NEEDS_BODY} OR d.finished_at >= @ago(:retention)))
    ORDER BY m.id LIMIT :most"""


class Housekeeper:
    """`start`, then `close`; `clean` and `clean_spool` are one turn each."""

    def __init__(self, settings: Settings, engine: Engine, spool: Spool) -> None:
        self._engine, self._spool, self._retention = engine, spool, settings.retention
        self._spell = dialect_of(engine)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="housekeeping", daemon=True)

    def start(self) -> None:
        """Start; the first turn comes after a tenth of the usual time."""
        self._thread.start()

    def close(self) -> None:
        """Stop after the batch at hand."""
        self._closing.set()

    def _run(self) -> None:
        spool_at, pause = 0.0, EVERY / 10
        while not self._closing.wait(pause):
            pause = EVERY
            try:
                with self._alone() as alone:
                    if alone:
                        self.clean()
                    if alone and time.monotonic() >= spool_at:
                        self.clean_spool()
                        spool_at = time.monotonic() + SPOOL_EVERY
            except Exception as error:
                log.warning(
                    "housekeeping put off",
                    reason=first_line(error),
                )

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether no other worker is at it."""
        if not self._spell.postgresql:
            with Path(f"{self._engine.url.database}.housekeeping").open("ab") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    yield False
                else:
                    yield True
            return
        with self._engine.connect() as connection:
            got = bool(connection.execute(text("SELECT pg_try_advisory_lock(:key)"), {"key": _LOCK}).scalar())
            connection.commit()  # the lock is the session's; an open transaction would keep dead rows alive
            try:
                yield got
            finally:
                if got:
                    connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": _LOCK})
                    connection.commit()

    def _rows(self, connection: Connection, sql: str, **given: Any) -> Any:
        return connection.execute(text(self._spell(sql)), given)

    def clean(self) -> int:
        """Remove what has been finished for RETENTION; how many messages that were."""
        bound = dashed(f"{int((time.time() - self._retention) * 1000) << 80:032x}")  # ids sort by time: an index scan
        given = {"bound": bound, "retention": self._retention, "most": BATCH}
        count = 0
        while not self._closing.is_set():
            with reading(self._engine) as connection:
                ids = [row[0] for row in self._rows(connection, _FINISHED, **given)]
            for message_id in ids:
                self._spool.remove(message_id)
            with writing(self._engine) as connection:
                rows = json.dumps([{"message_id": dashed(i)} for i in ids])
                for table, key in (("attempts", "message_id"), ("touched", "message_id"), ("recipients", "message_id"),
                                   ("deliveries", "message_id"), ("messages", "id")):  # fmt: skip
                    these = "SELECT message_id FROM @rows(:ids; message_id uuid)"
                    self._rows(connection, f"DELETE FROM {table} WHERE {key} IN ({these})", ids=rows)
                gone = "SELECT id FROM workers WHERE ended_at IS NOT NULL"
                self._rows(connection, f"DELETE FROM rests WHERE worker IN ({gone})")
                self._rows(connection, "DELETE FROM workers WHERE ended_at < @ago(:age)", age=self._retention)
            count += len(ids)
            if len(ids) < BATCH:
                break
        if count:
            log.info("finished messages removed", messages=count)
        return count

    def clean_spool(self) -> tuple[int, int]:
        """Remove bodies that nobody needs, put orphans aside; how many of each."""
        now = time.time()
        unneeded = orphans = 0
        settled = (
            (name, Path(entry.path), age)
            for name, entry in self._spool.ids()
            if (age := now - entry.stat().st_mtime) >= SETTLED
        )
        for batch in itertools.batched(settled, BATCH):
            if self._closing.is_set():
                break
            found = self._look_up([name for name, _, _ in batch])
            newest = self._newest_age()
            for name, path, age in batch:
                known, needed = found.get(name, (False, False))
                if known and not needed:
                    unneeded += self._spool.remove(name)
                elif not known and age >= YOUNG and newest < age:
                    orphans += self._put_aside(path)
        self._purge(now)
        if unneeded or orphans:
            log.warning("spool cleaned", unneeded=unneeded, orphans=orphans)
        return unneeded, orphans

    def _look_up(self, ids: list[str]) -> dict[str, tuple[bool, bool]]:
        """For each id: is there a message, does a delivery need its body."""
        rows = json.dumps([{"message_id": dashed(i)} for i in ids])
        with reading(self._engine) as connection:
            return {row[0]: (bool(row[1]), bool(row[2])) for row in self._rows(connection, _FILES, ids=rows)}

    def _newest_age(self) -> float:
        """Seconds since the newest message came."""
        with reading(self._engine) as connection:
            newest = "SELECT @since(received_at) FROM messages ORDER BY id DESC LIMIT 1"
            age = self._rows(connection, newest).scalar()
        return float("inf") if age is None else float(age)

    def _put_aside(self, path: Path) -> bool:
        aside = self._spool.directory / "orphans"
        aside.mkdir(mode=0o700, exist_ok=True)
        path.rename(aside / path.name)
        log.error("a body without a message was put aside", id=path.name)
        return True

    def _purge(self, now: float) -> None:
        """Remove orphans that nobody asked for, and directories that have emptied."""
        aside = self._spool.directory / "orphans"
        for orphan in aside.iterdir() if aside.is_dir() else ():
            if now - orphan.stat().st_ctime >= self._retention:
                orphan.unlink(missing_ok=True)
        for directory in self._spool.directory.iterdir():
            if directory.is_dir() and now - directory.stat().st_mtime >= SETTLED:
                try:
                    directory.rmdir()
                except OSError:
                    continue  # it holds bodies
