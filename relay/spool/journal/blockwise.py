"""Reads a segment of which the disk cannot give some blocks.

A read that fails is repeated block by block. A block that fails twice more is lost: its octets are
zeros, which verify nowhere. A failing disk takes seconds for each try, so a lost block is not tried
again as long as its file is open and remembers it. When the patience of the file has run out, a
read that fails is repeated only from its two ends, up to a lost block, and what lies between is
lost.

What must stay true: `lost` names every block that was not read, and an error that does not belong
to a place of the disk is raised.
"""

import errno
import time

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
            octets = self._try(size, position)
            if octets is not None:
                return octets
        return self._blocks(position, min(position + size, self._file.size()))

    def lost(self, start: int, end: int) -> bool:
        """Whether the disk could not give some block of these octets."""
        return bool(self._lost) and not self._lost.isdisjoint(
            range(start // BLOCK * BLOCK, end, BLOCK)
        )

    def _blocks(self, start: int, end: int) -> bytes:
        """Octets, block by block: from the front, and without patience from both ends."""
        blocks = range(start // BLOCK * BLOCK, end, BLOCK)
        pieces: dict[int, bytes] = {}
        for order in (blocks, blocks[::-1]):
            for block in order:
                if block in pieces:
                    break
                known = block in self._lost
                pieces[block] = self._piece(max(block, start), min(block + BLOCK, end))
                if not known and block in self._lost and self._file.patience <= 0:
                    break
        for block in blocks:
            if block not in pieces:
                self._lost.add(block)
                pieces[block] = bytes(BLOCK)  # it is neither the first nor the last, so it is whole
        return b"".join(pieces[block] for block in blocks)

    def _piece(self, start: int, end: int) -> bytes:
        """Octets of one block."""
        block = start // BLOCK * BLOCK
        for _ in range(0 if block in self._lost else _TRIES):
            octets = self._try(end - start, start)
            if octets is not None:
                return octets
        self._lost.add(block)
        return bytes(end - start)

    def _try(self, size: int, position: int) -> bytes | None:
        began = time.monotonic()
        try:
            return self._file.read(size, position)
        except OSError as error:
            if error.errno not in UNREADABLE:
                raise
        self._file.patience -= time.monotonic() - began
        return None
