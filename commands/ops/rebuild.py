"""`qmqp-relay fsck --rebuild`: makes the rows that the database lacks, from the spool.

Every record of the journal and every trailer of a body file holds what the rows of its message
need. A message without rows gets rows that are held: it may have been delivered, and only its rows
are lost, or retention has removed them. The operator releases what shall be sent.

A database whose mark is below that of the spool (`relay.spool.mark`) is new or was restored from a
backup. Then every unfinished delivery that it knows is held too, all segments count as replayed,
and at the end its mark rises above that of the spool, so that smtpd and workers use it. In a
database that is as new as the spool, the committer of smtpd makes the rows of what waits for it,
and this command leaves that to it.

What must stay true: nothing is sent that may have been delivered, before an operator says so; the
mark rises last, so a rebuild that is interrupted runs again; nothing is removed.
"""

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sqlalchemy import Engine

from commands.errors import DONE, NOTHING_MATCHED, OUT_OF_REACH, CommandError, say
from commands.ops.database import opened
from commands.ops.modify import actor, confirmed
from commands.output import as_json, counted, span
from relay.db.engine import check_schema, reading, writing
from relay.db.sql import Queries
from relay.ids import dashed
from relay.queue.accept import Acceptor, EncodedMessage, decode
from relay.queue.audit import CHUNK, AuditEntry, keys_of
from relay.queue.rescue import Rescuer
from relay.report.queries import QueueReader
from relay.settings import WorkerSettings, load
from relay.spool.journal.adoption import voided_batches
from relay.spool.journal.blockwise import UNREADABLE
from relay.spool.journal.contents import SegmentContents, contents, end_of, highest_mark
from relay.spool.journal.directory import JournalDirectory
from relay.spool.journal.format import JournalRecord, Place
from relay.spool.journal.scan import Damage, ScannedBatch, synced
from relay.spool.mark import SpoolMark
from relay.spool.orphans import MIN_ORPHAN_AGE
from relay.spool.segments import BodyMove, move_bodies
from relay.spool.store import Spool

LOST = "held by fsck --rebuild: its rows were missing, so it may have been delivered"
OLDER = (
    "held by fsck --rebuild: the database is older than the spool, so it may have been delivered"
)
PENDING = (
    "held by fsck --rebuild: the database is older than the spool, so its DSN may have been sent; "
)
BATCH = 500
PROGRESS = 10.0  # seconds


class Lacking(NamedTuple):
    """Messages without rows that arrived together, `age` seconds ago. `segment`: where their bodies
    stand; None: in files."""

    segment: str | None
    age: float
    messages: list[EncodedMessage]


@dataclass
class RebuildReport:
    """What a rebuild found. `skipped`: messages that are older than --since; `damages`: octets of
    segments that do not verify; `bare`: files from which nothing can be rebuilt; `waiting`:
    messages whose rows the committer is going to make, the first of which arrived `waiting_age`
    seconds ago."""

    messages: int = 0
    deliveries: int = 0
    octets: int = 0
    skipped: int = 0
    waiting: int = 0
    waiting_age: float = 0.0
    ids: list[str] = field(default_factory=list)
    damages: list[str] = field(default_factory=list)
    bare: list[str] = field(default_factory=list)

    def count(self, lacking: Lacking) -> None:
        """Add messages that get rows."""
        envelopes = [decode(message.rows) for message in lacking.messages]
        self.messages += len(envelopes)
        self.ids += [one.queue_id for one in envelopes]
        self.deliveries += sum(len(one.deliveries) for one in envelopes)
        self.octets += sum(one.size for one in envelopes)


class Rebuilder:
    """One rebuild. `since`: messages that arrived longer ago, in seconds, get no rows."""

    def __init__(
        self, settings: WorkerSettings, engine: Engine, spool: Spool, since: float | None
    ) -> None:
        self._engine, self._spool = engine, spool
        self._since = float("inf") if since is None else since
        self._directory = JournalDirectory(spool.handle)
        self._acceptor = Acceptor(engine, lifetime=settings.queue_lifetime, grace=settings.grace)
        self._rescuer = Rescuer(engine, settings.model_copy(update={"uncertain": "hold"}))
        self._queries = Queries(engine, __name__)
        self._mark = SpoolMark(self._directory, spool.identity)
        self._voids = voided_batches(self._directory)
        self._waiting = set[str]()  # messages that the committer is going to insert
        self.known = max(self._mark.known, highest_mark(self._directory, spool.identity))
        self.mark = int(self._ask("mark")[0].mark)

    @property
    def older(self) -> bool:
        """Whether the database is older than the spool."""
        return self.mark < self.known

    def survey(self) -> RebuildReport:
        """What a rebuild would make. Changes nothing."""
        report = RebuildReport()
        for lacking in self._lacking(report):
            report.count(lacking)
        return report

    def survey_of(self, name: str) -> RebuildReport | None:
        """What a rebuild would make of one segment; None if this spool has none of this id."""
        for segment in contents(self._directory):
            if segment.id == name and not self._is_foreign(segment):
                report = RebuildReport()
                for lacking in self._of_segment(segment, report, change=False):
                    report.count(lacking)
                return report
        return None

    def unfinished(self) -> int:
        """The deliveries that a rebuild of an older database holds."""
        return int(self._ask("unfinished")[0].count) if self.older else 0

    def run(self, entry: AuditEntry) -> RebuildReport:
        """Rebuild. Raises OSError and the database's errors; then run it again."""
        report = RebuildReport()
        for lacking in self._lacking(report, change=True):
            with writing(self._engine) as connection:
                self._acceptor.insert_held(
                    connection, lacking.messages, lacking.segment, age=lacking.age, reason=LOST
                )
                keys = [
                    (dashed(one.queue_id), number)
                    for one in (decode(message.rows) for message in lacking.messages)
                    for number in one.deliveries
                ]
                entry.note_rows(connection, keys)
            report.count(lacking)
        return report

    def hold_unfinished(self, entry: AuditEntry) -> int:
        """Hold what an older database believes to be unfinished, or to need a DSN; the number of
        deliveries. One that was being sent gets an attempt of unknown outcome."""
        held = 0
        for name in ("lock_sending", "hold_unfinished", "hold_pending"):
            rows: Sequence[Any] = [None]
            while rows:
                with writing(self._engine) as connection:
                    rows = self._queries.run(connection, name, most=CHUNK, **_REPLY[name]).all()
                    if rows and name == "lock_sending":
                        self._rescuer.mark_uncertain(connection, keys_of(rows), OLDER)
                    entry.note_rows(connection, rows)
                held += len(rows)
        return held

    def raise_mark(self) -> None:
        """Let smtpd and workers use the database."""
        with writing(self._engine) as connection:
            self._queries.run(connection, "raise_mark", mark=self.known + 1)
        self._mark.learn(self.known + 1)

    def _ask(self, name: str, **parameters: Any) -> list[Any]:
        with reading(self._engine) as connection:
            return list(self._queries.run(connection, name, **parameters))

    def _lacking(self, report: RebuildReport, *, change: bool = False) -> Iterator[Lacking]:
        """Everything that gets rows; notes in the report what does not. `change`: also correct the
        rows of segments."""
        shown = time.monotonic()
        for number, segment in enumerate(contents(self._directory), 1):
            if time.monotonic() >= shown + PROGRESS:
                say(f"reading segment {number} of the journal")
                shown = time.monotonic()
            if not self._is_foreign(segment):
                yield from self._of_segment(segment, report, change=change)
        yield from self._of_files(report)

    def _is_foreign(self, segment: SegmentContents) -> bool:
        if segment.header.spool in ("", self._spool.identity):
            return False
        say(f"{segment.name} belongs to the spool {segment.header.spool}: not read")
        return True

    def _of_segment(
        self, segment: SegmentContents, report: RebuildReport, *, change: bool
    ) -> Iterator[Lacking]:
        segment.file.patience = float("inf")  # only the operator waits
        position, sealed = self._acceptor.position(segment.id)
        # Without its header no spooler adopts it.
        orphaned = bool(segment.fault) and not segment.file.has_owner()
        whole = self.older or segment.copied or sealed or orphaned
        committed = float("inf") if whole else position or 0
        if change and whole:
            _sync(segment)
        items = list(segment.batches(self._voids))
        if segment.fault:
            report.damages.append(f"{segment.name} at 0: {segment.fault}")
        for item in items:
            # What has rows was synced, so it is no torn tail.
            one = synced(item) if item.position < (position or 0) else item
            damages = [one] if isinstance(one, Damage) else one.damages
            report.damages += [
                f"{segment.name} at {damage.position}: {damage.reason}"
                for damage in damages
                if not damage.torn
            ]
            if isinstance(one, ScannedBatch) and (records := _with_envelope(one)):
                if one.position >= committed:
                    self._waiting.update(record.queue_id for record in records)
                    report.waiting += len(records)
                    report.waiting_age = max(report.waiting_age, _age(one))
                else:
                    yield from self._of_batch(segment, one, report, change=change)
        if change and segment.copied:
            self._change("insert_sealed", segment=dashed(segment.id), end=end_of(items))
        elif change and (self.older or orphaned):
            self._change("advance_segment", segment=dashed(segment.id), end=end_of(items))

    def _of_batch(
        self, segment: SegmentContents, batch: ScannedBatch, report: RebuildReport, *, change: bool
    ) -> Iterator[Lacking]:
        # A LARGE record has its body in a file, which is asked for its own trailer.
        records = {one.queue_id: one for one in _with_envelope(batch) if one.in_journal}
        places = self._places(records)
        if change and segment.copied:
            self._move(segment.id, records, places)
        messages = [
            EncodedMessage(record.envelope, record.position)
            for queue_id, record in records.items()
            if queue_id not in places
        ]
        age = _age(batch)
        if messages and age > self._since:
            report.skipped += len(messages)
        elif messages:
            yield Lacking(segment.id, age, messages)

    def _of_files(self, report: RebuildReport) -> Iterator[Lacking]:
        now = self._spool.clock()
        files = itertools.chain(self._spool.ids(), self._spool.orphans())
        for batch in itertools.batched(files, BATCH):
            places = self._places([name for name, _ in batch])
            for name, status in batch:
                age = max(0.0, now - status.st_mtime)
                if name in places or name in self._waiting:
                    continue
                if not self.older and age < MIN_ORPHAN_AGE:
                    continue  # it is being accepted
                if age > self._since:
                    report.skipped += 1
                elif envelope := self._envelope(name):
                    yield Lacking(None, age, [EncodedMessage(envelope)])
                else:
                    report.bare.append(name)

    def _envelope(self, name: str) -> bytes:
        try:
            envelope = self._spool.envelope(name)
        except OSError as error:
            if error.errno not in UNREADABLE:
                raise
            return b""
        return envelope if envelope and decode(envelope).queue_id == name else b""

    def _places(self, ids: Sequence[str] | dict[str, Any]) -> dict[str, tuple[str | None, int]]:
        """Segment and position in the rows of these messages, of those that have a row."""
        listed = json.dumps([dashed(one) for one in ids])
        rows = self._ask("messages_with_rows", ids=listed)
        return {row.id: (row.segment, row.position) for row in rows}

    def _move(
        self,
        copy: str,
        records: dict[str, JournalRecord],
        places: dict[str, tuple[str | None, int]],
    ) -> None:
        """Point rows to a copy that still point to a segment which is gone."""
        moves = [
            BodyMove(queue_id, Place(segment, position), records[queue_id].position)
            for queue_id, (segment, position) in places.items()
            if segment and segment != copy and self._is_gone(segment)
        ]
        if moves:
            with writing(self._engine) as connection:
                move_bodies(self._engine, connection, copy, moves)

    def _is_gone(self, segment: str) -> bool:
        file = self._directory.open_segment(segment)
        if file is not None:
            file.close()
        return file is None

    def _change(self, name: str, **parameters: Any) -> None:
        with writing(self._engine) as connection:
            self._queries.run(connection, name, **parameters)


def _with_envelope(batch: ScannedBatch) -> list[JournalRecord]:
    """The messages of a batch whose rows can be made, also without their bodies."""
    return [*batch.records, *(record for record, _ in batch.without_bodies)]


def _sync(segment: SegmentContents) -> None:
    """Its owner may have ended before its sync, and a row must not refer to octets that a power
    failure takes away."""
    try:
        segment.file.sync()
    except OSError as error:
        say(f"{segment.name} cannot be synced, and what was written last may be lost: {error}")


def _age(batch: ScannedBatch) -> float:
    """How long ago a batch was written, in seconds of this machine's clock, as it was stamped."""
    return max(0.0, time.time() - batch.header.written_at / 1e6)


_REPLY: dict[str, dict[str, str]] = {
    "lock_sending": {},
    "hold_unfinished": {"reply": OLDER},
    "hold_pending": {"reply": PENDING},
}


def spool_to_rebuild_from(settings: WorkerSettings, engine: Engine) -> Spool:
    """The spool, whose identity a new database learns. Raises CommandError if the database knows
    another one, or if it does not exist."""
    spool, known = Spool(settings.spool_dir), QueueReader(engine).spool_id()
    try:
        identity = spool.identity
    except OSError:
        identity = ""
    if not identity or known not in (None, identity):
        where = f"the spool of this database is not mounted in {settings.spool_dir}"
        raise CommandError(OUT_OF_REACH, f"{where}: run this command where it is mounted")
    if known is None:
        spool.prepare(engine, unsafe=settings.unsafe_durability)
    return spool


def run(*, since: float | None, yes: bool, json_lines: bool) -> int:
    """Survey, ask, rebuild, and print what was done; the exit status."""
    settings = load(WorkerSettings)
    with opened(settings) as engine:
        check_schema(engine)
        rebuilder = Rebuilder(settings, engine, spool_to_rebuild_from(settings, engine), since)
        found, unfinished = rebuilder.survey(), rebuilder.unfinished()
        for text in found.damages:
            say(f"damaged: {text}")
        for name in found.bare:
            say(f"cannot be rebuilt: the file {name} has no envelope that can be read")
        if found.skipped and since is not None:
            say(f"{found.skipped} messages without rows are older than {span(since)}: left out")
        if not found.messages and not rebuilder.older:
            say("no message of the spool lacks its rows")
            return _status(found)
        if not confirmed(_plan(rebuilder, found, unfinished), yes=yes):
            return NOTHING_MATCHED
        shown = "--rebuild" + (f" --since {span(since).replace(' ', '')}" if since else "")
        entry = AuditEntry(engine, actor(), "fsck", "rows rebuilt from the spool", shown)
        report, held = rebuilder.run(entry), 0
        if rebuilder.older:
            held = rebuilder.hold_unfinished(entry)
            rebuilder.raise_mark()
    _print(rebuilder, report, held, json_lines=json_lines)
    return _status(report)


def _status(report: RebuildReport) -> int:
    """1 if something cannot be rebuilt."""
    return NOTHING_MATCHED if report.damages or report.bare else DONE


def _plan(rebuilder: Rebuilder, found: RebuildReport, unfinished: int) -> str:
    text = f"make the rows of {found.messages} messages, held"
    if rebuilder.older:
        text = (
            f"the database is older than the spool (mark {rebuilder.mark}, and the spool has"
            f" {rebuilder.known}): {text}, hold {counted(unfinished)} that the database believes"
            " unfinished, and let smtpd and workers use it"
        )
    return text


def _print(rebuilder: Rebuilder, report: RebuildReport, held: int, *, json_lines: bool) -> None:
    if json_lines:
        row = {"messages": report.messages, "deliveries": report.deliveries, "held": held}
        print(as_json(row | {"bytes": report.octets, "mark": rebuilder.known + rebuilder.older}))
        return
    print(
        f"rebuilt {report.messages} messages with {counted(report.deliveries)}, held;"
        f" held {counted(held)} that were unfinished"
    )
    say("next: `qmqp-relay list --state held`, then `qmqp-relay release` what shall be sent")
