"""`python -m bench.source PORT MESSAGES BYTES SESSIONS REUSE`: what smtp-source does for the
benchmark, for machines without Postfix. REUSE is 0 or 1: send all messages of a session on one
connection.

It uses several times the CPU of smtp-source, so only runs with the same source can be compared.
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from bench.load import connect, deliver, text_of


def _send_all(port: int, text: bytes, messages: Iterator[int], *, reuse: bool) -> None:
    """Send messages until the iterator, which all sessions share, is empty."""
    for _ in messages:
        with connect(port) as client:
            deliver(client, text)
            for _ in messages if reuse else ():
                deliver(client, text)


def main() -> None:
    port, messages, size, sessions, reuse = map(int, sys.argv[1:])
    left = iter(range(messages))
    with ThreadPoolExecutor(sessions) as pool:
        started = [
            pool.submit(_send_all, port, text_of(size), left, reuse=bool(reuse))
            for _ in range(sessions)
        ]
    for session in started:
        session.result()


if __name__ == "__main__":
    main()
