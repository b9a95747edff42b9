"""The queue against a model of it, on both databases, in random histories made by Hypothesis.

In a history mail is accepted, workers claim, complete, crash and wake up, leases run out, DSNs are
generated and their generator is killed, and operators act. A small Python model says what must be
true after each step, and at the end everything is brought to its final state. The model also knows
what no database can know: whether the server really took a message, and which recipients a DSN
names. Time passes by `QueueHarness.pass_time` alone, in steps so large that the seconds of a run do
not matter. `make soak` runs a thousand histories on each database.
"""

import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from sqlalchemy import text

from migrations.tables import metadata
from relay.db.engine import writing
from relay.dsn.generator import DsnGenerator
from relay.dsn.message import POSSIBLY_DELIVERED
from relay.ids import new_id
from relay.queue import rescue
from relay.queue.model import Claim, ClaimRequest, Command, Completion, CompletionResult, Renewal
from relay.queue.operations import OPERATIONS, REROUTE, Operation, QueueOperations
from relay.queue.outcome import Outcome
from relay.queue.states import FINAL, UNFINISHED, State
from relay.report.filters import Filter
from relay.spool.store import Spool
from tests.bodies import body_in
from tests.integration.harness import OUTCOME_POLICY, QueueHarness, new_message

type Key = tuple[str, int]

EXAMPLES = int(os.environ.get("RELAY_TESTS_EXAMPLES", "10"))  # histories a database; `make soak`

STEP = 13_700.0
GRACE, DELAY, UNCERTAIN_DELAY, LEASE, SESSION, LIFETIME = (
    10_000.0,
    20_000.0,
    30_000.0,
    20_000.0,
    10_000.0,
    200_000.0,
)
GATHER, WARNING = 5_000.0, 45_000.0
NEAR = (
    50.0  # no two times of the model that differ come nearer than this, nor does a run take so long
)
POISON = 3
TOOK = (Outcome.DELIVERED, Outcome.UNCERTAIN, Outcome.MALFORMED)
NOT_TOOK = (
    *(outcome for outcome in Outcome if outcome is not Outcome.DELIVERED),
    Outcome.REJECTED,
    Outcome.REJECTED,
)
OPERATION_STATES = {
    "hold": State.HELD,
    "drop": State.DROPPED,
    "bounce": State.BOUNCED,
    "retry": State.QUEUED,
}
ROUTES = ("default", "bulk")
FAILED = (State.BOUNCED, State.EXPIRED)
WAITING = (State.QUEUED, State.SENDING, State.DEFERRED)
SENDERS = ["a@example.com", "a@example.com", "", "#@[]"]
# The DSNs that it requests.
NOTIFY: dict[str | None, frozenset[str]] = {
    None: frozenset({"failure", "delay"}),
    "FAILURE": frozenset({"failure"}),
    "DELAY": frozenset({"delay"}),
    "NEVER": frozenset(),
}
SAME = "user unknown (#5.1.1)"  # replies that servers repeat
BY_OPERATOR = "an operator did that"
# Everything else happens in both.
VARIANTS: dict[str, dict[str, Any]] = {
    "warnings": {"delay_warning": WARNING},
    "hold": {"uncertain": "hold"},
}
# Events, and their relative frequency.
HAPPENINGS = [
    what
    for what, often in {
        "work": 10,
        "accept": 6,
        "wait": 3,
        "wake": 3,
        "crash": 2,
        "wake_up_late": 3,
        "operate": 3,
        "generate": 4,
        "reroute": 1,
        "warn": 3,
        "register_worker": 1,
        "expire_worker": 1,
        "expire_one_that_renewed": 1,
        "expire_stuck_transfers": 1,
        "rescue_unowned": 1,
    }.items()
    for _ in range(often)
]
# Hypothesis chooses and shrinks the events of a history; the details are random.
CHANCE = st.randoms(use_true_random=True)


def sample_of[T](chance: Random, these: Sequence[T], share: float) -> list[T]:
    return [one for one in these if chance.random() < share]


class Killed(BaseException):
    """Acts as kill -9: no code catches it, nothing is cleaned up, and the database rolls back the
    transaction."""


class KilledSpool(Spool):
    """The spool of a process that is killed when half a body is written, or when one is to be
    removed."""

    def __init__(self, directory: Path, last: str) -> None:
        super().__init__(directory)
        self._last = last

    def store(self, queue_id: str, parts: Sequence[bytes], envelope: bytes = b"") -> int:
        if self._last == "store":
            super().store(queue_id, [b"half"])
            raise Killed
        return super().store(queue_id, parts, envelope)

    def remove(self, queue_id: str) -> bool:
        if self._last == "remove" and self.path(queue_id).exists():
            raise Killed
        return super().remove(queue_id)


@dataclass
class Delivery:
    """The model of a delivery."""

    sender: str
    route: str
    recipients: tuple[str, ...]
    due: float | None
    expires: float
    parent: int | None = None
    state: State = State.QUEUED
    worker: str | None = None
    claims: int = 0
    crash_count: int = 0
    pending: str | None = None
    k: bool = False
    taken: int = 0  # how often the server really accepted it
    uncertain: set[int] = field(default_factory=set)  # claims of unknown outcome
    outcome: str | None = None  # of the last attempt, and its text
    reply: str = ""
    about: str = ""  # of a DSN: the message, its recipients, and the enclosed content
    names: tuple[str, ...] = ()
    encloses: str | None = None

    @property
    def about_us(self) -> bool:
        """Bounced by a D that is not about the mail."""
        return self.state is State.BOUNCED and "not allowed" in self.reply


@dataclass
class Transfer:
    """An open claim of a worker, or of one whose lease has expired without its knowledge."""

    worker: str
    claim: Claim
    took: bool

    @property
    def key(self) -> Key:
        return self.claim.queue_id, self.claim.number


class History(RuleBasedStateMachine):
    """`happens` is one event after the other; the invariants are checked after each of them."""

    harness: QueueHarness
    spool: Spool

    def __init__(self) -> None:
        super().__init__()
        self._empty()
        self.operations = QueueOperations(self.harness.database, sends_dsns=True)
        self.clock = 0.0
        self.queue: dict[Key, Delivery] = {}
        self.transfers: list[Transfer] = []
        self.leases: dict[str, float | None] = {}  # until; None: dead
        self.worker_queue = self.harness.another_worker_queue()
        self.finished: set[Key] = set()
        self.said = itertools.count()
        self.hold = self.harness.settings.uncertain == "hold"
        self.warned: set[str] = set()  # messages whose sender got a delay warning
        self.received: dict[str, float] = {}
        self.notify: dict[
            tuple[str, str], frozenset[str]
        ] = {}  # by message and address: the DSNs that its sender requested
        self.reported: Counter[tuple[str, str]] = (
            Counter()
        )  # by message and address: DSNs that name it
        for _ in range(2):
            self.register_worker(Random())

    def _empty(self) -> None:
        with writing(self.harness.database) as connection:
            for table in metadata.sorted_tables:
                connection.execute(text(f"DELETE FROM {table.name}"))

    def _alive(self) -> list[str]:
        return [worker for worker, until in self.leases.items() if until is not None]

    def _end(self, delivery: Delivery, state: State) -> None:
        """The model's side of every change that ends a transfer or is an operator's."""
        owed = delivery.sender not in SENDERS[2:] or delivery.encloses is not None
        due = {
            State.QUEUED: self.clock + GRACE,
            State.BOUNCED: self.clock if owed else None,
            State.EXPIRED: self.clock if owed else None,
        }
        delivery.state, delivery.due, delivery.worker, delivery.pending = (
            state,
            due.get(state),
            None,
            None,
        )

    @rule(what=st.sampled_from(HAPPENINGS), chance=CHANCE)
    def happens(self, what: str, chance: Random) -> None:
        getattr(self, what)(chance)

    # --- mail
    # ----------------------------------------------------------------------------------------------

    def accept(self, chance: Random) -> None:
        """A message is accepted, perhaps committed twice because the first COMMIT is unknown."""
        routes, sender = (
            chance.choices(ROUTES, (3, 1), k=chance.randint(1, 8)),
            chance.choice(SENDERS),
        )
        addresses = [f"{n}@{route}.example.org" for n, route in enumerate(routes)]
        message = new_message(*map(":".join, zip(routes, addresses, strict=True)), sender=sender)
        queue_id = message.id
        self.spool.store(queue_id, [bytes(message.size)])
        for n, recipient in enumerate(message.recipients):
            message.recipients[n] = asked = recipient._replace(
                notify=chance.choice([None, *NOTIFY])
            )
            self.notify[queue_id, asked.address] = (
                NOTIFY[asked.notify] if sender in SENDERS[:2] else frozenset()
            )
        self.received[queue_id] = self.clock
        for _ in range(chance.randint(1, 2)):
            self.harness.insert([message])
        for number, route in enumerate(dict.fromkeys(routes), 1):
            mine = tuple(
                address for address, way in zip(addresses, routes, strict=True) if way == route
            )
            self.queue[queue_id, number] = Delivery(
                sender, route, mine, self.clock + GRACE, self.clock + LIFETIME
            )

    # --- workers
    # ----------------------------------------------------------------------------------------------

    def register_worker(self, _: Random) -> None:
        """Another worker process starts."""
        if len(self._alive()) >= 4:
            return
        worker = new_id()
        self.worker_queue.register(worker, "host", 1)
        self.leases[worker] = self.clock + LEASE

    def work(self, chance: Random) -> None:
        """One commit of a worker, expired or not: outcomes, a renewal, requests; perhaps committed
        twice."""
        worker = chance.choice(list(self.leases))
        mine = [transfer for transfer in self.transfers if transfer.worker == worker]
        ends = sample_of(chance, mine, 0.4)
        requests = self._claim_requests(worker, chance)
        self._round(worker, ends, requests, chance)

    def wake_up_late(self, chance: Random) -> None:
        """A worker reports on a transfer that was taken from it."""
        stale = [transfer for transfer in self.transfers if self._stale(transfer)]
        if stale:
            transfer = chance.choice(stale)
            self._round(transfer.worker, [transfer], [], chance)

    def _stale(self, transfer: Transfer) -> bool:
        delivery = self.queue[transfer.key]
        return (delivery.worker, delivery.claims) != (transfer.worker, transfer.claim.claim)

    def _round(
        self,
        worker: str,
        ends: list[Transfer],
        requests: list[ClaimRequest],
        chance: Random,
        *,
        last: bool = False,
    ) -> None:
        records = [self._report(transfer, chance, last=last) for transfer in ends]
        renew = chance.random() < 0.5
        renewals = [Renewal(worker)] if renew else []
        items: list[Command] = [*requests, *records, *renewals]
        results = self.worker_queue.commit(items)
        assert len(results) == len(items)
        if renew:
            assert results[-1] is (self.leases[worker] is not None)
            if self.leases[worker] is not None:
                self.leases[worker] = self.clock + LEASE
        self._recorded(list(zip(ends, records, results[len(requests) :], strict=False)))
        for record, result in zip(records, results[len(requests) :], strict=False):
            if isinstance(result, CompletionResult) and result.body_deletable:
                self.spool.remove(record.queue_id)
        for request, result in zip(requests, results, strict=False):
            self._claimed(request, result, chance)
        if records and chance.random() < 0.3:
            for record, result in zip(records, self.worker_queue.commit(records), strict=True):
                delivery = self.queue[record.queue_id, record.number]
                assert isinstance(result, CompletionResult)
                assert result.state in (None, delivery.state)

    def _needed(self, queue_id: str) -> bool:
        """Whether a delivery still needs the body."""
        mine = [delivery for key, delivery in self.queue.items() if key[0] == queue_id]
        return any(delivery.state in UNFINISHED or delivery.due is not None for delivery in mine)

    def _report(self, transfer: Transfer, chance: Random, *, last: bool) -> Completion:
        """The completion of a transfer, which must agree with the real event; `last`: it ends the
        transfer."""
        self.transfers.remove(transfer)
        delivery = self.queue[transfer.key]
        outcome = chance.choice(TOOK if transfer.took else NOT_TOOK)
        half = (
            delivery.parent is not None and chance.random() < 0.7
        )  # rejected, as its sibling may be
        if last or (half and not transfer.took):
            outcome = Outcome.DELIVERED if transfer.took else Outcome.REJECTED
        state = OUTCOME_POLICY[outcome]
        if outcome is Outcome.INTERRUPTED and chance.random() < 0.5:
            state = State.QUEUED
        if outcome is Outcome.REJECTED and (half or chance.random() < 0.5):
            state = State.SPLIT
        if outcome is Outcome.MALFORMED:
            outcome = Outcome.UNCERTAIN
        if outcome is Outcome.UNCERTAIN:
            delivery.uncertain.add(transfer.claim.claim)
            state = State.HELD if self.hold else state
        reply = SAME if half else chance.choice([SAME, f"reply {next(self.said)}"])
        # A server that does not authorize the relay does not work, and its mail has no end.
        if outcome is Outcome.REJECTED and not half and not last and chance.random() < 0.2:
            reply = f"client not allowed, {reply}"
        return self.harness.completion(
            transfer.claim, outcome, worker=transfer.worker, state=state, delay=DELAY, reply=reply
        )

    def _recorded(self, completions: list[tuple[Transfer, Completion, Any]]) -> None:
        """The model of a commit of outcomes: the effect of each, then the halves, then the effect
        of a late K on them."""
        cuts, late = [], []
        for transfer, record, _ in completions:
            delivery, accepted = self.queue[transfer.key], record.outcome is Outcome.DELIVERED
            owner = (delivery.state, delivery.worker, delivery.claims)
            if accepted and not delivery.k:
                self._end(delivery, State.DELIVERED)
                delivery.k = True
                late += [transfer.key] if delivery.claims > record.claim else []
            elif owner == (State.SENDING, transfer.worker, record.claim):
                cuts += [transfer.key] if self._ended(delivery, record) is State.SPLIT else []
            else:
                continue
            delivery.outcome = record.outcome
            if (
                record.outcome is not Outcome.UNREACHABLE
            ):  # else nothing was sent at which a worker could have crashed
                delivery.crash_count = 0
        for key in cuts:
            self._cut(key, self.queue[key])
        for transfer, record, result in completions:
            delivery = self.queue[transfer.key]
            expected = delivery.state if delivery.claims == record.claim or delivery.k else None
            assert isinstance(result, CompletionResult)
            assert result.state == expected
        for key in late:
            self._taken(key)

    def _ended(self, delivery: Delivery, record: Completion) -> State:
        """The state of a delivery after a completion that is not fenced."""
        state = OPERATION_STATES[delivery.pending] if delivery.pending else record.state
        delivery.reply = BY_OPERATOR if delivery.pending == "bounce" else record.reply
        if state is State.DEFERRED and delivery.expires <= self.clock:
            state = State.EXPIRED
        self._end(delivery, state)
        if state is State.DEFERRED:
            delivery.due = self.clock + DELAY
        return state

    def _taken(self, key: Key) -> None:
        """A late K counts for the parts that the delivery was split into since."""
        for delivery in self._offspring(key):
            if delivery.state not in (State.DELIVERED, State.SPLIT):
                self._end(delivery, State.DELIVERED)
                delivery.k = True

    def _cut(self, key: Key, delivery: Delivery) -> None:
        if self._both_refused(key, delivery) or len(delivery.recipients) == 1:
            self._end(delivery, State.BOUNCED)
            return
        roots = sum(other[0] == key[0] and one.parent is None for other, one in self.queue.items())
        middle = (len(delivery.recipients) + 1) // 2
        halves = delivery.recipients[:middle], delivery.recipients[middle:]
        for number, half in enumerate(halves, roots + 2 * key[1] - 1):
            child = Delivery(
                delivery.sender, delivery.route, half, self.clock, delivery.expires, key[1]
            )
            self.queue[key[0], number] = child
        delivery.recipients = ()

    def _both_refused(self, key: Key, delivery: Delivery) -> bool:
        """Whether the other first half was rejected with the same text; then the remaining parts
        bounce."""
        if delivery.parent is None or self.queue[key[0], delivery.parent].parent is not None:
            return False
        for sibling, other in list(self.queue.items()):
            if (
                sibling[0] == key[0]
                and sibling != key
                and other.parent == delivery.parent
                and other.route == delivery.route
                and other.state in (State.SPLIT, State.BOUNCED)
                and (other.outcome, other.reply) == ("rejected", delivery.reply)
            ):
                for left in self._offspring(sibling):
                    if left.state in (State.QUEUED, State.DEFERRED):
                        self._end(left, State.BOUNCED)
                        left.outcome, left.reply = "rejected", delivery.reply
                return True
        return False

    def _offspring(self, key: Key) -> list[Delivery]:
        """The halves of a delivery, and their halves."""
        children = [(k, d) for k, d in self.queue.items() if k[0] == key[0] and d.parent == key[1]]
        return [d for k, child in children for d in (child, *self._offspring(k))]

    def _line(self, key: Key) -> list[Key]:
        """A delivery and its ancestors."""
        parent = self.queue[key].parent
        return [key] if parent is None else [key, *self._line((key[0], parent))]

    def _claim_requests(self, worker: str, chance: Random) -> list[ClaimRequest]:
        """A hint, a poll for overdue mail, both or neither."""
        requests = []
        for hinted in chance.choice([(), (True,), (False,), (True, False)]):
            capacity = {route: chance.randint(0, 6) for route in ROUTES}
            known = dict.fromkeys(queue_id for queue_id, _ in self.queue)
            ids = ["0" * 32, *sample_of(chance, list(known), 0.7)] if hinted else None
            requests.append(ClaimRequest(worker, ids, capacity))
        return requests

    def _claimed(self, request: ClaimRequest, claims: Any, chance: Random) -> None:
        assert isinstance(claims, list)
        if self.leases[request.worker] is None:
            assert claims == [], "an expired worker claims nothing"
            return
        got = {(claim.queue_id, claim.number): claim for claim in claims}
        assert len(got) == len(claims)
        for route, capacity in request.capacity.items():
            fit = {
                key: delivery
                for key, delivery in self.queue.items()
                if delivery.route == route
                and delivery.state is State.QUEUED
                and delivery.due is not None
                and (
                    key[0] in request.ids if request.ids is not None else delivery.due <= self.clock
                )
            }
            mine = [key for key in got if self.queue[key].route == route]
            assert set(mine) <= set(fit)
            assert len(mine) == min(capacity, len(fit)), (
                "all there is, and no more than there is room for"
            )
            if request.ids is None and mine:
                left = [
                    delivery.due
                    for key, delivery in fit.items()
                    if key not in got and delivery.due is not None
                ]
                first = [
                    key
                    for key in mine
                    if all(due >= (self.queue[key].due or 0.0) - NEAR for due in left)
                ]
                assert len(first) >= len(mine) // 2, "half of them are the longest due"
        for key, claim in got.items():
            delivery = self.queue[key]
            assert not delivery.k, "never after a K"
            delivery.claims += 1
            assert (claim.claim, claim.crash_count) == (delivery.claims, delivery.crash_count)
            assert (claim.recipients, claim.sender, claim.route) == (
                delivery.recipients,
                delivery.sender,
                delivery.route,
            )
            delivery.state, delivery.worker, delivery.pending = State.SENDING, request.worker, None
            delivery.due = self.clock + 2 * (SESSION + LEASE)
            took = chance.random() < 0.5
            delivery.taken += took
            self.transfers.append(Transfer(request.worker, claim, took))

    # --- sweepers
    # ---------------------------------------------------------------------------------------------

    def wake(self, chance: Random, limit: int = 0) -> None:
        """A sweeper requeues due deliveries."""
        limit = limit or chance.choice([1, 2, 100])
        due = {
            key: delivery.due
            for key, delivery in self.queue.items()
            if delivery.state is State.DEFERRED
            and delivery.due is not None
            and delivery.due <= self.clock
        }
        ids = self.harness.rescuer.requeue_due(limit)
        woken = [key for key in due if self._row(key)["state"] == "queued"]
        assert len(woken) == min(limit, len(due))
        assert {queue_id for some in ids.values() for queue_id in some} == {m for m, _ in woken}
        for key in woken:
            assert all(due[key] <= other + NEAR for left, other in due.items() if left not in woken)
            self.queue[key].state, self.queue[key].due = State.QUEUED, self.clock + GRACE

    def expire_worker(self, _: Random) -> None:
        """A sweeper buries every worker whose lease has run out."""
        expired_leases = {
            worker for worker in self._alive() if (self.leases[worker] or 0) < self.clock
        }
        found = dict(self.harness.rescuer.expired_leases())
        assert set(found) == expired_leases
        for worker in expired_leases:
            lost = self.harness.rescuer.expire_worker(worker, found[worker])
            self.leases[worker] = None
            assert lost == self._lost(lambda d, worker=worker: d.worker == worker)

    def expire_one_that_renewed(self, _: Random) -> None:
        """A sweeper reads the leases, the worker renews its own, and the sweeper is too late."""
        for worker, until in self.harness.rescuer.expired_leases()[:1]:
            assert self.worker_queue.commit([Renewal(worker)]) == [True]
            self.leases[worker] = self.clock + LEASE
            assert self.harness.rescuer.expire_worker(worker, until) is None

    def expire_stuck_transfers(self, chance: Random) -> None:
        """Transfers take longer than any session may, though their workers are alive."""
        self._pass(chance.choice([0, 5]) * STEP, alive=self._alive())
        assert self.harness.rescuer.expire_stuck_transfers() == self._lost(
            lambda d: d.due is not None and d.due <= self.clock
        )

    def rescue_unowned(self, _: Random) -> None:
        assert self.harness.rescuer.rescue_unowned() == self._lost(
            lambda d: self.leases[str(d.worker)] is None
        )

    def _lost(self, which: Any) -> int:
        lost = [
            delivery
            for delivery in self.queue.values()
            if delivery.state is State.SENDING and which(delivery)
        ]
        for delivery in lost:
            delivery.uncertain.add(delivery.claims)
            delivery.crash_count += 1
            delivery.outcome, delivery.reply = "uncertain", "unknown"
            if delivery.pending:
                state = OPERATION_STATES[delivery.pending]
            elif delivery.crash_count >= POISON or self.hold:
                state = State.HELD
            else:
                state = State.EXPIRED if delivery.expires <= self.clock else State.DEFERRED
            self._end(delivery, state)
            if state is State.DEFERRED:
                delivery.due = self.clock + UNCERTAIN_DELAY
        return len(lost)

    # --- operators, DSNs and time
    # --------------------------------------------------------------------------

    def operate(self, chance: Random) -> None:
        """An operation on a message."""
        if not self.queue:
            return
        busy = [key for key, delivery in self.queue.items() if delivery.state is State.SENDING]
        queue_id = chance.choice(busy or list(self.queue))[0]
        operation: Operation = chance.choice(list(OPERATIONS.values()))
        touched, free = self.operations.apply(
            operation, Filter(id=queue_id), actor="tester", reason=""
        )
        mine = [delivery for key, delivery in self.queue.items() if key[0] == queue_id]
        met = [
            d
            for d in mine
            if d.state in operation.takes
            or (d.state is State.SENDING and _reported(operation, d.pending))
        ]
        met = [delivery for delivery in met if delivery.recipients]
        assert touched.total() == len(met)
        for delivery in met:
            if delivery.state is State.SENDING:
                delivery.pending = operation.pending
                continue
            self._end(delivery, operation.state)
            if operation.state is State.QUEUED:
                delivery.due = self.clock
            else:
                delivery.reply = BY_OPERATOR
            if operation.name == "bounce":
                delivery.outcome = delivery.outcome or "rejected"
            if operation.name == "release":
                delivery.crash_count = 0
        for deletable_bodies in free:
            self.spool.remove(deletable_bodies)

    def reroute(self, chance: Random) -> None:
        """The recipients of a message get other routes, each by itself."""
        if not self.queue:
            return
        queue_id, today = chance.choice(list(self.queue))[0], dict[str, str]()
        touched, _ = self.operations.apply(
            REROUTE,
            Filter(id=queue_id),
            actor="tester",
            reason="",
            route_for=lambda address: today.setdefault(address, chance.choice(ROUTES)),
        )
        met = {
            key: d
            for key, d in self.queue.items()
            if key[0] == queue_id and d.state in REROUTE.takes
        }
        assert touched.total() == len(met)
        for key, delivery in met.items():
            if delivery.state is not State.HELD:
                self._end(delivery, State.QUEUED)
                delivery.due = self.clock
            self._divide(key, delivery, today)

    def _divide(self, key: Key, delivery: Delivery, today: dict[str, str]) -> None:
        names = list(dict.fromkeys(today[address] for address in delivery.recipients))
        delivery.route = names[0] if len(names) == 1 else delivery.route
        if len(names) > 1:
            roots = sum(
                other[0] == key[0] and one.parent is None for other, one in self.queue.items()
            )
            for number, name in enumerate(names, roots + 2 * key[1] - 1):
                mine = tuple(address for address in delivery.recipients if today[address] == name)
                piece = replace(
                    delivery,
                    route=name,
                    recipients=mine,
                    parent=key[1],
                    claims=0,
                    taken=0,
                    uncertain=set(),
                )
                self.queue[key[0], number] = piece
            self._end(delivery, State.SPLIT)
            delivery.recipients, delivery.claims = (), delivery.claims + 1

    def generate(self, chance: Random, last: str | None = None) -> None:
        """A sweeper generates DSNs; it may be killed between body and COMMIT, or after that."""
        last = chance.choice(["", "", "store", "remove"]) if last is None else last
        most, pending_dsns = chance.choice([1, 2, 100]), self._pending_dsns()
        made = self._made(last, lambda generator: generator.generate(most))
        settled = [
            queue_id
            for queue_id, mine in pending_dsns.items()
            if not all(map(self._is_pending, mine))
        ]
        assert (
            made is None
            or len(settled) == len(pending_dsns)
            or most < sum(map(len, pending_dsns.values()))
        )
        dsns = [
            dsn for queue_id in settled for dsn in self._generated(queue_id, pending_dsns[queue_id])
        ]
        assert made is None or sorted(made) == sorted(dsns)

    def _made(self, last: str, tell: Callable[[DsnGenerator], list[str]]) -> list[str] | None:
        """The DSNs that a sweeper generates; None if it was killed."""
        spool = KilledSpool(self.spool.directory, last)
        try:
            return tell(
                DsnGenerator(
                    self.harness.database, spool, self.harness.settings, lambda _: "default"
                )
            )
        except Killed:
            assert last
            return None

    def warn(self, chance: Random, last: str | None = None) -> None:
        """A sweeper generates delay warnings; it may be killed between body and COMMIT."""
        last = chance.choice(["", "", "store"]) if last is None else last
        most, late = chance.choice([1, 2, 100]), self._late()
        marked = self._marked_late()
        assert set(late) <= set(marked)
        made = self._made(last, lambda generator: generator.warn(most))
        new = {queue_id: self._new_notices(queue_id) for queue_id in late}
        warnings = {queue_id: dsns for queue_id, dsns in new.items() if dsns}
        # A mark may be of a message whose sender was warned before: one of its deliveries had been
        # finished then, and waits again. The call removes that mark, which costs it a message.
        due = [queue_id for queue_id in marked[:most] if queue_id in late]
        assert len(warnings) == (len(due) if made is not None else 0)
        assert made is None or sorted(made) == sorted(
            dsn for dsns in warnings.values() for dsn in dsns
        )
        for queue_id, dsns in warnings.items():
            assert [named for named, _ in dsns.values()] == [late[queue_id]], (
                "all that wait, in one"
            )
            self.warned.add(queue_id)

    def _marked_late(self) -> list[str]:
        """The messages of which a delivery waits and has a warning due, the longest due first."""
        rows = self.harness.rows(
            """SELECT DISTINCT warn_at, @hex(queue_id) AS id FROM deliveries
            WHERE state IN ('queued', 'sending', 'deferred') AND warn_at <= @now ORDER BY 1, 2"""
        )
        return list(dict.fromkeys(row["id"] for row in rows))

    def _late(self) -> dict[str, list[str]]:
        """Messages whose senders get a delay warning, and the recipients that
        wait."""
        late: dict[str, list[str]] = {}
        if self.harness.settings.delay_warning is None:
            return late
        for (queue_id, _), delivery in self.queue.items():
            old = self.clock - self.received.get(queue_id, self.clock) >= WARNING
            if old and delivery.state in WAITING and queue_id not in self.warned:
                late.setdefault(queue_id, []).extend(
                    address
                    for address in delivery.recipients
                    if "delay" in self.notify[queue_id, address]
                )
        return {queue_id: sorted(waiting) for queue_id, waiting in late.items() if waiting}

    def _new_notices(self, queue_id: str) -> dict[str, tuple[list[str], int]]:
        """The DSNs about a message that the model does not have yet: their recipients, and how many
        of these are possibly delivered."""
        new: dict[str, tuple[list[str], int]] = {}
        for dsn, (names, uncertain, content, again) in self._unknown(queue_id).items():
            if not again:
                new[dsn] = names, uncertain
                self._add_dsn(dsn, queue_id, names, content)
        return new

    def _unknown(self, queue_id: str) -> dict[str, tuple[list[str], int, str, bool]]:
        """All DSNs: their recipients, how many of these are possibly delivered, the enclosed
        content, and whether another DSN was rejected."""
        found: dict[str, tuple[list[str], int, str, bool]] = {}
        for row in self.harness.rows(
            "SELECT @hex(id) AS id, size, dsn_content FROM messages WHERE dsn_of = @id(:id)",
            id=queue_id,
        ):
            if (row["id"], 1) in self.queue:
                continue
            text = body_in(self.spool.path(row["id"])).decode()
            assert row["size"] == len(text)
            names = sorted(re.findall("^Final-Recipient: rfc822; (.*)$", text, re.MULTILINE))
            flat = " ".join(text.split())
            found[row["id"]] = (
                names,
                flat.count(POSSIBLY_DELIVERED),
                row["dsn_content"],
                "rejected this report" in flat,
            )
        return found

    def _add_dsn(self, dsn: str, about: str, names: list[str], content: str) -> None:
        sender = next(d.sender for key, d in self.queue.items() if key[0] == about)
        self.queue[dsn, 1] = Delivery(
            "",
            "default",
            (sender,),
            self.clock + GRACE,
            self.clock + LIFETIME,
            about=about,
            names=tuple(names),
            encloses=content,
        )

    def _pending_dsns(self) -> dict[str, dict[Key, Delivery]]:
        """The pending DSNs by message; not while another of its deliveries may soon fail too."""
        pending_dsns: dict[str, dict[Key, Delivery]] = {}
        for key, delivery in self.queue.items():
            if delivery.state in FAILED and delivery.due is not None:
                pending_dsns.setdefault(key[0], {})[key] = delivery
        about_to_be_decided = {
            key[0] for key, d in self.queue.items() if d.state in (State.QUEUED, State.SENDING)
        }
        late = self.clock - GATHER
        return {
            queue_id: mine
            for queue_id, mine in pending_dsns.items()
            if queue_id not in about_to_be_decided
            or any((d.due or 0.0) <= late for d in mine.values())
        }

    def _is_pending(self, key: Key) -> bool:
        row = self._row(key)
        return row["state"] in FAILED and row["due_at"] is not None

    def _generated(self, queue_id: str, mine: dict[Key, Delivery]) -> list[str]:
        """The model's side of it; the DSN, if one is pending."""
        if reclassified := {
            key: d for key, d in mine.items() if d.about_us and d.state is State.BOUNCED
        }:
            for key, delivery in mine.items():
                if key in reclassified:
                    self._end(delivery, State.DEFERRED)
                    delivery.due = self.clock + GATHER
                    self.finished.discard(key)
            return []
        for delivery in mine.values():
            delivery.due = None
        if (failed := self.queue[queue_id, 1]).encloses is not None:
            return self._made_again(failed)
        expected = {
            address: any(self.queue[one].uncertain for one in self._line(key))
            for key, delivery in mine.items()
            for address in delivery.recipients
            if "failure" in self.notify.get((queue_id, address), ())
        }
        made = self._new_notices(queue_id)
        assert list(made.values()) == (
            [(sorted(expected), sum(expected.values()))] if expected else []
        )
        self.reported.update((queue_id, address) for named, _ in made.values() for address in named)
        return list(made)

    def _made_again(self, failed: Delivery) -> list[str]:
        """The model's side of a DSN that failed: the one with less in its place, if a server
        refused it."""
        less = {"full": "header", "header": "none"}.get(str(failed.encloses))
        refused = (
            failed.state is State.BOUNCED
            and failed.outcome == Outcome.REJECTED
            and failed.reply != BY_OPERATOR
        )
        if not refused or less is None:
            return []
        expected = (list(failed.names), less, True)
        dsn = next(
            dsn
            for dsn, (names, _, content, again) in self._unknown(failed.about).items()
            if (names, content, again) == expected
        )
        self._add_dsn(dsn, failed.about, list(failed.names), less)
        return [dsn]

    def wait(self, chance: Random) -> None:
        """Time passes; sometimes so much that the leases expire if the workers do not renew
        them."""
        self._pass(
            chance.choice([1, 1, 2, 3, 6]) * STEP, alive=sample_of(chance, self._alive(), 0.9)
        )

    def _pass(self, seconds: float, *, alive: list[str]) -> None:
        self.harness.pass_time(seconds)
        past = "interval '1 second'" if self.harness.dialect.postgresql else "1000000"
        self.harness.change(
            f"UPDATE messages SET received_at = received_at - CAST(:s AS integer) * {past}",
            s=int(seconds),
        )
        self.clock += seconds
        assert self.worker_queue.commit([Renewal(worker) for worker in alive]) == [True] * len(
            alive
        )
        self.leases |= dict.fromkeys(alive, self.clock + LEASE)

    def crash(self, chance: Random) -> None:
        """A worker with something under way does not renew its lease for so long that it expires;
        the others are well."""
        busy = [t.worker for t in self.transfers if self.leases[t.worker] is not None]
        if busy:
            worker = chance.choice(busy)
            self._pass(2 * STEP, alive=[other for other in self._alive() if other != worker])
            self.expire_worker(chance)

    # --- the end
    # ----------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """With time and working servers everything comes to its final state."""
        chance = Random(0)
        self.leases[new := new_id()] = self.clock + LEASE
        self.worker_queue.register(new, "host", 1)
        for _ in range(20):
            for worker in self.leases:
                self._round(
                    worker,
                    [one for one in self.transfers if one.worker == worker],
                    [],
                    chance,
                    last=True,
                )
            self._pass(6 * STEP, alive=self._alive())
            self.rescue_unowned(chance)
            self._release()
            self.wake(chance, 1000)
            self._round(new, [], [ClaimRequest(new, None, dict.fromkeys(ROUTES, 1000))], chance)
            self.generate(chance, "")
            self.warn(chance, "")
            if all(d.state in (*FINAL, State.SPLIT) and d.due is None for d in self.queue.values()):
                break
        self.agrees()
        self.every_recipient_is_somewhere_once()
        self.no_send_is_hidden()
        self.every_sender_gets_one_dsn()
        assert not [
            key for key, d in self.queue.items() if d.state not in FINAL and d.recipients
        ], "all has an end"

    def _release(self) -> None:
        self.operations.apply(OPERATIONS["release"], Filter(), actor="tester", reason="")
        for delivery in self.queue.values():
            if delivery.state is State.HELD:
                self._end(delivery, State.QUEUED)
                delivery.due, delivery.crash_count = self.clock, 0

    # --- what is always so
    # ------------------------------------------------------------------------------------

    def _row(self, key: Key) -> Any:
        return self.harness.delivery(*key)

    @invariant()
    def agrees(self) -> None:
        sql = (
            "SELECT d.*, @hex(d.queue_id) AS id, @hex(d.worker) AS who, -@since(d.due_at) AS"
            " due_in FROM deliveries d"
        )
        rows = {(row["id"], row["number"]): row for row in self.harness.rows(sql)}
        assert rows.keys() == self.queue.keys()
        for key, row in rows.items():
            delivery = self.queue[key]
            found = (
                row["state"],
                row["who"],
                row["claim_count"],
                row["crash_count"],
                row["pending_operation"],
            )
            assert found == (
                delivery.state,
                delivery.worker,
                delivery.claims,
                delivery.crash_count,
                delivery.pending,
            ), key
            if delivery.due is None:
                assert row["due_in"] is None
            else:
                assert float(row["due_in"]) == pytest.approx(delivery.due - self.clock, abs=NEAR)
            assert (row["finished_at"] is not None) == (delivery.state in FINAL)
            if delivery.state in UNFINISHED:
                assert row["due_in"] is not None or delivery.state is State.HELD, (
                    "nothing is forgotten"
                )
            assert not delivery.k or delivery.state is State.DELIVERED, "a K is for good"
            assert key not in self.finished or delivery.state in FINAL, (
                "what is finished never comes back"
            )
        self.finished |= {key for key, delivery in self.queue.items() if delivery.state in FINAL}

    @invariant()
    def every_recipient_is_somewhere_once(self) -> None:
        sql = (
            "SELECT @hex(queue_id) AS id, delivery, address FROM recipients ORDER BY queue_id,"
            " position"
        )
        found: dict[Key, list[str]] = {key: [] for key in self.queue}
        for row in self.harness.rows(sql):
            found[row["id"], row["delivery"]].append(row["address"])
        assert found == {key: list(delivery.recipients) for key, delivery in self.queue.items()}

    @invariant()
    def every_sender_gets_one_dsn(self) -> None:
        """Each failed recipient is in one DSN, unless the sender gets none; a DSN is never
        reported. DSNs that replace a rejected one do not count."""
        for (queue_id, _), delivery in self.queue.items():
            for address in delivery.recipients:
                settled = delivery.state in FAILED and delivery.due is None
                wanted = "failure" in self.notify.get((queue_id, address), ())  # never for a DSN
                reports = self.reported[queue_id, address]
                assert reports == (wanted and settled) or (delivery.k and reports == 1), (
                    "K came after the DSN"
                )
        for queue_id in {key[0] for key in self.queue if self._needed(key[0])}:
            assert self.spool.path(queue_id).exists()

    @invariant()
    def no_send_is_hidden(self) -> None:
        """A message that was sent twice has an uncertain attempt in between: each recipient, also
        across halves."""
        sql = """SELECT @hex(queue_id) AS id, delivery, count(DISTINCT claim) AS n FROM attempts
            WHERE outcome = 'uncertain' GROUP BY queue_id, delivery"""
        uncertain = {(row["id"], row["delivery"]): row["n"] for row in self.harness.rows(sql)}
        for key, delivery in self.queue.items():
            assert uncertain.get(key, 0) == len(delivery.uncertain)
            line = self._line(key)
            assert sum(self.queue[one].taken for one in line) <= 1 + sum(
                uncertain.get(one, 0) for one in line
            )


@pytest.fixture(params=VARIANTS)
def harness(
    clean_url: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[QueueHarness]:
    monkeypatch.setattr("relay.dsn.generator.GATHER", GATHER)
    monkeypatch.setattr(rescue, "JITTER", 0.0)  # the model knows when each is due
    made = QueueHarness(
        clean_url,
        grace=GRACE,
        lease=LEASE,
        session_timeout=SESSION,
        queue_lifetime=LIFETIME,
        uncertain_delay=UNCERTAIN_DELAY,
        poison_limit=POISON,
        **VARIANTS[request.param],
    )
    yield made
    made.database.dispose()


def _reported(operation: Operation, pending: str | None) -> bool:
    """Whether an operation reports a delivery that is being sent."""
    return operation.pending is not None or (
        operation.cancels is not None and pending == operation.cancels
    )


def test_the_queue_does_what_its_model_does(harness: QueueHarness, spool: Spool) -> None:
    machine: type[History] = type("History", (History,), {"harness": harness, "spool": spool})
    # To have a failing history made shorter, which takes minutes, take `phases` away.
    checks: Sequence[HealthCheck] = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=50,
            deadline=None,
            phases=[Phase.reuse, Phase.generate],
            suppress_health_check=checks,
        ),
    )
