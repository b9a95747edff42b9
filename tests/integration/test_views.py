"""The views for operators: attempts, operations, workers, summaries and the flow of mail."""

import pytest

from relay.queue.operations import OPERATIONS, QueueOperations
from relay.queue.outcome import Outcome
from relay.report.filters import Filter
from relay.report.masking import masked
from relay.spool.store import Spool
from relay.version import running_version
from tests.integration.harness import QueueHarness
from tests.integration.typed import Typed, lines, typed_at

REASONS = [
    "451 4.7.1 <a@example.org>: greylisted for 300 seconds",
    "451 4.7.1 <b@example.org>: greylisted for 20 seconds",
    "550 5.1.1 no such user",
    "199 4.7 4.7.1. 451: 5.1.1 4.x.1 4..1 9.1.1 4.7.1.2 4.77.123",
    "  two  blanks  9 ",
    "one",
    "x",
]


@pytest.fixture
def typed(queue: QueueHarness, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> Typed:
    return typed_at(queue, spool, monkeypatch)


def test_reasons_are_masked_as_by_the_command(queue: QueueHarness, typed: Typed) -> None:
    for reason in REASONS:
        queue.complete(queue.claim(queue.accept())[0], Outcome.DEFERRED, reply=reason)
    queue.accept("x@one.example", "y@one.example")
    expected = {masked(reason) for reason in REASONS} | {""}
    assert "# # # # 5.1.1 # # # # 4.77.123" in expected
    rows = queue.rows("SELECT * FROM reason_summary")
    counts = {row["reason"]: (int(row["deliveries"]), int(row["recipients"])) for row in rows}
    assert set(counts) == expected
    assert (counts[masked(REASONS[0])], counts[""]) == ((2, 2), (1, 2))
    shown = lines(typed("list", "--count-by", "reason", "--json"))
    assert {row["reason"]: (row["deliveries"], row["recipients"]) for row in shown} == counts
    QueueOperations(queue.database, sends_dsns=True).pause(
        "route:default", actor="ann@host", reason="ticket 812"
    )
    (row,) = queue.rows("SELECT * FROM reason_summary")
    assert (row["reason"], int(row["deliveries"])) == ("paused by ann@host: ticket 812", 8)
    counts = {row["reason"]: (8, 9)}
    shown = lines(typed("list", "--count-by", "reason", "--json"))
    assert {row["reason"]: (row["deliveries"], row["recipients"]) for row in shown} == counts


def test_domains_are_counted(queue: QueueHarness) -> None:
    queue.accept("a@One.example", "b@one.EXAMPLE", "c@two.example")
    queue.complete(queue.claim(queue.accept("d@one.example"))[0], Outcome.DELIVERED)
    rows = queue.rows("SELECT domain, deliveries, recipients FROM domain_summary ORDER BY domain")
    assert [tuple(row.values()) for row in rows] == [("one.example", 1, 2), ("two.example", 1, 1)]


def test_attempts_have_their_route_and_length(queue: QueueHarness) -> None:
    queue_id = queue.accept("bulk:x@example.org")
    queue.complete(queue.claim(queue_id, capacity={"bulk": 1})[0], Outcome.DEFERRED)
    (row,) = queue.rows("SELECT * FROM mail_attempts")
    assert (row["queue_id"], row["route"], row["outcome"]) == (queue_id, "bulk", "deferred")
    assert row["seconds"] == pytest.approx(0.4, abs=0.01)


def test_workers_have_the_version_that_they_run(queue: QueueHarness) -> None:
    queue.claim(queue.accept())
    gone = queue.register_worker()
    queue.worker_queue.retire(gone)
    rows = queue.rows(
        "SELECT version, alive, sending, end_reason FROM worker_health ORDER BY worker"
    )
    assert [(bool(row["alive"]), row["sending"], row["end_reason"]) for row in rows] == [
        (True, 1, None),
        (False, 0, "stopped"),
    ]
    assert {row["version"] for row in rows} == {running_version()}


def test_flow_says_how_long_waiting_mail_takes(queue: QueueHarness, typed: Typed) -> None:
    ids = [queue.accept() for _ in range(8)]
    for claim in queue.claim(*ids[:6]):
        queue.complete(claim, Outcome.DELIVERED)
    queue.complete(queue.claim(ids[6])[0], Outcome.DEFERRED)

    def flow() -> dict[int, tuple[int, int, int, float | None]]:
        rows = queue.rows("SELECT * FROM mail_flow")
        return {
            row["minutes"]: (row["received"], row["finished"], row["waiting"], row["drain_seconds"])
            for row in rows
        }

    assert flow() == dict.fromkeys((1, 10, 60), (8, 6, 2, None)), "more came than went"
    queue.change("UPDATE messages SET received_at = @ago(300)")
    assert flow()[1] == (0, 6, 2, 20.0), "six a minute"
    assert flow()[10] == (8, 6, 2, None)
    queue.change("UPDATE attempts SET finished_at = @ago(4000)")
    assert flow()[60] == (8, 0, 2, None)
    queue.change("DELETE FROM deliveries WHERE state <> 'delivered'")
    assert flow()[60][2:] == (0, 0.0), "nothing waits"
    stats = [row for row in lines(typed("stats", "--json")) if row["kind"] == "flow"]
    assert [(row["minutes"], row["waiting"]) for row in stats] == [(1, 0), (10, 0), (60, 0)]


def test_stats_show_disk_and_versions(queue: QueueHarness, typed: Typed, spool: Spool) -> None:
    for outcome in (Outcome.DELIVERED, Outcome.UNCERTAIN):
        queue.complete(queue.claim(queue.accept())[0], outcome)
    old = queue.register_worker()
    queue.complete(queue.claim(queue.accept(), worker=old)[0], Outcome.REJECTED, worker=old)
    queue.change("UPDATE workers SET version = NULL WHERE id = @id(:id)", id=old)
    stats = lines(typed("stats", "--json"))
    (disk,) = [row for row in stats if row["kind"] == "disk"]
    assert disk["directory"] == str(spool.directory)
    assert 0 < disk["free_bytes"] <= disk["total_bytes"]
    shown = {row["version"]: row for row in stats if row["kind"] == "version"}
    assert (shown[""]["rejected"], shown[""]["attempts"]) == (1, 1)
    today = shown[running_version()]
    assert (today["delivered"], today["uncertain"], today["attempts"]) == (1, 1, 2)
    workers = {row["version"] for row in stats if row["kind"] == "worker"}
    assert workers == {running_version(), None}


def test_actions_are_in_view_and_command(queue: QueueHarness, typed: Typed) -> None:
    operations = QueueOperations(queue.database, sends_dsns=True)
    ids = [queue.accept() for _ in range(3)]
    assert typed("actions", status=1).stderr == "qmqp-relay: no operation is recorded\n"
    operations.apply(OPERATIONS["hold"], Filter(id=ids[0]), actor="ann@here", reason="a look")
    operations.apply(OPERATIONS["drop"], Filter(states=("queued",)), actor="bob@there", reason="")
    operations.pause("route:default", actor="ann@here", reason="ticket 812")
    by_sql = queue.rows(
        "SELECT actor, operation, changed, filter FROM operator_actions ORDER BY acted_at"
    )
    shown = lines(typed("actions", "--json"))
    assert [(row["actor"], row["operation"], row["changed"]) for row in shown] == [
        ("ann@here", "pause route:default", 1),
        ("bob@there", "drop", 2),
        ("ann@here", "hold", 1),
    ]
    assert [tuple(row.values()) for row in by_sql][::-1] == [
        (row["actor"], row["operation"], row["changed"], row["filter"]) for row in shown
    ]
    assert [row["operation"] for row in lines(typed("actions", "--actor", "bob*", "--json"))] == [
        "drop"
    ]
    assert len(lines(typed("actions", "--json", "--limit", "2"))) == 2
    queue.change("UPDATE audit SET at = @ago(7200) WHERE operation = 'hold'")
    assert len(lines(typed("actions", "--json", "--newer-than", "1h"))) == 2
    typed("actions", "--actor", "stranger", status=1)
    on_one = lines(typed("actions", ids[0], "--json"))
    assert [row["operation"] for row in on_one] == ["pause route:default", "hold"]
    rows = queue.rows("SELECT queue_id, operation FROM mail_actions")
    assert {(row["queue_id"], row["operation"]) for row in rows} == {
        (ids[0], "hold"),
        (ids[1], "drop"),
        (ids[2], "drop"),
    }
    table = typed("actions", "--format", "table").stdout.splitlines()
    assert table[0].split() == ["AT", "BY", "OPERATION", "CHANGED", "FILTER", "REASON"]
    assert "Z  ann@here" in table[1]


def test_circuit_keeps_the_time_when_it_opened(queue: QueueHarness) -> None:
    def failed() -> dict[str, tuple[str, str]]:
        sql = "SELECT server, failed_at, circuit_open_reason AS why FROM server_health"
        return {row["server"]: (row["failed_at"], row["why"]) for row in queue.rows(sql)}

    queue.rescuer.publish_open_circuits(queue.worker, {"a:628": "refused"})
    queue.change("UPDATE open_circuits SET since = @ago(600)")
    (since, _) = failed()["a:628"]
    queue.rescuer.publish_open_circuits(queue.worker, {"a:628": "timed out", "b:628": "refused"})
    assert failed()["a:628"] == (since, "timed out")
    assert failed()["b:628"][0] > since
    queue.rescuer.publish_open_circuits(queue.worker, {"b:628": "refused"})
    assert set(failed()) == {"b:628"}
    queue.rescuer.publish_open_circuits(queue.worker, {"a:628": "again", "b:628": "refused"})
    assert failed()["a:628"][0] > since
