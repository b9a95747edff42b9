"""The web server of the pages with clients that do not finish their requests."""

import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from commands.web import app as web
from commands.web import connection
from relay.db import engine as database
from relay.settings import SmtpdSettings, load
from relay.tls import CertificatePair
from tests.certificates import Authority
from tests.waiting import until

TIMEOUT = 1.0


@pytest.fixture
def port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Of a page that is served, on a database without tables."""
    monkeypatch.setattr(connection, "UNFINISHED_TIMEOUT", TIMEOUT)
    engine = database.connect(f"sqlite:///{tmp_path}/empty.db")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = web.server(engine, load(SmtpdSettings))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        until(lambda: server.started)
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(10)
        assert not server.server_state.connections
    engine.dispose()


def test_the_page_is_served_over_tls_with_the_renewed_certificate(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.sign("127.0.0.1").write(tmp_path / "tls")
    settings = load(SmtpdSettings, tls_certificate=certificate, tls_key=key)
    pair = CertificatePair(settings)
    engine = database.connect(f"sqlite:///{tmp_path}/empty.db")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = web.server(engine, settings, pair)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        until(lambda: server.started)
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/style.css"
        served = [_page_certificate(url, authority)]
        authority.sign("127.0.0.1").write(tmp_path / "tls")
        pair.reload()
        served.append(_page_certificate(url, authority))
        assert served[0] != served[1]
        server.should_exit = True
        thread.join(10)
    engine.dispose()


def _page_certificate(url: str, authority: Authority) -> bytes:
    with urllib.request.urlopen(url, context=authority.client_context()) as answer:
        assert answer.status == 200
    host, port = url.split("/")[2].split(":")
    with (
        socket.create_connection((host, int(port))) as plain,
        authority.client_context().wrap_socket(plain, server_hostname=host) as tls,
    ):
        return tls.getpeercert(binary_form=True) or b""


ANSWERED = b"GET /style.css HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    ("begun", "answer"),
    [
        (b"", b""),
        (b"GET / HT", b""),
        (b"GET /style.css HTTP/1.1\r\nHost: localhost\r\nX: ", b""),
        (
            b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nhalf",
            b"HTTP/1.1 405",
        ),
        (ANSWERED + b"GET / HT", b"HTTP/1.1 200"),
    ],
)
def test_a_request_that_is_not_finished_ends(port: int, begun: bytes, answer: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=4 * TIMEOUT) as client:
        client.sendall(begun)
        server_reply = b""
        while data := client.recv(65536):
            server_reply += data
        assert server_reply.startswith(answer)
        assert bool(server_reply) == bool(answer)


def test_a_hundred_unfinished_requests_do_not_block_the_page_for_long(port: int) -> None:
    with ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.create_connection(("127.0.0.1", port))).sendall(b"GET / HT")

        def status() -> int:
            request = urllib.request.Request(f"http://127.0.0.1:{port}/style.css")
            try:
                with urllib.request.urlopen(request) as answer:
                    return int(answer.status)
            except urllib.error.HTTPError as error:
                with error:
                    return error.code

        assert status() == 503
        until(lambda: status() == 200)


def test_a_visitor_that_comes_again_in_time_keeps_the_connection(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        for _ in range(3):
            client.sendall(ANSWERED)
            server_reply = b""
            while not server_reply.endswith(b"}\n"):
                data = client.recv(65536)
                assert data
                server_reply += data


def ask_for_events(port: int) -> socket.socket:
    """A connection that gets the stream of a live page; its first octets are read."""
    client = socket.create_connection(("127.0.0.1", port), timeout=10)
    client.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return client


def test_streams_end_when_the_server_stops(sqlite_url: str) -> None:
    engine = database.connect(sqlite_url)
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
        server = web.server(engine, load(SmtpdSettings))
        server.config.timeout_graceful_shutdown = 60  # the time that requests get
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        until(lambda: server.started)
        client = stack.enter_context(ask_for_events(listener.getsockname()[1]))
        reply = b""
        while b"data: 1" not in reply:
            reply += client.recv(65536)
        assert b"content-type: text/event-stream" in reply.lower()
        with capture_logs() as logged:
            server.should_exit = True
            thread.join(30)
        assert not thread.is_alive()
        assert logged == []
        while data := client.recv(65536):
            reply += data
        assert reply.endswith(b"0\r\n\r\n"), "the answer is whole"
    engine.dispose()


def test_streams_leave_connections_for_pages(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("commands.web.live.MAX_STREAMS", 2)
    engine = database.connect(sqlite_url)
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
        server = web.server(engine, load(SmtpdSettings))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        until(lambda: server.started)
        port = listener.getsockname()[1]
        first, second = (stack.enter_context(ask_for_events(port)) for _ in range(2))
        assert {first.recv(12), second.recv(12)} == {b"HTTP/1.1 200"}
        third = stack.enter_context(ask_for_events(port))
        assert third.recv(12) == b"HTTP/1.1 503"
        first.close()

        def status() -> bytes:
            with ask_for_events(port) as another:
                return another.recv(12)

        until(lambda: status() == b"HTTP/1.1 200", what="a stream has ended")
        server.should_exit = True
        thread.join(10)
    engine.dispose()
