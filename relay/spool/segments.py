"""Removes segments that no delivery needs, and compacts those of which little is needed.

`SegmentStore.turn` looks at the sealed segments that are due. One statement over the range of its
ids tells that a segment has no unfinished delivery, which is the rule for mail that is delivered at
once. Otherwise the ids in the file are compared with the rows. A segment of which less than a
quarter has been needed for ten minutes is compacted: what is needed of several goes to one copy.

What must stay true:
- a segment is removed only if no delivery needs a record of it, and no record lacks its row that is
  younger than the retention of rows, because its rows may have been lost;
- the file is unlinked and the directory synced before the row of the segment goes, so a crash in
  between leaves a row without a file, which the next turn removes;
- a copy is synced under its name before any row points to it, and a row moves only if it still
  points to the old place; the old segment is looked at afresh before it goes;
- the mark of the spool rises, and is on the disk, before a segment goes whose bodies may have been
  moved: a restored database that has the old places must be noticed (`relay.spool.mark`), and the
  copy, to which no row of it points, must not be taken for a leftover;
- a segment that declares a batch void outlives the segment of that batch.
"""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from sqlalchemy import Connection, Engine

from relay.db.engine import reading, writing
from relay.db.sql import Queries
from relay.ids import dashed
from relay.log import get_logger
from relay.spool.journal.adoption import voided_batches, voided_from
from relay.spool.journal.copying import write_copy
from relay.spool.journal.directory import ADOPTED, COPY, OWNED, JournalDirectory, SegmentFile
from relay.spool.journal.format import (
    CHECKSUM_SIZE,
    JournalFormatError,
    JournalRecord,
    Place,
    SegmentHeader,
    decode_record,
)
from relay.spool.journal.scan import first_void, read_header, scan_ids
from relay.spool.mark import SpoolMark

log = get_logger(__name__)
LOOKS = 64  # segments in a turn
LONGEST = 600.0  # seconds between two looks at a segment
SPARSE = 0.25  # less than so much of the segment is needed
SPARSE_SECONDS = 600.0
COPY_SIZE = 8 << 20
"""Bytes of bodies that one turn copies at most, which bounds the rate of compaction."""


class LiveBody(NamedTuple):
    """A body in a segment: its message, its place, its record, its size, and whether its message
    has a row."""

    queue_id: str
    position: int
    record: int
    size: int
    has_row: bool = False


class _Due(NamedTuple):
    """A sealed segment to look at. `sparse`: for so many seconds little of it has been needed."""

    id: str
    messages: int | None
    least: str | None
    greatest: str | None
    sparse: float | None


class CleaningTurn(NamedTuple):
    """How many segments a turn removed, and how many bodies it copied."""

    removed: int = 0
    copied: int = 0


class BodyMove(NamedTuple):
    """A body that was copied: its message, its old place, and its position in the copy."""

    queue_id: str
    old: Place
    position: int


def move_bodies(engine: Engine, connection: Connection, copy: str, moves: list[BodyMove]) -> None:
    """Point rows to a copy, in the caller's transaction; a row whose body is not at its old place
    any more stays as it is."""
    listed = [
        {
            "id": dashed(move.queue_id),
            "old_segment": dashed(move.old.segment),
            "old_position": move.old.position,
            "position": move.position,
        }
        for move in moves
    ]
    Queries(engine, __name__).run(
        connection, "move_bodies", segment=dashed(copy), moves=json.dumps(listed)
    )


class SegmentStore:
    """The sealed segments of a spool; `spool` is its identity. Rows of finished messages stay for
    `retention` seconds."""

    def __init__(
        self, engine: Engine, directory: JournalDirectory, spool: str, retention: float
    ) -> None:
        self._engine, self._directory, self._spool = engine, directory, spool
        self._retention = retention
        self._queries = Queries(engine, __name__)
        self._moves_covered = False  # in this turn

    def turn(self) -> CleaningTurn:
        """Look at the segments that are due. Raises OSError and the database's errors; the next
        turn goes on."""
        self._moves_covered = False
        removed, sparse = 0, dict[str, list[LiveBody]]()
        for due in self._due():
            if self._all_finished(due):
                removed += self._remove(due.id)
                continue
            with self._opened(due.id) as file:
                needed = self._needed(due.id, file) if file else []
                size = file.size() if file else 0
            if not needed:
                self._cover_moves()
                removed += self._remove(due.id)
                continue
            live = sum(body.size for body in needed)
            # A record without a row cannot be moved, so its segment stays as it is.
            movable = all(body.has_row for body in needed)
            if movable and live < SPARSE * size and (due.sparse or 0.0) >= SPARSE_SECONDS:
                sparse[due.id] = needed
            self._looked_at(due.id, live, sparse=live < SPARSE * size)
        return CleaningTurn(removed, self._compact(sparse))

    def usage(self) -> tuple[int, int]:
        """How many sealed segments there are, and the bytes in them that deliveries needed when
        they were looked at last."""
        with reading(self._engine) as connection:
            row = self._queries.run(connection, "total_live").one()
        return row.segments, int(row.live)

    def remove_unused_copies(self, older_than: float = 3600.0) -> int:
        """Remove copies without a row that no message points to: a compaction was interrupted. The
        number of them. A younger one may be about to get its row."""
        with reading(self._engine) as connection:
            known = {*self._queries.run(connection, "known_segments").scalars()}
        removed = 0
        for segment, _ in [*self._directory.segments(COPY)]:
            with self._opened(segment) as file:
                if segment in known or file is None or not file.lock():
                    continue
                if time.time() - read_header(file).created_at / 1e6 < older_than:
                    continue
                if not self._needed(segment, file, missing=False):
                    removed += self._remove(segment)
        return removed

    def _due(self) -> list[_Due]:
        with reading(self._engine) as connection:
            rows = self._queries.run(connection, "due_segments", longest=LONGEST, most=LOOKS)
            return [_Due(*row) for row in rows]

    def _all_finished(self, due: _Due) -> bool:
        if due.least is None or due.greatest is None:
            return False
        with reading(self._engine) as connection:
            row = self._queries.run(
                connection,
                "unfinished_between",
                segment=dashed(due.id),
                least=dashed(due.least),
                greatest=dashed(due.greatest),
            ).one()
        return row.messages == due.messages and not row.unfinished

    def _needed(self, segment: str, file: SegmentFile, *, missing: bool = True) -> list[LiveBody]:
        """The bodies of a segment that deliveries need. `missing`: also those whose rows may have
        been lost."""
        void_from = voided_from(voided_batches(self._directory), segment)
        bodies = {
            (record.queue_id, record.position): LiveBody(
                record.queue_id,
                record.position,
                record.start,
                len(memoryview(record.body)),
            )
            for record in scan_ids(file, SegmentHeader(segment, "", 0, ""))
            if record.in_journal and record.start < void_from
        }
        records = [{"id": dashed(one), "position": position} for one, position in bodies]
        with reading(self._engine) as connection:
            now = self._queries.run(connection, "now").scalar()
            oldest = max(0, int((now - self._retention) * 1000)) << 80 if missing else 2**128 - 1
            rows = self._queries.run(
                connection,
                "needs",
                segment=dashed(segment),
                records=json.dumps(records),
                oldest=dashed(f"{oldest:032x}"),
            )
            return [
                bodies[one, position]._replace(has_row=bool(has_row))
                for one, position, has_row in rows
            ]

    def _looked_at(self, segment: str, live: int, *, sparse: bool) -> None:
        with writing(self._engine) as connection:
            self._queries.run(
                connection, "looked_at", segment=dashed(segment), live=live, sparse=sparse
            )

    def _cover_moves(self) -> None:
        """A segment whose messages all have their rows, and here, goes without it: also when the
        disk is so full that the mark cannot be written."""
        if not self._moves_covered:
            SpoolMark(self._directory, self._spool).cover(self._engine)
            self._moves_covered = True

    def _remove(self, segment: str) -> bool:
        """Remove a segment, unless it declares a batch void whose segment is still there."""
        with self._opened(segment) as file:
            if file is not None and self._must_outlive(segment, file):
                self._looked_at(segment, 0, sparse=False)
                return False
        for suffix in (OWNED, ADOPTED, COPY):
            with suppress(FileNotFoundError):
                self._directory.unlink(segment + suffix)
        self._directory.sync()
        with writing(self._engine) as connection:
            self._queries.run(connection, "delete_segment", segment=dashed(segment))
        return True

    def _must_outlive(self, segment: str, file: SegmentFile) -> bool:
        """Whether the batch that a segment declares void is still there."""
        # Checksums contain the id of the segment, so its name is enough.
        void = first_void(file, SegmentHeader(segment, "", 0, ""))
        if void is None:
            return False
        voided = self._directory.open_segment(void.segment)
        if voided is not None:
            voided.close()
            return True
        self._directory.sync()  # its removal must be durable first
        return False

    def _compact(self, sparse: dict[str, list[LiveBody]]) -> int:
        """Copy what is needed of some segments; the number of bodies."""
        chosen, size = list[tuple[str, LiveBody]](), 0
        for segment, bodies in sparse.items():
            size += sum(body.size for body in bodies)
            if chosen and size > COPY_SIZE:
                break
            chosen += [(segment, body) for body in bodies]
        records = list(self._read(chosen))
        if not records:
            return 0
        copy, positions, end = write_copy(
            self._directory, self._spool, [record for _, _, record in records]
        )
        moves = [
            BodyMove(body.queue_id, Place(segment, body.position), position)
            for (segment, body, _), position in zip(records, positions, strict=True)
        ]
        segments = {segment for segment, _, _ in records}
        with writing(self._engine) as connection:
            self._queries.run(
                connection,
                "insert_copy",
                segment=dashed(copy),
                end=end,
                count=len(records),
                live=sum(body.size for _, body, _ in records),
            )
            move_bodies(self._engine, connection, copy, moves)
            self._queries.run(
                connection, "recheck", ids=json.dumps([dashed(segment) for segment in segments])
            )
        log.info("segments compacted", segments=len(segments), copy=copy, bodies=len(records))
        return len(records)

    def _read(
        self, bodies: Iterable[tuple[str, LiveBody]]
    ) -> Iterator[tuple[str, LiveBody, JournalRecord]]:
        """The records of bodies. One that does not verify stays where it is."""
        for segment, body in bodies:
            with self._opened(segment) as file:
                if file is None:
                    continue
                length = body.position - body.record + body.size + CHECKSUM_SIZE
                octets = file.read(length, body.record)
                try:
                    record = decode_record(bytes.fromhex(segment), body.record, octets)
                except JournalFormatError as error:
                    log.error("body not copied", id=body.queue_id, reason=str(error))
                    continue
            yield segment, body, record

    @contextmanager
    def _opened(self, segment: str) -> Iterator[SegmentFile | None]:
        """A segment's file; None if it is gone."""
        file = self._directory.open_segment(segment)
        try:
            yield file
        finally:
            if file is not None:
                file.close()
