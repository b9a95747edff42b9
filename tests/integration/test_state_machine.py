"""The queue against a model of it: whatever happens in whatever order, both say the same, on both databases.

Hypothesis makes up histories: mail is accepted, workers claim, report, vanish and wake up, leases run out, times come,
senders are told and whoever tells them is killed, operators meddle. A small Python model says what must be so after
each step, and at last everything is brought to its end. The model also knows what no database can know: whether the
server really took a message, and whom the bytes of a notice name. Time passes by `Office.pass_time` alone, in steps so
large, and so unlike the delays, that the seconds which a run takes cannot matter.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from sqlalchemy import text

from relay import sweeps
from relay.bodies import Spool
from relay.claims import Claim, Item, Record, Recorded, Renewal, Wish
from relay.database import writing
from relay.debts import Debts
from relay.filters import Filter
from relay.ids import new_id
from relay.schema import FINAL, UNFINISHED, Outcome, State, metadata
from relay.verbs import REROUTE, VERBS, Verb, Verbs
from tests.integration.office import NEXT, Office, new_message

type Key = tuple[str, int]

STEP = 13_700.0
GRACE, DELAY, UNCERTAIN_DELAY, LEASE, SESSION, LIFETIME = 10_000.0, 20_000.0, 30_000.0, 20_000.0, 10_000.0, 200_000.0
GATHER = 5_000.0
NEAR = 50.0  # no two times of the model that differ come nearer than this, nor does a run take so long
POISON = 3
TOOK = (Outcome.ACCEPTED, Outcome.UNCERTAIN, Outcome.MALFORMED)
NOT_TOOK = tuple(outcome for outcome in Outcome if outcome is not Outcome.ACCEPTED)
WANTED = {"hold": State.HELD, "drop": State.DROPPED, "bounce": State.BOUNCED, "retry": State.QUEUED}
ROUTES = ("default", "bulk")
FAILED = (State.BOUNCED, State.EXPIRED)
NOTIFY = {None: True, "FAILURE": True, "DELAY": False, "NEVER": False}  # whether that asks to hear of a failure
# What happens, and how often for each time that the others do.
HAPPENINGS = [
    what
    for what, often in {
        "work": 10, "accept": 6, "wait": 3, "wake": 3, "vanish": 2, "wake_up_late": 3, "meddle": 3, "settle": 4,
        "reroute": 1,
        "hire": 1, "bury": 1, "bury_one_that_renewed": 1, "lose_stuck": 1, "lose_strays": 1,
    }.items()
    for _ in range(often)
]  # fmt: skip
# What a history consists of is Hypothesis' to choose and to shrink; the details are mere chance.
CHANCE = st.randoms(use_true_random=True)


def some[T](chance: Random, these: Sequence[T], share: float) -> list[T]:
    return [one for one in these if chance.random() < share]


class Killed(BaseException):
    """Stands for kill -9: nothing is caught, nothing is cleaned up, the database rolls back what was not committed."""


class Deadly(Spool):
    """The spool of a process that is killed when half a body is written, or when one is to be removed."""

    def __init__(self, directory: Path, last: str) -> None:
        super().__init__(directory)
        self._last = last

    def store(self, message_id: str, parts: Sequence[bytes]) -> int:
        if self._last == "store":
            super().store(message_id, [b"half"])
            raise Killed
        return super().store(message_id, parts)

    def remove(self, message_id: str) -> bool:
        if self._last == "remove" and self.path(message_id).exists():
            raise Killed
        return super().remove(message_id)


@dataclass
class Delivery:
    """What the model knows of a delivery."""

    sender: str
    route: str
    recipients: tuple[str, ...]
    due: float | None
    expires: float
    parent: int | None = None
    state: State = State.QUEUED
    worker: str | None = None
    claims: int = 0
    vanished: int = 0
    wanted: str | None = None
    k: bool = False
    taken: int = 0  # how often the server really took it
    doubts: set[int] = field(default_factory=set)  # claims of which nobody knows
    about_us: bool = False  # its last words: a D that is not about the mail


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
    """`happens` is one thing after the other; the invariants are looked at after each."""

    office: Office
    spool: Spool

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
        self.notify: dict[tuple[str, str], bool] = {}  # by message and address: whether its sender wants to know
        self.told: Counter[tuple[str, str]] = Counter()  # by message and address: notices that name it
        for _ in range(2):
            self.hire(Random())

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

    @rule(what=st.sampled_from(HAPPENINGS), chance=CHANCE)
    def happens(self, what: str, chance: Random) -> None:
        getattr(self, what)(chance)

    # --- mail -------------------------------------------------------------------------------------------------

    def accept(self, chance: Random) -> None:
        """A message comes in, perhaps told twice for a COMMIT in doubt."""
        routes, sender = chance.choices(ROUTES, k=chance.randint(1, 6)), chance.choice(["a@example.com", ""])
        addresses = [f"{n}@{route}.example.org" for n, route in enumerate(routes)]
        message = new_message(*map(":".join, zip(routes, addresses, strict=True)), sender=sender)
        message_id = message.id
        self.spool.store(message_id, [bytes(message.size)])
        for n, recipient in enumerate(message.recipients):
            message.recipients[n] = asked = recipient._replace(notify=chance.choice([None, *NOTIFY]))
            self.notify[message_id, asked.address] = NOTIFY[asked.notify] and sender != ""
        for _ in range(chance.randint(1, 2)):
            self.office.intake.commit([message])
        for number, route in enumerate(dict.fromkeys(routes), 1):
            mine = tuple(address for address, way in zip(addresses, routes, strict=True) if way == route)
            self.queue[message_id, number] = Delivery(sender, route, mine, self.clock + GRACE, self.clock + LIFETIME)

    # --- workers ----------------------------------------------------------------------------------------------

    def hire(self, _: Random) -> None:
        """Another worker process starts."""
        if len(self._alive()) >= 4:
            return
        worker = new_id()
        self.ledger.register(worker, "host", 1)
        self.leases[worker] = self.clock + LEASE

    def work(self, chance: Random) -> None:
        """One round of a worker, dead or alive: outcomes, a renewal, wishes; perhaps told twice."""
        worker = chance.choice(list(self.leases))
        mine = [transfer for transfer in self.transfers if transfer.worker == worker]
        ends = some(chance, mine, 0.4)
        wishes = self._wishes(worker, chance) if self.leases[worker] is not None else []
        self._round(worker, ends, wishes, chance)

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
        self, worker: str, ends: list[Transfer], wishes: list[Wish], chance: Random, *, last: bool = False
    ) -> None:
        records = [self._report(transfer, chance, last=last) for transfer in ends]
        renew = chance.random() < 0.5
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
        for record, result in zip(records, results[len(wishes) :], strict=False):
            if isinstance(result, Recorded) and result.body_free:
                self.spool.remove(record.message_id)
        for wish, result in zip(wishes, results, strict=False):
            self._claimed(wish, result, chance)
        if records and chance.random() < 0.3:
            for record, result in zip(records, self.ledger.commit(records), strict=True):
                delivery = self.queue[record.message_id, record.number]
                assert isinstance(result, Recorded)
                assert result.state in (None, delivery.state)

    def _needed(self, message_id: str) -> bool:
        """Whether a delivery still needs the body."""
        mine = [delivery for key, delivery in self.queue.items() if key[0] == message_id]
        return any(delivery.state in UNFINISHED or delivery.due is not None for delivery in mine)

    def _report(self, transfer: Transfer, chance: Random, *, last: bool) -> Record:
        """What a worker says of a transfer, which must fit what really happened; `last`: and ends it."""
        self.transfers.remove(transfer)
        delivery = self.queue[transfer.key]
        outcome = chance.choice(TOOK if transfer.took else NOT_TOOK)
        if last:
            outcome = Outcome.ACCEPTED if transfer.took else Outcome.REJECTED
        state = NEXT[outcome]
        if outcome is Outcome.INTERRUPTED and chance.random() < 0.5:
            state = State.QUEUED
        if outcome is Outcome.REJECTED and chance.random() < 0.5:
            state = State.SPLIT
        if outcome is Outcome.MALFORMED:
            outcome = Outcome.UNCERTAIN
        if outcome is Outcome.UNCERTAIN:
            delivery.doubts.add(transfer.claim.claim)
        words = f"reply {next(self.said)}"
        if outcome is Outcome.REJECTED and chance.random() < 0.2:
            words = f"client not allowed, {words}"
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
            delivery.k, delivery.vanished, delivery.about_us = True, 0, False
            if delivery.claims > record.claim:
                self._taken(transfer.key)
        elif mine:
            sent_back = delivery.wanted == "bounce"
            state = WANTED[delivery.wanted] if delivery.wanted else record.state
            if state is State.DEFERRED and delivery.expires <= self.clock:
                state = State.EXPIRED
            self._end(delivery, state)
            delivery.vanished, delivery.about_us = 0, "not allowed" in record.reply and not sent_back
            if state is State.DEFERRED:
                delivery.due = self.clock + DELAY
            if state is State.SPLIT:
                self._cut(transfer.key, delivery)
        expected = delivery.state if delivery.claims == record.claim or delivery.k else None
        assert result.state == expected

    def _taken(self, key: Key) -> None:
        """A late K holds for what the delivery was cut into since."""
        for other, delivery in self.queue.items():
            if other[0] == key[0] and delivery.parent == key[1]:
                if delivery.state not in (State.DELIVERED, State.SPLIT):
                    self._end(delivery, State.DELIVERED)
                    delivery.k = True
                self._taken(other)

    def _cut(self, key: Key, delivery: Delivery) -> None:
        if len(delivery.recipients) == 1:
            self._end(delivery, State.BOUNCED)
            return
        roots = sum(other[0] == key[0] and one.parent is None for other, one in self.queue.items())
        middle = (len(delivery.recipients) + 1) // 2
        halves = delivery.recipients[:middle], delivery.recipients[middle:]
        for number, half in enumerate(halves, roots + 2 * key[1] - 1):
            child = Delivery(delivery.sender, delivery.route, half, self.clock, delivery.expires, key[1])
            self.queue[key[0], number] = child
        delivery.recipients = ()

    def _wishes(self, worker: str, chance: Random) -> list[Wish]:
        """A hint, a look at what is overdue, both or none."""
        wishes = []
        for hinted in chance.choice([(), (True,), (False,), (True, False)]):
            room = {route: chance.randint(0, 6) for route in ROUTES}
            known = dict.fromkeys(message_id for message_id, _ in self.queue)
            ids = ["0" * 32, *some(chance, list(known), 0.7)] if hinted else None
            wishes.append(Wish(worker, ids, room))
        return wishes

    def _claimed(self, wish: Wish, claims: Any, chance: Random) -> None:
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
            took = chance.random() < 0.5
            delivery.taken += took
            self.transfers.append(Transfer(wish.worker, claim, took))

    # --- sweepers ---------------------------------------------------------------------------------------------

    def wake(self, chance: Random, limit: int = 0) -> None:
        """A sweeper wakes what is due."""
        limit = limit or chance.choice([1, 2, 100])
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

    def bury(self, _: Random) -> None:
        """A sweeper buries every worker whose lease has run out."""
        ran_out = {worker for worker in self._alive() if (self.leases[worker] or 0) < self.clock}
        found = dict(self.office.sweeps.ran_out())
        assert set(found) == ran_out
        for worker in ran_out:
            lost = self.office.sweeps.bury(worker, found[worker])
            self.leases[worker] = None
            assert lost == self._lost(lambda d, worker=worker: d.worker == worker)

    def bury_one_that_renewed(self, _: Random) -> None:
        """A sweeper looks, the worker renews, the sweeper comes too late."""
        for worker, until in self.office.sweeps.ran_out()[:1]:
            assert self.ledger.commit([Renewal(worker)]) == [True]
            self.leases[worker] = self.clock + LEASE
            assert self.office.sweeps.bury(worker, until) is None

    def lose_stuck(self, chance: Random) -> None:
        """Transfers take longer than any session may, though their workers are alive."""
        self._pass(chance.choice([0, 5]) * STEP, alive=self._alive())
        assert self.office.sweeps.lose_stuck() == self._lost(lambda d: d.due is not None and d.due <= self.clock)

    def lose_strays(self, _: Random) -> None:
        assert self.office.sweeps.lose_strays() == self._lost(lambda d: self.leases[str(d.worker)] is None)

    def _lost(self, which: Any) -> int:
        lost = [delivery for delivery in self.queue.values() if delivery.state is State.SENDING and which(delivery)]
        for delivery in lost:
            delivery.doubts.add(delivery.claims)
            delivery.vanished += 1
            delivery.about_us = False
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

    def meddle(self, chance: Random) -> None:
        """An operator's verb on a message."""
        if not self.queue:
            return
        busy = [key for key, delivery in self.queue.items() if delivery.state is State.SENDING]
        message_id = chance.choice(busy or list(self.queue))[0]
        told: Verb = chance.choice(list(VERBS.values()))
        touched, free = self.verbs.apply(told, Filter(id=message_id), actor="tester", reason="")
        mine = [delivery for key, delivery in self.queue.items() if key[0] == message_id]
        met = [d for d in mine if d.state in told.takes or (d.state is State.SENDING and _heard(told, d.wanted))]
        met = [delivery for delivery in met if delivery.recipients]
        assert touched.total() == len(met)
        for delivery in met:
            if delivery.state is State.SENDING:
                delivery.wanted = told.wanted
                continue
            self._end(delivery, told.state)
            if told.state is State.QUEUED:
                delivery.due = self.clock
            else:
                delivery.about_us = False
            if told.name == "release":
                delivery.vanished = 0
        for unneeded in free:
            self.spool.remove(unneeded)

    def reroute(self, chance: Random) -> None:
        """The recipients of a message get other routes, each by itself."""
        if not self.queue:
            return
        message_id, today = chance.choice(list(self.queue))[0], dict[str, str]()
        touched, _ = self.verbs.apply(
            REROUTE, Filter(id=message_id), actor="tester", reason="",
            route_for=lambda address: today.setdefault(address, chance.choice(ROUTES)),
        )  # fmt: skip
        met = {key: d for key, d in self.queue.items() if key[0] == message_id and d.state in REROUTE.takes}
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
            roots = sum(other[0] == key[0] and one.parent is None for other, one in self.queue.items())
            for number, name in enumerate(names, roots + 2 * key[1] - 1):
                mine = tuple(address for address in delivery.recipients if today[address] == name)
                piece = replace(delivery, route=name, recipients=mine, parent=key[1], claims=0, taken=0, doubts=set())
                self.queue[key[0], number] = piece
            self._end(delivery, State.SPLIT)
            delivery.recipients, delivery.claims = (), delivery.claims + 1

    def settle(self, chance: Random, last: str | None = None) -> None:
        """A sweeper tells senders; it may be killed between body and COMMIT, or after that."""
        last = chance.choice(["", "", "store", "remove"]) if last is None else last
        most, owing = chance.choice([1, 2, 100]), self._owing()
        debts = Debts(self.office.engine, Deadly(self.spool.directory, last), self.office.settings, lambda _: "default")
        made: list[str] | None = None
        try:
            made = debts.settle(most)
        except Killed:
            assert last
        settled = [message_id for message_id, mine in owing.items() if not all(map(self._owes, mine))]
        assert made is None or len(settled) == len(owing) or most < sum(map(len, owing.values()))
        notices = [notice for message_id in settled for notice in self._settled(message_id, owing[message_id])]
        assert made is None or sorted(made) == sorted(notices)

    def _owing(self) -> dict[str, dict[Key, Delivery]]:
        """What is owed, by message, of which there is no more to come for now."""
        owing: dict[str, dict[Key, Delivery]] = {}
        for key, delivery in self.queue.items():
            if delivery.state in FAILED and delivery.due is not None:
                owing.setdefault(key[0], {})[key] = delivery
        about_to_be_decided = {key[0] for key, d in self.queue.items() if d.state in (State.QUEUED, State.SENDING)}
        late = self.clock - GATHER
        return {
            message_id: mine for message_id, mine in owing.items()
            if message_id not in about_to_be_decided or any((d.due or 0.0) <= late for d in mine.values())
        }  # fmt: skip

    def _owes(self, key: Key) -> bool:
        row = self._row(key)
        return row["state"] in FAILED and row["due_at"] is not None

    def _settled(self, message_id: str, mine: dict[Key, Delivery]) -> list[str]:
        """The model's side of it; the notice, if there is to be one."""
        if forgiven := {key: d for key, d in mine.items() if d.about_us and d.state is State.BOUNCED}:
            for key, delivery in mine.items():
                if key in forgiven:
                    self._end(delivery, State.DEFERRED)
                    delivery.due = self.clock + GATHER
                    self.finished.discard(key)
            return []
        for delivery in mine.values():
            delivery.due = None
        failed = sorted(a for d in mine.values() for a in d.recipients if self.notify.get((message_id, a)))
        sql = "SELECT @hex(id) AS id, size FROM messages WHERE notice_of = @id(:id)"
        made = [row for row in self.office.rows(sql, id=message_id) if (row["id"], 1) not in self.queue]
        assert len(made) == bool(failed)
        for row in made:
            text = self.spool.path(row["id"]).read_text()
            named = re.findall("^Final-Recipient: rfc822; (.*)$", text, re.MULTILINE)
            assert (sorted(named), row["size"]) == (failed, len(text))
            self.told.update((message_id, address) for address in named)
            sender = next(iter(mine.values())).sender
            self.queue[row["id"], 1] = Delivery("", "default", (sender,), self.clock + GRACE, self.clock + LIFETIME)
        return [row["id"] for row in made]

    def wait(self, chance: Random) -> None:
        """Time passes; now and then so much that the workers would be taken for dead if they did not renew."""
        self._pass(chance.choice([1, 1, 2, 3, 6]) * STEP, alive=some(chance, self._alive(), 0.9))

    def _pass(self, seconds: float, *, alive: list[str]) -> None:
        self.office.pass_time(seconds)
        self.clock += seconds
        assert self.ledger.commit([Renewal(worker) for worker in alive]) == [True] * len(alive)
        self.leases |= dict.fromkeys(alive, self.clock + LEASE)

    def vanish(self, chance: Random) -> None:
        """A worker with something under way is not heard of for so long that it is buried; the others are well."""
        busy = [t.worker for t in self.transfers if self.leases[t.worker] is not None]
        if busy:
            worker = chance.choice(busy)
            self._pass(2 * STEP, alive=[other for other in self._alive() if other != worker])
            self.bury(chance)

    # --- the end ----------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Give it time, and everybody who matters: everything comes to its end."""
        chance = Random(0)
        self.leases[new := new_id()] = self.clock + LEASE
        self.ledger.register(new, "host", 1)
        for _ in range(20):
            for worker in self.leases:
                self._round(worker, [one for one in self.transfers if one.worker == worker], [], chance, last=True)
            self._pass(6 * STEP, alive=self._alive())
            self.lose_strays(chance)
            self._release()
            self.wake(chance, 1000)
            self._round(new, [], [Wish(new, None, dict.fromkeys(ROUTES, 1000))], chance)
            self.settle(chance, "")
            if all(d.state in (*FINAL, State.SPLIT) and d.due is None for d in self.queue.values()):
                break
        self.agrees()
        self.every_recipient_is_somewhere_once()
        self.no_send_is_hidden()
        self.every_sender_is_told_once()
        assert not [key for key, d in self.queue.items() if d.state not in FINAL and d.recipients], "all has an end"

    def _release(self) -> None:
        self.verbs.apply(VERBS["release"], Filter(), actor="tester", reason="")
        for delivery in self.queue.values():
            if delivery.state is State.HELD:
                self._end(delivery, State.QUEUED)
                delivery.due, delivery.vanished = self.clock, 0

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
    def every_sender_is_told_once(self) -> None:
        """Of each recipient that failed, in one notice, unless nobody wants to know; of a notice never."""
        for (message_id, _), delivery in self.queue.items():
            for address in delivery.recipients:
                settled = delivery.state in FAILED and delivery.due is None
                wanted = self.notify.get((message_id, address), False)  # never for a notice
                told = self.told[message_id, address]
                assert told == (wanted and settled) or (delivery.k and told == 1), "K came after the notice"
        for message_id in {key[0] for key in self.queue if self._needed(key[0])}:
            assert self.spool.path(message_id).exists()

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
def office(clean_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Office]:
    monkeypatch.setattr("relay.debts.GATHER", GATHER)
    monkeypatch.setattr(sweeps, "_LOST", sweeps._LOST.replace("@chance", "0"))  # the model knows when each is due
    made = Office(
        clean_url, grace=GRACE, lease=LEASE, session_timeout=SESSION, queue_lifetime=LIFETIME,
        uncertain_delay=UNCERTAIN_DELAY, poison_limit=POISON,
    )  # fmt: skip
    yield made
    made.engine.dispose()


def _heard(told: Verb, wanted: str | None) -> bool:
    """Whether a verb has something to say about a delivery that is being sent."""
    return told.wanted is not None or (told.withdraws is not None and wanted == told.withdraws)


def test_the_queue_does_what_its_model_does(office: Office, spool: Spool) -> None:
    machine: type[History] = type("History", (History,), {"office": office, "spool": spool})
    # To have a failing history made shorter, which takes minutes, take `phases` away.
    checks: Sequence[HealthCheck] = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=20,
            stateful_step_count=50,
            deadline=None,
            phases=[Phase.reuse, Phase.generate],
            suppress_health_check=checks,
        ),
    )
