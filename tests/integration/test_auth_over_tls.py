"""AUTH and TLS together: where AUTH is offered, and what STARTTLS and certificates change."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from relay.listeners import Listener
from tests.certificates import Authority
from tests.integration.front_end import body_of
from tests.integration.test_authentication import RIGHT
from tests.integration.test_smtpd import SmtpHarness, talking
from tests.integration.test_smtpd_auth import PLAIN, run
from tests.integration.test_tls import authority, pair, speaking_tls

__all__ = ["authority", "pair", "run"]  # fixtures


@pytest.fixture
def serve(run: Callable[..., SmtpHarness], pair: tuple[Path, Path]) -> Callable[..., SmtpHarness]:
    certificate, key = pair
    return functools.partial(
        run, auth_plaintext_networks=(), tls_certificate=certificate, tls_key=key
    )


@pytest.mark.parametrize("implicit", [False, True])
def test_auth_is_offered_after_tls_only(
    serve: Callable[..., SmtpHarness], authority: Authority, implicit: bool
) -> None:
    running = serve(listener=Listener("127.0.0.1", 0, tls=implicit, auth=True))
    if not implicit:
        with talking(running) as client:
            client.expect(b"220")
            client.send(b"EHLO client.example\r\n")
            assert b"AUTH" not in client.reply()
            client.say(PLAIN, b"538 5.7.11")
    with speaking_tls(running, authority.client_context()) as client:
        if implicit:
            client.expect(b"220")
        client.send(b"EHLO client.example\r\n")
        assert b"250-AUTH PLAIN LOGIN\r\n" in client.reply()
        client.say(b"MAIL FROM:<a@example.com>", b"530 5.7.0")
        client.say(PLAIN, b"235")
        client.send(b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.org>\r\nDATA\r\n")
        client.expect(b"250", b"250", b"354")
        client.say(b"Subject: x\r\n\r\nbody\r\n.", b"250 2.0.0 Ok: queued")
    [message] = running.messages(1)
    assert (message.protocol, message.auth_user) == ("ESMTPSA", "ann")
    assert message.tls
    assert b"with ESMTPSA id " in body_of(running, message)


def test_starttls_forgets_a_login(serve: Callable[..., SmtpHarness], authority: Authority) -> None:
    running = serve(auth_plaintext_networks=("127.0.0.1",))
    with talking(running) as client:
        client.expect(b"220")
        client.say(b"EHLO client.example", b"250")
        client.say(PLAIN, b"235")
        client.say(b"STARTTLS", b"220 2.0.0")
        client.socket = authority.client_context().wrap_socket(
            client.socket, server_hostname="localhost"
        )
        client.say(b"EHLO client.example", b"250")
        client.say(b"MAIL FROM:<a@example.com>", b"250")
        client.say(b"RCPT TO:<b@example.org>", b"554 5.7.1")
        client.say(b"RSET", b"250")
        client.say(PLAIN, b"235")
    assert RIGHT not in str(running.database.messages)
