"""Requests and replies as bytes: golden vectors, both parsers, and each side against the other."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmqp.netstring import FormatError, NetstringError, SizeError, encode, length_of
from qmqp.reader import (
    MessageReceived,
    RequestComplete,
    RequestReader,
    RequestStarted,
    TooManyRecipients,
)
from qmqp.reply import KEPT_TEXT, MalformedReply, Reply, ReplyParser
from qmqp.request import MAX_ADDRESS, Request

NO_SUCH_ADDRESS = b"sorry, I can't accept addresses like that (#5.1.3)"
ADDRESSES = st.binary(min_size=1, max_size=60).filter(
    lambda a: not set(a) & set(b"\0\r\n") and a[:1] != b"<"
)


def wire_of(body: bytes, sender: bytes, *recipients: bytes) -> bytes:
    request = Request(len(body), sender, recipients)
    wire = request.head + body + request.tail
    assert request.length == len(wire)
    return wire


def pieces(wire: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cuts), len(wire)]
    return [wire[a:b] for a, b in itertools.pairwise(edges)]


class Reading:
    """A request that is being read, and what its events have said so far."""

    def __init__(self, **limits: int) -> None:
        self.reader = RequestReader(**limits)
        self.size: int | None = None
        self.body = b""
        self.request: RequestComplete | None = None

    def feed(self, *data: bytes) -> bool:
        """Whether the request is complete."""
        for piece in data:
            for event in self.reader.feed(piece):
                assert self.request is None, "nothing follows the end of a request"
                match event:
                    case RequestStarted(size):
                        self.size = size
                    case MessageReceived(text):
                        assert self.size is not None
                        self.body += text
                    case RequestComplete():
                        self.request = event
        assert self.reader.complete is (self.request is not None)
        return self.reader.complete

    @property
    def recipients(self) -> tuple[bytes, ...]:
        assert self.request is not None
        return self.request.recipients


@pytest.mark.parametrize(
    ("body", "envelope", "wire"),
    [
        (b"", [b"", b"a@b"], b"12:0:,0:,3:a@b,,"),
        (
            b"test\n",
            [b"a@example.com", b"b@example.com"],
            b"42:5:test\n,13:a@example.com,13:b@example.com,,",
        ),
        (b"From: <s@\n", [b"s@x.test", b"r@y.test"], b"36:10:From: <s@\n,8:s@x.test,8:r@y.test,,"),
    ],
)
def test_golden_requests(body, envelope, wire):
    assert wire_of(body, *envelope) == wire


def test_the_same_bytes_as_postfix_qmqp_source():
    body = b"x" * 300
    wire = wire_of(body, b"s@x.test", b"0r@y.test", b"1r@y.test", b"2r@y.test")
    assert wire == b"352:300:" + body + b",8:s@x.test,9:0r@y.test,9:1r@y.test,9:2r@y.test,,"


@pytest.mark.parametrize("size", [0, 1, 9, 10, 99, 100, 999, 1000, 9999, 10_000, 99_999, 100_000])
def test_the_outer_length_is_exact_where_digits_change(size):
    for padding in range(1, 12):
        request = Request(size, b"s", [b"r" * padding])
        inner = encode(b"x" * size) + encode(b"s") + encode(b"r" * padding)
        assert request.head + b"x" * size + request.tail == encode(inner)
        assert request.length == length_of(len(inner))


def test_B27_no_recipients():
    with pytest.raises(ValueError, match="needs a recipient"):
        Request(1, b"s@x", [])


def test_B28_the_null_sender():
    assert Request(0, b"", [b"r@y"]).tail == b",0:,3:r@y,,"


@pytest.mark.parametrize(
    "address", [b"a\0b@c", b"a\nb@c", b"a\rb@c", b"<a@b>", b"a" * (MAX_ADDRESS + 1), b"a@b\n"]
)
def test_B29_addresses_that_a_server_would_misread(address):
    with pytest.raises(ValueError, match="trusted with the sender"):
        Request(1, address, [b"r@y"])
    with pytest.raises(ValueError, match="trusted with the recipient"):
        Request(1, b"s@x", [b"r@y", address])


def test_B29_an_empty_recipient():
    with pytest.raises(ValueError, match="trusted with the recipient"):
        Request(1, b"s@x", [b""])


def test_B29_the_longest_address_that_every_server_takes():
    assert encode(b"a" * MAX_ADDRESS) in Request(1, b"s@x", [b"a" * MAX_ADDRESS]).tail


def test_an_address_is_bytes_without_quoting():
    assert b',8:\xff a"@c.d,' in Request(1, b"", [b'\xff a"@c.d']).tail


def test_a_negative_size():
    with pytest.raises(ValueError, match="-1 bytes"):
        Request(-1, b"s@x", [b"r@y"])


@pytest.mark.parametrize("count", [1, 2, 1000, 100_000])
def test_B30_any_number_of_recipients(count):
    recipients = [b"%d@example.org" % number for number in range(count)]
    reading = Reading()
    assert reading.feed(wire_of(b"hello", b"s@x", *recipients))
    assert reading.recipients == tuple(recipients)


def test_B31_duplicate_recipients_are_sent_unchanged():
    reading = Reading()
    assert reading.feed(wire_of(b"hello", b"s@x", *[b"r@y"] * 10_000))
    assert len(reading.recipients) == 10_000


def test_B33_a_message_of_more_than_4_gib_has_an_exact_length():
    size = 5 * 2**30
    request = Request(size, b"s@x", [b"r@y"])
    assert request.head == b"%d:%d:" % (length_of(size) + 12, size)
    assert request.length == length_of(length_of(size) + 12)


# The request as a strict server reads it


@given(
    st.binary(max_size=2000),
    st.one_of(st.just(b""), ADDRESSES),
    st.lists(ADDRESSES, min_size=1, max_size=6),
    st.data(),
)
def test_a_request_cut_in_any_way_reads_the_same(body, sender, recipients, data):
    wire = wire_of(body, sender, *recipients)
    cuts = data.draw(st.lists(st.integers(0, len(wire)), max_size=25))
    reading = Reading()
    assert reading.feed(*pieces(wire, cuts))
    assert reading.request == RequestComplete(sender, tuple(recipients))
    assert (reading.size, reading.body) == (len(body), body)


def test_a_request_byte_by_byte():
    wire = wire_of(b"hello\n", b"s@x", b"r@y", b"q@z")
    reading = Reading()
    whole = [reading.feed(wire[index : index + 1]) for index in range(len(wire))]
    assert whole == [False] * (len(wire) - 1) + [True]
    assert reading.body == b"hello\n"


def test_bytes_after_a_request_change_nothing():
    reading = Reading()
    assert reading.feed(wire_of(b"hello", b"", b"r@y") + b"12:", b"more")
    assert (reading.body, reading.recipients) == (b"hello", (b"r@y",))


@pytest.mark.parametrize(
    "wire",
    [
        b"11:0:,0:,3:a@b,,",  # the last address runs past the end
        b"3:5:hello,0:,1:r,,",  # the message does
        b"9:0:,0:,3:a@b,,",
        b"2:10:0123456789,",  # so does its length
        b"1:0:,,",
    ],
)
def test_A17_inner_strings_that_run_past_the_outer(wire):
    with pytest.raises(FormatError, match="past the end"):
        Reading().feed(wire)


@pytest.mark.parametrize(("begin", "longest"), [(b"20:", 16), (b"20:0:,", 13), (b"20:0:,0:,", 10)])
def test_A17_a_length_that_does_not_fit_is_refused_when_it_is_announced(begin: bytes, longest: int):
    assert not Reading().feed(begin + b"%d:" % longest)
    with pytest.raises(FormatError, match="string runs past the end"):
        Reading().feed(begin + b"%d:" % (longest + 1))


@pytest.mark.parametrize(
    "wire",
    [b"13:0:,0:,3:a@b,,", b"14:0:,0:,3:a@b,xx,", b"13:0:,0:,3:a@b,\n,", b"13:0:,0:,3:a@b,x,"],
)
def test_A18_slack_between_the_inner_and_the_outer(wire):
    with pytest.raises(FormatError):
        Reading().feed(wire, b"," * 4)


def test_a_request_must_end_with_a_comma():
    with pytest.raises(FormatError):
        Reading().feed(b"12:0:,0:,3:a@b,;")


def test_a_request_without_a_sender():
    with pytest.raises(FormatError, match="past the end"):
        Reading().feed(b"3:0:,,")


def test_a_request_without_recipients_is_complete():
    reading = Reading()
    assert reading.feed(b"6:0:,0:,,")
    assert reading.recipients == ()


def test_A8_a_server_refuses_leading_zeros_everywhere():
    for wire in (
        b"012:0:,0:,3:a@b,,",
        b"13:00:,0:,3:a@b,,",
        b"13:0:,00:,3:a@b,,",
        b"13:0:,0:,03:a@b,,",
    ):
        with pytest.raises(FormatError):
            Reading().feed(wire)


def test_A14_a_server_refuses_a_message_when_it_is_announced():
    reading = Reading(max_size=100)
    with pytest.raises(SizeError):
        reading.feed(b"200:101:")
    assert reading.reader.where == "message content"


def test_A14_a_server_refuses_an_address_when_it_is_announced():
    reading = Reading(max_address=100)
    with pytest.raises(SizeError):
        reading.feed(b"200:0:,0:,101:")
    assert reading.reader.where == "recipient address"


def test_a_server_refuses_recipients_beyond_its_limit_when_it_has_read_them():
    reading = Reading(max_recipients=2)
    assert reading.feed(wire_of(b"", b"", b"a", b"b"))
    reading = Reading(max_recipients=2)
    reading.feed(wire_of(b"", b"", *[b"a"] * 1000)[:-1])
    with pytest.raises(TooManyRecipients):
        reading.feed(b",")


@pytest.mark.parametrize("cut", range(24))
def test_the_reader_says_how_much_of_a_request_is_missing(cut: int):
    wire = wire_of(b"hello", b"", b"r@y", b"q@z")
    reading = Reading()
    reading.feed(wire[:cut])
    assert reading.reader.missing == (len(wire) - cut if cut > 2 else 0)
    refusing = Reading(max_size=4)
    with pytest.raises(SizeError):
        refusing.feed(wire[: max(cut, 5)])
    assert refusing.reader.missing == len(wire) - max(cut, 5), "also of one that it refuses"


@given(st.binary(max_size=60))
def test_any_bytes_are_a_request_or_a_netstring_error(data):
    reading = Reading()
    try:
        whole = reading.feed(data)
    except NetstringError:
        return
    if whole and reading.request is not None:
        envelope = [reading.request.sender, *reading.recipients]
        assert data.startswith(encode(encode(reading.body) + b"".join(map(encode, envelope))))


# What a client reads


@pytest.mark.parametrize(
    ("wire", "status", "text"),
    [
        (b"3:KOk,", b"K", b"Ok"),
        (b"1:K,", b"K", b""),
        (b"23:Kok 1182362995 qp 21894,", b"K", b"ok 1182362995 qp 21894"),
        (b"26:KOk: queued as 0BB2C21E081,", b"K", b"Ok: queued as 0BB2C21E081"),
        (b"51:D" + NO_SUCH_ADDRESS + b",", b"D", NO_SUCH_ADDRESS),
        (b"5:Zbusy,", b"Z", b"busy"),
    ],
)
def test_B1_B2_B6_golden_replies(wire, status, text):
    assert ReplyParser().feed(wire) == Reply(status, text)


@given(
    st.sampled_from([b"K", b"Z", b"D"]), st.binary(max_size=200), st.binary(max_size=5), st.data()
)
def test_B4_B11_a_reply_cut_in_any_way_reads_the_same(status, text, extra, data):
    wire = encode(status + text) + extra
    parser = ReplyParser()
    replies = [
        parser.feed(piece)
        for piece in pieces(wire, data.draw(st.lists(st.integers(0, len(wire)), max_size=20)))
    ]
    assert replies[-1] == Reply(status, text)
    assert parser.extra == len(extra)


def test_B3_bytes_after_a_reply_are_counted():
    parser = ReplyParser()
    assert parser.feed(b"3:KOk,\n") == Reply(b"K", b"Ok")
    parser.feed(b"more")
    assert parser.extra == 5


def test_B7_an_empty_reply_is_malformed():
    with pytest.raises(MalformedReply, match="empty"):
        ReplyParser().feed(b"0:,")


@pytest.mark.parametrize("wire", [b"3:Xab,", b"3:kok,", b"2:\0K,"])
def test_B8_an_unknown_status_is_malformed(wire):
    with pytest.raises(MalformedReply) as caught:
        ReplyParser().feed(wire)
    assert caught.value.received == wire[2:-1]


@pytest.mark.parametrize(
    "banner",
    [b"220 mx.example.com ESMTP\r\n", b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n", b"HTTP/1.0 400 Bad\r\n"],
)
def test_B9_another_protocol_is_malformed(banner):
    with pytest.raises(MalformedReply) as caught:
        ReplyParser().feed(banner)
    assert caught.value.received == banner


def test_B10_a_long_text_is_bounded_and_still_a_K():
    parser = ReplyParser()
    text = bytes(range(256)) * 400
    replies = [
        parser.feed(piece) for piece in pieces(encode(b"K" + text), list(range(0, 100_000, 4096)))
    ]
    assert replies[-1] == Reply(b"K", text[:KEPT_TEXT])
    assert not any(replies[:-1])


def test_B12_an_announced_gigabyte_is_not_allocated():
    parser = ReplyParser()
    assert parser.feed(b"999999999:") is None
    assert parser.eof() is None
    with pytest.raises(MalformedReply):
        ReplyParser().feed(b"1000000000")


@pytest.mark.parametrize("wire", [b"5:KO", b"5:K", b"2:KO"])
def test_B14_a_truncated_K_is_returned_as_truncated(wire):
    parser = ReplyParser()
    assert parser.feed(wire) is None
    assert parser.eof() == Reply(b"K", wire[3:], truncated=True)


@pytest.mark.parametrize("wire", [b"", b"5", b"5:"])
def test_B14_a_reply_cut_before_its_status_is_no_reply(wire):
    parser = ReplyParser()
    assert parser.feed(wire) is None
    assert parser.eof() is None


def test_a_reply_without_its_comma_is_malformed():
    with pytest.raises(MalformedReply, match="comma"):
        ReplyParser().feed(b"3:KOk;")


@pytest.mark.parametrize(
    ("address", "shown"), [(b"a\r\xffb@x", r"a\\r\\xffb@x"), (b"<a@x", "<a@x"), (b"", "<>")]
)
def test_the_error_shows_the_address_without_python_quoting(address: bytes, shown: str) -> None:
    with pytest.raises(ValueError, match=rf"^no server can be trusted with the recipient {shown}$"):
        Request(1, b"a@example.com", [address])


def test_a_prefix_is_a_part_of_the_message():
    request = Request(5, b"a@b", [b"c@d"], b"X-A: 1\n")
    assert request.head + b"body\n" + request.tail == wire_of(b"X-A: 1\nbody\n", b"a@b", b"c@d")
    assert request.length == len(request.head) + 5 + len(request.tail)
