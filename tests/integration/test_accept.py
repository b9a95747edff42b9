"""Acceptance on both databases: all of a message or nothing, and once however often it is
committed."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, OperationalError

from relay.db.engine import writing
from relay.ids import new_id
from relay.queue.accept import (
    Acceptor,
    EncodedMessage,
    NewMessage,
    SegmentSpan,
    encode,
    routes_of,
)
from relay.queue.model import Claim, ClaimRequest
from relay.queue.outcome import Outcome
from tests.integration.harness import QueueHarness, new_message
from tests.waiting import until


class JournalHarness:
    """A segment of a journal, without a file, whose messages an acceptor commits."""

    def __init__(self, queue: QueueHarness) -> None:
        self.acceptor = Acceptor(queue.database, lifetime=1000.0, grace=5.0)
        self.segment, self.end = new_id(), 4096
        self.acceptor.open_segment(self.segment, self.end)

    def batch(self, *messages: NewMessage) -> tuple[list[EncodedMessage], SegmentSpan]:
        """What `commit` takes for messages that were appended now."""
        encoded = [
            EncodedMessage(encode(message), self.end + n) for n, message in enumerate(messages, 1)
        ]
        span = SegmentSpan(self.segment, self.end, self.end + 4096)
        self.end = span.end
        return encoded, span


@pytest.fixture
def journal(queue: QueueHarness) -> JournalHarness:
    return JournalHarness(queue)


@contextmanager
def rows_under_way(
    queue: QueueHarness, journal: JournalHarness, message: NewMessage
) -> Iterator[None]:
    """While it lasts, a transaction has inserted the message and is not committed."""
    inserted, go_on = threading.Event(), threading.Event()
    encoded, span = journal.batch(message)

    def insert() -> None:
        with writing(queue.database) as connection:
            assert journal.acceptor.insert_batch(connection, encoded, span, announced=message.id)
            inserted.set()
            assert go_on.wait(30)

    with ThreadPoolExecutor(1) as pool:
        inserting = pool.submit(insert)
        assert inserted.wait(20)
        try:
            yield
        finally:
            go_on.set()
        inserting.result(20)


def early_claim(queue: QueueHarness, queue_id: str) -> list[Claim]:
    request = ClaimRequest(queue.worker, [queue_id], {"default": 1}, early=True)
    (claims,) = queue.worker_queue.commit([request])
    assert isinstance(claims, list)
    return claims


def waits_for_lock(queue: QueueHarness) -> bool:
    query = "SELECT count(*) AS n FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    return bool(queue.rows(query)[0]["n"])


def test_the_claim_of_an_early_hint_waits_for_the_rows(
    queue: QueueHarness, journal: JournalHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.queue.claim.EARLY_SEARCH", 60.0)
    message = new_message()
    with ThreadPoolExecutor(1) as pool:
        assert queue.worker
        with rows_under_way(queue, journal, message):
            claiming = pool.submit(early_claim, queue, message.id)
            if queue.dialect.postgresql:  # on SQLite no statement shows who waits for the flock
                until(lambda: waits_for_lock(queue))
                assert not claiming.done()
        assert [claim.queue_id for claim in claiming.result(20)] == [message.id]


def test_a_claim_that_waits_too_long_finds_nothing(
    postgres_queue: QueueHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.queue.claim.EARLY_SEARCH", 0.05)
    queue, message = postgres_queue, new_message()
    with rows_under_way(queue, JournalHarness(queue), message):
        assert early_claim(queue, message.id) == []
    assert [claim.queue_id for claim in early_claim(queue, message.id)] == [message.id]


def test_the_claim_of_a_message_that_never_comes_does_not_wait(
    queue: QueueHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.queue.claim.EARLY_SEARCH", 3600.0)
    assert early_claim(queue, new_id()) == []


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
    queue.insert([message])
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


def test_a_message_of_the_journal_has_its_place_and_its_age(
    queue: QueueHarness, journal: JournalHarness
) -> None:
    messages = [new_message("x@example.org", "bulk:y@example.org") for _ in range(2)]
    journal.acceptor.commit(*journal.batch(*messages), age=100.0)
    rows = queue.rows(
        "SELECT @hex(segment) AS segment, position, @since(received_at) AS ago"
        " FROM messages ORDER BY position"
    )
    assert [(row["segment"], row["position"]) for row in rows] == [
        (journal.segment, 4097),
        (journal.segment, 4098),
    ]
    assert all(100 <= row["ago"] < 160 for row in rows)
    delivery = queue.delivery(messages[0].id)
    assert delivery["expires_in"] == pytest.approx(900, abs=30), "its lifetime runs since then"
    assert delivery["due_in"] == pytest.approx(5, abs=4)


def test_a_message_that_is_committed_twice_is_accepted_once(
    queue: QueueHarness, journal: JournalHarness
) -> None:
    messages = [new_message("x@example.org", "bulk:y@example.org") for _ in range(3)]
    batch = journal.batch(*messages)
    journal.acceptor.commit(*batch)
    queue.complete(queue.claim(messages[0].id)[0], Outcome.DELIVERED)
    before = queue.rows("SELECT * FROM deliveries ORDER BY queue_id, number")
    journal.acceptor.commit(*batch)
    journal.acceptor.commit(*journal.batch(new_message()))
    after = queue.rows("SELECT * FROM deliveries ORDER BY queue_id, number")
    assert after[:-1] == before, "also what is finished stays so"
    assert counts(queue) == [4, 7, 7]


def test_the_routes_of_an_encoded_message() -> None:
    message = new_message("x@example.org", "bulk:y@example.org", "z@example.org")
    assert routes_of(encode(message)) == ("default", "bulk")


def test_bytes_from_peers_cannot_break_the_transaction(queue: QueueHarness) -> None:
    long = "<" + "x" * 5000 + "@x>"
    queue.insert([new_message(helo="nul\0 and \udcff and é", header_message_id=long)])
    (row,) = queue.rows("SELECT helo, header_message_id FROM messages")
    assert row["helo"] == r"nul\x00 and \xff and \xc3\xa9"
    assert len(row["header_message_id"]) == 1000


def test_a_row_that_the_database_refuses_is_held_and_the_others_are_not(
    queue: QueueHarness, journal: JournalHarness
) -> None:
    """Its client has heard 250, so it must not be lost."""
    long = "".join(new_id() for _ in range(1000))  # nothing that compresses
    senders = ["good@x", "nul\0", long]
    messages = [new_message(sender=sender) for sender in senders]
    batch = journal.batch(*messages)
    if queue.dialect.postgresql:
        with pytest.raises(DBAPIError):
            journal.acceptor.commit(*batch)
        assert counts(queue) == [0, 0, 0]
    journal.acceptor.commit_each(*batch)
    assert counts(queue) == [3, 3, 3]
    rows = queue.rows(
        "SELECT m.sender, d.state, d.last_reply FROM messages m"
        " JOIN deliveries d ON d.queue_id = m.id"
    )
    held = {row["sender"]: row["last_reply"] for row in rows if row["state"] == "held"}
    assert [row["sender"] for row in rows if row["state"] == "queued"][:1] == ["good@x"]
    if queue.dialect.postgresql:
        assert {*held} == {r"nul\x00", long[:997] + "..."}
        assert all("refused by the database" in reason for reason in held.values())
    journal.acceptor.commit_each(*batch)
    assert counts(queue) == [3, 3, 3]


def test_all_of_a_message_or_nothing(queue: QueueHarness) -> None:
    message = new_message("x@example.org", "y@example.org")
    message.recipients[1] = message.recipients[1]._replace(route=None)  # type: ignore[arg-type]
    with pytest.raises(DBAPIError):
        queue.insert([message])
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
    execute = psycopg.Connection.execute

    def interrupted(connection: Any, query: Any, *rest: Any, **options: Any) -> Any:
        if done or "INSERT INTO messages" not in query:
            return execute(connection, query, *rest, **options)
        done.append(connection.info.backend_pid)
        if after:
            execute(connection, query, *rest, **options)
        with queue.database.connect() as other:
            other.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": done[0]})
        return execute(connection, query, *rest, **options)  # the connection is broken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psycopg.Connection, "execute", interrupted)
        yield
    assert done


@pytest.mark.parametrize("after", [False, True])
def test_an_unknown_commit_is_settled_by_the_same_statement(
    postgres_queue: QueueHarness, after: bool
) -> None:
    journal = JournalHarness(postgres_queue)
    batch = journal.batch(*[new_message("x@example.org", "bulk:y@example.org") for _ in range(3)])
    with killed(postgres_queue, after=after), pytest.raises(OperationalError):
        journal.acceptor.commit(*batch)
    assert counts(postgres_queue) == ([3, 6, 6] if after else [0, 0, 0])
    journal.acceptor.commit(*batch)
    assert counts(postgres_queue) == [3, 6, 6]


def test_an_unknown_commit_whose_transaction_still_runs(postgres_queue: QueueHarness) -> None:
    """The repeat waits for the end of the first transaction, and then stores the message once in
    either case."""
    queue, journal = postgres_queue, JournalHarness(postgres_queue)
    for keep in (True, False):
        batch = journal.batch(new_message())
        first = queue.database.connect()
        first.begin()
        moved = text("UPDATE segments SET committed_to = :end WHERE id = CAST(:id AS uuid)")
        if keep:  # the whole statement, still without its COMMIT
            journal.acceptor.insert_batch(first, *batch)
        else:
            first.execute(moved, {"end": batch[1].end, "id": journal.segment})
        again = threading.Thread(target=journal.acceptor.commit, args=batch)
        again.start()
        until(lambda: queue.rows("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
        first.commit() if keep else first.rollback()
        first.close()
        again.join(20)
    assert counts(queue) == [2, 2, 2]


def test_what_plugins_decided_is_in_the_rows(queue: QueueHarness) -> None:
    plain = new_message()
    prefixed = new_message(prefix="X-Spam: yes\nX-Name: \u00e9\n\tfolded\n")
    held = new_message("b@example.org", "fast:c@example.org", hold_reason="looks odd")
    queue.insert([plain, prefixed, held])
    prefixes = queue.rows("SELECT @hex(id) AS id, prefix FROM messages")
    assert {row["id"]: row["prefix"] for row in prefixes} == {
        plain.id: None,
        prefixed.id: "X-Spam: yes\nX-Name: \u00e9\n\tfolded\n",
        held.id: None,
    }
    assert queue.states_of([plain.id, prefixed.id]) == ["queued", "queued"]
    for number in (1, 2):
        row = queue.delivery(held.id, number)
        assert (row["state"], row["due_at"]) == ("held", None)
        assert (row["last_reply"], row["reason_source"]) == ("looks odd", "relay")
    (claim,) = queue.claim(prefixed.id)
    assert claim.prefix == "X-Spam: yes\nX-Name: \u00e9\n\tfolded\n".encode()
    (claim,) = queue.claim(plain.id)
    assert claim.prefix == b""


def test_a_row_that_is_escaped_keeps_the_lines_of_its_prefix(
    queue: QueueHarness, journal: JournalHarness
) -> None:
    prefix = "X-Long: " + "y" * 900 + "\n\tz\nX-More: " + "y" * 900 + "\u00e9\n"
    message = new_message(prefix=prefix, helo="x", sender="a\0@example.com")
    encoded, span = journal.batch(message)
    journal.acceptor.commit_each(encoded, span)
    (row,) = queue.rows("SELECT prefix FROM messages")
    if queue.state(message.id) == "held":  # PostgreSQL refuses a NUL
        prefix = prefix.replace("\u00e9", "?")
    assert row["prefix"] == prefix
