"""The health check of a container: `python -I -S healthcheck.py smtp|worker`. Status 0 is healthy,
1 is not; Docker reserves 2.

    smtp    connects to RELAY_SMTP_LISTEN (also over TLS), reads the banner, sends QUIT
    worker  reads the age of the heartbeat file (RELAY_HEALTH_FILE), which the sweeper touches
            every second

It runs often in every container, so it is one file that imports only the standard library and
starts in milliseconds; asking Celery costs most of a second of CPU, and needs the broker. What must
stay true: the check ends within TIMEOUT, whatever the peer does; a broker, database or QMQP server
that is out of reach makes no container unhealthy, because a restart would not help.
"""

import contextlib
import os
import socket
import sys
import time

TIMEOUT = 5.0
# Seconds that a sweep may wait for a database that does not answer; see
# relay.db.engine.STATEMENT_TIMEOUT.
MAX_HEARTBEAT_AGE = 60.0
_LONGEST_BANNER = 4096


class Unhealthy(Exception):
    """The text is the reason."""


def smtp(listen: str) -> str:
    """Check the first address of a list of listeners, and return the banner; raises Unhealthy or
    OSError. The name of a socket of systemd is no address."""
    listeners = [each.split("/") for each in listen.replace(",", " ").split()]
    listeners = [each for each in listeners if not each[0].startswith("systemd:")]
    if not listeners:
        raise Unhealthy(f"{listen} names no address that can be connected to")
    # A listener behind a proxy accepts the check only from RELAY_PROXY_NETWORKS.
    place, *options = min(listeners, key=lambda each: "proxy" in each)
    host, _, port = place.rpartition(":")
    # A connection to the address that means all addresses of a host reaches that host.
    address = host.strip("[]") or "localhost", int(port)
    deadline = time.monotonic() + TIMEOUT
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(socket.create_connection(address, TIMEOUT))
        if "proxy" in options:
            client.sendall(b"PROXY UNKNOWN\r\n")
        if "tls" in options:
            client = stack.enter_context(_over_tls(client))
        banner = _reply(client, deadline)
        if not banner.startswith("220"):
            raise Unhealthy(f"the banner is {banner!r}")
        client.sendall(b"QUIT\r\n")
        reply = _reply(client, deadline)
        if not reply.startswith("221"):
            raise Unhealthy(f"the reply to QUIT is {reply!r}")
    return banner


def _over_tls(client: socket.socket) -> socket.socket:
    """Its handshake has TIMEOUT. The name in the certificate is not that of this address, and a
    health check sends no secret, so nothing is verified."""
    import ssl  # takes long, and few listeners need it

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(client)


def _reply(client: socket.socket, deadline: float) -> str:
    """The last line of one reply (RFC 5321 section 4.2.1: `220-` is continued, `220 ` is last)."""
    data = b""
    while len(data) < _LONGEST_BANNER:
        client.settimeout(max(0.001, deadline - time.monotonic()))
        more = client.recv(_LONGEST_BANNER)
        if not more:
            raise Unhealthy(f"the connection was closed after {data!r}")
        data += more
        last = data.split(b"\r\n")[-2] if data.endswith(b"\r\n") else b"-" * 4
        if last[3:4] != b"-":
            return last.decode("ascii", "backslashreplace")
    raise Unhealthy(f"the reply does not end: {data[:80]!r}...")


def worker(file: str) -> str:
    """Check the age of the heartbeat file; raises Unhealthy."""
    if not file:
        raise Unhealthy("RELAY_HEALTH_FILE is not set")
    try:
        age = time.time() - os.stat(file).st_mtime  # noqa: PTH116 - pathlib takes long to import
    except FileNotFoundError:
        raise Unhealthy(f"no {file}: the worker has not started yet, or is stopping") from None
    # After a clock was set back, the file is from the future until the next heartbeat.
    if abs(age) > MAX_HEARTBEAT_AGE:
        raise Unhealthy(f"the last heartbeat was {age:.0f} s ago")
    return f"the last heartbeat was {age:.1f} s ago"


def main(arguments: list[str]) -> int:
    """The exit status for these arguments."""
    try:
        match arguments:
            case ["smtp"]:
                text = smtp(os.environ.get("RELAY_SMTP_LISTEN") or "127.0.0.1:2525")
            case ["worker"]:
                text = worker(os.environ.get("RELAY_HEALTH_FILE", ""))
            case _:
                raise Unhealthy("usage: healthcheck.py smtp|worker")
    except (Unhealthy, OSError, ValueError) as error:
        print(f"unhealthy: {error}")
        return 1
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
