"""Random histories of the journal on a simulated disk: nothing is lost, and nothing comes twice.

Spoolers append with and without failures, are killed, paused and woken up; others adopt; the power
fails; the database is restored from a backup; workers deliver, compact and remove. What every
client heard is remembered:

- after a 250 a message has one row as long as a delivery needs it, and its body is readable;
- after a 451 a message never gets a row;
- no message gets a row twice, except on hold after the database was restored.
"""

import os
from collections.abc import Callable, Iterator, Sequence

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

from relay.spool.journal import copying, supply
from relay.spool.journal.directory import COPY, NEW
from relay.spool.journal.format import JournalRecord, RecordKind
from relay.spool.journal.reader import JournalReader, WrongBody
from relay.spool.journal.writer import AppendFailed, AppendUnknown
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
from tests.journal_model import (
    DatabaseAway,
    DatabaseSession,
    ModelDatabase,
    ModelSpooler,
    TwiceInserted,
    compact,
    learn_mark,
    rebuild,
    remove_segments,
)

EXAMPLES = int(os.environ.get("RELAY_TESTS_EXAMPLES", "100"))  # histories; `make soak`
SPOOLERS = 3
numbers = st.integers(0, 5)
interruptions = st.sampled_from(Interruption)


def plans(*calls: str, most: int = 3) -> st.SearchStrategy[Plan]:
    """What interrupts some of these calls."""
    steps = st.tuples(st.sampled_from(calls), st.integers(0, 2))
    return st.dictionaries(steps, interruptions, max_size=most)


append_plans = st.one_of(
    plans("write", "sync", "leads_to"),
    plans("write", "sync", "leads_to", "create", "fill", "rename", "sync_names"),
)
commit_plans = st.one_of(
    plans("transaction", "mark", "leads_to", "read", "unlink"),
    st.dictionaries(
        st.tuples(st.just("transaction"), st.integers(0, 1)), interruptions, min_size=1, max_size=1
    ),
)
adopt_plans = plans("transaction", "mark", "names", "open", "lock", "rename", "sync_names", "sync")
work_plans = plans(*CALLS, most=2)


class JournalHistory(RuleBasedStateMachine):
    """One spool, one database, and what the clients heard."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = SimulatedDisk()
        self.database = ModelDatabase(self.inserted)
        self.spoolers: list[ModelSpooler] = []
        self.backups: list[tuple[ModelDatabase, set[str]]] = []  # and which rows had come
        self.bodies: dict[str, bytes] = {}
        self.accepted: set[str] = set()  # the client heard 250
        self.refused: set[str] = set()  # the client heard 451
        self.waiting: dict[str, ModelSpooler] = {}  # synced, without a reply
        self.rows: set[str] = set()  # had a row in this history of the database
        self.forgotten: set[str] = set()  # had one before the database was restored
        self.done: set[str] = set()  # delivered at least once
        self.rebuilding = False
        self.uncertain: set[str] = set()  # their sync may have failed
        self.observer = self.disk.start_process()

    # What is checked

    def inserted(self, queue_id: str, held: bool) -> None:
        """A message gets a row."""
        if queue_id in self.refused:
            raise TwiceInserted(f"{queue_id} was refused and has a row")
        if queue_id in self.rows and not (held and self.rebuilding):
            raise TwiceInserted(f"{queue_id} comes twice")
        self.rows.add(queue_id)

    def look(self) -> SimulatedDirectory:
        """The directory for the checks, which are no part of the history."""
        if not self.observer.alive:
            self.observer = self.disk.start_process()
        return SimulatedDirectory(self.observer)

    def older(self) -> bool:
        """Whether the spool tells that the database was restored."""
        return self.database.mark < self.disk.mark

    @invariant()
    def bodies_are_readable(self) -> None:
        """Every body that a delivery needs stands at its place."""
        if self.older():
            return
        reader = JournalReader(self.look())
        for queue_id, row in self.database.messages.items():
            # A client that heard nothing sends again, so a body whose sync failed may be missing.
            certain = queue_id in self.accepted or queue_id not in self.uncertain
            if row.needed and certain and queue_id not in self.done:
                try:
                    body = reader.read(row.place, row.size)
                except WrongBody as error:
                    raise AssertionError(f"the body of {queue_id} is lost") from error
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
        except (ProcessKilled, DatabaseAway, AppendUnknown, OSError):
            if deep:
                self._deliver([*self.database.messages])
                self._purge()
            return False
        finally:
            if process.sync_failed:
                self.uncertain |= {*self.bodies} - self.accepted
            process.expect({})
        return True

    def _meanwhile(self, paused: SimulatedProcess, *, deep: bool) -> None:
        paused.lose_locks()
        other = ModelSpooler(self.disk, self.database)
        done = self.run(other.process, {}, other.adopt) and self.run(
            other.process, {}, other.commit
        )
        if done and deep:
            self._deliver([*self.database.messages])
            self._purge()
            self._work(remove_segments)
        other.process.kill()

    def _work(self, work: Callable[..., object], *rest: object) -> None:
        """A worker's process does something, without interruption."""
        process = self.disk.start_process()
        session = DatabaseSession(self.database, process)
        self.run(process, {}, lambda: work(SimulatedDirectory(process), session, *rest))
        process.kill()

    def _living(self, number: int) -> ModelSpooler:
        self.spoolers = [spooler for spooler in self.spoolers if spooler.alive]
        if not self.spoolers:
            self.spoolers.append(ModelSpooler(self.disk, self.database))
        return self.spoolers[number % len(self.spoolers)]

    def _reply(self) -> None:
        """250 to those whose rows are made; a process that has ended sends no reply."""
        for queue_id, spooler in [*self.waiting.items()]:
            if not spooler.alive:
                del self.waiting[queue_id]
            elif spooler.committed(queue_id):
                del self.waiting[queue_id]
                self.accepted.add(queue_id)

    # Spoolers

    @rule()
    def start(self) -> None:
        self._living(0)
        if len(self.spoolers) < SPOOLERS:
            self.spoolers.append(ModelSpooler(self.disk, self.database))

    @rule(
        number=numbers,
        sizes=st.lists(st.sampled_from([0, 10, 300, 3000, 9000]), min_size=1, max_size=3),
        plan=append_plans,
        late=st.booleans(),
        deep=st.booleans(),
        after=st.sampled_from(["lives", "dies", "is replaced"]),
    )
    def append(
        self,
        number: int,
        sizes: Sequence[int],
        plan: Plan,
        late: bool,
        deep: bool,
        after: str,
    ) -> None:
        """`late`: the reply goes out at the sync, because the database does not keep up. `after`:
        the process may be killed then, and another one may make its rows."""
        spooler = self._living(number)
        records = [self._message(size) for size in sizes]
        try:
            stored = self.run(spooler.process, plan, lambda: spooler.append(records), deep=deep)
        except AppendFailed:
            stored = False
            self.refused.update(record.queue_id for record in records)
            assert not self.refused & {*self.database.messages}
        if stored and late:
            self.accepted.update(record.queue_id for record in records)
        elif stored:
            self.waiting |= {record.queue_id: spooler for record in records}
        if after != "lives":
            spooler.process.kill()
            self._reply()
        if after == "is replaced":
            other = self._living(0)
            self.run(other.process, {}, other.adopt)
            self.run(other.process, {}, other.commit)

    def _message(self, size: int) -> JournalRecord:
        queue_id = f"{len(self.bodies) + (1 << 100):032x}"
        body = (queue_id.encode() * (size // 32 + 1))[:size]
        self.bodies[queue_id] = body
        return JournalRecord(RecordKind.MESSAGE, queue_id, b"envelope " + queue_id.encode(), body)

    @rule(number=numbers, plan=commit_plans, from_memory=st.booleans(), deep=st.booleans())
    def commit(self, number: int, plan: Plan, from_memory: bool, deep: bool) -> None:
        spooler = self._living(number)
        self.run(spooler.process, plan, lambda: spooler.commit(from_memory=from_memory), deep=deep)
        self._reply()

    @rule(number=numbers, plan=commit_plans, from_memory=st.booleans())
    def store(self, number: int, plan: Plan, from_memory: bool) -> None:
        """The usual way of a message, with an interruption of the transaction and a second try."""
        self.append(number, [10], {}, late=False, deep=False, after="lives")
        self.commit(number, plan, from_memory, deep=True)
        self.commit(number, {}, from_memory, deep=False)

    @rule(number=numbers, plan=adopt_plans, deep=st.booleans())
    def adopt(self, number: int, plan: Plan, deep: bool) -> None:
        spooler = self._living(number)
        self.run(spooler.process, plan, spooler.adopt, deep=deep)

    @rule(number=numbers, which=numbers)
    def adopt_by_order(self, number: int, which: int) -> None:
        """An operator believes that an owner has ended."""
        spooler = self._living(number)
        segments = [segment for segment, _ in self.look().segments(".segment")]
        if segments:
            segment = segments[which % len(segments)]
            self.run(spooler.process, {}, lambda: spooler.adopt(forced=segment))

    @rule(number=numbers)
    def lose_locks(self, number: int) -> None:
        self._living(number).process.lose_locks()

    @rule(number=numbers)
    def kill(self, number: int) -> None:
        self._living(number).process.kill()
        self._reply()

    @rule(cut=st.sampled_from(PowerCut), seed=st.integers(0, 1000))
    def cut_power(self, cut: PowerCut, seed: int) -> None:
        self.disk.lose_power(cut, seed)
        learn_mark(self.disk)
        self._reply()
        self._reconsider()

    # The database and the operator

    @rule()
    def back_up(self) -> None:
        self.backups.append((self.database.snapshot(), {*self.rows}))

    @precondition(lambda self: self.backups)
    @rule(number=numbers)
    def restore(self, number: int) -> None:
        """The database is as it was. What this spool had meanwhile comes on hold, if the spool can
        tell."""
        backup, rows = self.backups[number % len(self.backups)]
        self.forgotten |= self.rows - rows
        self.database.restore(backup)
        self._reconsider()

    def _reconsider(self) -> None:
        """A restored database whose mark the spool does not miss is as good as the lost one."""
        if not self.older():
            self.rows -= self.forgotten
            self.forgotten.clear()

    @precondition(lambda self: self.older())
    @rule()
    def rebuild(self) -> None:
        for spooler in self.spoolers:
            spooler.process.kill()
        self._reply()
        self.rebuilding = True
        rebuild(self.disk, self.database)
        self.rebuilding = False
        self.forgotten.clear()

    # Workers

    @rule(numbers=st.sets(numbers))
    def deliver(self, numbers: set[int]) -> None:
        messages = [*self.database.messages]
        self._deliver([messages[number] for number in numbers if number < len(messages)])

    def _deliver(self, queue_ids: Sequence[str]) -> None:
        """A worker claims nothing from an older database."""
        if not self.older():
            for queue_id in queue_ids:
                self.database.messages[queue_id].needed = False
                self.done.add(queue_id)

    @rule()
    def purge(self) -> None:
        self._purge()

    def _purge(self) -> None:
        """Retention."""
        if not self.older():
            for queue_id, row in [*self.database.messages.items()]:
                if not row.needed:
                    del self.database.messages[queue_id]

    @rule(plan=work_plans)
    def remove(self, plan: Plan) -> None:
        process = self.disk.start_process()
        session = DatabaseSession(self.database, process)
        directory = SimulatedDirectory(process)
        self.run(process, plan, lambda: remove_segments(directory, session))
        process.kill()

    @rule(plan=work_plans)
    def compact(self, plan: Plan) -> None:
        process = self.disk.start_process()
        session = DatabaseSession(self.database, process)
        directory = SimulatedDirectory(process)
        self.run(process, plan, lambda: compact(directory, session))
        process.kill()

    # The end

    @rule(cut=st.sampled_from(PowerCut))
    def settle(self, cut: PowerCut) -> None:
        """Everything starts again after a power cut, and makes the rows of what there is."""
        self.cut_power(cut, 1)
        if self.older():
            self.rebuild()
        spooler = self._living(0)
        spooler.adopt()
        spooler.commit()
        assert not spooler.segments
        for queue_id in self.accepted - self.done:
            row = self.database.messages.get(queue_id)
            assert row is not None, f"{queue_id} is lost"
            assert row.needed
        assert not self.refused & {*self.database.messages}
        self.bodies_are_readable()

    def teardown(self) -> None:
        self.settle(PowerCut.LOSES_ALL)
        self._deliver([*self.database.messages])
        self._purge()
        for _ in range(3):  # a segment with a void goes after the one that it voids
            self._work(remove_segments)
        assert {name[32:] for name in self.look().names()} <= {COPY, NEW}


@pytest.fixture
def counted_ids(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ids without chance, so that a history can be repeated."""
    numbers = iter(range(1, 1 << 60))
    for module in (copying, supply):
        monkeypatch.setattr(module, "new_id", lambda: f"{next(numbers):032x}")
    with capture_logs():
        yield


@pytest.mark.usefixtures("counted_ids")
def test_no_crash_loses_a_message_or_makes_it_come_twice() -> None:
    # To have a failing history made shorter, which takes minutes, take `phases` away.
    checks: Sequence[HealthCheck] = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(
        JournalHistory,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=40,
            deadline=None,
            phases=[Phase.reuse, Phase.generate],
            report_multiple_bugs=False,
            suppress_health_check=checks,
        ),
    )


# Histories that chance seldom finds


@pytest.mark.usefixtures("counted_ids")
def test_a_restored_database_is_noticed_before_a_segment_is_replayed() -> None:
    history = JournalHistory()
    history.back_up()
    history.append(0, [10], {}, late=False, deep=False, after="lives")
    history.commit(0, {}, from_memory=True, deep=False)
    history.restore(0)
    history.kill(0)
    history.adopt(0, {}, deep=False)
    history.commit(0, {}, from_memory=False, deep=False)
    assert not history.database.messages
    history.teardown()


@pytest.mark.usefixtures("counted_ids")
def test_a_mark_that_the_power_took_away_is_read_from_the_batches() -> None:
    history = JournalHistory()
    history.back_up()
    for _ in range(2):
        history.append(0, [10], {}, late=False, deep=False, after="lives")
        history.commit(0, {}, from_memory=True, deep=False)
    history.cut_power(PowerCut.LOSES_ALL, 1)
    history.restore(0)
    assert history.older()
    history.teardown()


@pytest.mark.usefixtures("counted_ids")
def test_an_adopter_sees_the_void_that_was_written_just_before_its_rename() -> None:
    """An owner that lives answers 451 while the adopter waits for the database."""
    history = JournalHistory()
    history.append(0, [10], {}, late=False, deep=False, after="lives")
    owner, adopter = history.spoolers[0], ModelSpooler(history.disk, history.database)

    def fail() -> None:
        history.append(
            0, [10], {("sync", 0): Interruption.FAIL}, late=False, deep=False, after="dies"
        )
        assert len(history.refused) == 1

    adopter.process.expect({("transaction", 0): Interruption.PAUSE}, fail)
    adopter.adopt()
    assert not owner.alive
    adopter.commit()
    assert len(history.database.messages) == 1
    history.teardown()


@pytest.mark.usefixtures("counted_ids")
def test_a_compaction_that_sleeps_moves_no_row_that_another_one_has_moved() -> None:
    """The copy of the sleeper may be removed before it wakes up, because no row points to it."""
    history = JournalHistory()
    history.append(0, [10], {}, late=False, deep=False, after="is replaced")
    process = history.disk.start_process()
    session, directory = DatabaseSession(history.database, process), SimulatedDirectory(process)

    def another() -> None:
        known = {row.place.segment for row in history.database.messages.values()}
        before = {name for name in history.look().names() if name.endswith(COPY)}
        history.compact({})
        moved = {row.place.segment for row in history.database.messages.values()}
        assert moved != known
        for name in before:
            history.look().unlink(name)

    process.expect({("transaction", 1): Interruption.PAUSE}, another)
    compact(directory, session)
    history.bodies_are_readable()
    history.teardown()


@pytest.mark.usefixtures("counted_ids")
def test_a_void_outlives_the_segment_of_its_batch() -> None:
    """A rebuild reads the segment again, whose first message still waits. Random histories seldom
    come here."""
    history = JournalHistory()
    history.back_up()
    history.append(0, [10], {}, late=False, deep=False, after="lives")
    history.commit(0, {}, from_memory=True, deep=False)
    failed = {("sync", 0): Interruption.FAIL}
    history.append(0, [10], failed, late=False, deep=False, after="is replaced")
    assert len(history.refused) == 1
    history.remove({})
    history.restore(0)
    history.rebuild()
    assert len(history.database.messages) == 1
    history.teardown()
