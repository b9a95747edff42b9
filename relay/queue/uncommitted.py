"""Messages that were accepted and have no rows yet, found in the journal by their id.

They wait for the committer: the database is away, or behind. `committed` says up to where each
segment has rows, so only what lies behind is read; without a database every segment is read. What
must stay true: a message that a void batch holds was never accepted, and is not found.
"""

import socket
import time
from collections.abc import Mapping
from typing import NamedTuple

from relay.queue.accept import StoredEnvelope, decode
from relay.report.rows import SegmentPosition
from relay.spool.journal.adoption import voided_batches
from relay.spool.journal.contents import contents
from relay.spool.journal.directory import JournalDirectory
from relay.spool.journal.format import BLOCK
from relay.spool.journal.scan import ScannedBatch
from relay.spool.store import Spool


class UncommittedMessage(NamedTuple):
    """A message as the journal has it. `written_at`: seconds since 1970, by the clock of smtpd."""

    envelope: StoredEnvelope
    segment: str
    position: int
    written_at: float


def uncommitted(
    spool: Spool, digits: str, committed: Mapping[str, SegmentPosition] | None
) -> list[UncommittedMessage]:
    """The messages whose id is or ends in these hex digits. `committed` by segment; None: the
    database is away. Raises OSError."""
    directory, found = JournalDirectory(spool.handle), dict[str, UncommittedMessage]()
    voids = voided_batches(directory)
    for segment in contents(directory):
        start = BLOCK
        if committed is not None:
            position = committed.get(segment.id, SegmentPosition(BLOCK, sealed=False))
            if position.sealed or segment.copied:
                continue
            start = position.committed_to
        for batch in segment.batches(voids, start, verify_bodies=False):
            if not isinstance(batch, ScannedBatch):
                continue
            for record in batch.records:
                if record.queue_id.endswith(digits):
                    found[record.queue_id] = UncommittedMessage(
                        decode(record.envelope),
                        segment.id,
                        record.position,
                        batch.header.written_at / 1e6,
                    )
    return list(found.values())


class JournalLag(NamedTuple):
    """What of the journal has no rows yet (`seconds`: since the oldest of it was written).
    `foreign_hosts`: other hosts whose segments are not sealed, unless a lock proves that the owner
    is alive."""

    messages: int
    octets: int
    seconds: float
    foreign_hosts: frozenset[str]


def journal_lag(spool: Spool, committed: Mapping[str, SegmentPosition]) -> JournalLag:
    """Computed from the files: only what lies behind `committed` is read. Raises OSError."""
    directory = JournalDirectory(spool.handle)
    messages = octets = 0
    oldest, hosts, voids = time.time(), set[str](), voided_batches(directory)
    for segment in contents(directory):
        position = committed.get(segment.id, SegmentPosition(BLOCK, sealed=False))
        if position.sealed or segment.copied:
            continue
        foreign = not segment.fault and segment.header.host != socket.gethostname()
        if foreign and not (segment.file.has_owner() and spool.is_local):
            hosts.add(segment.header.host)
        for batch in segment.batches(voids, position.committed_to, verify_bodies=False):
            if isinstance(batch, ScannedBatch) and batch.records:
                messages += len(batch.records)
                octets += sum(
                    len(record.envelope) + decode(record.envelope).size for record in batch.records
                )
                oldest = min(oldest, batch.header.written_at / 1e6)
    seconds = time.time() - oldest if messages else 0.0
    return JournalLag(messages, octets, seconds, frozenset(hosts))
