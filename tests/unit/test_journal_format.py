"""The layout of a segment: what was encoded decodes, and nothing else verifies."""

import struct
import zlib
from collections.abc import Buffer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.spool.journal import format as layout
from relay.spool.journal.format import (
    BATCH_HEADER,
    BLOCK,
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
    encode_batch,
    encode_segment_header,
    encode_void,
    record_size,
    verifies,
)

ids = st.binary(min_size=16, max_size=16).map(bytes.hex)
numbers = st.integers(0, 2**64 - 1)
blocks = st.integers(1, 4000).map(lambda block: block * BLOCK)
records = st.builds(
    JournalRecord,
    kind=st.sampled_from(RecordKind),
    queue_id=ids,
    envelope=st.binary(max_size=300),
    body=st.binary(max_size=5000),
)
SEGMENT = bytes(range(16))
OTHER = bytes(range(1, 17))


def joined(parts: list[Buffer]) -> bytes:
    return b"".join(bytes(part) for part in parts)


def encoded(one: JournalRecord, position: int = BLOCK) -> tuple[bytes, int]:
    """The octets of a batch with one record, and where its body stands."""
    parts, bodies, _ = encode_batch(SEGMENT, position, [one], mark=7, written_at=8)
    return joined(parts), bodies[0]


def flipped(octets: bytes, at: int, bit: int = 0) -> bytes:
    changed = bytearray(octets)
    changed[at] ^= 1 << bit
    return bytes(changed)


@given(segment=ids, spool=ids, created_at=numbers, copy=st.booleans(), host=st.text("abc-é"))
def test_a_segment_header_decodes_to_what_was_encoded(
    segment: str, spool: str, created_at: int, copy: bool, host: str
) -> None:
    header = SegmentHeader(segment, spool, created_at, host, copy)
    block = encode_segment_header(header)
    assert len(block) == BLOCK
    decoded = decode_segment_header(block)
    assert decoded == header._replace(host=decoded.host)
    if len(host.encode()) <= 64:  # the longest name of a Linux machine
        assert decoded.host == host


@given(segment=ids, position=blocks, batch=st.lists(records, max_size=6), mark=numbers, at=numbers)
def test_a_batch_decodes_to_what_was_encoded(
    segment: str, position: int, batch: list[JournalRecord], mark: int, at: int
) -> None:
    key = bytes.fromhex(segment)
    parts, bodies, end = encode_batch(key, position, batch, mark=mark, written_at=at)
    octets = joined(parts)
    assert len(octets) == end - position == aligned(len(octets)) == batch_size(batch)
    header = decode_batch_header(key, position, octets[:BLOCK])
    assert header[1:] == (len(batch), mark, at, BatchKind.RECORDS)
    assert header.next_position(position) == end
    assert not any(octets[header.length :])
    start = position + BATCH_HEADER
    for one, body in zip(batch, bodies, strict=True):
        found = decode_record(key, start, memoryview(octets)[start - position : header.length])
        assert (found.kind, found.queue_id, found.envelope) == one_fields(one)
        assert bytes(found.body) == one.body
        assert found.position == body
        assert verifies(key, body, octets[body - position : found.end - position])
        assert record_size(key, start, octets[start - position :]) == found.end - start
        start = found.end
    assert start == position + header.length


def one_fields(one: JournalRecord) -> tuple[RecordKind, str, bytes]:
    return one.kind, one.queue_id, one.envelope


@given(segment=ids, position=blocks, voided=ids, at=numbers, mark=numbers)
def test_a_void_batch_decodes_to_what_was_encoded(
    segment: str, position: int, voided: str, at: int, mark: int
) -> None:
    key = bytes.fromhex(segment)
    octets = encode_void(key, position, VoidedBatch(voided, at), mark=mark, written_at=9)
    assert len(octets) == BLOCK
    header = decode_batch_header(key, position, octets)
    assert header[1:] == (0, mark, 9, BatchKind.VOID)
    assert header.next_position(position) == position + BLOCK
    assert decode_void(key, position, octets) == VoidedBatch(voided, at)


def test_every_flipped_bit_of_both_segment_headers_is_detected() -> None:
    header = SegmentHeader("ab" * 16, "cd" * 16, 5, "host")
    block = encode_segment_header(header)
    half = BLOCK // 2
    for at in range(len(block[:half].rstrip(b"\0"))):
        for bit in range(8):
            assert decode_segment_header(flipped(block, at, bit)) == header
            assert decode_segment_header(flipped(block, half + at, bit)) == header
            with pytest.raises(JournalFormatError):
                decode_segment_header(flipped(flipped(block, at, bit), half + at, bit))


def test_every_flipped_bit_of_a_batch_header_is_detected() -> None:
    octets, _ = encoded(JournalRecord(RecordKind.MESSAGE, "ab" * 16, b"envelope", b"body"))
    for at in range(BATCH_HEADER):
        for bit in range(8):
            with pytest.raises(JournalFormatError):
                decode_batch_header(SEGMENT, BLOCK, flipped(octets, at, bit))


def test_every_flipped_bit_of_a_record_is_detected() -> None:
    octets, body = encoded(JournalRecord(RecordKind.MESSAGE, "ab" * 16, b"envelope", b"body"))
    start = BLOCK + BATCH_HEADER
    end = decode_record(SEGMENT, start, octets[BATCH_HEADER:]).end
    for at in range(BATCH_HEADER, end - BLOCK):
        for bit in range(8):
            damaged = flipped(octets, at, bit)[BATCH_HEADER:]
            with pytest.raises(JournalFormatError):
                decode_record(SEGMENT, start, damaged)
            # A damaged body leaves the size, so that the next record is found.
            assert bool(record_size(SEGMENT, start, damaged)) == (at >= body - BLOCK)


def test_every_flipped_bit_of_a_void_batch_is_detected() -> None:
    octets = encode_void(SEGMENT, BLOCK, VoidedBatch("ab" * 16, 8192), mark=1, written_at=2)
    for at in range(len(octets.rstrip(b"\0"))):
        for bit in range(8):
            damaged = flipped(octets, at, bit)
            decode = decode_batch_header if at < BATCH_HEADER else decode_void
            with pytest.raises(JournalFormatError):
                decode(SEGMENT, BLOCK, damaged)


@pytest.mark.parametrize(
    ("segment", "position"),
    [(OTHER, BLOCK), (SEGMENT, 2 * BLOCK), (SEGMENT, BLOCK + 1), (SEGMENT, BLOCK + (1 << 32))],
)
def test_the_right_octets_in_the_wrong_place_never_verify(segment: bytes, position: int) -> None:
    octets, body = encoded(JournalRecord(RecordKind.MESSAGE, "ab" * 16, b"envelope", b"body"))
    void = encode_void(SEGMENT, BLOCK, VoidedBatch("ab" * 16, 8192), mark=1, written_at=2)
    moved = body - BLOCK + position
    with pytest.raises(JournalFormatError):
        decode_batch_header(segment, position, octets)
    with pytest.raises(JournalFormatError):
        decode_record(segment, position + BATCH_HEADER, octets[BATCH_HEADER:])
    with pytest.raises(JournalFormatError):
        decode_batch_header(segment, position, void)
    with pytest.raises(JournalFormatError):
        decode_void(segment, position, void)
    assert verifies(SEGMENT, body, octets[body - BLOCK : body - BLOCK + 8])
    assert not verifies(segment, moved, octets[body - BLOCK : body - BLOCK + 8])


def test_a_header_of_another_segment_never_verifies() -> None:
    block = encode_segment_header(SegmentHeader("ab" * 16, "cd" * 16, 5, "host"))
    with pytest.raises(JournalFormatError):
        decode_segment_header(block.replace(b"\xab" * 16, b"\xac" * 16))


def test_octets_that_are_cut_off_are_a_format_error() -> None:
    octets, body = encoded(JournalRecord(RecordKind.MESSAGE, "ab" * 16, b"envelope", b"body"))
    void = encode_void(SEGMENT, BLOCK, VoidedBatch("ab" * 16, 8192), mark=1, written_at=2)
    block = encode_segment_header(SegmentHeader("ab" * 16, "cd" * 16, 5, "host"))
    for size in range(BATCH_HEADER):
        with pytest.raises(JournalFormatError):
            decode_batch_header(SEGMENT, BLOCK, octets[:size])
    for size in range(BATCH_HEADER, body - BLOCK + 8):
        with pytest.raises(JournalFormatError):
            decode_record(SEGMENT, BLOCK + BATCH_HEADER, octets[BATCH_HEADER:size])
    for size in range(BATCH_HEADER + 28):
        with pytest.raises(JournalFormatError):
            decode_void(SEGMENT, BLOCK, void[:size])
    for size in range(len(block[: BLOCK // 2].rstrip(b"\0"))):
        with pytest.raises(JournalFormatError):
            decode_segment_header(block[:size])
    assert not verifies(SEGMENT, body, b"abc")


def sealed(fields: bytes, position: int, rest: bytes = b"") -> bytes:
    """The fields of a header with the checksum that makes them verify, and what follows."""
    value = zlib.crc32(position.to_bytes(8, "little"), zlib.crc32(SEGMENT))
    return fields + struct.pack("<I", zlib.crc32(fields + rest, value)) + rest


def test_kinds_of_a_later_version_are_a_format_error() -> None:
    batch = sealed(struct.pack("<4sIIQQB", b"BTCH", 100, 1, 0, 0, 9), BLOCK)
    with pytest.raises(JournalFormatError, match="kind 9"):
        decode_batch_header(SEGMENT, BLOCK, batch)
    start = BLOCK + BATCH_HEADER
    record = sealed(struct.pack("<BB16sII", 9, 1, b"i" * 16, 0, 0), start)
    with pytest.raises(JournalFormatError, match="kind 9"):
        decode_record(SEGMENT, start, record + bytes(100), verify_body=False)
    later = sealed(struct.pack("<BB16sII", 1, 2, b"i" * 16, 0, 0), start)
    with pytest.raises(JournalFormatError, match="version 2"):
        decode_record(SEGMENT, start, later + bytes(100), verify_body=False)


def test_a_format_of_a_later_version_is_named() -> None:
    block = bytearray(encode_segment_header(SegmentHeader("ab" * 16, "cd" * 16, 5, "host")))
    block[8] = block[BLOCK // 2 + 8] = 2
    with pytest.raises(JournalFormatError, match="format 2"):
        decode_segment_header(bytes(block))
    with pytest.raises(JournalFormatError, match="no segment"):
        decode_segment_header(bytes(BLOCK))


def test_the_checksum_is_the_usual_crc() -> None:
    assert layout.checksum(b"12345", 0) != layout.checksum(b"12345", 1)
    value = zlib.crc32(b"ab", zlib.crc32((3).to_bytes(8, "little"), zlib.crc32(SEGMENT)))
    assert layout.checksum(SEGMENT, 3, b"a", b"b") == value
