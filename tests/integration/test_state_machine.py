"""The queue against a model of it: whatever happens in whatever order, both say the same, on both databases.

Hypothesis makes up histories: mail is accepted, workers claim, report, vanish and wake up, leases run out, times come,
operators meddle. A small Python model says what must be so after each step. It also knows what no database can know:
whether the server really took a message. Time passes by `Office.pass_time` alone, in steps so large, and so unlike the
delays, that the seconds which a run takes cannot matter.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import text

from relay.claims import Claim, Item, Record, Recorded, Renewal, Wish
from relay.database import writing
from relay.ids import new_id
from relay.queue import Filter
from relay.schema import FINAL, UNFINISHED, Outcome, State, metadata
from relay.verbs import VERBS, Verb, Verbs
from tests.integration.office import NEXT, Office

type Key = tuple[str, int]

STEP = 13_700.0
GRACE, DELAY, UNCERTAIN_DELAY, LEASE, SESSION, LIFETIME = 10_000.0, 20_000.0, 30_000.0, 20_000.0, 40_000.0, 200_000.0
NEAR = 50.0  # no two times of the model that differ come nearer than this, nor does a run take so long
POISON = 3
TOOK = (Outcome.ACCEPTED, Outcome.UNCERTAIN, Outcome.MALFORMED)
NOT_TOOK = tuple(outcome for outcome in Outcome if outcome is not Outcome.ACCEPTED)
WANTED = {"hold": State.HELD, "drop": State.DROPPED, "bounce": State.BOUNCED, "retry": State.QUEUED}
ROUTES = ("default", "bulk")


@dataclass
class Delivery:
    """What the model knows of a delivery."""

    sender: str
    route: str
    recipients: tuple[str, ...]
    due: float | None
    expires: float
    state: State = State.QUEUED
    worker: str | None = None
    claims: int = 0
    vanished: int = 0
    wanted: str | None = None
    k: bool = False
    taken: int = 0  # how often the server really took it
    doubts: set[int] = field(default_factory=set)  # claims of which nobody knows


@dataclass
class Transfer:
    """A claim under way in a worker, or in one that was declared dead and does not know."""

    worker: str
    claim: Claim
    took: bool

    @property
    def key(self) -> Key:
        return self.claim.message_id, self.claim.number


class History(RuleBasedStateMachine):
    """Rules are what may happen; `agrees` is looked at after each."""

    office: Office

    def __init__(self) -> None:
        super().__init__()
        self._empty()
        self.verbs = Verbs(self.office.engine, notices=True)
        self.clock = 0.0
        self.queue: dict[Key, Delivery] = {}
        self.transfers: list[Transfer] = []
        self.leases: dict[str, float | None] = {}  # until; None: dead
        self.ledger = self.office.another_ledger()
        self.finished: set[Key] = set()
        self.said = itertools.count()
        for _ in range(2):
            self.hire()

    def _empty(self) -> None:
        with writing(self.office.engine) as connection:
            for table in metadata.sorted_tables:
                connection.execute(text(f"DELETE FROM {table.name}"))

    def _alive(self) -> list[str]:
        return [worker for worker, until in self.leases.items() if until is not None]

    def _end(self, delivery: Delivery, state: State) -> None:
        """The model's side of every change that ends a transfer or is an operator's."""
        owed = delivery.sender not in ("", "#@[]")
        due = {
            State.QUEUED: self.clock + GRACE, State.BOUNCED: self.clock if owed else None,
            State.EXPIRED: self.clock if owed else None,
        }  # fmt: skip
        delivery.state, delivery.due, delivery.worker, delivery.wanted = state, due.get(state), None, None

    # --- mail -------------------------------------------------------------------------------------------------

    @rule(
        routes=st.lists(st.sampled_from(ROUTES), min_size=1, max_size=4),
        sender=st.sampled_from(["a@example.com", ""]), again=st.booleans(),
    )  # fmt: skip
    def accept(self, routes: list[str], sender: str, again: bool) -> None:
        addresses = [f"{n}@{route}.example.org" for n, route in enumerate(routes)]
        message_id = self.office.accept(*map(":".join, zip(routes, addresses, strict=True)), sender=sender)
        if again:  # a COMMIT in doubt
            self.office.accept(
                *map(":".join, zip(routes, addresses, strict=True)), sender=sender, message_id=message_id
            )
        for number, route in enumerate(dict.fromkeys(routes), 1):
            mine = tuple(address for address, way in zip(addresses, routes, strict=True) if way == route)
            self.queue[message_id, number] = Delivery(sender, route, mine, self.clock + GRACE, self.clock + LIFETIME)

    # --- workers ----------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.leases) < 6)
    @rule()
    def hire(self) -> None:
        worker = new_id()
        self.ledger.register(worker, "host", 1)
        self.leases[worker] = self.clock + LEASE

    @rule(data=st.data(), twice=st.booleans())
    def work(self, data: st.DataObject, twice: bool) -> None:
        """One round of a worker, dead or alive: outcomes, a renewal, wishes; perhaps told twice."""
        worker = data.draw(st.sampled_from(sorted(self.leases)), label="worker")
        mine = [transfer for transfer in self.transfers if transfer.worker == worker]
        ends = data.draw(st.lists(st.sampled_from(mine), max_size=3, unique_by=id), label="ends") if mine else []
        records = [self._report(transfer, data) for transfer in ends]
        wishes = self._wishes(worker, data) if self.leases[worker] is not None else []
        renew = data.draw(st.booleans(), label="renew")
        renewals = [Renewal(worker)] if renew else []
        items: list[Item] = [*wishes, *records, *renewals]
        results = self.ledger.commit(items)
        assert len(results) == len(items)
        if renew:
            assert results[-1] is (self.leases[worker] is not None)
            if self.leases[worker] is not None:
                self.leases[worker] = self.clock + LEASE
        for transfer, record, result in zip(ends, records, results[len(wishes) :], strict=False):
            self._recorded(transfer, record, result)
        for wish, result in zip(wishes, results, strict=False):
            self._claimed(wish, result, data)
        if twice and records:
            for record, result in zip(records, self.ledger.commit(records), strict=True):
                delivery = self.queue[record.message_id, record.number]
                assert isinstance(result, Recorded)
                assert result.state in (None, delivery.state)

    def _report(self, transfer: Transfer, data: st.DataObject) -> Record:
        """What a worker says of a transfer, which must fit what really happened."""
        self.transfers.remove(transfer)
        delivery = self.queue[transfer.key]
        outcome = data.draw(st.sampled_from(TOOK if transfer.took else NOT_TOOK), label="outcome")
        state = NEXT[outcome]
        if outcome is Outcome.INTERRUPTED and data.draw(st.booleans(), label="handed back"):
            state = State.QUEUED
        if outcome is Outcome.REJECTED and data.draw(st.booleans(), label="split"):
            state = State.SPLIT
        if outcome is Outcome.MALFORMED:
            outcome = Outcome.UNCERTAIN
        if outcome is Outcome.UNCERTAIN:
            delivery.doubts.add(transfer.claim.claim)
        words = f"reply {next(self.said)}"
        return self.office.note(
            transfer.claim, outcome, worker=transfer.worker, state=state, delay=DELAY, reply=words
        )  # fmt: skip

    def _recorded(self, transfer: Transfer, record: Record, result: Any) -> None:
        delivery, accepted = self.queue[transfer.key], record.outcome is Outcome.ACCEPTED
        owner = (delivery.state, delivery.worker, delivery.claims)
        mine = owner == (State.SENDING, transfer.worker, record.claim)
        assert isinstance(result, Recorded)
        if accepted and not delivery.k:
            self._end(delivery, State.DELIVERED)
            delivery.k, delivery.vanished = True, 0
        elif mine:
            state = WANTED[delivery.wanted] if delivery.wanted else record.state
            if state is State.DEFERRED and delivery.expires <= self.clock:
                state = State.EXPIRED
            self._end(delivery, state)
            delivery.vanished = 0
            if state is State.DEFERRED:
                delivery.due = self.clock + DELAY
            if state is State.SPLIT:
                self._cut(transfer.key, delivery)
        expected = delivery.state if delivery.claims == record.claim or delivery.k else None
        assert result.state == expected
        if result.body_free:
            assert not any(
                d.state in UNFINISHED or d.due is not None for key, d in self.queue.items() if key[0] == transfer.key[0]
            )

    def _cut(self, key: Key, delivery: Delivery) -> None:
        if len(delivery.recipients) == 1:
            self._end(delivery, State.BOUNCED)
            return
        last = max(number for message_id, number in self.queue if message_id == key[0])
        middle = (len(delivery.recipients) + 1) // 2
        halves = delivery.recipients[:middle], delivery.recipients[middle:]
        for number, half in enumerate(halves, last + 1):
            self.queue[key[0], number] = Delivery(delivery.sender, delivery.route, half, self.clock, delivery.expires)
        delivery.recipients = ()

    def _wishes(self, worker: str, data: st.DataObject) -> list[Wish]:
        """A hint, a look at what is overdue, both or none."""
        wishes = []
        for hinted in data.draw(st.sampled_from([(), (True,), (False,), (True, False)]), label="wishes"):
            room = data.draw(st.fixed_dictionaries({route: st.integers(0, 3) for route in ROUTES}), label="room")
            known = sorted({message_id for message_id, _ in self.queue}) or ["0" * 32]
            ids = data.draw(st.lists(st.sampled_from(known), max_size=4), label="ids") if hinted else None
            wishes.append(Wish(worker, ids, room))
        return wishes

    def _claimed(self, wish: Wish, claims: Any, data: st.DataObject) -> None:
        assert isinstance(claims, list)
        got = {(claim.message_id, claim.number): claim for claim in claims}
        assert len(got) == len(claims)
        for route, room in wish.room.items():
            fit = {
                key: delivery for key, delivery in self.queue.items()
                if delivery.route == route and delivery.state is State.QUEUED and delivery.due is not None
                and (key[0] in wish.ids if wish.ids is not None else delivery.due <= self.clock)
            }  # fmt: skip
            mine = [key for key in got if self.queue[key].route == route]
            assert set(mine) <= set(fit)
            assert len(mine) == min(room, len(fit)), "all there is, and no more than there is room for"
            if wish.ids is None and mine:
                left = [delivery.due for key, delivery in fit.items() if key not in got and delivery.due is not None]
                latest = max(self.queue[key].due or 0.0 for key in mine)
                assert all(due >= latest - NEAR for due in left), "the longest due first"
        for key, claim in got.items():
            delivery = self.queue[key]
            assert not delivery.k, "never after a K"
            delivery.claims += 1
            assert (claim.claim, claim.vanished) == (delivery.claims, delivery.vanished)
            assert (claim.recipients, claim.sender, claim.route) == (
                delivery.recipients, delivery.sender, delivery.route,
            )  # fmt: skip
            delivery.state, delivery.worker, delivery.wanted = State.SENDING, wish.worker, None
            delivery.due = self.clock + 2 * (SESSION + LEASE)
            took = data.draw(st.booleans(), label="the server takes it")
            delivery.taken += took
            self.transfers.append(Transfer(wish.worker, claim, took))

    # --- sweepers ---------------------------------------------------------------------------------------------

    @rule(limit=st.sampled_from([1, 2, 100]))
    def wake(self, limit: int) -> None:
        due = {
            key: delivery.due for key, delivery in self.queue.items()
            if delivery.state is State.DEFERRED and delivery.due is not None and delivery.due <= self.clock
        }  # fmt: skip
        ids = self.office.sweeps.requeue_due(limit)
        woken = [key for key in due if self._row(key)["state"] == "queued"]
        assert len(woken) == min(limit, len(due))
        assert set(ids) == {message_id for message_id, _ in woken}
        for key in woken:
            assert all(due[key] <= other + NEAR for left, other in due.items() if left not in woken)
            self.queue[key].state, self.queue[key].due = State.QUEUED, self.clock + GRACE

    @rule()
    def bury(self) -> None:
        ran_out = {worker for worker in self._alive() if (self.leases[worker] or 0) < self.clock}
        found = dict(self.office.sweeps.ran_out())
        assert set(found) == ran_out
        for worker in ran_out:
            lost = self.office.sweeps.bury(worker, found[worker])
            self.leases[worker] = None
            assert lost == self._lost(lambda d, worker=worker: d.worker == worker)

    @rule()
    def bury_one_that_renewed(self) -> None:
        for worker, until in self.office.sweeps.ran_out()[:1]:
            assert self.ledger.commit([Renewal(worker)]) == [True]
            self.leases[worker] = self.clock + LEASE
            assert self.office.sweeps.bury(worker, until) is None

    @rule()
    def lose_stuck(self) -> None:
        assert self.office.sweeps.lose_stuck() == self._lost(lambda d: d.due is not None and d.due <= self.clock)

    @rule()
    def lose_strays(self) -> None:
        assert self.office.sweeps.lose_strays() == self._lost(lambda d: self.leases[str(d.worker)] is None)

    def _lost(self, which: Any) -> int:
        lost = [delivery for delivery in self.queue.values() if delivery.state is State.SENDING and which(delivery)]
        for delivery in lost:
            delivery.doubts.add(delivery.claims)
            delivery.vanished += 1
            if delivery.wanted:
                state = WANTED[delivery.wanted]
            elif delivery.vanished >= POISON:
                state = State.HELD
            else:
                state = State.EXPIRED if delivery.expires <= self.clock else State.DEFERRED
            self._end(delivery, state)
            if state is State.DEFERRED:
                delivery.due = self.clock + UNCERTAIN_DELAY
        return len(lost)

    # --- operators, notices and time --------------------------------------------------------------------------

    @precondition(lambda self: self.queue)
    @rule(data=st.data(), verb=st.sampled_from(sorted(VERBS)))
    def meddle(self, data: st.DataObject, verb: str) -> None:
        message_id = data.draw(st.sampled_from(sorted({key[0] for key in self.queue})), label="message")
        told: Verb = VERBS[verb]
        touched, free = self.verbs.apply(told, Filter(id=message_id), actor="tester", reason="")
        mine = [delivery for key, delivery in self.queue.items() if key[0] == message_id]
        met = [d for d in mine if d.state in told.takes or (told.wanted and d.state is State.SENDING)]
        met = [delivery for delivery in met if delivery.recipients]
        assert touched.total() == len(met)
        for delivery in met:
            if delivery.state is State.SENDING:
                delivery.wanted = told.wanted
                continue
            self._end(delivery, told.state)
            if told.state is State.QUEUED:
                delivery.due = self.clock
            if verb == "release":
                delivery.vanished = 0
        if free:
            assert not any(d.state in UNFINISHED or d.due is not None for d in mine)

    @rule()
    def settle(self) -> None:
        """Every notice that is owed is made."""
        self.office.change("UPDATE deliveries SET due_at = NULL WHERE state IN ('bounced', 'expired')")
        for delivery in self.queue.values():
            if delivery.state in (State.BOUNCED, State.EXPIRED):
                delivery.due = None

    @rule(steps=st.integers(1, 3))
    def wait(self, steps: int) -> None:
        self.office.pass_time(steps * STEP)
        self.clock += steps * STEP

    # --- what is always so ------------------------------------------------------------------------------------

    def _row(self, key: Key) -> Any:
        return self.office.delivery(*key)

    @invariant()
    def agrees(self) -> None:
        sql = (
            "SELECT d.*, @hex(d.message_id) AS id, @hex(d.worker) AS who, -@since(d.due_at) AS due_in FROM deliveries d"
        )
        rows = {(row["id"], row["number"]): row for row in self.office.rows(sql)}
        assert rows.keys() == self.queue.keys()
        for key, row in rows.items():
            delivery = self.queue[key]
            found = (row["state"], row["who"], row["claims"], row["vanished"], row["wanted"])
            assert found == (delivery.state, delivery.worker, delivery.claims, delivery.vanished, delivery.wanted), key
            if delivery.due is None:
                assert row["due_in"] is None
            else:
                assert float(row["due_in"]) == pytest.approx(delivery.due - self.clock, abs=NEAR)
            assert (row["finished_at"] is not None) == (delivery.state in FINAL)
            if delivery.state in UNFINISHED:
                assert row["due_in"] is not None or delivery.state is State.HELD, "nothing is forgotten"
            assert not delivery.k or delivery.state is State.DELIVERED, "a K is for good"
            assert key not in self.finished or delivery.state in FINAL, "what is finished never comes back"
        self.finished |= {key for key, delivery in self.queue.items() if delivery.state in FINAL}

    @invariant()
    def every_recipient_is_somewhere_once(self) -> None:
        sql = "SELECT @hex(message_id) AS id, delivery, address FROM recipients ORDER BY message_id, position"
        found: dict[Key, list[str]] = {key: [] for key in self.queue}
        for row in self.office.rows(sql):
            found[row["id"], row["delivery"]].append(row["address"])
        assert found == {key: list(delivery.recipients) for key, delivery in self.queue.items()}

    @invariant()
    def no_send_is_hidden(self) -> None:
        """Whatever was sent twice was uncertain in between, and says so."""
        sql = """SELECT @hex(message_id) AS id, delivery, count(DISTINCT claim) AS n FROM attempts
            WHERE outcome = 'uncertain' GROUP BY message_id, delivery"""
        doubts = {(row["id"], row["delivery"]): row["n"] for row in self.office.rows(sql)}
        for key, delivery in self.queue.items():
            assert doubts.get(key, 0) == len(delivery.doubts)
            assert delivery.taken <= 1 + len(delivery.doubts)


@pytest.fixture
def office(clean_url: str) -> Iterator[Office]:
    made = Office(
        clean_url, grace=GRACE, lease=LEASE, session_timeout=SESSION, queue_lifetime=LIFETIME,
        uncertain_delay=UNCERTAIN_DELAY, poison_limit=POISON,
    )  # fmt: skip
    yield made
    made.engine.dispose()


def test_the_queue_does_what_its_model_does(office: Office) -> None:
    machine: type[History] = type("History", (History,), {"office": office})
    checks: Sequence[HealthCheck] = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=checks),
    )
