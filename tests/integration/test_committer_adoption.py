"""A committer whose segments another process adopts, replays and removes while it sleeps, or whose
segments cannot be read for a while."""

import errno
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from reception.committer import JournalCommitter, WrittenBatch
from relay.queue.accept import EncodedMessage, encode
from relay.spool.journal.adoption import AdoptedSegment, adopt
from relay.spool.journal.directory import ADOPTED, OWNED, JournalDirectory
from relay.spool.journal.format import JournalRecord, RecordKind
from relay.spool.journal.supply import make_segment
from relay.spool.journal.writer import AppendFailed, AppendUnknown, JournalWriter
from relay.spool.mark import SpoolMark
from relay.spool.store import Spool
from tests.bad_places import BadPlaces
from tests.integration.harness import QueueHarness, new_message
from tests.integration.test_spooler import spooler
from tests.journal_records import SMALL, DirectSupply, message
from tests.waiting import until

BODY = b"Subject: x\n\ntext\n"


class SleepyOwner:
    """A writer and its committer, which has not yet run."""

    def __init__(self, queue: QueueHarness, spool: Spool) -> None:
        self.directory = JournalDirectory(spool.handle)
        self.directory.make()
        self.supply = DirectSupply(self.directory)
        self.writer = JournalWriter(
            self.directory,
            self.supply,
            on_retired=lambda segment, orderly: self.committer.retire(segment, orderly=orderly),
            segment_size=SMALL,
        )
        self.committer = JournalCommitter(
            queue.acceptor,
            queue.database,
            self.directory,
            SpoolMark(JournalDirectory(spool.handle), spool.identity),
            self.writer,
            spool.identity,
        )
        self.committed = threading.Event()

    def append(self) -> str:
        """Write a message and give it to the committer; its segment."""
        one = new_message(size=len(BODY))
        rows = encode(one)
        batch = self.writer.append([JournalRecord(RecordKind.MESSAGE, one.id, rows, BODY)])
        messages = [EncodedMessage(rows, batch.positions[0])]
        hints: list[tuple[str, tuple[str, ...]]] = [(one.id, ("default",))]
        written = WrittenBatch(batch.segment, batch.start, batch.end, messages, hints, len(BODY))
        self.committer.put(written, wait=False)
        return batch.segment

    def take_away(self, segment: str, *, removed: bool) -> None:
        """Another process adopts the segment; and it may have removed it, and its row."""
        self.directory.rename(segment + OWNED, segment + ADOPTED)
        if removed:
            self.directory.unlink(segment + ADOPTED)

    def wake_up(self) -> None:
        self.committer.start(lambda *_: self.committed.set())
        until(lambda: self.committer.lag().messages == 0)


@pytest.fixture
def queue(clean_url: str) -> Iterator[QueueHarness]:
    made = QueueHarness(clean_url, registered=False)
    yield made
    made.database.dispose()


@pytest.fixture
def owner(queue: QueueHarness, spool: Spool) -> Iterator[SleepyOwner]:
    made = SleepyOwner(queue, spool)
    yield made
    made.committer.close(5.0)


def count(queue: QueueHarness) -> int:
    return len(queue.rows("SELECT id FROM messages"))


def test_messages_of_a_removed_segment_do_not_come_twice(
    owner: SleepyOwner, queue: QueueHarness
) -> None:
    owner.take_away(owner.append(), removed=True)
    owner.wake_up()
    assert count(queue) == 0
    assert not owner.committed.is_set()
    assert queue.rows("SELECT id FROM segments") == []


def test_a_message_of_an_own_segment_gets_its_row(owner: SleepyOwner, queue: QueueHarness) -> None:
    owner.append()
    owner.wake_up()
    assert count(queue) == 1
    assert owner.committed.wait(20)


def test_a_void_that_is_written_just_before_the_adoption_counts(
    owner: SleepyOwner, queue: QueueHarness, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clients heard 451, and the owner ends before the adopter looks for locks."""
    spool.prepare(queue.database, unsafe=True)
    owner.supply.spool = spool.identity
    segment = owner.append()

    def fail() -> None:
        raise OSError(errno.EIO, "the sync failed")

    def adopted(*arguments: Any, **options: Any) -> list[AdoptedSegment]:
        if segment in owner.writer.files:
            monkeypatch.setattr(owner.writer.files[segment], "sync", fail)
            with pytest.raises(AppendFailed):
                owner.append()
            for one in [*owner.writer.files]:
                owner.writer.files.pop(one).close()
        return adopt(*arguments, **options)

    monkeypatch.setattr("reception.committer.adopt", adopted)
    with spooler(queue, spool) as other:
        other.wait_for_rows(other.request())
        until(lambda: other.spooler.lag().messages == 0)
    assert count(queue) == 2, "of the owner's two messages one"


def test_a_segment_whose_owner_ends_a_little_later_is_adopted_soon(
    owner: SleepyOwner, queue: QueueHarness, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its smtpd was killed, and the next one started before it had ended."""
    monkeypatch.setattr("reception.committer.ADOPT_SOON", 0.05)
    spool.prepare(queue.database, unsafe=True)
    owner.supply.spool = spool.identity
    segment = owner.append()
    first = list[list[AdoptedSegment]]()

    def adopted(*arguments: Any, **options: Any) -> list[AdoptedSegment]:
        result = adopt(*arguments, **options)
        if not first:
            first.append(result)
            owner.writer.files.pop(segment).close()
        return result

    monkeypatch.setattr("reception.committer.adopt", adopted)
    with spooler(queue, spool):
        until(lambda: count(queue) == 1)
    assert first == [[]], "its owner had it"


def test_an_empty_segment_that_was_adopted_does_not_stop_the_committer(
    owner: SleepyOwner, queue: QueueHarness
) -> None:
    segment, file = make_segment(owner.directory, "ab" * 16, size=SMALL)
    owner.writer.segment, owner.writer.files = segment, {segment: file}
    owner.writer.retire()
    owner.take_away(segment, removed=True)
    owner.append()
    owner.wake_up()
    assert count(queue) == 1


def test_a_writer_may_retire_a_segment_that_was_released(
    owner: SleepyOwner, queue: QueueHarness
) -> None:
    """The committer lets a segment go while the writer writes to it."""
    segment = owner.append()
    owner.take_away(segment, removed=True)
    file = owner.writer.files[segment]
    owner.wake_up()
    until(lambda: segment not in owner.writer.files)
    owner.writer.files[segment] = file  # the writer looked before
    sync = file.sync

    def release_and_sync() -> None:
        owner.writer.close_segment(segment)
        sync()

    file.sync = release_and_sync  # type: ignore[method-assign]
    with pytest.raises(AppendUnknown):
        owner.writer.append([message()])
    owner.append()
    until(lambda: count(queue) == 1)


def test_a_segment_that_is_put_off_does_not_move_the_next_one_back(
    owner: SleepyOwner, queue: QueueHarness, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have batches in memory, and the first has one that must be read from its file."""
    disk = BadPlaces(monkeypatch)
    monkeypatch.setattr("reception.committer.ADOPT_INTERVAL", 0.5)
    with monkeypatch.context() as patched:
        patched.setattr("reception.committer.MAX_HELD", 0)
        first = owner.append()
    assert owner.append() == first
    owner.writer.retire()
    second = owner.append()
    assert owner.append() == second
    disk.add(spool.directory / "journal" / (first + OWNED), 0, SMALL)
    owner.committer.start(lambda *_: None)
    until(lambda: count(queue) == 2, 30)
    disk.heal()
    until(lambda: count(queue) == 4, 30)
    assert owner.append() == second
    until(lambda: owner.committer.lag().messages == 0, 30)
    assert count(queue) == 5
    (row,) = queue.rows("SELECT committed_to FROM segments WHERE id = @id(:id)", id=second)
    assert row["committed_to"] == owner.writer.position
