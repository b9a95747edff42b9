"""Order, places and breakers of servers, on a clock that we turn."""

from dataclasses import dataclass

import pytest

from relay.routes import Route, parse_server
from worker.backoff import delay
from worker.circuit_breaker import (
    FAILURES_TO_OPEN,
    FRESH,
    OPEN_MAX,
    REST_AWAITED,
    ConnectionSlot,
    ServerPool,
)

A, B = parse_server("a.example"), parse_server("b.example:2628")
ONE, BOTH, NONE = Route("one", (A,)), Route("both", (A, B)), Route("none", ())


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def servers(clock: Clock) -> ServerPool:
    return ServerPool(2, clock=clock, draw=lambda: 1.0)


def trip(servers: ServerPool, times: int = FAILURES_TO_OPEN) -> float | None:
    rest = None
    for _ in range(times):
        rest = servers.failed(A, "refused")
    return rest


def name(place: ConnectionSlot | None) -> str | None:
    return place.server.name if place else None


def test_servers_are_taken_in_order_and_full_ones_passed_over(servers: ServerPool) -> None:
    assert servers.room(BOTH) == 4
    taken = [name(servers.take(BOTH)) for _ in range(5)]
    assert taken == [A.name, A.name, B.name, B.name, None]
    assert servers.room(BOTH) == 0
    assert not servers.down(BOTH)  # full is not down


def test_a_place_is_given_back_once(servers: ServerPool) -> None:
    place = servers.take(ONE)
    assert place is not None
    place.release()
    place.release()
    assert servers.free(A) == 2


def test_what_was_tried_is_not_tried_again(servers: ServerPool) -> None:
    assert name(servers.take(BOTH, {A.name})) == B.name
    assert servers.take(BOTH, {A.name, B.name}) is None


def test_failures_in_a_row_open_the_breaker(servers: ServerPool) -> None:
    assert trip(servers, FAILURES_TO_OPEN - 1) is None
    servers.succeeded(A)
    assert trip(servers, FAILURES_TO_OPEN - 1) is None
    assert servers.failed(A, "refused") == 1.0
    assert name(servers.take(BOTH)) == B.name
    assert (servers.free(A), servers.down(ONE), servers.down(BOTH)) == (0, True, False)
    assert "refused" in servers.why(BOTH)
    assert A.name in servers.why(BOTH)


def test_one_probe_at_a_time_and_its_success_ends_the_rest(
    servers: ServerPool, clock: Clock
) -> None:
    trip(servers)
    clock.now += 1.0
    assert (servers.room(ONE), servers.down(ONE)) == (1, False)
    probe = servers.take(ONE)
    assert name(probe) == A.name
    assert (servers.take(ONE), servers.down(ONE)) == (None, True)
    assert servers.succeeded(A)
    assert probe is not None
    probe.release()
    assert servers.free(A) == 2
    assert not servers.succeeded(A)


def test_a_probe_that_fails_rests_the_server_for_longer_and_never_too_long(
    servers: ServerPool, clock: Clock
) -> None:
    rests = [trip(servers)]
    for _ in range(10):
        clock.now += rests[-1] or 0
        probe = servers.take(ONE)
        assert probe is not None
        rests.append(servers.failed(A, "refused"))
        probe.release()
    assert rests[:4] == [1.0, 2.0, 4.0, 8.0]
    assert rests[-1] == OPEN_MAX


def test_a_probe_of_our_own_that_said_nothing_makes_way_for_another(
    servers: ServerPool, clock: Clock
) -> None:
    trip(servers)
    clock.now += 1.0
    probe = servers.take(ONE)
    assert probe is not None
    probe.release()
    assert name(servers.take(ONE)) == A.name


def test_failures_that_began_before_the_rest_do_not_lengthen_it(servers: ServerPool) -> None:
    assert trip(servers) == 1.0
    assert servers.failed(A, "refused") is None


def test_a_server_that_refuses_us_rests_for_longer_than_the_mail_that_it_refused_waits(
    clock: Clock,
) -> None:
    least, most = 30.0, 300.0
    servers = ServerPool(2, clock=clock, draw=lambda: 0.0, backoff=(least, most))
    servers.awaited = frozenset({A.name})
    rest: float | None = None
    for step in range(6):
        rest = servers.failed(A, "not authorized", at_once=True)
        assert rest is not None
        assert rest >= delay(step, least=least, most=most, draw=lambda: 0.999)
        clock.now += rest - 0.1
        assert servers.free(A) == 0, "also if mail waits for it"
        assert servers.failed(A, "not authorized", at_once=True) is None, (
            "that transfer began before the rest"
        )
        clock.now += 0.1
        assert servers.free(A) == 1
    assert rest == most


def test_a_server_that_fails_and_then_refuses_us_rests_for_as_long_as_any_that_refuses_us(
    clock: Clock,
) -> None:
    servers = ServerPool(2, clock=clock, draw=lambda: 0.0, backoff=(30.0, 300.0))
    trip(servers)
    assert servers.failed(A, "not authorized", at_once=True) == 60.0
    clock.now += 60.0
    assert trip(servers, 1) == 1.0, "it fails again, and that is all"


def test_a_server_that_mail_waits_for_is_tried_every_few_seconds(
    servers: ServerPool, clock: Clock
) -> None:
    for _ in range(10):
        trip(servers)
        clock.now += OPEN_MAX
    trip(servers)
    clock.now += REST_AWAITED
    assert (servers.free(A), servers.rests(A.name), servers.down(ONE)) == (0, True, True)
    servers.awaited = frozenset({A.name})
    assert (servers.free(A), servers.rests(A.name), servers.down(ONE)) == (1, False, False)
    probe = servers.take(ONE)
    assert probe is not None
    assert servers.failed(A, "refused") == OPEN_MAX
    probe.release()
    assert servers.free(A) == 0
    clock.now += REST_AWAITED
    assert servers.free(A) == 1
    assert REST_AWAITED < 5


def test_a_server_works_while_its_last_reply_is_fresh(servers: ServerPool, clock: Clock) -> None:
    assert not servers.works(BOTH)
    servers.succeeded(B)
    assert (servers.works(BOTH), servers.works(ONE)) == (True, False)
    servers.pauses = frozenset({f"server:{B.name}"})
    assert not servers.works(BOTH)
    servers.pauses = frozenset({"route:both"})
    assert not servers.works(BOTH)
    servers.pauses = frozenset()
    servers.failed(B, "reset")
    assert not servers.works(BOTH)
    servers.succeeded(B)
    clock.now += FRESH
    assert not servers.works(BOTH)


def test_the_last_byte_is_held_back_where_the_last_connection_was_closed_at_once(
    servers: ServerPool,
) -> None:
    assert servers.holds_back(A) == 0
    servers.closed(A, 0.02)
    assert 0.04 <= servers.holds_back(A) < 0.06
    assert servers.holds_back(B) == 0
    servers.closed(A, 0.9)
    assert servers.holds_back(A) == 1.0
    servers.succeeded(A)
    assert servers.holds_back(A) == 0


def test_no_servers_at_all_are_down(servers: ServerPool) -> None:
    assert servers.down(NONE)
    assert (servers.room(NONE), servers.why(NONE), servers.take(NONE)) == (0, "", None)


def test_a_route_may_have_fewer_places_at_its_servers(servers: ServerPool) -> None:
    narrow = Route("narrow", (A, B), connections=1)
    assert (servers.room(narrow), servers.room(BOTH)) == (2, 4)
    assert [name(servers.take(narrow)) for _ in range(3)] == [A.name, B.name, None]
    assert servers.room(BOTH) == 2
    assert servers.room(narrow) == 0


def test_what_others_send_there_does_not_count_for_a_routes_own_limit() -> None:
    servers, narrow = ServerPool(4), Route("narrow", (A, B), connections=1)
    for _ in range(3):
        servers.take(BOTH)
    assert servers.room(narrow) == 2
    place = servers.take(narrow)
    assert place is not None
    assert place.server == A, "the last place that it had for anybody"
    assert (servers.free(A), servers.free(A, narrow), servers.room(narrow)) == (0, 0, 1)
    place.release()
    for _ in range(5):
        servers.take(BOTH)
    assert (servers.room(narrow), servers.take(narrow)) == (0, None), (
        "there is no place for anybody"
    )


def test_what_is_paused_is_passed_over_and_is_not_down(servers: ServerPool) -> None:
    servers.pauses = frozenset({f"server:{A.name}", "route:one"})
    assert name(servers.take(BOTH)) == B.name
    assert (servers.room(ONE), servers.paused(ONE), servers.paused(BOTH)) == (0, True, False)
    trip(servers)
    assert not servers.down(ONE)
    servers.pauses = frozenset()
    assert servers.down(ONE)


def test_a_rest_that_has_run_out_is_none(clock: Clock) -> None:
    """Also if nobody has mail for the server; and one that was taken out of the routes is
    nobody's."""
    routed = {A.name, B.name}
    servers = ServerPool(2, clock=clock, draw=lambda: 1.0, routed=lambda: routed)
    trip(servers)
    servers.failed(B, "not authorized", at_once=True)
    assert servers.open_circuits() == {A.name: "refused", B.name: "not authorized"}
    routed.remove(B.name)
    assert servers.open_circuits() == {A.name: "refused"}
    assert not servers.rests(B.name)
    clock.now += 1.0
    assert servers.open_circuits() == {}
    probe = servers.take(ONE)
    assert probe is not None
    assert servers.open_circuits() == {A.name: "refused"}, "while it is tried it has no other mail"
    servers.failed(A, "refused again")
    probe.release()
    assert servers.open_circuits() == {A.name: "refused again"}
    clock.now += 100.0
    assert servers.open_circuits() == {}


def test_a_server_that_is_in_use_is_not_forgotten(clock: Clock) -> None:
    servers = ServerPool(2, clock=clock, routed=set)
    place = servers.take(ONE)
    assert place is not None
    servers.open_circuits()
    assert servers.free(A) == 1
    place.release()
