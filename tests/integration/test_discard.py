"""`fsck`, `fsck --rebuild` and `fsck --discard` on a disk that cannot read some places, on both
databases: they read the rest, and nothing goes that is needed or may be needed."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from commands.ops import discard, fsck
from reception.replay import OpenSegment, seal
from relay.queue.accept import Acceptor
from relay.queue.outcome import Outcome
from relay.spool.journal.contents import SegmentContents, contents
from relay.spool.journal.directory import ADOPTED, JournalDirectory
from relay.spool.journal.format import BLOCK
from relay.spool.store import Spool
from tests.bad_places import BadPlaces
from tests.integration.harness import QueueHarness
from tests.integration.test_damaged_segments import left, segments, spoil
from tests.integration.test_rebuild import accepted, advance, forget
from tests.integration.test_spooler import places, spooler
from tests.integration.typed import Typed, lines, typed_at
from tests.waiting import until


@pytest.fixture
def typed(queue: QueueHarness, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> Typed:
    monkeypatch.setattr(fsck, "wait", lambda _seconds: None)
    return typed_at(queue, spool, monkeypatch)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> BadPlaces:
    return BadPlaces(monkeypatch)


@pytest.fixture
def kept(queue: QueueHarness, spool: Spool) -> tuple[list[str], Path]:
    """Two messages with rows, and a segment that is kept because an envelope between them is
    damaged."""
    requests, path = left(queue, spool, b"one\n", b"two\n", b"three\n")
    spoil(path, 2 * BLOCK + 100)
    with spooler(queue, spool):
        until(lambda: len(places(queue)) == 2)
        until(lambda: segments(queue)[path.stem][0] == 4 * BLOCK)
    return [requests[0].queue_id, requests[2].queue_id], path.with_suffix(ADOPTED)


def found(typed: Typed) -> list[str]:
    return [row["found"] for row in lines(typed("fsck", "--json", status=None))]


def finish(queue: QueueHarness, ids: list[str]) -> None:
    for claim in queue.claim(*ids):
        queue.complete(claim, Outcome.DELIVERED)


def test_a_place_that_cannot_be_read_ends_neither_fsck_nor_rebuild(
    queue: QueueHarness, spool: Spool, typed: Typed, disk: BadPlaces
) -> None:
    ids = accepted(queue, spool, b"b" * 3 * BLOCK, b"good", b"good")
    (path,) = (spool.directory / "journal").glob("*.segment")
    disk.add(path, 2 * BLOCK, 3 * BLOCK)
    assert found(typed) == ["body damaged", "journal damaged"]
    typed("fsck", "--repair", status=None)
    assert queue.states_of(ids) == ["held", "queued", "queued"]
    for queue_id in ids:
        forget(queue, queue_id)
    assert found(typed) == ["journal damaged", "rows lost"]
    done = typed("fsck", "--rebuild", "--yes", status=1)
    assert "cannot read" in done.stderr
    assert queue.states_of(ids) == ["held", "held", "held"], "the envelope can be read"


def test_messages_that_were_passed_over_come_back_held(
    queue: QueueHarness,
    spool: Spool,
    typed: Typed,
    disk: BadPlaces,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("reception.committer.ADOPT_INTERVAL", 0.05)
    requests, path = left(queue, spool, b"one\n", b"two\n", b"three\n")
    disk.add(path, 2 * BLOCK, 3 * BLOCK)
    with spooler(queue, spool):
        until(lambda: len(places(queue)) == 2)
    disk.heal()
    assert found(typed) == ["rows lost"]
    typed("fsck", "--rebuild", "--yes")
    assert queue.states_of([one.queue_id for one in requests]) == ["queued", "held", "queued"]
    with spooler(queue, spool):  # it is whole, so the next spooler seals it
        until(lambda: segments(queue)[path.stem][1])


def test_a_segment_whose_header_is_lost_is_rebuilt(
    queue: QueueHarness, spool: Spool, typed: Typed, disk: BadPlaces
) -> None:
    requests, path = left(queue, spool, b"one\n", b"two\n")
    advance(queue, spool)
    disk.add(path, 0, BLOCK)
    assert found(typed) == ["journal damaged", "rows lost"]
    typed("fsck", "--rebuild", "--yes", status=1)
    assert queue.states_of([one.queue_id for one in requests]) == ["held", "held"]
    assert found(typed) == ["journal damaged"]
    assert "have no rows yet" not in typed("check", status=None).stdout
    typed("release", "--all", "--yes")
    finish(queue, [one.queue_id for one in requests])
    typed("fsck", "--discard", path.stem, "--yes")
    assert not path.exists()
    assert found(typed) == []


def test_a_kept_segment_is_discarded_when_nothing_needs_it(
    queue: QueueHarness, spool: Spool, typed: Typed, kept: tuple[list[str], Path]
) -> None:
    ids, path = kept
    assert found(typed) == ["journal damaged"]
    refused = typed("fsck", "--discard", path.stem, "--yes", status=1)
    assert f"deliveries need it: {ids[0]}, {ids[1]}" in refused.stderr
    finish(queue, ids)
    assert "Add --yes" in typed("fsck", "--discard", path.stem, status=2).stderr
    assert path.exists()
    done = typed("fsck", "--discard", path.name, "--yes")
    assert "was removed" in done.stdout
    assert not path.exists()
    assert segments(queue) == {}
    assert found(typed) == []
    (row,) = queue.rows("SELECT filter, reason FROM audit WHERE operation = 'fsck'")
    assert row == {"filter": "--discard", "reason": f"segment {path.stem} discarded"}


def test_messages_without_rows_are_not_discarded(
    queue: QueueHarness, typed: Typed, kept: tuple[list[str], Path]
) -> None:
    ids, path = kept
    finish(queue, ids[1:])
    forget(queue, ids[0])
    refused = typed("fsck", "--discard", path.stem, "--yes", status=1)
    assert "the rows of 1 messages are missing" in refused.stderr
    queue.change("UPDATE segments SET committed_to = 4096")
    refused = typed("fsck", "--discard", path.stem, "--yes", status=1)
    assert "2 messages wait for their rows" in refused.stderr
    assert path.exists()


def test_only_damaged_segments_are_discarded(
    queue: QueueHarness, spool: Spool, typed: Typed
) -> None:
    finish(queue, accepted(queue, spool, b"one\n"))
    (path,) = (spool.directory / "journal").glob("*.segment")
    refused = typed("fsck", "--discard", path.stem, "--yes", status=1)
    assert "it is not damaged" in refused.stderr
    assert path.exists()
    assert "has no segment abc" in typed("fsck", "--discard", "abc", "--yes", status=1).stderr
    typed("fsck", "--discard", path.stem, "--repair", status=2)


def test_a_segment_that_a_spooler_keeps_is_discarded(
    queue: QueueHarness,
    spool: Spool,
    typed: Typed,
    kept: tuple[list[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept_again = threading.Event()

    def seal_and_tell(
        acceptor: Acceptor, directory: JournalDirectory, segment: OpenSegment
    ) -> None:
        seal(acceptor, directory, segment)
        if segment.id == kept[1].stem:
            kept_again.set()

    monkeypatch.setattr("reception.committer.seal", seal_and_tell)
    ids, path = kept
    finish(queue, ids)
    with spooler(queue, spool) as harness:
        assert kept_again.wait(20)
        until(lambda: not JournalDirectory(spool.handle).open(path.name).has_owner())
        typed("fsck", "--discard", path.stem, "--yes")
        harness.wait_for_rows(harness.request())
    assert not path.exists()


def test_rows_that_are_missing_after_the_question_keep_a_segment(
    queue: QueueHarness,
    typed: Typed,
    kept: tuple[list[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids, path = kept
    finish(queue, ids)

    def restore(_summary: str, *, yes: bool) -> bool:
        forget(queue, ids[0])
        return yes

    monkeypatch.setattr(discard, "confirmed", restore)
    refused = typed("fsck", "--discard", path.stem, "--yes", status=1)
    assert "the rows of 1 messages are missing" in refused.stderr
    assert path.exists()


def test_a_segment_that_smtpd_adopts_during_the_question_stays(
    queue: QueueHarness,
    spool: Spool,
    typed: Typed,
    kept: tuple[list[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may make rows of a place that can be read again."""
    ids, path = kept
    finish(queue, ids)
    file = JournalDirectory(spool.handle).open(path.name, write=True)
    monkeypatch.setattr(discard, "confirmed", lambda _summary, *, yes: file.lock() and yes)
    refused = typed("fsck", "--discard", path.stem, "--yes", status=1)
    assert "makes its rows" in refused.stderr
    assert path.exists()
    file.close()


def test_a_segment_of_another_spool_is_not_discarded(
    queue: QueueHarness,
    spool: Spool,
    typed: Typed,
    kept: tuple[list[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids, path = kept
    finish(queue, ids)

    def foreign(directory: JournalDirectory) -> Iterator[SegmentContents]:
        for one in contents(directory):
            yield replace(one, header=one.header._replace(spool="another"))

    monkeypatch.setattr("commands.ops.rebuild.contents", foreign)
    refused = typed("fsck", "--discard", path.stem, "--yes", status=1)
    assert "belongs to the spool another" in refused.stderr
    assert path.exists()
