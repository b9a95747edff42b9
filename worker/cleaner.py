"""Housekeeping: what nobody needs any more, removed slowly and by one worker at a time.

Every ten minutes whoever gets the lock (an advisory one on PostgreSQL, a file's on SQLite) removes,
in bounded batches, the rows of messages that have been finished for longer than RETENTION and of
workers that ended as long ago. Every few hours it goes through the spool as well
(`relay.spool.orphans`): a body that nobody needs is removed; a file without a row may be all that
is left of a message whose rows were lost, and is therefore only moved to `orphans/`, for RETENTION.

What must stay true: a file is young until it has been there for 36 h (`relay.spool.orphans` says by
which clock), and nothing without a row is touched unless some row is newer than it. In a spool only
what carries a name that we give is removed: its file system may have a `lost+found` there. The body
goes before the rows, so that a crash between the two leaves something to be found again. A message
with a row missing (`relay.spool.retention`) is never finished: it waits for `fsck` and a person.
"""

import fcntl
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, text

from relay.db.engine import reading, writing
from relay.db.sql import dialect_of
from relay.dsn.generator import LIMIT
from relay.ids import dashed
from relay.log import first_line, get_logger
from relay.settings import Settings
from relay.spool.orphans import MIN_ORPHAN_AGE, OrphanScanner
from relay.spool.retention import body_deletable
from relay.spool.store import Spool

log = get_logger(__name__)
EVERY = 600.0
SPOOL_EVERY = 6 * 3600.0
YOUNG = 36 * 3600.0
BATCH = 500
_LOCK = 7_126_280_001

_FINISHED = f"""SELECT @hex(m.id) FROM messages m WHERE m.id < :bound AND m.received_at < @ago(:retention)
    AND {body_deletable("m.id")}
    AND NOT EXISTS (SELECT 1 FROM deliveries d WHERE d.queue_id = m.id AND d.finished_at >= @ago(:retention))
    ORDER BY m.id LIMIT :most"""


class Cleaner:
    """`start`, then `close`; `clean` and `clean_spool` are one turn each."""

    def __init__(self, settings: Settings, engine: Engine, spool: Spool) -> None:
        self._engine, self._spool, self._retention = engine, spool, settings.retention
        self._spell, self._strays = dialect_of(engine), OrphanScanner(engine, spool)
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
            got = bool(
                connection.execute(
                    text("SELECT pg_try_advisory_lock(:key)"), {"key": _LOCK}
                ).scalar()
            )
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
        bound = dashed(
            f"{int((time.time() - self._retention) * 1000) << 80:032x}"
        )  # ids sort by time: an index scan
        given = {"bound": bound, "retention": self._retention, "most": BATCH}
        count = 0
        while not self._closing.is_set():
            with reading(self._engine) as connection:
                ids = [row[0] for row in self._rows(connection, _FINISHED, **given)]
            for queue_id in ids:
                self._spool.remove(queue_id)
            with writing(self._engine) as connection:
                rows = json.dumps([{"queue_id": dashed(i)} for i in ids])
                for table, key in (("attempts", "queue_id"), ("audit_deliveries", "queue_id"), ("recipients", "queue_id"),
                                   ("deliveries", "queue_id"), ("messages", "id")):  # fmt: skip
                    these = "SELECT queue_id FROM @rows(:ids; queue_id uuid)"
                    self._rows(
                        connection, f"DELETE FROM {table} WHERE {key} IN ({these})", ids=rows
                    )
                gone = "SELECT id FROM workers WHERE ended_at IS NOT NULL"
                self._rows(connection, f"DELETE FROM open_circuits WHERE worker IN ({gone})")
                self._rows(
                    connection, "DELETE FROM dsn_limits WHERE last_at < @ago(:age)", age=2 * LIMIT
                )
                self._rows(
                    connection,
                    "DELETE FROM workers WHERE ended_at < @ago(:age)",
                    age=self._retention,
                )
            count += len(ids)
            if len(ids) < BATCH:
                break
        if count:
            log.info("finished messages removed", messages=count)
        return count

    def clean_spool(self) -> tuple[int, int]:
        """Remove bodies that nobody needs, put orphans aside; how many of each."""
        deletable_bodies = orphans = 0
        purged = self._strays.purge(
            self._retention
        )  # before anything is put aside, and never in the same pass
        for stray in self._strays.scan(self._closing):
            if stray.row:
                deletable_bodies += self._strays.remove(stray)
            elif (
                stray.age >= YOUNG
                and stray.newer_row_exists
                and self._strays.move_to_orphans(stray)
            ):
                log.error("a body without a message was put aside", id=stray.name)
                orphans += 1
        settled = self._strays.now() - MIN_ORPHAN_AGE
        for directory in self._spool.directories():
            self._spool.remove_directory(directory, settled)
        if deletable_bodies or orphans or purged:
            log.warning(
                "spool cleaned", deletable_bodies=deletable_bodies, orphans=orphans, purged=purged
            )
        return deletable_bodies, orphans
