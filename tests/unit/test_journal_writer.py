"""Appending: what returned is on the disk, and what failed is void or unknown, never both."""

import errno
import os
import resource
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from relay.spool.journal.adoption import voided_batches
from relay.spool.journal.directory import (
    ADOPTED,
    DIRECTORY,
    NEW,
    OWNED,
    JournalDirectory,
    SegmentFile,
)
from relay.spool.journal.format import BLOCK, JournalRecord, VoidedBatch
from relay.spool.journal.scan import ScannedBatch, first_void, read_header, scan
from relay.spool.journal.supply import MIN_FREE, SegmentSupply, make_segment
from relay.spool.journal.writer import AppendFailed, AppendUnknown, JournalWriter
from tests.journal_records import (
    SMALL,
    RetiredSegments,
    message,
    new_writer,
    open_journal,
    scanned,
)
from tests.waiting import until


class BrokenFile(SegmentFile):
    """A file whose disk fails. The kernel does not let a test break a real one."""

    def __init__(self, handle: int, faults: "BrokenDirectory") -> None:
        super().__init__(handle)
        self.faults = faults
        self.failed = False

    def write(self, parts: Sequence[Any], position: int) -> int:
        assert not self.failed, "a failed segment was written again"
        self.failed = self.faults.strike("write")
        if self.failed:
            raise OSError(errno.EIO, "the write failed")
        return super().write(parts, position)

    def sync(self) -> None:
        assert not self.failed, "a failed segment was synced again"
        self.failed = self.faults.strike("sync")
        if self.failed:
            raise OSError(errno.EIO, "the sync failed")
        self.faults.synced.append(self)
        super().sync()


class BrokenDirectory(JournalDirectory):
    """`plan`: how many calls go well before each failing one, by the name of the call."""

    def __init__(self, path: Path) -> None:
        super().__init__(os.open(path, os.O_RDONLY | os.O_DIRECTORY))
        self.make()
        self.path = path
        self.plan: dict[str, list[int]] = {}
        self.synced: list[SegmentFile] = []

    def strike(self, call: str) -> bool:
        waits = self.plan.get(call)
        if not waits:
            return False
        waits[0] -= 1
        if waits[0] >= 0:
            return False
        waits.pop(0)
        return True

    def create(self, name: str) -> SegmentFile:
        if self.strike("create"):
            raise OSError(errno.ENOSPC, "no room")
        return reopened(super().create(name), BrokenFile(self.descriptor(name), self))

    def descriptor(self, name: str) -> int:
        return os.open(self.path / DIRECTORY / name, os.O_RDWR)


def reopened[File: SegmentFile](file: SegmentFile, other: File) -> File:
    """Close a file, and give its lock to another that leads to the same segment."""
    file.close()
    assert other.lock()
    return other


@pytest.fixture
def directory(tmp_path: Path) -> JournalDirectory:
    return open_journal(tmp_path)


@pytest.fixture
def broken(tmp_path: Path) -> BrokenDirectory:
    return BrokenDirectory(tmp_path)


@pytest.fixture
def file_limit() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def found_ids(directory: JournalDirectory, segment: str) -> list[str]:
    file = directory.open_segment(segment)
    assert file is not None
    return [record.queue_id for record in scanned(file)[0]]


def test_what_was_appended_is_found(directory: JournalDirectory) -> None:
    writer, retired = new_writer(directory)
    written: dict[str, list[JournalRecord]] = {}
    for round_ in range(24):
        records = [message(100 * round_ + k) for k in range(round_ % 3 + 1)]
        batch = writer.append(records, mark=round_)
        assert (batch.start == BLOCK) == (batch.segment not in written)
        written.setdefault(batch.segment, []).extend(records)
        file = writer.files[batch.segment]
        for record, position in zip(records, batch.positions, strict=True):
            assert file.read(len(memoryview(record.body)), position) == record.body
        assert batch.end == writer.position
        assert batch.start % BLOCK == batch.end % BLOCK == 0
    assert len(written) > 1
    assert retired == dict.fromkeys(list(written)[:-1], True)
    for segment, records in written.items():
        assert found_ids(directory, segment) == [record.queue_id for record in records]
        assert writer.files[segment].size() == SMALL
    assert not voided_batches(directory)


def test_a_mark_and_a_time_stand_in_each_batch(directory: JournalDirectory) -> None:
    writer, _ = new_writer(directory)
    batch = writer.append([message()], mark=77)
    file = writer.files[batch.segment]
    (one,) = scan(file, read_header(file))
    assert isinstance(one, ScannedBatch)
    assert one.header.mark == 77
    assert one.header.written_at >= read_header(file).created_at


def test_a_batch_that_fills_the_segment_fits(directory: JournalDirectory) -> None:
    writer, retired = new_writer(directory)
    room = SMALL - 2 * BLOCK
    batch = writer.append([message(room, envelope=0)])
    assert batch.end == SMALL
    writer.append([message(0)])
    assert list(retired.values()) == [True]


def test_a_batch_that_is_larger_than_a_segment_is_refused(directory: JournalDirectory) -> None:
    writer, _ = new_writer(directory)
    with pytest.raises(AppendFailed) as raised:
        writer.append([message(SMALL)])
    assert raised.value.errno == errno.EFBIG
    assert directory.names() == [], "it costs no segment"
    assert writer.append([message()]).start == BLOCK
    with pytest.raises(AppendFailed):
        writer.append([message(SMALL)])
    assert writer.append([message()]).start > BLOCK, "in the same segment"


def assert_void(directory: JournalDirectory, writer: JournalWriter, failed: VoidedBatch) -> None:
    """The current segment declares the batch void, and goes on."""
    assert voided_batches(directory) == {failed}
    assert writer.segment != failed.segment
    file = writer.files[writer.segment]
    assert first_void(file, read_header(file)) == failed
    batch = writer.append([message()])
    assert batch.segment == file_id(file)
    assert batch.start == 2 * BLOCK


def file_id(file: SegmentFile) -> str:
    return read_header(file).segment


@pytest.mark.usefixtures("file_limit")
@pytest.mark.parametrize("room", [0, 512, BLOCK, BLOCK + 100])
def test_a_short_write_is_void(tmp_path: Path, room: int) -> None:
    directory = open_journal(tmp_path)
    retired = RetiredSegments()
    # The second segment is made before the file system has no room.
    supply = SegmentSupply(directory, "ab" * 16, size=SMALL)
    writer = JournalWriter(directory, supply, on_retired=retired.add, segment_size=SMALL)
    kept = message(3 * BLOCK)
    first = writer.append([kept])
    until(lambda: len([*directory.segments(OWNED)]) == 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (first.end + room, resource.RLIM_INFINITY))
    with pytest.raises(AppendFailed) as raised:
        writer.append([message(2 * BLOCK), message()])
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert raised.value.errno == (errno.ENOSPC if room else errno.EFBIG)
    assert retired == {first.segment: True}
    assert found_ids(directory, first.segment) == [kept.queue_id]
    assert voided_batches(directory) == {VoidedBatch(first.segment, first.end)}
    supply.close()


@pytest.mark.parametrize("call", ["write", "sync"])
def test_a_batch_that_failed_is_void(broken: BrokenDirectory, call: str) -> None:
    writer, retired = new_writer(broken)
    first = writer.append([message()])
    broken.plan = {call: [0]}
    broken.synced.clear()
    with pytest.raises(AppendFailed) as raised:
        writer.append([message()])
    assert raised.value.errno == errno.EIO
    # The void was synced before the error was raised.
    assert broken.synced == [writer.files[writer.segment]]
    assert retired == {first.segment: True}
    assert_void(broken, writer, VoidedBatch(first.segment, first.end))


def test_the_first_batch_of_a_segment_may_be_void(broken: BrokenDirectory) -> None:
    writer, retired = new_writer(broken)
    broken.plan = {"sync": [0]}
    with pytest.raises(AppendFailed):
        writer.append([message()])
    ((failed, orderly),) = retired.items()
    assert orderly
    assert_void(broken, writer, VoidedBatch(failed, BLOCK))


@pytest.mark.parametrize(
    "plan",
    [
        {"sync": [0, 0]},
        {"sync": [0], "write": [2]},  # the batch, the header of the new segment, its void
        {"sync": [0], "create": [0]},
    ],
    ids=["sync", "write", "create"],
)
def test_a_batch_whose_void_failed_is_unknown(
    broken: BrokenDirectory, plan: dict[str, list[int]]
) -> None:
    writer, retired = new_writer(broken)
    first = writer.append([message()])
    broken.plan = {call: [*waits] for call, waits in plan.items()}
    with pytest.raises(AppendUnknown):
        writer.append([message()])
    assert not any(broken.plan.values())
    assert retired.pop(first.segment) is False
    assert list(retired.values()) == [False] * (len(writer.files) - 1)
    next_one = writer.append([message()])
    assert next_one.segment not in retired
    assert next_one.segment != first.segment
    assert next_one.start == BLOCK


def test_a_segment_that_cannot_be_made_is_a_failure(broken: BrokenDirectory) -> None:
    writer, retired = new_writer(broken)
    broken.plan = {"create": [0]}
    with pytest.raises(AppendFailed) as raised:
        writer.append([message()])
    assert raised.value.errno == errno.ENOSPC
    assert not retired
    assert writer.append([message()]).start == BLOCK
    assert not voided_batches(broken)


def test_a_full_segment_stays_retired_when_the_next_one_fails(broken: BrokenDirectory) -> None:
    writer, retired = new_writer(broken)
    first = writer.append([message(SMALL - 4 * BLOCK)])
    broken.plan = {"create": [0, 0]}
    for _ in range(2):
        with pytest.raises(AppendFailed):
            writer.append([message(4 * BLOCK)])
    assert retired == {first.segment: True}
    assert writer.append([message(4 * BLOCK)]).start == BLOCK


def test_an_adopted_segment_gives_no_reply(directory: JournalDirectory) -> None:
    writer, retired = new_writer(directory)
    first = writer.append([message()])
    directory.rename(first.segment + OWNED, first.segment + ADOPTED)
    with pytest.raises(AppendUnknown):
        writer.append([message()])
    assert retired == {first.segment: False}
    assert writer.append([message()]).segment != first.segment
    assert not voided_batches(directory)


def test_a_segment_that_is_adopted_during_its_sync_gives_no_reply(
    directory: JournalDirectory,
) -> None:
    """On a network file system the adopter may have read octets from before the write."""
    writer, _ = new_writer(directory)
    first = writer.append([message()])
    file = writer.files[first.segment]
    sync = file.sync

    def adopted() -> None:
        sync()
        directory.rename(first.segment + OWNED, first.segment + ADOPTED)

    file.sync = adopted  # type: ignore[method-assign]
    with pytest.raises(AppendUnknown):
        writer.append([message()])


@pytest.mark.parametrize("twin", [False, True])
def test_a_segment_that_was_removed_gives_no_reply(
    directory: JournalDirectory, tmp_path: Path, twin: bool
) -> None:
    writer, _ = new_writer(directory)
    first = writer.append([message()])
    path = tmp_path / "journal" / (first.segment + OWNED)
    octets = path.read_bytes()
    path.unlink()
    if twin:  # another file has the name
        path.write_bytes(octets)
    with pytest.raises(AppendUnknown):
        writer.append([message()])


def test_a_batch_that_was_adopted_before_its_void_is_unknown(broken: BrokenDirectory) -> None:
    """The adopter reads the voids before the owner has written one."""
    writer, retired = new_writer(broken)
    first = writer.append([message()])
    file = writer.files[first.segment]
    assert isinstance(file, BrokenFile)

    def adopt_and_fail() -> None:
        broken.rename(first.segment + OWNED, first.segment + ADOPTED)
        raise OSError(errno.EIO, "the sync failed")

    file.sync = adopt_and_fail  # type: ignore[method-assign]
    with pytest.raises(AppendUnknown):
        writer.append([message()])
    assert retired[first.segment] is False
    assert writer.append([message()]).start == BLOCK


def test_a_retired_segment_keeps_its_lock_until_it_is_closed(directory: JournalDirectory) -> None:
    writer, retired = new_writer(directory)
    first = writer.append([message()])
    writer.retire()
    writer.retire()
    assert retired == {first.segment: True}
    other = directory.open(first.segment + OWNED, write=True)
    assert not other.lock()
    writer.close_segment(first.segment)
    writer.close_segment(first.segment)
    assert other.lock()


def test_a_segment_that_was_closed_is_not_written_again(directory: JournalDirectory) -> None:
    """The rows of the segment were made by another process, so this one let it go."""
    writer, retired = new_writer(directory)
    first = writer.append([message()])
    writer.close_segment(first.segment)
    assert writer.append([message()]).segment != first.segment
    assert not retired


class ClosingFile(BrokenFile):
    """Another thread closes the segment while it is being written."""

    writer: JournalWriter

    def write(self, parts: Sequence[Any], position: int) -> int:
        self.writer.close_segment(self.writer.segment)
        return super().write(parts, position)


@pytest.mark.parametrize("fails", [False, True])
def test_a_segment_stays_open_until_its_write_has_ended(
    broken: BrokenDirectory, fails: bool
) -> None:
    writer, _ = new_writer(broken)
    first = writer.append([message()])
    file = ClosingFile(broken.descriptor(first.segment + OWNED), broken)
    file.writer = writer
    writer.files[first.segment] = reopened(writer.files[first.segment], file)
    record = message()
    if fails:
        broken.plan = {"sync": [0]}
        with pytest.raises(AppendFailed):
            writer.append([record])
        assert voided_batches(broken) == {VoidedBatch(first.segment, first.end)}
    else:
        writer.append([record])
        assert record.queue_id in found_ids(broken, first.segment)
    assert writer.append([message()]).segment != first.segment


# Supply


def test_a_new_segment_has_its_header_and_zeros(directory: JournalDirectory) -> None:
    segment, file = make_segment(directory, "ab" * 16, size=SMALL)
    header = read_header(file)
    assert (header.segment, header.spool, header.copy) == (segment, "ab" * 16, False)
    assert file.size() == SMALL
    assert not any(file.read(SMALL, BLOCK))
    assert directory.names() == [segment + OWNED]
    assert not directory.open(segment + OWNED, write=True).lock()


class ShortFile(SegmentFile):
    """The disk takes a part of the header, and then everything again."""

    def write(self, parts: Sequence[Any], position: int) -> int:
        return super().write([bytes(parts[0])[:40]], position)


class ShortDirectory(JournalDirectory):
    path: Path

    def create(self, name: str) -> SegmentFile:
        file = super().create(name)
        return reopened(file, ShortFile(os.open(self.path / DIRECTORY / name, os.O_RDWR)))


def test_a_header_that_is_written_in_part_makes_no_segment(tmp_path: Path) -> None:
    directory = ShortDirectory(os.open(tmp_path, os.O_RDONLY))
    directory.path = tmp_path
    directory.make()
    with pytest.raises(OSError) as raised:
        make_segment(directory, "ab" * 16, size=SMALL)
    assert raised.value.errno == errno.ENOSPC
    assert directory.names() == []


@pytest.mark.usefixtures("file_limit")
def test_a_segment_without_room_leaves_no_file(directory: JournalDirectory) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL - 1, resource.RLIM_INFINITY))
    with pytest.raises(OSError):
        make_segment(directory, "ab" * 16, size=SMALL)
    assert directory.names() == []


class ToldDirectory(JournalDirectory):
    """Tells in which order a segment becomes durable."""

    def __init__(self, path: Path) -> None:
        super().__init__(os.open(path, os.O_RDONLY))
        self.calls: list[str] = []

    def rename(self, old: str, new: str) -> None:
        self.calls.append(f"{old[32:]} to {new[32:]}")
        super().rename(old, new)

    def sync(self) -> None:
        self.calls.append("sync")
        super().sync()


def test_a_new_segment_is_named_and_then_durable(tmp_path: Path) -> None:
    directory = ToldDirectory(tmp_path)
    directory.make()
    make_segment(directory, "ab" * 16, size=SMALL)
    assert directory.calls == [f"{NEW} to {OWNED}", "sync"]


def test_a_supply_makes_the_next_segment_ahead(directory: JournalDirectory) -> None:
    supply = SegmentSupply(directory, "ab" * 16, size=SMALL)
    taken = [supply.take()[0] for _ in range(3)]
    assert len({*taken}) == 3
    supply.close()
    assert directory.names() == sorted(segment + OWNED for segment in taken)


@pytest.mark.usefixtures("file_limit")
def test_a_supply_tells_a_failure_and_tries_again(directory: JournalDirectory) -> None:
    supply = SegmentSupply(directory, "ab" * 16, size=SMALL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL - 1, resource.RLIM_INFINITY))
    for _ in range(2):
        with pytest.raises(OSError):
            supply.take()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    segment, _ = supply.take()
    supply.close()
    assert directory.names() == [segment + OWNED]


def test_a_segment_is_taken_although_no_thread_can_be_started(
    directory: JournalDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    supply = SegmentSupply(directory, "ab" * 16, size=SMALL)
    supply.prepare()

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(2):
            supply.take()
    supply.close()


class NearlyFullDirectory(JournalDirectory):
    """A file system with so many octets free."""

    free = 0

    def __init__(self, path: Path) -> None:
        super().__init__(os.open(path, os.O_RDONLY))
        self.make()
        self.asked = threading.Event()

    def free_octets(self) -> int:
        free = self.free
        self.asked.set()
        return free


def test_a_segment_leaves_the_room_that_is_kept_free(tmp_path: Path) -> None:
    directory = NearlyFullDirectory(tmp_path)
    supply = SegmentSupply(directory, "ab" * 16, size=SMALL)
    directory.free = MIN_FREE + SMALL - 1
    for _ in range(2):
        with pytest.raises(OSError) as raised:
            supply.take()
        assert raised.value.errno == errno.ENOSPC
    assert directory.names() == []
    directory.free += 1
    supply.take()
    supply.close()


def test_a_segment_that_could_not_be_made_ahead_is_made_when_it_is_needed(tmp_path: Path) -> None:
    """The disk was full then."""
    directory = NearlyFullDirectory(tmp_path)
    supply = SegmentSupply(directory, "ab" * 16, size=SMALL)
    supply.prepare()
    assert directory.asked.wait(20)
    directory.free = 1 << 40
    supply.take()
    supply.close()
