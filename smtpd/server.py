"""Sockets, and every limit in time and number.

A connection is a plain protocol object, not a task: what arrives goes through its session, the replies leave in one
write, and a message that is complete is answered by a callback. One clock tick a second looks at all connections, so
that none needs a timer: each only notes until when it may stay silent, and every byte that it sends moves that on.

Reading stops while the client does not read our replies, while the disk is behind with its message, and while it has
sent too much behind a message that is not answered yet.
"""

import asyncio
import fcntl
import os
import socket
import struct
import termios
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

from relay import metrics
from relay.log import get_logger
from relay.settings import SmtpdSettings
from smtpd.events import Abandon, Begin, Complete, Event, Refusal, Text
from smtpd.policy import Policy
from smtpd.receiver import Receiver, Reception
from smtpd.session import Greeting, Session

BACKLOG_LIMIT = 64 * 1024
"""Octets a client may send behind a message that is not answered yet."""
LINGER = 10.0
"""Seconds for the last reply to leave."""

_BUSY = b"421 4.3.2 Too many connections, try again later\r\n"
_BUSY_CLIENT = b"421 4.7.0 Too many connections from your address\r\n"
_STOPPING = b"421 4.3.2 Service is stopping\r\n"
_TIMEOUT = b"421 4.4.2 Timeout, closing connection\r\n"

log = get_logger(__name__)


class ListenError(Exception):
    """An address cannot be listened on; the text names it and the setting."""


@dataclass(slots=True)
class Server:
    """Everything that connections share."""

    loop: asyncio.AbstractEventLoop
    settings: SmtpdSettings
    receiver: Receiver
    policy: Policy
    greeting: Greeting
    largest: Callable[[], int] | None = None  # the size limit of now, where routes may change it
    connections: "set[Connection]" = field(default_factory=set)
    clients: Counter[str] = field(default_factory=Counter)
    stopping: bool = False
    _listeners: list[asyncio.Server] = field(default_factory=list)
    _clock: asyncio.TimerHandle | None = None
    _empty: asyncio.Event = field(default_factory=asyncio.Event)

    async def listen(self, addresses: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
        """Listens on these addresses ('' is every one, port 0 any free one); the ones it got. Raises ListenError."""
        found: list[tuple[str, int]] = []
        for host, port in addresses:
            try:
                listener = await self.loop.create_server(lambda: Connection(self), host or None, port, backlog=1024)
            except OSError as error:
                await self.stop(0.0)
                reason = os.strerror(error.errno) if error.errno else str(error)
                text = f"cannot listen on {shown(host, port)}: {reason}; RELAY_SMTP_LISTEN sets the address"
                raise ListenError(text) from error
            self._listeners.append(listener)
            found.extend(one.getsockname()[:2] for one in listener.sockets)
        self._tick()
        return found

    async def stop(self, drain: float) -> None:
        """Ends every session; transactions in progress may take `drain` seconds."""
        self.stopping = True
        for listener in self._listeners:
            listener.close()
        for connection in tuple(self.connections):
            connection.stop(idle=True)
        if self.connections and drain > 0:
            try:
                await asyncio.wait_for(self._empty.wait(), drain)
            except TimeoutError:
                log.warning("stopping with sessions open", sessions=len(self.connections))
        for connection in tuple(self.connections):
            connection.stop()
        if self._clock is not None:
            self._clock.cancel()

    def forget(self, connection: "Connection", client: str) -> None:
        self.connections.discard(connection)
        self.clients[client] -= 1
        if not self.clients[client]:
            del self.clients[client]
        if self.stopping and not self.connections:
            self._empty.set()

    def _tick(self) -> None:
        now = time.monotonic()
        if self.largest is not None and (size := self.largest()) != self.greeting.max_message_size:
            # Sessions that were offered another limit keep it for what they send.
            self.greeting, self.policy.max_message_size = Greeting(self.settings.hostname, size), size
        for connection in tuple(self.connections):
            connection.look_at_clock(now)
        self.receiver.store.look_at_clock(now)
        pause = min(1.0, self.settings.smtp_timeout / 4, self.receiver.deadline / 4)
        self._clock = self.loop.call_later(pause, self._tick)


class Connection(asyncio.Protocol):
    """One client."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._client, self._trusted = "", False
        self._reception: Reception | None = None
        self._paused = False  # we do not read
        self._stuck = False  # the client does not
        self._closing = False
        self._until = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        server = self._server
        # No peer: it was gone before we had it.
        client = server.policy.client(peer[0] if peer else "::")
        self._client, self._trusted = client.address, client.trusted
        crowded = len(server.connections) >= server.settings.max_connections
        server.connections.add(self)
        metrics.SESSIONS.inc()
        server.clients[self._client] += 1
        self._until = time.monotonic() + server.settings.smtp_timeout
        self._session = Session(server.greeting, client)
        log.debug("connection", client=self._client)
        if not peer:
            self._closing = True
            transport.abort()
        elif crowded or server.stopping:
            self._refuse(_STOPPING if server.stopping else _BUSY)
        elif server.clients[self._client] > server.settings.max_connections_per_client:
            self._refuse(_BUSY_CLIENT)
        elif _has_input(transport.get_extra_info("socket")):
            # What it has sent before the banner meets a session that has not started, and is refused there.
            return
        else:
            self._session.start()
            self._transport.write(self._session.replies())

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        self._until = time.monotonic() + self._server.settings.smtp_timeout
        self._follow(self._session.receive(data))

    def eof_received(self) -> bool:
        # With a QUIT behind its message the client has finished and may still be reading; else it has left.
        return self._session.says_goodbye()

    def connection_lost(self, error: Exception | None) -> None:
        self._closing = True
        self._give_up()
        self._server.forget(self, self._client)

    def pause_writing(self) -> None:
        self._stuck = True
        self._throttle()

    def resume_writing(self) -> None:
        self._stuck = False
        self._throttle()

    def look_at_clock(self, now: float) -> None:
        """Ends what has taken too long: the client's silence, our own answer, the last reply's way out."""
        reception = self._reception
        if self._closing:
            if now > self._until:
                self._transport.abort()
        elif reception is not None and reception.deadline is not None:
            if now > reception.deadline:
                reception.expire()
        elif now > self._until:
            self._refuse(_TIMEOUT)

    def stop(self, *, idle: bool = False) -> None:
        """Ends the session, or does so only if it is `idle`; a message without an answer is taken back if possible."""
        if idle and (self._closing or not self._session.idle):
            return
        if self._reception is not None and self._reception.deadline is not None:
            self._reception.expire()
        if self._closing:
            self._transport.abort()
        else:
            self._refuse(_STOPPING)

    def _follow(self, events: Sequence[Event]) -> None:
        """Does what the session found, then sends what it says."""
        for event in events:
            match event:
                case Begin():
                    receiver = self._server.receiver
                    self._reception = Reception(
                        receiver, event.envelope, self._client, self._answer, self._throttle, trusted=self._trusted
                    )
                case Text() if self._reception is not None:
                    self._reception.append(event.data)
                case Complete() if self._reception is not None:
                    self._reception.complete(event.message_id)
                case Abandon():
                    self._give_up()
                case Refusal():
                    self._log(event.reply)
        said = self._session.replies()
        if said:
            self._transport.write(said)
        if self._session.closed:
            self._close()
        elif self._server.stopping and self._session.idle:
            self._refuse(_STOPPING)
        elif self._paused or self._reception is not None:
            self._throttle()

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
