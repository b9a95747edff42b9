"""Connects to a server: by name or address, at every address, within a deadline.

The servers of the protocol are tried one after the other (qmail-qmqpc(8)). Here a server may also
be a name: all its addresses are tried in the resolver's order, each with an equal part of the time
that is left. It may be a Unix socket too: qrelay and Postfix listen on them.

A connection is closed with a reset. When a transfer ends before the commit point, nothing that is
still in the send buffer may follow, or the server could get the last byte after all.
"""

import asyncio
import errno
import os
import socket
from functools import lru_cache
from struct import pack
from time import monotonic
from typing import Any

from qmqp.resolver import Address, lookup
from qmqp.result import describe
from qmqp.wakeup import Wakeup

RESET_ON_CLOSE = pack("ii", 1, 0)  # the value of SO_LINGER
_NON_BLOCKING = int(socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
_OUT_OF_SOCKETS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_BACKLOG_POLL = 0.02  # seconds; no event tells when the full backlog of a Unix socket has room


class Unreachable(Exception):
    """No address could be connected to; the text names the reason for each."""


async def connect(
    host: str, port: int, path: str | None, deadline: float, wakeup: Wakeup
) -> socket.socket:
    """Connect to `host` and `port`, or to the Unix socket `path`.

    Raises Unreachable, Stopped, and OSError when this process cannot open another socket (EMFILE
    and the like)."""
    try:
        if path is not None:
            addresses: list[Address] = [(int(socket.AF_UNIX), path)]
        else:
            addresses = await _resolve(host, port, deadline, wakeup)
    except (OSError, UnicodeError) as error:
        raise Unreachable(f"no connection: {_name(host, port)} {_reason(error)}") from None
    failures = []
    for left, (family, address) in zip(range(len(addresses), 0, -1), addresses, strict=True):
        now = monotonic()
        try:
            return await _connect(family, address, now + (deadline - now) / left, wakeup)
        except OSError as error:
            if error.errno in _OUT_OF_SOCKETS:
                raise
            name = f"unix:{path}" if path is not None else _name(host, port, address[0])
            failures.append(f"{name} {_reason(error)}")
    raise Unreachable(f"no connection: {'; '.join(failures)}")


async def _resolve(host: str, port: int, deadline: float, wakeup: Wakeup) -> list[Address]:
    if literal := _literal(host, port):
        return [literal]
    future = lookup(host, port)
    future.add_done_callback(wakeup.notify)
    try:
        while not future.done():
            await wakeup.wait(deadline)
    finally:
        future.remove_done_callback(wakeup.notify)
    result = future.result()
    if isinstance(result, Exception):
        raise result
    return result


async def _connect(family: int, address: Any, deadline: float, wakeup: Wakeup) -> socket.socket:
    """A connection to one address. Raises OSError, Stopped."""
    sock = socket.socket(family, _NON_BLOCKING)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        while (code := sock.connect_ex(address)) not in (0, errno.EISCONN):
            if code == errno.EALREADY:
                await wakeup.wait_writable(sock, deadline)
            elif code == errno.EAGAIN:
                asyncio.get_running_loop().call_later(_BACKLOG_POLL, wakeup.notify)
                await wakeup.wait(deadline)
            elif code != errno.EINPROGRESS:
                raise OSError(code, os.strerror(code))
            # EINPROGRESS is asked again at once: on loopback the handshake is over by now.
    except BaseException:
        sock.close()
        raise
    return sock


@lru_cache(maxsize=1024)
def _literal(host: str, port: int) -> Address | None:
    """The address if `host` is one, without a lookup; None for a name."""
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return None
    return infos[0][0], infos[0][4]


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        error = OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
    return describe(error)


def _name(host: str, port: int, address: str | None = None) -> str:
    """The usual notation of an address; for an address of a name Postfix's `name[address]:port`."""
    if address is not None and not _literal(host, port):
        return f"{host}[{address}]:{port}"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
