"""AUTH over real TCP: what a login changes for a connection, and connections that end early."""

import smtplib
from base64 import b64encode
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from relay.db.engine import connect
from relay.listeners import Listener
from relay.spool.store import Spool
from relay.users import Users
from smtpd.session import AUTH_FAILURES
from tests.integration.front_end import body_of, starting
from tests.integration.test_authentication import HASH, RIGHT, measured
from tests.integration.test_smtpd import RawClient, SmtpHarness, smtp_door, talking
from tests.waiting import until

PLAIN = b"AUTH PLAIN " + b64encode(b"\0ann\0" + RIGHT.encode())
WRONG = b"AUTH PLAIN " + b64encode(b"\0ann\0wrong horse")
SETTINGS: dict[str, Any] = {"client_networks": (), "auth_plaintext_networks": ("127.0.0.1",)}

type Start = Callable[..., SmtpHarness]


@pytest.fixture
def run(spool: Spool, clean_url: str) -> Iterator[Start]:
    """A server whose database has the user ann, who may send from example.com."""
    engine = connect(clean_url)
    Users(engine).add("ann", HASH, senders=["*@example.com"], actor="test")
    engine.dispose()
    usual = {"database_url": clean_url, "failure_delay": 0.0, **SETTINGS}
    with starting(SmtpHarness, smtp_door, spool, **usual) as start:
        yield start


def greet(client: RawClient, *lines: bytes) -> None:
    client.expect(b"220")
    client.say(b"EHLO client.example", b"250")
    for line in lines:
        client.send(line + b"\r\n")


def test_a_login_relays_and_is_recorded(run: Start) -> None:
    running = run()
    with (
        capture_logs() as logs,
        smtplib.SMTP(running.host, running.port, local_hostname="client.example") as client,
    ):
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            client.sendmail("a@example.com", "b@example.org", b"\r\n")
        assert client.login("ann", RIGHT)[0] == 235
        client.sendmail("a@example.com", "b@example.org", b"Subject: x\r\n\r\n")
        with pytest.raises(smtplib.SMTPSenderRefused, match=r"5\.7\.1"):
            client.sendmail("a@elsewhere.example", "b@example.org", b"\r\n")
    [message] = running.messages(1)
    assert (message.auth_user, message.protocol, message.client_trusted) == ("ann", "ESMTPA", True)
    assert b" with ESMTPA id " in body_of(running, message)
    [accepted] = [entry for entry in logs if entry["event"] == "accepted"]
    assert accepted["user"] == "ann"
    assert RIGHT not in str(logs)
    until(lambda: not running.server.connections, what="the connection is gone")
    assert running.server.untrusted == 0, "it was counted as it came, and is taken away so"


def test_a_message_without_a_login_names_no_user(run: Start) -> None:
    running = run(recipient_domains=("example.org",))
    with talking(running) as client, capture_logs() as logs:
        client.begin()
        client.send(b".\r\n")
        client.expect(b"250")
    [message] = running.messages(1)
    assert (message.auth_user, message.protocol) == (None, "ESMTP")
    assert [entry for entry in logs if "user" in entry] == []


def test_messages_of_a_user_are_limited_by_the_rates(run: Start) -> None:
    running = run(rate_limits="user-messages=1")
    for replies in ((b"250",), (b"451 4.7.1 Too many messages a minute by this user",)):
        with talking(running) as client:
            greet(client, PLAIN)
            client.expect(b"235")
            client.say(b"MAIL FROM:<a@example.com>", *replies)


def test_auth_is_offered_in_the_networks_of_the_setting_only(run: Start) -> None:
    running = run(auth_plaintext_networks=("127.0.0.2",))
    for source, offered in (("127.0.0.1", False), ("127.0.0.2", True)):
        with talking(running, source) as client:
            client.expect(b"220")
            client.send(b"EHLO client.example\r\n")
            assert (b"250-AUTH PLAIN LOGIN\r\n" in client.reply()) is offered
            client.say(PLAIN, b"235" if offered else b"538 5.7.11")


def test_commands_behind_credentials_wait_for_the_verdict(run: Start) -> None:
    running = run()
    with talking(running) as client:
        greet(client, PLAIN, b"MAIL FROM:<a@example.com>", b"RCPT TO:<b@example.org>")
        client.expect(b"235", b"250 2.1.0", b"250 2.1.5")


def test_a_flood_behind_credentials_is_not_read(run: Start) -> None:
    running = run(failure_delay=3600.0)
    with talking(running) as client:
        greet(client, WRONG)
        client.socket.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.send(b"NOOP\r\n" * 10_000_000)
        [connection] = running.server.connections
        until(lambda: connection.reading_paused, what="reading is paused")


def test_the_third_failure_closes_the_connection(run: Start) -> None:
    running = run()
    with talking(running) as client:
        greet(client)
        for _ in range(AUTH_FAILURES):
            client.say(WRONG, b"535 5.7.8")
        client.expect(b"421 4.7.0")
        assert client.closed()


def test_a_client_that_goes_while_it_waits_changes_nothing(run: Start) -> None:
    running = run(failure_delay=0.2)
    before = measured("authentications", result="failed")
    with talking(running) as client:
        greet(client, WRONG)
    until(lambda: not running.server.connections, what="the connection is gone")
    until(lambda: measured("authentications", result="failed") > before)
    with talking(running) as client:
        greet(client)
        client.say(PLAIN, b"235")


def test_the_wait_for_a_verdict_is_not_the_silence_of_the_client(run: Start) -> None:
    running = run(failure_delay=3.0, smtp_timeout=1.5)
    with talking(running) as client:
        greet(client, WRONG)
        client.expect(b"535", b"421 4.4.2 Timeout")


def test_a_server_that_stops_does_not_wait_for_a_verdict(run: Start) -> None:
    running = run(failure_delay=3600.0)
    with talking(running) as client:
        greet(client, WRONG)
        until(lambda: running.server.authenticator.failing, what="it was verified")
        running.ask_to_stop(drain=3600.0)
        client.expect(b"421 4.3.2")
        assert client.closed()


def test_nobody_sends_where_auth_is_required(run: Start) -> None:
    running = run(client_networks=("127.0.0.1",), listener=Listener("127.0.0.1", 0, auth=True))
    with talking(running) as client:
        greet(client)
        client.say(b"MAIL FROM:<a@example.com>", b"530 5.7.0")
        client.say(PLAIN, b"235")
        client.say(b"MAIL FROM:<a@example.com>", b"250")


def test_an_address_that_failed_too_often_is_closed(run: Start) -> None:
    running = run()
    for _ in range(3):
        with talking(running) as client:
            greet(client)
            for _ in range(AUTH_FAILURES):
                client.say(WRONG, b"535")
    with talking(running) as client:
        greet(client)
        client.say(WRONG, b"535")
        client.say(PLAIN, b"421 4.7.0")
        assert client.closed()
    with talking(running, "127.0.0.3") as client:
        greet(client)
        client.say(PLAIN, b"538")
