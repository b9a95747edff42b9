"""Writes a copy segment: records of other segments, for compaction.

A copy is as large as its records need. It gets its name when it is synced. Its records have rows
already, so it is read and rebuilt from, and never replayed. It has several batches, and one of them
is in memory at a time.
"""

import errno
import socket
import time
from collections.abc import Buffer, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from relay.ids import new_id
from relay.spool.journal.directory import COPY, NEW, JournalDirectory, SegmentFile
from relay.spool.journal.format import (
    BLOCK,
    JournalRecord,
    SegmentHeader,
    encode_batch,
    encode_segment_header,
)

BATCH_SIZE = 1 << 20
"""Octets of records in a batch, unless one record is larger: who reads the copy reads whole
batches."""


class SegmentCopy(NamedTuple):
    """A copy: its id, the position of each message's body, and its size."""

    segment: str
    positions: dict[str, int]
    end: int


def write_copy(
    directory: JournalDirectory, spool: str, records: Iterable[JournalRecord]
) -> SegmentCopy:
    """A copy of some records, one of each message. Raises OSError, and whatever `records` raises.
    Nothing is left of it then, or if there are no records."""
    segment, now = new_id(), int(time.time() * 1_000_000)
    header = SegmentHeader(segment, spool, now, socket.gethostname(), copy=True)
    positions, end = dict[str, int](), BLOCK
    file = directory.create(segment + NEW)
    try:
        _write(file, [encode_segment_header(header)], 0, BLOCK)
        for batch in _batches(records):
            parts, bodies, behind = encode_batch(
                bytes.fromhex(segment), end, batch, mark=0, written_at=now
            )
            _write(file, parts, end, behind)
            ids = (record.queue_id for record in batch)
            positions.update(zip(ids, bodies, strict=True))
            end = behind
        if positions:
            file.sync()
            directory.rename(segment + NEW, segment + COPY)
            directory.sync()
        else:
            directory.unlink(segment + NEW)
    except BaseException:
        for name in (segment + NEW, segment + COPY):
            with suppress(OSError):
                directory.unlink(name)
        raise
    finally:
        file.close()
    return SegmentCopy(segment, positions, end)


def _batches(records: Iterable[JournalRecord]) -> Iterator[list[JournalRecord]]:
    batch, size = list[JournalRecord](), 0
    for record in records:
        if batch and size + record.size > BATCH_SIZE:
            yield batch
            batch, size = [], 0
        batch.append(record)
        size += record.size
    if batch:
        yield batch


def _write(file: SegmentFile, parts: Sequence[Buffer], start: int, end: int) -> None:
    """Write everything, in one call: the parts may be more than one call takes."""
    if file.write([b"".join(parts)], start) != end - start:
        raise OSError(errno.ENOSPC, "a short write")
