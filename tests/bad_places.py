"""Places of segments that the disk of a test cannot read, whatever their names are."""

import errno
import os
from pathlib import Path

import pytest

from relay.spool.journal.directory import SegmentFile


class BadPlaces:
    """Reads of these octets fail with EIO until `heal`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._places: list[tuple[int, int, int]] = []
        self.reads: list[tuple[int, int]] = []  # those that failed
        read, cached = SegmentFile.read, SegmentFile.read_cached

        def bad(file: SegmentFile, size: int, position: int) -> bool:
            inode = file.status().st_ino
            failed = any(
                inode == one and start < position + size and position < end
                for one, start, end in self._places
            )
            if failed:
                self.reads.append((position, size))
            return failed

        def failing(file: SegmentFile, size: int, position: int) -> bytes:
            if bad(file, size, position):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return read(file, size, position)

        def failing_cached(file: SegmentFile, size: int, position: int) -> bytes | None:
            return None if bad(file, size, position) else cached(file, size, position)

        monkeypatch.setattr(SegmentFile, "read", failing)
        monkeypatch.setattr(SegmentFile, "read_cached", failing_cached)

    def add(self, path: Path, start: int, end: int) -> None:
        """The disk loses these octets of a file."""
        self._places.append((path.stat().st_ino, start, end))

    def heal(self) -> None:
        """Everything can be read again."""
        self._places.clear()
