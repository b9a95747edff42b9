"""Replay: makes the rows of what a segment holds. The committer and `fsck --adopt` share it.

A chunk is what one transaction commits: messages that arrived within a second of each other. What
must stay true: a batch that was declared void gets no rows; damage is logged and passed over, and
everything that verifies gets its rows; damage behind the last batch of a segment is a torn tail, of
which no client has heard. A message whose body is damaged gets rows that are held. A segment where
envelopes are damaged, or cannot be read, is never sealed, and so never removed.
"""

import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from relay.db.engine import is_outage
from relay.log import first_line, get_logger
from relay.queue.accept import (
    Acceptor,
    EncodedMessage,
    PositionMoved,
    SegmentSpan,
    decode,
    held_rows,
    routes_of,
)
from relay.spool.journal.adoption import AdoptedSegment, voided_batches
from relay.spool.journal.blockwise import UNREADABLE
from relay.spool.journal.contents import contents
from relay.spool.journal.directory import ADOPTED, JournalDirectory, SegmentFile
from relay.spool.journal.format import BLOCK, JournalFormatError, JournalRecord, SegmentHeader
from relay.spool.journal.scan import (
    Damage,
    ScannedBatch,
    first_void,
    read_header,
    scan,
    synced,
)

log = get_logger(__name__)
MAX_ROWS = 512
"""Messages in a transaction."""
MAX_ROWS_OCTETS = 4 << 20
"""Octets of the envelopes of a transaction above which it takes no further batch."""
SAME_TIME = 1.0
"""Seconds: messages of one transaction get one time of arrival."""
MAX_AGE = 86400.0
"""Seconds that mail counts as older than its rows, at most: the clock that stamped it may have been
wrong, and mail that is too old expires at its first failure."""


class UnsyncedRows(NamedTuple):
    """Rows that a crash of the database may lose: where their chunk begins, the number of its
    messages, their size, and when they arrived (monotonic)."""

    start: int
    messages: int
    size: int
    arrived: float


@dataclass(slots=True, eq=False)
class OpenSegment:
    """A segment that this process owns. Its messages have rows up to `committed` and are written up
    to `end`; `count`: those whose bodies stand in it; `retired`: nothing more is written to it;
    `orderly`: what lies behind `end` does not count; nor does anything from `void_from` on.
    `unreadable_until`: it could not be read, and is tried again then (monotonic); `read_again`:
    the blocks for which that was done. `damaged`: messages of it may have no rows, so it is kept;
    `tail`: what of that lies behind `end`; `unsynced`: the last rows, in their order."""

    id: str
    name: str
    file: SegmentFile
    committed: int
    end: int
    ours: bool = True
    opened: bool = False  # it has a row
    retired: bool = False
    orderly: bool = True
    void_from: float = float("inf")
    unreadable_until: float = 0.0
    read_again: set[int] = field(default_factory=set)
    damaged: bool = False
    tail: Damage | None = None
    count: int = 0
    least: str = ""
    greatest: str = ""
    pending: int = 0
    pending_octets: int = 0
    unsynced: list[UnsyncedRows] = field(default_factory=list)

    def add(self, ids: Sequence[str], bodies: int, size: int, *, pending: bool = True) -> None:
        """Count messages. `bodies` of them stand in the segment; the others have files. `size`:
        octets of all envelopes and bodies; `pending`: they have no rows yet."""
        self.count += bodies
        if pending:
            self.pending += len(ids)
            self.pending_octets += size
        self.least = min(self.least or ids[0], *ids)
        self.greatest = max(self.greatest, *ids)


@dataclass(slots=True)
class Chunk:
    """What one transaction commits. `arrived`: when the first of it did (monotonic); `damages`:
    parts of the segment that did not verify; `hinted`: the hints for all of it are published."""

    segment: OpenSegment
    start: int
    end: int
    messages: list[EncodedMessage]
    hints: list[tuple[str, tuple[str, ...]]]
    size: int
    arrived: float
    damages: list[Damage] = field(default_factory=list)
    hinted: bool = False

    def add(self, record: JournalRecord, held: str = "") -> None:
        """Add a message. `held`: why its delivery waits for an operator."""
        rows = held_rows(record.envelope, held) if held else record.envelope
        self.messages.append(EncodedMessage(rows, record.position if record.in_journal else None))
        if not held:
            self.hints.append((record.queue_id, routes_of(record.envelope)))
        self.size += _octets(record)

    @property
    def unreadable(self) -> bool:
        """Whether the disk could not read some of it."""
        return any(damage.unreadable for damage in self.damages)

    @property
    def announced(self) -> str | None:
        """The id of a message that comes alone and whose hint is published."""
        return self.hints[0][0] if self.hinted and len(self.hints) == 1 else None

    @property
    def age(self) -> float:
        """How long ago it arrived, in seconds."""
        return min(MAX_AGE, max(0.0, time.monotonic() - self.arrived))


def to_replay(acceptor: Acceptor, adopted: AdoptedSegment, void_from: float) -> OpenSegment | None:
    """An adopted segment, with what of it has no rows; None if it is sealed. Raises OSError and
    the database's errors."""
    header, file = adopted.header, adopted.file
    position, sealed = acceptor.position(header.segment)
    if sealed:
        return None
    segment = OpenSegment(
        header.segment,
        header.segment + ADOPTED,
        file,
        position or BLOCK,
        position or BLOCK,
        ours=False,
        opened=position is not None,
        retired=True,
        void_from=void_from,
    )
    tail: ScannedBatch | Damage | None = None
    for item in scan(file, header, verify_bodies=False):
        if isinstance(item, ScannedBatch) and item.void is None:
            if item.position < void_from and item.records:
                size = sum(map(_octets, item.records))
                pending = item.position >= segment.committed
                ids, bodies = [r.queue_id for r in item.records], _bodies(item.records)
                segment.add(ids, bodies, size, pending=pending)
            segment.end = max(segment.end, item.end)
        if item.position < void_from:
            segment.damaged |= _hides_messages(item)
        tail = item
    if isinstance(tail, Damage) and tail.unreadable:  # it may be readable later, so `end` stays
        segment.tail = tail
    return segment


def _hides_messages(item: ScannedBatch | Damage) -> bool:
    damages = [item] if isinstance(item, Damage) else item.damages
    return any(damage.hides_messages for damage in damages)


class Backlog(NamedTuple):
    """What waits in segments without an owner: messages, octets of envelopes and bodies, and how
    many seconds ago the first of it was written."""

    messages: int = 0
    octets: int = 0
    seconds: float = 0.0


def backlog(directory: JournalDirectory, *, local: bool) -> Backlog:
    """Counted without the database: every message of each segment that is not marked as sealed, and
    that `adopt` would take. The segment that was in use last counts as a whole. Raises OSError."""
    messages = octets = 0
    oldest, voids = time.time(), voided_batches(directory)
    for segment in contents(directory):
        foreign = not local and segment.header.host != socket.gethostname()
        if segment.copied or segment.file.sealed() or foreign or segment.file.has_owner():
            continue
        for batch in segment.batches(voids, verify_bodies=False):
            if isinstance(batch, ScannedBatch) and batch.records:
                messages += len(batch.records)
                octets += sum(map(_octets, batch.records))
                oldest = min(oldest, batch.header.written_at / 1e6)
    return Backlog(messages, octets, min(MAX_AGE, time.time() - oldest))


def read_chunk(segment: OpenSegment, end: int) -> Chunk:
    """Reads from the file what is committed next, up to `end`: messages that arrived within a
    second of each other."""
    chunk = Chunk(segment, segment.committed, end, [], [], 0, time.monotonic())
    header, fault = _header(segment)
    written_at, octets = None, 0
    for item in scan(segment.file, header, segment.committed, end):
        if segment.ours:
            item = synced(item)
        if isinstance(item, Damage):
            chunk.damages.append(item)
            continue
        without_bodies = item.without_bodies
        records = [*item.records, *(record for record, _ in without_bodies)]
        size = sum(len(record.envelope) for record in records)
        if chunk.messages and written_at is not None:
            apart = abs(item.header.written_at - written_at) > SAME_TIME * 1e6
            many = len(chunk.messages) + len(records) > MAX_ROWS
            if apart or many or octets + size > MAX_ROWS_OCTETS:
                chunk.end = item.position
                break
        octets += size
        chunk.damages += item.damages
        if segment.void_from <= item.position:
            continue
        written_at = written_at or item.header.written_at
        for record in item.records:
            chunk.add(record)
        for record, reason in without_bodies:
            chunk.add(record, f"held by smtpd: {reason}")
    if fault is not None and not chunk.messages:
        raise fault  # of the whole disk, it seems
    if written_at is not None:
        chunk.arrived -= max(0.0, time.time() - written_at / 1e6)
    return chunk


def _header(segment: OpenSegment) -> tuple[SegmentHeader, OSError | None]:
    """The header of a segment, and the error if the disk cannot read it. The id is enough to read
    the rest."""
    try:
        return read_header(segment.file), None
    except JournalFormatError:
        fault = None
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
        fault = error
    return SegmentHeader(segment.id, "", 0, ""), fault


def _octets(record: JournalRecord) -> int:
    """The size of a message's envelope and of its body, wherever that stands."""
    body = len(memoryview(record.body)) if record.in_journal else decode(record.envelope).size
    return len(record.envelope) + body


def _bodies(records: Sequence[JournalRecord]) -> int:
    """How many bodies stand in these records."""
    return sum(record.in_journal for record in records)


def commit_chunk(acceptor: Acceptor, directory: JournalDirectory, chunk: Chunk) -> None:
    """Makes the rows of a chunk. A message that the database refuses gets rows that are held.
    Raises PositionMoved, and the database's errors if it is away."""
    segment = chunk.segment
    span = SegmentSpan(segment.id, chunk.start, chunk.end)
    _open_row(acceptor, directory, segment, chunk.start)
    try:
        acceptor.commit(chunk.messages, span, age=chunk.age, announced=chunk.announced)
    except PositionMoved:
        raise
    except Exception as error:
        if is_outage(error):
            raise
        log.error("batch refused by the database", reason=first_line(error))
        acceptor.commit_each(chunk.messages, span, age=chunk.age)
    segment.damaged |= any(damage.hides_messages for damage in chunk.damages)
    for damage in chunk.damages:
        log_damage(segment.id, damage)


def _open_row(
    acceptor: Acceptor, directory: JournalDirectory, segment: OpenSegment, start: int
) -> None:
    """Inserts the row of a segment that has none. Raises PositionMoved if another process took the
    segment: it may have removed segment and row, and its messages would come twice."""
    if not segment.opened:
        acceptor.open_segment(segment.id, start)
        if not directory.leads_to(segment.name, segment.file):
            if segment.file.unlinked():  # no process needs the row any more
                acceptor.close_segment(segment.id, start)
            raise PositionMoved(f"segment {segment.id} was adopted")
        segment.opened = True


def seal(acceptor: Acceptor, directory: JournalDirectory, segment: OpenSegment) -> None:
    """Seals a segment that is committed to its end, unless it is damaged. Raises PositionMoved if
    the database has another position, OSError and the database's errors."""
    unused = not segment.opened and not segment.least and _declares_nothing(segment)
    if segment.damaged:
        log.error("segment kept", segment=segment.id, reason="messages of it may have no rows")
        return
    if unused:
        with suppress(FileNotFoundError):  # another process adopted it
            directory.unlink(segment.name)  # nothing was ever written to it
        directory.sync()
        return
    if not segment.opened:
        try:
            _open_row(acceptor, directory, segment, segment.end)
        except PositionMoved:
            return
    try:
        acceptor.seal_segment(
            segment.id, segment.end, segment.count, segment.least, segment.greatest
        )
    except PositionMoved:
        if not segment.file.unlinked():  # else an earlier try has sealed it, and it was removed
            raise
    with suppress(OSError):
        segment.file.protect()


def _declares_nothing(segment: OpenSegment) -> bool:
    """Whether a segment declares no batch void. One whose first batch the disk cannot read is
    damaged."""
    try:
        return first_void(segment.file, SegmentHeader(segment.id, "", 0, "")) is None
    except OSError:
        segment.damaged = True
        return False


def replay(acceptor: Acceptor, directory: JournalDirectory, segment: OpenSegment) -> int:
    """Makes all rows that an adopted segment lacks, and seals it; the number of messages. Raises
    PositionMoved, OSError and the database's errors."""
    messages = 0
    while segment.committed < segment.end:
        chunk = read_chunk(segment, segment.end)
        commit_chunk(acceptor, directory, chunk)
        segment.committed = chunk.end
        messages += len(chunk.messages)
    seal(acceptor, directory, segment)
    return messages


def log_damage(segment: str, damage: Damage) -> None:
    """A torn tail is no loss: it was never confirmed to a client."""
    fields = {"segment": segment, "position": damage.position, "reason": damage.reason}
    if damage.torn:
        log.warning("segment ends in a torn batch", **fields)
    else:
        log.critical("segment damaged", octets=damage.end - damage.position, **fields)
