"""The bundled plugins in sessions of SMTP, against the real programs that they talk to."""

import json
import os
import socketserver
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from plugins.bundled import policy_service
from plugins.loader import PluginError
from qmqp.sink import Answer, Rule, running_sink
from qmqp_relay import OK, Deny, DenySoft, Session, Transaction
from relay.spool.store import Spool
from tests.filter_programs import Postgrey, Rspamd
from tests.integration.front_end import body_of, starting
from tests.integration.plugins import host, plugins
from tests.integration.test_smtpd import SmtpHarness, smtp_door, talking
from tests.postfix import Postfix, QmqpSink
from tests.services import ServiceError, free_port, temporary_directory
from tests.waiting import until

type Start = Callable[..., SmtpHarness]
FLAT = 8 << 20
"""Octets of memory that a message of 25 MB may take; the receiver and the client take most."""


@pytest.fixture
def start(spool: Spool) -> Iterator[Start]:
    """Starts a front end with the plugins of this RELAY_PLUGINS."""
    with starting(SmtpHarness, smtp_door, spool) as begin:
        yield lambda entries, **settings: begin(hooks=host(entries), **settings)


@pytest.fixture(scope="module")
def rspamd() -> Iterator[Rspamd]:
    server = Rspamd()
    try:
        server.start()
    except ServiceError as error:
        pytest.skip(str(error))
    yield server
    server.stop()


@pytest.fixture(params=[False, True], ids=["port", "unix"])
def postgrey(request: pytest.FixtureRequest) -> Iterator[Postgrey]:
    server = Postgrey(unix=request.param)
    try:
        server.start()
    except ServiceError as error:
        pytest.skip(str(error))
    yield server
    server.stop()


def reply_to(running: SmtpHarness, content: bytes, *recipients: bytes) -> bytes:
    """The reply to a message of this content."""
    with talking(running) as client:
        client.begin(*recipients)
        client.send(content.replace(b"\n", b"\r\n") + b".\r\n")
        return client.reply()


def reply_to_large(running: SmtpHarness) -> bytes:
    """The reply to a message of 25 MB, which the client sends line by line."""
    line = b"x" * 62 + b"\r\n"
    with talking(running) as client:
        client.socket.settimeout(60)
        client.begin()
        client.send(b"Subject: score=7\r\n\r\n")
        for _ in range(400):
            client.send(line * 1000)
        client.send(b".\r\n")
        return client.reply()


# --- qmqp_forward
# -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reply"),
    [
        (Answer(b"K", b"ok 123 qp 45"), b"250 2.0.0 Ok: ok 123 qp 45\r\n"),
        (Answer(b"Z", b"busy\r\nnow"), b"451 4.0.0 busy??now\r\n"),
        (Answer(b"D", b"no such mailbox"), b"550 5.0.0 no such mailbox\r\n"),
    ],
)
def test_the_client_sees_the_reply_of_the_server(start: Start, answer: Answer, reply: bytes):
    with running_sink(Rule(answer)) as sink:
        running = start(f"qmqp_forward 127.0.0.1 {sink.port}")
        assert reply_to(running, b"Subject: hi\n\nhello\n", b"b@example.org", b"C@x.org") == reply
        (request,) = sink.received
    assert request.sender == b"a@example.com"
    assert request.recipients == (b"b@example.org", b"C@x.org")
    assert running.database.messages == []
    assert running.bodies() == []


FAULTS = {
    "no reply": Answer(raw=b""),
    "no netstring": Answer(raw=b"hello\n"),
    "another letter": Answer(raw=b"3:Xyz,"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_reply_that_is_none_falls_through_to_the_queue(start: Start, fault: str):
    with running_sink(Rule(FAULTS[fault])) as sink:
        running = start(f"qmqp_forward 127.0.0.1 {sink.port}")
        reply = reply_to(running, b"\nhello\n")
        assert reply.startswith(b"250 2.0.0 Ok: queued as ")
    running.messages(1)


def test_a_server_out_of_reach_falls_through_or_is_a_451_with_only(start: Start):
    port = free_port()
    running = start(f"qmqp_forward 127.0.0.1 {port}")
    assert reply_to(running, b"\nhello\n").startswith(b"250 2.0.0 Ok: queued as ")
    running.messages(1)
    strict = start(f"qmqp_forward 127.0.0.1 {port} only=yes")
    reply = reply_to(strict, b"\nhello\n")
    assert reply == b"451 4.4.0 Cannot forward the message now\r\n"
    assert strict.database.messages == []


def test_a_held_message_is_not_forwarded(start: Start, tmp_path: Path):
    holder = tmp_path / "holder.py"
    holder.write_text(
        "from qmqp_relay import hookimpl\n"
        "@hookimpl\n"
        "def message(transaction):\n"
        "    transaction.hold('a look')\n"
    )
    with running_sink() as sink:
        running = start(f"{holder}; qmqp_forward 127.0.0.1 {sink.port}")
        assert reply_to(running, b"\nhello\n").startswith(b"250")
        running.messages(1)
        assert sink.count == 0


def test_25_mb_are_forwarded_with_flat_memory(start: Start, tmp_path: Path):
    adder = tmp_path / "adder.py"
    adder.write_text(
        "from qmqp_relay import hookimpl\n"
        "@hookimpl\n"
        "def message(transaction):\n"
        "    transaction.add_header('X-Added', 'yes')\n"
    )
    with running_sink(dump=tmp_path / "dump") as sink:
        running = start(f"{adder}; qmqp_forward 127.0.0.1 {sink.port}", max_message_size=30_000_000)
        assert reply_to(running, b"\nwarm\n").startswith(b"250")
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            assert reply_to_large(running).startswith(b"250 2.0.0 Ok")
            assert tracemalloc.get_traced_memory()[1] - before < FLAT
        finally:
            tracemalloc.stop()
        assert sink.received[1].size > 25_000_000
    content = sorted((tmp_path / "dump").glob("*.eml"))[-1].read_bytes()
    assert content.startswith(b"X-Added: yes\nReceived: ")
    assert content.endswith(b"x" * 62 + b"\n")
    until(lambda: running.bodies() == [])


def test_postfix_takes_what_is_forwarded(start: Start, postfix: Postfix):
    running = start(f"qmqp_forward 127.0.0.1 {postfix.port}")
    reply = reply_to(running, b"Subject: hi\n\nhello\n")
    assert reply.startswith(b"250 2.0.0 Ok: Ok: queued as "), reply
    queue_id = reply.split()[-1].decode()
    assert b"hello" in postfix.queued(queue_id)
    assert running.database.messages == []


def test_qmqp_sink_takes_what_is_forwarded(start: Start):
    server = QmqpSink(temporary_directory())
    try:
        server.start()
    except ServiceError as error:
        pytest.skip(str(error))
    try:
        running = start(f"qmqp_forward 127.0.0.1 {server.port}")
        assert reply_to(running, b"\nhello\n").startswith(b"250 2.0.0 Ok")
    finally:
        server.stop()


# --- check_recipients
# -------------------------------------------------------------------------------------


def refused(running: SmtpHarness, recipient: str) -> bool:
    with talking(running) as client:
        client.expect(b"220")
        client.say(b"EHLO client.example", b"250")
        client.say(b"MAIL FROM:<a@example.com>", b"250")
        client.send(b"RCPT TO:<" + recipient.encode() + b">\r\n")
        reply = client.reply()
    assert reply.startswith(b"250") or reply == b"550 5.1.1 No such recipient here\r\n"
    return reply.startswith(b"550")


def test_only_known_recipients_are_accepted(start: Start, tmp_path: Path):
    file = tmp_path / "recipients"
    file.write_text("# staff\nann@example.org\nBob@Example.ORG\n\n@open.example\n")
    running = start(f"check_recipients {file} delimiter=+")
    accepted = ["ann", "ANN", "bob", "ann+lists"]
    assert not any(refused(running, f"{local}@example.org") for local in accepted)
    assert refused(running, "carl@example.org")
    assert refused(running, "carl+ann@example.org")
    assert not refused(running, "any@open.example")
    assert not refused(running, "any@elsewhere.example")


def test_the_file_of_recipients_is_read_again_when_it_changes(start: Start, tmp_path: Path):
    file = tmp_path / "recipients"
    file.write_text("ann@example.org\n")
    running = start(f"check_recipients {file}")
    assert refused(running, "carl@example.org")
    (tmp_path / "new").write_text("carl@example.org\n")
    (tmp_path / "new").replace(file)
    assert not refused(running, "carl@example.org")
    file.unlink()
    assert not refused(running, "carl@example.org")
    assert refused(running, "ann@example.org")


# --- rspamd
# -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subject", "reply"),
    [
        (b"score=16", b"550 5.7.1 The message looks like spam\r\n"),
        (b"soft", b"451 4.7.1 Come back later\r\n"),
        (b"score=5", b"451 4.7.1 Greylisted, try again later\r\n"),
    ],
)
def test_rspamd_refuses(start: Start, rspamd: Rspamd, subject: bytes, reply: bytes):
    running = start(f"rspamd {rspamd.url}")
    assert reply_to(running, b"Subject: " + subject + b"\n\nhello\n") == reply
    assert running.database.messages == []


@pytest.mark.parametrize(
    ("score", "action", "spam"),
    [(0, "no action", False), (7, "add header", True), (9, "rewrite subject", True)],
)
def test_headers_of_rspamd_are_added(
    start: Start, rspamd: Rspamd, score: int, action: str, spam: bool
):
    running = start(f"rspamd {rspamd.url}")
    content = b"Subject: score=%d\n\nhello\n" % score
    assert reply_to(running, content, b"b@example.org", b"c@example.org").startswith(b"250")
    (message,) = running.messages(1)
    assert message.prefix is not None
    size = len(body_of(running, message))
    expected = [
        f"X-Spam-Action: {action}",
        f"X-Spam-Score: {score}.00 / 15.00",
        *(["X-Spam: Yes"] if spam else []),
        f"X-Seen: 127.0.0.1 client.example a@example.com b@example.org 2 {size}",
        "X-Twice: one",
        "X-Twice: two",
    ]
    assert sorted(message.prefix.splitlines()) == sorted(expected)
    assert message.prefix.startswith(f"X-Spam-Action: {action}\n")


def test_an_envelope_that_rspamd_greylists_passes_after_the_delay(start: Start, rspamd: Rspamd):
    running = start(f"rspamd {rspamd.url} delay=1s")
    content = b"Subject: score=5\n\nhello\n"
    assert reply_to(running, content).startswith(b"451 4.7.1 Greylisted")
    until(lambda: reply_to(running, content).startswith(b"250"))
    assert reply_to(running, content).startswith(b"250")
    assert reply_to(running, content, b"other@example.org").startswith(b"451")


def test_without_rspamd_mail_waits_or_passes_with_fail_open(start: Start):
    url = f"http://127.0.0.1:{free_port()}"
    reply = reply_to(start(f"rspamd {url}"), b"\nhello\n")
    assert reply == b"451 4.3.0 Local problem, try again later\r\n"
    assert reply_to(start(f"rspamd {url} fail=open"), b"\nhello\n").startswith(b"250")


def test_25_mb_go_through_rspamd_with_flat_memory(start: Start, rspamd: Rspamd):
    running = start(f"rspamd {rspamd.url}", max_message_size=30_000_000)
    assert reply_to(running, b"\nwarm\n").startswith(b"250")
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        assert reply_to_large(running).startswith(b"250 2.0.0 Ok: queued as ")
        assert tracemalloc.get_traced_memory()[1] - before < FLAT
    finally:
        tracemalloc.stop()
    _, message = running.messages(2)
    assert message.prefix is not None
    assert "X-Spam: Yes" in message.prefix
    assert f" 1 {message.size}\n" in message.prefix


# --- policy_service
# ---------------------------------------------------------------------------------------

STRANGERS = {"client_networks": ("10.0.0.1",), "recipient_domains": ("example.org",)}


def reply_to_rcpt(running: SmtpHarness) -> bytes:
    with talking(running) as client:
        client.expect(b"220")
        client.say(b"EHLO client.example", b"250")
        client.say(b"MAIL FROM:<a@example.com> SIZE=77", b"250")
        client.send(b"RCPT TO:<b@example.org>\r\n")
        return client.reply()


def test_postgrey_delays_strangers(start: Start, postgrey: Postgrey):
    running = start(f"policy_service {postgrey.address}", **STRANGERS)

    def accepted() -> bool:
        with talking(running) as client:
            client.expect(b"220")
            client.say(b"EHLO client.example", b"250")
            client.say(b"MAIL FROM:<a@example.com>", b"250")
            client.send(b"RCPT TO:<b@example.org>\r\n")
            reply = client.reply()
            if reply.startswith(b"450 4.7.1 Greylisted, see http"):
                return False
            client.say(b"DATA", b"354")
            client.say(b"hello\r\n.", b"250")
            return True

    assert not accepted()
    until(accepted)
    (message,) = running.messages(1)
    assert message.prefix is not None
    assert message.prefix.startswith("X-Greylist: delayed ")


def test_clients_that_may_relay_are_asked_about_with_trusted_only(start: Start):
    nothing = f"policy_service 127.0.0.1:{free_port()}"
    assert reply_to_rcpt(start(nothing)).startswith(b"250")
    assert reply_to_rcpt(start(f"{nothing} trusted=yes")).startswith(b"451 4.3.0")
    assert reply_to_rcpt(start(f"{nothing} trusted=yes fail=open")).startswith(b"250")


class RecordingService(socketserver.StreamRequestHandler):
    """A policy service that accepts all, keeps what it was asked, and closes the connection after
    the second question."""

    asked: ClassVar[list[dict[str, str]]] = []

    def handle(self) -> None:
        for _ in range(2):
            question = dict[str, str]()
            while line := self.rfile.readline().decode().strip("\n"):
                name, _, question[name] = line.partition("=")
            if question:
                self.asked.append(question | {"connection": str(id(self))})
                self.wfile.write(b"action=DUNNO\n\n")


def test_the_service_is_told_of_the_client_over_kept_connections(start: Start):
    RecordingService.asked.clear()
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), RecordingService) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        running = start(f"policy_service 127.0.0.1:{server.server_address[1]}", **STRANGERS)
        for _ in range(5):
            assert reply_to_rcpt(running).startswith(b"250")
        running.close()
        server.shutdown()
        thread.join()
    asked = RecordingService.asked
    assert len({one.pop("connection") for one in asked}) == 3
    assert len({one.pop("instance") for one in asked}) == 5
    assert asked[0] == {
        "request": "smtpd_access_policy",
        "protocol_state": "RCPT",
        "protocol_name": "ESMTP",
        "client_address": "127.0.0.1",
        "client_name": "unknown",
        "reverse_client_name": "unknown",
        "helo_name": "client.example",
        "queue_id": "",
        "recipient_count": "0",
        "sasl_username": "",
        "encryption_protocol": "",
        "encryption_cipher": "",
        "size": "77",
        "sender": "a@example.com",
        "recipient": "b@example.org",
    }


def test_a_plugin_that_accepts_the_sender_hides_only_the_size(start: Start, tmp_path: Path):
    accepting = tmp_path / "accepting.py"
    accepting.write_text(
        "from qmqp_relay import OK, hookimpl\n@hookimpl\ndef mail():\n    return OK\n"
    )
    RecordingService.asked.clear()
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), RecordingService) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        service = f"policy_service 127.0.0.1:{server.server_address[1]}"
        running = start(f"{accepting}; {service}", **STRANGERS)
        assert reply_to_rcpt(running).startswith(b"250")
        running.close()
        server.shutdown()
        thread.join()
    assert [one["size"] for one in RecordingService.asked] == ["0"]


ACTIONS = {
    "DUNNO": None,
    "dunno now": None,
    "DEFER_IF_REJECT later": None,
    "OK": OK(),
    "REJECT": Deny("Access denied", code=554),
    "REJECT 5.1.8 no such domain": Deny("no such domain", code=554, enhanced="5.1.8"),
    "DEFER wait": DenySoft("wait", code=450),
    "DEFER_IF_PERMIT 4.2.0 Greylisted": DenySoft("Greylisted", code=450, enhanced="4.2.0"),
    "521 go": Deny("go", code=521),
    "421 4.7.0 closing": DenySoft("closing", code=421, enhanced="4.7.0"),
}


def transaction() -> Transaction:
    return Transaction(Session("smtp", "192.0.2.1"), "a@example.com", list, list)


@pytest.mark.parametrize("action", ACTIONS)
def test_an_action_is_an_answer(action: str):
    assert policy_service.answer(action, transaction()) == ACTIONS[action]


def test_an_action_changes_the_message():
    one = transaction()
    for action in ("PREPEND X-SPF: pass (example)", "HOLD a look", "DISCARD"):
        assert policy_service.answer(action, one) is None
    assert one.prefix == b"X-SPF: pass (example)\n"
    assert one.hold_reason == "a look"
    assert one.discarded


@pytest.mark.parametrize("action", ["FILTER smtp:x", "PREPEND nonsense", "42", "REDIRECT a@b"])
def test_an_unknown_action_is_a_failure(action: str):
    with pytest.raises(ValueError, match="unknown here"):
        policy_service.answer(action, transaction())


# --- arguments
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        ("qmqp_forward", "needs 1 words behind its name"),
        ("qmqp_forward ho|st", "ho|st 628: write a host, and a port if not 628"),
        ("qmqp_forward host 70000", "host 70000: write a host, and a port if not 628"),
        ("qmqp_forward host 628 more", "takes 2 words, and 'more' is too many"),
        ("qmqp_forward host only=maybe", "only=: write yes, or no"),
        ("check_recipients", "needs 1 words behind its name"),
        ("check_recipients /no/such/file", "there is no file /no/such/file"),
        ("rspamd localhost:11333", "localhost:11333: write it like http://127.0.0.1:11333"),
        ("rspamd delay=soon", "delay=soon: "),
        ("policy_service 127.0.0.1", "127.0.0.1: write host:port, or unix:/path"),
        ("policy_service unix:relative", "unix:relative: write host:port, or unix:/path"),
        ("policy_service 127.0.0.1:1 trusted=1", "trusted=: write yes, or no"),
    ],
)
def test_a_wrong_argument_is_named(entry: str, error: str):
    with pytest.raises(PluginError) as raised:
        plugins(entry)
    assert error in str(raised.value)


def test_what_a_plugin_logs_is_not_in_the_output_of_a_command(tmp_path: Path):
    file = tmp_path / "recipients"
    file.write_text("ann@example.org\n")
    shown = subprocess.run(
        [sys.executable, "-m", "commands.cli.start", "plugins", "--json"],
        env=os.environ
        | {"RELAY_STATE_DIR": str(tmp_path), "RELAY_PLUGINS": f"check_recipients {file}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(shown.stdout)["name"] == "check_recipients"
    assert "recipients read" in shown.stderr


def test_a_plugin_sets_its_time_limits_unless_the_entry_does(tmp_path: Path):
    (forward,) = plugins("qmqp_forward 127.0.0.1").loaded
    assert (forward.entry.timeout, forward.entry.message_timeout) == (5.0, 300.0)
    (forward,) = plugins("qmqp_forward 127.0.0.1 message_timeout=30s").loaded
    assert forward.entry.message_timeout == 30.0
