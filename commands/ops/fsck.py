"""`qmqp-relay fsck`: compares spool, database and broker beside a relay that runs.

Each check yields inconsistencies; one that can be repaired carries its repair. A first sighting is
checked again before it is reported, and what the relay itself changes every second must have an age
before it counts, so a healthy relay under load has no inconsistency.

What must stay true: nothing changes without --repair, and every change is recorded in `audit`. No
delivery is finished: one that cannot be sent is held. A body that a row needs, or may need after a
restore, is never removed. Only files in the spool of this database are touched. A file without a
row is moved, not removed, and only if a newer row exists: after a restore of the database every
recent file lacks its row. A worker is expired only as sweepers do it: after its lease was seen
expired, unchanged, twice, LEASE apart.
"""

import errno
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from sqlalchemy import Engine

from commands.errors import DONE, NOTHING_MATCHED, OUT_OF_REACH, CommandError, say
from commands.ops.check import broker_lists
from commands.ops.database import opened
from commands.ops.modify import actor
from commands.ops.rebuild import Rebuilder
from commands.ops.show import mounted_spool
from commands.output import counted, span, write
from relay.db.engine import reading, writing
from relay.db.sql import Queries
from relay.hints import WINDOW
from relay.ids import dashed
from relay.queue.audit import CHUNK, FIRST, AuditEntry, keys_of
from relay.queue.rescue import Rescuer
from relay.queue.states import UNFINISHED
from relay.report.queries import QueueReader
from relay.settings import WorkerSettings, load
from relay.spool.bodies import Bodies
from relay.spool.journal.directory import (
    ADOPTED,
    COPY,
    DIRECTORY,
    NEW,
    OWNED,
    JournalDirectory,
)
from relay.spool.journal.format import Place
from relay.spool.orphans import MIN_ORPHAN_AGE, REMOVAL_GRACE, OrphanFile, OrphanScanner
from relay.spool.store import BodyUnsendable, Spool, SpoolError

LATE_ROWS = 60.0  # seconds
VERY_LATE = 4 * 3600.0  # seconds that a delivery may wait for a connection while others are sent
BATCH = 500
MAX_ROWS = 10_000  # that one check reports
SHOWN = 5  # ids in the text about many rows
wait = time.sleep  # living workers renew their leases meanwhile


@dataclass(frozen=True, slots=True)
class Inconsistency:
    """What is wrong, what repairs it, and the repair. The repair returns False if it was no longer
    needed."""

    what: str
    words: str
    remedy: str
    repair: Callable[[], bool] | None = None


class RowCheck(NamedTuple):
    """Rows that no statement of the relay creates: the names of the statements that find and repair
    them. `uncertain`: the repair finds and locks the deliveries, and their attempts are recorded as
    uncertain with this text."""

    what: str
    find: str
    remedy: str
    repair: str = ""
    uncertain: str = ""


_COLUMNS = {
    "FOUND": lambda row: row["found"],
    "REPAIRED": lambda row: row["repaired"],
    "DETAILS": lambda row: f"{row['words']}; {row['remedy']}",
}
_ROW_CHECKS = (
    RowCheck("no due time", "find_no_due_time", "make it due now", "repair_no_due_time"),
    RowCheck(
        "useless due time", "find_useless_due_time", "clear the time", "repair_useless_due_time"
    ),
    RowCheck(
        "no finish time",
        "find_no_finish_time",
        "set it to now, so that the row is kept no longer than others",
        "repair_no_finish_time",
    ),
    RowCheck(
        "delivery without recipient",
        "find_held_without_recipient",
        "it is held: restore the rows of its recipients from a backup, and release it",
    ),
    RowCheck(
        "delivery without recipient",
        "find_without_recipient",
        "hold it",
        "repair_without_recipient",
    ),
    RowCheck(
        "delivery without message",
        "find_without_message",
        "restore the row of its message from a backup",
    ),
    RowCheck(
        "sent by an ended worker",
        "find_sent_by_ended_worker",
        "record it as uncertain",
        "repair_sent_by_ended_worker",
        uncertain="the worker stopped while it was sending",
    ),
    RowCheck(
        "sent by an unknown worker",
        "find_sent_by_unknown_worker",
        "record it as uncertain",
        "repair_sent_by_unknown_worker",
        uncertain="the worker that was sending it is not known",
    ),
    RowCheck(
        "recipient without delivery",
        "find_recipient_without_delivery",
        "give it a delivery, which is held",
        "repair_recipient_without_delivery",
    ),
    RowCheck(
        "message without recipients",
        "find_message_without_recipients",
        "restore the rows of its recipients and deliveries from a backup; its body is kept",
    ),
)


class Fsck:
    """One comparison of everything."""

    def __init__(self, settings: WorkerSettings, engine: Engine, spool: Spool) -> None:
        self._settings = settings
        self._engine = engine
        self._spool = spool
        self._body_store = Bodies(spool, engine)
        self._rescuer = Rescuer(engine, settings)
        self._orphans = OrphanScanner(engine, spool)
        self._queries = Queries(
            engine,
            __name__,
            late=REMOVAL_GRACE,
            very_late=VERY_LATE,
            lifetime=settings.queue_lifetime,
        )

    def findings(self) -> Iterator[Inconsistency]:
        """Every inconsistency, as soon as it is found."""
        yield from self._rows()  # first: a repaired row may need a file that seems unneeded
        yield from self._files()
        yield from self._bodies()
        yield from self._journal()
        yield from self._segments()
        yield from self._workers()
        yield from self._overdue()
        yield from self._broker()

    def _all(self, name: str, **parameters: Any) -> list[Any]:
        with reading(self._engine) as connection:
            return list(self._queries.run(connection, name, **parameters))

    def _entry(self, reason: str, filter_shown: str = "") -> AuditEntry:
        return AuditEntry(self._engine, actor(), "fsck", reason, filter_shown)

    def _rows(self) -> Iterator[Inconsistency]:
        """Rows that no statement of the relay creates."""
        for check in _ROW_CHECKS:
            if rows := self._all(check.find, most=MAX_ROWS):
                repair = partial(self._repair_rows, check) if check.repair else None
                yield Inconsistency(check.what, _listed(rows), check.remedy, repair)

    def _repair_rows(self, check: RowCheck) -> bool:
        """Repair the rows and record it, a transaction for each chunk; False if there were none."""
        entry, repaired = self._entry(check.what), 0
        while True:
            with writing(self._engine) as connection:
                rows = self._queries.run(connection, check.repair, most=CHUNK).all()
                if rows and check.uncertain:
                    self._rescuer.mark_uncertain(connection, keys_of(rows), check.uncertain)
                entry.note_rows(connection, rows)
            repaired += len(rows)
            if len(rows) < CHUNK:
                return repaired > 0

    def _files(self) -> Iterator[Inconsistency]:
        """Files without a row, and bodies that no row needs any more."""
        for file in self._orphans.scan():
            path = str(file.path)
            if file.row:
                what = "body not needed"
                repair = partial(self._repair_file, what, file, self._orphans.remove)
                yield Inconsistency(what, path, "remove it", repair)
            elif file.newer_row_exists:
                what = "file without row"
                repair = partial(self._repair_file, what, file, self._orphans.move_to_orphans)
                yield Inconsistency(what, path, "move it to orphans/", repair)
            else:
                remedy = (
                    "it is kept: no row is newer, so the database may be an old copy;"
                    " `fsck --rebuild` makes the rows"
                )
                yield Inconsistency("file without row", path, remedy)

    def _repair_file(
        self, what: str, file: OrphanFile, repair: Callable[[OrphanFile], bool]
    ) -> bool:
        if not repair(file):
            return False
        with writing(self._engine) as connection:
            self._entry(what, f"--id {file.name}").note(connection, 0)
        return True

    def _bodies(self) -> Iterator[Inconsistency]:
        """Unfinished deliveries whose body is missing, damaged or of another size.

        A worker may finish the delivery after the query, so the row and then the file are read
        again.
        """
        after = FIRST
        while rows := self._all("needed_bodies", after=after, most=BATCH):
            for key, size, held, segment, position in rows:
                name = str(key).replace("-", "")
                place = Place(segment, position) if segment else None
                if (
                    self._fault(name, size, place)
                    and self._all("body_needed", id=str(key))[0][0]
                    and (fault := self._fault(name, size, place))
                ):
                    remedy = "put the file back and release it, or drop it" if held else "hold it"
                    missing = name in fault
                    damaged = place is not None or "checksum" in fault or "cannot read" in fault
                    what = "body damaged" if damaged else "body of another size"
                    yield Inconsistency(
                        "body missing" if missing else what,
                        fault if missing else f"{name}: {fault}",
                        remedy,
                        None if held else partial(self._hold, name, size, place),
                    )
            after = str(rows[-1][0])

    def _fault(self, name: str, size: int, place: Place | None) -> str:
        """What is wrong with a body; empty if nothing is. Raises SpoolError if the spool itself has
        changed."""
        try:
            self._body_store.verify(name, size, place)
        except BodyUnsendable as error:
            return str(error)
        except OSError as error:
            if error.errno in (errno.ESTALE, errno.ENOENT):
                directory = self._spool.directory
                raise SpoolError(f"{directory} is another spool now: run fsck again") from None
            raise
        return ""

    def _hold(self, name: str, size: int, place: Place | None) -> bool:
        if not (fault := self._fault(name, size, place)):
            return False
        reply = f"held by fsck: {fault}; put the file back and release it, or drop it"
        with writing(self._engine) as connection:
            rows = self._queries.run(connection, "hold", id=dashed(name), reply=reply).all()
            self._entry(fault, f"--id {name}").note_rows(connection, rows)
        return bool(rows)

    def _journal(self) -> Iterator[Inconsistency]:
        """Records of the journal and trailers of files, against the rows. Rows that retention may
        have removed are not missed."""
        kept = max(0.0, self._settings.retention - REMOVAL_GRACE)
        rebuilder = Rebuilder(self._settings, self._engine, self._spool, kept)
        found = rebuilder.survey()
        if rebuilder.older:
            yield Inconsistency(
                "database older than the spool",
                f"its mark is {rebuilder.mark}, and the spool has {rebuilder.known}",
                "run `qmqp-relay fsck --rebuild`; until then mail is accepted, and none is sent",
            )
        for damage in found.damages:
            remedy = (
                "messages there cannot be sent, and the others of the segment are read; check the"
                " disk; `qmqp-relay fsck --discard SEGMENT` removes the segment when no delivery"
                " needs it"
            )
            yield Inconsistency("journal damaged", damage, remedy)
        if found.messages and not rebuilder.older:
            more = " ..." if len(found.ids) > SHOWN else ""
            yield Inconsistency(
                "rows lost",
                f"{found.messages} messages: {', '.join(found.ids[:SHOWN])}{more}",
                "`qmqp-relay fsck --rebuild` makes them, held",
            )
        if found.waiting and found.waiting_age > LATE_ROWS:
            yield Inconsistency(
                "rows not made",
                f"{found.waiting} messages, for {span(found.waiting_age)}",
                "smtpd makes them: start it, or read its log; for those of a host that is gone,"
                " run `qmqp-relay fsck --adopt`",
            )

    def _segments(self) -> Iterator[Inconsistency]:
        """Rows of segments without files, and files that no process finished or needs."""
        if any(True for _ in self._without_file()):
            wait(1.0)  # a worker removes the file and then the row
        for segment, sealed in self._without_file():
            remedy = (
                "a worker removes the row" if sealed else "restore it from a backup of the spool"
            )
            yield Inconsistency("segment without file", segment, remedy)
        rows = {row.id for row in self._all("segment_rows")}
        now = self._spool.clock()
        for segment, name in JournalDirectory(self._spool.handle).segments(NEW, COPY):
            path = self._spool.directory / DIRECTORY / name
            with suppress(FileNotFoundError):
                if now - path.stat().st_mtime < MIN_ORPHAN_AGE:
                    continue
                if name.endswith(NEW):
                    remedy = "smtpd removes it when it starts"
                    yield Inconsistency("unfinished segment", str(path), remedy)
                elif segment not in rows:
                    remedy = "a worker removes it when it starts"
                    yield Inconsistency("segment without row", str(path), remedy)

    def _without_file(self) -> Iterator[tuple[str, bool]]:
        """The segments that have a row and no file, and whether they are sealed."""
        rows = self._all("segment_rows")
        segments = JournalDirectory(self._spool.handle).segments(OWNED, ADOPTED, COPY)
        files = {segment for segment, _ in segments}
        yield from ((row.id, bool(row.sealed)) for row in rows if row.id not in files)

    def _workers(self) -> Iterator[Inconsistency]:
        """Workers whose lease expired long ago, and is not renewed during another LEASE."""
        rows = self._all("expired_workers", long=3 * self._settings.lease)
        if not rows:
            return
        say(f"the lease of a worker expired; checking again in {span(self._settings.lease)}")
        wait(self._settings.lease)
        still_expired = set(self._rescuer.expired_leases())
        for worker, host, pid, until, age, count in rows:
            if (worker, until) in still_expired:
                text = f"{worker} ({host} {pid}), lease expired {span(age)} ago, {counted(count)}"
                repair = partial(self._expire_worker, worker, until)
                yield Inconsistency(
                    "expired worker", text, "record its deliveries as uncertain", repair
                )

    def _expire_worker(self, worker: str, until: str) -> bool:
        entry = self._entry(f"expired worker {worker}")
        return self._rescuer.expire_worker(worker, until, entry.note_rows) is not None

    def _overdue(self) -> Iterator[Inconsistency]:
        """Deliveries that a worker should have handled long ago."""
        ((alive,),) = self._all("workers_alive")
        remedy = "no worker is alive: start one"
        if alive:
            remedy = f"{alive} workers are alive: read their logs"
        for state, count, age in self._all("overdue"):
            what = "overdue" if state in UNFINISHED else "DSN pending"
            yield Inconsistency(what, f"{count} {state}, for {span(age)}", remedy)

    def _broker(self) -> Iterator[Inconsistency]:
        """Lists of hints that are longer than the relay lets them grow."""
        lists = broker_lists(self._settings)
        if not lists:
            say("the broker does not answer: mail is delivered without it, some seconds later")
        for name, length in lists.items():
            if length > 2 * WINDOW:
                remedy = "no worker reads it; mail is delivered without it, and you may delete it"
                yield Inconsistency("broker", f"{length} hints in {name}", remedy)


def _listed(rows: list[Any]) -> str:
    """The number of rows, and the first keys of deliveries or ids of messages."""
    ids = [".".join([str(key).replace("-", ""), *map(str, number)]) for key, *number in rows]
    many = counted(len(ids)) if len(rows[0]) > 1 else f"{len(ids)} messages"
    return f"{many}: {', '.join(ids[:SHOWN])}{' ...' if len(ids) > SHOWN else ''}"


def run(*, repair: bool, json_lines: bool) -> int:
    """Compare, repair if asked to, and print; the exit status is 0 if no inconsistency remains."""
    settings = load(WorkerSettings)
    counts = Counter[str]()

    def rows(fsck: Fsck) -> Iterator[dict[str, Any]]:
        for finding in fsck.findings():
            repaired = "-"
            if finding.repair:
                repaired = "yes" if repair and finding.repair() else "no"
            counts[repaired] += 1
            yield {
                "found": finding.what,
                "repaired": repaired,
                "words": finding.words,
                "remedy": finding.remedy,
            }

    with opened(settings) as engine:
        spool = mounted_spool(settings, QueueReader(engine))
        if spool is None:
            where = f"the spool of this database is not mounted in {settings.spool_dir}"
            hint = "run this command where it is mounted"
            if QueueReader(engine).spool_id() is None:
                hint = "for a database that was lost, run `qmqp-relay fsck --rebuild`"
            raise CommandError(OUT_OF_REACH, f"{where}: {hint}")
        write(rows(Fsck(settings, engine, spool)), _COLUMNS, json_lines=json_lines)
    if not json_lines:
        text = f"{counts.total()} found, {counts['yes']} repaired"
        if counts["no"] and not repair:
            text += f"; --repair would repair {counts['no']}"
        say(text if counts else "no inconsistency found")
    return NOTHING_MATCHED if counts.total() > counts["yes"] else DONE
