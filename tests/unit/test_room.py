"""Room: never more than there are connections, shared by the routes, given back."""

from hypothesis import given
from hypothesis import strategies as st

from relay.claims import Claim
from relay.routes import Route, Routes, parse_server
from worker.room import Room
from worker.servers import Servers

A, B = parse_server("a.example"), parse_server("b.example")


def room(*routes: Route, places: int = 10, connections: int = 16) -> tuple[Room, Servers]:
    servers = Servers(places)
    return Room(Routes(list(routes)), servers, connections, 5), servers


def claims(name: str, count: int) -> list[Claim]:
    return [Claim(f"{n:032x}", 1, 1, name, "", 1, ("b@example.org",), 0, 0, 0.0) for n in range(count)]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_no_more_is_offered_than_there_is(most: int, places: int, connections: int) -> None:
    found, _ = room(Route("one", (A,)), Route("two", (B,)), places=places, connections=connections)
    first = found.offer(most)
    assert sum(first.values()) <= min(most, connections)
    assert all(count <= places for count in first.values())
    second = found.offer(1000)
    assert found.busy == sum(first.values()) + sum(second.values()) <= connections
    assert all(first.get(name, 0) + second.get(name, 0) <= places for name in ("one", "two"))


def test_every_route_gets_its_share() -> None:
    found, _ = room(Route("one", (A,)), Route("two", (B,)), connections=10)
    shares = found.offer(10, hopeless=True)  # `default` has no server and wants to tell its mail
    assert set(shares) == {"one", "two", "default"}
    assert max(shares.values()) <= 4


def test_room_that_was_not_used_is_given_back() -> None:
    found, servers = room(Route("one", (A,)))
    promised = found.offer(8)
    assert promised == {"one": 8}
    found.settle(promised, claims("one", 3))
    assert found.busy == 3
    assert found.offer(100) == {"one": 7}  # ten places, three of them spoken for
    servers.take(Route("one", (A,)))
    found.placed("one")
    found.ended()
    assert found.busy == 9


def test_hopeless_routes_get_a_batch_from_looks_only() -> None:
    found, servers = room(Route("one", (A,)))
    for _ in range(3):
        servers.failed(A, "refused")
    assert found.hopeless("one")
    assert found.offer(100) == {}
    assert found.offer(5, hopeless=True).keys() <= {"one", "default"}


def test_a_paused_route_gets_nothing() -> None:
    found, servers = room(Route("one", (A,)))
    servers.pauses = frozenset({"route:one", "route:default"})
    assert found.offer(100, hopeless=True) == {}
