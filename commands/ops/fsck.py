"""`qmqp-relay fsck`: files, rows and broker compared, beside a relay that runs.

Each check gives findings; what can be mended knows how. What was found is looked at again before it
is told, and what somebody else does every second (sweeping, accepting, removing) has an age before
it counts: so a healthy relay under load has no findings.

What must stay true: nothing changes without --repair, nor without a record in `actions`; no mail
ends here: what cannot be sent as it is, is held; a body that a row needs, or may need when others
are restored, is never removed, nor is a file touched in a directory that is not this database's
spool; a file without a row is moved, not removed, and only when some row is newer than it, because
in a restored database every file of today looks lost; a worker is declared dead only as sweepers do
it, after its lease was seen run out, unchanged, twice, LEASE apart.
"""

import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import Connection, Engine

from commands.errors import DONE, NOTHING_MATCHED, OUT_OF_REACH, say
from commands.ops.check import broker_lists
from commands.ops.modify import actor
from commands.ops.show import at_hand, opened
from commands.output import counted, span, write
from relay.db.engine import reading, writing
from relay.db.schema import FINAL, NEEDS_BODY, UNFINISHED, words
from relay.db.sql import Statements
from relay.hints import WINDOW
from relay.ids import dashed
from relay.queue.audit import CHUNK, FIRST, PICKED, THESE, AuditEntry
from relay.queue.rescue import Rescuer
from relay.report.queries import QueueReader
from relay.settings import WorkerSettings, load
from relay.spool.orphans import LATE, OrphanFile, OrphanScanner
from relay.spool.store import BodyUnsendable, Spool, SpoolError

VERY_LATE = 4 * 3600.0  # what waits for a free connection, while others are sent
BATCH = 500
SHOWN = 5  # ids in a finding about many rows
BY_FSCK = "held by fsck: "


@dataclass(frozen=True, slots=True)
class Inconsistency:
    """What is wrong, what would mend it, and the mending, which answers whether it was still needed
    and done."""

    what: str
    words: str
    remedy: str
    repair: Callable[[], bool] | None = None


_COLUMNS = {
    "FOUND": lambda row: row["found"],
    "REPAIRED": lambda row: row["repaired"],
    "DETAILS": lambda row: f"{row['words']}; {row['remedy']}",
}
_WORKER = "EXISTS (SELECT 1 FROM workers w WHERE w.id = d.worker{})"
_NO_RECIPIENT = """NOT EXISTS (SELECT 1 FROM recipients r WHERE r.queue_id = d.queue_id
    AND r.delivery = d.number)"""
# Deliveries (as d) that no statement of ours makes: what, which, what mends them, and the SET that
# does.
_IMPOSSIBLE = (
    ("not due", "due_at IS NULL AND state IN ('queued', 'deferred')", "make it due now", "due_at = @now"),
    (
        "due for nothing", "due_at IS NOT NULL AND state IN ('held', 'split', 'delivered', 'dropped')",
        "clear the time", "due_at = NULL",
    ),
    (
        "end without time", f"finished_at IS NULL AND state IN ({words(FINAL)})",
        "call it finished now, so that it is kept no longer than others", "finished_at = @now",
    ),
    (
        "delivery without recipient", f"state = 'held' AND {_NO_RECIPIENT}",
        "it is held: restore the rows of its recipients from a backup, and release it", "",
    ),
    (
        "delivery without recipient", f"state IN ('queued', 'deferred') AND {_NO_RECIPIENT}",
        "hold it",
        f"""-- event: fsck
        state = 'held', due_at = NULL, last_reply = '{BY_FSCK}it has no recipient',
        reason_source = 'operator'""",
    ),
    (
        "delivery without message",
        f"{NEEDS_BODY} AND NOT EXISTS (SELECT 1 FROM messages m WHERE m.id = d.queue_id)",
        "restore the row of its message from a backup", "",
    ),
)  # fmt: skip
# What is being sent, and by whom it cannot be: what, which, and the words of an attempt whose end
# nobody knows.
_LOST = (
    (
        "sent by an ended worker", f"d.state = 'sending' AND {_WORKER.format(' AND w.ended_at < @ago(:late)')}",
        "the worker stopped while it was sending",
    ),
    (
        "sent by nobody", f"d.state = 'sending' AND NOT {_WORKER.format('')}",
        "the worker that was sending it is not known",
    ),
)  # fmt: skip
_STRAY = """SELECT r.queue_id, r.delivery FROM recipients r LEFT JOIN deliveries d ON d.queue_id = r.queue_id
    AND d.number = r.delivery WHERE d.number IS NULL"""
_ADOPT = f"""-- event: fsck
    INSERT INTO deliveries (queue_id, number, route, state, expires_at, last_reply, reason_source)
    SELECT DISTINCT s.queue_id, s.delivery, 'default', 'held', @later(:lifetime), '{BY_FSCK}it had no delivery', 'operator'
    FROM ({_STRAY}) s WHERE true ORDER BY s.queue_id, s.delivery LIMIT :most
    ON CONFLICT DO NOTHING RETURNING queue_id, number"""
_BARE = """SELECT @hex(m.id) FROM messages m
    WHERE NOT EXISTS (SELECT 1 FROM deliveries d WHERE d.queue_id = m.id)
    AND NOT EXISTS (SELECT 1 FROM recipients r WHERE r.queue_id = m.id) ORDER BY m.id LIMIT 10000"""
# Waiting for a free connection is no fault while others are sent; nor is what an operator paused.
_LATE = """SELECT state, count(*), @since(min(due_at)) FROM deliveries WHERE due_at < @ago(:late)
    AND NOT EXISTS (SELECT 1 FROM pauses p WHERE p.subject = 'route:' || route)
    AND (state <> 'queued' OR due_at < @ago(:very_late)
        OR NOT EXISTS (SELECT 1 FROM attempts WHERE finished_at > @ago(:late)))
    GROUP BY state ORDER BY state"""


class Fsck:
    """One look at everything."""

    def __init__(self, settings: WorkerSettings, engine: Engine, spool: Spool) -> None:
        self._settings, self._engine, self._spool = settings, engine, spool
        self._sweeps, self._strays = Rescuer(engine, settings), OrphanScanner(engine, spool)
        self._sql = Statements(
            engine, late=LATE, very_late=VERY_LATE, lifetime=settings.queue_lifetime
        )

    def findings(self) -> Iterator[Inconsistency]:
        """Everything that is wrong, as it is found."""
        yield from self._rows()  # before files: what a row was missing for is in them
        yield from self._files()
        yield from self._bodies()
        yield from self._workers()
        yield from self._late()
        yield from self._broker()

    def _all(self, sql: str, **given: Any) -> list[Any]:
        with reading(self._engine) as connection:
            return list(self._sql.run(connection, sql, **given))

    def _action(self, reason: str, filter_shown: str = "") -> AuditEntry:
        return AuditEntry(
            self._engine, self._sql, actor=actor(), verb="fsck", reason=reason, filter_shown=filter_shown
        )  # fmt: skip

    def _through(
        self,
        action: AuditEntry,
        which: str,
        change: Callable[[Connection, str], object],
        **given: Any,
    ) -> bool:
        """Mend deliveries (as d), a chunk a transaction, with a record; whether there were any."""
        return sum(len(rows) for rows in action.through(which, change, **given)) > 0

    def _files(self) -> Iterator[Inconsistency]:
        """Files without a row, and bodies that no row needs any more."""
        for stray in self._strays.found():
            if stray.row:
                what, remedy, mend = "file that nobody needs", "remove it", self._strays.remove
            else:
                what, remedy, mend = (
                    "file without row",
                    "move it to orphans/",
                    self._strays.move_to_orphans,
                )
            repair: Callable[[], bool] | None = partial(self._noted, what, stray, mend)
            if not stray.row and not stray.newer_row_exists:
                remedy, repair = (
                    "left alone: no row is newer, so the database may be an old copy",
                    None,
                )
            yield Inconsistency(what, str(stray.path), remedy, repair)

    def _noted(self, what: str, stray: OrphanFile, mend: Callable[[OrphanFile], bool]) -> bool:
        """Mend what is about a file, and record that."""
        if not mend(stray):
            return False
        with writing(self._engine) as connection:
            self._action(what, f"--id {stray.name}").note(connection, 0)
        return True

    def _bodies(self) -> Iterator[Inconsistency]:
        """Unfinished deliveries whose body is missing or of another size: looked at again, after
        their row."""
        after = FIRST
        sql = f"""SELECT m.id, m.size, min(d.state), max(d.state) FROM deliveries d JOIN messages m
            ON m.id = d.queue_id WHERE d.state IN ({words(UNFINISHED)}) AND m.id > @id(:after)
            GROUP BY m.id, m.size ORDER BY m.id LIMIT {BATCH}"""
        needed = f"SELECT 1 FROM deliveries WHERE queue_id = @id(:id) AND {NEEDS_BODY}"
        while rows := self._all(sql, after=after):
            for key, size, *states in rows:
                name = str(key).replace("-", "")
                if (
                    self._fault(name, size)
                    and self._all(needed, id=dashed(name))
                    and (fault := self._fault(name, size))
                ):
                    held = states == ["held", "held"]
                    remedy = (
                        "it is held: put the file back and release it, or drop it"
                        if held
                        else "hold it"
                    )
                    repair = None if held else partial(self._hold, name, size)
                    what = "body missing" if name in fault else "body of another size"
                    yield Inconsistency(
                        what, fault if name in fault else f"{name}: {fault}", remedy, repair
                    )
            after = str(rows[-1][0])

    def _fault(self, name: str, size: int) -> str:
        try:
            os.close(self._spool.open(name, size))
        except BodyUnsendable as error:
            return str(error)
        except OSError as error:
            if error.errno in (errno.ESTALE, errno.ENOENT):
                raise SpoolError(f"{self._spool.directory} has become another spool") from None
            raise
        return ""

    def _hold(self, name: str, size: int) -> bool:
        hold = f"""-- event: fsck
            UPDATE deliveries AS d SET state = 'held', due_at = NULL, last_outcome = 'unsendable',
            last_reply = :words, reason_source = 'operator' {THESE}"""
        if not (fault := self._fault(name, size)):
            return False

        def change(connection: Connection, keys: str) -> None:
            said = f"{BY_FSCK}{fault}; put the file back and release it, or drop it"
            self._sql.run(connection, hold, keys=keys, words=said)

        which = "d.queue_id = @id(:id) AND d.state IN ('queued', 'deferred')"
        return self._through(self._action(fault, f"--id {name}"), which, change, id=dashed(name))

    def _workers(self) -> Iterator[Inconsistency]:
        """Workers whose lease ran out long ago, and stays so for another LEASE."""
        sql = """SELECT @hex(w.id), w.host, w.pid, CAST(w.lease_expires_at AS text), @since(w.lease_expires_at), (SELECT count(*)
                FROM deliveries d WHERE d.state = 'sending' AND d.worker = w.id) FROM workers w
            WHERE w.ended_at IS NULL AND w.lease_expires_at < @ago(:long)"""
        if not (found := self._all(sql, long=3 * self._settings.lease)):
            return
        say(f"a lease ran out; looking at it again in {span(self._settings.lease)}")
        wait(self._settings.lease)
        still = set(self._sweeps.expired_leases())
        for worker, host, pid, until, age, count in found:
            if (worker, until) in still:
                about = f"{worker} ({host} {pid}), lease run out {span(age)} ago, {counted(count)}"
                yield Inconsistency(
                    "dead worker",
                    about,
                    "declare it dead",
                    partial(self._expire_worker, worker, until),
                )

    def _expire_worker(self, worker: str, until: str) -> bool:
        action = self._action(f"dead worker {worker}")
        return self._sweeps.expire_worker(worker, until, action.note_rows) is not None

    def _rows(self) -> Iterator[Inconsistency]:
        """Rows that no statement of ours makes."""
        for what, which, remedy, mend in _IMPOSSIBLE:
            yield from self._deliveries(
                what, which, remedy, partial(self._set, mend) if mend else None
            )
        for what, which, why in _LOST:
            yield from self._deliveries(
                what, which, "call it uncertain", partial(self._mark_uncertain, why)
            )
        if rows := self._all(f"{_STRAY} LIMIT 10000"):
            yield Inconsistency(
                "recipient without delivery",
                _these(rows),
                "give it a delivery, which is held",
                self._adopt,
            )
        if bare := self._all(_BARE):
            ids = ", ".join(row[0] for row in bare[:SHOWN]) + (" ..." if len(bare) > SHOWN else "")
            remedy = (
                "its body stays: restore the rows of its recipients and deliveries from a backup"
            )
            yield Inconsistency(
                "message without recipients", f"{len(bare)} messages: {ids}", remedy
            )

    def _deliveries(
        self, what: str, which: str, remedy: str, change: Callable[[Connection, str], object] | None
    ) -> Iterator[Inconsistency]:
        if rows := self._all(
            f"SELECT d.queue_id, d.number FROM deliveries d WHERE {which} LIMIT 10000"
        ):
            repair = partial(self._through, self._action(what), which, change) if change else None
            yield Inconsistency(what, _these(rows), remedy, repair)

    def _set(self, values: str, connection: Connection, keys: str) -> None:
        self._sql.run(connection, f"UPDATE deliveries AS d SET {values} {THESE}", keys=keys)

    def _mark_uncertain(self, why: str, connection: Connection, keys: str) -> None:
        self._sweeps.mark_uncertain(
            connection, f"(d.queue_id, d.number) IN ({PICKED})", why, keys=keys
        )

    def _adopt(self) -> bool:
        """Give recipients that nobody carries a delivery, which is held."""
        action, adopted = self._action("recipient without delivery"), 0
        while True:
            with writing(self._engine) as connection:
                rows = self._sql.run(connection, _ADOPT, most=CHUNK).all()
                action.note_rows(connection, rows)
            adopted += len(rows)
            if len(rows) < CHUNK:
                return adopted > 0

    def _late(self) -> Iterator[Inconsistency]:
        """What somebody should have looked at long ago."""
        late = self._all(_LATE)
        (alive,) = self._all(
            "SELECT count(*) FROM workers WHERE ended_at IS NULL AND lease_expires_at > @now"
        )
        who = (
            f"{alive[0]} workers are alive, and their log says why"
            if alive[0]
            else "no worker is alive: start one"
        )
        for state, count, age in late:
            what = "overdue" if state in UNFINISHED else "notice owed"
            yield Inconsistency(what, f"{count} {state}, for {span(age)}", who)

    def _broker(self) -> Iterator[Inconsistency]:
        """Lists that are longer than whoever fills them lets them get."""
        lists = broker_lists(self._settings)
        if not lists:
            say("the broker does not answer: mail moves without it, some seconds later")
        for name, length in lists.items():
            if length > 2 * WINDOW:
                remedy = "nobody takes them; mail moves without, and the list may be deleted"
                yield Inconsistency("broker", f"{length} hints in {name}", remedy)


def wait(seconds: float) -> None:
    """Give whoever lives the time to renew a lease."""
    time.sleep(seconds)


def _these(rows: list[Any]) -> str:
    keys = [f"{str(key).replace('-', '')}.{number}" for key, number in rows]
    return f"{counted(len(keys))}: {', '.join(keys[:SHOWN])}" + (
        " ..." if len(keys) > SHOWN else ""
    )


def run(*, repair: bool, json_lines: bool) -> int:
    """Look, mend if asked to, print; the exit status: 0 if nothing is left that is wrong."""
    settings = load(WorkerSettings)
    with opened(settings) as engine:
        spool = at_hand(settings, QueueReader(engine))
        if spool is None:
            say(
                f"the spool of this database is not at hand in {settings.spool_dir}; run this where it is mounted"
            )
            return OUT_OF_REACH
        found, left, mendable = _told(
            Fsck(settings, engine, spool).findings(), repair=repair, json_lines=json_lines
        )
    if not json_lines:
        more = f"; --repair would mend {mendable}" if mendable and not repair else ""
        say(
            f"{found} found, {found - left} repaired{more}"
            if found
            else "everything is as it should be"
        )
    return NOTHING_MATCHED if left else DONE


def _told(
    findings: Iterable[Inconsistency], *, repair: bool, json_lines: bool
) -> tuple[int, int, int]:
    """Print what is found, as it is found and mended; how many there were, are left, and can be
    mended."""
    left = mendable = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal left, mendable
        for finding in findings:
            done = repair and finding.repair is not None and finding.repair()
            left += not done
            mendable += finding.repair is not None
            repaired = "yes" if done else "no" if finding.repair else "-"
            yield {
                "found": finding.what,
                "repaired": repaired,
                "words": finding.words,
                "remedy": finding.remedy,
            }

    return write(rows(), _COLUMNS, json_lines=json_lines), left, mendable
