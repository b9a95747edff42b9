"""What commands answer about messages that the journal has and the database has not, on both
databases."""

import pytest
from sqlalchemy.exc import OperationalError

from relay.report.queries import QueueReader
from relay.spool.store import Spool
from tests.integration.harness import QueueHarness
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
