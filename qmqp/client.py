"""Sends one request to one server and tells exactly what happened.

    result = await send(host="192.0.2.1", request=Request(size, sender, recipients), fd=body)

How it works. One `Transfer` is one connection, driven by the callbacks of the event loop on a socket of its
own; the one thing awaited is its result. It owns the socket, rather than a transport, because three things
must be known that a transport hides: how many bytes the kernel has taken (the commit point, and when the
block may be used again), that it is just now that the last ones go, and what still lies in the receive buffer
when a write fails. The body is read block by block into one buffer, so memory stays flat whatever the size;
from the page cache on the loop, else in an executor. The header goes with the first block in one write, the
end of the body with the whole envelope in another (a request that fits into a block goes in a single one),
because there are servers that misread a header or a last comma of its own.

What must stay true.

- *The commit point is the last byte.* `committed` turns true when the kernel has taken it and not before;
  `may_commit` is asked immediately before every write that holds it. Until then closing the connection is
  always safe: the server must throw the message away, and another may be tried at once. The connection is
  closed with a reset, so that nothing that still lies in the send buffer follows.
- *The server is heard at any time*, and what it said whole wins over whatever the connection did afterwards:
  a server that refuses a message early (Postfix: too large, not authorised) closes with unread bytes, and the
  reset destroys the write but not the reply. An early Z or D is honoured; an early K cannot be meant, as the
  server did not have the envelope.
- *Nothing is guessed.* After the commit point silence, a reset or half a reply is `uncertain`; only a K that
  followed a valid length counts although its words were cut off, since sending again what was accepted makes
  a double.
- *Every phase ends*: connect (all addresses of a name together), progress of the writing, the reply, and the
  session as a whole, which the protocol limits to an hour. One timer serves all four and is set anew only
  when it fires early.
"""

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from struct import pack
from time import monotonic
from typing import Any, NamedTuple

from qmqp import PORT
from qmqp.request import KEPT_TEXT, MalformedReply, Reply, ReplyParser, Request

BLOCK_SIZE = 65536
_READ_SIZE = 4096
_STREAM = int(socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
_SPARE_BLOCKS = 64
_TIMER_SLACK = 0.002  # seconds; timers of an event loop count in milliseconds and may be that early
_RESET_ON_CLOSE = pack("ii", 1, 0)
_OUT_OF_SOCKETS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)  # Linux: read only what is in the page cache

_NO_FLAGS: frozenset[str] = frozenset()

_spare_blocks: dict[int, list[memoryview]] = {}

type Address = tuple[int, Any]  # family, and what connect() wants


class Outcome(StrEnum):
    """What became of an attempt."""

    ACCEPTED = "accepted"
    DEFERRED = "deferred"
    REJECTED = "rejected"
    UNREACHABLE = "unreachable"
    INTERRUPTED = "interrupted"
    UNCERTAIN = "uncertain"
    MALFORMED = "malformed"
    UNSENDABLE = "unsendable"  # never a result: the caller's word for a BodyFault


_BY_STATUS = {b"K": Outcome.ACCEPTED, b"Z": Outcome.DEFERRED, b"D": Outcome.REJECTED}


class BodyFault(OSError):
    """The body could not be read, as its errno says. The connection was closed before the commit point."""


class BodyChanged(BodyFault):
    """The body is shorter or longer than the request announces. The connection was closed before the commit
    point."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds: to connect, with all addresses of a name; without any progress in writing; from the commit
    point to the end of the reply; for everything together."""

    connect: float = 10.0
    io: float = 60.0
    reply: float = 600.0
    session: float = 3600.0


DEFAULT_TIMEOUTS = Timeouts()


class Result(NamedTuple):
    """What happened.

    `text` is the server's words without the status byte (bounded, any bytes) if it gave a valid reply, else
    our own. `committed`: the last byte of the request has left. `ours`: interrupted by `may_commit` or
    `abort`, not by the server. `flags`: "early-reply" (before the commit point), "truncated-reply" (a K whose
    words were cut off), "extra-bytes" (something came after the reply)."""

    outcome: Outcome
    text: bytes
    committed: bool
    connected: bool
    ours: bool
    bytes_sent: int
    connect_seconds: float
    transfer_seconds: float
    reply_seconds: float
    flags: frozenset[str]


@dataclass(eq=False, kw_only=True)  # without slots most of the state need not be set but stays the class's
class Transfer:
    """One request on its way: `request`, its body from the start of the file `fd`, to `host` and `port` or to
    the Unix socket `path`, in blocks of `block_size` bytes. For a caller that wants to look at it or stop it;
    else see `send`.

    `may_commit` is asked immediately before a write that holds the last byte; False ends the transfer.
    """

    request: Request
    fd: int
    host: str | None = None
    port: int = PORT
    path: str | None = None
    block_size: int = BLOCK_SIZE
    timeouts: Timeouts = DEFAULT_TIMEOUTS
    may_commit: Callable[[], bool] | None = None
    committed: bool = field(default=False, init=False)
    bytes_sent: int = field(default=0, init=False)

    _loop: asyncio.AbstractEventLoop = field(init=False)
    _done: asyncio.Future[Result] | None = field(default=None, init=False)
    _alarm: asyncio.TimerHandle | None = field(default=None, init=False)
    _alarm_time: float = field(default=0.0, init=False)
    _deadline: float = field(default=0.0, init=False)
    _start_time: float = field(default=0.0, init=False)
    _connect_time: float = field(default=0.0, init=False)
    _commit_time: float = field(default=0.0, init=False)
    _lookup: asyncio.Future[Any] | None = field(default=None, init=False)
    _addresses: list[Address] = field(default_factory=list, init=False)  # not tried yet
    _address: Address = field(default=(0, None), init=False)
    _tried: list[str] = field(default_factory=list, init=False)  # and how each failed
    _sock: socket.socket | None = field(default=None, init=False)
    _writing: bool = field(default=False, init=False)  # the loop tells when the socket is writable
    _block: memoryview | None = field(default=None, init=False)
    _reading: bool = field(default=False, init=False)  # a thread is filling the block
    _offset: int = field(default=0, init=False)
    _parts: list[bytes | memoryview] = field(default_factory=list, init=False)  # what is written next
    _final: bool = field(default=False, init=False)  # the parts hold the last byte of the request
    _heard_early: bool = field(default=False, init=False)  # a reply began before the commit point: write no more
    _parser: ReplyParser = field(default_factory=ReplyParser, init=False)

    async def run(self) -> Result:
        """Connect, send, and return what happened, whatever the network or the server does. Once.

        Raises BodyFault for what the body does, and OSError when this process has no socket to spare (EMFILE
        and the like). Cancelling before the commit point closes the connection."""
        self._loop = asyncio.get_running_loop()
        self._done = self._loop.create_future()
        self._start_time = monotonic()
        try:
            self._find_addresses()
            return await self._done
        except BaseException:
            self._close()
            raise

    def abort(self) -> None:
        """Close the connection now if the commit point has not been reached: interrupted, and ours. Else do
        nothing."""
        if self._done is not None and not self.committed:
            self._finish(Outcome.INTERRUPTED, b"stopped before the commit point", ours=True)

    # Connecting

    def _find_addresses(self) -> None:
        if self.path is not None:
            self._addresses = [(socket.AF_UNIX, self.path)]
        elif literal := _literal(self.host or "", self.port):
            self._addresses = list(literal)
        else:
            lookup = self._loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
            self._lookup = asyncio.ensure_future(lookup)
            self._wait_until(self._start_time + self.timeouts.connect)
            return self._lookup.add_done_callback(self._found_addresses)
        return self._connect_next()

    def _found_addresses(self, lookup: asyncio.Future[Any]) -> None:
        self._lookup = None
        if lookup.cancelled():
            return
        if error := lookup.exception():
            self._tried.append(f"{self._name()} {_describe(error)}")
        else:
            self._addresses = list(dict.fromkeys((found[0], found[4]) for found in lookup.result()))
        self._connect_next()

    def _connect_next(self) -> None:
        """Try the addresses that are left, in their order, each with an equal part of the time that is
        left."""
        while self._addresses:
            now = monotonic()
            left = self._start_time + min(self.timeouts.connect, self.timeouts.session) - now
            self._wait_until(now + left / len(self._addresses))
            self._address = family, where = self._addresses.pop(0)
            try:
                self._sock = sock = socket.socket(family, _STREAM)
            except OSError as error:
                if error.errno in _OUT_OF_SOCKETS:
                    return self._fail(error)
                self._address_failed(_describe(error))
                continue
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            if family != socket.AF_UNIX:
                if self.request.size > self.block_size:  # one write needs it not
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.connect_ex(where)  # on the loopback the handshake is over when this returns
            if self._connect(sock):
                return None
        return self._finish(Outcome.UNREACHABLE, f"no connection: {'; '.join(self._tried)}".encode())

    def _connect(self, sock: socket.socket) -> bool:
        """Ask how far the connection is and go on from there; False if it has failed."""
        try:
            code = sock.connect_ex(self._address[1])
        except OSError:  # that a path is too long for a Unix socket comes without an errno
            code = errno.ENAMETOOLONG
        if code in (0, errno.EISCONN):
            self._connected(sock)
        elif code in (errno.EINPROGRESS, errno.EALREADY):
            self._loop.add_writer(sock.fileno(), self._connect_again, sock)
            self._writing = True
        elif code == errno.EAGAIN:  # the backlog of a Unix socket is full, and nobody tells when it is not
            self._loop.call_later(0.02, self._connect_again, sock)
        else:
            self._address_failed(_describe(OSError(code, os.strerror(code))))
            return False
        return True

    def _connect_again(self, sock: socket.socket) -> None:
        if sock is self._sock and not self._connect(sock):
            self._connect_next()

    def _address_failed(self, why: str) -> None:
        self._tried.append(f"{self._name()} {why}")
        self._drop_socket()

    def _connected(self, sock: socket.socket) -> None:
        self._connect_time = monotonic()
        self._loop.add_reader(sock.fileno(), self._on_readable)
        self._parts.append(self.request.head)
        self._read_block()

    # Writing: a block a turn of the loop, so that one large message does not hold up the others

    def _read_block(self) -> None:
        """Get the next block, from the page cache at once or through a thread, and go on with it."""
        want = min(self.block_size, self.request.size - self._offset)
        if self._block is None:
            spare = _spare_blocks.get(self.block_size)
            self._block = spare.pop() if spare else memoryview(bytearray(self.block_size))
        view = self._block[:want]
        try:
            got = os.preadv(self.fd, (view,), self._offset, _NOWAIT) if _NOWAIT and want else 0
        except OSError:  # not in the cache, or not on this file system; a real error comes again
            got = 0
        if got == want:
            return self._got_block(view)
        self._reading = True
        self._stop_writing()
        self._wait_until(monotonic() + self.timeouts.io)
        reading = self._loop.run_in_executor(None, _read_fully, self.fd, view, self._offset, got)
        return reading.add_done_callback(self._read_by_thread)

    def _read_by_thread(self, reading: asyncio.Future[memoryview]) -> None:
        self._reading = False
        if self._sock is None or self._heard_early:
            return
        if error := reading.exception():
            code = error.errno if isinstance(error, OSError) else None
            self._fail(BodyFault(code or errno.EIO, f"the body cannot be read: {_describe(error)}"))
        else:
            self._got_block(reading.result())

    def _got_block(self, view: memoryview) -> None:
        size = self.request.size
        self._parts.append(view)
        self._offset += len(view)
        if self._offset == size or len(view) < self.block_size:
            found = os.lseek(self.fd, 0, os.SEEK_END)
            if self._offset != size or found != size:
                return self._fail(BodyChanged(errno.EIO, f"the body has {found} bytes where {size} were announced"))
            self._parts.append(self.request.tail)
            self._final = True
            if self.bytes_sent:
                self._on_readable()  # the last chance to hear that the server has had enough
        return self._write()

    def _write(self) -> None:
        sock = self._sock
        if sock is None or self._heard_early:
            return None
        if self._final and self.may_commit is not None:
            try:
                allowed = self.may_commit()
            except Exception as error:
                return self._fail(error)
            if not allowed:
                return self._finish(Outcome.INTERRUPTED, b"not allowed to pass the commit point", ours=True)
        try:
            sent = sock.sendmsg(self._parts)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            return self._broken(error)
        self.bytes_sent += sent
        if self.bytes_sent == self.request.length:
            return self._committed()
        if sent or not self.bytes_sent:
            self._wait_until(monotonic() + self.timeouts.io)
            _advance(self._parts, sent)
        self._writing = True
        return self._loop.add_writer(sock.fileno(), self._on_writable)

    def _on_writable(self) -> None:
        if self._parts:
            self._write()
        else:
            self._read_block()

    def _stop_writing(self) -> None:
        if self._writing and self._sock is not None:
            self._loop.remove_writer(self._sock.fileno())
        self._writing = False

    def _committed(self) -> None:
        self.committed = True
        self._commit_time = monotonic()
        self._wait_until(self._commit_time + self.timeouts.reply)
        self._stop_writing()
        self._release_block()

    # Reading

    def _on_readable(self) -> None:
        assert self._sock is not None
        try:
            data = self._sock.recv(_READ_SIZE)
        except BlockingIOError:
            return None
        except OSError as error:
            return self._lost(_describe(error))
        if not data:
            return self._lost("connection closed by the server")
        try:
            reply = self._parser.feed(data)
        except MalformedReply as error:
            return self._finish(Outcome.MALFORMED, b"%b: %b" % (str(error).encode(), error.received))
        if reply is not None:
            return self._replied(reply)
        if not self.committed and not self._heard_early:
            self._heard_early = True
            self._stop_writing()
            self._wait_until(monotonic() + self.timeouts.io)
        return None

    def _replied(self, reply: Reply) -> None:
        flags = _NO_FLAGS
        if reply.truncated:
            flags |= {"truncated-reply"}
        if self._parser.extra:
            flags |= {"extra-bytes"}
        if not self.committed:
            flags |= {"early-reply"}
            if reply.status == b"K":
                return self._finish(Outcome.MALFORMED, b"accepted before the request was sent: " + reply.text, flags)
        return self._finish(_BY_STATUS[reply.status], reply.text, flags)

    def _broken(self, error: OSError) -> None:
        """A write failed; what the server said before is still in the receive buffer."""
        while self._sock is not None:
            try:
                more = self._sock.recv(1, socket.MSG_PEEK)
            except OSError:
                more = b""
            if not more:
                return self._lost(_describe(error))
            self._on_readable()
        return None

    def _lost(self, why: str) -> None:
        """There will be no whole reply."""
        reply = self._parser.eof()
        if not self.committed:
            self._finish(Outcome.INTERRUPTED, f"{why} before the commit point".encode())
        elif reply is not None and reply.status == b"K":
            self._replied(reply)
        else:
            began = b"; the reply began: " + self._parser.received if self._parser.received else b""
            self._finish(Outcome.UNCERTAIN, f"{why} after the commit point".encode() + began)

    # Time

    def _wait_until(self, deadline: float) -> None:
        """Let this phase end at `deadline`. The timer is left alone unless it would fire later than that."""
        self._deadline = deadline = min(deadline, self._start_time + self.timeouts.session)
        if self._alarm is not None:
            if deadline >= self._alarm_time:
                return
            self._alarm.cancel()
        self._alarm_time = deadline
        self._alarm = self._loop.call_later(max(0.0, deadline - monotonic()), self._on_alarm)

    def _on_alarm(self) -> None:
        self._alarm = None
        now = monotonic()
        if self._deadline - now > _TIMER_SLACK:
            self._wait_until(self._deadline)
        elif not self._connect_time:
            self._address_failed(_describe(OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))))
            self._connect_next()
        elif now - self._start_time >= self.timeouts.session - _TIMER_SLACK:
            self._lost(f"session not over in {self.timeouts.session:g} s")
        elif self.committed:
            self._lost(f"no whole reply in {self.timeouts.reply:g} s")
        else:
            self._lost(f"no progress in {self.timeouts.io:g} s")

    # The end

    def _finish(self, outcome: Outcome, text: bytes, flags: frozenset[str] = _NO_FLAGS, ours: bool = False) -> None:
        if self._done is None or self._done.done():
            return
        now = monotonic()
        connected, committed = self._connect_time or now, self._commit_time or now
        times = connected - self._start_time, committed - connected, now - committed
        result = Result(
            outcome,
            text[:KEPT_TEXT],
            self.committed,
            self._connect_time > 0,
            ours,
            self.bytes_sent,
            *times,
            flags,
        )
        self._done.set_result(result)
        self._close()

    def _fail(self, error: Exception) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)
            self._close()

    def _close(self) -> None:
        self._drop_socket()
        self._release_block()
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if self._lookup is not None:
            self._lookup.cancel()

    def _drop_socket(self) -> None:
        if self._sock is not None:
            self._stop_writing()
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
            self._sock = None

    def _release_block(self) -> None:
        """Let another transfer have the block, unless a thread may still write into it."""
        if self._block is None:
            return
        self._parts.clear()
        spare = _spare_blocks.setdefault(self.block_size, [])
        if len(spare) < _SPARE_BLOCKS and not self._reading:
            spare.append(self._block)
        self._block = None

    def _name(self) -> str:
        """The address that is being tried, as people write it: of a name, as Postfix does,
        `name[address]:port`."""
        if self.path is not None:
            return f"unix:{self.path}"
        host = self.host or ""
        if self._sock is not None and not _literal(host, self.port):
            return f"{host}[{self._address[1][0]}]:{self.port}"
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"


def _coroutine_of[**P](transfer: Callable[P, Transfer]) -> Callable[P, Coroutine[Any, Any, Result]]:
    def send(*args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, Result]:
        return transfer(*args, **kwargs).run()

    return send


send = _coroutine_of(Transfer)
"""`await send(...)` is `await Transfer(...).run()`, with the same arguments, results and errors."""


@lru_cache(maxsize=1024)
def _literal(host: str, port: int) -> tuple[Address, ...]:
    """The address that `host` is in itself, without asking anybody; empty for a name."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return ()
    return tuple((family, address) for family, _, _, _, address in found)


def _read_fully(fd: int, view: memoryview, offset: int, done: int) -> memoryview:
    """Fill `view`, which has `done` bytes, from `offset` of the file; return what the file had. Blocks: for a
    thread."""
    while done < len(view) and (got := os.preadv(fd, (view[done:],), offset + done)):
        done += got
    return view[:done]


def _advance(parts: list[bytes | memoryview], count: int) -> None:
    """Take the first `count` bytes off `parts`."""
    while parts and count >= len(parts[0]):
        count -= len(parts.pop(0))
    if count:
        parts[0] = memoryview(parts[0])[count:]


def _describe(error: BaseException) -> str:
    """An error by its symbolic name and its words."""
    code = error.errno if isinstance(error, OSError) else None
    name = errno.errorcode.get(code or 0, type(error).__name__)
    return f"{name} ({getattr(error, 'strerror', None) or error})"
