"""Removal and compaction of segments, on both databases: nothing that is needed goes, and nothing
else stays."""

import errno
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from relay.queue.accept import Acceptor
from relay.queue.outcome import Outcome
from relay.spool.journal.copying import write_copy
from relay.spool.journal.directory import ADOPTED, COPY, MARK, OWNED, JournalDirectory
from relay.spool.journal.format import JournalRecord, Place, VoidedBatch, encode_void
from relay.spool.journal.reader import JournalReader, WrongBody
from relay.spool.journal.supply import make_segment
from relay.spool.mark import SpoolMark
from relay.spool.segments import CleaningTurn, SegmentStore
from relay.spool.store import Spool
from tests.integration.harness import QueueHarness
from tests.integration.test_spooler import SpoolerHarness
from tests.journal_records import told_calls

RETENTION = 1000.0
SIZE = 2000


class SegmentHarness:
    """A spool with segments that a spooler wrote and sealed."""

    def __init__(self, queue: QueueHarness, spool: Spool) -> None:
        self.queue, self.spool = queue, spool
        spool.prepare(queue.database, unsafe=True)
        self.directory = JournalDirectory(spool.handle)
        self.store = SegmentStore(queue.database, self.directory, spool.identity, RETENTION)

    def seal(self, count: int) -> list[str]:
        """A sealed segment with so many messages; their ids."""
        spooler = SpoolerHarness(self.queue, self.spool, segment_size=1 << 20)
        requests = [spooler.request(body=self.body(n)) for n in range(count)]
        spooler.wait_for_rows(*requests)
        spooler.finish()
        return [request.queue_id for request in requests]

    def body(self, number: int) -> bytes:
        return (b"%d\n" % number).ljust(SIZE, b"x")

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
        """All that is known of segments happened so many seconds ago."""
        for column in ("sealed_at", "checked_at", "sparse_since"):
            self.queue.change(
                f"UPDATE segments SET {column} = @ago({seconds}) WHERE {column} IS NOT NULL"
            )

    def read(self, queue_id: str) -> bytes:
        (row,) = self.queue.rows(
            "SELECT @hex(segment) AS segment, position FROM messages WHERE id = @id(:id)",
            id=queue_id,
        )
        return JournalReader(self.directory).read(Place(row["segment"], row["position"]), SIZE)


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
    assert harness.store.usage() == (1, 3 * SIZE)
    assert [harness.read(queue_id) for queue_id in waiting] == [harness.body(0)] * 3
    harness.queue.change("UPDATE deliveries SET state = 'queued' WHERE state = 'deferred'")
    harness.finish(*waiting)
    harness.pass_time(1000)
    assert harness.store.turn() == CleaningTurn(removed=1)
    assert (harness.files(), harness.rows()) == ([], 0)


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
        directory: JournalDirectory, spool: str, records: Sequence[JournalRecord]
    ) -> tuple[str, list[int], int]:
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
        with pytest.raises(OSError, match="the power fails"):
            harness.store.turn()
    assert (harness.files(), harness.rows()) == ([], 1)
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
