"""2,000 messages received by SMTP and delivered by QMQP, with foreign clients and servers."""

import re
import smtplib
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from email.message import EmailMessage
from pathlib import Path

import pytest

from qmqp.sink import Sink, running_sink
from tests.acceptance.installation import Install, Installation, installed, smtp_source
from tests.acceptance.stack import StartUp
from tests.postfix import Postfix, QmqpSink
from tests.services import ServiceError, temporary_directory
from tests.waiting import until

MANY = 2000
LETTER = (
    b"From: me@example.com\nTo: you@sink.test\nSubject: client\n\n.one dot\n..two dots\n.\n"
    b"The end.\n"
)


class CountingSink(QmqpSink):
    """`qmqp-sink -c`, which prints its count whenever it accepts a message."""

    def _command(self) -> list[str]:
        program, *rest = super()._command()
        return [program, "-c", *rest]

    @property
    def count(self) -> int:
        counted = re.findall(rb"\d+", self.log.read_bytes())
        return int(counted[-1]) if counted else 0

    def has_counted(self, count: int) -> None:
        """So many messages were accepted, and no more. It counts a message after its reply."""
        until(lambda: self.count >= count)
        assert self.count == count


@pytest.fixture(scope="module")
def qmqp_sink() -> Iterator[CountingSink]:
    sink = CountingSink(temporary_directory())
    try:
        sink.start()
    except ServiceError as error:
        pytest.skip(str(error))
    yield sink
    sink.stop()


@pytest.fixture(scope="module")
def qmqpd() -> Iterator[Postfix | None]:
    """A real qmqpd; None where it cannot run."""
    try:
        server = Postfix()
        server.start()
    except ServiceError:
        yield None
    else:
        yield server
        server.stop()


@pytest.fixture(scope="module")
def sink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sink]:
    with running_sink(dump=tmp_path_factory.mktemp("sink")) as sink:
        yield sink


@pytest.fixture(scope="module")
def relay(
    install: Install,
    qmqp_sink: CountingSink,
    qmqpd: Postfix | None,
    sink: Sink,
    tmp_path_factory: pytest.TempPathFactory,
) -> Installation:
    """On PostgreSQL. Mail for `example.org` goes to qmqp-sink, for `postfix.test` to qmqpd, and for
    `sink.test` to the relay's sink."""
    routes = tmp_path_factory.mktemp("routes") / "routes.toml"
    routes.write_text(f"""
        [qmqpd]
        recipients = ["postfix.test"]
        servers = ["127.0.0.1:{qmqpd.port if qmqpd else 628}"]
        [sink]
        recipients = ["sink.test"]
        servers = ["127.0.0.1:{sink.port}"]
    """)
    relay = install("postgresql", QMQP_SERVERS=f"127.0.0.1:{qmqp_sink.port}", ROUTES=str(routes))
    worker = relay.worker(wait=False)
    relay.smtpd()
    relay.until_registered(worker)
    return relay


def test_two_thousand_through_up(start_up: StartUp, qmqp_sink: CountingSink) -> None:
    before = qmqp_sink.count
    up = start_up(QMQP_SERVERS=f"127.0.0.1:{qmqp_sink.port}")
    smtp_source(up.port, MANY, "b@example.org", "-s", "20", "-l", "4096")
    with closing(sqlite3.connect(f"file:{up.state_dir}/relay.db?mode=ro", uri=True)) as database:

        def states() -> list[tuple[str, int, int]]:
            return database.execute(
                "SELECT state, claim_count, count(*) FROM deliveries GROUP BY 1, 2"
            ).fetchall()

        until(
            lambda: sum(count for state, _, count in states() if state == "delivered") >= MANY,
            60,
            what=lambda: f"{states()}{up.log_text()}",
        )
        assert states() == [("delivered", 1, MANY)]
    qmqp_sink.has_counted(before + MANY)
    until(lambda: not list(up.state_dir.glob("spool/*/" + "[0-9a-f]" * 32)), what="no body is left")


def test_two_thousand_on_postgresql(relay: Installation, qmqp_sink: CountingSink) -> None:
    before = qmqp_sink.count
    relay.smtp_source(MANY, "b@example.org", "-s", "20", "-l", "4096")
    relay.until_all_delivered()
    assert relay.rows(
        """SELECT d.claim_count, a.outcome, count(*) FROM attempts a
        JOIN deliveries d ON d.queue_id = a.queue_id AND d.number = a.delivery
        WHERE d.route = 'default' GROUP BY d.claim_count, a.outcome"""
    ) == [(1, "delivered", MANY)]
    qmqp_sink.has_counted(before + MANY)


def test_a_real_qmqpd(relay: Installation, qmqpd: Postfix | None) -> None:
    if qmqpd is None:
        pytest.skip("qmqpd runs as root only, and where Postfix is installed")
    relay.smtp_source(200, "b@postfix.test", "-s", "20", "-l", "4096")
    relay.until_all_delivered()
    ours = {row[0] for row in relay.rows("SELECT queue_id FROM mail_history WHERE route = 'qmqpd'")}
    theirs = [path.read_bytes() for path in (qmqpd.directory / "queue/incoming").iterdir()]
    found = [
        i.decode()
        for content in theirs
        for i in re.findall(rb"with E?SMTP id ([0-9a-f]{32})", content)
    ]
    assert len(ours) == 200
    assert sorted(found) == sorted(ours)  # each of them once
    reply = relay.to("b@postfix.test").reason
    assert (qmqpd.directory / "queue/incoming" / reply.rpartition(" ")[2]).exists(), reply


@pytest.mark.parametrize("client", ["curl", "smtplib", "swaks"])
def test_clients_use_it_without_an_error(
    relay: Installation, sink: Sink, tmp_path: Path, client: str
) -> None:
    recipient = f"{client}@sink.test"
    letter = tmp_path / "letter"
    letter.write_bytes(LETTER)
    address = f"127.0.0.1:{relay.port}"
    match client:
        case "curl":
            run(
                [
                    "curl",
                    "-sS",
                    "--crlf",
                    f"smtp://{address}",
                    "--mail-from",
                    "me@example.com",
                    "--mail-rcpt",
                    recipient,
                    "-T",
                    str(letter),
                ]
            )
        case "swaks":
            output = run(
                [
                    "swaks",
                    "--server",
                    address,
                    "-f",
                    "me@example.com",
                    "-t",
                    recipient,
                    "--data",
                    f"@{letter}",
                ]
            )
            assert "queued as" in output
            assert "** " not in output  # marks an error of swaks
        case _:
            message = EmailMessage()
            message["Subject"] = "client"
            message.set_content("..two dots\n.\nThe end.\n")
            with smtplib.SMTP("127.0.0.1", relay.port, timeout=30) as smtp:
                assert (
                    smtp.send_message(message, "me@example.com", [recipient, "second@sink.test"])
                    == {}
                )
    relay.until_state(recipient, "delivered")
    number = next(one.number for one in list(sink.received) if recipient.encode() in one.recipients)
    assert sink.dump is not None
    assert b"..two dots\n.\nThe end.\n" in (sink.dump / f"{number:08d}.eml").read_bytes()


def test_many_messages_over_one_connection(relay: Installation) -> None:
    relay.smtp_source(50, "d@sink.test", "-d", "-s", "2")
    relay.until_all_delivered()
    assert len(relay.rows("SELECT 1 FROM mail_history WHERE recipient = :r", r="d@sink.test")) == 50


def run(command: list[str]) -> str:
    """Run a client to its end; its output. Output on standard error is a failure."""
    done = subprocess.run(
        [installed(command[0]), *command[1:]],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), f"{done.stdout}{done.stderr}"
    return done.stdout
