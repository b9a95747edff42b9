"""Removal and compaction of segments, on both databases: nothing that is needed goes, and nothing
else stays."""

import errno
import os
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from reception.spooler_protocol import StoreRequest
from relay.ids import new_id
from relay.queue.accept import Acceptor
from relay.queue.outcome import Outcome
from relay.spool.journal.copying import SegmentCopy, write_copy
from relay.spool.journal.directory import ADOPTED, COPY, MARK, OWNED, JournalDirectory, SegmentFile
from relay.spool.journal.format import BLOCK, JournalRecord, Place, VoidedBatch, encode_void
from relay.spool.journal.reader import JournalReader, WrongBody
from relay.spool.journal.supply import make_segment
from relay.spool.mark import SpoolMark
from relay.spool.segments import CleaningTurn, SegmentStore
from relay.spool.store import Spool
from tests.integration.harness import QueueHarness
from tests.integration.test_spooler import SpoolerHarness
from tests.journal_records import message, told_calls
from tests.waiting import SetClock
from worker.segment_cleaner import SegmentCleaner

RETENTION = 1000.0
OLD_ID = "1".rjust(32, "0")  # of 1970
SIZE = 2000


class SegmentHarness:
    """A spool with segments that a spooler wrote and sealed."""

    def __init__(self, queue: QueueHarness, spool: Spool) -> None:
        self.queue, self.spool = queue, spool
        spool.prepare(queue.database, unsafe=True)
        self.directory = JournalDirectory(spool.handle)
        self.store = SegmentStore(queue.database, self.directory, spool.identity, RETENTION)

    def seal(
        self,
        count: int,
        *,
        recipients: int = 1,
        size: int = SIZE,
        room: int = 1 << 20,
        apart: bool = False,
    ) -> list[str]:
        """A sealed segment of `room` octets with so many messages; their ids. `apart`: each is a
        batch."""
        spooler = SpoolerHarness(self.queue, self.spool, segment_size=room)
        addresses = [f"recipient-{n}@example.org" for n in range(recipients)]
        requests = list[StoreRequest]()
        for number in range(count):
            requests.append(spooler.request(*addresses, body=self.body(number, size)))
            if apart:
                spooler.wait_for_rows(*requests)
        spooler.wait_for_rows(*requests)
        spooler.finish()
        return [request.queue_id for request in requests]

    def body(self, number: int, size: int = SIZE) -> bytes:
        return (b"%d\n" % number).ljust(size, b"x")

    def finish(self, *ids: str, outcome: Outcome = Outcome.DELIVERED) -> None:
        for start in range(0, len(ids), 100):
            claims = self.queue.claim(*ids[start : start + 100])
            self.queue.worker_queue.commit(
                [self.queue.completion(claim, outcome) for claim in claims]
            )

    def files(self) -> list[str]:
        return [name for name in self.directory.names() if name != "mark"]

    def rows(self) -> int:
        return len(self.queue.rows("SELECT id FROM segments"))

    def pass_time(self, seconds: float) -> None:
        """All that is known of segments happened so many seconds earlier."""
        for column in ("sealed_at", "checked_at", "sparse_since"):
            self.queue.change(
                f"UPDATE segments SET {column} = @ago(@since({column}) + {seconds})"
                f" WHERE {column} IS NOT NULL"
            )

    def place(self, queue_id: str) -> Place:
        (row,) = self.queue.rows(
            "SELECT @hex(segment) AS segment, position FROM messages WHERE id = @id(:id)",
            id=queue_id,
        )
        return Place(row["segment"], row["position"])

    def read(self, queue_id: str, size: int = SIZE) -> bytes:
        return JournalReader(self.directory).read(self.place(queue_id), size)

    def sizes(self) -> list[int]:
        return [(self.spool.directory / "journal" / name).stat().st_size for name in self.files()]


@pytest.fixture
def harness(queue: QueueHarness, spool: Spool) -> SegmentHarness:
    return SegmentHarness(queue, spool)


def test_a_segment_whose_mail_is_finished_is_removed(harness: SegmentHarness) -> None:
    ids = harness.seal(3)
    assert harness.store.turn() == CleaningTurn()
    harness.finish(*ids)
    harness.pass_time(1000)
    assert harness.store.turn() == CleaningTurn(removed=1)
    assert (harness.files(), harness.rows()) == ([], 0)


def test_a_segment_with_a_record_of_a_large_message_is_removed_without_a_scan(
    harness: SegmentHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    spooler = SpoolerHarness(harness.queue, harness.spool, segment_size=1 << 20)
    requests = [spooler.request(), spooler.request(body=None)]
    spooler.wait_for_rows(*requests)
    spooler.finish()
    harness.finish(*[request.queue_id for request in requests])
    harness.pass_time(1000)
    monkeypatch.delattr(SegmentStore, "_needed")
    assert harness.store.turn() == CleaningTurn(removed=1)


def test_the_names_are_durable_before_the_row_of_a_removed_segment_goes(
    harness: SegmentHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.finish(*harness.seal(1))
    harness.pass_time(1000)
    calls, rows = told_calls(monkeypatch), list[int]()
    monkeypatch.setattr(JournalDirectory, "sync", lambda _: rows.append(harness.rows()))
    assert harness.store.turn() == CleaningTurn(removed=1)
    assert calls == [f"unlink {OWNED}", f"unlink {ADOPTED}", f"unlink {COPY}"]
    assert (rows, harness.rows()) == ([1], 0)


@pytest.mark.parametrize("state", ["sending", "deferred", "held", "dsn pending"])
def test_a_segment_stays_while_a_delivery_needs_it(harness: SegmentHarness, state: str) -> None:
    needed, *others = harness.seal(3)
    harness.finish(*others)
    if state == "dsn pending":
        harness.finish(needed, outcome=Outcome.REJECTED)
    elif state == "held":
        harness.finish(needed, outcome=Outcome.UNSENDABLE)
    elif state == "deferred":
        harness.finish(needed, outcome=Outcome.DEFERRED)
    else:
        assert harness.queue.claim(needed)
    harness.pass_time(1000)
    assert harness.store.turn() == CleaningTurn()
    assert harness.read(needed) == harness.body(0)


def test_one_message_in_a_thousand_that_is_deferred_costs_no_more_than_its_share(
    harness: SegmentHarness,
) -> None:
    """Three segments hold 600 messages, and three of these wait for days."""
    waiting: list[str] = []
    for _ in range(3):
        first, *others = harness.seal(200)
        waiting.append(first)
        harness.finish(first, outcome=Outcome.DEFERRED)
        harness.finish(*others)
    harness.pass_time(100)
    assert harness.store.turn() == CleaningTurn(), "not at once"
    harness.pass_time(700)
    assert harness.store.turn() == CleaningTurn(copied=3)
    assert harness.store.turn() == CleaningTurn(removed=3)
    [copy] = harness.files()
    assert copy.endswith(COPY)
    used = (harness.spool.directory / "journal" / copy).stat().st_size
    assert used <= 4 * 3 * SIZE
    segments, live = harness.store.usage()
    assert segments == 1
    assert 3 * SIZE < live < used
    assert [harness.read(queue_id) for queue_id in waiting] == [harness.body(0)] * 3
    harness.queue.change("UPDATE deliveries SET state = 'queued' WHERE state = 'deferred'")
    harness.finish(*waiting)
    harness.pass_time(1000)
    assert harness.store.turn() == CleaningTurn(removed=1)
    assert (harness.files(), harness.rows()) == ([], 0)


@pytest.mark.parametrize(
    ("count", "recipients", "size", "room", "apart"),
    [(4, 1000, 4000, 1 << 20, False), (40, 30, 1000, 1 << 19, False), (40, 1, 100, 1 << 18, True)],
)
def test_a_segment_of_which_all_is_needed_is_never_rewritten(
    harness: SegmentHarness, count: int, recipients: int, size: int, room: int, apart: bool
) -> None:
    """However much of it are envelopes and padding."""
    harness.seal(count, recipients=recipients, size=size, room=room, apart=apart)
    [file] = harness.files()
    for _ in range(3):
        assert harness.store.turn() == CleaningTurn()
        harness.pass_time(700)
    assert harness.files() == [file]
    segments, live = harness.store.usage()
    assert segments == 1
    assert room / 4 < live < room


@pytest.mark.parametrize(("recipients", "size"), [(1, 100), (200, 100)])
def test_a_copy_is_not_compacted_again(harness: SegmentHarness, recipients: int, size: int) -> None:
    first, *others = harness.seal(10, recipients=recipients, size=size)
    harness.finish(*others)
    harness.store.turn()
    harness.pass_time(700)
    assert harness.store.turn() == CleaningTurn(copied=1)
    assert harness.store.turn() == CleaningTurn(removed=1)
    files = harness.files()
    for _ in range(3):
        harness.pass_time(700)
        assert harness.store.turn() == CleaningTurn()
    assert harness.files() == files
    assert harness.read(first, size) == harness.body(0, size)


def test_envelopes_count_for_what_a_turn_copies(
    harness: SegmentHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = harness.seal(25, recipients=200)
    waiting = ids[:5]
    harness.finish(*ids[5:])
    harness.store.turn()
    harness.pass_time(700)
    monkeypatch.setattr("relay.spool.segments.COPY_SIZE", 80_000)  # of two such messages
    turns = [harness.store.turn() for _ in range(4)]
    assert turns == [
        CleaningTurn(copied=2),
        CleaningTurn(copied=2),
        CleaningTurn(copied=1),
        CleaningTurn(removed=1),
    ]
    assert all(30_000 < size < 90_000 for size in harness.sizes())
    assert [harness.read(queue_id) for queue_id in waiting] == [harness.body(n) for n in range(5)]


def test_compaction_goes_on_in_the_next_turn(
    harness: SegmentHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten seconds later, and not when the segments that did not fit are due again."""
    waiting = list[str]()
    for _ in range(4):
        first, *others = harness.seal(3)
        waiting.append(first)
        harness.finish(*others)
    harness.store.turn()
    harness.pass_time(7000)
    monkeypatch.setattr("relay.spool.segments.COPY_SIZE", 2 * SIZE)  # fits one message
    copied = 0
    for _ in range(4):
        copied += harness.store.turn().copied
        harness.pass_time(10)
    assert copied == 4
    assert [harness.read(queue_id) for queue_id in waiting] == [harness.body(0)] * 4


def test_one_segment_that_cannot_be_removed_does_not_keep_the_others(
    harness: SegmentHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, *good = [harness.seal(1) for _ in range(3)]
    stuck = harness.place(bad[0]).segment
    harness.finish(*bad, *[one for ids in good for one in ids])
    harness.pass_time(1000)
    unlink = JournalDirectory.unlink

    def fail(directory: JournalDirectory, name: str) -> None:
        if name.startswith(stuck):
            raise PermissionError("immutable")
        unlink(directory, name)

    monkeypatch.setattr("relay.spool.segments.LOOKS", 1)
    monkeypatch.setattr(JournalDirectory, "unlink", fail)
    assert [harness.store.turn() for _ in range(3)].count(CleaningTurn(removed=1)) == 2
    assert harness.files() == [stuck + OWNED]
    monkeypatch.setattr(JournalDirectory, "unlink", unlink)
    harness.pass_time(1000)
    assert harness.store.turn() == CleaningTurn(removed=1)


def test_segments_that_wait_do_not_keep_those_that_are_finished(
    harness: SegmentHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn looks at fewer segments than wait."""
    monkeypatch.setattr("relay.spool.segments.LOOKS", 2)
    for _ in range(4):
        harness.seal(3, room=1 << 14)
    harness.finish(*harness.seal(3, room=1 << 14))
    turns = list[CleaningTurn]()
    for _ in range(3):
        harness.pass_time(1000)
        turns.append(harness.store.turn())
    assert sorted(turns) == [CleaningTurn(), CleaningTurn(), CleaningTurn(removed=1)]


def test_the_mark_is_on_the_disk_before_a_segment_goes_whose_bodies_were_moved(
    harness: SegmentHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database of a moment ago has the old places. It must be noticed, or the mail is lost: no
    row of it points to the copy."""
    needed, *others = harness.seal(20)
    harness.finish(*others)
    for turn in (CleaningTurn(), CleaningTurn(copied=1)):
        harness.pass_time(1000)
        assert harness.store.turn() == turn
    with monkeypatch.context() as full:

        def refuse(_mark: SpoolMark, _number: int) -> None:
            raise OSError(errno.ENOSPC, "full")

        full.setattr(SpoolMark, "_write", refuse)
        with suppress(OSError):
            harness.store.turn()
    assert len(harness.files()) == 2
    calls = told_calls(monkeypatch)
    harness.pass_time(1000)
    assert harness.store.turn() == CleaningTurn(removed=1)
    assert calls[:4] == ["write", "sync", f"rename to {MARK}", "sync names"]
    assert calls[-2:] == [f"unlink {COPY}", "sync names"]
    assert harness.read(needed) == harness.body(0)


def test_a_message_that_moved_meanwhile_stays_at_its_new_place(harness: SegmentHarness) -> None:
    first, *others = harness.seal(20)
    harness.finish(first, outcome=Outcome.DEFERRED)
    harness.finish(*others)
    harness.pass_time(700)
    harness.store.turn()
    harness.pass_time(700)
    moved = "UPDATE messages SET position = position + 1 WHERE id = @id(:id)"

    def meanwhile(
        directory: JournalDirectory, spool: str, records: Iterable[JournalRecord]
    ) -> SegmentCopy:
        harness.queue.change(moved, id=first)
        return write_copy(directory, spool, records)

    with pytest.MonkeyPatch.context() as patch:  # between the search and the change of the rows
        patch.setattr("relay.spool.segments.write_copy", meanwhile)
        harness.store.turn()
    (row,) = harness.queue.rows(
        "SELECT @hex(segment) AS segment FROM messages WHERE id = @id(:id)", id=first
    )
    assert row["segment"] + OWNED in harness.files()


def test_a_record_without_a_row_keeps_its_segment_for_the_retention_of_rows(
    harness: SegmentHarness,
) -> None:
    lost, other = harness.seal(2)
    harness.finish(lost, other)
    harness.queue.change("DELETE FROM messages WHERE id = @id(:id)", id=lost)
    harness.pass_time(1000)
    assert harness.store.turn() == CleaningTurn(), "its rows may have been lost"
    old = SegmentStore(harness.queue.database, harness.directory, harness.spool.identity, 0.0)
    harness.pass_time(1000)
    assert old.turn() == CleaningTurn(removed=1)


def test_a_removal_that_was_interrupted_is_finished(
    harness: SegmentHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.finish(*harness.seal(2))
    harness.pass_time(1000)

    def crash(_: JournalDirectory) -> None:
        raise OSError("the power fails")

    with monkeypatch.context() as patch:
        patch.setattr(JournalDirectory, "sync", crash)
        assert harness.store.turn() == CleaningTurn()
    assert (harness.files(), harness.rows()) == ([], 1)
    harness.pass_time(1000)
    assert harness.store.turn() == CleaningTurn(removed=1)
    assert harness.rows() == 0


def test_a_copy_that_no_row_points_to_is_removed(
    harness: SegmentHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *others = harness.seal(20)
    harness.finish(first, outcome=Outcome.DEFERRED)
    harness.finish(*others)
    harness.pass_time(700)
    harness.store.turn()
    harness.pass_time(700)

    def crash(*_: object, **__: object) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("relay.spool.segments.writing", crash)
        patch.setattr(SegmentStore, "_looked_at", lambda *_, **__: None)
        with pytest.raises(OSError, match="killed"):
            harness.store.turn()
    assert len(harness.files()) == 2
    assert harness.store.remove_unused_copies(older_than=0.0) == 1
    assert harness.read(first) == harness.body(0)
    harness.pass_time(700)
    assert harness.store.turn() == CleaningTurn(copied=1)
    assert harness.store.remove_unused_copies(older_than=0.0) == 0, "rows point to it"


def leave_copies(harness: SegmentHarness, count: int, *, queue_id: str = OLD_ID) -> list[str]:
    """Copies of a message, which no row points to; their names."""
    for _ in range(count):
        write_copy(
            harness.directory, harness.spool.identity, [replace(message(), queue_id=queue_id)]
        )
    return harness.files()


def test_unused_copies_are_removed_where_only_a_writer_may_lock(
    harness: SegmentHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS."""
    assert len(leave_copies(harness, 2)) == 2
    writers = list[SegmentFile]()
    open_file, lock = JournalDirectory.open, SegmentFile.lock

    def opened(directory: JournalDirectory, name: str, *, write: bool = False) -> SegmentFile:
        file = open_file(directory, name, write=write)
        writers.extend([file] if write else [])
        return file

    def lock_as_nfs(file: SegmentFile) -> bool:
        if file not in writers:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return lock(file)

    monkeypatch.setattr(JournalDirectory, "open", opened)
    monkeypatch.setattr(SegmentFile, "lock", lock_as_nfs)
    assert harness.store.remove_unused_copies(older_than=0.0) == 2
    assert harness.files() == []


def test_one_bad_copy_does_not_keep_the_others(
    harness: SegmentHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    headless, locked, unreadable, _ = leave_copies(harness, 4)
    with (harness.spool.directory / "journal" / headless).open("r+b") as file:
        file.write(bytes(BLOCK))
    open_file = JournalDirectory.open

    def fail(directory: JournalDirectory, name: str, *, write: bool = False) -> SegmentFile:
        if name == unreadable:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return open_file(directory, name, write=write)

    monkeypatch.setattr(JournalDirectory, "open", fail)
    holder = harness.directory.open(locked, write=True)
    assert holder.lock()
    removed = harness.store.remove_unused_copies(older_than=0.0)
    assert removed == 2, "one of them without its header"
    assert harness.files() == [locked, unreadable]
    holder.close()


def test_a_young_copy_stays(harness: SegmentHarness) -> None:
    """It may be about to get its row."""
    files = leave_copies(harness, 1)
    assert harness.store.remove_unused_copies() == 0
    assert harness.files() == files


def test_a_copy_of_a_message_without_a_row_stays(harness: SegmentHarness) -> None:
    """Its rows may have been lost."""
    files = leave_copies(harness, 1, queue_id=new_id())
    assert harness.store.remove_unused_copies(older_than=0.0) == 0
    assert harness.files() == files


def test_the_cleaner_searches_unused_copies_every_hour(
    harness: SegmentHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when a search failed."""
    clock, searches = SetClock(), list[float]()

    def search(_: SegmentStore) -> int:
        searches.append(clock.now)
        if len(searches) == 1:
            raise OSError("no directory")
        return 0

    monkeypatch.setattr(SegmentStore, "remove_unused_copies", search)
    # PostgreSQL releases the lock of a session a little later than the session ends.
    monkeypatch.setattr("worker.segment_cleaner.exclusive", lambda *_: nullcontext(True))
    queue = harness.queue
    cleaner = SegmentCleaner(queue.settings, queue.database, harness.spool, clock=clock)
    with pytest.raises(OSError, match="no directory"):
        cleaner.turn()
    for seconds in (0, 10, 3580, 20, 3600):
        clock.now += seconds
        cleaner.turn()
    assert searches == [1000.0, 1000.0, 4610.0, 8210.0]


def test_a_damaged_body_is_not_copied_and_keeps_its_segment(harness: SegmentHarness) -> None:
    damaged, whole, *others = harness.seal(20)
    harness.finish(damaged, whole, outcome=Outcome.DEFERRED)
    harness.finish(*others)
    (row,) = harness.queue.rows(
        "SELECT @hex(segment) AS segment, position FROM messages WHERE id = @id(:id)", id=damaged
    )
    path: Path = harness.spool.directory / "journal" / (row["segment"] + OWNED)
    with path.open("r+b") as file:
        file.seek(row["position"] + 50)
        file.write(b"?")
    harness.pass_time(700)
    harness.store.turn()
    harness.pass_time(700)
    assert harness.store.turn() == CleaningTurn(copied=1)
    harness.pass_time(700)
    harness.store.turn()
    assert path.exists()
    assert harness.read(whole) == harness.body(1)
    with pytest.raises(WrongBody):
        harness.read(damaged)


@pytest.mark.parametrize("copied", [False, True])
def test_a_segment_with_a_damaged_envelope_stays_while_its_body_is_needed(
    harness: SegmentHarness, copied: bool
) -> None:
    """The row has the place of the body, which is whole."""
    needed, *others = harness.seal(10)
    harness.finish(*others)
    for _ in range(3 * copied):
        harness.pass_time(700)
        harness.store.turn()
    place = harness.place(needed)
    [name] = harness.files()
    assert name == place.segment + (COPY if copied else OWNED)
    with (harness.spool.directory / "journal" / name).open("r+b") as file:
        file.seek(place.position - 10)  # the end of the envelope
        file.write(bytes(10))
    harness.pass_time(1000)
    assert harness.store.turn() == CleaningTurn()
    assert harness.read(needed) == harness.body(0)
    harness.finish(needed)
    harness.pass_time(1000)
    assert harness.store.turn() == CleaningTurn(removed=not copied)


def test_a_void_outlives_the_segment_that_it_voids(
    harness: SegmentHarness, queue: QueueHarness
) -> None:
    acceptor = Acceptor(queue.database, lifetime=1000.0, grace=5.0)
    made = [make_segment(harness.directory, harness.spool.identity, size=1 << 16) for _ in range(2)]
    (voided, _), (voiding, second) = made
    block = encode_void(
        bytes.fromhex(voiding), 4096, VoidedBatch(voided, 4096), mark=0, written_at=1
    )
    second.write([block], 4096)
    for segment, file in made:
        acceptor.open_segment(segment, 8192)
        acceptor.seal_segment(segment, 8192, 0, "", "")
        file.close()
    harness.pass_time(1000)
    queue.change("UPDATE segments SET sealed_at = @ago(2000) WHERE id = @id(:id)", id=voiding)
    assert harness.store.turn() == CleaningTurn(removed=1)
    assert harness.files() == [voiding + OWNED]
    harness.pass_time(1000)
    assert harness.store.turn() == CleaningTurn(removed=1)
