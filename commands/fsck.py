"""`qmqp-relay fsck`: files, rows and broker compared, beside a relay that runs.

Each check gives findings; what can be mended knows how. What was found is looked at again before it is told, and what
somebody else does every second (sweeping, accepting, removing) has an age before it counts: so a healthy relay under
load has no findings.

What must stay true: nothing changes without --repair; a body that a row needs is never removed, nor is a file touched
in a directory that is not this database's spool; a file without a row is moved, not removed, and only when some row is
newer than it, because in a restored database every file of today looks lost; a worker is declared dead only as sweepers
do it, after its lease was seen run out, unchanged, twice, LEASE apart.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import Engine

from commands.check import broker_lists
from commands.explain import DONE, NOTHING_MATCHED, OUT_OF_REACH, say
from commands.inspect import at_hand, opened
from commands.tables import counted, span, write
from relay.bodies import Spool, SpoolError
from relay.broker import WINDOW
from relay.database import Statements, reading, writing
from relay.ids import dashed
from relay.queue import Queue
from relay.schema import FINAL, NEEDS_BODY, UNFINISHED, words
from relay.settings import WorkerSettings, load
from relay.sweeps import Sweeps
from worker.strays import LATE, Strays

VERY_LATE = 4 * 3600.0  # what waits for a free connection, while others are sent
BATCH = 500
SHOWN = 5  # ids in a finding about many rows


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong, what would mend it, and the mending, which answers whether it was still needed and done."""

    what: str
    words: str
    remedy: str
    repair: Callable[[], bool] | None = None


_COLUMNS = {
    "FOUND": lambda row: row["found"],
    "REPAIRED": lambda row: row["repaired"],
    "DETAILS": lambda row: f"{row['words']}; {row['remedy']}",
}
_WORKER = "EXISTS (SELECT 1 FROM workers w WHERE w.id = deliveries.worker{})"
_RECIPIENT = "SELECT 1 FROM recipients r WHERE r.message_id = deliveries.message_id AND r.delivery = deliveries.number"
_LOST = """state = 'deferred', worker = NULL, wanted = NULL, due_at = @later(:delay), last_outcome = 'uncertain',
    last_reply = 'the worker that was sending it is not known'"""
# Deliveries that no statement of ours makes: what, which, what mends them, and the SET that does.
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
        "sent by an ended worker", f"state = 'sending' AND {_WORKER.format(' AND w.ended_at < @ago(:late)')}",
        "call it uncertain", _LOST,
    ),
    ("sent by nobody", f"state = 'sending' AND NOT {_WORKER.format('')}", "call it uncertain", _LOST),
    (
        "delivery without recipient", f"state IN ('queued', 'deferred', 'held') AND NOT EXISTS ({_RECIPIENT})",
        "drop it", "state = 'dropped', due_at = NULL, finished_at = @now",
    ),
    (
        "delivery without message",
        f"{NEEDS_BODY} AND NOT EXISTS (SELECT 1 FROM messages m WHERE m.id = deliveries.message_id)",
        "restore the row of its message from a backup", "",
    ),
)  # fmt: skip
_STRAY = """SELECT r.message_id, r.delivery FROM recipients r LEFT JOIN deliveries d ON d.message_id = r.message_id
    AND d.number = r.delivery WHERE d.number IS NULL"""
_ADOPT = f"""INSERT INTO deliveries (message_id, number, route, state, expires_at)
    SELECT DISTINCT s.message_id, s.delivery, 'default', 'held', @later(:lifetime) FROM ({_STRAY}) s"""
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
        self._sweeps, self._strays = Sweeps(engine, settings), Strays(engine, spool)
        self._spool_id = Queue(engine).spool_id()
        self._sql = Statements(
            engine, late=LATE, very_late=VERY_LATE, lifetime=settings.queue_lifetime, delay=settings.uncertain_delay
        )

    def findings(self) -> Iterator[Finding]:
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

    def _change(self, sql: str, **given: Any) -> bool:
        with writing(self._engine) as connection:
            return bool(self._sql.run(connection, sql, **given).rowcount)

    def _files(self) -> Iterator[Finding]:
        """Files without a row, and bodies that no row needs any more."""
        for stray in self._strays.found():
            path = str(stray.path)
            if stray.row:
                yield Finding("file that nobody needs", path, "remove it", partial(self._strays.remove, stray))
            elif stray.proven:
                yield Finding("file without row", path, "move it to orphans/", partial(self._strays.put_aside, stray))
            else:
                remedy = "left alone: no row is newer, so the database may be an old copy"
                yield Finding("file without row", path, remedy)

    def _bodies(self) -> Iterator[Finding]:
        """Unfinished deliveries whose body is missing or of another size: looked at again, after their row."""
        after = "00000000-0000-0000-0000-000000000000"
        sql = f"""SELECT m.id, m.size, min(d.state), max(d.state) FROM deliveries d JOIN messages m
            ON m.id = d.message_id WHERE d.state IN ({words(UNFINISHED)}) AND m.id > @id(:after)
            GROUP BY m.id, m.size ORDER BY m.id LIMIT {BATCH}"""
        needed = f"SELECT 1 FROM deliveries WHERE message_id = @id(:id) AND {NEEDS_BODY}"
        while rows := self._all(sql, after=after):
            for key, size, *states in rows:
                name = str(key).replace("-", "")
                if (
                    self._fault(name, size)
                    and self._all(needed, id=dashed(name))
                    and (fault := self._fault(name, size))
                ):
                    held = states == ["held", "held"]
                    remedy = "it is held: put the file back and release it, or drop it" if held else "hold it"
                    repair = None if held else partial(self._hold, name, size)
                    what = "body missing" if name in fault else "body of another size"
                    yield Finding(what, fault if name in fault else f"{name}: {fault}", remedy, repair)
            after = str(rows[-1][0])

    def _fault(self, name: str, size: int) -> str:
        try:
            found = self._spool.path(name).stat().st_size
        except FileNotFoundError:
            if (self._spool.directory / "spool-id").read_text().strip() != self._spool_id:
                raise SpoolError(f"{self._spool.directory} has become another spool") from None
            return f"no body file {name}"
        return "" if found == size else f"the body file has {found} bytes, not {size}"

    def _hold(self, name: str, size: int) -> bool:
        hold = """UPDATE deliveries SET state = 'held', due_at = NULL, last_outcome = 'unsendable', last_reply = :fault
            WHERE message_id = @id(:id) AND state IN ('queued', 'deferred')"""
        fault = self._fault(name, size)
        return bool(fault) and self._change(hold, id=dashed(name), fault=fault)

    def _workers(self) -> Iterator[Finding]:
        """Workers whose lease ran out long ago, and stays so for another LEASE."""
        sql = """SELECT @hex(w.id), w.host, w.pid, CAST(w.until AS text), @since(w.until), (SELECT count(*)
                FROM deliveries d WHERE d.state = 'sending' AND d.worker = w.id) FROM workers w
            WHERE w.ended_at IS NULL AND w.until < @ago(:long)"""
        if not (found := self._all(sql, long=3 * self._settings.lease)):
            return
        say(f"a lease ran out; looking at it again in {span(self._settings.lease)}")
        wait(self._settings.lease)
        still = set(self._sweeps.ran_out())
        for worker, host, pid, until, age, count in found:
            if (worker, until) in still:
                about = f"{worker} ({host} {pid}), lease run out {span(age)} ago, {counted(count)}"
                yield Finding("dead worker", about, "declare it dead", partial(self._bury, worker, until))

    def _bury(self, worker: str, until: str) -> bool:
        return self._sweeps.bury(worker, until) is not None

    def _rows(self) -> Iterator[Finding]:
        """Rows that no statement of ours makes."""
        for what, which, remedy, mend in _IMPOSSIBLE:
            if rows := self._all(f"SELECT message_id, number FROM deliveries WHERE {which} LIMIT 10000"):
                repair = partial(self._change, f"UPDATE deliveries SET {mend} WHERE {which}") if mend else None
                yield Finding(what, _these(rows), remedy, repair)
        if rows := self._all(f"{_STRAY} LIMIT 10000"):
            remedy = "give it a delivery, which is held"
            yield Finding("recipient without delivery", _these(rows), remedy, partial(self._change, _ADOPT))

    def _late(self) -> Iterator[Finding]:
        """What somebody should have looked at long ago."""
        late = self._all(_LATE)
        (alive,) = self._all("SELECT count(*) FROM workers WHERE ended_at IS NULL AND until > @now")
        who = f"{alive[0]} workers are alive, and their log says why" if alive[0] else "no worker is alive: start one"
        for state, count, age in late:
            what = "overdue" if state in UNFINISHED else "notice owed"
            yield Finding(what, f"{count} {state}, for {span(age)}", who)

    def _broker(self) -> Iterator[Finding]:
        """Lists that are longer than whoever fills them lets them get."""
        lists = broker_lists(self._settings)
        if not lists:
            say("the broker does not answer: mail moves without it, some seconds later")
        for name, length in lists.items():
            if length > 2 * WINDOW:
                remedy = "nobody takes them; mail moves without, and the list may be deleted"
                yield Finding("broker", f"{length} hints in {name}", remedy)


def wait(seconds: float) -> None:
    """Give whoever lives the time to renew a lease."""
    time.sleep(seconds)


def _these(rows: list[Any]) -> str:
    keys = [f"{str(key).replace('-', '')}.{number}" for key, number in rows]
    return f"{counted(len(keys))}: {', '.join(keys[:SHOWN])}" + (" ..." if len(keys) > SHOWN else "")


def run(*, repair: bool, json_lines: bool) -> int:
    """Look, mend if asked to, print; the exit status: 0 if nothing is left that is wrong."""
    settings = load(WorkerSettings)
    with opened(settings) as engine:
        spool = at_hand(settings, Queue(engine))
        if spool is None:
            say(f"the spool of this database is not at hand in {settings.spool_dir}; run this where it is mounted")
            return OUT_OF_REACH
        found, left, mendable = _told(Fsck(settings, engine, spool).findings(), repair=repair, json_lines=json_lines)
    if not json_lines:
        more = f"; --repair would mend {mendable}" if mendable and not repair else ""
        say(f"{found} found, {found - left} repaired{more}" if found else "everything is as it should be")
    return NOTHING_MATCHED if left else DONE


def _told(findings: Iterable[Finding], *, repair: bool, json_lines: bool) -> tuple[int, int, int]:
    """Print what is found, as it is found and mended; how many there were, are left, and can be mended."""
    left = mendable = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal left, mendable
        for finding in findings:
            done = repair and finding.repair is not None and finding.repair()
            left += not done
            mendable += finding.repair is not None
            repaired = "yes" if done else "no" if finding.repair else "-"
            yield {"found": finding.what, "repaired": repaired, "words": finding.words, "remedy": finding.remedy}

    return write(rows(), _COLUMNS, json_lines=json_lines), left, mendable
