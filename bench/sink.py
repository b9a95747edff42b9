"""`python -m bench.sink HOST:PORT DELAY`: a QMQP sink that replies K to each request after `DELAY`
seconds, with a running counter on standard output, as qmqp-sink writes it.

It counts the bytes of a request and checks nothing. `qmqp.sink`, which checks everything, uses as
much CPU for a message as the worker that it would slow down.
"""

import asyncio
import os
import sys
from typing import cast

import uvloop

from qmqp.netstring import encode

INTERVAL = 0.002  # seconds between two writes of the counter
REPLY = encode(b"Kok")


class RequestCounter:
    """Counts requests, and writes the number a moment after it has changed."""

    def __init__(self) -> None:
        self._count = self._written = 0

    def add(self) -> None:
        if self._count == self._written:
            asyncio.get_running_loop().call_later(INTERVAL, self._write)
        self._count += 1

    def _write(self) -> None:
        self._written = self._count
        os.write(1, b"%d\r" % self._written)


class CountedRequest(asyncio.Protocol):
    """A connection: one request, and the reply to it."""

    def __init__(self, counter: RequestCounter, delay: float) -> None:
        self._counter = counter
        self._delay = delay
        self._head = b""
        self._left = -1  # bytes that are missing; -1: the length is not known yet

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._left < 0:
            self._head += data
            length, colon, data = self._head.partition(b":")
            if not colon:
                return
            self._left = int(length) + len(b",")
        self._left -= len(data)
        if not self._left:
            asyncio.get_running_loop().call_later(self._delay, self._reply)

    def _reply(self) -> None:
        self._counter.add()
        self._transport.write(REPLY)
        self._transport.close()


async def _serve(address: str, delay: str) -> None:
    host, _, port = address.rpartition(":")
    counter = RequestCounter()
    server = await asyncio.get_running_loop().create_server(
        lambda: CountedRequest(counter, float(delay)), host, int(port), backlog=1000
    )
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(*sys.argv[1:]))
