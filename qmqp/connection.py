"""A connection to a server: found by name, tried at every address, in time.

The servers of the protocol are listed by address and tried one after the other (qmail-qmqpc(8));
this one also takes names, and all addresses that a name has, in the order of the resolver, each
with an equal part of the time that is left. Sockets of the Unix family are taken too: qrelay and
Postfix listen on them.

A connection is closed with a reset: when a transfer ends before the commit point, nothing that
still lies in the send buffer may follow, or the server might get the last byte after all.
"""

import asyncio
import errno
import os
import socket
from functools import lru_cache
from struct import pack
from time import monotonic
from typing import Any

from qmqp.resolver import Address, addresses
from qmqp.result import words_of
from qmqp.wakeup import Wakeup

_STREAM = int(socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
_RESET_ON_CLOSE = pack("ii", 1, 0)
_OUT_OF_SOCKETS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_BACKLOG_POLL = 0.02  # seconds; nobody tells when the full backlog of a Unix socket has room again


class Unreachable(Exception):
    """There is no connection to any address; the text says why, for each."""


async def connect(
    host: str, port: int, path: str | None, deadline: float, waiting: Wakeup
) -> socket.socket:
    """Connect to `host` and `port`, or to the Unix socket `path`.

    Raises Unreachable, Stopped, and OSError when this process has no socket to spare (EMFILE and
    the like)."""
    try:
        found = (
            [(int(socket.AF_UNIX), path)]
            if path is not None
            else await _found(host, port, deadline, waiting)
        )
    except (OSError, UnicodeError) as error:
        raise Unreachable(f"no connection: {_name(host, port)} {_why(error)}") from None
    tried = []
    for left, (family, where) in zip(range(len(found), 0, -1), found, strict=True):
        now = monotonic()
        try:
            return await _try(family, where, now + (deadline - now) / left, waiting)
        except OSError as error:
            if error.errno in _OUT_OF_SOCKETS:
                raise
            name = f"unix:{path}" if path is not None else _name(host, port, where[0])
            tried.append(f"{name} {_why(error)}")
    raise Unreachable(f"no connection: {'; '.join(tried)}")


async def _found(host: str, port: int, deadline: float, waiting: Wakeup) -> list[Address]:
    if literal := _literal(host, port):
        return [literal]
    lookup = addresses(host, port)
    lookup.add_done_callback(waiting.wake)
    try:
        while not lookup.done():
            await waiting.until(deadline)
    finally:
        lookup.remove_done_callback(waiting.wake)
    found = lookup.result()
    if isinstance(found, Exception):
        raise found
    return found


async def _try(family: int, where: Any, deadline: float, waiting: Wakeup) -> socket.socket:
    """A connection to one address. Raises OSError, Stopped."""
    sock = socket.socket(family, _STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        while (code := sock.connect_ex(where)) not in (0, errno.EISCONN):
            if code == errno.EALREADY:
                await _writable(sock, deadline, waiting)
            elif code == errno.EAGAIN:
                asyncio.get_running_loop().call_later(_BACKLOG_POLL, waiting.wake)
                await waiting.until(deadline)
            elif (
                code != errno.EINPROGRESS
            ):  # then it is asked again: on the loopback the handshake is over by now
                raise OSError(code, os.strerror(code))
    except BaseException:
        sock.close()
        raise
    return sock


async def _writable(sock: socket.socket, deadline: float, waiting: Wakeup) -> None:
    loop = asyncio.get_running_loop()
    loop.add_writer(sock.fileno(), waiting.wake)
    try:
        await waiting.until(deadline)
    finally:
        loop.remove_writer(sock.fileno())


@lru_cache(maxsize=1024)
def _literal(host: str, port: int) -> Address | None:
    """The address that `host` is in itself, without asking anybody; None for a name."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return None
    return found[0][0], found[0][4]


def _why(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        error = OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
    return words_of(error)


def _name(host: str, port: int, address: str | None = None) -> str:
    """An address as people write it; one of a name as Postfix does, `name[address]:port`."""
    if address is not None and not _literal(host, port):
        return f"{host}[{address}]:{port}"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
