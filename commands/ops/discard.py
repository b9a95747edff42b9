"""`qmqp-relay fsck --discard`: removes a damaged segment of the journal that nothing needs.

A segment where messages may have no rows is never sealed, so no worker removes it: it is the only
evidence of them, and a place that cannot be read today may be readable later. An operator ends that
with this command, after the rows of everything else are made and its deliveries are finished.

What must stay true: no body goes that a delivery needs or whose rows are missing; the unlinking is
durable before the row of the segment goes; what is removed is recorded in `audit`.
"""

from typing import NamedTuple

from sqlalchemy import Engine

from commands.errors import DONE, NOTHING_MATCHED, OUT_OF_REACH, CommandError, say
from commands.ops.database import opened
from commands.ops.modify import actor, confirmed
from commands.ops.rebuild import Rebuilder, RebuildReport
from commands.ops.show import mounted_spool
from relay.db.engine import reading, writing
from relay.db.sql import Queries
from relay.ids import dashed
from relay.queue.audit import AuditEntry
from relay.report.queries import QueueReader
from relay.settings import WorkerSettings, load
from relay.spool.journal.directory import ADOPTED, COPY, OWNED, JournalDirectory
from relay.spool.journal.format import SegmentHeader
from relay.spool.journal.scan import first_void
from relay.spool.mark import SpoolMark
from relay.spool.orphans import REMOVAL_GRACE
from relay.spool.store import Spool

SHOWN = 5  # ids of messages


class KeptReason(NamedTuple):
    """Why a segment stays, and what to do."""

    why: str
    remedy: str


class Discarder:
    """Removes one segment; its id are 32 hex digits."""

    def __init__(
        self, settings: WorkerSettings, engine: Engine, spool: Spool, segment: str
    ) -> None:
        kept = max(0.0, settings.retention - REMOVAL_GRACE)
        self._rebuilder = Rebuilder(settings, engine, spool, kept)
        self._engine, self._segment = engine, segment
        self._directory = JournalDirectory(spool.handle)
        self._mark = SpoolMark(self._directory, spool.identity)
        self._queries = Queries(engine, __name__)

    def survey(self) -> RebuildReport | None:
        """What the segment holds, without what has rows; None if there is no such segment."""
        return self._rebuilder.survey_of(self._segment)

    def refusal(self, found: RebuildReport) -> KeptReason | None:
        """Why the segment must stay; None if it may go."""
        if self._rebuilder.older:
            return KeptReason(
                "the database is older than the spool", "run `qmqp-relay fsck --rebuild`"
            )
        if not found.damages:
            return KeptReason("it is not damaged", "workers remove it when no delivery needs it")
        if self._has_owner():
            remedy = "smtpd lets a damaged segment go within ten minutes: try again later"
            return KeptReason("a spooler writes to it, or makes its rows", remedy)
        if found.waiting:
            return KeptReason(f"{found.waiting} messages wait for their rows", "smtpd makes them")
        if found.messages:
            remedy = "`qmqp-relay fsck --rebuild` makes them, held"
            return KeptReason(f"the rows of {found.messages} messages are missing", remedy)
        if ids := self._needed_by():
            remedy = "wait until they are finished, or release, bounce or drop them"
            return KeptReason(f"deliveries need it: {', '.join(ids)}", remedy)
        if self._declares_void():
            remedy = "a worker removes that one first, when no delivery needs it"
            return KeptReason("it declares a batch of another segment void", remedy)
        return None

    def discard(self) -> None:
        """Remove the segment, and its row. Raises OSError and the database's errors."""
        self._mark.cover(self._engine)  # bodies of it may have been moved a moment ago
        for suffix in (OWNED, ADOPTED, COPY):
            if self._segment + suffix in self._directory.names():
                self._directory.unlink(self._segment + suffix)
        self._directory.sync()
        with writing(self._engine) as connection:
            self._queries.run(connection, "delete_segment", segment=dashed(self._segment))
            entry = AuditEntry(
                self._engine, actor(), "fsck", f"segment {self._segment} discarded", "--discard"
            )
            entry.note(connection, 0)

    def _has_owner(self) -> bool:
        """Whether a spooler has the segment under its first name. One that has adopted a segment
        only waits for a disk to recover."""
        if self._segment + OWNED not in self._directory.names():
            return False
        file = self._directory.open(self._segment + OWNED)
        try:
            return file.has_owner()
        finally:
            file.close()

    def _needed_by(self) -> list[str]:
        with reading(self._engine) as connection:
            rows = self._queries.run(
                connection, "needed_by", segment=dashed(self._segment), most=SHOWN
            )
            return [*rows.scalars()]

    def _declares_void(self) -> bool:
        """Whether it declares a batch void whose segment is still there."""
        file = self._directory.open_segment(self._segment)
        if file is None:
            return False
        try:
            void = first_void(file, SegmentHeader(self._segment, "", 0, ""))
        except OSError:  # nobody can read that any more
            return False
        finally:
            file.close()
        other = self._directory.open_segment(void.segment) if void else None
        if other is not None:
            other.close()
        return other is not None


def run(name: str, *, yes: bool) -> int:
    """Look at the segment, ask, and remove it; the exit status. `name` may have a suffix."""
    segment = name.partition(".")[0]
    settings = load(WorkerSettings)
    with opened(settings) as engine:
        spool = mounted_spool(settings, QueueReader(engine))
        if spool is None:
            where = f"the spool of this database is not mounted in {settings.spool_dir}"
            raise CommandError(OUT_OF_REACH, f"{where}: run this command where it is mounted")
        discarder = Discarder(settings, engine, spool, segment)
        found = discarder.survey()
        if found is None:
            say(f"there is no segment {segment}: `qmqp-relay fsck` names the damaged ones")
            return NOTHING_MATCHED
        for damage in found.damages:
            say(damage)
        if refusal := discarder.refusal(found):
            say(f"segment {segment} is kept: {refusal.why}; {refusal.remedy}")
            return NOTHING_MATCHED
        summary = f"remove segment {segment}, and with it messages that may have no rows"
        if not confirmed(summary, yes=yes):
            return NOTHING_MATCHED
        discarder.discard()
    print(f"segment {segment} was removed")
    return DONE
