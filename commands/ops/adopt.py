"""`qmqp-relay fsck --adopt`: takes over the segments of another host, and makes their rows.

On a network file system a lock may be lost while its owner lives, so smtpd adopts only the segments
of its own host there. When a host is gone for good, an operator says so with this command.

What must stay true: an owner that is alive after all notices the new name after its next sync, and
its clients hear no 250 (`relay.spool.journal.adoption`); nothing is adopted into a database that is
older than the spool.
"""

import socket
import time
from collections.abc import Iterator
from typing import NamedTuple

from sqlalchemy import Engine

from commands.errors import DONE, NOTHING_MATCHED, say
from commands.ops.database import opened
from commands.ops.modify import actor, confirmed
from commands.ops.show import required_spool
from commands.output import span
from reception.replay import replay, to_replay
from relay.db.engine import writing
from relay.queue.accept import Acceptor, PositionMoved
from relay.queue.audit import AuditEntry
from relay.settings import WorkerSettings, load
from relay.spool.journal.adoption import adopt_one, voided_batches, voided_from
from relay.spool.journal.contents import contents
from relay.spool.journal.directory import JournalDirectory
from relay.spool.journal.scan import ScannedBatch
from relay.spool.mark import SpoolMark
from relay.spool.store import Spool


class ForeignSegment(NamedTuple):
    """A segment of another host that is not sealed. `age`: seconds since its last batch;
    `messages`: those whose rows are not made."""

    name: str
    host: str
    age: float
    messages: int

    def shown(self) -> str:
        """For people."""
        return (
            f"{self.name} of the host {self.host}, last written {span(self.age)} ago,"
            f" {self.messages} messages without rows"
        )


def foreign_segments(spool: Spool, acceptor: Acceptor) -> Iterator[ForeignSegment]:
    """Every segment that another host left and that only an operator can adopt. Where no other
    machine has the file system, hosts are containers, and the lock of a living one is certain."""
    local = spool.is_local
    directory, here = JournalDirectory(spool.handle), socket.gethostname()
    voids = voided_batches(directory)
    for segment in contents(directory):
        header = segment.header
        if segment.fault or segment.copied or header.spool != spool.identity:
            continue
        if header.host == here:
            continue
        position, sealed = acceptor.position(segment.id)
        if sealed or (local and segment.file.has_owner()):
            continue
        written, messages = header.created_at, 0
        for one in segment.batches(voids, verify_bodies=False):
            if isinstance(one, ScannedBatch):
                written = max(written, one.header.written_at)
                messages += len(one.records) if one.position >= (position or 0) else 0
        yield ForeignSegment(
            segment.name, header.host, max(0.0, time.time() - written / 1e6), messages
        )


def run(*, yes: bool) -> int:
    """Name the segments, ask, adopt and replay them; the exit status."""
    settings = load(WorkerSettings)
    with opened(settings) as engine:
        spool = required_spool(settings, engine)
        engine.dispose()
        SpoolMark(JournalDirectory(spool.handle), spool.identity).guard(engine)
        acceptor = Acceptor(engine, lifetime=settings.queue_lifetime, grace=settings.grace)
        found = list(foreign_segments(spool, acceptor))
        if not found:
            say("no segment of another host waits for its adoption")
            return NOTHING_MATCHED
        for segment in found:
            print(segment.shown())
        if not confirmed(f"adopt {len(found)} segments, whose spoolers have ended", yes=yes):
            return NOTHING_MATCHED
        done = sum(adopt_segment(engine, spool, acceptor, segment) for segment in found)
    return DONE if done == len(found) else NOTHING_MATCHED


def adopt_segment(engine: Engine, spool: Spool, acceptor: Acceptor, found: ForeignSegment) -> bool:
    """Adopt one segment and make its rows. Raises OSError and the database's errors."""
    directory = JournalDirectory(spool.handle)
    adopted = adopt_one(directory, found.name, local=spool.is_local, forced=True)
    if adopted is None:
        say(f"{found.name} is not adopted: another process has it, or has adopted it")
        return False
    try:
        void_from = voided_from(voided_batches(directory), adopted.header.segment)
        segment = to_replay(acceptor, adopted, void_from)
        messages = replay(acceptor, directory, segment) if segment else 0
    except PositionMoved as error:
        say(f"{found.name}: its position has changed, so run the command again: {error}")
        return False
    finally:
        adopted.file.close()
    with writing(engine) as connection:
        reason = f"segment {adopted.header.segment} of {found.host} adopted, {messages} messages"
        AuditEntry(engine, actor(), "fsck", reason, "--adopt").note(connection, 0)
    print(f"{found.name}: the rows of {messages} messages were made")
    return True
