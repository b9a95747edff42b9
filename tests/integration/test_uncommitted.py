"""What commands answer about messages that the journal has and the database has not, on both
databases."""

import pytest
from sqlalchemy.exc import OperationalError

from commands.ops import check
from relay.metrics import QueueMetrics
from relay.queue.accept import encode
from relay.report.queries import QueueReader
from relay.spool.journal.directory import JournalDirectory
from relay.spool.mark import SpoolMark
from relay.spool.store import Spool
from tests.integration.harness import QueueHarness, new_message
from tests.integration.test_rebuild import accepted, left_by_a_dead_spooler
from tests.integration.test_spooler import BODY
from tests.integration.typed import Typed, lines, typed_at


@pytest.fixture
def typed(queue: QueueHarness, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> Typed:
    return typed_at(queue, spool, monkeypatch)


def test_show_and_why_know_a_message_without_rows(
    queue: QueueHarness, spool: Spool, typed: Typed
) -> None:
    queue_id = left_by_a_dead_spooler(queue, spool)
    shown = typed("show", queue_id[-12:]).stdout
    assert "accepted, not yet in the database" in shown
    for text in (queue_id, "a@example.com", "b@example.org", f"{len(BODY)}"):
        assert text in shown
    (row,) = lines(typed("why", queue_id, "--json"))
    assert (row["queue_id"], row["state"], row["size"]) == (queue_id, "accepted", len(BODY))
    assert row["position"] > 4096


@pytest.mark.parametrize("operation", ["retry", "hold", "release", "bounce", "drop"])
def test_operations_on_a_message_without_rows_say_so(
    queue: QueueHarness, spool: Spool, typed: Typed, operation: str
) -> None:
    queue_id = left_by_a_dead_spooler(queue, spool)
    done = typed(operation, "--yes", queue_id, status=1)
    assert f"{queue_id}: accepted, not yet in the database" in done.stderr


def test_only_what_has_no_rows_is_looked_for(
    queue: QueueHarness, spool: Spool, typed: Typed
) -> None:
    (queue_id,) = accepted(queue, spool, BODY)
    queue.change("DELETE FROM deliveries")
    queue.change("DELETE FROM recipients")
    queue.change("DELETE FROM messages")
    assert "no message has an id" in typed("why", queue_id, status=1).stderr


def test_the_journal_answers_while_the_database_is_away(
    queue: QueueHarness, spool: Spool, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    (queue_id,) = accepted(queue, spool, BODY)

    def away(*_: object) -> str:
        raise OperationalError("SELECT", {}, ConnectionResetError("gone"))

    monkeypatch.setattr(QueueReader, "resolve", away)
    done = typed("why", queue_id, status=3)
    assert queue_id in done.stdout
    assert "only the database knows more" in done.stdout
    assert "run `qmqp-relay check`" in done.stderr
    assert f"{queue_id}: in the journal" in typed("retry", queue_id, status=3).stderr
    assert "journal" not in typed("why", "abcdef12", status=3).stdout


def test_the_lag_and_the_disk_are_shown(queue: QueueHarness, spool: Spool, typed: Typed) -> None:
    accepted(queue, spool, BODY)
    left_by_a_dead_spooler(queue, spool)
    size = len(encode(new_message(size=len(BODY)))) + len(BODY)
    (row,) = [row for row in lines(typed("stats", "--json")) if row["kind"] == "journal"]
    assert (row["messages"], row["bytes"], row["segments"]) == (1, size, 2)
    assert row["lag_seconds"] > 0
    assert row["disk"] > 0
    assert "lag_seconds" in typed("stats").stdout
    metrics = QueueMetrics(queue.database, spool, dict)
    found = {sample.name: sample.value for one in metrics.collect() for sample in one.samples}
    assert found["relay_journal_segments"] == 2
    assert found["relay_journal_sealed_segments"] == 1
    assert found["relay_journal_disk_bytes"] == row["disk"]
    assert found["relay_database_older"] == 0


def test_check_tells_of_the_journal(
    queue: QueueHarness, spool: Spool, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_by_a_dead_spooler(queue, spool)

    def results() -> list[tuple[str, str]]:
        rows = lines(typed("check", "--json", status=None))
        return [(row["verdict"], row["words"]) for row in rows if row["what"] == "journal"]

    [(verdict, text)] = results()
    assert verdict == "ok"
    assert text.startswith("1 segments, ")
    monkeypatch.setattr(check, "LATE_ROWS", 0.0)
    assert [verdict for verdict, _ in results()] == ["warn"]
    monkeypatch.setattr("socket.gethostname", lambda: "another.example.com")
    assert "segments of other hosts are not sealed" in results()[-1][1]
    SpoolMark(JournalDirectory(spool.handle), spool.identity).learn(7)
    assert results()[0] == (
        "fail",
        "the database has the mark 0, the spool 7: the database is older",
    )
