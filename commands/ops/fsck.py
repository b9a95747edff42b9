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
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine

from commands.errors import DONE, NOTHING_MATCHED, OUT_OF_REACH, say
from commands.ops.check import broker_lists
from commands.ops.modify import actor
from commands.ops.show import mounted_spool, opened
from commands.output import counted, span, write
from relay.db.engine import reading, writing
from relay.db.schema import NEEDS_BODY, words
from relay.db.sql import Statements, dialect_of
from relay.hints import WINDOW
from relay.ids import dashed
from relay.queue.audit import CHUNK, FIRST, AuditEntry
from relay.queue.rescue import Rescuer
from relay.queue.states import FINAL, UNFINISHED
from relay.report.queries import QueueReader
from relay.settings import WorkerSettings, load
from relay.spool.orphans import REMOVAL_GRACE, OrphanFile, OrphanScanner
from relay.spool.store import BodyUnsendable, Spool, SpoolError

VERY_LATE = 4 * 3600.0  # seconds that a delivery may wait for a connection while others are sent
BATCH = 500
SHOWN = 5  # ids in the text about many rows
BY_FSCK = "held by fsck: "
PICKED = "SELECT queue_id, number FROM @rows(:keys; queue_id uuid, number int)"
# The end of an UPDATE of the deliveries (as d) in `:keys`.
THESE = """FROM @rows(:keys; queue_id uuid, number int)
    WHERE d.queue_id = x.queue_id AND d.number = x.number"""


@dataclass(frozen=True, slots=True)
class Inconsistency:
    """What is wrong, what repairs it, and the repair. The repair returns False if it was no longer
    needed."""

    what: str
    words: str
    remedy: str
    repair: Callable[[], bool] | None = None


class RowCheck(NamedTuple):
    """Deliveries (as d) that no statement of the relay creates.

    They are repaired by the assignments in `sets`, or by recording their attempt as uncertain with
    the text `uncertain`.
    """

    what: str
    where: str
    remedy: str
    sets: str = ""
    uncertain: str = ""


_COLUMNS = {
    "FOUND": lambda row: row["found"],
    "REPAIRED": lambda row: row["repaired"],
    "DETAILS": lambda row: f"{row['words']}; {row['remedy']}",
}
_WORKER = "EXISTS (SELECT 1 FROM workers w WHERE w.id = d.worker{})"
_NO_RECIPIENT = """NOT EXISTS (SELECT 1 FROM recipients r WHERE r.queue_id = d.queue_id
    AND r.delivery = d.number)"""
_ROW_CHECKS = (
    RowCheck(
        "no due time", "due_at IS NULL AND state IN ('queued', 'deferred')",
        "make it due now", "due_at = @now",
    ),
    RowCheck(
        "useless due time",
        "due_at IS NOT NULL AND state IN ('held', 'split', 'delivered', 'dropped')",
        "clear the time", "due_at = NULL",
    ),
    RowCheck(
        "no finish time", f"finished_at IS NULL AND state IN ({words(FINAL)})",
        "set it to now, so that the row is kept no longer than others", "finished_at = @now",
    ),
    RowCheck(
        "delivery without recipient", f"state = 'held' AND {_NO_RECIPIENT}",
        "it is held: restore the rows of its recipients from a backup, and release it",
    ),
    RowCheck(
        "delivery without recipient", f"state IN ('queued', 'deferred') AND {_NO_RECIPIENT}",
        "hold it",
        f"""-- event: fsck
        state = 'held', due_at = NULL, last_reply = '{BY_FSCK}it has no recipient',
        reason_source = 'operator'""",
    ),
    RowCheck(
        "delivery without message",
        f"{NEEDS_BODY} AND NOT EXISTS (SELECT 1 FROM messages m WHERE m.id = d.queue_id)",
        "restore the row of its message from a backup",
    ),
    RowCheck(
        "sent by an ended worker",
        f"d.state = 'sending' AND {_WORKER.format(' AND w.ended_at < @ago(:late)')}",
        "record it as uncertain", uncertain="the worker stopped while it was sending",
    ),
    RowCheck(
        "sent by an unknown worker", f"d.state = 'sending' AND NOT {_WORKER.format('')}",
        "record it as uncertain", uncertain="the worker that was sending it is not known",
    ),
)  # fmt: skip
_UNASSIGNED = """SELECT r.queue_id, r.delivery FROM recipients r
    LEFT JOIN deliveries d ON d.queue_id = r.queue_id AND d.number = r.delivery
    WHERE d.number IS NULL"""
_ASSIGN = f"""-- event: fsck
    INSERT INTO deliveries (queue_id, number, route, state, expires_at, last_reply, reason_source)
    SELECT DISTINCT s.queue_id, s.delivery, 'default', 'held', @later(:lifetime),
        '{BY_FSCK}it had no delivery', 'operator'
    FROM ({_UNASSIGNED}) s WHERE true ORDER BY s.queue_id, s.delivery LIMIT :most
    ON CONFLICT DO NOTHING RETURNING queue_id, number"""
_WITHOUT_RECIPIENTS = """SELECT @hex(m.id) FROM messages m
    WHERE NOT EXISTS (SELECT 1 FROM deliveries d WHERE d.queue_id = m.id)
    AND NOT EXISTS (SELECT 1 FROM recipients r WHERE r.queue_id = m.id) ORDER BY m.id LIMIT 10000"""
_NEEDED_BODIES = f"""SELECT m.id, m.size, min(d.state), max(d.state)
    FROM deliveries d JOIN messages m ON m.id = d.queue_id
    WHERE d.state IN ({words(UNFINISHED)}) AND m.id > @id(:after)
    GROUP BY m.id, m.size ORDER BY m.id LIMIT {BATCH}"""
_BODY_NEEDED = f"SELECT 1 FROM deliveries WHERE queue_id = @id(:id) AND {NEEDS_BODY}"
_HOLD = f"""-- event: fsck
    UPDATE deliveries AS d SET state = 'held', due_at = NULL, last_outcome = 'unsendable',
    last_reply = :reply, reason_source = 'operator' {THESE}"""
_EXPIRED_LEASES = """SELECT @hex(w.id), w.host, w.pid, CAST(w.lease_expires_at AS text),
    @since(w.lease_expires_at),
    (SELECT count(*) FROM deliveries d WHERE d.state = 'sending' AND d.worker = w.id)
    FROM workers w
    WHERE w.ended_at IS NULL AND w.lease_expires_at < @ago(:long)"""
_ALIVE = "SELECT count(*) FROM workers WHERE ended_at IS NULL AND lease_expires_at > @now"
# A queued delivery may wait for a free connection while others are sent, and an operator may have
# paused its route.
_OVERDUE = """SELECT state, count(*), @since(min(due_at)) FROM deliveries WHERE due_at < @ago(:late)
    AND NOT EXISTS (SELECT 1 FROM pauses p WHERE p.subject = 'route:' || route)
    AND (state <> 'queued' OR due_at < @ago(:very_late)
        OR NOT EXISTS (SELECT 1 FROM attempts WHERE finished_at > @ago(:late)))
    GROUP BY state ORDER BY state"""


class Fsck:
    """One comparison of everything."""

    def __init__(self, settings: WorkerSettings, engine: Engine, spool: Spool) -> None:
        self._settings = settings
        self._engine = engine
        self._spool = spool
        self._rescuer = Rescuer(engine, settings)
        self._orphans = OrphanScanner(engine, spool)
        self._sql = Statements(
            engine, late=REMOVAL_GRACE, very_late=VERY_LATE, lifetime=settings.queue_lifetime
        )

    def findings(self) -> Iterator[Inconsistency]:
        """Every inconsistency, as soon as it is found."""
        yield from self._rows()  # first: a repaired row may need a file that looks superfluous
        yield from self._files()
        yield from self._bodies()
        yield from self._workers()
        yield from self._overdue()
        yield from self._broker()

    def _all(self, sql: str, **parameters: Any) -> list[Any]:
        with reading(self._engine) as connection:
            return list(self._sql.run(connection, sql, **parameters))

    def _entry(self, reason: str, filter_shown: str = "") -> AuditEntry:
        return AuditEntry(self._engine, actor(), "fsck", reason, filter_shown)

    def _change(
        self,
        entry: AuditEntry,
        where: str,
        change: Callable[[Connection, str], object],
        **parameters: Any,
    ) -> bool:
        """Change deliveries (as d) and record it, a transaction for each chunk; False if there were
        none."""
        # The parameters that all statements share, as far as a condition names them.
        parameters |= {"late": REMOVAL_GRACE}
        where = dialect_of(self._engine)(where)
        return sum(len(rows) for rows in entry.through(where, change, **parameters)) > 0

    def _rows(self) -> Iterator[Inconsistency]:
        """Rows that no statement of the relay creates."""
        for check in _ROW_CHECKS:
            sql = f"SELECT d.queue_id, d.number FROM deliveries d WHERE {check.where} LIMIT 10000"
            if rows := self._all(sql):
                repair = None
                if check.sets or check.uncertain:
                    change = partial(self._repair_rows, check)
                    repair = partial(self._change, self._entry(check.what), check.where, change)
                yield Inconsistency(check.what, _listed(rows), check.remedy, repair)
        if rows := self._all(f"{_UNASSIGNED} LIMIT 10000"):
            what, remedy = "recipient without delivery", "give it a delivery, which is held"
            yield Inconsistency(what, _listed(rows), remedy, self._assign_recipients)
        if rows := self._all(_WITHOUT_RECIPIENTS):
            ids = _shortened([row[0] for row in rows])
            remedy = (
                "restore the rows of its recipients and deliveries from a backup; its body is kept"
            )
            yield Inconsistency(
                "message without recipients", f"{len(rows)} messages: {ids}", remedy
            )

    def _repair_rows(self, check: RowCheck, connection: Connection, keys: str) -> None:
        if check.sets:
            sql = f"UPDATE deliveries AS d SET {check.sets} {THESE}"
            self._sql.run(connection, sql, keys=keys)
        else:
            self._rescuer.mark_uncertain(connection, keys, check.uncertain)

    def _assign_recipients(self) -> bool:
        """Create held deliveries for recipients that have none."""
        entry, repaired = self._entry("recipient without delivery"), 0
        while True:
            with writing(self._engine) as connection:
                rows = self._sql.run(connection, _ASSIGN, most=CHUNK).all()
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
                remedy = "it is kept: no row is newer, so the database may be an old copy"
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
        """Unfinished deliveries whose body is missing or of another size.

        A worker may finish the delivery after the query, so the row and then the file are read
        again.
        """
        after = FIRST
        while rows := self._all(_NEEDED_BODIES, after=after):
            for key, size, *states in rows:
                name = str(key).replace("-", "")
                if (
                    self._fault(name, size)
                    and self._all(_BODY_NEEDED, id=dashed(name))
                    and (fault := self._fault(name, size))
                ):
                    missing = name in fault
                    held = states == ["held", "held"]
                    remedy = "put the file back and release it, or drop it" if held else "hold it"
                    yield Inconsistency(
                        "body missing" if missing else "body of another size",
                        fault if missing else f"{name}: {fault}",
                        remedy,
                        None if held else partial(self._hold, name, size),
                    )
            after = str(rows[-1][0])

    def _fault(self, name: str, size: int) -> str:
        """What is wrong with a body; empty if nothing is. Raises SpoolError if the spool itself has
        changed."""
        try:
            os.close(self._spool.open(name, size))
        except BodyUnsendable as error:
            return str(error)
        except OSError as error:
            if error.errno in (errno.ESTALE, errno.ENOENT):
                directory = self._spool.directory
                raise SpoolError(f"{directory} is another spool now: run fsck again") from None
            raise
        return ""

    def _hold(self, name: str, size: int) -> bool:
        if not (fault := self._fault(name, size)):
            return False

        def change(connection: Connection, keys: str) -> None:
            reply = f"{BY_FSCK}{fault}; put the file back and release it, or drop it"
            self._sql.run(connection, _HOLD, keys=keys, reply=reply)

        where = "d.queue_id = @id(:id) AND d.state IN ('queued', 'deferred')"
        return self._change(self._entry(fault, f"--id {name}"), where, change, id=dashed(name))

    def _workers(self) -> Iterator[Inconsistency]:
        """Workers whose lease expired long ago, and is not renewed during another LEASE."""
        rows = self._all(_EXPIRED_LEASES, long=3 * self._settings.lease)
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
                    "dead worker", text, "record its deliveries as uncertain", repair
                )

    def _expire_worker(self, worker: str, until: str) -> bool:
        entry = self._entry(f"dead worker {worker}")
        return self._rescuer.expire_worker(worker, until, entry.note_rows) is not None

    def _overdue(self) -> Iterator[Inconsistency]:
        """Deliveries that a worker should have handled long ago."""
        ((alive,),) = self._all(_ALIVE)
        remedy = f"{alive} workers are alive: read their logs"
        if not alive:
            remedy = "no worker is alive: start one"
        for state, count, age in self._all(_OVERDUE):
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


def wait(seconds: float) -> None:
    """Give living workers the time to renew their leases."""
    time.sleep(seconds)


def _shortened(ids: list[str]) -> str:
    return ", ".join(ids[:SHOWN]) + (" ..." if len(ids) > SHOWN else "")


def _listed(rows: list[Any]) -> str:
    ids = [f"{str(key).replace('-', '')}.{number}" for key, number in rows]
    return f"{counted(len(ids))}: {_shortened(ids)}"


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
            say(f"{where}: run this command where it is mounted")
            return OUT_OF_REACH
        write(rows(Fsck(settings, engine, spool)), _COLUMNS, json_lines=json_lines)
    if not json_lines:
        text = f"{counts.total()} found, {counts['yes']} repaired"
        if counts["no"] and not repair:
            text += f"; --repair would repair {counts['no']}"
        say(text if counts else "no inconsistency found")
    return NOTHING_MATCHED if counts.total() > counts["yes"] else DONE
