"""A QMQP server gets the bytes that the client sent, and no size of a message makes a process
large.

The bytes at the sink are the trace field and the content as sent, with CRLF turned to LF and the
dots unstuffed. A content that is not empty has at least one octet in LF form, because SMTP has
whole lines only.
"""

import random
import re
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from qmqp.sink import Sink, running_sink
from tests.acceptance.installation import QUEUED_AS, Install, Installation
from tests.waiting import until

BLOCK = 64 << 10  # of smtpd, and RELAY_BLOCK_SIZE
MB = 1 << 20
GROWTH = 32 * MB
AT_ONCE = 16
TRACE = re.compile(
    rb"\AReceived: from client\.example\.com \(\[127\.0\.0\.1\]\)\n"
    rb"\tby relay\.example\.com with ESMTP id ([0-9a-f]{32})\n"
    rb"\tfor <[^>]+>; [A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d [+-]\d{4}\n"
)
HEADER = (
    b"From: me@example.com\nReceived: from elsewhere by example.com\nSubject: =?utf-8?q?bytes?=\n\n"
)
LINES = (
    b".\n..\n...dots\n.dot\n\n\n \n\t\n"
    + bytes(range(128, 256))
    + b"\n"
    + b"x" * 998
    + b"\nbare \x01\x7f bytes\n"
)


@pytest.fixture(scope="module")
def sink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sink]:
    with running_sink(dump=tmp_path_factory.mktemp("sink")) as sink:
        yield sink


@pytest.fixture(scope="module")
def vast() -> Iterator[Sink]:
    """A sink that stores no message."""
    with running_sink() as sink:
        yield sink


@pytest.fixture(scope="module")
def relay(
    install: Install, sink: Sink, vast: Sink, tmp_path_factory: pytest.TempPathFactory
) -> Installation:
    routes = tmp_path_factory.mktemp("routes") / "routes.toml"
    routes.write_text(f'[vast]\nrecipients = ["vast.test"]\nservers = ["127.0.0.1:{vast.port}"]\n')
    relay = install(
        "sqlite",
        QMQP_SERVERS=f"127.0.0.1:{sink.port}",
        MAX_MESSAGE_SIZE="128M",
        # A worker that is stopped within a transaction keeps SQLite's lock. No rows are made then,
        # and all vast messages wait at once.
        JOURNAL_LIMIT=str(2 * AT_ONCE * 100 * MB),
        ROUTES=str(routes),
    )
    worker = relay.worker(wait=False)
    relay.smtpd()
    relay.until_registered(worker)
    return relay


def content(size: int, *, header: bool) -> bytes:
    """Content of that many octets in LF form, with bytes that programs often break."""
    head = HEADER if header else b""
    lines = (
        LINES * ((size - len(head)) // len(LINES) + 1) if size < MB else LINES * (MB // len(LINES))
    )
    if size >= MB:
        lines *= size // len(lines) + 1
    text = (head + lines)[: max(0, size - 1)]
    return text + b"\n" if size else b""


def on_the_wire(text: bytes) -> bytes:
    """As an SMTP client sends it (RFC 5321, 4.5.2), with its end."""
    crlf = text.replace(b"\n", b"\r\n")
    stuffed = crlf.replace(b"\r\n.", b"\r\n..")
    return (b"." if crlf.startswith(b".") else b"") + stuffed + b".\r\n"


@contextmanager
def data_phase(relay: Installation, recipient: str, size: int = 0) -> Iterator[socket.socket]:
    """A connection on which content may be sent."""
    with socket.create_connection(("127.0.0.1", relay.port), 60) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        replies = connection.makefile("rb")
        assert replies.readline().startswith(b"220 ")
        parameter = f" SIZE={size}" if size else ""
        connection.sendall(
            f"EHLO client.example.com\r\nMAIL FROM:<me@example.com>{parameter}\r\n"
            f"RCPT TO:<{recipient}>\r\nDATA\r\n".encode()
        )
        until(lambda: replies.readline().startswith(b"354 "), what="DATA is answered")
        yield connection


def deliver_results(
    relay: Installation, recipient: str, wire: bytes, cuts: Iterator[int] | None = None
) -> str:
    """Send content in one go, or cut into segments of these lengths; the queue id."""
    with data_phase(relay, recipient) as connection:
        view, start = memoryview(wire), 0
        while start < len(wire):
            length = next(cuts) if cuts is not None else len(wire)
            connection.sendall(view[start : start + length])
            start += length
        return queue_id(connection)


def queue_id(connection: socket.socket) -> str:
    reply = connection.recv(1000)
    found = QUEUED_AS.search(reply)
    assert found, reply
    return found[1].decode()


def segments(seed: str) -> Iterator[int]:
    """Lengths of every kind, small ones more often."""
    draw = random.Random(seed)
    while True:
        yield int(2 ** draw.uniform(0, 18))


def arrived(relay: Installation, sink: Sink, recipient: str) -> tuple[bytes, bytes]:
    """The message at the sink for a recipient: its trace field, and the rest. It must be the only
    one."""
    relay.until_state(recipient, "delivered")
    (one,) = [one for one in list(sink.received) if one.recipients == (recipient.encode(),)]
    assert sink.dump is not None
    file = sink.dump / f"{one.number:08d}.eml"
    whole = file.read_bytes()
    file.unlink()
    assert len(whole) == one.size == relay.to(recipient).size
    trace = TRACE.match(whole)
    assert trace, whole[:500]
    assert trace[1].decode() == relay.to(recipient).queue_id
    return trace[0], whole[trace.end() :]


@pytest.mark.parametrize("header", [True, False], ids=["header", "bare"])
@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 10 * MB])
def test_C31_bytes_arrive_as_they_were_sent(
    relay: Installation, sink: Sink, size: int, header: bool
) -> None:
    text = content(size, header=header)
    assert len(text) == size
    for name, cuts in ("one", None), ("cut", segments(f"{size}{header}")):
        recipient = f"{name}-{size}-{header}@example.org"
        deliver_results(relay, recipient, on_the_wire(text), cuts)
        _, got = arrived(relay, sink, recipient)
        assert got == text


@pytest.mark.parametrize("size", [BLOCK - 1, BLOCK, BLOCK + 1])
def test_a_stored_body_of_about_a_block(relay: Installation, sink: Sink, size: int) -> None:
    empty, recipient = (
        f"empty--{size}@example.org",
        f"stored-{size}@example.org",
    )  # of the same length
    deliver_results(relay, empty, on_the_wire(b""))
    trace, _ = arrived(relay, sink, empty)
    text = content(size - len(trace), header=True)
    deliver_results(relay, recipient, on_the_wire(text))
    again, got = arrived(relay, sink, recipient)
    assert len(again) + len(got) == size
    assert got == text


def test_every_octet_in_a_segment_of_its_own(relay: Installation, sink: Sink) -> None:
    text = HEADER + LINES
    deliver_results(relay, "octets@example.org", on_the_wire(text), iter(lambda: 1, 0))
    _, got = arrived(relay, sink, "octets@example.org")
    assert got == text


@pytest.mark.parametrize("header", [True, False], ids=["header", "bare"])
def test_a_hundred_megabytes(relay: Installation, sink: Sink, header: bool) -> None:
    text = content(100 * MB, header=header)
    recipient = f"hundred-{header}@example.org"
    deliver_results(relay, recipient, on_the_wire(text), segments(recipient) if header else None)
    _, got = arrived(relay, sink, recipient)
    assert got == text


@pytest.mark.timeout(300)  # 1.6 GB have to be synced, on whatever disk there is
def test_memory_stays_flat_while_sixteen_of_a_hundred_megabytes_pass(
    relay: Installation, vast: Sink
) -> None:
    """All sixteen at once, first through smtpd, then, as it stood still until then, through the
    worker."""
    worker, smtpd = relay.children
    for n in range(AT_ONCE):  # the processes allocate the memory of any mail
        relay.send(f"warm-{n}@vast.test")
    relay.until_all_delivered()
    wire = on_the_wire(content(100 * MB, header=True))
    before = {process: peak(process.pid, afresh=True) for process in relay.children}
    all_in_data = threading.Barrier(AT_ONCE)

    def send(number: int) -> str:
        with data_phase(relay, f"vast-{number}@vast.test", 100 * MB) as connection:
            all_in_data.wait(60)
            connection.sendall(wire)
            return queue_id(connection)

    worker.send_signal(signal.SIGSTOP)
    with ThreadPoolExecutor(AT_ONCE) as threads:
        assert len(set(threads.map(send, range(AT_ONCE)))) == AT_ONCE
    worker.send_signal(signal.SIGCONT)
    relay.until_all_delivered()
    sizes = [one.size for one in list(vast.received)][-AT_ONCE:]
    assert all(size > 100 * MB for size in sizes)
    assert together(relay) == AT_ONCE
    grown = [peak(process.pid) - before[process] for process in (smtpd, worker)]
    assert max(grown) < GROWTH, f"octets by which smtpd and worker grew: {grown}"


def peak(pid: int, *, afresh: bool = False) -> int:
    """The most memory that a process had (octets): ever, or from now on."""
    if afresh:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found[1]) << 10


def together(relay: Installation) -> int:
    """How many of the vast messages were on their way to the server at the same moment."""
    tries = relay.rows(
        """SELECT @micros(a.started_at), @micros(a.finished_at) FROM attempts a
        JOIN messages m ON m.id = a.queue_id WHERE m.size > :least AND a.outcome = 'delivered'
        AND EXISTS (SELECT 1 FROM recipients r WHERE r.queue_id = m.id
        AND r.address LIKE :whose)""",
        least=100 * MB,
        whose="vast-%",
    )
    return sum(started <= min(ended for _, ended in tries) for started, _ in tries)
