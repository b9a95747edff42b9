"""smtpd over real TCP: its replies, its files and its rows.

Most tests run the server in a thread, with a real spool and spooler, and a list for a database. The
last ones run the whole program on a real database.
"""

import asyncio
import errno
import fcntl
import json
import math
import os
import re
import select
import signal
import smtplib
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from email import policy
from email.message import EmailMessage
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from sqlalchemy import create_engine, text

from reception.policy import Policy
from reception.receiver import BLOCK, MAX_BUFFERED
from reception.server import LATE_TICK, Door, FrontEnd
from relay.db.engine import connect, reading, writing
from relay.listeners import Listener
from relay.queue.accept import NewMessage
from relay.settings import SettingsError, SmtpdSettings
from relay.spool import store
from relay.spool.journal.directory import SegmentFile
from relay.spool.journal.supply import MIN_FREE
from relay.spool.store import BodyWriter, Spool
from smtpd.server import SmtpConnection
from smtpd.session import ENDLESS
from tests.integration.front_end import HeldSyncs, ServerHarness, body_of, starting
from tests.postfix import PostfixClient
from tests.services import ServiceError
from tests.waiting import stands_still, until, whole_lines


class SmtpHarness(ServerHarness):
    """A server of SMTP in a thread."""

    @property
    def connections(self) -> set[SmtpConnection]:
        return cast(set[SmtpConnection], self.server.connections)

    def client(self, source: str = "127.0.0.1") -> "RawClient":
        return RawClient(self.host, self.port, source)


def smtp_door(settings: SmtpdSettings) -> Door:
    return Door("smtp", "RELAY_SMTP_LISTEN", Policy(settings), SmtpConnection)


class RawClient:
    """A client that sends and expects bytes."""

    def __init__(self, host: str, port: int, source: str = "127.0.0.1") -> None:
        self.socket = socket.create_connection((host, port), timeout=30, source_address=(source, 0))
        self._received = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def expect(self, *replies: bytes) -> None:
        """The next replies begin with these bytes. A reply of several lines counts as one."""
        for expected in replies:
            found = self.reply()
            assert found.startswith(expected), found

    def reply(self) -> bytes:
        while not (match := re.match(rb"(?:\d{3}-.*\r\n)*\d{3} .*\r\n", self._received)):
            data = self.socket.recv(65536)
            assert data, f"closed after {self._received!r}"
            self._received += data
        self._received = self._received[match.end() :]
        return match[0]

    def closed(self) -> bool:
        try:
            return self.socket.recv(65536) == b""
        except ConnectionResetError:
            return True

    def say(self, line: bytes, *replies: bytes) -> None:
        self.send(line + b"\r\n")
        self.expect(*replies)

    def begin(self, *recipients: bytes) -> None:
        """Sends commands up to DATA, and expects the 354."""
        lines = [b"EHLO client.example", b"MAIL FROM:<a@example.com>"]
        lines += [b"RCPT TO:<" + one + b">" for one in recipients or [b"b@example.org"]] + [b"DATA"]
        self.expect(b"220")
        self.send(b"\r\n".join(lines) + b"\r\n")
        self.expect(*([b"250"] * (len(lines) - 1)), b"354")

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def run(spool: Spool) -> Iterator[Callable[..., SmtpHarness]]:
    with starting(SmtpHarness, smtp_door, spool) as start:
        yield start


@contextmanager
def talking(running: SmtpHarness, source: str = "127.0.0.1") -> Iterator[RawClient]:
    client = running.client(source)
    try:
        yield client
    finally:
        client.close()


TRACE = re.compile(
    rb"Received: from client\.example \(\[127\.0\.0\.1\]\)\n"
    rb"\tby relay\.example with (?:ESMTP|UTF8SMTP) id ([0-9a-f]{32})(\n\tfor <[^>]+>; |;\n\t)"
    rb"[A-Z][a-z]{2}, \d{2} [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d [+-]\d{4}\n"
)


def stored(running: SmtpHarness, message: NewMessage) -> bytes:
    """The body without its trace field, which is checked."""
    body = body_of(running, message)
    assert message.size == len(body)
    trace = TRACE.match(body)
    assert trace is not None, body[:300]
    assert trace[1].decode() == message.id
    assert (b"for <" in trace[2]) is (len(message.recipients) == 1)
    return body[trace.end() :]


SIZES = [0, 1, 100, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3_000_000]


@pytest.mark.parametrize("size", SIZES)
def test_C1_C6_bytes_are_stored_as_they_were_sent(
    run: Callable[..., SmtpHarness], size: int
) -> None:
    running = run()
    line = b".text that needs stuffing \xff\0"
    body = (line + b"\n") * (size // (len(line) + 1)) + b"x" * (size % (len(line) + 1))
    body = body + b"\n" if body else body
    with talking(running) as client:
        client.begin()
        wire = re.sub(rb"(?m)^\.", b"..", body).replace(b"\n", b"\r\n") + b".\r\n"
        client.send(wire[:1000])
        client.send(wire[1000:])
        reply = client.reply()
        client.say(b"QUIT", b"221 2.0.0")
    [message] = running.messages(1)
    assert reply == b"250 2.0.0 Ok: queued as %b\r\n" % message.id.encode()
    assert stored(running, message) == body
    until(lambda: {*running.hints} == {message.id})  # twice if the COMMIT took long


def test_an_ordinary_client_and_the_whole_envelope(run: Callable[..., SmtpHarness]) -> None:
    running = run()
    with smtplib.SMTP(running.host, running.port, local_hostname="client.example") as client:
        client.ehlo()
        assert client.has_extn("pipelining")
        client.sendmail(
            "a@example.com",
            ['"b c"@example.org', "d@example.org"],
            b"Message-ID: <m@i>\r\n\r\n..\r\n",
            mail_options=["BODY=8BITMIME", "RET=FULL", "ENVID=x+2B"],
            rcpt_options=["NOTIFY=SUCCESS"],
        )
    [message] = running.messages(1)
    assert [one.address for one in message.recipients] == ["b c@example.org", "d@example.org"]
    assert {one.notify for one in message.recipients} == {"SUCCESS"}
    assert (message.sender, message.helo, message.protocol) == (
        "a@example.com",
        "client.example",
        "ESMTP",
    )
    assert (message.body_type, message.ret, message.envid) == ("8BITMIME", "FULL", "x+2B")
    assert (message.header_message_id, message.client_address) == ("<m@i>", "127.0.0.1")
    assert stored(running, message) == b"Message-ID: <m@i>\n\n..\n"


@pytest.mark.parametrize(
    ("setting", "networks", "reply"),
    [
        ("reject", ("127.0.0.1",), b"550 5.6.11"),
        ("strip", (), b"550 5.6.11"),
        ("strip", ("127.0.0.1",), b"250"),
    ],
)
def test_cr_cr_lf_is_refused_or_stripped_by_setting(
    run: Callable[..., SmtpHarness], setting: str, networks: tuple[str, ...], reply: bytes
) -> None:
    running = run(bare_cr=setting, client_networks=networks, recipient_domains=("example.org",))
    with talking(running) as client:
        client.begin()
        client.send(b"Subject: x\r\r\n\r\r\nhello\r\r\n.\r\r\nRSET\r\n.\r\n")
        client.expect(reply)
    expected = [b"Subject: x\n\nhello\n\nRSET\n"] if reply == b"250" else []
    kept = [stored(running, message) for message in running.messages(len(expected))]
    assert kept == expected


MAILBOX_LINES = b"From ann Mon Jan  1\n>From bob remote from c\n"


@pytest.mark.parametrize("size", [0, 3 * BLOCK])
@pytest.mark.parametrize(
    ("beginning", "kept"),
    [
        (
            b"\tby bank.example with ESMTP\nSubject: x\n",
            b"\n\tby bank.example with ESMTP\nSubject: x\n",
        ),
        (b" \n", b"\n \n"),
        (b" ", b"\n "),
        (
            MAILBOX_LINES + b"Subject: x\n\nFrom\n",
            b"X-Mailbox-Line: From ann Mon Jan  1\n"
            b"X-Mailbox-Line: >From bob remote from c\nSubject: x\n\nFrom\n",
        ),
        (b">>From x\n", b"X-Mailbox-Line: >>From x\n"),
        (b"From: a@b\n\nFrom x\n", b"From: a@b\n\nFrom x\n"),
        (b"From\n", b"From\n"),
        (b"> From x\n", b"> From x\n"),
        (b"X: y\n folded\n", b"X: y\n folded\n"),
        (b"\n indented\n", b"\n indented\n"),
    ],
)
def test_the_first_line_of_the_content_never_continues_the_trace_field(
    run: Callable[..., SmtpHarness], beginning: bytes, kept: bytes, size: int
) -> None:
    running = run()
    rest = b"\n" + b"From x\n\ty\n" * (size // 10)
    wire = (beginning + rest).replace(b"\n", b"\r\n") + b".\r\n"
    with talking(running) as client:
        client.begin()
        for at in range(8):  # in segments of one octet
            client.send(wire[at : at + 1])
        client.send(wire[8:])
        client.expect(b"250")
    [message] = running.messages(1)
    assert stored(running, message) == kept + rest


def test_a_long_recipient_is_accepted_and_omitted_from_the_trace_field(
    run: Callable[..., SmtpHarness],
) -> None:
    running = run()
    long = b"srs0=" + b"x" * 950 + b"@example.org"
    with talking(running) as client:
        client.begin(long)
        client.say(b".", b"250")
    [message] = running.messages(1)
    assert message.recipients[0].address.encode() == long
    trace = body_of(running, message)
    assert b" for " not in trace
    assert max(map(len, trace.split(b"\n"))) <= 998


def test_a_trusted_client_may_leave_the_domain_out(run: Callable[..., SmtpHarness]) -> None:
    running = run()
    with talking(running) as client:
        client.expect(b"220")
        client.say(b"HELO app_1", b"250")
        client.send(b"MAIL FROM:<cron@app_1>\r\nRCPT TO:<root>\r\nDATA\r\n.\r\n")
        client.expect(b"250", b"250", b"354", b"250")
    [message] = running.messages(1)
    assert message.sender == "cron@app_1"
    assert [one.address for one in message.recipients] == ["root@relay.example"]


def test_an_untrusted_client_must_write_the_domain(run: Callable[..., SmtpHarness]) -> None:
    running = run(client_networks=(), recipient_domains=("relay.example",))
    with talking(running) as client:
        client.expect(b"220")
        client.say(b"HELO app", b"250")
        client.say(b"MAIL FROM:<cron>", b"501 5.1.7 Bad sender address: a domain is needed")
        client.say(b"MAIL FROM:<cron@app>", b"250")
        client.say(b"RCPT TO:<root>", b"501 5.1.3 Bad recipient address: a domain is needed")
        client.say(b"RCPT TO:<root@relay.example.>", b"250")


def test_a_header_in_utf_8_passes_and_an_address_does_not(
    run: Callable[..., SmtpHarness],
) -> None:
    running = run()
    mail = EmailMessage(policy=policy.SMTPUTF8)
    mail["From"], mail["To"], mail["Subject"] = (
        "J\xfcrgen <a@example.com>",
        "b@example.org",
        "Gr\xfc\xdfe \u2603",
    )
    mail.set_content("hello\n")
    options = ["SMTPUTF8", "BODY=8BITMIME"]
    with smtplib.SMTP(running.host, running.port, local_hostname="client.example") as client:
        client.sendmail("a@example.com", ["b@example.org"], mail.as_bytes(), mail_options=options)
        with pytest.raises(smtplib.SMTPSenderRefused) as refused:
            client.sendmail(
                "j\xfcrgen@example.com", ["b@example.org"], mail.as_bytes(), mail_options=options
            )
        assert refused.value.smtp_code == 553
    [message] = running.messages(1)
    assert (message.protocol, message.body_type) == ("UTF8SMTP", "8BITMIME")
    body = stored(running, message)
    assert b"with UTF8SMTP id" in body_of(running, message)
    assert (
        "From: J\xfcrgen <a@example.com>\nTo: b@example.org\nSubject: Gr\xfc\xdfe \u2603\n".encode()
        in body
    )


@pytest.fixture
def postfix_client() -> Iterator[Callable[[int], PostfixClient]]:
    started: list[PostfixClient] = []

    def start(relay_port: int) -> PostfixClient:
        try:
            started.append(PostfixClient(relay_port))
            started[-1].start()
        except ServiceError as error:
            pytest.skip(str(error))
        return started[-1]

    yield start
    for one in started:
        one.stop()


def test_a_utf_8_header_from_postfix_sendmail_arrives(
    run: Callable[..., SmtpHarness], postfix_client: Callable[[int], PostfixClient]
) -> None:
    running = run()
    content = "Subject: Gr\xfc\xdfe \u2603\nMessage-ID: <m@i>\n\nhello\n".encode()
    postfix_client(running.port).sendmail("a@example.com", "b@example.org", content)
    [message] = running.messages(1)
    assert (message.sender, message.recipients[0].address) == ("a@example.com", "b@example.org")
    assert (message.protocol, message.header_message_id) == ("UTF8SMTP", "<m@i>")
    assert "Subject: Gr\xfc\xdfe \u2603\n".encode() in body_of(running, message)


def test_the_trace_field_omits_several_recipients_and_escapes_the_client(
    run: Callable[..., SmtpHarness],
) -> None:
    running = run()
    with talking(running) as client:
        client.expect(b"220")
        client.say(b"HELO evil(host)", b"250")
        client.send(b'MAIL FROM:<>\r\nRCPT TO:<"b c"@d>\r\nDATA\r\n')
        client.expect(b"250", b"250", b"354")
        client.say(b".", b"250")
    [message] = running.messages(1)
    body = body_of(running, message)
    assert body.startswith(
        b"Received: from evil?host? ([127.0.0.1])\n\tby relay.example with SMTP id "
    )
    assert b'\n\tfor <"b c"@d>; ' in body
    assert (message.sender, message.helo) == ("", "evil(host)")


def test_C19_two_messages_in_one_packet(run: Callable[..., SmtpHarness]) -> None:
    running = run()
    with talking(running) as client:
        client.begin()
        again = b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.org>\r\nDATA\r\n"
        client.send(b"one\r\n.\r\n" + again)
        client.expect(b"250 2.0.0", b"250 2.1.0", b"250 2.1.5", b"354")
        client.send(b"two\r\n.\r\nQUIT\r\n")
        client.socket.shutdown(socket.SHUT_WR)
        client.expect(b"250 2.0.0", b"221 2.0.0")
        assert client.closed()
    assert [stored(running, message) for message in running.messages(2)] == [
        b"one\n",
        b"two\n",
    ]


def test_C2_smuggled_content_leaves_no_body(run: Callable[..., SmtpHarness]) -> None:
    running = run()
    with talking(running) as client:
        client.begin()
        client.send(b"x" * 3 * BLOCK + b"\n.\r\nMAIL FROM:<evil@example.com>\r\n.\r\nNOOP\r\n")
        client.expect(b"550 5.6.11", b"250 2.0.0")
    until(lambda: not running.bodies())
    assert running.database.messages == []


def test_C12_content_over_the_limit_is_removed(run: Callable[..., SmtpHarness]) -> None:
    running = run(max_message_size=4 * BLOCK)
    with talking(running) as client:
        client.begin()
        client.send(b"x" * 5 * BLOCK)
        client.send(b"x" * 5 * BLOCK + b"\r\n.\r\n")
        client.expect(b"552 5.3.4")
        client.say(b"MAIL FROM:<a@b> SIZE=%d" % (4 * BLOCK + 1), b"552 5.3.4")
        client.say(b"MAIL FROM:<a@b>", b"250 2.1.0")
    until(lambda: not running.bodies())


def test_C20_a_client_that_disconnects_in_its_message_leaves_no_body(
    run: Callable[..., SmtpHarness],
) -> None:
    running = run()
    with talking(running) as client:
        client.begin()
        client.send(b"x" * 3 * BLOCK)
        until(running.bodies)
    until(lambda: not running.bodies() and not running.connections)
    assert running.database.messages == []


def test_C21_a_client_that_disconnects_after_its_message_changes_nothing(
    run: Callable[..., SmtpHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    running, syncs = run(), HeldSyncs(monkeypatch)
    with talking(running) as first, talking(running) as second:
        first.begin()
        first.send(b"first\r\n.\r\n")
        second.begin()
        second.send(b"second\r\n.\r\n")
        until(lambda: [one.reception for one in running.connections].count(None) == 0)
        second.close()
        until(lambda: len(running.connections) == 1)
        syncs.gate.set()
        first.expect(b"250 2.0.0")
    kept = sorted(stored(running, message) for message in running.messages(2))
    assert kept == [b"first\n", b"second\n"]


def test_C23_after_the_deadline_the_connection_closes_without_a_reply(
    run: Callable[..., SmtpHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message may be in the journal, so there is neither a 250 nor an error."""
    running, syncs = run(accept_deadline=0.5), HeldSyncs(monkeypatch)
    with talking(running) as client:
        client.begin()
        client.send(b"first\r\n.\r\n")
        assert client.closed()
    syncs.gate.set()
    [message] = running.messages(1)
    assert stored(running, message) == b"first\n"


def test_C23_a_database_that_hangs_costs_no_250(run: Callable[..., SmtpHarness]) -> None:
    running = run()
    running.database.gate.clear()
    with talking(running) as client:
        client.begin()
        client.say(b"x\r\n.", b"250 2.0.0")
    assert running.database.messages == []
    running.database.gate.set()
    assert len(running.messages(1)) == 1


@pytest.mark.parametrize("size", [500, 70_000], ids=["small", "large"])
def test_an_envelope_that_no_segment_holds_552(
    run: Callable[..., SmtpHarness], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """It would be refused for ever with 451. A large message has its file by then."""
    monkeypatch.setattr("reception.receiver.MAX_ENVELOPE", 3000)
    running = run()
    with talking(running) as client:
        client.expect(b"220")
        client.say(b"HELO c.example", b"250")
        for count, reply in ((20, b"552 5.5.3 Too many recipients"), (1, b"250 2.0.0")):
            client.say(b"MAIL FROM:<a@example.com>", b"250")
            for number in range(count):
                client.say(b"RCPT TO:<%d@example.org>" % number, b"250")
            client.say(b"DATA", b"354")
            client.say((b"x" * 98 + b"\r\n") * (size // 100) + b".", reply)
    assert len(running.messages(1)) == 1
    until(lambda: len(running.bodies()) == (size > 64 * 1024))


def test_above_the_limit_of_the_journal_451(run: Callable[..., SmtpHarness]) -> None:
    running = run(journal_limit=1800)
    running.database.gate.clear()
    with talking(running) as client:
        client.begin()
        client.say(b"x" * 500 + b"\r\n.", b"250 2.0.0")
        client.say(b"MAIL FROM:<a@example.com>", b"250")
        client.say(b"RCPT TO:<b@example.org>", b"250")
        client.say(b"DATA", b"354")
        client.say(b"x" * 500 + b"\r\n.", b"451 4.3.0 Cannot take the message now")
    running.database.gate.set()
    assert len(running.messages(1)) == 1


@pytest.mark.parametrize(
    ("number", "reply"),
    [
        (errno.ENOSPC, b"452 4.3.1"),
        (errno.EDQUOT, b"452 4.3.1"),
        (errno.EIO, b"451 4.3.0"),
        (errno.EROFS, b"451 4.3.0"),
    ],
)
@pytest.mark.parametrize(
    ("call", "size"),
    [
        ("write", 100),
        ("sync", 100),
        ("create", 3 * BLOCK),
        ("append", 3 * BLOCK),
        ("finish", 3 * BLOCK),
    ],
)
def test_C22_disk_faults_are_temporary_and_store_nothing(
    run: Callable[..., SmtpHarness],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    reply: bytes,
    call: str,
    size: int,
) -> None:
    """A small message meets the fault in its segment, and a large one in its file."""
    running = run()
    owner: Any = {"create": Spool, "write": SegmentFile, "sync": SegmentFile}.get(call, BodyWriter)
    real, failures = getattr(owner, call), iter([True])

    def failing(*arguments: Any, **more: Any) -> Any:
        if next(failures, False):
            raise OSError(number, "of the disk /secret/path")
        return real(*arguments, **more)

    with talking(running) as client:
        client.begin()
        monkeypatch.setattr(owner, call, failing)
        client.send(b"x" * size + b"\r\n.\r\n")
        found = client.reply()
        assert found.startswith(reply)
        assert b"secret" not in found
        client.say(b"NOOP", b"250")
    until(lambda: not running.bodies())
    assert running.database.messages == []


def test_a_slow_disk_pauses_reading_so_memory_stays_bounded(
    run: Callable[..., SmtpHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    append = BodyWriter.append

    def slow(body: BodyWriter, data: bytes) -> None:
        gate.wait(20)
        append(body, data)

    monkeypatch.setattr(BodyWriter, "append", slow)
    running = run()
    size = 64 * BLOCK
    with talking(running) as client:
        client.begin()
        sender = threading.Thread(
            target=client.send, args=((b"x" * 998 + b"\r\n") * (size // 1000) + b".\r\n",)
        )
        sender.start()
        [connection] = running.connections
        until(lambda: connection.reading_paused)
        reception = connection.reception
        assert reception is not None
        assert reception.in_memory < MAX_BUFFERED + 5 * BLOCK
        gate.set()
        client.expect(b"250 2.0.0")
        sender.join()
    [message] = running.messages(1)
    assert len(stored(running, message)) == size // 1000 * 999


def test_a_large_message_is_read_while_what_has_arrived_is_synced(
    run: Callable[..., SmtpHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, entered, sync = threading.Event(), threading.Event(), os.fdatasync

    def held(handle: int) -> None:
        if "/journal/" not in str(Path(f"/proc/self/fd/{handle}").readlink()):
            entered.set()
            assert gate.wait(20)
        sync(handle)

    monkeypatch.setattr(store, "SYNC_EVERY", 4 * BLOCK)
    monkeypatch.setattr(os, "fdatasync", held)
    running = run()
    with talking(running) as client:
        client.begin()
        [connection] = running.connections
        assert connection.reception is not None
        path = running.spool.path(connection.reception.id)
        client.send(b"x" * (5 * BLOCK))
        assert entered.wait(20)
        client.send(b"y" * (2 * BLOCK))
        until(lambda: path.stat().st_size > 6 * BLOCK)
        client.send(b"\r\n.\r\n")
        gate.set()
        client.expect(b"250 2.0.0")
    [message] = running.messages(1)
    assert stored(running, message).endswith(b"x" * (5 * BLOCK) + b"y" * (2 * BLOCK) + b"\n")


def test_C26_limits_on_connections(run: Callable[..., SmtpHarness]) -> None:
    running = run(max_connections=3, max_connections_per_client=2)
    with talking(running) as one, talking(running) as two:
        one.expect(b"220")
        two.expect(b"220")
        with talking(running) as three:
            three.expect(b"421 4.7.0")
            assert three.closed()
        until(lambda: len(running.connections) == 2)
    until(lambda: not running.connections and not running.server.clients)


def test_C26_over_all_connections(run: Callable[..., SmtpHarness]) -> None:
    running = run(max_connections=1)
    with talking(running) as one, talking(running) as two:
        one.expect(b"220")
        two.expect(b"421 4.3.2")
        assert two.closed()


def test_C26_a_quarter_of_the_connections_is_reserved_for_trusted_clients(
    run: Callable[..., SmtpHarness],
) -> None:
    running = run(max_connections=4, **CLOSED)
    with ExitStack() as stack:
        strangers = [stack.enter_context(talking(running, STRANGER)) for _ in range(3)]
        for stranger in strangers:
            stranger.expect(b"220")
        with talking(running, "127.0.0.3") as another:
            another.expect(b"421 4.3.2")
        client = stack.enter_context(talking(running))
        client.expect(b"220")
        with talking(running) as another:
            another.expect(b"421 4.3.2")
        strangers[0].say(b"QUIT", b"221")
        assert strangers[0].closed()
        until(lambda: running.server.untrusted == 2)
        stack.enter_context(talking(running, "127.0.0.3")).expect(b"220")


def test_C26_a_network_of_ipv6_addresses_is_one_client(run: Callable[..., SmtpHarness]) -> None:
    running = run(max_connections_per_client=2)
    server, client = running.server, running.policy.client
    let_in = [client("2001:db8::1"), client("2001:db8::2"), client("2001:db8:0:1::1")]
    assert server.admit(let_in[0]) is server.admit(let_in[1]) is None
    assert (server.admit(client("2001:db8:0:0:ffff::3")) or "").startswith("421 4.7.0")
    assert server.admit(let_in[2]) is None
    for one in let_in:
        server.count(one, -1)
    assert (server.admitted, server.untrusted, server.clients) == (0, 0, {})


def test_large_messages_wait_for_a_descriptor(run: Callable[..., SmtpHarness]) -> None:
    running = run(bodies_at_once=1)
    content = (b"x" * 998 + b"\r\n") * 4000
    with ExitStack() as stack:
        first, gone, second, small = (stack.enter_context(talking(running)) for _ in range(4))
        first.begin()
        first.send(content)
        until(running.bodies)
        others = {one for one in tuple(running.connections) if one.reception}
        gone.begin()
        [connection] = {one for one in tuple(running.connections) if one.reception} - others
        gone.send(content[: 3 * BLOCK])
        until(partial(has_read, connection, gone))
        gone.close()
        until(lambda: connection not in running.connections)
        second.begin()
        sender = threading.Thread(target=second.send, args=(content + b".\r\n",))
        sender.start()
        stack.callback(sender.join)
        until(lambda: any(one.reading_paused for one in tuple(running.connections)))
        small.begin()
        small.say(b"x\r\n.", b"250")
        assert len(running.bodies()) == 1
        first.say(b".", b"250")
        second.expect(b"250")
    assert [len(stored(running, one)) for one in running.messages(3)] == [
        2,
        3_996_000,
        3_996_000,
    ]
    until(lambda: running.receiver.descriptors.locked() is False)


def test_C26_a_silent_client_gets_421(run: Callable[..., SmtpHarness]) -> None:
    running = run(smtp_timeout=0.3)
    with talking(running) as silent, talking(running) as halfway:
        halfway.begin()
        halfway.send(b"x" * 3 * BLOCK)
        silent.expect(b"220", b"421 4.4.2")
        assert silent.closed()
        halfway.expect(b"421 4.4.2")
    until(lambda: not running.connections and not running.bodies())


def has_read(connection: SmtpConnection, client: RawClient) -> bool:
    """Whether no byte of the client is still in a buffer of the kernel. `octets` of the connection
    does not show that: it is reset whenever the disk is slow."""
    unsent = fcntl.ioctl(client.socket.fileno(), termios.TIOCOUTQ, bytes(4))
    unread = fcntl.ioctl(
        connection.transport.get_extra_info("socket").fileno(), termios.FIONREAD, bytes(4)
    )
    return not connection.reading_paused and unsent == unread == bytes(4)


STRANGER = "127.0.0.2"
CLOSED = {"client_networks": ("127.0.0.1",), "recipient_domains": ("example.org",)}


def test_unfinished_messages_of_untrusted_clients_leave_space_for_trusted_clients(
    run: Callable[..., SmtpHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = run(**CLOSED)
    capacity = 4_000_000

    def statvfs(_path: Path) -> SimpleNamespace:
        used = sum(path.stat().st_size for path in running.spool.directory.glob("*/*"))
        return SimpleNamespace(
            f_files=0, f_favail=0, f_bavail=capacity + MIN_FREE - used, f_frsize=1
        )

    monkeypatch.setattr("reception.space.os.statvfs", statvfs)
    with ExitStack() as stack:
        strangers = [stack.enter_context(talking(running, f"127.0.1.{n}")) for n in range(1, 9)]
        for n, stranger in enumerate(strangers, 1):
            stranger.begin()
            [connection] = [
                one for one in running.connections if one.client.address == f"127.0.1.{n}"
            ]
            stranger.send((b"x" * 998 + b"\r\n") * 800)
            until(partial(has_read, connection, stranger))
        assert running.policy.space.untrusted <= capacity * 3 / 4, "all of them"
        again = stack.enter_context(talking(running, "127.0.1.1"))
        again.expect(b"220")
        again.send(b"EHLO x\r\nMAIL FROM:<a@example.com> SIZE=300000\r\n")
        again.expect(b"250", b"452 4.3.1")
        client = stack.enter_context(talking(running))
        client.expect(b"220")
        client.send(
            b"EHLO x\r\nMAIL FROM:<a@example.com> SIZE=900000\r\nRCPT"
            b" TO:<b@example.org>\r\nDATA\r\n"
        )
        client.expect(b"250", b"250", b"250", b"354")
        client.send(b"x" * 900_000 + b"\r\n.\r\n")
        client.expect(b"250 2.0.0")
        for stranger in strangers:
            stranger.send(b".\r\n")
        assert (
            sorted(stranger.reply()[:9] for stranger in strangers)
            == [b"250 2.0.0"] * 3 + [b"452 4.3.1"] * 5
        )
    running.messages(4)
    until(lambda: len(running.bodies()) == 4)


def test_content_that_cannot_be_stored_is_not_read_for_ever(
    run: Callable[..., SmtpHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = run()
    found = SimpleNamespace(f_files=0, f_favail=0, f_bavail=MIN_FREE + 100_000, f_frsize=1)
    monkeypatch.setattr("reception.space.os.statvfs", lambda _path: found)
    with talking(running) as client:
        client.begin()
        with suppress(ConnectionError):
            client.send((b"x" * 998 + b"\r\n") * 3000)
        client.expect(b"421 4.3.0")
        assert client.closed()
    until(lambda: not running.bodies())


def test_content_behind_a_fault_is_not_read_for_ever(run: Callable[..., SmtpHarness]) -> None:
    running = run()
    with talking(running) as client:
        client.begin()
        client.send(b"bare\n" + b"x" * ENDLESS)
        with suppress(ConnectionError):
            client.send(b"x" * ENDLESS)
        client.expect(b"550 5.6.11")
        assert client.closed()


def test_C26_the_timeout_covers_a_whole_command(
    run: Callable[..., SmtpHarness],
) -> None:
    running = run(smtp_timeout=1.0)
    with talking(running) as client:
        client.expect(b"220")
        ended = threading.Event()

        def drip() -> None:
            with suppress(OSError):
                while not ended.wait(0.05):
                    client.send(b"x")

        dripping = threading.Thread(target=drip)
        dripping.start()
        client.expect(b"421 4.4.2")
        ended.set()
        dripping.join()


def test_C26_a_transaction_has_a_time_limit(run: Callable[..., SmtpHarness]) -> None:
    running = run(session_timeout=2.0)
    with talking(running) as idle, talking(running) as endless:
        endless.begin()
        idle.expect(b"220")
        endless.send(b"x" * 3 * BLOCK)
        endless.expect(b"421 4.4.2 Transaction takes too long")
        assert endless.closed()
        idle.say(b"EHLO x", b"250")
        for _ in range(3):  # each transaction has its own time
            before = time.monotonic()
            idle.say(b"MAIL FROM:<a@b.example>", b"250")
            [connection] = running.connections
            envelope = connection.session.envelope
            assert envelope is not None
            assert envelope.started >= before
            idle.say(b"RSET", b"250")
    until(lambda: not running.bodies())


@pytest.mark.parametrize("source", [STRANGER, "127.0.0.1"])
def test_C26_an_untrusted_client_must_send_at_the_minimum_rate(
    run: Callable[..., SmtpHarness], monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr("smtpd.server.RATE_WINDOW", 0.5)
    running = run(**CLOSED)
    with talking(running, source) as client:
        client.begin()
        [connection] = running.connections
        client.send(b"x" * 100)
        if source == STRANGER:
            client.expect(b"421 4.4.2 Message comes too slowly")
            assert client.closed()
        else:
            until(lambda: time.monotonic() > connection.window_started + 3.0)
            client.say(b"\r\n.", b"250")


def test_input_that_has_arrived_is_read_before_a_deadline_counts(
    run: Callable[..., SmtpHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = run()
    overdue, sent, tick = threading.Event(), threading.Event(), FrontEnd.tick

    def ticked(server: FrontEnd) -> None:
        [connection] = running.connections
        if not overdue.is_set():
            connection.deadline = 0.0
            overdue.set()
            sent.wait(10)
            server.next_tick = math.inf  # the machine may be slow
        tick(server)

    with talking(running) as client:
        client.expect(b"220")
        monkeypatch.setattr(FrontEnd, "tick", ticked)
        assert overdue.wait(10)
        client.send(b"NOOP\r\n")
        sent.set()
        client.expect(b"250 2.0.0")


def test_a_late_clock_tick_ends_no_session(
    run: Callable[..., SmtpHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(smtp_timeout=2.0)
    seen: list[str] = []
    tick, look = FrontEnd.tick, FrontEnd.check_deadlines

    def ticked(server: FrontEnd) -> None:
        seen.append("tick")
        tick(server)

    def checked(server: FrontEnd, now: float) -> None:
        look(server, now)
        if "stopped" not in seen:
            seen.append("stopped")
            threading.Event().wait(LATE_TICK + 1.0)
        else:
            seen.append("look")

    monkeypatch.setattr(FrontEnd, "tick", ticked)
    monkeypatch.setattr(FrontEnd, "check_deadlines", checked)
    until(lambda: "look" in seen)
    assert seen[seen.index("stopped") + 1 :][:2] == ["tick", "tick"], "the first one was late"


def test_C26_a_client_that_never_reads_is_aborted(
    run: Callable[..., SmtpHarness], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reception.connection.LINGER_TIMEOUT", 0.1)
    running = run(smtp_timeout=0.4)
    with talking(running) as client:
        client.expect(b"220")
        client.socket.settimeout(0.2)
        with pytest.raises(OSError):
            client.send(b"HELP\r\n" * 20_000_000)
        until(lambda: not running.connections)


FLOOD = """
import select, socket, sys
flood = b"NOOP\\r\\n" * 20000
clients = [socket.create_connection(("127.0.0.1", int(sys.argv[1]))) for _ in range(4)]
for client in clients:
    client.recv(100)  # the banner
    client.setblocking(False)
print("flooding", flush=True)
while True:
    readable, writable, _ = select.select(clients, clients, [])
    for client in readable:
        client.recv(1 << 20)
    for client in writable:
        client.send(flood)
"""


def test_a_flood_of_commands_does_not_delay_other_clients(
    run: Callable[..., SmtpHarness], spawn: Callable[..., subprocess.Popen[Any]]
) -> None:
    running = run()
    flood = spawn([sys.executable, "-c", FLOOD, str(running.port)], stdout=subprocess.PIPE)
    assert flood.stdout is not None
    assert flood.stdout.readline() == b"flooding\n"
    until(
        lambda: sum(one.session.lines > 10_000 for one in tuple(running.connections)) == 4,
        60,
    )
    for _ in range(5):
        with talking(running) as client:
            client.socket.settimeout(5)  # without turns it would take a multiple of this
            client.expect(b"220")
            client.say(b"EHLO client.example", b"250")
            client.say(b"NOOP", b"250")


def test_unread_replies_exceed_the_buffer_by_at_most_one_turn(
    run: Callable[..., SmtpHarness],
) -> None:
    running = run()
    with talking(running) as client:
        client.expect(b"220")
        [connection] = running.connections
        client.socket.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.send(b"EHLO client.example\r\n" * 5_000_000)
        until(lambda: connection.session.halted and connection.reading_paused)
        assert connection.transport.get_write_buffer_size() < (64 + 16) * 1024
        assert len(connection.session.input) < 1024 * 1024
        server_reply = 0
        client.socket.settimeout(10)
        client.socket.shutdown(socket.SHUT_WR)
        while data := client.socket.recv(1 << 20):
            server_reply += data.count(b"250 DSN")
        assert server_reply > 5000, "the client can still read all of them"


def test_C19_input_before_the_banner_is_refused(run: Callable[..., SmtpHarness]) -> None:
    running = run()
    held = threading.Event()
    running.loop.call_soon_threadsafe(held.wait, 10)
    with talking(running) as client:
        client.send(b"EHLO early\r\n")
        held.set()
        client.expect(b"554 5.5.0")
        assert client.closed()


def test_C28_an_untrusted_client_cannot_relay(run: Callable[..., SmtpHarness]) -> None:
    running = run(client_networks=("192.0.2.0/24",), recipient_domains=("ours.example",))
    with smtplib.SMTP(running.host, running.port) as client:
        with pytest.raises(smtplib.SMTPRecipientsRefused) as caught:
            client.sendmail("a@example.com", ["b@example.org"], b"x\r\n")
        assert caught.value.recipients["b@example.org"][0] == 554
        client.sendmail("a@example.com", ["b@OURS.example"], b"x\r\n")
    assert [message.client_trusted for message in running.messages(1)] == [False]


def test_the_row_says_whether_the_client_is_trusted(run: Callable[..., SmtpHarness]) -> None:
    running = run()
    with smtplib.SMTP(running.host, running.port) as client:
        client.sendmail("a@example.com", ["b@example.org"], b"x\r\n")
    assert [message.client_trusted for message in running.messages(1)] == [True]


def test_stopping_lets_a_transaction_finish_and_closes_idle_sessions(
    run: Callable[..., SmtpHarness],
) -> None:
    running = run()
    with talking(running) as idle, talking(running) as busy:
        idle.expect(b"220")
        busy.begin()
        running.ask_to_stop(drain=20.0)
        idle.expect(b"421 4.3.2")
        assert idle.closed()
        busy.send(b"last\r\n.\r\n")
        busy.expect(b"250 2.0.0", b"421 4.3.2")
        assert busy.closed()
    running.close()
    running.messages(1)


def test_stopping_does_not_wait_for_ever(run: Callable[..., SmtpHarness]) -> None:
    running = run()
    with talking(running) as client:
        client.begin()
        client.send(b"x" * 3 * BLOCK)
        until(running.bodies)
        running.ask_to_stop(drain=0.1)
        client.expect(b"421 4.3.2")
        running.close()
    until(lambda: not running.bodies())


def test_a_taken_port_names_the_address_and_the_setting(run: Callable[..., SmtpHarness]) -> None:
    running = run()
    listening = asyncio.run_coroutine_threadsafe(
        running.server.listen(running.door, [Listener(running.host, running.port)]), running.loop
    )
    with pytest.raises(SettingsError, match=rf"{running.host}:{running.port}.*RELAY_SMTP_LISTEN"):
        listening.result(10)


PROGRAM = """
from relay.log import configure
from relay.listeners import Listener
from relay.settings import SmtpdSettings, load
from smtpd.main import run
settings = load(SmtpdSettings)
configure(settings)
raise SystemExit(run(settings))
"""


class Program:
    """smtpd as a process, on a real database."""

    def __init__(
        self,
        directory: Path,
        database_url: str,
        spawn: Callable[..., subprocess.Popen[Any]],
        port: int,
        *,
        descriptors: int = 0,
        **settings: str,
    ) -> None:
        self.port, self.log = port, directory / "log"
        environment = {
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "RELAY_STATE_DIR": str(directory / "state"),
            "RELAY_DATABASE_URL": database_url,
            "RELAY_SMTP_LISTEN": f"127.0.0.1:{port}",
            "RELAY_LOG_FORMAT": "json",
            "RELAY_UNSAFE_DURABILITY": "1",
        } | {f"RELAY_{name.upper()}": value for name, value in settings.items()}
        limited = ["sh", "-c", f'ulimit -n {descriptors}; exec "$@"', "sh"] if descriptors else []
        with self.log.open("wb") as stderr:
            self.process = spawn(
                [*limited, sys.executable, "-c", PROGRAM], env=environment, stderr=stderr
            )
        until(
            lambda: self.events("listening") or self.process.poll() is not None,
            30,
            what=self.log.read_text,
        )

    def events(self, name: str) -> list[dict[str, Any]]:
        return [e for e in map(json.loads, whole_lines(self.log)) if e["event"] == name]

    def spoolers(self) -> list[int]:
        return [
            int(pid)
            for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
            .read_text()
            .split()
        ]

    def replace_spooler(self) -> None:
        """Kills the spooler, and waits for the next one."""
        [spooler] = until(self.spoolers)
        os.kill(spooler, signal.SIGKILL)
        until(lambda: self.spoolers() not in ([], [spooler]))

    def send(self, *recipients: str, lines: int = 1) -> None:
        with smtplib.SMTP("127.0.0.1", self.port) as client:
            client.sendmail(
                "a@example.com",
                recipients,
                b"Subject: x\r\nMessage-ID: <1@example.com>\r\n\r\n" + b"body\r\n" * lines,
            )


@pytest.fixture
def program(
    database_url: str,
    tmp_path: Path,
    spawn: Callable[..., subprocess.Popen[Any]],
    free_port: Callable[[], int],
) -> Program:
    return Program(tmp_path, database_url, spawn, free_port())


def test_C24_the_program_accepts_mail_without_a_broker_and_stops_on_sigterm(
    database_url: str, program: Program
) -> None:
    program.send("b@example.org", "c@example.org")
    for process in (program.process.pid, *program.spoolers()):
        assert "Umask:\t0077\n" in Path(f"/proc/{process}/status").read_text(), (
            "only the own user may read new files"
        )
    engine = create_engine(database_url)

    def rows() -> list[Any]:
        query = "SELECT state FROM deliveries JOIN recipients USING (queue_id)"
        with engine.connect() as connection:
            return [*connection.execute(text(query)).scalars()]

    assert until(rows) == ["queued", "queued"]
    engine.dispose()
    [accepted] = program.events("accepted")
    assert (accepted["sender"], accepted["recipients"], accepted["client"]) == (
        "a@example.com",
        2,
        "127.0.0.1",
    )
    assert accepted["to"] == ["b@example.org", "c@example.org"]
    assert accepted["message_id"] == "<1@example.com>"
    program.process.send_signal(signal.SIGTERM)
    assert program.process.wait(20) == 0


def test_the_clients_of_a_killed_spooler_hear_nothing_and_it_is_replaced(
    program: Program,
) -> None:
    [spooler] = until(program.spoolers)
    os.kill(spooler, signal.SIGSTOP)
    with closing(RawClient("127.0.0.1", program.port)) as client:
        client.begin()
        client.send(b"x\r\n.\r\n")
        client.send(b"NOOP\r\n")  # when this is read, the spooler has the message
        os.kill(spooler, signal.SIGKILL)
        assert client.closed(), "the message may be in the journal"
    until(lambda: program.spoolers() not in ([], [spooler]))
    program.send("b@example.org")
    assert len(program.events("spooler restarted")) == len(program.events("accepted")) == 1


def test_a_spooler_ends_only_when_smtpd_is_killed(program: Program) -> None:
    program.send("b@example.org")
    [spooler] = program.spoolers()
    os.kill(spooler, signal.SIGINT)
    os.kill(spooler, signal.SIGTERM)
    program.send("b@example.org")
    assert program.spoolers() == [spooler], "only the end of its orders ends it"
    handle = os.pidfd_open(spooler)
    try:
        program.process.kill()
        assert select.select([handle], [], [], 10)[0], "it is still there"
    finally:
        os.close(handle)


def test_smtpd_that_was_stopped_past_the_deadline_sends_250_for_a_committed_message(
    database_url: str,
    tmp_path: Path,
    spawn: Callable[..., subprocess.Popen[Any]],
    free_port: Callable[[], int],
) -> None:
    program = Program(tmp_path, database_url, spawn, free_port(), accept_deadline="4s")
    [spooler] = program.spoolers()
    os.kill(spooler, signal.SIGSTOP)
    engine = create_engine(database_url)
    with closing(RawClient("127.0.0.1", program.port)) as client, engine.connect() as connection:
        client.begin()
        client.send(b"x\r\n.\r\nNOOP\r\n")
        ended = time.monotonic()
        with closing(
            RawClient("127.0.0.1", program.port)
        ) as later:  # what came before it has been read by now
            later.expect(b"220")
            later.say(b"NOOP", b"250")
        program.process.send_signal(signal.SIGSTOP)
        until(lambda: stands_still(program.process.pid))
        os.kill(spooler, signal.SIGCONT)

        def kept() -> bool:
            with connection.begin():
                return connection.execute(text("SELECT count(*) FROM deliveries")).scalar() == 1

        until(kept)
        until(lambda: time.monotonic() > ended + 4.5)
        program.process.send_signal(signal.SIGCONT)
        client.expect(b"250 2.0.0 Ok: queued", b"250 2.0.0")
    engine.dispose()


def test_without_free_descriptors_clients_wait_and_are_not_dropped(
    database_url: str,
    tmp_path: Path,
    spawn: Callable[..., subprocess.Popen[Any]],
    free_port: Callable[[], int],
) -> None:
    program = Program(
        tmp_path,
        database_url,
        spawn,
        free_port(),
        descriptors=160,
        max_connections_per_client="1000",
    )
    [warning] = program.events("RLIMIT_NOFILE too low for RELAY_MAX_CONNECTIONS")
    assert (warning["limit"], warning["max_connections"]) == (160, 1000)
    with ExitStack() as stack:
        clients = [
            stack.enter_context(closing(RawClient("127.0.0.1", program.port))) for _ in range(120)
        ]
        until(lambda: program.events("accepting paused"))
        clients[0].begin()
        clients[0].send(
            b"x\r\n" * 200_000 + b".\r\n"
        )  # there are descriptors left for a large message
        clients[0].expect(b"250 2.0.0 Ok: queued")
        for client in clients[1:]:  # one after the other, as earlier ones end
            client.expect(b"220")
            client.say(b"QUIT", b"221")
            client.close()
    until(lambda: program.events("accepting resumed"))


def test_a_locked_database_costs_no_250(
    database_url: str,
    tmp_path: Path,
    spawn: Callable[..., subprocess.Popen[Any]],
    free_port: Callable[[], int],
) -> None:
    program = Program(tmp_path, database_url, spawn, free_port())
    engine = connect(database_url)
    with writing(engine) as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("LOCK TABLE messages IN EXCLUSIVE MODE"))
        program.send("taken@example.org")

    def addresses() -> list[str]:
        with reading(engine) as connection:
            return [*connection.execute(text("SELECT address FROM recipients")).scalars()]

    assert until(addresses) == ["taken@example.org"]
    engine.dispose()


MAY_MOUNT = bool(
    int(re.findall(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())[0], 16) >> 21 & 1
)


@pytest.mark.skipif(not MAY_MOUNT, reason="only who may administer the system may mount")
def test_a_spool_that_is_unmounted_below_the_program_is_451_until_it_is_back(
    database_url: str,
    tmp_path: Path,
    spawn: Callable[..., subprocess.Popen[Any]],
    free_port: Callable[[], int],
) -> None:
    disk, place = tmp_path / "disk", tmp_path / "state" / "spool"
    disk.mkdir()
    place.mkdir(parents=True)
    with mounted("-t", "tmpfs", "-o", "mode=700", "none", str(disk)):
        with mounted("--bind", str(disk), str(place)):
            program = Program(tmp_path, database_url, spawn, free_port())
            program.send("b@example.org")
        for _ in range(2):  # with the first spooler, and with a new one
            for lines in (1, BLOCK):
                with pytest.raises(smtplib.SMTPDataError) as caught:
                    program.send("b@example.org", lines=lines)
                assert caught.value.smtp_code == 451
            program.replace_spooler()
        assert [*place.iterdir()] == []
        with mounted("--bind", str(disk), str(place)):
            program.send("b@example.org")
            program.send("b@example.org", lines=BLOCK)
            small, large = dict[str, Any](), dict[str, Any]()
            for event in program.events("accepted"):
                (large if event["size"] > BLOCK else small)[event["id"]] = event
            assert (len(small), len(large)) == (2, 1)
            assert {path.name for path in disk.glob("????????/*")} == {*large}
        program.process.kill()


@contextmanager
def mounted(*arguments: str) -> Iterator[None]:
    subprocess.run(["/usr/bin/mount", *arguments], check=True)
    try:
        yield
    finally:
        subprocess.run(["/usr/bin/umount", "--lazy", arguments[-1]], check=True)
