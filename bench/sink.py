"""`python -m bench.sink HOST:PORT DELAY`: our QMQP sink with a running counter on standard output,
as qmqp-sink writes it."""

import asyncio
import os
import sys

import uvloop

from qmqp.sink import Answer, Rule, Sink

INTERVAL = 0.002  # seconds between two reads of the count


async def _serve(address: str, delay: str) -> None:
    host, _, port = address.rpartition(":")
    sink = Sink([Rule(Answer(delay=float(delay)))], keep=1)
    await sink.start(host, int(port))
    written = 0
    while True:
        await asyncio.sleep(INTERVAL)
        if sink.count != written:
            written = sink.count
            os.write(1, b"%d\r" % written)


if __name__ == "__main__":
    uvloop.run(_serve(*sys.argv[1:]))
