"""One QMQP request as a state machine: bytes in, one reply and events out, no I/O and no clock.

A connection carries one request. Its message comes first, so the events are those of a message
whose envelope is filled in at its end. Texts of replies have the codes of SMTP everywhere in the
relay; here 2xx becomes K, 4xx becomes Z and 5xx becomes D, with the enhanced code behind the text,
as qmail writes it.

D is for a request that can never be accepted as it is: it is malformed, too large or without a
recipient, it has an address that servers read differently or too many recipients (a client that can
divide a message does so after D with 5.5.3), or its message loops. Z is for everything else: a
fault of the relay, no space, a limit, a client that is not authorized. An operator can correct
that, and a Z bounces nothing until then.

What must stay true: a message is complete only with the last comma of its request; before that a
client may close, and nothing is left.
"""

from collections import deque
from collections.abc import Collection, Iterator
from enum import IntEnum

from qmqp.netstring import NetstringError, SizeError, encode
from qmqp.reader import (
    MessageReceived,
    RequestComplete,
    RequestEvent,
    RequestReader,
    RequestStarted,
    TooManyRecipients,
)
from qmqp.request import MAX_ADDRESS
from qmqpd.addresses import parse_recipient, parse_sender
from reception.envelope import LOOP, TOO_BIG, Envelope, Recipient, Refused
from reception.events import (
    DataComplete,
    DataReceived,
    Event,
    HookQuestion,
    MailStarted,
    Refusal,
)
from reception.header import MAX_RECEIVED, HeaderScanner
from reception.policy import ClientPolicy

NOT_AUTHORIZED = "451 4.7.1 Client is not authorized to use this service"
PROTOCOL = "QMQP"  # in the trace field and in the row
_STATUS = {"2": "K", "4": "Z", "5": "D"}


class RequestState(IntEnum):
    """How far the request has come."""

    HEADER = 0  # the lengths have not come
    CONTENT = 1  # the message, then the envelope
    ASKING = 2  # the request has ended, and the plugins are asked about its envelope
    AWAIT_REPLY = 3  # its reply is due
    CLOSED = 4


class QmqpSession:
    """The request of one client. `hostname` is the domain of addresses that have none; `max_size`
    and `max_recipients` are the limits of a message. `hooks` are those that some plugin has: after
    `HookQuestion` either `hook_agreed` or `hook_refused` is due."""

    def __init__(
        self,
        client: ClientPolicy,
        hostname: str,
        max_size: int,
        max_recipients: int,
        hooks: Collection[str] = (),
    ) -> None:
        self.client = client
        self.state = RequestState.HEADER
        self.envelope: Envelope | None = None
        self.unread = 0  # octets of a refused request that are worth reading to its end
        self._hostname = hostname
        self._reader = RequestReader(max_size, MAX_ADDRESS, max_recipients)
        self._header = HeaderScanner()
        self._hooks = hooks
        self._unasked: deque[HookQuestion] = deque()  # about the envelope
        self._reply = b""
        self._events: list[Event] = []

    @property
    def closed(self) -> bool:
        """Whether the request has its reply: send `replies` and close the connection."""
        return self.state is RequestState.CLOSED

    @property
    def idle(self) -> bool:
        """Whether no message has begun, so that closing costs the client nothing."""
        return self.state is RequestState.HEADER

    def receive(self, data: bytes) -> list[Event]:
        """Takes bytes from the client; returns the events in order. Bytes after the request mean
        nothing."""
        self._events = []
        if self.state <= RequestState.CONTENT:
            try:
                for event in self._reader.feed(data):
                    self._take(event)
            except Refused as refused:
                self._refuse(str(refused))
            except NetstringError as error:
                self._refuse(self._fault(error))
        return self._events

    def refuse_content(self) -> None:
        """The message cannot be stored; `reply` brings the reason when the request has ended."""

    def reply(self, reply: str) -> list[Event]:
        """Replies to the request after `DataComplete`."""
        if self.state is not RequestState.AWAIT_REPLY:
            raise RuntimeError("no reply is due")
        self.close(reply)
        return []

    def hook_agreed(self, rewritten: str | None = None) -> list[Event]:
        """The plugins have nothing against a part of the envelope; `rewritten` takes the place of
        the recipient."""
        asked = self._end_question()
        if rewritten is not None:
            assert self.envelope is not None
            self.envelope.recipients = [
                one.rewritten(rewritten) if one.address == asked.subject else one
                for one in self.envelope.recipients
            ]
        self._events = []
        self._ask_next()
        return self._events

    def hook_refused(self, reply: str, *, closes: bool = False) -> list[Event]:
        """A plugin refuses a part of the envelope, and so the request: it has one reply."""
        self._end_question()
        self._events = []
        self._refuse(reply)
        return self._events

    def _end_question(self) -> HookQuestion:
        if self.state is not RequestState.ASKING:
            raise RuntimeError("no answer of the plugins is due")
        return self._unasked.popleft()

    def close(self, *reply: str) -> None:
        """Ends the session with this reply in any state."""
        for text in reply:
            self._reply += encode(_in_qmqp(text))
        self.state = RequestState.CLOSED

    def replies(self) -> bytes:
        """The reply, if it was not sent yet."""
        reply, self._reply = self._reply, b""
        return reply

    def _take(self, event: RequestEvent) -> None:
        match event:
            case RequestStarted(size):
                self.client.check_sender("", size)
                self.envelope = Envelope("", {b"SIZE": str(size)}, "", PROTOCOL)
                self.state = RequestState.CONTENT
                self._events.append(MailStarted(self.envelope))
            case MessageReceived(data):
                self._scan(data)
                self._events.append(DataReceived(data))
            case RequestComplete(sender, recipients):
                self._complete(sender, recipients)

    def _scan(self, data: bytes) -> None:
        if self._header.complete:
            return
        self._header.feed(data)
        if self._header.received > MAX_RECEIVED:
            raise Refused(LOOP)

    def _complete(self, sender: bytes, recipients: tuple[bytes, ...]) -> None:
        assert self.envelope is not None
        if not recipients:
            raise Refused("554 5.5.4 No recipients")
        self.envelope.sender = parse_sender(sender, self._hostname)
        self.client.check_rate("messages", self.envelope.sender)
        # Each recipient is a copy of the message, so a repeat is dropped.
        accepted: dict[str, Recipient] = {}
        for address in recipients:
            recipient = parse_recipient(address, self._hostname)
            if recipient.mailbox not in accepted:
                self.client.check_recipient(recipient, len(accepted))
                self.client.check_rate("recipients", self.envelope.sender)
                accepted[recipient.mailbox] = recipient
        self.envelope.recipients = [*accepted.values()]
        if self._hooks:
            self.state = RequestState.ASKING
            self._unasked.extend(self._questions(self.envelope))
            self._ask_next()
        else:
            self._accept()

    def _accept(self) -> None:
        self.state = RequestState.AWAIT_REPLY
        self._events.append(DataComplete(self._header.message_id))

    def _questions(self, envelope: Envelope) -> Iterator[HookQuestion]:
        """What the plugins are asked about an envelope. QMQP has no parameters."""
        if "mail" in self._hooks:
            yield HookQuestion("mail", envelope, envelope.sender)
        if "rcpt" in self._hooks:
            for recipient in envelope.recipients:
                yield HookQuestion("rcpt", envelope, recipient.address)

    def _ask_next(self) -> None:
        if self._unasked:
            self._events.append(self._unasked[0])
            return
        assert self.envelope is not None
        # A plugin may have given two recipients one address.
        different = {one.mailbox: one for one in self.envelope.recipients}
        self.envelope.recipients = [*different.values()]
        self._accept()

    def _refuse(self, reply: str) -> None:
        """Refuses the request. A client that reads only after it has written its whole request must
        get a D, or it sends the message again for days: its request is worth reading."""
        if reply.startswith("5"):
            self.unread = self._reader.missing
        self.close(reply)
        self._events.append(Refusal(reply))

    def _fault(self, error: NetstringError) -> str:
        """The reply to a request that the reader refuses."""
        if isinstance(error, TooManyRecipients):
            return "554 5.5.3 Too many recipients"
        if not isinstance(error, SizeError):
            return f"554 5.5.2 Malformed request: {error} ({self._reader.where})"
        if self._reader.where == "sender address":
            return f"553 5.1.7 Sender address longer than {MAX_ADDRESS} octets"
        if self._reader.where == "recipient address":
            return f"553 5.1.3 Recipient address longer than {MAX_ADDRESS} octets"
        return TOO_BIG


def _in_qmqp(reply: str) -> bytes:
    """A reply as QMQP has it: `250 2.0.0 Ok` is `KOk`, `451 4.3.0 Later` is `ZLater (#4.3.0)`."""
    code, enhanced, text = reply.split(" ", 2)
    status = _STATUS[code[0]]
    return f"{status}{text}".encode() if status == "K" else f"{status}{text} (#{enhanced})".encode()
