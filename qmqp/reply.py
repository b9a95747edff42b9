"""A reply as bytes: a netstring whose first byte is the status of the whole request.

    K   accepted: the server answers for every recipient, as RFC 1123 section 5.3.3 has it
    Z   not now: the same request may be sent again later
    D   never: no recipient got it

The text after the status may hold any bytes: NUL, line ends, any charset (the text of QMTP, section
5, about the same replies: "the client should be ready for arbitrary bytes"). A reply has any
length. The parser accepts all of it and keeps a bounded part: a client that refuses a long K sends
the message twice. An empty reply, another first byte, and bytes that are not a netstring are not a
verdict. A client must not search the bytes for the first K, Z or D (qmail-qmqpc.c does):
`SSH-2.0-OpenSSH_9.2p1 Debian` has one. Bytes after the reply mean nothing; some servers send a line
feed.
"""

from typing import NamedTuple

from qmqp.netstring import MAX_LENGTH, NetstringError, read_length

KEPT_TEXT = 4096  # bytes of a reply's text that are kept

_KEPT = len(f"{MAX_LENGTH}:K") + KEPT_TEXT


class MalformedReply(ValueError):
    """A reply that is not a netstring, is empty, or does not begin with K, Z or D. `received` is
    its beginning."""

    def __init__(self, why: str, received: bytes) -> None:
        super().__init__(why)
        self.received = received


class Reply(NamedTuple):
    """A server's reply. `status` is b"K", b"Z" or b"D"; `text` has at most KEPT_TEXT bytes;
    `truncated`: the connection ended before the reply did."""

    status: bytes
    text: bytes
    truncated: bool = False


class ReplyParser:
    """Reads one reply, however it is cut up. `extra` counts the bytes after it, which mean nothing;
    `received` is the beginning of the reply, as far as it is kept."""

    extra = 0
    received = b""
    _head = b""  # the beginning of all bytes
    _total = 0  # the number of all bytes

    def feed(self, data: bytes) -> Reply | None:
        """Take the next bytes; return the reply once it is complete. Raises MalformedReply at the
        first wrong byte."""
        self._head += data[: _KEPT - len(self._head)]
        self._total += len(data)
        self.received = self._head
        try:
            header = read_length(self._head)
        except NetstringError as error:
            raise MalformedReply(str(error), self._head[:KEPT_TEXT]) from None
        if header is None:
            return None
        length, begin = header
        self.received = self._head[begin : begin + min(length, KEPT_TEXT + 1)]
        if not length:
            raise MalformedReply("an empty reply", b"0:")
        if self.received and self.received[0] not in b"KZD":
            raise MalformedReply("a reply that begins with none of K, Z, D", self.received)
        extra = self._total - begin - length - 1
        if extra < 0:
            return None
        if extra < len(data) and data[-extra - 1] != 0x2C:
            raise MalformedReply("a reply that does not end with a comma", self.received)
        self.extra = extra
        return Reply(self.received[:1], self.received[1:])

    def eof(self) -> Reply | None:
        """The beginning of a reply that the connection cut off, marked truncated; None unless a
        valid length and the status byte have come."""
        if self.received[:1] not in (b"K", b"Z", b"D"):
            return None
        return Reply(self.received[:1], self.received[1:], truncated=True)
