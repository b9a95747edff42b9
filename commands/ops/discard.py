"""`qmqp-relay fsck --discard`: removes a damaged segment of the journal that nothing needs.

A segment where messages may have no rows is never sealed, so no worker removes it: it is the only
evidence of them, and a place that cannot be read today may be readable later. An operator ends that
with this command, after the rows of everything else are made and its deliveries are finished.

What must stay true: no body goes that a delivery needs or whose rows are missing, also if they were
made while the operator was asked; the unlinking is durable before the row of the segment goes; what
is removed is recorded in `audit`.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from sqlalchemy import Engine

from commands.errors import DONE, NOTHING_MATCHED, say
from commands.ops.database import opened
from commands.ops.modify import actor, confirmed
from commands.ops.rebuild import Rebuilder, RebuildReport
from commands.ops.show import required_spool
from relay.db.engine import reading, writing
from relay.db.sql import Queries
from relay.ids import dashed
from relay.queue.audit import AuditEntry
from relay.settings import WorkerSettings, load
from relay.spool.journal.blockwise import UNREADABLE
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

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Whether no smtpd has the segment. Then none can adopt it meanwhile."""
        file = self._directory.open_segment(self._segment)
        if file is None:
            yield True
            return
        try:
            yield file.share()
        finally:
            file.close()

    def refusal(self, found: RebuildReport, *, locked: bool) -> KeptReason | None:
        """Why the segment must stay; None if it may go. `locked`: no smtpd has it."""
        if self._rebuilder.older:
            return KeptReason(
                "the database is older than the spool", "run `qmqp-relay fsck --rebuild`"
            )
        if not found.damages:
            return KeptReason("it is not damaged", "workers remove it when no delivery needs it")
        if not locked:
            remedy = "try again when it is sealed or kept, or when smtpd has ended"
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
            with suppress(FileNotFoundError):
                self._directory.unlink(self._segment + suffix)
        self._directory.sync()
        with writing(self._engine) as connection:
            self._queries.run(connection, "delete_segment", segment=dashed(self._segment))
            entry = AuditEntry(
                self._engine, actor(), "fsck", f"segment {self._segment} discarded", "--discard"
            )
            entry.note(connection, 0)

    def _needed_by(self) -> list[str]:
        with reading(self._engine) as connection:
            rows = self._queries.run(
                connection, "needed_by", segment=dashed(self._segment), most=SHOWN
            )
            return [*rows.scalars()]

    def _declares_void(self) -> bool:
        """Whether it declares a batch void whose segment is still there. A place that the disk
        cannot read declares nothing to any reader."""
        file = self._directory.open_segment(self._segment)
        if file is None:
            return False
        try:
            void = first_void(file, SegmentHeader(self._segment, "", 0, ""))
        except OSError as error:
            if error.errno not in UNREADABLE:
                raise
            return False
        finally:
            file.close()
        return void is not None and not self._directory.is_gone(void.segment)


def run(name: str, *, yes: bool) -> int:
    """Look at the segment, ask, look again, and remove it; the exit status. `name` may have a
    suffix."""
    segment = name.partition(".")[0]
    settings = load(WorkerSettings)
    with opened(settings) as engine:
        spool = required_spool(settings, engine)
        discarder = Discarder(settings, engine, spool, segment)
        with discarder.locked() as locked:
            if not _may_go(discarder, segment, locked=locked):
                return NOTHING_MATCHED
        summary = f"remove segment {segment}, and with it messages that may have no rows"
        if not confirmed(summary, yes=yes):
            return NOTHING_MATCHED
        with discarder.locked() as locked:
            # While the operator read, smtpd or another command may have made rows that need it.
            if not _may_go(discarder, segment, locked=locked, shown=True):
                return NOTHING_MATCHED
            discarder.discard()
    print(f"segment {segment} was removed")
    return DONE


def _may_go(discarder: Discarder, segment: str, *, locked: bool, shown: bool = False) -> bool:
    """Whether the segment may be removed; says what is damaged, unless that is `shown`, and why it
    must stay."""
    found = discarder.survey()
    if found is None:
        say(f"this spool has no segment {segment}: `qmqp-relay fsck` names the damaged ones")
        return False
    for damage in () if shown else found.damages:
        say(damage)
    refusal = discarder.refusal(found, locked=locked)
    if refusal:
        say(f"segment {segment} is kept: {refusal.why}; {refusal.remedy}")
    return refusal is None
