"""The connection of a client, whatever its protocol.

A connection is a protocol object, not a task: input goes through its session, a state machine
without I/O, the replies leave in one write, and a callback brings the reply to a message. A door
has a class of its own for its session, its way to begin and its way to close. The front end
(reception/server.py) checks the deadlines.

What must stay true: reading stops while the disk is behind with the message of the client. A
connection that is lost or refused cancels its message.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, cast

from plugins.runner import Verdict
from qmqp_relay import Address, Deny, DenySoft, RewritableAddress, Session
from reception.envelope import Envelope
from reception.events import (
    CredentialsReceived,
    DataComplete,
    DataReceived,
    Event,
    HookQuestion,
    MailStarted,
    Refusal,
    TlsRequested,
    TransactionEnded,
)
from reception.hooks import ConnectionHooks
from reception.login import Credentials
from reception.policy import ClientPolicy
from reception.receiver import MAX_BUFFERED, Reception
from reception.server import STOPPING, Door, FrontEnd
from relay import metrics
from relay.listeners import Listener
from relay.log import get_logger

EARLY_LIMIT = 256 * 1024
"""Octets that a client may send before the plugins let it connect."""
LINGER_TIMEOUT = 10.0
"""Seconds for the last reply to leave."""

log = get_logger(__name__)


class DoorSession(Protocol):
    """What a connection needs of its session. A reply is a text with the codes of SMTP, such as
    `451 4.3.0 Try again later`; the session knows how its protocol says that. `client` has the
    rules of a login, if there was one."""

    client: ClientPolicy

    @property
    def closed(self) -> bool:
        """Whether nothing more is read: send `replies` and close the connection."""

    @property
    def idle(self) -> bool:
        """Whether no transaction is open, so that closing costs the client nothing."""

    @property
    def envelope(self) -> Envelope | None:
        """The envelope of the open transaction."""

    def refuse_content(self) -> None:
        """The message cannot be stored; `reply` brings the reason."""

    def reply(self, reply: str) -> list[Event]:
        """Replies to the message after `DataComplete`."""

    def hook_agreed(self, rewritten: str | None = None) -> list[Event]:
        """Continues after `HookQuestion`; `rewritten` takes the place of the recipient."""

    def hook_refused(self, reply: str, *, closes: bool = False) -> list[Event]:
        """Refuses what `HookQuestion` was about; `closes`: the session ends."""

    def close(self, *reply: str) -> None:
        """Ends the session with this reply in any state."""

    def replies(self) -> bytes:
        """All replies since the last call."""


class MailConnection(asyncio.Protocol, ABC):
    """One client's connection."""

    session: DoorSession

    def __init__(
        self, server: FrontEnd, door: Door, listener: Listener, proxied: str | None = None
    ) -> None:
        self._server = server
        self._door = door
        self._listener = listener
        self._proxied = proxied  # the address of the client, if a proxy has sent it
        self.reception: Reception | None = None
        self.reading_paused = False
        self.deadline = 0.0  # of the client's silence, or of the last reply (monotonic)
        self._admitted: ClientPolicy | None = None
        self._hooks: ConnectionHooks | None = None  # None without plugins
        self.early: bytes | None = None  # input before the plugins let the client connect

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        # Without a peer the client has already closed the connection.
        self.client = self._door.policy.client(self._proxied or (peer[0] if peer else "::"))
        self._server.add(self, self._door)
        self._extend()
        if self._server.hooks is not None:
            public = Session(self._door.name, self.client.address, self.client.trusted)
            self._hooks = ConnectionHooks(self._server.hooks, public, self._hooks_idle)
        self._open()
        log.debug("connection", client=self.client.address)
        if not peer:
            self.session.close()
            transport.abort()
            return
        self._server.watch_descriptors(transport)
        refusal = self._admit()
        if refusal is not None:
            self._refuse(refusal, silently=self._listener.tls)
            return
        self._admitted = self.client
        self._start()

    def connection_lost(self, error: Exception | None) -> None:
        self.session.close()
        self._cancel()
        if self._hooks is not None:
            self._hooks.close()
        self._server.remove(self, self._door, self._admitted)

    def check_deadlines(self, now: float) -> None:
        """Ends a last reply, a reply to a message, or a client that takes too long."""
        if self.session.closed:
            if now > self.deadline:
                self.transport.abort()
        elif self._hooks is not None and self._hooks.busy:
            pass  # a hook has its own time limit
        elif self.reception is not None and self.reception.deadline is not None:
            if now > self.reception.deadline:
                self.reception.expire()
        elif now > self.deadline:
            self._refuse("421 4.4.2 Timeout, closing connection")
        elif (envelope := self.session.envelope) is not None and now > (
            envelope.started + self._server.settings.session_timeout
        ):
            self._refuse("421 4.4.2 Transaction takes too long, closing connection")
        else:
            self._check_progress(now)

    def restart_rate(self, now: float) -> None:
        """Begins a new window for the least rate of content."""

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

    @abstractmethod
    def _open(self) -> None:
        """Makes the session."""

    def _admit(self) -> str | None:
        """Counts the connection, or returns the reply that refuses it."""
        return self._server.admit(self.client)

    @abstractmethod
    def _start(self) -> None:
        """The client is admitted."""

    def _greet(self) -> None:
        """The plugins let the client connect, and it has sent nothing."""

    @abstractmethod
    def _continue(self) -> None:
        """The session has taken all that it may for now: schedules its next turn, and throttles."""

    @abstractmethod
    def _throttle(self) -> None:
        """Pauses or resumes reading."""

    def _begin_handshake(self) -> None:
        """The client may begin TLS; a session of a protocol without TLS never says so."""

    def _authenticate(self, credentials: Credentials) -> None:
        """Credentials wait for their verdict; a session of a protocol without AUTH never says
        so."""

    def _check_progress(self, now: float) -> None:
        """Ends a client that sends too slowly."""

    def _close(self) -> None:
        """Closes the connection after the replies that were written."""
        self.transport.close()

    def may_yield_to(self, newcomer: ClientPolicy) -> bool:
        """Whether this session may be closed for another connection: it costs its client
        nothing."""
        counted = self._admitted
        return (
            counted is not None and self.session.idle and (newcomer.trusted or not counted.trusted)
        )

    def yield_place(self) -> None:
        """Ends the session; its place is free at once."""
        if self._admitted is not None:
            self._server.count(self._admitted, -1)
            self._admitted = None
        self._refuse("421 4.3.2 Too many connections, closing this one, which is idle")

    def _extend(self) -> None:
        """The client has been active: its timeout begins again."""
        self.deadline = time.monotonic() + self._server.settings.smtp_timeout

    def _handle(self, events: Sequence[Event]) -> None:
        """Acts on the session's events, then sends its replies."""
        session = self.session
        if self._hooks is not None:
            self._describe(self._hooks.session)
        for event in events:
            self._act(event)
        replies = session.replies()
        if replies:
            self.transport.write(replies)
        if session.closed:
            self._cancel()
            self.deadline = time.monotonic() + LINGER_TIMEOUT
            self._close()
        elif self._server.stopping and session.idle:
            self._refuse(STOPPING)
        else:
            self._continue()

    def _act(self, event: Event) -> None:
        """Acts on one event of the session."""
        match event:
            case MailStarted():
                self.reception = Reception(
                    self._server.receiver,
                    event.envelope,
                    self.session.client,
                    self._reply,
                    self._throttle,
                    self._hooks,
                )
                self.restart_rate(time.monotonic())
            case DataReceived() if self.reception is not None:
                self.reception.append(event.data)
                if self.reception.error:
                    self.session.refuse_content()
            case DataComplete() if self.reception is not None:
                self.reception.complete(event.header_message_id)
            case TlsRequested():
                self._begin_handshake()
            case CredentialsReceived(credentials):
                self._authenticate(credentials)
            case HookQuestion() if self._hooks is not None:
                self._ask(event, self._hooks)
            case TransactionEnded() if self._hooks is not None:
                self._hooks.end_transaction()
            case Refusal(reply):
                self._cancel()
                self._tell_refusal(reply)

    def _tell_refusal(self, reply: str) -> None:
        """Tells plugins, metrics and the log that the client was refused."""
        if self._hooks is not None:
            self._hooks.tell("deny", session=self._hooks.session, reply=reply)
        metrics.refused(reply, self._door.name)
        log.info(
            "refused",
            door=self._door.name,
            client=self.client.address,
            code=int(reply[:3]),
            reason=reply[4:],
        )

    def _reply(self, reply: str | None) -> None:
        """The reply to a message; None closes the connection without one."""
        if reply is None:
            self.reception = None
            self.session.close()
            self.transport.abort()
            return
        if not reply.startswith("2"):
            metrics.refused(reply, self._door.name)
        self.reception = None
        self._extend()
        if self._hooks is not None:
            self._hooks.end_message(reply)
            if self._hooks.ends_session:
                self.session.close(reply)
                self._handle([])
                return
        self._handle(self.session.reply(reply))

    # Questions to the plugins

    def _ask(self, question: HookQuestion, hooks: ConnectionHooks) -> None:
        """Asks the plugins about a command."""
        hook, envelope = question.hook, question.envelope
        if envelope is None:
            hooks.ask(hook, self._answered, session=hooks.session, name=question.subject)
            return
        transaction = hooks.transaction(envelope)
        if hook == "rcpt":
            recipient = RewritableAddress(question.subject)
            hooks.ask(
                hook,
                lambda verdict: self._answered(verdict, recipient),
                transaction=transaction,
                recipient=recipient,
                parameters=question.parameters,
            )
        elif hook == "mail":
            hooks.ask(
                hook,
                self._answered,
                transaction=transaction,
                sender=Address(question.subject),
                parameters=question.parameters,
            )
        else:
            hooks.ask(hook, self._answered, transaction=transaction)

    def _describe(self, public: Session) -> None:
        """Tells the public session what is known by now."""
        public.trusted = self.session.client.trusted

    def _ask_to_connect(self) -> bool:
        """Asks the plugins whether the client may connect; False if none wants to know. Input waits
        in `early` until then."""
        hooks = self._hooks
        if hooks is None or "connect" not in hooks.hooks:
            return False
        self.early = b""
        self._describe(hooks.session)
        hooks.ask("connect", self._connected, session=hooks.session)
        return True

    def _take_early(self, data: bytes) -> None:
        """Keeps input that comes before the plugins have answered whether the client may connect;
        more than EARLY_LIMIT closes the connection."""
        assert self.early is not None
        self.early += data
        if len(self.early) > EARLY_LIMIT:
            self.session.close()
            self.transport.abort()

    def _connected(self, verdict: Verdict | None) -> None:
        """The plugins have answered whether the client may connect."""
        early, self.early = self.early, None
        if self.session.closed:
            return
        self._extend()
        if verdict is not None and isinstance(verdict.answer, Deny | DenySoft):
            self._refuse(verdict.answer.reply)
        elif early:
            self.data_received(early)
        else:
            self._greet()

    def _answered(
        self, verdict: Verdict | None, recipient: RewritableAddress | None = None
    ) -> None:
        """The plugins have answered what the session had asked."""
        if self.session.closed:
            return
        self._extend()
        if verdict is not None and isinstance(verdict.answer, Deny | DenySoft):
            answer = verdict.answer
            if self._hooks is not None and self.session.envelope is None:
                self._hooks.end_transaction()  # it was about the sender, or about no transaction
            self._handle(self.session.hook_refused(answer.reply, closes=answer.disconnect))
        else:
            rewritten = recipient.rewritten if recipient is not None else None
            self._handle(self.session.hook_agreed(rewritten))

    def _hooks_idle(self) -> None:
        """The plugins are not asked or told anything any more."""
        self._extend()

    def _refuse(self, reply: str, *, silently: bool = False) -> None:
        """Closes the connection with a reply, or without one where the client expects TLS."""
        self.session.close(*(() if silently else (reply,)))
        self._handle([Refusal(reply)])

    def _cancel(self) -> None:
        reception, self.reception = self.reception, None
        if reception is not None:
            reception.cancel()

    @property
    def _congested(self) -> bool:
        """Whether the disk is behind with the message."""
        return self.reception is not None and self.reception.in_memory > MAX_BUFFERED

    def _pause_reading(self, pause: bool) -> None:
        if pause is self.reading_paused or self.session.closed:
            return
        self.reading_paused = pause
        if pause:
            self.transport.pause_reading()
        else:
            self._extend()
            self.transport.resume_reading()
