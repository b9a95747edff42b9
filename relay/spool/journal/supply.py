"""Makes segments ahead of need, in a thread: one is always ready.

A segment is filled with zeros and synced before its name says that it may be written, so a crash
leaves at most a `.new` file, which the next owner removes. What must stay true: a segment leaves
MIN_FREE octets of the file system free; `take` itself tries again if the segment that should be
ready could not be made, and raises only the error of that second try.
"""

import errno
import socket
import threading
import time
from concurrent.futures import Future
from contextlib import suppress

from relay.ids import new_id
from relay.spool.journal.directory import NEW, OWNED, JournalDirectory, SegmentFile
from relay.spool.journal.format import (
    BLOCK,
    SEGMENT_SIZE,
    SegmentHeader,
    encode_segment_header,
)

MIN_FREE = 4 << 20
"""Octets that stay free on the file system."""


def make_segment(
    directory: JournalDirectory, spool: str, *, size: int = SEGMENT_SIZE
) -> tuple[str, SegmentFile]:
    """A new segment, filled, synced and locked, under its final name; raises OSError."""
    segment = new_id()
    header = SegmentHeader(segment, spool, int(time.time() * 1_000_000), socket.gethostname())
    file = directory.create(segment + NEW)
    try:
        if file.write([encode_segment_header(header)], 0) != BLOCK:
            raise OSError(errno.ENOSPC, "a short write")
        file.fill(BLOCK, size)
        directory.rename(segment + NEW, segment + OWNED)
        directory.sync()
    except OSError:
        file.close()
        for name in (segment + NEW, segment + OWNED):
            with suppress(OSError):
                directory.unlink(name)
        raise
    return segment, file


class SegmentSupply:
    """`take` may wait for the disk. `spool` is the spool's identity."""

    def __init__(
        self, directory: JournalDirectory, spool: str, *, size: int = SEGMENT_SIZE
    ) -> None:
        self._directory, self._spool, self._size = directory, spool, size
        self._next: Future[tuple[str, SegmentFile]] | None = None

    def prepare(self) -> None:
        """Begin to make the next segment."""
        future: Future[tuple[str, SegmentFile]] = Future()
        self._next = future
        thread = threading.Thread(
            target=self._fulfil, args=(future,), name="segment-supply", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:  # the system has no thread left
            future.set_exception(OSError(errno.EAGAIN, str(error)))

    def take(self) -> tuple[str, SegmentFile]:
        """The next segment; raises OSError."""
        ready, self._next = self._next, None
        try:
            result = self._make() if ready is None else ready.result()
        except OSError:
            if ready is None:
                raise
            result = self._make()  # the disk may have been full when it was prepared
        self.prepare()
        return result

    def close(self) -> None:
        """Remove the segment that was not taken."""
        if self._next is not None:
            with suppress(OSError):
                segment, file = self._next.result()
                self._directory.unlink(segment + OWNED)
                file.close()

    def _fulfil(self, future: "Future[tuple[str, SegmentFile]]") -> None:
        try:
            future.set_result(self._make())
        except BaseException as error:
            future.set_exception(error)

    def _make(self) -> tuple[str, SegmentFile]:
        if self._directory.free_octets() < self._size + MIN_FREE:
            raise OSError(errno.ENOSPC, "no room for a segment")
        return make_segment(self._directory, self._spool, size=self._size)
