"""Capacity: never more than the connections, shared by the routes, and returned."""

from collections import Counter
from collections.abc import Mapping
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from relay.queue.model import Claim
from relay.routes import Route, Routes, parse_server
from worker.circuit_breaker import ConnectionSlot, ServerPool
from worker.producer import Capacity, Slots

A, B, C = parse_server("a.example"), parse_server("b.example"), parse_server("c.example")
ROUTES = ("one", "two", "default")


def opened(*routes: Route, slots: int = 10, connections: int = 16) -> tuple[Capacity, ServerPool]:
    servers = ServerPool(slots)
    return Capacity(Routes(list(routes)), servers, connections, 5), servers


def claims(name: str, count: int) -> list[Claim]:
    return [
        Claim(f"{n:032x}", 1, 1, name, "", 1, ("b@example.org",), 0, 0, 0.0) for n in range(count)
    ]


def counts(reserved: Mapping[str, Slots]) -> dict[str, int]:
    return {name: len(slots) for name, slots in reserved.items()}


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_no_more_is_reserved_than_is_free(most: int, slots: int, connections: int) -> None:
    capacity, _ = opened(
        Route("one", (A,)), Route("two", (B,)), slots=slots, connections=connections
    )
    first = Counter(counts(capacity.reserve(("one", "two"), most, overdue=True)))
    assert first.total() <= min(most, connections)
    assert all(count <= slots for count in first.values())
    second = Counter(counts(capacity.reserve(("one", "two"), 1000)))
    assert capacity.busy == first.total() + second.total() <= connections
    assert all(first[name] + second[name] <= slots for name in ("one", "two"))


def test_every_route_gets_a_share() -> None:
    capacity, _ = opened(Route("one", (A,)), Route("two", (B,)), connections=10)
    shares = counts(capacity.reserve(ROUTES, 10, overdue=True))
    assert set(shares) == {
        "one",
        "two",
        "default",
    }  # `default` has no server: its mail gets a reason
    assert max(shares.values()) <= 4


def test_unused_capacity_is_returned() -> None:
    capacity, servers = opened(Route("one", (A,)))
    reserved = capacity.reserve(ROUTES, 8)
    assert counts(reserved) == {"one": 8}
    held = capacity.release_unclaimed(reserved, claims("one", 3))
    assert capacity.busy == len(held) == 3
    again = capacity.reserve(["one"], 100)
    assert counts(again) == {"one": 7}  # ten slots, three of them reserved
    assert servers.take(Route("one", (A,))) is None
    assert held[0] is not None
    held[0].release()
    assert servers.take(Route("one", (A,))) is not None
    capacity.ended()
    assert capacity.busy == 9


def test_routes_with_all_servers_down_get_a_batch_from_polls_only() -> None:
    capacity, servers = opened(Route("one", (A,)))
    for _ in range(3):
        servers.record_failure(A, "refused")
    assert capacity.closed("one")
    assert capacity.reserve(ROUTES, 100) == {}
    assert capacity.reserve(["one"], 100) == {}
    polled = capacity.reserve(ROUTES, 100, overdue=True)
    assert polled == {"one": [None] * 5, "default": [None] * 5}
    assert capacity.release_unclaimed(polled, claims("one", 2)) == [None, None]
    assert capacity.busy == 2


def test_a_paused_route_has_no_capacity() -> None:
    capacity, servers = opened(Route("one", (A,)))
    servers.pauses = frozenset({"route:one", "route:default"})
    assert capacity.reserve(ROUTES, 100, overdue=True) == {}


def test_routes_that_share_a_server_share_its_slots() -> None:
    alike = [Route(f"r{n}", (A,)) for n in range(8)]
    capacity, servers = opened(*alike, Route("more", (A, B)), slots=4, connections=128)
    names = [route.name for route in alike] + ["more"]
    hinted = capacity.reserve(names, 64)
    assert sum(counts(hinted).values()) == 8
    assert capacity.reserve(names, 128, overdue=True) == {}, "the hints have reserved everything"
    assert capacity.release_unclaimed(hinted, ()) == []
    slots = capacity.release_unclaimed(capacity.reserve(["r0"], 3), claims("r0", 3))
    polled = counts(capacity.reserve(names, 128, overdue=True))
    assert sum(polled.values()) == 5
    assert sum(count for name, count in polled.items() if name != "more") <= 1
    for slot in slots:
        assert slot is not None
        slot.release()
        assert servers.take(alike[0])
    assert capacity.reserve(names, 128, overdue=True) == {}


def test_a_probe_is_reserved_once_and_does_not_count_as_a_probe_yet() -> None:
    now = 1000.0
    servers = ServerPool(10, clock=lambda: now, draw=lambda: 1.0)
    one = Route("one", (A,))
    capacity = Capacity(Routes([one]), servers, 16, 5)
    for _ in range(3):
        servers.record_failure(A, "refused")
    now += 1.0
    reserved = capacity.reserve(["one"], 100)
    assert counts(reserved) == {"one": 1}
    assert capacity.reserve(["one"], 100, overdue=True) == {}
    assert not servers.circuit_open(A.name), "nothing is sent yet"
    assert not capacity.closed("one"), "other hints wait and are not dropped"
    assert servers.wake_limits([one]) == {"one": 1}, "the sweeper may wake a delivery for it"
    (slot,) = capacity.release_unclaimed(reserved, claims("one", 1))
    assert slot is not None
    slot.release()
    assert servers.take(one)
    assert servers.circuit_open(A.name)


@given(st.integers(0, 2**32))
def test_every_claim_gets_a_slot(seed: int) -> None:
    """For random routes that share any of their servers, and random claims."""
    chance = Random(seed)
    lists = chance.choices(
        [(A,), (B,), (A, B), (B, A), (B, C), (C,), (A, B, C)], k=chance.randint(1, 6)
    )
    limits = [chance.choice([None, 1, 3]) for _ in lists]
    routes = {f"r{n}": Route(f"r{n}", one, connections=limits[n]) for n, one in enumerate(lists)}
    capacity, servers = opened(*routes.values(), slots=4, connections=20)
    held: list[ConnectionSlot] = []
    for _ in range(6):
        requests = [
            capacity.reserve(routes, chance.randint(1, 20)),
            capacity.reserve(routes, 20, overdue=True),
        ]
        claimed: list[tuple[Claim, ConnectionSlot | None]] = []
        for reserved in requests:
            found = [
                claim
                for name, most in counts(reserved).items()
                for claim in claims(name, chance.randint(0, most))
            ]
            claimed += zip(found, capacity.release_unclaimed(reserved, found), strict=True)
        chance.shuffle(claimed)
        for claim, reserved_slot in claimed:
            assert reserved_slot is not None
            reserved_slot.release()
            slot = servers.take(routes[claim.route])
            assert slot is not None, (claim.route, claimed)
            held.append(slot)
        while held and chance.random() < 0.7:
            held.pop(chance.randrange(len(held))).release()
            capacity.ended()
    assert capacity.busy == len(held)
