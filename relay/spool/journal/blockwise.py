"""Reads a segment of which the disk cannot give some blocks.

A read that fails is repeated block by block. A block that fails twice more is lost: its octets are
zeros, which verify nowhere. A failing disk takes seconds for each try, so a lost block is not tried
again as long as its file is open and remembers it. What must stay true: `lost` names every block
that was not read, and an error that does not belong to a place of the disk is raised.
"""

import errno

from relay.spool.journal.directory import SegmentFile
from relay.spool.journal.format import BLOCK

UNREADABLE = frozenset({errno.EIO, errno.EUCLEAN})
"""What a disk or its file system says about a place that it has lost."""
_TRIES = 2


class BlockwiseReader:
    """Reads one open segment."""

    def __init__(self, file: SegmentFile) -> None:
        self._file, self._lost = file, file.lost

    def read(self, size: int, position: int) -> bytes:
        """Up to `size` octets. Raises OSError."""
        if not self.lost(position, position + size):
            try:
                return self._file.read(size, position)
            except OSError as error:
                if error.errno not in UNREADABLE:
                    raise
        end = min(position + size, self._file.size())
        starts = range(position // BLOCK * BLOCK, end, BLOCK)
        return b"".join(self._piece(max(at, position), min(at + BLOCK, end)) for at in starts)

    def lost(self, start: int, end: int) -> bool:
        """Whether the disk could not give some block of these octets."""
        return bool(self._lost) and not self._lost.isdisjoint(
            range(start // BLOCK * BLOCK, end, BLOCK)
        )

    def _piece(self, start: int, end: int) -> bytes:
        """Octets of one block."""
        block = start // BLOCK * BLOCK
        for _ in range(0 if block in self._lost else _TRIES):
            try:
                return self._file.read(end - start, start)
            except OSError as error:
                if error.errno not in UNREADABLE:
                    raise
        self._lost.add(block)
        return bytes(end - start)
