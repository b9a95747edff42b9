"""A strict QMQP server that answers, or misbehaves, by rule: for demonstrations, benchmarks, and for testing
clients.

It reads every request exactly as the protocol has it (each length exact, nothing between inner and outer
netstring, no leading zeros), streams the message past a digest and into a file if asked, and keeps no body in
memory. What it answers is an `Answer`; which answer a connection gets is decided by rules, read from the
first to the last:

    with running_sink(Rule(Answer(b"Z", b"busy"), times=2)) as sink:   # Z twice, K from then on
        ...
        sink.wait_for(1, timeout=5)

A rule without `recipient` holds for a connection from its first byte, so its answer may also come early
(`at`) or say how to read (`read_size`, `read_pause`); one with `recipient`, and `MagicRecipients`, look at
the envelope when it is whole. A preset says what happens to a request that is no good: `strict` says D and
why, `qmail` closes without a word, as qmail-qmqpd does, `postfix` says D after a second and closes while the
client is still writing, so that a reset follows.
"""

import asyncio
import json
import os
import re
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from struct import pack
from threading import Condition, Thread
from typing import Any, Literal, Protocol, cast

from qmqp.netstring import MAX_LENGTH, NetstringError, SizeError, encode
from qmqp.request import RequestParser

_BUFFER_SIZE = 262144


@dataclass(frozen=True, slots=True)
class Answer:
    """How a connection is answered: `status` and `text` (a K without text gets `Ok: queued as N`) as a
    netstring, or the bytes `raw` as they are (b"": nothing is said); `delay` seconds late, with `drip`
    seconds between single bytes.

    `at`: as soon as so many bytes of the request have been read, and no more are; None: when the request is
    whole. `read_size`, `read_pause`: read at most so many bytes at a time, and wait so many seconds in
    between. `end`: what then becomes of the connection."""

    status: bytes = b"K"
    text: bytes = b""
    raw: bytes | None = None
    delay: float = 0.0
    drip: float = 0.0
    at: int | None = None
    read_size: int = _BUFFER_SIZE
    read_pause: float = 0.0
    end: Literal["close", "reset", "stay"] = "close"


@dataclass(frozen=True, slots=True)
class Preset:
    """What is done about a request that is no good. `silent`: close without a word. Sizes in bytes,
    `error_delay` in seconds before a D."""

    silent: bool = False
    max_size: int = MAX_LENGTH
    max_address: int = 2048
    error_delay: float = 0.0


PRESETS = {
    "strict": Preset(),
    "qmail": Preset(silent=True, max_address=999),
    "postfix": Preset(max_size=10_240_000, error_delay=1.0),
}


@dataclass(frozen=True, slots=True)
class Received:
    """A request that was read whole. `reply` is what was answered, status byte first."""

    number: int
    sender: bytes
    recipients: tuple[bytes, ...]
    size: int
    sha256: str
    reply: bytes


class Chooser(Protocol):
    """A rule: `opening` is asked when a connection is accepted, `answer` when a request is whole."""

    def opening(self) -> Answer | None: ...
    def answer(self, recipients: Sequence[bytes], digest: str) -> Answer | None: ...


@dataclass(slots=True)
class Rule:
    """Give `answer` to requests that have a recipient beginning with `recipient` (empty: to every
    connection), `times` times if that is given."""

    what: Answer
    recipient: bytes = b""
    times: int | None = None

    def opening(self) -> Answer | None:
        return None if self.recipient else self._take()

    def answer(self, recipients: Sequence[bytes], digest: str) -> Answer | None:
        if self.recipient and any(recipient.startswith(self.recipient) for recipient in recipients):
            return self._take()
        return None

    def _take(self) -> Answer | None:
        if self.times is None:
            return self.what
        self.times -= 1
        return self.what if self.times >= 0 else None


@dataclass(slots=True)
class MagicRecipients:
    """The recipient says what happens: `defer-3@` is Z the first three times for each message, `reject@` D,
    `slow@` K after `slow` seconds, `drop-reply@` taken and never answered."""

    slow: float = 5.0
    seen: Counter[tuple[str, bytes]] = field(default_factory=Counter)

    def opening(self) -> Answer | None:
        return None

    def answer(self, recipients: Sequence[bytes], digest: str) -> Answer | None:
        for recipient in recipients:
            local = recipient.partition(b"@")[0]
            if local == b"reject":
                return Answer(b"D", b"Error: no such mailbox: " + recipient)
            if local == b"drop-reply":
                return Answer(raw=b"")
            if local == b"slow":
                return Answer(delay=self.slow)
            if match := re.fullmatch(rb"defer-([0-9]{1,6})", local):
                self.seen[digest, recipient] += 1
                tries = self.seen[digest, recipient]
                if tries <= int(match[1]):
                    return Answer(b"Z", b"Error: %b is busy, try %d of %b" % (recipient, tries, match[1]))
        return None


class Sink:
    """The server. `received` holds the last `keep` requests that were read whole, `faults` why the last of
    the others were not; `count` and `connections` count the former and everybody.

    `dump`: write each message to a numbered file in that directory, and its envelope beside it as JSON.
    `receive_buffer`: bytes that the kernel may hold of what has not been read.
    """

    def __init__(
        self,
        rules: Sequence[Chooser] = (),
        dump: Path | None = None,
        preset: Preset | str = "strict",
        keep: int = 10_000,
        receive_buffer: int | None = None,
    ) -> None:
        self.rules = tuple(rules)
        self.dump = dump
        self.preset = PRESETS[preset] if isinstance(preset, str) else preset
        self.receive_buffer = receive_buffer
        self.received: deque[Received] = deque(maxlen=keep)
        self.faults: deque[str] = deque(maxlen=keep)
        self.count = self.connections = self.port = 0
        self.buffer = memoryview(bytearray(_BUFFER_SIZE))  # one for all: read and parsed in the same turn of the loop
        self.open: set[Connection] = set()
        self.closing = False
        self.changed = Condition()
        if dump is not None:
            dump.mkdir(parents=True, exist_ok=True)
            self.count = max((int(file.stem) for file in dump.glob("*.eml")), default=0)

    async def start(self, host: str = "127.0.0.1", port: int = 0, *, path: str | None = None) -> None:
        """Listen on `host` and `port` (0: any; then see `port`) or on the Unix socket `path`."""
        loop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        family = socket.AF_UNIX if path is not None else socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self.receive_buffer:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.receive_buffer)
        try:
            listener.bind((host, port) if path is None else path)
        except OSError:
            listener.close()
            raise
        if path is None:
            self.port = listener.getsockname()[1]
        serve = loop.create_server if path is None else loop.create_unix_server
        self._server: asyncio.Server = await serve(lambda: Connection(self, loop), sock=listener, backlog=1024)

    async def close(self) -> None:
        """Stop listening and reset what is open."""
        self.closing = True
        asyncio.get_running_loop().remove_reader(self._listener.fileno())
        await asyncio.sleep(0)  # asyncio fails at a server that is closed in the turn in which it has accepted
        self._server.close()
        for connection in tuple(self.open):
            connection.reset()
        await self._server.wait_closed()
        if self.open:
            await self._idle.wait()

    def wait_for(self, count: int, timeout: float) -> bool:
        """Wait, in another thread, until `count` requests have been read whole; False if that takes too
        long."""
        with self.changed:
            return self.changed.wait_for(lambda: self.count >= count, timeout)

    def wait_for_fault(self, timeout: float) -> bool:
        """Wait, in another thread, until a request has been no good or was broken off."""
        with self.changed:
            return self.changed.wait_for(lambda: bool(self.faults), timeout)

    def gone(self, connection: "Connection") -> None:
        self.open.discard(connection)
        if not self.open:
            self._idle.set()


class Connection(asyncio.BufferedProtocol):
    """One connection to a sink."""

    def __init__(self, sink: Sink, loop: asyncio.AbstractEventLoop) -> None:
        self._sink = sink
        self._loop = loop
        self._parser = RequestParser(self._keep_piece, sink.preset.max_size)
        self._digest = sha256()
        self._part = sink.dump / f".{os.getpid()}-{id(self)}" if sink.dump is not None else None
        self._read = 0
        self._answered = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._sink.open.add(self)
        self._sink.connections += 1
        if self._sink.closing:
            self.reset()
        self._later, self._answer = len(self._sink.rules), Answer()
        for index, rule in enumerate(self._sink.rules):
            if (answer := rule.opening()) is not None:
                self._later, self._answer = index, answer
                break
        if self._answer.at == 0:
            self._respond(self._answer)

    def get_buffer(self, sizehint: int) -> memoryview:
        answer = self._answer
        size = answer.read_size if answer.at is None else min(answer.read_size, max(1, answer.at - self._read))
        return self._sink.buffer[:size]

    def buffer_updated(self, nbytes: int) -> None:
        if self._answered:
            return
        self._read += nbytes
        try:
            whole = self._parser.feed(self._sink.buffer[:nbytes])
        except NetstringError as error:
            self._refuse(error)
            return
        if whole:
            self._judge()
        elif self._answer.at is not None and self._read >= self._answer.at:
            self._respond(self._answer)
        elif self._answer.read_pause:
            self._transport.pause_reading()
            self._after(self._answer.read_pause, self._transport.resume_reading)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._part is not None:
            self._part.unlink(missing_ok=True)
        if not self._answered:
            self._fault(f"connection lost while receiving {self._parser.where}")
        self._sink.gone(self)

    def reset(self) -> None:
        """Close at once, so that the client sees a reset."""
        self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, pack("ii", 1, 0))
        self._transport.abort()

    def _keep_piece(self, piece: memoryview) -> None:
        self._digest.update(piece)
        if self._part is not None:
            with self._part.open("ab") as file:
                file.write(piece)

    def _fault(self, why: str) -> None:
        with self._sink.changed:
            self._sink.faults.append(why)
            self._sink.changed.notify_all()

    def _refuse(self, error: NetstringError) -> None:
        kind = "length exceeds storage limit" if isinstance(error, SizeError) else "format error"
        text = f"netstring {kind} while receiving {self._parser.where}"
        preset = self._sink.preset
        self._respond(Answer(b"D", text.encode(), b"" if preset.silent else None, preset.error_delay))
        self._fault(f"{text}: {error}")

    def _judge(self) -> None:
        """The request is whole: decide what it gets."""
        sink, recipients = self._sink, tuple(self._parser.recipients)
        sender, digest = self._parser.sender or b"", self._digest.hexdigest()
        if any(len(address) > sink.preset.max_address or b"\0" in address for address in (sender, *recipients)):
            answer = Answer(b"D", b"sorry, I can't accept addresses like that (#5.1.3)")
        elif not recipients and not sink.preset.silent:
            answer = Answer(b"D", b"Error: no recipients specified", delay=sink.preset.error_delay)
        else:
            choices = (rule.answer(recipients, digest) for rule in sink.rules[: self._later])
            answer = next((choice for choice in choices if choice is not None), self._answer)
        with sink.changed:
            sink.count += 1
            reply = self._words(answer)
            received = Received(sink.count, sender, recipients, self._parser.size, digest, reply)
            if self._part is not None and sink.dump is not None:
                self._part.touch()
                _store(received, self._part, sink.dump / f"{sink.count:08d}.eml")
            sink.received.append(received)
            sink.changed.notify_all()
        self._respond(answer)

    def _words(self, answer: Answer) -> bytes:
        """The reply without its frame."""
        if answer.raw is not None:
            return answer.raw
        words = answer.status + answer.text
        return b"KOk: queued as %d" % self._sink.count if words == b"K" else words

    def _respond(self, answer: Answer) -> None:
        """Give the answer and read no more."""
        self._answered = True
        words = self._words(answer)
        wire = encode(words) if answer.raw is None else words
        if not self._parser.complete:
            self._transport.pause_reading()
        if answer.delay:
            self._after(answer.delay, self._say, wire, answer)
        else:
            self._say(wire, answer)

    def _say(self, wire: bytes, answer: Answer) -> None:
        if answer.drip and len(wire) > 1:
            self._transport.write(wire[:1])
            self._after(answer.drip, self._say, wire[1:], answer)
            return
        self._transport.write(wire)
        if answer.end == "close":
            self._transport.close()
        elif answer.end == "reset":
            self.reset()

    def _after(self, seconds: float, call: Callable[..., object], *arguments: object) -> None:
        self._timer = self._loop.call_later(seconds, call, *arguments)


def _store(received: Received, part: Path, path: Path) -> None:
    part.rename(path)
    envelope = asdict(received)
    for name in ("sender", "reply"):
        envelope[name] = envelope[name].decode(errors="backslashreplace")
    envelope["recipients"] = [address.decode(errors="backslashreplace") for address in received.recipients]
    path.with_suffix(".json").write_text(json.dumps(envelope, indent=1) + "\n")


@contextmanager
def running_sink(
    *rules: Chooser,
    host: str = "127.0.0.1",
    port: int = 0,
    path: str | None = None,
    new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
    **options: Any,
) -> Iterator[Sink]:
    """A sink with a thread and an event loop of its own; `options` as `Sink` takes them."""
    sink = Sink(rules, **options)
    loop = new_loop()
    thread = Thread(target=loop.run_forever, name="qmqp-sink", daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(sink.start(host, port, path=path), loop).result(10)
        try:
            yield sink
        finally:
            asyncio.run_coroutine_threadsafe(sink.close(), loop).result(10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
