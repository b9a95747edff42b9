"""The PROXY header that a balancer sends before a connection, version 1 and 2, without I/O.

The text of HAProxy (proxy-protocol.txt) is the standard. Version 1 is a line of at most 107 octets,
version 2 has 16 octets, addresses and TLVs. `HeaderReader.wanted` says how many octets may be read
next, so that nothing behind the header is read with it: those belong to the session, or to TLS.

What must stay true: a header is complete, or refused at the first octet that no header has there.
LOCAL, UNKNOWN and an unspecified family mean the peer itself. TLVs are skipped.
"""

import re
import struct
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"  # of version 2
LINE_LIMIT = 107  # octets of version 1, with CRLF
BLOCK_LIMIT = 4096  # octets of version 2 behind the first 16
_SHORTEST = len(b"PROXY UNKNOWN\r\n")
_FIXED = struct.Struct("!12sBBH")
_LINE = re.compile(rb"PROXY (TCP4|TCP6) ([\w:.]+) ([\w:.]+) (0|[1-9]\d{0,4}) (0|[1-9]\d{0,4})\r\n")
_LOCAL, _PROXY = 0x20, 0x21  # version and command
_UNSPECIFIED, _TCP4, _TCP6 = 0x00, 0x11, 0x21  # family and transport


class ProxyHeader(NamedTuple):
    """`source` is the address of the client, None if it is the peer of the connection itself."""

    source: str | None


class BadHeader(Exception):
    """The connection does not begin with a header; the text says why."""


class HeaderReader:
    """Reads one header; `feed` what was read, never more than `wanted` octets."""

    def __init__(self) -> None:
        self._data = b""

    @property
    def wanted(self) -> int:
        """The octets that may be read next."""
        size = len(self._data)
        if size < _SHORTEST:
            return _SHORTEST - size
        if not self._data.startswith(SIGNATURE):
            return 1
        if size < _FIXED.size:
            return _FIXED.size - size
        return _FIXED.size + self._length() - size

    def feed(self, data: bytes) -> ProxyHeader | None:
        """The header if it is complete; raises BadHeader."""
        self._data += data
        beginning = self._data[: len(SIGNATURE)]
        if SIGNATURE.startswith(beginning):
            return self._read_binary()
        if not (b"PROXY ".startswith(beginning) or beginning.startswith(b"PROXY ")):
            raise BadHeader("no PROXY header")
        return self._read_line()

    def _read_line(self) -> ProxyHeader | None:
        data = self._data
        if not data.endswith(b"\r\n"):
            if len(data) >= LINE_LIMIT:
                raise BadHeader("the line is too long")
            return None
        if data.startswith((b"PROXY UNKNOWN\r\n", b"PROXY UNKNOWN ")):
            return ProxyHeader(None)
        match = _LINE.fullmatch(data)
        if match is None or max(int(match[4]), int(match[5])) > 65535:
            raise BadHeader("no addresses in the line")
        family = IPv4Address if match[1] == b"TCP4" else IPv6Address
        try:
            source, _destination = (family(match[n].decode("ascii")) for n in (2, 3))
        except ValueError:
            raise BadHeader("an address of another family in the line") from None
        return ProxyHeader(str(source))

    def _length(self) -> int:
        return int(_FIXED.unpack_from(self._data)[3])

    def _read_binary(self) -> ProxyHeader | None:
        data = self._data
        if len(data) < _FIXED.size:
            return None
        _, command, kind, length = _FIXED.unpack_from(data)
        if command not in (_LOCAL, _PROXY):
            raise BadHeader("an unknown version or command")
        if length > BLOCK_LIMIT:
            raise BadHeader("the header is too long")
        if len(data) < _FIXED.size + length:
            return None
        if command == _LOCAL or kind == _UNSPECIFIED:
            return ProxyHeader(None)
        if kind == _TCP4 and length >= 12:
            return ProxyHeader(str(IPv4Address(data[16:20])))
        if kind == _TCP6 and length >= 36:
            return ProxyHeader(str(IPv6Address(data[16:32])))
        raise BadHeader("no addresses of TCP")
