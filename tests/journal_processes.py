"""The processes around the journal, as the simulation runs them: spooler, worker, commands.

They are the program's own: the writer, the committer with its replay and adoption, acceptance, the
mark, the cleaning of segments, the cleaner of rows, `fsck --rebuild` and `fsck --adopt`. They work
on a simulated disk (tests/journal_disk.py) and a real SQLite database (tests/journal_database.py).

What stands in for the program: a committer without its thread, which works when it is told to; a
supply that makes each segment when it is taken, because the steps of a thread could come in any
order; a worker that claims and completes in one transaction. Not here are smtpd, the channel of the
spooler, and bodies that are files.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from sqlalchemy import text

from commands.ops import adopt, rebuild
from commands.ops.adopt import ForeignSegment, adopt_segment
from commands.ops.rebuild import Rebuilder
from reception.committer import Committed, JournalCommitter, WrittenBatch
from relay.db.engine import writing
from relay.ids import dashed
from relay.queue.accept import Acceptor, EncodedMessage, NewMessage, NewRecipient, encode
from relay.queue.audit import AuditEntry
from relay.settings import WorkerSettings, load
from relay.spool.journal.directory import JournalDirectory, SegmentFile
from relay.spool.journal.format import BLOCK, JournalRecord, RecordKind
from relay.spool.journal.supply import make_segment
from relay.spool.journal.writer import JournalWriter
from relay.spool.mark import SpoolMark
from relay.spool.segments import SegmentStore
from relay.spool.store import Spool
from tests.journal_database import SimulatedClock, SimulatedDatabase
from tests.journal_disk import SimulatedDirectory, SimulatedDisk
from worker.cleaner import Cleaner

SEGMENT_SIZE = 8 * BLOCK
SPOOL = "ab" * 16
RETENTION = 3600.0
GRACE = 5.0


def new_id(number: int, now: float) -> str:
    """As `relay.ids.new_id`, without chance."""
    return f"{int(now * 1000) << 80 | 0x7 << 76 | number:032x}"


def new_record(number: int, size: int, now: float) -> JournalRecord:
    """A message that arrives now. Its body is no other's."""
    queue_id = new_id(number, now)
    body = (queue_id.encode() * (size // 32 + 1))[:size]
    recipients = [NewRecipient("b@example.org")]
    message = NewMessage(queue_id, "a@example.com", size, recipients, "192.0.2.1", "c", "ESMTP")
    return JournalRecord(RecordKind.MESSAGE, queue_id, encode(message), body)


@dataclass
class Machine:
    """What all processes share. `settings` and `spool` are for the parts of the program that want
    them; the journal of that spool is never used."""

    disk: SimulatedDisk
    database: SimulatedDatabase
    clock: SimulatedClock
    settings: WorkerSettings
    spool: Spool


def new_settings(path: Path) -> WorkerSettings:
    """The settings of workers and commands."""
    return load(WorkerSettings, database_url=f"sqlite:///{path}", retention=RETENTION, grace=GRACE)


class StepwiseSupply:
    """Makes each segment when it is taken."""

    def __init__(self, directory: JournalDirectory) -> None:
        self._directory = directory

    def take(self) -> tuple[str, SegmentFile]:
        """A new segment; raises OSError."""
        return make_segment(self._directory, SPOOL, size=SEGMENT_SIZE)


class StepwiseCommitter(JournalCommitter):
    """The committer without its thread. It waits for nothing, and adopts when it is told to."""

    clock: SimulatedClock

    def start(self, committed: Committed) -> None:
        self._committed = committed

    def step(self) -> bool:
        """One transaction, or the mark if it is due. Raises the database's errors."""
        self._adopt_at = self.clock.now + 1e-6  # a wait is as short as that
        return self._turn()

    def drain(self) -> None:
        """Make the rows of everything. Raises the database's errors."""
        while self._has_work():
            self.step()

    def finish(self) -> None:
        """As when smtpd stops. Raises the database's errors."""
        self._closing = True
        while self.step():
            pass

    def adopt(self) -> None:
        """Take over what has no owner. Raises the database's errors."""
        self._adopt()

    def _gather(self, until: float) -> None:
        """No more messages come meanwhile."""


class RelayProcess:
    """A process of the relay, with its view of the disk and of the database."""

    def __init__(self, machine: Machine, *, guarded: bool = True) -> None:
        self.machine = machine
        self.process = machine.disk.start_process()
        self.directory = SimulatedDirectory(self.process)
        self.engine = machine.database.connect(self.process)
        self.mark = SpoolMark(self.directory, SPOOL)
        if guarded:
            self.mark.guard(self.engine)

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self.process.alive

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()


class SimulatedSpooler(RelayProcess):
    """`replied` gets the ids of messages whose clients hear 250."""

    def __init__(self, machine: Machine, replied: Callable[[Iterable[str]], object]) -> None:
        super().__init__(machine)
        self.mark.learn_from_journal(unsealed=True)
        self._replied, clock = replied, machine.clock
        self.writer = JournalWriter(
            self.directory,
            StepwiseSupply(self.directory),
            on_retired=lambda segment, orderly: self.committer.retire(segment, orderly=orderly),
            segment_size=SEGMENT_SIZE,
            clock=clock.time,
        )
        acceptor = Acceptor(self.engine, lifetime=1e6, grace=GRACE)
        self.committer = StepwiseCommitter(
            acceptor, self.engine, self.directory, self.mark, self.writer, SPOOL
        )
        self.committer.clock = clock
        self.committer.start(lambda batches, _ids, _count, _seconds: self._reply(batches))

    def store(self, records: Sequence[JournalRecord], *, wait: bool) -> None:
        """Write and sync. `wait`: the reply waits for the rows. Raises what the writer raises."""
        appended = self.writer.append(records, mark=self.mark.known)
        batch = WrittenBatch(
            appended.segment,
            appended.start,
            appended.end,
            [
                EncodedMessage(record.envelope, position)
                for record, position in zip(records, appended.positions, strict=True)
            ],
            [(record.queue_id, ("default",)) for record in records],
            sum(len(record.envelope) + len(memoryview(record.body)) for record in records),
            [int(record.queue_id, 16) for record in records],
            hinted=len(records) == 1 and not wait,
            written=self.machine.clock.monotonic(),
        )
        if not wait:
            self._reply([batch])
            self.committer.put(batch, wait=False)
        elif not self.committer.put(batch, wait=True):
            self._reply([batch])

    def reply_overdue(self, seconds: float) -> None:
        """What has waited for its rows for so long is replied to without them."""
        self._reply(self.committer.overdue(self.machine.clock.monotonic() - seconds))

    def stop(self) -> None:
        """As when smtpd stops. Raises the database's errors."""
        self.writer.retire()
        self.committer.finish()
        self.committer.close(0.0)
        self.kill()

    def _reply(self, batches: Sequence[WrittenBatch]) -> None:
        self._replied(f"{number:032x}" for batch in batches for number in batch.numbers)


class SimulatedWorker(RelayProcess):
    """Delivers and cleans up."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self.store = SegmentStore(self.engine, self.directory, SPOOL, RETENTION)
        self._cleaner = Cleaner(machine.settings, self.engine, machine.spool)

    def deliver(self, queue_ids: Sequence[str]) -> None:
        """Claim and complete. Raises the database's errors."""
        with writing(self.engine) as connection:
            for queue_id in map(dashed, queue_ids):
                for change in _DELIVERED:
                    connection.execute(text(change), {"id": queue_id})

    def purge(self) -> None:
        """Remove the rows that are older than the retention. Raises the database's errors."""
        self._cleaner.clean()

    def clean(self) -> None:
        """Look at the segments that are due. Raises OSError and the database's errors."""
        self.store.turn()


_DELIVERED = (
    "UPDATE deliveries SET state = 'sending', worker = queue_id"
    " WHERE queue_id = :id AND state = 'queued'",
    "UPDATE deliveries SET state = 'delivered', worker = NULL, due_at = NULL,"
    " finished_at = (SELECT now FROM clock) WHERE queue_id = :id AND state = 'sending'",
)


class SimulatedCommand(RelayProcess):
    """Commands of an operator."""

    def rebuild(self) -> None:
        """`fsck --rebuild`. Raises OSError and the database's errors."""
        with patch.object(rebuild, "JournalDirectory", lambda _: self.directory):
            rebuilder = Rebuilder(self.machine.settings, self.engine, self.machine.spool, None)
        entry = AuditEntry(self.engine, "operator", "fsck", "test", "--rebuild")
        rebuilder.run(entry)
        if rebuilder.older:
            rebuilder.hold_unfinished(entry)
            rebuilder.raise_mark()

    def adopt(self, name: str) -> None:
        """`fsck --adopt`, on a network file system. Raises OSError and the database's errors."""
        acceptor = Acceptor(self.engine, lifetime=1e6, grace=GRACE)
        found = ForeignSegment(name, "another", 0.0, 0)
        with (
            patch.object(adopt, "JournalDirectory", lambda _: self.directory),
            patch.object(Spool, "is_local", False),
        ):
            adopt_segment(self.engine, self.machine.spool, acceptor, found)
