"""Operators act on the page: previews, operations, and their record, as by the command."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from relay import passwords
from relay.queue.outcome import Outcome
from relay.queue.states import State
from relay.spool.store import Spool
from relay.users import Role, Users
from tests.acceptance.console import HOSTILE, Browser, browsing, hidden
from tests.integration.harness import BODY, QueueHarness, opened
from tests.integration.typed import Typed, lines, typed_at

PASSWORD = "correct horse"
HASH = passwords.hash_new(PASSWORD)


class Desk:
    """A queue, the command line, and an operator who has logged in to the page."""

    def __init__(self, queue: QueueHarness, spool: Spool, typed: Typed, browser: Browser) -> None:
        self.queue, self.spool, self.typed, self.browser = queue, spool, typed, browser

    def accept(self, *addresses: str, outcome: Outcome | None = None, **more: Any) -> str:
        """Accept a message with a body; with an outcome it was tried once."""
        queue_id = self.queue.accept(*addresses, size=len(BODY), **more)
        self.spool.store(queue_id, [BODY])
        if outcome is not None:
            self.queue.complete(self.queue.claim(queue_id)[0], outcome)
        return queue_id

    def actions(self) -> list[dict[str, Any]]:
        """What the command `actions` shows of the operations on mail, the newest first."""
        rows = lines(self.typed("actions", "--json", status=None))
        return [row for row in rows if not row["operation"].startswith("user ")]


@pytest.fixture
def desk(clean_url: str, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.setattr("socket.gethostname", lambda: "mx-1")
    with opened(clean_url) as queue:
        typed = typed_at(queue, spool, monkeypatch)
        Users(queue.database).add("ann", HASH, role=Role.OPERATOR, actor="me@here")
        with browsing(queue) as browser:
            assert browser.log_in("ann", PASSWORD, "/search").status == 200
            yield Desk(queue, spool, typed, browser)


@pytest.mark.parametrize(
    ("name", "outcome", "before", "after", "reply"),
    [
        ("retry", Outcome.DEFERRED, "deferred", State.QUEUED, None),
        ("hold", Outcome.DEFERRED, "deferred", State.HELD, "held by web:ann@mx-1: ticket 7"),
        ("release", Outcome.UNSENDABLE, "held", State.QUEUED, None),
        ("bounce", Outcome.DEFERRED, "deferred", State.BOUNCED, "bounced by an operator: ticket 7"),
        ("drop", Outcome.DEFERRED, "deferred", State.DROPPED, "dropped by web:ann@mx-1: ticket 7"),
    ],
)
def test_an_operation_on_a_message(
    desk: Desk, name: str, outcome: Outcome, before: str, after: State, reply: str | None
) -> None:
    queue_id, other = desk.accept(outcome=outcome), desk.accept(outcome=outcome)
    link = f"/act/{name}?id={queue_id}"
    assert f'href="{link}"' in desk.browser.get(f"/message/{queue_id}").text
    preview = desk.browser.get(link)
    assert f"{name.capitalize()} 1 delivery" in preview.visible_text
    assert f"1 delivery (1 {before})" in preview.visible_text
    assert f"--id {queue_id}" in preview.visible_text
    assert queue_id[-12:] in preview.visible_text
    assert desk.actions() == [], "a preview changes nothing"
    done = desk.browser.act(link, reason=" ticket 7 ")
    assert f"{name}: 1 delivery (1 {before})" in done.visible_text
    assert desk.queue.states_of([queue_id, other]) == [after, before]
    [action] = desk.actions()
    assert (action["actor"], action["operation"], action["reason"], action["changed"]) == (
        "web:ann@mx-1",
        name,
        "ticket 7",
        1,
    )
    assert action["filter"] == f"--id {queue_id} --limit 1"
    if reply is not None:
        assert desk.queue.delivery(queue_id)["last_reply"] == reply
    assert "web:ann@mx-1" in desk.browser.get("/operators").visible_text
    assert f'href="/search?id={queue_id}"' in desk.browser.get("/operators").text
    assert desk.spool.path(other).exists()
    assert desk.spool.path(queue_id).exists() is (after is not State.DROPPED)
    assert ("bodies removed: 1" in done.visible_text) is (after is State.DROPPED)


def test_an_operation_on_the_result_of_a_search(desk: Desk) -> None:
    mine = [desk.accept("x@a.example", outcome=Outcome.DEFERRED) for _ in range(3)]
    queued = desk.accept("x@a.example")
    other = desk.accept("x@b.example", outcome=Outcome.DEFERRED)
    page = desk.browser.get("/search?domain=a.example&newer_than=1h&oldest=1")
    link = "/act/hold?domain=a.example&newer_than=1h"
    assert f'href="{link.replace("&", "&amp;")}"' in page.text
    preview = desk.browser.get(link)
    assert "Hold 4 deliveries" in preview.visible_text
    assert "4 deliveries (3 deferred, 1 queued)" in preview.visible_text
    done = desk.browser.act(link, reason="x")
    assert "hold: 4 deliveries (3 deferred, 1 queued)" in done.visible_text
    assert desk.queue.states_of([*mine, queued, other]) == [State.HELD] * 4 + [State.DEFERRED]
    assert desk.actions()[0]["filter"] == "--newer-than 3600s --domain a.example --limit 4"


def test_no_more_is_changed_than_the_preview_has_counted(desk: Desk) -> None:
    ids = [desk.accept() for _ in range(2)]
    preview = desk.browser.get("/act/hold?state=queued")
    late = desk.accept()
    form = {"state": "queued", "token": hidden(preview, "token"), "reason": "x"}
    desk.browser.post("/act/hold", **form, expected=hidden(preview, "expected"))
    assert desk.queue.states_of([*ids, late]) == [State.HELD, State.HELD, State.QUEUED]


@pytest.mark.parametrize("expected", ["", "0", "-1", "x", "\xb2", "9" * 30])
def test_a_form_without_its_count_changes_nothing(desk: Desk, expected: str) -> None:
    queue_id = desk.accept()
    preview = desk.browser.get("/act/hold?state=queued")
    token = hidden(preview, "token")
    page = desk.browser.post(
        "/act/hold", state="queued", token=token, reason="x", expected=expected
    )
    assert (page.status, "how many deliveries it means" in page.visible_text) == (400, True)
    assert desk.queue.state(queue_id) == State.QUEUED


def test_an_operation_needs_a_reason(desk: Desk) -> None:
    queue_id = desk.accept()
    for reason in ("", "  "):
        page = desk.browser.act(f"/act/drop?id={queue_id}", reason=reason)
        assert (page.status, "write a reason" in page.visible_text) == (400, True)
        assert "Drop 1 delivery" in page.visible_text, "the form is shown again"
    assert desk.queue.state(queue_id) == State.QUEUED
    page = desk.browser.act("/act/pause?route=default", reason="")
    assert (page.status, "write a reason" in page.visible_text) == (400, True)


def test_without_a_filter_everything_must_be_meant(desk: Desk) -> None:
    ids = [desk.accept() for _ in range(2)]
    assert "this means every delivery" in desk.browser.get("/act/hold").visible_text
    page = desk.browser.act("/act/hold", reason="x")
    assert (page.status, "confirm that you mean every" in page.visible_text) == (400, True)
    assert desk.queue.states_of(ids) == [State.QUEUED] * 2
    assert desk.browser.act("/act/hold", reason="x", everything="1").status == 200
    assert desk.queue.states_of(ids) == [State.HELD] * 2


def test_what_an_operation_cannot_do_is_said(desk: Desk) -> None:
    queue_id = desk.accept()
    page = desk.browser.get(f"/act/release?id={queue_id}")
    assert "Nothing to release: it applies to held deliveries" in page.visible_text
    assert 'action="/act/' not in page.text
    for path, text in {
        "/act/hold?id=zz": "is not a queue id",
        "/act/hold?state=lost": "there is no state lost: choose one of queued",
        "/act/hold?newer_than=x": "Newer than: x is not a duration: write 30s",
        "/act/pause": "name one",
        "/act/pause?route=a&server=b": "name one",
        "/act/pause?server=:": "bad QMQP server",
    }.items():
        page = desk.browser.get(path)
        assert (page.status, text in page.visible_text) == (400, True), path
    assert desk.browser.get("/act/reroute?state=held").status == 404
    assert desk.actions() == []


def test_a_delivery_that_is_being_sent_is_changed_after_its_attempt(desk: Desk) -> None:
    queue_id = desk.accept()
    [claim] = desk.queue.claim(queue_id)
    done = desk.browser.act(f"/act/hold?id={queue_id}", reason="x")
    assert "1 being sent: hold follows after this attempt" in done.visible_text
    desk.queue.complete(claim, Outcome.DEFERRED)
    assert desk.queue.state(queue_id) == State.HELD


def test_routes_and_servers_are_paused_and_resumed(desk: Desk) -> None:
    server = "192.0.2.1:628"
    desk.queue.rescuer.publish_routes(desk.queue.worker, {"default": [server]})
    desk.accept()
    overview = desk.browser.get("/")
    for link in ("/act/pause?route=default", "/act/pause?server=192.0.2.1%3A628"):
        assert f'href="{link}"' in overview.text
    assert (
        "Waiting for it: 1 delivery."
        in desk.browser.get(f"/act/pause?server={server}").visible_text
    )
    for kind, name in (("route", "default"), ("server", server)):
        done = desk.browser.act(f"/act/pause?{kind}={name}", reason="ticket 8")
        assert f"{kind}:{name} paused" in done.visible_text
        shown = desk.browser.get("/").visible_text
        assert re.search(rf"{kind}:{re.escape(name)} for \d+s", shown), "it is shown at once"
        again = desk.browser.act(f"/act/pause?{kind}={name}", reason="ticket 9")
        assert f"{kind}:{name} is already paused" in again.visible_text
        preview = desk.browser.get(f"/act/resume?{kind}={name}")
        assert "web:ann@mx-1 paused it: ticket 8" in preview.visible_text
        done = desk.browser.act(f"/act/resume?{kind}={name}", reason="done")
        assert f"{kind}:{name} resumed" in done.visible_text
    assert [(row["operation"], row["reason"]) for row in reversed(desk.actions())] == [
        ("pause route:default", "ticket 8"),
        ("resume route:default", "done"),
        (f"pause server:{server}", "ticket 8"),
        (f"resume server:{server}", "done"),
    ]


def test_a_header_is_shown_as_text(desk: Desk) -> None:
    queue_id = desk.queue.accept(size=400)
    header = f"Subject: {HOSTILE}\nX-Bytes: \xff\u202e\nX-Folded: a\n\tb\n".encode(
        "latin-1", "ignore"
    )
    body = header + b"\nsecret of the body\n"
    desk.queue.change("UPDATE messages SET size = :n WHERE id = @id(:id)", id=queue_id, n=len(body))
    desk.spool.store(queue_id, [body])
    page = desk.browser.get(f"/message/{queue_id}/header")
    assert page.status == 200
    assert HOSTILE in page.visible_text.replace(" ", "") or "alert('x')" in page.visible_text
    assert "<script>" not in page.text
    assert "X-Bytes: \\xff" in page.visible_text
    assert "secret" not in page.text
    desk.spool.remove(queue_id)
    page = desk.browser.get(f"/message/{queue_id}/header")
    assert (page.status, "has this message no longer" in page.visible_text) == (404, True)
    assert desk.browser.get("/message/ffff/header").status == 404


def test_a_long_header_is_cut_short(desk: Desk) -> None:
    body = b"X: " + b"y" * 900 + b"\n"
    body = body * 80 + b"\nbody\n"
    queue_id = desk.queue.accept(size=len(body))
    desk.spool.store(queue_id, [body])
    page = desk.browser.get(f"/message/{queue_id}/header")
    assert "The rest of the header is not shown" in page.visible_text
    assert len(page.text) < 80_000
