"""A QMQP request and its reply as bytes, without any I/O.

`Request` knows the length of everything before the first byte is sent, which is what lets a client stream a
body of any size from a file: a head, `size` bytes that somebody else supplies, a tail. The last byte of the
tail is the commit point of the protocol: a server must throw away a request of which it has not read that
byte.

`ReplyParser` reads what a server answers. A reply is as long as the server likes, so what is kept of its text
is bounded while what is accepted is not: a long K is still a K, and refusing it would send the message twice.

`RequestParser` is the other side: it reads a request as a strict server does, hands the body on in pieces as
it comes, and never holds more than an address of it.

Addresses are bare octets: no angle brackets, no quoting; the null sender is the empty string.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from qmqp.netstring import MAX_LENGTH, FormatError, NetstringError, read_length

MAX_ADDRESS = 999
"""The longest address that every server takes: qmail-qmqpd refuses a thousand bytes, Postfix more than
2048."""

KEPT_TEXT = 4096
"""How much of a reply's text is kept, in bytes."""

_GOOD_ADDRESS = re.compile(rb"[^\0\r\n<][^\0\r\n]{0,%d}" % (MAX_ADDRESS - 1)).fullmatch


class BadAddress(ValueError):
    """An address that some server would misread: NUL, CR or LF (Postfix delivers what stands before a NUL), a
    leading angle bracket, more than MAX_ADDRESS bytes, or a recipient that is empty."""


class NoRecipients(ValueError):
    """A request without a recipient: qmail takes it and loses the message, Postfix refuses it."""


class MalformedReply(ValueError):
    """A reply that is no netstring, is empty, or begins with none of K, Z, D. `received` is how it began."""

    def __init__(self, why: str, received: bytes) -> None:
        super().__init__(why)
        self.received = received


class Request:
    """A message of `size` bytes to `recipients` from `sender` (empty: the null sender).

    On the wire it is `head`, then the `size` bytes of the message, then `tail`; `length` bytes in all.
    Raises BadAddress, NoRecipients, and ValueError for a negative size.
    """

    __slots__ = ("head", "length", "size", "tail")

    def __init__(self, size: int, sender: bytes, recipients: Sequence[bytes]) -> None:
        if size < 0:
            raise ValueError(f"a message of {size} bytes")
        if not recipients:
            raise NoRecipients("a request needs a recipient")
        if sender and not _GOOD_ADDRESS(sender):
            raise BadAddress(f"no server can be trusted with the sender {sender[:80]!r}")
        for recipient in recipients:
            if not _GOOD_ADDRESS(recipient):
                raise BadAddress(f"no server can be trusted with the recipient {recipient[:80]!r}")
        envelope = b"".join([b"%d:%b," % (len(address), address) for address in (sender, *recipients)])
        message = b"%d:" % size
        payload = len(message) + size + 1 + len(envelope)
        self.size = size
        self.head = b"%d:%b" % (payload, message)
        self.tail = b",%b," % envelope
        self.length = len(self.head) + size + len(self.tail)


class Reply(NamedTuple):
    """What a server said: `status` is b"K", b"Z" or b"D"; `text` its words, of which KEPT_TEXT bytes are
    kept; `truncated` if the connection ended before the reply did."""

    status: bytes
    text: bytes
    truncated: bool = False


class ReplyParser:
    """Reads one reply, however it is cut up. `extra` counts the bytes that came after it, which mean
    nothing."""

    __slots__ = ("_kept", "_left", "_reply", "extra")

    def __init__(self) -> None:
        self._kept = b""
        self._left = -1
        self._reply: Reply | None = None
        self.extra = 0

    @property
    def received(self) -> bytes:
        """How the reply began, as far as it is kept."""
        return self._kept

    def feed(self, data: bytes) -> Reply | None:
        """Take the next bytes; return the reply once it is whole. Raises MalformedReply at the first byte
        that is wrong."""
        if self._reply is not None:
            self.extra += len(data)
            return self._reply
        if self._left < 0:
            data = self._kept + data
            self._kept = data[:KEPT_TEXT]
            try:
                found = read_length(data)
            except NetstringError as error:
                raise MalformedReply(str(error), self._kept) from None
            if found is None:
                return None
            self._left, begin = found
            data = data[begin:]
            self._kept = b""
            if not self._left:
                raise MalformedReply("an empty reply", b"0:")
        piece = data[: self._left]
        if len(self._kept) <= KEPT_TEXT:
            self._kept += piece[: KEPT_TEXT + 1 - len(self._kept)]
        if self._kept and self._kept[0] not in b"KZD":
            raise MalformedReply("a reply that begins with none of K, Z, D", self._kept)
        self._left -= len(piece)
        if self._left or len(data) == len(piece):
            return None
        if data[len(piece)] != 0x2C:
            raise MalformedReply("a reply that does not end with a comma", self._kept)
        self.extra = len(data) - len(piece) - 1
        self._reply = Reply(self._kept[:1], self._kept[1:])
        return self._reply

    def eof(self) -> Reply | None:
        """The stream has ended: the part of a reply that came, marked truncated, if its status byte stood
        after a valid length; else None."""
        if self._left < 0 or not self._kept:
            return None
        return Reply(self._kept[:1], self._kept[1:], truncated=True)


class RequestParser:
    """Reads one request as a strict server does: every length exact, no slack between the inner and the outer
    string.

    `body` is called with each piece of the message: a view that is valid only during the call. `size` is
    known, and not negative, when the message begins. When `feed` has returned True, `sender` and `recipients`
    (which may be empty: that is for the server to judge) are whole, and `extra` counts the bytes that came
    after the request. `where` says what is being read, in Postfix' words."""

    __slots__ = ("_body", "_left", "_rest", "complete", "extra", "max_address", "max_size", "missing",
                 "recipients", "sender", "size", "where")  # fmt: skip

    def __init__(
        self,
        body: Callable[[memoryview], object],
        max_size: int = MAX_LENGTH,
        max_address: int = 2048,
    ) -> None:
        self._body = body
        self.max_size = max_size
        self.max_address = max_address
        self.size = -1
        self.missing = 0  # bytes of the message that have not come yet, its comma included
        self.sender: bytes | None = None
        self.recipients: list[bytes] = []
        self.complete = False
        self.extra = 0
        self.where = "QMQP packet header"
        self._left = 0  # bytes of the outer netstring after the message
        self._rest = b""

    def feed(self, data: bytes | memoryview) -> bool:
        """Take the next bytes; True once the request is whole. Raises FormatError, SizeError."""
        view = memoryview(self._rest + data if self._rest else data)
        self._rest = b""
        if self.size < 0:
            begin = self._read_header(bytes(view[:32]))
            if not begin:
                self._rest = bytes(view)
                return False
            view = view[begin:]
        if self.missing:
            view = self._read_message(view)
        if not self.missing and not self.complete:
            view = self._read_envelope(bytes(view))
        if self.complete:
            self.extra += len(view)
        return self.complete

    def _read_header(self, head: bytes) -> int:
        """Read both lengths before the message; return where it begins, 0 if more must come first."""
        outer = read_length(head)
        if outer is None:
            return 0
        payload, begin = outer
        self.where = "message content"
        inner = read_length(head[: begin + payload], begin, self.max_size)
        if inner is None:
            if len(head) >= begin + payload:
                raise FormatError("the message runs past the end of the request")
            return 0
        size, position = inner
        self._left = payload - (position - begin) - size - 1
        if self._left < 0:
            raise FormatError("the message runs past the end of the request")
        self.size = size
        self.missing = size + 1
        return position

    def _read_message(self, view: memoryview) -> memoryview:
        piece = view[: self.missing - 1]
        if piece:
            self._body(piece)
            self.missing -= len(piece)
        view = view[len(piece) :]
        if view and self.missing == 1:
            if view[0] != 0x2C:
                raise FormatError("no comma after the message")
            self.missing = 0
            self.where = "sender address"
            view = view[1:]
        return view

    def _read_envelope(self, text: bytes) -> memoryview:
        """Read addresses and the last comma; keep what is not whole; return what comes after the request."""
        inner = text[: self._left]
        position = 0
        while position < self._left:
            found = read_length(inner, position, self.max_address)
            end = found[0] + found[1] if found else len(inner)
            if end >= self._left:
                raise FormatError("an address runs past the end of the request")
            if found is None or end >= len(inner):
                break
            if inner[end] != 0x2C:
                raise FormatError("no comma after an address")
            address = inner[found[1] : end]
            if self.sender is None:
                self.sender = address
                self.where = "recipient address"
            else:
                self.recipients.append(address)
            position = end + 1
        self._left -= position
        if self._left or len(text) == position:
            self._rest = text[position:]
            return memoryview(b"")
        if self.sender is None:
            raise FormatError("no sender")
        if text[position] != 0x2C:
            raise FormatError("no comma after the request")
        self.complete = True
        return memoryview(text)[position + 1 :]
