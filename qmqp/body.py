"""The message of a request, read from a file block by block into one buffer.

How it works. A message has any size and memory stays flat, so there is one block for all of it, no
larger than the message. What lies in the page cache is read on the event loop, which is where a
file that was just written lies; for anything else the loop must not wait, and a thread fills the
block.

What must stay true: the length of a request is sent before its message is read, so the file must
have exactly the size that was announced. With the last block its end is looked for, and what is
shorter or longer is no body: the connection has to be closed before the commit point, as a wrong
length is read as another message or as none.
"""

import errno
import os

from qmqp.result import words_of

_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)  # Linux: read only what is in the page cache
_MOST_SPARE = 64

_spare: list[memoryview] = []  # blocks whose memory the kernel need not fetch and clear again


class BodyFault(OSError):
    """The body could not be read, as its errno says. The connection was closed before the commit
    point."""


class BodyChanged(BodyFault):
    """The body is shorter or longer than the request announces. The connection was closed before
    the commit point."""


class BodyReader:
    """The `size` bytes that the file `fd` is expected to have, `block_size` bytes at a time;
    `whole` once the last of them were read. A block is valid until the next one is asked for."""

    __slots__ = ("_block", "_fd", "_offset", "_size", "whole")

    def __init__(self, fd: int, size: int, block_size: int) -> None:
        self._fd, self._size = fd, size
        spare = _spare and len(_spare[-1]) == block_size
        self._block = _spare.pop() if spare else memoryview(bytearray(block_size))
        self._offset = 0
        self.whole = False

    def cached(self) -> memoryview | None:
        """The next block; None if it cannot be had without waiting. Raises BodyChanged."""
        view = self._block[: self._size - self._offset]
        try:
            got = os.preadv(self._fd, (view,), self._offset, _NOWAIT) if _NOWAIT and view else 0
        except OSError:  # not in the cache, or not on this file system; a real error comes again
            got = 0
        return self._got(view) if got == len(view) else None

    def read(self) -> memoryview:
        """The next block. Blocks: for a thread. Raises BodyFault, BodyChanged."""
        view, done = self._block[: self._size - self._offset], 0
        try:
            while done < len(view) and (
                got := os.preadv(self._fd, (view[done:],), self._offset + done)
            ):
                done += got
        except OSError as error:
            raise BodyFault(error.errno, f"the body cannot be read: {words_of(error)}") from error
        return self._got(view[:done])

    def release(self) -> None:
        """Let another body have the block. Not while a thread may still write into it."""
        if len(_spare) < _MOST_SPARE:
            _spare.append(self._block)

    def _got(self, view: memoryview) -> memoryview:
        self._offset += len(view)
        self.whole = self._offset == self._size
        if self.whole or len(view) < len(self._block):
            found = os.lseek(self._fd, 0, os.SEEK_END)
            if not self.whole or found != self._size:
                raise BodyChanged(
                    errno.EIO, f"the body has {found} bytes where {self._size} were announced"
                )
        return view
