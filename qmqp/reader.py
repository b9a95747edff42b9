"""The server's side of a request: a strict reader without any I/O.

`RequestParser` reads a request as a strict server does, passes the message on in pieces as they
come, and never buffers more than an address.
"""

from collections.abc import Callable, Generator, Iterator

from qmqp.netstring import MAX_LENGTH, FormatError, read_length


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
