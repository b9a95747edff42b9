"""Reads a segment from end to end: its batches, its records, and what is damaged.

A batch that does not verify is either a torn tail, the batch that was being written when the power
failed, or corruption. A batch is written only after the one before it was synced, so a later batch
that verifies proves that the damage is corruption. Reading then goes on at that batch.

A header costs only what it describes: behind a damaged one the octets are searched for the next
record that verifies. Its checksum knows segment and position, so a body cannot imitate one.

A block that the disk cannot read is damage too. It is never a torn tail, because what it holds is
not known, and it may be readable later.

What must stay true: every record that verifies is found, whatever is damaged around it; only
between blocks that the disk cannot read some may be passed over, to bound the time
(`relay.spool.journal.blockwise`).
"""

import errno
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from relay.spool.journal.blockwise import BlockwiseReader
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
    batch_size,
    decode_batch_header,
    decode_record,
    decode_segment_header,
    decode_void,
    record_size,
    verifies,
)

_CHUNK = 1 << 20
_KINDS = frozenset(RecordKind)


class Damage(NamedTuple):
    """Octets of a segment that do not verify. `torn`: the last write was not finished, so no client
    has heard 250 for them. Otherwise they were synced and are corrupt, or `unreadable`: the disk
    cannot give some of them. `record`: the message whose body this is; its envelope verifies."""

    position: int
    end: int
    reason: str
    torn: bool
    unreadable: bool = False
    record: JournalRecord | None = None

    @property
    def hides_messages(self) -> bool:
        """Whether messages may be lost whose envelopes are not known."""
        return not self.torn and self.record is None


type _Bad = tuple[int, int, str, JournalRecord | None]


@dataclass(frozen=True, slots=True)
class ScannedBatch:
    """A batch that stands at `position`. The next one stands at `end` or later."""

    position: int
    end: int
    header: BatchHeader
    records: list[JournalRecord]
    void: VoidedBatch | None
    damages: list[Damage]

    @property
    def without_bodies(self) -> list[tuple[JournalRecord, str]]:
        """The messages whose envelopes verify and whose bodies do not, with the reason."""
        return [
            (damage.record, damage.reason)
            for damage in self.damages
            if damage.record is not None and not damage.torn
        ]

    def shares(self) -> Iterator[tuple[JournalRecord, int]]:
        """Each record, and how many octets of the segment it takes with its part of the batch's
        header and padding."""
        taken, sizes = batch_size(self.records), sum(record.size for record in self.records)
        for record in self.records:
            yield record, record.size * taken // sizes


def read_header(file: SegmentFile) -> SegmentHeader:
    """The header of a segment. Raises JournalFormatError, and OSError."""
    octets = BlockwiseReader(file)
    block = octets.read(BLOCK, 0)
    if octets.lost(0, BLOCK):
        raise OSError(errno.EIO, "the disk cannot read the header")
    return decode_segment_header(block)


def first_void(file: SegmentFile, header: SegmentHeader) -> VoidedBatch | None:
    """The batch of another segment that this segment declares void. It can only stand first. A
    damaged header of its batch does not hide it. Raises OSError if the disk cannot read it."""
    segment, octets = bytes.fromhex(header.segment), BlockwiseReader(file)
    block = octets.read(BLOCK, BLOCK)
    if octets.lost(BLOCK, 2 * BLOCK):
        raise OSError(errno.EIO, "the disk cannot read the first batch")
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
    octets, limit = BlockwiseReader(file), size if end is None else min(end, size)
    position, written_at = start, header.created_at
    while position < limit:
        try:
            batch = decode_batch_header(segment, position, octets.read(BLOCK, position))
        except JournalFormatError as error:
            found = _next_batch(octets, segment, position + BLOCK, size)
            behind = min(found or size, limit)
            content, last = octets.read(behind - position, position), found is None
            begun = octets.lost(position, position + BLOCK) or content.count(0) != len(content)
            if begun or not last:  # else nothing was ever written here
                damage = _damage(octets, (position, behind, str(error), None), torn=last)
                yield _headless_batch(
                    segment, octets, content, damage, written_at, verify=verify_bodies
                )
            position = behind
            continue
        behind = aligned(min(batch.next_position(position), limit))
        content = octets.read(batch.length, position)
        if batch.kind is BatchKind.VOID:
            found_void, bad = _void_of(segment, position, content)
            records: list[JournalRecord] = []
        else:
            found_void = None
            records, bad = _records(segment, position, content, verify=verify_bodies)
        torn = bool(bad) and _next_batch(octets, segment, behind, size) is None
        torn = torn and not octets.lost(behind, size)  # else a later batch may prove the opposite
        damages = [_damage(octets, one, torn=torn) for one in bad]
        yield ScannedBatch(position, behind, batch, records, found_void, damages)
        position, written_at = behind, batch.written_at


def synced(item: ScannedBatch | Damage) -> ScannedBatch | Damage:
    """The same of which the caller knows that it was synced, so none of it is a torn tail."""
    if isinstance(item, Damage):
        return item._replace(torn=False)
    return replace(item, damages=[damage._replace(torn=False) for damage in item.damages])


def batch_headers(file: SegmentFile, header: SegmentHeader) -> Iterator[BatchHeader]:
    """The header of each batch, without its records. Raises OSError."""
    segment, size, position = bytes.fromhex(header.segment), file.size(), BLOCK
    octets = BlockwiseReader(file)
    while position < size:
        try:
            batch = decode_batch_header(segment, position, octets.read(BATCH_HEADER, position))
        except JournalFormatError:
            position = _next_batch(octets, segment, position + BLOCK, size) or size
            continue
        yield batch
        position = batch.next_position(position)


def _void_of(
    segment: bytes, position: int, content: bytes
) -> tuple[VoidedBatch | None, list[_Bad]]:
    try:
        return decode_void(segment, position, content), []
    except JournalFormatError as error:
        return None, [(position, position + BLOCK, str(error), None)]


def _damage(octets: BlockwiseReader, bad: _Bad, *, torn: bool) -> Damage:
    start, end, reason, record = bad
    if octets.lost(start, end):
        reason = f"{reason}: the disk cannot read it"
        return Damage(start, end, reason, torn=False, unreadable=True, record=record)
    return Damage(start, end, reason, torn, record=record)


def _headless_batch(
    segment: bytes,
    octets: BlockwiseReader,
    content: bytes,
    damage: Damage,
    written_at: int,
    *,
    verify: bool,
) -> ScannedBatch | Damage:
    """The records of a batch whose header is damaged. Its time is that of the batch before it."""
    position, end, reason, torn, *_ = damage
    records, bad = _records(segment, position, content, verify=verify)
    spoilt = any(record for *_, record in bad)
    if not records and not spoilt:
        return damage
    header = BatchHeader(end - position, len(records), 0, written_at, BatchKind.RECORDS)
    header_end = position + BATCH_HEADER
    damages = [_damage(octets, (position, header_end, reason, None), torn=torn)]
    for one in bad:
        start, stop, *_ = one
        if octets.lost(start, stop) or any(content[start - position : stop - position]):
            damages.append(_damage(octets, one, torn=torn))
    return ScannedBatch(position, end, header, records, None, damages)


def _records(
    segment: bytes, position: int, content: bytes, *, verify: bool
) -> tuple[list[JournalRecord], list[_Bad]]:
    """The records of a batch, and what of it is damaged."""
    view, length = memoryview(content), len(content)
    records: list[JournalRecord] = []
    bad: list[_Bad] = []
    at = BATCH_HEADER
    while at < length:
        start = position + at
        try:
            record = decode_record(segment, start, view[at:], verify_body=False)
        except JournalFormatError as error:
            size = record_size(segment, start, view[at:])
            at = at + size if size else _next_record(segment, position, content, at + 1)
            bad.append((start, position + min(at, length), str(error), None))
            continue
        at = record.end - position
        if verify and not verifies(segment, record.position, view[record.position - position : at]):
            reason = f"the body of {record.queue_id} is damaged"
            bad.append((start, record.end, reason, record))
        else:
            records.append(record)
    return records, bad


def _next_record(segment: bytes, position: int, content: bytes, at: int) -> int:
    """Where the next record that verifies begins in the octets of a batch; their end if none."""
    view = memoryview(content)
    while (at := content.find(bytes([ENVELOPE_VERSION]), at + 1)) > 0:
        if content[at - 1] in _KINDS and record_size(segment, position + at - 1, view[at - 1 :]):
            return at - 1
    return len(content)


def _next_batch(octets: BlockwiseReader, segment: bytes, position: int, limit: int) -> int | None:
    """The position of the next batch whose header verifies, from a block's position on."""
    while position < limit:
        chunk = memoryview(octets.read(min(_CHUNK, limit - position), position))
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


def scan_shares(file: SegmentFile, header: SegmentHeader) -> Iterator[tuple[JournalRecord, int]]:
    """Every record of a segment, without the check of its body, and its share of the octets. Raises
    OSError, also if the disk cannot read a place where a record may stand: callers remove what they
    do not find."""
    for item in scan(file, header, verify_bodies=False):
        damages = [item] if isinstance(item, Damage) else item.damages
        if any(damage.unreadable for damage in damages):
            raise OSError(errno.EIO, f"the disk cannot read parts of segment {header.segment}")
        if isinstance(item, ScannedBatch):
            yield from item.shares()
