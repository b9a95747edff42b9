"""Sockets, and every limit in time and number.

A connection is a plain protocol object, not a task: what arrives goes through its session, the
replies leave in one write, and a message that is complete is answered by a callback. One clock tick
a second looks at all connections, so that none needs a timer: each only notes until when it may
stay silent, and every command and every byte of content moves that on.

A deadline counts when what has arrived was read after it: timers run before sockets, and a process
that was kept from running would find every deadline passed, and say 451 about messages that are
kept.

A session obeys a turn of commands; what is left it obeys in the next turn of the loop, so that a
client that sends commands without an end has no more of the process than each of the others. It
obeys none while its replies are not read.

Reading stops while the client does not read our replies, while the disk is behind with its message,
and while it has sent too much behind what is not answered yet.
"""

import asyncio
import fcntl
import math
import os
import socket
import struct
import termios
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

from reception.policy import ClientPolicy, Policy
from reception.receiver import Receiver, Reception
from relay import metrics
from relay.log import get_logger
from relay.settings import SmtpdSettings
from smtpd.events import (
    DataComplete,
    DataReceived,
    DataRejected,
    Envelope,
    Event,
    MailStarted,
    Refusal,
)
from smtpd.session import Greeting, Session

BACKLOG = 1024
"""Connections that wait to be accepted."""
BACKLOG_LIMIT = 64 * 1024
"""Octets a client may send behind a message that is not answered yet."""
LINGER = 10.0
"""Seconds for the last reply to leave."""
LATE = 1.0
"""Seconds by which a clock tick may be late: behind one that is later the process, or its machine,
stood still, and neither the clients nor the keeper can be blamed for the time."""
READING = 0.01
"""Seconds from a tick to the look at deadlines: the loop reads what has arrived in between."""
MIN_RATE, RATE_WINDOW = 500, 60.0
"""Octets a second that content must come with, over so many seconds, from a client that is not
trusted. Without it 5 octets in five minutes keep a connection and the room of a message for years.
Modems of 1990 were quicker."""

_BUSY = b"421 4.3.2 Too many connections, try again later\r\n"
_BUSY_CLIENT = b"421 4.7.0 Too many connections from your address\r\n"
_STOPPING = b"421 4.3.2 Service is stopping\r\n"
_TIMEOUT = b"421 4.4.2 Timeout, closing connection\r\n"
_TOO_SLOW = b"421 4.4.2 Message comes too slowly, closing connection\r\n"
_TOO_LONG = b"421 4.4.2 Transaction takes too long, closing connection\r\n"

log = get_logger(__name__)


class ListenError(Exception):
    """An address cannot be listened on; the text names it and the setting."""


@dataclass(slots=True)
class SmtpServer:
    """Everything that connections share."""

    loop: asyncio.AbstractEventLoop
    settings: SmtpdSettings
    receiver: Receiver
    policy: Policy
    greeting: Greeting
    largest: Callable[[], int] | None = None  # the size limit of now, where routes may change it
    last_descriptor: float = math.inf  # of a connection; with it, or a higher one, accepting pauses
    connections: "set[SmtpConnection]" = field(default_factory=set)
    clients: Counter[str] = field(
        default_factory=Counter
    )  # connections that were let in, by network
    admitted: int = 0
    strangers: int = 0  # of those
    stopping: bool = False
    _listeners: list[asyncio.Server] = field(default_factory=list)
    _sockets: list[socket.socket] = field(
        default_factory=list
    )  # the same; they stay open while accepting pauses
    _resuming: asyncio.Task[None] | None = None
    _clock: asyncio.TimerHandle | None = None
    _due: float = math.inf  # the next tick
    _empty: asyncio.Event = field(default_factory=asyncio.Event)

    async def listen(self, addresses: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
        """Listens on these addresses ('' is every one, port 0 any free one); the ones it got.
        Raises ListenError."""
        found: list[tuple[str, int]] = []
        for host, port in addresses:
            try:
                listener = await self.loop.create_server(
                    lambda: SmtpConnection(self), host or None, port, backlog=BACKLOG
                )
            except OSError as error:
                await self.stop(0.0)
                reason = os.strerror(error.errno) if error.errno else str(error)
                text = f"cannot listen on {shown(host, port)}: {reason}; RELAY_SMTP_LISTEN sets the address"
                raise ListenError(text) from error
            self._listeners.append(listener)
            self._sockets += [
                socket.socket(fileno=os.dup(one.fileno())) for one in listener.sockets
            ]
            found.extend(one.getsockname()[:2] for one in listener.sockets)
        self._tick()
        return found

    async def stop(self, drain: float) -> None:
        """Ends every session; transactions in progress may take `drain` seconds."""
        self.stopping = True
        self._close_listeners()
        for one in self._sockets:
            one.close()
        for connection in tuple(self.connections):
            connection.stop(idle=True)
        if self.connections and drain > 0:
            try:
                await asyncio.wait_for(self._empty.wait(), drain)
            except TimeoutError:
                log.warning("stopping with sessions open", sessions=len(self.connections))
                await asyncio.sleep(READING)
        for connection in tuple(self.connections):
            connection.stop()
        if self._clock is not None:
            self._clock.cancel()

    def admit(self, client: ClientPolicy) -> bytes | None:
        """Counts another connection of a client, or gives the reply that refuses it.

        A quarter of the connections is kept for clients that are trusted. One that is refused is
        not counted: a burst of them must not take the places of others until all have heard it.
        """
        most = self.settings.max_connections
        if self.stopping:
            return _STOPPING
        if self.admitted >= most or (not client.trusted and self.strangers >= most - most // 4):
            return _BUSY
        if self.clients[client.network] >= self.settings.max_connections_per_client:
            return _BUSY_CLIENT
        self.clients[client.network] += 1
        self.admitted += 1
        self.strangers += not client.trusted
        return None

    def dismiss(self, client: ClientPolicy) -> None:
        """A connection that was counted has ended."""
        self.admitted -= 1
        self.strangers -= not client.trusted
        self.clients[client.network] -= 1
        if not self.clients[client.network]:
            del self.clients[client.network]

    def pause(self) -> None:
        """Accepts nothing more until there are descriptors. Clients wait in the listen queue, which
        stays."""
        if self._listeners and not self.stopping:
            self._close_listeners()
            log.warning("accepting paused", sessions=len(self.connections))

    def _resume(self) -> None:
        """Accepts again, if there are descriptors; a new one tells, since it has the least number
        that is free."""
        copies: list[socket.socket] = []
        try:
            copies.extend(one.dup() for one in self._sockets)
        except OSError:
            enough = False
        else:
            enough = copies[-1].fileno() < self.last_descriptor
        if enough:
            self._resuming = self.loop.create_task(self._accept_again(copies))
        else:
            for one in copies:
                one.close()

    async def _accept_again(self, copies: list[socket.socket]) -> None:
        create = partial(self.loop.create_server, lambda: SmtpConnection(self), backlog=BACKLOG)
        self._listeners = [await create(sock=one) for one in copies]
        if self.stopping:
            self._close_listeners()
        else:
            log.info("accepting resumed", sessions=len(self.connections))

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    def forget(self, connection: "SmtpConnection") -> None:
        self.connections.discard(connection)
        if self.stopping and not self.connections:
            self._empty.set()

    def _tick(self) -> None:
        now = time.monotonic()
        if self.largest is not None and (size := self.largest()) != self.greeting.max_message_size:
            # Sessions that were offered another limit keep it for what they send.
            self.greeting, self.policy.max_message_size = (
                Greeting(self.settings.hostname, size),
                size,
            )
        if (
            not self._listeners
            and not self.stopping
            and (self._resuming is None or self._resuming.done())
        ):
            self._resume()
        late = now > self._due + LATE
        pause = min(1.0, self.settings.smtp_timeout / 4, self.receiver.deadline / 4)
        self._due = now + pause
        if late:
            for connection in self.connections:
                connection.measure(now)
            self._clock = self.loop.call_later(pause, self._tick)
        else:
            self._clock = self.loop.call_later(READING, self._look_at_clock, now)

    def _look_at_clock(self, now: float) -> None:
        """Ends what was overdue at the time of the tick, and is still."""
        for connection in tuple(self.connections):
            connection.look_at_clock(now)
        self.receiver.store.look_at_clock(now)
        self._clock = self.loop.call_later(max(0.0, self._due - time.monotonic()), self._tick)


class SmtpConnection(asyncio.Protocol):
    """One client."""

    def __init__(self, server: SmtpServer) -> None:
        self._server = server
        self._client, self._trusted = "", False
        self._reception: Reception | None = None
        self._paused = False  # we do not read
        self._stuck = False  # the client does not
        self._closing = False
        self._admitted = False
        self._until = 0.0
        self._transactions, self._began = (
            0,
            0.0,
        )  # the number of the one that is open, and when it began
        self._octets, self._window = 0, 0.0  # came since
        self._turn: asyncio.Handle | None = None  # of the session, when it has one before it

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        server = self._server
        # No peer: it was gone before we had it.
        client = self._rules = server.policy.client(peer[0] if peer else "::")
        self._client = client.address
        server.connections.add(self)
        metrics.SESSIONS.inc()
        self._until = time.monotonic() + server.settings.smtp_timeout
        self._session = Session(server.greeting, client)
        log.debug("connection", client=self._client)
        if not peer:
            self._closing = True
            transport.abort()
            return
        connection = transport.get_extra_info("socket")
        if connection.fileno() >= server.last_descriptor:
            server.pause()
        refusal = server.admit(client)
        self._admitted = refusal is None
        if refusal is not None:
            self._refuse(refusal)
        elif _has_input(connection):
            # What it has sent before the banner meets a session that has not started, and is
            # refused there.
            return
        else:
            self._session.start()
            self._transport.write(self._session.replies())

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        session, lines = self._session, self._session.lines
        self._octets += len(data)
        events = session.receive(data)
        if session.receiving or session.lines != lines:
            # A command has so long from its first octet to its last (RFC 5321, 4.5.3.2.7), not from
            # one to the next.
            self._until = time.monotonic() + self._server.settings.smtp_timeout
        self._follow(events)

    def eof_received(self) -> bool:
        # With a QUIT behind its message the client has finished and may still be reading; else it
        # has left.
        return self._session.quit_pending()

    def connection_lost(self, error: Exception | None) -> None:
        self._closing = True
        self._give_up()
        if self._admitted:
            self._server.dismiss(self._rules)
        self._server.forget(self)

    def pause_writing(self) -> None:
        self._stuck = self._session.halted = True
        self._throttle()

    def resume_writing(self) -> None:
        self._stuck = self._session.halted = False
        if self._turn is None:
            self._turn = self._server.loop.call_soon(self._go_on)
        self._throttle()

    def look_at_clock(self, now: float) -> None:
        """Ends what has taken too long: the client's silence, our own answer, the last reply's way
        out."""
        reception = self._reception
        if self._closing:
            if now > self._until:
                self._transport.abort()
        elif reception is not None and reception.deadline is not None:
            if now > reception.deadline:
                reception.expire()
        elif now > self._until:
            self._refuse(_TIMEOUT)
        elif not self._session.idle and now > self._began + self._server.settings.session_timeout:
            self._refuse(_TOO_LONG)
        elif self._session.receiving and not self._rules.trusted:
            self._look_at_rate(now)

    def _look_at_rate(self, now: float) -> None:
        if self._paused:  # the disk is behind, not the client
            self.measure(now)
        elif now >= self._window + RATE_WINDOW:
            slow = self._octets < MIN_RATE * (now - self._window)
            self.measure(now)
            if slow:
                self._refuse(_TOO_SLOW)

    def measure(self, now: float) -> None:
        """Begins to count anew what comes in a time."""
        self._octets, self._window = 0, now

    def stop(self, *, idle: bool = False) -> None:
        """Ends the session, or does so only if it is `idle`; a message without an answer is taken
        back if possible."""
        if idle and (self._closing or not self._session.idle):
            return
        if self._reception is not None and self._reception.deadline is not None:
            self._reception.expire()
        if self._closing:
            self._transport.abort()
        else:
            self._refuse(_STOPPING)

    def _go_on(self) -> None:
        """The session's next turn."""
        self._turn = None
        if not (
            self._closing or self._stuck
        ):  # else there is none, or the client has to read first
            self._until = time.monotonic() + self._server.settings.smtp_timeout
            self._follow(self._session.go_on())

    def _follow(self, events: Sequence[Event]) -> None:
        """Does what the session found, then sends what it says."""
        if self._session.transactions != self._transactions:
            self._transactions, self._began = self._session.transactions, time.monotonic()
        for event in events:
            match event:
                case MailStarted():
                    self._begin(event.envelope)
                case DataReceived() if self._reception is not None:
                    self._reception.append(event.data)
                    if self._reception.failed:
                        self._session.refuse_content()
                case DataComplete() if self._reception is not None:
                    self._reception.complete(event.header_message_id)
                case DataRejected():
                    self._give_up()
                case Refusal():
                    self._log(event.reply)
        said = self._session.replies()
        if said:
            self._transport.write(said)
        if self._session.closed:
            self._give_up()
            self._close()
        elif self._server.stopping and self._session.idle:
            self._refuse(_STOPPING)
        else:
            pause = self._session.pause
            if pause is not None and self._turn is None:
                loop = self._server.loop
                self._turn = (
                    loop.call_later(pause, self._go_on) if pause else loop.call_soon(self._go_on)
                )
            if self._paused or self._reception is not None or pause is not None:
                self._throttle()

    def _begin(self, envelope: Envelope) -> None:
        claim = self._rules.claim(int(envelope.parameters.get(b"SIZE", "0")))
        receiver = self._server.receiver
        self._reception = Reception(
            receiver,
            envelope,
            self._client,
            claim,
            self._answer,
            self._throttle,
            trusted=self._rules.trusted,
        )
        self.measure(time.monotonic())

    def _answer(self, reply: bytes) -> None:
        if not reply.startswith(b"2"):
            metrics.refused(reply)
        self._reception = None
        self._until = time.monotonic() + self._server.settings.smtp_timeout
        self._follow(self._session.answer(reply))

    def _refuse(self, reply: bytes) -> None:
        """Says goodbye, from our side and with a reason."""
        self._log(reply)
        self._give_up()
        self._session.close(reply)
        self._transport.write(self._session.replies())
        self._close()

    def _give_up(self) -> None:
        reception, self._reception = self._reception, None
        if reception is not None:
            reception.abandon()

    def _log(self, reply: bytes) -> None:
        metrics.refused(reply)
        words = reply[4:].rstrip().decode("ascii")
        log.info("refused", client=self._client, code=int(reply[:3]), reason=words)

    def _close(self) -> None:
        self._closing = True
        self._until = time.monotonic() + LINGER
        self._transport.close()

    def _throttle(self) -> None:
        reception = self._reception
        congested = reception is not None and reception.congested
        wait = self._stuck or congested or self._session.backlog > BACKLOG_LIMIT
        if wait is self._paused or self._closing:
            return
        self._paused = wait
        if wait:
            self._transport.pause_reading()
        else:
            self._until = time.monotonic() + self._server.settings.smtp_timeout
            self._transport.resume_reading()


def _has_input(connection: socket.socket) -> bool:
    """Whether a client has talked before it was spoken to (nothing is read)."""
    waiting = fcntl.ioctl(connection.fileno(), termios.FIONREAD, b"\0\0\0\0")
    return bool(struct.unpack("i", waiting)[0])


def shown(host: str, port: int) -> str:
    """An address as it is written in settings."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
