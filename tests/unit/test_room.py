"""Room: never more than there are connections, shared by the routes, given back."""

from collections import Counter
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from relay.queue.model import Claim
from relay.routes import Route, Routes, parse_server
from worker.capacity import Capacity
from worker.circuit_breaker import ConnectionSlot, ServerPool

A, B, C = parse_server("a.example"), parse_server("b.example"), parse_server("c.example")
ROUTES = ("one", "two", "default")


def room(*routes: Route, places: int = 10, connections: int = 16) -> tuple[Capacity, ServerPool]:
    servers = ServerPool(places)
    return Capacity(Routes(list(routes)), servers, connections, 5), servers


def claims(name: str, count: int) -> list[Claim]:
    return [
        Claim(f"{n:032x}", 1, 1, name, "", 1, ("b@example.org",), 0, 0, 0.0) for n in range(count)
    ]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_no_more_is_offered_than_there_is(most: int, places: int, connections: int) -> None:
    found, _ = room(Route("one", (A,)), Route("two", (B,)), places=places, connections=connections)
    first = found.look(most, ("one", "two"))
    assert sum(first.values()) <= min(most, connections)
    assert all(count <= places for count in first.values())
    second, together = found.offer(1000)
    assert together == []
    assert found.busy == sum(first.values()) + sum(second.values()) <= connections
    assert all(first.get(name, 0) + second.get(name, 0) <= places for name in ("one", "two"))


def test_every_route_gets_its_share() -> None:
    found, _ = room(Route("one", (A,)), Route("two", (B,)), connections=10)
    shares = found.look(10, ROUTES)  # `default` has no server and wants to tell its mail
    assert set(shares) == {"one", "two", "default"}
    assert max(shares.values()) <= 4


def test_room_that_was_not_used_is_given_back() -> None:
    found, servers = room(Route("one", (A,)))
    promised, _ = found.offer(8)
    assert promised == {"one": 8}
    found.settle(promised, claims("one", 3))
    assert found.busy == 3
    assert found.offer(100) == ({"one": 7}, [])  # ten places, three of them spoken for
    servers.take(Route("one", (A,)))
    found.slot_taken("one")
    found.ended()
    assert found.busy == 9


def test_hopeless_routes_get_a_batch_from_looks_only() -> None:
    found, servers = room(Route("one", (A,)))
    for _ in range(3):
        servers.failed(A, "refused")
    assert found.all_servers_down("one")
    assert found.offer(100) == ({}, [])
    assert found.look(5, ROUTES).keys() <= {"one", "default"}


def test_a_paused_route_gets_nothing() -> None:
    found, servers = room(Route("one", (A,)))
    servers.pauses = frozenset({"route:one", "route:default"})
    assert found.look(100, ROUTES) == {}


def test_routes_that_share_a_server_share_its_places() -> None:
    alike = [Route(f"r{n}", (A,)) for n in range(8)]
    found, servers = room(*alike, Route("more", (A, B)), places=4, connections=128)
    hinted, together = found.offer(64)
    assert hinted == {route.name: 4 for route in alike} | {"more": 8}
    assert dict(together) == {
        frozenset(route.name for route in alike): 4, frozenset(hinted): 8
    }  # fmt: skip
    assert found.look(128, hinted) == {}, "the hints may take it all"
    found.settle(hinted, claims("r0", 3))
    looked = found.look(128, hinted)
    assert sum(looked.values()) <= 5
    assert sum(count for name, count in looked.items() if name != "more") <= 1
    for claim in claims("r0", 3):
        assert servers.take(alike[0]), claim
        found.slot_taken("r0")
    found.settle(looked, ())
    assert found.offer(1) == ({route.name: 1 for route in alike} | {"more": 1}, [
        (frozenset(route.name for route in alike), 1), (frozenset(hinted), 5),
    ])  # fmt: skip


@given(st.integers(0, 2**32))
def test_what_is_claimed_has_a_place(seed: int) -> None:
    """Whatever routes there are that share all of their servers, some or none, and whatever is
    claimed and ends."""
    chance = Random(seed)
    lists = chance.choices([(A,), (B,), (A, B), (C,), (A, B, C)], k=chance.randint(1, 6))
    limits = [chance.choice([None, 1, 3]) if len(one) == 1 else None for one in lists]
    routes = {f"r{n}": Route(f"r{n}", one, connections=limits[n]) for n, one in enumerate(lists)}
    found, servers = room(*routes.values(), places=4, connections=20)
    held: list[ConnectionSlot] = []
    for _ in range(6):
        hinted, together = found.offer(chance.randint(1, 9))
        claimed: Counter[str] = Counter()
        for name, most in hinted.items():
            shared = [
                left - sum(claimed[other] for other in them)
                for them, left in together
                if name in them
            ]
            claimed[name] = chance.randint(0, max(0, min([most, *shared])))
        looked = found.look(20, routes)
        taken = {name: chance.randint(0, most) for name, most in looked.items()}
        for promised, got in ((hinted, Counter(claimed)), (looked, taken)):
            found.settle(
                promised, [claim for name, count in got.items() for claim in claims(name, count)]
            )
            claimed.update(taken if got is taken else {})
        for name in sorted(claimed.elements(), key=lambda name: len(routes[name].servers)):
            place = servers.take(routes[name])
            assert place is not None, (name, claimed)
            found.slot_taken(name)
            held.append(place)
        while held and chance.random() < 0.7:
            held.pop(chance.randrange(len(held))).release()
            found.ended()
    assert found.busy == len(held)
