"""The spooler's client: whatever spoolers do, every request gets one result."""

import asyncio
import socket
import time
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY

from reception.spooler_client import (
    HANG_TIMEOUT,
    WRITE_TOGETHER,
    Launch,
    SpoolerClient,
    SpoolerError,
)
from reception.spooler_protocol import (
    FrameDecoder,
    Lag,
    SpoolerReply,
    StoreFault,
    StoreRequest,
    frame,
)
from relay.ids import new_id

DEADLINE = 60.0
STARTED = frame(SpoolerReply([], {}, 0, 0.0, Lag()))


class ClientHarness:
    """A client on a loop. Each launch of a spooler runs the next one of `launches`."""

    def __init__(self, *launches: Launch) -> None:
        self.launches, self.offers, self.results = list(launches), list[Any](), list[Any]()
        self.spooler = SpoolerClient(self._launch, self._note_offer, DEADLINE)
        self._changed = asyncio.Event()

    async def _launch(self, channel: socket.socket) -> object:
        return await self.launches.pop(0)(channel)

    def store(self, body: bytes = b"text", done: Any = None) -> int:
        return self.spooler.store(
            new_id(), b"{}", ("default",), len(body), [body], done or self._done
        )

    def _note_offer(self, ids: list[str], route: str, early: bool) -> None:
        self.offers.append((ids, route, early))
        self._changed.set()

    async def wait_for_offer(self) -> None:
        async with asyncio.timeout(10):
            while not self.offers:
                self._changed.clear()
                await self._changed.wait()

    def _done(self, result: StoreFault | None) -> None:
        self.results.append(result)
        self._changed.set()

    async def wait_for(self, count: int) -> list[Any]:
        async with asyncio.timeout(10):
            while len(self.results) < count:
                self._changed.clear()
                await self._changed.wait()
        return self.results


async def working(channel: socket.socket) -> object:
    """It stores every message and makes its rows."""
    loop, frames = asyncio.get_running_loop(), FrameDecoder()
    with channel:
        channel.setblocking(False)
        await loop.sock_sendall(channel, STARTED)
        while data := await loop.sock_recv(channel, 1 << 16):
            for values in frames.feed(data):
                request = StoreRequest(*values)
                reply = SpoolerReply(
                    [(request.number, None)], {"default": [request.queue_id]}, 1, 0.01, Lag()
                )
                await loop.sock_sendall(channel, frame(reply))
    return 0


async def hanging(channel: socket.socket) -> object:
    """It starts and never sends a result."""
    with channel:
        channel.sendall(STARTED)
        return await asyncio.Event().wait()


async def dying(channel: socket.socket) -> object:
    """It starts, reads a request, and dies."""
    with channel:
        channel.sendall(STARTED)
        channel.setblocking(False)
        await asyncio.get_running_loop().sock_recv(channel, 1 << 16)
    return -9


async def failing(_: socket.socket) -> object:
    raise BlockingIOError(11, "no process to spare")


@pytest.fixture
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reception.spooler_client.RESTART_DELAY", 0.05)


def test_requests_of_one_turn_of_the_loop_are_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        client = ClientHarness(working)
        await client.spooler.start()
        transport = client.spooler.transport
        assert transport is not None
        writes = list[bytes]()

        def write(data: bytes) -> None:
            writes.append(data)
            transport.write(data)

        counting = SimpleNamespace(write=write, write_eof=transport.write_eof)
        monkeypatch.setattr(client.spooler, "transport", counting)
        for _ in range(WRITE_TOGETHER):
            client.store()
        assert await client.wait_for(WRITE_TOGETHER) == [None] * WRITE_TOGETHER
        assert len(writes) == 1
        await client.spooler.close(10)

    asyncio.run(run())


def test_start_raises_if_the_first_spooler_cannot_start() -> None:
    async def run() -> None:
        with pytest.raises(SpoolerError, match="no process to spare"):
            await ClientHarness(failing).spooler.start()

    asyncio.run(run())


@pytest.mark.usefixtures("no_delay")
def test_a_request_of_a_dead_spooler_is_unknown_and_the_next_one_takes_those_that_waited() -> None:
    async def run() -> None:
        client = ClientHarness(dying, failing, failing, working)
        await client.spooler.start()
        client.store()
        [fault] = await client.wait_for(1)
        assert fault.unknown
        client.store()  # the next two launches fail
        assert (await client.wait_for(2))[1:] == [None]
        await client.spooler.close(10)
        assert len(client.offers) == 1

    asyncio.run(run())


@pytest.mark.parametrize("early", [True, False])
def test_ids_are_offered_as_the_spooler_says(early: bool) -> None:
    ids = [new_id(), new_id()]

    async def announcing(channel: socket.socket) -> object:
        with channel:
            channel.sendall(STARTED)
            channel.sendall(frame(SpoolerReply([], {"bulk": ids}, 0, 0.0, Lag(), early)))
            channel.setblocking(False)
            await asyncio.get_running_loop().sock_recv(channel, 1)
        return 0

    async def run() -> None:
        client = ClientHarness(announcing)
        await client.spooler.start()
        await client.wait_for_offer()
        await client.spooler.close(10)
        assert client.offers == [(ids, "bulk", early)]

    asyncio.run(run())


@pytest.mark.usefixtures("no_delay")
def test_a_spooler_that_hangs_is_replaced() -> None:
    async def run() -> None:
        client = ClientHarness(hanging, working)
        await client.spooler.start()
        before = time.monotonic()
        client.store()
        client.spooler.check_deadlines(before + DEADLINE + HANG_TIMEOUT - 1)
        await asyncio.sleep(0)
        assert client.results == []
        client.spooler.check_deadlines(time.monotonic() + DEADLINE + HANG_TIMEOUT + 1)
        assert [fault.unknown for fault in await client.wait_for(1)] == [True]
        client.store()
        assert (await client.wait_for(2))[1:] == [None]
        await client.spooler.close(10)

    asyncio.run(run())


def test_what_no_spooler_has_read_can_be_withdrawn_and_memory_is_bounded() -> None:
    async def run() -> None:
        client = ClientHarness(hanging)
        await client.spooler.start()
        transport = client.spooler.transport
        assert transport is not None
        sent = [client.store(bytes(1 << 20)) for _ in range(8)]
        await asyncio.sleep(0)
        waiting = [client.store(bytes(1 << 20)) for _ in range(50)]
        held = transport.get_write_buffer_size()
        assert all(client.spooler.withdraw(number) for number in waiting)
        assert not client.spooler.withdraw(sent[0])
        assert transport.get_write_buffer_size() <= held <= 8 * (1 << 20) + 4096
        await client.spooler.close(0.1)
        assert len(await client.wait_for(8)) == 8

    asyncio.run(run())


def test_a_reply_of_a_spooler_that_reads_nothing_sends_it_nothing_more() -> None:
    go, sent = asyncio.Event(), list[int]()

    async def talking(channel: socket.socket) -> object:
        """It reads nothing, and sends a reply."""
        with channel:
            channel.sendall(STARTED)
            await go.wait()
            channel.sendall(frame(SpoolerReply([(sent[0], None)], {}, 0, 0.0, Lag())))
            return await asyncio.Event().wait()

    async def run() -> None:
        client = ClientHarness(talking)
        await client.spooler.start()
        transport = client.spooler.transport
        assert transport is not None
        sent.extend(client.store(bytes(1 << 20)) for _ in range(8))
        await asyncio.sleep(0)  # a turn of the loop, which sends them
        held = transport.get_write_buffer_size()
        waiting = [client.store(bytes(1 << 20)) for _ in range(3)]
        go.set()
        assert await client.wait_for(1) == [None]
        assert transport.get_write_buffer_size() <= held
        assert all(client.spooler.withdraw(number) for number in waiting)
        await client.spooler.close(0.1)

    asyncio.run(run())


def test_damage_is_counted_over_all_spoolers() -> None:
    def telling(damages: int) -> Launch:
        async def spooler(channel: socket.socket) -> object:
            with channel:
                channel.sendall(STARTED)
                for count in range(damages + 1):
                    channel.sendall(frame(SpoolerReply([], {}, 0, 0.0, Lag(damages=count))))
                return 0

        return spooler

    async def run() -> None:
        third = asyncio.Event()

        async def last(channel: socket.socket) -> object:
            third.set()
            return await working(channel)

        client = ClientHarness(telling(2), telling(1), last)
        before = _damages()
        await client.spooler.start()
        async with asyncio.timeout(10):
            await third.wait()
        assert _damages() - before == 3
        await client.spooler.close(10)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reception.spooler_client.RESTART_DELAY", 0.05)
        asyncio.run(run())


def _damages() -> float:
    value = REGISTRY.get_sample_value("relay_journal_damages_total")
    assert value is not None
    return value


def test_every_result_is_delivered_although_one_callback_raises() -> None:
    async def run() -> None:
        client = ClientHarness(working)
        await client.spooler.start()

        def raising(_: StoreFault | None) -> None:
            raise RuntimeError("gone")

        client.store(done=raising)
        client.store()
        assert await client.wait_for(1) == [None]
        await client.spooler.close(10)

    asyncio.run(run())
