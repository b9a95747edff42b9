"""The health check of a container: `python -I -S health.py smtp|worker`. Exit status 0 is healthy,
1 is not.

    smtp    connect to RELAY_SMTP_LISTEN, read the banner, say QUIT
    worker  look how old the tick file is (RELAY_HEALTH_FILE), which the sweeper touches about once a second

It runs in every container again and again, so it is one file of the standard library that imports
no other of ours: it starts in milliseconds, where asking Celery costs most of a second of CPU and
the broker's good health.

What must stay true: the whole check ends within TIMEOUT, whatever the peer does; once we have
begun, a broker, database or QMQP server that is away makes nobody unhealthy, because restarting us
would not mend it. Docker reserves the status 2.
"""

import os
import socket
import sys
import time

TIMEOUT = 5.0
# A sweep may wait this long for a database that does not answer (seconds); see
# relay.db.engine.STATEMENT_TIMEOUT.
MAX_HEARTBEAT_AGE = 60.0
_LONGEST_BANNER = 4096


class Unhealthy(Exception):
    """The text says why."""


def smtp(listen: str) -> str:
    """Banner and QUIT at the first address of a list of `host:port`; raises Unhealthy or
    OSError."""
    host, _, port = listen.replace(",", " ").split()[0].rpartition(":")
    # The address that means all of a host's own reaches that host when it is connected to.
    address = host.strip("[]") or "localhost", int(port)
    deadline = time.monotonic() + TIMEOUT
    with socket.create_connection(address, TIMEOUT) as client:
        banner = _reply(client, deadline)
        if not banner.startswith("220"):
            raise Unhealthy(f"the banner is {banner!r}")
        client.sendall(b"QUIT\r\n")
        goodbye = _reply(client, deadline)
        if not goodbye.startswith("221"):
            raise Unhealthy(f"QUIT is answered {goodbye!r}")
    return banner


def _reply(client: socket.socket, deadline: float) -> str:
    """The last line of one reply (RFC 5321 section 4.2.1: `220-` goes on, `220 ` ends it)."""
    said = b""
    while len(said) < _LONGEST_BANNER:
        client.settimeout(max(0.001, deadline - time.monotonic()))
        more = client.recv(_LONGEST_BANNER)
        if not more:
            raise Unhealthy(f"the connection was closed after {said!r}")
        said += more
        last = said.split(b"\r\n")[-2] if said.endswith(b"\r\n") else b"-" * 4
        if last[3:4] != b"-":
            return last.decode("ascii", "backslashreplace")
    raise Unhealthy(f"a reply without an end: {said[:80]!r}...")


def worker(file: str) -> str:
    """Whether the tick file is young; raises Unhealthy."""
    if not file:
        raise Unhealthy("RELAY_HEALTH_FILE is not set")
    try:
        handle = os.open(file, os.O_RDONLY)
    except FileNotFoundError:
        raise Unhealthy(f"no {file}: the worker has not begun, or is stopping") from None
    age = time.time() - os.fstat(handle).st_mtime
    os.close(handle)
    # A clock that was set back makes the file seem to come from the future until its next tick.
    if abs(age) > MAX_HEARTBEAT_AGE:
        raise Unhealthy(f"the last tick was {age:.0f} s ago")
    return f"the last tick was {age:.1f} s ago"


def main(words: list[str]) -> int:
    """The exit status for these arguments."""
    try:
        match words:
            case ["smtp"]:
                said = smtp(os.environ.get("RELAY_SMTP_LISTEN") or "127.0.0.1:2525")
            case ["worker"]:
                said = worker(os.environ.get("RELAY_HEALTH_FILE", ""))
            case _:
                raise Unhealthy("usage: health.py smtp|worker")
    except (Unhealthy, OSError, ValueError) as error:
        print(f"unhealthy: {error}")
        return 1
    print(said)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
