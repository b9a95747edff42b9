"""`python -m bench.sink HOST:PORT DELAY`: our QMQP sink, with a running counter on standard output
as qmqp-sink has."""

import asyncio
import os
import sys

from qmqp.sink import Answer, Rule, Sink

TELL_EVERY = 0.002
"""Seconds between two looks at the count."""


async def _serve(host: str, port: int, delay: float) -> None:
    sink, told = Sink([Rule(Answer(delay=delay))], keep=1), 0
    await sink.start(host, port)
    while True:
        await asyncio.sleep(TELL_EVERY)
        if sink.count != told:
            told = sink.count
            os.write(1, b"%d\r" % told)


def main() -> None:
    import uvloop

    where, delay = sys.argv[1:]
    host, _, port = where.rpartition(":")
    uvloop.run(_serve(host, int(port), float(delay)))


if __name__ == "__main__":
    main()
