"""smtpd behind a PROXY header, on both event loops, with and without TLS."""

import asyncio
import functools
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop
from prometheus_client import REGISTRY

from reception import proxy
from reception.proxy_header import SIGNATURE
from relay.listeners import Listener
from relay.settings import SettingsError, SmtpdSettings, load
from tests.certificates import Authority
from tests.integration.front_end import body_of
from tests.integration.test_smtpd import SmtpHarness, run, talking
from tests.waiting import until

__all__ = ["run"]  # a fixture

PROXIED = Listener("127.0.0.1", 0, proxy=True)
LOOPS = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}
V1 = b"PROXY TCP4 192.0.2.1 198.51.100.1 40000 25\r\n"
V2 = SIGNATURE + struct.pack("!BBH", 0x21, 0x11, 12 + 6) + bytes(
    [192, 0, 2, 1, 198, 51, 100, 1, 1, 1, 0, 25]
) + b"\x04\0\3abc"  # fmt: skip
V6 = b"PROXY TCP6 2001:db8::1 2001:db8::2 40000 25\r\n"
LOCAL = SIGNATURE + b"\x20\0\0\0"


@pytest.fixture(params=LOOPS)
def serve(
    request: pytest.FixtureRequest, run: Callable[..., SmtpHarness]
) -> Callable[..., SmtpHarness]:
    """Runs a server behind a proxy, on each event loop."""
    return functools.partial(
        run, new_loop=LOOPS[request.param], listener=PROXIED, proxy_networks="127.0.0.1"
    )


def refusals() -> float:
    return REGISTRY.get_sample_value("relay_proxy_refusals_total") or 0.0


@pytest.mark.parametrize(
    ("header", "address", "literal"),
    [
        (V1, "192.0.2.1", b"[192.0.2.1]"),
        (V2, "192.0.2.1", b"[192.0.2.1]"),
        (V6, "2001:db8::1", b"[IPv6:2001:db8::1]"),
        (LOCAL, "127.0.0.1", b"[127.0.0.1]"),
        (b"PROXY UNKNOWN\r\n", "127.0.0.1", b"[127.0.0.1]"),
    ],
    ids=["v1", "v2", "v6", "local", "unknown"],
)
@pytest.mark.parametrize("octets", [1, 1000])
def test_policy_limits_row_and_trace_field_have_the_inner_address(
    serve: Callable[..., SmtpHarness], header: bytes, address: str, literal: bytes, octets: int
) -> None:
    running = serve(client_networks=(address,), max_connections_per_client=1)
    with talking(running) as client:
        for at in range(0, len(header), octets):
            client.send(header[at : at + octets])
        client.begin()
        assert running.server.clients == {running.policy.client(address).network: 1}
        client.say(b"body\r\n.", b"250 2.0.0")
        with talking(running) as second:
            second.send(header)
            second.expect(b"421 4.7.0 Too many connections from your address")
    [message] = running.messages(1)
    assert (message.client_address, message.client_trusted) == (address, True)
    trace = body_of(running, message).split(b"\n")[0]
    assert trace == b"Received: from client.example (%b)" % literal


def test_a_client_that_the_proxy_names_is_no_trusted_proxy(
    serve: Callable[..., SmtpHarness],
) -> None:
    running = serve()
    with talking(running) as client:
        client.send(V1)
        client.expect(b"220")
        client.say(b"EHLO client.example", b"250")
        client.say(b"MAIL FROM:<a@example.com>", b"250")
        client.say(b"RCPT TO:<b@example.org>", b"554 5.7.1")


def test_octets_behind_the_header_came_before_the_banner(
    serve: Callable[..., SmtpHarness],
) -> None:
    running = serve()
    with talking(running) as client:
        client.send(V1 + b"EHLO client.example\r\n")
        client.expect(b"554 5.5.0 The client must wait")
        assert client.closed()


def test_a_second_header_is_a_command(serve: Callable[..., SmtpHarness]) -> None:
    with talking(serve()) as client:
        client.send(V1)
        client.expect(b"220")
        client.say(V1.strip(), b"500 5.5.2 Command not recognized")


def test_without_the_option_a_header_is_a_command(run: Callable[..., SmtpHarness]) -> None:
    with talking(run()) as client:
        client.expect(b"220")
        client.say(V1.strip(), b"500 5.5.2 Command not recognized")


@pytest.mark.parametrize("sent", [b"EHLO client.example\r\n", b"PROXY TCP4 x\r\n", b"\x16\x03\x01"])
def test_anything_but_a_header_closes_without_a_reply(
    serve: Callable[..., SmtpHarness], sent: bytes
) -> None:
    running, before = serve(), refusals()
    with talking(running) as client:
        client.send(sent)
        assert client.closed()
    assert refusals() == before + 1


def test_a_peer_that_is_no_proxy_is_closed(serve: Callable[..., SmtpHarness]) -> None:
    running, before = serve(), refusals()
    with talking(running, "127.0.0.2") as client:
        assert client.closed()
    assert refusals() == before + 1
    assert not running.server.connections


@pytest.mark.parametrize("sent", [b"", V1[:20], V2[:20]])
def test_a_header_has_a_time_limit(
    serve: Callable[..., SmtpHarness], monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    assert proxy.HEADER_TIMEOUT == 5.0
    monkeypatch.setattr(proxy, "HEADER_TIMEOUT", 0.1)
    running, before = serve(), refusals()
    with talking(running) as client:
        client.send(sent)
        assert client.closed()
    assert refusals() == before + 1


def test_the_time_limit_ends_with_the_header(
    serve: Callable[..., SmtpHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "HEADER_TIMEOUT", 0.1)
    running = serve()
    with talking(running) as client, talking(running) as silent:
        client.send(V1)
        client.expect(b"220")
        assert silent.closed()  # the time has passed
        client.say(b"NOOP", b"250")
    until(lambda: not running.server.connections)


@pytest.mark.parametrize("header", [V1, V2], ids=["v1", "v2"])
def test_the_header_comes_before_tls(
    serve: Callable[..., SmtpHarness], tmp_path: Path, header: bytes
) -> None:
    """The client's first flight may come in one segment with the header."""
    authority = Authority(tmp_path)
    certificate, key = authority.sign("localhost").write(tmp_path / "tls")
    running = serve(
        listener=Listener("127.0.0.1", 0, tls=True, proxy=True),
        client_networks="192.0.2.1",
        tls_certificate=certificate,
        tls_key=key,
    )
    with talking(running) as client:
        client.send(header)
        client.socket = authority.client_context().wrap_socket(
            client.socket, server_hostname="localhost"
        )
        client.begin()
        client.say(b"body\r\n.", b"250 2.0.0")
    [message] = running.messages(1)
    assert (message.protocol, message.client_address) == ("ESMTPS", "192.0.2.1")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"smtp_listen": ":25/proxy"}, ":25/proxy closes every connection: name the proxies in"),
        ({"proxy_networks": "connected"}, "'connected' names no proxy: write its address"),
        ({"proxy_networks": "10.0.0.1/8"}, "is an address within a network"),
        ({"proxy_networks": "10.0.0.9 0.0.0.0/0"}, "every peer could claim any address"),
        ({"proxy_networks": "::/0"}, "every peer could claim any address"),
    ],
)
def test_settings_of_proxies_are_complete(values: dict[str, str], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        load(SmtpdSettings, **values)
