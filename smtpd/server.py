"""The connection of an SMTP client.

What must stay true: reading stops while the client does not read its replies, while the disk is
behind with its message, and while too much input waits behind a message.
"""

import asyncio
import fcntl
import math
import termios
from dataclasses import replace

from qmqp_relay import Session
from reception.connection import MailConnection
from reception.envelope import TlsState
from reception.handshake import handshake, handshake_fault
from reception.login import Credentials, Login
from reception.server import STOPPING, Door, FrontEnd
from relay import metrics
from relay.listeners import Listener
from relay.log import get_logger
from smtpd.session import Greeting, SessionState, SmtpSession

INPUT_LIMIT = 64 * 1024
"""Octets that a client may send after a message whose reply is due."""
MIN_RATE = 500
"""Octets a second of content from an untrusted client, on average over RATE_WINDOW. Without it, 5
octets in five minutes would hold a connection and the space of a message for years."""
RATE_WINDOW = 60.0  # seconds

log = get_logger(__name__)


class SmtpConnection(MailConnection):
    """One SMTP client's connection."""

    session: SmtpSession

    def __init__(
        self, server: FrontEnd, door: Door, listener: Listener, proxied: str | None = None
    ) -> None:
        super().__init__(server, door, listener, proxied)
        self.octets = 0  # of content, since the window began
        self.window_started = 0.0
        self._turn: asyncio.Handle | None = None  # the session's next one
        self._handshake: asyncio.Task[None] | None = None
        self._client_is_slow = False  # to read its replies
        self._waits_for_hooks = False

    def data_received(self, data: bytes) -> None:
        if self.session.closed:
            return
        if self.early is not None:
            self._take_early(data)
            return
        lines = self.session.lines
        self.octets += len(data)
        events = self.session.receive(data)
        if self.session.state is SessionState.CONTENT or self.session.lines != lines:
            # The timeout runs for a whole command (RFC 5321, 4.5.3.2.7), not between its octets.
            self._extend()
        self._handle(events)

    def eof_received(self) -> bool:
        # If QUIT waits behind a message the client has finished and may still read. TLS has no
        # half of a connection.
        return self.session.quit_pending and self.session.tls is None

    def stop(self, *, idle: bool = False) -> None:
        """Ends the session, with `idle` only if no transaction is open."""
        if self.session.state is SessionState.HANDSHAKE:
            self.transport.abort()
        else:
            super().stop(idle=idle)

    def check_deadlines(self, now: float) -> None:
        """Ends what takes too long; the authenticator has a timeout of its own."""
        if self.session.state is not SessionState.VERIFYING:
            super().check_deadlines(now)

    def pause_writing(self) -> None:
        self._client_is_slow = True
        self._set_halted()
        self._throttle()

    def resume_writing(self) -> None:
        self._client_is_slow = False
        self._set_halted()
        self._schedule(0.0)
        self._throttle()

    def restart_rate(self, now: float) -> None:
        """Begins a new window for MIN_RATE."""
        self.octets = 0
        self.window_started = now

    def _open(self) -> None:
        self._new_session(None)

    def _new_session(self, tls: TlsState | None) -> None:
        server = self._server
        offers_tls = server.certificate is not None
        greeting = Greeting(server.settings.hostname, server.max_size, offers_tls)
        hooks = self._hooks.hooks if self._hooks is not None else ()
        self.session = SmtpSession(greeting, self.client, tls, hooks)
        self.session.auth_required = self._listener.auth

    def _start(self) -> None:
        if self._listener.tls:
            self._begin_handshake()
        elif not self._ask_to_connect():
            self._send_banner()

    def _greet(self) -> None:
        self._send_banner()

    def _send_banner(self) -> None:
        # A session that has not started refuses input that came before the banner. FIONREAD says
        # how many octets wait, and reads none.
        if self.session.state is not SessionState.PRE_BANNER:
            return
        connection = self.transport.get_extra_info("socket")
        if fcntl.ioctl(connection.fileno(), termios.FIONREAD, bytes(4)) == bytes(4):
            self.session.start()
            self.transport.write(self.session.replies())

    def _begin_handshake(self) -> None:
        """Begins TLS. Until it is done nothing is read here, and the handshake has a time limit of
        its own. The task starts at once: in the next turn of the loop octets of the handshake could
        have been read as commands."""
        implicit = self.session.state is SessionState.PRE_BANNER
        self.session.state = SessionState.HANDSHAKE
        self.deadline = math.inf
        self.reading_paused = False
        self._handshake = asyncio.Task(
            self._secure(implicit=implicit), loop=self._server.loop, eager_start=True
        )

    async def _secure(self, *, implicit: bool) -> None:
        server = self._server
        assert server.certificate is not None
        try:
            context = server.certificate.context
            secure = await handshake(server.loop, self.transport, context)
        except OSError as error:
            metrics.HANDSHAKES.labels("failed").inc()
            log.info("handshake failed", client=self.client.address, reason=handshake_fault(error))
            self.connection_lost(error)
            return
        metrics.HANDSHAKES.labels(secure.state.protocol).inc()
        self.transport = secure.transport
        self.transport.set_protocol(self)
        if secure.state.subject is not None:
            self.client = replace(self.client, trusted=True)
        self._extend()
        self._new_session(secure.state)
        if server.stopping:
            self._refuse(STOPPING)
        elif not implicit:
            self.session.start_again()
        elif self._ask_to_connect():
            pass
        elif not secure.early:
            # uvloop delivers what came with the end of the handshake before this call.
            server.loop.call_soon(self._send_banner)
        if secure.early:
            self.data_received(secure.early)

    def _check_progress(self, now: float) -> None:
        if self.session.state is not SessionState.CONTENT or self.session.client.trusted:
            return
        seconds = now - self.window_started
        if self.reading_paused:  # the disk is slow, not the client
            self.restart_rate(now)
        elif seconds >= RATE_WINDOW:
            slow = self.octets < MIN_RATE * seconds
            self.restart_rate(now)
            if slow:
                self._refuse("421 4.4.2 Message comes too slowly, closing connection")

    def _describe(self, public: Session) -> None:
        super()._describe(public)
        session = self.session
        public.helo, public.user = session.client_name, session.user
        public.tls = str(session.tls) if session.tls is not None else None

    def _hooks_idle(self) -> None:
        super()._hooks_idle()
        if self._waits_for_hooks:
            self._waits_for_hooks = False
            self._set_halted()
            self._schedule(0.0)
            self._throttle()

    def _set_halted(self) -> None:
        """The session takes no input while the client does not read, or plugins are being told
        something."""
        self.session.halted = self._client_is_slow or self._waits_for_hooks

    def _schedule(self, pause: float) -> None:
        """Gives the session a turn after so many seconds, unless it has one before that."""
        if self._turn is None:
            self._turn = self._server.loop.call_later(pause, self._resume)

    def _resume(self) -> None:
        self._turn = None
        if not (self.session.closed or self.session.halted):
            self._extend()
            self._handle(self.session.resume())

    def _authenticate(self, credentials: Credentials) -> None:
        self._server.authenticator.authenticate(credentials, self.client, self._authenticated)

    def _authenticated(self, result: Login | str) -> None:
        """The verdict about credentials: a login, or the reply that refuses them."""
        if self.session.closed:
            return
        self._extend()
        if isinstance(result, str):
            self._handle(self.session.authentication_failed(result))
        else:
            self._handle(self.session.authenticated(result))

    def _continue(self) -> None:
        session = self.session
        pause = session.pause
        if pause is not None:
            self._schedule(pause)
        asking = session.state is SessionState.ASKING
        if self._hooks is not None and self._hooks.busy and not asking:
            self._waits_for_hooks = True
            self._set_halted()
        if (
            self.reading_paused
            or self.reception is not None
            or pause is not None
            or asking
            or session.state is SessionState.VERIFYING
            or self._waits_for_hooks
        ):
            self._throttle()

    def _throttle(self) -> None:
        session = self.session
        self._pause_reading(session.halted or self._congested or len(session.input) > INPUT_LIMIT)
