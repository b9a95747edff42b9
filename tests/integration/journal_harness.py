"""A worker's harness whose messages are in the journal: real segments, and rows that point there.

`accept_all` appends messages in one batch. `move` copies a body to another segment, as compaction
does.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from relay.ids import dashed
from relay.queue.accept import EncodedMessage, SegmentSpan, encode
from relay.spool.journal.directory import DIRECTORY, OWNED, JournalDirectory
from relay.spool.journal.format import JournalRecord, Place, RecordKind
from relay.spool.journal.supply import SegmentSupply
from relay.spool.journal.writer import JournalWriter
from relay.spool.store import Spool
from tests.integration.harness import BODY, EngineHarness, new_message

SEGMENT_SIZE = 1 << 20


class JournalWorkerHarness(EngineHarness):
    """An `EngineHarness` that is also a spooler."""

    def __init__(self, database_url: str, spool: Spool, directory: Path, **given: Any) -> None:
        super().__init__(database_url, spool, directory, **given)
        self.directory = JournalDirectory(spool.handle)
        self._supply = SegmentSupply(self.directory, spool.identity, size=SEGMENT_SIZE)
        self._writer = JournalWriter(
            self.directory,
            self._supply,
            on_retired=lambda segment, _orderly: self._writer.close_segment(segment),
            segment_size=SEGMENT_SIZE,
        )

    def close(self) -> None:
        self._supply.close()
        super().close()

    def accept_all(self, *bodies: bytes, recipients: Sequence[str] = (), **more: Any) -> list[str]:
        """Accept messages with these bodies in one batch; their queue ids."""
        messages = [new_message(*recipients, size=len(body), **more) for body in bodies]
        encoded = [encode(message) for message in messages]
        records = [
            JournalRecord(RecordKind.MESSAGE, message.id, rows, body)
            for message, rows, body in zip(messages, encoded, bodies, strict=True)
        ]
        batch = self._writer.append(records)
        self.acceptor.open_segment(batch.segment, batch.start)
        self.acceptor.commit(
            [*map(EncodedMessage, encoded, batch.positions)],
            SegmentSpan(batch.segment, batch.start, batch.end),
        )
        return [message.id for message in messages]

    def accept_one(self, body: bytes = BODY, **more: Any) -> str:
        """Accept a message; its queue id."""
        (queue_id,) = self.accept_all(body, **more)
        return queue_id

    def place(self, queue_id: str) -> Place:
        """The place that the row of a message says."""
        (row,) = self.rows(
            "SELECT segment, position FROM messages WHERE id = @id(:id)", id=queue_id
        )
        return Place(str(row["segment"]).replace("-", ""), row["position"])

    def segment_path(self, queue_id: str) -> Path:
        """The path of the segment that has a body."""
        return self.spool.directory / DIRECTORY / f"{self.place(queue_id).segment}{OWNED}"

    def move(self, queue_id: str, body: bytes = BODY, *, unlink: bool = True) -> Place:
        """Copy a body to another segment, point its row there, and unlink the old segment."""
        old = self.segment_path(queue_id)
        self._writer.retire()
        record = JournalRecord(RecordKind.MESSAGE, queue_id, b"{}\n\n", body)
        batch = self._writer.append([record])
        self.change(
            "UPDATE messages SET segment = :segment, position = :position WHERE id = @id(:id)",
            segment=dashed(batch.segment),
            position=batch.positions[0],
            id=queue_id,
        )
        if unlink:
            old.unlink()
        return Place(batch.segment, batch.positions[0])

    def flip(self, queue_id: str) -> None:
        """Change the first octet of a body, or change it back."""
        handle = os.open(self.segment_path(queue_id), os.O_RDWR)
        position = self.place(queue_id).position
        (octet,) = os.pread(handle, 1, position)
        os.pwrite(handle, bytes([octet ^ 1]), position)
        os.close(handle)
