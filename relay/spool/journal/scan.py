"""Reads a segment from end to end: its batches, its records, and what is damaged.

A batch that does not verify is either a torn tail, the batch that was being written when the power
failed, or corruption. A batch is written only after the one before it was synced, so a later batch
that verifies proves that the damage is corruption. Reading then goes on at that batch.

What must stay true: every record that verifies is found, whatever is damaged around it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from relay.spool.journal.directory import SegmentFile
from relay.spool.journal.format import (
    BATCH_HEADER,
    BLOCK,
    BatchHeader,
    BatchKind,
    FormatError,
    JournalRecord,
    SegmentHeader,
    VoidedBatch,
    aligned,
    decode_batch_header,
    decode_record,
    decode_segment_header,
    decode_void,
    record_size,
)

_CHUNK = 1 << 20


class Damage(NamedTuple):
    """Octets of a segment that do not verify. `torn`: the last write was not finished, so no client
    has heard 250 for them. Otherwise they were synced and are corrupt."""

    position: int
    end: int
    reason: str
    torn: bool


@dataclass(frozen=True, slots=True)
class ScannedBatch:
    """A batch that stands at `position`. The next one stands at `end` or later."""

    position: int
    end: int
    header: BatchHeader
    records: list[JournalRecord]
    void: VoidedBatch | None
    damages: list[Damage]


def read_header(file: SegmentFile) -> SegmentHeader:
    """The header of a segment. Raises FormatError, and OSError."""
    return decode_segment_header(file.read(BLOCK, 0))


def first_void(file: SegmentFile, header: SegmentHeader) -> VoidedBatch | None:
    """The batch of another segment that this segment declares void. It can only stand first."""
    segment = bytes.fromhex(header.segment)
    block = file.read(BLOCK, BLOCK)
    try:
        if decode_batch_header(segment, BLOCK, block).kind is BatchKind.VOID:
            return decode_void(segment, BLOCK, block)
    except FormatError:
        pass
    return None


def scan(
    file: SegmentFile,
    header: SegmentHeader,
    start: int = BLOCK,
    end: int | None = None,
    *,
    verify_bodies: bool = True,
) -> Iterator[ScannedBatch | Damage]:
    """The batches of a segment from a batch's position on, up to `end`, in order. Damage between
    two batches comes by itself; damage inside of a batch stands in the batch. Raises OSError."""
    segment = bytes.fromhex(header.segment)
    limit = file.size() if end is None else end
    position = start
    while position < limit:
        try:
            batch = decode_batch_header(segment, position, file.read(BLOCK, position))
        except FormatError as error:
            found = _next_batch(file, segment, position + BLOCK, limit)
            if found is not None:
                yield Damage(position, found, str(error), torn=False)
            elif any(file.read(BLOCK, position)):  # zeros: nothing was ever written here
                yield Damage(position, limit, str(error), torn=True)
            position = limit if found is None else found
            continue
        behind = min(batch.next_position(position), aligned(limit))
        octets = file.read(batch.length, position)
        if batch.kind is BatchKind.VOID:
            yield _void_batch(segment, position, behind, batch, octets)
        else:
            yield _record_batch(
                file, segment, position, behind, limit, batch, octets, verify_bodies=verify_bodies
            )
        position = behind


def _void_batch(
    segment: bytes, position: int, end: int, header: BatchHeader, octets: bytes
) -> ScannedBatch:
    try:
        void = decode_void(segment, position, octets)
    except FormatError as error:
        torn = Damage(position, end, str(error), torn=True)
        return ScannedBatch(position, end, header, [], None, [torn])
    return ScannedBatch(position, end, header, [], void, [])


def _record_batch(
    file: SegmentFile,
    segment: bytes,
    position: int,
    end: int,
    limit: int,
    header: BatchHeader,
    octets: bytes,
    *,
    verify_bodies: bool,
) -> ScannedBatch:
    view = memoryview(octets)
    records: list[JournalRecord] = []
    bad: list[tuple[int, int, str]] = []
    at = BATCH_HEADER
    for _ in range(header.records):
        try:
            record = decode_record(segment, position + at, view[at:], verify_body=verify_bodies)
            records.append(record)
            at = record.end - position
        except FormatError as error:
            size = record_size(segment, position + at, view[at:])
            bad.append((position + at, position + at + size if size else end, str(error)))
            if not size:  # nothing tells where the next record begins
                break
            at += size
    torn = bool(bad) and _next_batch(file, segment, end, limit) is None
    damages = [Damage(start, stop, reason, torn) for start, stop, reason in bad]
    return ScannedBatch(position, end, header, records, None, damages)


def _next_batch(file: SegmentFile, segment: bytes, position: int, limit: int) -> int | None:
    """The position of the next batch whose header verifies, from a block's position on."""
    while position < limit:
        chunk = memoryview(file.read(min(_CHUNK, limit - position), position))
        if not chunk:
            return None
        for at in range(0, len(chunk), BLOCK):
            try:
                decode_batch_header(segment, position + at, chunk[at : at + BLOCK])
            except FormatError:
                continue
            return position + at
        position += aligned(len(chunk))
    return None


def scan_ids(file: SegmentFile, header: SegmentHeader) -> Iterator[JournalRecord]:
    """Every record of a segment, without the check of its body."""
    for item in scan(file, header, verify_bodies=False):
        if isinstance(item, ScannedBatch):
            yield from item.records
