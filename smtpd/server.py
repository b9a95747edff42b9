"""The SMTP server: sockets, and every limit of time and number.

A connection is a protocol object, not a task: input goes through its session, the replies leave in
one write, and a callback brings the reply to a message. One clock tick a second checks the
deadlines of all connections, so that no connection needs a timer.

What must stay true: a deadline counts only after the input that had arrived by then was read.
Timers run before sockets, so a process that was stopped would find every deadline passed, and would
send 451 for messages that are stored. Reading stops while the client does not read its replies,
while the disk is behind with its message, and while too much input waits behind a message.
"""

import asyncio
import fcntl
import math
import os
import socket
import termios
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import cast

from reception.authentication import Authenticator
from reception.login import Login
from reception.policy import ClientPolicy, Policy
from reception.receiver import MAX_BUFFERED, Receiver, Reception
from relay import metrics
from relay.log import get_logger
from relay.settings import SettingsError, SmtpdSettings, format_address
from smtpd.session import (
    CredentialsReceived,
    DataComplete,
    DataReceived,
    Event,
    Greeting,
    MailStarted,
    Refusal,
    Session,
    SessionState,
)

LISTEN_BACKLOG = 1024
"""Connections that wait to be accepted."""
INPUT_LIMIT = 64 * 1024
"""Octets that a client may send after a message whose reply is due."""
LINGER_TIMEOUT = 10.0
"""Seconds for the last reply to leave."""
LATE_TICK = 1.0
"""Seconds that a clock tick may be late. After a later one the process, or its machine, has stood
still, and the lost time counts against neither the clients nor the spooler."""
READ_DELAY = 0.01
"""Seconds from a tick to the check of deadlines: the loop reads in between what has arrived."""
MIN_RATE = 500
"""Octets a second of content from an untrusted client, on average over RATE_WINDOW. Without it, 5
octets in five minutes would hold a connection and the space of a message for years."""
RATE_WINDOW = 60.0  # seconds

_STOPPING = "421 4.3.2 Service is stopping"

log = get_logger(__name__)


@dataclass(slots=True)
class SmtpServer:
    """The state that connections share. `size_limit` is called every second, because routes may
    change it.

    A connection whose descriptor is `last_descriptor` or higher pauses accepting. `auth_required`:
    nobody sends without a login.
    """

    loop: asyncio.AbstractEventLoop
    settings: SmtpdSettings
    receiver: Receiver
    policy: Policy
    size_limit: Callable[[], int]
    authenticator: Authenticator
    last_descriptor: float = math.inf
    auth_required: bool = False
    connections: "set[SmtpConnection]" = field(default_factory=set)
    clients: Counter[str] = field(default_factory=Counter)  # admitted connections by network
    admitted: int = 0
    untrusted: int = 0  # of the admitted ones
    stopping: bool = False
    next_tick: float = math.inf
    greeting: Greeting = field(init=False)
    _listeners: list[asyncio.Server] = field(default_factory=list)
    _sockets: list[socket.socket] = field(default_factory=list)  # open while accepting pauses
    _resuming: asyncio.Task[None] | None = None
    _clock: asyncio.TimerHandle | None = None
    _empty: asyncio.Event = field(default_factory=asyncio.Event)

    async def listen(self, addresses: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
        """Listens on these addresses ('' means every one, port 0 any free port); returns those in
        use. Raises SettingsError that names the address and the setting."""
        self._set_size_limit()
        for host, port in addresses:
            try:
                listener = await self.loop.create_server(
                    partial(SmtpConnection, self), host or None, port, backlog=LISTEN_BACKLOG
                )
            except OSError as error:
                await self.stop(0.0)
                reason = os.strerror(error.errno) if error.errno else str(error)
                raise SettingsError(
                    f"cannot listen on {format_address(host, port)}: {reason};"
                    " RELAY_SMTP_LISTEN sets the address"
                ) from error
            self._listeners.append(listener)
            self._sockets += [socket.socket(fileno=os.dup(s.fileno())) for s in listener.sockets]
        self.tick()
        return [listening.getsockname()[:2] for listening in self._sockets]

    async def stop(self, drain: float) -> None:
        """Ends every session. Transactions in progress have `drain` seconds to finish."""
        self.stopping = True
        self._close_listeners()
        for listening in self._sockets:
            listening.close()
        for connection in tuple(self.connections):
            connection.stop(idle=True)
        if self.connections and drain > 0:
            try:
                await asyncio.wait_for(self._empty.wait(), drain)
            except TimeoutError:
                log.warning("stopping with sessions open", sessions=len(self.connections))
                await asyncio.sleep(READ_DELAY)
        for connection in tuple(self.connections):
            connection.stop()
        if self._clock is not None:
            self._clock.cancel()

    def admit(self, client: ClientPolicy) -> str | None:
        """Counts a connection, or returns the reply that refuses it.

        A quarter of the connections is reserved for trusted clients. A refused connection is not
        counted, so that a burst of them takes no slots while their replies leave.
        """
        limit = self.settings.max_connections
        if self.stopping:
            return _STOPPING
        if self.admitted >= limit or (not client.trusted and self.untrusted >= limit - limit // 4):
            return "421 4.3.2 Too many connections, try again later"
        if self.clients[client.network] >= self.settings.max_connections_per_client:
            return "421 4.7.0 Too many connections from your address"
        self.count(client, 1)
        return None

    def remove(self, connection: "SmtpConnection", admitted: ClientPolicy | None) -> None:
        """A connection has ended; `admitted` is its client if it was counted."""
        if admitted is not None:
            self.count(admitted, -1)
        self.connections.discard(connection)
        if self.stopping and not self.connections:
            self._empty.set()

    def count(self, client: ClientPolicy, change: int) -> None:
        """Adds to the admitted connections of a client, or takes one away."""
        self.admitted += change
        self.untrusted += 0 if client.trusted else change
        self.clients[client.network] += change
        if not self.clients[client.network]:
            del self.clients[client.network]

    def pause(self) -> None:
        """Accepts no more until descriptors are free. Clients wait in the listen queue of the
        kernel, because the sockets stay open."""
        if self._listeners and not self.stopping:
            self._close_listeners()
            log.warning("accepting paused", sessions=len(self.connections))

    async def _resume(self) -> None:
        """Accepts again if descriptors are free. A new descriptor shows that, because it has the
        lowest free number."""
        with suppress(OSError), self._sockets[0].dup() as lowest:
            if lowest.fileno() + len(self._sockets) > self.last_descriptor:
                return
            for listening in self._sockets:
                listener = await self.loop.create_server(
                    partial(SmtpConnection, self), sock=listening.dup(), backlog=LISTEN_BACKLOG
                )
                self._listeners.append(listener)
        if self.stopping:
            self._close_listeners()
        else:
            log.info("accepting resumed", sessions=len(self.connections))

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    def tick(self) -> None:
        """The clock: once a second, or more often for short timeouts."""
        now = time.monotonic()
        self._set_size_limit()
        if not self._listeners and not self.stopping:
            self._resuming = self.loop.create_task(self._resume())
        late = now > self.next_tick + LATE_TICK
        pause = min(1.0, self.settings.smtp_timeout / 4, self.settings.accept_deadline / 4)
        self.next_tick = now + pause
        if late:
            for connection in self.connections:
                connection.restart_rate(now)
            self._clock = self.loop.call_later(pause, self.tick)
        else:
            self._clock = self.loop.call_later(READ_DELAY, self.check_deadlines, now)

    def _set_size_limit(self) -> None:
        """Open sessions keep the limit that they were offered."""
        self.greeting = Greeting(self.settings.hostname, self.size_limit())

    def check_deadlines(self, now: float) -> None:
        """Ends connections and requests that were overdue at the tick, `now`, and still are."""
        for connection in tuple(self.connections):
            connection.check_deadlines(now)
        self.receiver.spooler.check_deadlines(now)
        self._clock = self.loop.call_later(max(0.0, self.next_tick - time.monotonic()), self.tick)


class SmtpConnection(asyncio.Protocol):
    """One client's connection."""

    def __init__(self, server: SmtpServer) -> None:
        self._server = server
        self.reception: Reception | None = None
        self.reading_paused = False
        self.deadline = 0.0  # of the client's silence, or of the last reply (monotonic)
        self.octets = 0  # of content, since the window began
        self.window_started = 0.0
        self._admitted: ClientPolicy | None = None
        self._turn: asyncio.Handle | None = None  # the session's next one

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        server = self._server
        # Without a peer the client has already closed the connection.
        self.client = server.policy.client(peer[0] if peer else "::")
        server.connections.add(self)
        metrics.SESSIONS.inc()
        self._extend()
        self.session = Session(server.greeting, self.client)
        self.session.auth_required = server.auth_required
        log.debug("connection", client=self.client.address)
        if not peer:
            self.session.close()
            transport.abort()
            return
        connection = transport.get_extra_info("socket")
        if connection.fileno() >= server.last_descriptor:
            server.pause()
        refusal = server.admit(self.client)
        if refusal is not None:
            self._refuse(refusal)
            return
        self._admitted = self.client
        # A session that has not started refuses input that came before the banner. FIONREAD says
        # how many octets wait, and reads none.
        if fcntl.ioctl(connection.fileno(), termios.FIONREAD, bytes(4)) == bytes(4):
            self.session.start()
            transport.write(self.session.replies())

    def data_received(self, data: bytes) -> None:
        if self.session.closed:
            return
        lines = self.session.lines
        self.octets += len(data)
        events = self.session.receive(data)
        if self.session.state is SessionState.CONTENT or self.session.lines != lines:
            # The timeout runs for a whole command (RFC 5321, 4.5.3.2.7), not between its octets.
            self._extend()
        self._handle(events)

    def eof_received(self) -> bool:
        # If QUIT waits behind a message the client has finished and may still read.
        return self.session.quit_pending

    def connection_lost(self, error: Exception | None) -> None:
        self.session.close()
        self._cancel()
        self._server.remove(self, self._admitted)

    def pause_writing(self) -> None:
        self.session.halted = True
        self._throttle()

    def resume_writing(self) -> None:
        self.session.halted = False
        self._schedule(0.0)
        self._throttle()

    def check_deadlines(self, now: float) -> None:
        """Ends a last reply, a reply to a message, or a client that takes too long."""
        if self.session.closed:
            if now > self.deadline:
                self.transport.abort()
        elif self.reception is not None and self.reception.deadline is not None:
            if now > self.reception.deadline:
                self.reception.expire()
        elif self.session.state is SessionState.VERIFYING:
            pass  # the authenticator has a timeout of its own
        elif now > self.deadline:
            self._refuse("421 4.4.2 Timeout, closing connection")
        elif (envelope := self.session.envelope) is not None and now > (
            envelope.started + self._server.settings.session_timeout
        ):
            self._refuse("421 4.4.2 Transaction takes too long, closing connection")
        elif self.session.state is SessionState.CONTENT and not self.session.client.trusted:
            self._check_rate(now)

    def _check_rate(self, now: float) -> None:
        seconds = now - self.window_started
        if self.reading_paused:  # the disk is slow, not the client
            self.restart_rate(now)
        elif seconds >= RATE_WINDOW:
            slow = self.octets < MIN_RATE * seconds
            self.restart_rate(now)
            if slow:
                self._refuse("421 4.4.2 Message comes too slowly, closing connection")

    def restart_rate(self, now: float) -> None:
        """Begins a new window for MIN_RATE."""
        self.octets = 0
        self.window_started = now

    def stop(self, *, idle: bool = False) -> None:
        """Ends the session, with `idle` only if no transaction is open."""
        if idle and not self.session.idle:
            return
        if self.reception is not None and self.reception.deadline is not None:
            self.reception.expire()
        if self.session.closed:
            self.transport.abort()
        else:
            self._refuse(_STOPPING)

    def _extend(self) -> None:
        """The client has been active: its timeout begins again."""
        self.deadline = time.monotonic() + self._server.settings.smtp_timeout

    def _schedule(self, pause: float) -> None:
        """Gives the session a turn after so many seconds, unless it has one before that."""
        if self._turn is None:
            self._turn = self._server.loop.call_later(pause, self._resume)

    def _resume(self) -> None:
        self._turn = None
        if not (self.session.closed or self.session.halted):
            self._extend()
            self._handle(self.session.resume())

    def _handle(self, events: Sequence[Event]) -> None:
        """Acts on the session's events, then sends its replies."""
        session = self.session
        for event in events:
            match event:
                case MailStarted():
                    receiver = self._server.receiver
                    self.reception = Reception(
                        receiver, event.envelope, session.client, self._reply, self._throttle
                    )
                    self.restart_rate(time.monotonic())
                case DataReceived() if self.reception is not None:
                    self.reception.append(event.data)
                    if self.reception.error:
                        session.refuse_content()
                case DataComplete() if self.reception is not None:
                    self.reception.complete(event.header_message_id)
                case CredentialsReceived(credentials):
                    self._server.authenticator.authenticate(
                        credentials, self.client, self._authenticated
                    )
                case Refusal(reply):
                    self._cancel()
                    metrics.refused(reply)
                    log.info(
                        "refused", client=self.client.address, code=int(reply[:3]), reason=reply[4:]
                    )
        replies = session.replies()
        if replies:
            self.transport.write(replies)
        if session.closed:
            self._cancel()
            self.deadline = time.monotonic() + LINGER_TIMEOUT
            self.transport.close()
        elif self._server.stopping and session.idle:
            self._refuse(_STOPPING)
        else:
            if session.pause is not None:
                self._schedule(session.pause)
            if (
                self.reading_paused
                or self.reception is not None
                or session.pause is not None
                or session.state is SessionState.VERIFYING
            ):
                self._throttle()

    def _reply(self, reply: str) -> None:
        if not reply.startswith("2"):
            metrics.refused(reply)
        self.reception = None
        self._extend()
        self._handle(self.session.reply(reply))

    def _authenticated(self, result: Login | str) -> None:
        """The verdict about credentials: a login, or the reply that refuses them."""
        if self.session.closed:
            return
        self._extend()
        if isinstance(result, str):
            self._handle(self.session.authentication_failed(result))
        else:
            self._handle(self.session.authenticated(result))

    def _refuse(self, reply: str) -> None:
        """Closes the connection with a reply."""
        self.session.close(reply)
        self._handle([Refusal(reply)])

    def _cancel(self) -> None:
        reception, self.reception = self.reception, None
        if reception is not None:
            reception.cancel()

    def _throttle(self) -> None:
        """Pauses or resumes reading."""
        congested = self.reception is not None and self.reception.in_memory > MAX_BUFFERED
        pause = self.session.halted or congested or len(self.session.input) > INPUT_LIMIT
        if pause is self.reading_paused or self.session.closed:
            return
        self.reading_paused = pause
        if pause:
            self.transport.pause_reading()
        else:
            self._extend()
            self.transport.resume_reading()
