"""The layout of a segment. Pure code: bytes in, bytes out.

A segment is a file of SEGMENT_SIZE octets, zeros at first. It begins with a header of one block,
and batches follow, each from the start of a block. A batch has a header and its records; a record
has a header, an envelope, a body and the body's checksum. All numbers are little-endian. A checksum
is a CRC-32 that begins with the segment's id and the position of what it covers, so a block of an
older file, or one that was written to the wrong place, never verifies.

What must stay true: a batch is written in one call and synced before the next begins, so a batch
that verifies proves that everything before it was synced. A synced block is never written again.
"""

import struct
from collections.abc import Buffer, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from isal.isal_zlib import crc32  # zlib's takes seven times as long

BLOCK = 4096
"""Octets. Batches start at multiples of it: a disk writes whole sectors, so no write of a later
batch can damage an earlier one."""
SEGMENT_SIZE = 16 << 20
MAX_ENVELOPE = 8 << 20
"""Octets. With the largest body that stands in a record, such an envelope fits a segment."""
ENVELOPE_VERSION = 1
_SEGMENT = struct.Struct("<8sI16s16sQB64s")
_HOST_SIZE = 64
_SEGMENT_MAGIC = b"QMQPjrnl"
_FORMAT = 1
_SECOND_HEADER = BLOCK // 2
_HEADERS = (0, _SECOND_HEADER)
_BATCH = struct.Struct("<4sIIQQB")
_BATCH_MAGIC = b"BTCH"
_RECORD = struct.Struct("<BB16sII")
_VOID = struct.Struct("<16sQ")
_CRC = struct.Struct("<I")
BATCH_HEADER = _BATCH.size + _CRC.size
RECORD_HEADER = _RECORD.size + _CRC.size
RECORD_OVERHEAD = RECORD_HEADER + _CRC.size
CHECKSUM_SIZE = _CRC.size


class JournalFormatError(ValueError):
    """These octets are not what should stand here: they were never written whole, or are spoilt."""


class BatchKind(IntEnum):
    """RECORDS holds messages. VOID says that a batch of another segment does not count, because its
    sync failed and its clients heard that."""

    RECORDS = 1
    VOID = 2


class RecordKind(IntEnum):
    """MESSAGE has its body in the record. LARGE has it in a file of its own."""

    MESSAGE = 1
    LARGE = 2


class SegmentHeader(NamedTuple):
    """The ids are 32 hex digits; `created_at` is in microseconds since 1970; `host` is the name of
    the owner's machine; `copy`: compaction made the segment, so its records have rows already and
    are never replayed."""

    segment: str
    spool: str
    created_at: int
    host: str
    copy: bool = False


class Place(NamedTuple):
    """Where a body stands: the segment's id and the position of its first octet."""

    segment: str
    position: int


class VoidedBatch(NamedTuple):
    """The batch that does not count: its segment and its position."""

    segment: str
    position: int


@dataclass(frozen=True, slots=True)
class JournalRecord:
    """One message: its envelope as `relay.queue.accept` encodes it, and its body (b"" if LARGE).

    `start` is the position of the record, `position` the body's, and `end` that behind the record.
    """

    kind: RecordKind
    queue_id: str
    envelope: bytes
    body: Buffer
    start: int = 0
    position: int = 0
    end: int = 0

    @property
    def in_journal(self) -> bool:
        """Whether the body stands in the record."""
        return self.kind is RecordKind.MESSAGE

    @property
    def size(self) -> int:
        """The octets that the record takes in a batch."""
        return RECORD_OVERHEAD + len(self.envelope) + len(memoryview(self.body))


class BatchHeader(NamedTuple):
    """`length` is the batch's in octets, with this header and without the padding behind it.

    `mark` is the highest mark of the database (`relay.spool.mark`) that was known at that time;
    `written_at` is in microseconds since 1970.
    """

    length: int
    records: int
    mark: int
    written_at: int
    kind: BatchKind

    def next_position(self, position: int) -> int:
        """Where the batch behind this one would stand."""
        return aligned(position + self.length)


def aligned(position: int) -> int:
    """The next start of a block."""
    return -(-position // BLOCK) * BLOCK


def checksum(segment: bytes, position: int, *parts: Buffer) -> int:
    """The CRC-32 of octets at a position of a segment (its id in 16 octets)."""
    value = crc32(position.to_bytes(8, "little"), crc32(segment))
    for part in parts:
        value = crc32(part, value)
    return value


def encode_segment_header(header: SegmentHeader) -> bytes:
    """The first block of a segment. It holds the header twice: a segment needs it."""
    return b"".join(_encode_header_copy(header, at).ljust(_SECOND_HEADER, b"\0") for at in _HEADERS)


def _encode_header_copy(header: SegmentHeader, position: int) -> bytes:
    segment = bytes.fromhex(header.segment)
    fields = _SEGMENT.pack(
        _SEGMENT_MAGIC,
        _FORMAT,
        segment,
        bytes.fromhex(header.spool),
        header.created_at,
        header.copy,
        header.host.encode()[:_HOST_SIZE],
    )
    return fields + _CRC.pack(checksum(segment, position, fields))


def decode_segment_header(block: bytes) -> SegmentHeader:
    """Raises JournalFormatError; the text is for the operator."""
    try:
        return _decode_header_copy(block, 0)
    except JournalFormatError:
        with suppress(JournalFormatError):
            return _decode_header_copy(block, _SECOND_HEADER)
        raise


def _decode_header_copy(block: bytes, position: int) -> SegmentHeader:
    fields = block[position : position + _SEGMENT.size]
    if len(block) < position + _SEGMENT.size + _CRC.size or not fields.startswith(_SEGMENT_MAGIC):
        raise JournalFormatError("no segment of a journal")
    _, version, segment, spool, created_at, copy, host = _SEGMENT.unpack(fields)
    if version != _FORMAT:
        raise JournalFormatError(f"format {version}, which this version of the relay cannot read")
    crc = checksum(segment, position, fields)
    if _CRC.unpack_from(block, position + _SEGMENT.size) != (crc,):
        raise JournalFormatError("the header is damaged")
    name = host.rstrip(b"\0").decode(errors="replace")
    return SegmentHeader(segment.hex(), spool.hex(), created_at, name, bool(copy))


def batch_size(records: Sequence[JournalRecord]) -> int:
    """The octets that a batch of these records takes, with its padding."""
    return aligned(BATCH_HEADER + sum(record.size for record in records))


def encode_batch(
    segment: bytes, position: int, records: Sequence[JournalRecord], *, mark: int, written_at: int
) -> tuple[list[Buffer], list[int], int]:
    """A batch that stands at `position`: its octets with padding, the position of each body, and
    the position behind the padding."""
    parts: list[Buffer] = [b""]
    bodies: list[int] = []
    at = position + BATCH_HEADER
    for record in records:
        size = len(memoryview(record.body))
        fields = _RECORD.pack(
            record.kind,
            ENVELOPE_VERSION,
            bytes.fromhex(record.queue_id),
            len(record.envelope),
            size,
        )
        crc = checksum(segment, at, fields, record.envelope)
        at += RECORD_HEADER + len(record.envelope)
        bodies.append(at)
        parts += (
            fields + _CRC.pack(crc) + record.envelope,
            record.body,
            _CRC.pack(checksum(segment, at, record.body)),
        )
        at += size + CHECKSUM_SIZE
    header = BatchHeader(at - position, len(records), mark, written_at, BatchKind.RECORDS)
    parts[0] = _encode_batch_header(segment, position, header)
    end = aligned(at)
    parts.append(bytes(end - at))
    return parts, bodies, end


def encode_void(
    segment: bytes, position: int, void: VoidedBatch, *, mark: int, written_at: int
) -> bytes:
    """The batch that says that another batch does not count; it fills one block."""
    payload = _VOID.pack(bytes.fromhex(void.segment), void.position)
    crc = _CRC.pack(checksum(segment, position + BATCH_HEADER, payload))
    length = BATCH_HEADER + len(payload) + len(crc)
    header = BatchHeader(length, 0, mark, written_at, BatchKind.VOID)
    return (_encode_batch_header(segment, position, header) + payload + crc).ljust(BLOCK, b"\0")


def _encode_batch_header(segment: bytes, position: int, header: BatchHeader) -> bytes:
    fields = _BATCH.pack(
        _BATCH_MAGIC,
        header.length,
        header.records,
        header.mark,
        header.written_at,
        header.kind,
    )
    return fields + _CRC.pack(checksum(segment, position, fields))


def decode_batch_header(segment: bytes, position: int, octets: Buffer) -> BatchHeader:
    """Raises JournalFormatError."""
    view = memoryview(octets)
    if len(view) < BATCH_HEADER or view[: len(_BATCH_MAGIC)] != _BATCH_MAGIC:
        raise JournalFormatError("no batch")
    fields = view[: _BATCH.size]
    if _CRC.unpack_from(view, _BATCH.size) != (checksum(segment, position, fields),):
        raise JournalFormatError("the header of a batch is damaged")
    _, length, count, mark, written_at, kind = _BATCH.unpack(fields)
    return BatchHeader(length, count, mark, written_at, _known(BatchKind, kind))


def _known[Kind: (BatchKind, RecordKind)](kinds: type[Kind], number: int) -> Kind:
    try:
        return kinds(number)
    except ValueError:
        raise JournalFormatError(f"kind {number}, which this version cannot read") from None


def decode_void(segment: bytes, position: int, batch: Buffer) -> VoidedBatch:
    """The batch that a VOID batch names. Raises JournalFormatError."""
    view = memoryview(batch)[BATCH_HEADER : BATCH_HEADER + _VOID.size + _CRC.size]
    if len(view) < _VOID.size + _CRC.size:
        raise JournalFormatError("a void batch is cut off")
    payload = view[: _VOID.size]
    if _CRC.unpack_from(view, _VOID.size) != (checksum(segment, position + BATCH_HEADER, payload),):
        raise JournalFormatError("a void batch is damaged")
    voided, at = _VOID.unpack(payload)
    return VoidedBatch(voided.hex(), at)


def decode_record(
    segment: bytes, position: int, octets: Buffer, *, verify_body: bool = True
) -> JournalRecord:
    """The record that stands at `position` and begins `octets`.

    Raises JournalFormatError. `verify_body=False` leaves the body's checksum to its reader.
    """
    view = memoryview(octets)
    kind, version, queue_id, body_at, size = _record_header(segment, position, view)
    if version != ENVELOPE_VERSION:
        raise JournalFormatError(f"envelope version {version}, which this version cannot read")
    end = body_at + size + CHECKSUM_SIZE
    if end > len(view):
        raise JournalFormatError(f"the body of {queue_id.hex()} is cut off")
    body = view[body_at : body_at + size]
    if verify_body and not verifies(segment, position + body_at, view[body_at:end]):
        raise JournalFormatError(f"the body of {queue_id.hex()} is damaged")
    return JournalRecord(
        _known(RecordKind, kind),
        queue_id.hex(),
        bytes(view[RECORD_HEADER:body_at]),
        body,
        position,
        position + body_at,
        position + end,
    )


def _record_header(
    segment: bytes, position: int, view: memoryview
) -> tuple[int, int, bytes, int, int]:
    """Kind, version, queue id, where the body begins in `view`, and its size."""
    if len(view) < RECORD_OVERHEAD:
        raise JournalFormatError("no record")
    fields = view[: _RECORD.size]
    kind, version, queue_id, envelope_size, size = _RECORD.unpack(fields)
    body_at = RECORD_HEADER + envelope_size
    envelope = view[RECORD_HEADER:body_at]
    crc = checksum(segment, position, fields, envelope)
    if _CRC.unpack_from(view, _RECORD.size) != (crc,):
        raise JournalFormatError("the header or the envelope of a record is damaged")
    return kind, version, queue_id, body_at, size


def record_size(segment: bytes, position: int, octets: Buffer) -> int:
    """The size of a record whose body may be damaged; 0 if its header is."""
    try:
        *_, body_at, size = _record_header(segment, position, memoryview(octets))
    except JournalFormatError:
        return 0
    return body_at + size + CHECKSUM_SIZE


def verifies(segment: bytes, position: int, body_and_checksum: Buffer) -> bool:
    """Whether a body verifies that stands at `position`, with its checksum behind it."""
    view = memoryview(body_and_checksum)
    body, crc = view[:-CHECKSUM_SIZE], view[-CHECKSUM_SIZE:]
    return len(view) >= CHECKSUM_SIZE and _CRC.unpack(crc) == (checksum(segment, position, body),)
