"""The keeper and its store: whatever dies, hangs or comes too late, each is answered once and
nothing is done twice."""

import asyncio
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


class Desk:
    """A keeper in a thread, with a database that is a list, and the other end of its line."""

    def __init__(self, spool: Spool) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.settimeout(10)
        self.spool = spool
        self.committed: list[str] = []
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()
        self.fault: BaseException | None = None
        self.frames, self.reports = FrameDecoder(), list[BatchReply]()
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

    def order(self, *, body: bool = True, deadline: float | None = None) -> StoreRequest:
        """Send an order; without a `body` it is there already."""
        message = new_message()
        if not body:
            self.spool.store(message.id, [b"text"])
        order = StoreRequest(next(self.numbers), message, [b"text"] if body else None, deadline)
        self.ours.sendall(order.encode())
        return order

    def cancel(self, order: StoreRequest) -> None:
        self.ours.sendall(StoreRequest(order.number).encode())

    def busy(self) -> list[StoreRequest]:
        """One that is being committed, and one that is stored and waits: no more is taken."""
        self.gate.clear()
        first = self.order()
        assert self.entered.wait(10)
        second = self.order()
        until(lambda: self.bodies() == 2)
        return [first, second]

    def bodies(self) -> int:
        return len([*self.spool.ids()])

    def results(self) -> dict[int, Any]:
        """Everything that is answered until the keeper closes."""
        with suppress(ConnectionResetError):
            while data := self.ours.recv(1 << 16):
                self.reports += self.frames.feed(data)
        found = [result for report in self.reports for result in report.results]
        assert len(found) == len(dict(found)), "answered twice"
        return dict(found)

    def ended(self) -> bool:
        self._thread.join(10)
        return not self._thread.is_alive()

    def close(self) -> None:
        self.gate.set()
        self.ours.close()
        assert self.ended()


@pytest.fixture
def desk(spool: Spool) -> Iterator[Desk]:
    desk = Desk(spool)
    yield desk
    desk.close()


def test_at_the_end_what_was_ordered_is_kept_and_what_was_withdrawn_is_told(desk: Desk) -> None:
    kept = desk.busy()
    streamed, small = desk.order(body=False), desk.order()
    desk.cancel(streamed)
    desk.cancel(small)
    desk.ours.shutdown(socket.SHUT_WR)
    desk.gate.set()
    results = desk.results()
    assert [results[order.number] for order in kept] == [None, None]
    assert {type(results[order.number]) for order in (streamed, small)} == {Cancelled}
    assert (desk.bodies(), len(desk.committed)) == (2, 2)
    assert desk.ended()


def test_who_has_heard_451_gets_nothing_committed_or_stored(desk: Desk) -> None:
    desk.gate.clear()
    first = desk.order()
    assert desk.entered.wait(10)
    soon = time.monotonic() + 0.3
    waits = desk.order(deadline=soon)
    until(lambda: desk.bodies() == 2)
    unread = desk.order(deadline=soon)
    until(lambda: time.monotonic() > soon)
    desk.gate.set()
    desk.ours.shutdown(socket.SHUT_WR)
    results = desk.results()
    assert results[first.number] is None
    assert {type(results[order.number]) for order in (waits, unread)} == {RowRefused}
    assert (desk.bodies(), len(desk.committed)) == (1, 1)


def test_with_nobody_left_to_answer_nothing_new_is_committed(desk: Desk) -> None:
    first, _ = desk.busy()
    desk.order()
    desk.ours.close()  # as when smtpd is killed: its clients lose their connections and send again
    desk.gate.set()
    assert desk.ended()
    assert first.message is not None
    assert desk.committed == [first.message.id]
    assert desk.bodies() == 1


@pytest.mark.parametrize(
    ("fault", "answer", "bodies"),
    [
        (OperationalError(None, None, ConnectionRefusedError()), RowRefused, 0),
        (OperationalError("INSERT", {}, ConnectionResetError()), CommitUnknown, 1),
    ],
)
def test_only_what_a_commit_may_hold_keeps_its_body(
    desk: Desk, fault: Exception, answer: type, bodies: int
) -> None:
    desk.fault = fault
    order = desk.order(deadline=time.monotonic() + 0.2)
    until(desk.entered.is_set)
    until(lambda: desk.bodies() == bodies)
    desk.ours.shutdown(socket.SHUT_WR)
    assert type(desk.results()[order.number]) is answer
    assert (desk.bodies(), desk.committed) == (bodies, [])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_committer_that_breaks_ends_the_keeper(desk: Desk) -> None:
    desk.fault = (
        MemoryError()
    )  # which `GroupCommitter` takes for the row's fault, and so is answered
    refused = desk.order()
    desk.entered.wait(10)
    desk.fault = SystemExit()
    desk.order()
    assert desk.ended()
    assert str(desk.results()[refused.number]) == "MemoryError"


# --- the store
# --------------------------------------------------------------------------------------------


class Shop:
    """A store on a loop; every launch of a keeper does what `lives` says next."""

    def __init__(self, *lives: Launch) -> None:
        self.lives, self.kept, self.answers = list(lives), list[str](), list[Any]()
        self.store = SpoolerClient(self._launch, lambda ids, _route: self.kept.extend(ids))
        self._changed = asyncio.Event()

    async def _launch(self, channel: socket.socket) -> object:
        return await self.lives.pop(0)(channel)

    def put(self, body: bytes = b"text", deadline: float = 1e9) -> int:
        return self.store.store(new_message(), [body], deadline, self._answered)

    def _answered(self, answer: Exception | None) -> None:
        self.answers.append(answer)
        self._changed.set()

    async def answered(self, count: int) -> list[Any]:
        async with asyncio.timeout(10):
            while len(self.answers) < count:
                self._changed.clear()
                await self._changed.wait()
        return self.answers


def sound(spool: Spool) -> Launch:
    async def launch(channel: socket.socket) -> object:
        with channel:
            keeper = Spooler(channel, spool, lambda messages, _: [None] * len(messages))
            await asyncio.to_thread(keeper.run)
        return 0

    return launch


async def deaf(channel: socket.socket) -> object:
    """It says that it is there, and never anything else."""
    with channel:
        channel.sendall(frame(BatchReply([], 0.0)))
        return await asyncio.Event().wait()


async def mortal(channel: socket.socket) -> object:
    """It is there, takes one order in, and dies."""
    with channel:
        channel.sendall(frame(BatchReply([], 0.0)))
        channel.setblocking(False)
        await asyncio.get_running_loop().sock_recv(channel, 1 << 16)
    return -9


async def impossible(_: socket.socket) -> object:
    raise BlockingIOError(11, "no process to spare")


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reception.spooler_client.RESTART_DELAY", 0.05)


def test_a_keeper_that_cannot_be_started_is_said_at_the_start() -> None:
    async def run() -> None:
        with pytest.raises(SpoolerError, match="no process to spare"):
            await Shop(impossible).store.start()

    asyncio.run(run())


@pytest.mark.usefixtures("hasty")
def test_whatever_ends_a_keeper_the_next_one_takes_what_waited(spool: Spool) -> None:
    async def run() -> None:
        shop = Shop(mortal, impossible, impossible, sound(spool))
        await shop.store.start()
        shop.put()
        assert [type(answer) for answer in await shop.answered(1)] == [CommitUnknown]
        shop.put()  # nobody is there to take it, for two launches
        assert (await shop.answered(2))[1:] == [None]
        assert len(shop.kept) == 1
        await shop.store.close(10)

    asyncio.run(run())


@pytest.mark.usefixtures("hasty")
def test_a_keeper_that_hangs_is_ended_and_replaced(spool: Spool) -> None:
    async def run() -> None:
        shop = Shop(deaf, sound(spool))
        await shop.store.start()
        shop.put(deadline=100.0)
        shop.store.check_deadlines(100.0 + HANG_TIMEOUT - 1)
        await asyncio.sleep(0)
        assert shop.answers == []
        shop.store.check_deadlines(100.0 + HANG_TIMEOUT + 1)
        assert [type(answer) for answer in await shop.answered(1)] == [CommitUnknown]
        shop.put()
        assert (await shop.answered(2))[1:] == [None]
        await shop.store.close(10)

    asyncio.run(run())


def test_while_the_keeper_reads_nothing_orders_can_be_taken_back_and_no_more_is_held() -> None:
    async def run() -> None:
        shop = Shop(deaf)
        await shop.store.start()
        transport = shop.store._transport
        assert transport is not None
        orders = [shop.put(bytes(1 << 20)) for _ in range(8)]
        await asyncio.sleep(0)
        orders += [shop.put(bytes(1 << 20)) for _ in range(50)]
        held = transport.get_write_buffer_size()
        for order in orders[8:]:
            shop.store.cancel(order)
        assert [type(answer) for answer in await shop.answered(50)] == [Cancelled] * 50
        assert transport.get_write_buffer_size() <= held <= 8 * (1 << 20) + 4096
        await shop.store.close(0.1)
        assert len(await shop.answered(58)) == 58

    asyncio.run(run())


def test_every_answer_comes_although_one_cannot_be_taken(spool: Spool) -> None:
    async def run() -> None:
        shop = Shop(sound(spool))
        await shop.store.start()

        def gone(_: Exception | None) -> None:
            raise RuntimeError("gone")

        shop.store.store(new_message(), [b"text"], 1e9, gone)
        shop.put()
        assert await shop.answered(1) == [None]
        await shop.store.close(10)

    asyncio.run(run())


def test_frames_survive_any_cut() -> None:
    frames, data, found = (
        FrameDecoder(),
        b"".join(frame((n, b"x" * n)) for n in range(40)),
        list[Any](),
    )
    for n in range(len(data)):
        found += frames.feed(data[n : n + 1])
    assert found == [(n, b"x" * n) for n in range(40)]
