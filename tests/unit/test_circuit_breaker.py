"""The servers of a worker: order, slots and circuits, on a clock that the test sets."""

import asyncio

import pytest

from relay.routes import Route, parse_server
from tests.waiting import SetClock
from worker.backoff import delay
from worker.circuit_breaker import (
    FAILURES_TO_OPEN,
    MAX_PROBE_INTERVAL,
    OPEN_MAX,
    WORKING_TIME,
    ConnectionSlot,
    ServerPool,
)

A, B = parse_server("a.example"), parse_server("b.example:2628")
ONE, BOTH, NONE = Route("one", (A,)), Route("both", (A, B)), Route("none", ())


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def servers(clock: SetClock) -> ServerPool:
    return ServerPool(2, clock=clock, draw=lambda: 1.0)


def trip(servers: ServerPool, times: int = FAILURES_TO_OPEN) -> float | None:
    opened = None
    for _ in range(times):
        opened = servers.record_failure(A, "refused")
    return opened


def name(slot: ConnectionSlot | None) -> str | None:
    return slot.server.name if slot else None


def test_servers_are_tried_in_order_and_full_ones_passed_over(servers: ServerPool) -> None:
    assert servers.capacity(BOTH) == 4
    taken = [name(servers.take(BOTH)) for _ in range(5)]
    assert taken == [A.name, A.name, B.name, B.name, None]
    assert servers.capacity(BOTH) == 0
    assert not servers.down(BOTH)  # full is not down


def test_a_slot_is_released_once(servers: ServerPool) -> None:
    slot = servers.take(ONE)
    assert slot is not None
    slot.release()
    slot.release()
    assert servers.free(A) == 2


def test_a_tried_server_is_not_tried_again(servers: ServerPool) -> None:
    assert name(servers.take(BOTH, {A.name})) == B.name
    assert servers.take(BOTH, {A.name, B.name}) is None


def test_failures_in_a_row_open_the_circuit(servers: ServerPool) -> None:
    assert trip(servers, FAILURES_TO_OPEN - 1) is None
    servers.record_success(A)
    assert trip(servers, FAILURES_TO_OPEN - 1) is None
    assert servers.record_failure(A, "refused") == 1.0
    assert name(servers.take(BOTH)) == B.name
    assert (servers.free(A), servers.down(ONE), servers.down(BOTH)) == (0, True, False)
    assert "refused" in servers.open_reason(BOTH)
    assert A.name in servers.open_reason(BOTH)


def test_there_is_one_probe_at_a_time_and_its_success_closes_the_circuit(
    servers: ServerPool, clock: SetClock
) -> None:
    trip(servers)
    clock.now += 1.0
    assert (servers.capacity(ONE), servers.down(ONE)) == (1, False)
    probe = servers.take(ONE)
    assert name(probe) == A.name
    assert (servers.take(ONE), servers.down(ONE)) == (None, True)
    assert servers.record_success(A)
    assert probe is not None
    probe.release()
    assert servers.free(A) == 2
    assert not servers.record_success(A)


def test_each_failed_probe_doubles_the_open_time_up_to_a_limit(
    servers: ServerPool, clock: SetClock
) -> None:
    times = [trip(servers)]
    for _ in range(10):
        clock.now += times[-1] or 0
        probe = servers.take(ONE)
        assert probe is not None
        times.append(servers.record_failure(A, "refused"))
        probe.release()
    assert times[:4] == [1.0, 2.0, 4.0, 8.0]
    assert times[-1] == OPEN_MAX


def test_a_probe_without_a_result_allows_another(servers: ServerPool, clock: SetClock) -> None:
    trip(servers)
    clock.now += 1.0
    probe = servers.take(ONE)
    assert probe is not None
    probe.release()
    assert name(servers.take(ONE)) == A.name


def test_failures_of_earlier_transfers_do_not_lengthen_the_open_time(servers: ServerPool) -> None:
    assert trip(servers) == 1.0
    assert servers.record_failure(A, "refused") is None


def test_an_unauthorized_relay_opens_the_circuit_for_longer_than_the_refused_mail_waits(
    clock: SetClock,
) -> None:
    least, most = 30.0, 300.0
    servers = ServerPool(2, clock=clock, draw=lambda: 0.0, backoff=(least, most))
    servers.awaited = {A.name: A}
    opened: float | None = None
    for step in range(6):
        opened = servers.record_failure(A, "not authorized", unauthorized=True)
        assert opened is not None
        assert opened >= delay(step, least=least, most=most, draw=lambda: 0.999)
        clock.now += opened - 0.1
        assert servers.free(A) == 0, "also if mail waits for it"
        assert servers.record_failure(A, "not authorized", unauthorized=True) is None, (
            "that transfer began before the circuit opened"
        )
        clock.now += 0.1
        assert servers.free(A) == 1
    assert opened == most


def test_a_failing_server_that_becomes_unauthorized_opens_for_the_full_time(
    clock: SetClock,
) -> None:
    servers = ServerPool(2, clock=clock, draw=lambda: 0.0, backoff=(30.0, 300.0))
    trip(servers)
    assert servers.record_failure(A, "not authorized", unauthorized=True) == 60.0
    clock.now += 60.0
    assert trip(servers, 1) == 1.0, "an ordinary failure again"


def wait_for(servers: ServerPool, route: Route = ONE) -> dict[str, int]:
    """What a sweep does while mail waits for the route."""
    return servers.wake_limits([route])


def lose(servers: ServerPool, times: int = FAILURES_TO_OPEN) -> None:
    """Fail without a connection."""
    for _ in range(times):
        servers.record_failure(A, "refused", unreachable=True)


def test_a_server_that_mail_waits_for_needs_a_connection_before_a_transfer(
    servers: ServerPool, clock: SetClock
) -> None:
    assert wait_for(servers) == {"one": 1}, "a server that this worker has not met"
    lose(servers)
    for _ in range(20):
        clock.now += OPEN_MAX
        assert wait_for(servers) == {}
        assert (servers.free(A), servers.down(ONE), servers.circuit_open(A.name)) == (0, True, True)
        assert servers.take_probes() == [A]
        assert servers.record_failure(A, "refused", unreachable=True) is None
    servers.record_connection(A)
    assert (servers.free(A), servers.down(ONE), servers.circuit_open(A.name)) == (1, False, False)
    assert wait_for(servers) == {"one": 1}
    assert servers.take_probes() == []


def test_mail_is_not_woken_for_an_unreachable_server_before_its_circuit_opens(
    servers: ServerPool,
) -> None:
    """Each try would be a claim. The connection probes count until the circuit opens."""
    lose(servers, 1)
    assert (wait_for(servers), servers.take_probes()) == ({}, [A])
    assert servers.closed(A)
    lose(servers, FAILURES_TO_OPEN - 1)
    assert not servers.closed(A)


def test_connection_probes_are_a_few_seconds_apart(servers: ServerPool, clock: SetClock) -> None:
    lose(servers)
    assert servers.take_probes() == [], "no mail waits"
    wait_for(servers)
    assert servers.take_probes() == [A]
    clock.now += MAX_PROBE_INTERVAL - 0.1
    assert servers.take_probes() == []
    clock.now += 0.1
    servers.pauses = frozenset({f"server:{A.name}"})
    assert servers.take_probes() == []
    servers.pauses = frozenset()
    assert servers.take_probes() == [A]
    assert MAX_PROBE_INTERVAL < 5


def test_without_waiting_mail_an_unreachable_server_is_tried_after_its_time(
    servers: ServerPool, clock: SetClock
) -> None:
    lose(servers)
    clock.now += 1.0
    assert servers.free(A) == 1


def test_a_server_that_accepts_connections_and_fails_is_tested_every_few_seconds_while_mail_waits(
    servers: ServerPool, clock: SetClock
) -> None:
    """It may be a balancer whose server is away. (Its first failure after a connection probe may
    also be that no connection came about.)"""
    lose(servers)
    wait_for(servers)
    servers.record_connection(A)
    times = [servers.record_failure(A, "refused", unreachable=True) or 0.0]
    for _ in range(3):
        wait_for(servers)
        assert (servers.take_probes(), servers.free(A)) == ([], 0)
        clock.now += times[-1]
        assert servers.free(A) == 1
        times.append(servers.record_failure(A, "reset") or 0.0)
    assert times == [2.0, 3.0, 3.0, 3.0]


def test_a_server_that_closes_connections_gets_mail_after_its_time_only(
    servers: ServerPool, clock: SetClock
) -> None:
    assert trip(servers) == 1.0
    wait_for(servers)
    assert (servers.take_probes(), servers.free(A)) == ([], 0)
    clock.now += 1.0
    assert servers.free(A) == 1
    assert servers.record_failure(A, "refused", unreachable=True) == 2.0
    assert servers.take_probes() == [A], "now it is away"


def test_a_server_works_while_its_last_reply_is_recent(
    servers: ServerPool, clock: SetClock
) -> None:
    assert not servers.works(BOTH)
    servers.record_success(B)
    assert (servers.works(BOTH), servers.works(ONE)) == (True, False)
    servers.pauses = frozenset({f"server:{B.name}"})
    assert not servers.works(BOTH)
    servers.pauses = frozenset({"route:both"})
    assert not servers.works(BOTH)
    servers.pauses = frozenset()
    servers.record_failure(B, "reset")
    assert not servers.works(BOTH)
    servers.record_success(B)
    clock.now += WORKING_TIME
    assert not servers.works(BOTH)


def test_the_last_byte_waits_where_the_last_connection_was_closed_at_once(
    servers: ServerPool,
) -> None:
    assert servers.hold_back(A) == 0
    servers.record_close(A, 0.02)
    assert 0.04 <= servers.hold_back(A) < 0.06
    assert servers.hold_back(B) == 0
    servers.record_close(A, 0.9)
    assert servers.hold_back(A) == 1.0
    servers.record_success(A)
    assert servers.hold_back(A) == 0


@pytest.mark.parametrize("works", ["yes", "circuit open", "closes at once"])
def test_only_a_server_that_works_is_preconnected(servers: ServerPool, works: str) -> None:
    async def scenario() -> bool:
        slot = servers.take(BOTH, {B.name})
        assert slot is not None
        if works == "circuit open":
            trip(servers)
        elif works == "closes at once":
            servers.record_close(A, 0.02)
        servers.preconnect(slot, 5.0)
        made = slot.preconnection is not None
        slot.release()
        assert slot.preconnection is None
        return made

    assert asyncio.run(scenario()) == (works == "yes")


def test_a_route_without_servers_is_down(servers: ServerPool) -> None:
    assert servers.down(NONE)
    assert (servers.capacity(NONE), servers.open_reason(NONE), servers.take(NONE)) == (0, "", None)


def test_a_route_may_have_fewer_slots_at_its_servers(servers: ServerPool) -> None:
    narrow = Route("narrow", (A, B), connections=1)
    assert (servers.capacity(narrow), servers.capacity(BOTH)) == (2, 4)
    assert [name(servers.take(narrow)) for _ in range(3)] == [A.name, B.name, None]
    assert servers.capacity(BOTH) == 2
    assert servers.capacity(narrow) == 0


def test_connections_of_other_routes_do_not_count_for_a_routes_own_limit() -> None:
    servers, narrow = ServerPool(4), Route("narrow", (A, B), connections=1)
    for _ in range(3):
        servers.take(BOTH)
    assert servers.capacity(narrow) == 2
    slot = servers.take(narrow)
    assert slot is not None
    assert slot.server == A, "the last free slot"
    assert (servers.free(A), servers.free(A, narrow), servers.capacity(narrow)) == (0, 0, 1)
    slot.release()
    for _ in range(5):
        servers.take(BOTH)
    assert (servers.capacity(narrow), servers.take(narrow)) == (0, None), "no slot is free"


def test_a_paused_server_is_passed_over_and_is_not_down(servers: ServerPool) -> None:
    servers.pauses = frozenset({f"server:{A.name}", "route:one"})
    assert name(servers.take(BOTH)) == B.name
    assert (servers.capacity(ONE), servers.paused(ONE), servers.paused(BOTH)) == (0, True, False)
    trip(servers)
    assert not servers.down(ONE)
    servers.pauses = frozenset()
    assert servers.down(ONE)


def test_an_open_circuit_counts_as_closed_after_its_time(clock: SetClock) -> None:
    """Also without traffic; and a server that is in no route is forgotten."""
    routed = {A.name, B.name}
    servers = ServerPool(2, clock=clock, draw=lambda: 1.0, routed=lambda: routed)
    trip(servers)
    servers.record_failure(B, "not authorized", unauthorized=True)
    assert servers.open_circuits() == {A.name: "refused", B.name: "not authorized"}
    routed.remove(B.name)
    assert servers.open_circuits() == {A.name: "refused"}
    assert not servers.circuit_open(B.name)
    clock.now += 1.0
    assert servers.open_circuits() == {}
    probe = servers.take(ONE)
    assert probe is not None
    assert servers.open_circuits() == {A.name: "refused"}, "while it is probed"
    servers.record_failure(A, "refused again")
    probe.release()
    assert servers.open_circuits() == {A.name: "refused again"}
    clock.now += 100.0
    assert servers.open_circuits() == {}


def test_a_server_that_is_in_use_is_not_forgotten(clock: SetClock) -> None:
    servers = ServerPool(2, clock=clock, routed=set)
    slot = servers.take(ONE)
    assert slot is not None
    servers.open_circuits()
    assert servers.free(A) == 1
    slot.release()
