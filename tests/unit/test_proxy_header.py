"""PROXY headers of both versions, whole and cut, and everything else."""

import ipaddress
import struct
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from reception.proxy_header import (
    BLOCK_LIMIT,
    LINE_LIMIT,
    SIGNATURE,
    BadHeader,
    HeaderReader,
    ProxyHeader,
)


def read(wire: bytes, at_most: int = 1 << 16) -> tuple[ProxyHeader | None, bytes]:
    """The header, and what was not read, if each read brings `at_most` octets."""
    reader = HeaderReader()
    header = None
    while header is None and wire:
        size = min(reader.wanted, at_most)
        assert size > 0
        header = reader.feed(wire[:size])
        wire = wire[size:]
    return header, wire


def binary(command: int, kind: int, block: bytes) -> bytes:
    return SIGNATURE + struct.pack("!BBH", command, kind, len(block)) + block


def addresses(source: str, destination: str) -> bytes:
    packed = b"".join(ipaddress.ip_address(each).packed for each in (source, destination))
    return packed + struct.pack("!HH", 40000, 25)


TCP4 = b"PROXY TCP4 192.0.2.1 198.51.100.1 40000 25\r\n"
LONGEST = (
    b"PROXY TCP6 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"
    b" ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe 65535 65535\r\n"
)
VALID = [
    (TCP4, "192.0.2.1"),
    (b"PROXY TCP4 0.0.0.0 0.0.0.0 0 0\r\n", "0.0.0.0"),
    (b"PROXY TCP6 2001:db8::1 2001:db8::2 40000 25\r\n", "2001:db8::1"),
    (LONGEST, "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
    (b"PROXY UNKNOWN\r\n", None),
    (b"PROXY UNKNOWN " + b"x" * 91 + b"\r\n", None),
    (b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n", None),
    (binary(0x21, 0x11, addresses("192.0.2.1", "198.51.100.1")), "192.0.2.1"),
    (binary(0x21, 0x21, addresses("2001:db8::1", "2001:db8::2")), "2001:db8::1"),
    (binary(0x21, 0x11, addresses("192.0.2.1", "198.51.100.1") + b"\x04\0\3abc"), "192.0.2.1"),
    (binary(0x21, 0x11, addresses("192.0.2.1", "198.51.100.1") + bytes(4084)), "192.0.2.1"),
    (binary(0x20, 0x00, b""), None),
    (binary(0x20, 0x11, addresses("192.0.2.1", "198.51.100.1")), None),
    (binary(0x20, 0x99, b"anything"), None),
    (binary(0x21, 0x00, b"\x03\0\4abcd"), None),
]


@pytest.mark.parametrize("rest", [b"", b"EHLO x\r\n", b"\x16\x03\x01", b"PROXY UNKNOWN\r\n"])
@pytest.mark.parametrize(("wire", "source"), VALID)
def test_a_header_names_the_client_and_nothing_behind_it_is_read(
    wire: bytes, source: str | None, rest: bytes
) -> None:
    for at_most in (1, 2, 7, 1 << 16):
        assert read(wire + rest, at_most) == (ProxyHeader(source), rest)


@pytest.mark.parametrize(("wire", "_source"), VALID)
def test_a_header_that_is_cut_is_not_complete(wire: bytes, _source: str | None) -> None:
    for size in range(len(wire)):
        assert read(wire[:size]) == (None, b"")


INVALID = [
    b"EHLO client.example\r\n",
    b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03\x00\x00\x00\x00",
    b"proxy TCP4 192.0.2.1 198.51.100.1 40000 25\r\n",
    b"PROXY TCP4 192.0.2.1 198.51.100.1 40000 25\n\r\n",
    b"PROXY TCP4 192.0.2.1  198.51.100.1 40000 25\r\n",
    b"PROXY TCP4 192.0.2.1 198.51.100.1 40000\r\n",
    b"PROXY TCP4 192.0.2.1 198.51.100.1 40000 25 \r\n",
    b"PROXY TCP4 192.0.2.1 198.51.100.1 65536 25\r\n",
    b"PROXY TCP4 192.0.2.1 198.51.100.1 040 25\r\n",
    b"PROXY TCP4 192.0.2.1 198.51.100.1 -1 25\r\n",
    b"PROXY TCP4 192.0.2.256 198.51.100.1 40000 25\r\n",
    b"PROXY TCP4 192.0.02.1 198.51.100.1 40000 25\r\n",
    b"PROXY TCP4 2001:db8::1 2001:db8::2 40000 25\r\n",
    b"PROXY TCP6 192.0.2.1 198.51.100.1 40000 25\r\n",
    b"PROXY TCP6 2001:db8::1 localhost 40000 25\r\n",
    b"PROXY TCP4 \xff\xff 198.51.100.1 40000 25\r\n",
    b"PROXY TCP6 fe80::1%eth0 2001:db8::2 40000 25\r\n",
    b"PROXY UDP4 192.0.2.1 198.51.100.1 40000 25\r\n",
    b"PROXY UNKNOWNX\r\n",
    b"PROXY UNKNOWN " + b"x" * 92 + b"\r\n",
    b"PROXY " + b"x" * LINE_LIMIT,
    SIGNATURE[:-1] + b"X" + bytes(4),
    binary(0x11, 0x11, addresses("192.0.2.1", "198.51.100.1")),
    binary(0x22, 0x11, addresses("192.0.2.1", "198.51.100.1")),
    binary(0x21, 0x12, addresses("192.0.2.1", "198.51.100.1")),
    binary(0x21, 0x31, bytes(216)),
    binary(0x21, 0x11, bytes(11)),
    binary(0x21, 0x21, bytes(35)),
    binary(0x21, 0x11, bytes(BLOCK_LIMIT + 1)),
    binary(0x20, 0x00, bytes(BLOCK_LIMIT + 1)),
]


@pytest.mark.parametrize("wire", INVALID)
def test_everything_else_is_refused(wire: bytes) -> None:
    for at_most in (1, 1 << 16):
        with pytest.raises(BadHeader):
            read(wire, at_most)


def test_an_octet_that_no_header_has_is_refused_at_once() -> None:
    for wire in (b"E", b"PRO\r", b"\r\n\r\n\0\rX", b"PROXYX"):
        reader = HeaderReader()
        with pytest.raises(BadHeader):
            reader.feed(wire)


@given(st.binary(max_size=200), st.sampled_from([b"", b"PROXY ", b"PROXY TCP4 ", SIGNATURE]))
@example(b"\x21\x11\xff\xff", SIGNATURE)
def test_any_octets_are_a_header_or_refused_and_reading_is_bounded(
    wire: bytes, beginning: bytes
) -> None:
    with suppress(BadHeader):
        header, rest = read(beginning + wire)
        if header is not None:
            used = len(beginning + wire) - len(rest)
            assert used <= max(LINE_LIMIT, 16 + BLOCK_LIMIT)
            assert header.source is None or str(ipaddress.ip_address(header.source))


@given(st.ip_addresses(), st.ip_addresses(), st.integers(0, 65535), st.integers(1, 9))
def test_every_address_comes_out_of_both_versions(
    source: ipaddress.IPv4Address | ipaddress.IPv6Address,
    other: ipaddress.IPv4Address | ipaddress.IPv6Address,
    port: int,
    at_most: int,
) -> None:
    destination = other if other.version == source.version else source
    line = f"PROXY TCP{source.version} {source} {destination} {port} 25\r\n".encode()
    kind = 0x11 if source.version == 4 else 0x21
    block = source.packed + destination.packed + struct.pack("!HH", port, 25)
    expected = ProxyHeader(str(source)), b"rest"
    assert read(line + b"rest", at_most) == expected
    assert read(binary(0x21, kind, block) + b"rest", at_most) == expected
