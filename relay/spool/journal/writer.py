"""Appends batches to segments: one write and one sync for all messages that gathered.

A segment is made ahead of need (`supply`), so that an append changes no metadata of the file
system. When a write or a sync fails, the state of the batch on the disk is unknown. The writer then
declares the batch void in a new segment. Only when that is synced may clients hear that nothing was
stored (`AppendFailed`). Otherwise they hear nothing (`AppendUnknown`), because a replay may find
the batch.

What must stay true: a segment that failed is never written or synced again, because the kernel
reports an error once and may then call the lost octets clean; a batch that returned is on the disk,
in a file that still belongs to this process.
"""

import errno
import time
from collections.abc import Buffer, Callable, Sequence
from typing import NamedTuple, Protocol

from relay.log import get_logger
from relay.spool.journal.directory import OWNED, JournalDirectory, SegmentFile
from relay.spool.journal.format import (
    BLOCK,
    SEGMENT_SIZE,
    JournalRecord,
    VoidedBatch,
    batch_size,
    encode_batch,
    encode_void,
)

log = get_logger(__name__)


class AppendFailed(OSError):
    """Nothing of the batch was stored, and no replay will find it."""


class AppendUnknown(Exception):
    """The batch may be on the disk. Its clients must hear neither 250 nor an error."""


class AppendedBatch(NamedTuple):
    """Where a batch stands. `positions` are those of the bodies."""

    segment: str
    start: int
    end: int
    positions: list[int]


class SegmentSource(Protocol):
    """Makes segments (`relay.spool.journal.supply`)."""

    def take(self) -> tuple[str, SegmentFile]:
        """The id and the file of a new segment that this process owns; raises OSError."""


class JournalWriter:
    """Belongs to one thread, but for `close_segment`.

    `on_retired` gets the id of each segment that will not be written again, and whether it ends
    orderly; its file stays open and locked until `close_segment`, which may be called from any
    thread.
    """

    def __init__(
        self,
        directory: JournalDirectory,
        supply: SegmentSource,
        *,
        on_retired: Callable[[str, bool], object],
        segment_size: int = SEGMENT_SIZE,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._directory = directory
        self._supply = supply
        self._on_retired = on_retired
        self._size = segment_size
        self._clock = clock
        self.segment = ""  # none yet
        self.position = 0
        self.files: dict[str, SegmentFile] = {}  # of the segments that this process owns

    def append(self, records: Sequence[JournalRecord], *, mark: int = 0) -> AppendedBatch:
        """Write and sync records together. Raises AppendFailed (its errno is the cause) and
        AppendUnknown."""
        file = self.files.get(self.segment)  # stays open while it is written to
        if file is None:  # it was closed because another process adopted it
            self.segment = ""
        if file is None or not (batch := self._encode(records, mark))[2] <= self._size:
            if BLOCK + batch_size(records) > self._size:
                raise AppendFailed(errno.EFBIG, "a batch that is larger than a segment")
            file = self._rotate()
            batch = self._encode(records, mark)
        parts, positions, end = batch
        segment, start = self.segment, self.position
        try:
            self._write(file, parts, end)
        except OSError as error:
            self._void(VoidedBatch(segment, start), file, error, mark)
        return AppendedBatch(segment, start, end, positions)

    def close_segment(self, segment: str) -> None:
        """Close the file of a segment, which releases its lock, but not before a write to it that
        goes on has ended."""
        file = self.files.pop(segment, None)
        if file is not None and segment != self.segment:
            file.close()

    def retire(self, *, orderly: bool = True) -> None:
        """Write no more to the current segment."""
        segment, self.segment = self.segment, ""
        if segment:
            self._on_retired(segment, orderly)

    def _encode(
        self, records: Sequence[JournalRecord], mark: int
    ) -> tuple[list[Buffer], list[int], int]:
        written_at = int(self._clock() * 1_000_000)
        return encode_batch(
            bytes.fromhex(self.segment), self.position, records, mark=mark, written_at=written_at
        )

    def _rotate(self) -> SegmentFile:
        """Begin a new segment; raises AppendFailed if it cannot be made."""
        self.retire()
        try:
            return self._open_next()
        except OSError as error:
            raise AppendFailed(error.errno, f"no new segment: {error.strerror}") from error

    def _open_next(self) -> SegmentFile:
        self.segment, file = self._supply.take()
        self.files[self.segment] = file
        self.position = BLOCK
        return file

    def _write(self, file: SegmentFile, parts: Sequence[Buffer], end: int) -> None:
        """Write and sync at the current position; raises OSError, and AppendUnknown when another
        process has adopted the segment."""
        if file.write(parts, self.position) != end - self.position:
            raise OSError(errno.ENOSPC, "a short write")
        file.sync()
        if not self._directory.leads_to(self.segment + OWNED, file):
            log.critical("segment lost", segment=self.segment)
            self.retire(orderly=False)
            raise AppendUnknown("another process has adopted the segment")
        self.position = end

    def _void(
        self, failed: VoidedBatch, failed_file: SegmentFile, error: OSError, mark: int
    ) -> None:
        """Declare a batch void; always raises."""
        log.critical("journal write failed", segment=failed.segment, reason=str(error))
        self.segment = ""
        try:
            file = self._open_next()
            written_at = int(self._clock() * 1_000_000)
            segment = bytes.fromhex(self.segment)
            void = encode_void(segment, self.position, failed, mark=mark, written_at=written_at)
            self._write(file, [void], self.position + BLOCK)
            # An adopter renames first and reads the voids then, so it sees this one if the name is
            # still there. Otherwise it may have made rows of the batch already.
            if not self._directory.leads_to(failed.segment + OWNED, failed_file):
                raise AppendUnknown("another process has adopted the segment of the void batch")
        except (OSError, AppendUnknown) as second:
            if self.segment:
                self.retire(orderly=False)
            self._on_retired(failed.segment, False)
            raise AppendUnknown(str(second)) from error
        self._on_retired(failed.segment, True)
        raise AppendFailed(error.errno, str(error)) from error
