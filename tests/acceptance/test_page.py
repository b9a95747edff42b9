"""The pages with addresses that no link of theirs has, with faults of their own, and with
operations.

`test_page_in_chromium.py` checks the layout, `test_console.py` the numbers.
"""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from relay.ids import dashed, new_id
from relay.queue.outcome import Outcome
from relay.report.queries import QueueReader
from relay.report.statistics import Statistics
from relay.spool.store import Spool
from tests.acceptance.console import Browser, browsing
from tests.integration.harness import QueueHarness, opened
from tests.integration.typed import typed_at


@pytest.fixture
def at_the_page(
    clean_url: str, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[QueueHarness, Browser]]:
    with opened(clean_url) as queue:
        typed_at(queue, spool, monkeypatch)
        with browsing(queue) as browser:
            yield queue, browser


def test_an_incomplete_link_to_older_mail_is_explained(
    at_the_page: tuple[QueueHarness, Browser],
) -> None:
    queue, browser = at_the_page
    queue_id = queue.accept()
    behind = [f"{queue_id}.{position}" for position in ("9" * 23, "-1", "%D9%A3", "1.2", "")]
    for after in (*behind, queue_id, f"{queue_id[-8:]}.1", ".", "x.y", "%00"):
        page = browser.get(f"/search?after={after}")
        assert (page.status, "this link to older mail is not complete" in page.visible_text) == (
            200,
            True,
        ), after
    assert "no message has an id" in browser.get(f"/search?after={new_id()}.1").visible_text
    assert "There is no older mail" in browser.get(f"/search?after={queue_id}.1").visible_text
    assert browser.get(f"/search?after={queue_id}.999999999").status == 200


@pytest.mark.parametrize(
    "name", ["id", "sender", "recipient", "header_message_id", "state", "reply"]
)
def test_a_zero_byte_is_no_outage(at_the_page: tuple[QueueHarness, Browser], name: str) -> None:
    _, browser = at_the_page
    for value in ("%00", "a%00b@example.com", "*%00"):
        page = browser.get(f"/search?{name}={value}")
        assert (page.status, "no mail has a zero byte in this field" in page.visible_text) == (
            200,
            True,
        ), value
    assert browser.get("/message/%00").status == 404


def test_an_internal_error_is_a_page_and_a_line_of_the_log(
    at_the_page: tuple[QueueHarness, Browser], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, browser = at_the_page

    def broken(_statistics: Statistics, *_spans: int) -> Any:
        raise RuntimeError("something inside")

    monkeypatch.setattr(Statistics, "history", broken)
    with capture_logs() as logged:
        page = browser.get("/")
    assert page.status == 500
    assert "This page failed" in page.visible_text
    assert "inside" not in page.text
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert [(line["event"], line["log_level"]) for line in logged] == [("page failed", "error")]
    assert browser.get("/search").status == 200, "and the next is served"


def did(
    queue: QueueHarness, verb: str, reason: str, seconds_ago: float, *touched: tuple[str, int]
) -> None:
    """A row of `audit`, and the deliveries that the operation changed."""
    action = new_id()
    queue.change(
        "INSERT INTO audit VALUES (@id(:id), @ago(:ago), :actor, :verb, :reason, '--sender x',"
        " :matched)",
        id=action,
        ago=seconds_ago,
        actor="ops@mx-1",
        verb=verb,
        reason=reason,
        matched=len(touched),
    )
    for queue_id, number in touched:
        sql = "INSERT INTO audit_deliveries VALUES (@id(:id), :number, @id(:action))"
        queue.change(sql, id=queue_id, number=number, action=dashed(action))


def test_timeline_shows_operations(
    at_the_page: tuple[QueueHarness, Browser],
) -> None:
    queue, browser = at_the_page
    mine, other = queue.accept("b@example.org", "other:c@example.org"), queue.accept()
    moved = "UPDATE messages SET received_at = @ago(1000) WHERE id = @id(:id)"
    assert queue.change(moved, id=mine) == 1
    queue.complete(queue.claim(mine)[0], Outcome.DEFERRED)
    did(queue, "pause route:other", "before it came", 2000)
    did(queue, "hold", "the customer <b>asked</b>", 900, (mine, 1), (mine, 2), (other, 1))
    did(queue, "pause route:other", "maintenance", 800)
    did(queue, "pause route:nowhere", "not its way", 800)
    did(queue, "resume route:other", "", 700)
    did(queue, "release", "", 600, (mine, 2))
    did(queue, "drop", "not ours", 500, (other, 1))
    did(queue, "pause server:qmqp.example.net:628", "it was tried there", 400)
    found = QueueReader(queue.database).operations_on(mine)
    assert [(row["operation"], row["delivery"]) for row in found] == [
        ("hold", 1),
        ("hold", 2),
        ("pause route:other", None),
        ("resume route:other", None),
        ("release", 2),
        ("pause server:qmqp.example.net:628", None),
    ]
    assert {**found[0], "acted_at": None} == {
        "delivery": 1,
        "acted_at": None,
        "actor": "ops@mx-1",
        "operation": "hold",
        "reason": "the customer <b>asked</b>",
        "filter": "--sender x",
    }
    shown = browser.get(f"/message/{mine}").visible_text
    places = [
        shown.index(expected)
        for expected in (
            "accepted from",
            "hold delivery 1 by ops@mx-1: the customer <b>asked</b>",
            "hold delivery 2",
            "pause route:other by ops@mx-1: maintenance",
            "resume route:other by ops@mx-1",
            "release delivery 2",
            "pause server:qmqp.example.net:628",
            "deferred delivery 1, try 1",
        )
    ]
    assert places == sorted(places)
    for expected in ("before it came", "not its way", "not ours"):
        assert expected not in shown
    queue.change(
        "UPDATE deliveries SET state = 'dropped', due_at = NULL, finished_at = @ago(650) WHERE"
        " queue_id = @id(:id)",
        id=mine,
    )
    assert [row["operation"] for row in QueueReader(queue.database).operations_on(mine)][-2:] == [
        "resume route:other",
        "release",
    ]


def test_link_of_a_dsn_leads_to_the_original(
    at_the_page: tuple[QueueHarness, Browser],
) -> None:
    queue, browser = at_the_page
    original = queue.accept()
    for content, text in ((None, original), ("header", f"{original} and encloses its header")):
        dsn = queue.accept(sender="", dsn_of=original, dsn_content=content)
        page = browser.get(f"/message/{dsn}")
        link = re.search(r'<dt>DSN of</dt><dd><a href="([^"]*)"><code>([^<]*)</code>', page.text)
        assert link is not None
        assert link[2] == text
        assert browser.get(link[1].replace(" ", "%20")).status == 200


def test_counts_are_labelled(at_the_page: tuple[QueueHarness, Browser]) -> None:
    queue, browser = at_the_page
    queue.accept("a@example.org", "b@example.org", "c@example.org")
    overview = browser.get("/")
    assert "Deliveries by state" in overview.visible_text
    assert re.search(r"<b>1</b> <span class=\"state queued\">", overview.text)
    assert "3 recipients, newest first" in browser.get("/search?state=queued").visible_text
    assert (
        "1 recipient, newest first" in browser.get("/search?recipient=a@example.org").visible_text
    )


def test_the_newest_bar_is_as_long_as_the_others(at_the_page: tuple[QueueHarness, Browser]) -> None:
    """Tries of a moment ago and of nearly five minutes ago are in one step, whatever the clock
    says."""
    queue, _ = at_the_page
    queue_id = queue.accept()
    for attempt_index, ago in enumerate((1, 150, 298, 302, 21_000), 1):
        queue.change(
            "INSERT INTO attempts VALUES (@id(:id), 1, 1, :attempt_index, @id(:w), 's', @ago(:ago"
            " + 0.5), @ago(:ago), 'delivered',"
            " '', 1)",
            id=queue_id,
            attempt_index=attempt_index,
            ago=ago,
            w=dashed(queue.worker),
        )
    now, rows = Statistics(queue.database).history(21_600, 300)
    assert now.tzinfo is not None
    assert [(row["step"], row["tries"]) for row in rows] == [(0, 3), (1, 1), (70, 1)]
    assert {round(row["seconds"], 2) for row in rows} == {0.5}
