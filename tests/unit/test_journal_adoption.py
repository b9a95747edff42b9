"""Adoption: segments without an owner are taken over, others are not."""

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from relay.ids import new_id
from relay.spool.journal.adoption import adopt, adopt_one, voided_batches
from relay.spool.journal.directory import (
    ADOPTED,
    COPY,
    DIRECTORY,
    NEW,
    OWNED,
    JournalDirectory,
    SegmentFile,
)
from relay.spool.journal.format import (
    BLOCK,
    SegmentHeader,
    VoidedBatch,
    encode_segment_header,
    encode_void,
)
from relay.spool.journal.supply import make_segment
from tests.journal_records import SMALL, message, new_writer, open_journal, scanned

SPOOL = "ab" * 16


@pytest.fixture
def directory(tmp_path: Path) -> JournalDirectory:
    return open_journal(tmp_path)


def abandoned(directory: JournalDirectory, suffix: str = OWNED, *, host: str = "") -> str:
    """A segment whose owner has ended; its id."""
    segment = new_id()
    header = SegmentHeader(segment, SPOOL, 1, host or socket.gethostname(), suffix == COPY)
    file = directory.create(segment + suffix)
    file.write([encode_segment_header(header)], 0)
    file.fill(BLOCK, SMALL)
    file.close()
    return segment


def adopted_ids(directory: JournalDirectory, *, local: bool = True) -> list[str]:
    adopted = adopt(directory, skip=set(), local=local)
    for one in adopted:
        one.file.close()
    return [one.header.segment for one in adopted]


def test_a_segment_without_an_owner_is_adopted_and_locked(directory: JournalDirectory) -> None:
    writer, _ = new_writer(directory)
    records = [message(), message()]
    segment = writer.append(records).segment
    writer.retire()
    writer.close_segment(segment)
    (one,) = adopt(directory, skip=set())
    assert one.header.segment == segment
    assert directory.names() == [segment + ADOPTED]
    assert [record.queue_id for record in scanned(one.file)[0]] == [r.queue_id for r in records]
    assert adopt(directory, skip=set()) == []
    one.file.close()
    assert adopted_ids(directory) == [segment]


def test_a_segment_with_an_owner_is_left_alone(directory: JournalDirectory) -> None:
    segment, file = make_segment(directory, SPOOL, size=SMALL)
    assert adopt(directory, skip=set()) == []
    assert directory.names() == [segment + OWNED]
    file.close()
    assert adopted_ids(directory) == [segment]


def test_segments_to_skip_and_copies_are_left_alone(directory: JournalDirectory) -> None:
    skipped, copy, free = (
        abandoned(directory),
        abandoned(directory, COPY),
        abandoned(directory),
    )
    assert [one.header.segment for one in adopt(directory, skip={skipped})] == [free]
    names = {skipped + OWNED, copy + COPY, free + ADOPTED}
    assert {*directory.names()} == names
    assert adopt_one(directory, copy + COPY, local=True) is None
    assert adopt_one(directory, copy + COPY, local=True, forced=True) is None
    assert {*directory.names()} == names


def test_segments_are_adopted_by_age(directory: JournalDirectory) -> None:
    segments = [f"{at:032x}" for at in (5, 3, 9)]
    for segment in segments:
        header = SegmentHeader(segment, SPOOL, 1, "host")
        directory.create(segment + OWNED).write([encode_segment_header(header)], 0)
    assert adopted_ids(directory) == sorted(segments)


def test_files_that_were_never_finished_are_removed(directory: JournalDirectory) -> None:
    being_made, left = new_id(), new_id()
    file = directory.create(being_made + NEW)
    directory.create(left + NEW).close()
    assert adopt(directory, skip=set()) == []
    assert directory.names() == [being_made + NEW]
    file.close()


def test_other_names_are_left_alone(directory: JournalDirectory, tmp_path: Path) -> None:
    for name in ("mark", "backup.segment", "x.new", "ABC.adopted", f"{'g' * 32}.segment"):
        (tmp_path / "journal" / name).write_bytes(b"")
    names = directory.names()
    assert adopt(directory, skip=set()) == []
    assert voided_batches(directory) == set()
    assert directory.names() == names


@pytest.mark.parametrize("suffix", [OWNED, ADOPTED])
def test_a_network_file_system_gives_only_segments_of_the_own_host(
    directory: JournalDirectory, suffix: str
) -> None:
    ours = abandoned(directory, suffix)
    other = abandoned(directory, suffix, host="other.example.com")
    assert adopted_ids(directory, local=False) == [ours]
    assert other + suffix in directory.names()
    assert adopt_one(directory, other + suffix, local=False) is None
    forced = adopt_one(directory, other + suffix, local=False, forced=True)
    assert forced is not None
    assert forced.header.host == "other.example.com"
    forced.file.close()
    assert adopted_ids(directory, local=True) == sorted([ours, other])


def test_an_order_adopts_a_segment_although_its_lock_is_held(directory: JournalDirectory) -> None:
    """On a network file system the server may keep the lock of a host that is gone."""
    segment, file = make_segment(directory, SPOOL, size=SMALL)
    assert adopt_one(directory, segment + OWNED, local=False) is None
    forced = adopt_one(directory, segment + OWNED, local=False, forced=True)
    assert forced is not None
    assert directory.leads_to(segment + ADOPTED, file)
    assert not directory.leads_to(segment + OWNED, file)


def test_a_segment_that_another_process_took_first_is_left_alone(
    directory: JournalDirectory,
) -> None:
    segment = abandoned(directory)
    assert adopt_one(directory, new_id() + OWNED, local=True) is None
    directory.rename(segment + OWNED, segment + ADOPTED)
    assert adopt_one(directory, segment + OWNED, local=True) is None


def test_no_order_takes_a_segment_from_a_living_owner_of_this_machine(
    directory: JournalDirectory,
) -> None:
    segment, file = make_segment(directory, SPOOL, size=SMALL)
    assert adopt_one(directory, segment + OWNED, local=True, forced=True) is None
    assert directory.leads_to(segment + OWNED, file)


def test_an_owner_is_seen_by_its_lock(directory: JournalDirectory) -> None:
    segment, file = make_segment(directory, SPOOL, size=SMALL)
    other = directory.open(segment + OWNED)
    assert other.has_owner()
    assert not file.has_owner()
    file.close()
    assert not other.has_owner()
    assert adopted_ids(directory) == [segment], "to ask took no lock"


def test_a_sealed_segment_that_a_new_database_does_not_know_is_adopted(
    directory: JournalDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment, original = abandoned(directory), os.open
    directory.open(segment + OWNED, write=True).protect()
    assert directory.open(segment + OWNED).sealed()

    def strict(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        """As for a user who is not root."""
        handle = original(path, flags & ~os.O_RDWR, mode, dir_fd=dir_fd)
        writable = os.fstat(handle).st_mode & stat.S_IWUSR
        os.close(handle)
        if flags & os.O_RDWR and not writable:
            raise PermissionError(path)
        return original(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", strict)
    assert adopted_ids(directory) == [segment]


class MovingDirectory(JournalDirectory):
    """Another process adopts, or adopts and removes, the segment as soon as this one opens it."""

    removed = False

    def open(self, name: str, *, write: bool = False) -> SegmentFile:
        file = super().open(name, write=write)
        if write and name.endswith(OWNED):
            super().rename(name, name.replace(OWNED, ADOPTED))
            if self.removed:
                self.unlink(name.replace(OWNED, ADOPTED))
        return file


@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("forced", [False, True])
def test_a_segment_that_moves_while_it_is_adopted_is_left_alone(
    tmp_path: Path, removed: bool, forced: bool
) -> None:
    open_journal(tmp_path)
    moving = MovingDirectory(os.open(tmp_path, os.O_RDONLY))
    moving.removed = removed
    segment = abandoned(moving)
    assert adopt_one(moving, segment + OWNED, local=True, forced=forced) is None
    assert moving.names() == ([] if removed else [segment + ADOPTED])


class ToldFile(SegmentFile):
    """Tells when it is synced."""

    def __init__(self, handle: int, calls: list[str], *, fails: bool = False) -> None:
        super().__init__(handle)
        self.calls = calls
        self.fails = fails

    def sync(self) -> None:
        self.calls.append("sync file")
        if self.fails:
            raise OSError("the disk failed")
        super().sync()


class WatchedDirectory(JournalDirectory):
    """Tells in which order a segment is adopted; `broken`: a name whose file cannot be synced."""

    def __init__(self, path: Path) -> None:
        super().__init__(os.open(path, os.O_RDONLY))
        self.path = path
        self.calls: list[str] = []
        self.broken = ""

    def open(self, name: str, *, write: bool = False) -> SegmentFile:
        super().open(name, write=write).close()
        handle = os.open(self.path / DIRECTORY / name, os.O_RDWR if write else os.O_RDONLY)
        return ToldFile(handle, self.calls, fails=name == self.broken)

    def rename(self, old: str, new: str) -> None:
        self.calls.append("rename")
        super().rename(old, new)

    def sync(self) -> None:
        self.calls.append("sync directory")
        super().sync()


def test_an_adopted_segment_is_durable_before_it_is_read(
    directory: JournalDirectory, tmp_path: Path
) -> None:
    """Its owner may have ended between its write and its sync."""
    abandoned(directory)
    watched = WatchedDirectory(tmp_path)
    adopted_ids(watched)
    assert watched.calls == ["rename", "sync directory", "sync file"]
    watched.calls.clear()
    adopted_ids(watched)
    assert watched.calls == ["sync file"]


def test_one_broken_segment_does_not_keep_the_others(
    directory: JournalDirectory, tmp_path: Path
) -> None:
    segments = sorted(abandoned(directory) for _ in range(3))
    watched = WatchedDirectory(tmp_path)
    watched.broken = segments[1] + OWNED
    with capture_logs() as logs:
        assert adopted_ids(watched) == [segments[0], segments[2]]
    assert [entry["event"] for entry in logs] == ["segment unreadable"]
    watched.broken = ""
    assert adopted_ids(watched) == segments


@pytest.mark.parametrize("octets", [b"", bytes(SMALL), b"QMQPjrnl" + bytes(BLOCK)])
def test_a_file_without_a_header_is_left_alone(
    directory: JournalDirectory, tmp_path: Path, octets: bytes
) -> None:
    path = tmp_path / "journal" / (new_id() + OWNED)
    path.write_bytes(octets)
    other = abandoned(directory)
    with capture_logs() as logs:
        assert adopted_ids(directory) == [other]
    assert [entry["event"] for entry in logs] == ["segment unreadable"]
    assert path.read_bytes() == octets


def test_a_copy_under_another_name_never_replaces_the_segment(
    directory: JournalDirectory, tmp_path: Path
) -> None:
    segment, journal = abandoned(directory), tmp_path / "journal"
    assert adopted_ids(directory) == [segment]
    stranger = journal / (new_id() + OWNED)
    stranger.write_bytes((journal / (segment + ADOPTED)).read_bytes())
    inode = (journal / (segment + ADOPTED)).stat().st_ino
    assert adopted_ids(directory) == [segment]
    assert (journal / (segment + ADOPTED)).stat().st_ino == inode
    assert stranger.exists()


# Voids


def declare_void(directory: JournalDirectory, suffix: str = OWNED) -> tuple[str, VoidedBatch]:
    """A segment that declares a batch void."""
    segment, void = abandoned(directory, suffix), VoidedBatch(new_id(), 3 * BLOCK)
    file = directory.open(segment + suffix, write=True)
    file.write([encode_void(bytes.fromhex(segment), BLOCK, void, mark=0, written_at=0)], BLOCK)
    file.close()
    return segment, void


def test_voids_are_read_under_every_name(directory: JournalDirectory) -> None:
    voids = {declare_void(directory, suffix)[1] for suffix in (OWNED, ADOPTED, COPY)}
    declare_void(directory, NEW)
    abandoned(directory)
    assert voided_batches(directory) == voids


def test_a_damaged_segment_header_does_not_hide_a_void(directory: JournalDirectory) -> None:
    segment, void = declare_void(directory)
    directory.open(segment + OWNED, write=True).write([bytes(BLOCK)], 0)
    assert voided_batches(directory) == {void}


class RacingDirectory(JournalDirectory):
    """Another process adopts the segments while this one reads their names: each name that is read
    is old already (`late`), or neither name is seen (`hidden`)."""

    late = False
    hidden = False

    def names(self) -> list[str]:
        names = super().names()
        for name in names:
            if name.endswith(OWNED):
                self.rename(name, name.replace(OWNED, ADOPTED))
                if self.hidden:
                    names.remove(name)
        return names


@pytest.mark.parametrize("way", ["late", "hidden"])
def test_a_void_is_seen_although_its_segment_is_renamed(
    directory: JournalDirectory, tmp_path: Path, way: str
) -> None:
    _, void = declare_void(directory)
    racing = RacingDirectory(os.open(tmp_path, os.O_RDONLY))
    setattr(racing, way, True)
    assert voided_batches(racing) == {void}


# Locks


@pytest.fixture
def child(directory: JournalDirectory) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """A segment and a child process that its owner started with all inheritable descriptors. The
    owner's file is closed."""
    segment, file = make_segment(directory, SPOOL, size=SMALL)
    other = directory.open(segment + OWNED)
    program = (
        "import os, sys; print('ready', *os.listdir('/proc/self/fd'), flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        close_fds=False,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"ready")
    file.close()
    other.close()
    yield segment, process
    process.communicate()


def test_a_child_process_does_not_keep_the_lock(
    directory: JournalDirectory, child: tuple[str, "subprocess.Popen[bytes]"]
) -> None:
    segment, process = child
    assert adopted_ids(directory) == [segment]
    assert process.poll() is None


def test_the_lock_ends_with_its_process(directory: JournalDirectory, tmp_path: Path) -> None:
    program = f"""
import os, sys
from relay.spool.journal.directory import JournalDirectory
from relay.spool.journal.supply import make_segment
directory = JournalDirectory(os.open({str(tmp_path)!r}, os.O_RDONLY))
segment, file = make_segment(directory, {SPOOL!r}, size={SMALL})
print(segment, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        segment = process.stdout.readline().decode().strip()
        assert adopt(directory, skip=set()) == []
        process.kill()
        process.wait()
        assert adopted_ids(directory) == [segment]


def test_the_name_of_the_directory_is_durable_although_it_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that made it may have ended before its sync."""
    (tmp_path / "journal").mkdir()
    spool = os.open(tmp_path, os.O_RDONLY)
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    JournalDirectory(spool).make()
    assert synced == [spool]
