"""smtpd and workers as they run on a server: processes on one database, one broker and one spool.

A test observes them as an operator does: in the database, in the replies to SMTP clients, and in
what QMQP servers received. `Feeder` is a group of such clients.
"""

import re
import shutil
import signal
import smtplib
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from qmqp.sink import Sink
from reception.committer import ADOPT_SOON
from relay.db.engine import connect, reading
from relay.queue.uncommitted import journal_lag
from relay.report.queries import QueueReader
from relay.spool.store import Spool
from tests.acceptance.stack import ROOT, STARTING, relay_environ
from tests.dialect import dialect_of
from tests.postfix import program
from tests.services import Broker, ServiceError, end, free_port, spawn, temporary_directory
from tests.waiting import until

QUEUED_AS = re.compile(rb"queued as ([0-9a-f]{32})")


class Installation:
    """smtpd on `port`, workers, and their broker. Settings are given without RELAY_."""

    def __init__(self, directory: Path, database_url: str, **settings: str) -> None:
        self.directory = directory
        self.port = free_port()
        self.broker = Broker(temporary_directory())
        self.broker.start()
        self.database = connect(database_url)
        self.dialect = dialect_of(self.database)
        self.spool = directory / "var" / "spool"
        self.journal = Spool(self.spool)
        self.settings = {
            "STATE_DIR": str(directory / "var"),
            "DATABASE_URL": database_url,
            "BROKER_URL": self.broker.url,
            "SMTP_LISTEN": f"127.0.0.1:{self.port}",
            "HOSTNAME": "relay.example.com",
            **settings,
        }
        self.log = directory / "log"
        self.children: list[subprocess.Popen[Any]] = []

    def close(self) -> None:
        for child in reversed(self.children):
            end(child, signal.SIGKILL)
        self.database.dispose()
        self.broker.resume()
        self.broker.stop()
        shutil.rmtree(self.broker.directory)

    # Processes

    def begin(self, *arguments: str, **settings: str) -> subprocess.Popen[Any]:
        """Start `python -m ARGUMENTS`."""
        with self.log.open("ab") as log:
            child = spawn(
                [sys.executable, "-m", *arguments],
                env=relay_environ(**{**self.settings, **settings}),
                stdout=log,
                stderr=log,
                cwd=ROOT,
            )
        self.children.append(child)
        return child

    def smtpd(self, *, wait: bool = True, **settings: str) -> subprocess.Popen[Any]:
        child = self.begin("commands.cli.start", "smtpd", **settings)
        if wait:
            self.until_accepting(child)
        return child

    def worker(self, *, wait: bool = True, **settings: str) -> subprocess.Popen[Any]:
        child = self.begin("commands.cli.start", "worker", **settings)
        if wait:
            self.until_registered(child)
        return child

    def until_accepting(self, smtpd: subprocess.Popen[Any]) -> None:
        until(lambda: self._accepts() or smtpd.poll() is not None, STARTING, what=self.log_text)
        assert smtpd.poll() is None, self.log_text()

    def _accepts(self) -> bool:
        try:
            smtplib.SMTP("127.0.0.1", self.port, timeout=10).close()
        except OSError:
            return False
        return True

    def until_registered(self, worker: subprocess.Popen[Any]) -> None:
        registered = "SELECT id FROM workers WHERE pid = :pid AND ended_at IS NULL"
        until(
            lambda: self.rows(registered, pid=worker.pid) or worker.poll() is not None,
            STARTING,
            what=self.log_text,
        )
        assert worker.poll() is None, self.log_text()

    def end(self, child: subprocess.Popen[Any], number: int = signal.SIGTERM) -> int:
        """Signal a child and wait for its end; its exit status."""
        self.children.remove(child)
        return end(child, number)

    def log_text(self) -> str:
        """The processes that ended, and the last lines of the log without those about each
        message."""
        ended = [
            f"{child!r} (pid {child.pid})" for child in self.children if child.poll() is not None
        ]
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        routine = ('"event": "accepted"', '"event": "sending"', '"event": "delivered"')
        return "\n".join(
            ended + [line for line in lines if not any(word in line for word in routine)][-40:]
        )

    # Mail

    def smtp_source(
        self, count: int, recipient: str, *options: str, sender: str = "a@example.com"
    ) -> None:
        """Send messages with smtp-source of Postfix; all must be accepted."""
        smtp_source(self.port, count, recipient, *options, sender=sender)

    def send(
        self,
        *recipients: str,
        sender: str = "me@example.com",
        body: bytes = b"Subject: x\n\nHello.\n",
    ) -> str:
        """Send a message by SMTP; its queue id."""
        with smtplib.SMTP(
            "127.0.0.1", self.port, local_hostname="client.example.com", timeout=30
        ) as client:
            return submit(client, *recipients, sender=sender, body=body)

    # Queries

    def rows(self, sql: str, **parameters: Any) -> list[Any]:
        """The rows of a SELECT (macros of `tests.dialect` work)."""
        with reading(self.database) as connection:
            return list(connection.execute(text(self.dialect(sql)), parameters).all())

    def count(self, where: str = "1 = 1") -> int:
        """How many deliveries match."""
        return int(self.rows(f"SELECT count(*) FROM deliveries d WHERE {where}")[0][0])

    def to(self, recipient: str) -> Any:
        """The row of `mail_history` of a recipient (`%` matches anything), once it is there; the
        last row if there are several."""
        sql = "SELECT * FROM mail_history WHERE recipient LIKE :r ORDER BY queue_id"
        return until(lambda: self.rows(sql, r=recipient))[-1]

    def attempts(self, recipient: str) -> list[tuple[str | None, str, str]]:
        """Server, outcome and reply of each try for a recipient, in order."""
        sql = """SELECT a.server, a.outcome, a.reply FROM attempts a JOIN recipients r
            ON r.queue_id = a.queue_id
            AND r.delivery = a.delivery WHERE r.address = :r ORDER BY a.queue_id, a.claim,
            a.attempt_index"""
        return [tuple(row) for row in self.rows(sql, r=recipient)]

    def until_state(self, recipient: str, state: str, timeout: float = 30.0) -> Any:
        """Wait until the delivery to a recipient is in that state; its row of `mail_history`."""
        until(
            lambda: self.to(recipient).state == state,
            timeout,
            what=lambda: f"{self.to(recipient)} {self.log_text()}",
        )
        return self.to(recipient)

    def until_all_delivered(self, timeout: float = 60.0) -> None:
        """Wait until what was accepted has its rows, every delivery is delivered, and the spool has
        no body."""
        self.until_all_recorded(timeout)
        until(
            lambda: not self.bodies(),
            timeout,
            what=lambda: f"{self.bodies()} are left in the spool",
        )

    def until_all_recorded(self, timeout: float = 60.0) -> None:
        """Wait until what was accepted has its rows, and every delivery is delivered."""
        self.until_rows(timeout + ADOPT_SOON)
        until(lambda: not self.count("d.state <> 'delivered'"), timeout, what=self.unfinished)

    def until_rows(self, timeout: float = 60.0) -> None:
        """Wait until what was accepted has its rows, which follow the replies. A segment that a
        dying spooler still had when the next one started is adopted ADOPT_SOON later."""
        until(lambda: not self.without_rows(), timeout, what=self.unfinished)

    def without_rows(self) -> int:
        """The messages that were accepted and have no rows yet."""
        return journal_lag(self.journal, QueueReader(self.database).segments()).messages

    def unfinished(self) -> str:
        rows = self.rows(
            "SELECT queue_id, recipient, state, attempts, reason, next_at FROM mail_queue LIMIT 5"
        )
        states = self.rows("SELECT state, count(*) FROM deliveries GROUP BY state")
        return f"{states}, such as {rows}\n{self.log_text()}"

    def bodies(self) -> list[Path]:
        """The bodies in the spool."""
        return [path for path in self.spool.rglob("*") if re.fullmatch("[0-9a-f]{32}", path.name)]


type Install = Callable[..., Installation]


def smtp_source(
    port: int, count: int, recipient: str, *options: str, sender: str = "a@example.com"
) -> None:
    """Run smtp-source of Postfix; any output is an error."""
    command = [
        installed("smtp-source"),
        *options,
        "-m",
        str(count),
        "-f",
        sender,
        "-t",
        recipient,
        f"127.0.0.1:{port}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def installed(name: str) -> str:
    """The path of a foreign program; the test is skipped if it is not installed."""
    try:
        return program(name)
    except ServiceError as error:
        pytest.skip(str(error))


def submit(client: smtplib.SMTP, *recipients: str, sender: str, body: bytes) -> str:
    """One transaction with a body in LF form; the queue id. AssertionError for anything but 250."""
    client.ehlo_or_helo_if_needed()
    text = body.replace(b"\n", b"\r\n")
    for code, reply in (client.mail(sender), *map(client.rcpt, recipients), client.data(text)):
        assert code == 250, reply
    queued = QUEUED_AS.search(reply)
    assert queued, reply
    return queued[1].decode()


class Feeder:
    """SMTP clients that send all the time, each message to a recipient of its own, and note which
    were accepted. A message whose connection broke is not sent again: it may arrive or not, but
    never twice."""

    def __init__(self, port: int, clients: int = 4, *, name: str = "") -> None:
        self.accepted: set[str] = set()
        self._port = port
        self._name = name
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=partial(self._run, number), daemon=True)
            for number in range(clients)
        ]

    def __enter__(self) -> "Feeder":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop sending; returns when the open transactions are answered."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def until_accepted(self, more: int, timeout: float = 30.0) -> None:
        """Wait until this many more messages are accepted."""
        goal = len(self.accepted) + more
        until(lambda: len(self.accepted) >= goal, timeout, what=f"{goal} messages are accepted")

    def _run(self, client: int) -> None:
        number = 0
        while not self._stopping.is_set():
            try:
                with smtplib.SMTP(
                    "127.0.0.1", self._port, "client.example.com", timeout=20
                ) as connection:
                    while not self._stopping.wait(0.05):
                        number += 1
                        recipient = f"{self._name}{client}-{number}@example.org"
                        submit(
                            connection,
                            recipient,
                            sender="a@example.com",
                            body=b"Subject: x\n\n" + b"y" * 2000,
                        )
                        self.accepted.add(recipient)
            except (OSError, smtplib.SMTPException, AssertionError):
                self._stopping.wait(0.1)  # smtpd was out of reach or failed: connect again


def accepted_by(*sinks: Sink) -> Counter[str]:
    """How often these sinks replied K, by recipient, whether or not a worker read the reply."""
    messages = (message for sink in sinks for message in list(sink.received))
    return Counter(r.decode() for m in messages if m.reply.startswith(b"K") for r in m.recipients)


def assert_none_lost(installation: Installation, accepted: Iterable[str], *sinks: Sink) -> None:
    """Assert that no accepted message is lost, and that a server accepted a message twice only
    after an uncertain attempt."""
    received = accepted_by(*sinks)
    lost = set(accepted) - received.keys()
    assert not lost, f"accepted with 250 and never accepted by a server: {sorted(lost)[:10]}"
    uncertain = Counter(
        row[0]
        for row in installation.rows(
            "SELECT r.address FROM attempts a JOIN recipients r ON r.queue_id = a.queue_id"
            " WHERE a.outcome = 'uncertain'"
        )
    )
    twice = {recipient: n for recipient, n in received.items() if n > 1 + uncertain[recipient]}
    assert not twice, f"accepted more often than uncertain attempts explain: {twice}"
