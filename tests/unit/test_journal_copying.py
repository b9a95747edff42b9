"""Copy segments: whole and durable under their name, or not there at all."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.spool.journal.adoption import adopt
from relay.spool.journal.copying import write_copy
from relay.spool.journal.directory import COPY, JournalDirectory
from relay.spool.journal.format import BLOCK, JournalRecord, Place
from relay.spool.journal.reader import JournalReader
from relay.spool.journal.scan import ScannedBatch, read_header, scan
from tests.journal_records import content, message, open_journal, scanned, told_calls

SPOOL = "ab" * 16


@pytest.fixture
def directory(tmp_path: Path) -> JournalDirectory:
    return open_journal(tmp_path)


@pytest.fixture
def file_limit() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_copy_holds_the_records(directory: JournalDirectory) -> None:
    records = [message(3000), message(0), message(9000)]
    segment, positions, end = write_copy(directory, SPOOL, iter(records))
    assert directory.names() == [segment + COPY]
    file = directory.open(segment + COPY)
    header = read_header(file)
    assert (header.segment, header.spool, header.copy) == (segment, SPOOL, True)
    assert file.size() == end
    found, damages = scanned(file)
    assert not damages
    assert [one.queue_id for one in found] == [one.queue_id for one in records]
    reader = JournalReader(directory)
    for record in records:
        place = Place(segment, positions[record.queue_id])
        assert reader.read(place, len(memoryview(record.body))) == record.body
    assert adopt(directory, skip=set()) == []


def test_a_copy_is_durable_before_it_has_its_name(
    directory: JournalDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = told_calls(monkeypatch)
    write_copy(directory, SPOOL, [message(3000)])
    assert calls == ["write", "write", "sync", f"rename to {COPY}", "sync names"]


def test_a_copy_is_written_batch_by_batch(
    directory: JournalDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that neither the copy nor a later scan needs memory for all of it."""
    monkeypatch.setattr("relay.spool.journal.copying.BATCH_SIZE", 10_000)
    calls = told_calls(monkeypatch)
    records = [message(4000, envelope=size) for size in (100, 4000, 30_000, 10, 20)]

    def read() -> Iterator[JournalRecord]:
        for record in records:
            calls.append("read")
            yield record

    segment, positions, _ = write_copy(directory, SPOOL, read())
    batches = [*scan(file := directory.open(segment + COPY), read_header(file))]
    assert all(isinstance(batch, ScannedBatch) and not batch.damages for batch in batches)
    counts = [len(batch.records) for batch in batches if isinstance(batch, ScannedBatch)]
    assert counts == [1, 1, 1, 2]
    found, _ = content(batches)
    assert {record.queue_id: record.position for record in found} == positions
    assert [record.queue_id for record in found] == [record.queue_id for record in records]
    taken = "write read read write read write read write read write sync"  # the header is first
    assert " ".join(calls).startswith(taken)


def test_a_copy_of_nothing_leaves_no_file(directory: JournalDirectory) -> None:
    assert not write_copy(directory, SPOOL, []).positions
    assert directory.names() == []


def test_a_copy_whose_records_cannot_be_read_leaves_no_file(directory: JournalDirectory) -> None:
    def read() -> Iterator[JournalRecord]:
        yield message(3000)
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        write_copy(directory, SPOOL, read())
    assert directory.names() == []


@pytest.mark.usefixtures("file_limit")
@pytest.mark.parametrize("room", [0, 40, BLOCK, BLOCK + 100, 2 * BLOCK])
def test_a_copy_without_room_leaves_no_file(directory: JournalDirectory, room: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    with pytest.raises(OSError):
        write_copy(directory, SPOOL, [message(9000)])
    assert directory.names() == []
