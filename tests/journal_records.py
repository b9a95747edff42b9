"""Segments and records for the tests of the journal, on a real file system.

The tests use segments of a few blocks, because a segment of the usual size holds nothing more that
they could find.
"""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath
from typing import Any

import pytest

from relay.ids import new_id
from relay.spool.journal.directory import JournalDirectory, SegmentFile
from relay.spool.journal.format import BLOCK, JournalRecord, RecordKind
from relay.spool.journal.scan import Damage, ScannedBatch, read_header, scan
from relay.spool.journal.supply import make_segment
from relay.spool.journal.writer import JournalWriter

SMALL = 16 * BLOCK
"""The size of a segment."""


class RetiredSegments(dict[str, bool]):
    """Whether each segment that a writer has retired ended orderly."""

    def add(self, segment: str, orderly: bool) -> None:
        """For `JournalWriter`."""
        assert segment not in self, "retired twice"
        self[segment] = orderly


class DirectSupply:
    """Makes each segment when it is taken, in the caller's thread."""

    def __init__(self, directory: JournalDirectory, *, size: int = SMALL) -> None:
        self.directory, self.size = directory, size
        self.spool = new_id()

    def take(self) -> tuple[str, SegmentFile]:
        """A new segment; raises OSError."""
        return make_segment(self.directory, self.spool, size=self.size)


def told_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that make octets and names durable, in order; names without their ids."""
    calls: list[str] = []

    def tell(owner: type, name: str, text: Callable[..., str]) -> None:
        original = getattr(owner, name)

        def telling(one: Any, *arguments: Any) -> Any:
            calls.append(text(*arguments))
            return original(one, *arguments)

        monkeypatch.setattr(owner, name, telling)

    tell(SegmentFile, "write", lambda *_: "write")
    tell(SegmentFile, "sync", lambda: "sync")
    tell(JournalDirectory, "rename", lambda _, new: f"rename to {PurePath(new).suffix or new}")
    tell(JournalDirectory, "unlink", lambda name: f"unlink {PurePath(name).suffix}")
    tell(JournalDirectory, "sync", lambda: "sync names")
    return calls


def message(size: int = 100, *, envelope: int = 50, seed: int = 0) -> JournalRecord:
    """A message whose octets look like no other's."""
    octets = os.urandom(size) if not seed else bytes(seed * k & 0xFF for k in range(size))
    return JournalRecord(RecordKind.MESSAGE, new_id(), b"e" * envelope, octets)


def open_journal(path: Path) -> JournalDirectory:
    """The journal of a spool that stands at `path`. Its descriptor stays open until the process
    ends."""
    directory = JournalDirectory(os.open(path, os.O_RDONLY | os.O_DIRECTORY))
    directory.make()
    return directory


def new_writer(
    directory: JournalDirectory, *, size: int = SMALL
) -> tuple[JournalWriter, RetiredSegments]:
    """A writer, and what it has retired."""
    retired = RetiredSegments()
    supply = DirectSupply(directory, size=size)
    writer = JournalWriter(
        directory, supply, on_retired=retired.add, segment_size=size, clock=time.time
    )
    return writer, retired


def content(octets: Iterable[ScannedBatch | Damage]) -> tuple[list[JournalRecord], list[Damage]]:
    """The records and the damages of a scan, in order."""
    records, damages = [], []
    for each in octets:
        if isinstance(each, Damage):
            damages.append(each)
        else:
            records += each.records
            damages += each.damages
    return records, damages


def scanned(file: SegmentFile) -> tuple[list[JournalRecord], list[Damage]]:
    """The records and the damages of a segment."""
    return content(scan(file, read_header(file)))
