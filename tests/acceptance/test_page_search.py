"""The search of the page finds what commands find with the same filters, and says what is wrong."""

import re
import shlex
from collections.abc import Iterator
from urllib.parse import urlencode

import pytest

from commands.web import search
from relay.ids import new_id
from relay.queue.outcome import Outcome
from relay.report.filters import Filter
from relay.spool.store import Spool
from tests.acceptance.console import Browser, browsing
from tests.integration.harness import QueueHarness, opened
from tests.integration.typed import Typed, lines, typed_at

type Found = tuple[QueueHarness, Typed, Browser]


@pytest.fixture
def found(clean_url: str, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> Iterator[Found]:
    with opened(clean_url) as queue:
        typed = typed_at(queue, spool, monkeypatch)
        queue.rescuer.publish_routes(queue.worker, {"default": ["a:628"], "bulk": ["c:628"]})
        for sender, recipient, outcome in (
            ("ann@example.com", "x@one.example", Outcome.DELIVERED),
            ("ann@example.com", "y@two.example", Outcome.DEFERRED),
            ("bob@example.com", "bulk:z@two.example", Outcome.UNCERTAIN),
            ("", "x@one.example", Outcome.REJECTED),
        ):
            more = {"header_message_id": "<1@x>"} if sender == "ann@example.com" else {}
            queue_id = queue.accept(recipient, sender=sender, **more)
            queue.complete(
                queue.claim(queue_id, capacity={"default": 1, "bulk": 1})[0],
                outcome,
                reply=f"451 4.7.1 try in {len(sender)}",
            )
        queue.accept("many@one.example", "more@one.example", client_address="198.51.100.7")
        queue.accept("late@one.example", auth_user="app", queue_id=f"{1000:012x}{new_id()[12:]}")
        with browsing(queue) as browser:
            yield queue, typed, browser


FILTERS = [
    "--state deferred --state queued",
    "--sender ann@example.com",
    "--sender '<>'",
    "--sender '*@EXAMPLE.com'",
    "--recipient x@one.example",
    "--domain two.example",
    "--domain '*.example' --state delivered",
    "--route bulk",
    "--server c:628",
    "--client 198.51.100.7",
    "--user app",
    "--message-id 1@x",
    "--reply 'try in'",
    "--outcome uncertain --outcome rejected",
    "--uncertain",
    "--newer-than 1h",
    "--older-than 1h",
    "--received-between 1970-01-01 2000-01-01",
    "--expires-within 5d",
    "--domain one.example --client 192.0.2.1 --newer-than 1d",
]


def ids(page: str) -> list[str]:
    return re.findall(r'<th scope="row"><a href="/message/([0-9a-f]{32})"', page)


@pytest.mark.parametrize("everything", ["", "--all"])
def test_a_filter_finds_what_the_command_finds(found: Found, everything: str) -> None:
    _, typed, browser = found
    for filter_ in FILTERS:
        command = f"qmqp-relay list {filter_} {everything}"
        listed = lines(typed(*shlex.split(command)[1:], "--json", status=None))
        link = search.link_of(command)
        page = browser.get(link)
        assert ids(page.text) == [row["queue_id"] for row in listed][:: -1 if everything else 1], (
            link
        )
        if everything:
            assert listed, f"{filter_} is tried"


def test_the_form_has_what_the_address_says(found: Found) -> None:
    _, _, browser = found
    values = [
        *((name, "x") for name in ("sender", "recipient", "domain", "route", "client", "user")),
        *(("state", state) for state in ("held", "queued")),
        ("newer_than", "2h"),
        ("server", "a:628"),
        ("uncertain", "1"),
        ("count_by", "sender"),
    ]
    page = browser.get(f"/search?{urlencode(values)}").text
    for name, value in values:
        if name in ("state", "uncertain"):
            assert re.search(rf'name="{name}" value="{value}" checked', page), name
        elif name == "count_by":
            assert "<option selected>sender</option>" in page
        else:
            assert re.search(rf'name="{name}" value="{value}"', page), name


def test_totals_count_recipients_and_deliveries(
    found: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, browser = found
    text = browser.get("/search?domain=one.example").visible_text
    assert "5 recipients, newest first. 4 deliveries: 1 bounced, 1 delivered, 2 queued." in text
    monkeypatch.setattr("commands.web.pages.PAGE_ROWS", 2)
    page = browser.get("/search?domain=one.example")
    assert "2 recipients, and older mail, newest first. In all 5 in 4 deliveries:" in (
        page.visible_text
    )
    older = re.search(r'href="([^"]*)" rel="next"', page.text)
    assert older is not None
    assert "deliveries:" not in browser.get(older[1].replace("&amp;", "&")).visible_text
    monkeypatch.setattr("commands.web.pages.TOTAL_ROWS", 3)
    text = browser.get("/search?domain=one.example").visible_text
    assert "In all at least 3 in" in text


@pytest.mark.parametrize("key", ["reason", "sender", "domain", "server", "route", "client"])
def test_a_count_is_that_of_the_command(found: Found, key: str) -> None:
    _, typed, browser = found
    counted = lines(typed("list", "--all", "--count-by", key, "--json"))
    page = browser.get(f"/search?count_by={key}")
    for row in counted:
        shown = f"{row[key] or '<>'} {row['deliveries']} {row['recipients']} "
        assert shown in page.visible_text
        if key == "reason" and not row[key]:
            continue  # mail without a reason cannot be searched for
        link = search.narrowed([], key, row[key])
        assert f'href="{link.replace("&", "&amp;")}"' in page.text
        if row[key] or key == "sender":
            recipients = len(ids(browser.get(link).text))
            assert recipients >= row["recipients"], link
    assert f"{len(counted)} value" in page.visible_text


def test_csv_is_that_of_the_command(found: Found) -> None:
    _, typed, browser = found
    page = browser.get("/search.csv?sender=ann%40example.com&oldest=1")
    assert page.headers["content-type"].startswith("text/csv")
    assert page.headers["content-disposition"] == 'attachment; filename="mail.csv"'
    command = ("list", "--all", "--sender", "ann@example.com", "--format", "csv")
    assert page.text == typed(*command).stdout
    assert 'href="/search.csv?sender=ann%40example.com"' in (
        browser.get("/search?sender=ann%40example.com").text
    )
    assert browser.get("/search.csv?state=lost").status == 400


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("state=lost", "there is no state lost: choose one of queued, sending"),
        ("outcome=lost", "there is no outcome lost: choose one of delivered"),
        ("newer_than=soon", "Newer than: soon is not a duration: write 30s, 5m, 2h or 5d"),
        ("expires_within=x", "Expires within: x is not a duration"),
        ("received_from=noon", "noon is no time: write 2026-11-25"),
        ("count_by=size", "cannot count by size: choose one of reason, sender"),
        ("server=%3A", "bad QMQP server"),
        ("id=zz", "is not a queue id"),
    ],
)
def test_a_field_that_is_not_valid_is_named(found: Found, query: str, text: str) -> None:
    page = found[2].get(f"/search?{query}")
    assert (page.status, text in page.visible_text) == (200, True), page.visible_text


@pytest.mark.parametrize(
    ("command", "link"),
    [
        ("qmqp-relay show ff00", "/message/ff00"),
        ("qmqp-relay why ff00", "/message/ff00"),
        ("qmqp-relay list ff00 --columns recipient", "/search?id=ff00&oldest=1"),
        ("qmqp-relay list --state held --newest", "/search?state=held"),
        ("qmqp-relay list --all --sender '<>'", "/search?sender=%3C%3E"),
        ("qmqp-relay list --limit 10", "/search?unfinished=1&oldest=1"),
        ("qmqp-relay resume --route 'a b'", "/act/resume?route=a+b"),
        ("qmqp-relay probe '[::1]:628'", "/search?server=%5B%3A%3A1%5D%3A628&unfinished=1"),
        ("qmqp-relay check", ""),
        ("df -h /var", ""),
        ("qmqp-relay list --unknown x", ""),
    ],
)
def test_a_command_has_a_link(command: str, link: str) -> None:
    assert search.link_of(command) == link


def test_a_recorded_filter_has_a_link() -> None:
    shown = Filter(states=("held",), sender="a b@x", newer_than=60.0).shown()
    link = search.link_of_filter(f"{shown} --limit 5 --newest")
    assert link == "/search?state=held&sender=a+b%40x&newer_than=60s"
    for other in ("", "--role operator --sender *", "it's", "rebuilt"):
        assert search.link_of_filter(other) == "", other
