"""Random histories of the journal, with its real code on a simulated disk: nothing is lost, and
nothing comes twice.

Spoolers append with and without failures, are killed, paused and woken up; others adopt; the power
fails; the database is restored from a backup; workers deliver, compact and remove; operators adopt
and rebuild. tests/journal_processes.py says what of it is the program's own code. What every client
heard, and what every COMMIT made durable, is remembered:

- after a 250 a message has one row as long as a delivery needs it, and its body is readable;
- after a 451 a message never gets a row;
- no message gets a row twice, and none is sent twice, except on hold after the database was
  restored, or when the mark could not tell: what was committed since the mark last reached the disk
  may come again.
"""

import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple, cast

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from structlog.testing import capture_logs

from commands.ops import rebuild
from reception import committer, replay
from relay.db import engine
from relay.db.engine import is_outage
from relay.spool import mark, segments
from relay.spool.journal import copying, supply
from relay.spool.journal.contents import highest_mark
from relay.spool.journal.directory import ADOPTED, COPY, MARK, NEW, OWNED
from relay.spool.journal.format import Place
from relay.spool.journal.reader import JournalReader, WrongBody
from relay.spool.journal.writer import AppendFailed, AppendUnknown
from relay.spool.mark import SpoolMark
from relay.spool.store import Spool
from tests.journal_database import SimulatedClock, SimulatedDatabase, turn_to_write
from tests.journal_disk import (
    CALLS,
    Interruption,
    Plan,
    PowerCut,
    ProcessKilled,
    SimulatedDirectory,
    SimulatedDisk,
    SimulatedProcess,
)
from tests.journal_processes import (
    RETENTION,
    SPOOL,
    Machine,
    RelayProcess,
    SimulatedCommand,
    SimulatedSpooler,
    SimulatedWorker,
    new_id,
    new_record,
    new_settings,
)
from worker import cleaner

EXAMPLES = int(os.environ.get("RELAY_TESTS_EXAMPLES", "0"))  # histories; `make soak`
BATCHES, BATCH = 5, 20
"""Batches of histories without EXAMPLES."""
SECONDS = 40.0
"""Seconds after which no more batches begin: a busy machine takes minutes for all of them."""
SPOOLERS = 3
SPARSE = 700.0
"""Seconds after which a segment may be compacted of which little is needed."""
numbers = st.integers(0, 5)
interruptions = st.sampled_from(Interruption)


def plans(*calls: str, most: int = 3) -> st.SearchStrategy[Plan]:
    """What interrupts some of these calls."""
    steps = st.tuples(st.sampled_from(calls), st.integers(0, 2))
    return st.dictionaries(steps, interruptions, max_size=most)


append_plans = st.one_of(
    # Its owner ends before the sync, or sleeps while it declares the batch void.
    st.sampled_from([{("write", 0): Interruption.KILL}, {("sync", 0): Interruption.KILL}]),
    st.tuples(
        st.sampled_from(["write", "sync", "leads_to", "create", "sync_names"]), st.integers(0, 1)
    ).map(lambda step: {("sync", 0): Interruption.FAIL, step: Interruption.PAUSE}),
    plans("write", "sync", "leads_to"),
    plans("write", "sync", "leads_to", "create", "fill", "rename", "sync_names"),
)
commit_plans = st.one_of(
    plans("query", "transaction", "committed", "leads_to", "read", "unlink"),
    plans("create", "write", "sync", "rename", "sync_names"),  # of the mark
    st.dictionaries(
        st.tuples(st.sampled_from(["transaction", "committed"]), st.integers(0, 1)),
        interruptions,
        min_size=1,
        max_size=1,
    ),
)
adopt_plans = plans("query", "transaction", "names", "open", "lock", "rename", "sync_names", "sync")
work_plans = plans(*CALLS, most=2)


class Backup(NamedTuple):
    """A copy of the database, with what had rows and what was delivered in it."""

    database: sqlite3.Connection
    rows: frozenset[str]
    delivered: frozenset[str]


class Row(NamedTuple):
    """What the database says of a message."""

    queue_id: str
    segment: str
    position: int
    size: int
    state: str

    @property
    def needed(self) -> bool:
        """Whether a delivery needs the body."""
        return self.state in ("queued", "held")


class JournalHistory(RuleBasedStateMachine):
    """One spool, one database, and what the clients heard."""

    def __init__(self, directory: Path, template: Path) -> None:
        super().__init__()
        path = directory / "relay.db"
        shutil.copy(template, path)
        spool = directory / "spool"
        spool.mkdir()
        (spool / "spool-id").write_text(f"{SPOOL}\n")
        self.clock = SimulatedClock()
        self.disk = SimulatedDisk()
        self.database = SimulatedDatabase(path, SPOOL, self.clock, self.committed)
        self.machine = Machine(
            self.disk, self.database, self.clock, new_settings(path), Spool(spool)
        )
        self.observer = self.disk.start_process()
        self.spoolers: list[SimulatedSpooler] = []
        self.backups: list[Backup] = []
        self.bodies: dict[str, bytes] = {}
        self.accepted: set[str] = set()  # the client heard 250
        self.refused: set[str] = set()  # the client heard 451
        self.present: dict[str, str] = {}  # the state of each message in the database
        self.rows: set[str] = set()  # had a row in this history of the database
        self.delivered: set[str] = set()  # were delivered in this history of the database
        self.had_rows: set[str] = set()  # in any history
        self.done: set[str] = set()  # were delivered in any history
        self.covered = {0: (frozenset[str](), frozenset[str]())}  # rows and deliveries by mark
        self.may_come_again: set[str] = set()
        self.may_be_sent_again: set[str] = set()
        self.faults: list[str] = []  # an error that is raised there might be caught
        self.rebuilding = self.restored = False
        self.uncertain: set[str] = set()  # their sync may have failed

    # What is checked

    def committed(self) -> None:
        """Something was committed."""
        before, self.present = self.present, {row.queue_id: row.state for row in self.messages()}
        for queue_id, state in self.present.items():
            if queue_id not in before:
                self._inserted(queue_id, held=state == "held")
            if state == "delivered" != before.get(queue_id):
                self._sent(queue_id)
        if (mark_now := self.database.mark()) not in self.covered:
            self.covered[mark_now] = frozenset(self.rows), frozenset(self.delivered)

    def _inserted(self, queue_id: str, *, held: bool) -> None:
        if queue_id in self.refused:
            self.faults.append(f"{queue_id} was refused and has a row")
        may = queue_id in self.may_come_again or (held and self.rebuilding)
        if queue_id in self.had_rows and not may:
            self.faults.append(f"{queue_id} comes twice")
        self.may_come_again.discard(queue_id)
        self.rows.add(queue_id)
        self.had_rows.add(queue_id)

    def _sent(self, queue_id: str) -> None:
        if queue_id in self.done - self.may_be_sent_again:
            self.faults.append(f"{queue_id} is sent twice")
        self.may_be_sent_again.discard(queue_id)
        self.delivered.add(queue_id)
        self.done.add(queue_id)

    def messages(self) -> list[Row]:
        """All messages."""
        rows = self.database.observer.execute(
            "SELECT replace(m.id, '-', ''), replace(m.segment, '-', ''), m.position, m.size,"
            " d.state FROM messages m JOIN deliveries d ON d.queue_id = m.id ORDER BY m.id"
        )
        return [Row(*row) for row in rows]

    def look(self) -> SimulatedDirectory:
        """The directory for the checks, which are no part of the history."""
        if not self.observer.alive:
            self.observer = self.disk.start_process()
        return SimulatedDirectory(self.observer)

    def older(self) -> bool:
        """Whether the spool tells that the database was restored."""
        directory = self.look()
        known = max(SpoolMark(directory, SPOOL).known, highest_mark(directory, SPOOL))
        return self.database.mark() < known

    def durable_mark(self) -> int:
        """The mark that no power cut takes away."""
        file = self.disk.durable.get(MARK)
        return int(file.disk or 0) if file else 0

    @invariant()
    def bodies_are_readable(self) -> None:
        """Every body that a delivery needs stands at its place; no alarm is false."""
        assert not self.faults
        assert self.restored or not self.older(), "nothing was restored"
        reader = JournalReader(self.look())
        for row in self.messages():
            queue_id = row.queue_id
            # A client that heard nothing sends again, so a body whose sync failed may be missing.
            certain = queue_id in self.accepted or queue_id not in self.uncertain
            if row.needed and certain and queue_id not in self.done:
                try:
                    body = reader.read(Place(row.segment, row.position), row.size)
                except WrongBody as error:
                    if not self.older():
                        raise AssertionError(f"the body of {queue_id} is lost") from error
                else:
                    assert body == self.bodies[queue_id]

    # How a step of the history runs

    def run(
        self,
        process: SimulatedProcess,
        plan: Plan,
        work: Callable[[], object],
        *,
        deep: bool = False,
    ) -> bool:
        """Whether the work ended well. A pause lets others take everything over. `deep`: what has
        rows is delivered and removed during the pause, and after a failure."""
        process.expect(plan, lambda: self._meanwhile(process, deep=deep))
        try:
            work()
        except AppendFailed:
            raise
        except (ProcessKilled, AppendUnknown):
            return self._failed(deep=deep)
        except Exception as error:
            if not is_outage(error):
                raise
            return self._failed(deep=deep)
        finally:
            if process.sync_failed:
                self.uncertain |= {*self.bodies} - self.accepted
            process.expect({})
        return True

    def _failed(self, *, deep: bool) -> bool:
        if deep:
            self._finish_all()
        return False

    def _meanwhile(self, paused: SimulatedProcess, *, deep: bool) -> None:
        paused.lose_locks()
        other = self._new_spooler()
        if (
            self.run(other.process, {}, other.committer.adopt)
            and self.run(other.process, {}, other.committer.drain)
            and deep
        ):
            self._finish_all()
            self._work(SimulatedWorker.clean)
        other.kill()

    def _finish_all(self) -> None:
        """Everything that has a row is delivered, and its rows are removed."""
        self._deliver([*self.present])
        self._purge()

    def _work(self, work: Callable[[SimulatedWorker], object], plan: Plan | None = None) -> bool:
        """A worker does something."""
        return self._in_process(SimulatedWorker(self.machine), work, plan or {})

    def _in_process[Process: RelayProcess](
        self, process: Process, work: Callable[[Process], object], plan: Plan
    ) -> bool:
        done = self.run(process.process, plan, partial(work, process))
        process.kill()
        return done

    def _new_spooler(self) -> SimulatedSpooler:
        return SimulatedSpooler(self.machine, self.accepted.update)

    def _living(self, number: int) -> SimulatedSpooler:
        self.spoolers = [spooler for spooler in self.spoolers if spooler.alive]
        if not self.spoolers:
            self.spoolers.append(self._new_spooler())
        return self.spoolers[number % len(self.spoolers)]

    # Spoolers

    @rule()
    def start(self) -> None:
        self._living(0)
        if len(self.spoolers) < SPOOLERS:
            self.spoolers.append(self._new_spooler())

    @rule(
        number=numbers,
        sizes=st.lists(st.sampled_from([0, 10, 300, 3000, 7000]), min_size=1, max_size=3),
        plan=append_plans,
        wait=st.booleans(),
        deep=st.booleans(),
        after=st.sampled_from(["lives", "dies", "is replaced"]),
    )
    def append(
        self,
        number: int,
        sizes: Sequence[int],
        plan: Plan,
        wait: bool,
        deep: bool,
        after: str,
    ) -> None:
        """`wait`: the reply waits for the rows. `after`: the process may be killed then, and
        another one may make its rows."""
        spooler = self._living(number)
        records = []
        for size in sizes:
            record = new_record(len(self.bodies), size, self.clock.now)
            self.bodies[record.queue_id] = bytes(record.body)
            records.append(record)
        try:
            self.run(spooler.process, plan, lambda: spooler.store(records, wait=wait), deep=deep)
        except AppendFailed:
            self.refused.update(record.queue_id for record in records)
            assert not self.refused & self.accepted
            assert not self.refused & self.present.keys()
        if after != "lives":
            spooler.kill()
        if after == "is replaced":
            other = self._living(0)
            self.run(other.process, {}, other.committer.adopt)
            self.run(other.process, {}, other.committer.drain)

    @rule(number=numbers, plan=commit_plans, deep=st.booleans())
    def commit(self, number: int, plan: Plan, deep: bool) -> None:
        spooler = self._living(number)
        self.run(spooler.process, plan, spooler.committer.drain, deep=deep)

    @rule(number=numbers, plan=commit_plans, stops=st.booleans())
    def store(self, number: int, plan: Plan, stops: bool) -> None:
        """The usual way of a message, with an interruption of the transaction and a second try."""
        self.append(number, [10], {}, wait=True, deep=False, after="lives")
        self.commit(number, plan, deep=True)
        self.commit(number, {}, deep=False)
        if stops:
            self.stop(number, {})

    @rule(number=numbers, plan=adopt_plans, deep=st.booleans())
    def adopt(self, number: int, plan: Plan, deep: bool) -> None:
        spooler = self._living(number)
        self.run(spooler.process, plan, spooler.committer.adopt, deep=deep)

    @rule(which=numbers, plan=plans(*CALLS, most=1))
    def adopt_by_order(self, which: int, plan: Plan) -> None:
        """An operator believes that an owner has ended."""
        names = [name for _, name in self.look().segments(OWNED)]
        if names:
            name = names[which % len(names)]
            command = SimulatedCommand(self.machine)
            self._in_process(command, lambda one: one.adopt(name), plan)

    @rule(number=numbers, plan=commit_plans)
    def stop(self, number: int, plan: Plan) -> None:
        spooler = self._living(number)
        self.run(spooler.process, plan, spooler.stop)
        spooler.kill()

    @rule(number=numbers)
    def lose_locks(self, number: int) -> None:
        self._living(number).process.lose_locks()

    @rule(number=numbers)
    def kill(self, number: int) -> None:
        self._living(number).kill()

    @rule(seconds=st.sampled_from([0.3, 1.0, SPARSE, 2 * RETENTION]))
    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds
        for spooler in self.spoolers:
            if spooler.alive:
                self.run(spooler.process, {}, spooler.committer.step)
                spooler.reply_overdue(1.0)

    @rule(cut=st.sampled_from(PowerCut), seed=st.integers(0, 1000))
    def cut_power(self, cut: PowerCut, seed: int) -> None:
        self.disk.lose_power(cut, seed)

    # The database and the operator

    @rule()
    def back_up(self) -> None:
        copy = self.database.back_up()
        self.backups.append(Backup(copy, frozenset(self.rows), frozenset(self.delivered)))

    @precondition(lambda self: self.backups)
    @rule(number=numbers, live=st.booleans())
    def restore(self, number: int, live: bool) -> None:
        """The database is as it was. What this spool had meanwhile comes on hold, if the mark can
        tell. `live`: connections go on, and do not notice."""
        backup = self.backups[number % len(self.backups)]
        self.database.restore(backup.database, live=live)
        self.restored = True
        self.rows, self.delivered = {*backup.rows}, {*backup.delivered}
        self.present = {row.queue_id: row.state for row in self.messages()}
        known = max(one for one in self.covered if one <= self.durable_mark())
        rows, delivered = self.covered[known]
        self.may_come_again = self.had_rows - self.rows - rows
        self.may_be_sent_again = self.done - self.delivered - delivered

    @precondition(lambda self: self.database.may_lose)
    @rule()
    def crash_database(self) -> None:
        """Rows are lost that were not synced; nothing of them was delivered."""
        before = {*self.present}
        self.database.crash()
        self.present = {row.queue_id: row.state for row in self.messages()}
        lost = before - {*self.present}
        assert not lost & self.done
        self.rows -= lost
        self.may_come_again |= lost

    @precondition(lambda self: self.restored and self.older())
    @rule(plan=work_plans, alone=st.booleans())
    def rebuild(self, plan: Plan, alone: bool) -> None:
        """The second try ends well. smtpd may run meanwhile."""
        for spooler in self.spoolers:
            if alone:
                spooler.kill()
        self.rebuilding = True
        tries = [
            self._in_process(
                SimulatedCommand(self.machine, guarded=False), SimulatedCommand.rebuild, each
            )
            for each in (plan, {})
        ]
        assert tries[-1]
        self.rebuilding = self.restored = False

    # Workers

    @rule(numbers=st.sets(numbers), advances=st.booleans())
    def deliver(self, numbers: set[int], advances: bool) -> None:
        ids = [*self.present]
        self._deliver([ids[number] for number in numbers if number < len(ids)])
        if advances:
            self._work(lambda worker: worker.mark.advance(worker.engine))

    def _deliver(self, queue_ids: Sequence[str]) -> None:
        self._work(lambda worker: worker.deliver(queue_ids))

    def _purge(self) -> None:
        """Retention."""
        self.clock.now += 2 * RETENTION
        self._work(SimulatedWorker.purge)

    @rule()
    def purge(self) -> None:
        self._purge()

    @rule(plan=work_plans)
    def clean(self, plan: Plan) -> None:
        self._work(SimulatedWorker.clean, plan)

    @rule(plan=work_plans)
    def compact(self, plan: Plan) -> None:
        """A turn finds sparse segments; a later one copies them, and the next one removes them."""
        self._work(SimulatedWorker.clean)
        self.clock.now += SPARSE
        self._work(SimulatedWorker.clean, plan)
        self._work(SimulatedWorker.clean)

    @rule(plan=work_plans)
    def remove_copies(self, plan: Plan) -> None:
        self._work(lambda worker: worker.store.remove_unused_copies(), plan)

    # The end

    @rule(cut=st.sampled_from(PowerCut))
    def settle(self, cut: PowerCut) -> None:
        """Everything starts again after a power cut, and makes the rows of what there is."""
        self.cut_power(cut, 1)
        self._living(0)
        if self.older():
            self.rebuild({}, alone=True)
        spooler = self._living(0)
        spooler.committer.adopt()
        spooler.committer.drain()
        assert not spooler.committer.lag().messages
        states = {row.queue_id: row for row in self.messages()}
        for queue_id in self.accepted - self.done:
            assert queue_id in states, f"{queue_id} is lost"
            assert states[queue_id].needed
        assert not self.refused & states.keys()
        self.bodies_are_readable()

    def teardown(self) -> None:
        try:
            self.settle(PowerCut.LOSES_ALL)
            self._release()
            self._finish_all()
            for _ in range(4):  # a segment with a void goes after the one that it voids
                self.clock.now += SPARSE
                self._work(SimulatedWorker.clean)
            self._work(lambda worker: worker.store.remove_unused_copies())
            assert not self.faults
            assert {name[32:] for name in self.look().names() if name != MARK} <= {NEW}
        finally:
            self.close()

    def close(self) -> None:
        """Close everything, and remove the database."""
        self.database.close()
        while self.backups:
            self.backups.pop().database.close()
        shutil.rmtree(self.database.path.parent, ignore_errors=True)

    def _release(self) -> None:
        """An operator lets everything go that is on hold."""
        self.may_be_sent_again |= {id_ for id_, state in self.present.items() if state == "held"}
        self.database.observer.execute(
            "UPDATE deliveries SET state = 'queued', due_at = 0 WHERE state = 'held'"
        )


@pytest.fixture
def new_history(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sqlite_template: Path
) -> Iterator[Callable[[], JournalHistory]]:
    """Makes histories. Neither chance nor time is in them, so they can be repeated."""
    directory, ids, histories = tmp_path / "history", count(1), list[JournalHistory]()
    monkeypatch.setattr(engine, "write_lock", turn_to_write)
    monkeypatch.setattr(committer, "MAX_HELD", 2)  # the rest is read from the segment
    for module in (committer, replay):
        monkeypatch.setattr(module, "MAX_ROWS", 3)
    timed = (committer, replay, segments, copying, supply, rebuild, cleaner)

    def new() -> JournalHistory:
        while histories:  # it failed, or is closed already
            histories.pop().close()
        directory.mkdir()
        history = JournalHistory(directory, sqlite_template / "relay.db")
        for module in timed:
            monkeypatch.setattr(module, "time", history.clock)
        for module in (copying, supply, mark):
            monkeypatch.setattr(module, "new_id", lambda: new_id(next(ids), history.clock.now))
        histories.append(history)
        return history

    with capture_logs():
        yield new
    for history in histories:
        history.close()


def test_no_crash_loses_a_message_or_makes_it_come_twice(
    new_history: Callable[[], JournalHistory],
) -> None:
    if EXAMPLES:
        run_histories(new_history, EXAMPLES)
        return
    end = time.monotonic() + SECONDS
    for _ in range(BATCHES):
        run_histories(new_history, BATCH)
        if time.monotonic() > end:
            break


def run_histories(new_history: Callable[[], JournalHistory], examples: int) -> None:
    # To have a failing history made shorter, which takes minutes, take `phases` away.
    checks: Sequence[HealthCheck] = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(
        cast("type[JournalHistory]", new_history),  # it may be any callable
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            derandomize=False,  # each batch has its own histories
            phases=[Phase.reuse, Phase.generate],
            report_multiple_bugs=False,
            suppress_health_check=checks,
        ),
    )


# Histories that chance seldom finds


def test_a_restored_database_is_noticed_before_a_segment_is_replayed(
    new_history: Callable[[], JournalHistory],
) -> None:
    history = new_history()
    history.back_up()
    history.append(0, [10], {}, wait=True, deep=False, after="lives")
    history.commit(0, {}, deep=False)
    history.restore(0, live=False)
    history.kill(0)
    history.adopt(0, {}, deep=False)
    history.commit(0, {}, deep=False)
    assert not history.present
    history.teardown()


def test_a_mark_that_the_power_took_away_is_read_from_the_batches(
    new_history: Callable[[], JournalHistory],
) -> None:
    history = new_history()
    history.back_up()
    for _ in range(2):
        history.append(0, [10], {}, wait=True, deep=False, after="lives")
        history.commit(0, {}, deep=False)
    history.look().unlink(MARK)
    history.restore(0, live=False)
    assert history.older()
    history.teardown()


@pytest.mark.parametrize("step", ["query", "names", "lock", "rename"])
def test_an_adopter_sees_the_void_that_was_written_just_before_its_rename(
    new_history: Callable[[], JournalHistory], step: str
) -> None:
    """An owner that lives answers 451 while the adopter waits."""
    history = new_history()
    history.append(0, [10], {}, wait=True, deep=False, after="lives")
    owner, adopter = history.spoolers[0], SimulatedSpooler(history.machine, set[str]().update)

    def fail() -> None:
        failed = {("sync", 0): Interruption.FAIL}
        history.append(0, [10], failed, wait=True, deep=False, after="dies")
        assert len(history.refused) == 1

    owner.process.lose_locks()
    adopter.process.expect({(step, 0): Interruption.PAUSE}, fail)
    adopter.committer.adopt()
    assert not owner.alive
    adopter.committer.drain()
    assert len(history.present) == 1
    history.teardown()


def test_a_void_outlives_the_segment_of_its_batch(
    new_history: Callable[[], JournalHistory],
) -> None:
    """A rebuild reads the segment again, whose first message still waits. Random histories seldom
    come here."""
    history = new_history()
    history.back_up()
    history.append(0, [10], {}, wait=True, deep=False, after="lives")
    history.commit(0, {}, deep=False)
    failed = {("sync", 0): Interruption.FAIL}
    history.append(0, [10], failed, wait=True, deep=False, after="is replaced")
    assert len(history.refused) == 1
    history.clean({})
    history.restore(0, live=False)
    history.rebuild({}, alone=True)
    assert len(history.present) == 1
    history.teardown()


def test_a_database_that_lacks_a_compaction_is_noticed_if_the_old_segment_is_gone(
    new_history: Callable[[], JournalHistory],
) -> None:
    """Two workers may compact and remove within a moment. The restored rows lead to the segment
    that is gone, and a copy to which no row leads is removed as a leftover."""
    history = new_history()
    history.append(0, [10], {}, wait=True, deep=False, after="is replaced")
    history.back_up()
    history.compact({})
    assert not [*history.look().segments(OWNED, ADOPTED)]
    history.restore(0, live=False)
    assert history.older()
    history.teardown()


def test_a_compaction_that_sleeps_moves_no_row_that_another_one_has_moved(
    new_history: Callable[[], JournalHistory],
) -> None:
    """The copy of the sleeper may be removed before it wakes up, because no row points to it."""
    history = new_history()
    history.append(0, [10], {}, wait=True, deep=False, after="is replaced")
    history.clean({})
    history.clock.now += SPARSE
    worker = SimulatedWorker(history.machine)

    def another() -> None:
        (copy,) = [name for _, name in history.look().segments(COPY)]
        history.clock.now += SPARSE
        history.clean({})
        history.look().unlink(copy)
        history.bodies_are_readable()

    worker.process.expect({("transaction", 1): Interruption.PAUSE}, another)
    assert worker.store.turn().copied
    history.bodies_are_readable()
    history.teardown()


def test_nothing_is_replayed_into_a_database_that_was_restored_under_a_connection(
    new_history: Callable[[], JournalHistory],
) -> None:
    """The spooler lives on, and its connection too; it adopts, or goes on with its own segment."""
    history = new_history()
    history.append(0, [10], {}, wait=True, deep=False, after="lives")
    history.start()
    for number in (0, 1):
        history.commit(number, {}, deep=False)
    history.back_up()
    history.clock.now += 1
    for number in (0, 1):
        history.append(number, [10], {}, wait=True, deep=False, after="lives")
        history.commit(number, {}, deep=False)
    history.deliver({0, 1, 2}, advances=True)
    history.restore(0, live=True)
    history.kill(1)
    history.adopt(0, {}, deep=False)
    history.append(0, [10], {}, wait=True, deep=False, after="lives")
    history.commit(0, {}, deep=False)
    assert len(history.present) == 1
    history.deliver({0}, advances=False)
    history.teardown()


def test_a_segment_whose_position_a_restored_database_has_forgotten_is_replayed(
    new_history: Callable[[], JournalHistory],
) -> None:
    """The mark cannot tell, because the last one came before the backup."""
    history = new_history()
    for _ in range(2):
        history.append(0, [10], {}, wait=True, deep=False, after="lives")
        history.commit(0, {}, deep=False)
        history.back_up()
    history.append(0, [10], {}, wait=True, deep=False, after="lives")
    history.restore(0, live=True)
    assert not history.older()
    history.commit(0, {}, deep=False)
    history.stop(0, {})
    history.teardown()
    assert len(history.done) == 3


def test_a_rebuild_makes_no_row_of_a_body_that_a_power_failure_takes_away(
    new_history: Callable[[], JournalHistory],
) -> None:
    history = new_history()
    history.back_up()
    history.append(0, [10], {}, wait=True, deep=False, after="lives")
    history.commit(0, {}, deep=False)
    history.restore(0, live=False)
    killed = {("sync", 0): Interruption.KILL}
    history.append(0, [10], killed, wait=True, deep=False, after="dies")
    history.rebuild({}, alone=True)
    history.cut_power(PowerCut.LOSES_ALL, 1)
    assert len(history.present) == 2
    history.bodies_are_readable()
    history.teardown()


def test_an_adopter_makes_no_row_of_a_body_that_a_power_failure_takes_away(
    new_history: Callable[[], JournalHistory],
) -> None:
    history = new_history()
    killed = {("sync", 0): Interruption.KILL}
    history.append(0, [10], killed, wait=True, deep=False, after="is replaced")
    history.cut_power(PowerCut.LOSES_ALL, 1)
    assert len(history.present) == 1
    history.bodies_are_readable()
    history.teardown()


def test_an_owner_refuses_nothing_that_was_adopted_before_it_was_declared_void(
    new_history: Callable[[], JournalHistory],
) -> None:
    """The owner sleeps between its failed sync and the void batch."""
    history = new_history()
    asleep = {("sync", 0): Interruption.FAIL, ("create", 1): Interruption.PAUSE}
    history.append(0, [10], asleep, wait=True, deep=False, after="lives")
    assert len(history.present) == 1
    assert not history.refused
    history.teardown()


@pytest.mark.parametrize("then", ["the mark", "more mail", "the end of its segment", "the stop"])
@pytest.mark.parametrize("lost", [1, 2])
def test_rows_that_a_crash_of_the_database_takes_away_are_made_again(
    new_history: Callable[[], JournalHistory], then: str, lost: int
) -> None:
    """The spooler lives on; each message came alone, so its COMMIT was not synced."""
    history = new_history()
    for _ in range(1 + lost):  # a mark follows the first one
        history.append(0, [10], {}, wait=False, deep=False, after="lives")
        history.commit(0, {}, deep=False)
    spooler = history.spoolers[0]
    history.crash_database()
    assert len(history.present) == 1
    if then == "the end of its segment":
        spooler.writer.retire()
    elif then == "more mail":
        history.append(0, [10], {}, wait=False, deep=False, after="lives")
    elif then == "the mark":
        history.clock.now += 1.0
        spooler.committer.step()
    if then == "the stop":
        history.stop(0, {})
    else:
        spooler.committer.drain()
        assert spooler.committer.lag().messages == 0
    assert len(history.present) == 1 + lost + (then == "more mail")
    history.teardown()
