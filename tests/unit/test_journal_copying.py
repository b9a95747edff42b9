"""Copy segments: whole and durable under their name, or not there at all."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.spool.journal.adoption import adopt
from relay.spool.journal.copying import write_copy
from relay.spool.journal.directory import COPY, JournalDirectory
from relay.spool.journal.format import BLOCK, Place
from relay.spool.journal.reader import JournalReader
from relay.spool.journal.scan import read_header
from tests.journal_records import message, open_journal, scanned, told_calls

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
    segment, positions, end = write_copy(directory, SPOOL, records)
    assert directory.names() == [segment + COPY]
    file = directory.open(segment + COPY)
    header = read_header(file)
    assert (header.segment, header.spool, header.copy) == (segment, SPOOL, True)
    assert file.size() == end
    found, damages = scanned(file)
    assert not damages
    assert [one.queue_id for one in found] == [one.queue_id for one in records]
    reader = JournalReader(directory)
    for record, position in zip(records, positions, strict=True):
        assert reader.read(Place(segment, position), len(memoryview(record.body))) == record.body
    assert adopt(directory, skip=set()) == []


def test_a_copy_is_durable_before_it_has_its_name(
    directory: JournalDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = told_calls(monkeypatch)
    write_copy(directory, SPOOL, [message(3000)])
    assert calls == ["write", "sync", f"rename to {COPY}", "sync names"]


@pytest.mark.usefixtures("file_limit")
@pytest.mark.parametrize("room", [0, 40, BLOCK, BLOCK + 100, 2 * BLOCK])
def test_a_copy_without_room_leaves_no_file(directory: JournalDirectory, room: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    with pytest.raises(OSError):
        write_copy(directory, SPOOL, [message(9000)])
    assert directory.names() == []
