"""Hooks of plugins in sessions of SMTP over real TCP: each hook by each answer, and their faults.

The front end runs in a thread, with a real spool and spooler, and a list for a database.
"""

import errno
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from qmqp.netstring import encode
from reception.receiver import BLOCK
from relay.spool.store import BodyWriter, Spool
from tests.integration.front_end import ServerHarness, body_of, starting
from tests.integration.plugins import host, plugin_file
from tests.integration.test_qmqpd import QmqpClient, qmqp_door
from tests.integration.test_smtpd import SmtpHarness, smtp_door, talking
from tests.waiting import until

type Run = Callable[..., Any]


@pytest.fixture
def run(spool: Spool, tmp_path: Path) -> Iterator[Run]:
    """Starts a front end with a plugin of this text; `arguments` stand behind its name."""
    with (
        starting(SmtpHarness, smtp_door, spool) as by_smtp,
        starting(ServerHarness, qmqp_door, spool) as by_qmqp,
    ):

        def start(
            text: str, arguments: str = "", door: Callable[..., Any] = smtp_door, **settings: Any
        ) -> ServerHarness:
            begin = by_smtp if door is smtp_door else by_qmqp
            return begin(hooks=host(f"{plugin_file(tmp_path, text)} {arguments}"), **settings)

        yield start


ANSWERS = {
    "None": (b"2", "declined"),
    "OK": (b"2", "ok"),
    "OK('fine')": (b"2", "ok"),
    "Deny('no')": (b"550 5.7.1 no\r\n", "deny"),
    "Deny('no', code=571, enhanced='5.1.2')": (b"571 5.1.2 no\r\n", "deny"),
    "DenySoft('wait')": (b"451 4.7.1 wait\r\n", "denysoft"),
    "DenySoft('wait', disconnect=True)": (b"451 4.7.1 wait\r\n", "denysoft"),
    "Deny('no', disconnect=True)": (b"550 5.7.1 no\r\n", "deny"),
    "42": (b"451 4.3.0 Local problem, try again later\r\n", "failed"),
    "1 / 0": (b"451 4.3.0 Local problem, try again later\r\n", "failed"),
    "Deny('no', code=250)": (b"451 4.3.0 Local problem, try again later\r\n", "failed"),
    "exit(3)": (b"451 4.3.0 Local problem, try again later\r\n", "failed"),
}
"""What a hook does: how the reply to the command begins, and what the metric says."""
SCRIPT = {
    "connect": b"",
    "helo": b"EHLO client.example",
    "mail": b"MAIL FROM:<a@example.com>",
    "rcpt": b"RCPT TO:<b@example.org>",
    "data": b"DATA",
    "message": b"Subject: x\r\n\r\nhi\r\n.",
    "queue": b"Subject: x\r\n\r\nhi\r\n.",
}
POSITIVE = {"data": b"354", "connect": b"220"}


@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("hook", SCRIPT)
def test_each_hook_by_each_answer(run: Run, hook: str, answer: str, kind: str) -> None:
    running = run(f"""
        @hookimpl
        {kind} {hook}():
            return {answer}
        """)
    reply, _ = ANSWERS[answer]
    denied = reply != b"2"
    with talking(running) as client:
        for name, line in SCRIPT.items():
            if name == "queue" and hook != "queue":
                break
            if name == "message" and hook == "queue":
                continue
            if line:
                client.send(line + b"\r\n")
            if name == hook:
                client.expect(reply if denied else POSITIVE.get(hook, b"250"))
                break
            client.expect(POSITIVE.get(name, b"250"))
        if "disconnect" in answer or (denied and hook == "connect"):
            assert client.closed()
        else:
            client.say(b"NOOP", *([] if hook == "data" and not denied else [b"250"]))
    stored = hook in ("message", "queue") and not denied
    stored = stored and not (hook == "queue" and answer.startswith("OK"))
    if stored:
        running.messages(1)
    else:
        assert running.database.messages == []


@pytest.mark.parametrize("size", [10, BLOCK * 3])
def test_effects_of_a_plugin_reach_the_rows(run: Run, size: int) -> None:
    running = run("""
        @hookimpl
        def mail(transaction, sender, parameters):
            transaction.notes["sender"] = sender.address
            assert parameters == {"BODY": "8BITMIME"}, parameters

        @hookimpl
        def rcpt(transaction, recipient, parameters):
            if recipient.local == "old":
                recipient.rewrite("new@" + recipient.domain)
            assert parameters == {"NOTIFY": "NEVER"}, parameters

        @hookimpl
        def message(transaction):
            content = transaction.content
            text = b"".join(content.blocks(1000))
            assert len(text) == content.size
            assert text.endswith(b"x\\n"), text[-10:]
            assert transaction.header["subject"] == "hello"
            assert [str(one) for one in transaction.recipients] == ["new@example.org"]
            transaction.add_header("X-First", "1")
            transaction.add_header("X-Size", str(content.size))

        @hookimpl
        async def queue(transaction):
            blocks = [block async for block in transaction.content.blocks(100)]
            text = b"".join(blocks)
            assert text.startswith(b"X-Size: "), text[:100]
            assert len(text) == transaction.content.size
            transaction.add_header("X-Sender", transaction.notes["sender"])
            transaction.route = "fast"
            transaction.hold("to be looked at")
        """)
    body = b"x" * 70 + b"\n"
    text = b"Subject: hello\n\n" + body * (size // len(body) + 1)
    with talking(running) as client:
        client.expect(b"220")
        client.say(b"EHLO client.example", b"250")
        client.say(b"MAIL FROM:<a@example.com> BODY=8BITMIME", b"250")
        client.say(b"RCPT TO:<old@example.org> NOTIFY=NEVER", b"250")
        client.say(b"RCPT TO:<new@example.org> NOTIFY=NEVER", b"250")
        client.say(b"DATA", b"354")
        client.send(text.replace(b"\n", b"\r\n") + b".\r\n")
        client.expect(b"250 2.0.0 Ok: queued as ")
    (message,) = running.messages(1)
    assert [one.address for one in message.recipients] == ["new@example.org"]
    assert [one.route for one in message.recipients] == ["fast"]
    assert message.prefix is not None
    assert message.prefix.startswith("X-Sender: a@example.com\nX-Size: ")
    assert message.prefix.endswith("\nX-First: 1\n")
    (delivery,) = [json.loads(f"[{rows}]") for rows in running.database.deliveries]
    assert delivery[0]["hold_reason"] == "held by plugin example: to be looked at"
    until(lambda: running.spooler.lag.messages == 0)
    assert running.hints == [], "a held message is not claimed"
    stored = body_of(running, message)
    assert message.size == len(stored)
    assert stored.endswith(text)
    assert stored.startswith(b"Received: ")


def test_a_discarded_message_is_answered_with_250_and_not_stored(run: Run) -> None:
    running = run("""
        @hookimpl
        def message(transaction):
            transaction.discard()

        @hookimpl
        def queue():
            raise RuntimeError("not asked")
        """)
    for size in (1, 2 * BLOCK):
        with talking(running) as client:
            client.begin()
            client.send(b"x" * 60 + b"\r\n")
            client.send((b"y" * 60 + b"\r\n") * (size // 62) + b".\r\n")
            client.expect(b"250 2.0.0 Ok: queued as ")
    assert running.database.messages == []
    until(lambda: running.bodies() == [])


def test_a_failing_plugin_lets_mail_pass_with_fail_open(run: Run) -> None:
    running = run(
        """
        @hookimpl
        async def rcpt():
            raise OSError("no disk")

        @hookimpl
        def message():
            raise OSError("no disk")
        """,
        "fail=open",
    )
    with talking(running) as client:
        client.begin()
        client.send(b"hi\r\n.\r\n")
        client.expect(b"250")
    running.messages(1)


NOTICES = """
    calls = []

    def note(hook, *values):
        with open(PATH, "a") as file:
            file.write(" ".join([hook, *map(str, values)]) + "\\n")

    @hookimpl
    def register(args):
        global PATH
        PATH = args.word(0)

    @hookimpl
    def connect(session):
        note("connect", session.door, session.client_address)

    @hookimpl
    def mail(transaction, sender):
        note("mail", sender or "<>")

    @hookimpl
    async def queue_post(transaction):
        note("queue_post", len(transaction.queue_id))

    @hookimpl
    def deny(session, reply):
        note("deny", reply)

    @hookimpl
    def reset_transaction(transaction):
        note("reset", transaction.sender)

    @hookimpl
    def disconnect(session):
        note("disconnect", session.helo)
"""


def test_notices_come_in_order(run: Run, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    running = run(NOTICES, str(notes), client_networks=("10.0.0.1",))
    with talking(running) as client:
        client.begin(b"postmaster@relay.example")
        client.send(b"hi\r\n.\r\n")
        client.expect(b"250")
        client.send(b"MAIL FROM:<second@example.com>\r\nRCPT TO:<b@elsewhere.example>\r\nRSET\r\n")
        client.expect(b"250", b"554", b"250")
        client.send(b"MAIL FROM:<third@example.com>\r\n")
        client.expect(b"250")
    expected = [
        "connect smtp 127.0.0.1",
        "mail a@example.com",
        "queue_post 32",
        "reset a@example.com",
        "mail second@example.com",
        "deny 554 5.7.1 Relay access denied",
        "reset second@example.com",
        "mail third@example.com",
        "reset third@example.com",
        "disconnect client.example",
    ]
    until(lambda: notes.read_text().splitlines()[9:] != [])
    assert notes.read_text().splitlines() == expected


# By QMQP


def request(recipients: tuple[bytes, ...] = (b"b@example.org",), body: bytes = b"x\n") -> bytes:
    return encode(encode(body) + encode(b"a@example.com") + b"".join(map(encode, recipients)))


QMQP_HOOKS = ("connect", "mail", "rcpt", "message", "queue")
QMQP_ANSWERS = {
    "None": (b"K", b""),
    "OK('fine')": (b"K", b""),
    "Deny('no')": (b"D", b"no (#5.7.1)"),
    "DenySoft('wait')": (b"Z", b"wait (#4.7.1)"),
    "DenySoft('wait', disconnect=True)": (b"Z", b"wait (#4.7.1)"),
    "1 / 0": (b"Z", b"Local problem, try again later (#4.3.0)"),
}


@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.parametrize("answer", QMQP_ANSWERS)
@pytest.mark.parametrize("hook", QMQP_HOOKS)
def test_each_hook_by_each_answer_by_qmqp(run: Run, hook: str, answer: str, kind: str) -> None:
    running = run(f"@hookimpl\n{kind} {hook}():\n    return {answer}\n", door=qmqp_door)
    client = QmqpClient(running)
    client.send(request())
    reply = client.reply()
    client.socket.close()
    status, text = QMQP_ANSWERS[answer]
    assert reply is not None
    assert reply.status == status
    assert reply.text == text if text else reply.text.startswith(b"Ok")
    if status == b"K" and not (hook == "queue" and answer.startswith("OK")):
        running.messages(1)
    else:
        assert running.database.messages == []


def test_hooks_see_the_envelope_of_qmqp(run: Run) -> None:
    running = run(
        """
        @hookimpl
        def mail(transaction, sender, parameters):
            assert (str(sender), parameters) == ("a@example.com", {})
            assert transaction.session.door == "qmqp"

        @hookimpl
        async def rcpt(transaction, recipient):
            if recipient.local == "old":
                recipient.rewrite("new@example.org")

        @hookimpl
        def message(transaction):
            transaction.add_header("X-To", " ".join(map(str, transaction.recipients)))

        @hookimpl
        def helo():
            1 / 0

        @hookimpl
        def data():
            1 / 0
        """,
        door=qmqp_door,
    )
    client = QmqpClient(running)
    client.send(request((b"old@example.org", b"b@example.org", b"new@example.org")))
    reply = client.reply()
    client.socket.close()
    assert reply is not None
    assert reply.status == b"K"
    (message,) = running.messages(1)
    addresses = [one.address for one in message.recipients]
    assert sorted(addresses) == ["b@example.org", "new@example.org"]
    assert message.prefix == f"X-To: {' '.join(addresses)}\n"


def test_a_plugin_that_denies_one_recipient_by_qmqp_denies_the_request(run: Run) -> None:
    running = run(
        """
        @hookimpl
        def rcpt(recipient):
            return Deny("No such user", enhanced="5.1.1") if recipient.local == "x" else None
        """,
        door=qmqp_door,
    )
    client = QmqpClient(running)
    client.send(request((b"b@example.org", b"x@example.org", b"c@example.org")))
    reply = client.reply()
    client.socket.close()
    assert reply is not None
    assert (reply.status, reply.text) == (b"D", b"No such user (#5.1.1)")


# Faults of a hook

UNTIL_THE_CLIENT_LEAVES = """
import asyncio, threading

left = threading.Event()

@hookimpl
async def disconnect():
    left.set()

@hookimpl
"""
HANGS = {
    "def": "def {hook}():\n    left.wait(60)\n",
    "async def": "async def {hook}():\n    await asyncio.sleep(100)\n",
    "async def that cannot be cancelled": (
        "async def {hook}():\n    while not left.is_set():\n"
        "        try:\n            await asyncio.sleep(0.1)\n"
        "        except asyncio.CancelledError:\n            pass\n"
    ),
}


@pytest.mark.parametrize("kind", HANGS)
@pytest.mark.parametrize("hook", ["helo", "rcpt", "data", "message"])
def test_a_hook_that_hangs_is_451_and_the_session_lives(run: Run, hook: str, kind: str) -> None:
    running = run(
        UNTIL_THE_CLIENT_LEAVES + HANGS[kind].format(hook=hook),
        "timeout=200ms message_timeout=200ms",
    )
    before = sample("relay_hook_calls_total", plugin="example", hook=hook, answer="late")
    began = time.monotonic()
    with talking(running) as client:
        for name, line in SCRIPT.items():
            if line:
                client.send(line + b"\r\n")
            if name == hook:
                client.expect(b"451 4.3.0 Local problem, try again later\r\n")
                break
            client.expect(POSITIVE.get(name, b"250"))
        client.say(b"RSET", b"250")
    assert time.monotonic() - began >= 0.2
    after = sample("relay_hook_calls_total", plugin="example", hook=hook, answer="late")
    assert after == before + 1
    assert running.database.messages == []


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_a_hook_that_blocks_the_loop_is_named(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    running = run("""
        import time

        @hookimpl
        async def rcpt():
            time.sleep(0.3)
        """)
    with talking(running) as client:
        client.begin()
    until(lambda: "hook blocked the loop" in "".join(capfd.readouterr()))


def test_a_client_that_leaves_ends_the_question(run: Run, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    running = run(f"""
        import asyncio, pathlib

        @hookimpl
        async def message():
            note("asked")
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                note("cancelled")
                raise

        @hookimpl
        def disconnect():
            note("disconnect")

        def note(text):
            with open({str(notes)!r}, "a") as file:
                file.write(text + "\\n")
        """)
    for size in (1, 3 * BLOCK):
        with talking(running) as client:
            client.begin()
            client.send((b"y" * 60 + b"\r\n") * (size // 62 + 1) + b".\r\n")
            until(lambda: notes.exists() and notes.read_text().endswith("asked\n"))
        until(lambda: notes.read_text().endswith("asked\ncancelled\ndisconnect\n"))
    until(lambda: running.bodies() == [])
    assert running.database.messages == []


def test_a_server_that_stops_ends_the_question(run: Run) -> None:
    running = run("""
        import asyncio

        @hookimpl
        async def message():
            await asyncio.sleep(60)
        """)
    with talking(running) as client:
        client.begin()
        client.send(b"hi\r\n.\r\n")
        until(lambda: running.hooks.tasks)
        running.ask_to_stop(0.1)
        client.expect(b"421 4.3.2 Service is stopping")
        assert client.closed()
    assert running.database.messages == []


def test_a_refused_sender_leaves_no_transaction(run: Run) -> None:
    running = run("""
        @hookimpl
        def mail(transaction, sender):
            assert not transaction.notes
            transaction.notes["seen"] = True
            if sender.local == "bad":
                return Deny("no")
        """)
    with talking(running) as client:
        client.expect(b"220")
        client.say(b"EHLO client.example", b"250")
        client.say(b"MAIL FROM:<bad@example.com>", b"550 5.7.1 no")
        client.say(b"RCPT TO:<b@example.org>", b"503")
        client.say(b"MAIL FROM:<a@example.com>", b"250")
        client.say(b"RCPT TO:<b@example.org>", b"250")


def test_pipelined_commands_wait_for_each_answer(run: Run) -> None:
    running = run("""
        @hookimpl
        async def rcpt(transaction, recipient):
            assert len(transaction.recipients) == int(recipient.local)
        """)
    lines = [b"RCPT TO:<%d@example.org>" % number for number in range(1000)]
    with talking(running) as client:
        client.expect(b"220")
        client.send(b"\r\n".join([b"EHLO client.example", b"MAIL FROM:<a@example.com>", b""]))
        client.expect(b"250", b"250")
        client.send(b"\r\n".join([*lines, b"DATA", b""]))
        client.expect(*[b"250"] * 1000, b"354")
        client.say(b".", b"250")
    (message,) = running.messages(1)
    assert [one.address for one in message.recipients][-1] == "999@example.org"


def test_content_behind_a_refused_data_never_runs_as_commands(run: Run) -> None:
    running = run("@hookimpl\ndef data():\n    return Deny('no')\n")
    with talking(running) as client:
        client.expect(b"220")
        client.send(b"EHLO client.example\r\nMAIL FROM:<a@example.com>\r\n")
        client.send(b"RCPT TO:<b@example.org>\r\n")
        client.expect(b"250", b"250", b"250")
        client.send(b"DATA\r\nMAIL FROM:<evil@example.com>\r\n.\r\n")
        client.expect(b"550 5.7.1 no", b"421")
        assert client.closed()


def test_input_before_the_banner_is_refused_while_connect_is_asked(
    run: Run, tmp_path: Path
) -> None:
    sent = tmp_path / "sent"
    running = run(f"""
        import pathlib, time

        @hookimpl
        def connect():
            while not pathlib.Path({str(sent)!r}).exists():
                time.sleep(0.01)
            time.sleep(0.2)  # the server reads meanwhile
        """)
    with talking(running) as client:
        client.send(b"EHLO early.example\r\n")
        sent.touch()
        client.expect(b"554 5.5.0 The client must wait for the banner")
        assert client.closed()


def test_slow_hooks_delay_no_other_session(run: Run) -> None:
    """A thousand sessions wait for a hook; others pass."""
    running = run(
        """
        import asyncio

        go_on = asyncio.Event()

        @hookimpl
        async def rcpt(recipient):
            if recipient.local == "slow":
                await go_on.wait()
            elif recipient.local == "last":
                go_on.set()
        """,
        "timeout=100s",
        max_connections=4000,
        max_connections_per_client=3000,
    )
    with ExitStack() as stack:
        slow = [stack.enter_context(closing(running.client())) for _ in range(1000)]
        for client in slow:
            client.expect(b"220")
            client.send(b"EHLO c.example\r\nMAIL FROM:<a@example.com>\r\n")
        for client in slow:
            client.expect(b"250", b"250")
            client.send(b"RCPT TO:<slow@example.org>\r\n")
        for name in (b"first", b"second", b"last"):
            for client in slow:
                client.socket.setblocking(False)
                with pytest.raises(BlockingIOError):
                    client.socket.recv(1)
            with talking(running) as client:
                client.begin(name + b"@example.org")
                client.say(b".", b"250")
        for client in slow:
            client.socket.settimeout(30)
            client.expect(b"250")


def test_a_hundred_threads_wait_at_once(run: Run) -> None:
    running = run(
        """
        import threading

        all_of_them = threading.Barrier(100)

        @hookimpl
        def rcpt():
            all_of_them.wait(60)
        """,
        "timeout=60s",
        max_connections_per_client=200,
    )
    with ExitStack() as stack:
        slow = [stack.enter_context(closing(running.client())) for _ in range(100)]
        for client in slow:
            client.expect(b"220")
            client.send(b"EHLO c.example\r\nMAIL FROM:<a@example.com>\r\n")
            client.send(b"RCPT TO:<b@example.org>\r\n")
        for client in slow:
            client.socket.settimeout(60)
            client.expect(b"250", b"250", b"250")


@pytest.mark.parametrize("hook", ["message", "disconnect"])
def test_a_disk_that_fails_before_the_plugins_are_asked_is_452(
    run: Run, monkeypatch: pytest.MonkeyPatch, hook: str
) -> None:
    running = run(f"@hookimpl\nasync def {hook}(): pass\n")
    append = BodyWriter.append

    def full(body: BodyWriter, data: bytes) -> None:
        if data.endswith(b"last\n"):
            body.discard()
            raise OSError(errno.ENOSPC, "no space")
        append(body, data)

    monkeypatch.setattr(BodyWriter, "append", full)
    with talking(running) as client:
        client.begin()
        client.send((b"y" * 60 + b"\r\n") * (3 * BLOCK // 62) + b"last\r\n.\r\n")
        client.expect(b"452 4.3.1")
        client.say(b"NOOP", b"250")
    until(lambda: running.bodies() == [])
