"""`fsck --rebuild` and `fsck --adopt` on both databases: rows come back held, nothing comes twice,
and a database that was restored from a backup sends nothing in silence."""

import os
import socket
import time
from contextlib import closing

import pytest
from sqlalchemy.exc import OperationalError

from commands.ops import fsck
from relay.db.engine import OlderDatabase, connect, reading
from relay.ids import new_id
from relay.queue.accept import encode
from relay.queue.outcome import Outcome
from relay.spool.bodies import Bodies
from relay.spool.journal.adoption import AdoptedSegment, adopt_one
from relay.spool.journal.directory import ADOPTED, OWNED, JournalDirectory
from relay.spool.journal.format import Place, VoidedBatch, encode_segment_header, encode_void
from relay.spool.journal.scan import read_header
from relay.spool.journal.supply import make_segment
from relay.spool.mark import SpoolMark
from relay.spool.store import Spool
from tests.integration.harness import QueueHarness, new_message
from tests.integration.test_spooler import BODY, SpoolerHarness
from tests.integration.typed import Typed, lines, typed_at

TABLES = (
    "audit_deliveries",
    "audit",
    "attempts",
    "deliveries",
    "recipients",
    "messages",
    "segments",
)


@pytest.fixture
def typed(queue: QueueHarness, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> Typed:
    monkeypatch.setattr(fsck, "wait", lambda _seconds: None)
    return typed_at(queue, spool, monkeypatch)


def accepted(queue: QueueHarness, spool: Spool, *bodies: bytes) -> list[str]:
    """Messages that a spooler wrote and committed, in a sealed segment."""
    spooler = SpoolerHarness(queue, spool)
    requests = [spooler.request(body=body) for body in bodies]
    spooler.wait_for_rows(*requests)
    spooler.finish()
    return [request.queue_id for request in requests]


def accepted_in_file(queue: QueueHarness, spool: Spool) -> str:
    """A message whose body is a file with a trailer."""
    message = new_message(size=len(BODY))
    spool.store(message.id, [BODY], encode(message))
    queue.insert([message])
    return message.id


def forget(queue: QueueHarness, queue_id: str) -> None:
    """The rows of a message are lost."""
    for table, key in (("deliveries", "queue_id"), ("recipients", "queue_id"), ("messages", "id")):
        queue.change(f"DELETE FROM {table} WHERE {key} = @id(:id)", id=queue_id)


def advance(queue: QueueHarness, spool: Spool, marks: int = 3) -> None:
    """Mail was accepted in so many seconds."""
    mark = SpoolMark(JournalDirectory(spool.handle), spool.identity)
    for _ in range(marks):
        mark.advance(queue.database)


def body_of(queue: QueueHarness, spool: Spool, queue_id: str) -> bytes:
    (row,) = queue.rows(
        "SELECT @hex(segment) AS segment, position FROM messages WHERE id = @id(:id)", id=queue_id
    )
    place = Place(row["segment"], row["position"]) if row["segment"] else None
    with Bodies(spool, queue.database).stream(queue_id, len(BODY), place) as body:
        return body.read()


def mark_of(queue: QueueHarness) -> int:
    return int(queue.rows("SELECT mark FROM spool")[0]["mark"])


def test_a_database_that_has_everything_needs_no_rebuild(
    queue: QueueHarness, spool: Spool, typed: Typed
) -> None:
    accepted(queue, spool, BODY)
    accepted_in_file(queue, spool)
    assert "no message of the spool lacks" in typed("fsck", "--rebuild", "--yes").stderr
    assert queue.states() == {"queued"}


def test_rows_that_were_lost_come_back_held(
    queue: QueueHarness, spool: Spool, typed: Typed
) -> None:
    lost, kept = accepted(queue, spool, BODY, BODY)
    forget(queue, lost)
    assert "Add --yes" in typed("fsck", "--rebuild", status=2).stderr
    typed("fsck", "--rebuild", "--yes")
    assert queue.states_of([lost, kept]) == ["held", "queued"]
    assert body_of(queue, spool, lost) == BODY
    (row,) = queue.rows("SELECT operation, filter, matched FROM audit")
    assert row == {"operation": "fsck", "filter": "--rebuild", "matched": 1}
    typed("release", "--id", lost)
    assert queue.states() == {"queued"}


def test_a_database_that_was_lost_is_made_again_from_the_spool(
    queue: QueueHarness, spool: Spool, typed: Typed
) -> None:
    ids = [*accepted(queue, spool, BODY, BODY), accepted_in_file(queue, spool)]
    advance(queue, spool)
    for table in TABLES:
        queue.change(f"DELETE FROM {table}")
    queue.change("DELETE FROM spool")
    guarded = connect(queue.database.url.render_as_string(hide_password=False))
    SpoolMark(JournalDirectory(spool.handle), spool.identity).guard(guarded)
    with pytest.raises(OlderDatabase), reading(guarded):
        pass
    done = typed("fsck", "--rebuild", "--yes")
    assert "rebuilt 3 messages" in done.stdout
    assert queue.states_of(ids) == ["held"] * 3
    assert [body_of(queue, spool, one) for one in ids] == [BODY] * 3
    with reading(guarded):  # smtpd and workers go on
        pass
    guarded.dispose()
    with_spooler = SpoolerHarness(queue, spool)
    request = with_spooler.request()
    with_spooler.wait_for_rows(request)
    with_spooler.finish()
    assert queue.states_of([*ids, request.queue_id]) == ["held"] * 3 + ["queued"]
    assert len(queue.rows("SELECT 1 AS n FROM messages")) == 4, "nothing was replayed"


def test_an_older_database_sends_nothing_in_silence(
    queue: QueueHarness, spool: Spool, typed: Typed
) -> None:
    """A delivery of every unfinished state stands in the backup, and mail came after it."""
    queued, sending, deferred, finished = accepted(queue, spool, BODY, BODY, BODY, BODY)
    queue.claim(sending)
    for queue_id, outcome in ((deferred, Outcome.DEFERRED), (finished, Outcome.DELIVERED)):
        queue.complete(queue.claim(queue_id)[0], outcome)
    (later,) = accepted(queue, spool, BODY)
    advance(queue, spool, 5)
    forget(queue, later)
    queue.change("UPDATE spool SET mark = 1")
    assert "older than the spool" in typed("fsck", status=1).stdout
    typed("fsck", "--rebuild", "--yes")
    assert queue.states_of([queued, sending, deferred, later]) == ["held"] * 4
    assert queue.state(finished) == "delivered"
    assert ("", "uncertain") in [(server or "", o) for server, o in queue.attempts(sending)]
    assert mark_of(queue) == SpoolMark(JournalDirectory(spool.handle), spool.identity).known > 5
    assert typed("fsck", "--rebuild", "--yes").stdout == "", "once"


@pytest.mark.parametrize("outcome", [Outcome.REJECTED, Outcome.DEFERRED], ids=["D", "expired"])
def test_a_dsn_that_was_pending_in_the_backup_is_not_sent_again_in_silence(
    queue: QueueHarness, spool: Spool, typed: Typed, outcome: Outcome
) -> None:
    pending, told = accepted(queue, spool, BODY, BODY)
    if outcome is Outcome.DEFERRED:
        queue.change("UPDATE deliveries SET expires_at = @ago(1)")
    for queue_id in (pending, told):
        queue.complete(queue.claim(queue_id)[0], outcome)
    queue.change("UPDATE deliveries SET due_at = NULL WHERE queue_id = @id(:id)", id=told)
    before = queue.states_of([pending, told])
    assert before == [before[0]] * 2
    advance(queue, spool, 5)
    queue.change("UPDATE spool SET mark = 1")
    typed("fsck", "--rebuild", "--yes")
    assert queue.states_of([pending, told]) == ["held", before[1]]
    (row,) = queue.rows(
        "SELECT last_reply, finished_at, due_at FROM deliveries WHERE queue_id = @id(:id)",
        id=pending,
    )
    assert row["last_reply"].startswith("held by fsck --rebuild")
    assert "its DSN may have been sent" in row["last_reply"]
    assert (row["finished_at"], row["due_at"]) == (None, None)
    typed("bounce", "--id", pending, "--yes")
    assert queue.state(pending) == "bounced"
    due = "SELECT due_at FROM deliveries WHERE due_at IS NOT NULL"
    assert len(queue.rows(due)) == 1, "the operator has it sent"


@pytest.mark.parametrize("options", [(), ("--since", "0s")], ids=["all", "left out"])
def test_a_segment_that_the_backup_does_not_know_is_not_replayed(
    queue: QueueHarness, spool: Spool, typed: Typed, options: tuple[str, ...]
) -> None:
    """Its rows were committed, and the mail may have been delivered."""
    (queue_id,) = accepted(queue, spool, BODY)
    advance(queue, spool)
    for table in TABLES:
        queue.change(f"DELETE FROM {table}")
    queue.change("UPDATE spool SET mark = 0")
    typed("fsck", "--rebuild", "--yes", *options)
    spooler = SpoolerHarness(queue, spool)  # adopts what has no owner
    request = spooler.request()
    spooler.wait_for_rows(request)
    spooler.finish()
    states = {
        row["id"]: row["state"]
        for row in queue.rows("SELECT @hex(queue_id) AS id, state FROM deliveries")
    }
    held = {} if options else {queue_id: "held"}
    assert states == {request.queue_id: "queued"} | held


def test_old_mail_can_be_left_out(queue: QueueHarness, spool: Spool, typed: Typed) -> None:
    in_file, in_journal = accepted_in_file(queue, spool), accepted(queue, spool, BODY)[0]
    advance(queue, spool)
    for queue_id in (in_file, in_journal):
        forget(queue, queue_id)
    queue.change("UPDATE spool SET mark = 0")
    os.utime(spool.path(in_file), (time.time() - 7200,) * 2)
    done = typed("fsck", "--rebuild", "--yes", "--since", "1h")
    assert "1 messages without rows are older than 1h: left out" in done.stderr
    assert queue.rows("SELECT @hex(id) AS id FROM messages") == [{"id": in_journal}]


def test_what_the_committer_is_going_to_insert_is_left_to_it(
    queue: QueueHarness, spool: Spool, typed: Typed
) -> None:
    queue_id = left_by_a_dead_spooler(queue, spool)
    assert "lacks its rows" in typed("fsck", "--rebuild", "--yes").stderr
    assert queue.rows("SELECT id FROM messages") == []
    spooler = SpoolerHarness(queue, spool)
    until_rows = spooler.committed
    while queue_id not in until_rows():
        spooler.receive()
    spooler.finish()
    assert queue.state(queue_id) == "queued"


def left_by_a_dead_spooler(queue: QueueHarness, spool: Spool) -> str:
    """A message in the journal whose rows are not made."""
    spooler = SpoolerHarness(queue, spool)
    spooler.acceptor.fault = OperationalError("COMMIT", {}, ConnectionResetError())
    request = spooler.request()
    assert spooler.result(request) is None
    spooler.finish()
    return request.queue_id


def voided(directory: JournalDirectory, spool: Spool, failed: str) -> None:
    """Another segment declares the first batch of this one void."""
    segment, file = make_segment(directory, spool.identity, size=1 << 16)
    void = encode_void(
        bytes.fromhex(segment), 4096, VoidedBatch(failed, 4096), mark=0, written_at=0
    )
    file.write([void], 4096)
    file.close()


def test_a_void_batch_gets_no_rows(queue: QueueHarness, spool: Spool, typed: Typed) -> None:
    (queue_id,) = accepted(queue, spool, BODY)
    advance(queue, spool)
    forget(queue, queue_id)
    queue.change("UPDATE spool SET mark = 0")
    directory = JournalDirectory(spool.handle)
    ((failed, _),) = directory.segments(OWNED, ADOPTED)
    voided(directory, spool, failed)
    typed("fsck", "--rebuild", "--yes")
    assert queue.rows("SELECT id FROM messages") == []


def test_damage_is_reported_and_the_rest_is_rebuilt(
    queue: QueueHarness, spool: Spool, typed: Typed
) -> None:
    ids = accepted(queue, spool, BODY, BODY, BODY)
    positions = {
        row["id"]: row["position"]
        for row in queue.rows("SELECT @hex(id) AS id, position FROM messages")
    }
    directory = JournalDirectory(spool.handle)
    ((_, name),) = directory.segments(OWNED, ADOPTED)
    with closing(directory.open(name, write=True)) as file:
        file.write([b"X"], positions[ids[0]])  # a body
        file.write([b"X"], positions[ids[1]] - 2)  # an envelope
    for queue_id in ids:
        forget(queue, queue_id)
    done = typed("fsck", "--rebuild", "--yes", status=1)
    assert done.stderr.count(f"damaged: {name} at") == 2
    rebuilt = {row["id"] for row in queue.rows("SELECT @hex(id) AS id FROM messages")}
    assert rebuilt == {ids[0], ids[2]}
    assert queue.states() == {"held"}


@pytest.fixture
def foreign(queue: QueueHarness, spool: Spool, typed: Typed) -> str:
    """A message in a segment of another host, whose rows are not made. `typed` binds the spool
    to the database."""
    del typed
    queue_id = left_by_a_dead_spooler(queue, spool)
    directory = JournalDirectory(spool.handle)
    ((_, name),) = directory.segments(OWNED)
    file = directory.open(name, write=True)
    file.write([encode_segment_header(read_header(file)._replace(host="gone.example.com"))], 0)
    file.close()
    return queue_id


def test_segments_of_another_host_are_adopted_by_order(
    queue: QueueHarness, spool: Spool, typed: Typed, foreign: str
) -> None:
    refused = typed("fsck", "--adopt", status=2)
    assert "of the host gone.example.com" in refused.stdout
    assert queue.rows("SELECT id FROM messages") == []
    done = typed("fsck", "--adopt", "--yes")
    assert "the rows of 1 messages were made" in done.stdout
    assert queue.state(foreign) == "queued"
    assert body_of(queue, spool, foreign) == BODY
    assert [row["filter"] for row in queue.rows("SELECT filter FROM audit")] == ["--adopt"]
    assert "no segment of another host" in typed("fsck", "--adopt", status=1).stderr


def test_an_order_sees_the_void_that_was_written_just_before_it(
    queue: QueueHarness,
    spool: Spool,
    typed: Typed,
    foreign: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    del foreign

    def late(directory: JournalDirectory, name: str, **options: bool) -> AdoptedSegment | None:
        voided(directory, spool, name.partition(".")[0])
        return adopt_one(directory, name, **options)

    monkeypatch.setattr("commands.ops.adopt.adopt_one", late)
    assert "the rows of 0 messages were made" in typed("fsck", "--adopt", "--yes").stdout
    assert queue.rows("SELECT id FROM messages") == []


def test_no_order_adopts_what_another_container_of_this_machine_owns(
    queue: QueueHarness, spool: Spool, typed: Typed, foreign: str
) -> None:
    """Its lock is held, and the file system is local."""
    directory = JournalDirectory(spool.handle)
    ((_, name),) = directory.segments(OWNED)
    owner = directory.open(name, write=True)
    assert owner.lock()
    assert "no segment of another host" in typed("fsck", "--adopt", "--yes", status=1).stderr
    assert "segments of other hosts" not in typed("check", status=None).stdout
    owner.close()
    assert "segments of other hosts" in typed("check", status=None).stdout
    typed("fsck", "--adopt", "--yes")
    assert queue.state(foreign) == "queued"


def test_nothing_is_adopted_into_an_older_database(
    queue: QueueHarness, spool: Spool, typed: Typed, foreign: str
) -> None:
    advance(queue, spool)
    queue.change("UPDATE spool SET mark = 0")
    assert "fsck --rebuild" in typed("fsck", "--adopt", "--yes", status=3).stderr
    typed("fsck", "--rebuild", "--yes")
    assert queue.state(foreign) == "held"


def test_segments_of_this_host_are_left_to_smtpd(
    queue: QueueHarness, spool: Spool, typed: Typed
) -> None:
    left_by_a_dead_spooler(queue, spool)
    assert socket.gethostname() != "gone.example.com"
    typed("fsck", "--adopt", "--yes", status=1)
    assert queue.rows("SELECT id FROM messages") == []


def test_a_file_without_an_envelope_is_reported(
    queue: QueueHarness, spool: Spool, typed: Typed
) -> None:
    accepted(queue, spool, BODY)
    advance(queue, spool)
    queue.change("UPDATE spool SET mark = 0")
    name = new_id()
    spool.store(name, [BODY])
    done = typed("fsck", "--rebuild", "--yes", status=1)
    assert f"the file {name} has no envelope" in done.stderr


def fsck_rows(typed: Typed) -> list[tuple[str, str]]:
    """What fsck reports, and the details."""
    return [(row["found"], row["words"]) for row in lines(typed("fsck", "--json", status=None))]


def test_fsck_reads_every_record(queue: QueueHarness, spool: Spool, typed: Typed) -> None:
    lost, damaged, kept = accepted(queue, spool, BODY, BODY, BODY)
    queue.complete(queue.claim(damaged)[0], Outcome.DELIVERED)
    assert fsck_rows(typed) == []
    (row,) = queue.rows("SELECT position FROM messages WHERE id = @id(:id)", id=damaged)
    directory = JournalDirectory(spool.handle)
    ((_, name),) = directory.segments(OWNED, ADOPTED)
    directory.open(name, write=True).write([b"X"], row["position"])
    forget(queue, lost)
    [(first, place), (second, ids)] = fsck_rows(typed)
    assert (first, second) == ("journal damaged", "rows lost")
    assert place.startswith(f"{name} at ")
    assert damaged in place
    assert ids == f"1 messages: {lost}"
    assert queue.state(kept) == "queued"


def test_fsck_reads_the_whole_of_a_large_body(
    queue: QueueHarness, spool: Spool, typed: Typed
) -> None:
    queue_id = accepted_in_file(queue, spool)
    advance(queue, spool)
    assert fsck_rows(typed) == []
    with spool.path(queue_id).open("r+b") as file:
        file.write(b"?")
    [(found, words)] = fsck_rows(typed)
    assert found == "body damaged"
    assert words.startswith(f"{queue_id}: the body has the checksum ")
    typed("fsck", "--repair", status=None)
    assert queue.state(queue_id) == "held"


def test_fsck_tells_of_rows_that_nobody_makes(
    queue: QueueHarness, spool: Spool, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_by_a_dead_spooler(queue, spool)
    assert fsck_rows(typed) == [], "smtpd may be about to make them"
    monkeypatch.setattr(fsck, "LATE_ROWS", 0.0)
    assert [found for found, _ in fsck_rows(typed)] == ["rows not made"]


def test_fsck_does_not_miss_rows_that_retention_removed(
    queue: QueueHarness, spool: Spool, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    (queue_id,) = accepted(queue, spool, BODY)
    forget(queue, queue_id)
    monkeypatch.setenv("RELAY_RETENTION", "1s")
    assert fsck_rows(typed) == []


def test_fsck_finds_segments_without_files_and_leftovers(
    queue: QueueHarness, spool: Spool, typed: Typed
) -> None:
    (queue_id,) = accepted(queue, spool, BODY)
    directory = JournalDirectory(spool.handle)
    ((segment, name),) = directory.segments(OWNED, ADOPTED)
    queue.complete(queue.claim(queue_id)[0], Outcome.DELIVERED)
    directory.unlink(name)
    path = spool.directory / "journal" / f"{new_id()}.new"
    path.write_bytes(b"")
    assert fsck_rows(typed) == [("segment without file", segment)]
    os.utime(path, (time.time() - 7200,) * 2)
    assert fsck_rows(typed) == [
        ("segment without file", segment),
        ("unfinished segment", str(path)),
    ]


def test_rebuild_keeps_what_plugins_have_added(
    queue: QueueHarness, spool: Spool, typed: Typed
) -> None:
    message = new_message(size=len(BODY), prefix="X-Spam: maybe\n")
    spool.store(message.id, [BODY], encode(message))
    queue.insert([message])
    advance(queue, spool)
    forget(queue, message.id)
    queue.change("UPDATE spool SET mark = 0")
    typed("fsck", "--rebuild", "--yes")
    (row,) = queue.rows("SELECT prefix FROM messages WHERE id = @id(:id)", id=message.id)
    assert row["prefix"] == "X-Spam: maybe\n"
    assert queue.state(message.id) == "held"
