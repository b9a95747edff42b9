"""The overview of the page: what it reads, on both databases, and how long it keeps it."""

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from structlog.testing import capture_logs

from commands.ops.problems import find_problems
from commands.web import charts
from commands.web.overview import BackgroundValue, KeptValue, Overview
from relay.ids import dashed
from relay.queue.operations import QueueOperations
from relay.queue.outcome import Outcome
from relay.queue.states import State
from relay.report.queries import QueueReader
from relay.report.rows import Row
from relay.report.statistics import Statistics
from relay.settings import SmtpdSettings, load
from relay.spool.store import Spool
from tests.acceptance.console import browsing
from tests.integration.harness import QueueHarness, opened
from tests.integration.typed import typed_at
from tests.waiting import until

UP, DOWN = "a:628", "b:628"


@pytest.fixture
def queue(clean_url: str, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> Iterator[QueueHarness]:
    with opened(clean_url) as queue:
        typed_at(queue, spool, monkeypatch)
        yield queue


def values(queue: QueueHarness) -> dict[str, Any]:
    return Overview(queue.database, load(SmtpdSettings), timeout=60).values(charts.USUAL)


def test_routes_show_what_waits_and_since_when_they_fail(queue: QueueHarness) -> None:
    routes = {"both": [UP, DOWN], "down": [DOWN], "idle": [UP]}
    queue.rescuer.publish_routes(queue.worker, routes)
    queue.rescuer.publish_open_circuits(queue.worker, {DOWN: "connect: refused"})
    QueueOperations(queue.database, sends_dsns=True).pause("route:idle", actor="a@b", reason="")
    for address in ("both:x@a", "down:x@a", "down:y@a", "gone:x@a"):
        queue.accept(address)
    held = queue.accept("both:x@a")
    queue.complete(queue.claim(held, capacity={"both": 1})[0], Outcome.UNSENDABLE)
    rows = {row.name: row for row in values(queue)["routes"]}
    assert list(rows) == ["both", "down", "gone", "idle"]
    assert {name: row.waiting for name, row in rows.items()} == {
        "both": 1,
        "down": 2,
        "gone": 1,
        "idle": 0,
    }
    assert [name for name, row in rows.items() if row.down] == ["down"]
    assert rows["down"].failing_at is not None
    assert rows["both"].servers == [UP, DOWN]
    assert [name for name, row in rows.items() if row.paused_at] == ["idle"]
    assert rows["idle"].oldest_seconds is None
    assert rows["gone"].servers == []


def test_last_words_are_those_of_the_last_attempt(queue: QueueHarness) -> None:
    queue_id = queue.accept()
    for index, (server, ago, reply) in enumerate(
        ((UP, 5, "last"), (UP, 50, "before"), (DOWN, 3000, "older"), ("c:628", 4000, "too old")), 1
    ):
        queue.change(
            "INSERT INTO attempts VALUES (@id(:id), 1, 1, :n, @id(:w), :server, @ago(:ago),"
            " @ago(:ago), 'deferred', :reply, 1)",
            id=queue_id,
            n=index,
            w=dashed(queue.worker),
            server=server,
            ago=ago,
            reply=reply,
        )
    words = {row["server"]: row["words"] for row in values(queue)["servers"]}
    assert {server: row and row["reply"] for server, row in words.items()} == {
        UP: "last",
        DOWN: "older",
    }


def test_unfinished_mail_is_counted_by_reason_domain_and_sender(queue: QueueHarness) -> None:
    for n in range(7):
        queue_id = queue.accept(f"x@d{n // 2}.example", sender="" if n < 4 else f"s{n}@example.com")
        reply = f"451 4.7.1 greylisted for {n} s" if n < 3 else "busy"
        queue.complete(queue.claim(queue_id)[0], Outcome.DEFERRED, reply=reply)
    queue.accept("fresh@d0.example")
    done = queue.accept("done@d9.example")
    queue.complete(queue.claim(done)[0], Outcome.DELIVERED)
    tops = dict(values(queue)["tops"])
    assert [(row["reason"], row["deliveries"]) for row in tops["reason"]] == [
        ("busy", 4),
        ("451 4.7.1 greylisted for # s", 3),
    ]
    assert [(row["domain"], row["deliveries"]) for row in tops["domain"]] == [
        ("d0.example", 3),
        ("d1.example", 2),
        ("d2.example", 2),
        ("d3.example", 1),
    ]
    assert [(row["sender"], row["deliveries"]) for row in tops["sender"]][:2] == [
        ("", 4),
        ("a@example.com", 1),
    ]
    assert len(tops["sender"]) == 5


def test_problems_are_those_of_the_command(queue: QueueHarness) -> None:
    queue.rescuer.publish_routes(queue.worker, {"default": [DOWN]})
    queue.rescuer.publish_open_circuits(queue.worker, {DOWN: "connect: refused"})
    queue_id = queue.accept()
    queue.complete(queue.claim(queue_id)[0], Outcome.UNSENDABLE)
    shown = values(queue)
    assert shown["problems"] == find_problems()[0]
    assert [problem.kind for problem in shown["problems"]][:2] == ["server_down", "held"]
    assert shown["critical"] is True


def test_refusals_of_rates_are_shown(queue: QueueHarness) -> None:
    for n, name in enumerate(("192.0.2.7", ""), 1):
        queue.change(
            "INSERT INTO rate_refusals (hour, subject, what, name, refused, last_at) VALUES"
            " (@ago(10), 'client', 'messages', :name, :n, @ago(10))",
            name=name,
            n=n,
        )
    with browsing(queue) as browser:
        text = browser.get("/").visible_text
    assert re.search(r"client several others messages 2 \d+s client 192\.0\.2\.7 messages 1 ", text)


def test_arrivals_are_counted_by_step(queue: QueueHarness) -> None:
    queue.accept("a@x", "bulk:b@x")
    old, split = queue.accept(), queue.accept()
    for queue_id, ago in ((old, 400), (split, 10)):
        queue.change(
            "UPDATE messages SET received_at = @ago(:ago) WHERE id = @id(:id)", id=queue_id, ago=ago
        )
    queue.complete(queue.claim(split)[0], Outcome.REJECTED, state=State.BOUNCED)
    rows = Statistics(queue.database).arrivals(3600, 300)
    assert [(row["step"], row["deliveries"]) for row in rows] == [(0, 3), (1, 1)]


def test_a_kept_value_is_read_once_for_all_that_wait() -> None:
    began, go_on, reads = threading.Event(), threading.Event(), list[int]()

    def read() -> int:
        began.set()
        assert go_on.wait(10)
        reads.append(1)
        return len(reads)

    value = KeptValue(read)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(value.get) for _ in range(4)]
        assert began.wait(10)
        go_on.set()
        assert [answer.result() for answer in answers] == [1] * 4
    assert value.version == 1
    value.expire()
    assert (value.get(), value.version) == (2, 2)


def test_a_background_value_is_not_waited_for_too_long() -> None:
    go_on, reads = threading.Event(), list[int]()

    def read() -> int:
        assert go_on.wait(10)
        reads.append(1)
        return len(reads)

    value = BackgroundValue(read, timeout=0.05)
    assert (value.get(), value.get(), value.late) == (None, None, 0)
    go_on.set()
    until(lambda: value.late == 1, what="the value came late")
    assert (value.get(), value.late, reads) == (1, 1, [1])


def test_a_late_failure_of_a_background_value_is_logged() -> None:
    go_on = threading.Event()

    def read() -> int:
        assert go_on.wait(10)
        raise OSError("no database")

    value = BackgroundValue(read, timeout=0.05)
    with capture_logs() as logged:
        assert value.get() is None
        go_on.set()
        until(lambda: logged, what="the failure is logged")
    assert [line["event"] for line in logged] == ["count failed"]
    assert value.get() is None, "it is not read again at once"
    early = BackgroundValue(read, timeout=60)
    with pytest.raises(OSError, match="no database"):
        early.get()


def test_the_page_is_shown_before_its_counts(
    queue: QueueHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, count = threading.Event(), QueueReader.counted_by

    def slow(*arguments: Any, **options: Any) -> list[Row]:
        assert go_on.wait(60)
        return count(*arguments, **options)

    monkeypatch.setattr("commands.web.overview.COUNTS_TIMEOUT", 0.05)
    monkeypatch.setattr(QueueReader, "counted_by", slow)
    queue.accept("x@d0.example")
    with browsing(queue) as browser:
        text = browser.get("/").visible_text
        assert "1 queued" in text
        assert text.count("Still being counted") == 5
        go_on.set()
        until(lambda: "d0.example" in browser.get("/").text, what="the counts are shown")
        assert "Still being counted" not in browser.get("/").visible_text
