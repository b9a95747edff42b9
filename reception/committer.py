"""The committer: a thread of the spooler that makes the rows of what the journal holds.

Each segment has a position up to which its messages have rows. The thread takes what lies behind
it: from memory while the database keeps up, else from the segment, so an outage of any length costs
no memory. It does the same for segments whose spooler has ended (`relay.spool.journal.adoption`),
in turns with its own. A segment that is committed to its end is sealed.

What must stay true: rows and position are one COMMIT (`relay.queue.accept`), so nothing comes twice
and nothing is passed over; a batch that was declared void never gets rows; a message that the
database refuses gets rows that are held, because its client has heard 250.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from sqlalchemy import Engine

from reception.spooler_protocol import Lag
from relay.db.engine import is_outage
from relay.log import first_line, get_logger
from relay.queue.accept import (
    Acceptor,
    EncodedMessage,
    PositionMoved,
    SegmentSpan,
    routes_of,
)
from relay.spool.journal.adoption import AdoptedSegment, adopt, voided_batches, voided_from
from relay.spool.journal.directory import ADOPTED, OWNED, JournalDirectory, SegmentFile
from relay.spool.journal.format import BLOCK
from relay.spool.journal.scan import Damage, ScannedBatch, first_void, read_header, scan
from relay.spool.journal.writer import JournalWriter
from relay.spool.mark import SpoolMark

log = get_logger(__name__)
MAX_ROWS = 512
"""Messages in a transaction."""
MAX_HELD = 4096
"""Messages in memory that wait for their rows. The others are read back from the journal."""
ADOPT_INTERVAL = 60.0  # seconds
MARK_INTERVAL = 1.0  # seconds
_SAME_TIME = 1_000_000
"""Microseconds: messages of one transaction get one time of arrival."""
_RECENT = 3600.0
_PAUSE = 0.1
_LONGEST_PAUSE = 2.0

type Ids = dict[str, list[str]]
type Committed = Callable[[Sequence["WrittenBatch"], Ids, int, float], object]


@dataclass(slots=True, eq=False)
class WrittenBatch:
    """A batch that is synced. `hints`: each message's id and routes; `size`: octets of the bodies;
    `numbers`: the requests, which get their result when `replied` becomes true."""

    segment: str
    start: int
    end: int
    messages: list[EncodedMessage]
    hints: list[tuple[str, tuple[str, ...]]]
    size: int
    numbers: list[int] = field(default_factory=list)
    written: float = field(default_factory=time.monotonic)


@dataclass(slots=True, eq=False)
class OpenSegment:
    """A segment that this process owns. Its messages have rows up to `committed` and are written up
    to `end`; `retired`: nothing more is written to it; `orderly`: what lies behind `end` does not
    count; nor does anything from `void_from` on."""

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
    count: int = 0
    least: str = ""
    greatest: str = ""
    pending: int = 0
    pending_octets: int = 0

    def add(self, ids: Sequence[str], size: int, *, pending: bool = True) -> None:
        """Count messages whose bodies have `size` octets; `pending`: they have no rows yet."""
        self.count += len(ids)
        if pending:
            self.pending += len(ids)
            self.pending_octets += size
        self.least = min(self.least or ids[0], *ids)
        self.greatest = max(self.greatest, *ids)


@dataclass(slots=True)
class _Chunk:
    """What one transaction commits."""

    segment: OpenSegment
    start: int
    end: int
    messages: list[EncodedMessage]
    hints: list[tuple[str, tuple[str, ...]]]
    size: int
    age: float


class JournalCommitter:
    """`put`, `retire`, `overdue` and `lag` belong to the main thread of the spooler."""

    def __init__(
        self,
        acceptor: Acceptor,
        engine: Engine,
        directory: JournalDirectory,
        mark: SpoolMark,
        writer: JournalWriter,
        spool: str,
        *,
        local: bool = True,
    ) -> None:
        self._spool = spool
        self._acceptor, self._engine, self._mark = acceptor, engine, mark
        self._directory, self._writer, self._local = directory, writer, local
        self._changed = threading.Condition()
        self._segments: dict[str, OpenSegment] = {}
        self._chunk: _Chunk | None = None  # what is being committed
        self._others_turn = False
        self._held: deque[WrittenBatch] = deque()
        self._held_messages = 0
        self._unreplied: deque[WrittenBatch] = deque()
        self._behind = False  # a reply waited in vain; no reply waits until all rows are made
        self._oldest = time.monotonic()  # about when the oldest message without a row arrived
        self._closing = False
        self._give_up_at = float("inf")
        self._adopt_at = 0.0
        self._mark_at = 0.0
        self._thread: threading.Thread | None = None

    def start(self, committed: Committed) -> None:
        """Starts the thread. `committed` gets the batches that still need a reply, the ids whose
        rows were made by route, their number, and the seconds that it took."""
        self._committed = committed
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)
        self._thread.start()

    @property
    def replies_wait(self) -> bool:
        """Whether some reply waits for rows."""
        return bool(self._unreplied)

    def lag(self) -> Lag:
        """What has no rows yet."""
        with self._changed:
            messages = sum(segment.pending for segment in self._segments.values())
            octets = sum(segment.pending_octets for segment in self._segments.values())
            return Lag(messages, octets, time.monotonic() - self._oldest if messages else 0.0)

    def put(self, batch: WrittenBatch, *, wait: bool) -> bool:
        """Takes a batch that was written. `wait`: whether its reply shall wait for the rows; False
        if it must not, because the database does not keep up."""
        with self._changed:
            segment = self._segments.get(batch.segment)
            if segment is None:
                file = self._writer.files[batch.segment]
                name = batch.segment + OWNED
                segment = OpenSegment(batch.segment, name, file, batch.start, batch.start)
                self._segments[batch.segment] = segment
            if not any(one.pending for one in self._segments.values()):
                self._oldest, self._behind = batch.written, False
            segment.end = batch.end
            segment.add([queue_id for queue_id, _ in batch.hints], batch.size)
            if self._held_messages < MAX_HELD:
                self._held.append(batch)
                self._held_messages += len(batch.messages)
            waits = wait and not self._behind
            if waits:
                self._unreplied.append(batch)
            self._changed.notify()
            return waits

    def retire(self, segment: str, *, orderly: bool) -> None:
        """Nothing more is written to a segment. Not `orderly`: it may hold more than was told."""
        with self._changed:
            one = self._segments.get(segment)
            if one is None:  # it has no message, or another process has it
                file = self._writer.files.get(segment)
                if file is None:
                    return
                one = OpenSegment(segment, segment + OWNED, file, BLOCK, BLOCK)
                self._segments[segment] = one
            one.retired, one.orderly = True, orderly
            self._changed.notify()

    def overdue(self, before: float) -> list[WrittenBatch]:
        """The batches written before a time (monotonic) whose replies must wait no longer; after
        one of them no reply waits until all rows are made."""
        with self._changed:
            if not self._unreplied or self._unreplied[0].written > before:
                return []
            self._behind = True
            batches = [*self._unreplied]
            self._unreplied.clear()
            return batches

    def close(self, timeout: float) -> None:
        """Ends the thread; it makes the rows of what is written, within so many seconds and if the
        database is there. What has no rows then is left to the next spooler."""
        with self._changed:
            self._closing, self._give_up_at = True, time.monotonic() + timeout
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout + 1.0)
        for segment in [*self._segments.values()]:
            self._release(segment)

    def _run(self) -> None:
        pause = _PAUSE
        while True:
            try:
                if not self._turn():
                    return
                pause = _PAUSE
            except Exception as error:
                if not is_outage(error):
                    log.exception("committer failed")
                elif pause == _PAUSE:
                    log.error("database away", reason=first_line(error))
                with self._changed:
                    if self._closing:
                        return
                    self._changed.wait_for(lambda: self._closing, pause)
                pause = min(pause * 2, _LONGEST_PAUSE)

    def _turn(self) -> bool:
        """One transaction, or one wait; False at the end. Raises the database's errors."""
        now = time.monotonic()
        if now >= self._adopt_at and not self._closing:
            self._adopt()
            self._adopt_at = now + ADOPT_INTERVAL
        self._finish_segments()
        chunk = self._next_chunk()
        if chunk is not None:
            self._commit(chunk)
            if now >= self._mark_at:
                self._mark.advance(self._engine)
                self._mark_at = now + MARK_INTERVAL
        with self._changed:
            if self._closing and (chunk is None or now >= self._give_up_at):
                return False
            if chunk is None:
                self._changed.wait_for(
                    lambda: self._closing or self._has_work(), max(0.0, self._adopt_at - now)
                )
        return True

    def _has_work(self) -> bool:
        return any(
            segment.committed < segment.end or segment.retired
            for segment in self._segments.values()
        )

    # Taking what has no rows

    def _next_chunk(self) -> _Chunk | None:
        """What is committed next: in turns of our own segments and of an adopted one."""
        if self._chunk is not None:  # an outage interrupted it
            return self._chunk
        with self._changed:
            pending = [s for s in self._segments.values() if s.committed < s.end]
            if not pending:
                return None
            others = [segment for segment in pending if not segment.ours]
            self._others_turn = bool(others) and not self._others_turn
            segment = others[0] if self._others_turn else pending[0]
            head = self._held[0] if self._held else None
            end = segment.end
            if head is not None and head.segment == segment.id:
                if head.start == segment.committed:
                    self._chunk = self._from_memory(segment)
                    return self._chunk
                end = head.start
        self._chunk = self._from_file(segment, end)
        return self._chunk

    def _from_memory(self, segment: OpenSegment) -> _Chunk:
        batches: list[WrittenBatch] = []
        end, count = segment.committed, 0
        while self._held:
            head = self._held[0]
            if (head.segment, head.start) != (segment.id, end) or (
                batches and count + len(head.messages) > MAX_ROWS
            ):
                break
            batches.append(self._held.popleft())
            end, count = head.end, count + len(head.messages)
        self._held_messages -= count
        return _Chunk(
            segment,
            segment.committed,
            end,
            [message for batch in batches for message in batch.messages],
            [hint for batch in batches for hint in batch.hints],
            sum(batch.size for batch in batches),
            max(0.0, time.monotonic() - batches[0].written),
        )

    def _from_file(self, segment: OpenSegment, end: int) -> _Chunk:
        """Reads messages that arrived within a second of each other."""
        chunk = _Chunk(segment, segment.committed, end, [], [], 0, 0.0)
        written_at = None
        for item in scan(segment.file, read_header(segment.file), segment.committed, end):
            if isinstance(item, Damage):
                _log_damage(segment.id, item)
                continue
            if chunk.messages and written_at is not None:
                apart = abs(item.header.written_at - written_at) > _SAME_TIME
                if apart or len(chunk.messages) + len(item.records) > MAX_ROWS:
                    chunk.end = item.position
                    break
            for damage in item.damages:
                _log_damage(segment.id, damage)
            if segment.void_from <= item.position:
                continue
            written_at = written_at or item.header.written_at
            for record in item.records:
                chunk.messages.append(
                    EncodedMessage(record.envelope, record.position if record.in_journal else None)
                )
                chunk.hints.append((record.queue_id, routes_of(record.envelope)))
                chunk.size += len(memoryview(record.body))
        if written_at is not None:
            chunk.age = max(0.0, time.time() - written_at / 1e6)
        return chunk

    # Making rows

    def _commit(self, chunk: _Chunk) -> None:
        """Commits a chunk and tells of it. Raises the database's errors if it is away."""
        started = time.monotonic()
        segment = chunk.segment
        span = SegmentSpan(segment.id, chunk.start, chunk.end)
        try:
            self._open_row(segment, chunk.start)
            self._acceptor.commit(chunk.messages, span, age=chunk.age)
        except PositionMoved as error:
            log.critical("segment replayed by another process", reason=str(error))
            self._chunk = None
            self._release(segment)
            return
        except Exception as error:
            if is_outage(error):
                raise
            log.error("batch refused by the database", reason=first_line(error))
            self._acceptor.commit_each(chunk.messages, span, age=chunk.age)
        self._chunk = None
        ids: Ids = {}
        for queue_id, routes in chunk.hints:
            for route in routes:
                ids.setdefault(route, []).append(queue_id)
        replies = self._advance(segment, chunk)
        self._committed(replies, ids, len(chunk.messages), time.monotonic() - started)

    def _open_row(self, segment: OpenSegment, start: int) -> None:
        """Inserts the row of a segment that has none. Raises PositionMoved if another process took
        the segment: it may have removed segment and row, and its messages would come twice."""
        if not segment.opened:
            self._acceptor.open_segment(segment.id, start)
            if not self._directory.leads_to(segment.name, segment.file):
                raise PositionMoved(f"segment {segment.id} was adopted")
            segment.opened = True

    def _advance(self, segment: OpenSegment, chunk: _Chunk) -> list[WrittenBatch]:
        """The rows of a chunk are made; the batches whose replies waited for that."""
        with self._changed:
            segment.committed = chunk.end
            segment.pending -= len(chunk.messages)
            segment.pending_octets -= chunk.size
            if chunk.age < _RECENT:
                self._oldest = time.monotonic() - chunk.age
            replies = []
            while self._unreplied:
                head = self._unreplied[0]
                if head.segment != segment.id or head.end > chunk.end:
                    break
                replies.append(self._unreplied.popleft())
            return replies

    # Segments that begin and end

    def _finish_segments(self) -> None:
        """Seals what is committed to its end. Raises the database's errors."""
        with self._changed:
            done = [s for s in self._segments.values() if s.retired and s.committed >= s.end]
        for segment in done:
            if segment.orderly:
                self._seal(segment)
            self._release(segment)

    def _seal(self, segment: OpenSegment) -> None:
        if not segment.opened:
            if not segment.count and first_void(segment.file, read_header(segment.file)) is None:
                with suppress(FileNotFoundError):  # another process adopted it
                    self._directory.unlink(segment.name)  # nothing was ever written to it
                self._directory.sync()
                return
            try:
                self._open_row(segment, segment.end)
            except PositionMoved:
                return
        self._acceptor.seal_segment(
            segment.id, segment.end, segment.count, segment.least, segment.greatest
        )

    def _release(self, segment: OpenSegment) -> None:
        """Closes a segment, which releases its lock."""
        with self._changed:
            del self._segments[segment.id]
            self._held = deque(batch for batch in self._held if batch.segment != segment.id)
            self._held_messages = sum(len(batch.messages) for batch in self._held)
        if segment.ours:
            self._writer.close_segment(segment.id)
        else:
            segment.file.close()

    def _adopt(self) -> None:
        """Takes over the segments of spoolers that have ended. Raises the database's errors."""
        skip = self._acceptor.sealed_segments() | {*self._segments}
        try:
            adopted = adopt(self._directory, skip=skip, local=self._local)
            voids = voided_batches(self._directory) if adopted else set()
            for one in adopted:
                self._take_over(one, voided_from(voids, one.header.segment))
        except OSError as error:
            log.error("segments not adopted", reason=str(error))

    def _take_over(self, adopted: AdoptedSegment, void_from: float) -> None:
        header, file = adopted.header, adopted.file
        if header.spool != self._spool:
            log.error("segment of another spool", segment=header.segment, spool=header.spool)
            file.close()
            return
        position, sealed = self._acceptor.position(header.segment)
        if sealed:
            file.close()
            return
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
        for item in scan(file, header, verify_bodies=False):
            if isinstance(item, ScannedBatch) and item.void is None:
                if item.position < void_from and item.records:
                    size = sum(len(memoryview(record.body)) for record in item.records)
                    pending = item.position >= segment.committed
                    segment.add([r.queue_id for r in item.records], size, pending=pending)
                segment.end = max(segment.end, item.end)
            elif isinstance(item, Damage) and not item.torn:
                segment.end = max(segment.end, item.end)
        log.info("segment adopted", segment=segment.id, messages=segment.pending)
        with self._changed:
            self._segments[segment.id] = segment


def _log_damage(segment: str, damage: Damage) -> None:
    """A torn tail was never confirmed to a client; anything else is a loss."""
    fields = {"segment": segment, "position": damage.position, "reason": damage.reason}
    if damage.torn:
        log.warning("segment ends in a torn batch", **fields)
    else:
        log.critical("segment damaged", octets=damage.end - damage.position, **fields)
