"""Reads the message of a request from a file, block by block, into one buffer.

Memory stays flat for a message of any size: there is one block. The event loop itself reads what
lies in the page cache, as a file that was just written does. Everything else would block the loop,
so a thread reads it.

What must stay true: the request announces its length before the message is read, so the file must
have exactly the announced size. The last block is returned only when the file ends with it. A file
that is shorter or longer raises BodyChanged, and the connection must be closed before the commit
point: the server would read a wrong length as another message, or as none.
"""

import errno
import os

from qmqp.connection import describe

_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)  # Linux: read only what is in the page cache


class BodyFault(OSError):
    """The body cannot be read; see errno. The connection was closed before the commit point."""


class BodyChanged(BodyFault):
    """The body has another size than announced. The connection was closed before the commit
    point."""


class BodyReader:
    """Reads `size` bytes of the file `fd`, at most `block_size` bytes at a time.

    `whole` is true once the last byte was read. A block is valid until the next one is read."""

    __slots__ = ("_block", "_fd", "_offset", "_size", "whole")

    def __init__(self, fd: int, size: int, block_size: int) -> None:
        self._fd = fd
        self._size = size
        self._block = memoryview(bytearray(min(size, block_size)))
        self._offset = 0
        self.whole = False

    def cached(self) -> memoryview | None:
        """The next block; None if it cannot be read without waiting. Raises BodyChanged."""
        view = self._block[: self._size - self._offset]
        try:
            count = os.preadv(self._fd, (view,), self._offset, _NOWAIT) if _NOWAIT and view else 0
        except OSError:  # not in the cache, or not on this file system; `read` meets a real error
            count = 0
        return self._advance(view) if count == len(view) else None

    def read(self) -> memoryview:
        """The next block. Blocks: for a thread. Raises BodyFault, BodyChanged."""
        view = self._block[: self._size - self._offset]
        done = 0
        try:
            while done < len(view) and (
                count := os.preadv(self._fd, (view[done:],), self._offset + done)
            ):
                done += count
        except OSError as error:
            raise BodyFault(error.errno, f"the body cannot be read: {describe(error)}") from error
        return self._advance(view[:done])

    def _advance(self, view: memoryview) -> memoryview:
        self._offset += len(view)
        self.whole = self._offset == self._size
        if self.whole or len(view) < len(self._block):
            size = os.lseek(self._fd, 0, os.SEEK_END)
            if not self.whole or size != self._size:
                raise BodyChanged(
                    errno.EIO, f"the body has {size} bytes where {self._size} were announced"
                )
        return view
