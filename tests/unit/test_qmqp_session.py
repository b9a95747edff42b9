"""The QMQP session: what it takes, what it refuses, and what it leaves of a request that breaks
off."""

import itertools
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmqp.netstring import encode
from qmqp.reply import Reply, ReplyParser
from qmqp.request import Request
from qmqpd.session import QmqpSession, RequestState
from reception.envelope import Recipient, Refused
from reception.events import DataComplete, DataReceived, Event, MailStarted, Refusal
from reception.header import MAX_RECEIVED
from reception.policy import ClientPolicy

MAX_SIZE = 5000
MAX_RECIPIENTS = 5
ADDRESSES = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1).filter(
    lambda text: text[0] != "<" and "@" not in text
)


class FullDisk:
    """A policy without room for a message of more than 4,000 octets."""

    def check_rate(self, what: str, sender: str = "", user: str | None = None) -> None:
        """No limits."""

    def check_sender(self, sender: str, size: int) -> None:
        if size > 4000:
            raise Refused("452 4.3.1 Insufficient system storage")

    def check_recipient(self, recipient: Recipient, accepted: int) -> None:
        assert accepted < MAX_RECIPIENTS


class QmqpDialogue:
    """A session, its events and its reply."""

    def __init__(self) -> None:
        policy = cast(ClientPolicy, FullDisk())
        self.session = QmqpSession(policy, "relay.example", MAX_SIZE, MAX_RECIPIENTS)
        self.events: list[Event] = []
        self.wire = b""

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.events += self.session.receive(piece)
            self.wire += self.session.replies()

    def reply(self, text: str) -> Reply | None:
        assert self.session.reply(text) == []
        self.wire += self.session.replies()
        return self.read()

    def read(self) -> Reply | None:
        """The reply as a client reads it; there is never more than one."""
        parser = ReplyParser()
        reply = parser.feed(self.wire)
        assert parser.extra == 0
        return reply

    def text(self) -> bytes:
        return b"".join(event.data for event in self.events if isinstance(event, DataReceived))

    @property
    def complete(self) -> bool:
        return self.session.state is RequestState.AWAIT_REPLY


def wire_of(body: bytes, sender: bytes, *recipients: bytes) -> bytes:
    return encode(encode(body) + encode(sender) + b"".join(map(encode, recipients)))


def pieces(wire: bytes, cuts: list[int]) -> list[bytes]:
    return [wire[a:b] for a, b in itertools.pairwise([0, *sorted(cuts), len(wire)])]


BODY = b"Message-ID: <m@i>\nSubject: x\n\nhello\r there\n"
WIRE = wire_of(BODY, b"a@example.com", b"b@example.org", b"c@example.org")


@pytest.mark.parametrize("cut", range(len(WIRE) + 1))
def test_a_request_cut_anywhere_is_the_same_message(cut: int) -> None:
    dialogue = QmqpDialogue()
    dialogue.send(WIRE[:cut], WIRE[cut:])
    assert dialogue.complete
    assert dialogue.text() == BODY, "a bare CR is data"
    start, *_, end = dialogue.events
    assert isinstance(start, MailStarted)
    envelope = start.envelope
    assert (envelope.sender, envelope.helo, envelope.protocol) == ("a@example.com", "", "QMQP")
    assert [one.address for one in envelope.recipients] == ["b@example.org", "c@example.org"]
    assert envelope.parameters == {b"SIZE": str(len(BODY))}
    assert end == DataComplete("<m@i>")
    assert dialogue.wire == b"", "nothing is said before the message is stored"
    assert dialogue.reply("250 2.0.0 Ok: queued as 0123") == Reply(b"K", b"Ok: queued as 0123")
    assert dialogue.session.closed


@pytest.mark.parametrize("cut", range(len(WIRE)))
def test_a_request_that_breaks_off_is_not_complete(cut: int) -> None:
    dialogue = QmqpDialogue()
    dialogue.send(WIRE[:cut])
    assert not dialogue.complete
    assert not any(isinstance(event, DataComplete) for event in dialogue.events)
    assert dialogue.wire == b""
    dialogue.session.close()
    assert dialogue.session.replies() == b""


@given(
    st.binary(max_size=400),
    st.one_of(st.just(""), ADDRESSES),
    st.lists(ADDRESSES, min_size=1, max_size=MAX_RECIPIENTS, unique=True),
    st.data(),
)
def test_what_the_client_encodes_arrives(
    body: bytes, sender: str, recipients: list[str], data: st.DataObject
) -> None:
    addresses = [f"{local}@example.org" for local in recipients]
    sender = sender and f"{sender}@example.com"
    request = Request(len(body), sender.encode(), [address.encode() for address in addresses])
    wire = request.head + body + request.tail
    dialogue = QmqpDialogue()
    dialogue.send(*pieces(wire, data.draw(st.lists(st.integers(0, len(wire)), max_size=9))))
    if dialogue.session.closed:  # a body of trace fields, or one that looks like them
        assert dialogue.read() == Reply(b"D", b"Too many hops, this mail is looping (#5.4.6)")
        return
    assert dialogue.complete
    assert dialogue.text() == body
    [start] = [event for event in dialogue.events if isinstance(event, MailStarted)]
    assert start.envelope.sender == sender
    assert [one.address for one in start.envelope.recipients] == addresses


MALFORMED = b"5.5.2"


@pytest.mark.parametrize(
    ("wire", "status", "code"),
    [
        # what is no netstring
        (b":0:,0:,3:a@b,,", b"D", MALFORMED),
        (b"012:0:,0:,3:a@b,,", b"D", MALFORMED),
        (b"+12:0:,0:,3:a@b,,", b"D", MALFORMED),
        (b" 12:0:,0:,3:a@b,,", b"D", MALFORMED),
        (b"12 :0:,0:,3:a@b,,", b"D", MALFORMED),
        (b"0xc:0:,0:,3:a@b,,", b"D", MALFORMED),
        (b"GET / HTTP/1.0\r\n\r\n", b"D", MALFORMED),
        (b"EHLO client.example\r\n", b"D", MALFORMED),
        (b"\x16\x03\x01\x02\x00\x01", b"D", MALFORMED),
        (b"12:0:,0:,3:a@b;,", b"D", MALFORMED),
        (b"12:0:,0:,3:a@b,;", b"D", MALFORMED),
        (b"12:00:,0:,3:a@b,", b"D", MALFORMED),
        (b"12:0:;0:,3:a@b,,", b"D", MALFORMED),
        # lengths that do not fit together
        (b"11:0:,0:,3:a@b,,", b"D", MALFORMED),
        (b"13:0:,0:,3:a@b,x,", b"D", MALFORMED),
        (b"3:5:hello,0:,1:r,,", b"D", MALFORMED),
        (b"0:,", b"D", MALFORMED),
        (b"3:0:,,", b"D", MALFORMED),
        # too large, refused when it is announced
        (b"9999999999", b"D", b"5.3.4"),
        (b"6000:5001:", b"D", b"5.3.4"),
        (b"6000:4001:", b"Z", b"4.3.1"),
        (b"2000:0:,1000:", b"D", b"5.1.7"),
        (b"2000:0:,0:,1000:", b"D", b"5.1.3"),
        # the envelope
        (b"6:0:,0:,,", b"D", b"5.5.4"),
        (wire_of(b"", b"", b""), b"D", b"5.1.3"),
        (wire_of(b"", b"", b"a\0b@c"), b"D", b"5.1.3"),
        (wire_of(b"", b"", b"a@b\nc@d"), b"D", b"5.1.3"),
        (wire_of(b"", b"", b"a@b\r"), b"D", b"5.1.3"),
        (wire_of(b"", b"", b"<a@b>"), b"D", b"5.1.3"),
        (wire_of(b"", b"", b"ok@b", b"a\x1b@b"), b"D", b"5.1.3"),
        (wire_of(b"", b"", b"@b"), b"D", b"5.1.3"),
        (wire_of(b"", b"", b"a@"), b"D", b"5.1.3"),
        (wire_of(b"", b"", "ü@b".encode()), b"D", b"5.6.7"),
        (wire_of(b"", b"a\0@b", b"c@d"), b"D", b"5.1.7"),
        (wire_of(b"", "ü@b".encode(), b"c@d"), b"D", b"5.6.7"),
        (wire_of(b"", b"", *[b"%d@b" % n for n in range(6)]), b"D", b"5.5.3"),
        (wire_of(b"Received: x\n" * (MAX_RECEIVED + 1), b"", b"a@b"), b"D", b"5.4.6"),
    ],
)
def test_refusals_and_their_status(wire: bytes, status: bytes, code: bytes) -> None:
    for cut in ([wire], [wire[n : n + 1] for n in range(len(wire))]):
        dialogue = QmqpDialogue()
        dialogue.send(*cut)
        reply = dialogue.read()
        assert reply is not None
        assert (reply.status, reply.text[-len(code) - 3 :]) == (status, b"(#%b)" % code)
        assert dialogue.session.closed
        [refusal] = [event for event in dialogue.events if isinstance(event, Refusal)]
        assert refusal.reply[4:].encode().startswith(code)
        assert refusal is dialogue.events[-1]
        dialogue.send(wire)
        assert dialogue.read() == reply, "what follows changes nothing"


def test_trace_fields_up_to_the_limit_are_no_loop() -> None:
    for body in (b"Received: x\n" * MAX_RECEIVED, b"\n" + b"Received: x\n" * 200):
        dialogue = QmqpDialogue()
        dialogue.send(wire_of(body, b"", b"a@b"))
        assert dialogue.complete


@pytest.mark.parametrize("sender", [b"", b"#@[]", b"list-@host.example-@[]", b"a b@c.example"])
def test_senders_of_qmail_pass_unchanged(sender: bytes) -> None:
    dialogue = QmqpDialogue()
    dialogue.send(wire_of(b"", sender, b"a@b"))
    [start, _] = dialogue.events
    assert isinstance(start, MailStarted)
    assert start.envelope.sender == sender.decode()


def test_names_without_a_domain_get_that_of_this_host() -> None:
    dialogue = QmqpDialogue()
    dialogue.send(wire_of(b"", b"root", b"cron", b"a@b.example.."))
    [start, _] = dialogue.events
    assert isinstance(start, MailStarted)
    assert start.envelope.sender == "root@relay.example"
    assert start.envelope.recipients == [
        Recipient("cron@relay.example", "cron@relay.example", "relay.example"),
        Recipient("a@b.example", "a@b.example", "b.example"),
    ]


def test_a_repeated_recipient_gets_one_copy() -> None:
    dialogue = QmqpDialogue()
    dialogue.send(wire_of(b"", b"", b"a@b", b"A@b", b"a@b.", b"a@B"))
    [start, _] = dialogue.events
    assert isinstance(start, MailStarted)
    assert [one.address for one in start.envelope.recipients] == ["a@b", "A@b"]


@pytest.mark.parametrize(
    ("wire", "unread"),
    [
        (b"6000:5001:" + b"x" * 100, 6000 + 1 - 5 - 100),
        (b"6000:4001:" + b"x" * 100, 0),
        (b"100:0:,0:,1000:", 100 + 1 - 3 - 3 - 5),
        (b"EHLO client.example\r\n", 0),
        (wire_of(b"", b"", b""), 0),
    ],
)
def test_the_rest_of_a_request_is_read_if_its_reply_is_d(wire: bytes, unread: int) -> None:
    dialogue = QmqpDialogue()
    dialogue.send(wire)
    assert dialogue.session.closed
    assert dialogue.session.unread == unread


@pytest.mark.parametrize(
    ("first", "second"), [(b"Zbusy (#4.3.0)", "451 4.3.0 busy"), (b"Dno (#5.7.1)", "554 5.7.1 no")]
)
def test_replies_carry_the_enhanced_code_behind_the_text(first: bytes, second: str) -> None:
    dialogue = QmqpDialogue()
    dialogue.send(WIRE)
    reply = dialogue.reply(second)
    assert reply is not None
    assert reply.status + reply.text == first
