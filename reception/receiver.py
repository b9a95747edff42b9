"""The receiver: turns a transaction into a message in the journal, and then a 250.

A message of less than a block goes whole to the spooler, which appends many to the journal at once.
A larger one streams to its file in threads, a block at a time and in order, while its connection
stops reading if too much waits in memory; the spooler then records it in the journal.

What must stay true: 250 follows the sync. Once the spooler has a message there is 250 or a closed
connection, unless the spooler says that nothing was stored; a client that has gone changes nothing.
A fault of the relay is temporary for the client (452 without space, else 451). Octets are claimed
from the free space before they are written. A reception lives on the loop; at most one thread has
its body.
"""

import asyncio
import errno
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from qmqp_relay.content import MessageContent
from reception.envelope import Envelope
from reception.hooks import ConnectionHooks, Decision
from reception.policy import ClientPolicy
from reception.spooler_client import SpoolerClient
from reception.spooler_protocol import StoreFault
from reception.trace import date, received_field, separate
from relay import metrics
from relay.ids import new_id
from relay.log import first_line, get_logger, named
from relay.queue.accept import NewMessage, NewRecipient, encode
from relay.settings import SmtpdSettings
from relay.spool.journal.format import MAX_ENVELOPE
from relay.spool.store import BodyWriter, Spool

BLOCK = 64 * 1024
"""Octets from which on a message streams to its file."""
MAX_BUFFERED = 8 * BLOCK
"""Octets of one message in memory above which its connection stops reading."""
THREADS = 8  # for writing, syncing and removing the bodies of large messages

_TOO_MANY = "552 5.5.3 Too many recipients"
_LOCAL_FAULT = "451 4.3.0 Cannot take the message now, try again later"

log = get_logger(__name__)


class DiskThreads:
    """Daemon threads for calls that block on the disk, or on the database.

    A ThreadPoolExecutor would wait at exit for a disk that hangs; these threads do not.
    """

    def __init__(self, count: int, name: str = "bodies") -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def run[Result](self, call: Callable[[], Result]) -> asyncio.Future[Result]:
        """Runs `call` in one of the threads; the result, or the error that it raised."""
        return asyncio.wrap_future(self.start(call))

    def start[Result](self, call: Callable[[], Result]) -> Future[Result]:
        """As `run`, but called from any thread."""
        future: Future[Result] = Future()
        self._calls.put((future, call))
        return future

    def close(self, timeout: float) -> None:
        """Waits for the calls so far, for at most `timeout` seconds."""
        deadline = time.monotonic() + timeout
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while (work := self._calls.get()) is not None:
            future, call = work
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except Exception as error:
                    future.set_exception(error)


@dataclass(slots=True)
class Receiver:
    """The parts that receptions share. `descriptors` are those of large messages; receptions wait
    for one, first come first served."""

    spool: Spool
    spooler: SpoolerClient
    route_for: Callable[[str], str]
    settings: SmtpdSettings
    threads: DiskThreads
    descriptors: asyncio.Semaphore


class Reception:
    """One message that arrives from `client`. Its public methods are called on the loop.

    `reply` is called once after `complete`, unless `cancel` came first: with the text of the reply,
    or with None to close the connection without one. `on_backpressure` is called when `in_memory`
    has fallen. `hooks` are those of the connection, if there are plugins: they see the message when
    it is complete, before anything of it is in the journal.
    """

    def __init__(
        self,
        receiver: Receiver,
        envelope: Envelope,
        client: ClientPolicy,
        reply: Callable[[str | None], None],
        on_backpressure: Callable[[], None],
        hooks: ConnectionHooks | None = None,
    ) -> None:
        self.id = new_id()
        self.deadline: float | None = None  # of the reply (monotonic), after `complete`
        self.error: Exception | None = None  # why it is not stored
        self._receiver = receiver
        self._envelope = envelope
        self._client = client
        self._reply: Callable[[str | None], None] | None = reply
        self._on_backpressure = on_backpressure
        self._claim = client.claim(int(envelope.parameters.get(b"SIZE", "0")))
        self._started = self._ended = time.monotonic()
        now = date(int(time.time()))
        trace = received_field(envelope, client.address, receiver.settings.hostname, self.id, now)
        self._blocks = [trace]
        self.in_memory = len(trace)  # octets that are not written yet
        self._stream: asyncio.Task[None] | None = None  # of a large message
        self._has_descriptor = False  # the stream may open the body
        self._changed = asyncio.Event()  # the stream has something to do
        self._body: BodyWriter | None = None  # of the stream
        self._size = 0
        self._recipients: list[NewRecipient] = []  # known when the message has ended
        self._rows = b""  # as the file of a large message has them
        self._header_message_id: str | None = None
        self._request = 0  # the number of the request to the spooler
        self._hooks = hooks
        self._decision: Decision | None = None  # of the plugins
        self._whole = False  # the message has ended
        self._asking: asyncio.Task[None] | None = None  # the plugins about a small message

    def append(self, text: bytes) -> None:
        """Takes decoded content."""
        if self.error is not None:
            return
        if not self._claim.grow(len(text)):
            self._stop(OSError(errno.ENOSPC, "no space for more of an unfinished message"))
            return
        self._blocks.append(text)
        self.in_memory += len(text)
        if self.in_memory >= BLOCK:
            self._changed.set()
            if self._stream is None:
                self._stream = asyncio.create_task(self._write_body())

    def complete(self, header_message_id: str | None) -> None:
        """The message has ended, so a reply is due. `header_message_id` is None without one."""
        self._ended = time.monotonic()
        self._header_message_id = header_message_id
        self._whole = True
        if self._hooks is None or self.error is not None:
            self._finish(self._ended)
        elif self._stream is not None:
            self._changed.set()
        else:
            self._asking = asyncio.create_task(self._ask_about_small(self._hooks))

    def _finish(self, now: float) -> None:
        """Has the message stored."""
        self.deadline = now + self._receiver.settings.accept_deadline
        decision = self._decision
        route_for = self._receiver.route_for
        if decision is not None and decision.route is not None:
            route_for = decision.route_for
        self._recipients = [
            NewRecipient(one.address, one.notify, one.orcpt, route_for(one.address))
            for one in self._envelope.recipients
        ]
        if self.error is not None:
            self._refuse(self.error)
        elif self._stream is not None:
            self._changed.set()
        else:
            self._separate()
            self._size = sum(map(len, self._blocks))
            self._spool(self._blocks)

    def expire(self) -> None:
        """The deadline has passed. A message that the spooler has may be stored, so its client
        hears nothing."""
        late = "RELAY_ACCEPT_DEADLINE passed"
        if not self._request:
            self._refuse(TimeoutError(late))
            self._stop(TimeoutError(late))
        elif self._receiver.spooler.withdraw(self._request):
            self._spooled(StoreFault(late))
        else:
            self._log_fault(late)
            self._send(None)

    def cancel(self) -> None:
        """The client needs no reply any more. A message that has ended is stored all the same."""
        self._reply = None
        if not self._request and self.deadline is None:
            self._stop(ConnectionError("the client has gone"))

    def _stop(self, error: Exception) -> None:
        """Nothing more is stored. The stream discards the body as soon as no thread has it."""
        self.error = self.error or error
        self._blocks = []
        self.in_memory = 0
        self._changed.set()
        if not self._has_descriptor:
            self._claim.end()
            if self._stream is not None:
                self._stream.cancel()

    async def _write_body(self) -> None:
        """Writes a large message to its file while it arrives, and has its row committed."""
        async with self._receiver.descriptors:
            self._has_descriptor = True
            self._separate()
            try:
                while not self._size:
                    await self._changed.wait()
                    self._changed.clear()
                    if self.error is not None:
                        break
                    await self._write_blocks()
                    self._on_backpressure()
                    if self._hooks is not None and await self._is_settled(self._hooks):
                        break
            except Exception as error:
                self._stop(error)
            if self.error is not None or not self._size:
                self._discard()
        if self.error is None and self._decision is not None and self._decision.reply:
            self._send(self._decision.reply)
        elif self.error is None:
            self._spool(None)
        elif self._whole:
            self._refuse(self.error)
        self._on_backpressure()

    async def _write_blocks(self) -> None:
        finish = self.deadline is not None  # and the plugins, if there are any, have seen it
        blocks = self._blocks
        self._blocks = []
        size = sum(map(len, blocks))

        def write() -> int:
            receiver = self._receiver
            self._body = self._body or receiver.spool.create(self.id, receiver.threads.start)
            self._body.append(b"".join(blocks))
            if not finish:
                return 0
            self._rows = self._encode(self._body.size)
            return self._body.finish(self._rows)

        self._size = await self._receiver.threads.run(write)
        self._claim.store(size)
        self.in_memory = max(0, self.in_memory - size)

    async def _is_settled(self, hooks: ConnectionHooks) -> bool:
        """Asks the plugins about a large message when all of it is in its file; whether they have
        refused or taken it."""
        if not self._whole or self.deadline is not None or self._blocks or self._body is None:
            return False
        content = MessageContent(self._body.read, self._body.size, self._receiver.threads.run)
        return not await self._may_store(hooks, content)

    async def _ask_about_small(self, hooks: ConnectionHooks) -> None:
        """Asks the plugins about a message that is in memory, and has it stored if they agree."""
        self._separate()
        body = b"".join(self._blocks)
        self._blocks = [body]
        content = MessageContent(lambda size, offset: body[offset : offset + size], len(body))
        try:
            if not await self._may_store(hooks, content):
                self._claim.end()
                self._send(self._decision.reply if self._decision is not None else None)
        except Exception as error:  # the client has gone, or a defect
            self._stop(error)
            self._refuse(error)

    async def _may_store(self, hooks: ConnectionHooks, content: MessageContent) -> bool:
        """Asks the plugins about the message, and begins to store it unless they have refused or
        taken it. Raises ConnectionError if the client has gone."""
        decision = await hooks.decide(self._envelope, self.id, content)
        if self.error is not None:
            raise self.error
        self._decision = decision
        if decision.reply:
            return False
        self._finish(time.monotonic())
        return True

    def _separate(self) -> None:
        """Keeps the trace field and the client's header apart, before the first bytes are written.
        Content that begins with another character needs no change, and no copy."""
        if len(self._blocks) > 1 and self._blocks[1][0] in b" \t>F":
            self._blocks[1:] = [separate(b"".join(self._blocks[1:]))]

    def _encode(self, size: int) -> bytes:
        """The rows of the message, whose body has so many octets."""
        envelope = self._envelope
        message = NewMessage(
            self.id,
            envelope.sender,
            size,
            self._recipients,
            self._client.address,
            envelope.helo,
            envelope.protocol,
            envelope.auth_user,
            header_message_id=self._header_message_id,
            body_type=envelope.parameters.get(b"BODY"),
            ret=envelope.parameters.get(b"RET"),
            envid=envelope.parameters.get(b"ENVID"),
            client_trusted=self._client.trusted,
            tls=envelope.tls,
        )
        if self._decision is not None:
            message = message._replace(
                prefix=self._decision.prefix or None, hold_reason=self._decision.hold_reason
            )
        return encode(message, delay_warning=self._receiver.settings.delay_warning)

    def _spool(self, body: list[bytes] | None) -> None:
        """Has the spooler store the message; `body` is None if its file is synced."""
        self._blocks = []
        rows = self._rows or self._encode(self._size)
        if len(rows) > MAX_ENVELOPE:
            self._discard()
            self._log_fault(f"an envelope of {len(rows)} octets")
            self._send(_TOO_MANY)
            return
        routes: tuple[str, ...] = ()  # of the hints; a held message is not claimed
        if self._decision is None or self._decision.hold_reason is None:
            routes = tuple(dict.fromkeys(recipient.route for recipient in self._recipients))
        self._request = self._receiver.spooler.store(
            self.id, rows, routes, self._size, body, self._spooled
        )

    def _spooled(self, fault: StoreFault | None) -> None:
        """The spooler has answered."""
        unknown = fault is not None and fault.unknown
        self._claim.end(kept=fault is None or unknown)
        if fault is not None:
            if unknown:
                self._log_fault(fault.reason)
                self._send(None)
            else:
                self._discard()
                self._refuse(OSError(fault.number, fault.reason))
            return
        now = time.monotonic()
        metrics.RECEIVED_BYTES.inc(self._size)
        metrics.ACCEPT_SECONDS.observe(now - self._ended)
        more: dict[str, Any] = {} if self._reply else {"reply_sent": False}
        if self._envelope.auth_user is not None:
            more["user"] = self._envelope.auth_user
        self._send(f"250 2.0.0 Ok: queued as {self.id}")
        log.info(
            "accepted",
            id=self.id,
            client=self._client.address,
            sender=self._envelope.sender,
            to=named(one.address for one in self._envelope.recipients),
            recipients=len(self._envelope.recipients),
            message_id=self._header_message_id,
            size=self._size,
            ms=round((now - self._started) * 1000, 1),
            **more,
        )

    def _log_fault(self, reason: str) -> None:
        if self._reply:  # else the client has gone, or has had its reply
            log.error("message not stored", id=self.id, client=self._client.address, reason=reason)

    def _refuse(self, error: Exception) -> None:
        self._log_fault(first_line(error))
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        self._send("452 4.3.1 Insufficient system storage" if full else _LOCAL_FAULT)

    def _send(self, text: str | None) -> None:
        reply, self._reply = self._reply, None
        if reply is not None:
            reply(text)

    def _discard(self) -> None:
        """Ends the claim, and removes the file of a message that streamed."""
        self._claim.end()
        if self._body is not None:
            self._receiver.threads.run(self._remove)

    def _remove(self) -> None:
        if self._body is not None:
            self._body.discard()
        self._receiver.spool.remove(self.id)
