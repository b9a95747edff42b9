"""Hooks of plugins in sessions of SMTP over real TCP: each hook by each answer, and their faults.

The front end runs in a thread, with a real spool and spooler, and a list for a database.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from reception.hooks import HookHost
from reception.receiver import BLOCK
from relay.settings import SmtpdSettings, load
from relay.spool.store import Spool
from tests.integration.front_end import ServerHarness, body_of
from tests.integration.plugins import host, plugin_file
from tests.integration.test_smtpd import SmtpHarness, smtp_door, talking
from tests.waiting import until

type Run = Callable[..., Any]


@pytest.fixture
def run(spool: Spool, tmp_path: Path) -> Iterator[Run]:
    """Starts a front end with a plugin of this text; `arguments` stand behind its name."""
    running: list[ServerHarness] = []

    def start(
        text: str, arguments: str = "", door: Callable[..., Any] = smtp_door, **settings: Any
    ) -> ServerHarness:
        path = plugin_file(tmp_path, text)
        made = load(
            SmtpdSettings,
            state_dir=tmp_path,
            spool_dir=spool.directory,
            hostname="relay.example",
            **settings,
        )
        kind = SmtpHarness if door is smtp_door else ServerHarness
        hooks: HookHost = host(f"{path} {arguments}")
        running.append(kind(spool, made, 100, door, hooks=hooks))
        return running[-1]

    yield start
    for one in running:
        one.close()


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
    assert delivery[0]["hold_reason"] == "to be looked at"
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
