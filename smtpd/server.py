"""The connection of an SMTP client.

What must stay true: reading stops while the client does not read its replies, while the disk is
behind with its message, and while too much input waits behind a message.
"""

import asyncio
import fcntl
import termios

from reception.connection import MailConnection
from reception.server import Door, FrontEnd
from smtpd.session import Greeting, Session, SessionState

INPUT_LIMIT = 64 * 1024
"""Octets that a client may send after a message whose reply is due."""
MIN_RATE = 500
"""Octets a second of content from an untrusted client, on average over RATE_WINDOW. Without it, 5
octets in five minutes would hold a connection and the space of a message for years."""
RATE_WINDOW = 60.0  # seconds


class SmtpConnection(MailConnection):
    """One SMTP client's connection."""

    session: Session

    def __init__(self, server: FrontEnd, door: Door) -> None:
        super().__init__(server, door)
        self.octets = 0  # of content, since the window began
        self.window_started = 0.0
        self._turn: asyncio.Handle | None = None  # the session's next one

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

    def pause_writing(self) -> None:
        self.session.halted = True
        self._throttle()

    def resume_writing(self) -> None:
        self.session.halted = False
        self._schedule(0.0)
        self._throttle()

    def restart_rate(self, now: float) -> None:
        """Begins a new window for MIN_RATE."""
        self.octets = 0
        self.window_started = now

    def _open(self) -> None:
        greeting = Greeting(self._server.settings.hostname, self._server.max_size)
        self.session = Session(greeting, self.client)

    def _start(self, descriptor: int) -> None:
        # A session that has not started refuses input that came before the banner. FIONREAD says
        # how many octets wait, and reads none.
        if fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)) == bytes(4):
            self.session.start()
            self.transport.write(self.session.replies())

    def _check_progress(self, now: float) -> None:
        if self.session.state is not SessionState.CONTENT or self.client.trusted:
            return
        seconds = now - self.window_started
        if self.reading_paused:  # the disk is slow, not the client
            self.restart_rate(now)
        elif seconds >= RATE_WINDOW:
            slow = self.octets < MIN_RATE * seconds
            self.restart_rate(now)
            if slow:
                self._refuse("421 4.4.2 Message comes too slowly, closing connection")

    def _schedule(self, pause: float) -> None:
        """Gives the session a turn after so many seconds, unless it has one before that."""
        if self._turn is None:
            self._turn = self._server.loop.call_later(pause, self._resume)

    def _resume(self) -> None:
        self._turn = None
        if not (self.session.closed or self.session.halted):
            self._extend()
            self._handle(self.session.resume())

    def _continue(self) -> None:
        pause = self.session.pause
        if pause is not None:
            self._schedule(pause)
        if self.reading_paused or self.reception is not None or pause is not None:
            self._throttle()

    def _throttle(self) -> None:
        session = self.session
        self._pause_reading(session.halted or self._congested or len(session.input) > INPUT_LIMIT)
