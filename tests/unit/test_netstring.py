"""The netstring codec: it writes exact lengths and refuses everything else at the first wrong byte.

Whole netstrings are read by the parsers of replies and requests; here a reply stands for both. That
they read the same however a stream is cut, test_request.py shows with streams of any bytes.
"""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmqp.netstring import FormatError, SizeError, encode, length_of, read_length
from qmqp.reply import MalformedReply, Reply, ReplyParser

BOUNDARIES = [0, 1, 9, 10, 99, 100, 999, 1000, 9999, 10_000, 99_999, 100_000, 1_000_000]


def fed_in_pieces(wire: bytes, cuts: list[int]) -> ReplyParser:
    parser = ReplyParser()
    edges = [0, *sorted(cuts), len(wire)]
    for begin, end in itertools.pairwise(edges):
        parser.feed(wire[begin:end])
    return parser


def test_A1_an_empty_string_is_a_zero_a_colon_and_a_comma():
    assert encode(b"") == b"0:,"


@pytest.mark.parametrize("size", BOUNDARIES)
def test_A2_lengths_are_exact_where_their_digits_change(size):
    wire = encode(b"x" * size)
    assert wire == str(size).encode() + b":" + b"x" * size + b","
    assert len(wire) == length_of(size)
    assert read_length(wire) == (size, len(str(size)) + 1)


def test_A3_every_byte_comes_back_unchanged():
    data = bytes(range(256)) + b"3:abc," * 3
    assert ReplyParser().feed(encode(b"K" + data)) == Reply(b"K", data)


def test_A4_a_str_has_no_length_on_the_wire():
    with pytest.raises(TypeError):
        encode("Grüße")  # type: ignore[arg-type]


@pytest.mark.parametrize("cut", range(7))
def test_A5_one_cut_anywhere_changes_nothing(cut):
    assert fed_in_pieces(b"3:Koo,", [cut]).feed(b"") == Reply(b"K", b"oo")


def test_A5_byte_by_byte_changes_nothing():
    assert fed_in_pieces(b"3:Koo,", list(range(6))).feed(b"") == Reply(b"K", b"oo")


@given(st.binary(max_size=300), st.data())
def test_A5_a_stream_cut_in_any_way_holds_the_same_string(text, data):
    wire = encode(b"Z" + text)
    cuts = data.draw(st.lists(st.integers(0, len(wire)), max_size=20))
    assert fed_in_pieces(wire, cuts).feed(b"") == Reply(b"Z", text)


def test_A6_what_follows_a_string_is_not_part_of_it():
    parser = ReplyParser()
    assert parser.feed(b"3:Koo,4:tail,5:he") == Reply(b"K", b"oo")
    assert parser.extra == len(b"4:tail,5:he")


@pytest.mark.parametrize("wire", [b":foo,", b":,"])
def test_A7_a_length_without_digits_is_refused(wire):
    with pytest.raises(FormatError):
        read_length(wire)


@pytest.mark.parametrize("wire", [b"03:foo,", b"00:,", b"000", b"0" * 40])
def test_A8_a_leading_zero_is_refused(wire):
    with pytest.raises(FormatError):
        read_length(wire)


@pytest.mark.parametrize(
    "wire",
    [
        b"+3:foo,",
        b"-3:foo,",
        b"-0:,",
        b" 3:foo,",
        b"3 :foo,",
        b"0x3:foo,",
        b"1e0:f,",
        b"1.0:f,",
        b"1_0:f,",
        "٣:foo,".encode(),
    ],
)
def test_A9_text_that_int_accepts_is_no_length(wire):
    with pytest.raises(FormatError):
        read_length(wire)


@pytest.mark.parametrize("wire", [b"foo", b"x:", b"GET / HTTP/1.0", b"\x16\x03\x01"])
def test_A10_another_protocol_fails_at_its_first_byte(wire):
    with pytest.raises(FormatError):
        read_length(wire[:1])


@pytest.mark.parametrize("wire", [b"3:Koo;", b"3:Koo\n", b"2:Koo,"])
def test_A11_a_string_must_end_with_a_comma(wire):
    with pytest.raises(MalformedReply, match="comma"):
        ReplyParser().feed(wire)


@pytest.mark.parametrize("wire", [b"3:Koo", b"3:Ko,"])
def test_A11_the_end_of_the_stream_inside_a_string_truncates_it(wire):
    parser = ReplyParser()
    assert parser.feed(wire) is None
    reply = parser.eof()
    assert reply is not None
    assert reply.truncated


@pytest.mark.parametrize("wire", [b"9" * 20 + b":", b"1000000000", b"4294967296:"])
def test_A12_ten_digits_are_too_many_before_the_colon_has_come(wire):
    with pytest.raises(SizeError):
        read_length(wire)


def test_A13_an_announced_gigabyte_is_not_allocated():
    parser = ReplyParser()
    assert parser.feed(b"999999999:K123456789") is None
    assert parser.received == b"K123456789"


def test_A14_more_than_the_limit_is_refused_when_it_is_announced():
    assert read_length(b"10:", limit=10) == (10, 3)
    with pytest.raises(SizeError):
        read_length(b"11:", limit=10)


def test_A15_digits_without_end_fail_at_the_tenth():
    assert all(read_length(b"1" * count) is None for count in range(10))
    with pytest.raises(SizeError):
        read_length(b"1" * 10)


@pytest.mark.parametrize("wire", [b"0", b"1", b"12", b""])
def test_A16_the_beginning_of_a_length_needs_more_bytes(wire):
    assert read_length(wire) is None


@pytest.mark.parametrize("wire", [b"", b"1", b"1:"])
def test_A16_a_stream_that_ends_before_the_status_is_no_reply(wire):
    parser = ReplyParser()
    assert parser.feed(wire) is None
    assert parser.eof() is None
