"""Dialogues with the SMTP state machine: its replies and its events."""

import itertools
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reception.envelope import Recipient, Refused
from reception.events import (
    DataComplete,
    DataReceived,
    Event,
    HookQuestion,
    MailStarted,
    Refusal,
    TransactionEnded,
)
from reception.login import Login
from reception.policy import ClientPolicy
from smtpd.session import (
    COMMAND_LIMIT,
    ENDLESS,
    ERROR_LIMIT,
    FREE_COMMANDS,
    FREE_ERRORS,
    LINE_LIMIT,
    TARPIT,
    TURN,
    Greeting,
    SessionState,
    SmtpSession,
)

GREETING = Greeting("relay.example", 1000)


class FakePolicy:
    """Accepts everything but the domain `denied` and a fourth recipient."""

    def __init__(self, *, trusted: bool = False) -> None:
        self.trusted = self.strips_cr = trusted
        self.accepts_all = False
        self.counted: list[tuple[str, str, str | None]] = []
        self.plaintext_auth = False
        self.login: Login | None = None

    def as_user(self, login: Login) -> "FakePolicy":
        policy = FakePolicy(trusted=True)
        policy.login = login
        return policy

    def check_sender(self, sender: str, size: int) -> None:
        assert size <= 1000
        if self.login is not None:
            self.login.begin_message(sender)

    def check_rate(self, what: str, sender: str = "", user: str | None = None) -> None:
        self.counted.append((what, sender, user))

    def check_recipient(self, recipient: Recipient, accepted: int) -> None:
        if recipient.domain == "denied":
            raise Refused("554 5.7.1 Relay access denied")
        if accepted >= 3 and not self.accepts_all:
            raise Refused("452 4.5.3 Too many recipients")


class Dialogue:
    """A session and its events; each call returns the replies to it."""

    def __init__(self, *, start: bool = True, trusted: bool = False) -> None:
        self.policy = FakePolicy(trusted=trusted)
        self.session = SmtpSession(GREETING, cast(ClientPolicy, self.policy))
        self.events: list[Event] = []
        if start:
            self.session.start()
            assert self.session.replies() == b"220 relay.example ESMTP qmqp-relay\r\n"

    def send(self, *pieces: bytes) -> bytes:
        replies = b""
        for piece in pieces:
            self.events += self.session.receive(piece)
            replies += self.session.replies()
        return replies

    def pause(self) -> float | None:
        return self.session.pause

    def resume(self) -> bytes:
        self.events += self.session.resume()
        return self.session.replies()

    def reply(self, reply: str = "250 2.0.0 Ok") -> bytes:
        self.events += self.session.reply(reply)
        return self.session.replies()

    @property
    def waiting(self) -> bool:
        return self.session.state is SessionState.AWAIT_REPLY

    def events_of[Kind](self, kind: type[Kind]) -> list[Kind]:
        return [event for event in self.events if isinstance(event, kind)]

    def text(self) -> bytes:
        return b"".join(event.data for event in self.events_of(DataReceived))


def codes(replies: bytes) -> list[bytes]:
    """The first nine characters hold the code and, where there is one, the enhanced code."""
    lines = replies.split(b"\r\n")
    assert lines.pop() == b""
    return [b" ".join(line.split(b" ")[:2]) for line in lines if line[3:4] == b" "]


EHLO = b"EHLO client.example\r\n"
MAIL = b"MAIL FROM:<a@b>\r\n"
RCPT = b"RCPT TO:<c@d>\r\n"
DATA = b"DATA\r\n"


@pytest.mark.parametrize(
    "steps",
    [
        # C17: order
        [(RCPT, b"503 5.5.1")],
        [
            (MAIL, b"503 5.5.1"),
            (DATA, b"503 5.5.1"),
            (b"HELO x\r\n", b"250 relay.example"),
            (MAIL, b"250 2.1.0"),
        ],
        [(EHLO, b"250 DSN"), (RCPT, b"503 5.5.1"), (DATA, b"503 5.5.1")],
        [
            (EHLO, b"250 DSN"),
            (MAIL, b"250 2.1.0"),
            (MAIL, b"503 5.5.1"),
            (RCPT, b"250 2.1.5"),
            (MAIL, b"503 5.5.1"),
        ],
        [
            (EHLO, b"250 DSN"),
            (MAIL, b"250 2.1.0"),
            (b"RSET\r\n", b"250 2.0.0"),
            (RCPT, b"503 5.5.1"),
        ],
        [
            (EHLO, b"250 DSN"),
            (MAIL, b"250 2.1.0"),
            (RCPT, b"250 2.1.5"),
            (EHLO, b"250 DSN"),
            (DATA, b"503 5.5.1"),
        ],
        # C18: no recipient left
        [
            (EHLO, b"250 DSN"),
            (MAIL, b"250 2.1.0"),
            (b"RCPT TO:<a@denied>\r\n", b"554 5.7.1"),
            (DATA, b"554 5.5.1"),
        ],
        # commands that are valid at any time
        [
            (b"NOOP\r\n", b"250 2.0.0"),
            (b"noop with words\r\n", b"250 2.0.0"),
            (b"RSET\r\n", b"250 2.0.0"),
            (b"VRFY a\r\n", b"252 2.1.5"),
            (b"HELP\r\n", b"214 2.0.0"),
            (b"QUIT\r\n", b"221 2.0.0"),
        ],
        # arguments
        [
            (b"HELO\r\n", b"501 5.5.4"),
            (b"EHLO \r\n", b"501 5.5.4"),
            (b"EHLO a b\r\n", b"501 5.5.4"),
        ],
        [
            (b"HELO \xff\r\n", b"501 5.5.4"),
            (b"EHLO a\tb\r\n", b"501 5.5.4"),
            (b"HELO " + b"x" * 256 + b"\r\n", b"501 5.5.4"),
        ],
        [
            (b"RSET now\r\n", b"501 5.5.4"),
            (b"QUIT now\r\n", b"501 5.5.4"),
            (b"QUIT \r\n", b"221 2.0.0"),
        ],
        [
            (b"EHLO [IPv6:::1]\r\n", b"250 DSN"),
            (b"mail from:<>\r\n", b"250 2.1.0"),
            (b"rcpt to:<C@d>\r\n", b"250 2.1.5"),
        ],
        # C12: SIZE at MAIL
        [
            (EHLO, b"250 DSN"),
            (b"MAIL FROM:<a@b> SIZE=1001\r\n", b"552 5.3.4"),
            (MAIL, b"250 2.1.0"),
        ],
        # C11, C14
        [
            (EHLO, b"250 DSN"),
            (b"MAIL FROM:<a@b> FUTURE8\r\n", b"555 5.5.4"),
            (b"MAIL FROM:a@b\r\n", b"501 5.1.7"),
        ],
        [
            (EHLO, b"250 DSN"),
            ("MAIL FROM:<\xfc@b> SMTPUTF8\r\n".encode(), b"553 5.6.7"),
            (b"MAIL FROM:<a@b> SMTPUTF8 BODY=8BITMIME\r\n", b"250 2.1.0"),
            ("RCPT TO:<\xfc@d>\r\n".encode(), b"553 5.6.7"),
            (RCPT, b"250 2.1.5"),
        ],
        # C27: lines
        [
            (b"\r\n", b"500 5.5.2"),
            (b"FOO\r\n", b"500 5.5.2"),
            (b"MAILFROM:<a@b>\r\n", b"500 5.5.2"),
        ],
        [
            (b"NOOP\n", b"500 5.5.2"),
            (b"\x00\xff\x01\r\n", b"500 5.5.2"),
            (b"NO\rOP\r\n", b"500 5.5.2"),
        ],
    ],
)
def test_C17_C18_dialogues(steps: list[tuple[bytes, bytes]]) -> None:
    dialogue = Dialogue()
    for command, code in steps:
        assert codes(dialogue.send(command)) == [code]


def test_the_extensions() -> None:
    assert Dialogue().send(EHLO) == (
        b"250-relay.example\r\n250-PIPELINING\r\n250-SIZE 1000\r\n250-8BITMIME\r\n"
        b"250-ENHANCEDSTATUSCODES\r\n250-SMTPUTF8\r\n250 DSN\r\n"
    )


def test_a_message_with_its_envelope() -> None:
    dialogue = Dialogue()
    dialogue.send(
        EHLO, b"MAIL FROM:<> BODY=8BITMIME RET=HDRS ENVID=aB\r\n", b"RCPT TO:<c@d> NOTIFY=NEVER\r\n"
    )
    assert dialogue.send(b"RCPT TO:<@x:e@f> ORCPT=rfc822;E@f\r\n", DATA).endswith(
        b"354 End data with <CR><LF>.<CR><LF>\r\n"
    )
    assert not dialogue.session.idle
    assert dialogue.send(b"Message-ID: <m@i>\r\n\r\n..dot\r\n.\r\n") == b""
    assert dialogue.waiting
    [begin] = dialogue.events_of(MailStarted)
    envelope = begin.envelope
    assert (envelope.sender, envelope.helo, envelope.protocol) == ("", "client.example", "ESMTP")
    assert envelope.parameters == {b"BODY": "8BITMIME", b"RET": "HDRS", b"ENVID": "aB"}
    assert envelope.recipients == [
        Recipient("c@d", "c@d", "d", notify="NEVER"),
        Recipient("e@f", "e@f", "f", orcpt="rfc822;E@f"),
    ]
    assert dialogue.text() == b"Message-ID: <m@i>\n\n.dot\n"
    assert dialogue.events[-1] == DataComplete("<m@i>")
    assert dialogue.reply("250 2.0.0 Ok: queued as 1") == b"250 2.0.0 Ok: queued as 1\r\n"
    assert dialogue.session.idle


def test_nobody_sends_mail_without_authentication_where_it_is_required() -> None:
    dialogue = Dialogue(trusted=True)
    dialogue.session.auth_required = True
    assert codes(dialogue.send(EHLO, MAIL, RCPT)) == [b"250 DSN", b"530 5.7.0", b"503 5.5.1"]
    dialogue.session.user = "ann"
    assert codes(dialogue.send(MAIL, RCPT)) == [b"250 2.1.0", b"250 2.1.5"]


def test_helo_is_plain_smtp() -> None:
    dialogue = Dialogue()
    dialogue.send(b"HELO client\r\n", MAIL, RCPT, DATA)
    assert dialogue.events_of(MailStarted)[0].envelope.protocol == "SMTP"


def test_a_message_with_smtputf8_was_received_by_utf8smtp() -> None:
    dialogue = Dialogue()
    dialogue.send(
        EHLO, b"MAIL FROM:<a@b> SMTPUTF8\r\n", RCPT, DATA, "Subject: \xfc\r\n.\r\n".encode()
    )
    dialogue.reply()
    dialogue.send(MAIL, RCPT, DATA)
    assert [begin.envelope.protocol for begin in dialogue.events_of(MailStarted)] == [
        "UTF8SMTP",
        "ESMTP",
    ]
    assert dialogue.text() == "Subject: \xfc\n".encode()


def test_C19_a_pipelined_group_is_answered_in_one_piece() -> None:
    dialogue = Dialogue()
    dialogue.send(EHLO)
    replies = dialogue.send(MAIL + RCPT + b"RCPT TO:<a@denied>\r\n" + b"RCPT TO:<e@f>\r\n" + DATA)
    assert codes(replies) == [b"250 2.1.0", b"250 2.1.5", b"554 5.7.1", b"250 2.1.5", b"354 End"]


def test_C19_commands_behind_a_message_wait_for_its_reply() -> None:
    dialogue = Dialogue()
    dialogue.send(EHLO, MAIL + RCPT + DATA)
    assert dialogue.send(b"x\r\n.\r\n" + MAIL + RCPT) == b""
    assert dialogue.send(DATA) == b""
    assert len(dialogue.session.input) == len(MAIL + RCPT + DATA)
    assert codes(dialogue.reply("451 4.3.0 Later")) == [
        b"451 4.3.0",
        b"250 2.1.0",
        b"250 2.1.5",
        b"354 End",
    ]
    assert dialogue.send(b"y\r\n.\r\nQUIT\r\n") == b""
    assert dialogue.session.quit_pending
    assert codes(dialogue.reply()) == [b"250 2.0.0", b"221 2.0.0"]
    assert dialogue.session.closed
    assert [type(event) for event in dialogue.events] == [
        MailStarted,
        DataReceived,
        DataComplete,
        MailStarted,
        DataReceived,
        DataComplete,
    ]


def test_C19_the_session_refuses_input_before_the_banner() -> None:
    dialogue = Dialogue(start=False)
    assert codes(dialogue.send(EHLO + MAIL)) == [b"554 5.5.0"]
    assert dialogue.session.closed
    assert dialogue.send(b"NOOP\r\n") == b""


def test_C19_input_behind_a_refused_data_is_not_run() -> None:
    dialogue = Dialogue()
    dialogue.send(EHLO, MAIL)
    replies = dialogue.send(DATA + b"RCPT TO:<c@d>\r\n.\r\n")
    assert codes(replies) == [b"554 5.5.1", b"421 4.5.0"]
    assert dialogue.session.closed


@pytest.mark.parametrize(
    "data",
    [
        b"DATA\n",
        b"data \n",
        b"DATA now\r\n",
        b"DATA\t\r\n",
        b"DATA\r\r\n",
        b" DATA\r\n",
        b"DATA " + b" " * LINE_LIMIT + b"\r\n",
    ],
)
def test_content_behind_any_refused_data_is_not_run(data: bytes) -> None:
    dialogue = Dialogue()
    dialogue.send(EHLO, MAIL, RCPT)
    assert codes(dialogue.send(data + b"RSET\r\n" + MAIL))[1:] == [b"421 4.5.0"]
    assert dialogue.session.closed
    assert not dialogue.events_of(MailStarted)


def test_a_client_that_waits_for_the_reply_to_data_may_continue() -> None:
    dialogue = Dialogue()
    dialogue.send(EHLO, MAIL, RCPT)
    assert codes(dialogue.send(b"DATA\n", DATA)) == [b"500 5.5.2", b"354 End"]


@pytest.mark.parametrize("before", [b"", EHLO, EHLO + MAIL, EHLO + MAIL + RCPT])
@pytest.mark.parametrize("bdat", [b"BDAT 29 LAST\r\n", b"bdat 29\n", b"BDAT\r\n"])
@pytest.mark.parametrize("together", [True, False])
def test_bdat_closes_the_session_and_its_content_is_not_run(
    before: bytes, bdat: bytes, together: bool
) -> None:
    dialogue = Dialogue()
    dialogue.send(before)
    content = b"MAIL FROM:<x@y>\r\nRCPT TO:<a@b>\r\n"
    replies = dialogue.send(bdat + content) if together else dialogue.send(bdat, content)
    assert codes(replies) == [b"500 5.5.2", b"421 4.5.0"]
    assert dialogue.session.closed


def test_a_reply_that_is_not_due_raises() -> None:
    with pytest.raises(RuntimeError):
        Dialogue().reply()


@given(st.lists(st.integers(1, 200), max_size=8))
def test_C19_the_segments_of_tcp_do_not_matter(places: list[int]) -> None:
    wire = EHLO + MAIL + b"RCPT TO:<bad>\r\n" + RCPT + DATA + b"S: x\r\n\r\n..\r\n.\r\n"
    edges = [0, *sorted({min(place, len(wire)) for place in places}), len(wire)]
    dialogue = Dialogue()
    replies = dialogue.send(*(wire[a:b] for a, b in itertools.pairwise(edges)))
    assert codes(replies) == [b"250 DSN", b"250 2.1.0", b"501 5.1.3", b"250 2.1.5", b"354 End"]
    assert dialogue.text() == b"S: x\n\n.\n"
    assert dialogue.waiting


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"a\nb\r\n", b"550 5.6.11"),
        (b"a\rb\r\n", b"550 5.6.11"),
        (b"x" * 999 + b"\r\n", b"552 5.3.4"),
    ],
)
def test_C2_C12_rejected_content_is_read_to_its_end(content: bytes, code: bytes) -> None:
    dialogue = Dialogue()
    dialogue.send(EHLO, MAIL + RCPT + DATA)
    replies = dialogue.send(*(bytes([byte]) for byte in content + b".\r\nNOOP\r\n"))
    assert codes(replies) == [code, b"250 2.0.0"]
    assert [event.reply.startswith(code.decode()) for event in dialogue.events_of(Refusal)] == [
        True
    ]
    assert not dialogue.events_of(DataComplete)
    assert codes(dialogue.send(MAIL)) == [b"250 2.1.0"]


def test_bare_crs_are_stripped_by_policy() -> None:
    dialogue = Dialogue(trusted=True)
    dialogue.send(EHLO, MAIL + RCPT + DATA, b"a\r\r\n.\r\r\nb\r\n.\r\n")
    assert dialogue.waiting
    assert dialogue.text() == b"a\n\nb\n"


def test_C29_a_loop_is_refused() -> None:
    dialogue = Dialogue()
    dialogue.session.greeting = Greeting("relay.example", 1 << 20)
    dialogue.send(EHLO, MAIL + RCPT + DATA)
    assert codes(dialogue.send(b"Received: x\r\n" * 101 + b"\r\n.\r\n")) == [b"554 5.4.6"]


def test_C16_past_the_recipient_limit_452_without_being_an_error() -> None:
    dialogue = Dialogue()
    dialogue.send(EHLO, MAIL, RCPT, b"RCPT TO:<e@d>\r\nRCPT TO:<f@d>\r\n")
    assert codes(dialogue.send(b"RCPT TO:<g@d>\r\n" * TURN)) == [b"452 4.5.3"] * TURN
    assert len(dialogue.events_of(Refusal)) == 1
    assert codes(dialogue.send(DATA)) == [b"354 End"]
    assert len(dialogue.events_of(MailStarted)[0].envelope.recipients) == 3


def test_a_repeated_recipient_counts_once() -> None:
    dialogue = Dialogue(trusted=True)
    dialogue.send(EHLO, MAIL)
    repeats = [b"c@d", b"c@D", b'"c"@d', b'"\\c"@d.', b"@relay:c@d"]
    for path in repeats * 200:
        assert codes(dialogue.send(b"RCPT TO:<%b>\r\n" % path)) == [b"250 2.1.5"]
    assert codes(
        dialogue.send(b"RCPT TO:<C@d>\r\nRCPT TO:<c@d.e>\r\n", RCPT, b"RCPT TO:<c@e>\r\n")
    ) == [
        *[b"250 2.1.5"] * 3,
        b"452 4.5.3",
    ]
    dialogue.send(DATA, b".\r\n")
    [begin] = dialogue.events_of(MailStarted)
    assert [one.address for one in begin.envelope.recipients] == ["c@d", "C@d", "c@d.e"]
    dialogue.reply()
    dialogue.send(MAIL + RCPT + DATA)
    assert [one.address for one in dialogue.events_of(MailStarted)[1].envelope.recipients] == [
        "c@d"
    ]


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        (b"", b"", None),
        (b" NOTIFY=NEVER", b" NOTIFY=NEVER", "NEVER"),
        (b" NOTIFY=NEVER", b" NOTIFY=FAILURE", "FAILURE"),
        (b" NOTIFY=SUCCESS", b" NOTIFY=NEVER", "SUCCESS"),
        (b" NOTIFY=NEVER", b"", "DELAY,FAILURE"),
        (b"", b" NOTIFY=SUCCESS", "DELAY,FAILURE,SUCCESS"),
    ],
)
def test_a_repeated_recipient_keeps_every_requested_dsn(
    first: bytes, second: bytes, both: str | None
) -> None:
    dialogue = Dialogue()
    orcpt = b" ORCPT=rfc822;x@y"
    dialogue.send(
        EHLO, MAIL, b"RCPT TO:<c@d>%b\r\nRCPT TO:<c@d>%b%b\r\n" % (first, second, orcpt), DATA
    )
    [begin] = dialogue.events_of(MailStarted)
    assert begin.envelope.recipients == [Recipient("c@d", "c@d", "d", both, "rfc822;x@y")]


@pytest.mark.parametrize("hello", [b"HELO x\r\n", EHLO])
def test_C27_the_length_of_a_line(hello: bytes) -> None:
    dialogue, limit = Dialogue(), LINE_LIMIT
    dialogue.send(hello)
    fits = b"NOOP " + b"x" * (limit - 7) + b"\r\n"
    assert codes(dialogue.send(fits)) == [b"250 2.0.0"]
    assert codes(dialogue.send(b"x" + fits)) == [b"500 5.5.2"]
    # Without an end it is refused as soon as it is too long, once, and none of it is kept.
    assert codes(dialogue.send(b"NOOP " + b"x" * limit)) == [b"500 5.5.2"]
    assert dialogue.send(*([b"x" * limit] * 50)) == b""
    assert len(dialogue.session.input) <= limit
    assert codes(dialogue.send(b"end\r\nNOOP\r\n")) == [b"250 2.0.0"]


@pytest.mark.parametrize("hello", [b"HELO x\r\n", EHLO])
def test_the_longest_address_fits_a_line(hello: bytes) -> None:
    dialogue = Dialogue()
    path = b'"' + b"\\l" * 989 + b'"@b.example'
    assert codes(
        dialogue.send(hello + b"MAIL FROM:<" + path + b">\r\nRCPT TO:<" + path + b">\r\n")
    )[1:] == [
        b"250 2.1.0",
        b"250 2.1.5",
    ]


def test_trusted_clients_may_omit_the_domain() -> None:
    assert codes(Dialogue().send(EHLO, b"MAIL FROM:<root>\r\n"))[1:] == [b"501 5.1.7"]
    dialogue = Dialogue(trusted=True)
    assert (
        codes(dialogue.send(EHLO, b"MAIL FROM:<root>\r\n", b"RCPT TO:<cron>\r\n", DATA))[-1]
        == b"354 End"
    )
    [begin] = dialogue.events_of(MailStarted)
    assert begin.envelope.sender == "root@relay.example"
    assert begin.envelope.recipients == [
        Recipient("cron@relay.example", "cron@relay.example", "relay.example")
    ]


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST / HTTP/1.0\r\n\r\nMAIL",
    ],
)
def test_C27_tls_and_http_close_the_session(garbage: bytes) -> None:
    dialogue = Dialogue()
    assert codes(dialogue.send(garbage)) == [b"500 5.5.1"]
    assert dialogue.session.closed


def test_C27_too_many_errors() -> None:
    dialogue = Dialogue(trusted=True)
    replies = dialogue.send(b"\x00\x01\r\n" * 1000)
    assert codes(replies) == [b"500 5.5.2"] * ERROR_LIMIT + [b"421 4.7.0"]
    assert dialogue.session.closed


def test_an_accepted_message_resets_the_error_count() -> None:
    dialogue = Dialogue(trusted=True)
    dialogue.send(EHLO)
    for _ in range(3):
        dialogue.send(b"FOO\r\n" * (ERROR_LIMIT - 1), MAIL + RCPT + DATA, b".\r\n")
        dialogue.reply()
    assert not dialogue.session.closed
    dialogue.send(b"FOO\r\n" * (ERROR_LIMIT - 1), MAIL + RCPT + DATA, b".\r\n")
    dialogue.reply("451 4.3.0 Later")
    assert codes(dialogue.send(b"FOO\r\n")) == [b"500 5.5.2", b"421 4.7.0"]


@pytest.mark.parametrize("trusted", [False, True])
def test_errors_of_an_untrusted_client_are_tarpitted(trusted: bool) -> None:
    dialogue = Dialogue(trusted=trusted)
    pauses = []
    while not dialogue.session.closed:
        dialogue.send(b"FOO\r\n")
        pauses.append(dialogue.pause())
        if dialogue.pause() is not None:
            assert dialogue.send(b"NOOP\r\n") == b"", "input waits"
            dialogue.resume()
    slow = 0 if trusted else ERROR_LIMIT - FREE_ERRORS - 1
    assert pauses == [None] * FREE_ERRORS + [None if trusted else TARPIT] * (
        ERROR_LIMIT - FREE_ERRORS - 1
    ) + [None]
    assert pauses.count(TARPIT) == slow


def test_temporary_refusals_are_not_tarpitted() -> None:
    dialogue = Dialogue()
    dialogue.send(EHLO, MAIL, *(b"RCPT TO:<c%d@d>\r\n" % n for n in range(3 + 2 * ERROR_LIMIT)))
    assert dialogue.pause() is None


def test_messages_and_recipients_are_counted_with_sender_and_user() -> None:
    dialogue = Dialogue()
    dialogue.session.user = "ann"
    dialogue.send(EHLO, MAIL, RCPT, RCPT, b"RCPT TO:<x@denied>\r\n", b"RCPT TO:<e@d>\r\n")
    sent = ("a@b", "ann")
    what = [count for count, *subjects in dialogue.policy.counted if tuple(subjects) == sent]
    assert what == ["messages", "recipients", "recipients"]


def test_a_health_check_is_not_refused() -> None:
    dialogue = Dialogue()
    assert codes(dialogue.send(b"QUIT\r\n")) == [b"221 2.0.0"]
    assert dialogue.session.closed
    assert dialogue.events == []


def test_input_behind_quit_is_not_read() -> None:
    dialogue = Dialogue()
    assert codes(dialogue.send(b"QUIT\r\nNOOP\r\n", b"NOOP\r\n")) == [b"221 2.0.0"]


@given(
    st.lists(
        st.sampled_from(
            [EHLO, MAIL, RCPT, DATA, b"RSET\r\n", b"x\r\n", b".\r\n", b"\n", b"\xff", b"RCPT TO:<"]
        )
    )
)
def test_every_reply_but_hello_and_354_has_an_enhanced_code(pieces: list[bytes]) -> None:
    dialogue = Dialogue()
    for piece in pieces:
        for line in dialogue.send(piece).split(b"\r\n")[:-1]:
            plain = line[:3] == b"354" or (piece == EHLO and line[:3] == b"250")
            assert plain or line[4:6] == line[:1] + b"."
        if dialogue.waiting:
            dialogue.reply()


NOOP = b"NOOP\r\n"


def test_a_turn_runs_a_limited_number_of_commands() -> None:
    dialogue = Dialogue(trusted=True)
    assert codes(dialogue.send(NOOP * (2 * TURN + 1))) == [b"250 2.0.0"] * TURN
    assert dialogue.pause() == 0.0
    assert dialogue.send(NOOP) == b"", "input waits for the next turn"
    assert len(dialogue.session.input) == (TURN + 2) * len(NOOP)
    assert codes(dialogue.resume()) == [b"250 2.0.0"] * TURN
    assert codes(dialogue.resume()) == [b"250 2.0.0"] * 2
    assert dialogue.pause() is None
    assert dialogue.send(NOOP * TURN)
    assert dialogue.pause() is None, "a turn that has run all the input needs no other turn"


def test_a_turn_may_end_anywhere_in_a_transaction() -> None:
    dialogue = Dialogue()
    replies = dialogue.send(EHLO + NOOP * (TURN - 3) + MAIL + RCPT + DATA + b"x\r\n.\r\nQUIT\r\n")
    assert codes(replies)[-2:] == [b"250 2.1.0", b"250 2.1.5"]
    assert dialogue.session.quit_pending, "the client has finished, and may have closed its half"
    assert codes(dialogue.resume()) == [b"354 End"]
    assert dialogue.text() == b"x\n"
    assert codes(dialogue.reply()) == [b"250 2.0.0", b"221 2.0.0"]


def test_no_command_runs_while_replies_are_not_read() -> None:
    dialogue = Dialogue()
    dialogue.session.halted = True
    assert dialogue.send(EHLO, NOOP) == b""
    assert dialogue.resume() == b""
    dialogue.session.halted = False
    assert codes(dialogue.resume()) == [b"250 DSN", b"250 2.0.0"]


def test_no_command_runs_after_a_reply_that_is_not_read() -> None:
    dialogue = Dialogue()
    dialogue.send(EHLO, MAIL + RCPT + DATA + b"x\r\n.\r\n" + NOOP * 5)
    dialogue.session.halted = True
    assert codes(dialogue.reply()) == [b"250 2.0.0"]
    dialogue.session.halted = False
    assert codes(dialogue.resume()) == [b"250 2.0.0"] * 5


@pytest.mark.parametrize("command", [NOOP, b"RSET\r\n", EHLO, b"VRFY a\r\n"])
def test_commands_without_a_message_are_tarpitted_and_then_close_the_session(
    command: bytes,
) -> None:
    dialogue = Dialogue(trusted=False)
    for _ in range(FREE_COMMANDS):
        dialogue.send(command)
        assert dialogue.pause() is None
    for _ in range(COMMAND_LIMIT - FREE_COMMANDS):
        assert codes(dialogue.send(command))[0][:1] == b"2"
        assert dialogue.pause() == TARPIT
        assert dialogue.send(command * 3) == b""
        dialogue.session.input = b""
        assert dialogue.resume() == b""
    assert codes(dialogue.send(command))[-1] == b"421 4.7.0"
    assert dialogue.session.closed
    assert len(dialogue.events_of(Refusal)) == 1


def test_pipelined_commands_are_tarpitted_too() -> None:
    dialogue = Dialogue(trusted=False)
    dialogue.send(NOOP * (FREE_COMMANDS + 10))
    while dialogue.pause() == 0.0:
        dialogue.resume()
    assert dialogue.pause() == TARPIT
    for left in range(9, 0, -1):
        assert len(dialogue.session.input) == left * len(NOOP)
        assert codes(dialogue.resume()) == [b"250 2.0.0"], "one command a second"


def test_commands_of_a_trusted_client_are_not_tarpitted() -> None:
    dialogue = Dialogue(trusted=True)
    for _ in range(3 * COMMAND_LIMIT):
        assert codes(dialogue.send(NOOP)) == [b"250 2.0.0"]
        assert dialogue.pause() is None


def test_only_an_accepted_message_resets_the_command_count() -> None:
    dialogue = Dialogue(trusted=False)
    for reply in ("250 2.0.0 Ok", "250 2.0.0 Ok", "451 4.3.0 Later"):
        for _ in range(FREE_COMMANDS - 4):
            dialogue.send(NOOP)
        dialogue.send(EHLO, MAIL, RCPT, DATA)
        assert dialogue.pause() is None
        dialogue.send(b".\r\n")
        dialogue.reply(reply)
    dialogue.send(NOOP)
    assert dialogue.pause() == TARPIT, "a message that was not accepted does not"


def test_recipients_of_the_open_transaction_do_not_count() -> None:
    dialogue = Dialogue(trusted=False)
    dialogue.policy.accepts_all = True
    dialogue.send(EHLO, MAIL)
    for number in range(1000):
        assert codes(dialogue.send(b"RCPT TO:<c%d@d>\r\n" % number)) == [b"250 2.1.5"]
        assert dialogue.pause() is None
    assert codes(dialogue.send(b"RSET\r\n")) == [b"250 2.0.0", b"421 4.7.0"], (
        "without a message they are"
    )


def test_C27_a_line_without_an_end_ends_the_session() -> None:
    dialogue = Dialogue()
    assert codes(dialogue.send(b"x" * 4096)) == [b"500 5.5.2"]
    assert dialogue.send(*[b"x" * 4096] * (ENDLESS // 4096 - 1)) == b""
    assert codes(dialogue.send(b"x")) == [b"421 4.5.2"]
    assert dialogue.session.closed


@pytest.mark.parametrize(
    ("content", "reply"),
    [
        (b"bare\n", "550 5.6.11 Message contains a bare CR or LF"),
        (b"x" * 1001, "552 5.3.4 Message exceeds the size limit"),
        (b"", "421 4.3.0 Message cannot be taken, closing connection"),
    ],
)
def test_content_that_is_not_stored_must_end(content: bytes, reply: str) -> None:
    dialogue = Dialogue()
    dialogue.session.greeting = Greeting("relay.example", 1000 if content else 1 << 30)
    dialogue.send(EHLO, MAIL + RCPT + DATA, content)
    if not content:
        dialogue.session.refuse_content()
    assert dialogue.send(*[b"x" * 4096] * (ENDLESS // 4096)) == b""
    assert dialogue.send(b"x") == f"{reply}\r\n".encode()
    assert dialogue.session.closed
    assert dialogue.events_of(Refusal)[-1].reply == reply


# Questions to plugins

ASKED = ("helo", "mail", "rcpt", "data", "reset_transaction")


def asked_dialogue() -> Dialogue:
    talk = Dialogue(trusted=True)
    talk.session = SmtpSession(GREETING, cast(ClientPolicy, talk.policy), hooks=ASKED)
    talk.session.start()
    talk.session.replies()
    return talk


def answered(talk: Dialogue, rewritten: str | None = None) -> bytes:
    talk.events += talk.session.hook_agreed(rewritten)
    return talk.session.replies()


def test_a_command_waits_for_the_plugins_and_holds_what_follows():
    talk = asked_dialogue()
    assert talk.send(EHLO + MAIL + RCPT + b"DATA\r\n") == b""
    questions = [(HookQuestion("helo", None, "client.example"))]
    assert talk.events == questions
    assert answered(talk).startswith(b"250-relay.example")
    assert answered(talk) == b"250 2.1.0 Ok\r\n"
    assert answered(talk) == b"250 2.1.5 Ok\r\n"
    assert answered(talk).startswith(b"354")
    assert [event.hook for event in talk.events_of(HookQuestion)] == list(ASKED[:4])
    assert [event.subject for event in talk.events_of(HookQuestion)] == [
        "client.example",
        "a@b",
        "c@d",
        "",
    ]
    talk.send(b"hi\r\n.\r\n")
    assert talk.waiting
    assert talk.events_of(TransactionEnded) == [], "the message ends it, not the content"


def test_a_refusal_of_the_plugins_leaves_the_state_as_it_was():
    talk = asked_dialogue()
    talk.send(EHLO)
    answered(talk)
    talk.send(MAIL)
    talk.events += talk.session.hook_refused("550 5.7.1 no")
    assert talk.session.replies() == b"550 5.7.1 no\r\n"
    assert talk.session.state is SessionState.READY
    talk.send(MAIL)
    answered(talk)
    talk.send(RCPT)
    talk.events += talk.session.hook_refused("450 4.7.1 wait")
    assert talk.session.replies() == b"450 4.7.1 wait\r\n"
    assert codes(talk.send(b"DATA\r\n")) == [b"554 5.5.1"]
    talk.send(RCPT)
    answered(talk, "new@example.org")
    assert talk.session.envelope is not None
    assert [one.address for one in talk.session.envelope.recipients] == ["new@example.org"]
    assert talk.send(b"RCPT TO:<c@d>\r\n") == b"250 2.1.5 Ok\r\n", "a repeat of what was rewritten"
    talk.send(b"RSET\r\n")
    assert len(talk.events_of(TransactionEnded)) == 1


def test_a_plugin_may_end_the_session():
    talk = asked_dialogue()
    talk.send(EHLO + b"NOOP\r\n")
    talk.events += talk.session.hook_refused("550 5.7.1 no", closes=True)
    assert talk.session.replies() == b"550 5.7.1 no\r\n"
    assert talk.session.closed


def test_no_answer_of_the_plugins_is_taken_that_is_not_due():
    talk = asked_dialogue()
    with pytest.raises(RuntimeError, match="no answer of the plugins is due"):
        talk.session.hook_agreed()
    with pytest.raises(RuntimeError, match="no answer of the plugins is due"):
        talk.session.hook_refused("550 5.7.1 no")


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("a.b@example.org", "a.b@example.org"),
        ("a..b@example.org", '"a..b"@example.org'),
        ('a"\\b@example.org', '"a\\"\\\\b"@example.org'),
        ("a@b@example.org", '"a@b"@example.org'),
    ],
)
def test_a_rewritten_recipient_is_quoted_where_smtp_wants_it(address: str, path: str):
    recipient = Recipient("x@y", "x@y", "y", notify="NEVER").rewritten(address)
    assert (recipient.address, recipient.path) == (address, path)
    assert (recipient.domain, recipient.notify) == ("example.org", "NEVER")
