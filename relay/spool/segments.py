"""Removes segments that no delivery needs, and compacts those of which little is needed.

`SegmentStore.turn` looks at the sealed segments that are due. One statement over the range of its
ids tells that a segment has no unfinished delivery, which is the rule for mail that is delivered at
once. Otherwise the ids in the file are compared with the rows. A segment of which less than a
quarter has been needed for ten minutes is compacted: what is needed of several goes to one copy.
A needed record counts with its envelope, and with its part of its batch's padding. So a segment of
which all is needed is never compacted, and a copy is compacted again only when mail in it is done.

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
- a segment that declares a batch void outlives the segment of that batch;
- a segment that fails, or waits, does not keep the others from their turn.
"""

import errno
import json
import time
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import groupby
from typing import NamedTuple

from sqlalchemy import Connection, Engine

from relay.db.engine import reading, writing
from relay.db.sql import Queries
from relay.ids import dashed, made_at
from relay.log import first_line, get_logger
from relay.spool.journal.adoption import voided_batches, voided_from
from relay.spool.journal.copying import write_copy
from relay.spool.journal.directory import ADOPTED, COPY, OWNED, JournalDirectory, SegmentFile
from relay.spool.journal.format import (
    BLOCK,
    JournalFormatError,
    JournalRecord,
    Place,
    SegmentHeader,
    VoidedBatch,
    decode_record,
)
from relay.spool.journal.scan import Damage, first_void, scan, scan_shares
from relay.spool.mark import SpoolMark

log = get_logger(__name__)
LOOKS = 64  # segments in a turn
LONGEST = 600.0  # seconds between two looks at a segment
SPARSE = 0.25  # less than so much of the segment is needed
SPARSE_SECONDS = 600.0
COPY_SIZE = 8 << 20
"""Octets of records that one turn copies at most, which bounds the rate of compaction."""


class LiveRecord(NamedTuple):
    """A record whose body is needed. `position` is the body's, and `start` the record's. `share`:
    the octets that it takes with its part of the padding; `has_row`: its message has a row."""

    queue_id: str
    position: int
    start: int
    size: int
    share: int
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


class _Selection:
    """The records that a turn copies, with their segments: COPY_SIZE octets, or one record.
    `waiting`: segments of which not everything fits."""

    def __init__(self) -> None:
        self.records: list[tuple[str, LiveRecord]] = []
        self.waiting: list[str] = []
        self._size = 0

    @property
    def full(self) -> bool:
        """Whether something did not fit."""
        return bool(self.waiting)

    def add(self, segment: str, records: Collection[LiveRecord]) -> None:
        """Take as many records of a segment as fit."""
        for record in records:
            if self.records and self._size + record.size > COPY_SIZE:
                self.waiting.append(segment)
                return
            self.records.append((segment, record))
            self._size += record.size


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
        self._queries = Queries(engine, __name__, longest=LONGEST)
        self._moves_covered = False  # in this turn

    def turn(self) -> CleaningTurn:
        """Look at the segments that are due. One that fails is logged, and a later turn looks at it
        again. Raises the database's errors, and OSError if no copy can be written."""
        self._moves_covered = False
        removed, selection, due = 0, _Selection(), self._due()
        # Those of due segments were declared before: a segment is sealed after its last write.
        voids = voided_batches(self._directory) if due else set()
        for one in due:
            try:
                removed += self._look_at(one, voids, selection)
            except Exception as error:
                self._run_for("postpone", [one.id])  # raises if the database is away
                log.error("segment not checked", segment=one.id, reason=first_line(error))
        self._run_for("look_again", selection.waiting)
        return CleaningTurn(removed, self._compact(selection.records))

    def usage(self) -> tuple[int, int]:
        """How many sealed segments there are, and the bytes in them that deliveries needed when
        they were looked at last."""
        with reading(self._engine) as connection:
            row = self._queries.run(connection, "total_live").one()
        return row.segments, int(row.live)

    def remove_unused_copies(self, older_than: float = 3600.0) -> int:
        """Remove copies without a row that no message points to: a compaction was interrupted. The
        number of them. A younger one may be about to get its row. One that fails is logged."""
        with reading(self._engine) as connection:
            known = {*self._queries.run(connection, "known_segments").scalars()}
        removed = 0
        for segment, name in [*self._directory.segments(COPY)]:
            if segment in known or time.time() - made_at(segment) < older_than:
                continue
            try:
                removed += self._remove_unused(segment, name)
            except Exception as error:
                log.error("segment not checked", segment=segment, reason=first_line(error))
        return removed

    def _remove_unused(self, segment: str, name: str) -> bool:
        try:
            file = self._directory.open(name, write=True)  # NFS locks for a writer only
        except FileNotFoundError:
            return False
        with closing(file):
            return file.lock() and not self._needed(segment, file, set()) and self._remove(segment)

    def _due(self) -> list[_Due]:
        with reading(self._engine) as connection:
            rows = self._queries.run(connection, "due_segments", most=LOOKS)
            return [_Due(*row) for row in rows]

    def _look_at(self, due: _Due, voids: set[VoidedBatch], selection: _Selection) -> bool:
        """Remove a segment if nothing of it is needed; whether it was. Select what must be copied
        first. Raises OSError and the database's errors."""
        if self._all_finished(due):
            return self._remove(due.id)
        long_sparse = (due.sparse or 0.0) >= SPARSE_SECONDS
        if long_sparse and selection.full:  # a scan for nothing
            selection.waiting.append(due.id)
            return False
        with self._opened(due.id) as file:
            needed = self._needed(due.id, file, voids) if file else []
            size = file.size() if file else 0
            if file and not needed and self._hides_body(due, file):
                raise OSError(errno.EIO, "a part that may be needed is damaged")
        if not needed:
            self._cover_moves()
            return self._remove(due.id)
        live = sum(record.share for record in needed)
        sparse = live < SPARSE * size
        self._looked_at(due.id, live, sparse=sparse)
        # A record without a row cannot be moved, so its segment stays as it is.
        movable = all(record.has_row for record in needed)
        if movable and sparse and long_sparse:
            selection.add(due.id, needed)
        return False

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

    def _needed(self, segment: str, file: SegmentFile, voids: set[VoidedBatch]) -> list[LiveRecord]:
        """The records of a segment whose bodies deliveries need, or whose rows may have been
        lost."""
        void_from = voided_from(voids, segment)
        bodies = {
            (record.queue_id, record.position): LiveRecord(
                record.queue_id, record.position, record.start, record.size, share
            )
            for record, share in scan_shares(file, SegmentHeader(segment, "", 0, ""))
            if record.in_journal and record.start < void_from
        }
        records = [{"id": dashed(one), "position": position} for one, position in bodies]
        with reading(self._engine) as connection:
            now = self._queries.run(connection, "now").scalar()
            oldest = max(0, int((now - self._retention) * 1000)) << 80
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

    def _hides_body(self, due: _Due, file: SegmentFile) -> bool:
        """Whether a delivery needs a body whose record was not found, because the envelope is
        damaged. The rows of a copy are too far apart for a query: there all damage counts."""
        if due.least and due.greatest:
            with reading(self._engine) as connection:
                found = self._queries.run(
                    connection,
                    "needed_in",
                    segment=dashed(due.id),
                    least=dashed(due.least),
                    greatest=dashed(due.greatest),
                )
                return bool(found.scalar())
        header = SegmentHeader(due.id, "", 0, "")
        return bool(due.messages) and any(
            isinstance(item, Damage) or item.damages
            for item in scan(file, header, verify_bodies=False)
        )

    def _looked_at(self, segment: str, live: int, *, sparse: bool) -> None:
        with writing(self._engine) as connection:
            self._queries.run(
                connection, "looked_at", segment=dashed(segment), live=live, sparse=sparse
            )

    def _run_for(self, statement: str, segments: Collection[str]) -> None:
        if segments:
            ids = json.dumps([dashed(segment) for segment in segments])
            with writing(self._engine) as connection:
                self._queries.run(connection, statement, ids=ids)

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
        return void is not None and not self._directory.is_gone(void.segment)

    def _compact(self, chosen: list[tuple[str, LiveRecord]]) -> int:
        """Copy some records of some segments; how many were copied."""
        if not chosen:
            return 0
        copy = write_copy(self._directory, self._spool, self._read(chosen))
        moves = [
            BodyMove(
                record.queue_id, Place(segment, record.position), copy.positions[record.queue_id]
            )
            for segment, record in chosen
            if record.queue_id in copy.positions
        ]
        if not moves:
            return 0
        segments = {move.old.segment for move in moves}
        with writing(self._engine) as connection:
            self._queries.run(
                connection,
                "insert_copy",
                segment=dashed(copy.segment),
                end=copy.end,
                count=len(moves),
                live=copy.end - BLOCK,
            )
            move_bodies(self._engine, connection, copy.segment, moves)
            self._queries.run(
                connection, "recheck", ids=json.dumps([dashed(segment) for segment in segments])
            )
        log.info("segments compacted", segments=len(segments), copy=copy.segment, bodies=len(moves))
        return len(moves)

    def _read(self, chosen: list[tuple[str, LiveRecord]]) -> Iterator[JournalRecord]:
        """The records, one after the other. One that cannot be read, or does not verify, stays
        where it is."""
        for segment, records in groupby(chosen, key=lambda one: one[0]):
            with self._opened(segment) as file:
                if file is None:
                    continue
                for _, record in records:
                    try:
                        octets = file.read(record.size, record.start)
                        read = decode_record(bytes.fromhex(segment), record.start, octets)
                    except (OSError, JournalFormatError) as error:
                        log.error("body not copied", id=record.queue_id, reason=str(error))
                    else:
                        yield read

    @contextmanager
    def _opened(self, segment: str) -> Iterator[SegmentFile | None]:
        """A segment's file; None if it is gone."""
        file = self._directory.open_segment(segment)
        try:
            yield file
        finally:
            if file is not None:
                file.close()
