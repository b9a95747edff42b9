"""Every segment of a journal, one after the other, for commands that read all of them.

It changes nothing, so it may run beside a relay that works. A segment whose header is damaged, or
cannot be read, is read all the same: its name is its id, and checksums contain the id. What must
stay true: a segment that is renamed meanwhile is read, and one that is removed meanwhile is left
out; no fault of one segment keeps the others.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePath

from relay.log import get_logger
from relay.spool.journal.adoption import voided_from
from relay.spool.journal.blockwise import UNREADABLE
from relay.spool.journal.directory import ADOPTED, COPY, OWNED, JournalDirectory, SegmentFile
from relay.spool.journal.format import BLOCK, JournalFormatError, SegmentHeader, VoidedBatch
from relay.spool.journal.scan import Damage, ScannedBatch, batch_headers, read_header, scan

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SegmentContents:
    """A segment that is open. `fault`: what is wrong with its header; empty if nothing is."""

    name: str
    header: SegmentHeader
    file: SegmentFile
    fault: str = ""

    @property
    def id(self) -> str:
        """The segment's id."""
        return self.header.segment

    @property
    def copied(self) -> bool:
        """Whether compaction made it."""
        return PurePath(self.name).suffix == COPY

    def batches(
        self,
        voids: Iterable[VoidedBatch] = (),
        start: int = BLOCK,
        *,
        verify_bodies: bool = True,
    ) -> Iterator[ScannedBatch | Damage]:
        """What `scan` finds, without what is void. Raises OSError."""
        end = voided_from(voids, self.id)
        for one in scan(self.file, self.header, start, verify_bodies=verify_bodies):
            if one.position >= end:
                return
            if not (isinstance(one, ScannedBatch) and one.void is not None):
                yield one


def contents(directory: JournalDirectory) -> Iterator[SegmentContents]:
    """Every segment, oldest first; each is closed when the next is taken. One that cannot be opened
    is logged and left out. Raises OSError if the directory cannot be read."""
    for segment, name in [*directory.segments(OWNED, ADOPTED, COPY)]:
        try:
            file = directory.open_segment(segment)
            if file is None:
                continue
            header, fault = _header(file, segment)
        except OSError as error:
            log.error("segment unreadable", name=name, reason=str(error))
            continue
        try:
            yield SegmentContents(name, header, file, fault)
        finally:
            file.close()


def _header(file: SegmentFile, segment: str) -> tuple[SegmentHeader, str]:
    """The header of the segment of this id, and what is wrong with it."""
    try:
        header = read_header(file)
    except (JournalFormatError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in UNREADABLE:
            raise
        return SegmentHeader(segment, "", 0, ""), getattr(error, "strerror", "") or str(error)
    if header.segment != segment:
        fault = f"it has the header of segment {header.segment}"
        return header._replace(segment=segment), fault
    return header, ""


def highest_mark(directory: JournalDirectory, spool: str, *, unsealed: bool = False) -> int:
    """The highest mark that a batch of a spool carries; 0 without one. `unsealed`: in segments that
    are not sealed, which are few. Raises OSError."""
    marks = [0]
    for segment in contents(directory):
        if segment.header.spool in ("", spool) and not (unsealed and segment.file.sealed()):
            marks += (batch.mark for batch in batch_headers(segment.file, segment.header))
    return max(marks)


def end_of(items: list[ScannedBatch | Damage], start: int = BLOCK) -> int:
    """Where the last whole batch ends; what lies behind it is a torn tail, or is being written."""
    ends = [
        one.position
        if isinstance(one, ScannedBatch) and any(damage.torn for damage in one.damages)
        else one.end
        for one in items
        if isinstance(one, ScannedBatch) or not one.torn
    ]
    return max(ends, default=start)
