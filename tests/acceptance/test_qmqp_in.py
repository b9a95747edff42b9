"""Mail that comes by QMQP: from Postfix' qmqp-source, from nullmailer, and from another relay."""

import os
import subprocess
import tempfile
from collections.abc import Iterator

import pytest

from qmqp.sink import Sink, running_sink
from tests.acceptance.installation import QUEUED_AS, Install, Installation, installed
from tests.acceptance.stack import StartUp, command
from tests.services import free_port
from tests.waiting import until

MANY = 500
NULLMAILER = (os.environ.get("RELAY_TEST_NULLMAILER", ""), "/usr/lib/nullmailer/qmqp")


@pytest.fixture(scope="module")
def sink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sink]:
    with running_sink(dump=tmp_path_factory.mktemp("sink")) as sink:
        yield sink


@pytest.fixture(scope="module")
def door() -> int:
    """The port where the relay listens for QMQP."""
    return free_port()


@pytest.fixture(scope="module")
def relay(install: Install, sink: Sink, door: int) -> Installation:
    """It delivers to the sink."""
    relay = install(
        "sqlite",
        QMQP_SERVERS=f"127.0.0.1:{sink.port}",
        QMQP_LISTEN=f"127.0.0.1:{door}",
        MAX_RECIPIENTS="100",
    )
    worker = relay.worker(wait=False)
    relay.smtpd()
    relay.until_registered(worker)
    return relay


def delivered(sink: Sink, recipient: bytes) -> list[bytes]:
    """The messages that the sink has accepted for a recipient."""
    assert sink.dump is not None
    return [
        (sink.dump / f"{one.number:08d}.eml").read_bytes()
        for one in tuple(sink.received)
        if recipient in one.recipients and one.reply.startswith(b"K")
    ]


def test_many_from_qmqp_source(relay: Installation, sink: Sink, door: int) -> None:
    options = ("-s", "20", "-m", str(MANY), "-l", "4096", "-f", "many@example.com")
    source = [installed("qmqp-source"), *options, "-t", "many@example.org", f"127.0.0.1:{door}"]
    done = subprocess.run(source, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    relay.until_all_delivered()
    rows = "SELECT count(*), min(protocol), max(protocol) FROM messages WHERE sender = :sender"
    assert relay.rows(rows, sender="many@example.com") == [(MANY, "QMQP", "QMQP")]
    messages = delivered(sink, b"many@example.org")
    assert len(messages) == MANY
    assert all(b"with QMQP id" in message for message in messages)
    shown = relay.rows("SELECT queue_id FROM mail_history LIMIT 1")[0][0]
    text = command("show", shown, **relay.settings).stdout
    assert "from 127.0.0.1 by QMQP\n" in text


def nullmailer(port: int, message: bytes) -> subprocess.CompletedProcess[str]:
    """Send a file of nullmailer's queue with its QMQP client, which reads it from descriptor 3."""
    programs = [path for path in NULLMAILER if os.access(path, os.X_OK)]
    if not programs:
        pytest.skip("no QMQP client of nullmailer: RELAY_TEST_NULLMAILER may name one")
    with tempfile.NamedTemporaryFile() as file:
        file.write(message)
        file.flush()
        return subprocess.run(
            ["sh", "-c", 'exec "$0" 3<"$1"', programs[0], file.name],
            input=f"host=127.0.0.1\nport={port}\n",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


def test_a_message_from_nullmailer(relay: Installation, sink: Sink, door: int) -> None:
    body = b"Subject: x\n\n.one dot\nbare \r and \xff\n"
    sent = nullmailer(door, b"a@example.com\nb@null.test\nc@null.test\n\n" + body)
    assert sent.returncode == 0, sent.stderr
    queued = QUEUED_AS.search(sent.stdout.encode())
    assert queued
    relay.until_all_delivered()
    [message] = delivered(sink, b"b@null.test")
    assert message.endswith(b"\n" + body)
    assert b"id " + queued[1] in message


def test_nullmailer_learns_of_a_permanent_failure(relay: Installation, door: int) -> None:
    sent = nullmailer(door, b"a@example.com\n<b@null.test\n\nSubject: x\n\n")
    assert sent.returncode == 35, "ERR_MSG_PERMFAIL"
    assert "Bad recipient address" in sent.stdout


def test_nullmailer_tries_again_after_z(relay: Installation, install: Install) -> None:
    port = free_port()
    closed = install("sqlite", QMQP_LISTEN=f"127.0.0.1:{port}", QMQP_CLIENT_NETWORKS="192.0.2.0/24")
    closed.smtpd()
    sent = nullmailer(port, b"a@example.com\nb@null.test\n\nSubject: x\n\n")
    assert sent.returncode == 16, "ERR_MSG_TEMPFAIL"
    assert "not authorized" in sent.stdout


def test_up_says_where_it_listens_for_qmqp(start_up: StartUp) -> None:
    port = free_port()
    up = start_up("--demo", QMQP_LISTEN=f"127.0.0.1:{port}")
    assert f"QMQP in   127.0.0.1:{port}" in up.log_text()
    sent = nullmailer(port, b"a@example.com\nb@up.test\n\nSubject: x\n\n")
    assert sent.returncode == 0, sent.stderr
    up.until_state("b@up.test", "delivered")


def test_a_relay_before_another_relay(
    relay: Installation, install: Install, sink: Sink, door: int
) -> None:
    first = install("sqlite", QMQP_SERVERS=f"127.0.0.1:{door}", RETRY_MIN="1s")
    worker = first.worker(wait=False)
    first.smtpd()
    first.until_registered(worker)
    body = b"Subject: two relays\n\n" + b"line\n" * 200_000
    queue_id = first.send("b@two.test", body=body)
    first.until_all_delivered()
    relay.until_all_delivered()
    [message] = delivered(sink, b"b@two.test")
    assert message.endswith(b"\n" + body)
    assert f"id {queue_id}".encode() in message
    [(server, outcome, reply)] = first.attempts("b@two.test")
    assert (server, outcome) == (f"127.0.0.1:{door}", "delivered")
    assert reply == f"Ok: queued as {relay.to('b@two.test').queue_id}"


def test_a_relay_sends_too_many_recipients_in_parts(
    relay: Installation, install: Install, sink: Sink, door: int
) -> None:
    first = install("sqlite", QMQP_SERVERS=f"127.0.0.1:{door}")
    worker = first.worker(wait=False)
    first.smtpd()
    first.until_registered(worker)
    recipients = [f"{number}@parts.test" for number in range(150)]
    first.send(*recipients)
    until(
        lambda: all(delivered(sink, recipient.encode()) for recipient in recipients),
        60,
        what=first.log_text,
    )
    assert {len(delivered(sink, recipient.encode())) for recipient in recipients} == {1}
    until(lambda: not first.count("d.state = 'sending'"), what=first.unfinished)
    states = dict(first.rows("SELECT state, count(*) FROM deliveries GROUP BY state"))
    assert states == {"split": 1, "delivered": 2}
