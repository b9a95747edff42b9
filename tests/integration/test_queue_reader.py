"""The queue reader on both databases: every filter, ids by their end, and long queues that are
streamed."""

import itertools
from collections.abc import Generator
from datetime import UTC, datetime

import pytest

from relay.ids import dashed, new_id
from relay.queue.outcome import Outcome
from relay.queue.states import State
from relay.report.filters import Filter
from relay.report.queries import NoSuchMessage, QueueReader
from tests.integration.harness import QueueHarness, new_message


@pytest.fixture
def reader(queue: QueueHarness) -> QueueReader:
    return QueueReader(queue.database)


def found(reader: QueueReader, **wanted: object) -> list[str]:
    return [row["queue_id"] for row in reader.rows(Filter(**wanted))]  # type: ignore[arg-type]


def test_every_filter_selects_its_rows(queue: QueueHarness, reader: QueueReader) -> None:
    # Ids that are made in one millisecond are in no order.
    one, two, three = sorted(new_id() for _ in range(3))
    queue.accept(
        "ann@example.org", sender="news@example.com", header_message_id="<1@x>", queue_id=one
    )
    queue.accept("bulk:bob_1@example.net", sender="", queue_id=two)
    queue.accept("bobX1@EXAMPLE.net", sender="it's 100%@example.com", queue_id=three)
    (claim,) = queue.claim(one)
    queue.complete(claim, Outcome.DEFERRED, reply="451 4.2.0 mailbox_full (#1)", server="a:628")
    assert found(reader) == [one, two, three], "oldest first"
    assert found(reader, states=("deferred",)) == [one]
    assert found(reader, states=("deferred", "queued")) == [one, two, three]
    assert found(reader, sender="") == [two]
    assert found(reader, sender="*@example.com") == [one, three]
    assert found(reader, sender="it's 100%*") == [three]
    assert found(reader, sender="100%") == []
    assert found(reader, recipient="ann@example.org") == [one]
    assert found(reader, recipient="bob_1@*") == [two], "only * stands for something"
    assert found(reader, recipient="*@example.net") == [two, three], (
        "domains are the same in capitals"
    )
    assert found(reader, route="bulk") == [two]
    assert found(reader, server="a:628") == [one]
    assert found(reader, reply="mailbox_full") == [one]
    assert found(reader, reply="mailbox%full") == []
    assert found(reader, header_message_id="<1@x>") == [one]
    assert found(reader, id=three) == [three]
    assert found(reader, sender="*@example.com", states=("queued",)) == [three], (
        "everything must hold"
    )
    assert found(reader, sender="*\\*") == []


def test_older_than_filters_by_age(queue: QueueHarness, reader: QueueReader) -> None:
    old = f"{int((datetime.now(UTC).timestamp() - 7200) * 1000):012x}7" + "0" * 19
    queue.insert([new_message(queue_id=old)])
    young = queue.accept()
    assert found(reader, older_than=3600.0) == [old]
    assert found(reader, older_than=0.0) in ([old], [old, young])
    assert found(reader, older_than=1e12) == []


def test_finished_rows_are_history(queue: QueueHarness, reader: QueueReader) -> None:
    queue_id = queue.accept()
    queue.complete(queue.claim(queue_id)[0], Outcome.DELIVERED)
    assert found(reader) == []
    assert found(reader, states=("delivered",)) == [queue_id]
    (row,) = reader.rows(Filter(), finished=True)
    assert row["state"] == State.DELIVERED
    assert row["finished_at"] <= datetime.now(UTC)


def test_row_has_the_columns_of_the_view(queue: QueueHarness, reader: QueueReader) -> None:
    queue_id = queue.accept(
        "x@example.org", sender="s@example.com", dsn_of=queue.accept("other@example.org")
    )
    queue.complete(queue.claim(queue_id)[0], Outcome.DEFERRED)
    (row,) = reader.rows(Filter(id=queue_id))
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


def test_long_queue_is_streamed(queue: QueueHarness, reader: QueueReader) -> None:
    queue.insert([new_message(*(f"r{n}@example.org" for n in range(10))) for _ in range(300)])
    rows = reader.rows(Filter())
    first = list(itertools.islice(rows, 5))
    assert [row["position"] for row in first] == [1, 2, 3, 4, 5]
    queue.claim(first[0]["queue_id"])  # the stream locks no row
    assert len(list(rows)) == 2995
    assert len(list(reader.rows(Filter(), limit=7))) == 7
    half_read = reader.rows(Filter())
    next(half_read)
    assert isinstance(half_read, Generator)
    half_read.close()


def test_id_is_found_by_any_unique_end(queue: QueueHarness, reader: QueueReader) -> None:
    queue_id = queue.accept()
    similar = queue_id[:10] + "0000" + queue_id[14:]
    queue.insert([new_message(queue_id=similar)])
    for text in (
        queue_id,
        queue_id.upper(),
        dashed(queue_id),
        queue_id[-20:],
        dashed(queue_id)[-24:],
    ):
        assert reader.resolve(text) == queue_id
    with pytest.raises(NoSuchMessage, match="more than one") as caught:
        reader.resolve(queue_id[-4:])
    assert queue_id in str(caught.value)
    assert similar in str(caught.value)
    for text, expected in (
        ("f" * 32, "no message"),
        ("ffff", "no message"),
        ("abc", "not a queue id"),
        ("%", "not a queue id"),
    ):
        with pytest.raises(NoSuchMessage, match=expected):
            reader.resolve(text)


def test_message_has_recipients_deliveries_and_attempts(
    queue: QueueHarness, reader: QueueReader
) -> None:
    queue_id = queue.accept("x@example.org", "bulk:y@example.org", "z@example.org")
    queue.complete(queue.claim(queue_id)[0], Outcome.DEFERRED)
    queue.pass_time(60)
    queue.rescuer.requeue_due(10)
    queue.complete(queue.claim(queue_id)[0], Outcome.REJECTED)
    message = reader.message(queue_id)
    assert [row.address for row in message.recipients] == [
        "x@example.org",
        "y@example.org",
        "z@example.org",
    ]
    assert [(row.number, row.state, row.claim_count) for row in message.deliveries] == [
        (1, "bounced", 2),
        (2, "queued", 0),
    ]
    assert [(row.claim, row.outcome, row.worker) for row in message.attempts] == [
        (1, "deferred", queue.worker),
        (2, "rejected", queue.worker),
    ]
    assert message.attempts[0].started_at.tzinfo is UTC
    with pytest.raises(NoSuchMessage):
        reader.message("f" * 32)


def test_summary_and_servers_count_the_queue(queue: QueueHarness, reader: QueueReader) -> None:
    assert (reader.read("summary"), reader.read("servers")) == ([], [])
    queue.accept("x@example.org", "bulk:y@example.org")
    (late,) = queue.claim(queue.accept())
    queue.complete(late, Outcome.UNCERTAIN)
    queue.pass_time(60, only=[late.queue_id])
    summary = {(row["state"], row["route"]): row for row in reader.read("summary")}
    assert {
        key: (row["deliveries"], row["bytes"], row["overdue"]) for key, row in summary.items()
    } == {
        ("deferred", "default"): (1, 100, 1),
        ("queued", "bulk"): (1, 100, 0),
        ("queued", "default"): (1, 100, 0),
    }
    assert all(
        0 <= row["oldest_seconds"] < 60 and row["oldest_at"].tzinfo is UTC
        for row in summary.values()
    )
    (server,) = reader.read("servers")
    assert (server["attempts"], server["uncertain"], server["delivered"], server["bytes_sent"]) == (
        1,
        1,
        0,
        90,
    )


def test_workers_are_listed(queue: QueueHarness, reader: QueueReader) -> None:
    queue.claim(queue.accept(), queue.accept())
    gone = queue.register_worker()
    queue.worker_queue.retire(gone)
    (alive, ended) = reader.workers()
    assert (alive.id, alive.alive, alive.sending, alive.ended_at) == (
        queue.worker,
        True,
        2,
        None,
    )
    assert (ended.id, ended.alive, ended.end_reason) == (gone, False, "stopped")


def test_filter_is_shown_as_options() -> None:
    assert Filter().shown() == ""
    wanted = Filter(states=("held", "queued"), sender="", older_than=60.0)
    assert wanted.shown() == "--state held --state queued --sender '' --older-than 60s"
