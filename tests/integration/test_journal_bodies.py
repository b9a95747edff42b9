"""From a claim to the server with bodies in the journal, on both databases: sent whole or not at
all, and held only when the damage is proven."""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
from sqlalchemy import event

from qmqp.body import BodyFile
from qmqp.sink import Sink, running_sink
from relay.db.engine import OlderDatabase
from relay.ids import new_id
from relay.queue.model import CompletionResult
from relay.queue.outcome import Outcome
from relay.queue.states import State
from relay.spool import damaged_bodies
from relay.spool.bodies import Bodies, BodyMisplaced
from relay.spool.journal.directory import ADOPTED, JournalDirectory
from relay.spool.journal.format import BLOCK
from relay.spool.mark import SpoolMark
from relay.spool.store import BodyUnsendable, Spool
from relay.spool.trailer import FIXED_SIZE
from tests.bad_places import BadPlaces
from tests.integration.harness import BODY
from tests.integration.journal_harness import JournalWorkerHarness
from tests.waiting import until
from worker import engine, spool_keeper
from worker.spool_keeper import SpoolKeeper

LARGE = 300_000
"""Octets of a body that has a file, in several blocks."""


@pytest.fixture
def sink() -> Iterator[Sink]:
    with running_sink() as running:
        yield running


@pytest.fixture
def mail(
    clean_url: str, spool: Spool, tmp_path: Path, sink: Sink
) -> Iterator[JournalWorkerHarness]:
    servers = (f"127.0.0.1:{sink.port}",)
    harness = JournalWorkerHarness(clean_url, spool, tmp_path, qmqp_servers=servers)
    yield harness
    harness.close()


@pytest.fixture
def mail_on_disk(
    clean_url: str, spool_on_disk: Spool, tmp_path: Path
) -> Iterator[JournalWorkerHarness]:
    harness = JournalWorkerHarness(clean_url, spool_on_disk, tmp_path)
    yield harness
    harness.close()


@pytest.fixture
def quick_recheck(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that does not verify is read again at once."""
    monkeypatch.setattr(engine, "RECHECK", 0.0)
    monkeypatch.setattr(damaged_bodies, "RECHECK", 0.0)


@contextmanager
def statements(mail: JournalWorkerHarness) -> Iterator[list[str]]:
    """The names of the statements that run meanwhile."""
    names: list[str] = []

    def note(_c: Any, _cursor: Any, sql: str, *_: Any) -> None:
        if sql.startswith("-- "):
            names.append(sql.split("\n")[0].split()[-1])

    event.listen(mail.database, "before_cursor_execute", note)
    yield names
    event.remove(mail.database, "before_cursor_execute", note)


def bodies(mail: JournalWorkerHarness) -> Bodies:
    return Bodies(mail.spool, mail.database)


def swept(mail: JournalWorkerHarness, *ids: str) -> list[str]:
    """The states of deliveries, after those that are due were requeued as a sweeper does."""
    mail.rescuer.requeue_due(10)
    return mail.states_of(ids)


def test_claim_has_the_place_of_the_body(mail: JournalWorkerHarness) -> None:
    assert mail.worker
    first, second = mail.accept_all(BODY, b"other")
    (file,) = [mail.accept()]
    claims = {claim.queue_id: claim for claim in mail.claim(first, second, file)}
    assert [claims[queue_id].place for queue_id in (first, second)] == [
        mail.place(first),
        mail.place(second),
    ]
    assert claims[file].place is None
    mail.change("UPDATE deliveries SET state = 'queued', worker = NULL")
    mail.pass_time(86400)
    assert {c.queue_id: c.place for c in mail.claim()} == {
        queue_id: claim.place for queue_id, claim in claims.items()
    }


def test_bodies_of_the_journal_and_of_files_are_sent_unchanged(
    mail: JournalWorkerHarness, sink: Sink
) -> None:
    contents = [BODY, b"", b"x" * 65_535, b"\r\n.\r\n" * 1000]
    ids = mail.accept_all(*contents)
    ids += [mail.accept(body=BODY), mail.accept(body=b"y" * LARGE)]
    with mail.working() as running:
        assert running.offer(ids).wait(10)
        until(lambda: mail.states() == {"delivered"})
        until(lambda: not [*mail.spool.ids()], what="the files are removed")
    expected = [*contents, BODY, b"y" * LARGE]
    assert sorted((got.size, got.sha256) for got in sink.received) == sorted(
        (len(content), hashlib.sha256(content).hexdigest()) for content in expected
    )
    assert mail.segment_path(ids[0]).exists()


def test_cached_body_is_read_without_a_thread(mail_on_disk: JournalWorkerHarness) -> None:
    mail = mail_on_disk
    queue_id = mail.accept_one()
    place, reader = mail.place(queue_id), bodies(mail)
    assert reader.cached(len(BODY), place) is None, "its segment is not open"
    assert reader.open(queue_id, len(BODY), place) == BODY
    assert reader.cached(len(BODY), place) == BODY
    assert reader.cached(len(BODY), None) is None
    mail.flip(queue_id)
    assert reader.cached(len(BODY), place) is None


def test_body_that_was_moved_is_read_at_its_new_place(mail: JournalWorkerHarness) -> None:
    """Compaction moves a body between the claim and the read."""
    queue_id = mail.accept_one()
    old, reader = mail.place(queue_id), bodies(mail)
    assert mail.move(queue_id) != old
    assert reader.open(queue_id, len(BODY), old) == BODY


def test_open_segment_is_read_after_it_was_adopted_or_unlinked(mail: JournalWorkerHarness) -> None:
    queue_id = mail.accept_one()
    place, reader, path = mail.place(queue_id), bodies(mail), mail.segment_path(queue_id)
    path.rename(path.with_suffix(ADOPTED))
    assert reader.open(queue_id, len(BODY), place) == BODY
    path.with_suffix(ADOPTED).unlink()
    assert reader.open(queue_id, len(BODY), place) == BODY
    mail.spool.segments.close_unlinked()
    with pytest.raises(BodyMisplaced, match=f"segment {place.segment} is missing"):
        reader.open(queue_id, len(BODY), place)


def test_spool_keeper_closes_unlinked_segments_and_raises_the_mark(
    mail: JournalWorkerHarness,
) -> None:
    queue_id = mail.accept_one()
    path = mail.segment_path(queue_id)
    bodies(mail).open(queue_id, len(BODY), mail.place(queue_id))
    mark = SpoolMark(JournalDirectory(mail.spool.handle), mail.spool.identity)
    path.unlink()
    assert str(path) in deleted_files()
    SpoolKeeper(mail.database, mail.spool, mark, lambda: 0).turn()
    # The spooler of this test still has it open, with its lock.
    assert deleted_files().count(str(path)) == 1
    (row,) = mail.rows("SELECT mark FROM spool")
    assert row["mark"] == mark.known == 1


def deleted_files() -> list[str]:
    """The paths of open files that have no name any more."""
    paths = []
    for name in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the directory itself
            paths.append(str(name.readlink()))
    return [path.removesuffix(" (deleted)") for path in paths if path.endswith(" (deleted)")]


def test_few_segments_are_open_at_a_time(
    mail_on_disk: JournalWorkerHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    mail = mail_on_disk
    monkeypatch.setattr("relay.spool.journal.reader.MAX_OPEN", 1)
    first, second = mail.accept_all(BODY, BODY)
    mail.move(second, unlink=False)
    reader = bodies(mail)
    for queue_id, other in ((first, second), (second, first), (first, second)):
        assert reader.open(queue_id, len(BODY), mail.place(queue_id)) == BODY
        assert reader.cached(len(BODY), mail.place(queue_id)) == BODY
        assert reader.cached(len(BODY), mail.place(other)) is None


def test_damaged_body_is_deferred_and_then_held(
    mail: JournalWorkerHarness, sink: Sink, quick_recheck: None
) -> None:
    bad, good = mail.accept_all(BODY, b"good")
    mail.flip(bad)
    with mail.working():
        until(lambda: swept(mail, bad, good) == ["held", "delivered"])
    row = mail.delivery(bad)
    assert (row["last_outcome"], row["claim_count"], row["reason_source"]) == (
        "unsendable",
        2,
        "relay",
    )
    assert row["last_reply"].startswith("damaged at ")
    assert [got.size for got in sink.received] == [4]


def test_damaged_body_is_sent_when_it_verifies_again(
    mail: JournalWorkerHarness, sink: Sink
) -> None:
    """A minute must pass before the second look."""
    queue_id = mail.accept_one()
    mail.flip(queue_id)
    with mail.working():
        until(lambda: mail.state(queue_id) == "deferred")
        row = mail.delivery(queue_id)
        assert (row["last_outcome"], 50 < row["due_in"] <= 60) == ("unsendable", True)
        mail.flip(queue_id)
        mail.pass_time(100)
        mail.rescuer.requeue_due(10)
        until(lambda: mail.state(queue_id) == "delivered")
    assert mail.numbered_attempts(queue_id) == [(2, 1, "delivered")]


def test_second_look_within_the_minute_proves_nothing(
    mail: JournalWorkerHarness, sink: Sink
) -> None:
    queue_id = mail.accept_one()
    mail.flip(queue_id)
    with mail.working():
        until(lambda: mail.state(queue_id) == "deferred")
        mail.pass_time(100)  # by the database's clock; the worker has its own
        mail.rescuer.requeue_due(10)
        until(lambda: mail.delivery(queue_id)["claim_count"] == 2)
        until(lambda: mail.state(queue_id) == "deferred")
    assert sink.count == 0


def test_damage_at_another_place_is_another_first_look(
    mail: JournalWorkerHarness, quick_recheck: None
) -> None:
    seen = damaged_bodies.DamagedBodies()
    queue_id = mail.accept_one()
    place = mail.place(queue_id)
    assert not seen.confirmed(queue_id, place)
    assert not seen.confirmed(queue_id, place._replace(position=1))
    assert seen.confirmed(queue_id, place._replace(position=1))
    assert not seen.confirmed(new_id(), place)


class WatchedId(str):
    """A queue id that can be referred to weakly."""

    __slots__ = ("__weakref__",)


@pytest.mark.timeout(20)
def test_a_disk_full_of_damaged_bodies_costs_the_loop_no_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, now = damaged_bodies.DamagedBodies(), 1000.0
    monkeypatch.setattr("relay.spool.damaged_bodies.time.monotonic", lambda: now)
    kept = WeakSet[WatchedId]()

    def damaged(queue_id: WatchedId) -> None:
        kept.add(queue_id)
        assert not seen.confirmed(queue_id, None)

    for number in range(50_000):
        damaged(WatchedId(f"{number:032x}"))
    now += 3599
    assert seen.confirmed(f"{0:032x}", None)
    assert len(kept) == 50_000
    now += 2
    assert not seen.confirmed("a", None)
    assert not kept, "all of them were seen more than an hour ago"


def test_damaged_body_never_expires(mail: JournalWorkerHarness, quick_recheck: None) -> None:
    """A fault of this machine must not become a bounce."""
    queue_id = mail.accept_one()
    mail.flip(queue_id)
    mail.pass_time(10 * 86400)
    with mail.working():
        until(lambda: swept(mail, queue_id) == ["held"])


def test_missing_segment_holds_its_mail_and_no_other(
    mail: JournalWorkerHarness, sink: Sink, quick_recheck: None
) -> None:
    lost = mail.accept_one()
    path = mail.segment_path(lost)
    file = mail.accept()
    path.unlink()
    with mail.working():
        until(lambda: swept(mail, lost, file) == ["held", "delivered"])
    assert mail.delivery(lost)["last_reply"] == f"segment {path.stem} is missing"


def test_replaced_spool_is_not_a_damaged_body(mail: JournalWorkerHarness, tmp_path: Path) -> None:
    queue_id = mail.accept_one()
    place, reader = mail.place(queue_id), bodies(mail)
    mail.flip(queue_id)
    mail.spool.directory.rename(tmp_path / "right")
    mail.spool.directory.mkdir()
    (mail.spool.directory / "spool-id").write_text(f"{new_id()}\n")
    with pytest.raises(OSError) as caught:
        reader.open(queue_id, len(BODY), place)
    assert caught.value.errno == errno.ESTALE


def test_fault_of_the_disk_is_not_the_mails(
    mail: JournalWorkerHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue_id = mail.accept_one()

    def fail(*_: Any) -> bytes:
        raise OSError(errno.EIO, "input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fail)
        with mail.working():
            until(
                lambda: (
                    mail.delivery(queue_id)["claim_count"] == 1 and mail.state(queue_id) == "queued"
                )
            )
            patch.undo()
            until(lambda: mail.state(queue_id) == "delivered", 20)
    assert [outcome for _, outcome in mail.attempts(queue_id)] == ["delivered"]


def test_body_that_the_disk_cannot_read_is_held_and_delays_no_other(
    mail: JournalWorkerHarness,
    sink: Sink,
    quick_recheck: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad, good = mail.accept_all(b"b" * BLOCK, b"good")
    position = mail.place(bad).position
    BadPlaces(monkeypatch).add(mail.segment_path(bad), position, position + 1)
    with mail.working() as running:
        until(lambda: swept(mail, bad, good) == ["held", "delivered"])
        assert running.offer(mail.accept_all(b"after")).wait(10)
        until(lambda: sink.count == 2)
    row = mail.delivery(bad)
    assert (row["last_outcome"], row["reason_source"], row["claim_count"]) == (
        "unsendable",
        "relay",
        2,
    )
    assert row["last_reply"].startswith("the disk cannot read the body at ")


def test_body_that_can_be_read_again_is_sent(
    mail: JournalWorkerHarness, sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue_id = mail.accept_one()
    position, disk = mail.place(queue_id).position, BadPlaces(monkeypatch)
    disk.add(mail.segment_path(queue_id), position, position + 1)
    with mail.working():
        until(lambda: mail.state(queue_id) == "deferred")
        disk.heal()
        mail.pass_time(100)
        mail.rescuer.requeue_due(10)
        until(lambda: mail.state(queue_id) == "delivered")


def test_body_that_was_copied_from_a_bad_place_is_sent(
    mail: JournalWorkerHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim still has the old place."""
    queue_id = mail.accept_one()
    place = mail.place(queue_id)
    BadPlaces(monkeypatch).add(mail.segment_path(queue_id), place.position, place.position + 1)
    mail.move(queue_id, unlink=False)
    assert bodies(mail).open(queue_id, len(BODY), place) == BODY


# Large bodies


def test_large_body_with_a_bad_place_is_held_and_delays_no_other(
    mail: JournalWorkerHarness, quick_recheck: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The place is met while the body is sent. Nothing is mapped at the beginning of that file."""
    bad, good = mail.accept(body=b"x" * LARGE), mail.accept(body=b"y" * LARGE)
    opens = mail.spool.open

    def opened(queue_id: str, size: int) -> BodyFile:
        body = opens(queue_id, size)
        if queue_id == bad:
            unreadable = os.open("/proc/self/mem", os.O_RDONLY)
            os.dup2(unreadable, body.fd)
            os.close(unreadable)
        return body

    monkeypatch.setattr(mail.spool, "open", opened)
    with pytest.raises(BodyMisplaced, match="cannot read the body in its file"):
        bodies(mail).verify(bad, LARGE, None)
    with mail.working():
        until(lambda: swept(mail, bad, good) == ["held", "delivered"])
    assert "cannot be read" in mail.delivery(bad)["last_reply"]


def test_damaged_large_body_closes_before_the_commit_point(
    mail: JournalWorkerHarness, sink: Sink, quick_recheck: None
) -> None:
    queue_id = mail.accept(body=b"x" * LARGE)
    path = mail.spool.path(queue_id)
    octets = bytearray(path.read_bytes())
    octets[LARGE // 2] ^= 1
    path.write_bytes(octets)
    with mail.working():
        until(lambda: swept(mail, queue_id) == ["held"])
    assert sink.count == 0
    assert mail.numbered_attempts(queue_id) == [(1, 1, "interrupted"), (2, 1, "interrupted")]
    row = mail.delivery(queue_id)
    assert (row["last_outcome"], "checksum" in row["last_reply"]) == ("unsendable", True)


def test_large_body_is_read_without_its_trailer(mail: JournalWorkerHarness) -> None:
    queue_id, reader = new_id(), bodies(mail)
    mail.spool.store(queue_id, [b"first\nlast"], b"envelope")
    assert mail.spool.path(queue_id).stat().st_size == 10 + 8 + FIXED_SIZE
    body = reader.open(queue_id, 10, None)
    assert isinstance(body, BodyFile)
    body.close()
    with reader.stream(queue_id, 10, None) as file:
        assert [*file] == [b"first\n", b"last"]
    with pytest.raises(BodyUnsendable, match="has 10 bytes, not 11"):
        reader.stream(queue_id, 11, None)


# Outcomes


def test_outcome_of_a_journal_body_never_asks_whether_it_can_be_deleted(
    mail: JournalWorkerHarness,
) -> None:
    assert mail.worker
    recipients = ("one:b@example.org", "two:c@example.org")
    in_journal = mail.accept_one(recipients=recipients)
    claims = mail.claim(in_journal, capacity={"one": 1, "two": 1})
    assert len(claims) == 2
    with statements(mail) as names:
        for claim in claims:
            result = mail.complete(claim, Outcome.DELIVERED, in_journal=claim.place is not None)
            assert result == CompletionResult(State.DELIVERED, body_deletable=False)
    assert "deletable_bodies" not in names
    (claim,) = mail.claim(mail.accept())
    result = mail.complete(claim, Outcome.DELIVERED, in_journal=claim.place is not None)
    assert result == CompletionResult(State.DELIVERED, body_deletable=True)


# A restored database


def test_each_second_with_outcomes_raises_the_mark(
    mail: JournalWorkerHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A standby that lacks the outcomes of the last seconds has a lower mark. A second without
    outcomes costs nothing."""
    monkeypatch.setattr(spool_keeper, "IDLE_INTERVAL", 1e9)
    mark = SpoolMark(mail.directory, mail.spool.identity)
    with mail.working() as running:
        keeper = SpoolKeeper(mail.database, mail.spool, mark, lambda: running.outcomes)
        keeper.turn()
        begun = mark.known
        keeper.turn()
        assert mark.known == begun
        queue_ids = [mail.accept_one(), mail.accept_one()]
        running.offer(queue_ids)
        until(lambda: running.outcomes == 2)
        assert mail.states_of(queue_ids) == ["delivered"] * 2
        keeper.turn()
        assert mark.known == begun + 1
        keeper.turn()
        assert mark.known == begun + 1
        running.offer([mail.accept_one()])
        until(lambda: running.outcomes == 3)
        keeper.finish()
        assert mark.known == begun + 2, "the last outcomes of a worker that stops"
        keeper.finish()
        assert mark.known == begun + 2


def test_a_database_that_is_overwritten_under_connections_is_noticed_without_outcomes(
    mail: JournalWorkerHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by `pg_restore --clean`: no connection breaks."""
    monkeypatch.setattr(spool_keeper, "IDLE_INTERVAL", 1e9)
    mark = SpoolMark(mail.directory, mail.spool.identity)
    mark.guard(mail.database)
    mail.database.dispose()
    keeper = SpoolKeeper(mail.database, mail.spool, mark, lambda: 0)
    worker, queue_id = mail.register_worker(), mail.accept_one()
    keeper.turn()
    mark.advance(mail.database)
    keeper.turn()
    mail.change("UPDATE spool SET mark = 1")
    keeper.turn()
    with pytest.raises(OlderDatabase, match="fsck --rebuild"):
        mail.claim(queue_id, worker=worker)


def test_an_outage_delays_the_mark_and_loses_no_outcome(
    mail: JournalWorkerHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_keeper, "IDLE_INTERVAL", 1e9)
    mark = SpoolMark(mail.directory, mail.spool.identity)
    outcomes = 0
    keeper = SpoolKeeper(mail.database, mail.spool, mark, lambda: outcomes)
    keeper.turn()
    outcomes = 7
    with monkeypatch.context() as away:
        away.setattr(mark, "advance", lambda _engine: mail.rows("SELECT * FROM no_such_table"))
        keeper.turn()
        keeper.finish()
    assert mark.known == 1
    keeper.turn()
    assert mark.known == 2


def test_restored_database_is_not_claimed_from(mail: JournalWorkerHarness, sink: Sink) -> None:
    mark = SpoolMark(JournalDirectory(mail.spool.handle), mail.spool.identity)
    mark.advance(mail.database)
    mark.advance(mail.database)
    queue_id = mail.accept_one()
    mail.change("UPDATE spool SET mark = 1")
    guard = SpoolMark(JournalDirectory(mail.spool.handle), mail.spool.identity)
    assert guard.known == 2
    guard.guard(mail.database)
    mail.database.dispose()
    with pytest.raises(OlderDatabase, match="fsck --rebuild"):
        mail.claim(queue_id, worker=new_id())
    assert sink.count == 0
