"""Rate limits: their grammar, their buckets, and the bound of their memory."""

from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from reception import rates as module
from reception.envelope import Refused
from reception.login import Login
from reception.policy import Policy
from reception.rates import MAX_KEYS, RateExceeded, Rates, RateTable
from relay.rate_limits import RateLimit, parse_rate_limit
from relay.settings import SettingsError, SmtpdSettings, load
from relay.users import Role, User
from tests.waiting import SetClock


def limits(text: str) -> tuple[RateLimit, ...]:
    return load(SmtpdSettings, rate_limits=text).rate_limits


def test_limits_are_off_unless_they_are_set() -> None:
    assert limits("") == limits("off") == ()
    assert Policy(load(SmtpdSettings)).rates is None
    assert limits("client-messages=60, user-recipients=5 client-connections=30") == (
        RateLimit("client", "messages", 60),
        RateLimit("user", "recipients", 5),
        RateLimit("client", "connections", 30),
    )


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("messages=60", "'messages=60' is no limit: write client-messages=60"),
        ("client-messages=0", "is no limit"),
        ("client-messages=60/h", "is no limit"),
        ("host-messages=60", "is no limit"),
        ("client-bytes=60", "is no limit"),
        ("sender-connections=60", "a connection has a client and no sender yet"),
        ("client-messages=60 client-messages=6", "client-messages=60 is not the only limit"),
    ],
)
def test_nonsense_names_itself(text: str, named: str) -> None:
    with pytest.raises(SettingsError, match=f"RELAY_RATE_LIMITS.*{named}"):
        limits(text)


@given(st.text())
def test_any_text_is_a_limit_that_is_written_so_or_an_error(text: str) -> None:
    try:
        limit = parse_rate_limit(text)
    except ValueError:
        return
    assert str(limit) == text


def refused(rates: Rates, what: str = "messages", **subjects: str) -> str:
    """The refusal, or ''."""
    try:
        rates.take(what, subjects)
    except Refused as error:
        return str(error)
    return ""


@pytest.mark.parametrize("number", [1, 2, 7, 60, 1000, 9999])
def test_a_bucket_has_a_minute_of_tokens_and_fills_evenly(number: int) -> None:
    clock = SetClock()
    rates = Rates([RateLimit("client", "messages", number)], clock)
    for _ in range(number):
        assert refused(rates, client="192.0.2.1") == ""
    assert refused(rates, client="192.0.2.1").startswith("451 4.7.1 Too many messages a minute")
    assert refused(rates, client="192.0.2.2") == "", "another client has its own"
    clock.now += 60 / number * 1.01
    assert refused(rates, client="192.0.2.1") == ""
    assert refused(rates, client="192.0.2.1") != ""
    clock.now += 3600
    assert [refused(rates, client="192.0.2.1") for _ in range(number)] == [""] * number
    assert refused(rates, client="192.0.2.1") != ""


def test_all_limits_of_a_message_must_have_a_token_and_a_refusal_takes_none() -> None:
    clock = SetClock()
    rates = Rates([RateLimit("client", "messages", 3), RateLimit("sender", "messages", 1)], clock)
    assert refused(rates, client="c", sender="a@x") == ""
    for _ in range(5):
        assert "from this sender" in refused(rates, client="c", sender="A@X")
    assert refused(rates, client="c", sender="b@x") == ""
    assert refused(rates, client="c", sender="c@x") == ""
    assert "from your address" in refused(rates, client="c", sender="d@x")


def test_the_null_sender_and_a_client_without_a_user_have_no_such_limits() -> None:
    rates = Rates([RateLimit("sender", "messages", 1), RateLimit("user", "messages", 1)])
    for _ in range(3):
        assert refused(rates, client="c", sender="") == ""
    assert refused(rates, user="ann") == ""
    assert "by this user" in refused(rates, user="ann")
    assert refused(rates, what="recipients", user="ann") == ""


@pytest.fixture
def few_keys(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    monkeypatch.setattr(module, "MAX_KEYS", 100)
    return lambda: module.MAX_KEYS


def test_memory_is_bounded_and_full_buckets_are_forgotten(few_keys: Callable[[], int]) -> None:
    clock = SetClock()
    table = RateTable(RateLimit("sender", "messages", 2), clock)
    for number in range(10 * few_keys()):
        table.take(f"{number}@x")
    assert len(table) == few_keys()
    newest = f"{10 * few_keys() - 1}@x"
    table.take(newest)
    assert not table.has_token(newest), "the newest are kept"
    clock.now += 61
    for number in range(few_keys()):
        table.take(f"late{number}@x")
    assert len(table) <= few_keys()
    clock.now += 61
    table.take("last@x")
    table.take("last@x")
    assert len(table) < few_keys()
    assert MAX_KEYS <= 1 << 14


def test_refusals_are_counted_and_told_with_whose_they_are() -> None:
    policy = Policy(load(SmtpdSettings, rate_limits="sender-messages=1"))
    told: list[RateExceeded] = []
    policy.on_rate_exceeded = told.append
    before = refused_messages()
    client = policy.client("192.0.2.1")
    client.check_rate("messages", "a@x")
    user = User("ann", Role.SENDER, ("*",), 1, datetime.now(UTC), None, None)
    logged_in = client.as_user(Login(user))
    logged_in.check_sender("b@x", 0)
    for _ in range(2):
        with pytest.raises(RateExceeded):
            client.check_rate("messages", "a@x")
    with pytest.raises(RateExceeded, match=r"451 4\.7\.1 Too many messages a minute by this user"):
        logged_in.check_sender("b@x", 0)
    assert [(one.subject, one.what, one.name) for one in told] == [
        ("sender", "messages", "a@x"),
        ("sender", "messages", "a@x"),
        ("user", "messages", "ann"),
    ]
    assert refused_messages() == [before[0] + 2, before[1] + 1]


def refused_messages() -> list[float]:
    """The messages refused by the rates of senders, and by those of users."""
    return [
        REGISTRY.get_sample_value(
            "relay_rate_limited_total", {"subject": subject, "what": "messages"}
        )
        or 0.0
        for subject in ("sender", "user")
    ]


def test_a_policy_counts_clients_by_their_network() -> None:
    policy = Policy(load(SmtpdSettings, rate_limits="client-recipients=1 client-connections=1"))
    policy.client("2001:db8::1").check_rate("recipients", "a@x")
    with pytest.raises(Refused, match=r"451 4\.7\.1 Too many recipients a minute"):
        policy.client("2001:db8::2").check_rate("recipients", "b@x")
    policy.client("2001:db8:0:1::1").check_rate("recipients", "a@x")
    policy.client("2001:db8::1").check_rate("connections")
