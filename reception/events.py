"""The events of a session: the terms that the sessions of all front ends share.

A session is a state machine without I/O. It turns bytes into events, and the connection that drives
it acts on them: `MailStarted` begins a reception, `DataReceived` appends to it, `DataComplete` ends
it, and its reply goes back to the session.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from reception.envelope import Envelope
from reception.login import Credentials


@dataclass(frozen=True, slots=True)
class MailStarted:
    """The message of a transaction begins."""

    envelope: Envelope


@dataclass(frozen=True, slots=True)
class DataReceived:
    """Decoded content."""

    data: bytes


@dataclass(frozen=True, slots=True)
class DataComplete:
    """The message has ended; a reply is due."""

    header_message_id: str | None


@dataclass(frozen=True, slots=True)
class Refusal:
    """A command or a message was refused. Of the temporary refusals of a transaction only the first
    is an event."""

    reply: str


@dataclass(frozen=True, slots=True)
class TlsRequested:
    """The client got 220 and begins its handshake (RFC 3207)."""


@dataclass(frozen=True, slots=True)
class CredentialsReceived:
    """The client sent a name and a password; `authenticated` or `authentication_failed` is due."""

    credentials: Credentials


@dataclass(frozen=True, slots=True)
class HookQuestion:
    """The plugins decide about a command: `hook_agreed` or `hook_refused` is due. `envelope` is
    that of the transaction (None outside of one); `subject` is the name, the sender or the
    recipient that the command has."""

    hook: str
    envelope: Envelope | None
    subject: str = ""
    parameters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TransactionEnded:
    """A transaction has ended without a message. It is an event only if a plugin wants to know."""


type Event = (
    MailStarted
    | DataReceived
    | DataComplete
    | Refusal
    | TlsRequested
    | CredentialsReceived
    | HookQuestion
    | TransactionEnded
)
