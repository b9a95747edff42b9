"""The server's side of a request: a strict reader without any I/O.

`RequestReader` takes bytes, cut anywhere, and returns events: the size of the message, the message
in pieces as they come, and the envelope with the last comma. Every length must be exact, and
nothing may stand between the inner strings and the end of the outer one.

What must stay true: no event but `RequestComplete` means that there is a request, because the
client may close before its last comma. The reader buffers no more than an address, and keeps no
more than the envelope, which `max_address` and `max_recipients` limit. A length that is too large
is refused when it is announced.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass

from qmqp.netstring import MAX_LENGTH, FormatError, NetstringError, read_length

_HEADER = len(f"{MAX_LENGTH}::")  # bytes that decide about a length


class TooManyRecipients(NetstringError):
    """The request is well formed and complete, but has more recipients than this reader takes."""


@dataclass(frozen=True, slots=True)
class RequestStarted:
    """The lengths of the request and of its message have come: `size` bytes of message follow."""

    size: int


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """The next bytes of the message."""

    data: bytes


@dataclass(frozen=True, slots=True)
class RequestComplete:
    """The last comma has come. `sender` is empty if it is null; `recipients` may be empty, and each
    of them any bytes: the server decides about that."""

    sender: bytes
    recipients: tuple[bytes, ...]


type RequestEvent = RequestStarted | MessageReceived | RequestComplete


class RequestReader:
    """Reads one request. Bytes after it mean nothing.

    `where` names what is being read, in Postfix' words."""

    def __init__(
        self,
        max_size: int = MAX_LENGTH,
        max_address: int = 2048,
        max_recipients: int = MAX_LENGTH,
    ) -> None:
        self._max_size = max_size
        self._max_address = max_address
        self._max_recipients = max_recipients
        self.where = "QMQP packet header"
        self.complete = False
        self._data = memoryview(b"")  # received and not yet read
        self._left = 2 * MAX_LENGTH  # bytes of the outer string that are not yet read
        self._announced = False  # the outer length has come
        self._events: list[RequestEvent] = []
        self._steps = self._read()

    @property
    def missing(self) -> int:
        """Bytes up to the end of the request that have not come; 0 before its length has come."""
        return max(0, self._left + 1 - len(self._data)) if self._announced else 0

    def feed(self, data: bytes) -> list[RequestEvent]:
        """Take the next bytes; the events that they complete. Raises FormatError, SizeError and
        TooManyRecipients, after which the reader reads no more."""
        self._data = memoryview(bytes(self._data) + data if self._data else data)
        self._events = []
        next(self._steps, None)
        return self._events

    def _read(self) -> Iterator[None]:
        """Read the whole request; yield wherever more bytes must come."""
        self._left = yield from self._length(MAX_LENGTH)
        self._announced = True
        self.where = "message content"
        missing = yield from self._length(self._max_size)
        self._events.append(RequestStarted(missing))
        while missing:
            while not self._data:
                yield
            piece = yield from self._take(min(missing, len(self._data)))
            self._events.append(MessageReceived(piece))
            missing -= len(piece)
        yield from self._comma()
        self.where = "sender address"
        sender = yield from self._address()
        self.where = "recipient address"
        recipients: list[bytes] = []
        too_many = False
        while self._left:
            address = yield from self._address()
            too_many = len(recipients) == self._max_recipients
            if not too_many:
                recipients.append(address)
        yield from self._comma()
        if too_many:
            raise TooManyRecipients(f"more than {self._max_recipients} recipients")
        self.complete = True
        self._events.append(RequestComplete(sender, tuple(recipients)))

    def _length(self, limit: int) -> Generator[None, None, int]:
        """The length of a string that must end, with its comma, before the request does."""
        while (header := read_length(bytes(self._data[: min(self._left, _HEADER)]), limit)) is None:
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
        address = yield from self._take(length)
        yield from self._comma()
        return address

    def _comma(self) -> Iterator[None]:
        if (yield from self._take(1)) != b",":
            raise FormatError(f"no comma at the end: {self.where}")

    def _take(self, count: int) -> Generator[None, None, bytes]:
        while len(self._data) < count:
            yield
        taken = bytes(self._data[:count])
        self._data = self._data[count:]
        self._left -= count
        return taken
