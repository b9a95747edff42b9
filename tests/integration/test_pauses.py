"""Mail behind a pause is wanted: it counts as paused, not as overdue, and its reason is the pause.

The views, `list`, `stats`, the page and the metrics read the same rows, on both databases.
"""

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from relay.metrics import QueueMetrics
from relay.queue.operations import QueueOperations
from relay.queue.outcome import Outcome
from relay.spool.store import Spool
from tests.acceptance.console import browsing
from tests.integration.harness import QueueHarness
from tests.integration.typed import Typed, lines, typed_at

ROUTES = {"default": ["a:628", "b:628"], "bulk": ["b:628"], "idle": []}
REASON = "paused by ann@host: ticket 812"


@pytest.fixture
def typed(queue: QueueHarness, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> Typed:
    return typed_at(queue, spool, monkeypatch)


@pytest.fixture
def overdue(queue: QueueHarness) -> dict[str, str]:
    """Two overdue deliveries of each route: one is queued, a server deferred the other one."""
    queue.rescuer.publish_routes(queue.worker, ROUTES)
    ids = dict[str, str]()
    for route in ("default", "bulk"):
        ids[f"{route} queued"] = queue.accept(f"{route}:q@example.org")
        deferred = ids[f"{route} deferred"] = queue.accept(f"{route}:d@example.org")
        queue.complete(queue.claim(deferred, capacity={route: 1})[0], Outcome.DEFERRED)
    queue.pass_time(100, only=list(ids.values()))
    return ids


def pause(queue: QueueHarness, *subjects: str) -> None:
    operations = QueueOperations(queue.database, sends_dsns=True)
    for subject in subjects:
        assert operations.pause(subject, actor="ann@host", reason="ticket 812")


def paused_ids(queue: QueueHarness) -> set[str]:
    rows = queue.rows("SELECT queue_id, reason FROM mail_queue WHERE paused_at IS NOT NULL")
    assert {row["reason"] for row in rows} <= {REASON}
    return {row["queue_id"] for row in rows}


def counts(queue: QueueHarness) -> dict[str, tuple[int, int]]:
    """Overdue and paused deliveries by route."""
    sql = "SELECT route, sum(overdue) AS late, sum(paused) AS paused FROM queue_summary GROUP BY 1"
    return {row["route"]: (int(row["late"]), int(row["paused"])) for row in queue.rows(sql)}


@pytest.mark.parametrize(
    ("subjects", "routes"),
    [
        (("route:bulk",), {"bulk"}),
        (("server:b:628",), {"bulk"}),  # the other route has another server
        (("server:a:628",), set[str]()),
        (("server:a:628", "server:b:628"), {"default", "bulk"}),
        (("server:a:628", "server:b:628", "route:bulk"), {"default", "bulk"}),
        (("route:nowhere",), set[str]()),
    ],
)
def test_mail_behind_a_pause_is_paused_and_not_overdue(
    queue: QueueHarness, overdue: dict[str, str], subjects: tuple[str, ...], routes: set[str]
) -> None:
    assert counts(queue) == {"default": (2, 0), "bulk": (2, 0)}
    pause(queue, *subjects)
    expected = {route: (0, 2) if route in routes else (2, 0) for route in ("default", "bulk")}
    assert counts(queue) == expected
    assert paused_ids(queue) == {i for name, i in overdue.items() if name.split()[0] in routes}
    listed = queue.rows("SELECT queue_id FROM mail_queue")
    assert len(listed) == 4, "a delivery behind two pauses is one row"
    resumed = QueueOperations(queue.database, sends_dsns=True)
    for subject in subjects:
        assert resumed.resume(subject, actor="ann@host", reason="")
    assert counts(queue) == {"default": (2, 0), "bulk": (2, 0)}


def test_the_pauses_say_what_waits_behind_them(
    queue: QueueHarness, overdue: dict[str, str]
) -> None:
    pause(queue, "server:a:628", "server:b:628", "route:idle")
    rows = queue.rows("SELECT subject, actor, reason, deliveries FROM paused ORDER BY subject")
    assert [(row["subject"], int(row["deliveries"])) for row in rows] == [
        ("route:idle", 0),
        ("server:a:628", 2),
        ("server:b:628", 4),
    ]
    assert {(row["actor"], row["reason"]) for row in rows} == {("ann@host", "ticket 812")}


def test_only_waiting_mail_is_paused(queue: QueueHarness, overdue: dict[str, str]) -> None:
    (sending,) = queue.claim(queue.accept("bulk:s@example.org"), capacity={"bulk": 1})
    held = overdue["bulk queued"]
    queue.change(
        "UPDATE deliveries SET state = 'held', due_at = NULL WHERE queue_id = @id(:id)", id=held
    )
    pause(queue, "route:bulk")
    assert paused_ids(queue) == {overdue["bulk deferred"]}
    summary = {
        (row["state"], row["route"]): row["paused"]
        for row in queue.rows("SELECT * FROM queue_summary")
    }
    assert summary["sending", "bulk"] == summary["held", "bulk"] == 0
    queue.complete(sending, Outcome.DELIVERED)
    assert sending.queue_id not in paused_ids(queue)


def test_without_workers_the_last_known_routes_count(
    queue: QueueHarness, overdue: dict[str, str]
) -> None:
    pause(queue, "server:b:628")
    stranger = queue.register_worker()
    queue.rescuer.publish_routes(stranger, {"bulk": ["c:628"]})
    assert paused_ids(queue) == set(), "a worker that is alive sends the mail to another server"
    queue.worker_queue.retire(stranger)
    assert len(paused_ids(queue)) == 2
    queue.worker_queue.retire(queue.worker)
    assert paused_ids(queue) == set(), "the last worker that started had other routes"


def test_the_commands_say_who_paused_it_and_why(
    queue: QueueHarness, typed: Typed, overdue: dict[str, str]
) -> None:
    pause(queue, "route:bulk")
    rows = {row["queue_id"]: row for row in lines(typed("list", "--json"))}
    row = rows[overdue["bulk deferred"]]
    assert (row["reason"], row["last_reply"]) == (REASON, "its words")
    assert row["paused_at"].endswith("Z")
    assert rows[overdue["default deferred"]]["reason"] == "its words"
    for words in ("its words", "ticket 812"):
        found = {row["queue_id"] for row in lines(typed("list", "--reply", words, "--json"))}
        assert overdue["bulk deferred"] in found, "by the last reply and by the reason"
    assert "its words" in typed("show", overdue["bulk deferred"]).stdout
    assert "overdue" not in typed("why", overdue["bulk deferred"]).stdout
    stats = lines(typed("stats", "--json"))
    (shown,) = [row for row in stats if row["kind"] == "pause"]
    assert (shown["subject"], shown["deliveries"]) == ("route:bulk", 2)
    late = {
        (row["route"], row["overdue"], row["paused"]) for row in stats if row["kind"] == "queue"
    }
    assert late == {("default", 1, 0), ("bulk", 0, 1)}


def test_the_page_tells_a_pause_from_a_fault(queue: QueueHarness, overdue: dict[str, str]) -> None:
    pause(queue, "route:default", "route:bulk")
    with browsing(queue) as browser:
        page = browser.get("/")
        found = browser.get("/search?state=queued")
    assert "overdue." not in page.visible_text
    assert '<b class="wanted">4 deliveries wait behind a pause.</b>' in page.text
    assert '<b class="bad">' not in page.text
    assert '<b class="wanted">paused' in found.text
    assert REASON in found.visible_text


def test_the_metrics_count_paused_mail_apart(
    queue: QueueHarness, overdue: dict[str, str], tmp_path: Path
) -> None:
    pause(queue, "route:bulk", "server:a:628", "server:b:628")
    fresh = queue.accept("other:x@example.org")
    queue.pass_time(100, only=[fresh])
    registry = CollectorRegistry()
    registry.register(QueueMetrics(queue.database, Spool(tmp_path)))

    def by_state(name: str) -> list[float | None]:
        states = ("queued", "sending", "deferred", "held")
        return [registry.get_sample_value(f"relay_{name}", {"state": state}) for state in states]

    assert by_state("paused_deliveries") == [2, 0, 2, 0]
    assert by_state("overdue") == [1, 0, 0, 0]
    assert by_state("deliveries") == [3, 0, 2, 0]
    assert by_state("oldest_age_seconds")[2] == 0, "all deferred mail is behind a pause"
    for subject in ("route:bulk", "server:a:628"):
        seconds = registry.get_sample_value("relay_paused_seconds", {"subject": subject})
        assert seconds is not None
        assert 0 <= seconds < 600
