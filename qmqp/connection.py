"""Connects to a server: by name or address, at every address, within a deadline.

The servers of the protocol are tried one after the other (qmail-qmqpc(8)). Here a server may also
be a name: all its addresses are tried in the resolver's order, each with an equal part of the time
that is left. It may be a Unix socket too: qrelay and Postfix listen on them.

A lookup takes as long as the resolver likes and cannot be cancelled, and the threads of an event
loop are few. Each name is therefore looked up in a thread of its own, and all connections to that
name wait for the same result: they wait for no other name. What was found is used for CACHE_TTL, so
that a busy client does not ask for every message; a failure is not used again.

A connection is closed with a reset. When a transfer ends before the commit point, nothing that is
still in the send buffer may follow, or the server could get the last byte after all.
"""

import asyncio
import errno
import math
import os
import socket
import threading
from functools import lru_cache
from struct import pack
from time import monotonic
from typing import Any

CACHE_TTL = 5.0  # seconds
PRECONNECTION_LIFE = 1.0  # seconds; less than servers wait for a request
LATE = 1.0  # seconds; a timer that is later than this shows that the process was stopped
RESET_ON_CLOSE = pack("ii", 1, 0)  # the value of SO_LINGER
_NON_BLOCKING = int(socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
_OUT_OF_SOCKETS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_BACKLOG_POLL = 0.02  # seconds; no event tells when the full backlog of a Unix socket has room

type Address = tuple[int, Any]  # family, and the argument of connect()
type Lookup = asyncio.Future[list[Address] | Exception]

# The last lookup of each name, and the time when it began.
lookups: dict[tuple[asyncio.AbstractEventLoop, str, int], tuple[float, Lookup]] = {}


class Unreachable(Exception):
    """No address could be connected to; the text names the reason for each."""


class Stopped(Exception):
    """This side has ended the transfer."""


class Wakeup:
    """Wakes one waiting coroutine. A notification carries no data: the coroutine checks its own
    conditions before it waits and after it wakes, and waits in a loop."""

    _future: asyncio.Future[bool] | None = None
    stopped = False

    def notify(self, *_: object) -> None:
        """End the present wait. Takes and ignores the arguments of a callback."""
        if self._future is not None and not self._future.done():
            self._future.set_result(True)

    def stop(self) -> None:
        """End the present wait, and let all later ones raise Stopped."""
        self.stopped = True
        self.notify()

    async def wait(self, deadline: float, writable: socket.socket | None = None) -> None:
        """Wait for a notification, or until the kernel has room for bytes of `writable`. Raises
        TimeoutError when `monotonic()` reaches `deadline`, and Stopped."""
        self.check()
        seconds = deadline - monotonic()
        if seconds <= 0:  # notifications may come without a pause: only the clock ends the loop
            raise TimeoutError
        loop = asyncio.get_running_loop()
        self._future = loop.create_future()
        timer = loop.call_later(seconds, _expire, self._future, deadline)
        if writable is not None:
            loop.add_writer(writable.fileno(), self.notify)
        try:
            if not await self._future:
                raise TimeoutError
        finally:
            timer.cancel()
            if writable is not None:
                loop.remove_writer(writable.fileno())

    def check(self) -> None:
        """Raises Stopped."""
        if self.stopped:
            raise Stopped("stopped before the commit point")


def _expire(future: asyncio.Future[bool], deadline: float) -> None:
    if future.done():
        return
    now = monotonic()
    if now - deadline > LATE:
        # A process that was stopped (SIGSTOP, a paused machine) has not read its sockets meanwhile,
        # and what its peers sent may still be on its way: RFC 6298 spaces retransmissions by a
        # second and more. Such a timer says nothing about the peer, so the deadline counts only
        # after another second of listening.
        future.get_loop().call_later(LATE, _expire, future, now + LATE)
    else:
        future.set_result(False)


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
        raise Unreachable(f"no connection: {_name(host, port)} {describe(error)}") from None
    failures = []
    for left, (family, address) in zip(range(len(addresses), 0, -1), addresses, strict=True):
        now = monotonic()
        try:
            return await _connect(family, address, now + (deadline - now) / left, wakeup)
        except OSError as error:
            if error.errno in _OUT_OF_SOCKETS:
                raise
            name = f"unix:{path}" if path is not None else _name(host, port, address[0])
            failures.append(f"{name} {describe(error)}")
    raise Unreachable(f"no connection: {'; '.join(failures)}")


class Preconnection:
    """A connection that is made while its request is still being prepared. `close` ends it, unless
    somebody has the socket of `ready`. `began` and `made` are the times of its beginning and of its
    end (monotonic; infinite before). Needs a running loop."""

    def __init__(self, host: str, port: int, path: str | None, seconds: float) -> None:
        self.wakeup = Wakeup()
        self.began, self.made = monotonic(), math.inf
        self._connecting = asyncio.get_running_loop().create_task(
            self._connect(host, port, path, self.began + seconds)
        )

    @property
    def stale(self) -> bool:
        """Whether the server may have waited too long for a request."""
        return monotonic() - self.made > PRECONNECTION_LIFE

    async def _connect(
        self, host: str, port: int, path: str | None, deadline: float
    ) -> socket.socket:
        connected = await connect(host, port, path, deadline, self.wakeup)
        self.made = monotonic()
        return connected

    async def ready(self) -> socket.socket:
        """The socket, on which the server may have written already, or which it may have closed.
        Raises as `connect`."""
        try:
            return await self._connecting
        except asyncio.CancelledError:
            self.close()
            raise

    def close(self) -> None:
        """End the connection, which is not needed."""
        self.wakeup.stop()
        self._connecting.add_done_callback(_close_socket)


def _close_socket(connecting: asyncio.Task[socket.socket]) -> None:
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result().close()


async def _resolve(host: str, port: int, deadline: float, wakeup: Wakeup) -> list[Address]:
    if literal := _literal(host, port):
        return [literal]
    lookup = look_up(host, port)
    lookup.add_done_callback(wakeup.notify)
    while not lookup.done():
        await wakeup.wait(deadline)
    result = lookup.result()
    if isinstance(result, Exception):
        raise result
    return result


def look_up(host: str, port: int) -> Lookup:
    """The addresses of a name in the resolver's order, or the OSError or UnicodeError instead.

    Several connections may wait for the same future: do not cancel it."""
    loop = asyncio.get_running_loop()
    began, lookup = lookups.get((loop, host, port), (0.0, None))
    old = monotonic() - began >= CACHE_TTL
    if not lookup or (lookup.done() and (old or isinstance(lookup.result(), Exception))):
        lookup = loop.create_future()
        lookups[loop, host, port] = monotonic(), lookup
        threading.Thread(
            target=_look_up, args=(lookup, host, port), name=f"resolver {host}", daemon=True
        ).start()
    return lookup


def _look_up(lookup: Lookup, host: str, port: int) -> None:
    result: list[Address] | Exception
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        result = list(dict.fromkeys((int(info[0]), info[4]) for info in infos))
    except (OSError, UnicodeError) as error:
        result = error
    if not lookup.get_loop().is_closed():
        lookup.get_loop().call_soon_threadsafe(lookup.set_result, result)


async def _connect(family: int, address: Any, deadline: float, wakeup: Wakeup) -> socket.socket:
    """A connection to one address. Raises OSError, Stopped."""
    sock = socket.socket(family, _NON_BLOCKING)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        while (code := sock.connect_ex(address)) not in (0, errno.EISCONN):
            if code == errno.EALREADY:
                await wakeup.wait(deadline, sock)
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


def _name(host: str, port: int, address: str | None = None) -> str:
    """The usual notation of an address; for an address of a name Postfix's `name[address]:port`."""
    if address is not None and not _literal(host, port):
        return f"{host}[{address}]:{port}"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def describe(error: BaseException) -> str:
    """The symbolic name of an error and its text: `ECONNREFUSED (Connection refused)`."""
    if isinstance(error, TimeoutError):
        error = OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
    name = errno.errorcode.get(getattr(error, "errno", None) or 0, type(error).__name__)
    return f"{name} ({getattr(error, 'strerror', None) or error})"
