"""fsck on both databases: it reports faults, repairs them only with --repair, and reports nothing
in a healthy relay."""

import os
import time
from pathlib import Path

import pytest
from sqlalchemy import Connection, text

from commands.ops import fsck
from commands.ops.check import broker_lists
from commands.ops.fsck import Fsck, Inconsistency
from qmqp.body import BodyFile
from relay.db.engine import writing
from relay.hints import QUEUES
from relay.ids import dashed, new_id
from relay.queue import audit
from relay.queue.outcome import Outcome
from relay.settings import Settings, load
from relay.spool.store import Spool
from tests.bodies import body_in
from tests.integration.harness import QueueHarness
from tests.integration.typed import Typed, lines, typed_at
from worker.celery_app import celery_app

BODY = b"b" * 100
OLD = 7200.0


@pytest.fixture
def typed(queue: QueueHarness, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> Typed:
    monkeypatch.setattr(fsck, "wait", lambda _seconds: None)
    return typed_at(queue, spool, monkeypatch)


def stored(queue: QueueHarness, spool: Spool, *addresses: str, **more: object) -> str:
    queue_id = queue.accept(*addresses, **more)
    spool.store(queue_id, [BODY])
    return queue_id


def aged(path: Path, seconds: float = OLD) -> Path:
    os.utime(path, (time.time() - seconds,) * 2)
    return path


def orphan(spool: Spool, seconds: float = OLD) -> Path:
    name = new_id()
    spool.store(name, [b"lost"])
    return aged(spool.path(name), seconds)


def fsck_rows(typed: Typed, *arguments: str) -> list[tuple[str, str]]:
    """The inconsistencies that fsck reports, and whether each was repaired."""
    done = typed("fsck", "--json", *arguments, status=None)
    rows = [(row["found"], row["repaired"]) for row in lines(done)]
    assert done.exit_code == any(repaired != "yes" for _, repaired in rows)
    return rows


def assert_repairable(typed: Typed, what: str) -> None:
    """fsck reports it, changes nothing without --repair, repairs it, and reports it no more."""
    assert fsck_rows(typed) == fsck_rows(typed) == [(what, "no")]
    assert fsck_rows(typed, "--repair") == [(what, "yes")]
    assert fsck_rows(typed) == []


def test_a_busy_relay_has_no_inconsistency(queue: QueueHarness, spool: Spool, typed: Typed) -> None:
    for outcome in (
        Outcome.DELIVERED,
        Outcome.DEFERRED,
        Outcome.REJECTED,
        Outcome.UNCERTAIN,
        Outcome.UNREACHABLE,
    ):
        queue_id = stored(queue, spool, "a@example.org", "bulk:b@example.org")
        queue.complete(queue.claim(queue_id, capacity={"default": 1})[0], outcome)
        aged(spool.path(queue_id))
    stored(queue, spool)
    queue.claim(stored(queue, spool))
    finished = stored(queue, spool)  # its worker is about to remove the body
    queue.complete(queue.claim(finished)[0], Outcome.DELIVERED)
    aged(spool.path(finished))
    orphan(spool, 60)  # its message is about to be committed
    queue.worker_queue.retire(queue.register_worker())
    assert fsck_rows(typed, "--repair") == []
    assert "no inconsistency found" in typed("fsck").stderr


def test_a_file_without_a_row_is_moved(queue: QueueHarness, spool: Spool, typed: Typed) -> None:
    stored(queue, spool)
    path = orphan(spool)
    assert_repairable(typed, "file without row")
    assert body_in(spool.directory / "orphans" / path.name) == b"lost"


def test_a_restored_database_has_no_orphans(
    queue: QueueHarness, spool: Spool, typed: Typed
) -> None:
    path = orphan(spool)
    assert fsck_rows(typed, "--repair") == [("file without row", "-")], "there is no row at all"
    stored(queue, spool)
    earlier = (
        "received_at - interval '1 day'"
        if queue.dialect.postgresql
        else "received_at - 86400000000"
    )
    queue.change(f"UPDATE messages SET received_at = {earlier}")
    assert fsck_rows(typed, "--repair") == [("file without row", "-")]
    assert path.exists()


def test_a_body_that_is_not_needed_is_removed(
    queue: QueueHarness, spool: Spool, typed: Typed
) -> None:
    queue_id = stored(queue, spool)
    queue.complete(queue.claim(queue_id)[0], Outcome.DELIVERED)
    earlier = (
        "finished_at - interval '1 hour'"
        if queue.dialect.postgresql
        else "finished_at - 3600000000"
    )
    queue.change(f"UPDATE deliveries SET finished_at = {earlier}")
    aged(spool.path(queue_id))
    assert_repairable(typed, "body not needed")
    assert not spool.path(queue_id).exists()


def test_a_body_whose_delivery_is_missing_stays(
    queue: QueueHarness, spool: Spool, typed: Typed
) -> None:
    alone, beside = (
        stored(queue, spool),
        stored(queue, spool, "a@example.org", "bulk:b@example.org"),
    )
    queue.complete(queue.claim(beside, capacity={"default": 1})[0], Outcome.DELIVERED)
    queue.change("DELETE FROM deliveries WHERE state = 'queued'")
    earlier = (
        "finished_at - interval '1 hour'"
        if queue.dialect.postgresql
        else "finished_at - 3600000000"
    )
    queue.change(f"UPDATE deliveries SET finished_at = {earlier}")
    for queue_id in (alone, beside):
        aged(spool.path(queue_id))
    assert fsck_rows(typed, "--repair") == [("recipient without delivery", "yes")]
    assert [queue.state(alone), queue.state(beside, 2)] == ["held", "held"]
    assert fsck_rows(typed, "--repair") == [], "the bodies are there"


@pytest.mark.parametrize("body", [None, b"too short"])
def test_a_delivery_that_cannot_be_sent_is_held(
    queue: QueueHarness, spool: Spool, typed: Typed, body: bytes | None
) -> None:
    whole, broken = stored(queue, spool), queue.accept()
    if body:
        spool.store(broken, [body])
    what = "body of another size" if body else "body missing"
    assert fsck_rows(typed) == [(what, "no")]
    assert "--repair would repair 1" in typed("fsck", status=1).stderr
    assert fsck_rows(typed, "--repair") == [(what, "yes")]
    assert queue.states_of([whole, broken]) == ["queued", "held"]
    assert queue.delivery(broken)["last_outcome"] == "unsendable"
    assert fsck_rows(typed, "--repair") == [(what, "-")], "it is reported until an operator decides"
    assert "put the file back and release it" in typed("why", broken).stdout


def test_a_body_of_a_delivery_that_finishes_meanwhile_is_no_inconsistency(
    queue: QueueHarness, spool: Spool, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue_id = stored(queue, spool)
    open_body = Spool.open

    def delivered_meanwhile(self: Spool, name: str, size: int) -> BodyFile:
        if queue.state(queue_id) == "queued":
            queue.complete(queue.claim(queue_id)[0], Outcome.DELIVERED)
            spool.remove(queue_id)
        return open_body(self, name, size)

    monkeypatch.setattr(Spool, "open", delivered_meanwhile)
    assert fsck_rows(typed, "--repair") == []


def test_a_spool_that_changes_meanwhile_holds_no_mail(
    queue: QueueHarness, spool: Spool, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue_id = queue.accept()

    def unmounted(_self: Fsck) -> list[Inconsistency]:
        (spool.directory / "spool-id").write_text("another")
        return []

    monkeypatch.setattr(Fsck, "_files", unmounted)
    assert "another spool" in typed("fsck", "--repair", status=2).stderr
    assert queue.state(queue_id) == "queued"


def test_a_worker_is_expired_only_if_its_lease_stays_expired(
    queue: QueueHarness, spool: Spool, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue_id, other = stored(queue, spool), stored(queue, spool)
    dead = queue.register_worker()
    queue.claim(queue_id, worker=dead)
    queue.claim(other)
    queue.pass_time(400)
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        queue.renew()

    monkeypatch.setattr(fsck, "wait", wait)
    assert_repairable(typed, "expired worker")
    assert set(waits) == {60.0}
    assert queue.states_of([queue_id, other]) == ["deferred", "sending"]
    assert queue.numbered_attempts(queue_id) == [(1, 0, "uncertain")]


def test_a_delivery_of_an_unknown_worker_is_uncertain(
    queue: QueueHarness, spool: Spool, typed: Typed
) -> None:
    queue_id = stored(queue, spool)
    queue.claim(queue_id)
    queue.change("DELETE FROM workers")
    assert_repairable(typed, "sent by an unknown worker")
    assert queue.state(queue_id) == "deferred"


def test_overdue_deliveries_are_reported(queue: QueueHarness, spool: Spool, typed: Typed) -> None:
    (one,), (two,), _ = (queue.claim(stored(queue, spool)) for _ in range(3))
    queue.complete(one, Outcome.DEFERRED)
    queue.complete(two, Outcome.REJECTED)
    stored(queue, spool, "slow:x@example.org")
    queue.pass_time(1200)
    queue.renew()
    assert fsck_rows(typed) == [("DSN pending", "-"), ("overdue", "-")], (
        "others are sent: it may wait for a connection"
    )
    queue.pass_time(20000)
    queue.renew()
    late = lines(typed("fsck", "--json", status=1))
    assert [row["words"].split(",")[0] for row in late] == [
        "1 bounced",
        "1 deferred",
        "1 queued",
        "1 sending",
    ]
    typed("pause", "--route", "slow")
    assert len(fsck_rows(typed)) == 3


def test_recipients_without_a_delivery_are_held(
    queue: QueueHarness, spool: Spool, typed: Typed
) -> None:
    queue_id = stored(queue, spool, "a@example.org", "bulk:b@example.org")
    queue.change("DELETE FROM deliveries WHERE number = 2")
    assert_repairable(typed, "recipient without delivery")
    assert queue.state(queue_id, 2) == "held"
    queue.change("DELETE FROM recipients WHERE delivery = 1")
    assert fsck_rows(typed, "--repair") == [("delivery without recipient", "yes")]
    assert queue.state(queue_id) == "held", (
        "fsck ends no delivery, so that no failure stays unreported"
    )
    assert fsck_rows(typed, "--repair") == [("delivery without recipient", "-")], (
        "until an operator decides"
    )
    said = [queue.delivery(queue_id, number)["last_reply"] for number in (2, 1)]
    assert said == ["held by fsck: it had no delivery", "held by fsck: it has no recipient"]
    assert (
        "b@example.org: held by fsck: it had no delivery. It stays until"
        in typed("why", queue_id).stdout
    )
    queue.change("DELETE FROM messages")
    stored(queue, spool)
    aged(spool.path(queue_id))
    assert ("delivery without message", "-") in (rows := fsck_rows(typed, "--repair"))
    assert ("file without row", "yes") not in rows, (
        "the rows that remain say that the body may be needed"
    )


def test_a_message_that_lost_all_its_rows_keeps_its_body(
    queue: QueueHarness, spool: Spool, typed: Typed
) -> None:
    queue_id = stored(queue, spool)
    for table in ("recipients", "deliveries"):
        queue.change(f"DELETE FROM {table}")
    aged(spool.path(queue_id))
    assert fsck_rows(typed, "--repair") == [("message without recipients", "-")]
    assert queue_id in typed("fsck", status=1).stdout
    assert spool.path(queue_id).exists()


def test_repairs_are_recorded(queue: QueueHarness, spool: Spool, typed: Typed) -> None:
    lost, broken, unknown = stored(queue, spool), queue.accept(), stored(queue, spool)
    queue.claim(unknown)
    queue.change("DELETE FROM workers")
    queue.change("DELETE FROM deliveries WHERE queue_id = @id(:id)", id=lost)
    path = orphan(spool)
    stored(queue, spool)
    assert len(fsck_rows(typed)) == 4
    assert queue.rows("SELECT * FROM audit") == []
    assert {repaired for _, repaired in fsck_rows(typed, "--repair")} == {"yes"}
    sql = """SELECT a.reason, a.filter, a.matched, @hex(t.queue_id) AS id FROM audit a
        LEFT JOIN audit_deliveries t ON t.audit_id = a.id WHERE a.operation = 'fsck'
        AND a.actor LIKE '%@%' ORDER BY a.id"""
    assert [tuple(row.values()) for row in queue.rows(sql)] == [
        ("sent by an unknown worker", "", 1, unknown),
        ("recipient without delivery", "", 1, lost),
        ("file without row", f"--id {path.name}", 0, None),
        (f"no body file {broken}", f"--id {broken}", 1, broken),
    ]
    assert queue.numbered_attempts(unknown) == [(1, 0, "uncertain")], "it may have been sent"


def test_an_expired_worker_is_recorded(queue: QueueHarness, spool: Spool, typed: Typed) -> None:
    queue_id = stored(queue, spool)
    queue.claim(queue_id, worker=(dead := queue.register_worker()))
    queue.request_operation(queue_id, "hold")
    queue.change("UPDATE workers SET lease_expires_at = @ago(1000) WHERE id = @id(:id)", id=dead)
    assert fsck_rows(typed, "--repair") == [("expired worker", "yes")]
    assert [row["reason"] for row in queue.rows("SELECT reason FROM audit")] == [
        f"expired worker {dead}"
    ]
    assert (
        len(queue.rows("SELECT 1 FROM audit_deliveries WHERE queue_id = @id(:id)", id=queue_id))
        == 1
    )


@pytest.mark.parametrize(
    "what",
    ["sent by an unknown worker", "delivery without recipient", "recipient without delivery"],
)
def test_many_rows_are_repaired_in_chunks(
    queue: QueueHarness, spool: Spool, typed: Typed, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    # With this plan PostgreSQL would run a subquery again for each row.
    ways = ("hashjoin", "mergejoin", "hashagg", "sort", "material")
    monkeypatch.setenv("PGOPTIONS", " ".join(f"-c enable_{way}=off" for way in ways))
    monkeypatch.setattr(fsck, "CHUNK", 2)
    chunks, note = list[int](), audit.AuditEntry.note

    def noting(self: audit.AuditEntry, connection: Connection, matched: int, *keys: str) -> None:
        chunks.append(matched)
        note(self, connection, matched, *keys)

    monkeypatch.setattr(audit.AuditEntry, "note", noting)
    ids = [stored(queue, spool) for _ in range(5)]
    if what == "sent by an unknown worker":
        queue.claim(*ids)
        queue.request_operation(ids[0], "bounce")
    gone = {"sent by an unknown worker": "workers", "delivery without recipient": "recipients"}.get(
        what, "deliveries"
    )
    queue.change(f"DELETE FROM {gone}")
    assert fsck_rows(typed, "--repair") == [(what, "yes")]
    assert chunks == [2, 2, 1]
    assert [tuple(row.values()) for row in queue.rows("SELECT reason, matched FROM audit")] == [
        (what, 5)
    ]
    if what == "sent by an unknown worker":
        assert queue.states_of(ids) == ["bounced", *["deferred"] * 4], (
            "the pending operation comes first"
        )
    else:
        assert set(queue.states_of(ids)) == {"held"}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("due_at = NULL", "no due time"),
        ("state = 'held'", "useless due time"),
        ("state = 'bounced', due_at = NULL", "no finish time"),
    ],
)
def test_impossible_rows_are_repaired(
    queue: QueueHarness, spool: Spool, typed: Typed, change: str, what: str
) -> None:
    stored(queue, spool)
    with writing(
        queue.database
    ) as connection:  # no statement of the relay gets past the constraints
        loosen = (
            (
                "ALTER TABLE deliveries DROP CONSTRAINT IF EXISTS"
                " deliveries_due_where_the_state_needs_it"
            )
            if queue.dialect.postgresql
            else "PRAGMA ignore_check_constraints = ON"
        )
        connection.execute(text(loosen))
        connection.execute(text(f"UPDATE deliveries SET {change}"))
        if not queue.dialect.postgresql:
            connection.execute(text("PRAGMA ignore_check_constraints = OFF"))
    assert_repairable(typed, what)


def test_long_lists_at_the_broker_are_reported(
    queue: QueueHarness, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fsck, "broker_lists", lambda _settings: {"fresh": 5000, "retry": 3})
    assert [row["words"] for row in lines(typed("fsck", "--json", status=1))] == [
        "5000 hints in fresh"
    ]
    monkeypatch.setattr(fsck, "broker_lists", lambda _settings: {})
    assert "the broker does not answer: mail is delivered without it" in typed("fsck").stderr, (
        "which is no inconsistency of the queue"
    )


def test_the_lists_at_the_broker_are_counted(broker_url: str) -> None:
    settings = load(Settings, broker_url=broker_url)
    celery_app(settings).send_task("deliver", args=[[new_id()]], queue=QUEUES[0], retry=False)
    assert broker_lists(settings) == {"fresh": 1, "retry": 0}
    assert broker_lists(load(Settings, broker_url="redis://127.0.0.1:1/0")) == {}, (
        "away, which stops no mail"
    )


def test_ids_are_printed_without_dashes(queue: QueueHarness, spool: Spool, typed: Typed) -> None:
    queue_id = queue.accept()
    assert queue_id in typed("fsck", status=1).stdout
    assert dashed(queue_id) not in typed("fsck", status=1).stdout
