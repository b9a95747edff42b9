"""The rest of the relay around the journal, as small as it can be: database, spooler, operator.

`ModelDatabase` has the rows of messages and segments. `ModelSpooler` writes with the real writer,
adopts with the real adoption, and makes rows from the real scan. Removal, compaction and rebuild
use the real reader. Every transaction is a step of the process, so it too can fail, be lost, or be
the last one. What is replaced here by real code later takes the place of one function.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from relay.spool.journal.adoption import AdoptedSegment, adopt, adopt_one, voided_batches
from relay.spool.journal.copying import write_copy
from relay.spool.journal.directory import ADOPTED, COPY, OWNED, JournalDirectory, SegmentFile
from relay.spool.journal.format import (
    BLOCK,
    JournalRecord,
    Place,
    SegmentHeader,
    VoidedBatch,
)
from relay.spool.journal.reader import JournalReader, WrongBody
from relay.spool.journal.scan import ScannedBatch, first_void, read_header, scan
from relay.spool.journal.supply import make_segment
from relay.spool.journal.writer import AppendedBatch, JournalWriter
from tests.journal_disk import Interruption, SimulatedDirectory, SimulatedDisk, SimulatedProcess

SEGMENT_SIZE = 8 * BLOCK
SPOOL = "ab" * 16


class DatabaseAway(Exception):
    """No connection, or a COMMIT of unknown outcome; or the database is older than the spool."""


class PositionElsewhere(Exception):
    """Another process has replayed this segment."""


class TwiceInserted(AssertionError):
    """A message came a second time, or one came whose client heard that it was not stored."""


@dataclass
class ModelMessage:
    """`needed`: a delivery needs the body. `held`: only an operator lets it go on."""

    place: Place
    size: int
    needed: bool = True
    held: bool = False


@dataclass
class ModelSegmentRow:
    """A row of the table segments."""

    committed_to: int
    sealed: bool = False


@dataclass
class ModelDatabase:
    """What a COMMIT made durable. `on_insert` is told of every new row, before its COMMIT."""

    on_insert: Callable[[str, bool], None]
    messages: dict[str, ModelMessage] = field(default_factory=dict)
    segments: dict[str, ModelSegmentRow] = field(default_factory=dict)
    mark: int = 0

    def snapshot(self) -> "ModelDatabase":
        """A backup."""
        return ModelDatabase(
            self.on_insert, copy.deepcopy(self.messages), copy.deepcopy(self.segments), self.mark
        )

    def restore(self, backup: "ModelDatabase") -> None:
        """Put a backup in the place of everything."""
        made = backup.snapshot()
        self.messages, self.segments, self.mark = made.messages, made.segments, made.mark

    def insert(self, queue_id: str, row: ModelMessage) -> None:
        """ON CONFLICT DO NOTHING."""
        if queue_id not in self.messages:
            self.on_insert(queue_id, row.held)
            self.messages[queue_id] = row

    def forget(self, segment: str) -> None:
        """The file of a segment is gone."""
        self.segments.pop(segment, None)

    def needs(self, segment: str) -> bool:
        """Whether a delivery needs a body of this segment."""
        return any(row.needed and row.place.segment == segment for row in self.messages.values())


class DatabaseSession:
    """The database as one process sees it."""

    def __init__(self, database: ModelDatabase, process: SimulatedProcess) -> None:
        self.database, self.process, self.disk = database, process, process.disk
        self.known = self.disk.mark

    def run[T](self, statement: Callable[[ModelDatabase], T]) -> T:
        """One transaction, and the mark behind it. Raises DatabaseAway."""
        now = self.process.step("transaction")
        if now in (Interruption.FAIL, Interruption.SHORT):
            raise DatabaseAway("no connection")
        self.known = max(self.known, self.disk.mark)
        if self.database.mark < self.known:
            raise DatabaseAway("the database is older than the spool")
        result = statement(self.database)
        self.database.mark += 1
        if now is Interruption.LOST:
            raise DatabaseAway("the reply to COMMIT was lost")
        mark = self.database.mark
        if self.process.step("mark") is None:  # else the file keeps an older mark
            self.known = self.disk.mark = max(self.disk.mark, mark)
        return result


@dataclass(eq=False)
class ModelSegment:
    """A segment that a spooler owns: messages have rows up to `committed`."""

    id: str
    name: str
    file: SegmentFile
    committed: int
    end: int
    ours: bool = True
    opened: bool = False
    retired: bool = False
    orderly: bool = True
    voided_at: int | None = None
    count: int = 0
    batches: list[tuple[AppendedBatch, list[JournalRecord]]] = field(default_factory=list)


class StepwiseSupply:
    """Makes each segment when it is taken: the steps of a thread could come in any order."""

    def __init__(self, directory: JournalDirectory) -> None:
        self._directory = directory

    def take(self) -> tuple[str, SegmentFile]:
        """A new segment; raises OSError."""
        return make_segment(self._directory, SPOOL, size=SEGMENT_SIZE)


def voided_position(voids: Iterable[VoidedBatch], segment: str) -> int | None:
    """From where on nothing of a segment counts: a failed segment is never written again."""
    return min((void.position for void in voids if void.segment == segment), default=None)


class ModelSpooler:
    """A process that writes, makes rows and adopts."""

    def __init__(self, disk: SimulatedDisk, database: ModelDatabase) -> None:
        self.process = disk.start_process()
        self.directory = SimulatedDirectory(self.process)
        self.session = DatabaseSession(database, self.process)
        self.segments: dict[str, ModelSegment] = {}
        times = count(1)
        self.writer = JournalWriter(
            self.directory,
            StepwiseSupply(self.directory),
            on_retired=self.retire,
            segment_size=SEGMENT_SIZE,
            clock=lambda: next(times),
        )

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self.process.alive

    def append(self, records: Sequence[JournalRecord]) -> None:
        """Write and sync. Raises what the writer raises."""
        batch = self.writer.append(records, mark=self.session.known)
        segment = self._own(batch.segment, batch.start)
        segment.end = batch.end
        segment.count += len(records)
        segment.batches.append((batch, [*records]))

    def retire(self, segment: str, orderly: bool) -> None:
        """The writer writes no more to a segment."""
        one = self._own(segment, BLOCK)
        one.retired, one.orderly = True, orderly

    def _own(self, segment: str, start: int) -> ModelSegment:
        if segment not in self.segments:
            file = self.writer.files[segment]
            self.segments[segment] = ModelSegment(segment, segment + OWNED, file, start, start)
        return self.segments[segment]

    def committed(self, queue_id: str) -> bool:
        """Whether this process knows that a message that it wrote has its row."""
        return not any(
            queue_id == record.queue_id
            for segment in self.segments.values()
            for _, records in segment.batches
            for record in records
        )

    def commit(self, *, from_memory: bool = True) -> None:
        """Make the rows of everything. Raises DatabaseAway."""
        for segment in [*self.segments.values()]:
            try:
                while segment.committed < segment.end:
                    self._commit_chunk(segment, from_memory=from_memory)
            except PositionElsewhere:
                self._release(segment)
                continue
            if segment.retired:
                if segment.orderly:
                    self._seal(segment)
                self._release(segment)

    def _commit_chunk(self, segment: ModelSegment, *, from_memory: bool) -> None:
        start, rows, end = segment.committed, {}, segment.end
        if from_memory and segment.batches and segment.batches[0][0].start == start:
            batch, records = segment.batches[0]
            end = batch.end
            for record, position in zip(records, batch.positions, strict=True):
                place = Place(segment.id, position)
                rows[record.queue_id] = ModelMessage(place, len(memoryview(record.body)))
        else:
            limit = min(filter(None, (segment.voided_at, end)))
            for item in scan(segment.file, read_header(segment.file), start, limit):
                if isinstance(item, ScannedBatch):
                    rows |= rows_of(segment.id, item.records)
        if not segment.opened:
            self._open(segment)
        self._accept(segment, start, end, rows)
        segment.committed = end
        segment.batches = [pair for pair in segment.batches if pair[0].start >= end]

    def _open(self, segment: ModelSegment) -> None:
        """Insert the row of a segment. Its name is compared behind that: if the segment was adopted
        and removed meanwhile, its row would come back, and its messages too."""
        self.session.run(
            lambda database: database.segments.setdefault(
                segment.id, ModelSegmentRow(segment.committed)
            )
        )
        if not self.directory.leads_to(segment.name, segment.file):
            raise PositionElsewhere(segment.id)
        segment.opened = True

    def _accept(
        self, segment: ModelSegment, start: int, end: int, rows: dict[str, ModelMessage]
    ) -> None:
        """Rows and position in one transaction; PositionElsewhere if another process moved it."""

        def statement(database: ModelDatabase) -> bool:
            row = database.segments.get(segment.id)
            if row is None or row.sealed or row.committed_to != start:
                return row is not None and (row.sealed or row.committed_to >= end)
            row.committed_to = end
            for queue_id, message in rows.items():
                database.insert(queue_id, message)
            return True

        if not self.session.run(statement):
            raise PositionElsewhere(segment.id)

    def _seal(self, segment: ModelSegment) -> None:
        if not segment.opened:
            if not segment.count and first_void(segment.file, read_header(segment.file)) is None:
                if self.directory.leads_to(segment.name, segment.file):
                    self.directory.unlink(segment.name)  # nothing was ever written to it
                    self.directory.sync()
                return
            self._open(segment)
        self.session.run(lambda database: seal(database, segment.id, segment.end))

    def _release(self, segment: ModelSegment) -> None:
        self.segments.pop(segment.id, None)
        if segment.ours:
            self.writer.close_segment(segment.id)
        else:
            segment.file.close()

    def adopt(self, *, forced: str | None = None) -> None:
        """Take over what has no owner; `forced`: one segment by an operator's order. Raises
        DatabaseAway and OSError."""
        sealed = self.session.run(
            lambda database: {key for key, row in database.segments.items() if row.sealed}
        )
        skip = sealed | {*self.segments}
        if forced is None:
            adopted = adopt(self.directory, skip=skip)
        elif forced in skip:
            return
        else:
            one = adopt_one(self.directory, forced + OWNED, local=False, forced=True)
            adopted = [one] if one else []
        voids = voided_batches(self.directory)
        for one in adopted:
            self._take_over(one, voided_position(voids, one.header.segment))

    def _take_over(self, adopted: AdoptedSegment, voided_at: int | None) -> None:
        segment = adopted.header.segment
        row = self.session.run(lambda database: copy.copy(database.segments.get(segment)))
        if row is not None and row.sealed:
            adopted.file.close()
            return
        start = row.committed_to if row else BLOCK
        one = ModelSegment(
            segment,
            segment + ADOPTED,
            adopted.file,
            start,
            start,
            ours=False,
            opened=row is not None,
            retired=True,
            voided_at=voided_at,
        )
        for item in scan(adopted.file, adopted.header, end=voided_at):
            if isinstance(item, ScannedBatch):
                one.end = max(one.end, item.end)
                one.count += len(item.records)
        self.segments[segment] = one


def rows_of(segment: str, records: Iterable[JournalRecord]) -> dict[str, ModelMessage]:
    """The rows of records that stand in a segment."""
    return {
        record.queue_id: ModelMessage(Place(segment, record.position), len(memoryview(record.body)))
        for record in records
    }


def seal(database: ModelDatabase, segment: str, end: int) -> None:
    """Nothing more of a segment is replayed."""
    row = database.segments.get(segment)
    if row is not None and not row.sealed:
        row.sealed, row.committed_to = True, end


def learn_mark(disk: SimulatedDisk) -> None:
    """The first process after a power cut reads the marks that the batches carry, because the file
    with the mark may be an older one."""
    process = disk.start_process()
    directory = SimulatedDirectory(process)
    for segment, _ in directory.segments(OWNED, ADOPTED):
        if file := directory.open_segment(segment):
            for item in scan(file, SegmentHeader(segment, SPOOL, 0, "")):
                if isinstance(item, ScannedBatch):
                    disk.mark = max(disk.mark, item.header.mark)
    process.kill()


# Removal and compaction


def remove_segments(directory: JournalDirectory, session: DatabaseSession) -> None:
    """Remove the sealed segments that no delivery needs: the file, the sync, then the row. Raises
    DatabaseAway and OSError."""
    sealed = session.run(
        lambda database: sorted(key for key, row in database.segments.items() if row.sealed)
    )
    for segment in sealed:
        needed = session.run(partial(ModelDatabase.needs, segment=segment))
        if not needed and unlink_segment(directory, segment):
            session.run(partial(ModelDatabase.forget, segment=segment))


def unlink_segment(directory: JournalDirectory, segment: str) -> bool:
    """False if the segment declares a batch void whose segment still exists."""
    file = directory.open_segment(segment)
    if file is not None:
        void = first_void(file, SegmentHeader(segment, SPOOL, 0, ""))
        file.close()
        if void is not None:
            voided = directory.open_segment(void.segment)
            if voided is not None:
                voided.close()
                return False
            directory.sync()  # the name of the other must be gone for good
        for suffix in (OWNED, ADOPTED, COPY):
            if segment + suffix in directory.names():
                directory.unlink(segment + suffix)
    directory.sync()
    return True


def compact(directory: JournalDirectory, session: DatabaseSession) -> None:
    """Copy what is needed of all sealed segments into a new one. Raises DatabaseAway and
    OSError."""

    def survivors(database: ModelDatabase) -> dict[str, ModelMessage]:
        return {
            queue_id: copy.copy(row)
            for queue_id, row in sorted(database.messages.items())
            if row.needed and (one := database.segments.get(row.place.segment)) and one.sealed
        }

    rows = session.run(survivors)
    new, places = copy_bodies(directory, rows)
    if not new:
        return
    session.run(lambda database: move_rows(database, new, rows, places))
    # A database that is older than this must be noticed, whatever happens: it has the old places.
    disk = session.disk
    disk.durable_mark = disk.mark = max(disk.mark, session.database.mark)
    remove_segments(directory, session)


def copy_bodies(
    directory: JournalDirectory, rows: dict[str, ModelMessage]
) -> tuple[str, dict[str, Place]]:
    """A copy segment with these bodies: its id, and their places; no id if there are none."""
    reader, records = JournalReader(directory), list[JournalRecord]()
    for queue_id, row in rows.items():
        try:
            body = reader.read(row.place, row.size)
        except WrongBody:  # an older database may need what was removed
            continue
        envelope = envelope_of(directory, row.place.segment, queue_id)
        records.append(JournalRecord(envelope.kind, queue_id, envelope.envelope, body))
    if not records:
        return "", {}
    new, positions, _ = write_copy(directory, SPOOL, records)
    return new, {queue_id: Place(new, position) for queue_id, position in positions.items()}


def envelope_of(directory: JournalDirectory, segment: str, queue_id: str) -> JournalRecord:
    """The record of a message in a segment."""
    file = directory.open_segment(segment)
    assert file is not None
    try:
        for item in scan(file, SegmentHeader(segment, SPOOL, 0, "")):
            if isinstance(item, ScannedBatch):
                for record in item.records:
                    if record.queue_id == queue_id:
                        return record
    finally:
        file.close()
    raise AssertionError(f"{queue_id} is not in segment {segment}")


def move_rows(
    database: ModelDatabase, new: str, old: dict[str, ModelMessage], places: dict[str, Place]
) -> None:
    """Rows that are still where they were get their new places."""
    database.segments.setdefault(new, ModelSegmentRow(SEGMENT_SIZE, sealed=True))
    for queue_id, place in places.items():
        row = database.messages.get(queue_id)
        if row is not None and row.needed and row.place == old[queue_id].place:
            row.place = place


# The operator


def rebuild(disk: SimulatedDisk, database: ModelDatabase) -> None:
    """What `fsck --rebuild` does while nothing else runs: whatever the database lacks gets rows
    that are held, and what may have been delivered is held."""
    process = disk.start_process()
    directory = SimulatedDirectory(process)
    voids = voided_batches(directory)
    found: dict[str, ModelMessage] = {}
    segments: dict[str, int] = {}
    for segment, name in directory.segments(OWNED, ADOPTED, COPY):
        file = directory.open(name, write=True)
        file.sync()  # its owner may have ended before its sync
        limit = voided_position(voids, segment)
        for item in scan(file, SegmentHeader(segment, SPOOL, 0, ""), end=limit):
            if isinstance(item, ScannedBatch):
                found |= rows_of(segment, item.records)
        segments[segment] = file.size()
    mark = max(disk.mark, database.mark) + 1
    for segment, end in segments.items():
        database.segments[segment] = ModelSegmentRow(end, sealed=True)
    for row in database.messages.values():
        row.held = True
    for queue_id, row in found.items():
        row.held = True
        database.insert(queue_id, row)
        if database.messages[queue_id].place.segment not in segments:
            database.messages[queue_id].place = row.place
    database.mark = disk.mark = disk.durable_mark = mark
    process.kill()
