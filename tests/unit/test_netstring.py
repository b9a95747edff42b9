"""The codec: what it writes, what it refuses, and that it does not matter how a stream is cut
up."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmqp.netstring import (
    Decoder,
    FormatError,
    SizeError,
    TruncatedError,
    encode,
    length_of,
    read_length,
)

BOUNDARIES = [0, 1, 9, 10, 99, 100, 999, 1000, 9999, 10_000, 99_999, 100_000, 1_000_000]


def decoded_in_pieces(wire: bytes, cuts: list[int], limit: int = 10_000_000) -> list[bytes]:
    decoder = Decoder(limit)
    edges = [0, *sorted(cuts), len(wire)]
    strings = [string for a, b in itertools.pairwise(edges) for string in decoder.feed(wire[a:b])]
    decoder.eof()
    return strings


def test_A1_nothing_is_a_zero_a_colon_and_a_comma():
    assert encode(b"") == b"0:,"


@pytest.mark.parametrize("size", BOUNDARIES)
def test_A2_lengths_are_exact_where_their_digits_change(size):
    wire = encode(b"x" * size)
    assert wire == str(size).encode() + b":" + b"x" * size + b","
    assert len(wire) == length_of(size)


def test_A3_every_byte_comes_back_as_it_was():
    data = bytes(range(256)) + b"3:abc," * 3
    assert Decoder().feed(encode(data)) == [data]


def test_A4_a_str_has_no_length_on_the_wire():
    with pytest.raises(TypeError):
        encode("Grüße")  # type: ignore[arg-type]


@pytest.mark.parametrize("cut", range(7))
def test_A5_one_cut_anywhere_changes_nothing(cut):
    assert decoded_in_pieces(b"3:foo,", [cut]) == [b"foo"]


def test_A5_byte_by_byte_changes_nothing():
    assert decoded_in_pieces(b"3:foo,", list(range(6))) == [b"foo"]


@given(st.lists(st.binary(max_size=300), max_size=8), st.data())
def test_A5_whatever_way_a_stream_is_cut_it_holds_the_same_strings(strings, data):
    wire = b"".join(encode(string) for string in strings)
    cuts = data.draw(st.lists(st.integers(0, len(wire)), max_size=20))
    assert decoded_in_pieces(wire, cuts) == strings


def test_A6_two_strings_and_the_beginning_of_a_third():
    decoder = Decoder()
    assert decoder.feed(b"3:foo,4:tail,5:he") == [b"foo", b"tail"]
    assert decoder.rest == b"5:he"


@pytest.mark.parametrize("wire", [b":foo,", b":,"])
def test_A7_a_length_without_digits(wire):
    with pytest.raises(FormatError):
        Decoder().feed(wire)


@pytest.mark.parametrize("wire", [b"03:foo,", b"00:,", b"000", b"0" * 40])
def test_A8_a_leading_zero(wire):
    with pytest.raises(FormatError):
        Decoder().feed(wire)


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
def test_A9_what_int_would_take_is_no_length(wire):
    with pytest.raises(FormatError):
        Decoder().feed(wire)


@pytest.mark.parametrize("wire", [b"foo", b"x:", b"GET / HTTP/1.0", b"\x16\x03\x01"])
def test_A10_another_protocol_fails_at_its_first_byte(wire):
    with pytest.raises(FormatError):
        Decoder().feed(wire[:1])


@pytest.mark.parametrize("wire", [b"3:foo;", b"3:foo\n", b"2:foo,"])
def test_A11_no_comma_where_the_string_ends(wire):
    with pytest.raises(FormatError):
        Decoder().feed(wire)


@pytest.mark.parametrize("wire", [b"3:foo", b"3:fo,"])
def test_A11_the_end_inside_a_string(wire):
    decoder = Decoder()
    assert decoder.feed(wire) == []
    with pytest.raises(TruncatedError):
        decoder.eof()


@pytest.mark.parametrize("wire", [b"9" * 20 + b":", b"1000000000", b"4294967296:"])
def test_A12_ten_digits_are_too_many_before_the_colon_has_come(wire):
    with pytest.raises(SizeError):
        Decoder().feed(wire)


def test_A13_an_announced_gigabyte_is_not_allocated():
    decoder = Decoder()
    assert decoder.feed(b"999999999:0123456789") == []
    assert len(decoder.rest) == 20
    with pytest.raises(TruncatedError):
        decoder.eof()


def test_A14_more_than_the_limit_is_refused_when_it_is_announced():
    assert Decoder(limit=10).feed(b"10:0123456789,") == [b"0123456789"]
    with pytest.raises(SizeError):
        Decoder(limit=10).feed(b"11:")


def test_A15_digits_without_end_end_at_the_tenth():
    decoder = Decoder()
    for _ in range(9):
        assert decoder.feed(b"1") == []
    with pytest.raises(SizeError):
        decoder.feed(b"1")


@pytest.mark.parametrize("wire", [b"0", b"0:", b"1:", b"1:a", b"12"])
def test_A16_a_beginning_asks_for_more_and_then_is_truncated(wire):
    decoder = Decoder()
    assert decoder.feed(wire) == []
    with pytest.raises(TruncatedError):
        decoder.eof()


def test_A16_an_empty_stream_holds_nothing():
    decoder = Decoder()
    assert decoder.feed(b"") == []
    decoder.eof()


@given(st.binary(max_size=40))
def test_whatever_comes_is_strings_or_a_netstring_error(data):
    decoder = Decoder()
    try:
        strings = decoder.feed(data)
        decoder.eof()
    except (FormatError, SizeError, TruncatedError):
        return
    assert b"".join(encode(string) for string in strings) == data


def test_a_length_is_read_from_the_middle_of_a_buffer():
    assert read_length(b"3:foo,10:abc", 6) == (10, 9)
    assert read_length(b"3:foo,", 6) is None
