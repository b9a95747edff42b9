"""A strict QMQP server that replies, or misbehaves, by rule: for trials, benchmarks and tests.

It reads every request exactly as the protocol has it (each length exact, nothing between the inner
and the outer netstring, no leading zeros), streams the message past a digest and on request into a
file, and keeps no message in memory. The first rule that applies to a connection chooses its
`Answer`:

    with running_sink(Rule(Answer(b"Z", b"busy"), times=2)) as sink:   # Z twice, K from then on
        ...
        sink.wait_for(1, timeout=5)

A preset (qmqp/sink_rules.py) decides about bad requests. What must stay true: a request is counted,
kept and accepted only after its last comma was read; one that breaks off before leaves nothing.
"""

import asyncio
import json
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from threading import Condition, Thread
from typing import Any

from qmqp import LONGEST_SESSION
from qmqp.connection import RESET_ON_CLOSE
from qmqp.netstring import MAX_LENGTH, NetstringError, SizeError, encode
from qmqp.request import RequestParser
from qmqp.sink_rules import PRESETS, Answer, Chooser, MagicRecipients, Preset, Rule

__all__ = [
    "PRESETS",
    "Answer",
    "MagicRecipients",
    "Preset",
    "Received",
    "Rule",
    "Sink",
    "running_sink",
]

_READ_SIZE = 65536


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
    connections.

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
            listener = socket.create_server(path, family=socket.AF_UNIX, backlog=1024)
        else:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, port), family=family, backlog=1024)
            self.port = listener.getsockname()[1]
        listener.setblocking(False)
        if self.receive_buffer:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.receive_buffer)
        self._listener = listener
        self._path = Path(path) if path else None
        asyncio.get_running_loop().add_reader(listener.fileno(), self._accept)

    async def close(self) -> None:
        """Stop listening and reset all open connections."""
        asyncio.get_running_loop().remove_reader(self._listener.fileno())
        self._listener.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        for task in self.open:
            task.cancel()
        if self.open:
            await asyncio.wait(self.open)

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
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return  # the client has gone, or no socket is free: then the loop calls again
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
        self._parser = RequestParser(self._keep, sink.preset.max_size)
        self._digest = sha256()
        self._number = 0
        self._part = sink.dump / f".{os.getpid()}-{id(self)}" if sink.dump is not None else None

    async def serve(self) -> None:
        rules: Sequence[Chooser] = self._sink.rules
        answer = Answer()
        for index, rule in enumerate(rules):
            if (opening := rule.opening()) is not None:
                rules, answer = rules[:index], opening
                break
        end = "reset"
        try:
            async with asyncio.timeout(LONGEST_SESSION):
                answer = await self._read(answer, rules)
                await self._reply(answer)
                if answer.end == "stay":
                    await self._stay()
            end = answer.end
        except OSError:
            end = "close"
        finally:
            if end == "reset":
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            if self._part is not None:
                self._part.unlink(missing_ok=True)

    async def _read(self, answer: Answer, rules: Sequence[Chooser]) -> Answer:
        """Read the request as `answer` says. Returns the answer of the first rule that applies,
        else `answer`."""
        count = 0
        while answer.at is None or count < answer.at:
            left = MAX_LENGTH if answer.at is None else answer.at - count
            data = await self._receive(min(answer.read_size, left))
            if not data:
                self._fault(f"connection lost while receiving {self._parser.where}")
                raise ConnectionResetError
            count += len(data)
            try:
                if self._parser.feed(data):
                    return self._received(answer, rules)
            except NetstringError as error:
                return self._refuse(error)
            if answer.read_pause:
                await asyncio.sleep(answer.read_pause)
        return answer

    async def _receive(self, size: int) -> bytes:
        """At most `size` bytes, empty at the end."""
        try:
            return await asyncio.get_running_loop().sock_recv(self._sock, min(size, _READ_SIZE))
        except OSError:
            return b""

    def _refuse(self, error: NetstringError) -> Answer:
        kind = "length exceeds storage limit" if isinstance(error, SizeError) else "format error"
        text = f"netstring {kind} while receiving {self._parser.where}"
        self._fault(f"{text}: {error}")
        preset = self._sink.preset
        return Answer(b"D", text.encode(), b"" if preset.silent else None, preset.error_delay)

    def _received(self, answer: Answer, rules: Sequence[Chooser]) -> Answer:
        """Choose the answer to a complete request, and record both."""
        sink, recipients = self._sink, tuple(self._parser.recipients)
        sender, digest = self._parser.sender, self._digest.hexdigest()
        if any(
            len(address) > sink.preset.max_address or b"\0" in address
            for address in (sender, *recipients)
        ):
            answer = Answer(b"D", b"sorry, I can't accept addresses like that (#5.1.3)")
        elif not recipients and not sink.preset.silent:
            answer = Answer(b"D", b"Error: no recipients specified", delay=sink.preset.error_delay)
        else:
            choices = (rule.answer(recipients, digest) for rule in rules)
            answer = next(filter(None, choices), answer)
        with sink.changed:
            sink.count = self._number = sink.count + 1
            received = Received(
                self._number,
                sender,
                recipients,
                self._parser.size,
                digest,
                self._reply_text(answer),
            )
            if self._part is not None:
                _store(received, self._part)
            sink.received.append(received)
            sink.changed.notify_all()
        return answer

    def _reply_text(self, answer: Answer) -> bytes:
        """The reply without its frame."""
        if answer.raw is not None:
            return answer.raw
        text = answer.status + answer.text
        return b"KOk: queued as %d" % self._number if text == b"K" else text

    async def _reply(self, answer: Answer) -> None:
        loop = asyncio.get_running_loop()
        wire = encode(self._reply_text(answer)) if answer.raw is None else answer.raw
        if answer.delay:
            await asyncio.sleep(answer.delay)
        while answer.drip and len(wire) > 1:
            await loop.sock_sendall(self._sock, wire[:1])
            await asyncio.sleep(answer.drip)
            wire = wire[1:]
        await loop.sock_sendall(self._sock, wire)

    async def _stay(self) -> None:
        """Wait until the client closes, without reading what the answer did not ask for."""
        if not self._parser.complete:
            await asyncio.get_running_loop().create_future()
        while await self._receive(4096):
            pass

    def _keep(self, piece: memoryview) -> None:
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
