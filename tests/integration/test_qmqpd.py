"""QMQP in over real TCP: replies, files and rows.

The front end runs in a thread, with a real spool and spooler, and a list for a database. Foreign
clients send to the whole program in tests/acceptance/test_qmqp_in.py.
"""

import asyncio
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import cast

import pytest

from qmqp.netstring import encode
from qmqp.probe import probe
from qmqp.reply import Reply, ReplyParser
from qmqpd.server import QmqpConnection
from reception.policy import Policy, qmqp_networks
from reception.receiver import BLOCK, MAX_BUFFERED
from reception.server import Door, FrontEnd
from relay.listeners import Listener
from relay.queue.accept import NewMessage
from relay.settings import SmtpdSettings
from relay.spool.store import BodyWriter, Spool
from tests.integration.front_end import HeldSyncs, ServerHarness, body_of, starting
from tests.waiting import until

STRANGER = "127.0.0.2"


def qmqp_door(settings: SmtpdSettings) -> Door:
    policy = Policy(settings, qmqp_networks(settings))
    return Door("qmqp", "RELAY_QMQP_LISTEN", policy, QmqpConnection)


class QmqpClient:
    """A client that sends bytes and reads one reply."""

    def __init__(self, running: ServerHarness, source: str = "127.0.0.1") -> None:
        self.socket = socket.create_connection(
            (running.host, running.port), timeout=20, source_address=(source, 0)
        )

    def send(self, *data: bytes) -> None:
        for piece in data:
            self.socket.sendall(piece)

    def reply(self) -> Reply | None:
        """The reply; None if the connection ends without one. The server must then close."""
        parser, reply = ReplyParser(), None
        while data := self.socket.recv(65536):
            assert reply is None, "one reply"
            reply = parser.feed(data)
            assert parser.extra == 0
        return reply


@pytest.fixture
def run(spool: Spool) -> Iterator[Callable[..., ServerHarness]]:
    networks = {"qmqp_client_networks": ("127.0.0.1",)}
    with starting(ServerHarness, qmqp_door, spool, **networks) as start:
        yield start


@contextmanager
def talking(running: ServerHarness, source: str = "127.0.0.1") -> Iterator[QmqpClient]:
    client = QmqpClient(running, source)
    with client.socket:
        yield client


def wire_of(body: bytes, sender: bytes = b"a@example.com", *recipients: bytes) -> bytes:
    envelope = b"".join(map(encode, (sender, *(recipients or [b"b@example.org"]))))
    return encode(encode(body) + envelope)


def status(reply: Reply | None) -> bytes:
    assert reply is not None
    return reply.status + reply.text


def nothing_left(running: ServerHarness) -> None:
    """No connection, no body, no claimed space."""
    space = running.policy.space
    until(lambda: not running.server.connections and not running.bodies())
    until(lambda: (space.claimed, space.stored) == (0, 0))


TRACE = re.compile(
    rb"Received: from \[127\.0\.0\.1\] \(\[127\.0\.0\.1\]\)\n"
    rb"\tby relay\.example with QMQP id ([0-9a-f]{32});\n"
    rb"\t[A-Z][a-z]{2}, \d{2} [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d [+-]\d{4}\n"
)


def stored(running: ServerHarness, message: NewMessage) -> bytes:
    """The body without its trace field, which is checked."""
    body = body_of(running, message)
    assert message.size == len(body)
    trace = TRACE.match(body)
    assert trace is not None, body[:300]
    assert trace[1].decode() == message.id
    return body[trace.end() :]


@pytest.mark.parametrize("size", [0, 1, 100, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3_000_000])
def test_bytes_are_stored_as_they_were_sent(run: Callable[..., ServerHarness], size: int) -> None:
    running = run()
    line = b".text with a bare \r and \xff\0\r\n"
    body = (line * (size // len(line) + 1))[:size]
    wire = wire_of(body, b"a@example.com", b"b@example.org", b"c d@example.org")
    with talking(running) as client:
        client.send(wire[:1000], wire[1000:])
        reply = client.reply()
    [message] = running.messages(1)
    assert status(reply) == b"KOk: queued as %b" % message.id.encode()
    assert stored(running, message) == body
    until(lambda: {*running.hints} == {message.id})  # twice if the COMMIT took long
    assert (message.sender, message.helo, message.protocol) == ("a@example.com", "", "QMQP")
    assert [one.address for one in message.recipients] == ["b@example.org", "c d@example.org"]
    assert (message.client_address, message.client_trusted) == ("127.0.0.1", True)
    assert (message.body_type, message.ret, message.envid) == (None, None, None)


def test_the_first_line_never_continues_the_trace_field(run: Callable[..., ServerHarness]) -> None:
    running = run()
    for body in (b" folded\n", b"From ann Mon Jan  1\nSubject: x\n"):
        with talking(running) as client:
            client.send(*[bytes([byte]) for byte in wire_of(body)])
            assert status(client.reply())[:1] == b"K"
    assert [stored(running, message) for message in running.messages(2)] == [
        b"\n folded\n",
        b"X-Mailbox-Line: From ann Mon Jan  1\nSubject: x\n",
    ]


@pytest.mark.parametrize("size", [0, 100, 3 * BLOCK])
def test_a_client_that_closes_before_the_last_comma_leaves_nothing(
    run: Callable[..., ServerHarness], size: int
) -> None:
    running = run()
    wire = wire_of(b"x" * size)
    for cut in (0, 1, 5, len(wire) // 2, len(wire) - 1):
        with talking(running) as client:
            client.send(wire[:cut])
            client.socket.shutdown(socket.SHUT_WR)
            assert client.reply() is None
        nothing_left(running)
    assert running.database.messages == []


def test_a_client_that_closes_its_side_after_the_request_gets_its_reply(
    run: Callable[..., ServerHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    running, syncs = run(), HeldSyncs(monkeypatch)
    with talking(running) as client:
        client.send(wire_of(b"hello\n"))
        client.socket.shutdown(socket.SHUT_WR)
        assert syncs.taken.wait(10)
        syncs.gate.set()
        assert status(client.reply())[:1] == b"K"
    until(lambda: not running.server.connections)


def test_bytes_after_the_request_do_not_cost_the_reply(
    run: Callable[..., ServerHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    running, syncs = run(), HeldSyncs(monkeypatch)
    with talking(running) as client:
        client.send(wire_of(b"hello\n"), wire_of(b"second\n"))
        assert syncs.taken.wait(10)
        client.send(b"x" * 100_000)
        syncs.gate.set()
        assert status(client.reply())[:1] == b"K"
    until(lambda: not running.server.connections)
    assert len(running.messages(1)) == 1, "a connection carries one request"


def test_a_client_that_is_not_authorized_gets_z_and_no_connection_is_counted(
    run: Callable[..., ServerHarness],
) -> None:
    running = run(max_connections=1)
    with talking(running, STRANGER) as stranger, talking(running) as client:
        reply = stranger.reply()
        assert status(reply) == b"ZClient is not authorized to use this service (#4.7.1)"
        client.send(wire_of(b"hello\n"))
        assert status(client.reply())[:1] == b"K"
    with talking(running, STRANGER) as stranger:
        stranger.send(wire_of(b"x" * 500_000))
        assert status(stranger.reply())[:1] == b"Z", "also if it reads only after it has written"
    assert [message.client_address for message in running.messages(1)] == ["127.0.0.1"]


def test_many_refused_clients_hold_no_descriptors(
    run: Callable[..., ServerHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qmqpd.server.REFUSED_LIMIT", 2)
    running = run()
    with ExitStack() as stack:
        for _ in range(9):
            stranger = stack.enter_context(talking(running, STRANGER))
            assert status(stranger.reply())[:1] == b"Z"
        until(lambda: len(running.server.connections) == 2)
        client = stack.enter_context(talking(running))
        client.send(wire_of(b"hello\n"))
        assert status(client.reply())[:1] == b"K"


@pytest.mark.parametrize("allowed", [True, False])
def test_the_probe_knows_this_door(run: Callable[..., ServerHarness], allowed: bool) -> None:
    running = run(qmqp_client_networks=("127.0.0.1" if allowed else "192.0.2.1",))
    result = asyncio.run(probe(host=running.host, port=running.port, connect=10.0, reply=10.0))
    assert (result.family, result.allowed) == ("qmqp-relay", allowed)
    nothing_left(running)
    assert running.database.messages == []


def test_behind_a_balancer_the_header_names_the_client(run: Callable[..., ServerHarness]) -> None:
    running = run(
        listener=Listener("127.0.0.1", 0, proxy=True),
        proxy_networks="127.0.0.1",
        qmqp_client_networks=("192.0.2.1",),
    )
    header = b"PROXY TCP4 192.0.2.%d 198.51.100.1 40000 628\r\n"
    with talking(running) as client:
        client.send(header % 1 + wire_of(b"body\n"))
        assert status(client.reply()).startswith(b"K")
    with talking(running) as client:
        client.send(header % 2)
        assert status(client.reply()).startswith(b"Z")
    [message] = running.messages(1)
    assert message.client_address == "192.0.2.1"


def test_past_a_rate_limit_z(run: Callable[..., ServerHarness]) -> None:
    running = run(rate_limits="client-messages=1")
    for expected in (b"K", b"ZToo many messages a minute from your address"):
        with talking(running) as client:
            client.send(wire_of(b"body\n"))
            assert status(client.reply()).startswith(expected)
    running.messages(1)


def test_what_follows_a_reply_is_not_read_for_ever(run: Callable[..., ServerHarness]) -> None:
    running = run()
    with talking(running) as client:
        client.send(b"EHLO client.example\r\n")
        with pytest.raises(ConnectionError):
            client.send(*[b"x" * 65536] * 1000)
    until(lambda: not running.server.connections)


def test_the_connection_of_a_silent_client_ends_after_its_reply(
    run: Callable[..., ServerHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reception.connection.LINGER_TIMEOUT", 0.1)
    running = run(smtp_timeout=1.0)
    with talking(running) as client:
        client.send(wire_of(b"hello\n"))
        assert status(client.reply())[:1] == b"K"
        until(lambda: not running.server.connections)


@pytest.mark.parametrize("wait", [True, False])
def test_a_request_that_is_too_large_gets_d_also_if_the_client_only_writes(
    run: Callable[..., ServerHarness], wait: bool
) -> None:
    running = run(max_message_size=100_000)
    wire = wire_of(b"x" * 20_000_000)
    with talking(running) as client:
        client.send(wire[:20])
        if not wait:  # as qmail-qmqpc, which reads only after its last byte
            client.send(wire[20:])
        assert status(client.reply()) == b"DMessage exceeds the size limit (#5.3.4)"
    nothing_left(running)


def test_the_rest_of_a_refused_request_has_as_much_time_as_an_accepted_one(
    run: Callable[..., ServerHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("reception.connection", "qmqpd.server"):
        monkeypatch.setattr(f"{module}.LINGER_TIMEOUT", 0.0)
    running = run(max_message_size=10, smtp_timeout=60.0)
    monkeypatch.setattr(FrontEnd, "check_deadlines", lambda _server, _now: None)
    wire = wire_of(b"x" * 1000)
    with talking(running) as client:
        client.send(wire[:500])
        [connection] = until(lambda: tuple(running.server.connections))
        until(lambda: connection.session.closed)
        client.send(wire[500:600])
        until(lambda: connection.deadline > time.monotonic() + 30.0)
        client.send(wire[600:])
        until(lambda: connection.deadline < time.monotonic())
        running.loop.call_soon_threadsafe(connection.check_deadlines, time.monotonic())
        until(lambda: not running.server.connections)


@pytest.mark.parametrize(
    ("envelope", "reply"),
    [
        (
            (b"a\0@example.com", b"b@example.org"),
            b"DBad sender address: it has a control character",
        ),
        ((b"", b"b@example.org\n"), b"DBad recipient address: it has a control character"),
        ((b"", b""), b"DBad recipient address: it is empty"),
        ((b"", *[b"%d@example.org" % n for n in range(101)]), b"DToo many recipients (#5.5.3)"),
    ],
)
@pytest.mark.parametrize("size", [10, 3 * BLOCK])
def test_an_envelope_that_is_refused_leaves_no_body(
    run: Callable[..., ServerHarness], envelope: tuple[bytes, ...], reply: bytes, size: int
) -> None:
    running = run(max_recipients=100)
    with talking(running) as client:
        client.send(wire_of(b"x" * size, *envelope))
        assert status(client.reply()).startswith(reply)
    nothing_left(running)
    assert running.database.messages == []


def test_a_database_that_hangs_costs_no_k(run: Callable[..., ServerHarness]) -> None:
    running = run()
    running.database.gate.clear()
    for size in (10, 3 * BLOCK):
        with talking(running) as client:
            client.send(wire_of(b"x" * size))
            assert status(client.reply())[:1] == b"K"
    assert running.database.messages == []
    running.database.gate.set()
    running.messages(2)


def test_after_the_deadline_the_connection_closes_without_a_reply(
    run: Callable[..., ServerHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message may be in the journal, so there is neither a K nor a Z."""
    running, syncs = run(accept_deadline=0.3), HeldSyncs(monkeypatch)
    with talking(running) as client:
        client.send(wire_of(b"hello\n"))
        with suppress(ConnectionResetError):
            assert client.reply() is None
    syncs.gate.set()
    running.messages(1)


def test_a_disk_fault_is_z(
    run: Callable[..., ServerHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = run()

    def broken(_writer: BodyWriter, _data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(BodyWriter, "append", broken)
    with talking(running) as client:
        client.send(wire_of(b"x" * 1_000_000))
        assert status(client.reply()) == b"ZInsufficient system storage (#4.3.1)"
    nothing_left(running)


def test_a_slow_disk_pauses_reading_so_memory_stays_bounded(
    run: Callable[..., ServerHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = run()
    gate, append = threading.Event(), BodyWriter.append

    def slow(writer: BodyWriter, data: bytes) -> None:
        gate.wait(20)
        append(writer, data)

    monkeypatch.setattr(BodyWriter, "append", slow)
    body = b"x" * 20_000_000
    with talking(running) as client:
        sender = threading.Thread(target=client.send, args=(wire_of(body),))
        sender.start()
        until(lambda: any(one.reading_paused for one in tuple(running.server.connections)))
        [connection] = running.server.connections
        assert connection.reception is not None
        assert connection.reception.in_memory < MAX_BUFFERED + 1_000_000
        gate.set()
        assert status(client.reply())[:1] == b"K"
        sender.join()
    [message] = running.messages(1)
    assert stored(running, message) == body


def test_a_silent_client_gets_z(run: Callable[..., ServerHarness]) -> None:
    running = run(smtp_timeout=0.3)
    for sent in (b"", b"1", wire_of(b"x" * 3 * BLOCK)[:-1]):
        with talking(running) as client:
            client.send(sent)
            assert status(client.reply()) == b"ZTimeout, closing connection (#4.4.2)"
        nothing_left(running)


def test_the_first_timeout_runs_for_the_lengths_as_a_whole(
    run: Callable[..., ServerHarness],
) -> None:
    running = run()
    with talking(running):
        [connection] = until(lambda: tuple(running.server.connections))
        began = connection.deadline
        deadlines: list[float] = []
        fed = threading.Event()

        def feed() -> None:
            for piece in (b"1", b"2", b":0:,0:"):
                cast(QmqpConnection, connection).data_received(piece)
                deadlines.append(connection.deadline)
            fed.set()

        running.loop.call_soon_threadsafe(feed)
        assert fed.wait(10)
    assert deadlines[:2] == [began, began]
    assert deadlines[2] > began


def test_a_request_has_a_time_limit(run: Callable[..., ServerHarness]) -> None:
    running = run(session_timeout=0.5)
    with talking(running) as client:
        client.send(wire_of(b"x" * 100)[:50])
        assert status(client.reply()).startswith(b"ZTransaction takes too long")
    nothing_left(running)


def test_limits_on_connections_are_z(run: Callable[..., ServerHarness]) -> None:
    running = run(max_connections=3, max_connections_per_client=2)
    with talking(running) as one, talking(running) as two, talking(running) as three:
        assert status(three.reply()) == b"ZToo many connections from your address (#4.7.0)"
        for client in (one, two):
            client.send(wire_of(b"hello\n"))
            assert status(client.reply())[:1] == b"K"
    until(lambda: not running.server.connections and not running.server.clients)
    assert running.server.sessions == {"qmqp": 0}


def test_stopping_lets_a_request_finish_and_closes_idle_connections(
    run: Callable[..., ServerHarness],
) -> None:
    running = run()
    wire = wire_of(b"x" * 100_000)
    with talking(running) as idle, talking(running) as busy:
        busy.send(wire[:50_000])
        until(lambda: [one for one in tuple(running.server.connections) if one.reception])
        running.ask_to_stop(drain=20.0)
        assert status(idle.reply()) == b"ZService is stopping (#4.3.2)"
        busy.send(wire[50_000:])
        assert status(busy.reply())[:1] == b"K"
    running.close()
    running.messages(1)


def test_stopping_does_not_wait_for_ever(run: Callable[..., ServerHarness]) -> None:
    running = run()
    with talking(running) as client:
        client.send(wire_of(b"x" * 3 * BLOCK)[:-1])
        until(running.bodies)
        running.ask_to_stop(drain=0.1)
        assert status(client.reply()) == b"ZService is stopping (#4.3.2)"
        running.close()
    nothing_left(running)
