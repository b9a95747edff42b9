"""Writes a copy segment: records of other segments, for compaction.

A copy is as large as its records need. It gets its name when it is synced. Its records have rows
already, so it is read and rebuilt from, and never replayed.
"""

import errno
import socket
import time
from collections.abc import Sequence
from contextlib import suppress

from relay.ids import new_id
from relay.spool.journal.directory import COPY, NEW, JournalDirectory
from relay.spool.journal.format import (
    BLOCK,
    JournalRecord,
    SegmentHeader,
    encode_batch,
    encode_segment_header,
)


def write_copy(
    directory: JournalDirectory, spool: str, records: Sequence[JournalRecord]
) -> tuple[str, list[int], int]:
    """A copy of some records: its id, the position of each body, and its size. Raises OSError, and
    then nothing is left of it."""
    segment, now = new_id(), int(time.time() * 1_000_000)
    header = SegmentHeader(segment, spool, now, socket.gethostname(), copy=True)
    parts, positions, end = encode_batch(
        bytes.fromhex(segment), BLOCK, records, mark=0, written_at=now
    )
    file = directory.create(segment + NEW)
    try:
        file.fill(0, end)
        octets = [encode_segment_header(header), *parts]
        if file.write([b"".join(octets)], 0) != end:
            raise OSError(errno.ENOSPC, "a short write")
        file.sync()
        directory.rename(segment + NEW, segment + COPY)
        directory.sync()
    except OSError:
        for name in (segment + NEW, segment + COPY):
            with suppress(OSError):
                directory.unlink(name)
        raise
    finally:
        file.close()
    return segment, positions, end
