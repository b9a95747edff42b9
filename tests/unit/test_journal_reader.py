"""Reading bodies by their place, while segments are renamed, removed and damaged."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relay.ids import new_id
from relay.spool.journal.directory import ADOPTED, COPY, OWNED, JournalDirectory, SegmentFile
from relay.spool.journal.format import BLOCK, Place
from relay.spool.journal.reader import JournalReader, WrongBody
from tests.journal_records import SMALL, message, new_writer, open_journal


class BodyInSegment:
    """One body in a segment of its own, and a reader."""

    def __init__(self, path: Path, size: int = 3000) -> None:
        self.directory = open_journal(path)
        self.writer, _ = new_writer(self.directory)
        record = message(size)
        batch = self.writer.append([message(), record])
        self.segment = batch.segment
        self.place = Place(batch.segment, batch.positions[1])
        self.body = bytes(record.body)
        self.path = path / "journal" / (batch.segment + OWNED)
        self.reader = JournalReader(self.directory)

    def read(self) -> bytes:
        return self.reader.read(self.place, len(self.body))

    def flip(self, at: int, path: Path | None = None) -> None:
        with (path or self.path).open("r+b") as file:
            file.seek(at)
            octet = file.read(1)[0]
            file.seek(at)
            file.write(bytes([octet ^ 1]))


@pytest.fixture
def stored(tmp_path: Path) -> BodyInSegment:
    return BodyInSegment(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(sizes=st.lists(st.integers(0, 9000), min_size=1, max_size=5))
def test_every_body_is_read_by_its_place(tmp_path: Path, sizes: list[int]) -> None:
    directory = open_journal(tmp_path)
    writer, _ = new_writer(directory)
    reader = JournalReader(directory)
    records = [message(size) for size in sizes]
    batch = writer.append(records)
    for record, position in zip(records, batch.positions, strict=True):
        body = reader.read(Place(batch.segment, position), len(memoryview(record.body)))
        assert body == record.body


def test_a_body_is_read_under_each_name_of_its_segment(stored: BodyInSegment) -> None:
    assert stored.read() == stored.body
    for name in (ADOPTED, COPY):
        (old,) = stored.directory.names()
        stored.directory.rename(old, stored.segment + name)
        assert stored.read() == stored.body
        stored.reader.reopen(stored.segment)
        assert stored.read() == stored.body


@pytest.mark.parametrize(
    ("shift", "size"), [(0, 2999), (0, 3001), (1, 3000), (-1, 3000), (BLOCK, 3000), (0, 1 << 20)]
)
def test_a_wrong_place_gives_no_body(stored: BodyInSegment, shift: int, size: int) -> None:
    with pytest.raises(WrongBody):
        stored.reader.read(Place(stored.segment, stored.place.position + shift), size)


def test_every_damaged_octet_of_a_body_is_detected(tmp_path: Path) -> None:
    stored = BodyInSegment(tmp_path, size=200)
    for at in range(stored.place.position, stored.place.position + 204):
        stored.flip(at)
        with pytest.raises(WrongBody, match="damaged"):
            stored.read()
        stored.flip(at)
    assert stored.read() == stored.body


def test_damage_outside_of_a_body_does_not_matter(stored: BodyInSegment) -> None:
    start, end = stored.place.position, stored.place.position + 3004
    for at in (0, BLOCK, start - 1, end):
        stored.flip(at)
        assert stored.read() == stored.body


def test_a_missing_segment_gives_no_body(stored: BodyInSegment) -> None:
    missing = new_id()
    with pytest.raises(WrongBody, match="missing"):
        stored.reader.read(Place(missing, BLOCK), 10)
    stored.path.unlink()
    with pytest.raises(WrongBody, match="missing"):
        stored.read()


def test_a_segment_that_was_removed_is_read_until_it_is_closed(stored: BodyInSegment) -> None:
    assert stored.read() == stored.body
    stored.path.unlink()
    assert stored.read() == stored.body
    stored.reader.close_unlinked()
    with pytest.raises(WrongBody, match="missing"):
        stored.read()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def test_closing_what_was_removed_gives_the_descriptor_back(stored: BodyInSegment) -> None:
    before = open_descriptors()
    stored.read()
    stored.read()
    assert open_descriptors() == before + 1
    stored.reader.close_unlinked()
    assert open_descriptors() == before + 1
    stored.path.unlink()
    stored.reader.close_unlinked()
    assert open_descriptors() == before


def test_a_segment_that_was_renamed_aside_is_closed(stored: BodyInSegment) -> None:
    """NFS does that with a file that is removed while it is open."""
    before = open_descriptors()
    stored.read()
    stored.path.rename(stored.path.with_name(".nfs0000000000000001"))
    stored.reader.close_unlinked()
    assert open_descriptors() == before


def test_a_segment_that_was_adopted_stays_open(stored: BodyInSegment) -> None:
    stored.read()
    before = open_descriptors()
    stored.path.rename(stored.path.with_suffix(ADOPTED))
    stored.reader.close_unlinked()
    assert open_descriptors() == before
    assert stored.read() == stored.body


@pytest.mark.parametrize(("number", "closed"), [(errno.ESTALE, 1), (errno.EIO, 0)])
def test_only_a_stale_segment_is_closed_of_those_that_fail(
    stored: BodyInSegment, monkeypatch: pytest.MonkeyPatch, number: int, closed: int
) -> None:
    """On NFS another host has removed it."""

    def fail(_: SegmentFile) -> os.stat_result:
        raise OSError(number, os.strerror(number))

    stored.read()
    before = open_descriptors()
    monkeypatch.setattr(SegmentFile, "status", fail)
    stored.reader.close_unlinked()
    assert open_descriptors() == before - closed


def test_a_segment_that_another_file_replaced_is_read_after_reopening(
    stored: BodyInSegment,
) -> None:
    """An operator puts a copy from a backup in the place of a damaged segment."""
    octets = stored.path.read_bytes()
    stored.flip(stored.place.position)
    with pytest.raises(WrongBody):
        stored.read()
    stored.path.unlink()
    stored.path.write_bytes(octets)
    with pytest.raises(WrongBody):
        stored.read()
    stored.reader.reopen(stored.segment)
    assert stored.read() == stored.body


def test_a_segment_of_another_id_under_the_name_never_verifies(stored: BodyInSegment) -> None:
    other = new_id()
    (stored.path.parent / (other + OWNED)).write_bytes(stored.path.read_bytes())
    with pytest.raises(WrongBody, match="damaged"):
        stored.reader.read(Place(other, stored.place.position), len(stored.body))


class BusyDirectory(JournalDirectory):
    """Another process adopts each segment just before it is opened for the first time."""

    def open(self, name: str, *, write: bool = False) -> SegmentFile:
        if name.endswith(OWNED) and name in self.names():
            self.rename(name, name.replace(OWNED, ADOPTED))
        return super().open(name, write=write)


def test_a_rename_between_two_tries_does_not_hide_a_segment(
    stored: BodyInSegment, tmp_path: Path
) -> None:
    busy = JournalReader(BusyDirectory(os.open(tmp_path, os.O_RDONLY)))
    assert busy.read(stored.place, len(stored.body)) == stored.body
    assert stored.directory.names() == [stored.segment + ADOPTED]


def test_an_error_of_the_file_system_is_no_wrong_body(stored: BodyInSegment) -> None:
    stored.path.unlink()
    stored.path.mkdir()
    with pytest.raises(OSError):
        stored.read()


def test_threads_read_while_others_reopen(stored: BodyInSegment) -> None:
    def read(turn: int) -> bool:
        if turn % 3 == 0:
            stored.reader.reopen(stored.segment)
        if turn % 5 == 0:
            stored.reader.close_unlinked()
        return stored.read() == stored.body

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, range(400)))
    assert stored.path.stat().st_size == SMALL
