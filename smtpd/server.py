"""The connection of an SMTP client.

A connection is a protocol object, not a task: input goes through its session, the replies leave in
one write, and a callback brings the reply to a message. The front end (reception/server.py) checks
its deadlines.

What must stay true: reading stops while the client does not read its replies, while the disk is
behind with its message, and while too much input waits behind a message.
"""

import asyncio
import fcntl
import termios
import time
from collections.abc import Sequence
from typing import cast

from reception.events import DataComplete, DataReceived, Event, MailStarted, Refusal
from reception.policy import ClientPolicy
from reception.receiver import MAX_BUFFERED, Reception
from reception.server import STOPPING, Door, FrontEnd
from relay import metrics
from relay.log import get_logger
from smtpd.session import Greeting, Session, SessionState

INPUT_LIMIT = 64 * 1024
"""Octets that a client may send after a message whose reply is due."""
LINGER_TIMEOUT = 10.0
"""Seconds for the last reply to leave."""
MIN_RATE = 500
"""Octets a second of content from an untrusted client, on average over RATE_WINDOW. Without it, 5
octets in five minutes would hold a connection and the space of a message for years."""
RATE_WINDOW = 60.0  # seconds

log = get_logger(__name__)


class SmtpConnection(asyncio.Protocol):
    """One client's connection."""

    def __init__(self, server: FrontEnd, door: Door) -> None:
        self._server = server
        self._door = door
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
        self.client = self._door.policy.client(peer[0] if peer else "::")
        server.connections.add(self)
        metrics.SESSIONS.inc()
        self._extend()
        greeting = Greeting(server.settings.hostname, server.max_size)
        self.session = Session(greeting, self.client)
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
        elif now > self.deadline:
            self._refuse("421 4.4.2 Timeout, closing connection")
        elif (envelope := self.session.envelope) is not None and now > (
            envelope.started + self._server.settings.session_timeout
        ):
            self._refuse("421 4.4.2 Transaction takes too long, closing connection")
        elif self.session.state is SessionState.CONTENT and not self.client.trusted:
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
            self._refuse(STOPPING)

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
                        receiver, event.envelope, self.client, self._reply, self._throttle
                    )
                    self.restart_rate(time.monotonic())
                case DataReceived() if self.reception is not None:
                    self.reception.append(event.data)
                    if self.reception.error:
                        session.refuse_content()
                case DataComplete() if self.reception is not None:
                    self.reception.complete(event.header_message_id)
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
            self._refuse(STOPPING)
        else:
            if session.pause is not None:
                self._schedule(session.pause)
            if self.reading_paused or self.reception is not None or session.pause is not None:
                self._throttle()

    def _reply(self, reply: str) -> None:
        if not reply.startswith("2"):
            metrics.refused(reply)
        self.reception = None
        self._extend()
        self._handle(self.session.reply(reply))

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
