"""Sends one request to one server and tells exactly what happened.

    result = await send(host="192.0.2.1", request=Request(size, sender, recipients), fd=body)

How it works. One `ClientConnection` is one connection: connect, write, hear, and a `Result`. It
owns the socket, rather than a transport, because three things must be known that a transport hides:
how many bytes the kernel has taken (the commit point), that it is just now that the last ones go,
and what still lies in the receive buffer when a write fails. The header goes with the first block
of the body in one write, the end of the body with the whole envelope in another (a request that
fits into a block goes in a single one). After each block the loop has a turn, so that one large
message does not hold up the others.

What must stay true (the rules and their sources: see the package).

- *The commit point is the last byte.* `committed` turns true when the kernel has taken it and not
  before; `may_commit` is asked immediately before every write that holds it.
- *The server is heard at any time*, and what it said whole wins over whatever the connection did
  afterwards. An early Z or D is honoured; an early K cannot be meant, as the server did not have
  the envelope.
- *Nothing is guessed.* After the commit point silence, a reset or half a reply is `uncertain`; only
  a K that followed a valid length counts although its words were cut off, since sending again what
  was accepted makes a double.
- *Every phase ends*, and so does the session as a whole; but what has arrived wins over a timer
  that has run out.
"""

import asyncio
import select
import socket
import struct
import termios
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from fcntl import ioctl
from time import monotonic
from typing import Any

from qmqp import LONGEST_SESSION, PORT
from qmqp.body import BodyChanged, BodyFault, BodyReader
from qmqp.connection import Unreachable, connect
from qmqp.reply import KEPT_TEXT, MalformedReply, Reply, ReplyParser
from qmqp.request import Request
from qmqp.result import Result, SendOutcome, words_of
from qmqp.wakeup import Stopped, Wakeup

__all__ = [
    "BLOCK_SIZE",
    "BodyChanged",
    "BodyFault",
    "SendOutcome",
    "Result",
    "Timeouts",
    "ClientConnection",
    "send",
]

BLOCK_SIZE = 65536
_READ_SIZE = 4096
# A server that closes a connection within so many seconds, when its kernel has acknowledged no more
# than so many octets (the receive window that Linux and the BSDs give to a process that does not
# read), may have read nothing.
_AT_ONCE = 1.0
_UNREAD = 65536
_NO_FLAGS: frozenset[str] = frozenset()
_BY_STATUS = {b"K": SendOutcome.DELIVERED, b"Z": SendOutcome.DEFERRED, b"D": SendOutcome.REJECTED}


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds: to connect, with all addresses of a name; without any progress in writing; from the
    commit point to the end of the reply; for everything together."""

    connect: float = 10.0
    io: float = 60.0
    reply: float = 600.0
    session: float = LONGEST_SESSION


DEFAULT_TIMEOUTS = Timeouts()


class ReplyLost(Exception):
    """There will be no whole reply, and why."""


@dataclass(
    eq=False, kw_only=True
)  # without slots most of the state need not be set but stays the class's
class ClientConnection:
    """One request on its way: `request`, its body from the start of the file `fd`, to `host` and
    `port` or to the Unix socket `path`, in blocks of `block_size` bytes. For a caller that wants to
    look at it or stop it; else see `send`.

    `may_commit` is asked immediately before a write that holds the last byte; False ends the
    transfer. `hold_back`: the last byte does not leave before so many seconds have passed since the
    connection was made, so that a server which closes connections without reading them is heard
    before the commit point.
    """

    request: Request
    fd: int
    host: str | None = None
    port: int = PORT
    path: str | None = None
    block_size: int = BLOCK_SIZE
    timeouts: Timeouts = DEFAULT_TIMEOUTS
    may_commit: Callable[[], bool] | None = None
    hold_back: float = 0.0
    committed: bool = field(default=False, init=False)
    bytes_sent: int = field(default=0, init=False)

    _sock: socket.socket = field(init=False)
    _began: float = field(default=0.0, init=False)
    _waiting: Wakeup = field(default_factory=Wakeup, init=False)
    _readable: bool = field(default=False, init=False)
    _connected: float = field(default=0.0, init=False)
    _closed_at_once: bool = field(default=False, init=False)
    _looked: float = field(
        default=0.0, init=False
    )  # the last deadline that passed and was looked beyond
    _broken: str = field(default="", init=False)  # why a write failed
    _parser: ReplyParser = field(default_factory=ReplyParser, init=False)
    _reply: Reply | None = field(default=None, init=False)

    async def run(self) -> Result:
        """Connect, send, and return what happened, whatever the network or the server does. Once.

        Raises BodyFault for what the body does, and OSError when this process has no socket to
        spare (EMFILE and the like). Cancelling before the commit point closes the connection."""
        self._began = monotonic()
        try:
            return self._replied(await self._converse())
        except Unreachable as error:
            return self._result(SendOutcome.UNREACHABLE, str(error).encode())
        except MalformedReply as error:
            return self._result(
                SendOutcome.MALFORMED, b"%b: %b" % (str(error).encode(), error.received)
            )
        except Stopped as error:
            return self._result(SendOutcome.INTERRUPTED, str(error).encode(), ours=True)
        except ReplyLost as error:
            return self._lost(str(error))

    def abort(self) -> None:
        """Close the connection if the commit point has not been reached: interrupted, and ours.
        Else do nothing."""
        if not self.committed:
            self._waiting.stop()

    async def _converse(self) -> Reply:
        deadline = self._began + min(self.timeouts.connect, self.timeouts.session)
        self._sock = sock = await connect(
            self.host or "", self.port, self.path, deadline, self._waiting
        )
        self._connected = monotonic()
        loop = asyncio.get_running_loop()
        try:
            if self.path is None and self.request.size > self.block_size:  # one write needs it not
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            loop.add_reader(sock.fileno(), self._on_readable)
            await self._write()
            return await self._read_reply()
        finally:
            loop.remove_reader(sock.fileno())
            sock.close()

    async def _write(self) -> None:
        """Write until the last byte has left, the connection breaks, or the server begins to
        speak."""
        body = BodyReader(self.fd, self.request.size, self.block_size)
        parts: list[bytes | memoryview] = [self.request.head]
        while not self.committed:
            view = body.cached()
            if view is None and (view := await self._read(body)) is None:
                return
            parts.append(view)
            if body.whole:
                parts.append(self.request.tail)
                if self.hold_back and not await self._hold_back(parts):
                    return
                if (
                    self.bytes_sent and self._listen()
                ):  # the last chance to hear that the server has had enough
                    return
            if not await self._push(parts, last=body.whole):
                return
        body.release()

    async def _hold_back(self, parts: list[bytes | memoryview]) -> bool:
        """Write all but the last byte, and wait until it may follow; False if the connection breaks
        or the server begins to speak."""
        tail = self.request.tail
        parts[-1] = tail[:-1]
        if not await self._push(parts, last=False):
            return False
        parts.append(tail[-1:])
        end = self._connected + self.hold_back
        while monotonic() < end:
            with suppress(TimeoutError):
                await self._waiting.until(end)
            if self._readable and self._listen():
                return False
        return True

    async def _read(self, body: BodyReader) -> memoryview | None:
        """The next block, by a thread; None if the server begins to speak meanwhile."""
        reading = asyncio.get_running_loop().run_in_executor(None, body.read)
        reading.add_done_callback(self._waiting.wake)
        deadline = monotonic() + self.timeouts.io
        try:
            while not reading.done():
                await self._until(deadline)
                if self._readable and self._listen():
                    return None
        finally:
            reading.cancel()
        return reading.result()

    async def _push(self, parts: list[bytes | memoryview], *, last: bool) -> bool:
        """Write the parts, which end with the request if this is the `last` time; False if the
        connection breaks or the server begins to speak."""
        deadline = monotonic() + self.timeouts.io
        while True:
            if last and self.may_commit is not None and not self.may_commit():
                raise Stopped("not allowed to pass the commit point")
            if self._waiting.stopped:
                raise Stopped("stopped before the commit point")
            try:
                sent = self._sock.sendmsg(parts)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._broken = words_of(error)
                return False
            self.bytes_sent += sent
            if self.bytes_sent == self.request.length:
                self.committed = True
                return True
            if sent:
                deadline = monotonic() + self.timeouts.io
                _advance(parts, sent)
            if parts:
                await self._writable(deadline)
            else:
                await asyncio.sleep(0)
            if self._readable and self._listen():
                return False
            if not parts:
                return True

    async def _writable(self, deadline: float) -> None:
        """Wait until the kernel has room, or other news."""
        loop = asyncio.get_running_loop()
        loop.add_writer(self._sock.fileno(), self._waiting.wake)
        try:
            await self._until(deadline)
        finally:
            loop.remove_writer(self._sock.fileno())

    async def _read_reply(self) -> Reply:
        """Wait for the whole reply."""
        patience = self.timeouts.reply if self.committed else self.timeouts.io
        deadline = monotonic() + patience
        while self._reply is None:
            if not self._broken:  # then all that will ever come is there
                try:
                    await self._until(deadline)
                except asyncio.CancelledError:
                    if not (self._listen() and self._has_reply()):
                        raise
                    continue  # a reply that has arrived wins over our own end
            self._listen()
        return self._reply

    def _has_reply(self) -> bool:
        return self._reply is not None

    def _on_readable(self) -> None:
        self._readable = True
        self._waiting.wake()

    def _listen(self) -> bool:
        """Take what the server has said, without waiting; whether that was anything. Raises _Lost,
        MalformedReply."""
        self._readable = False
        try:
            data = self._sock.recv(_READ_SIZE)
        except OSError as error:
            if isinstance(error, BlockingIOError) and not self._broken:
                return False
            raise self._closed(self._broken or words_of(error)) from None
        if not data:
            raise self._closed(self._broken or "connection closed by the server")
        self._reply = self._parser.feed(data)
        return True

    def _closed(self, why: str) -> ReplyLost:
        """The server has closed the connection; notes whether it may have done so without
        reading."""
        if not self._parser.received and monotonic() - self._connected < _AT_ONCE:
            (unacknowledged,) = struct.unpack("i", ioctl(self._sock, termios.TIOCOUTQ, bytes(4)))
            self._closed_at_once = self.bytes_sent - unacknowledged <= _UNREAD
        return ReplyLost(why)

    async def _until(self, deadline: float) -> None:
        """Wait for news from the server, the kernel or a thread, but not past `deadline` or the end
        of the session."""
        session_end = self._began + self.timeouts.session
        try:
            await self._waiting.until(min(deadline, session_end))
        except TimeoutError:
            if self._look_again(min(deadline, session_end)):
                return
            if session_end <= deadline:
                raise ReplyLost(f"session not over in {self.timeouts.session:g} s") from None
            if self.committed:
                raise ReplyLost(f"no whole reply in {self.timeouts.reply:g} s") from None
            raise ReplyLost(f"no progress in {self.timeouts.io:g} s") from None

    def _look_again(self, deadline: float) -> bool:
        """Whether the kernel has news, once for each deadline that has passed.

        An event loop may run timers before it looks at its sockets (libuv does), so a deadline can
        come before the data that arrived in time. A reply that is there must not become
        `uncertain`, which sends the message twice. Once, because a server that never stops sending
        must not put its deadline off for ever.
        """
        if deadline <= self._looked:
            return False
        self._looked = deadline
        poll = select.poll()
        poll.register(
            self._sock, select.POLLIN if self.committed else select.POLLIN | select.POLLOUT
        )
        events = sum(event for _, event in poll.poll(0))
        self._readable = bool(events & ~select.POLLOUT)
        return events != 0

    def _replied(self, reply: Reply) -> Result:
        flags = _NO_FLAGS
        if reply.truncated:
            flags |= {"truncated-reply"}
        if self._parser.extra:
            flags |= {"extra-bytes"}
        outcome, text = _BY_STATUS[reply.status], reply.text
        if not self.committed:
            flags |= {"early-reply"}
            if reply.status == b"K":
                outcome, text = (
                    SendOutcome.MALFORMED,
                    b"accepted before the request was sent: " + text,
                )
        return self._result(outcome, text, flags)

    def _lost(self, why: str) -> Result:
        reply = self._parser.eof()
        flags = frozenset({"closed-at-once"}) if self._closed_at_once else _NO_FLAGS
        if not self.committed:
            return self._result(
                SendOutcome.INTERRUPTED, f"{why} before the commit point".encode(), flags
            )
        if reply is not None and reply.status == b"K":
            return self._replied(reply)
        began = b"; the reply began: " + self._parser.received if self._parser.received else b""
        return self._result(
            SendOutcome.UNCERTAIN, f"{why} after the commit point".encode() + began, flags
        )

    def _result(
        self,
        outcome: SendOutcome,
        text: bytes,
        flags: frozenset[str] = _NO_FLAGS,
        *,
        ours: bool = False,
    ) -> Result:
        seconds = monotonic() - self._began
        return Result(
            outcome, text[:KEPT_TEXT], self.committed, ours, self.bytes_sent, seconds, flags
        )


def _coroutine_of[**P](
    transfer: Callable[P, ClientConnection],
) -> Callable[P, Coroutine[Any, Any, Result]]:
    def send(*args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, Result]:
        return transfer(*args, **kwargs).run()

    return send


send = _coroutine_of(ClientConnection)
"""`await send(...)` is `await Transfer(...).run()`, with the same arguments, results and errors."""


def _advance(parts: list[bytes | memoryview], count: int) -> None:
    """Take the first `count` bytes off `parts`."""
    while parts and count >= len(parts[0]):
        count -= len(parts.pop(0))
    if count:
        parts[0] = memoryview(parts[0])[count:]
