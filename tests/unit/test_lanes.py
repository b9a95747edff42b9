"""Hints that wait: turns of the lanes, and when a ticket is done."""

from worker.hint_queue import HintBatch, HintQueue


def filled(**lanes: int) -> tuple[HintQueue, dict[str, HintBatch]]:
    made, tickets = HintQueue(), {}
    for lane, count in lanes.items():
        tickets[lane] = HintBatch(count)
        made.add(tickets[lane], [f"{lane}{n}" for n in range(count)], lane)
    return made, tickets


def test_fresh_mail_and_retries_take_turns() -> None:
    lanes, _ = filled(fresh=3, retry=3)
    assert [hint for hint, _ in lanes.take(4)] == ["fresh0", "retry0", "fresh1", "retry1"]
    assert len(lanes) == 2


def test_an_empty_lane_costs_the_other_nothing() -> None:
    lanes, _ = filled(retry=3)
    assert [hint for hint, _ in lanes.take(9)] == ["retry0", "retry1", "retry2"]
    assert lanes.take(9) == []


def test_a_ticket_is_done_when_its_last_message_is_dealt_with() -> None:
    lanes, tickets = filled(fresh=2, retry=1)
    lanes.settle(lanes.take(2))
    assert (tickets["fresh"].wait(0), tickets["retry"].wait(0)) == (False, True)
    assert lanes.tickets == {tickets["fresh"]}
    lanes.settle(lanes.take(2))
    assert tickets["fresh"].wait(0)


def test_clearing_lets_everybody_go() -> None:
    lanes, tickets = filled(fresh=5, retry=5)
    taken = lanes.take(3)
    lanes.clear()
    assert all(ticket.wait(0) for ticket in tickets.values())
    assert not lanes
    lanes.settle(taken)
    assert lanes.tickets == set()


def test_a_ticket_for_nothing_is_done() -> None:
    assert HintBatch(0).wait(0)


def test_a_lane_that_nobody_knows_is_the_first() -> None:
    lanes, _ = filled(other=1)
    assert lanes.take(1)[0][0] == "other0"
