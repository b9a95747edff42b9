"""The results of a probe: of the sink with its presets, of a real Postfix, and of other servers."""

import asyncio
import json
import socket
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from commands.cli.main import app_for
from qmqp import probe as module
from qmqp.probe import ProbeResult, probe
from qmqp.sink import Answer, Preset, Rule, running_sink
from tests.postfix import Postfix
from tests.waiting import until


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for a late refusal: the servers here refuse at once."""
    monkeypatch.setattr(module, "REFUSAL_DELAY", 0.1)


def ask(port: int = 0, path: str | None = None, reply: float = 5.0) -> ProbeResult:
    return asyncio.run(probe(host="127.0.0.1", port=port, path=path, connect=5.0, reply=reply))


def typed(*arguments: str) -> Result:
    done = CliRunner().invoke(app_for(["probe"]), ["probe", *arguments])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


@contextmanager
def speaking(
    first: bytes, *, then: bytes | None = None, close: bool = False
) -> Iterator[tuple[int, list[bytes]]]:
    """A server that sends `first` to each client, and `then` after each read; its port, and the
    bytes that it read."""
    server_reply: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(10)
                connection.sendall(first)
                try:
                    while not close and (data := connection.recv(100)):
                        server_reply.append(data)
                        if then is not None:
                            connection.sendall(then)
                except OSError:
                    server_reply.append(b"reset")

        server = threading.Thread(target=serve)
        server.start()
        try:
            yield listener.getsockname()[1], server_reply
        finally:
            server.join(10)


@pytest.mark.parametrize(
    ("preset", "family"), [("strict", "postfix"), ("postfix", "postfix"), ("qmail", "qmail")]
)
def test_the_presets_of_the_sink_are_distinguished(preset: str, family: str) -> None:
    with running_sink(preset=preset) as sink:
        found = ask(sink.port)
        assert (found.reachable, found.allowed, found.family) == (True, True, family), found
        assert sink.wait_for_fault(5)
        assert (sink.count, sink.connections) == (0, 2 if preset == "qmail" else 1), (
            "nothing was delivered"
        )


def test_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "qmqp")
    with running_sink(path=path):
        assert ask(path=path).family == "postfix"


def test_a_z_is_mailfront() -> None:
    with speaking(b"", then=b"14:Zbad netstring,") as (port, _):
        found = ask(port)
    assert (found.allowed, found.family) == (True, "mailfront")


def netstring(text: bytes) -> bytes:
    return b"%d:%b," % (len(text), text)


@contextmanager
def serving(answer: Callable[[bytes], bytes | None]) -> Iterator[int]:
    """A server that passes all bytes so far to `answer`, and closes with its result once that is
    not None; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, suppress(OSError):
                        connection.settimeout(10)
                        server_reply = b""
                        while (said := answer(server_reply)) is None and (
                            data := connection.recv(100)
                        ):
                            server_reply += data
                        connection.sendall(said or b"")

        server = threading.Thread(target=serve)
        server.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            server.join(10)


def qmail_ldap(server_reply: bytes) -> bytes | None:
    """Its saferead, built with QMQP_COMPRESS: a byte that is no digit begins zlib data."""
    try:
        zlib.decompressobj().decompress(server_reply)
    except zlib.error as error:
        return netstring(
            b"ZReceiving compressed data failed: " + str(error).encode() + b" #(4.3.0)"
        )
    return None


def qrelay(server_reply: bytes) -> bytes | None:
    """It closes at a bad length, and parses the message when the netstring is complete."""
    if server_reply and not server_reply[:1].isdigit():
        return b""
    return netstring(b"Dmalformed input") if server_reply.endswith(b",") else None


def mailfront(server_reply: bytes) -> bytes | None:
    return netstring(b"ZInvalid wrapper netstring") if server_reply else None


@pytest.mark.parametrize(
    ("server", "family"),
    [
        (qmail_ldap, "qmail-ldap"),
        (qrelay, "qrelay"),
        (mailfront, "mailfront"),
    ],
)
def test_families_with_replies_of_their_own(
    server: Callable[[bytes], bytes | None], family: str
) -> None:
    with serving(server) as port:
        found = ask(port, reply=0.5)
    assert (found.reachable, found.allowed, found.family) == (True, True, family), found


def test_a_real_qmqpd_that_allows_this_client(postfix: Postfix) -> None:
    found = ask(postfix.port)
    assert (found.reachable, found.allowed, found.family) == (True, True, "postfix"), found
    assert b"netstring format error" in found.said


def test_a_real_qmqpd_that_does_not_allow_this_client(postfix: Postfix) -> None:
    found = ask(postfix.closed_port)
    assert (found.reachable, found.allowed, found.family) == (True, False, "postfix"), found
    assert b"is not authorized to use this service" in found.said


def test_a_real_qmqpd_with_soft_bounce(postfix: Postfix) -> None:
    found = ask(postfix.soft_port)
    assert (found.allowed, found.family) == (True, "postfix"), found
    assert "soft_bounce" in found.words


def test_a_probe_leaves_no_message_in_postfix(postfix: Postfix) -> None:
    queue = postfix.directory / "queue/incoming"
    before = set(queue.iterdir())
    for port in (postfix.port, postfix.closed_port, postfix.soft_port):
        ask(port)
    until(
        lambda: set(queue.iterdir()) <= before
    )  # what it begins and throws away may be there for a moment


def test_a_silent_server_is_of_no_known_family() -> None:
    with speaking(b"") as (port, server_reply):
        found = ask(port, reply=0.2)
    assert (found.reachable, found.allowed, found.family) == (True, None, "other")
    assert "sent nothing" in found.words
    assert b"".join(server_reply).removesuffix(b"reset") == b"x" * 10, (
        "not one byte that could begin a request"
    )


@pytest.mark.parametrize(
    "banner",
    [
        b"220 mx.example.org ESMTP\r\n",
        b"SSH-2.0-OpenSSH_9.2p1\r\n",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"2:hi,",
        b"0:,",
    ],
)
def test_a_server_of_another_protocol(banner: bytes) -> None:
    with speaking(banner) as (port, _):
        found = ask(port, reply=0.5)
    assert (found.reachable, found.allowed, found.family, found.said) == (
        True,
        None,
        "other",
        banner,
    )
    assert "did not send a QMQP reply" in found.words


def test_a_K_to_no_message_is_of_no_known_family() -> None:
    with speaking(b"", then=b"3:KOk,") as (port, _):
        found = ask(port)
    assert (found.allowed, found.family) == (None, "other")
    assert "accepted an invalid request" in found.words


def test_a_server_that_closes_at_once() -> None:
    with speaking(b"", close=True) as (port, _):
        found = ask(port)
    assert (found.reachable, found.allowed, found.family) == (True, None, "other")
    assert "before anything was sent" in found.words, (
        "as tcpserver does to a client that is not allowed"
    )


def test_a_long_reply_is_cut() -> None:
    with speaking(b"y" * 100_000) as (port, _):
        assert len(ask(port, reply=0.5).said) <= 8192


def test_an_unknown_name_is_unreachable() -> None:
    found = asyncio.run(probe(host="nonesuch.invalid", connect=5.0))
    assert (found.reachable, found.family) == (False, "none")
    assert "Unknown error" not in found.words


def test_an_invalid_name_is_unreachable() -> None:
    found = asyncio.run(probe(host="a" * 64 + ".example.com", connect=5.0))
    assert (found.reachable, found.family) == (False, "none")


def test_a_qmail_of_before_2022_takes_any_byte_for_a_digit() -> None:
    """It closes at the tenth byte, when the length that it has read is too large."""
    server_reply = b""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            nonlocal server_reply
            connection, _ = listener.accept()
            with connection:
                while len(server_reply) < 10 and (data := connection.recv(100)):
                    server_reply += data

        server = threading.Thread(target=serve)
        server.start()
        found = ask(listener.getsockname()[1], reply=0.3)
        server.join(10)
    assert (found.allowed, found.family) == (True, "qmail")
    assert server_reply == b"x" * 10


def test_a_port_without_a_listener_is_out_of_reach() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        found = ask(taken.getsockname()[1])
    assert (found.reachable, found.allowed, found.family) == (False, None, "none")
    assert "Connection refused" in found.words


# --- the command
# ------------------------------------------------------------------------------------------


def test_the_command_reports_by_text_and_exit_status(postfix: Postfix) -> None:
    done = typed(f"127.0.0.1:{postfix.port}")
    assert done.exit_code == 0
    assert "postfix" in done.stdout
    refused = typed(f"127.0.0.1:{postfix.closed_port}", "--json")
    assert refused.exit_code == 1
    row = json.loads(refused.stdout)
    assert (row["server"], row["allowed"]) == (f"127.0.0.1:{postfix.closed_port}", False)
    assert "not authorized" in row["said"]


def test_the_command_fails_for_a_missing_server(tmp_path: Path) -> None:
    done = typed(f"unix:{tmp_path}/none", "--json")
    assert done.exit_code == 3
    assert json.loads(done.stdout)["reachable"] is False


def test_the_command_names_an_invalid_server() -> None:
    done = typed("host:port")
    assert done.exit_code == 2
    assert "host:port" in done.output


def test_bytes_of_a_server_are_escaped() -> None:
    with speaking(b"\x1b[31m\xffred\r\n") as (port, _):
        done = typed(f"127.0.0.1:{port}", "--timeout", "0.3")
    assert done.stdout.isascii()
    assert "\x1b" not in done.stdout
    assert done.exit_code == 1


def test_a_late_refusal_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """qmqpd_error_delay: Postfix refuses after a second."""
    monkeypatch.setattr(module, "REFUSAL_DELAY", 1.5)
    with running_sink(
        Rule(Answer(b"D", b"Error: x is not authorized to use this service", at=0, delay=0.5)),
        preset=Preset(),
    ) as sink:
        assert ask(sink.port).allowed is False
