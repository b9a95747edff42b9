"""Capacity: never more than the connections, shared by the routes, and returned."""

from collections import Counter
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from relay.queue.model import Claim
from relay.routes import Route, Routes, parse_server
from worker.circuit_breaker import ConnectionSlot, ServerPool
from worker.producer import Capacity

A, B, C = parse_server("a.example"), parse_server("b.example"), parse_server("c.example")
ROUTES = ("one", "two", "default")


def opened(*routes: Route, slots: int = 10, connections: int = 16) -> tuple[Capacity, ServerPool]:
    servers = ServerPool(slots)
    return Capacity(Routes(list(routes)), servers, connections, 5), servers


def claims(name: str, count: int) -> list[Claim]:
    return [
        Claim(f"{n:032x}", 1, 1, name, "", 1, ("b@example.org",), 0, 0, 0.0) for n in range(count)
    ]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_no_more_is_reserved_than_is_free(most: int, slots: int, connections: int) -> None:
    capacity, _ = opened(
        Route("one", (A,)), Route("two", (B,)), slots=slots, connections=connections
    )
    first = capacity.reserve(("one", "two"), most, overdue=True)
    assert sum(first.values()) <= min(most, connections)
    assert all(count <= slots for count in first.values())
    second, shared = capacity.reserve_any(1000, capacity.free)
    assert shared == []
    assert capacity.busy == sum(first.values()) + sum(second.values()) <= connections
    assert all(first.get(name, 0) + second.get(name, 0) <= slots for name in ("one", "two"))


def test_every_route_gets_a_share() -> None:
    capacity, _ = opened(Route("one", (A,)), Route("two", (B,)), connections=10)
    shares = capacity.reserve(ROUTES, 10, overdue=True)  # `default` has no server: its mail is told
    assert set(shares) == {"one", "two", "default"}
    assert max(shares.values()) <= 4


def test_unused_capacity_is_returned() -> None:
    capacity, servers = opened(Route("one", (A,)))
    reserved, _ = capacity.reserve_any(8, capacity.free)
    assert reserved == {"one": 8}
    capacity.settle(reserved, claims("one", 3))
    assert capacity.busy == 3
    assert capacity.reserve(["one"], 100) == {"one": 7}  # ten slots, three of them reserved
    servers.take(Route("one", (A,)))
    capacity.slot_taken("one")
    capacity.ended()
    assert capacity.busy == 9


def test_routes_with_all_servers_down_get_a_batch_from_polls_only() -> None:
    capacity, servers = opened(Route("one", (A,)))
    for _ in range(3):
        servers.record_failure(A, "refused")
    assert capacity.all_servers_down("one")
    assert capacity.reserve_any(100, capacity.free) == ({}, [])
    assert capacity.reserve(["one"], 100) == {}
    assert capacity.reserve(ROUTES, 5, overdue=True).keys() <= {"one", "default"}


def test_a_paused_route_has_no_capacity() -> None:
    capacity, servers = opened(Route("one", (A,)))
    servers.pauses = frozenset({"route:one", "route:default"})
    assert capacity.reserve(ROUTES, 100, overdue=True) == {}


def test_routes_that_share_a_server_share_its_slots() -> None:
    alike = [Route(f"r{n}", (A,)) for n in range(8)]
    capacity, servers = opened(*alike, Route("more", (A, B)), slots=4, connections=128)
    hinted, shared = capacity.reserve_any(64, capacity.free)
    assert hinted == {route.name: 4 for route in alike} | {"more": 8}
    assert dict(shared) == {
        frozenset(route.name for route in alike): 4, frozenset(hinted): 8
    }  # fmt: skip
    assert capacity.reserve(hinted, 128, overdue=True) == {}, "the hints have reserved everything"
    capacity.settle(hinted, claims("r0", 3))
    polled = capacity.reserve(hinted, 128, overdue=True)
    assert sum(polled.values()) <= 5
    assert sum(count for name, count in polled.items() if name != "more") <= 1
    for claim in claims("r0", 3):
        assert servers.take(alike[0]), claim
        capacity.slot_taken("r0")
    capacity.settle(polled, ())
    assert capacity.reserve_any(1, capacity.free) == ({route.name: 1 for route in alike} | {"more": 1}, [
        (frozenset(route.name for route in alike), 1), (frozenset(hinted), 5),
    ])  # fmt: skip


@given(st.integers(0, 2**32))
def test_every_claim_finds_a_slot(seed: int) -> None:
    """For random routes that share all of their servers, some or none, and random claims."""
    chance = Random(seed)
    lists = chance.choices([(A,), (B,), (A, B), (C,), (A, B, C)], k=chance.randint(1, 6))
    limits = [chance.choice([None, 1, 3]) if len(one) == 1 else None for one in lists]
    routes = {f"r{n}": Route(f"r{n}", one, connections=limits[n]) for n, one in enumerate(lists)}
    capacity, servers = opened(*routes.values(), slots=4, connections=20)
    held: list[ConnectionSlot] = []
    for _ in range(6):
        hinted, shared = capacity.reserve_any(chance.randint(1, 9), capacity.free)
        claimed: Counter[str] = Counter()
        for name, most in hinted.items():
            left = [
                slots - sum(claimed[other] for other in group)
                for group, slots in shared
                if name in group
            ]
            claimed[name] = chance.randint(0, max(0, min([most, *left])))
        polled = capacity.reserve(routes, 20, overdue=True)
        taken = {name: chance.randint(0, most) for name, most in polled.items()}
        for reserved, got in ((hinted, Counter(claimed)), (polled, taken)):
            capacity.settle(
                reserved, [claim for name, count in got.items() for claim in claims(name, count)]
            )
            claimed.update(taken if got is taken else {})
        for name in sorted(claimed.elements(), key=lambda name: len(routes[name].servers)):
            slot = servers.take(routes[name])
            assert slot is not None, (name, claimed)
            capacity.slot_taken(name)
            held.append(slot)
        while held and chance.random() < 0.7:
            held.pop(chance.randrange(len(held))).release()
            capacity.ended()
    assert capacity.busy == len(held)
