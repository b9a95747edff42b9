"""The spooler and its client: whatever crashes, hangs or is late, every request gets one result and
no row is committed twice."""

import asyncio
import math
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from reception.spooler import Spooler
from reception.spooler_client import HANG_TIMEOUT, Launch, SpoolerClient, SpoolerError
from reception.spooler_protocol import (
    BatchReply,
    Cancelled,
    FrameDecoder,
    RowRefused,
    StoreRequest,
    cancellation,
    frame,
)
from relay.db.group_commit import CommitUnknown
from relay.ids import new_id
from relay.queue.accept import NewMessage, NewRecipient
from relay.spool.store import Spool
from tests.waiting import until


def new_message() -> NewMessage:
    return NewMessage(
        new_id(), "a@example.com", 4, [NewRecipient("b@example.org")], "::1", "client", "ESMTP"
    )


class SpoolerHarness:
    """A spooler in a thread, whose database is a list, and our end of its channel."""

    def __init__(self, spool: Spool) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.settimeout(10)
        self.spool = spool
        self.committed: list[str] = []
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()
        self.fault: BaseException | None = None
        self.frames, self.replies = FrameDecoder(), list[BatchReply]()
        self.numbers = iter(range(1, 100))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with self.theirs:
            Spooler(self.theirs, self.spool, self._commit).run()

    def _commit(self, messages: Sequence[NewMessage], _begin_by: float) -> list[None]:
        self.entered.set()
        assert self.gate.wait(10)
        if self.fault is not None:
            raise self.fault
        self.committed += [message.id for message in messages]
        return [None] * len(messages)

    def request(self, *, body: bool = True, deadline: float = math.inf) -> StoreRequest:
        """Send a request; without a `body` its file is synced already."""
        message = new_message()
        if not body:
            self.spool.store(message.id, [b"text"])
        request = StoreRequest(next(self.numbers), message, [b"text"] if body else None, deadline)
        self.ours.sendall(request.encode())
        return request

    def cancel(self, request: StoreRequest) -> None:
        self.ours.sendall(cancellation(request.number))

    def busy(self) -> list[StoreRequest]:
        """One request that is being committed, and one whose body is synced. No other is read."""
        self.gate.clear()
        first = self.request()
        assert self.entered.wait(10)
        second = self.request()
        until(lambda: self.bodies() == 2)
        return [first, second]

    def bodies(self) -> int:
        return len([*self.spool.ids()])

    def results(self) -> dict[int, Any]:
        """All results until the spooler closes its end."""
        with suppress(ConnectionResetError):
            while data := self.ours.recv(1 << 16):
                self.replies += self.frames.feed(data)
        results = [result for reply in self.replies for result in reply.results]
        assert len(results) == len(dict(results)), "two results for a request"
        return dict(results)

    def ended(self) -> bool:
        self._thread.join(10)
        return not self._thread.is_alive()

    def close(self) -> None:
        self.gate.set()
        self.ours.close()
        assert self.ended()


@pytest.fixture
def harness(spool: Spool) -> Iterator[SpoolerHarness]:
    harness = SpoolerHarness(spool)
    yield harness
    harness.close()


def test_at_the_end_requests_are_stored_and_cancelled_requests_get_cancelled(
    harness: SpoolerHarness,
) -> None:
    kept = harness.busy()
    streamed, small = harness.request(body=False), harness.request()
    harness.cancel(streamed)
    harness.cancel(small)
    harness.ours.shutdown(socket.SHUT_WR)
    harness.gate.set()
    results = harness.results()
    assert [results[request.number] for request in kept] == [None, None]
    assert {type(results[request.number]) for request in (streamed, small)} == {Cancelled}
    assert (harness.bodies(), len(harness.committed)) == (2, 2)
    assert harness.ended()


def test_a_request_past_its_deadline_is_neither_committed_nor_stored(
    harness: SpoolerHarness,
) -> None:
    harness.gate.clear()
    first = harness.request()
    assert harness.entered.wait(10)
    soon = time.monotonic() + 0.3
    waits = harness.request(deadline=soon)
    until(lambda: harness.bodies() == 2)
    unread = harness.request(deadline=soon)
    until(lambda: time.monotonic() > soon)
    harness.gate.set()
    harness.ours.shutdown(socket.SHUT_WR)
    results = harness.results()
    assert results[first.number] is None
    assert {type(results[request.number]) for request in (waits, unread)} == {RowRefused}
    assert (harness.bodies(), len(harness.committed)) == (1, 1)


def test_without_smtpd_no_further_batch_is_committed(harness: SpoolerHarness) -> None:
    first, _ = harness.busy()
    harness.request()
    harness.ours.close()  # like a killed smtpd, whose clients send again
    harness.gate.set()
    assert harness.ended()
    assert harness.committed == [first.message.id]
    assert harness.bodies() == 1


@pytest.mark.parametrize(
    ("fault", "error", "bodies"),
    [
        (OperationalError(None, None, ConnectionRefusedError()), RowRefused, 0),
        (OperationalError("INSERT", {}, ConnectionResetError()), CommitUnknown, 1),
    ],
)
def test_only_an_unknown_commit_keeps_its_body(
    harness: SpoolerHarness, fault: Exception, error: type, bodies: int
) -> None:
    harness.fault = fault
    request = harness.request(deadline=time.monotonic() + 0.2)
    until(harness.entered.is_set)
    until(lambda: harness.bodies() == bodies)
    harness.ours.shutdown(socket.SHUT_WR)
    assert type(harness.results()[request.number]) is error
    assert (harness.bodies(), harness.committed) == (bodies, [])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_unexpected_error_of_the_committer_ends_the_spooler(harness: SpoolerHarness) -> None:
    harness.fault = (
        MemoryError()
    )  # `GroupCommitter` treats it as a fault of the row, so this is a result
    refused = harness.request()
    harness.entered.wait(10)
    harness.fault = SystemExit()
    harness.request()
    assert harness.ended()
    assert str(harness.results()[refused.number]) == "MemoryError"


class ClientHarness:
    """A client on a loop. Each launch of a spooler runs the next one of `launches`."""

    def __init__(self, *launches: Launch) -> None:
        self.launches, self.stored, self.results = list(launches), list[str](), list[Any]()
        self.spooler = SpoolerClient(self._launch, lambda ids, _route: self.stored.extend(ids))
        self._changed = asyncio.Event()

    async def _launch(self, channel: socket.socket) -> object:
        return await self.launches.pop(0)(channel)

    def store(self, body: bytes = b"text", deadline: float = 1e9) -> int:
        return self.spooler.store(new_message(), [body], deadline, self._done)

    def _done(self, result: Exception | None) -> None:
        self.results.append(result)
        self._changed.set()

    async def wait_for(self, count: int) -> list[Any]:
        async with asyncio.timeout(10):
            while len(self.results) < count:
                self._changed.clear()
                await self._changed.wait()
        return self.results


def working(spool: Spool) -> Launch:
    async def launch(channel: socket.socket) -> object:
        with channel:
            spooler = Spooler(channel, spool, lambda messages, _: [None] * len(messages))
            await asyncio.to_thread(spooler.run)
        return 0

    return launch


async def hanging(channel: socket.socket) -> object:
    """It starts and never sends a result."""
    with channel:
        channel.sendall(frame(BatchReply([], 0.0)))
        return await asyncio.Event().wait()


async def dying(channel: socket.socket) -> object:
    """It starts, reads a request, and dies."""
    with channel:
        channel.sendall(frame(BatchReply([], 0.0)))
        channel.setblocking(False)
        await asyncio.get_running_loop().sock_recv(channel, 1 << 16)
    return -9


async def failing(_: socket.socket) -> object:
    raise BlockingIOError(11, "no process to spare")


@pytest.fixture
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reception.spooler_client.RESTART_DELAY", 0.05)


def test_start_raises_if_the_first_spooler_cannot_start() -> None:
    async def run() -> None:
        with pytest.raises(SpoolerError, match="no process to spare"):
            await ClientHarness(failing).spooler.start()

    asyncio.run(run())


@pytest.mark.usefixtures("no_delay")
def test_the_next_spooler_takes_the_requests_that_waited(spool: Spool) -> None:
    async def run() -> None:
        client = ClientHarness(dying, failing, failing, working(spool))
        await client.spooler.start()
        client.store()
        assert [type(result) for result in await client.wait_for(1)] == [CommitUnknown]
        client.store()  # the next two launches fail
        assert (await client.wait_for(2))[1:] == [None]
        assert len(client.stored) == 1
        await client.spooler.close(10)

    asyncio.run(run())


@pytest.mark.usefixtures("no_delay")
def test_a_spooler_that_hangs_is_replaced(spool: Spool) -> None:
    async def run() -> None:
        client = ClientHarness(hanging, working(spool))
        await client.spooler.start()
        client.store(deadline=100.0)
        client.spooler.check_deadlines(100.0 + HANG_TIMEOUT - 1)
        await asyncio.sleep(0)
        assert client.results == []
        client.spooler.check_deadlines(100.0 + HANG_TIMEOUT + 1)
        assert [type(result) for result in await client.wait_for(1)] == [CommitUnknown]
        client.store()
        assert (await client.wait_for(2))[1:] == [None]
        await client.spooler.close(10)

    asyncio.run(run())


def test_while_the_spooler_does_not_read_requests_can_be_cancelled_and_memory_is_bounded() -> None:
    async def run() -> None:
        client = ClientHarness(hanging)
        await client.spooler.start()
        transport = client.spooler.transport
        assert transport is not None
        requests = [client.store(bytes(1 << 20)) for _ in range(8)]
        await asyncio.sleep(0)
        requests += [client.store(bytes(1 << 20)) for _ in range(50)]
        held = transport.get_write_buffer_size()
        for request in requests[8:]:
            client.spooler.cancel(request)
        assert [type(result) for result in await client.wait_for(50)] == [Cancelled] * 50
        assert transport.get_write_buffer_size() <= held <= 8 * (1 << 20) + 4096
        await client.spooler.close(0.1)
        assert len(await client.wait_for(58)) == 58

    asyncio.run(run())


def test_every_result_is_delivered_although_one_callback_raises(spool: Spool) -> None:
    async def run() -> None:
        client = ClientHarness(working(spool))
        await client.spooler.start()

        def raising(_: Exception | None) -> None:
            raise RuntimeError("gone")

        client.spooler.store(new_message(), [b"text"], 1e9, raising)
        client.store()
        assert await client.wait_for(1) == [None]
        await client.spooler.close(10)

    asyncio.run(run())


def test_frames_may_be_cut_anywhere() -> None:
    decoder = FrameDecoder()
    data = b"".join(frame((n, b"x" * n)) for n in range(40))
    values: list[Any] = []
    for n in range(len(data)):
        values += decoder.feed(data[n : n + 1])
    assert values == [(n, b"x" * n) for n in range(40)]
