"""Reads a segment from end to end: its batches, its records, and what is damaged.

A batch that does not verify is either a torn tail, the batch that was being written when the power
failed, or corruption. A batch is written only after the one before it was synced, so a later batch
that verifies proves that the damage is corruption. Reading then goes on at that batch.

A header costs only what it describes: behind a damaged one the octets are searched for the next
record that verifies. Its checksum knows segment and position, so a body cannot imitate one.

What must stay true: every record that verifies is found, whatever is damaged around it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from relay.spool.journal.directory import SegmentFile
from relay.spool.journal.format import (
    BATCH_HEADER,
    BLOCK,
    ENVELOPE_VERSION,
    BatchHeader,
    BatchKind,
    JournalFormatError,
    JournalRecord,
    RecordKind,
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
_KINDS = frozenset(RecordKind)


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
    """The header of a segment. Raises JournalFormatError, and OSError."""
    return decode_segment_header(file.read(BLOCK, 0))


def first_void(file: SegmentFile, header: SegmentHeader) -> VoidedBatch | None:
    """The batch of another segment that this segment declares void. It can only stand first. A
    damaged header of its batch does not hide it. Raises OSError."""
    segment, block = bytes.fromhex(header.segment), file.read(BLOCK, BLOCK)
    try:
        if decode_batch_header(segment, BLOCK, block).kind is not BatchKind.VOID:
            return None
    except JournalFormatError:
        pass
    try:
        return decode_void(segment, BLOCK, block)
    except JournalFormatError:
        return None


def scan(
    file: SegmentFile,
    header: SegmentHeader,
    start: int = BLOCK,
    end: int | None = None,
    *,
    verify_bodies: bool = True,
) -> Iterator[ScannedBatch | Damage]:
    """The batches of a segment from a batch's position on, up to `end`, in order.

    Damage inside of a batch stands in the batch, other damage comes by itself. A batch whose header
    is damaged comes with the records that were found, and may contain the ones behind it whose
    headers are damaged too. Raises OSError.
    """
    segment, size = bytes.fromhex(header.segment), file.size()
    limit = size if end is None else min(end, size)
    position, written_at = start, header.created_at
    while position < limit:
        try:
            batch = decode_batch_header(segment, position, file.read(BLOCK, position))
        except JournalFormatError as error:
            found = _next_batch(file, segment, position + BLOCK, size)
            behind = min(found or size, limit)
            octets = file.read(behind - position, position)
            if found or octets.count(0) != len(octets):  # else nothing was ever written here
                damage = Damage(position, behind, str(error), torn=found is None)
                yield _headless_batch(segment, octets, damage, written_at, verify=verify_bodies)
            position = behind
            continue
        behind = aligned(min(batch.next_position(position), limit))
        octets = file.read(batch.length, position)
        if batch.kind is BatchKind.VOID:
            found_void, bad = _void_of(segment, position, octets)
            records: list[JournalRecord] = []
        else:
            found_void = None
            records, bad = _records(segment, position, octets, batch.length, verify=verify_bodies)
        torn = bool(bad) and _next_batch(file, segment, behind, size) is None
        damages = [Damage(*where, torn) for where in bad]
        yield ScannedBatch(position, behind, batch, records, found_void, damages)
        position, written_at = behind, batch.written_at


def batch_headers(file: SegmentFile, header: SegmentHeader) -> Iterator[BatchHeader]:
    """The header of each batch, without its records. Raises OSError."""
    segment, size, position = bytes.fromhex(header.segment), file.size(), BLOCK
    while position < size:
        try:
            batch = decode_batch_header(segment, position, file.read(BATCH_HEADER, position))
        except JournalFormatError:
            position = _next_batch(file, segment, position + BLOCK, size) or size
            continue
        yield batch
        position = batch.next_position(position)


def _void_of(
    segment: bytes, position: int, octets: bytes
) -> tuple[VoidedBatch | None, list[tuple[int, int, str]]]:
    try:
        return decode_void(segment, position, octets), []
    except JournalFormatError as error:
        return None, [(position, position + BLOCK, str(error))]


def _headless_batch(
    segment: bytes, octets: bytes, damage: Damage, written_at: int, *, verify: bool
) -> ScannedBatch | Damage:
    """The records of a batch whose header is damaged. Its time is that of the batch before it."""
    position, end, reason, torn = damage
    records, bad = _records(segment, position, octets, len(octets), verify=verify)
    if not records:
        return damage
    header = BatchHeader(end - position, len(records), 0, written_at, BatchKind.RECORDS)
    damages = [Damage(position, position + BATCH_HEADER, reason, torn)]
    for start, stop, why in bad:
        if any(octets[start - position : stop - position]):
            damages.append(Damage(start, stop, why, torn))
    return ScannedBatch(position, end, header, records, None, damages)


def _records(
    segment: bytes, position: int, octets: bytes, length: int, *, verify: bool
) -> tuple[list[JournalRecord], list[tuple[int, int, str]]]:
    """The records of a batch, and start, end and reason of what is damaged."""
    view = memoryview(octets)
    records: list[JournalRecord] = []
    bad: list[tuple[int, int, str]] = []
    at = BATCH_HEADER
    while at < length:
        try:
            record = decode_record(segment, position + at, view[at:], verify_body=verify)
        except JournalFormatError as error:
            size = record_size(segment, position + at, view[at:])
            behind = at + size if size else _next_record(segment, position, octets, at + 1)
            bad.append((position + at, position + min(behind, length), str(error)))
            at = behind
        else:
            records.append(record)
            at = record.end - position
    return records, bad


def _next_record(segment: bytes, position: int, octets: bytes, at: int) -> int:
    """Where the next record that verifies begins in the octets of a batch; their end if none."""
    view = memoryview(octets)
    while (at := octets.find(bytes([ENVELOPE_VERSION]), at + 1)) > 0:
        if octets[at - 1] in _KINDS and record_size(segment, position + at - 1, view[at - 1 :]):
            return at - 1
    return len(octets)


def _next_batch(file: SegmentFile, segment: bytes, position: int, limit: int) -> int | None:
    """The position of the next batch whose header verifies, from a block's position on."""
    while position < limit:
        chunk = memoryview(file.read(min(_CHUNK, limit - position), position))
        if not chunk:
            return None
        for at in range(0, len(chunk), BLOCK):
            try:
                decode_batch_header(segment, position + at, chunk[at : at + BLOCK])
            except JournalFormatError:
                continue
            return position + at
        position += aligned(len(chunk))
    return None


def scan_ids(file: SegmentFile, header: SegmentHeader) -> Iterator[JournalRecord]:
    """Every record of a segment, without the check of its body."""
    for item in scan(file, header, verify_bodies=False):
        if isinstance(item, ScannedBatch):
            yield from item.records
