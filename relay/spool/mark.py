"""The mark: a number by which the spool notices a database that was restored from a backup.

`spool.mark` rises by one within a second after rows were made of accepted mail or a worker recorded
an outcome, once for all of that second, and every ten seconds while a worker runs. After the
COMMIT the new value is written to `journal/mark` in the spool, and batches of the journal carry it.
A database whose mark is below that of the spool has lost what was committed since: its queue may
hold mail that was delivered. Connections to it are refused, which the relay takes for an outage:
smtpd accepts mail into the journal, and workers claim nothing, until `qmqp-relay fsck --rebuild`
has held what is in doubt.

What must stay true: the file is written after the COMMIT and never before it, so that a COMMIT that
fails raises no alarm. File and name are synced, because segments are removed by what the database
says. A lost file is made again from the marks of the batches. `advance` is a COMMIT that the
database syncs: what was committed before is durable then.
"""

import threading
from contextlib import suppress
from typing import Any

from sqlalchemy import Engine

from relay.db.engine import OlderDatabase, prepare_connections, reading, writing
from relay.db.sql import Queries
from relay.ids import new_id
from relay.log import get_logger
from relay.spool.journal.contents import highest_mark
from relay.spool.journal.directory import MARK, NEW, JournalDirectory

log = get_logger(__name__)
_SELECT = "SELECT replace(CAST(id AS text), '-', ''), mark FROM spool"


class SpoolMark:
    """The mark of one spool, as one process knows it: of its journal, and its identity."""

    def __init__(self, directory: JournalDirectory, identity: str) -> None:
        self._directory = directory
        self._identity = identity
        self._lock = threading.Lock()
        # A lost file is not made here: the user of a command may be another one than smtpd's.
        self.known = self._read() or highest_mark(directory, identity)

    def guard(self, engine: Engine) -> None:
        """Refuse new connections of this engine to an older database (OlderDatabase)."""
        prepare_connections(engine, self._check)

    def check(self, engine: Engine) -> None:
        """Raise OlderDatabase if the database was overwritten under a connection that lives on, and
        the database's errors."""
        known = max(self.known, self._read())
        with reading(engine) as connection:
            row = connection.exec_driver_sql(_SELECT).fetchone()
        try:
            self._compare(row, known)
        except OlderDatabase:
            engine.dispose()  # new connections are refused by `guard`
            raise

    def advance(self, engine: Engine) -> int:
        """Raise the mark by one; the new value. Raises the database's errors, and OlderDatabase if
        the database was restored under a connection that lives on."""
        known = max(self.known, self._read())
        try:
            with writing(engine) as connection:
                mark = int(Queries(engine, __name__).run(connection, "advance").scalar() or 0)
                if mark <= known and known:
                    # Rolled back: several processes would lift it above what the spool knows.
                    log.critical("database older than the spool", mark=mark - 1, known=known)
                    raise OlderDatabase(
                        "the database is older than the spool: run `fsck --rebuild`"
                    )
        except OlderDatabase:
            engine.dispose()  # new connections are refused by `guard`
            raise
        self.learn(mark)
        return mark

    def cover(self, engine: Engine) -> None:
        """Raise the mark, and make sure that the spool keeps it: from now on a database is noticed
        that lacks what is committed. Raises as `advance`, and OSError if the file cannot be
        written."""
        mark = self.advance(engine)
        with self._lock:
            self._write(mark)
        self._directory.sync()  # another process may have written it, and not synced its name yet

    def learn(self, mark: int) -> None:
        """A mark that the database had; the spool keeps the highest."""
        with self._lock:
            if mark > self.known:
                self.known = mark
                with suppress(OSError):  # a full disk: the next second tries again
                    self._write(mark)

    def learn_from_journal(self, *, unsealed: bool = False) -> None:
        """Write the highest mark of the batches to the file, which may be lost, or an older one
        because the disk was full. Raises OSError if the journal cannot be read."""
        found = highest_mark(self._directory, self._identity, unsealed=unsealed)
        with self._lock:
            self.known = max(self.known, found)
            with suppress(OSError):
                self._write(self.known)

    def _check(self, connection: Any, _record: Any) -> None:
        # Before the query: others may raise it meanwhile, this process or another one.
        known = max(self.known, self._read())
        row = connection.execute(_SELECT).fetchone()
        with suppress(AttributeError):  # sqlite3 has begun no transaction
            connection.commit()
        self._compare(row, known)

    def _compare(self, row: Any, known: int) -> None:
        """Raise OlderDatabase unless this row of `spool` is ours and has a mark that is known."""
        if row is not None and row[0] != self._identity:
            log.critical("database of another spool", spool=self._identity, known=row[0])
            raise OlderDatabase(
                f"the database knows the spool {row[0]}, and this one is {self._identity}:"
                " mount the right one; nothing was touched"
            )
        mark = row[1] if row is not None else 0  # without the row it is a new database
        if mark < known:
            log.critical("database older than the spool", mark=mark, known=known)
            raise OlderDatabase(
                "the database is older than the spool: it is new, or was restored from a backup."
                " Run `qmqp-relay fsck --rebuild`, which holds what may have been delivered since"
            )

    def _read(self) -> int:
        try:
            file = self._directory.open(MARK)
        except FileNotFoundError:  # none yet
            return 0
        try:
            return int(file.read(32, 0))
        except ValueError:  # cut off by a power failure
            return 0
        finally:
            file.close()

    def _write(self, mark: int) -> None:
        """Replace the file, unless it has this mark or a higher one."""
        directory = self._directory
        if self._read() >= mark:
            return
        # Not by the process number: processes of several containers may share it. An adopter
        # removes the file of a process that ended here.
        temporary = new_id() + NEW
        file = directory.create(temporary)
        try:
            file.write([b"%d\n" % mark], 0)
            file.sync()
            directory.rename(temporary, MARK)
        except OSError:
            directory.unlink(temporary)
            raise
        finally:
            file.close()
        directory.sync()
