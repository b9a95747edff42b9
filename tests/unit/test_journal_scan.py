"""Reading a segment from end to end: every record that verifies is found, and damage is told."""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relay.ids import new_id
from relay.spool.journal.directory import OWNED, JournalDirectory, SegmentFile
from relay.spool.journal.format import (
    BATCH_HEADER,
    BLOCK,
    BatchKind,
    JournalRecord,
    SegmentHeader,
    VoidedBatch,
    aligned,
    encode_batch,
    encode_segment_header,
    encode_void,
)
from relay.spool.journal.scan import (
    Damage,
    ScannedBatch,
    first_void,
    read_header,
    scan,
    scan_shares,
)
from tests.journal_records import SMALL, content, message, open_journal, scanned

SECTOR = 512


class WrittenSegment:
    """A segment of a file, with batches that this test writes and damages."""

    def __init__(self, directory: JournalDirectory, path: Path, *, void: bool = False) -> None:
        self.header = SegmentHeader(new_id(), new_id(), 12345, "host")
        self.id = bytes.fromhex(self.header.segment)
        self.file: SegmentFile = directory.create(self.header.segment + OWNED)
        self.file.write([encode_segment_header(self.header)], 0)
        self.file.fill(BLOCK, SMALL)
        self.path = path / "journal" / (self.header.segment + OWNED)
        self.end = BLOCK
        self.starts: list[int] = []
        self.voided = VoidedBatch(new_id(), 3 * BLOCK)
        if void:
            self.put([encode_void(self.id, self.end, self.voided, mark=3, written_at=9)])

    def put(self, parts: Sequence[bytes]) -> None:
        octets = b"".join(parts)
        self.file.write([octets], self.end)
        self.starts.append(self.end)
        self.end += len(octets)

    def batch(self, *records: JournalRecord) -> bytes:
        """The octets of a batch that would stand at the end."""
        parts, _, _ = encode_batch(self.id, self.end, records, mark=3, written_at=9)
        return b"".join(bytes(part) for part in parts)

    def add(self, *records: JournalRecord) -> None:
        self.put([self.batch(*records)])

    def flip(self, at: int) -> None:
        octet = self.file.read(1, at)[0]
        self.file.write([bytes([octet ^ 1 << at % 8])], at)

    def records(self) -> list[JournalRecord]:
        return scanned(self.file)[0]

    def ids(self) -> list[str]:
        return [record.queue_id for record in self.records()]

    def damages(self) -> list[Damage]:
        return scanned(self.file)[1]


@pytest.fixture
def segment(tmp_path: Path) -> WrittenSegment:
    return WrittenSegment(open_journal(tmp_path), tmp_path)


@pytest.fixture
def void_segment(tmp_path: Path) -> WrittenSegment:
    return WrittenSegment(open_journal(tmp_path), tmp_path, void=True)


def named(*records: JournalRecord) -> list[str]:
    return [record.queue_id for record in records]


def test_a_segment_without_records_has_no_batch_and_no_damage(segment: WrittenSegment) -> None:
    assert read_header(segment.file) == segment.header
    assert list(scan(segment.file, segment.header)) == []
    assert first_void(segment.file, segment.header) is None


def test_a_scan_finds_every_batch(segment: WrittenSegment) -> None:
    written = [[message(100), message(5000)], [message(0, envelope=0)], [message(9000)]]
    for records in written:
        segment.add(*records)
    found = list(scan(segment.file, segment.header))
    assert all(isinstance(batch, ScannedBatch) and not batch.damages for batch in found)
    batches = [batch for batch in found if isinstance(batch, ScannedBatch)]
    assert [batch.position for batch in batches] == segment.starts
    assert [batch.end for batch in batches] == [*segment.starts[1:], segment.end]
    for batch, records in zip(batches, written, strict=True):
        assert (batch.header.mark, batch.header.written_at) == (3, 9)
        assert [bytes(one.body) for one in batch.records] == [one.body for one in records]
        assert named(*batch.records) == named(*records)
        for one in batch.records:
            body = bytes(one.body)
            assert segment.file.read(len(body), one.position) == body


@pytest.mark.parametrize("envelope", [0, 50, 5000])
def test_records_share_the_octets_of_their_batch(segment: WrittenSegment, envelope: int) -> None:
    """With its header and its padding, as if each were alone."""
    segment.add(message(10, envelope=envelope))
    segment.add(*[message(100 * n, envelope=envelope) for n in range(30)])
    shares = [share for _, share in scan_shares(segment.file, segment.header)]
    assert shares[0] == segment.starts[1] - segment.starts[0]
    taken = segment.end - segment.starts[1]
    assert taken - 30 < sum(shares[1:]) <= taken
    assert shares[1:] == sorted(shares[1:])
    for record, share in scan_shares(segment.file, segment.header):
        assert share >= record.size


def test_a_scan_of_a_part_finds_the_batches_of_that_part(segment: WrittenSegment) -> None:
    one, two, three = message(), message(5000), message()
    for record in (one, two, three):
        segment.add(record)
    first, second, third = segment.starts

    def part(start: int, end: int | None) -> list[str]:
        return named(*content(scan(segment.file, segment.header, start, end))[0])

    assert part(second, None) == named(two, three)
    assert part(first, third) == named(one, two)
    assert part(second, third) == named(two)
    assert part(third, third) == []
    assert part(segment.end, None) == []


def test_damage_at_the_end_of_a_part_is_no_torn_tail(segment: WrittenSegment) -> None:
    segment.add(message())
    segment.add(message())
    segment.add(message())
    last = segment.starts[-1]
    segment.flip(segment.starts[1] + BATCH_HEADER + 3)
    (damage,) = content(scan(segment.file, segment.header, end=last))[1]
    assert not damage.torn
    segment.flip(segment.starts[1])
    damages = content(scan(segment.file, segment.header, end=last))[1]
    assert damages
    assert not any(damage.torn for damage in damages)


def test_a_void_batch_names_what_it_voids(void_segment: WrittenSegment) -> None:
    one = message()
    void_segment.add(one)
    batch, other = scan(void_segment.file, void_segment.header)
    assert isinstance(batch, ScannedBatch)
    assert isinstance(other, ScannedBatch)
    assert (batch.void, batch.header.kind) == (void_segment.voided, BatchKind.VOID)
    assert (other.void, named(*other.records)) == (None, named(one))
    assert first_void(void_segment.file, void_segment.header) == void_segment.voided


def test_a_damaged_header_does_not_hide_a_void(void_segment: WrittenSegment) -> None:
    for at in range(BATCH_HEADER):
        void_segment.flip(BLOCK + at)
        assert first_void(void_segment.file, void_segment.header) == void_segment.voided
        void_segment.flip(BLOCK + at)
    void_segment.flip(BLOCK + BATCH_HEADER)
    assert first_void(void_segment.file, void_segment.header) is None


def test_a_damaged_void_below_a_later_batch_is_corruption(void_segment: WrittenSegment) -> None:
    void_segment.flip(BLOCK + BATCH_HEADER)
    assert [damage.torn for damage in void_segment.damages()] == [True]
    one = message()
    void_segment.add(one)
    assert [damage.torn for damage in void_segment.damages()] == [False]
    assert void_segment.ids() == named(one)


def costs(segment: WrittenSegment, at: int, batches: list[list[JournalRecord]]) -> set[str]:
    """The ids that a damaged octet may cost: those of the record that it stands in."""
    for start, records in zip(segment.starts, batches, strict=True):
        position = start + BATCH_HEADER
        for record in records:
            end = position + 34 + len(record.envelope) + len(memoryview(record.body))
            if position <= at < end:
                return {record.queue_id}
            position = end
    return set()


def test_a_flipped_octet_costs_the_record_that_it_stands_in(segment: WrittenSegment) -> None:
    batches = [
        [message(40, envelope=20), message(0), message(60, envelope=1)],
        [message(30), message(30)],
        [message(10, envelope=9), message(20, envelope=0)],
    ]
    for records in batches:
        segment.add(*records)
    everything = set(named(*chain(*batches)))
    for start, records in zip(segment.starts, batches, strict=True):
        used = BATCH_HEADER + sum(
            34 + len(record.envelope) + len(memoryview(record.body)) for record in records
        )
        for at in range(start, start + used):
            segment.flip(at)
            found, damages = scanned(segment.file)
            lost = costs(segment, at, batches)
            assert set(named(*found)) == everything - lost, at
            assert len(found) == len(everything) - len(lost)
            assert len(damages) == 1
            assert damages[0].position <= at < damages[0].end
            assert damages[0].torn == (start == segment.starts[-1])
            segment.flip(at)
    assert not segment.damages()


def test_batches_in_a_row_with_damaged_headers_cost_nothing(segment: WrittenSegment) -> None:
    records = [message(3000), message(200), message(6000), message(100)]
    for record in records:
        segment.add(record)
    for start in segment.starts[:3]:
        segment.flip(start + 5)
    found, damages = scanned(segment.file)
    assert named(*found) == named(*records)
    assert [bytes(one.body) for one in found] == [one.body for one in records]
    assert damages
    assert not any(damage.torn for damage in damages)


def test_a_batch_without_its_header_has_the_time_of_the_one_before(segment: WrittenSegment) -> None:
    segment.add(message())
    segment.flip(BLOCK)
    (batch,) = scan(segment.file, segment.header)
    assert isinstance(batch, ScannedBatch)
    assert batch.header.written_at == segment.header.created_at
    segment.add(message())
    segment.flip(BLOCK)
    segment.flip(segment.starts[1])
    _, batch = scan(segment.file, segment.header)
    assert isinstance(batch, ScannedBatch)
    assert batch.header.written_at == 9


@pytest.mark.parametrize("size", [1, 11, 700, 3000, 9000])
def test_a_torn_tail_of_every_length_is_told_apart(segment: WrittenSegment, size: int) -> None:
    """The last batch reached the disk up to a sector."""
    first = message(5000)
    segment.add(first)
    records = [message(size), message(size)]
    octets = segment.batch(*records)
    for reached in range(0, len(octets) + 1, SECTOR):
        tail = octets[:reached].ljust(len(octets), b"\0")
        segment.file.write([tail], segment.end)
        whole = []
        at = BATCH_HEADER
        for record in records:
            at += 34 + len(record.envelope) + len(memoryview(record.body))
            if not any(octets[min(reached, at) : at]):  # a missing zero is no difference
                whole.append(record)
        found, damages = scanned(segment.file)
        assert named(*found) == named(first, *whole), reached
        assert all(damage.torn for damage in damages)
        assert bool(damages) == (reached > 0 and len(whole) < 2)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=4), seed=st.integers(0, 2**32))
def test_any_sectors_of_a_torn_batch_cost_only_what_they_hold(
    tmp_path: Path, sizes: list[int], seed: int
) -> None:
    segment = WrittenSegment(open_journal(tmp_path), tmp_path)
    first, chance = message(3000), random.Random(seed)
    segment.add(first)
    records = [message(size) for size in sizes]
    octets = segment.batch(*records)
    kept = b"".join(
        octets[at : at + SECTOR] if chance.random() < 0.7 else bytes(SECTOR)
        for at in range(0, len(octets), SECTOR)
    )
    segment.file.write([kept], segment.end)
    whole, at = [], BATCH_HEADER
    for record in records:
        end = at + 34 + len(record.envelope) + len(memoryview(record.body))
        if kept[at:end] == octets[at:end]:
            whole.append(record)
        at = end
    found, damages = scanned(segment.file)
    assert named(*found) == named(first, *whole)
    assert all(damage.torn for damage in damages)
    segment.file.close()


def test_corruption_below_a_later_batch_is_no_torn_tail(segment: WrittenSegment) -> None:
    records = [message(3000), message(6000), message(100)]
    for record in records:
        segment.add(record)
    segment.file.write([bytes(2 * BLOCK)], segment.starts[1])
    (damage,) = segment.damages()
    assert not damage.torn
    assert damage.position <= segment.starts[1] + BLOCK < damage.end
    assert segment.ids() == named(records[0], records[2])


@pytest.mark.parametrize("spoil", [bytes, os.urandom], ids=["zeros", "noise"])
def test_damage_of_any_place_leaves_all_other_records(
    segment: WrittenSegment, spoil: Callable[[int], bytes]
) -> None:
    records = [message(900), message(5000), message(300), message(2000), message(10)]
    segment.add(*records[:2])
    segment.add(records[2])
    segment.add(*records[3:])
    whole = segment.file.read(SMALL, 0)
    places = {one.queue_id: (one.position - 80, one.end) for one in segment.records()}
    for at in range(BLOCK, segment.end, SECTOR):
        segment.file.write([spoil(SECTOR)], at)
        kept = {
            queue_id
            for queue_id, (start, end) in places.items()
            if end <= at or start >= at + SECTOR
        }
        assert kept <= set(segment.ids())
        assert len(kept) >= len(records) - 3
        segment.file.write([whole], 0)


def blocks_of(octets: bytes) -> Iterator[bytes]:
    for at in range(0, len(octets), BLOCK):
        yield octets[at : at + BLOCK]


def test_blocks_in_the_wrong_place_never_verify(segment: WrittenSegment, tmp_path: Path) -> None:
    """Stale and misdirected writes: right octets of another place or of another segment."""
    other = WrittenSegment(open_journal(tmp_path), tmp_path)
    for each in (segment, other):
        each.add(message(100), message(200))
        each.add(message(300))
    good = segment.ids()
    for source in (segment, other):
        octets = source.file.read(2 * BLOCK, BLOCK)
        for block in blocks_of(octets):
            for at in range(BLOCK, SMALL, BLOCK):
                before = segment.file.read(BLOCK, at)
                if before == block:
                    continue
                segment.file.write([block], at)
                assert set(segment.ids()) <= set(good)
                if at >= segment.end:
                    assert segment.ids() == good
                segment.file.write([before], at)


def test_a_file_that_was_cut_off_keeps_what_is_left(segment: WrittenSegment) -> None:
    records = [message(3000), message(6000)]
    for record in records:
        segment.add(record)
    whole = segment.records()
    for size in range(segment.end, 0, -SECTOR):
        os.truncate(segment.path, size)
        assert segment.ids() == [one.queue_id for one in whole if one.end <= size]


def test_a_cut_off_void_batch_is_no_void(void_segment: WrittenSegment) -> None:
    for size in range(BLOCK + BATCH_HEADER + 30, 0, -1):
        os.truncate(void_segment.path, size)
        expected = void_segment.voided if size >= BLOCK + BATCH_HEADER + 28 else None
        assert first_void(void_segment.file, void_segment.header) == expected
        batches = list(scan(void_segment.file, void_segment.header))
        assert len(batches) == (size > BLOCK)


def test_unverified_bodies_do_not_matter_to_shares(segment: WrittenSegment) -> None:
    one, two = message(), message()
    segment.add(one, two)
    segment.flip(segment.records()[0].position)
    assert segment.ids() == named(two)
    found = [record for record, _ in scan_shares(segment.file, segment.header)]
    assert named(*found) == named(one, two)


def test_a_body_cannot_imitate_a_record(segment: WrittenSegment) -> None:
    """The octets of a whole batch inside of a body, whose own header is then damaged."""
    forged = message(50)
    inner = segment.batch(forged)
    outer = JournalRecord(message().kind, new_id(), b"", inner + inner[:BLOCK])
    segment.add(outer)
    segment.flip(BLOCK + BATCH_HEADER)
    assert segment.ids() == []
    assert aligned(segment.end) == segment.end
