"""Reads single bodies by their place. Segments stay open, so a body is one system call.

What must stay true: a body is checked before the caller gets it; a segment that was unlinked is
closed by `close_unlinked`, or its space would never come back; however many segments wait, only
MAX_OPEN are open.
"""

import threading

from relay.spool.journal.directory import JournalDirectory, SegmentFile
from relay.spool.journal.format import CHECKSUM_SIZE, Place, verifies

MAX_OPEN = 64
"""Segments. The one that was opened first is closed for another one."""


class WrongBody(Exception):
    """The body is not at its place, or damaged; the text says which."""


class JournalReader:
    """Any number of threads may read."""

    def __init__(self, directory: JournalDirectory) -> None:
        self._directory = directory
        self._files: dict[str, SegmentFile] = {}
        self._lock = threading.Lock()

    def read(self, place: Place, size: int) -> bytes:
        """The body of so many octets. Raises WrongBody, and OSError if the fault is not the
        body's."""
        file = self._files.get(place.segment) or self._open(place.segment)
        octets = file.read(size + CHECKSUM_SIZE, place.position)
        if len(octets) != size + CHECKSUM_SIZE or not _verifies(place, octets):
            raise WrongBody(f"damaged at {place.position} of segment {place.segment}")
        return octets[:-CHECKSUM_SIZE]

    def cached(self, place: Place, size: int) -> bytes | None:
        """The body, if its segment is open and the body is in the page cache; else None, also if it
        does not verify. Does not wait for the disk."""
        file = self._files.get(place.segment)
        octets = file and file.read_cached(size + CHECKSUM_SIZE, place.position)
        if not octets or not _verifies(place, octets):
            return None
        return octets[:-CHECKSUM_SIZE]

    def reopen(self, segment: str) -> None:
        """Open the segment's file again for the next read."""
        with self._lock:
            self._files.pop(segment, None)  # a thread that reads it keeps it until it is done

    def close_unlinked(self) -> None:
        """Close the segments that have no name any more. One whose name cannot be looked up stays
        open; the next call asks again."""
        with self._lock:
            files = [*self._files.items()]
        unlinked = {segment for segment, file in files if self._is_unlinked(segment, file)}
        with self._lock:
            for segment in unlinked:
                self._files.pop(segment, None)

    def _is_unlinked(self, segment: str, file: SegmentFile) -> bool:
        try:
            return not self._directory.has_name(segment, file)
        except OSError:
            return False

    def _open(self, segment: str) -> SegmentFile:
        """The file of a segment, under any of its names."""
        file = self._directory.open_segment(segment)
        if file is None:
            raise WrongBody(f"segment {segment} is missing")
        with self._lock:
            if len(self._files) >= MAX_OPEN:  # a thread that reads it keeps it open
                del self._files[next(iter(self._files))]
            return self._files.setdefault(segment, file)


def _verifies(place: Place, octets: bytes) -> bool:
    return verifies(bytes.fromhex(place.segment), place.position, octets)
