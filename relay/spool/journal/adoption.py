"""Takes over the segments of a spooler that has ended, so that their mail gets its rows.

A free lock proves on a local file system that the owner's process has ended. On a network file
system a lock may be lost while its owner lives, so there only segments of this machine's name are
adopted by themselves; `fsck --adopt` adopts the others by an operator's order.

What must stay true: an adopter renames the segment before it reads it, and an owner compares the
name after each sync. So either the adopter reads the batch, or its owner's clients hear no 250. An
error of a lock is no adoption.
"""

import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePath

from relay.log import get_logger
from relay.spool.journal.directory import (
    ADOPTED,
    COPY,
    NEW,
    OWNED,
    JournalDirectory,
    SegmentFile,
)
from relay.spool.journal.format import JournalFormatError, SegmentHeader, VoidedBatch
from relay.spool.journal.scan import first_void, read_header

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class AdoptedSegment:
    """A segment that this process owns now. Closing `file` releases it."""

    header: SegmentHeader
    file: SegmentFile


def adopt(
    directory: JournalDirectory, *, skip: set[str], local: bool = True
) -> list[AdoptedSegment]:
    """Adopt every segment that has no owner, oldest first, but those whose ids are in `skip`.

    `local`: the file system belongs to this machine alone. One segment that cannot be read does not
    keep the others; raises OSError if the directory cannot be read.
    """
    _remove_unfinished(directory)
    adopted = []
    for segment, name in directory.segments(OWNED, ADOPTED):
        if segment in skip:
            continue
        try:
            if one := adopt_one(directory, name, local=local):
                adopted.append(one)
        except OSError as error:
            log.error("segment unreadable", name=name, reason=str(error))
    return adopted


def adopt_one(
    directory: JournalDirectory, name: str, *, local: bool, forced: bool = False
) -> AdoptedSegment | None:
    """Adopt one segment by its name; None if it has an owner, or is no segment. `forced`: an
    operator says that its owner, on another host, has ended; where several hosts have the file
    system, that counts more than a lock. Raises OSError.

    The owner may have ended between its write and its sync, so the segment is synced before it is
    read: rows never refer to octets that a power failure may take away.
    """
    try:
        file = directory.open(name, write=True)
    except FileNotFoundError:  # another process was faster
        return None
    try:
        header = read_header(file)
        if header.segment != PurePath(name).stem:
            raise JournalFormatError(f"the file has the header of segment {header.segment}")
        ours = local or forced or header.host == socket.gethostname()
        if ours and (file.lock() or (forced and not local)):
            if name.endswith(OWNED):
                directory.rename(name, header.segment + ADOPTED)
                directory.sync()
            if directory.leads_to(header.segment + ADOPTED, file):
                file.sync()
                return AdoptedSegment(header, file)
    except JournalFormatError as error:
        log.error("segment unreadable", name=name, reason=str(error))
    except FileNotFoundError:
        pass
    except OSError:
        file.close()
        raise
    file.close()
    return None


def voided_batches(directory: JournalDirectory) -> set[VoidedBatch]:
    """Every batch that some segment declares void. Raises OSError if the directory cannot be read.

    Call it after the adoption: an owner that is alive declares a batch void and then looks whether
    the segment still has its name. A segment that cannot be read is logged and passed over: if it
    declares a batch void, the messages of that batch may come twice, and no other waits for it.
    """
    voids = set()
    # A segment that is renamed while the directory is read may be missing. None is renamed twice.
    for segment in {
        segment for _ in range(2) for segment, _ in directory.segments(OWNED, ADOPTED, COPY)
    }:
        try:
            void = _void_in(directory, segment)
        except OSError as error:
            log.error("segment unreadable", name=segment, reason=str(error))
            continue
        if void is not None:
            voids.add(void)
    return voids


def _void_in(directory: JournalDirectory, segment: str) -> VoidedBatch | None:
    """The batch that a segment declares void. Raises OSError."""
    file = directory.open_segment(segment)
    if file is None:
        return None
    try:
        # The name is as good as the header, which may be damaged: checksums contain the id.
        return first_void(file, SegmentHeader(segment, "", 0, ""))
    finally:
        file.close()


def voided_from(voids: Iterable[VoidedBatch], segment: str) -> float:
    """From where on nothing of a segment counts: a segment that failed is never written again. The
    batch itself may seem to begin earlier, if headers before it are damaged."""
    return min((void.position for void in voids if void.segment == segment), default=float("inf"))


def _remove_unfinished(directory: JournalDirectory) -> None:
    """Remove files that were never finished and whose maker has ended."""
    for _, name in directory.segments(NEW):
        with suppress(OSError):  # it only takes room
            file = directory.open(name, write=True)
            try:
                if file.lock():
                    directory.unlink(name)
            finally:
                file.close()
