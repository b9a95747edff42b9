"""The spooler on a real journal and both databases: what it confirms is stored, every request gets
one result, and every stored message gets its rows once."""

import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy.exc import OperationalError
from structlog.testing import capture_logs

import reception.committer
import reception.replay
import reception.spooler
from reception.replay import Chunk, OpenSegment, read_chunk, to_replay
from reception.spooler import Spooler
from reception.spooler_protocol import (
    FrameDecoder,
    Lag,
    SpoolerReply,
    StoreFault,
    StoreRequest,
    frame,
)
from relay.db.engine import DatabaseFileError, OlderDatabase
from relay.ids import new_id
from relay.queue.accept import Acceptor, EncodedMessage, PositionMoved, SegmentSpan, encode
from relay.spool.journal.directory import ADOPTED, OWNED, JournalDirectory, SegmentFile
from relay.spool.journal.format import BLOCK, Place
from relay.spool.journal.reader import JournalReader
from relay.spool.journal.supply import make_segment
from relay.spool.mark import SpoolMark
from relay.spool.store import Spool
from tests.integration.harness import QueueHarness, new_message
from tests.services import Postgres
from tests.waiting import until

BODY = b"Subject: x\n\ntext\n"
SEGMENT = 1 << 20


class GatedAcceptor(Acceptor):
    """An acceptor whose database can be away (`gate` is closed) or refuse (`fault`)."""

    def __init__(self, queue: QueueHarness) -> None:
        super().__init__(queue.database, lifetime=1000.0, grace=5.0)
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()
        self.fault: Exception | None = None
        self.batches: list[int] = []
        self.announced: list[str | None] = []

    def sealed_segments(self) -> set[str]:
        if self.fault is not None:
            raise self.fault
        return super().sealed_segments()

    def commit(
        self, messages: Any, span: SegmentSpan, *, age: float = 0.0, announced: str | None = None
    ) -> None:
        self.entered.set()
        assert self.gate.wait(20)
        if self.fault is not None:
            raise self.fault
        super().commit(messages, span, age=age, announced=announced)
        self.batches.append(len(messages))
        self.announced.append(announced)


class SpoolerHarness:
    """A spooler in a thread, and our end of its channel."""

    def __init__(self, queue: QueueHarness, spool: Spool, **options: Any) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.settimeout(30)
        self.queue, self.spool = queue, spool
        self.acceptor = GatedAcceptor(queue)
        self.acceptor.fault = options.pop("fault", None)
        self.mark = SpoolMark(JournalDirectory(spool.handle), spool.identity)
        self.spooler = Spooler(
            self.theirs,
            spool,
            self.acceptor,
            queue.database,
            self.mark,
            **({"segment_size": SEGMENT} | options),
        )
        self.frames, self.replies = FrameDecoder(), list[SpoolerReply]()
        self.numbers = iter(range(1, 100_000))
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        self.receive()

    def _run(self) -> None:
        with self.theirs:
            self.spooler.run()

    def request(self, *addresses: str, body: bytes | None = BODY, **more: Any) -> StoreRequest:
        """Send a request; a body of None says that its file is synced."""
        size = len(BODY) if body is None else len(body)
        message = new_message(*addresses, size=size, **more)
        routes = tuple({recipient.route: None for recipient in message.recipients})
        parts = None if body is None else [body[:5], body[5:]]
        number = next(self.numbers)
        request = StoreRequest(number, message.id, encode(message), routes, size, parts)
        self.ours.sendall(frame(request))
        return request

    def receive(self) -> None:
        """Wait for at least one more reply."""
        replies = self.frames.feed(self.ours.recv(1 << 16))
        self.replies += [SpoolerReply(*values) for values in replies]

    def results(self) -> dict[int, StoreFault | None]:
        results = [result for reply in self.replies for result in reply.results]
        assert len(results) == len(dict(results)), "two results for a request"
        return {number: StoreFault(*fault) if fault else None for number, fault in results}

    def result(self, request: StoreRequest) -> StoreFault | None:
        while request.number not in self.results():
            self.receive()
        return self.results()[request.number]

    def committed(self) -> list[str]:
        """The ids whose rows were announced, in order."""
        found, early = list[str](), list[str]()
        for reply in self.replies:
            ids = [queue_id for some in reply.ids.values() for queue_id in some]
            if reply.early:
                early += ids
            elif ids:
                found += ids
                early = [queue_id for queue_id in early if queue_id not in ids]
            elif reply.messages:  # in time, so only the early hint has named them
                found += early
                early = []
        return found

    def wait_for_rows(self, *requests: StoreRequest) -> None:
        while not {request.queue_id for request in requests} <= {*self.committed()}:
            self.receive()

    def finish(self) -> None:
        """smtpd closes its end, and takes what still comes."""
        self.ours.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            while data := self.ours.recv(1 << 16):
                self.replies += [SpoolerReply(*values) for values in self.frames.feed(data)]
        self.end()

    def end(self) -> None:
        self.ours.close()
        self.thread.join(20)
        assert not self.thread.is_alive()


@contextmanager
def spooler(queue: QueueHarness, spool: Spool, **options: Any) -> Iterator[SpoolerHarness]:
    harness = SpoolerHarness(queue, spool, **options)
    yield harness
    harness.acceptor.gate.set()
    harness.end()


@pytest.fixture
def bound(queue: QueueHarness, spool: Spool) -> Spool:
    spool.prepare(queue.database, unsafe=True)
    return spool


@pytest.fixture
def harness(queue: QueueHarness, bound: Spool) -> Iterator[SpoolerHarness]:
    with spooler(queue, bound) as harness:
        yield harness


def octets(request: StoreRequest) -> int:
    """What a request counts for the limit."""
    return len(request.rows) + request.size


def outage() -> OperationalError:
    return OperationalError("COMMIT", {}, ConnectionResetError())


def places(queue: QueueHarness) -> dict[str, Place | None]:
    rows = queue.rows("SELECT @hex(id) AS id, @hex(segment) AS segment, position FROM messages")
    return {
        row["id"]: Place(row["segment"], row["position"]) if row["segment"] else None
        for row in rows
    }


def body_of(harness: SpoolerHarness, queue_id: str, size: int = len(BODY)) -> bytes:
    place = places(harness.queue)[queue_id]
    assert place is not None
    return JournalReader(JournalDirectory(harness.spool.handle)).read(place, size)


def test_a_stored_message_has_its_rows_and_its_body(harness: SpoolerHarness) -> None:
    request = harness.request("b@example.org", "bulk:c@example.org")
    assert harness.result(request) is None
    harness.wait_for_rows(request)
    assert body_of(harness, request.queue_id) == BODY
    assert [row["state"] for row in harness.queue.rows("SELECT state FROM deliveries")] == [
        "queued",
        "queued",
    ]
    early = harness.replies[1]
    assert early.ids == {"default": [request.queue_id], "bulk": [request.queue_id]}


def test_the_hint_of_a_lone_message_comes_with_its_reply(
    harness: SpoolerHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once, as its rows are made in time."""
    monkeypatch.setattr("reception.committer.EARLY_COMMIT", 60.0)
    request = harness.request()
    harness.wait_for_rows(request)
    (stored,) = [reply for reply in harness.replies if reply.results]
    (committed,) = [reply for reply in harness.replies if reply.messages]
    assert (stored.early, stored.ids) == (True, {"default": [request.queue_id]})
    assert (committed.early, committed.ids) == (False, {})
    assert harness.acceptor.announced == [request.queue_id]


def test_an_early_hint_is_repeated_when_the_rows_come_late(
    harness: SpoolerHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers may have looked for them in vain by then."""
    monkeypatch.setattr("reception.committer.EARLY_COMMIT", 0.0)
    request = harness.request()
    harness.wait_for_rows(request)
    hints = [(reply.early, reply.ids) for reply in harness.replies if reply.ids]
    ids = {"default": [request.queue_id]}
    assert hints == [(True, ids), (False, ids)]


def test_a_hint_is_not_early_while_other_messages_wait_for_rows(harness: SpoolerHarness) -> None:
    harness.acceptor.gate.clear()
    first = harness.request()
    harness.result(first)
    second = harness.request()  # in a batch of its own
    harness.result(second)
    hinted = [queue_id for r in harness.replies for ids in r.ids.values() for queue_id in ids]
    assert hinted == [first.queue_id]
    harness.acceptor.gate.set()
    harness.wait_for_rows(first, second)


def test_a_large_message_has_no_place_in_the_journal(harness: SpoolerHarness) -> None:
    request = harness.request(body=None)
    harness.wait_for_rows(request)
    assert places(harness.queue) == {request.queue_id: None}


def test_the_reply_follows_the_sync_and_not_the_database(harness: SpoolerHarness) -> None:
    harness.acceptor.gate.clear()
    request = harness.request()
    assert harness.result(request) is None
    assert places(harness.queue) == {}
    assert harness.replies[-1].lag.messages == 1
    harness.acceptor.gate.set()
    harness.wait_for_rows(request)
    assert harness.replies[-1].lag == Lag()


def test_rows_gather_after_a_batch_of_several(
    queue: QueueHarness, bound: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception.committer, "GATHER", 1e6)
    monkeypatch.setattr(reception.committer, "GATHER_MESSAGES", 5)
    monkeypatch.setattr(reception.committer, "SAME_TIME", 1e6)
    with spooler(queue, bound) as harness:
        harness.acceptor.gate.clear()
        first = [harness.request()]
        assert harness.acceptor.entered.wait(20)
        first += [harness.request() for _ in range(2)]
        assert [harness.result(request) for request in first] == [None] * 3
        # A reply goes before the committer has its message.
        until(lambda: harness.spooler.lag().messages == 3)
        harness.acceptor.gate.set()
        harness.wait_for_rows(*first)
        later = [harness.request() for _ in range(5)]
        harness.wait_for_rows(*later)
        counts = [reply.messages for reply in harness.replies if reply.messages]
        assert counts == [1, 2, 5], "a batch of several waits for five"
        more = [harness.request() for _ in range(2)]
        assert [harness.result(request) for request in more] == [None] * 2
        harness.finish()
        assert {request.queue_id for request in more} <= {*harness.committed()}, "at the end too"


def test_a_reply_that_waits_for_rows_ends_the_gathering(
    queue: QueueHarness, bound: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception.committer, "GATHER", 1e6)
    with spooler(queue, bound, reply_lag=1) as harness:
        harness.acceptor.gate.clear()
        first = [harness.request() for _ in range(4)]
        harness.acceptor.gate.set()
        harness.wait_for_rows(*first)
        gathers = harness.request()
        assert harness.result(gathers) is None
        harness.wait_for_rows(gathers, harness.request())


def test_a_reply_waits_for_its_rows_once_and_then_follows_the_sync(
    queue: QueueHarness, bound: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception.spooler, "REPLY_WAIT", 1e6)
    with spooler(queue, bound, reply_lag=0) as harness:
        quick = harness.request()
        harness.wait_for_rows(quick)
        (both,) = [reply for reply in harness.replies if reply.messages]
        assert both.results == [(quick.number, None)], "one reply says both"
        monkeypatch.setattr(reception.spooler, "REPLY_WAIT", 0.4)
        harness.acceptor.gate.clear()
        first = harness.request()
        assert harness.result(first) is None, "after the wait, without rows"
        monkeypatch.setattr(reception.spooler, "REPLY_WAIT", 1e6)
        assert harness.result(harness.request()) is None, "at once: the database does not keep up"
        assert len(places(queue)) == 1
        harness.acceptor.gate.set()
        until(lambda: len(places(queue)) == 3)


def test_above_the_limit_nothing_is_stored(queue: QueueHarness, bound: Spool) -> None:
    size = len(encode(new_message(size=len(BODY)))) + len(BODY)
    with spooler(queue, bound, limit=5 * size) as harness:
        harness.acceptor.gate.clear()
        stored = []
        for count in range(1, 6):
            stored.append(harness.request())
            assert harness.result(stored[-1]) is None
            assert harness.replies[-1].lag.octets == count * size
        refused = harness.request()
        fault = harness.result(refused)
        assert fault is not None
        assert "RELAY_JOURNAL_LIMIT" in fault.reason
        assert not fault.unknown
        harness.acceptor.gate.set()
        harness.wait_for_rows(*stored)
        assert harness.result(harness.request()) is None
    assert refused.queue_id not in places(queue)


def test_envelopes_count_for_the_limit(queue: QueueHarness, bound: Spool) -> None:
    """A message of a few octets may have a thousand recipients."""
    many = [f"{number}@example.org" for number in range(500)]
    with spooler(queue, bound, limit=1 << 17) as harness:
        harness.acceptor.gate.clear()
        assert harness.result(harness.request(*many)) is None
        fault = harness.result(harness.request(*many))
        assert fault is not None
        assert "RELAY_JOURNAL_LIMIT" in fault.reason


def test_batches_of_large_envelopes_fit_their_segments(queue: QueueHarness, bound: Spool) -> None:
    many = [f"{number}@example.org" for number in range(1500)]
    with spooler(queue, bound, segment_size=1 << 20) as harness:
        requests = [harness.request(*many) for _ in range(12)]
        assert all(len(request.rows) > 100_000 for request in requests)
        assert [harness.result(request) for request in requests] == [None] * 12
        harness.wait_for_rows(*requests)
    used = sum(len(request.rows) for request in requests) / (1 << 20)
    assert len(queue.rows("SELECT id FROM segments")) <= 2 * used + 1, "none is wasted"


def test_memory_and_transactions_are_bounded_in_octets(
    queue: QueueHarness, bound: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [f"{number}@example.org" for number in range(100)]
    monkeypatch.setattr(reception.committer, "MAX_HELD_OCTETS", 50_000)
    for module in (reception.committer, reception.replay):
        monkeypatch.setattr(module, "MAX_ROWS_OCTETS", 50_000)
    read = list[int]()

    def counted(*arguments: Any) -> Chunk:
        chunk = read_chunk(*arguments)
        read.append(len(chunk.messages))
        return chunk

    monkeypatch.setattr(reception.committer, "read_chunk", counted)
    with spooler(queue, bound, fault=outage()) as harness:
        for _ in range(2):  # the memory of the first outage is free for the second
            harness.acceptor.fault = outage()
            read.clear()
            requests = []
            for _ in range(20):  # one batch each
                requests.append(harness.request(*many))
                assert harness.result(requests[-1]) is None
            harness.acceptor.fault = None
            harness.wait_for_rows(*requests)
            fit = 50_000 // len(requests[0].rows)
            assert fit <= 20 - sum(read) <= 2 * fit, "so many waited, or were tried, in memory"
            assert max(harness.acceptor.batches) <= fit


def test_without_a_database_the_mail_of_earlier_spoolers_counts_for_the_limit(
    queue: QueueHarness, bound: Spool
) -> None:
    first = SpoolerHarness(queue, bound)
    sealed = first.request()
    first.wait_for_rows(sealed)
    first.finish()
    second = SpoolerHarness(queue, bound, fault=outage())
    left = [second.request(), second.request()]
    assert [second.result(request) for request in left] == [None, None]
    second.finish()
    size = sum(map(octets, left))
    with spooler(queue, bound, fault=outage(), limit=size + octets(left[0])) as third:
        until(lambda: third.spooler.lag().messages == 2)
        assert third.result(third.request()) is None
        assert third.replies[-1].lag[:2] == (3, size + octets(left[0]))
        fault = third.result(third.request())
        assert fault is not None
        assert "RELAY_JOURNAL_LIMIT" in fault.reason
        third.acceptor.fault = None
        third.wait_for_rows(*left)
        until(lambda: len(places(queue)) == 4)
        assert third.result(third.request()) is None


def test_without_mail_and_without_a_database_the_lag_is_told(
    queue: QueueHarness, bound: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start of a spooler that finds mail without rows too."""
    monkeypatch.setattr(reception.spooler, "LAG_INTERVAL", 0.02)
    first = SpoolerHarness(queue, bound, fault=outage())
    requests = [first.request() for _ in range(3)]
    assert [first.result(request) for request in requests] == [None] * 3
    wait_for_lag(first, lambda lag: lag.messages == 3 and lag.seconds > 0.1)
    first.finish()
    with spooler(queue, bound, fault=outage()) as second:
        wait_for_lag(second, lambda lag: lag.messages == 3 and lag.seconds > 0.2)
        assert second.results() == {}
        second.acceptor.fault = None
        wait_for_lag(second, lambda lag: lag == Lag())


def test_a_lag_that_ends_without_a_commit_is_told_as_0(
    queue: QueueHarness, bound: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier spooler left had its rows."""
    monkeypatch.setattr(reception.spooler, "LAG_INTERVAL", 0.02)
    with spooler(queue, bound) as harness:
        monkeypatch.setattr(harness.spooler, "lag", lambda: Lag(2, 300, 4.0))
        wait_for_lag(harness, lambda lag: lag.messages == 2)
        monkeypatch.setattr(harness.spooler, "lag", Lag)
        wait_for_lag(harness, lambda lag: lag == Lag())


def test_a_stopped_smtpd_does_not_stop_the_spooler(
    queue: QueueHarness, bound: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not read the replies that tell the lag."""
    monkeypatch.setattr(reception.spooler, "LAG_INTERVAL", 0.0)
    with spooler(queue, bound) as harness:
        harness.theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        told = list[Lag]()

        def lag() -> Lag:
            told.append(Lag(1))
            return Lag(1)

        monkeypatch.setattr(harness.spooler, "lag", lag)
        until(lambda: len(told) > 1000)
        request = harness.request()
        until(lambda: request.queue_id in places(queue))


def wait_for_lag(harness: SpoolerHarness, condition: Callable[[Lag], bool]) -> None:
    """Wait for a reply that tells such a lag."""
    while not condition(Lag(*harness.replies[-1].lag)):
        harness.receive()


def test_mail_of_earlier_spoolers_counts_once_while_it_is_adopted(
    queue: QueueHarness, bound: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else smtpd would reply 451 above half of the limit."""
    for _ in range(3):
        earlier = SpoolerHarness(queue, bound, fault=outage())
        assert earlier.result(earlier.request()) is None
        earlier.finish()
    seen = list[int]()

    def watched(*arguments: Any) -> OpenSegment | None:
        seen.append(third.spooler.lag().messages)
        return to_replay(*arguments)

    monkeypatch.setattr(reception.committer, "to_replay", watched)
    with spooler(queue, bound, fault=outage()) as third:
        until(lambda: third.spooler.lag().messages == 3)
        third.acceptor.gate.clear()
        third.acceptor.fault = None
        assert third.acceptor.entered.wait(20)
        assert third.spooler.lag().messages == 3
    assert seen == [3, 3, 3]


def test_a_reply_is_due_exactly_when_its_wait_ends(
    queue: QueueHarness, bound: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception.spooler, "LAG_INTERVAL", 1e6)
    monkeypatch.setattr(reception.spooler, "REPLY_WAIT", 1e5)
    with spooler(queue, bound, reply_lag=0) as harness:
        until(lambda: harness.spooler.next_due() > time.monotonic() + 2e5)
        harness.acceptor.gate.clear()
        sent = time.monotonic()
        request = harness.request()
        assert harness.acceptor.entered.wait(20)
        assert sent + 1e5 <= harness.spooler.next_due() <= time.monotonic() + 1e5
        harness.acceptor.gate.set()
        assert harness.result(request) is None


@pytest.mark.parametrize(
    ("fault", "event"),
    [
        (OSError(errno.EIO, os.strerror(errno.EIO)), "spool away"),
        (DatabaseFileError(errno.ENOENT, os.strerror(errno.ENOENT)), "database away"),
        (OperationalError("COMMIT", {}, ConnectionResetError()), "database away"),
    ],
    ids=["spool", "file of the database", "connection"],
)
def test_the_log_says_what_is_away(
    queue: QueueHarness,
    bound: Spool,
    monkeypatch: pytest.MonkeyPatch,
    fault: Exception,
    event: str,
) -> None:
    events = list[str]()
    monkeypatch.setattr(reception.committer.log, "error", lambda event, **_: events.append(event))
    with spooler(queue, bound, fault=fault):
        until(lambda: events)
    assert events == [event]


def test_messages_of_one_transaction_arrived_within_a_second(
    queue: QueueHarness, bound: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception.committer, "SAME_TIME", 0.0)
    with spooler(queue, bound, fault=outage()) as harness:
        requests = []
        for _ in range(3):
            requests.append(harness.request())
            assert harness.result(requests[-1]) is None
        harness.acceptor.fault = None
        harness.wait_for_rows(*requests)
        assert harness.acceptor.batches == [1, 1, 1]


def test_rows_that_wait_for_the_database_get_the_time_of_arrival(
    queue: QueueHarness, bound: Spool
) -> None:
    with spooler(queue, bound) as harness:
        harness.wait_for_rows(harness.request())
        queue.change("DELETE FROM messages")
        harness.acceptor.fault = outage()
        harness.acceptor.entered.clear()
        request = harness.request()
        assert harness.result(request) is None
        stored = time.monotonic()
        assert harness.acceptor.entered.wait(10), "the transaction was tried"
        until(lambda: time.monotonic() > stored + 0.8)
        harness.acceptor.fault = None
        harness.wait_for_rows(request)
    (row,) = queue.rows("SELECT @since(received_at) AS ago FROM messages")
    assert row["ago"] >= 0.8


def test_damage_of_a_segment_is_told(queue: QueueHarness, bound: Spool) -> None:
    first = SpoolerHarness(queue, bound, fault=outage())
    damaged = first.request()
    assert first.result(damaged) is None
    whole = first.request()  # another batch
    assert first.result(whole) is None
    first.finish()
    ((_, name),) = JournalDirectory(bound.handle).segments(OWNED)
    JournalDirectory(bound.handle).open(name, write=True).write([b"?"], 4096 + 100)
    with spooler(queue, bound) as second:
        second.wait_for_rows(whole)
        assert second.result(second.request()) is None
        assert second.replies[-1].lag.damages == 1
    assert damaged.queue_id not in places(queue)


def test_a_spooler_learns_the_mark_of_the_batches(queue: QueueHarness, bound: Spool) -> None:
    """The disk was full when the file should have been written."""
    first = SpoolerHarness(queue, bound, fault=outage())
    first.mark.known = 7
    assert first.result(first.request()) is None
    first.finish()
    SpoolMark(JournalDirectory(bound.handle), bound.identity).learn(3)
    with spooler(queue, bound, fault=outage()) as second:
        until(lambda: second.mark.known == 7)


def mark_of(queue: QueueHarness) -> int:
    return int(queue.rows("SELECT mark FROM spool")[0]["mark"])


def test_a_mark_follows_the_last_rows_without_further_mail(
    queue: QueueHarness, bound: Spool
) -> None:
    with spooler(queue, bound) as harness:
        harness.wait_for_rows(harness.request())
        until(lambda: harness.mark.known == 1)
        harness.wait_for_rows(harness.request())
        until(lambda: harness.mark.known == 2)
    assert mark_of(queue) == 2, "no rows were made since"


def test_a_mark_follows_the_last_rows_of_a_spooler_that_ends(
    queue: QueueHarness, bound: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception.committer, "MARK_INTERVAL", 1e9)
    harness = SpoolerHarness(queue, bound)
    for _ in range(3):
        harness.wait_for_rows(harness.request())
    until(lambda: harness.mark.known == 1)
    harness.finish()
    assert mark_of(queue) == 2


def test_an_outage_of_any_length_costs_no_memory_and_no_order(
    queue: QueueHarness, bound: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception.committer, "MAX_HELD", 4)
    for module in (reception.committer, reception.replay):
        monkeypatch.setattr(module, "MAX_ROWS", 16)
        monkeypatch.setattr(module, "SAME_TIME", 1e6)
    with spooler(queue, bound, segment_size=1 << 17) as harness:
        harness.acceptor.fault = OperationalError("COMMIT", {}, ConnectionResetError())
        requests = []
        for _ in range(40):  # over several segments
            requests.append(harness.request(body=bytes(10_000)))
            assert harness.result(requests[-1]) is None
        assert places(queue) == {}
        harness.acceptor.fault = None
        later = harness.request()
        harness.wait_for_rows(*requests, later)
        assert harness.committed() == [request.queue_id for request in (*requests, later)]
        assert max(harness.acceptor.batches) > 4, "large batches"
        for request in requests:
            assert body_of(harness, request.queue_id, 10_000) == bytes(10_000)


def test_the_next_spooler_makes_the_rows_of_one_that_died(
    queue: QueueHarness, bound: Spool
) -> None:
    first = SpoolerHarness(queue, bound)
    first.acceptor.fault = OperationalError("COMMIT", {}, ConnectionResetError())
    requests = [first.request(), first.request("bulk:c@example.org")]
    assert [first.result(request) for request in requests] == [None, None]
    first.finish()  # it gives up, as the database is away
    assert places(queue) == {}
    with spooler(queue, bound) as second:
        second.wait_for_rows(*requests)
        assert [body_of(second, request.queue_id) for request in requests] == [BODY, BODY]
        sealed = "SELECT @hex(id) AS id FROM segments WHERE sealed_at IS NOT NULL"
        (segment,) = until(lambda: queue.rows(sealed))
        assert segment["id"] + ADOPTED in JournalDirectory(bound.handle).names()
    assert queue.rows("SELECT count(*) AS n FROM deliveries") == [{"n": 2}]


@pytest.fixture
def late_sync(postgres_queue: QueueHarness, postgres: Postgres) -> Iterator[QueueHarness]:
    """A database that syncs a COMMIT without a sync ten seconds later."""
    engine = sqlalchemy.create_engine(postgres_queue.database.url, isolation_level="AUTOCOMMIT")

    def configure(change: str) -> None:
        with engine.connect() as connection:
            connection.exec_driver_sql(f"ALTER SYSTEM {change}")
            connection.exec_driver_sql("SELECT pg_reload_conf()")
        engine.dispose()

    configure("SET wal_writer_delay = '10s'")
    yield postgres_queue
    configure("RESET wal_writer_delay")


def test_rows_of_a_lone_message_that_a_crash_takes_away_are_made_again(
    late_sync: QueueHarness, spool: Spool, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception.committer, "MARK_INTERVAL", 1e9)
    spool.prepare(late_sync.database, unsafe=True)
    with spooler(late_sync, spool) as harness, capture_logs() as logs:
        first = harness.request()
        harness.wait_for_rows(first)
        until(lambda: harness.mark.known == 1)  # this COMMIT is synced
        lost = harness.request()
        harness.wait_for_rows(lost)
        assert {*places(late_sync)} == {first.queue_id, lost.queue_id}
        postgres.kill()
        postgres.start()
        later = harness.request()
        harness.wait_for_rows(later)
        assert {*places(late_sync)} == {one.queue_id for one in (first, lost, later)}
        assert body_of(harness, lost.queue_id) == BODY
    (found,) = [log for log in logs if log["event"] == "rows lost by a crash of the database"]
    assert found["messages"] == 1


def test_a_replay_gives_the_time_of_arrival(queue: QueueHarness, bound: Spool) -> None:
    first = SpoolerHarness(queue, bound)
    first.acceptor.fault = OperationalError("COMMIT", {}, ConnectionResetError())
    request = first.request()
    assert first.result(request) is None
    first.finish()
    until(lambda: _age_of_segments(bound) > 0.5)
    with spooler(queue, bound) as second:
        second.wait_for_rows(request)
    (row,) = queue.rows("SELECT @since(received_at) AS ago FROM messages")
    assert row["ago"] >= 0.5


def _age_of_segments(spool: Spool) -> float:
    directory = spool.directory / "journal"
    return time.time() - max(path.stat().st_mtime for path in directory.glob(f"*{OWNED}"))


def test_at_the_end_rows_are_made_and_the_segment_is_sealed(
    queue: QueueHarness, bound: Spool
) -> None:
    harness = SpoolerHarness(queue, bound)
    requests = [harness.request() for _ in range(3)]
    for request in requests:
        assert harness.result(request) is None
    harness.finish()
    assert {*places(queue)} == {request.queue_id for request in requests}
    (segment,) = queue.rows(
        "SELECT @hex(id) AS id, messages, @hex(least_id) AS least FROM segments"
        " WHERE sealed_at IS NOT NULL"
    )
    assert (segment["messages"], segment["least"]) == (3, min(r.queue_id for r in requests))
    names = JournalDirectory(bound.handle).names()
    assert [name for name in names if name.endswith(OWNED)] == [segment["id"] + OWNED], (
        "the segment that was made ahead is gone"
    )


def test_a_segment_that_was_sealed_and_removed_is_not_sealed_again(
    queue: QueueHarness, bound: Spool
) -> None:
    """The reply to the first try was lost. While the file is there, the position has moved."""
    acceptor, directory = GatedAcceptor(queue), JournalDirectory(bound.handle)
    directory.make()
    segment, file = make_segment(directory, bound.identity, size=SEGMENT)
    sealing = OpenSegment(segment, segment + OWNED, file, BLOCK, BLOCK, opened=True)
    sealing.add([new_id()], 1, 1)
    with pytest.raises(PositionMoved):
        reception.replay.seal(acceptor, directory, sealing)
    directory.unlink(sealing.name)
    reception.replay.seal(acceptor, directory, sealing)
    file.close()


def test_segments_without_a_message_do_not_stay(queue: QueueHarness, bound: Spool) -> None:
    for _ in range(2):
        SpoolerHarness(queue, bound).finish()
    assert [n for n in JournalDirectory(bound.handle).names() if n != "mark"] == []


@pytest.mark.parametrize("call", ["write", "sync"])
def test_a_failed_write_is_told_and_never_replayed(
    queue: QueueHarness, bound: Spool, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    with spooler(queue, bound) as harness:
        before = harness.request()
        assert harness.result(before) is None
        once = iter([True])
        original = getattr(SegmentFile, call)

        def failing(file: SegmentFile, *arguments: Any) -> Any:
            if threading.current_thread() is harness.thread and next(once, False):
                if call == "sync":
                    original(file)  # it is on the disk all the same
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(file, *arguments)

        monkeypatch.setattr(SegmentFile, call, failing)
        refused = harness.request()
        fault = harness.result(refused)
        assert fault is not None
        assert (fault.number, fault.unknown) == (errno.ENOSPC, False)
        after = harness.request()
        assert harness.result(after) is None
    with spooler(queue, bound):
        until(lambda: {before.queue_id, after.queue_id} <= {*places(queue)})
    assert refused.queue_id not in places(queue)


def test_a_batch_whose_fate_is_unknown_is_told_so(
    queue: QueueHarness, bound: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = SegmentFile.sync
    with spooler(queue, bound) as harness:
        calls = iter([True, True])  # the batch, and the batch that would declare it void

        def failing(file: SegmentFile) -> None:
            if threading.current_thread() is harness.thread and next(calls, False):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            original(file)

        monkeypatch.setattr(SegmentFile, "sync", failing)
        lost = harness.request()
        fault = harness.result(lost)
        assert fault is not None
        assert fault.unknown
        after = harness.request()
        assert harness.result(after) is None
        harness.wait_for_rows(after)


def test_rows_that_the_database_refuses_are_held(queue: QueueHarness, bound: Spool) -> None:
    with spooler(queue, bound) as harness:
        harness.acceptor.gate.clear()
        good = [harness.request()]
        assert harness.acceptor.entered.wait(10)
        bad = harness.request(sender="nul\0")  # SQLite stores it
        good.append(harness.request())
        harness.acceptor.gate.set()
        until(lambda: len(places(queue)) == 3)
        harness.wait_for_rows(*good)
    states = {
        row["id"]: (row["state"], row["reason_source"])
        for row in queue.rows("SELECT @hex(queue_id) AS id, state, reason_source FROM deliveries")
    }
    assert [states[request.queue_id] for request in good] == [("queued", None)] * 2
    if queue.dialect.postgresql:
        assert states[bad.queue_id] == ("held", "relay")


def test_two_replays_of_a_segment_cannot_both_make_rows(queue: QueueHarness) -> None:
    acceptor = Acceptor(queue.database, lifetime=1000.0, grace=5.0)
    segment = new_id()
    acceptor.open_segment(segment, 4096)
    first, second = (EncodedMessage(encode(new_message()), 5000) for _ in range(2))
    acceptor.commit([first], SegmentSpan(segment, 4096, 8192))
    acceptor.commit([first], SegmentSpan(segment, 4096, 8192))  # the COMMIT was in doubt
    acceptor.commit([second], SegmentSpan(segment, 8192, 16384))
    with pytest.raises(PositionMoved):
        acceptor.commit([first], SegmentSpan(segment, 8192, 20480))
    with pytest.raises(PositionMoved):
        acceptor.commit_each([first], SegmentSpan(segment, 8192, 20480))
    queue.change("DELETE FROM messages")  # retention
    acceptor.commit([first], SegmentSpan(segment, 4096, 8192))
    assert places(queue) == {}


def test_frames_may_be_cut_anywhere() -> None:
    decoder = FrameDecoder()
    data = b"".join(frame((n, b"x" * n)) for n in range(40))
    values: list[Any] = []
    for n in range(len(data)):
        values += decoder.feed(data[n : n + 1])
    assert values == [(n, b"x" * n) for n in range(40)]


def test_a_database_that_was_restored_under_living_connections_is_noticed(
    queue: QueueHarness, bound: Spool
) -> None:
    """Each of several processes notices it, and none makes the database look newer."""
    processes = [SpoolMark(JournalDirectory(bound.handle), bound.identity) for _ in range(3)]
    for mark in processes:
        mark.advance(queue.database)
    queue.change("UPDATE spool SET mark = 2")
    for mark in processes:
        with pytest.raises(OlderDatabase, match="fsck --rebuild"):
            mark.advance(queue.database)
    assert queue.rows("SELECT mark FROM spool") == [{"mark": 2}]


def test_a_database_that_was_restored_is_refused(
    queue: QueueHarness, bound: Spool, tmp_path: Path
) -> None:
    mark = SpoolMark(JournalDirectory(bound.handle), bound.identity)
    mark.guard(queue.database)
    assert mark.advance(queue.database) == 1
    queue.database.dispose()
    assert queue.rows("SELECT mark FROM spool") == [{"mark": 1}]
    queue.change("UPDATE spool SET mark = 0")
    queue.database.dispose()
    again = SpoolMark(JournalDirectory(bound.handle), bound.identity)
    assert again.known == 1
    with pytest.raises(Exception, match="fsck --rebuild"):
        queue.rows("SELECT mark FROM spool")
