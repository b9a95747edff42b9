"""AUTH in the session (RFC 4954): where it is offered, its order, its limits, and what a login
changes."""

from base64 import b64encode
from dataclasses import replace

import pytest

from reception.envelope import TlsState
from reception.events import CredentialsReceived, Refusal
from reception.login import Credentials, Login
from smtpd.sasl import RESPONSE_LIMIT
from smtpd.session import AUTH_FAILURES, SessionState
from tests.unit.test_login import ANN
from tests.unit.test_session import DATA, EHLO, MAIL, RCPT, Dialogue, codes

INVALID = "535 5.7.8 Authentication credentials invalid"
RESPONSE = b64encode(b"\0ann\0correct horse")
AUTH = b"AUTH PLAIN " + RESPONSE + b"\r\n"


class AuthDialogue(Dialogue):
    """A dialogue of a client that may log in."""

    def __init__(self, *, tls: bool = True, plaintext: bool = False) -> None:
        super().__init__()
        self.session.tls = TlsState("TLSv1.3", "x") if tls else None
        self.policy.plaintext_auth = plaintext

    @property
    def credentials(self) -> list[Credentials]:
        return [event.credentials for event in self.events_of(CredentialsReceived)]

    def accept(self, login: Login | None = None) -> bytes:
        self.events += self.session.authenticated(login or Login(ANN))
        return self.session.replies()

    def refuse(self, reply: str = INVALID) -> bytes:
        self.events += self.session.authentication_failed(reply)
        return self.session.replies()

    def log_in(self, login: Login | None = None) -> None:
        self.send(EHLO, AUTH)
        assert self.accept(login) == b"235 2.7.0 Authentication successful\r\n"


@pytest.mark.parametrize(
    ("tls", "plaintext", "offered"),
    [(False, False, False), (True, False, True), (False, True, True)],
)
def test_auth_is_offered_only_where_nobody_can_read_the_password(
    tls: bool, plaintext: bool, offered: bool
):
    dialogue = AuthDialogue(tls=tls, plaintext=plaintext)
    assert (b"\r\n250-AUTH PLAIN LOGIN\r\n" in dialogue.send(EHLO)) is offered
    assert codes(dialogue.send(AUTH)) == ([] if offered else [b"538 5.7.11"])
    assert bool(dialogue.credentials) is offered


def test_credentials_wait_for_their_verdict_and_input_for_both():
    dialogue = AuthDialogue()
    assert codes(dialogue.send(EHLO, AUTH + MAIL)) == [b"250 DSN"]
    assert dialogue.credentials == [Credentials("PLAIN", "ann", "correct horse")]
    assert dialogue.send(RCPT) == b""
    assert codes(dialogue.accept()) == [b"235 2.7.0", b"250 2.1.0", b"250 2.1.5"]


def test_a_challenge_is_answered_in_a_line_of_its_own():
    dialogue = AuthDialogue()
    assert dialogue.send(EHLO, b"AUTH PLAIN\r\n").endswith(b"\r\n334 \r\n")
    assert dialogue.send(RESPONSE[:5], RESPONSE[5:] + b"\r") == b""
    assert dialogue.send(b"\n") == b""
    assert len(dialogue.credentials) == 1
    dialogue = AuthDialogue()
    assert dialogue.send(EHLO, b"auth login\r\n").endswith(b"\r\n334 VXNlcm5hbWU6\r\n")
    assert dialogue.send(b"YW5u\r\n") == b"334 UGFzc3dvcmQ6\r\n"
    assert dialogue.send(b64encode(b"correct horse") + b"\r\n") == b""
    assert dialogue.credentials == [Credentials("LOGIN", "ann", "correct horse")]


@pytest.mark.parametrize(
    ("line", "reply"),
    [
        (b"AUTH\r\n", b"501 5.5.4"),
        (b"AUTH PLAIN a b\r\n", b"501 5.5.4"),
        (b"AUTH  PLAIN\r\n", b"334"),
        (b"AUTH CRAM-MD5\r\n", b"504 5.5.4"),
        (b"AUTH PLAIN =\r\n", b"501 5.5.2"),
        (b"AUTH PLAIN !\r\n", b"501 5.5.2"),
        (b"AUTH PLAIN\r\n*\r\n", b"501 5.7.0"),
        (b"AUTH PLAIN\r\n!\r\n", b"501 5.5.2"),
        (b"AUTH PLAIN\r\n" + RESPONSE + b"\n", b"500 5.5.2"),
        (b"AUTH PLAIN " + b"A" * 3000 + b"\r\n", b"500 5.5.2"),
    ],
)
def test_an_exchange_that_is_refused_leaves_the_session_ready(line: bytes, reply: bytes):
    dialogue = AuthDialogue()
    replies = dialogue.send(EHLO, line)
    assert replies.split(b"\r\n")[-2].startswith(reply)
    assert dialogue.credentials == []
    if reply != b"334":
        assert codes(dialogue.send(MAIL)) == [b"250 2.1.0"]


@pytest.mark.parametrize(
    ("before", "reply"),
    [
        (b"", b"503 5.5.1"),
        (b"HELO client.example\r\n", b"503 5.5.1"),
        (EHLO + MAIL, b"503 5.5.1"),
        (EHLO + MAIL + RCPT, b"503 5.5.1"),
    ],
)
def test_auth_has_its_place(before: bytes, reply: bytes):
    dialogue = AuthDialogue()
    assert codes(dialogue.send(before + AUTH))[-1] == reply


def test_auth_is_refused_after_a_success_and_not_offered():
    dialogue = AuthDialogue()
    dialogue.log_in()
    assert codes(dialogue.send(AUTH)) == [b"503 5.5.1"]
    assert b"AUTH" not in dialogue.send(EHLO)
    assert codes(dialogue.send(AUTH)) == [b"503 5.5.1"], "EHLO does not end a login"
    assert codes(dialogue.send(b"RSET\r\n", AUTH)) == [b"250 2.0.0", b"503 5.5.1"]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_response_has_at_most_12288_octets(at_once: bool):
    longest = b"A" * (RESPONSE_LIMIT - 4) + b"==\r\n"
    pieces = [longest] if at_once else [longest[n : n + 1000] for n in range(0, 13000, 1000)]
    dialogue = AuthDialogue()
    dialogue.send(EHLO, b"AUTH PLAIN\r\n")
    assert codes(dialogue.send(*pieces)) == [b"501 5.5.2"], "it is read, and means nothing"
    dialogue.send(b"AUTH PLAIN\r\n")
    assert codes(dialogue.send(*[b"AA" + pieces[0], *pieces[1:]])) == [b"500 5.5.6"]
    assert codes(dialogue.send(MAIL)) == [b"250 2.1.0"], "the rest of the line is no command"


def test_a_response_without_an_end_ends_the_session():
    dialogue = AuthDialogue()
    dialogue.send(EHLO, b"AUTH PLAIN\r\n")
    replies = dialogue.send(*[b"A" * 60_000] * 20)
    assert codes(replies) == [b"500 5.5.6", b"421 4.5.2"]
    assert dialogue.session.closed


def test_the_third_failure_ends_the_session():
    dialogue = AuthDialogue()
    dialogue.send(EHLO)
    for _ in range(AUTH_FAILURES - 1):
        dialogue.send(AUTH)
        assert codes(dialogue.refuse()) == [b"535 5.7.8"]
    dialogue.send(AUTH + MAIL)
    assert codes(dialogue.refuse()) == [b"535 5.7.8", b"421 4.7.0"]
    assert dialogue.session.closed
    assert dialogue.events_of(Refusal) == [Refusal(INVALID)] * AUTH_FAILURES


def test_a_temporary_failure_ends_nothing_and_421_does():
    dialogue = AuthDialogue()
    dialogue.send(EHLO)
    for _ in range(5):
        dialogue.send(AUTH)
        assert codes(dialogue.refuse("454 4.7.0 Later")) == [b"454 4.7.0"]
    dialogue.send(AUTH + MAIL)
    assert codes(dialogue.refuse("421 4.7.0 Too many")) == [b"421 4.7.0"]
    assert dialogue.session.closed


def test_a_failure_after_another_is_right_in_the_end():
    dialogue = AuthDialogue()
    dialogue.send(EHLO, AUTH)
    assert codes(dialogue.refuse()) == [b"535 5.7.8"]
    dialogue.send(AUTH)
    assert codes(dialogue.accept()) == [b"235 2.7.0"]


def test_nobody_sends_without_auth_where_it_is_required():
    dialogue = AuthDialogue()
    dialogue.session.auth_required = True
    assert codes(dialogue.send(EHLO, MAIL, RCPT)) == [b"250 DSN", b"530 5.7.0", b"503 5.5.1"]
    for allowed in (b"NOOP\r\n", b"RSET\r\n", EHLO):
        assert dialogue.send(allowed).startswith(b"250")
    dialogue.log_in()
    assert codes(dialogue.send(MAIL)) == [b"250 2.1.0"]


@pytest.mark.parametrize(
    ("tls", "log_in", "parameter", "protocol"),
    [
        (False, False, b"", "ESMTP"),
        (True, False, b"", "ESMTPS"),
        (False, True, b"", "ESMTPA"),
        (True, True, b"", "ESMTPSA"),
        (True, True, b" SMTPUTF8", "UTF8SMTPSA"),
        (False, False, b" SMTPUTF8", "UTF8SMTP"),
    ],
)
def test_the_protocol_of_the_trace_field(tls: bool, log_in: bool, parameter: bytes, protocol: str):
    dialogue = AuthDialogue(tls=tls, plaintext=True)
    dialogue.send(EHLO)
    if log_in:
        dialogue.log_in()
    dialogue.send(b"MAIL FROM:<a@b>" + parameter + b"\r\n")
    envelope = dialogue.session.envelope
    assert envelope is not None
    assert envelope.protocol == protocol


def test_a_client_that_said_helo_gets_the_keyword_of_helo():
    dialogue = AuthDialogue()
    dialogue.send(b"HELO client.example\r\n", MAIL)
    assert dialogue.session.envelope is not None
    assert dialogue.session.envelope.protocol == "SMTP"


def test_a_login_limits_the_sender_and_is_trusted():
    login = Login(replace(ANN, senders=("*@b",), messages_per_minute=2))
    dialogue = AuthDialogue()
    dialogue.log_in(login)
    assert codes(dialogue.send(b"MAIL FROM:<a@elsewhere>\r\n")) == [b"553 5.7.1"]
    assert codes(dialogue.send(MAIL, b"RSET\r\n", b"MAIL FROM:<>\r\n")) == [
        b"250 2.1.0",
        b"250 2.0.0",
        b"250 2.1.0",
    ]
    assert codes(dialogue.send(b"RSET\r\n", MAIL)) == [b"250 2.0.0", b"451 4.7.1"]
    assert dialogue.session.client.trusted


def test_a_revoked_login_ends_its_session_at_the_next_message():
    login = Login(ANN)
    dialogue = AuthDialogue()
    dialogue.log_in(login)
    assert codes(dialogue.send(MAIL, RCPT)) == [b"250 2.1.0", b"250 2.1.5"]
    login.revoked = True
    assert codes(dialogue.send(DATA, b"x\r\n.\r\n")) == [b"354 End"], "what has begun may end"
    assert codes(dialogue.reply()) == [b"250 2.0.0"]
    assert codes(dialogue.send(MAIL)) == [b"421 4.7.0"]
    assert dialogue.session.closed


@pytest.mark.parametrize(
    ("value", "reply"),
    [
        (b"<>", b"250 2.1.0"),
        (b"ann+40example.org", b"250 2.1.0"),
        (b"ann@example.org", b"250 2.1.0"),
        (b"x+3", b"501 5.5.4"),
        (b"x=y", b"501 5.5.4"),
    ],
)
def test_the_auth_parameter_of_mail_is_read_and_not_trusted(value: bytes, reply: bytes):
    dialogue = AuthDialogue()
    dialogue.send(EHLO)
    assert codes(dialogue.send(b"MAIL FROM:<a@b> AUTH=" + value + b"\r\n")) == [reply]
    assert dialogue.session.client.login is None


def test_the_segments_of_tcp_do_not_matter():
    pieces = EHLO, b"AUTH LOGIN\r\n", b"YW5u\r\n", b64encode(b"correct horse") + b"\r\n", MAIL
    whole = b"".join(pieces)
    expected = AuthDialogue().send(whole)
    for cut in range(1, len(whole)):
        dialogue = AuthDialogue()
        assert dialogue.send(whole[:cut], whole[cut:]) == expected
        assert dialogue.credentials == [Credentials("LOGIN", "ann", "correct horse")]
        assert codes(dialogue.accept()) == [b"235 2.7.0", b"250 2.1.0"]


def test_a_verdict_is_due_only_after_credentials():
    dialogue = AuthDialogue()
    dialogue.send(EHLO, b"AUTH PLAIN\r\n")
    assert dialogue.session.state is SessionState.RESPONSE
    assert dialogue.session.idle, "to close it costs the client nothing"
    with pytest.raises(RuntimeError):
        dialogue.accept()
    with pytest.raises(RuntimeError):
        dialogue.refuse()
