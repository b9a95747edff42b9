"""A request as bytes, without any I/O.

`Request` knows the whole length before the first byte is sent, so that a client can stream a
message of any size from a file: a head, `size` bytes of the message, a tail. The last byte of the
tail is the commit point. It refuses addresses that some server would misread.

`RequestParser` is the other side. It reads a request as a strict server does, passes the message on
in pieces as they come, and never buffers more than an address.
"""

import re
from collections.abc import Callable, Generator, Iterator, Sequence

from qmqp.netstring import MAX_LENGTH, FormatError, length_of, read_length

# Every server accepts an address of this length: qmail-qmqpd refuses 1,000 bytes, Postfix 2,049.
MAX_ADDRESS = 999

_SENDABLE = re.compile(rb"[^\0\r\n<][^\0\r\n]{0,%d}" % (MAX_ADDRESS - 1)).fullmatch


def is_sendable(address: bytes) -> bool:
    """Whether every server reads this address as it was meant, as a recipient or as a sender. (The
    null sender is empty, and valid as a sender only.)

    Some would misread NUL, CR or LF (Postfix delivers to what stands before a NUL), a leading angle
    bracket, and more than MAX_ADDRESS bytes."""
    return _SENDABLE(address) is not None


class Request:
    """A message of `size` bytes to `recipients` from `sender` (empty: the null sender).

    On the wire it is `head`, then the `size` bytes of the message, then `tail`; `length` bytes in
    all. Raises ValueError for a negative size, an address that is not sendable, and a request
    without a recipient (qmail-qmqpd accepts and discards it, Postfix refuses it).
    """

    __slots__ = ("head", "length", "size", "tail")

    def __init__(self, size: int, sender: bytes, recipients: Sequence[bytes]) -> None:
        if size < 0:
            raise ValueError(f"a message of {size} bytes")
        if not recipients:
            raise ValueError("a request needs a recipient")
        if sender and not is_sendable(sender):
            raise ValueError(f"no server can be trusted with the sender {_shown(sender)}")
        for recipient in recipients:
            if not is_sendable(recipient):
                raise ValueError(f"no server can be trusted with the recipient {_shown(recipient)}")
        envelope = b"".join(
            [b"%d:%b," % (len(address), address) for address in (sender, *recipients)]
        )
        self.size = size
        self.head = b"%d:%d:" % (length_of(size) + len(envelope), size)
        self.tail = b",%b," % envelope
        self.length = len(self.head) + size + len(self.tail)


def _shown(address: bytes) -> str:
    """The beginning of an address; bytes that cannot be printed are `\\xNN`."""
    return repr(address[:80])[2:-1] or "<>"


class RequestParser:
    """Reads one request as a strict server does: every length is exact, and nothing stands between
    the inner strings and the end of the outer one.

    `body` is called with each piece of the message, in turn. Once `feed` has returned True, `size`,
    `sender` and `recipients` (perhaps empty: the server decides about that) are known; bytes after
    the request mean nothing. `where` names what is being read, in Postfix' words."""

    def __init__(
        self,
        body: Callable[[memoryview], object],
        max_size: int = MAX_LENGTH,
        max_address: int = 2048,
    ) -> None:
        self._body = body
        self._max_size = max_size
        self._max_address = max_address
        self.where = "QMQP packet header"
        self.size = 0
        self.sender = b""
        self.recipients: list[bytes] = []
        self.complete = False
        self._data = memoryview(b"")  # received and not yet read
        self._left = 2 * MAX_LENGTH  # bytes of the outer string that are not yet read
        self._steps = self._read()

    def feed(self, data: bytes) -> bool:
        """Take the next bytes; True once the request is complete. Raises FormatError, SizeError."""
        self._data = memoryview(bytes(self._data) + data)
        next(self._steps, None)
        return self.complete

    def _read(self) -> Iterator[None]:
        """Read the whole request; yield wherever more bytes must come."""
        self._left = yield from self._length(MAX_LENGTH)
        self.where = "message content"
        self.size = missing = yield from self._length(self._max_size)
        while missing:
            while not self._data:
                yield
            piece = yield from self._take(min(missing, len(self._data)))
            self._body(piece)
            missing -= len(piece)
        yield from self._comma()
        self.where = "sender address"
        self.sender = yield from self._address()
        self.where = "recipient address"
        while self._left:
            self.recipients.append((yield from self._address()))
        yield from self._comma()
        self.complete = True

    def _length(self, limit: int) -> Generator[None, None, int]:
        """The length of a string that must end, with its comma, before the request does."""
        while (header := read_length(bytes(self._data[: min(self._left, 11)]), limit)) is None:
            if len(self._data) >= self._left:
                raise FormatError("a length runs past the end of the request")
            yield
        length, begin = header
        yield from self._take(begin)
        if length >= self._left:
            raise FormatError("a string runs past the end of the request")
        return length

    def _address(self) -> Generator[None, None, bytes]:
        length = yield from self._length(self._max_address)
        address = bytes((yield from self._take(length)))
        yield from self._comma()
        return address

    def _comma(self) -> Iterator[None]:
        if bytes((yield from self._take(1))) != b",":
            raise FormatError(f"no comma at the end: {self.where}")

    def _take(self, count: int) -> Generator[None, None, memoryview]:
        while len(self._data) < count:
            yield
        taken = self._data[:count]
        self._data = self._data[count:]
        self._left -= count
        return taken
