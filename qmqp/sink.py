"""A strict QMQP server that replies, or misbehaves, by rule: for trials, benchmarks and tests.

It reads every request exactly as the protocol has it (each length exact, nothing between the inner
and the outer netstring, no leading zeros), streams the message past a digest and on request into a
file, and keeps no message in memory. The first rule that applies to a connection chooses its
`Answer`:

    with running_sink(Rule(Answer(b"Z", b"busy"), times=2)) as sink:   # Z twice, K from then on
        ...
        sink.wait_for(1, timeout=5)

A preset decides about bad requests. What must stay true: a request is counted, kept and accepted
only after its last comma was read; one that breaks off before leaves nothing.
"""

import asyncio
import json
import math
import os
import re
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from threading import Condition, Thread
from typing import Any, Literal

from qmqp import LONGEST_SESSION
from qmqp.connection import RESET_ON_CLOSE
from qmqp.netstring import MAX_LENGTH, NetstringError, SizeError, encode
from qmqp.reader import MessageReceived, RequestComplete, RequestReader, RequestStarted

_READ_SIZE = 65536


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to a connection: `status` and `text` as a netstring (a K without a text gets `Ok:
    queued as N` once the request is complete), or the bytes `raw` as they are (b"": no reply). It
    is sent `delay` seconds late, with `drip` seconds between single bytes.

    `at`: answer as soon as so many bytes of the request have been read, and read no more; without
    it, when the request is complete. `read_size`, `read_pause`: read at most so many bytes at a
    time, and wait so many seconds in between. `end`: how the connection ends."""

    status: bytes = b"K"
    text: bytes = b""
    raw: bytes | None = None
    delay: float = 0.0
    drip: float = 0.0
    at: int = 2 * MAX_LENGTH
    read_size: int = _READ_SIZE
    read_pause: float = 0.0
    end: Literal["close", "reset", "stay"] = "close"


@dataclass(frozen=True, slots=True)
class Preset:
    """The treatment of a bad request. `silent`: close without a reply. Sizes are bytes;
    `error_delay` is the seconds before a D."""

    silent: bool = False
    max_size: int = MAX_LENGTH
    max_address: int = 2048
    error_delay: float = 0.0


# strict replies D and the reason. qmail closes without a reply, as qmail-qmqpd.c does. postfix
# replies D after a second (qmqpd_error_delay) and closes while the client still writes, so that a
# reset follows.
PRESETS = {
    "strict": Preset(),
    "qmail": Preset(silent=True, max_address=999),
    "postfix": Preset(max_size=10_240_000, error_delay=1.0),
}

# A rule is called when a connection is accepted (with None), and when its request is complete, with
# the recipients and the digest of the message. It returns None if it does not apply.
type Chooser = Callable[[Sequence[bytes] | None, str], Answer | None]


@dataclass(slots=True)
class Rule:
    """Gives the answer `what` to requests that have a recipient beginning with `recipient` (empty:
    to every connection), at most `times` times.

    Without `recipient` the rule holds from the first byte of a connection, so its answer may be
    early (`at`) or say how to read."""

    what: Answer
    recipient: bytes = b""
    times: float = math.inf

    def __call__(self, recipients: Sequence[bytes] | None, digest: str) -> Answer | None:
        begins = any(address.startswith(self.recipient) for address in recipients or ())
        applies = begins if self.recipient else recipients is None
        if not applies or not self.times:
            return None
        self.times -= 1
        return self.what


@dataclass(slots=True)
class MagicRecipients:
    """Answers as the recipient's address says: `defer-3@` is Z three times for each message and
    then K, `reject@` D, `slow@` K after `slow` seconds, `drop-reply@` is accepted without a
    reply."""

    slow: float = 5.0
    seen: Counter[tuple[str, bytes]] = field(default_factory=Counter)

    def __call__(self, recipients: Sequence[bytes] | None, digest: str) -> Answer | None:
        for recipient in recipients or ():
            match re.split(rb"-(?=[0-9]{1,6}$)", recipient.partition(b"@")[0]):
                case [b"reject"]:
                    return Answer(b"D", b"Error: no such mailbox: " + recipient)
                case [b"drop-reply"]:
                    return Answer(raw=b"")
                case [b"slow"]:
                    return Answer(delay=self.slow)
                case [b"defer", times]:
                    self.seen[digest, recipient] += 1
                    tries = self.seen[digest, recipient]
                    if tries <= int(times):
                        return Answer(
                            b"Z", b"Error: %b is busy, try %d of %b" % (recipient, tries, times)
                        )
        return None


@dataclass(frozen=True, slots=True)
class Received:
    """A complete request. `reply` is the answer to it, status byte first."""

    number: int
    sender: bytes
    recipients: tuple[bytes, ...]
    size: int
    sha256: str
    reply: bytes


class Sink:
    """The server. `received` holds the last `keep` complete requests, `faults` the reasons why
    others were bad; `count` is the number of all complete requests, `connections` that of all
    connections, `open` has one task for each connection that is open.

    `dump`: write each message to a numbered file in that directory, and its envelope beside it as
    JSON. `receive_buffer`: bytes that the kernel may hold unread.
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
        self.changed = Condition()
        self.open: set[asyncio.Task[None]] = set()
        if dump is not None:
            dump.mkdir(parents=True, exist_ok=True)
            self.count = max((int(file.stem) for file in dump.glob("*.eml")), default=0)

    async def start(
        self, host: str = "127.0.0.1", port: int = 0, *, path: str | None = None
    ) -> None:
        """Listen on `host` and `port` (0: any; then see `port`) or on the Unix socket `path`."""
        if path is not None:
            self._listener = socket.create_server(path, family=socket.AF_UNIX, backlog=1024)
        else:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = socket.create_server((host, port), family=family, backlog=1024)
            self.port = self._listener.getsockname()[1]
        self._path = Path(path) if path else None
        self._listener.setblocking(False)
        if self.receive_buffer:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.receive_buffer)
        asyncio.get_running_loop().add_reader(self._listener.fileno(), self._accept)

    async def close(self) -> None:
        """Stop listening and reset all open connections."""
        asyncio.get_running_loop().remove_reader(self._listener.fileno())
        self._listener.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        for task in self.open:
            task.cancel()
        await asyncio.gather(*self.open, return_exceptions=True)

    def wait_for(self, count: int, timeout: float) -> bool:
        """Wait, in another thread, until `count` requests are complete; False after `timeout`
        seconds."""
        with self.changed:
            return self.changed.wait_for(lambda: self.count >= count, timeout)

    def wait_for_fault(self, timeout: float) -> bool:
        """Wait, in another thread, for a bad or broken request; False after `timeout` seconds."""
        with self.changed:
            return self.changed.wait_for(lambda: bool(self.faults), timeout)

    def _accept(self) -> None:
        with suppress(OSError):  # the client has gone, or no socket is free: the loop calls again
            sock, _ = self._listener.accept()
            sock.setblocking(False)
            self.connections += 1
            task = asyncio.get_running_loop().create_task(SinkConnection(self, sock).serve())
            self.open.add(task)
            task.add_done_callback(self.open.discard)
            task.add_done_callback(lambda _: sock.close())


class SinkConnection:
    """One connection of a client to a sink."""

    def __init__(self, sink: Sink, sock: socket.socket) -> None:
        self._sink = sink
        self._sock = sock
        self._reader = RequestReader(sink.preset.max_size)
        self._size = 0  # of the message
        self._digest = sha256()
        self._part = sink.dump and sink.dump / f".{os.getpid()}-{id(self)}"

    async def serve(self) -> None:
        """Read, reply, and end the connection as the answer says."""
        end = "reset"
        try:
            async with asyncio.timeout(LONGEST_SESSION):
                answer = await self._read()
                await self._reply(answer)
                # A client that was answered early gets no more of its request read.
                if answer.end == "stay" and not self._reader.complete:
                    await asyncio.sleep(LONGEST_SESSION)
                while answer.end == "stay" and await self._receive(_READ_SIZE):
                    pass
            end = answer.end
        except OSError:
            end = "close"
        finally:
            if end == "reset":
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            if self._part is not None:
                self._part.unlink(missing_ok=True)

    async def _read(self) -> Answer:
        """Read the request as the first rule says that applies to the connection. Returns the
        answer of the first rule that applies to the request, else that one."""
        rules, answer = self._sink.rules, Answer()
        for index, rule in enumerate(rules):
            if (opening := rule(None, "")) is not None:
                rules, answer = rules[:index], opening
                break
        left = answer.at
        while left:
            data = await self._receive(min(answer.read_size, left))
            if not data:
                self._fault(f"connection lost while receiving {self._reader.where}")
                raise ConnectionResetError
            left -= len(data)
            try:
                if (request := self._take(data)) is not None:
                    return self._received(request, answer, rules)
            except NetstringError as error:
                return self._refuse(error)
            if answer.read_pause:
                await asyncio.sleep(answer.read_pause)
        return answer

    async def _receive(self, size: int) -> bytes:
        """At most `size` bytes; empty at the end of the connection."""
        try:
            with suppress(BlockingIOError):
                return self._sock.recv(size)
            return await asyncio.get_running_loop().sock_recv(self._sock, size)
        except ConnectionError:
            return b""

    def _refuse(self, error: NetstringError) -> Answer:
        kind = "length exceeds storage limit" if isinstance(error, SizeError) else "format error"
        text = f"netstring {kind} while receiving {self._reader.where}"
        self._fault(f"{text}: {error}")
        preset = self._sink.preset
        return Answer(b"D", text.encode(), b"" if preset.silent else None, preset.error_delay)

    def _received(
        self, request: RequestComplete, answer: Answer, rules: Sequence[Chooser]
    ) -> Answer:
        """Choose the answer to a complete request, and record both."""
        sink, preset, digest = self._sink, self._sink.preset, self._digest.hexdigest()
        sender, recipients = request.sender, request.recipients
        longest = max(map(len, (sender, *recipients)))
        if longest > preset.max_address or b"\0" in sender + b"".join(recipients):
            answer = Answer(b"D", b"sorry, I can't accept addresses like that (#5.1.3)")
        elif not recipients and not preset.silent:
            answer = Answer(b"D", b"Error: no recipients specified", delay=preset.error_delay)
        else:
            answer = next(filter(None, (rule(recipients, digest) for rule in rules)), answer)
        with sink.changed:
            sink.count += 1
            if answer.status + answer.text == b"K":
                answer = replace(answer, text=b"Ok: queued as %d" % sink.count)
            reply = answer.status + answer.text if answer.raw is None else answer.raw
            received = Received(sink.count, sender, recipients, self._size, digest, reply)
            if self._part is not None:
                _store(received, self._part)
            sink.received.append(received)
            sink.changed.notify_all()
        return answer

    async def _reply(self, answer: Answer) -> None:
        wire = encode(answer.status + answer.text) if answer.raw is None else answer.raw
        if answer.delay:
            await asyncio.sleep(answer.delay)
        for piece in [bytes([byte]) for byte in wire] if answer.drip else [wire]:
            await asyncio.get_running_loop().sock_sendall(self._sock, piece)
            if answer.drip:
                await asyncio.sleep(answer.drip)

    def _take(self, data: bytes) -> RequestComplete | None:
        """Take the next bytes of the request, which they may complete."""
        for event in self._reader.feed(data):
            match event:
                case RequestStarted(size):
                    self._size = size
                case MessageReceived(piece):
                    self._keep(piece)
                case RequestComplete():
                    return event
        return None

    def _keep(self, piece: bytes) -> None:
        self._digest.update(piece)
        if self._part is not None:
            with self._part.open("ab") as file:
                file.write(piece)

    def _fault(self, why: str) -> None:
        with self._sink.changed:
            self._sink.faults.append(why)
            self._sink.changed.notify_all()


def _store(received: Received, part: Path) -> None:
    path = part.with_name(f"{received.number:08d}.eml")
    part.touch()
    part.rename(path)
    envelope = json.dumps(
        asdict(received), indent=1, default=lambda octets: octets.decode(errors="backslashreplace")
    )
    path.with_suffix(".json").write_text(envelope + "\n")


@contextmanager
def running_sink(
    *rules: Chooser,
    host: str = "127.0.0.1",
    port: int = 0,
    path: str | None = None,
    new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
    **options: Any,
) -> Iterator[Sink]:
    """A sink in a thread and an event loop of its own; `options` are those of `Sink`."""
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
