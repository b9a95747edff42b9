"""The client against a sink that misbehaves by rule: every way in which a transfer ends."""

import asyncio
import errno
import itertools
import os
import socket
import threading
import tracemalloc
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from struct import pack
from time import monotonic
from typing import Any
from unittest.mock import patch

import pytest
import uvloop

from qmqp import body as body_module
from qmqp import connection
from qmqp.client import (
    BodyChanged,
    BodyFault,
    BodyFile,
    ClientConnection,
    Result,
    SendOutcome,
    Timeouts,
)
from qmqp.request import Request
from qmqp.sink import Answer, Rule, Sink, running_sink
from relay.queue.outcome import Outcome
from tests.services import free_port

# For what never comes. What comes is waited for by the defaults: a busy machine may take seconds.
QUICK = Timeouts(connect=0.3, io=0.3, reply=0.3, session=5)
SILENCE = Answer(raw=b"", end="stay")
LARGE = 12_000_000  # more than the buffers of both kernels hold

type Run = Callable[[Coroutine[Any, Any, Any]], Any]
type MakeBody = Callable[[bytes | int], BodyFile]


async def send(**options: Any) -> Result:
    """The result of a new connection."""
    return await ClientConnection(**options).run()


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Run a coroutine on an event loop."""
    with asyncio.Runner(loop_factory=request.param) as runner:
        yield runner.run


@pytest.fixture
def body(tmp_path: Path) -> Iterator[MakeBody]:
    """Make an open file that holds some bytes, or as many zeros as a number says."""
    opened: list[int] = []
    names = itertools.count()

    def make(data: bytes | int) -> BodyFile:
        path = tmp_path / f"body-{next(names)}"
        path.write_bytes(data if isinstance(data, bytes) else b"")
        if isinstance(data, int):
            os.truncate(path, data)
        opened.append(os.open(path, os.O_RDONLY))
        return BodyFile(opened[-1], path.stat().st_size)

    yield make
    for fd in opened:
        os.close(fd)


@pytest.fixture
def deliver(run: Run, body: MakeBody) -> Callable[..., Result]:
    """Send a message to a sink; return the result."""

    def deliver(sink: Sink, data: bytes | int = b"hello\n", **options: Any) -> Result:
        size = data if isinstance(data, int) else len(data)
        request = options.pop("request", None) or Request(size, b"s@x.test", [b"r@y.test"])
        result: Result = run(
            send(host="127.0.0.1", port=sink.port, request=request, body=body(data), **options)
        )
        return result

    return deliver


def test_every_outcome_of_a_request_can_be_recorded():
    assert {Outcome(outcome) for outcome in SendOutcome} == set(Outcome) - {Outcome.UNSENDABLE}


# Replies


def test_B1_accepted(deliver):
    with running_sink(Rule(Answer(b"K", b"Ok"))) as sink:
        result = deliver(sink)
        assert sink.wait_for(1, 20)
    assert (result.outcome, result.text, result.committed) == (SendOutcome.DELIVERED, b"Ok", True)
    assert not result.flags
    assert (sink.received[0].sender, sink.received[0].recipients) == (b"s@x.test", (b"r@y.test",))


def test_B2_a_K_without_text(deliver):
    with running_sink(Rule(Answer(raw=b"1:K,"))) as sink:
        assert deliver(sink)[:2] == (SendOutcome.DELIVERED, b"")


@pytest.mark.parametrize("extra", [b"\n", b"26:KOk: queued as 0BB2C21E081,"])
def test_B3_bytes_after_the_reply_are_ignored_and_flagged(deliver, extra):
    with running_sink(Rule(Answer(raw=b"3:KOk," + extra))) as sink:
        result = deliver(sink)
    assert (result.outcome, result.text, result.flags) == (
        SendOutcome.DELIVERED,
        b"Ok",
        {"extra-bytes"},
    )


def test_B4_a_reply_byte_by_byte(deliver):
    with running_sink(Rule(Answer(b"K", b"Ok", drip=0.01))) as sink:
        assert deliver(sink, timeouts=Timeouts(reply=5))[:2] == (SendOutcome.DELIVERED, b"Ok")


def test_B5_a_server_that_keeps_the_connection_open(deliver):
    with running_sink(Rule(Answer(b"K", b"Ok", end="stay"))) as sink:
        assert deliver(sink, timeouts=Timeouts(reply=60)).seconds < 5


@pytest.mark.parametrize(
    ("status", "outcome"), [(b"Z", SendOutcome.DEFERRED), (b"D", SendOutcome.REJECTED)]
)
def test_B6_deferred_and_rejected(deliver, status, outcome):
    with running_sink(Rule(Answer(status, b"not now (#4.3.0)"))) as sink:
        result = deliver(sink)
    assert (result.outcome, result.text, result.committed) == (outcome, b"not now (#4.3.0)", True)


@pytest.mark.parametrize("raw", [b"0:,", b"3:Xab,", b"3:kok,", b"2:\0K,", b"3:KOk;", b"03:KOk,"])
def test_B7_B8_malformed_replies(deliver, raw):
    with running_sink(Rule(Answer(raw=raw))) as sink:
        result = deliver(sink)
    assert (result.outcome, result.committed) == (SendOutcome.MALFORMED, True)


@pytest.mark.parametrize(
    "banner", [b"220 mx.example.com ESMTP\r\n", b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n"]
)
def test_B9_another_protocol_is_no_verdict(deliver, banner):
    with running_sink(Rule(Answer(raw=banner))) as sink:
        result = deliver(sink)
    assert result.outcome is SendOutcome.MALFORMED
    assert result.text.endswith(banner)


def test_B10_a_long_text_is_kept_in_part(deliver):
    with running_sink(Rule(Answer(b"K", b"x" * 100_000))) as sink:
        result = deliver(sink)
    assert (result.outcome, len(result.text)) == (SendOutcome.DELIVERED, 4096)


def test_B11_any_bytes_come_as_they_are(deliver):
    text = b"\r\n\0\x1b[31m\xff\xc3\xa9,5:K"
    with running_sink(Rule(Answer(b"D", text))) as sink:
        assert deliver(sink)[:2] == (SendOutcome.REJECTED, text)


def test_B12_a_reply_that_announces_a_gigabyte(deliver):
    with running_sink(Rule(Answer(raw=b"999999999:", end="stay"))) as sink:
        assert deliver(sink, timeouts=QUICK).outcome is SendOutcome.UNCERTAIN


def test_B13_B41_no_reply(deliver):
    with running_sink(Rule(Answer(raw=b""))) as sink:
        result = deliver(sink)
    assert (result.outcome, result.committed) == (SendOutcome.UNCERTAIN, True)
    assert result.text == b"connection closed by the server after the commit point"


@pytest.mark.parametrize("end", ["close", "reset", "stay"])
def test_B14_a_truncated_K_is_a_K(deliver, end):
    with running_sink(Rule(Answer(raw=b"5:KO", end=end))) as sink:
        result = deliver(sink, timeouts=Timeouts(reply=2))
    assert (result.outcome, result.text, result.flags) == (
        SendOutcome.DELIVERED,
        b"O",
        {"truncated-reply"},
    )


@pytest.mark.parametrize("end", ["close", "reset", "stay"])
@pytest.mark.parametrize("raw", [b"5:D", b"5:Zno", b"5:", b"5"])
def test_B14_any_other_truncated_reply_is_uncertain(deliver, raw, end):
    with running_sink(Rule(Answer(raw=raw, end=end))) as sink:
        result = deliver(sink, timeouts=QUICK)
    assert (result.outcome, result.committed) == (SendOutcome.UNCERTAIN, True)


@pytest.mark.parametrize(
    ("status", "outcome"), [(b"K", SendOutcome.DELIVERED), (b"D", SendOutcome.REJECTED)]
)
def test_B15_a_reset_after_the_reply(deliver, status, outcome):
    with running_sink(Rule(Answer(status, b"whole", end="reset"))) as sink:
        assert deliver(sink)[:2] == (outcome, b"whole")


# Early replies


@pytest.mark.parametrize("attempt", range(5))
def test_B16_a_D_before_the_reset_that_breaks_the_writing(deliver, attempt):
    rule = Rule(Answer(b"D", b"Error: message too large", at=1000))
    with running_sink(rule, receive_buffer=4096) as sink:
        result = deliver(sink, LARGE)
    assert result[:3] == (SendOutcome.REJECTED, b"Error: message too large", False)
    assert result.flags == {"early-reply"}
    assert result.bytes_sent < LARGE


@pytest.mark.parametrize("attempt", range(5))
def test_B16_the_reply_is_read_when_the_write_fails(run, body, monkeypatch, attempt):
    """The server has replied and closed before the client reads: the first error is that of a
    write."""
    listener = socket.create_server(("127.0.0.1", 0))
    refused = threading.Event()

    def refuse() -> None:
        peer, _ = listener.accept()
        with peer:
            peer.recv(10, socket.MSG_WAITALL)
            peer.sendall(b"10:Dtoo large,")
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, pack("ii", 1, 0))
        refused.set()

    def preadv(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        assert not offset or refused.wait(10)
        return len(buffers[0])

    monkeypatch.setattr(os, "preadv", preadv)
    thread = threading.Thread(target=refuse)
    thread.start()
    with listener:
        content, request = body(200_000), Request(200_000, b"s@x", [b"r@y"])
        address = listener.getsockname()
        result = run(send(host=address[0], port=address[1], request=request, body=content))
        thread.join(10)
    assert result[:3] == (SendOutcome.REJECTED, b"too large", False)


@pytest.mark.parametrize(
    ("status", "outcome"), [(b"Z", SendOutcome.DEFERRED), (b"D", SendOutcome.REJECTED)]
)
def test_B17_an_early_reply_stops_the_writing(deliver, status, outcome):
    with running_sink(
        Rule(Answer(status, b"enough", at=1000, end="stay")), receive_buffer=4096
    ) as sink:
        result = deliver(sink, LARGE)
    assert (result.outcome, result.text, result.committed, result.flags) == (
        outcome,
        b"enough",
        False,
        {"early-reply"},
    )
    assert result.bytes_sent < LARGE


def test_B17_an_early_reply_byte_by_byte(deliver):
    with running_sink(
        Rule(Answer(b"D", b"enough", at=1000, drip=0.01)), receive_buffer=4096
    ) as sink:
        assert deliver(sink, LARGE)[:2] == (SendOutcome.REJECTED, b"enough")


def test_B18_an_early_K_is_malformed(deliver):
    with running_sink(
        Rule(Answer(b"K", b"sure", at=1000, end="stay")), receive_buffer=4096
    ) as sink:
        result = deliver(sink, LARGE)
    assert (result.outcome, result.committed, result.flags) == (
        SendOutcome.MALFORMED,
        False,
        {"early-reply"},
    )


def test_an_early_reply_without_an_end_interrupts(deliver):
    with running_sink(Rule(Answer(raw=b"5:K", at=1000, end="stay")), receive_buffer=4096) as sink:
        result = deliver(sink, LARGE, timeouts=QUICK)
    assert (result.outcome, result.committed) == (SendOutcome.INTERRUPTED, False)


def test_early_bytes_that_are_no_reply_are_malformed(deliver):
    with running_sink(
        Rule(Answer(raw=b"220 hello\r\n", at=1000, end="stay")), receive_buffer=4096
    ) as sink:
        result = deliver(sink, LARGE)
    assert (result.outcome, result.committed) == (SendOutcome.MALFORMED, False)


@pytest.mark.parametrize("end", ["close", "reset"])
def test_B19_an_early_end(deliver, end):
    with running_sink(Rule(Answer(raw=b"", at=1000, end=end)), receive_buffer=4096) as sink:
        result = deliver(sink, LARGE)
    assert (result.outcome, result.committed, result.ours) == (
        SendOutcome.INTERRUPTED,
        False,
        False,
    )
    assert b"before the commit point" in result.text


# Time


def test_B20_a_server_that_never_reads(deliver):
    with running_sink(Rule(Answer(raw=b"", at=1000, end="stay")), receive_buffer=4096) as sink:
        result = deliver(sink, LARGE, timeouts=QUICK)
    assert (result.outcome, result.text) == (
        SendOutcome.INTERRUPTED,
        b"no progress in 0.3 s before the commit point",
    )


def test_B21_a_server_that_reads_too_slowly_for_the_session(deliver):
    with running_sink(Rule(Answer(read_size=1000, read_pause=0.01)), receive_buffer=4096) as sink:
        result = deliver(sink, LARGE, timeouts=Timeouts(io=30, session=0.4))
    assert (result.outcome, result.text) == (
        SendOutcome.INTERRUPTED,
        b"session not over in 0.4 s before the commit point",
    )
    assert result.seconds < 5, "data that never stops does not extend the session"


def test_B22_a_server_that_never_replies(deliver):
    with running_sink(Rule(SILENCE)) as sink:
        result = deliver(sink, timeouts=QUICK)
    assert (result.outcome, result.text) == (
        SendOutcome.UNCERTAIN,
        b"no whole reply in 0.3 s after the commit point",
    )
    assert 0.2 < result.seconds < 5


def test_B22_the_session_ends_the_wait_for_a_reply(deliver):
    with running_sink(Rule(SILENCE)) as sink:
        result = deliver(sink, timeouts=Timeouts(session=0.2))
    assert (result.outcome, result.text) == (
        SendOutcome.UNCERTAIN,
        b"session not over in 0.2 s after the commit point",
    )


async def stopped(
    coroutine: Coroutine[Any, Any, Any], sink: Sink, seconds: float, *, cancel: bool = False
) -> Any:
    """Await it, while the loop stands still for a time from the moment on when the server has read
    the request.

    It does so in the callback of a descriptor, as a process that gets SIGSTOP while it waits for
    its descriptors."""
    task, loop = asyncio.create_task(coroutine), asyncio.get_running_loop()
    ours, theirs = socket.socketpair()

    def stand_still() -> None:
        loop.remove_reader(ours)
        threading.Event().wait(seconds)
        if cancel:
            task.cancel()

    with ours, theirs:
        loop.add_reader(ours, stand_still)
        while not sink.count:  # noqa: ASYNC110 (the sink has a loop of its own)
            await asyncio.sleep(0)
        theirs.send(b"x")
        return await task


def test_a_reply_that_has_arrived_wins_over_a_timer(run, body):
    """libuv runs timers before it polls its sockets."""
    request = Request(6, b"s@x.test", [b"r@y.test"])
    with running_sink(Rule(Answer(b"K", b"Ok", delay=0.1))) as sink:
        sending = send(
            host="127.0.0.1", port=sink.port, request=request, body=body(b"hello\n"), timeouts=QUICK
        )
        result = run(stopped(sending, sink, 1.1))
    assert (result.outcome, result.text) == (SendOutcome.DELIVERED, b"Ok")


def test_a_reply_wins_over_a_timer_that_is_late_by_more_than_a_second(run, body):
    """The process was stopped: bytes that the server sent meanwhile may still be in transit."""
    request = Request(6, b"s@x.test", [b"r@y.test"])
    with running_sink(Rule(Answer(b"K", b"Ok", delay=1.8))) as sink:
        sending = send(
            host="127.0.0.1", port=sink.port, request=request, body=body(b"hello\n"), timeouts=QUICK
        )
        result = run(stopped(sending, sink, 1.6))
    assert (result.outcome, result.text) == (SendOutcome.DELIVERED, b"Ok")


def test_a_reply_that_has_arrived_wins_over_the_end_of_a_drain(run, body):
    request = Request(6, b"s@x.test", [b"r@y.test"])
    with running_sink(Rule(Answer(b"K", b"Ok", delay=0.1))) as sink:
        sending = send(host="127.0.0.1", port=sink.port, request=request, body=body(b"hello\n"))
        assert run(stopped(sending, sink, 1.1, cancel=True)).outcome is SendOutcome.DELIVERED


def test_a_phase_may_be_longer_than_the_one_before(deliver):
    timeouts = Timeouts(connect=0.5, io=0.5, reply=20)
    with running_sink(Rule(Answer(delay=0.8))) as sink:
        assert deliver(sink, timeouts=timeouts).outcome is SendOutcome.DELIVERED


# Connecting


@pytest.fixture
def hello(body: MakeBody) -> dict[str, Any]:
    return {
        "request": Request(6, b"s@x.test", [b"r@y.test"]),
        "body": body(b"hello\n"),
    }


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """A port with a full backlog: connections to it get no answer."""
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for waiting in (first, second):
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


async def send_by_name(found: list[tuple[Any, Any]] | Exception, options: dict[str, Any]) -> Result:
    """Send to a name that resolves to the addresses `found`."""

    def getaddrinfo(*_: object) -> list[tuple[Any, ...]]:
        if isinstance(found, Exception):
            raise found
        return [(family, socket.SOCK_STREAM, 6, "", address) for family, address in found]

    with resolving(getaddrinfo):
        return await send(host="mx.example.com", **options)


@contextmanager
def resolving(answer: Callable[..., Any]) -> Iterator[None]:
    """A resolver that answers so, or raises, for everything that is a name; nothing is known
    beforehand."""
    real = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, **options: Any) -> Any:
        return (
            real(host, port, **options)
            if host[:1].isdigit() or options.get("flags")
            else answer(host, port)
        )

    connection.lookups.clear()
    with patch.object(socket, "getaddrinfo", getaddrinfo):
        yield
    connection.lookups.clear()


def test_B23_connection_refused(run, hello):
    port = free_port()
    result = run(send(host="127.0.0.1", port=port, **hello))
    assert (result.outcome, result.committed) == (SendOutcome.UNREACHABLE, False)
    assert (
        result.text == f"no connection: 127.0.0.1:{port} ECONNREFUSED (Connection refused)".encode()
    )


def test_B23_no_reply(run, hello, deaf_port):
    result = run(send(host="127.0.0.1", port=deaf_port, timeouts=QUICK, **hello))
    assert (
        result.text
        == f"no connection: 127.0.0.1:{deaf_port} ETIMEDOUT (Connection timed out)".encode()
    )
    assert 0.2 < result.seconds < 5


def test_B23_no_way_there(run, hello):
    result = run(send(host="255.255.255.255", port=628, **hello))
    assert result.outcome is SendOutcome.UNREACHABLE
    assert result.text.startswith(b"no connection: 255.255.255.255:628 E")


@pytest.mark.parametrize("code", [socket.EAI_NONAME, socket.EAI_AGAIN])
def test_B23_an_unknown_name(run, hello, code):
    result = run(send_by_name(socket.gaierror(code, "no such name"), hello))
    assert (result.outcome, result.text) == (
        SendOutcome.UNREACHABLE,
        b"no connection: mx.example.com:628 gaierror (no such name)",
    )


def test_B23_a_name_server_that_does_not_answer_holds_up_no_other_name(run, hello):
    """Fifty connections wait with one lookup; another name is resolved meanwhile."""
    asked, gate = list[str](), threading.Event()

    def getaddrinfo(host: str, port: int) -> list[tuple[Any, ...]]:
        asked.append(host)
        if host != "good.example.com":
            gate.wait(20)
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    async def scenario() -> tuple[Result, list[Result]]:
        lost = [
            asyncio.create_task(send(host="mx.example.com", timeouts=QUICK, **hello))
            for _ in range(50)
        ]
        await asyncio.sleep(0)
        found = await send(host="good.example.com", port=sink.port, **hello)
        return found, await asyncio.gather(*lost)

    with running_sink() as sink, resolving(getaddrinfo):
        found, lost = run(scenario())
        gate.set()
    assert found.outcome is SendOutcome.DELIVERED
    assert {one.text for one in lost} == {
        b"no connection: mx.example.com:628 ETIMEDOUT (Connection timed out)"
    }
    assert asked == ["mx.example.com", "good.example.com"]


def test_a_name_is_resolved_again_after_a_while_and_at_once_after_a_failure(
    run, hello, monkeypatch
):
    asked = list[str]()

    def getaddrinfo(host: str, port: int) -> list[tuple[Any, ...]]:
        asked.append(host)
        if len(asked) == 1:
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    async def outcomes(count: int) -> list[SendOutcome]:
        return [
            (await send(host="mx.example.com", port=sink.port, **hello)).outcome
            for _ in range(count)
        ]

    with running_sink() as sink, resolving(getaddrinfo):
        assert run(outcomes(4)) == [SendOutcome.UNREACHABLE, *[SendOutcome.DELIVERED] * 3]
        assert len(asked) == 2
        monkeypatch.setattr(connection, "CACHE_TTL", 0.0)
        run(outcomes(2))
        assert len(asked) == 4


def test_B23_an_invalid_name_is_unreachable(run, hello):
    result = run(send(host="a" * 64 + ".example.com", **hello))
    assert result.outcome is SendOutcome.UNREACHABLE


def test_B25_every_address_of_a_name_is_tried_in_time(run, hello, deaf_port):
    dead = free_port()
    with running_sink() as sink:
        found = [
            (socket.AF_INET6, ("::1", dead, 0, 0)),
            (socket.AF_INET, ("127.0.0.1", deaf_port)),
            (socket.AF_INET, ("127.0.0.1", sink.port)),
        ]
        result = run(send_by_name(found, hello | {"timeouts": Timeouts(connect=2)}))
    assert result.outcome is SendOutcome.DELIVERED


def test_B25_the_failure_of_every_address_is_named(run, hello):
    dead = free_port()
    found = [(socket.AF_INET, ("127.0.0.1", dead)), (socket.AF_INET, ("127.0.0.2", dead))]
    result = run(send_by_name(found, hello | {"port": dead}))
    assert (
        result.text
        == (
            f"no connection: mx.example.com[127.0.0.1]:{dead} ECONNREFUSED (Connection refused); "
            f"mx.example.com[127.0.0.2]:{dead} ECONNREFUSED (Connection refused)"
        ).encode()
    )


def test_B26_a_real_name(run, hello):
    with running_sink() as sink:
        assert run(send(host="localhost", port=sink.port, **hello)).outcome is SendOutcome.DELIVERED


def test_B26_ipv6(run, hello):
    with running_sink(host="::1") as sink:
        assert run(send(host="::1", port=sink.port, **hello)).outcome is SendOutcome.DELIVERED
        port = sink.port
    assert run(send(host="::1", port=port, **hello)).text.startswith(
        f"no connection: [::1]:{port} ECONNREFUSED".encode()
    )


def test_B26_a_unix_socket(run, hello, tmp_path):
    path = str(tmp_path / "qmqp")
    assert b"ENOENT" in run(send(path=path, **hello)).text
    with running_sink(path=path):
        assert run(send(path=path, **hello)).outcome is SendOutcome.DELIVERED


def test_B26_a_unix_socket_without_a_listener(run, hello, tmp_path):
    path = str(tmp_path / "qmqp")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(path)
    result = run(send(path=path, **hello))
    assert result.text == f"no connection: unix:{path} ECONNREFUSED (Connection refused)".encode()


def test_B26_a_path_too_long_for_a_unix_socket(run, hello):
    assert run(send(path="/x" * 100, **hello)).outcome is SendOutcome.UNREACHABLE


def test_a_unix_socket_whose_backlog_is_full_is_waited_for(run, hello, tmp_path):
    path = str(tmp_path / "qmqp")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)
        assert b"ETIMEDOUT" in run(send(path=path, timeouts=QUICK, **hello)).text
        room = threading.Event()

        async def scenario() -> Result:
            loop = asyncio.get_running_loop()
            loop.call_later(0.1, room.set)
            answered = loop.run_in_executor(None, answer)
            result = await send(path=path, **hello)
            await answered
            return result

        def answer() -> None:
            assert room.wait(10)
            listener.accept()[0].close()
            peer, _ = listener.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(b"3:KOk,")

        assert run(scenario()).outcome is SendOutcome.DELIVERED


class Sockets:
    """The module `socket`, with another class of sockets in it."""

    def __init__(self, make: Callable[..., socket.socket]) -> None:
        self.socket = make

    def __getattr__(self, name: str) -> Any:
        return getattr(socket, name)


def test_a_lack_of_sockets_is_an_error_of_this_process(run, hello, monkeypatch):
    def full(*_: object) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(connection, "socket", Sockets(full))
    with pytest.raises(OSError, match="Too many open files"):
        run(send(path="/nowhere", **hello))


# The request on the wire


BLOCK = 1000


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 7 * BLOCK, 7 * BLOCK + 1])
def test_B32_any_size_is_framed_exactly(deliver, size):
    data = os.urandom(size)
    with running_sink() as sink:
        result = deliver(sink, data, block_size=BLOCK)
        assert sink.wait_for(1, 20)
    assert result.outcome is SendOutcome.DELIVERED
    assert result.bytes_sent == Request(size, b"s@x.test", [b"r@y.test"]).length
    assert (sink.received[0].size, sink.faults) == (size, type(sink.faults)())


@pytest.mark.parametrize("count", [1, 1000, 100_000])
def test_B30_recipients_of_any_number(deliver, count):
    recipients = tuple(b"%d@y.test" % number for number in range(count))
    with running_sink() as sink:
        result = deliver(sink, request=Request(6, b"", recipients))
    assert result.outcome is SendOutcome.DELIVERED
    assert (sink.received[0].sender, sink.received[0].recipients) == (b"", recipients)


def test_B33_memory_stays_flat(deliver):
    tracemalloc.start()
    try:
        with running_sink() as sink:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            assert deliver(sink, 40_000_000).outcome is SendOutcome.DELIVERED
            assert tracemalloc.get_traced_memory()[1] - before < 2_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [0, 1, 10 * BLOCK, 10 * BLOCK + 1, BLOCK])
def test_B40_header_and_tail_never_travel_alone(deliver, monkeypatch, size):
    writes: list[int] = []

    class Recording(socket.socket):
        def sendmsg(self, buffers: Any, *rest: Any) -> int:
            writes.append(super().sendmsg(buffers, *rest))
            return writes[-1]

    monkeypatch.setattr(connection, "socket", Sockets(Recording))
    with running_sink() as sink:
        assert deliver(sink, size, block_size=BLOCK).outcome is SendOutcome.DELIVERED
    request = Request(size, b"s@x.test", [b"r@y.test"])
    assert writes[0] > len(request.head)
    assert writes[-1] > len(request.tail) - 1 >= 2
    assert len(writes) == max(1, -(-size // BLOCK))


def test_B42_a_connection_for_each_request(run, hello):
    async def scenario(port: int) -> list[Result]:
        return await asyncio.gather(
            *[send(host="127.0.0.1", port=port, **hello) for _ in range(100)]
        )

    with running_sink() as sink:
        results = run(scenario(sink.port))
    assert {result.outcome for result in results} == {SendOutcome.DELIVERED}
    assert (sink.connections, sink.count) == (100, 100)


# The body


@pytest.mark.parametrize("blocks", [1, 5])
@pytest.mark.parametrize("difference", [-1, 1, BLOCK, -BLOCK])
def test_B34_B35_a_body_of_another_size_closes_before_the_commit_point(
    run, body, blocks, difference
):
    size = blocks * BLOCK
    asked: list[int] = []

    def may_commit() -> bool:
        asked.append(transfer.bytes_sent)
        return True

    request = Request(size, b"s@x", [b"r@y"])
    with running_sink() as sink:
        transfer = ClientConnection(
            host="127.0.0.1",
            port=sink.port,
            request=request,
            body=replace(body(size + difference), size=size),
            block_size=BLOCK,
            may_commit=may_commit,
        )
        with pytest.raises(BodyChanged, match=f"{size + difference} bytes where {size}"):
            run(transfer.run())
        assert sink.wait_for_fault(5)
    assert (transfer.committed, asked, sink.count) == (False, [], 0)


def test_B36_a_body_that_cannot_be_read(run, tmp_path):
    fd = os.open(tmp_path / "body", os.O_CREAT | os.O_WRONLY)
    try:
        with running_sink() as sink, pytest.raises(BodyFault, match="EBADF") as caught:
            run(
                send(
                    host="127.0.0.1",
                    port=sink.port,
                    request=Request(5, b"", [b"r@y"]),
                    body=BodyFile(fd, 5),
                )
            )
    finally:
        os.close(fd)
    assert caught.value.errno == errno.EBADF
    assert not isinstance(caught.value, BodyChanged)


def test_a_body_outside_the_page_cache_is_read_by_a_thread(deliver, monkeypatch):
    monkeypatch.setattr(body_module, "_NOWAIT", 0)
    data = os.urandom(5 * BLOCK + 7)
    with running_sink() as sink:
        assert deliver(sink, data, block_size=BLOCK).outcome is SendOutcome.DELIVERED
        assert sink.received[0].size == len(data)


def test_a_body_partly_in_the_page_cache_is_read_whole(deliver, monkeypatch):
    preadv = os.preadv

    def half_cached(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        return preadv(fd, [buffers[0][: len(buffers[0]) // 2]] if flags else buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", half_cached)
    data = os.urandom(5 * BLOCK + 7)
    with running_sink() as sink:
        assert deliver(sink, data, block_size=BLOCK).outcome is SendOutcome.DELIVERED
        assert sink.received[0].size == len(data)


# Stopping


async def begun(transfer: ClientConnection) -> None:
    """Wait until some of the request has left."""
    async with asyncio.timeout(30):
        while not transfer.bytes_sent:  # noqa: ASYNC110 (nothing is notified of it)
            await asyncio.sleep(0.01)


def test_B38_not_allowed_to_commit(deliver):
    for size in (6, 1_000_000):
        with running_sink() as sink:
            result = deliver(sink, size, may_commit=lambda: False)
            assert sink.wait_for_fault(5)
        assert (result.outcome, result.ours, result.committed, sink.count) == (
            SendOutcome.INTERRUPTED,
            True,
            False,
            0,
        )


def test_B38_may_commit_is_called_once_and_last(run, hello):
    seen: list[tuple[bool, int]] = []

    def may_commit() -> bool:
        seen.append((transfer.committed, transfer.bytes_sent))
        return True

    with running_sink() as sink:
        transfer = ClientConnection(
            host="127.0.0.1", port=sink.port, may_commit=may_commit, **hello
        )
        assert run(transfer.run()).outcome is SendOutcome.DELIVERED
    assert seen == [(False, 0)]
    assert transfer.committed


def test_an_exception_of_may_commit_is_raised(deliver):
    def broken() -> bool:
        raise LookupError("no lease")

    with running_sink() as sink, pytest.raises(LookupError):
        deliver(sink, may_commit=broken)


def test_B38_stopped_in_the_body(run, body):
    async def scenario(port: int) -> tuple[Result, bool]:
        transfer = ClientConnection(
            host="127.0.0.1", port=port, request=Request(LARGE, b"", [b"r@y"]), body=body(LARGE)
        )
        running = asyncio.create_task(transfer.run())
        await begun(transfer)
        transfer.abort()
        result = await running
        transfer.abort()
        return result, transfer.committed

    with running_sink(Rule(Answer(read_size=1000, read_pause=0.01)), receive_buffer=4096) as sink:
        result, committed = run(scenario(sink.port))
        assert sink.wait_for_fault(5)
    assert (result.outcome, result.ours, committed) == (SendOutcome.INTERRUPTED, True, False)
    assert 0 < result.bytes_sent < LARGE


def test_B38_stopped_before_it_began(run, hello):
    with running_sink() as sink:
        transfer = ClientConnection(host="127.0.0.1", port=sink.port, **hello)
        transfer.abort()
        result = run(transfer.run())
        assert sink.wait_for_fault(5)
    assert (result.outcome, result.ours, result.bytes_sent, sink.count) == (
        SendOutcome.INTERRUPTED,
        True,
        0,
        0,
    )


def test_B38_stopped_while_it_connects(run, hello, deaf_port):
    async def scenario() -> Result:
        transfer = ClientConnection(host="127.0.0.1", port=deaf_port, **hello)
        asyncio.get_running_loop().call_later(0.05, transfer.abort)
        return await transfer.run()

    result = run(scenario())
    assert (result.outcome, result.ours) == (SendOutcome.INTERRUPTED, True)
    assert result.seconds < 5


# Preconnections


def preconnected(run: Run, port: int, options: dict[str, Any], **more: Any) -> Result:
    """The result of a transfer over a connection that is being made before."""

    async def scenario() -> Result:
        preconnection = connection.Preconnection("127.0.0.1", port, None, 0.5)
        if "abort_after" in more:
            transfer = ClientConnection(**options, preconnection=preconnection)
            asyncio.get_running_loop().call_later(more["abort_after"], transfer.abort)
            return await transfer.run()
        # A host that does not exist: the connection is the one that was made.
        return await send(host="host.invalid", preconnection=preconnection, **options)

    result: Result = run(scenario())
    return result


def test_a_preconnection_is_used(run, hello):
    with running_sink() as sink:
        result = preconnected(run, sink.port, hello)
        assert (result.outcome, sink.count, sink.connections) == (SendOutcome.DELIVERED, 1, 1)


def test_a_preconnection_that_fails_is_an_unreachable_server(run, hello):
    result = preconnected(run, free_port(), hello)
    assert (result.outcome, result.committed) == (SendOutcome.UNREACHABLE, False)
    assert b"ECONNREFUSED" in result.text


def test_a_preconnection_in_time_or_never(run, hello, deaf_port):
    result = preconnected(run, deaf_port, hello)
    assert (result.outcome, result.ours) == (SendOutcome.UNREACHABLE, False)


def test_a_transfer_stops_while_its_preconnection_is_made(run, hello, deaf_port):
    result = preconnected(run, deaf_port, hello, abort_after=0.05)
    assert (result.outcome, result.ours) == (SendOutcome.INTERRUPTED, True)


def test_a_preconnection_that_is_not_needed_is_closed(run):
    async def scenario(listener: socket.socket) -> bytes:
        preconnection = connection.Preconnection("127.0.0.1", listener.getsockname()[1], None, 5)
        loop = asyncio.get_running_loop()
        server, _ = await loop.sock_accept(listener)
        with server:
            preconnection.close()
            return await asyncio.wait_for(loop.sock_recv(server, 1), 10)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        with pytest.raises(ConnectionResetError):
            run(scenario(listener))


def test_a_preconnection_that_is_not_needed_is_not_waited_for(run, deaf_port):
    async def scenario() -> None:
        preconnection = connection.Preconnection("127.0.0.1", deaf_port, None, 3600)
        preconnection.close()
        await preconnection.ready()

    with pytest.raises(connection.Stopped):
        run(scenario())


def test_a_preconnection_that_the_server_closes_is_not_written_to(run, hello):
    """Not a byte leaves, so nothing is uncertain; the time counts from the connection."""

    async def scenario(listener: socket.socket) -> tuple[Result, float]:
        preconnection = connection.Preconnection("127.0.0.1", listener.getsockname()[1], None, 5)
        await asyncio.get_running_loop().create_task(preconnection.ready())
        server, _ = listener.accept()
        server.close()
        transfer = ClientConnection(**hello, preconnection=preconnection)
        return await transfer.run(), monotonic() - preconnection.began

    with socket.create_server(("127.0.0.1", 0)) as listener:
        result, passed = run(scenario(listener))
    assert (result.outcome, result.committed) == (SendOutcome.INTERRUPTED, False)
    assert (result.bytes_sent, result.flags) == (0, {"closed-at-once"})
    assert 0 < result.seconds <= passed


def test_a_cancelled_transfer_closes_its_preconnection(run, hello, deaf_port):
    async def scenario() -> None:
        preconnection = connection.Preconnection("127.0.0.1", deaf_port, None, 60)
        transfer = ClientConnection(**hello, preconnection=preconnection)
        running = asyncio.create_task(transfer.run())
        asyncio.get_running_loop().call_soon(running.cancel)  # after its first step
        with pytest.raises(asyncio.CancelledError):
            await running
        with pytest.raises(asyncio.CancelledError):
            await preconnection.ready()

    run(scenario())


def test_B38_after_the_commit_point_nothing_is_stopped(run, hello):
    async def scenario(port: int) -> Result:
        transfer = ClientConnection(host="127.0.0.1", port=port, **hello)
        running = asyncio.create_task(transfer.run())
        await begun(transfer)
        transfer.abort()
        return await running

    with running_sink(Rule(Answer(delay=0.3))) as sink:
        assert run(scenario(sink.port)).outcome is SendOutcome.DELIVERED


@pytest.mark.parametrize("in_thread", [False, True])
def test_B38_cancelled_in_the_body(run, body, monkeypatch, in_thread):
    if in_thread:
        monkeypatch.setattr(body_module, "_NOWAIT", 0)

    async def scenario(port: int) -> bool:
        transfer = ClientConnection(
            host="127.0.0.1", port=port, request=Request(LARGE, b"", [b"r@y"]), body=body(LARGE)
        )
        running = asyncio.create_task(transfer.run())
        await begun(transfer)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        return transfer.committed

    with running_sink(Rule(Answer(read_size=1000, read_pause=0.01)), receive_buffer=4096) as sink:
        assert not run(scenario(sink.port))
        assert sink.wait_for_fault(5)
        assert sink.count == 0
