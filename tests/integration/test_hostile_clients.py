"""Clients that go away, or send nonsense, in every phase of a connection: nothing of them is left.

A phase is how far a client has come, an end is what it does then. Afterwards no connection, no
claim of space, no descriptor and no body may be left, and the server takes mail as before.
"""

import socket
import ssl
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from relay.listeners import Listener
from tests.certificates import Authority
from tests.integration.test_smtpd import RawClient, SmtpHarness
from tests.integration.test_smtpd_auth import PLAIN, run
from tests.integration.test_tls import authority, pair
from tests.waiting import until

__all__ = ["authority", "pair", "run"]  # fixtures

ENVELOPE = b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.org>\r\nDATA\r\n"


def connected(client: RawClient) -> None:
    pass


def greeted(client: RawClient) -> None:
    client.expect(b"220")


def half_a_command(client: RawClient) -> None:
    greeted(client)
    client.send(b"EHLO clie")


def idle(client: RawClient) -> None:
    greeted(client)
    client.say(b"EHLO client.example", b"250")


def starttls(client: RawClient) -> None:
    idle(client)
    client.say(b"STARTTLS", b"220")


def half_a_handshake(client: RawClient) -> None:
    starttls(client)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    handshake = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="x")
    with pytest.raises(ssl.SSLWantReadError):
        handshake.do_handshake()
    client.send(outgoing.read()[:100])


def in_auth(client: RawClient) -> None:
    idle(client)
    client.say(b"AUTH PLAIN", b"334")


def waiting_for_a_verdict(client: RawClient) -> None:
    idle(client)
    client.send(b"AUTH PLAIN AGFubgB3cm9uZyBob3JzZQ==\r\nNOOP\r\n")


def logged_in(client: RawClient) -> None:
    idle(client)
    client.say(PLAIN, b"235")


def in_content(client: RawClient) -> None:
    logged_in(client)
    client.send(ENVELOPE)
    client.expect(b"250", b"250", b"354")
    client.send(b"Subject: x\r\n\r\nhalf a li")


def in_large_content(client: RawClient) -> None:
    in_content(client)
    client.send(b"\r\n" + b"x" * 98 + b"\r\n" * 3000)


def not_reading(client: RawClient) -> None:
    logged_in(client)
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.send(b"HELP\r\n" * 4000)


PHASES = (
    connected, greeted, half_a_command, idle, starttls, half_a_handshake, in_auth,
    waiting_for_a_verdict, logged_in, in_content, in_large_content, not_reading,
)  # fmt: skip


def close(client: RawClient) -> None:
    client.close()


def reset(client: RawClient) -> None:
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def close_one_side(client: RawClient) -> None:
    client.socket.shutdown(socket.SHUT_WR)
    read_to_the_end(client)


def garbage(client: RawClient) -> None:
    try:
        client.send(bytes(range(256)) * 400 + b"\r\n.\r\n" * 50 + b"\x16\x03\x01\r\n" * 50)
        client.socket.shutdown(socket.SHUT_WR)
    except OSError:  # it was closed already
        pass
    read_to_the_end(client)


def read_to_the_end(client: RawClient) -> None:
    # With the small window of `not_reading`, reading would take seconds.
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    try:
        while client.socket.recv(65536):
            pass
    except ConnectionResetError:
        pass
    client.close()


def descriptors() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


@pytest.mark.parametrize("end", [close, reset, close_one_side, garbage])
def test_a_client_that_goes_leaves_nothing_in_any_phase(
    run: Callable[..., SmtpHarness],
    pair: tuple[Path, Path],
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
    end: Callable[[RawClient], None],
) -> None:
    monkeypatch.setattr("smtpd.session.TARPIT", 0.0)
    running = run(
        tls_certificate=pair[0],
        tls_key=pair[1],
        recipient_domains=("example.org",),
        listener=Listener("127.0.0.1", 0),
    )
    server, space = running.server, running.policy.space
    warm_up = running.client()
    logged_in(warm_up)
    warm_up.close()
    until(lambda: not server.connections)
    before = descriptors()
    for reach in PHASES:
        client = running.client()
        reach(client)
        end(client)
        until(lambda: not server.connections, 20, what=f"{reach.__name__} has ended")
        assert (server.admitted, server.untrusted, dict(server.clients)) == (0, 0, {})
        until(lambda: (space.claimed, space.untrusted) == (0, 0))
        running.server.loop.call_soon_threadsafe(server.authenticator.failing.clear)
    until(lambda: descriptors() <= before, what=lambda: f"{descriptors()} of {before} descriptors")
    assert not running.database.messages
    assert not [file for file in running.spool.directory.rglob("*") if len(file.name) == 32]
    client = running.client()
    in_content(client)
    client.say(b"ne\r\n.", b"250 2.0.0")
    client.close()
    [message] = running.messages(1)
    assert message.auth_user == "ann"
