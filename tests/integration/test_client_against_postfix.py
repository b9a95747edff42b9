"""The client against Postfix' qmqp-sink and a real qmqpd."""

import asyncio
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import uvloop

from qmqp.body import BodyFile
from qmqp.client import ClientConnection, Result, SendOutcome, Timeouts
from qmqp.netstring import encode
from qmqp.request import Request
from qmqp.sink import running_sink
from tests.postfix import QmqpSink
from tests.services import ServiceError, end, spawn

HEADER = (
    b"From: <s@x.test>\nTo: <r@y.test>\nDate: Sun, 22 Nov 2026 15:00:00 +0000\nMessage-Id:"
    b" <1@x.test>\n"
)

type Deliver = Callable[..., Result]


@pytest.fixture(scope="module")
def qmqp_sink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QmqpSink]:
    sink = QmqpSink(tmp_path_factory.mktemp("qmqp-sink"))
    try:
        sink.start()
    except ServiceError as error:
        pytest.skip(str(error))
    yield sink
    sink.stop()


@pytest.fixture
def deliver(tmp_path: Path) -> Deliver:
    """Send a message `times` times at once; return one of the results, which must be equal."""
    path = tmp_path / "body"

    def deliver(
        port: int,
        data: bytes,
        *recipients: bytes,
        sender: bytes = b"s@x.test",
        times: int = 1,
        block_size: int = 65536,
    ) -> Result:
        path.write_bytes(data)
        fd = os.open(path, os.O_RDONLY)
        request = Request(len(data), sender, recipients or (b"r@y.test",))

        async def scenario() -> list[Result]:
            sendings = [
                ClientConnection(
                    host="127.0.0.1",
                    port=port,
                    request=request,
                    body=BodyFile(fd, len(data)),
                    block_size=block_size,
                    timeouts=Timeouts(reply=20),
                ).run()
                for _ in range(times)
            ]
            return await asyncio.gather(*sendings)

        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                results = runner.run(scenario())
        finally:
            os.close(fd)
        assert len({(result.outcome, result.committed) for result in results}) == 1, results
        return results[0]

    return deliver


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 65535, 65536, 65537, 200_000, 3_000_000])
def test_B40_qmqp_sink_takes_every_size(deliver, qmqp_sink, size):
    result = deliver(qmqp_sink.port, bytes(size), times=20)
    assert result[:3] == (SendOutcome.DELIVERED, b"Ok", True)


@pytest.mark.parametrize("block_size", [1, 7, 4096])
def test_B40_qmqp_sink_takes_blocks_of_any_size(deliver, qmqp_sink, block_size):
    assert (
        deliver(qmqp_sink.port, bytes(300), times=20, block_size=block_size).outcome
        is SendOutcome.DELIVERED
    )


def test_B30_qmqp_sink_takes_an_envelope_larger_than_the_message(deliver, qmqp_sink):
    recipients = [b"%d@y.test" % number for number in range(100_000)]
    assert deliver(qmqp_sink.port, b"hello\n", *recipients).outcome is SendOutcome.DELIVERED


def test_qmqpd_accepts_and_keeps_what_was_sent(deliver, postfix):
    data = HEADER + b"Subject: hello\n\nFirst line\n.\n..two dots\n\xff 8 bit\n"
    result = deliver(postfix.port, data, b"r@y.test", b"q@z.test")
    assert result.outcome is SendOutcome.DELIVERED
    assert result.text.startswith(b"Ok: queued as ")
    queued = postfix.queued(result.text.split()[-1].decode())
    assert data.partition(b"\n\n")[2] in queued
    assert b"sender: s@x.test\n" in queued
    assert queued.count(b"\nrecipient: ") == 2


def test_qmqpd_takes_many_at_once(deliver, postfix):
    assert deliver(postfix.port, HEADER + b"\nhello\n", times=30).outcome is SendOutcome.DELIVERED


def test_B28_qmqpd_accepts_the_null_sender(deliver, postfix):
    result = deliver(postfix.port, HEADER + b"\nhello\n", sender=b"")
    assert result.outcome is SendOutcome.DELIVERED
    assert b"sender: \n" in postfix.queued(result.text.split()[-1].decode())


@pytest.mark.parametrize("size", [250_000, 3_000_000, 30_000_000])
def test_B16_qmqpd_refuses_a_large_message_before_it_has_come(deliver, postfix, size):
    result = deliver(postfix.port, b"x" * 70 + b"\n" + bytes(size))
    assert result.outcome is SendOutcome.REJECTED
    assert b"length exceeds storage limit" in result.text


def test_B17_qmqpd_refuses_a_client_that_is_not_authorized(deliver, postfix):
    result = deliver(postfix.closed_port, HEADER + b"\nhello\n")
    assert result.outcome is SendOutcome.REJECTED
    assert b"is not authorized to use this service" in result.text


@pytest.mark.parametrize(
    ("subject", "outcome"), [(b"refuse", SendOutcome.REJECTED), (b"later", SendOutcome.DEFERRED)]
)
def test_B6_qmqpd_refuses_by_content(deliver, postfix, subject, outcome):
    result = deliver(postfix.port, HEADER + b"Subject: " + subject + b"\n\nhello\n")
    assert (result.outcome, result.committed) == (outcome, True)


def exchange(port: int, data: bytes) -> bytes:
    """All bytes that a server sends until it closes."""
    with socket.create_connection(("127.0.0.1", port), 20) as server:
        server.sendall(data)
        server.shutdown(socket.SHUT_WR)
        server_reply = b""
        with suppress(ConnectionResetError):
            while more := server.recv(4096):
                server_reply += more
        return server_reply


ENVELOPE = b"8:s@x.test,8:r@y.test,"


@pytest.mark.parametrize(
    ("wire", "times"),
    [
        (b"99:" + encode(HEADER) + ENVELOPE + b",", 1),
        (encode(encode(HEADER) + ENVELOPE) * 2, 1),
        (encode(encode(HEADER) + b"8:s@x.test,"), 0),
        (encode(encode(HEADER) + ENVELOPE)[:-1], 0),
    ],
    ids=[
        "ignores the outer length",
        "ignores a second request",
        "wants a recipient",
        "wants its end",
    ],
)
def test_framing_of_postfix_is_that_of_the_reference(postfix, wire, times):
    assert exchange(postfix.port, wire).count(b"KOk: queued as ") == times


def test_B29_addresses_and_line_ends_in_postfix_are_those_of_the_reference(postfix):
    body, recipient = HEADER.replace(b"\n", b"\r\n") + b"\r\nNo: header\r\n", b"r@y.test\0q@z.test"
    server_reply = exchange(
        postfix.port, encode(encode(body) + encode(b"s@x.test") + encode(recipient))
    )
    queued = postfix.queued(server_reply.split()[-1].removesuffix(b",").decode())
    assert b"\nrecipient: r@y.test\n" in queued, "a recipient that was not meant"
    assert b"z.test" not in queued
    assert b" \n \nNo: header \n" in queued, "the line between header and body is no longer empty"


def test_our_sink_takes_what_qmqp_source_sends():
    with running_sink() as sink:
        command = [
            "qmqp-source",
            "-s",
            "4",
            "-m",
            "40",
            "-l",
            "3000",
            "-r",
            "3",
            "-f",
            "s@x.test",
            "-t",
            "r@y.test",
        ]
        try:
            source = spawn([*command, f"127.0.0.1:{sink.port}"])
        except FileNotFoundError as error:
            pytest.skip(str(error))
        assert sink.wait_for(40, 20)
        assert source.wait(20) == 0
        end(source)
    assert (sink.count, list(sink.faults)) == (40, [])
    assert sink.received[0].recipients == (b"0r@y.test", b"1r@y.test", b"2r@y.test")
    assert sink.received[0].size == 3000
