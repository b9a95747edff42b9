"""Splits on both databases: bisection finds the bad recipient, and every other recipient gets the
mail once.

`RefusingServer` answers a whole request as a QMQP server does: D if any recipient is bad, K
otherwise. The queue's part is real, and fenced and recorded as a worker does it.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, text
from sqlalchemy.exc import OperationalError

from relay.db.engine import is_outage, writing
from relay.ids import dashed
from relay.queue.model import Claim, CompletionResult
from relay.queue.operations import OPERATIONS, REROUTE, QueueOperations
from relay.queue.outcome import Outcome
from relay.queue.split import LARGEST, Splitter
from relay.queue.states import State
from relay.report.filters import Filter
from tests.integration.harness import QueueHarness

PLENTY = {"default": 1000}


def addresses(count: int) -> list[str]:
    return [f"{n}@example.org" for n in range(count)]


class RefusingServer:
    """Refuses whatever has a bad recipient, with the text of `reply_for`."""

    def __init__(
        self,
        bad: set[str],
        reply_for: Callable[[str], str] = lambda address: f"no {address} here (#5.1.1)",
    ) -> None:
        self.bad, self.reply_for = bad, reply_for
        self.sends = 0
        self.accepted: Counter[str] = Counter()

    def answer(self, claim: Claim) -> str | None:
        self.sends += 1
        for address in claim.recipients:
            if address in self.bad:
                return self.reply_for(address)
        self.accepted.update(claim.recipients)
        return None


def deliver(
    queue: QueueHarness, queue_id: str, server: RefusingServer, *, one_by_one: bool = False
) -> None:
    """Send until nothing is left to be sent."""
    capacity = {"default": 1} if one_by_one else PLENTY
    while claims := queue.claim(queue_id, capacity=capacity):
        for claim in claims:
            if refuse(queue, claim, server) is None:
                assert queue.complete(claim, Outcome.DELIVERED).state is State.DELIVERED


def refuse(queue: QueueHarness, claim: Claim, server: RefusingServer) -> str | None:
    """Send, and record a D that is about an address as a worker does; None for a K, which is not
    recorded."""
    reply = server.answer(claim)
    if reply is not None:
        whole = len(claim.recipients) == 1 and claim.number == 1  # as in worker/delivery.py
        state = State.BOUNCED if whole else State.SPLIT
        assert queue.complete(claim, Outcome.REJECTED, reply=reply, state=state).state in (
            state,
            State.BOUNCED,
        )
    return reply


def became(queue: QueueHarness, queue_id: str) -> dict[str, str]:
    """The state of each recipient; asserts that each has one."""
    sql = """SELECT r.address, d.state FROM recipients r LEFT JOIN deliveries d
        ON d.queue_id = r.queue_id AND d.number = r.delivery WHERE r.queue_id = @id(:id)"""
    rows = queue.rows(sql, id=queue_id)
    found = {row["address"]: row["state"] for row in rows}
    assert len(found) == len(rows)
    return found


def family(queue: QueueHarness, queue_id: str) -> list[dict[str, Any]]:
    sql = (
        "SELECT number, parent, state, due_at FROM deliveries WHERE queue_id = @id(:id) ORDER"
        " BY number"
    )
    return [dict(row) for row in queue.rows(sql, id=queue_id)]


@pytest.mark.parametrize("count", [2, 3, 7, 8, 30])
@pytest.mark.parametrize("where", ["first", "last"])
def test_the_one_bad_recipient_alone_bounces(queue: QueueHarness, count: int, where: str) -> None:
    names = addresses(count)
    bad = names[0] if where == "first" else names[-1]
    queue_id, server = queue.accept(*names), RefusingServer({bad})
    deliver(queue, queue_id, server)
    assert became(queue, queue_id) == {
        name: "bounced" if name == bad else "delivered" for name in names
    }
    assert server.accepted == Counter(set(names) - {bad}), "each once"
    owed = [row for row in family(queue, queue_id) if row["due_at"] is not None]
    assert [row["state"] for row in owed] == ["bounced"], "one DSN, for one"


def test_a_split_is_a_parent_and_two_children_that_are_due_now(queue: QueueHarness) -> None:
    queue_id = queue.accept(*addresses(5))
    (claim,) = queue.claim(queue_id)
    recorded = queue.complete(claim, Outcome.REJECTED, state=State.SPLIT)
    assert recorded == CompletionResult(State.SPLIT, body_deletable=False)
    assert [(row["number"], row["parent"], row["state"]) for row in family(queue, queue_id)] == [
        (1, None, "split"),
        (2, 1, "queued"),
        (3, 1, "queued"),
    ]
    parent, child = queue.delivery(queue_id, 1), queue.delivery(queue_id, 2)
    assert (parent["due_at"], parent["finished_at"]) == (None, None)
    assert child["due_in"] <= 0
    assert (child["route"], child["expires_at"], child["deferrals"]) == (
        "default",
        parent["expires_at"],
        0,
    )
    halves = [claim.recipients for claim in queue.claim(queue_id)]
    assert halves == [tuple(addresses(5)[:3]), tuple(addresses(5)[3:])]


def test_a_repeated_completion_splits_once(queue: QueueHarness) -> None:
    queue_id = queue.accept(*addresses(6))
    (claim,) = queue.claim(queue_id)
    note = queue.completion(claim, Outcome.REJECTED, state=State.SPLIT)
    first, again = queue.worker_queue.commit([note]), queue.worker_queue.commit([note])
    assert first == again == [CompletionResult(State.SPLIT, body_deletable=False)]
    assert [row["state"] for row in family(queue, queue_id)] == ["split", "queued", "queued"]
    claims = queue.claim(queue_id)
    third = queue.worker_queue.commit([note])
    assert third == first
    assert sorted(address for claim in claims for address in claim.recipients) == addresses(6)


def test_a_worker_without_its_claim_splits_nothing(queue: QueueHarness) -> None:
    queue_id = queue.accept(*addresses(4))
    (old,) = queue.claim(queue_id)
    queue.complete(old, Outcome.INTERRUPTED, state=State.QUEUED)
    (new,) = queue.claim(queue_id, worker=queue.register_worker())
    assert queue.complete(old, Outcome.REJECTED, state=State.SPLIT).state is None
    assert len(family(queue, queue_id)) == 1
    assert new.recipients == tuple(addresses(4))


@pytest.mark.parametrize("count", [4, 32])
def test_both_first_halves_refused_with_the_same_reply_bounce_all(
    queue: QueueHarness, count: int
) -> None:
    names = addresses(count)
    queue_id, server = (
        queue.accept(*names),
        RefusingServer(set(names), lambda _: "your list is not welcome (#5.1.8)"),
    )
    deliver(queue, queue_id, server)
    assert set(became(queue, queue_id).values()) == {"bounced"}
    assert server.sends == 3, "the whole, and its halves"
    assert server.accepted == Counter()
    states = Counter(row["state"] for row in family(queue, queue_id))
    assert states == {"split": 2, "bounced": 3}, (
        "the first half was split before the second was completed"
    )
    assert all(
        (row["due_at"] is not None) == (row["state"] == "bounced")
        for row in family(queue, queue_id)
    )


def test_a_half_that_was_split_bounces_with_the_other_half(queue: QueueHarness) -> None:
    names = addresses(8)
    queue_id, server = queue.accept(*names), RefusingServer(set(names), lambda _: "same (#5.1.1)")
    deliver(queue, queue_id, server, one_by_one=True)
    assert set(became(queue, queue_id).values()) == {"bounced"}
    assert server.accepted == Counter()


@pytest.mark.parametrize("count", [2, 3, 5])
def test_three_sends_do_whichever_half_is_refused_last(queue: QueueHarness, count: int) -> None:
    """Also if that half has a single recipient, while the other has been cut already."""
    names = addresses(count)
    for last in (0, 1):
        queue_id, server = (
            queue.accept(*names),
            RefusingServer(set(names), lambda _: "same (#5.1.1)"),
        )
        (whole,) = queue.claim(queue_id)
        refuse(queue, whole, server)
        halves = queue.claim(queue_id)
        refuse(queue, halves[1 - last], server)
        refuse(queue, halves[last], server)
        assert queue.claim(queue_id) == []
        assert server.sends == 3
        assert became(queue, queue_id) == dict.fromkeys(names, "bounced")


def test_halves_may_be_split_at_the_same_time(postgres_queue: QueueHarness) -> None:
    queue, names = postgres_queue, addresses(8)
    queue_id, server = queue.accept(*names), RefusingServer({names[0], names[7]})
    (whole,) = queue.claim(queue_id)
    refuse(queue, whole, server)
    first, second = queue.claim(queue_id)
    elsewhere = Splitter(queue.database, sends_dsns=True)
    with writing(queue.database) as connection:  # another worker is in its transaction
        assert elsewhere.split_in_half(connection, dashed(queue_id), first.number, "no")
        refuse(queue, second, server)
    assert [row["number"] for row in family(queue, queue_id)] == [1, 2, 3, 4, 5, 6, 7]
    queue.complete(first, Outcome.REJECTED, state=State.SPLIT)
    deliver(queue, queue_id, server)
    assert server.accepted == Counter(names[1:7])


def test_a_commit_waits_for_no_lock_of_the_same_message(postgres_queue: QueueHarness) -> None:
    """It has locked its own in key order: if it waited for more, two rounds could wait for each
    other."""
    queue, names = postgres_queue, addresses(3)
    queue_id, server = queue.accept(*names), RefusingServer(set(names), lambda _: "same (#5.1.1)")
    (whole,) = queue.claim(queue_id)
    refuse(queue, whole, server)
    two, one = queue.claim(queue_id)
    refuse(queue, two, server)
    with writing(queue.database) as connection:
        lock(connection, queue_id, 4)
        refuse(queue, one, server)
    assert [row["state"] for row in family(queue, queue_id)] == [
        "split",
        "split",
        "bounced",
        "queued",
        "bounced",
    ]
    assert [claim.number for claim in queue.claim(queue_id)] == [4]


def test_a_late_K_waits_for_no_such_lock_and_loses_no_part(
    postgres_queue: QueueHarness,
) -> None:
    queue = postgres_queue
    queue_id = queue.accept(*addresses(3))
    (old,) = queue.claim(queue_id)
    queue.complete(old, Outcome.UNCERTAIN, delay=0.0)
    queue.rescuer.requeue_due(10)
    (new,) = queue.claim(queue_id)
    queue.complete(new, Outcome.REJECTED, state=State.SPLIT)
    late = queue.completion(old, Outcome.DELIVERED)
    with writing(queue.database) as connection:
        lock(connection, queue_id, 2)
        with pytest.raises(OperationalError) as refused:
            queue.worker_queue.commit([late])
    assert is_outage(refused.value), "the writer runs the round again"
    queue.worker_queue.commit([late])
    assert [row["state"] for row in family(queue, queue_id)] == ["delivered"] * 3


def lock(connection: Connection, queue_id: str, number: int) -> None:
    sql = (
        "SELECT 1 FROM deliveries WHERE queue_id = CAST(:id AS uuid) AND number = :number"
        " FOR UPDATE"
    )
    assert connection.execute(text(sql), {"id": dashed(queue_id), "number": number}).first()


# --- by route
# -----------------------------------------------------------------------------------------------


def way(address: str) -> str:
    """The routes of today: `x@a.test` goes by `a`."""
    return address.rpartition("@")[2].removesuffix(".test")


def reroute(queue: QueueHarness, route: str = "bulk") -> int:
    operations = QueueOperations(queue.database, sends_dsns=True)
    return operations.apply(REROUTE, Filter(route=route), actor="me", reason="", route_for=way)[
        0
    ].total()


def ways(queue: QueueHarness, queue_id: str) -> dict[str, tuple[int, str, str]]:
    """Number, state and route of each recipient's delivery."""
    sql = """SELECT r.address, d.number, d.state, d.route FROM recipients r JOIN deliveries d
        ON d.queue_id = r.queue_id AND d.number = r.delivery WHERE r.queue_id = @id(:id)
        ORDER BY r.position"""
    return {
        row["address"]: (row["number"], row["state"], row["route"])
        for row in queue.rows(sql, id=queue_id)
    }


def test_recipients_whose_routes_differ_today_go_on_in_deliveries_of_their_own(
    queue: QueueHarness,
) -> None:
    """All would follow the first to servers that know nothing of the others, and bounce them."""
    queue_id = queue.accept(*(f"bulk:{n}@{'abac'[n]}.test" for n in range(4)), "default:z@d.test")
    (claim,) = queue.claim(queue_id, capacity={"bulk": 1})
    queue.complete(claim, Outcome.DEFERRED, deferrals=3)
    queue.change(
        "UPDATE deliveries SET crash_count = 2 WHERE queue_id = @id(:id) AND route = 'bulk'",
        id=queue_id,
    )
    whole = queue.delivery(queue_id)
    assert reroute(queue) == 1
    found = ways(queue, queue_id)
    assert {address: (state, route) for address, (_, state, route) in found.items()} == {
        "0@a.test": ("queued", "a"),
        "1@b.test": ("queued", "b"),
        "2@a.test": ("queued", "a"),
        "3@c.test": ("queued", "c"),
        "z@d.test": ("queued", "default"),
    }
    assert found["0@a.test"][0] == found["2@a.test"][0], "one request for one route"
    assert len({number for number, _, _ in found.values()}) == 4
    piece = queue.delivery(queue_id, found["1@b.test"][0])
    kept = ("expires_at", "crash_count", "last_outcome", "last_reply", "last_server")
    assert [piece[column] for column in kept] == [whole[column] for column in kept]
    assert (piece["claim_count"], piece["deferrals"], piece["due_in"] <= 0) == (0, 0, True)
    assert (queue.state(queue_id), queue.delivery(queue_id)["due_at"]) == ("split", None)
    assert reroute(queue) == reroute(queue, "a") - 1 == 0, "there is nothing left to divide"
    assert ways(queue, queue_id) == found
    claims = queue.claim(queue_id, capacity=dict.fromkeys(["a", "b", "c", "default"], 9))
    assert sorted(claim.recipients for claim in claims) == [
        ("0@a.test", "2@a.test"),
        ("1@b.test",),
        ("3@c.test",),
        ("z@d.test",),
    ]


def test_a_held_delivery_is_split_and_stays_held(queue: QueueHarness) -> None:
    queue_id = queue.accept("bulk:x@a.test", "bulk:y@b.test")
    operations = QueueOperations(queue.database, sends_dsns=True)
    operations.apply(OPERATIONS["hold"], Filter(id=queue_id), actor="me", reason="a look")
    assert reroute(queue) == 1
    assert [(state, route) for _, state, route in ways(queue, queue_id).values()] == [
        ("held", "a"),
        ("held", "b"),
    ]
    assert "a look" in queue.delivery(queue_id, 2)["last_reply"]
    operations.apply(OPERATIONS["release"], Filter(id=queue_id), actor="me", reason="")
    assert len(queue.claim(queue_id, capacity={"a": 1, "b": 1})) == 2


def test_parts_by_route_are_split_like_any_other(queue: QueueHarness) -> None:
    """Also when both get the same reply: halves on two routes are not compared."""
    queue_id = queue.accept(*(f"bulk:{n}@{'ab'[n % 2]}.test" for n in range(12)))
    reroute(queue)
    server = RefusingServer({"0@a.test", "1@b.test"}, lambda _: "no such mailbox (#5.1.1)")
    while claims := queue.claim(queue_id, capacity={"a": 1, "b": 1}):
        for claim in claims:
            if refuse(queue, claim, server) is None:
                queue.complete(claim, Outcome.DELIVERED)
    states = became(queue, queue_id)
    assert {name for name, state in states.items() if state != "delivered"} == server.bad
    assert set(server.accepted.values()) == {1}


def test_a_late_K_counts_for_a_delivery_that_was_split(queue: QueueHarness) -> None:
    queue_id = queue.accept("bulk:x@a.test", "bulk:y@b.test")
    (old,) = queue.claim(queue_id, capacity={"bulk": 1})
    queue.complete(old, Outcome.UNCERTAIN)
    reroute(queue)
    assert queue.complete(old, Outcome.DEFERRED).state is None, "the whole was split"
    assert queue.complete(old, Outcome.DELIVERED).state is State.DELIVERED
    assert [row["state"] for row in family(queue, queue_id)] == ["delivered"] * 3
    assert queue.claim(queue_id, capacity={"a": 1, "b": 1}) == [], "never again after a K"


def test_numbers_of_halves_are_unique(postgres_queue: QueueHarness) -> None:
    """While one delivery is divided by route another of the same message is cut, and neither waits
    for the other."""
    queue = postgres_queue
    queue_id = queue.accept(*addresses(4), *(f"bulk:{n}@{n}.test" for n in range(5)))
    (claim,) = queue.claim(queue_id)
    elsewhere = Splitter(queue.database, sends_dsns=True)
    with writing(queue.database) as connection:
        lock(connection, queue_id, 2)
        elsewhere.divide(connection, dashed(queue_id), 2, {str(n): [5 + n] for n in range(5)})
        assert queue.complete(claim, Outcome.REJECTED, state=State.SPLIT).state is State.SPLIT
        assert len(queue.claim(queue_id)) == 2
    assert [
        address for address, (_, _, route) in ways(queue, queue_id).items() if route == "default"
    ] == addresses(4)
    assert [route for _, _, route in ways(queue, queue_id).values()][4:] == list("01234")
    numbers = [row["number"] for row in family(queue, queue_id)]
    assert len(set(numbers)) == len(numbers) == 2 + 2 + 8


def test_halves_refused_with_other_replies_are_split_further(queue: QueueHarness) -> None:
    names = addresses(8)
    queue_id, server = queue.accept(*names), RefusingServer({names[0], names[7]})
    deliver(queue, queue_id, server)
    states = became(queue, queue_id)
    assert [name for name, state in states.items() if state == "bounced"] == [names[0], names[7]]


def test_two_bad_recipients_bounce(queue: QueueHarness) -> None:
    names = addresses(2)
    for reply_for in (lambda address: f"no {address} (#5.1.1)", lambda _: "same (#5.1.1)"):
        queue_id, server = queue.accept(*names), RefusingServer(set(names), reply_for)
        deliver(queue, queue_id, server)
        assert became(queue, queue_id) == dict.fromkeys(names, "bounced")
        assert server.sends == 3


@pytest.mark.parametrize("most", [1, 3, 100])
def test_a_list_with_too_many_recipients_is_split_until_the_server_accepts_it(
    queue: QueueHarness, most: int
) -> None:
    """Every half is rejected with the same text, and there are more parts than LARGEST."""
    names = addresses(150)
    queue_id, server = queue.accept(*names), RefusingServer(set())

    def answer(claim: Claim) -> str | None:
        server.accepted.update(claim.recipients if len(claim.recipients) <= most else ())
        return "sorry, too many recipients (#5.5.3)" if len(claim.recipients) > most else None

    server.answer = answer  # type: ignore[method-assign]
    deliver(queue, queue_id, server)
    assert became(queue, queue_id) == dict.fromkeys(names, "delivered")
    assert server.accepted == Counter(names), "each once"
    assert (len(family(queue, queue_id)) > LARGEST) == (most < 100)


@pytest.mark.parametrize("cut_first", [True, False])
def test_body_stays_for_the_children_when_another_delivery_ends_in_the_batch(
    queue: QueueHarness, cut_first: bool
) -> None:
    queue_id = queue.accept(*addresses(2), "bulk:x@example.org")
    claims = {
        claim.route: claim for claim in queue.claim(queue_id, capacity={"default": 9, "bulk": 9})
    }
    batch = [
        queue.completion(claims["default"], Outcome.REJECTED, state=State.SPLIT),
        queue.completion(claims["bulk"], Outcome.DELIVERED),
    ]
    results = queue.worker_queue.commit(batch if cut_first else batch[::-1])
    assert {
        (result.state, result.body_deletable)
        for result in results
        if isinstance(result, CompletionResult)
    } == {(State.SPLIT, False), (State.DELIVERED, False)}


def test_a_single_recipient_that_is_too_many_bounces(queue: QueueHarness) -> None:
    names = addresses(3)
    queue_id, server = queue.accept(*names), RefusingServer(set(names), lambda _: "5.5.3 too many")
    deliver(queue, queue_id, server)
    assert became(queue, queue_id) == dict.fromkeys(names, "bounced")
    assert server.sends == 5


def test_a_message_is_split_into_a_bounded_number_of_parts(queue: QueueHarness) -> None:
    names = addresses(300)
    queue_id, server = queue.accept(*names), RefusingServer(set(names[::2]))
    deliver(queue, queue_id, server)
    pieces = family(queue, queue_id)
    assert len(pieces) <= LARGEST
    assert server.sends <= LARGEST
    assert set(became(queue, queue_id).values()) <= {"bounced", "delivered"}
    assert set(server.accepted.values()) <= {1}
    assert not server.accepted.keys() & server.bad


def test_other_routes_keep_their_recipients(queue: QueueHarness) -> None:
    queue_id = queue.accept("bulk:x@example.org", *addresses(4), "bulk:y@example.org")
    claims = {
        claim.route: claim for claim in queue.claim(queue_id, capacity={"default": 9, "bulk": 9})
    }
    queue.complete(claims["default"], Outcome.REJECTED, state=State.SPLIT)
    assert queue.complete(claims["bulk"], Outcome.DELIVERED).state is State.DELIVERED
    deliver(queue, queue_id, RefusingServer({"0@example.org"}))
    states = became(queue, queue_id)
    assert [name for name, state in states.items() if state != "delivered"] == ["0@example.org"]


def test_a_bounce_of_a_part_has_a_pending_dsn_for_a_real_sender_only(queue: QueueHarness) -> None:
    queue_id = queue.accept(*addresses(4), sender="")
    deliver(queue, queue_id, RefusingServer({"1@example.org"}))
    assert all(row["due_at"] is None for row in family(queue, queue_id))


def test_a_pending_operation_comes_before_a_split(queue: QueueHarness) -> None:
    queue_id = queue.accept(*addresses(4))
    (claim,) = queue.claim(queue_id)
    queue.request_operation(queue_id, "hold")
    assert queue.complete(claim, Outcome.REJECTED, state=State.SPLIT).state is State.HELD
    assert len(family(queue, queue_id)) == 1


def test_parts_expire_with_the_message(queue: QueueHarness) -> None:
    queue_id = queue.accept(*addresses(4))
    (claim,) = queue.claim(queue_id)
    queue.complete(claim, Outcome.REJECTED, state=State.SPLIT)
    queue.pass_time(2000)
    first, second = queue.claim(queue_id)
    assert queue.complete(first, Outcome.DEFERRED).state is State.EXPIRED
    assert queue.complete(second, Outcome.DELIVERED).state is State.DELIVERED


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)
@given(data=st.data())
def test_every_recipient_ends_once_for_any_bad_recipients(
    queue: QueueHarness, data: st.DataObject
) -> None:
    names = addresses(data.draw(st.integers(2, 24)))
    bad = set(data.draw(st.lists(st.sampled_from(names), max_size=4, unique=True)))
    queue_id, server = queue.accept(*names), RefusingServer(bad)
    deliver(queue, queue_id, server, one_by_one=data.draw(st.booleans()))
    states = became(queue, queue_id)
    assert states == {name: "bounced" if name in bad else "delivered" for name in names}, (
        "few parts, distinct texts"
    )
    assert server.accepted == Counter(set(names) - bad)
    assert server.sends <= LARGEST
    assert (
        Counter(row["state"] for row in family(queue, queue_id))["split"] == (server.sends - 1) / 2
    )
