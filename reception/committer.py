"""The committer: a thread of the spooler that makes the rows of what the journal holds.

Each segment has a position up to which its messages have rows. The thread takes what lies behind
it: from memory while the database keeps up, else from the segment, so an outage of any length costs
no memory. It does the same for segments whose spooler has ended (`relay.spool.journal.adoption`),
in turns with its own. A segment that is committed to its end is sealed.

What must stay true: rows and position are one COMMIT (`relay.queue.accept`), so nothing comes twice
and nothing is passed over; a batch that was declared void never gets rows; a message that the
database refuses gets rows that are held, because its client has heard 250; rows that a crash of the
database takes away are made again (`_go_back`).
"""

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from sqlalchemy import Engine

from reception.replay import (
    MAX_ROWS,
    MAX_ROWS_OCTETS,
    SAME_TIME,
    Backlog,
    Chunk,
    OpenSegment,
    UnsyncedRows,
    backlog,
    commit_chunk,
    log_damage,
    read_chunk,
    seal,
    to_replay,
)
from reception.spooler_protocol import Lag
from relay.db.engine import DatabaseFileError, is_outage
from relay.hint_entry import EARLY_COMMIT
from relay.log import first_line, get_logger
from relay.queue.accept import Acceptor, EncodedMessage, PositionMoved
from relay.spool.journal.adoption import AdoptedSegment, adopt, voided_batches, voided_from
from relay.spool.journal.directory import ADOPTED, OWNED, JournalDirectory
from relay.spool.journal.format import BLOCK
from relay.spool.journal.scan import Damage
from relay.spool.journal.writer import JournalWriter
from relay.spool.mark import SpoolMark

log = get_logger(__name__)
MAX_HELD = 4096
"""Messages in memory that wait for their rows. The others are read back from the journal."""
GATHER = 0.01
"""Seconds between two COMMITs while messages come faster and no reply waits for rows. A row in a
batch of 32 costs a third of what it costs in a batch of 8."""
GATHER_MESSAGES = 64
"""Messages that do not wait for others."""
MAX_HELD_OCTETS = 8 << 20
"""Octets of the envelopes of these messages."""
ADOPT_INTERVAL = 60.0  # seconds
ADOPT_SOON = 10.0
"""Seconds from the first adoption to the second. A spooler whose smtpd was killed goes on for five
seconds with the rows that are missing, and has its segment until then."""
KEPT_INTERVAL = 600.0
"""Seconds until a damaged segment is read again: the disk may have recovered."""
MARK_INTERVAL = 1.0  # seconds
_RECENT = 3600.0
_PAUSE = 0.1
_LONGEST_PAUSE = 2.0

type Ids = dict[str, list[str]]
type Committed = Callable[[Sequence["WrittenBatch"], Ids, int, float], object]


@dataclass(slots=True, eq=False)
class WrittenBatch:
    """A batch that is synced. `hints`: each message's id and routes; `size`: octets of envelopes
    and bodies; `numbers`: the requests, whose results may wait for the rows; `hinted`: their hints
    are published before the rows are made."""

    segment: str
    start: int
    end: int
    messages: list[EncodedMessage]
    hints: list[tuple[str, tuple[str, ...]]]
    size: int
    numbers: list[int] = field(default_factory=list)
    hinted: bool = False
    written: float = field(default_factory=time.monotonic)

    @property
    def in_memory(self) -> int:
        """Octets of the envelopes, which wait in memory."""
        return sum(len(message.rows) for message in self.messages)


def by_route(hints: Iterable[tuple[str, tuple[str, ...]]]) -> Ids:
    """The ids of messages by their routes."""
    ids: Ids = {}
    for queue_id, routes in hints:
        for route in routes:
            ids.setdefault(route, []).append(queue_id)
    return ids


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
        self._kept: dict[str, float] = {}  # damaged segments, until they are read again (monotonic)
        self._tails = set[tuple[str, int]]()  # segments and positions of tails that were counted
        self._damages = 0  # parts of segments that did not verify
        self._backlog = Backlog()  # of earlier spoolers, until their segments are adopted
        self._chunk: Chunk | None = None  # what is being committed
        self._others_turn = False
        # By segment, because one that cannot be read for a while must not stand before another.
        self._held: defaultdict[str, deque[WrittenBatch]] = defaultdict(deque)
        self._held_messages = self._held_octets = 0  # of all segments
        self._unreplied: deque[WrittenBatch] = deque()
        self._behind = False  # a reply waited in vain; no reply waits until all rows are made
        self._oldest = time.monotonic()  # about when the oldest message without a row arrived
        self._closing = False
        self._gathering = False
        self._give_up_at = float("inf")
        self._adopt_at = 0.0  # before the first adoption
        self._mark_at = 0.0
        self._unmarked = False  # rows were made that no mark follows
        self._thread: threading.Thread | None = None

    def start(self, committed: Committed) -> None:
        """Starts the thread. `committed` gets the batches that still need a reply, the ids whose
        rows were made by route, their number, and the seconds that it took."""
        self._committed = committed
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)
        self._thread.start()

    def waits_since(self) -> float | None:
        """When the batch was written whose reply has waited for rows the longest (monotonic); None
        if no reply waits."""
        with self._changed:
            return self._unreplied[0].written if self._unreplied else None

    def lag(self) -> Lag:
        """What has no rows yet."""
        with self._changed:
            messages, octets, _ = self._backlog
            messages += sum(segment.pending for segment in self._segments.values())
            octets += sum(segment.pending_octets for segment in self._segments.values())
            seconds = time.monotonic() - self._oldest if messages else 0.0
            return Lag(messages, octets, seconds, self._damages)

    def put(self, batch: WrittenBatch, *, wait: bool) -> bool:
        """Takes a batch that was written. `wait`: whether its reply shall wait for the rows; False
        if it must not, because the database does not keep up."""
        with self._changed:
            segment = self._segments.get(batch.segment)
            if segment is None:
                file = self._writer.files.get(batch.segment)
                if file is None:  # another process has adopted it, and makes the rows
                    return False
                name = batch.segment + OWNED
                segment = OpenSegment(batch.segment, name, file, batch.start, batch.start)
                self._segments[batch.segment] = segment
            waiting = self._backlog.messages or any(s.pending for s in self._segments.values())
            if not waiting:
                self._oldest, self._behind = batch.written, False
            segment.end = batch.end
            bodies = sum(message.position is not None for message in batch.messages)
            segment.add([queue_id for queue_id, _ in batch.hints], bodies, batch.size)
            octets = batch.in_memory
            if self._held_messages < MAX_HELD and self._held_octets + octets <= MAX_HELD_OCTETS:
                self._held[batch.segment].append(batch)
                self._held_messages += len(batch.messages)
                self._held_octets += octets
            waits = wait and not self._behind
            if waits:
                self._unreplied.append(batch)
            if waits or not self._gathering or self._held_messages >= GATHER_MESSAGES:
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
        pause, learned = _PAUSE, False
        while True:
            try:
                if not learned:  # before the first connection, which the mark may refuse
                    self._mark.learn_from_journal(unsealed=True)
                    self._count_backlog()
                    learned = True
                if not self._turn():
                    return
                pause = _PAUSE
            except Exception as error:
                if not is_outage(error):
                    log.exception("committer failed")
                elif pause == _PAUSE:
                    _log_outage(error)
                with self._changed:
                    if self._closing:
                        return
                    self._changed.wait_for(lambda: self._closing, pause)
                pause = min(pause * 2, _LONGEST_PAUSE)

    def _count_backlog(self) -> None:
        """What earlier spoolers left counts, also while no database says what has its rows."""
        try:
            found = backlog(self._directory, local=self._local)
        except OSError as error:
            log.error("backlog not counted", reason=str(error))
            return
        with self._changed:
            self._backlog = found
            if found.messages:
                self._oldest = time.monotonic() - found.seconds

    def _turn(self) -> bool:
        """One transaction, or one wait; False at the end. Raises the database's errors."""
        now = time.monotonic()
        if now >= self._adopt_at and not self._closing:
            self._adopt()
            self._adopt_at = now + (ADOPT_INTERVAL if self._adopt_at else ADOPT_SOON)
        self._finish_segments()
        chunk = self._next_chunk()
        if chunk is not None:
            self._commit(chunk)
            if len(chunk.messages) > 1:
                self._gather(now + GATHER)
        ends = self._closing and chunk is None
        if self._unmarked and (ends or now >= self._mark_at):
            self._mark.advance(self._engine)
            self._find_lost_rows()
            self._mark_at, self._unmarked = now + MARK_INTERVAL, False
            ends = ends and not self._has_work()
        with self._changed:
            if ends or (self._closing and now >= self._give_up_at):
                return False
            if chunk is None:
                self._changed.wait_for(
                    lambda: self._closing or self._has_work(), max(0.0, self._next_at() - now)
                )
        return True

    def _next_at(self) -> float:
        """When there is something to do without new mail."""
        times = [self._adopt_at]
        if self._unmarked:
            times.append(self._mark_at)
        times += (s.unreadable_until for s in self._segments.values() if s.committed < s.end)
        return min(times)

    def _gather(self, until: float) -> None:
        """After a batch of several, lets more messages gather until this time (monotonic)."""

        def enough() -> bool:
            waiting = self._closing or bool(self._unreplied)
            return waiting or self._held_messages >= GATHER_MESSAGES

        with self._changed:
            self._gathering = True
            self._changed.wait_for(enough, max(0.0, until - time.monotonic()))
            self._gathering = False

    def _has_work(self) -> bool:
        return any(
            self._pends(segment) or self._ends(segment) for segment in self._segments.values()
        )

    # Taking what has no rows

    def _next_chunk(self) -> Chunk | None:
        """What is committed next: in turns of our own segments and of an adopted one."""
        if self._chunk is not None:  # an outage interrupted it
            return self._chunk
        with self._changed:
            pending = [s for s in self._segments.values() if self._pends(s)]
            if not pending:
                return None
            others = [segment for segment in pending if not segment.ours]
            self._others_turn = bool(others) and not self._others_turn
            ours = [segment for segment in pending if segment.ours]
            segment = others[0] if self._others_turn or not ours else ours[0]
            held, end = self._held.get(segment.id), segment.end
            if held:
                if held[0].start == segment.committed:
                    self._chunk = self._from_memory(segment, held)
                    return self._chunk
                end = held[0].start
        try:
            chunk = read_chunk(segment, end)
        except OSError as error:
            self._put_off(segment, str(error))
            return None
        if chunk.unreadable and not segment.file.lost <= segment.read_again:
            segment.read_again |= segment.file.lost  # a minute later they are passed over
            self._put_off(segment, "the disk cannot read parts of it")
            return None
        self._chunk = chunk
        return chunk

    def _put_off(self, segment: OpenSegment, reason: str) -> None:
        log.error("segment unreadable", name=segment.name, reason=reason)
        segment.file.try_again()
        segment.unreadable_until = time.monotonic() + ADOPT_INTERVAL

    def _pends(self, segment: OpenSegment) -> bool:
        """Whether rows of a segment are missing that can be made now."""
        return segment.committed < segment.end and segment.unreadable_until <= time.monotonic()

    def _from_memory(self, segment: OpenSegment, held: deque[WrittenBatch]) -> Chunk:
        """The first batches of a segment in memory. The caller has seen that there is one."""
        batches: list[WrittenBatch] = []
        end, count, octets = segment.committed, 0, 0
        arrived = held[0].written
        while held:
            head = held[0]
            size = head.in_memory
            if head.start != end or (
                batches
                and (
                    count + len(head.messages) > MAX_ROWS
                    or octets + size > MAX_ROWS_OCTETS
                    or head.written - arrived > SAME_TIME
                )
            ):
                break
            batches.append(held.popleft())
            end, count, octets = head.end, count + len(head.messages), octets + size
        self._held_messages -= count
        self._held_octets -= octets
        return Chunk(
            segment,
            segment.committed,
            end,
            [message for batch in batches for message in batch.messages],
            [hint for batch in batches for hint in batch.hints],
            sum(batch.size for batch in batches),
            arrived,
            hinted=all(batch.hinted for batch in batches),
        )

    # Making rows

    def _commit(self, chunk: Chunk) -> None:
        """Commits a chunk and tells of it. Raises the database's errors if it is away."""
        started = time.monotonic()
        segment = chunk.segment
        try:
            commit_chunk(self._acceptor, self._directory, chunk)
        except PositionMoved as error:
            self._position_moved(segment, error)
            self._chunk = None
            return
        self._chunk = None
        ended = time.monotonic()
        hint_suffices = chunk.hinted and ended <= chunk.arrived + EARLY_COMMIT
        replies = self._advance(segment, chunk)
        ids = {} if hint_suffices else by_route(chunk.hints)
        self._committed(replies, ids, len(chunk.messages), ended - started)

    def _advance(self, segment: OpenSegment, chunk: Chunk) -> list[WrittenBatch]:
        """The rows of a chunk are made; the batches whose replies waited for that."""
        with self._changed:
            segment.committed, self._unmarked = chunk.end, True
            self._damages += sum(not damage.torn for damage in chunk.damages)
            segment.pending -= len(chunk.messages)
            segment.pending_octets -= chunk.size
            if chunk.announced is None:  # this COMMIT is synced, with all before it
                segment.unsynced.clear()
            else:
                rows = UnsyncedRows(chunk.start, len(chunk.messages), chunk.size, chunk.arrived)
                segment.unsynced.append(rows)
            if chunk.age < _RECENT:
                self._oldest = chunk.arrived
            replies = []
            while self._unreplied:
                head = self._unreplied[0]
                if head.segment != segment.id or head.end > chunk.end:
                    break
                replies.append(self._unreplied.popleft())
            return replies

    def _find_lost_rows(self) -> None:
        """After a COMMIT that was synced: goes back to where the database is, if it has crashed and
        lost rows that were not. Raises the database's errors."""
        for segment in [*self._segments.values()]:
            if segment.unsynced and not self._go_back(segment):
                segment.unsynced.clear()

    def _go_back(self, segment: OpenSegment) -> bool:
        """Whether the database has lost rows of a segment; they are made again from the journal."""
        position, sealed = self._acceptor.position(segment.id)
        lost = [
            rows for rows in segment.unsynced if position is not None and rows.start >= position
        ]
        if sealed or not lost or lost[0].start != position:
            return False
        count = sum(rows.messages for rows in lost)
        log.error("rows lost by a crash of the database", segment=segment.id, messages=count)
        with self._changed:
            segment.committed = position
            segment.pending += count
            segment.pending_octets += sum(rows.size for rows in lost)
            segment.unsynced.clear()
            self._oldest = min(self._oldest, lost[0].arrived)
        return True

    def _position_moved(self, segment: OpenSegment, error: PositionMoved) -> None:
        """A segment's position is not where it was left. Raises the database's errors, and
        OlderDatabase if it was restored meanwhile."""
        self._mark.advance(self._engine)
        if not self._go_back(segment):
            log.critical("segment replayed by another process", reason=str(error))
            self._release(segment)

    # Segments that begin and end

    def _finish_segments(self) -> None:
        """Seals what is committed to its end, or keeps it if it is damaged: without its lock, so
        that an operator can discard it. Raises the database's errors."""
        with self._changed:
            done = [segment for segment in self._segments.values() if self._ends(segment)]
        for segment in done:
            if segment.orderly:
                try:
                    seal(self._acceptor, self._directory, segment)
                except PositionMoved as error:
                    self._position_moved(segment, error)
                    continue
                if segment.damaged:
                    self._kept[segment.id] = time.monotonic() + KEPT_INTERVAL
            self._release(segment)

    def _ends(self, segment: OpenSegment) -> bool:
        """Whether a segment is committed to its end."""
        return segment.retired and segment.committed >= segment.end

    def _release(self, segment: OpenSegment) -> None:
        """Closes a segment, which releases its lock."""
        with self._changed:
            del self._segments[segment.id]
            for batch in self._held.pop(segment.id, ()):
                self._held_messages -= len(batch.messages)
                self._held_octets -= batch.in_memory
        if segment.ours:
            self._writer.close_segment(segment.id)
        else:
            segment.file.close()

    def _adopt(self) -> None:
        """Takes over the segments of spoolers that have ended. Raises the database's errors."""
        now = time.monotonic()
        self._kept = {segment: until for segment, until in self._kept.items() if until > now}
        skip = self._acceptor.sealed_segments() | {*self._segments} | {*self._kept}
        try:
            adopted = adopt(self._directory, skip=skip, local=self._local)
            voids = voided_batches(self._directory) if adopted else set()
        except OSError as error:
            log.error("segments not adopted", reason=str(error))
            return
        if adopted:
            self._mark.advance(self._engine)  # raises if the database was restored meanwhile
        taken: list[OpenSegment] = []
        for one in adopted:
            try:
                taken += self._taken_over(one, voided_from(voids, one.header.segment))
            except OSError as error:
                name = one.header.segment + ADOPTED
                log.error("segment unreadable", name=name, reason=str(error))
                one.file.close()
        with self._changed:  # in one step, so that no message counts twice for the limit
            self._segments |= {segment.id: segment for segment in taken}
            self._backlog = Backlog()

    def _taken_over(self, adopted: AdoptedSegment, void_from: float) -> Sequence[OpenSegment]:
        """An adopted segment with what of it has no rows, if it is to be replayed here."""
        header, file = adopted.header, adopted.file
        if header.spool != self._spool:
            log.error("segment of another spool", segment=header.segment, spool=header.spool)
            file.close()
            return ()
        segment = to_replay(self._acceptor, adopted, void_from)
        if segment is None:
            file.close()
            return ()
        log.info("segment adopted", segment=segment.id, messages=segment.pending)
        if segment.tail is not None:
            self._count_tail(segment.id, segment.tail)
        return (segment,)

    def _count_tail(self, segment: str, tail: Damage) -> None:
        """Tells of a tail that cannot be read, once: its segment is adopted again and again."""
        if (segment, tail.position) not in self._tails:
            self._tails.add((segment, tail.position))
            log_damage(segment, tail)
            with self._changed:
                self._damages += 1


def _log_outage(error: Exception) -> None:
    """Log what is away: the spool, if it is an error of a file that is not the database's."""
    if isinstance(error, OSError) and not isinstance(error, DatabaseFileError):
        log.error("spool away", reason=first_line(error))
    else:
        log.error("database away", reason=first_line(error))
