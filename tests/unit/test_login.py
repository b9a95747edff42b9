"""A login: which senders its user may have, and how many messages it may send."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reception.envelope import Refused
from reception.login import EventWindow, Login
from relay.users import Role, User

ANN = User("ann", Role.SENDER, ("*",), None, datetime.now(UTC), None, None, "a hash")


def refusal(login: Login, sender: str) -> str | None:
    try:
        login.begin_message(sender)
    except Refused as refused:
        return str(refused)
    return None


@pytest.mark.parametrize(
    ("patterns", "sender", "allowed"),
    [
        (["*"], "a@b", True),
        (["*"], "a b@c@d", True),
        (["*@example.org"], "ann@example.org", True),
        (["*@example.org"], "Ann@Example.ORG", True),
        (["*@example.org"], "a@b@example.org", True),
        (["*@example.org"], "ann@sub.example.org", False),
        (["*@example.org"], "ann@example.org.test", False),
        (["*@example.org"], "ann@notexample.org", False),
        (["*@*.example.org"], "ann@sub.example.org", True),
        (["ann@example.org"], "ann@example.org", True),
        (["ann@example.org"], "ann+news@example.org", False),
        (["ann+*@example.org"], "ann+news@example.org", True),
        (["ann@*"], "ann@b@example.org", False),
        (["a.n@example.org"], "axn@example.org", False),
        (["bob@example.org", "*@example.net"], "ann@example.net", True),
        ([], "ann@example.net", False),
    ],
)
def test_a_sender_must_match_a_pattern(patterns: list[str], sender: str, allowed: bool):
    login = Login(replace(ANN, senders=tuple(patterns)))
    assert login.allows(sender) is allowed
    reply = refusal(login, sender)
    assert reply is None if allowed else str(reply).startswith("553 5.7.1")


def test_the_null_sender_is_allowed_to_every_user():
    assert refusal(Login(replace(ANN, senders=("ann@example.org",))), "") is None


def test_messages_beyond_the_limit_are_refused_for_now():
    login = Login(replace(ANN, messages_per_minute=2))
    assert [refusal(login, "a@b") for _ in range(2)] == [None, None]
    assert str(refusal(login, "a@b")).startswith("451 4.7.1")
    login.update(replace(ANN, messages_per_minute=None))
    assert refusal(login, "a@b") is None


def test_a_refused_sender_counts_towards_no_limit():
    login = Login(replace(ANN, messages_per_minute=1, senders=("ann@example.org",)))
    assert str(refusal(login, "bob@example.org")).startswith("553")
    assert refusal(login, "ann@example.org") is None


def test_an_update_keeps_what_was_counted():
    login = Login(replace(ANN, messages_per_minute=1))
    assert refusal(login, "a@b") is None
    login.update(replace(ANN, messages_per_minute=1, senders=("*@b",)))
    assert str(refusal(login, "a@b")).startswith("451")


def test_a_revoked_login_ends_the_session():
    login = Login(ANN)
    login.revoked = True
    assert str(refusal(login, "")).startswith("421 4.7.0")


@given(st.integers(1, 5), st.lists(st.integers(0, 100), max_size=50))
def test_no_minute_has_more_events_than_the_limit(limit: int, gaps: list[int]):
    window, now, counted = EventWindow(limit), 0.0, list[float]()
    for gap in gaps:
        now += gap
        if not window.is_full(now):
            window.add(now)
            counted.append(now)
        assert sum(now - 60 < when for when in counted) <= limit
    assert window.is_over(now + 60)
