"""Sends one request to one server and reports exactly how it ended.

    connection = ClientConnection(host="192.0.2.1", fd=body, request=Request(size, sender,
    recipients)) result = await connection.run()

A `ClientConnection` connects, writes, reads the reply, and returns a `Result`. It uses a socket
rather than a transport, because a transport hides three facts: how many bytes the kernel has taken
(the commit point), that the next write is the last one, and what lies in the receive buffer when a
write fails. The header is written with the first block of the body, and the end of the body with
the envelope; a request that fits into a block is one write. After each block the event loop has a
turn, so that a large message does not delay the others.

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
import select
import socket
import struct
import termios
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from fcntl import ioctl
from time import monotonic

from qmqp import LONGEST_SESSION, PORT
from qmqp.body import BodyChanged, BodyFault, BodyReader
from qmqp.connection import Unreachable, connect
from qmqp.reply import KEPT_TEXT, MalformedReply, Reply, ReplyParser
from qmqp.request import Request
from qmqp.result import Result, SendOutcome, describe
from qmqp.wakeup import Stopped, Wakeup

__all__ = [
    "BLOCK_SIZE",
    "BodyChanged",
    "BodyFault",
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
_NO_FLAGS: frozenset[str] = frozenset()
_OUTCOMES = {
    b"K": SendOutcome.DELIVERED,
    b"Z": SendOutcome.DEFERRED,
    b"D": SendOutcome.REJECTED,
}


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds: `connect` for all addresses of a name together; `io` without any progress in
    writing; `reply` from the commit point to the end of the reply; `session` for everything."""

    connect: float = 10.0
    io: float = 60.0
    reply: float = 600.0
    session: float = LONGEST_SESSION


DEFAULT_TIMEOUTS = Timeouts()


class ReplyLost(Exception):
    """No complete reply will come; the text says why."""


# No slots: a default that is not changed stays in the class and need not be set.
@dataclass(eq=False, kw_only=True)
class ClientConnection:
    """One connection that sends `request`, and its body from the start of the file `fd`, to `host`
    and `port` or to the Unix socket `path`, in blocks of `block_size` bytes.

    `may_commit` is called immediately before a write that holds the last byte; False ends the
    transfer. `hold_back`: the last byte leaves no sooner than so many seconds after the connection
    was made, so that a server which closes connections unread does so before the commit point.
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
    _connected: float = field(default=0.0, init=False)
    _wakeup: Wakeup = field(default_factory=Wakeup, init=False)
    _readable: bool = field(default=False, init=False)
    _closed_at_once: bool = field(default=False, init=False)
    # The last deadline that passed and was extended by `_check_again`.
    _extended: float = field(default=0.0, init=False)
    _write_error: str = field(default="", init=False)
    _parser: ReplyParser = field(default_factory=ReplyParser, init=False)
    _reply: Reply | None = field(default=None, init=False)

    async def run(self) -> Result:
        """Connect, send, and return the result, whatever the network or the server does. May be
        called once.

        Raises BodyFault, and OSError when this process cannot open another socket (EMFILE and the
        like). Cancelling before the commit point closes the connection."""
        self._began = monotonic()
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
            return self._lost(str(error))

    def abort(self) -> None:
        """Close the connection before the commit point (the result is interrupted, and ours); after
        it do nothing."""
        if not self.committed:
            self._wakeup.stop()

    async def _exchange(self) -> Reply:
        deadline = self._began + min(self.timeouts.connect, self.timeouts.session)
        self._sock = sock = await connect(
            self.host or "", self.port, self.path, deadline, self._wakeup
        )
        self._connected = monotonic()
        loop = asyncio.get_running_loop()
        try:
            if self.path is None and self.request.size > self.block_size:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            loop.add_reader(sock.fileno(), self._on_readable)
            await self._write()
            return await self._read_reply()
        finally:
            loop.remove_reader(sock.fileno())
            sock.close()

    async def _write(self) -> None:
        """Write until the last byte has left, the connection breaks, or the server replies."""
        body = BodyReader(self.fd, self.request.size, self.block_size)
        parts: list[bytes | memoryview] = [self.request.head]
        while not self.committed:
            view = body.cached()
            if view is None and (view := await self._read_block(body)) is None:
                return
            parts.append(view)
            if body.whole:
                parts.append(self.request.tail)
                if self.hold_back and not await self._hold_back(parts):
                    return
                if self.bytes_sent and self._receive():  # the last chance to see an early reply
                    return
            if not await self._push(parts, last=body.whole):
                return
        body.release()

    async def _hold_back(self, parts: list[bytes | memoryview]) -> bool:
        """Write all but the last byte, and wait until it may follow; False if the connection breaks
        or the server replies."""
        tail = self.request.tail
        parts[-1] = tail[:-1]
        if not await self._push(parts, last=False):
            return False
        parts.append(tail[-1:])
        end = self._connected + self.hold_back
        while monotonic() < end:
            with suppress(TimeoutError):
                await self._wakeup.wait(end)
            if self._readable and self._receive():
                return False
        return True

    async def _read_block(self, body: BodyReader) -> memoryview | None:
        """The next block, read by a thread; None if the server replies meanwhile."""
        reading = asyncio.get_running_loop().run_in_executor(None, body.read)
        reading.add_done_callback(self._wakeup.notify)
        deadline = monotonic() + self.timeouts.io
        try:
            while not reading.done():
                await self._wait(deadline)
                if self._readable and self._receive():
                    return None
        finally:
            reading.cancel()
        return reading.result()

    async def _push(self, parts: list[bytes | memoryview], *, last: bool) -> bool:
        """Write the parts; `last`: the request ends with them. False if the connection breaks or
        the server replies."""
        deadline = monotonic() + self.timeouts.io
        while True:
            if last and self.may_commit is not None and not self.may_commit():
                raise Stopped("not allowed to pass the commit point")
            if self._wakeup.stopped:
                raise Stopped("stopped before the commit point")
            try:
                sent = self._sock.sendmsg(parts)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._write_error = describe(error)
                return False
            self.bytes_sent += sent
            if self.bytes_sent == self.request.length:
                self.committed = True
                return True
            if sent:
                deadline = monotonic() + self.timeouts.io
                _advance(parts, sent)
            if parts:
                await self._wait(deadline, writable=True)
            else:
                await asyncio.sleep(0)
            if self._readable and self._receive():
                return False
            if not parts:
                return True

    async def _read_reply(self) -> Reply:
        deadline = monotonic() + (self.timeouts.reply if self.committed else self.timeouts.io)
        while not (reply := self._reply):
            if not self._write_error:  # after one, all that will ever come has come
                try:
                    await self._wait(deadline)
                except asyncio.CancelledError:
                    # A reply that has arrived wins over the end of this process.
                    if not self._receive() or not self._parser.complete:
                        raise
                    continue
            self._receive()
        return reply

    def _on_readable(self) -> None:
        self._readable = True
        self._wakeup.notify()

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
        """Note whether the server, which has closed the connection, may have read nothing."""
        if not self._parser.received and monotonic() - self._connected < _AT_ONCE:
            (unacknowledged,) = struct.unpack("i", ioctl(self._sock, termios.TIOCOUTQ, bytes(4)))
            self._closed_at_once = self.bytes_sent - unacknowledged <= _UNREAD
        return ReplyLost(why)

    async def _wait(self, deadline: float, *, writable: bool = False) -> None:
        """Wait for the server, a thread, or (`writable`) room in the kernel; at most until
        `deadline` or the end of the session. Raises ReplyLost, Stopped."""
        session_end = self._began + self.timeouts.session
        try:
            if writable:
                await self._wakeup.wait_writable(self._sock, min(deadline, session_end))
            else:
                await self._wakeup.wait(min(deadline, session_end))
        except TimeoutError:
            if self._check_again(min(deadline, session_end)):
                return
            if session_end <= deadline:
                raise ReplyLost(f"session not over in {self.timeouts.session:g} s") from None
            if self.committed:
                raise ReplyLost(f"no whole reply in {self.timeouts.reply:g} s") from None
            raise ReplyLost(f"no progress in {self.timeouts.io:g} s") from None

    def _check_again(self, deadline: float) -> bool:
        """Whether the kernel has data or room, once for each deadline that has passed.

        An event loop may run timers before it polls its sockets (libuv does), so a deadline can
        come before the data that arrived in time. A reply that has arrived must not become
        `uncertain`, which sends the message twice. Only once: a server that never stops sending
        cannot extend its deadline without end.
        """
        if deadline <= self._extended:
            return False
        self._extended = deadline
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
        outcome, text = _OUTCOMES[reply.status], reply.text
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


def _advance(parts: list[bytes | memoryview], count: int) -> None:
    """Remove the first `count` bytes from `parts`."""
    while parts and count >= len(parts[0]):
        count -= len(parts.pop(0))
    if count:
        parts[0] = memoryview(parts[0])[count:]
