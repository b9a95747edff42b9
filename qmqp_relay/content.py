"""The content of a message, as `message` and `queue` may read it.

It is what a QMQP server would get: the fields that plugins have added, the Received field of the
relay, then what the client sent, with LF line ends. A message of any size is read in blocks, and
only one block of it is in memory.
"""

import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from email.message import EmailMessage

BLOCK_SIZE = 64 * 1024
LONGEST_HEADER = 1 << 20
"""Octets of a header that is parsed; what follows is left out."""

type Read = Callable[[int, int], bytes]
type InThread = Callable[[Callable[[], bytes]], Awaitable[bytes]]


class ContentClosed(Exception):
    """The hook that got the content has ended, or has taken too long."""


class MessageContent:
    """The content of one message.

    `read(size, offset)` reads the stored part, which has `stored` octets, and may block; then
    `in_thread` runs it in a thread (None: it does not block).
    """

    def __init__(self, read: Read, stored: int, in_thread: InThread | None = None) -> None:
        self.added = b""
        """The fields that plugins have added; `Transaction.add_header` changes it."""
        self._read = read
        self._stored = stored
        self._in_thread = in_thread
        self._lock = threading.Lock()
        self._closed = False
        self._header: EmailMessage | None = None

    @property
    def size(self) -> int:
        """Octets that `blocks` yields in all."""
        return len(self.added) + self._stored

    def blocks(self, size: int = BLOCK_SIZE) -> "ContentBlocks":
        """The content in blocks of `size` octets. An `async def` reads them with `async for`, a
        `def` with `for`; each call begins again. Raises OSError if the disk does not yield them,
        and ContentClosed after the end of the hook."""
        return ContentBlocks(self, size)

    @property
    def header(self) -> "EmailMessage":
        """The header of the stored part, parsed by `email` when it is first asked for."""
        if self._header is None:
            # Most relays have no plugin that asks, and the parser takes half a MiB.
            from email import message_from_bytes, policy
            from email.message import EmailMessage

            text, end = b"", -1
            while end < 0 and len(text) < min(self._stored, LONGEST_HEADER):
                text += self.read(BLOCK_SIZE, len(self.added) + len(text))
                end = text.find(b"\n\n")
            head = text if end < 0 else text[: end + 2]
            parsed = message_from_bytes(head, policy=policy.default)
            assert isinstance(parsed, EmailMessage)
            self._header = parsed
        return self._header

    def read(self, size: int, offset: int) -> bytes:
        """At most `size` octets from `offset` on; fewer only at the end of a part. Blocks."""
        if offset < len(self.added):
            return self.added[offset : offset + size]
        offset -= len(self.added)
        size = min(size, self._stored - offset)
        with self._lock:
            if self._closed:
                raise ContentClosed("the content can be read only while the hook runs")
            block = self._read(size, offset) if size > 0 else b""
        if size > 0 and not block:
            raise OSError(f"the content ends after {offset} of {self._stored} octets")
        return block

    async def read_soon(self, size: int, offset: int) -> bytes:
        """As `read`, without blocking the event loop."""
        if self._in_thread is None or offset < len(self.added):
            return self.read(size, offset)
        return await self._in_thread(lambda: self.read(size, offset))

    def close(self) -> None:
        """Nothing can be read any more. Waits for a read that has begun, because its descriptor is
        closed next."""
        with self._lock:
            self._closed = True


@dataclass(slots=True)
class ContentBlocks:
    """One pass over a content, for `for` or for `async for`."""

    content: MessageContent
    size: int
    _offset: int = field(default=0, init=False)

    def __iter__(self) -> Iterator[bytes]:
        while self._offset < self.content.size:
            block = self.content.read(self.size, self._offset)
            self._offset += len(block)
            yield block

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while self._offset < self.content.size:
            block = await self.content.read_soon(self.size, self._offset)
            self._offset += len(block)
            yield block
