"""The message of a request: its octets, a file that is read block by block into one buffer, or a
function that returns the blocks.

Memory stays flat for a file of any size: there is one block. The event loop itself reads what lies
in the page cache, as a file that was just written does. Everything else would block the loop, so a
thread reads it.

What must stay true: the request announces its length before the message is read, so the file must
hold what was announced. The last block is returned only when the size is right, and the checksum if
one is known. Otherwise the connection must be closed before the commit point: the server would read
a wrong length as another message, or as none, and would accept damaged octets.
"""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass

from isal.isal_zlib import crc32  # zlib's takes seven times as long

from qmqp.connection import describe

_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)  # Linux: read only what is in the page cache


class BodyFault(OSError):
    """The body cannot be read; see errno. The connection was closed before the commit point."""


class BodyChanged(BodyFault):
    """The body has another size than announced. The connection was closed before the commit
    point."""


class BodyDamaged(BodyFault):
    """The octets do not verify. The connection was closed before the commit point."""


@dataclass(frozen=True, slots=True)
class BodyFile:
    """A body of `size` octets from the start of an open file. The file ends with it, unless its
    CRC-32 is given: then that is checked, and more may follow in the file."""

    fd: int
    size: int
    checksum: int | None = None

    def close(self) -> None:
        """Close the file."""
        os.close(self.fd)


type Body = bytes | BodyFile


@dataclass(frozen=True, slots=True)
class BodyStream:
    """A body of `size` octets that a function returns: `read(size, offset)` is at most `size`
    octets from `offset` on, and nothing only at the end. It may block: a thread calls it."""

    size: int
    read: Callable[[int, int], bytes]


class BodyStreamReader:
    """Reads a stream as `BodyReader` reads a file. Nothing of it is read without waiting."""

    __slots__ = ("_block_size", "_offset", "_stream", "whole")

    def __init__(self, stream: BodyStream, block_size: int) -> None:
        self._stream = stream
        self._block_size = block_size
        self._offset = 0
        self.whole = False

    def cached(self) -> None:
        """No block: `read` waits for each."""

    def read(self) -> memoryview:
        """The next block. Blocks: for a thread. Raises BodyFault, BodyChanged."""
        size = min(self._block_size, self._stream.size - self._offset)
        block = b""
        try:
            while len(block) < size and (
                piece := self._stream.read(size - len(block), self._offset + len(block))
            ):
                block += piece
        except OSError as error:
            raise BodyFault(error.errno, f"the body cannot be read: {describe(error)}") from error
        self._offset += len(block)
        if len(block) != size:
            raise BodyChanged(
                errno.EIO,
                f"the body has {self._offset} bytes where {self._stream.size} were announced",
            )
        self.whole = self._offset == self._stream.size
        return memoryview(block)


class BodyReader:
    """Reads the body of a file, at most `block_size` octets at a time.

    `whole` is true once the last octet was read. A block is valid until the next one is read."""

    __slots__ = ("_block", "_checksum", "_file", "_offset", "whole")

    def __init__(self, file: BodyFile, block_size: int) -> None:
        self._file = file
        self._block = memoryview(bytearray(min(file.size, block_size)))
        self._offset = 0
        self._checksum = 0  # of what was read
        self.whole = False

    def cached(self) -> memoryview | None:
        """The next block; None if it cannot be read without waiting. Raises as `read`."""
        view = self._next()
        try:
            count = (
                os.preadv(self._file.fd, (view,), self._offset, _NOWAIT) if _NOWAIT and view else 0
            )
        except OSError:  # not in the cache, or not on this file system; `read` meets a real error
            count = 0
        return self._advance(view) if count == len(view) else None

    def read(self) -> memoryview:
        """The next block. Blocks: for a thread. Raises BodyFault, BodyChanged, BodyDamaged."""
        view = self._next()
        done = 0
        try:
            while done < len(view) and (
                count := os.preadv(self._file.fd, (view[done:],), self._offset + done)
            ):
                done += count
        except OSError as error:
            raise BodyFault(error.errno, f"the body cannot be read: {describe(error)}") from error
        return self._advance(view[:done])

    def _next(self) -> memoryview:
        return self._block[: self._file.size - self._offset]

    def _advance(self, view: memoryview) -> memoryview:
        self._offset += len(view)
        self.whole = self._offset == self._file.size
        if self._file.checksum is not None:
            self._checksum = crc32(view, self._checksum)
        if self.whole or len(view) < len(self._block):
            self._verify()
        return view

    def _verify(self) -> None:
        """Check the body at its end, or where the file ended before it."""
        size, checksum = self._file.size, self._file.checksum
        if not self.whole or checksum is None:
            actual = os.lseek(self._file.fd, 0, os.SEEK_END)
            if not self.whole or actual != size:
                raise BodyChanged(
                    errno.EIO, f"the body has {actual} bytes where {size} were announced"
                )
        elif self._checksum != checksum:
            raise BodyDamaged(
                errno.EIO, f"the body has the checksum {self._checksum:08x}, not {checksum:08x}"
            )
