"""The next state of each outcome, row by row of the table in the design."""

import pytest

from relay.queue.outcome import Outcome
from relay.queue.states import State
from relay.settings import WorkerSettings, load, unauthorized_pattern
from worker.delivery import ABOUT_AN_ADDRESS, next_state

SETTINGS = load(
    WorkerSettings, retry_min=30, retry_max=3600, uncertain_delay=900, uncertain="retry"
)
HOLD = load(WorkerSettings, uncertain="hold")


@pytest.mark.parametrize(
    ("outcome", "state", "step", "shortest", "longest"),
    [
        (Outcome.DELIVERED, State.DELIVERED, 2, 0, 0),
        (Outcome.DEFERRED, State.DEFERRED, 3, 120, 240),
        (Outcome.REJECTED, State.BOUNCED, 2, 0, 0),
        (Outcome.UNREACHABLE, State.DEFERRED, 2, 30, 45),
        (Outcome.INTERRUPTED, State.DEFERRED, 3, 120, 240),
        (Outcome.UNCERTAIN, State.DEFERRED, 3, 900, 1350),
        (Outcome.MALFORMED, State.DEFERRED, 3, 900, 1350),
        (Outcome.UNSENDABLE, State.HELD, 2, 0, 0),
    ],
)
def test_an_outcome_leads_to_its_state_wait_and_step(
    outcome: Outcome, state: State, step: int, shortest: float, longest: float
) -> None:
    next_, delay, next_step = next_state(outcome, SETTINGS, 2)
    assert (next_, next_step) == (state, step)
    assert shortest <= delay <= longest


def test_a_malformed_reply_before_the_commit_point_is_an_interruption() -> None:
    assert next_state(Outcome.MALFORMED, SETTINGS, 0, committed=False)[1] <= 60


def test_retries_of_uncertain_deliveries_are_spread() -> None:
    assert len({next_state(Outcome.UNCERTAIN, SETTINGS, 0)[1] for _ in range(20)}) > 10


def test_the_wait_of_an_uncertain_delivery_grows() -> None:
    assert next_state(Outcome.UNCERTAIN, SETTINGS, 30)[1] >= 1800


@pytest.mark.parametrize("outcome", [Outcome.UNCERTAIN, Outcome.MALFORMED])
def test_an_uncertain_delivery_may_be_held(outcome: Outcome) -> None:
    assert next_state(outcome, HOLD, 0)[0] is State.HELD


def test_an_unauthorized_relay_defers_the_mail() -> None:
    assert next_state(Outcome.REJECTED, SETTINGS, 0, unauthorized=True)[0] is State.DEFERRED


@pytest.mark.parametrize(
    ("reply", "unauthorized"),
    [
        ("Error: host.example[192.0.2.1] is not authorized to use this service", True),
        ("client not allowed", True),
        ("5.1.0 Mail system is not configured to accept that recipient", True),
        ("You are not allowed to use this mail server.", True),
        ("sorry, no mailbox here by that name (#5.1.1)", False),
        ("Error: message too large", False),
        ("sender not authorized to post to this list", False),
    ],
)
def test_which_rejections_are_about_this_relay(reply: str, unauthorized: bool) -> None:
    assert bool(unauthorized_pattern(load(WorkerSettings)).search(reply)) is unauthorized


@pytest.mark.parametrize(
    ("reply", "about_one"),
    [
        ("sorry, no mailbox here by that name (#5.1.1)", True),
        ("550 5.1.10 Null MX", True),
        ("5.1.1. No such user", True),
        ("go away (#5.7.1)", False),
        ("no mail from [192.5.1.10]", False),
        ("no mail from [5.1.2.3]", False),
        ("refused by filter-5.1.2b", False),
    ],
)
def test_which_rejections_may_be_about_one_recipient(reply: str, about_one: bool) -> None:
    assert bool(ABOUT_AN_ADDRESS.search(reply.encode())) is about_one


def test_without_patterns_no_rejection_is_about_this_relay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_UNAUTHORIZED_REPLIES", ";")
    assert not unauthorized_pattern(load(WorkerSettings)).search("client not allowed")
