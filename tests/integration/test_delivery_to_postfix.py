"""The engine against a real Postfix qmqpd: its replies, and the rows and DSNs that follow."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qmqp.netstring import encode
from qmqp.reply import ReplyParser
from relay.dsn.generator import DsnGenerator
from relay.spool.store import Spool
from tests.bodies import body_in
from tests.integration.harness import EngineHarness
from tests.postfix import Postfix
from tests.waiting import until
from worker.circuit_breaker import ServerPool

HEADER = (
    b"From: <s@x.test>\nTo: <r@y.test>\nDate: Sun, 22 Nov 2026 15:00:00 +0000\nMessage-Id:"
    b" <1@x.test>\n"
)

type Open = Callable[..., EngineHarness]


@pytest.fixture
def harness_with(clean_sqlite_url: str, spool: Spool, tmp_path: Path) -> Iterator[Open]:
    opened: list[EngineHarness] = []

    def open_(*ports: int, **settings: object) -> EngineHarness:
        servers = tuple(f"127.0.0.1:{port}" for port in ports)
        given = {"retry_min": 60.0, "retry_max": 60.0} | settings
        opened.append(
            EngineHarness(clean_sqlite_url, spool, tmp_path, qmqp_servers=servers, **given)
        )
        return opened[-1]

    yield open_
    for one in opened:
        one.close()


def become(mail: EngineHarness, queue_id: str, state: str) -> str:
    """Send a message and wait for the state; return the last reply."""
    with mail.working() as engine:
        engine.offer([queue_id])
        until(lambda: mail.state(queue_id) == state, 20, what=lambda: str(mail.delivery(queue_id)))
    return str(mail.delivery(queue_id)["last_reply"])


def dsn_about(mail: EngineHarness, queue_id: str) -> str:
    """The text of the DSN that a sweeper then makes."""
    (dsn,) = DsnGenerator(
        mail.database, mail.spool, mail.settings, lambda address: "default"
    ).generate(10)
    return body_in(mail.spool.path(dsn)).decode()


def test_a_delivery_is_queued_there_under_the_id_that_it_names(
    harness_with: Open, postfix: Postfix
) -> None:
    mail = harness_with(postfix.port)
    queue_id = mail.accept("r@y.test", body=HEADER + b"Subject: hello\n\nhello\n")
    reply = become(mail, queue_id, "delivered")
    assert reply.startswith("Ok: queued as ")
    assert b"Subject: hello" in postfix.queued(reply.split()[-1])


@pytest.mark.parametrize("size", [250_000, 20_000_000])
def test_an_oversize_message_bounces_with_the_reply(
    harness_with: Open, postfix: Postfix, size: int
) -> None:
    mail = harness_with(postfix.port)
    queue_id = mail.accept(
        "r@y.test", "q@y.test", body=HEADER + b"\n" + b"x" * 70 + b"\n" + bytes(size)
    )
    reply = become(mail, queue_id, "bounced")
    assert "length exceeds storage limit" in reply
    assert [outcome for _, outcome in mail.attempts(queue_id)] == ["rejected"]
    text = dsn_about(mail, queue_id)
    assert "length exceeds storage limit" in " ".join(text.split())
    assert text.count("Final-Recipient: ") == 2, "an early D holds for all recipients"


def test_mail_waits_while_postfix_does_not_authorize_this_client(
    harness_with: Open, postfix: Postfix, capsys: pytest.CaptureFixture[str]
) -> None:
    mail = harness_with(postfix.closed_port)
    first, second = mail.accept("r@y.test", body=HEADER + b"\nhello\n"), mail.accept("r@y.test")
    with mail.working() as engine:
        engine.offer([first])
        until(lambda: mail.state(first) == "deferred", 20)
        assert mail.delivery(first)["last_outcome"] == "rejected"
        assert "is not authorized to use this service" in mail.delivery(first)["last_reply"]
        mail.change("UPDATE deliveries SET due_at = @ago(10) WHERE queue_id = @id(:id)", id=second)
        until(lambda: mail.state(second) == "deferred", 20)
    tried = mail.rows("SELECT count(*) AS n FROM attempts")[0]["n"]
    said = capsys.readouterr().out
    assert said.count("relay not authorized") == tried
    assert "circuit opened" in said
    assert mail.rows("SELECT due_at FROM deliveries WHERE state = 'bounced'") == []


def test_the_next_server_gets_the_mail_when_one_does_not_authorize(
    harness_with: Open, postfix: Postfix
) -> None:
    """In the same claim; later mail goes there at once."""
    mail = harness_with(postfix.closed_port, postfix.port)
    # The clock stands still, so that the circuit of the first server stays open.
    with mail.working(servers=ServerPool(50, clock=lambda: 0.0)) as engine:
        engine.offer([first := mail.accept("r@y.test", body=HEADER + b"\nhello\n")])
        until(lambda: mail.state(first) == "delivered", 20)
        engine.offer([second := mail.accept("r@y.test", body=HEADER + b"\nhello\n")])
        until(lambda: mail.state(second) == "delivered", 20)
    closed, opened = f"127.0.0.1:{postfix.closed_port}", f"127.0.0.1:{postfix.port}"
    assert mail.attempts(first) == [(closed, "rejected"), (opened, "delivered")]
    assert mail.attempts(second) == [(opened, "delivered")]


@pytest.mark.parametrize(
    ("subject", "state", "expected"),
    [
        (b"refuse", "bounced", "go away"),
        (b"later", "deferred", "not now"),
    ],
)
def test_header_checks_bounce_or_defer(
    harness_with: Open, postfix: Postfix, subject: bytes, state: str, expected: str
) -> None:
    mail = harness_with(postfix.port)
    queue_id = mail.accept(
        "r@y.test", "q@y.test", body=HEADER + b"Subject: " + subject + b"\n\nhello\n"
    )
    assert expected in become(mail, queue_id, state)
    assert mail.delivery(queue_id)["last_outcome"] == (
        "rejected" if state == "bounced" else "deferred"
    )
    assert len(mail.attempts(queue_id)) == 1, "a reply about the content does not split"
    if state == "bounced":
        assert "go away" in dsn_about(mail, queue_id)


def test_a_dsn_refused_for_its_enclosure_arrives_without_it(
    harness_with: Open, postfix: Postfix
) -> None:
    """header_checks are nested_header_checks too, so that Postfix rejects the DSN for the text of
    the original; body_checks read the header that a second DSN encloses."""
    mail = harness_with(postfix.port)
    original = mail.accept(
        "r@y.test", body=HEADER + b"Subject: refuse\n\nhello\n", sender="s@x.test"
    )
    become(mail, original, "bounced")
    generator = DsnGenerator(mail.database, mail.spool, mail.settings, lambda address: "default")
    replies = []
    for state in ("bounced", "bounced", "delivered"):
        (dsn,) = generator.generate(10)
        replies.append(become(mail, dsn, state))
    assert generator.generate(10) == []
    assert "go away" in replies[0]
    assert "not even enclosed" in replies[1]
    shown = postfix.queued(replies[2].split()[-1])
    assert b"Subject: Undelivered mail returned to sender" in shown
    assert b"Diagnostic-Code: x-qmqp; Error: 5.7.1 go away" in shown
    assert b"Subject: refuse" not in shown
    contents = mail.rows("SELECT dsn_content FROM messages WHERE dsn_of IS NOT NULL ORDER BY id")
    assert [row["dsn_content"] for row in contents] == ["full", "header", "none"]


def test_soft_bounce_makes_each_D_a_Z(harness_with: Open, postfix: Postfix) -> None:
    mail = harness_with(postfix.soft_port)
    queue_id = mail.accept("r@y.test", body=HEADER + b"\n" + bytes(300_000))
    assert "length exceeds storage limit" in become(mail, queue_id, "deferred")
    assert mail.attempts(queue_id) == [(f"127.0.0.1:{postfix.soft_port}", "deferred")]


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (b"GET / HTTP/1.0\r\n\r\n", b"netstring format error while receiving QMQP packet header"),
        (encode(b"x:hello"), b"netstring format error while receiving message"),
        (encode(b"5:hello;"), b"netstring format error while receiving message"),
        (encode(encode(b"hello\n") + encode(b"s@x.test")), b"no recipients specified"),
    ],
)
def test_postfix_rejects_a_broken_frame_and_names_it(
    postfix: Postfix, request_: bytes, expected: bytes
) -> None:
    """The client never sends such bytes. If its framing broke, the reply would say so, and the DSN
    would quote it."""
    parser = ReplyParser()
    with socket.create_connection(("127.0.0.1", postfix.port), 10) as server:
        server.sendall(request_)
        reply = None
        while reply is None:
            data = server.recv(4096)
            assert data, "it closed without a reply"
            reply = parser.feed(data)
    assert reply.status == b"D"
    assert expected in reply.text
