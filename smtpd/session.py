"""SMTP (RFC 5321) as a state machine: bytes in, replies and events out, no I/O and no clock.

`receive` takes whatever the network gave and returns what happened, in order; the replies that it
caused gather in one piece for `replies`, so that a pipelined group (RFC 2920) is answered in one
write. One table of commands by states says what each command does where it is allowed and what it
is answered where it is not; a new command is a row.

A message passes as `MailStarted`, then `DataReceived` as often as there is some, then
`DataComplete` (smtpd/events.py); or `DataRejected` as soon as its content is found at fault (the
session reads on to the real end and answers by itself). After `DataComplete` the session stands
still: what the client sent behind its message waits until `answer` brings the verdict, so that no
command overtakes it. Whoever drives a session cancels a begun message when the connection goes
before its `DataComplete`.

One client must not keep the others waiting, so a session obeys a turn of TURN commands and leaves
the rest for the next one: `pause` says when that is due, and the driver of the session calls
`go_on` then. While the client does not read its replies (`halted`) nothing is obeyed. A client that
is not trusted may send so many commands that lead to no message; then each costs it a second, and
in the end its connection.

A client out of step is dangerous, because what it means as content could run as commands. Bytes
before the banner, or behind a DATA that was refused, close the connection, and so do BDAT (which is
not offered, and whose content follows without waiting), HTTP and TLS on this port, and too many
errors.
"""

import re
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Protocol

from smtpd.addresses import CommandRefused, Recipient, parse_recipient, parse_sender
from smtpd.content import Content
from smtpd.events import (
    DataComplete,
    DataReceived,
    DataRejected,
    Envelope,
    Event,
    MailStarted,
    Refusal,
)

LINE_LIMIT = 2048
"""Octets of a command line with its CRLF. RFC 5321 (4.5.3.1.4) asks for 512 at least, SIZE and DSN
for 639 more, and the longest address that QMQP servers take (999 octets) has to fit, also for
clients that say HELO."""
ERROR_LIMIT = 20
"""Refused commands without an accepted message between them."""
TURN = 50
"""Commands that are obeyed before other connections get their turn: some hundred microseconds."""
FREE_COMMANDS, COMMAND_LIMIT = 100, 200
"""Commands without an accepted message from which on each costs a client that is not trusted TARPIT
seconds, and above which it is sent away. Postfix' smtpd_junk_command_limit is 100, and counts anew
after a message only, as here: a client that could begin anew with RSET would never come to the end.
The recipients of the transaction that is open do not count: a server must take 100 of them at least
(RFC 5321, 4.5.3.1.8), and MAX_RECIPIENTS may be many more."""
TARPIT = 1.0
ENDLESS = 1 << 20
"""Octets of a line, or of content that will not be kept, after which its end is not waited for any
longer."""


class SessionState(IntEnum):
    """The first four are the columns of the command table."""

    START = 0  # no HELO yet
    READY = 1
    SENDER = 2  # a sender, no recipient yet
    RECIPIENTS = 3
    CONTENT = 4
    AWAIT_REPLY = 5  # the message is whole, its answer is awaited
    PRE_BANNER = 6  # the banner was not sent yet
    CLOSED = 7


class Rules(Protocol):
    """What a session asks before it takes a sender or a recipient; both checks raise Refused."""

    @property
    def trusted(self) -> bool:
        """Whether this is a client of our own: it may write addresses as one network does, and
        commands cost it nothing."""
        ...

    @property
    def strips_cr(self) -> bool:
        """Whether bare CRs are dropped from this client's content, and not refused."""
        ...

    def check_sender(self, size: int) -> None: ...

    def check_recipient(self, recipient: Recipient, accepted: int) -> None: ...


class Greeting:
    """The replies that name this host and its extensions, made once."""

    def __init__(self, hostname: str, max_message_size: int) -> None:
        name = hostname.encode("ascii")
        size = b"SIZE %d" % max_message_size
        # SMTPUTF8 (RFC 6531) is for headers: Postfix bounces a message with UTF-8 in it where this
        # is not offered. QMQP cannot ask a server about addresses beyond ASCII, so each of those is
        # refused with 553 5.6.7.
        extensions = (
            name,
            b"PIPELINING",
            size,
            b"8BITMIME",
            b"ENHANCEDSTATUSCODES",
            b"SMTPUTF8",
            b"DSN",
        )
        self.hostname = hostname
        self.max_message_size = max_message_size
        self.banner = b"220 %b ESMTP qmqp-relay\r\n" % name
        self.helo = b"250 %b\r\n" % name
        self.ehlo = (
            b"".join(b"250-%b\r\n" % line for line in extensions[:-1])
            + b"250 %b\r\n" % extensions[-1]
        )


_OK = b"250 2.0.0 Ok\r\n"
_SENDER_OK = b"250 2.1.0 Ok\r\n"
_RECIPIENT_OK = b"250 2.1.5 Ok\r\n"
_SEND = b"354 End data with <CR><LF>.<CR><LF>\r\n"
_BYE = b"221 2.0.0 Bye\r\n"
_VRFY = b"252 2.1.5 Cannot verify; send some mail and see\r\n"
_HELP = b"214 2.0.0 HELO EHLO MAIL RCPT DATA RSET NOOP VRFY HELP QUIT\r\n"
_HELO_FIRST = b"503 5.5.1 Send HELO or EHLO first\r\n"
_SENDER_FIRST = b"503 5.5.1 Send MAIL first\r\n"
_NESTED = b"503 5.5.1 A sender was given already\r\n"
_NO_RECIPIENT = b"554 5.5.1 No valid recipients\r\n"
_NO_ARGUMENT = b"501 5.5.4 This command takes no argument\r\n"
_BAD_NAME = b"501 5.5.4 A host name or address literal is needed\r\n"
_UNKNOWN = b"500 5.5.2 Command not recognized\r\n"
_TOO_LONG = b"500 5.5.2 Line too long\r\n"
_BARE_LF = b"500 5.5.2 A line ends with CR LF\r\n"
_NOT_SMTP = b"500 5.5.1 This is an SMTP server\r\n"
_TOO_EARLY = b"554 5.5.0 The client must wait for the banner\r\n"
_OUT_OF_STEP = b"421 4.5.0 Content behind a refused command, closing connection\r\n"
_TOO_MANY_COMMANDS = b"421 4.7.0 Too many commands without a message, closing connection\r\n"
_ENDLESS_LINE = b"421 4.5.2 Line does not end, closing connection\r\n"
_ENDLESS_CONTENT = b"421 4.3.0 Message cannot be taken, closing connection\r\n"
_TOO_MANY_ERRORS = b"421 4.7.0 Too many errors, closing connection\r\n"
_HTTP = (b"GET", b"POST", b"PUT", b"HEAD", b"OPTIONS", b"CONNECT", b"DELETE", b"PATCH", b"PRI")
_NAME = re.compile(rb"[!-~]{1,255}")
_TLS_HANDSHAKE = b"\x16\x03"


class Session:
    """One connection's conversation: `start`, then `receive` and `answer`; after each `replies`,
    then `closed`.

    `pause`: seconds after which `go_on` is due (0: in the next turn of the loop), None if it is
    not; until then what comes is kept. `halted` is set while the client does not read. `lines` and
    `transactions` count what has begun.
    """

    def __init__(self, greeting: Greeting, rules: Rules) -> None:
        self._greeting, self._rules = greeting, rules
        self._state = SessionState.PRE_BANNER
        self._input = b""
        self._replies: list[bytes] = []
        self._events: list[Event] = []
        self._errors = 0
        self._commands = 0  # since the last accepted message
        self._deferred = False  # this transaction was told of a temporary refusal
        self._skipping = False  # the rest of a line that was too long
        self._more = False  # there is input behind this command
        self._helo, self._protocol = "", "SMTP"
        self._envelope: Envelope | None = None
        self._places: dict[str, int] = {}  # where a mailbox stands among its recipients
        self._content: Content | None = None
        self._faulty = False  # Abandon was told
        self._unwanted = False  # the content will not be kept
        self._wasted = 0  # octets of a line that is too long, or of content that will not be kept
        self.halted = False
        self.lines = self.transactions = 0
        self.pause: float | None = None

    @property
    def closed(self) -> bool:
        """Nothing more is read; send what `replies` still gives and close."""
        return self._state is SessionState.CLOSED

    @property
    def idle(self) -> bool:
        """No transaction is open: closing now costs the client nothing."""
        return self._state in (SessionState.START, SessionState.READY, SessionState.PRE_BANNER)

    @property
    def receiving(self) -> bool:
        """Content is coming, be it wanted or not."""
        return self._state is SessionState.CONTENT

    @property
    def backlog(self) -> int:
        """Octets that were received and not yet looked at."""
        return len(self._input)

    def start(self) -> None:
        """The connection stands and the client has kept quiet: the banner."""
        self._state = SessionState.START
        self._replies.append(self._greeting.banner)

    def receive(self, data: bytes) -> list[Event]:
        """Takes bytes from the client, any number; returns what they led to, in order."""
        self._events = []
        self._input = self._input + data if self._input else data
        if self.pause is None:
            self._advance()
        return self._events

    def go_on(self) -> list[Event]:
        """The pause is over: another turn of what has come, and what that led to."""
        self._events, self.pause = [], None
        self._advance()
        return self._events

    def refuse_content(self) -> None:
        """The message cannot be kept, which `answer` will say: its content is read to the end, if
        that comes soon."""
        self._unwanted = True

    def answer(self, reply: bytes) -> list[Event]:
        """The verdict on the `DataComplete` message, a whole reply. Goes on with what the client
        sent behind it."""
        if self._state is not SessionState.AWAIT_REPLY:
            raise RuntimeError("no answer is due")
        self._events = []
        self._state = SessionState.READY
        self._replies.append(reply)
        if reply.startswith(b"2"):
            self._errors = self._commands = 0
        if self.pause is None:
            self._advance()
        return self._events

    def close(self, reply: bytes) -> None:
        """Ends the session with `reply` (a 421), whatever it was doing."""
        self._replies.append(reply)
        self._state = SessionState.CLOSED

    def replies(self) -> bytes:
        """Everything to be sent since the last call, in one piece."""
        said = b"".join(self._replies)
        self._replies.clear()
        return said

    def quit_pending(self) -> bool:
        """Whether QUIT waits behind what is not answered yet: its client did not leave, it has
        finished."""
        behind = self._state is SessionState.AWAIT_REPLY or self.pause is not None or self.halted
        return behind and b"QUIT\r\n" in self._input.upper()

    def _advance(self) -> None:
        """A turn: it ends with the input, at a message that waits for its answer, and after TURN
        commands."""
        self._left = TURN
        while self._input and not self.halted and self.pause is None:
            if self._state <= SessionState.RECIPIENTS:
                if self._state is SessionState.START and self._input.startswith(_TLS_HANDSHAKE):
                    self._refuse_and_close(_NOT_SMTP)
                elif not self._read_commands():
                    return
            elif self._state is SessionState.CONTENT:
                self._read_content()
            elif self._state is SessionState.AWAIT_REPLY:
                return
            else:
                if self._state is SessionState.PRE_BANNER:
                    self._refuse_and_close(_TOO_EARLY)
                self._input = b""

    def _read_commands(self) -> bool:
        """Obeys the whole lines there are, until the turn ends; False if more input is needed."""
        data, start, end = self._input, 0, 0
        while self._state <= SessionState.RECIPIENTS and self.pause is None:
            end = data.find(b"\n", start)
            if end < 0:
                break
            if not self._left:
                self.pause = 0.0
                break
            line = data[start : end + 1]
            start = end + 1
            self._more = start < len(data)
            self._left -= 1
            self.lines += 1
            if self._skipping:
                self._skipping = False
            else:
                self._obey(line)
            self._commands += 1
            if self._commands > FREE_COMMANDS:
                self._charge()
        self._input = data[start:]
        if end < 0 and (self._skipping or len(self._input) > LINE_LIMIT):
            self._skip()
        return end >= 0

    def _charge(self) -> None:
        """A command has been obeyed or refused; what it costs a client that is not trusted."""
        if self._rules.trusted or self._state > SessionState.RECIPIENTS:
            return
        spent = self._commands - (
            len(self._envelope.recipients) if self._envelope is not None else 0
        )
        if spent > COMMAND_LIMIT:
            self._refuse_and_close(_TOO_MANY_COMMANDS)
        elif spent > FREE_COMMANDS:
            self.pause = TARPIT

    def _skip(self) -> None:
        """Throws away the beginning, or more, of a line that is too long and has not ended."""
        begun, size = self._skipping, len(self._input)
        self._input, self._skipping = b"", True
        if not begun:
            self._wasted = 0
            self._refuse(_TOO_LONG)
        self._wasted += size
        if self._wasted > ENDLESS and self._state is not SessionState.CLOSED:
            self._refuse_and_close(_ENDLESS_LINE)

    def _obey(self, line: bytes) -> None:
        """Does what a line says, which includes its end."""
        word, _, argument = line[:-2].partition(b" ")
        word = word.upper()
        try:
            if len(line) > LINE_LIMIT:
                raise CommandRefused(_TOO_LONG)
            if line[-2:] != b"\r\n":
                raise CommandRefused(_BARE_LF)
            cell = COMMANDS[word][self._state] if word in COMMANDS else _UNKNOWN
            if isinstance(cell, bytes):
                raise CommandRefused(cell)
            # Trailing space is tolerated (RFC 5321, 4.1.1).
            cell(self, argument.strip(b" "))
        except CommandRefused as refused:
            self._refuse(refused.reply)
            # The content of a refused message must not run as commands. A client waits for the
            # reply to DATA, so only what has come already shows that it did not; the content of
            # BDAT (RFC 3030) follows in any case. The word counts as its client meant it, also with
            # a bare LF, a tab or a CR too many.
            meant = line.upper().split(None, 1)[:1]
            if (meant == [b"BDAT"] or (meant == [b"DATA"] and self._more)) and not self.closed:
                self.close(_OUT_OF_STEP)

    def _refuse(self, reply: bytes) -> None:
        self._replies.append(reply)
        # No mistake of the client's: a list of 5,000 gets its 4,000 refusals and comes again
        # (4.5.3.1.10).
        temporary = reply.startswith(b"4")
        if not (temporary and self._deferred):
            self._events.append(Refusal(reply))
        self._deferred = self._deferred or temporary
        self._errors += not temporary
        if self._errors >= ERROR_LIMIT and self._state is not SessionState.CLOSED:
            self.close(_TOO_MANY_ERRORS)

    def _refuse_and_close(self, reply: bytes) -> None:
        self._state = SessionState.CLOSED
        self._refuse(reply)

    def _reset(self) -> None:
        self._envelope, self._places, self._deferred, self._state = (
            None,
            {},
            False,
            SessionState.READY,
        )

    def _greet(self, name: bytes, protocol: str, reply: bytes) -> None:
        if not _NAME.fullmatch(name):
            raise CommandRefused(_BAD_NAME)
        self._reset()
        self._helo, self._protocol = name.decode("ascii"), protocol
        self._replies.append(reply)

    def helo(self, argument: bytes) -> None:
        self._greet(argument, "SMTP", self._greeting.helo)

    def ehlo(self, argument: bytes) -> None:
        self._greet(argument, "ESMTP", self._greeting.ehlo)

    def mail(self, argument: bytes) -> None:
        sender, parameters = parse_sender(
            argument, self._greeting.hostname, trusted=self._rules.trusted
        )
        self._rules.check_sender(int(parameters.get(b"SIZE", "0")))
        # The keywords of the trace field: RFC 3848, and RFC 6531 (4.3) for a message that asks for
        # SMTPUTF8.
        protocol = "UTF8SMTP" if b"SMTPUTF8" in parameters else self._protocol
        self._envelope = Envelope(sender, parameters, self._helo, protocol)
        self.transactions += 1
        self._state = SessionState.SENDER
        self._replies.append(_SENDER_OK)

    def rcpt(self, argument: bytes) -> None:
        assert self._envelope is not None
        recipient = parse_recipient(argument, self._greeting.hostname, trusted=self._rules.trusted)
        recipients, mailbox = self._envelope.recipients, recipient.mailbox
        place = self._places.get(mailbox)
        if place is not None:
            # Each recipient in a request is a copy of the message, so a repeat is dropped. The
            # client hears 250, because the message goes where it asked. A repeat counts towards no
            # limit.
            recipients[place] = recipients[place].with_repeat(recipient)
        else:
            self._rules.check_recipient(recipient, len(recipients))
            self._places[mailbox] = len(recipients)
            recipients.append(recipient)
        self._state = SessionState.RECIPIENTS
        self._replies.append(_RECIPIENT_OK)

    def data(self, argument: bytes) -> None:
        assert self._envelope is not None
        _refuse_any(argument)
        self._content = Content(self._greeting.max_message_size, strip_cr=self._rules.strips_cr)
        self._faulty = self._unwanted = False
        self._wasted = 0
        self._state = SessionState.CONTENT
        self._replies.append(_SEND)
        self._events.append(MailStarted(self._envelope))

    def _read_content(self) -> None:
        content = self._content
        assert content is not None
        size = len(self._input)
        text, rest = content.feed(self._input)
        self._input = rest or b""
        if self._faulty or self._unwanted:
            self._wasted += size
        if content.fault is not None and not self._faulty:
            self._faulty = True
            self._events.append(DataRejected())
        if text:
            self._events.append(DataReceived(text))
        self.lines += rest is not None
        if rest is None:
            if self._wasted > ENDLESS:
                # Reading on keeps the client in step, but must not be work without an end. The
                # reply names the fault.
                words = content.fault.value[5:-2] if content.fault is not None else None
                self._refuse_and_close(
                    b"421 4%b, closing connection\r\n" % words if words else _ENDLESS_CONTENT
                )
            return
        self._content = None
        self._reset()
        if content.fault is not None:
            self._refuse(content.fault.value)
        else:
            self._state = SessionState.AWAIT_REPLY
            self._events.append(DataComplete(content.header_message_id))

    def rset(self, argument: bytes) -> None:
        _refuse_any(argument)
        if self._state is not SessionState.START:
            self._reset()
        self._replies.append(_OK)

    def quit(self, argument: bytes) -> None:
        _refuse_any(argument)
        self.close(_BYE)

    def leave(self, argument: bytes) -> None:
        self._refuse_and_close(_NOT_SMTP)

    def say(self, reply: bytes) -> None:
        self._replies.append(reply)


def _refuse_any(argument: bytes) -> None:
    if argument:
        raise CommandRefused(_NO_ARGUMENT)


def _answer(reply: bytes) -> Callable[[Session, bytes], None]:
    return lambda session, argument: session.say(reply)


_ANYWHERE = 4
COMMANDS: Mapping[bytes, tuple[bytes | Callable[[Session, bytes], None], ...]] = {
    #         START         READY          SENDER         RECIPIENTS
    b"HELO": (Session.helo,) * _ANYWHERE,
    b"EHLO": (Session.ehlo,) * _ANYWHERE,
    b"MAIL": (_HELO_FIRST, Session.mail, _NESTED, _NESTED),
    b"RCPT": (_HELO_FIRST, _SENDER_FIRST, Session.rcpt, Session.rcpt),
    b"DATA": (_HELO_FIRST, _SENDER_FIRST, _NO_RECIPIENT, Session.data),
    b"RSET": (Session.rset,) * _ANYWHERE,
    b"NOOP": (_answer(_OK),) * _ANYWHERE,
    b"VRFY": (_answer(_VRFY),) * _ANYWHERE,
    b"HELP": (_answer(_HELP),) * _ANYWHERE,
    b"QUIT": (Session.quit,) * _ANYWHERE,
    **dict.fromkeys(_HTTP, (Session.leave,) * _ANYWHERE),
}
"""What each command does in each state, or the reply that refuses it there."""
