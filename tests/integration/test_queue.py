"""The queue reader on both databases: every filter, ids by their end, and long queues that are
streamed."""

import itertools
from collections.abc import Generator
from datetime import UTC, datetime

import pytest

from relay.db.schema import Outcome, State
from relay.ids import dashed, new_id
from relay.report.filters import Filter
from relay.report.queries import NoSuchMessage, QueueReader
from tests.integration.office import Office, new_message


@pytest.fixture
def queue(office: Office) -> QueueReader:
    return QueueReader(office.engine)


def found(queue: QueueReader, **wanted: object) -> list[str]:
    return [row["queue_id"] for row in queue.rows(Filter(**wanted))]  # type: ignore[arg-type]


def test_every_filter_selects_its_rows(office: Office, queue: QueueReader) -> None:
    # Ids that are made in one millisecond are in no order.
    one, two, three = sorted(new_id() for _ in range(3))
    office.accept(
        "ann@example.org", sender="news@example.com", header_message_id="<1@x>", queue_id=one
    )
    office.accept("bulk:bob_1@example.net", sender="", queue_id=two)
    office.accept("bobX1@EXAMPLE.net", sender="it's 100%@example.com", queue_id=three)
    (claim,) = office.claim(one)
    office.record(claim, Outcome.DEFERRED, reply="451 4.2.0 mailbox_full (#1)", server="a:628")
    assert found(queue) == [one, two, three], "oldest first"
    assert found(queue, states=("deferred",)) == [one]
    assert found(queue, states=("deferred", "queued")) == [one, two, three]
    assert found(queue, sender="") == [two]
    assert found(queue, sender="*@example.com") == [one, three]
    assert found(queue, sender="it's 100%*") == [three]
    assert found(queue, sender="100%") == []
    assert found(queue, recipient="ann@example.org") == [one]
    assert found(queue, recipient="bob_1@*") == [two], "only * stands for something"
    assert found(queue, recipient="*@example.net") == [two, three], (
        "domains are the same in capitals"
    )
    assert found(queue, route="bulk") == [two]
    assert found(queue, server="a:628") == [one]
    assert found(queue, reply="mailbox_full") == [one]
    assert found(queue, reply="mailbox%full") == []
    assert found(queue, header_message_id="<1@x>") == [one]
    assert found(queue, id=three) == [three]
    assert found(queue, sender="*@example.com", states=("queued",)) == [three], (
        "everything must hold"
    )
    assert found(queue, sender="*\\*") == []


def test_older_than_filters_by_age(office: Office, queue: QueueReader) -> None:
    old = f"{int((datetime.now(UTC).timestamp() - 7200) * 1000):012x}7" + "0" * 19
    office.intake.commit([new_message(queue_id=old)])
    young = office.accept()
    assert found(queue, older_than=3600.0) == [old]
    assert found(queue, older_than=0.0) in ([old], [old, young])
    assert found(queue, older_than=1e12) == []


def test_finished_rows_are_history(office: Office, queue: QueueReader) -> None:
    queue_id = office.accept()
    office.record(office.claim(queue_id)[0], Outcome.DELIVERED)
    assert found(queue) == []
    assert found(queue, states=("delivered",)) == [queue_id]
    (row,) = queue.rows(Filter(), finished=True)
    assert row["state"] == State.DELIVERED
    assert row["finished_at"] <= datetime.now(UTC)


def test_row_has_the_columns_of_the_view(office: Office, queue: QueueReader) -> None:
    queue_id = office.accept(
        "x@example.org", sender="s@example.com", dsn_of=office.accept("other@example.org")
    )
    office.record(office.claim(queue_id)[0], Outcome.DEFERRED)
    (row,) = queue.rows(Filter(id=queue_id))
    assert (row["queue_id"], row["queue_uuid"]) == (queue_id, dashed(queue_id))
    assert (row["sender"], row["recipient"], row["size"], row["attempts"]) == (
        "s@example.com",
        "x@example.org",
        100,
        1,
    )
    assert (row["last_outcome"], row["reason"], row["server"]) == (
        "deferred",
        "its words",
        "qmqp.example.net:628",
    )
    assert all(row[name].tzinfo is UTC for name in ("received_at", "next_at", "expires_at"))
    assert row["received_at"] < row["next_at"] < row["expires_at"]
    assert row["finished_at"] is None
    assert len(row["dsn_of"]) == 32


def test_long_queue_is_streamed(office: Office, queue: QueueReader) -> None:
    office.intake.commit(
        [new_message(*(f"r{n}@example.org" for n in range(10))) for _ in range(300)]
    )
    rows = queue.rows(Filter())
    first = list(itertools.islice(rows, 5))
    assert [row["position"] for row in first] == [1, 2, 3, 4, 5]
    office.claim(first[0]["queue_id"])  # the stream locks no row
    assert len(list(rows)) == 2995
    assert len(list(queue.rows(Filter(), limit=7))) == 7
    half_read = queue.rows(Filter())
    next(half_read)
    assert isinstance(half_read, Generator)
    half_read.close()


def test_id_is_found_by_any_unique_end(office: Office, queue: QueueReader) -> None:
    queue_id = office.accept()
    twin = queue_id[:10] + "0000" + queue_id[14:]
    office.intake.commit([new_message(queue_id=twin)])
    for text in (
        queue_id,
        queue_id.upper(),
        dashed(queue_id),
        queue_id[-20:],
        dashed(queue_id)[-24:],
    ):
        assert queue.resolve(text) == queue_id
    with pytest.raises(NoSuchMessage, match="more than one") as caught:
        queue.resolve(queue_id[-4:])
    assert queue_id in str(caught.value)
    assert twin in str(caught.value)
    for text, words in (
        ("f" * 32, "no message"),
        ("ffff", "no message"),
        ("abc", "not a queue id"),
        ("%", "not a queue id"),
    ):
        with pytest.raises(NoSuchMessage, match=words):
            queue.resolve(text)


def test_message_has_recipients_deliveries_and_attempts(office: Office, queue: QueueReader) -> None:
    queue_id = office.accept("x@example.org", "bulk:y@example.org", "z@example.org")
    office.record(office.claim(queue_id)[0], Outcome.DEFERRED)
    office.pass_time(60)
    office.sweeps.requeue_due(10)
    office.record(office.claim(queue_id)[0], Outcome.REJECTED)
    message = queue.message(queue_id)
    assert message is not None
    assert [row["address"] for row in message["recipients"]] == [
        "x@example.org",
        "y@example.org",
        "z@example.org",
    ]
    assert [(row["number"], row["state"], row["claim_count"]) for row in message["deliveries"]] == [
        (1, "bounced", 2), (2, "queued", 0)
    ]  # fmt: skip
    assert [(row["claim"], row["outcome"], row["worker"]) for row in message["attempts"]] == [
        (1, "deferred", office.worker), (2, "rejected", office.worker)
    ]  # fmt: skip
    assert message["attempts"][0]["started_at"].tzinfo is UTC
    assert queue.message("f" * 32) is None


def test_summary_and_servers_count_the_queue(office: Office, queue: QueueReader) -> None:
    assert (queue.summary(), queue.servers()) == ([], [])
    office.accept("x@example.org", "bulk:y@example.org")
    (late,) = office.claim(office.accept())
    office.record(late, Outcome.UNCERTAIN)
    office.pass_time(60, only=[late.queue_id])
    summary = {(row["state"], row["route"]): row for row in queue.summary()}
    assert {key: (row["deliveries"], row["bytes"], row["overdue"]) for key, row in summary.items()} == {
        ("deferred", "default"): (1, 100, 1), ("queued", "bulk"): (1, 100, 0), ("queued", "default"): (1, 100, 0),
    }  # fmt: skip
    assert all(
        0 <= row["oldest_seconds"] < 60 and row["oldest_at"].tzinfo is UTC
        for row in summary.values()
    )
    (server,) = queue.servers()
    assert (server["attempts"], server["uncertain"], server["delivered"], server["bytes_sent"]) == (
        1,
        1,
        0,
        90,
    )


def test_workers_are_listed(office: Office, queue: QueueReader) -> None:
    office.claim(office.accept(), office.accept())
    gone = office.hire()
    office.ledger.retire(gone)
    (alive, ended) = queue.workers()
    assert (alive["id"], bool(alive["alive"]), alive["sending"], alive["ended_at"]) == (
        office.worker,
        True,
        2,
        None,
    )
    assert (ended["id"], bool(ended["alive"]), ended["end_reason"]) == (gone, False, "stopped")


def test_filter_is_shown_as_options() -> None:
    assert Filter().shown() == ""
    wanted = Filter(states=("held", "queued"), sender="", older_than=60.0)
    assert wanted.shown() == "--state held --state queued --sender '' --older-than 60s"
