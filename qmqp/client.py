"""Sends one request to one server and reports exactly how it ended.

    connection = ClientConnection(host="192.0.2.1", body=body, request=Request(size, sender,
    recipients)) result = await connection.run()

A `ClientConnection` connects, writes, reads the reply, and returns a `Result`. It uses a socket
rather than a transport, because a transport hides three facts: how many bytes the kernel has taken
(the commit point), that the next write is the last one, and what lies in the receive buffer when a
write fails. The header is written with the first block of the body, and the end of the body with
the envelope; a request whose body is in memory, or fits into a block, is one write. After each
block the event loop has a turn, so that a large message does not delay the others.

What must stay true (the rules and their sources: see the package).

- *The commit point is the last byte.* `committed` becomes true when the kernel has taken it, and
  not before. `may_commit` is called immediately before every write that holds it.
- *The server may reply at any time*, and a complete reply wins over whatever the connection does
  afterwards. An early Z or D holds. An early K does not: the server does not have the envelope.
- *Nothing is guessed.* After the commit point silence, a reset or half a reply is `uncertain`. One
  exception: a K after a valid length counts although its text was cut off, because to send an
  accepted message again makes a duplicate.
- *Every phase has a deadline*, and so has the session; but data that has arrived wins over a
  deadline that has passed.
"""

import asyncio
import socket
import struct
import termios
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from fcntl import ioctl
from time import monotonic
from typing import NamedTuple

from qmqp import LONGEST_SESSION, PORT
from qmqp.body import (
    Body,
    BodyChanged,
    BodyDamaged,
    BodyFault,
    BodyFile,
    BodyReader,
    BodyStream,
    BodyStreamReader,
)
from qmqp.connection import Preconnection, Stopped, Unreachable, Wakeup, connect, describe
from qmqp.reply import KEPT_TEXT, MalformedReply, Reply, ReplyParser
from qmqp.request import Request

__all__ = [
    "BLOCK_SIZE",
    "Body",
    "BodyChanged",
    "BodyDamaged",
    "BodyFault",
    "BodyFile",
    "BodyStream",
    "ClientConnection",
    "Result",
    "SendOutcome",
    "Timeouts",
]

BLOCK_SIZE = 65536
_READ_SIZE = 4096
# A server that closes a connection so soon (seconds), when its kernel has acknowledged no more than
# so many octets, may have read nothing. Linux and the BSDs give such a receive window to a process
# that does not read.
_AT_ONCE = 1.0
_UNREAD = 65536


class SendOutcome(StrEnum):
    """How a request ended. What the client may do next depends on the server's reply, and on which
    side of the commit point (see the package) the connection ended.

    outcome       what happened                   what may follow
    DELIVERED     K                               nothing: the server answers for every recipient
    DEFERRED      Z                               the same request, later
    REJECTED      D                               nothing: no recipient will get it
    UNREACHABLE   no connection                   another server, at once
    INTERRUPTED   the end before the commit       another server, at once: no server may keep it
                  point, without a reply
    UNCERTAIN     the end after the commit        the same request, later; it may be a duplicate
                  point, without a reply
    MALFORMED     bytes that are not a reply,     before the commit point as INTERRUPTED,
                  or a K too early                after it as UNCERTAIN

    Source: qmqp.html, "Any response not received by the client indicates a temporary failure", and
    that the server must throw away a request that it did not receive wholly."""

    DELIVERED = "delivered"
    DEFERRED = "deferred"
    REJECTED = "rejected"
    UNREACHABLE = "unreachable"
    INTERRUPTED = "interrupted"
    UNCERTAIN = "uncertain"
    MALFORMED = "malformed"


_OUTCOMES = {
    b"K": SendOutcome.DELIVERED,
    b"Z": SendOutcome.DEFERRED,
    b"D": SendOutcome.REJECTED,
}


class Result(NamedTuple):
    """How a request ended, and why.

    `text` is the server's text without the status byte (bounded, any bytes) if the reply was valid,
    else our own. `committed`: the last byte of the request has left. `ours`: `may_commit` or
    `abort` ended the transfer, not the server. `flags`: "early-reply" (before the commit point),
    "truncated-reply" (a K whose text was cut off), "extra-bytes" (after the reply),
    "closed-at-once" (the server closed the connection within a second, without a reply, and may
    have read nothing)."""

    outcome: SendOutcome
    text: bytes
    committed: bool
    ours: bool
    bytes_sent: int
    seconds: float
    flags: frozenset[str]


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds: `connect` for all addresses of a name together; `io` without any progress in
    writing; `reply` from the commit point to the end of the reply; `session` for everything."""

    connect: float = 10.0
    io: float = 60.0
    reply: float = 600.0
    session: float = LONGEST_SESSION


class WriteEnded(Exception):
    """The connection is broken, or the server has replied: nothing more is to be written."""


class ReplyLost(Exception):
    """No complete reply will come. The arguments: why, and whether the server has closed the
    connection and may have read nothing."""


# No slots: a default that is not changed stays in the class and need not be set.
@dataclass(eq=False, kw_only=True)
class ClientConnection:
    """One connection that sends `request` with `body` to `host` and `port` or to the Unix socket
    `path`; a file or a stream in blocks of `block_size` bytes. The body has the size that the
    request says.

    `may_commit` is called immediately before a write that holds the last byte; False ends the
    transfer. `hold_back`: the last byte leaves no sooner than so many seconds after the connection
    was made, so that a server which closes connections unread does so before the commit point.
    `preconnection`: the connection to use; this object closes it from now on.
    """

    request: Request
    body: Body | BodyStream
    host: str | None = None
    port: int = PORT
    path: str | None = None
    block_size: int = BLOCK_SIZE
    timeouts: Timeouts = field(default_factory=Timeouts)
    may_commit: Callable[[], bool] | None = None
    hold_back: float = 0.0
    preconnection: Preconnection | None = None
    committed: bool = field(default=False, init=False)
    bytes_sent: int = field(default=0, init=False)

    _sock: socket.socket = field(init=False)
    _began: float = field(default=0.0, init=False)
    _session_end: float = field(default=0.0, init=False)
    _connected: float = field(default=0.0, init=False)
    _wakeup: Wakeup = field(default_factory=Wakeup, init=False)
    _readable: bool = field(default=False, init=False)
    _write_error: str = field(default="", init=False)
    _parser: ReplyParser = field(default_factory=ReplyParser, init=False)
    _reply: Reply | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.preconnection is not None:
            self._wakeup = self.preconnection.wakeup

    async def run(self) -> Result:
        """Connect, send, and return the result, whatever the network or the server does. May be
        called once.

        Raises BodyFault, and OSError when this process cannot open another socket (EMFILE and the
        like). Cancelling before the commit point closes the connection."""
        self._began = self.preconnection.began if self.preconnection else monotonic()
        self._session_end = self._began + self.timeouts.session
        try:
            return self._replied(await self._exchange())
        except Unreachable as error:
            return self._result(SendOutcome.UNREACHABLE, str(error).encode())
        except MalformedReply as error:
            return self._result(
                SendOutcome.MALFORMED, b"%b: %b" % (str(error).encode(), error.received)
            )
        except Stopped as error:
            return self._result(SendOutcome.INTERRUPTED, str(error).encode(), ours=True)
        except ReplyLost as error:
            return self._lost(*error.args)

    def abort(self) -> None:
        """Close the connection before the commit point (the result is interrupted, and ours); after
        it do nothing."""
        if not self.committed:
            self._wakeup.stop()

    async def _exchange(self) -> Reply:
        self._sock = sock = await self._connect()
        loop = asyncio.get_running_loop()
        try:
            if self.path is None and self.request.size > self.block_size:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            loop.add_reader(sock.fileno(), self._on_readable)
            with suppress(WriteEnded):
                await self._write()
            return await self._read_reply()
        finally:
            loop.remove_reader(sock.fileno())
            sock.close()

    async def _connect(self) -> socket.socket:
        if self.preconnection is not None:
            sock = await self.preconnection.ready()
            self._connected = self.preconnection.made
            self._readable = True  # the server may have closed it meanwhile
            return sock
        deadline = min(self._began + self.timeouts.connect, self._session_end)
        sock = await connect(self.host or "", self.port, self.path, deadline, self._wakeup)
        self._connected = monotonic()
        return sock

    async def _write(self) -> None:
        """Write until the last byte has left. Raises WriteEnded, ReplyLost, Stopped."""
        parts: list[bytes | memoryview] = [self.request.head]
        if isinstance(self.body, BodyFile):
            await self._write_blocks(BodyReader(self.body, self.block_size), parts)
        elif isinstance(self.body, BodyStream):
            await self._write_blocks(BodyStreamReader(self.body, self.block_size), parts)
        else:
            parts.append(self.body)
        parts.append(self.request.tail)
        if self.hold_back:
            await self._hold_back(parts)
        if self.bytes_sent:  # the last chance to see an early reply
            self._readable = True
        await self._push(parts, last=True)

    async def _write_blocks(
        self, body: BodyReader | BodyStreamReader, parts: list[bytes | memoryview]
    ) -> None:
        """Write the parts and the body, but for its last block, which is then what `parts` has."""
        while True:
            view = body.cached()
            parts.append(await self._read_block(body) if view is None else view)
            if body.whole:
                return
            await self._push(parts, last=False)

    async def _hold_back(self, parts: list[bytes | memoryview]) -> None:
        """Write all but the last byte, and wait until it may follow."""
        tail = self.request.tail
        parts[-1] = tail[:-1]
        await self._push(parts, last=False)
        parts.append(tail[-1:])
        end = self._connected + self.hold_back
        while not await self._wait(end):
            self._look_for_reply()

    async def _read_block(self, body: BodyReader | BodyStreamReader) -> memoryview:
        """The next block, read by a thread."""
        reading = asyncio.get_running_loop().run_in_executor(None, body.read)
        reading.add_done_callback(self._wakeup.notify)
        deadline = monotonic() + self.timeouts.io
        try:
            while not reading.done():
                too_late = await self._wait(deadline)
                self._look_for_reply()
                if too_late and not reading.done():
                    raise ReplyLost(too_late)
        finally:
            reading.cancel()
        return reading.result()

    async def _push(self, parts: list[bytes | memoryview], *, last: bool) -> None:
        """Write the parts; `last`: the request ends with them."""
        deadline = monotonic() + self.timeouts.io
        too_late = ""
        while parts:
            self._look_for_reply()
            if last and self.may_commit is not None and not self.may_commit():
                raise Stopped("not allowed to pass the commit point")
            self._wakeup.check()
            try:
                sent = self._sock.sendmsg(parts)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._write_error = describe(error)
                raise WriteEnded from None
            self.bytes_sent += sent
            if self.bytes_sent == self.request.length:
                self.committed = True
                return
            if too_late and (not sent or self._session_end <= monotonic()):
                raise ReplyLost(too_late)
            if sent:
                deadline = monotonic() + self.timeouts.io
                _advance(parts, sent)
            if parts:
                too_late = await self._wait(deadline, self._sock)
            else:
                await asyncio.sleep(0)

    async def _read_reply(self) -> Reply:
        deadline = monotonic() + (self.timeouts.reply if self.committed else self.timeouts.io)
        too_late = ""
        while not (reply := self._reply):
            if too_late:
                raise ReplyLost(too_late)
            try:
                if not self._write_error:  # after one, all that will ever come has come
                    too_late = await self._wait(deadline)
                self._receive()
            except asyncio.CancelledError:
                # A reply that has arrived wins over the end of this process.
                if not (self._receive() and self._reply):
                    raise
        return reply

    def _on_readable(self) -> None:
        self._readable = True
        self._wakeup.notify()

    def _look_for_reply(self) -> None:
        """Raises WriteEnded if bytes of the server have come."""
        if self._readable and self._receive():
            raise WriteEnded

    def _receive(self) -> bool:
        """Read what has come, without waiting; False if that is nothing. Raises ReplyLost,
        MalformedReply."""
        self._readable = False
        try:
            data = self._sock.recv(_READ_SIZE)
        except OSError as error:
            if isinstance(error, BlockingIOError) and not self._write_error:
                return False
            raise self._closed(self._write_error or describe(error)) from None
        if not data:
            raise self._closed(self._write_error or "connection closed by the server")
        self._reply = self._parser.feed(data)
        return True

    def _closed(self, why: str) -> ReplyLost:
        (unacknowledged,) = struct.unpack("i", ioctl(self._sock, termios.TIOCOUTQ, bytes(4)))
        at_once = (
            not self._parser.received
            and monotonic() - self._connected < _AT_ONCE
            and self.bytes_sent - unacknowledged <= _UNREAD
        )
        return ReplyLost(why, at_once)

    async def _wait(self, deadline: float, writable: socket.socket | None = None) -> str:
        """Wait for the server, a thread, or room in the kernel for bytes of `writable`. Raises
        Stopped.

        Returns why it is too late to wait again, once `deadline` or the end of the session has
        passed; else an empty text. An event loop may run timers before it polls its sockets (libuv
        does), so a deadline can come before the data that arrived in time. A reply that has arrived
        must not become `uncertain`, which sends the message twice. The caller therefore tries the
        socket once more before it gives up.
        """
        try:
            await self._wakeup.wait(min(deadline, self._session_end), writable)
        except TimeoutError:
            self._readable = True
            if self._session_end <= deadline:
                return f"session not over in {self.timeouts.session:g} s"
            if self.committed:
                return f"no whole reply in {self.timeouts.reply:g} s"
            return f"no progress in {self.timeouts.io:g} s"
        return ""

    def _replied(self, reply: Reply) -> Result:
        outcome, text = _OUTCOMES[reply.status], reply.text
        if not self.committed and reply.status == b"K":
            outcome, text = SendOutcome.MALFORMED, b"accepted before the request was sent: " + text
        flags = {
            "truncated-reply": reply.truncated,
            "extra-bytes": self._parser.extra > 0,
            "early-reply": not self.committed,
        }
        return self._result(outcome, text, flags)

    def _lost(self, why: str, closed_at_once: bool = False) -> Result:
        text = f"{why} {'after' if self.committed else 'before'} the commit point".encode()
        flags = {"closed-at-once": closed_at_once}
        if not self.committed:
            return self._result(SendOutcome.INTERRUPTED, text, flags)
        reply = self._parser.eof()
        if reply is not None and reply.status == b"K":
            return self._replied(reply)
        if self._parser.received:
            text += b"; the reply began: " + self._parser.received
        return self._result(SendOutcome.UNCERTAIN, text, flags)

    def _result(
        self,
        outcome: SendOutcome,
        text: bytes,
        flags: dict[str, bool] | None = None,
        *,
        ours: bool = False,
    ) -> Result:
        return Result(
            outcome,
            text[:KEPT_TEXT],
            self.committed,
            ours,
            self.bytes_sent,
            monotonic() - self._began,
            frozenset(flag for flag, given in (flags or {}).items() if given),
        )


def _advance(parts: list[bytes | memoryview], count: int) -> None:
    """Remove the first `count` bytes from `parts`."""
    while parts and count >= len(parts[0]):
        count -= len(parts.pop(0))
    if count:
        parts[0] = memoryview(parts[0])[count:]
