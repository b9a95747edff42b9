"""A spooler whose segments are damaged, or cannot be read in places: the other mail gets its rows,
and nothing is given up that may be read later."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import reception.committer
import reception.replay
from reception.replay import Chunk, OpenSegment, read_chunk
from reception.spooler_protocol import StoreRequest
from relay.spool.journal.directory import ADOPTED, OWNED, JournalDirectory
from relay.spool.journal.format import BLOCK
from relay.spool.store import Spool
from tests.bad_places import BadPlaces
from tests.integration.harness import QueueHarness
from tests.integration.test_spooler import SEGMENT, SpoolerHarness, outage, places, spooler
from tests.waiting import until

LARGE = b"Subject: x\n\n" + 3 * BLOCK * b"x"


@pytest.fixture(autouse=True)
def short_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second look comes soon, and a kept segment is read again soon."""
    for name in ("ADOPT_INTERVAL", "ADOPT_SOON", "KEPT_INTERVAL"):
        monkeypatch.setattr(reception.committer, name, 0.05)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> BadPlaces:
    return BadPlaces(monkeypatch)


@pytest.fixture
def bound(queue: QueueHarness, spool: Spool) -> Spool:
    spool.prepare(queue.database, unsafe=True)
    return spool


@pytest.fixture
def queue(clean_url: str) -> Iterator[QueueHarness]:
    made = QueueHarness(clean_url, registered=False)
    yield made
    made.database.dispose()


def left(queue: QueueHarness, spool: Spool, *bodies: bytes) -> tuple[list[StoreRequest], Path]:
    """Messages without rows, each in a batch, in the segment of a spooler that has ended."""
    before = {name for name in JournalDirectory(spool.handle).names() if name.endswith(OWNED)}
    harness = SpoolerHarness(queue, spool, fault=outage())
    requests = list[StoreRequest]()
    for body in bodies:
        requests.append(harness.request(body=body))
        assert harness.result(requests[-1]) is None
    harness.finish()
    (name,) = {
        name for name in JournalDirectory(spool.handle).names() if name.endswith(OWNED)
    } - before
    return requests, spool.directory / "journal" / name


def states(queue: QueueHarness) -> dict[str, tuple[str, str | None]]:
    rows = queue.rows("SELECT @hex(queue_id) AS id, state, last_reply FROM deliveries")
    return {row["id"]: (row["state"], row["last_reply"]) for row in rows}


def segments(queue: QueueHarness) -> dict[str, tuple[int, bool]]:
    rows = queue.rows(
        "SELECT @hex(id) AS id, committed_to, sealed_at IS NOT NULL AS sealed FROM segments"
    )
    return {row["id"]: (row["committed_to"], bool(row["sealed"])) for row in rows}


def spoil(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        (octet,) = file.read(1)
        file.seek(position)
        file.write(bytes([octet ^ 1]))


def test_mail_behind_a_place_that_cannot_be_read_gets_its_rows(
    queue: QueueHarness, bound: Spool, disk: BadPlaces
) -> None:
    requests, path = left(queue, bound, b"one\n", b"two\n", b"three\n")
    disk.add(path, 2 * BLOCK, 3 * BLOCK)
    with spooler(queue, bound) as harness:
        until(lambda: {requests[0].queue_id, requests[2].queue_id} <= {*places(queue)})
        until(lambda: harness.spooler.lag().messages == 0)
        assert harness.result(harness.request()) is None
        assert harness.replies[-1].lag.damages == 1
    assert requests[1].queue_id not in places(queue)
    position, sealed = segments(queue)[path.stem]
    assert (position, sealed) == (4 * BLOCK, False)
    assert path.with_suffix(ADOPTED).exists()


def test_a_place_that_cannot_be_read_once_costs_nothing(
    queue: QueueHarness, bound: Spool, disk: BadPlaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, path = left(queue, bound, b"one\n", b"two\n", b"three\n")
    disk.add(path, 2 * BLOCK, 3 * BLOCK)
    seen = list[bool]()

    def read_and_heal(*arguments: Any) -> Chunk:
        chunk = read_chunk(*arguments)
        seen.append(chunk.unreadable)
        disk.heal()
        return chunk

    monkeypatch.setattr(reception.committer, "read_chunk", read_and_heal)
    with spooler(queue, bound):
        until(lambda: {one.queue_id for one in requests} <= {*places(queue)})
    assert seen == [True, False]
    assert {state for state, _ in states(queue).values()} == {"queued"}


def test_each_place_that_cannot_be_read_is_read_again(
    queue: QueueHarness, bound: Spool, disk: BadPlaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one can be read then."""
    monkeypatch.setattr(reception.replay, "MAX_ROWS", 1)
    requests, path = left(queue, bound, b"one\n", b"two\n", b"three\n", b"four\n", b"five\n")
    disk.add(path, 2 * BLOCK, 3 * BLOCK)
    seen = list[bool]()

    def read_and_change(segment: OpenSegment, end: int) -> Chunk:
        chunk = read_chunk(segment, end)
        seen.append(chunk.unreadable)
        if len(seen) == 2:
            disk.add(path.with_suffix(ADOPTED), 4 * BLOCK, 5 * BLOCK)
        elif len(seen) > 2:
            disk.heal()
        return chunk

    monkeypatch.setattr(reception.committer, "read_chunk", read_and_change)
    with spooler(queue, bound):
        until(lambda: {requests[n].queue_id for n in (0, 2, 3, 4)} <= {*places(queue)})
    assert seen[:4] == [True, True, True, False]


def test_the_last_batch_gets_its_rows_when_it_can_be_read_again(
    queue: QueueHarness, bound: Spool, disk: BadPlaces
) -> None:
    requests, path = left(queue, bound, b"one\n", b"two\n")
    disk.add(path, 2 * BLOCK, 3 * BLOCK)
    with spooler(queue, bound) as harness:
        until(lambda: requests[0].queue_id in places(queue))
        until(lambda: len(disk.reads) > 20)  # it was read again in vain, more than once
        assert harness.spooler.lag().damages == 1
        assert segments(queue)[path.stem] == (2 * BLOCK, False)
        disk.heal()
        until(lambda: requests[1].queue_id in places(queue))
        until(lambda: segments(queue)[path.stem][1])
    assert states(queue)[requests[1].queue_id] == ("queued", None)


def test_a_segment_of_which_nothing_can_be_read_keeps_its_position(
    queue: QueueHarness, bound: Spool, disk: BadPlaces
) -> None:
    """It is a fault of the disk, and ends with it. The other segments get their rows."""
    requests, path = left(queue, bound, b"one\n", b"two\n")
    others, _ = left(queue, bound, b"three\n")
    disk.add(path, 0, path.stat().st_size)
    with spooler(queue, bound):
        until(lambda: others[0].queue_id in places(queue))
        assert segments(queue).get(path.stem) in (None, (BLOCK, False))
        disk.heal()
        until(lambda: {one.queue_id for one in requests} <= {*places(queue)})
    assert {state for state, _ in states(queue).values()} == {"queued"}


def test_a_disk_that_fails_after_the_adoption_keeps_the_position(
    queue: QueueHarness, bound: Spool, disk: BadPlaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, path = left(queue, bound, b"one\n", b"two\n")
    original = reception.replay.to_replay

    def fail_then(*arguments: Any) -> Any:
        segment = original(*arguments)
        if not disk.reads:
            disk.add(path.with_suffix(ADOPTED), 0, SEGMENT)
        return segment

    monkeypatch.setattr(reception.committer, "to_replay", fail_then)
    with spooler(queue, bound) as harness:
        until(lambda: len(disk.reads) > 20)
        assert (harness.spooler.lag().messages, places(queue)) == (2, {})
        disk.heal()
        until(lambda: {one.queue_id for one in requests} <= {*places(queue)})


@pytest.mark.parametrize("unreadable", [False, True])
def test_a_message_whose_body_is_damaged_gets_rows_that_are_held(
    queue: QueueHarness, bound: Spool, disk: BadPlaces, unreadable: bool
) -> None:
    requests, path = left(queue, bound, b"one\n", LARGE, b"three\n")
    if unreadable:
        disk.add(path, 3 * BLOCK, 4 * BLOCK)
    else:
        spoil(path, 3 * BLOCK)
    with spooler(queue, bound) as harness:
        until(lambda: {one.queue_id for one in requests} <= {*places(queue)})
        until(lambda: segments(queue)[path.stem][1])  # nothing of it is unknown
        assert harness.spooler.lag().damages == 1
        assert harness.spooler.lag().messages == 0
    found = states(queue)
    state, reason = found[requests[1].queue_id]
    assert state == "held"
    assert reason is not None
    assert reason.startswith("held by smtpd: the body")
    assert ("cannot read" in reason) is unreadable
    assert [found[requests[n].queue_id][0] for n in (0, 2)] == ["queued"] * 2
    assert requests[1].queue_id not in harness.committed(), "no worker needs a hint of it"


def test_a_segment_with_a_damaged_envelope_is_kept(queue: QueueHarness, bound: Spool) -> None:
    requests, path = left(queue, bound, b"one\n", b"two\n", b"three\n")
    spoil(path, 2 * BLOCK + 100)
    for _ in range(2):  # the next spooler knows it too
        with spooler(queue, bound) as harness:
            until(lambda: {requests[0].queue_id, requests[2].queue_id} <= {*places(queue)})
            until(lambda: harness.spooler.lag().messages == 0)
            assert segments(queue)[path.stem] == (4 * BLOCK, False)
    assert path.with_suffix(ADOPTED).exists()


def test_damage_of_the_last_batch_of_a_living_spooler_is_no_torn_tail(
    queue: QueueHarness, bound: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client has heard 250."""
    monkeypatch.setattr(reception.committer, "MAX_HELD", 0)  # so it is read back
    with spooler(queue, bound, fault=outage()) as harness:
        request = harness.request(body=LARGE)
        assert harness.result(request) is None
        directory = JournalDirectory(bound.handle)
        names = [name for _, name in directory.segments(OWNED)]
        (name,) = [name for name in names if directory.open(name).read(4, BLOCK) != bytes(4)]
        spoil(bound.directory / "journal" / name, 2 * BLOCK)
        harness.acceptor.fault = None
        until(lambda: request.queue_id in places(queue))
        assert states(queue)[request.queue_id][0] == "held"
        until(lambda: harness.spooler.lag().damages == 1)
    assert segments(queue)[Path(name).stem][1], "all its messages have rows"
