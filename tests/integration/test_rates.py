"""Rate limits and crowded servers over real connections."""

from collections.abc import Callable
from contextlib import ExitStack

import pytest

from reception import server as module
from smtpd.server import SmtpConnection
from tests.integration.test_smtpd import RawClient, SmtpHarness, run, talking
from tests.waiting import until

__all__ = ["run"]  # a fixture

TRUSTED, STRANGER = "127.0.0.1", "127.0.0.2"


def greet(client: RawClient) -> None:
    client.expect(b"220")
    client.say(b"EHLO client.example", b"250")


def test_past_a_limit_451_and_the_session_goes_on(run: Callable[..., SmtpHarness]) -> None:
    running = run(rate_limits="client-messages=2 sender-recipients=3")
    with talking(running) as client:
        greet(client)
        for sender in (b"a@example.com", b"b@example.com"):
            client.say(b"MAIL FROM:<%b>" % sender, b"250")
            client.say(b"RSET", b"250")
        client.say(b"MAIL FROM:<c@example.com>", b"451 4.7.1 Too many messages a minute")
    with talking(running, STRANGER) as client:
        greet(client)
        client.say(b"MAIL FROM:<a@example.com>", b"250")
    running = run(rate_limits="sender-recipients=3")
    with talking(running) as client:
        greet(client)
        client.say(b"MAIL FROM:<a@example.com>", b"250")
        for number in range(3):
            client.say(b"RCPT TO:<%d@example.org>" % number, b"250")
        client.say(b"RCPT TO:<0@example.org>", b"250")
        client.say(b"RCPT TO:<4@example.org>", b"451 4.7.1 Too many recipients a minute")
        client.say(b"DATA", b"354")
        client.say(b".", b"250 2.0.0")
    [message] = running.messages(1)
    assert len(message.recipients) == 3


def test_connections_a_minute_are_limited(run: Callable[..., SmtpHarness]) -> None:
    running = run(rate_limits="client-connections=2")
    for _ in range(2):
        with talking(running) as client:
            client.expect(b"220")
            client.say(b"QUIT", b"221")
    with talking(running) as client:
        client.expect(b"421 4.7.1 Too many connections a minute from your address")
        assert client.closed()
    with talking(running, STRANGER) as client:
        client.expect(b"220")


def test_errors_slow_an_untrusted_client_down(
    run: Callable[..., SmtpHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = run(client_networks=())
    pauses: list[float] = []
    monkeypatch.setattr(SmtpConnection, "_schedule", lambda _self, s: pauses.append(s))
    with talking(running) as client:
        client.expect(b"220")
        client.send(b"FOO\r\n" * 12)
        client.expect(*[b"500"] * 11)
        until(lambda: pauses)
    assert pauses == [1.0]


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_TIME", 0.0)
    monkeypatch.setattr(module, "SEARCH_INTERVAL", 0.0)


@pytest.mark.usefixtures("no_patience")
def test_the_oldest_idle_session_is_closed_for_a_new_one(
    run: Callable[..., SmtpHarness],
) -> None:
    running = run(max_connections=3)
    with ExitStack() as stack:
        busy, idle, later = (stack.enter_context(talking(running)) for _ in range(3))
        for client in (busy, idle, later):
            greet(client)
        busy.say(b"MAIL FROM:<a@example.com>", b"250")
        later.say(b"NOOP", b"250")
        for closed in (idle, later):
            stack.enter_context(talking(running)).expect(b"220")
            closed.expect(b"421 4.3.2 Too many connections, closing this one")
            assert closed.closed()
        busy.send(b"RCPT TO:<b@example.org>\r\nDATA\r\n.\r\n")
        busy.expect(b"250", b"354", b"250 2.0.0")
    until(lambda: not running.server.connections and not running.server.clients)
    assert (running.server.admitted, running.server.untrusted) == (0, 0)


@pytest.mark.usefixtures("no_patience")
def test_a_stranger_does_not_displace_a_trusted_client(run: Callable[..., SmtpHarness]) -> None:
    running = run(max_connections=4, client_networks=(TRUSTED,))
    with ExitStack() as stack:
        trusted = [stack.enter_context(talking(running)) for _ in range(4)]
        for client in trusted:
            greet(client)
        stack.enter_context(talking(running, STRANGER)).expect(b"421 4.3.2 Too many connections,")
        stack.enter_context(talking(running)).expect(b"220")
        trusted[0].expect(b"421 4.3.2")


def test_a_session_that_was_active_just_now_is_not_closed(
    run: Callable[..., SmtpHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SEARCH_INTERVAL", 1e6)
    running = run(max_connections=1)
    with talking(running) as first:
        greet(first)
        for idle_time in (module.IDLE_TIME, 0.0):  # the second time a search would find it
            monkeypatch.setattr(module, "IDLE_TIME", idle_time)
            with talking(running) as second:
                second.expect(b"421 4.3.2 Too many connections, try again later")
        first.say(b"NOOP", b"250")


@pytest.mark.usefixtures("no_patience")
def test_a_transaction_is_never_closed_for_a_new_connection(
    run: Callable[..., SmtpHarness],
) -> None:
    running = run(max_connections=1)
    with talking(running) as first:
        greet(first)
        first.say(b"MAIL FROM:<a@example.com>", b"250")
        with talking(running) as second:
            second.expect(b"421 4.3.2")
        first.say(b"RSET", b"250")
