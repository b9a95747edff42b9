"""The targets: each takes any bytes and raises AssertionError if a parser breaks a promise.

The first byte of an input says how the others are cut into packets. A parser must not depend on
that, so most targets read an input twice and compare.
"""

import re
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import cache
from ipaddress import ip_address
from pathlib import Path

from qmqp.netstring import NetstringError, encode
from qmqp.reader import MessageReceived, RequestComplete, RequestReader, RequestStarted
from qmqp.reply import ReplyParser
from qmqp.request import Request, is_sendable
from qmqpd.addresses import parse_recipient as parse_qmqp_recipient
from qmqpd.addresses import parse_sender as parse_qmqp_sender
from qmqpd.session import QmqpSession, RequestState
from reception.authentication import INVALID
from reception.envelope import Envelope, Recipient, Refused
from reception.events import CredentialsReceived, DataComplete, DataReceived, MailStarted
from reception.login import Login
from reception.policy import ClientPolicy, Policy
from reception.proxy_header import BLOCK_LIMIT, BadHeader, HeaderReader
from relay.settings import SmtpdSettings, load
from relay.users import Role, User
from smtpd.addresses import parse_recipient, parse_sender
from smtpd.content import Content, Fault
from smtpd.session import Greeting, SessionState, SmtpSession
from tests.content_model import model

HOST = "relay.example"
MAX_SIZE = 2000
MAX_RECIPIENTS = 100
PASSWORD = "right"  # of every user
_SMTP_REPLY = re.compile(rb"[2-5][0-9]{2}[ -][ -~]*\r\n")
_NOW = datetime.now(UTC)
_REFUSAL = re.compile(r"[45][0-9]{2} [45]\.[0-9]{1,3}\.[0-9]{1,3} [ -~]+")


def packets(data: bytes) -> tuple[bytes, list[bytes]]:
    """The bytes as one packet, and cut as the first byte says."""
    size, rest = 1 + (data[0] if data else 0) % 32, data[1:]
    return rest, [rest[at : at + size] for at in range(0, len(rest), size)]


@cache
def client(*, trusted: bool) -> ClientPolicy:
    """A client with a real policy: of our networks, or a stranger who may send to example.org."""
    settings = load(
        SmtpdSettings,
        spool_dir=Path(tempfile.gettempdir()),
        hostname=HOST,
        client_networks=("127.0.0.1",),
        auth_plaintext_networks=("192.0.2.1",),
        recipient_domains=("example.org",),
        bare_cr="strip",
    )
    return Policy(settings).client("127.0.0.1" if trusted else "192.0.2.1")


def qmqp_reader(data: bytes) -> None:
    """A request reads the same however it is cut, and only if its lengths are exact."""
    whole, cut = packets(data)
    first = _request([whole])
    assert first == _request(cut)
    request, body, fault = first
    if request is not None:
        assert fault is None
        inner = encode(body) + encode(request.sender) + b"".join(map(encode, request.recipients))
        assert whole.startswith(encode(inner))


def _request(pieces: list[bytes]) -> tuple[RequestComplete | None, bytes, type | None]:
    """The request, the message so far unless it fails, and the kind of the fault."""
    reader, body, request, size = RequestReader(MAX_SIZE, 200, 20), b"", None, None
    fed = 0
    for piece in pieces:
        fed += len(piece)
        try:
            for event in reader.feed(piece):
                assert request is None
                match event:
                    case RequestStarted(announced):
                        size = announced
                    case MessageReceived(text):
                        body += text
                    case RequestComplete():
                        request = event
        except NetstringError as error:
            return None, b"", type(error)
        assert reader.missing >= 0
        assert size is None or len(body) <= size <= MAX_SIZE
    assert request is None or len(body) == size
    return request, body, None


def qmqp_session(data: bytes) -> None:
    """A request gets one reply. What is accepted can be sent on as it is."""
    _, cut = packets(data)
    session = QmqpSession(client(trusted=True), HOST, MAX_SIZE, MAX_RECIPIENTS)
    body, envelope, wire, complete = b"", None, b"", False
    for piece in cut:
        for event in session.receive(piece):
            assert not complete
            match event:
                case MailStarted():
                    envelope = event.envelope
                case DataReceived(text):
                    body += text
                case DataComplete():
                    complete = True
        wire += session.replies()
    assert complete is (session.state is RequestState.AWAIT_REPLY)
    if complete:
        assert not wire
        assert envelope is not None
        assert envelope.parameters == {b"SIZE": str(len(body))}
        _check_envelope(envelope)
        session.reply("250 2.0.0 Ok: queued as ID")
        assert session.replies() == b"17:KOk: queued as ID,"
    elif session.closed:
        parser = ReplyParser()
        reply = parser.feed(wire)
        assert reply is not None
        assert reply.status in (b"D", b"Z")
        assert parser.extra == 0
        assert reply.text.isascii()
    else:
        assert not wire


def _check_envelope(envelope: Envelope) -> None:
    addresses = [recipient.address for recipient in envelope.recipients]
    for address in filter(None, [envelope.sender, *addresses]):
        assert re.fullmatch(r"[ -~]+@[ -~]+", address)
    mailboxes = {recipient.mailbox for recipient in envelope.recipients}
    assert 0 < len(mailboxes) == len(addresses) <= 1000
    Request(0, envelope.sender.encode(), [address.encode() for address in addresses])


def smtp_session(data: bytes) -> None:
    """Replies are lines of SMTP; an accepted message has an envelope and no CR; no command runs
    before a verdict; and messages do not depend on how the bytes are cut, if the client waits where
    it must."""
    for trusted in (True, False):
        whole, cut = packets(data)
        messages, replies = _dialogue([whole], trusted=trusted)
        again, other = _dialogue(cut, trusted=trusted)
        # Both depend on how the bytes come: input behind a refused DATA, and what looks like TLS.
        if not re.search(rb"421 4\.5\.0|500 5\.5\.1", replies + other):
            assert messages == again


def _dialogue(pieces: list[bytes], *, trusted: bool) -> tuple[list[tuple[object, bytes]], bytes]:
    session = SmtpSession(Greeting(HOST, MAX_SIZE), client(trusted=trusted))
    session.start()
    messages: list[tuple[object, bytes]] = []
    replies, text, envelope = session.replies(), b"", None
    for piece in pieces:
        events = session.receive(piece)
        while events or session.pause is not None:
            complete, credentials = False, None
            for event in events:
                assert credentials is None
                match event:
                    case MailStarted():
                        text, envelope = b"", event.envelope
                    case DataReceived(more):
                        text += more
                    case DataComplete():
                        complete = True
                    case CredentialsReceived():
                        credentials = event.credentials
            if credentials is not None:
                assert session.state is SessionState.VERIFYING
                assert session.client.login is None
                if credentials.password == PASSWORD:
                    user = User(credentials.name, Role.SENDER, ("*",), None, _NOW, None, None)
                    events = session.authenticated(Login(user))
                else:
                    events = session.authentication_failed(INVALID)
            elif complete:
                assert session.state is SessionState.AWAIT_REPLY
                assert envelope is not None
                assert b"\r" not in text
                _check_envelope(envelope)
                messages.append(((envelope.sender, *envelope.recipients), text))
                events = session.reply("250 2.0.0 Ok: queued as ID")
            else:
                events = session.resume() if session.pause is not None else []
        replies += session.replies()
    assert replies == b"".join(_SMTP_REPLY.findall(replies))
    return messages, replies


def content(data: bytes) -> None:
    """The decoder does what a model does that works line by line, however its input is cut."""
    whole, cut = packets(data)
    for strip_cr in (False, True):
        (text, rest, header), fault = _decoded([whole], strip_cr=strip_cr)
        # Which of several faults is found first depends on how the bytes come.
        assert _decoded(cut, strip_cr=strip_cr)[0] == (text, rest, header)
        expected = model(whole, strip_cr=strip_cr)
        if expected is None:
            assert rest is None
            continue
        assert rest == expected[1]
        if fault is None:
            assert text == expected[0]
        elif fault is Fault.BARE:
            assert expected[0] is None


def _decoded(
    pieces: list[bytes], *, strip_cr: bool
) -> tuple[tuple[bytes | None, bytes | None, object], Fault | None]:
    """Text (None after a fault), rest (None without an end) and what the header says; the fault."""
    decoder = Content(MAX_SIZE, strip_cr=strip_cr)
    text, rest = b"", None
    for piece in pieces:
        if rest is None:
            more, rest = decoder.feed(piece)
            text += more
        else:
            rest += piece
    if rest is None:
        return (b"", None, None), None
    if decoder.fault is not None:
        return (None, rest, None), decoder.fault
    header = (decoder.octets, decoder.header.message_id, decoder.header.received)
    return (text, rest, header), None


def addresses(data: bytes) -> None:
    """A parsed address is one that QMQP can carry, and its path parses to the same again."""
    for trusted in (True, False):
        for sender in _parsed(lambda t=trusted: parse_sender(b"FROM:" + data, HOST, trusted=t)):  # type: ignore[misc]
            _check_address(sender[0])
        for found in _parsed(lambda t=trusted: parse_recipient(b"TO:" + data, HOST, trusted=t)):  # type: ignore[misc]
            _check_address(found.address)
            path = b"TO:<%b>" % found.path.encode()
            again = parse_recipient(path, HOST, trusted=trusted)
            assert again == Recipient(found.address, found.path, found.domain)
    for address in _parsed(lambda: parse_qmqp_sender(data, HOST)):
        _check_address(address)
        assert parse_qmqp_sender(address.encode(), HOST) == address
    for recipient in _parsed(lambda: parse_qmqp_recipient(data, HOST)):
        assert recipient.address
        _check_address(recipient.address)


def _parsed[Result](parse: Callable[[], Result]) -> Iterator[Result]:
    """The result, or none if the address is refused."""
    try:
        yield parse()
    except Refused as refused:
        reply = str(refused)
    else:
        return
    assert _REFUSAL.fullmatch(reply), reply


def _check_address(address: str) -> None:
    if address:
        assert re.fullmatch(r"[ -~]+@[ -~]+", address)
        assert is_sendable(address.encode())


def proxy_header(data: bytes) -> None:
    """A header reads the same however it is cut, names an address or none, and is bounded."""
    whole, cut = packets(data)
    assert _header([whole]) == _header(cut)


def _header(pieces: list[bytes]) -> tuple[str | None, int] | None:
    """The client of a header and the length of the header, or None without a header (yet)."""
    reader, read = HeaderReader(), 0
    for piece in pieces:
        while piece:
            part, piece = piece[: reader.wanted], piece[reader.wanted :]
            read += len(part)
            assert part
            assert read <= 16 + BLOCK_LIMIT
            try:
                header = reader.feed(part)
            except BadHeader:
                return None
            if header is not None:
                if header.source is not None:
                    ip_address(header.source)
                return header.source, read
    return None


TARGETS: dict[str, Callable[[bytes], None]] = {
    function.__name__: function
    for function in (
        qmqp_reader,
        qmqp_session,
        smtp_session,
        content,
        addresses,
        proxy_header,
    )
}
