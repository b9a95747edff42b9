"""SMTP (RFC 5321) as a state machine: bytes in, replies and events out, no I/O and no clock.

`receive` takes any number of bytes and returns events; `replies` returns the replies to all of them
in one piece, so that a pipelined group (RFC 2920) is answered in one write. `COMMANDS` says what a
command does, or is answered, in each state. After `DataComplete` input waits for `reply`, so that
no command overtakes the message; likewise after `CredentialsReceived` (RFC 4954) and after
`HookQuestion`. If the connection is lost before that, the driver cancels it.

What must stay true: content never runs as commands. Input before the banner or behind a refused
DATA closes the connection, and so do BDAT, HTTP, TLS and too many errors. Input behind STARTTLS is
discarded, and after the handshake the driver makes a new session. One client does not delay others:
after TURN commands, or in `TARPIT`, the rest waits until the driver calls `resume`.
"""

import re
from collections.abc import Callable, Collection, Mapping
from enum import IntEnum
from functools import partial
from typing import NamedTuple

from reception.envelope import Envelope, Recipient, Refused, TlsState
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
from reception.login import Credentials, Login
from reception.policy import ClientPolicy
from smtpd.addresses import parse_recipient, parse_sender
from smtpd.content import Content, Fault
from smtpd.sasl import MECHANISMS, RESPONSE_LIMIT, Exchange

LINE_LIMIT = 2048
"""Octets of a command line with its CRLF. RFC 5321 (4.5.3.1.4) asks for at least 512, SIZE and DSN
for 639 more. The longest address that QMQP servers accept (999 octets) must fit, also after HELO.
"""
ERROR_LIMIT = 20
"""Refused commands without an accepted message between them."""
FREE_ERRORS = 10
"""Of these, after which each one costs an untrusted client TARPIT, as in Postfix
(smtpd_soft_error_limit)."""
TURN = 50
"""Commands before other connections get their turn: some hundred microseconds."""
FREE_COMMANDS = 100
"""Commands of an untrusted client without an accepted message, after which each one costs TARPIT.

Postfix' smtpd_junk_command_limit is 100. Only an accepted message resets the count, as in Postfix;
RSET does not, because a client could repeat it forever. Recipients of the open transaction do not
count: a server must accept at least 100 (RFC 5321, 4.5.3.1.8), and MAX_RECIPIENTS may be more."""
COMMAND_LIMIT = 200  # of these, after which the connection is closed
TARPIT = 1.0  # seconds
ENDLESS = 1 << 20
"""Octets of a line, or of content that is not stored, after which the connection is closed."""

AUTH_FAILURES = 3
"""Of a connection, after which it is closed."""

_OK = "250 2.0.0 Ok"
_TOO_LONG = "500 5.5.2 Line too long"
_NOT_TAKEN = "421 4.3.0 Message cannot be taken, closing connection"
_NOT_SMTP = "500 5.5.1 This is an SMTP server"
_NAME = re.compile(rb"[!-~]{1,255}")
_TLS_HANDSHAKE = b"\x16\x03"


class SessionState(IntEnum):
    """The first four are the columns of the command table."""

    START = 0  # no HELO yet
    READY = 1
    SENDER = 2  # a sender, no recipient yet
    RECIPIENTS = 3
    CONTENT = 4
    AWAIT_REPLY = 5  # the message has ended, its reply is due
    PRE_BANNER = 6  # the banner was not sent yet
    CLOSED = 7
    HANDSHAKE = 8  # what comes now is no SMTP
    RESPONSE = 9  # an exchange of AUTH awaits a response of the client
    VERIFYING = 10  # credentials have come, their verdict is due
    ASKING = 11  # a command waits for the answer of the plugins


class Greeting(NamedTuple):
    """The facts about this host that a session sends."""

    hostname: str
    max_message_size: int
    starttls: bool = False


class SmtpSession:
    """One connection's dialogue.

    Call `start`, then `receive` and `reply`; after each send `replies`, then check `closed`.
    `pause` is the seconds after which `resume` is due (0: in the next turn of the loop), or None;
    input waits until then. The driver sets `halted` while the client does not read, and
    `auth_required` where no client sends without a login. `hooks` are those that some plugin has:
    such a command waits for `hook_agreed` or `hook_refused`.
    """

    def __init__(
        self,
        greeting: Greeting,
        client: ClientPolicy,
        tls: TlsState | None = None,
        hooks: Collection[str] = (),
    ) -> None:
        self.greeting = greeting
        self.client = client
        self.tls = tls  # None in plain text
        self.state = SessionState.PRE_BANNER
        self.input = b""  # that waits
        self._replies: list[str] = []
        self._events: list[Event] = []
        self._errors = 0
        self._commands = 0  # since the last accepted message
        self._deferred = False  # this transaction had a temporary refusal
        self._skipping = False  # the rest of a line that was too long
        self.client_name = ""  # of HELO or EHLO
        self._protocol = "SMTP"
        self.auth_required = False  # no client sends without authentication
        self.user = tls.subject if tls is not None else None  # that the client authenticated as
        self.envelope: Envelope | None = None  # of the open transaction
        self._positions: dict[str, int] = {}  # of a mailbox among the recipients
        self._content: Content | None = None
        self._unwanted = False  # the content cannot be stored
        self._wasted = 0  # octets of a line that is too long, or of content that is not stored
        self._exchange: Exchange | None = None  # of the AUTH that awaits a response
        self._auth_failures = 0
        self._hooks = hooks
        self._asked_hook = ""
        self._asked_in = SessionState.READY  # the state of the command that waits for plugins
        self._agreed: Callable[[str | None], None] | None = None  # what that command does then
        self.halted = False
        self.lines = 0  # begun
        self.pause: float | None = None

    @property
    def closed(self) -> bool:
        """Whether nothing more is read: send `replies` and close the connection."""
        return self.state is SessionState.CLOSED

    @property
    def idle(self) -> bool:
        """Whether no transaction is open, so that closing costs the client nothing."""
        return self.state in _IDLE

    @property
    def offers_auth(self) -> bool:
        """Whether the client may log in: no third party can read its password, and it has not."""
        return self.client.login is None and (self.tls is not None or self.client.plaintext_auth)

    @property
    def quit_pending(self) -> bool:
        """Whether QUIT waits behind a message or a pause: the client has finished, it did not
        abort."""
        waits = self.state in _WAITING or self.pause is not None or self.halted
        return waits and b"QUIT\r\n" in self.input.upper()

    def start(self) -> None:
        """Sends the banner."""
        self.state = SessionState.START
        self._replies.append(f"220 {self.greeting.hostname} ESMTP qmqp-relay")

    def start_again(self) -> None:
        """Continues after STARTTLS: there is no banner, and the client sends EHLO."""
        self.state = SessionState.START

    def receive(self, data: bytes) -> list[Event]:
        """Takes bytes from the client; returns the events in order."""
        self.input = self.input + data if self.input else data
        return self._advance()

    def resume(self) -> list[Event]:
        """Ends the pause: another turn of the input, and its events."""
        self.pause = None
        return self._advance()

    def refuse_content(self) -> None:
        """The message cannot be stored; `reply` brings the reason. Its content is read to the end,
        or to ENDLESS."""
        self._unwanted = True

    def reply(self, reply: str) -> list[Event]:
        """Replies to the message after `DataComplete`, and continues with the input after it."""
        if self.state is not SessionState.AWAIT_REPLY:
            raise RuntimeError("no reply is due")
        self.state = SessionState.READY
        self._replies.append(reply)
        if reply.startswith("2"):
            self._errors = self._commands = 0
        return self._advance()

    def authenticated(self, login: Login) -> list[Event]:
        """The credentials were right; continues with the input after them."""
        self._end_verification()
        self.client = self.client.as_user(login)
        self.user = login.name
        self._replies.append("235 2.7.0 Authentication successful")
        return self._advance()

    def authentication_failed(self, reply: str) -> list[Event]:
        """The credentials are refused; continues with the input after them, unless the reply is 421
        or the client has failed too often."""
        self._end_verification()
        self._events = []
        self._auth_failures += reply.startswith("535")
        if reply.startswith("421"):
            self._refuse_and_close(reply)
        else:
            self._refuse(reply)
            if self._auth_failures >= AUTH_FAILURES and not self.closed:
                self.close("421 4.7.0 Too many failed authentications, closing connection")
        return self._events + self._advance()

    def hook_agreed(self, rewritten: str | None = None) -> list[Event]:
        """The plugins have nothing against the command; continues with it, and with the input after
        it. `rewritten`: the recipient that takes the place of the one that was named."""
        agreed = self._end_question()
        self._events = []
        try:
            agreed(rewritten)
        except Refused as refused:
            self._refuse(str(refused))
        return self._events + self._advance()

    def hook_refused(self, reply: str, *, closes: bool = False) -> list[Event]:
        """A plugin refuses the command; continues with the input after it, unless the session ends
        (`closes`)."""
        self._end_question()
        self._events = []
        if closes:
            self._refuse_and_close(reply)
        else:
            self._refuse(reply)
            if self.input and self._asked_hook == "data" and not self.closed:
                self.close("421 4.5.0 Content behind a refused command, closing connection")
        return self._events + self._advance()

    def _end_question(self) -> Callable[[str | None], None]:
        agreed, self._agreed = self._agreed, None
        if self.state is not SessionState.ASKING or agreed is None:
            raise RuntimeError("no answer of the plugins is due")
        self.state = self._asked_in
        return agreed

    def _ask(self, question: HookQuestion, agreed: Callable[[str | None], None]) -> None:
        """Has the command wait for the plugins; `agreed` is what it does then."""
        self._asked_in, self.state = self.state, SessionState.ASKING
        self._asked_hook = question.hook
        self._agreed = agreed
        self._events.append(question)

    def _end_verification(self) -> None:
        if self.state is not SessionState.VERIFYING:
            raise RuntimeError("no verdict is due")
        self._reset()

    def close(self, *reply: str) -> None:
        """Ends the session with this reply in any state."""
        self._replies += reply
        self.state = SessionState.CLOSED

    def replies(self) -> bytes:
        """All replies since the last call."""
        if not self._replies:
            return b""
        text = "\r\n".join((*self._replies, ""))
        self._replies.clear()
        return text.encode("ascii")

    def _advance(self) -> list[Event]:
        """Runs a turn. It ends with the input, at a message whose reply is due, and after TURN
        commands without content between them."""
        self._events = []
        while self.input and not self.halted and self.pause is None:
            if self.state <= SessionState.RECIPIENTS:
                if self.state is SessionState.START and self.input.startswith(_TLS_HANDSHAKE):
                    self._refuse_and_close(_NOT_SMTP)
                elif not self._read_commands():
                    break
            elif self.state is SessionState.CONTENT:
                self._read_content()
            elif self.state in _WAITING:
                break
            elif self.state is SessionState.RESPONSE:
                if not self._read_response():
                    break
            else:
                if self.state is SessionState.PRE_BANNER:
                    self._refuse_and_close("554 5.5.0 The client must wait for the banner")
                self.input = b""  # behind STARTTLS too (CVE-2011-0411)
        return self._events

    def _read_commands(self) -> bool:
        """Runs the whole lines of the input until the turn ends; False if more input is needed."""
        data, start, end = self.input, 0, 0
        turn = self.lines + TURN
        while self.state <= SessionState.RECIPIENTS and self.pause is None:
            end = data.find(b"\n", start)
            if end < 0:
                break
            if self.lines == turn:
                self.pause = 0.0
                break
            line = data[start : end + 1]
            start = end + 1
            self.lines += 1
            if self._skipping:
                self._skipping = False
            else:
                self._run(line, pipelined=start < len(data))
            self._commands += 1
            if self._commands > FREE_COMMANDS:
                self._charge()
        self.input = data[start:]
        if end < 0 and (self._skipping or len(self.input) > LINE_LIMIT):
            self._skip()
        return end >= 0

    def _charge(self) -> None:
        """Slows down an untrusted client that sends no messages, and in the end closes its
        connection."""
        if self.client.trusted or self.state > SessionState.RECIPIENTS:
            return
        recipients = len(self.envelope.recipients) if self.envelope is not None else 0
        if self._commands - recipients > COMMAND_LIMIT:
            self._refuse_and_close(
                "421 4.7.0 Too many commands without a message, closing connection"
            )
        elif self._commands - recipients > FREE_COMMANDS:
            self.pause = TARPIT

    def _skip(self) -> None:
        """Drops the input, a part of a line that is too long and has not ended."""
        if not self._skipping:
            self._skipping = True
            self._wasted = 0
            self._refuse(_TOO_LONG)
        self._wasted += len(self.input)
        self.input = b""
        if self._wasted > ENDLESS and not self.closed:
            self._refuse_and_close("421 4.5.2 Line does not end, closing connection")

    def _run(self, line: bytes, *, pipelined: bool) -> None:
        """Runs the command of a line, which includes its end. `pipelined`: there is input behind
        it."""
        word, _, argument = line[:-2].partition(b" ")
        try:
            if len(line) > LINE_LIMIT:
                raise Refused(_TOO_LONG)
            if line[-2:] != b"\r\n":
                raise Refused("500 5.5.2 A line ends with CR LF")
            row = COMMANDS.get(word.upper())
            cell = row[self.state] if row is not None else "500 5.5.2 Command not recognized"
            if not isinstance(cell, str):
                # Trailing space is tolerated (RFC 5321, 4.1.1).
                cell(self, argument.strip(b" "))
            elif cell[0] == "2":
                self._replies.append(cell)
            else:
                raise Refused(cell)
        except Refused as refused:
            if refused.closes:
                self._refuse_and_close(str(refused))
                return
            self._refuse(str(refused))
            # A client waits for the reply to DATA, so input behind it shows that it did not wait,
            # and the input is content; the content of BDAT (RFC 3030) follows in any case. This is
            # so too for a command with a bare LF, a tab or a CR too many.
            meant = line.upper().split(None, 1)[:1]
            content_follows = meant == [b"BDAT"] or (meant == [b"DATA"] and pipelined)
            if content_follows and not self.closed:
                self.close("421 4.5.0 Content behind a refused command, closing connection")

    def _refuse(self, reply: str) -> None:
        self._replies.append(reply)
        # A temporary refusal is no error of the client: a list of 5,000 recipients gets 4,000 of
        # them and comes again (RFC 5321, 4.5.3.1.10).
        temporary = reply.startswith("4")
        if not (temporary and self._deferred):
            self._events.append(Refusal(reply))
        self._deferred = self._deferred or temporary
        self._errors += not temporary
        if self.closed:
            return
        if self._errors >= ERROR_LIMIT:
            self.close("421 4.7.0 Too many errors, closing connection")
        elif self._errors > FREE_ERRORS and not temporary and not self.client.trusted:
            self.pause = TARPIT

    def _refuse_and_close(self, reply: str) -> None:
        self.state = SessionState.CLOSED
        self._refuse(reply)

    def _reset(self) -> None:
        """Ends the transaction, if one is open, without a message."""
        if self.envelope is not None and "reset_transaction" in self._hooks:
            self._events.append(TransactionEnded())
        self._clear()

    def _clear(self) -> None:
        self.envelope = None
        self._positions = {}
        self._deferred = False
        self.state = SessionState.READY

    def _helo(self, argument: bytes) -> None:
        self._greet(argument, "SMTP", f"250 {self.greeting.hostname}")

    def _ehlo(self, argument: bytes) -> None:
        # SMTPUTF8 (RFC 6531) is for headers: Postfix bounces a message with UTF-8 in it where this
        # is not offered. A QMQP server cannot be asked about addresses beyond ASCII, so those are
        # refused with 553 5.6.7.
        starttls = "250-STARTTLS\r\n" if self.greeting.starttls and self.tls is None else ""
        self._greet(
            argument,
            "ESMTP" if self.tls is None else "ESMTPS",
            f"250-{self.greeting.hostname}\r\n250-PIPELINING\r\n{starttls}"
            f"250-SIZE {self.greeting.max_message_size}\r\n250-8BITMIME\r\n"
            f"250-ENHANCEDSTATUSCODES\r\n{_AUTH_OFFER if self.offers_auth else ''}"
            "250-SMTPUTF8\r\n250 DSN",
        )

    def _greet(self, name: bytes, protocol: str, reply: str) -> None:
        if not _NAME.fullmatch(name):
            raise Refused("501 5.5.4 A host name or address literal is needed")
        text = name.decode("ascii")
        if "helo" in self._hooks:
            self._ask(
                HookQuestion("helo", None, text), partial(self._greeted, text, protocol, reply)
            )
        else:
            self._greeted(text, protocol, reply)

    def _greeted(self, name: str, protocol: str, reply: str, _: str | None = None) -> None:
        self._reset()
        self.client_name = name
        self._protocol = protocol
        self._replies.append(reply)

    def _auth(self, argument: bytes) -> None:
        if self.client.login is not None:
            raise Refused("503 5.5.1 You have authenticated already")
        if self._protocol == "SMTP":
            raise Refused("503 5.5.1 Send EHLO first")
        mechanism, _, initial = argument.partition(b" ")
        if not mechanism or b" " in initial:
            raise Refused("501 5.5.4 Write AUTH, a mechanism, and at most one initial response")
        exchange = Exchange(mechanism)
        if not self.offers_auth:
            raise Refused("538 5.7.11 Encryption is required for this mechanism")
        self._exchange = exchange
        self._continue_exchange(exchange.start(initial or None))

    def _continue_exchange(self, step: str | Credentials) -> None:
        if isinstance(step, str):
            self.state = SessionState.RESPONSE
            self._replies.append(step)
        else:
            self._exchange = None
            self.state = SessionState.VERIFYING
            self._events.append(CredentialsReceived(step))

    def _read_response(self) -> bool:
        """Takes a response of the exchange; False if more input is needed."""
        assert self._exchange is not None
        line, newline, rest = self.input.partition(b"\n")
        if not newline and len(line) < RESPONSE_LIMIT:
            return False
        self.lines += 1
        self.state = SessionState.READY
        self.input = rest
        try:
            if len(line) >= RESPONSE_LIMIT:
                self._skipping, self._wasted = not newline, len(line)
                raise Refused("500 5.5.6 Authentication exchange line is too long")
            if line[-1:] != b"\r":
                raise Refused("500 5.5.2 A line ends with CR LF")
            self._continue_exchange(self._exchange.respond(line[:-1]))
        except Refused as refused:
            self._exchange = None
            self._refuse(str(refused))
        return True

    def _mail(self, argument: bytes) -> None:
        if self.auth_required and self.user is None:
            raise Refused("530 5.7.0 Authentication required")
        trusted = self.client.trusted
        sender, parameters = parse_sender(argument, self.greeting.hostname, trusted=trusted)
        size = int(parameters.get(b"SIZE", "0"))
        if size > self.greeting.max_message_size:
            raise Refused(Fault.TOO_BIG.value)
        self.client.check_sender(sender, size)
        self.client.check_rate("messages", sender, self.user)
        protocol = self._keyword(smtputf8=b"SMTPUTF8" in parameters)
        envelope = Envelope(sender, parameters, self.client_name, protocol)
        if self.tls is not None:
            envelope.tls = str(self.tls)
        envelope.auth_user = self.user
        if "mail" in self._hooks:
            named = {name.decode("ascii"): value for name, value in parameters.items()}
            question = HookQuestion("mail", envelope, sender, named)
            self._ask(question, partial(self._begin, envelope))
        else:
            self._begin(envelope)

    def _begin(self, envelope: Envelope, _: str | None = None) -> None:
        self.envelope = envelope
        self.state = SessionState.SENDER
        self._replies.append("250 2.1.0 Ok")

    def _keyword(self, *, smtputf8: bool) -> str:
        """The keyword of the trace field: RFC 3848, and RFC 6531 (4.3) for SMTPUTF8."""
        if not smtputf8 and self._protocol == "SMTP":
            return "SMTP"
        protocol = "UTF8SMTP" if smtputf8 else "ESMTP"
        logged_in = self.client.login is not None
        return f"{protocol}{'S' if self.tls is not None else ''}{'A' if logged_in else ''}"

    def _rcpt(self, argument: bytes) -> None:
        assert self.envelope is not None
        recipient = parse_recipient(argument, self.greeting.hostname, trusted=self.client.trusted)
        recipients = self.envelope.recipients
        position = self._positions.get(recipient.mailbox)
        if position is not None:
            # Each recipient of a QMQP request is a copy of the message, so a repeat is dropped. The
            # reply is 250, because the message goes there. A repeat counts towards no limit.
            recipients[position] = recipients[position].merge(recipient)
        else:
            self.client.check_recipient(recipient, len(recipients))
            self.client.check_rate("recipients", self.envelope.sender, self.user)
            if "rcpt" in self._hooks:
                question = HookQuestion(
                    "rcpt", self.envelope, recipient.address, recipient.parameters
                )
                self._ask(question, partial(self._add_asked, recipient))
                return
            self._positions[recipient.mailbox] = len(recipients)
            recipients.append(recipient)
        self.state = SessionState.RECIPIENTS
        self._replies.append("250 2.1.5 Ok")

    def _add_asked(self, recipient: Recipient, rewritten: str | None) -> None:
        """Adds a recipient that the plugins have agreed to. Its repeat is dropped under the name
        that the client gave, and under the one that a plugin gave."""
        assert self.envelope is not None
        recipients = self.envelope.recipients
        named = recipient.mailbox
        recipient = recipient if rewritten is None else recipient.rewritten(rewritten)
        position = self._positions.get(recipient.mailbox)
        if position is None:
            position = len(recipients)
            recipients.append(recipient)
        else:
            recipients[position] = recipients[position].merge(recipient)
        self._positions[named] = self._positions[recipient.mailbox] = position
        self.state = SessionState.RECIPIENTS
        self._replies.append("250 2.1.5 Ok")

    def _data(self, argument: bytes) -> None:
        assert self.envelope is not None
        _require_none(argument)
        if "data" in self._hooks:
            self._ask(HookQuestion("data", self.envelope), self._open_content)
        else:
            self._open_content()

    def _open_content(self, _: str | None = None) -> None:
        assert self.envelope is not None
        self._content = Content(self.greeting.max_message_size, strip_cr=self.client.strips_cr)
        self._unwanted = False
        self._wasted = 0
        self.state = SessionState.CONTENT
        self._replies.append("354 End data with <CR><LF>.<CR><LF>")
        self._events.append(MailStarted(self.envelope))

    def _read_content(self) -> None:
        content = self._content
        assert content is not None
        if content.fault is not None or self._unwanted:
            self._wasted += len(self.input)
        text, rest = content.feed(self.input)
        self.input = rest or b""
        if text:
            self._events.append(DataReceived(text))
        if rest is not None:
            self.lines += 1
            self._content = None
            if content.fault is not None:
                self._reset()
                self._refuse(content.fault.value)
            else:
                self._clear()
                self.state = SessionState.AWAIT_REPLY
                self._events.append(DataComplete(content.header.message_id))
        elif self._wasted > ENDLESS:
            # Reading keeps the client in step, but must end.
            self._refuse_and_close(content.fault.value if content.fault else _NOT_TAKEN)

    def _rset(self, argument: bytes) -> None:
        _require_none(argument)
        if self.state is not SessionState.START:
            self._reset()
        self._replies.append(_OK)

    def _quit(self, argument: bytes) -> None:
        _require_none(argument)
        self.close("221 2.0.0 Bye")

    def _starttls(self, argument: bytes) -> None:
        if not self.greeting.starttls:
            raise Refused("500 5.5.2 Command not recognized")
        if self.state is SessionState.START:
            raise Refused(_NO_HELO)
        if self.tls is not None:
            raise Refused("503 5.5.1 TLS is active already")
        if self.envelope is not None:
            raise Refused("503 5.5.1 STARTTLS is not allowed in a transaction")
        _require_none(argument)
        self.state = SessionState.HANDSHAKE
        self._replies.append("220 2.0.0 Ready to start TLS")
        self._events.append(TlsRequested())

    def _http(self, _argument: bytes) -> None:
        self._refuse_and_close(_NOT_SMTP)


def _require_none(argument: bytes) -> None:
    if argument:
        raise Refused("501 5.5.4 This command takes no argument")


_HTTP_METHODS = b"GET POST PUT HEAD OPTIONS CONNECT DELETE PATCH PRI".split()
_NO_HELO = "503 5.5.1 Send HELO or EHLO first"
_NO_SENDER = "503 5.5.1 Send MAIL first"
_NESTED = "503 5.5.1 A sender was given already"
_NOT_WITHIN = "503 5.5.1 AUTH is not allowed within a transaction"
_AUTH_OFFER = f"250-AUTH {b' '.join(MECHANISMS).decode()}\r\n"
_IDLE = (
    SessionState.START,
    SessionState.READY,
    SessionState.PRE_BANNER,
    SessionState.RESPONSE,
    SessionState.VERIFYING,
)
_WAITING = (SessionState.AWAIT_REPLY, SessionState.VERIFYING, SessionState.ASKING)
COMMANDS: Mapping[bytes, tuple[str | Callable[[SmtpSession, bytes], None], ...]] = {
    #        START     READY         SENDER                           RECIPIENTS
    b"MAIL": (_NO_HELO, SmtpSession._mail, _NESTED, _NESTED),
    b"RCPT": (_NO_HELO, _NO_SENDER, SmtpSession._rcpt, SmtpSession._rcpt),
    b"AUTH": (_NO_HELO, SmtpSession._auth, _NOT_WITHIN, _NOT_WITHIN),
    b"DATA": (_NO_HELO, _NO_SENDER, "554 5.5.1 No valid recipients", SmtpSession._data),
    b"HELO": (SmtpSession._helo,) * 4,
    b"EHLO": (SmtpSession._ehlo,) * 4,
    b"RSET": (SmtpSession._rset,) * 4,
    b"QUIT": (SmtpSession._quit,) * 4,
    b"NOOP": (_OK,) * 4,
    b"STARTTLS": (SmtpSession._starttls,) * 4,
    b"VRFY": ("252 2.1.5 Cannot verify; send some mail and see",) * 4,
    b"HELP": ("214 2.0.0 HELO EHLO AUTH MAIL RCPT DATA RSET NOOP VRFY HELP QUIT",) * 4,
    **dict.fromkeys(_HTTP_METHODS, (SmtpSession._http,) * 4),
}
"""The method of a command in each state, or its reply."""
