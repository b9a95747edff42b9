"""Replay of a segment, without a database: what one transaction gets, and how old it is."""

import socket
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from reception import replay
from reception.replay import MAX_AGE, Backlog, OpenSegment, backlog, read_chunk
from relay.ids import new_id
from relay.queue.accept import NewMessage, NewRecipient, encode
from relay.spool.journal.directory import OWNED, JournalDirectory
from relay.spool.journal.format import BLOCK, JournalRecord, RecordKind, encode_segment_header
from relay.spool.journal.scan import read_header
from relay.spool.journal.writer import JournalWriter
from tests.journal_records import SMALL, DirectSupply, RetiredSegments, open_journal

BODY = b"Subject: x\n\ntext\n"


@pytest.fixture
def directory(tmp_path: Path) -> JournalDirectory:
    return open_journal(tmp_path)


class SteppedWriter(JournalWriter):
    """A writer whose clock shows the given times, one for each of its batches, and then the last
    one."""

    def __init__(self, directory: JournalDirectory, times: Sequence[float]) -> None:
        self.times = [*times]
        super().__init__(
            directory,
            DirectSupply(directory),
            on_retired=RetiredSegments().add,
            segment_size=SMALL,
            clock=lambda: self.times.pop(0) if len(self.times) > 1 else self.times[0],
        )


def record(kind: RecordKind = RecordKind.MESSAGE, size: int = len(BODY)) -> JournalRecord:
    message = NewMessage(
        new_id(), "a@example.com", size, [NewRecipient("b@example.org")], "192.0.2.1", "c", "SMTP"
    )
    return JournalRecord(kind, message.id, encode(message), BODY if kind is kind.MESSAGE else b"")


def written(writer: JournalWriter, count: int) -> OpenSegment:
    """The segment of so many batches of one message."""
    batches = [writer.append([record()]) for _ in range(count)]
    segment = batches[0].segment
    return OpenSegment(segment, segment + OWNED, writer.files[segment], BLOCK, batches[-1].end)


@pytest.mark.parametrize(
    ("seconds", "age"), [(1.7e9, MAX_AGE), (-500.0, 500.0), (1000.0, 0.0)], ids=str
)
def test_an_age_has_bounds_whatever_the_clocks_say(
    directory: JournalDirectory, seconds: float, age: float
) -> None:
    """A machine without a clock of its own begins at 1970, and corrects that later."""
    stamped = 60.0 if seconds > 1e9 else time.time() + seconds
    segment = written(SteppedWriter(directory, [stamped]), 1)
    chunk = read_chunk(segment, segment.end)
    assert chunk.age == pytest.approx(age, abs=5.0)
    assert chunk.arrived <= time.monotonic()


def test_a_chunk_becomes_older_while_it_waits(
    directory: JournalDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = written(SteppedWriter(directory, [time.time() - 10]), 1)
    chunk = read_chunk(segment, segment.end)
    later = time.monotonic() + 100
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert chunk.age == pytest.approx(110, abs=5.0)


def test_a_chunk_takes_messages_of_one_second(directory: JournalDirectory) -> None:
    segment = written(SteppedWriter(directory, [100.0, 100.9, 101.1]), 3)
    chunk = read_chunk(segment, segment.end)
    assert len(chunk.messages) == 2


def test_a_chunk_is_bounded_in_octets_of_envelopes(
    directory: JournalDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = written(SteppedWriter(directory, [100.0]), 4)
    rows = read_chunk(segment, segment.end).messages[0].rows
    monkeypatch.setattr(replay, "MAX_ROWS_OCTETS", 2 * len(rows))
    sizes = []
    while segment.committed < segment.end:
        chunk = read_chunk(segment, segment.end)
        segment.committed = chunk.end
        sizes.append(len(chunk.messages))
    assert sizes == [2, 2]
    monkeypatch.setattr(replay, "MAX_ROWS_OCTETS", 1)
    segment.committed = BLOCK
    assert len(read_chunk(segment, segment.end).messages) == 1, "one batch is taken whole"


def test_damage_is_counted_but_for_a_torn_tail(directory: JournalDirectory) -> None:
    writer = SteppedWriter(directory, [100.0])
    segment = written(writer, 3)
    first = read_chunk(segment, segment.end).messages[0]
    assert first.position is not None
    segment.file.write([b"?"], first.position)
    segment.file.write([b"?"], segment.end - BLOCK)  # the last batch
    segment.ours = False
    chunk = read_chunk(segment, segment.end + BLOCK)
    assert [damage.torn for damage in chunk.damages] == [False, True]


# The backlog


def left(directory: JournalDirectory, *records: JournalRecord) -> OpenSegment:
    """A segment whose owner has ended."""
    writer = SteppedWriter(directory, [time.time() - 50])
    batch = writer.append(records)
    segment = batch.segment
    file = directory.open(segment + OWNED, write=True)
    writer.retire()
    writer.close_segment(segment)
    return OpenSegment(segment, segment + OWNED, file, BLOCK, batch.end)


def octets(*records: JournalRecord) -> int:
    return sum(len(one.envelope) + len(memoryview(one.body)) for one in records)


def test_the_backlog_counts_envelopes_and_bodies_wherever_they_stand(
    directory: JournalDirectory,
) -> None:
    small, large = record(), record(RecordKind.LARGE, size=1 << 20)
    left(directory, small)
    left(directory, large)
    found = backlog(directory, local=True)
    assert found[:2] == (2, octets(small, large) + (1 << 20))
    assert found.seconds == pytest.approx(50, abs=5)


def test_the_backlog_counts_no_segment_that_is_sealed_or_has_an_owner(
    directory: JournalDirectory,
) -> None:
    left(directory, record()).file.protect()
    owned = SteppedWriter(directory, [100.0])
    owned.append([record()])
    found = backlog(directory, local=True)
    assert found == Backlog(seconds=found.seconds)
    assert found.seconds < 5.0
    assert owned.files


def test_the_backlog_counts_other_hosts_only_on_a_local_file_system(
    directory: JournalDirectory,
) -> None:
    segment = left(directory, record())
    header = read_header(segment.file)
    assert header.host == socket.gethostname()
    segment.file.write([encode_segment_header(header._replace(host="other.example.com"))], 0)
    assert backlog(directory, local=True).messages == 1
    assert backlog(directory, local=False).messages == 0
