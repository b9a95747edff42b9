"""Reads single bodies by their place. Segments stay open, so a body is one system call.

What must stay true: a body is checked before the caller gets it; a segment that was unlinked is
closed by `close_unlinked`, or its space would never come back.
"""

import threading

from relay.spool.journal.directory import JournalDirectory, SegmentFile
from relay.spool.journal.format import CHECKSUM_SIZE, Place, verifies


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
        if len(octets) != size + CHECKSUM_SIZE or not verifies(
            bytes.fromhex(place.segment), place.position, octets
        ):
            raise WrongBody(f"damaged at {place.position} of segment {place.segment}")
        return octets[:-CHECKSUM_SIZE]

    def reopen(self, segment: str) -> None:
        """Open the segment's file again for the next read."""
        with self._lock:
            self._files.pop(segment, None)  # a thread that reads it keeps it until it is done

    def close_unlinked(self) -> None:
        """Close the segments that have no name any more."""
        with self._lock:
            self._files = {
                segment: file for segment, file in self._files.items() if not file.unlinked()
            }

    def _open(self, segment: str) -> SegmentFile:
        """The file of a segment, under any of its names."""
        file = self._directory.open_segment(segment)
        if file is None:
            raise WrongBody(f"segment {segment} is missing")
        with self._lock:
            return self._files.setdefault(segment, file)
