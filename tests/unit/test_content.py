"""The DATA decoder against a slow and simple model of it, however the network cuts the bytes."""

import itertools
import re
import tracemalloc
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reception.header import MAX_RECEIVED
from smtpd.content import Content, Fault
from tests.content_model import model

LIMIT = 1 << 20


def encode(text: bytes) -> bytes:
    """The bytes that a client sends for LF text: CRLF, stuffed dots, the end."""
    lines = text.split(b"\n")[:-1]
    return (
        b"".join((b"." if line.startswith(b".") else b"") + line + b"\r\n" for line in lines)
        + b".\r\n"
    )


def decode(
    blocks: Iterable[bytes], limit: int = LIMIT, *, strip_cr: bool = False
) -> tuple[Content, bytes, bytes | None]:
    content = Content(limit, strip_cr=strip_cr)
    text = b""
    rest: bytes | None = None
    for block in blocks:
        if rest is not None:
            rest += block
            continue
        decoded, rest = content.feed(block)
        text += decoded
    return content, text, rest


def cuts(wire: bytes) -> Iterator[list[bytes]]:
    """Whole, byte by byte, and cut in two everywhere."""
    yield [wire]
    yield [wire[i : i + 1] for i in range(len(wire))]
    for at in range(1, len(wire)):
        yield [wire[:at], wire[at:]]


def check(wire: bytes, blocks: Iterable[bytes], *, strip_cr: bool = False) -> None:
    content, text, rest = decode(blocks, strip_cr=strip_cr)
    expected = model(wire, strip_cr=strip_cr)
    if expected is None:
        assert rest is None
        return
    assert rest == expected[1]
    if expected[0] is None:
        assert content.fault is Fault.BARE
    else:
        assert content.fault is None
        assert text == expected[0]
        stripped = wire[: len(wire) - len(rest)].count(b"\r") - text.count(b"\n") - 1
        assert content.octets == len(text) + text.count(b"\n") + stripped


@pytest.mark.parametrize("strip_cr", [False, True])
@pytest.mark.parametrize("length", range(1, 7))
def test_every_sequence_of_cr_lf_and_dot_as_the_model_has_it(length: int, strip_cr: bool) -> None:
    for symbols in itertools.product((b"\r", b"\n", b".", b"a"), repeat=length):
        wire = b"".join(symbols) + b"\r\n.\r\nQUIT\r\n"
        check(wire, [wire], strip_cr=strip_cr)
        check(wire, [wire[i : i + 1] for i in range(len(wire))], strip_cr=strip_cr)


@given(
    st.lists(
        st.sampled_from(
            [
                b"\r",
                b"\n",
                b".",
                b"\r\n",
                b"\r\r\n",
                b"\r\n.",
                b"\r\n.\r\n",
                b"\r\r\n.\r\r\n",
                b"text",
                b"\0\xff",
            ]
        ),
        max_size=12,
    ),
    st.lists(st.integers(1, 40), max_size=6),
    st.booleans(),
)
def test_any_bytes_in_any_blocks_as_the_model_has_it(
    pieces: list[bytes], places: list[int], strip_cr: bool
) -> None:
    wire = b"".join(pieces) + b"\r\n.\r\n"
    edges = [0, *sorted({min(place, len(wire)) for place in places}), len(wire)]
    check(wire, [wire[a:b] for a, b in itertools.pairwise(edges)], strip_cr=strip_cr)


@given(
    st.lists(st.binary(max_size=20).map(lambda line: re.sub(rb"[\r\n]", b".", line)), max_size=8),
    st.data(),
)
def test_a_text_comes_out_as_it_was_encoded(lines: list[bytes], data: st.DataObject) -> None:
    text = b"".join(line + b"\n" for line in lines)
    wire = encode(text)
    at = data.draw(st.integers(0, len(wire)))
    content, decoded, rest = decode([wire[:at], wire[at:]])
    assert (decoded, rest, content.fault) == (text, b"", None)


def test_C1_crlf_is_stored_as_lf() -> None:
    content, text, rest = decode([b"Subject: x\r\n\r\nbody\r\n.\r\n"])
    assert (text, rest, content.octets) == (b"Subject: x\n\nbody\n", b"", 20)


@pytest.mark.parametrize(
    "fake", [b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\r.\r\n", b"\r.\r", b"\r\n.\r"]
)
def test_C2_a_smuggled_end_does_not_end_the_message(fake: bytes) -> None:
    wire = b"a" + fake + b"MAIL FROM:<x@y>\r\nb\r\n.\r\n"
    for blocks in cuts(wire):
        content, _, rest = decode(blocks)
        assert content.fault is Fault.BARE
        assert rest == b""


@pytest.mark.parametrize(
    "bare", [b"a\rb", b"\ra", b"a\r\r\nb", b"a\nb", b"\n", b"\n\r\n", b"a\r\n\rb", b"\r"]
)
def test_C3_a_bare_cr_or_lf_is_refused_and_the_session_stays_in_step(bare: bytes) -> None:
    wire = bare + b"\r\n.\r\nNOOP\r\n"
    for blocks in cuts(wire):
        content, _, rest = decode(blocks)
        assert content.fault is Fault.BARE
        assert rest == b"NOOP\r\n"


@pytest.mark.parametrize(
    ("fake", "kept"),
    [
        (b"\r\r\n.\r\r\n", b"\n\n"),
        (b"\r\n.\r\r\n", b"\n\n"),
        (b"\r\n.\r\r\r\n", b"\n\n"),
        (b"\r\n\r.\r\n", b"\n.\n"),
        (b"\r\n\r.\r\r\n", b"\n.\n"),
        (b"\r\r\n..\r\r\n", b"\n.\n"),
        (b"\r.\r", b"."),
        (b"\r\r\r", b""),
        (b"\r\n.\r", b"\n"),
    ],
)
def test_stripping_bare_crs_makes_no_end(fake: bytes, kept: bytes) -> None:
    wire = b"a" + fake + b"MAIL FROM:<x@y>\r\nb\r\n.\r\nNOOP\r\n"
    for blocks in cuts(wire):
        content, text, rest = decode(blocks, strip_cr=True)
        assert (text, rest, content.fault) == (
            b"a" + kept + b"MAIL FROM:<x@y>\nb\n",
            b"NOOP\r\n",
            None,
        )


@pytest.mark.parametrize(
    "fake", [b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\r\r\n.\n", b"\n\r.\r\n", b"\n\r\r\n"]
)
def test_a_bare_lf_is_refused_where_bare_crs_are_stripped(fake: bytes) -> None:
    wire = b"a" + fake + b"MAIL FROM:<x@y>\r\nb\r\n.\r\nNOOP\r\n"
    for blocks in cuts(wire):
        content, _, rest = decode(blocks, strip_cr=True)
        assert (content.fault, rest) == (Fault.BARE, b"NOOP\r\n")


def test_cr_cr_lf_becomes_one_line_end() -> None:
    wire = b"Message-ID: <a@b>\r\r\n\r\r\nhello\r\r\n..x\r\r\n.\r\nQUIT\r\n"
    for blocks in cuts(wire):
        content, text, rest = decode(blocks, strip_cr=True)
        assert (text, rest, content.fault) == (
            b"Message-ID: <a@b>\n\nhello\n.x\n",
            b"QUIT\r\n",
            None,
        )
        assert content.header.message_id == "<a@b>"


def test_crs_that_are_stripped_count_towards_the_limit() -> None:
    assert decode([b"\r" * 50, b"a\r\n.\r\n"], 53, strip_cr=True)[0].fault is None
    assert decode([b"\r" * 51, b"a\r\n.\r\n"], 53, strip_cr=True)[0].fault is Fault.TOO_BIG


def test_C4_exactly_one_leading_dot_is_removed() -> None:
    wire = b"..\r\n.x\r\n...\r\nx.\r\n..x\r\n.\r\n"
    for blocks in cuts(wire):
        content, text, rest = decode(blocks)
        assert (text, rest, content.fault) == (b".\nx\n..\nx.\n.x\n", b"", None)


def test_C5_the_end_is_recognized_however_it_is_cut() -> None:
    wire = b"a\r\n.\r\nRSET\r\n"
    for length in range(1, 4):
        for places in itertools.combinations(range(1, len(wire)), length):
            edges = [0, *places, len(wire)]
            assert decode(wire[a:b] for a, b in itertools.pairwise(edges))[1:] == (
                b"a\n",
                b"RSET\r\n",
            )


@pytest.mark.parametrize(
    ("wire", "text"),
    [
        (b".\r\n", b""),
        (b"Subject: x\r\n.\r\n", b"Subject: x\n"),
        (b"just words\r\n.\r\n", b"just words\n"),
        (b"\r\n.\r\n", b"\n"),
        (b"\r\nbody\r\n.\r\n", b"\nbody\n"),
    ],
)
def test_C6_empty_header_only_body_only_blank_first_line(wire: bytes, text: bytes) -> None:
    for blocks in cuts(wire):
        content, decoded, rest = decode(blocks)
        assert (decoded, rest, content.fault, content.octets) == (text, b"", None, len(wire) - 3)


@given(st.binary())
def test_C7_content_ends_with_a_line_end(wire: bytes) -> None:
    content, text, rest = decode([wire + b"\r\n.\r\n"])
    assert rest is not None
    assert content.fault is not None or text.endswith(b"\n") or content.octets == 0


@pytest.mark.parametrize(
    "first", [b"From someone Mon Jan  1\r\n", b" indented\r\n", b"\tindented\r\n"]
)
def test_C8_an_odd_first_line_passes_unchanged(first: bytes) -> None:
    assert decode([first + b".\r\n"])[1] == first.replace(b"\r\n", b"\n")


@pytest.mark.parametrize("length", [998, 999, 1000, 300_000])
def test_C9_a_long_line_is_decoded_block_by_block(length: int) -> None:
    content = Content(LIMIT)
    sizes = [len(content.feed(b"x" * 1000)[0]) for _ in range(length // 1000)]
    assert all(size == 1000 for size in sizes)
    assert content.feed(b"x" * (length % 1000) + b"\r\n.\r\n")[1] == b""
    assert content.octets == length + 2


def test_C10_eight_bits_and_nul_are_kept() -> None:
    every = bytes(set(range(256)) - {10, 13})
    assert decode([every + b"\r\n.\r\n"])[1] == every + b"\n"


@pytest.mark.parametrize(("limit", "fault"), [(10, Fault.TOO_BIG), (11, None), (12, None)])
def test_C12_the_limit_counts_line_ends_as_two_and_stuffed_dots_not(
    limit: int, fault: Fault | None
) -> None:
    for blocks in cuts(b"12345\r\n..3\r\n.\r\nQUIT\r\n"):
        content, _, rest = decode(blocks, limit)
        assert (content.fault, rest) == (fault, b"QUIT\r\n")


def test_C12_nothing_is_decoded_past_the_limit() -> None:
    content = Content(1000)
    assert content.feed(b"x" * 2000) == (b"", None)
    assert content.feed(b"y" * 2000) == (b"", None)
    assert content.fault is Fault.TOO_BIG
    assert content.feed(b"\r\n.\r\nNOOP\r\n") == (b"", b"NOOP\r\n")


@pytest.mark.parametrize(
    ("fields", "fault"), [(MAX_RECEIVED, None), (MAX_RECEIVED + 1, Fault.LOOP)]
)
def test_C29_too_many_received_fields_are_a_loop(fields: int, fault: Fault | None) -> None:
    header = b"X: received: no\r\n" + b"rEceived: from a\r\n\tby b\r\n" * fields + b"Subject: x\r\n"
    wire = header + b"\r\n" + b"Received: in the body\r\n" * 50 + b".\r\n"
    for size in (1, 7, 64, 1000, len(wire)):
        content, _, rest = decode(wire[i : i + size] for i in range(0, len(wire), size))
        assert (content.fault, rest) == (fault, b"")


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (b"Message-ID: <a@b>\r\n", "<a@b>"),
        (b"Subject: x\r\nmessage-id:<a@b> (comment)\r\nTo: y\r\n", "<a@b>"),
        (b"Message-Id:\r\n <folded@b>\r\nReceived: x\r\n", "<folded@b>"),
        (b"Message-ID: none\r\nTo: <y@z>\r\n", None),
        (b"X-Message-ID: <a@b>\r\n", None),
        (b"Message-ID: <" + b"a" * 501 + b">\r\n", None),
        (b"X: " + b"y" * 5000 + b"\r\nMessage-ID: <late@b>\r\n", "<late@b>"),
        (b"Message-ID: <a\xff@b>\r\n", None),
        (b"", None),
    ],
)
def test_the_message_id_is_read_from_the_header_alone(header: bytes, found: str | None) -> None:
    wire = header + b"\r\nMessage-ID: <body@b>\r\n.\r\n"
    for size in (1, 3, 16, len(wire)):
        content, _, _ = decode(wire[i : i + size] for i in range(0, len(wire), size))
        assert content.header.message_id == found


@pytest.mark.parametrize("blank", [b" ", b"\t", b"\r ", b"\r\r\t"])
def test_content_that_begins_with_a_continuation_has_no_header(blank: bytes) -> None:
    wire = (
        blank
        + b"by bank.example\r\n"
        + b"Received: x\r\n" * 101
        + b"Message-ID: <a@b>\r\n\r\n.\r\n"
    )
    for size in (1, 3, len(wire)):
        pieces = (wire[i : i + size] for i in range(0, len(wire), size))
        content, _, _ = decode(pieces, strip_cr=True)
        assert (content.header.message_id, content.fault) == (None, None)


def test_only_one_unfinished_header_line_is_kept_and_bounded() -> None:
    content = Content(LIMIT)
    content.feed(b"x" * 10_000)
    tracemalloc.start()
    for _ in range(20):
        content.feed(b"x" * 10_000)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 4_000
