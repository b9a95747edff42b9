"""Segments of which the disk cannot read some blocks: what else they hold is found."""

import errno
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest

from relay.spool.journal.adoption import voided_batches
from relay.spool.journal.blockwise import BlockwiseReader
from relay.spool.journal.contents import contents, highest_mark
from relay.spool.journal.directory import PATIENCE
from relay.spool.journal.format import BLOCK
from relay.spool.journal.scan import (
    Damage,
    ScannedBatch,
    batch_headers,
    first_void,
    scan,
    scan_shares,
)
from tests.bad_places import BadPlaces
from tests.journal_records import SMALL, message, open_journal
from tests.unit.test_journal_scan import WrittenSegment, named


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> BadPlaces:
    return BadPlaces(monkeypatch)


@pytest.fixture
def segment(tmp_path: Path) -> WrittenSegment:
    return WrittenSegment(open_journal(tmp_path), tmp_path)


def lose(places: BadPlaces, segment: WrittenSegment, position: int, blocks: int = 1) -> None:
    start = position // BLOCK * BLOCK
    places.add(segment.path, start, start + blocks * BLOCK)


def test_only_lost_blocks_are_zeros(places: BadPlaces, segment: WrittenSegment) -> None:
    segment.add(message(5 * BLOCK))
    whole = segment.file.read(SMALL, 0)
    lose(places, segment, 2 * BLOCK)
    octets = BlockwiseReader(segment.file)
    got = octets.read(4 * BLOCK, 100)
    assert got == whole[100 : 2 * BLOCK] + bytes(BLOCK) + whole[3 * BLOCK : 4 * BLOCK + 100]
    assert octets.lost(0, SMALL)
    assert octets.lost(3 * BLOCK - 1, 3 * BLOCK)
    assert not octets.lost(0, 2 * BLOCK)
    assert not octets.lost(3 * BLOCK, SMALL)


def test_a_lost_block_is_not_asked_again(places: BadPlaces, segment: WrittenSegment) -> None:
    """A failing disk takes seconds for each try."""
    lose(places, segment, 2 * BLOCK)
    octets = BlockwiseReader(segment.file)
    octets.read(4 * BLOCK, 0)
    tries = len(places.reads)
    octets.read(4 * BLOCK, 0)
    octets.read(10, 2 * BLOCK)
    BlockwiseReader(segment.file).read(4 * BLOCK, 0)
    assert len(places.reads) == tries <= 3


def test_a_large_bad_region_is_read_from_its_ends_without_patience(
    places: BadPlaces, segment: WrittenSegment
) -> None:
    """One MiB of a failing disk has 256 blocks, and each may take seconds."""
    segment.file.fill(0, 300 * BLOCK)
    whole = bytes(range(1, 251)) * BLOCK
    segment.file.write([whole], 0)
    lose(places, segment, 20 * BLOCK, 200)
    segment.file.patience = 0.0
    for _ in range(2):
        got = BlockwiseReader(segment.file).read(250 * BLOCK, 100)
        assert len(places.reads) <= 5
        assert segment.file.lost == {*range(20 * BLOCK, 220 * BLOCK, BLOCK)}
        assert got[: 20 * BLOCK - 100] == whole[100 : 20 * BLOCK]
        assert got[220 * BLOCK - 100 : 250 * BLOCK - 100] == whole[220 * BLOCK :]
        assert not any(got[20 * BLOCK - 100 : 220 * BLOCK - 100])
        assert len(got) == 250 * BLOCK


def test_reads_that_fail_use_up_the_patience(
    places: BadPlaces, segment: WrittenSegment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies between bad places is found as long as it lasts, and known ones end nothing."""
    seconds = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: next(seconds))
    monkeypatch.setattr("relay.spool.journal.blockwise.time", clock)
    segment.file.fill(0, 30 * BLOCK)
    for block in (2, 4, 6, 8, 10, 12):
        lose(places, segment, block * BLOCK)
    segment.file.patience = 6.0  # the first read, and two of each block
    BlockwiseReader(segment.file).read(20 * BLOCK, 0)
    assert segment.file.lost == {block * BLOCK for block in (2, 4, *range(6, 13))}
    segment.file.try_again()
    assert segment.file.patience == PATIENCE
    segment.file.patience = float("inf")
    BlockwiseReader(segment.file).read(20 * BLOCK, 0)
    assert segment.file.lost == {block * BLOCK for block in (2, 4, 6, 8, 10, 12)}
    segment.file.patience = 0.0
    BlockwiseReader(segment.file).read(20 * BLOCK, 0)
    assert len(segment.file.lost) == 6


def test_a_read_that_fails_once_loses_nothing(
    segment: WrittenSegment, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment.add(message())
    calls, read = [0], segment.file.read

    def failing(size: int, position: int) -> bytes:
        calls[0] += 1
        if calls[0] % 3 == 0:
            raise OSError(errno.EIO, "Input/output error")
        return read(size, position)

    monkeypatch.setattr(segment.file, "read", failing)
    octets = BlockwiseReader(segment.file)
    for _ in range(5):
        octets.read(2 * BLOCK, BLOCK)
    assert not octets.lost(0, SMALL)


def test_another_error_is_raised(segment: WrittenSegment, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(size: int, position: int) -> bytes:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(segment.file, "read", failing)
    with pytest.raises(OSError, match="Stale"):
        BlockwiseReader(segment.file).read(BLOCK, 0)


def test_batches_behind_a_lost_header_are_found(places: BadPlaces, segment: WrittenSegment) -> None:
    records = [message() for _ in range(3)]
    for one in records:
        segment.add(one)
    lose(places, segment, segment.starts[1])
    found = list(scan(segment.file, segment.header))
    assert [type(one) for one in found] == [ScannedBatch, Damage, ScannedBatch]
    damage = found[1]
    assert isinstance(damage, Damage)
    assert damage.position == segment.starts[1]
    assert damage.unreadable
    assert damage.hides_messages
    assert "cannot read" in damage.reason
    assert segment.ids() == named(records[0], records[2])
    marks = list(batch_headers(segment.file, segment.header))
    assert len(marks) == 2


def test_records_around_a_lost_envelope_are_found(
    places: BadPlaces, segment: WrittenSegment
) -> None:
    records = [message(BLOCK), message(BLOCK, envelope=3 * BLOCK), message(BLOCK)]
    segment.add(*records)
    lose(places, segment, BLOCK + 3 * BLOCK)
    assert segment.ids() == named(records[0], records[2])
    (damage,) = segment.damages()
    assert damage.unreadable
    assert damage.record is None


def test_a_message_whose_body_is_lost_is_told_with_its_envelope(
    places: BadPlaces, segment: WrittenSegment
) -> None:
    records = [message(100), message(3 * BLOCK), message(100)]
    segment.add(*records)
    lose(places, segment, BLOCK + 2 * BLOCK)
    (batch,) = scan(segment.file, segment.header)
    assert isinstance(batch, ScannedBatch)
    assert named(*batch.records) == named(records[0], records[2])
    ((record, reason),) = batch.without_bodies
    assert record.queue_id == records[1].queue_id
    assert record.envelope == records[1].envelope
    assert "cannot read" in reason
    assert not batch.damages[0].hides_messages


def test_a_lost_tail_is_not_torn(places: BadPlaces, segment: WrittenSegment) -> None:
    """Clients may have heard 250 for it."""
    segment.add(message())
    segment.add(message())
    lose(places, segment, segment.starts[-1])
    *_, damage = scan(segment.file, segment.header)
    assert isinstance(damage, Damage)
    assert (damage.torn, damage.unreadable) == (False, True)


def test_damage_before_a_lost_place_is_not_torn(places: BadPlaces, segment: WrittenSegment) -> None:
    """What is lost may be the batch that proves it."""
    segment.add(message())
    segment.flip(segment.starts[0] + 200)
    segment.add(message())
    lose(places, segment, segment.starts[-1])
    (batch, *_) = scan(segment.file, segment.header)
    assert isinstance(batch, ScannedBatch)
    assert not batch.damages[0].torn


def test_a_lost_block_behind_what_was_never_written_is_no_damage(
    places: BadPlaces, segment: WrittenSegment
) -> None:
    segment.add(message())
    lose(places, segment, segment.end + 2 * BLOCK)
    assert segment.damages() == []


def test_ids_are_not_listed_without_the_lost_ones(
    places: BadPlaces, segment: WrittenSegment
) -> None:
    """What is not listed counts as not needed, and would be removed."""
    segment.add(message())
    segment.add(message())
    lose(places, segment, segment.starts[0])
    with pytest.raises(OSError, match="cannot read"):
        list(scan_shares(segment.file, segment.header))


def test_whether_a_lost_first_batch_is_a_void_is_not_known(
    places: BadPlaces, segment: WrittenSegment
) -> None:
    lose(places, segment, BLOCK)
    with pytest.raises(OSError, match="cannot read"):
        first_void(segment.file, segment.header)


# Every segment of a journal


def test_the_voids_of_the_other_segments_are_known(places: BadPlaces, tmp_path: Path) -> None:
    directory = open_journal(tmp_path)
    lost = WrittenSegment(directory, tmp_path, void=True)
    other = WrittenSegment(directory, tmp_path, void=True)
    lose(places, lost, BLOCK)
    assert voided_batches(directory) == {other.voided}


def test_the_contents_of_a_segment_with_a_lost_header_are_read(
    places: BadPlaces, tmp_path: Path
) -> None:
    directory = open_journal(tmp_path)
    segments = [WrittenSegment(directory, tmp_path) for _ in range(2)]
    for one in segments:
        one.add(message())
    lose(places, segments[0], 0)
    found = {one.id: (one.fault, len(list(one.batches()))) for one in contents(directory)}
    fault, count = found.pop(segments[0].header.segment)
    assert "cannot" in fault
    assert count == 1
    assert found == {segments[1].header.segment: ("", 1)}
    assert highest_mark(directory, segments[1].header.spool) == 3


def test_a_segment_that_cannot_be_opened_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = open_journal(tmp_path)
    segments = [WrittenSegment(directory, tmp_path, void=True) for _ in range(2)]
    opened = directory.open_segment

    def failing(segment: str) -> object:
        if segment == segments[0].header.segment:
            raise OSError(errno.EIO, "Input/output error")
        return opened(segment)

    monkeypatch.setattr(directory, "open_segment", failing)
    assert [one.id for one in contents(directory)] == [segments[1].header.segment]
    assert voided_batches(directory) == {segments[1].voided}
