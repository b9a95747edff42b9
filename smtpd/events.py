"""What a session tells whoever drives it: a transaction, and what happens to it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from smtpd.addresses import Recipient


@dataclass(slots=True)
class Envelope:
    """A transaction: `sender` is '' if null, `parameters` are those of MAIL, `protocol` goes into
    the trace field."""

    sender: str
    parameters: Mapping[bytes, str]
    helo: str
    protocol: str
    recipients: list[Recipient] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class MailStarted:
    """The client was told to send its message."""

    envelope: Envelope


@dataclass(frozen=True, slots=True)
class DataReceived:
    """Decoded content."""

    data: bytes


@dataclass(frozen=True, slots=True)
class DataRejected:
    """The content is at fault: what was stored of it is not wanted. Its Refusal comes when its end
    was read."""


@dataclass(frozen=True, slots=True)
class DataComplete:
    """The end of the message was read; `answer` is due."""

    header_message_id: str | None


@dataclass(frozen=True, slots=True)
class Refusal:
    """A command was answered with an error; of the temporary ones only the first in a transaction
    is told."""

    reply: bytes


type Event = MailStarted | DataReceived | DataRejected | DataComplete | Refusal
