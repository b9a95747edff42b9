"""Acceptance on both databases: all of a message or nothing, once however often it is committed,
and a bad row fails alone."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, OperationalError

from relay.db.engine import TooLate
from relay.db.group_commit import CommitThread, CommitUnknown
from relay.ids import new_id
from relay.queue.accept import NewMessage
from relay.queue.outcome import Outcome
from tests.integration.harness import QueueHarness, new_message, opened
from tests.services import Postgres
from tests.waiting import until


class AcceptHarness:
    """A writer of messages, and its results by id. A second result for an id is an error."""

    def __init__(self, queue: QueueHarness) -> None:
        self.answers: dict[str, Any] = {}
        self.rounds: list[int] = []
        self.writer: CommitThread[NewMessage, None] = CommitThread(
            "test",
            queue.acceptor.commit,
            post=lambda call: call(),
            observe=lambda n, _: self.rounds.append(n),
        )

    def put(self, message: NewMessage, deadline: float | None = None) -> None:
        def done(answer: Exception | None) -> None:
            assert message.id not in self.answers
            self.answers[message.id] = answer

        self.writer.put(message, done, deadline)

    def take(self, *messages: NewMessage) -> dict[str, Any]:
        """Put these in one round and wait for the answers."""
        for message in messages:
            self.put(message)
        self.writer.start()
        assert self.writer.close(30)
        return self.answers


def counts(queue: QueueHarness) -> list[int]:
    """Rows of messages, recipients and deliveries."""
    return [
        queue.rows(f"SELECT count(*) AS n FROM {t}")[0]["n"]
        for t in ("messages", "recipients", "deliveries")
    ]


def test_every_field_of_a_message_is_kept(queue: QueueHarness) -> None:
    about = queue.accept()
    message = new_message(
        "Zoe@example.org",
        "bulk:adam@example.org",
        "mia@example.org",
        sender="",
        auth_user="user",
        header_message_id="<1@x>",
        body_type="8BITMIME",
        ret="HDRS",
        envid="QQ+3D",
        dsn_of=about,
        client_trusted=False,
        dsn_content="header",
        tls="TLSv1.3 TLS_AES_256_GCM_SHA384",
    )
    message.recipients[0] = message.recipients[0]._replace(
        notify="FAILURE,DELAY", orcpt="rfc822;zoe@example.org"
    )
    queue.acceptor.commit([message])
    (row,) = queue.rows(
        "SELECT m.*, @since(received_at) AS ago, @hex(dsn_of) AS about FROM messages m"
        " WHERE id = @id(:id)",
        id=message.id,
    )
    assert (row["sender"], row["size"], row["client_address"], row["helo"]) == (
        "",
        100,
        "192.0.2.1",
        message.helo,
    )
    assert (row["protocol"], row["auth_user"], row["header_message_id"]) == (
        "ESMTP",
        "user",
        "<1@x>",
    )
    assert (row["body_type"], row["ret"], row["envid"], row["about"]) == (
        "8BITMIME",
        "HDRS",
        "QQ+3D",
        about,
    )
    assert (row["client_trusted"], row["dsn_content"]) == (False, "header")
    assert row["tls"] == "TLSv1.3 TLS_AES_256_GCM_SHA384"
    assert 0 <= row["ago"] < 60
    sql = "SELECT * FROM recipients WHERE queue_id = @id(:id) ORDER BY position"
    fields = ("position", "address", "delivery", "notify", "orcpt")
    assert [tuple(row[f] for f in fields) for row in queue.rows(sql, id=message.id)] == [
        (1, "Zoe@example.org", 1, "FAILURE,DELAY", "rfc822;zoe@example.org"),
        (2, "adam@example.org", 2, None, None),
        (3, "mia@example.org", 1, None, None),
    ]
    first, second = queue.delivery(message.id, 1), queue.delivery(message.id, 2)
    assert (first["route"], second["route"], first["state"], first["claim_count"]) == (
        "default",
        "bulk",
        "queued",
        0,
    )
    assert first["due_in"] == pytest.approx(queue.settings.grace, abs=4)
    assert first["expires_in"] == pytest.approx(queue.settings.queue_lifetime, abs=30)


def test_a_message_that_is_committed_twice_is_accepted_once(queue: QueueHarness) -> None:
    messages = [new_message("x@example.org", "bulk:y@example.org") for _ in range(3)]
    queue.acceptor.commit(messages)
    queue.complete(queue.claim(messages[0].id)[0], Outcome.DELIVERED)
    before = queue.rows("SELECT * FROM deliveries ORDER BY queue_id, number")
    queue.acceptor.commit([*messages, new_message()])
    after = queue.rows("SELECT * FROM deliveries ORDER BY queue_id, number")
    assert after[:-1] == before, "also what is finished stays so"
    assert counts(queue) == [4, 7, 7]


def test_bytes_from_peers_cannot_break_the_transaction(queue: QueueHarness) -> None:
    long = "<" + "x" * 5000 + "@x>"
    queue.acceptor.commit([new_message(helo="nul\0 and \udcff and é", header_message_id=long)])
    (row,) = queue.rows("SELECT helo, header_message_id FROM messages")
    assert row["helo"] == r"nul\x00 and \xff and \xc3\xa9"
    assert len(row["header_message_id"]) == 1000


def test_one_bad_row_fails_alone(queue: QueueHarness) -> None:
    good = [new_message() for _ in range(4)]
    bad = new_message()._replace(sender=None)  # type: ignore[arg-type]
    harness = AcceptHarness(queue)
    answers = harness.take(*good[:2], bad, *good[2:])
    assert [answers[m.id] for m in good] == [None] * 4
    assert isinstance(answers[bad.id], DBAPIError)
    assert harness.rounds == [5]
    assert counts(queue) == [4, 4, 4]


def test_values_that_only_postgresql_refuses_fail_alone_and_at_once(
    postgres_queue: QueueHarness,
) -> None:
    good, nul = new_message(), new_message(sender="nul\0")
    long = new_message(sender="".join(new_id() for _ in range(1000)))  # nothing that compresses
    answers = AcceptHarness(postgres_queue).take(nul, good, long)
    assert answers[good.id] is None
    assert isinstance(answers[nul.id], DBAPIError)
    assert isinstance(answers[long.id], DBAPIError), "too long for an index"
    assert counts(postgres_queue) == [1, 1, 1]


def test_all_of_a_message_or_nothing(queue: QueueHarness) -> None:
    message = new_message("x@example.org", "y@example.org")
    message.recipients[1] = message.recipients[1]._replace(route=None)  # type: ignore[arg-type]
    with pytest.raises(DBAPIError):
        queue.acceptor.commit([message])
    assert counts(queue) == [0, 0, 0]


# --- COMMIT in doubt
# --------------------------------------------------------------------------------------


@contextmanager
def killed(queue: QueueHarness, *, after: bool) -> Iterator[None]:
    """The server process is killed just before the next statement that inserts, or when it has
    committed unheard.

    The statement is a transaction of its own, so its end is the COMMIT.
    """
    done: list[int] = []

    def kill(connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if done or "INSERT INTO messages" not in statement:
            return
        done.append(connection.connection.driver_connection.info.backend_pid)
        with queue.database.connect() as other:
            other.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": done[0]})
        if after:
            connection.invalidate()
            raise OperationalError("COMMIT", {}, ConnectionResetError())

    moment = "after_cursor_execute" if after else "before_cursor_execute"
    event.listen(queue.database, moment, kill)
    yield
    assert done
    event.remove(queue.database, moment, kill)


@pytest.mark.parametrize("after", [False, True])
def test_an_unknown_commit_is_settled_by_the_same_statement(
    postgres_queue: QueueHarness, after: bool
) -> None:
    messages = [new_message("x@example.org", "bulk:y@example.org") for _ in range(3)]
    with killed(postgres_queue, after=after):
        answers = AcceptHarness(postgres_queue).take(*messages)
    assert answers == dict.fromkeys((m.id for m in messages), None)
    assert counts(postgres_queue) == [3, 6, 6]


def test_an_unknown_commit_whose_transaction_still_runs(postgres_queue: QueueHarness) -> None:
    """The repeat waits for the end of the first transaction, and then stores the message once in
    either case."""
    queue = postgres_queue
    kept, undone = new_message(), new_message()
    for message, keep in ((kept, True), (undone, False)):
        first = queue.database.connect()
        first.begin()
        queue.acceptor.insert(first, [message])
        again = threading.Thread(target=queue.acceptor.commit, args=([message],))
        again.start()
        until(lambda: queue.rows("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
        first.commit() if keep else first.rollback()
        first.close()
        again.join(20)
    assert counts(queue) == [2, 2, 2]


def test_messages_wait_while_the_database_is_away(
    postgres: Postgres, clean_postgres_url: str
) -> None:
    with opened(clean_postgres_url) as queue:
        harness = AcceptHarness(queue)
        postgres.stop()
        harness.writer.start()
        patient, hurried = new_message(), new_message()
        harness.put(patient)
        harness.put(hurried, deadline=0.0)
        until(lambda: harness.answers)
        assert isinstance(harness.answers[hurried.id], CommitUnknown)
        assert harness.writer.committer.stuck
        assert list(harness.answers) == [hurried.id]
        postgres.start()
        until(lambda: patient.id in harness.answers)
        assert harness.answers[patient.id] is None
        until(lambda: not harness.writer.committer.stuck)
        assert harness.writer.close(10)


def test_a_refusal_of_a_read_only_database_is_certain(
    queue: QueueHarness,
) -> None:
    """No try came to a COMMIT, so its body need not stay."""
    sql = (
        "SET default_transaction_read_only = {}"
        if queue.dialect.postgresql
        else "PRAGMA query_only = {}"
    )
    mode = ["on"]

    def prepare(connection: Any, *_: Any) -> None:
        connection.execute(sql.format(mode[0]))
        connection.commit()

    queue.database.dispose()
    event.listen(queue.database, "checkout", prepare)
    harness = AcceptHarness(queue)
    harness.writer.start()
    patient, hurried = new_message(), new_message()
    harness.put(patient)
    harness.put(hurried, deadline=0.0)
    until(lambda: harness.answers)
    assert list(harness.answers) == [hurried.id]
    assert isinstance(harness.answers[hurried.id], DBAPIError)
    mode[0] = "off"
    until(lambda: patient.id in harness.answers)
    assert harness.writer.close(10)
    assert [row["id"] for row in queue.rows("SELECT @hex(id) AS id FROM messages")] == [patient.id]


def test_nothing_is_written_when_the_turn_comes_too_late(queue: QueueHarness) -> None:
    with pytest.raises(TooLate):
        queue.acceptor.commit([new_message()], time.monotonic() - 1)
    assert counts(queue) == [0, 0, 0]
