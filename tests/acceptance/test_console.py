"""One scenario of some fifty messages in all states: SQL, command line, pages and metrics show the
same numbers."""

import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import quote

import pytest
from prometheus_client import CollectorRegistry

from relay.db.engine import reading
from relay.ids import dashed
from relay.metrics import QueueMetrics as Collected
from relay.queue.states import UNFINISHED, State
from relay.spool.store import Spool
from tests.acceptance.console import (
    HOSTILE,
    LONG,
    SERVER,
    TURNED,
    Browser,
    Scenario,
    browsing,
    questions,
    scenario,
)
from tests.integration.harness import QueueHarness, opened
from tests.integration.typed import Typed, lines, typed_at


@dataclass(slots=True)
class Console:
    """The scenario, and every interface that shows it."""

    queue: QueueHarness
    spool: Spool
    typed: Typed
    browser: Browser
    scenario: Scenario


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def console(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Console]:
    """One scenario for the module: no test changes rows that another test reads."""
    directory = tmp_path_factory.mktemp("console")
    with ExitStack() as stack:
        if request.param == "sqlite":
            for file in request.getfixturevalue("sqlite_template").iterdir():
                shutil.copy(file, directory)
            url = f"sqlite:///{directory}/relay.db"
        else:
            databases = request.getfixturevalue("postgres_databases")
            name = databases.create()
            stack.callback(databases.drop, name)
            url = databases.url(name)
        queue, spool = stack.enter_context(opened(url)), Spool(directory / "spool")
        typed = typed_at(queue, spool, stack.enter_context(pytest.MonkeyPatch.context()))
        created = scenario(queue, spool)
        yield Console(queue, spool, typed, stack.enter_context(browsing(queue)), created)


def test_every_interface_shows_the_same_numbers(console: Console) -> None:
    created, wanted = console.scenario, console.scenario.recipients
    assert set(wanted) == set(State) - {"split"}
    assert 45 <= sum(map(len, created.ids.values())) <= 60

    by_sql = console.queue.rows("SELECT state, count(*) AS n FROM mail_history GROUP BY state")
    assert {row["state"]: row["n"] for row in by_sql} == wanted
    unfinished = {state: count for state, count in wanted.items() if state in UNFINISHED}
    by_sql = console.queue.rows("SELECT state, count(*) AS n FROM mail_queue GROUP BY state")
    assert {row["state"]: row["n"] for row in by_sql} == unfinished

    assert (
        Counter(row["state"] for row in lines(console.typed("list", "--all", "--json"))) == wanted
    )
    assert Counter(row["state"] for row in lines(console.typed("list", "--json"))) == unfinished
    for state, ids in created.ids.items():
        assert {
            row["queue_id"] for row in lines(console.typed("list", "--state", state, "--json"))
        } == set(ids)

    deliveries = Counter(
        {
            row["state"]: row["n"]
            for row in console.queue.rows(
                "SELECT state, count(*) AS n FROM deliveries GROUP BY state"
            )
        }
    )
    stats = lines(console.typed("stats", "--json"))
    counts: Counter[str] = Counter()
    for row in stats:
        counts[row.get("state", "")] += row["deliveries"] if row["kind"] == "queue" else 0
    assert +counts == deliveries
    assert sum(row["waiting"] for row in stats if row["kind"] == "age") == sum(unfinished.values())
    assert sum(row["under_5m"] for row in stats if row["kind"] == "age") == sum(unfinished.values())
    (tries,) = console.queue.rows("SELECT count(*) AS n FROM attempts")
    assert sum(row["last_minute"] for row in stats if row["kind"] == "rate") == tries["n"]
    assert [row["sending"] for row in stats if row["kind"] == "worker"] == [wanted["sending"]]

    overview = console.browser.get("/").text
    tiles = re.findall(r"<b>(\d+)</b> <span class=\"state (\w+)\">", overview)
    assert {state: int(count) for count, state in tiles} == deliveries
    health = {
        row["server"]: row["attempts"] for row in console.queue.rows("SELECT * FROM server_health")
    }
    assert {row["server"]: row["attempts"] for row in stats if row["kind"] == "server"} == health
    servers = re.findall(r'class="server">(.*?)</th>.*"Tries">(\d+)</td>', overview)
    assert {re.sub("<[^>]*>", "", server): int(attempts) for server, attempts in servers} == health
    for state, count in wanted.items():
        assert len(ids_on(console.browser, f"/search?state={state}")) == count

    registry = CollectorRegistry()
    registry.register(Collected(console.queue.database, console.spool))
    by_state = {s: registry.get_sample_value("relay_deliveries", {"state": s}) for s in UNFINISHED}
    assert by_state == {state: deliveries[state] for state in UNFINISHED}
    assert registry.get_sample_value("relay_dsns_pending") == created.dsns_pending
    assert registry.get_sample_value("relay_workers_alive") == 1
    assert registry.get_sample_value("relay_uncertain_attempts") == len(created.possibly_delivered)


def test_every_interface_shows_the_same_ages_and_delays(console: Console) -> None:
    created, dialect = console.scenario, console.queue.dialect
    messages = console.queue.rows(
        "SELECT @hex(id) AS id, @when(received_at) AS received_at FROM messages"
    )
    received = {row["id"]: row["received_at"] for row in messages}
    oldest = {state: min(received[i] for i in created.ids[state]) for state in UNFINISHED}

    def ages() -> dict[str, float]:
        sql = "SELECT @since(min(received_at)) AS age FROM messages WHERE @when(received_at) = :at"
        return {state: console.queue.rows(sql, at=at)[0]["age"] for state, at in oldest.items()}

    before = ages()
    stats = [row for row in lines(console.typed("stats", "--json")) if row["kind"] == "queue"]
    overview = console.browser.get("/").visible_text
    registry = CollectorRegistry()
    registry.register(Collected(console.queue.database, console.spool))
    by_metric = {
        s: registry.get_sample_value("relay_oldest_age_seconds", {"state": s}) for s in UNFINISHED
    }
    late = {s: registry.get_sample_value("relay_overdue", {"state": s}) for s in UNFINISHED}
    after = ages()

    by_sql = console.queue.rows(
        "SELECT state, min(oldest_at) AS at FROM queue_summary GROUP BY state"
    )
    assert {row["state"]: row["at"] for row in by_sql if row["at"]} == oldest
    for state in UNFINISHED:
        age = max(row["oldest_seconds"] for row in stats if row["state"] == state)
        assert before[state] <= age <= after[state]
        assert before[state] <= (by_metric[state] or 0) <= after[state]
    by_state: Counter[str] = Counter()
    for row in stats:
        by_state[row["state"]] += row["overdue"]
    assert +by_state == created.overdue
    assert {state: count for state, count in late.items() if count} == created.overdue
    assert f" {created.overdue.total()} deliveries are overdue." in overview
    assert dialect.postgresql or all("." in at for at in oldest.values())


def test_the_twenty_further_questions_are_answered(console: Console) -> None:
    """The further questions are those of docs/inspect.md; the scenario has the answers."""
    created, recipients = console.scenario, console.scenario.recipients
    ids = {state: set(some) for state, some in created.ids.items()}
    unfinished = sorted(i for state in UNFINISHED for i in created.ids[state])
    named = {
        "you@example.org": "many2@example.org",
        "news@example.com": "sender1@example.com",
        "<4711@app.example.com>": "<7@example.com>",
        "019ab3f0-c1d2-7a31-b1f3-a44be53c7f10": dashed(created.possibly_delivered[0]),
    }

    def ask(query: str) -> list[tuple[Any, ...]]:
        for example, ours in named.items():
            query = query.replace(example, ours)
        with reading(console.queue.database) as connection:
            return [
                tuple(row) for row in connection.exec_driver_sql(query.replace("%", "%%")).all()
            ]

    asked = questions("postgresql" if console.queue.dialect.postgresql else "sqlite")
    answers: dict[int, Any] = {
        n: [ask(query) for query in queries] for n, queries in enumerate(asked, 1)
    }
    (_, warned, withheld), (_, touched, paused) = answers[19], answers[20]
    assert withheld == []
    answers = {n: some[0] for n, some in answers.items()}
    assert len(answers) == 20

    deliveries, overdue, waiting = Counter[str](), Counter[str](), Counter[str]()
    for state, _route, count, _bytes, _oldest, late in answers[1]:
        deliveries[state] += count
        overdue[state] += late
    assert {s: deliveries[s] for s in ids if s != "delivered"} == {
        s: len(i) for s, i in ids.items() if s != "delivered"
    }
    assert (deliveries["split"], +overdue) == (1, created.overdue)
    for state, _outcome, _reason, count, _oldest in answers[2]:
        waiting[state] += count
    assert waiting == {state: recipients[state] for state in UNFINISHED}
    assert [(row[0] in ids["queued"], row[1]) for row in answers[3]] == [(True, "queued")]
    assert [row[:2] for row in answers[4]] == [("delivered", 1)]
    assert [row[1:3] for row in answers[5]] == [("r7@d1.example.org", "delivered")]
    assert [row[5] for row in answers[6]] == ["uncertain"]
    assert sum(row[1] for row in answers[7]) == sum(waiting.values())
    assert {"d0.example.org", "d1.example.org", "d2.example.org"} <= {row[0] for row in answers[7]}
    assert (answers[8][0][0], len(answers[8])) == (unfinished[0], 10)
    assert {row[1] for row in answers[9]} == ids["deferred"]
    assert {row[1] for row in answers[9][:2]} == set(created.ids["deferred"][:2])
    assert {(row[0], row[3]) for row in answers[10]} == {(i, "host") for i in ids["sending"]}
    assert {row[0] for row in answers[11]} == ids["held"]
    assert [(HOSTILE in row[1], row[2]) for row in answers[12]] == [(True, recipients["bounced"])]
    assert {row[0] for row in answers[13]} == set(created.possibly_delivered)
    (tries,) = console.queue.rows("SELECT count(*) AS n FROM attempts")
    assert [(row[0], row[1], row[6]) for row in answers[14]] == [
        (SERVER, tries["n"], len(created.possibly_delivered))
    ]
    ((server, mean, longest),) = answers[15]
    assert (server, *(round(seconds(some), 1) for some in (mean, longest))) == (SERVER, 0.4, 0.4)
    ((longest, mean),) = answers[16]
    assert seconds(longest) >= seconds(mean) >= 0
    assert sum(row[1] for row in answers[17]) == sum(map(len, ids.values()))
    assert {row[1] for row in answers[18]} <= ids["queued"] | ids["deferred"]
    assert [row[0] for row in answers[18]] == sorted(row[0] for row in answers[18])
    assert len(answers[19]) == created.dsns
    assert {row[0] for row in answers[19]} <= ids["bounced"] | ids["expired"]
    assert {row[1] for row in answers[19]} <= ids["queued"]
    assert Counter(row[2] for row in answers[20]) == created.actions
    assert (warned, touched, paused) == ([], [], []), "no operation changed it"


def seconds(length: float | timedelta) -> float:
    """A length of time, however the database gives it."""
    return length.total_seconds() if isinstance(length, timedelta) else float(length)


def ids_on(browser: Browser, path: str) -> list[str]:
    """The ids on a page and on the pages with older mail."""
    page = browser.get(path)
    assert page.status == 200
    ids = re.findall(r'href="/message/([0-9a-f]{32})"', page.text)
    older = re.search(r'href="(/search\?[^"]*)" rel="next"', page.text)
    return ids + (ids_on(browser, older[1].replace("&amp;", "&")) if older else [])


def test_why_explains_every_state(console: Console) -> None:
    created = console.scenario
    sentences_of = {
        state: [line for i in ids for line in console.typed("why", i).stdout.splitlines()]
        for state, ids in console.scenario.ids.items()
    }
    patterns = {
        "queued": (
            r"queued(: a worker claims it when a hint arrives|, and overdue for [\w ]+: 1 worker"
            r" is busy)"
        ),
        "sending": r"being sent by worker \w{12} \(host 1\)",
        "held": (
            r"held (by .*here|because it cannot be sent: no body).* It stays until an operator"
            r" releases, bounces or drops it"
        ),
        "delivered": r"delivered [\w ]+ ago to qmqp\.example\.net:628 \(try 1\): its words",
        "dropped": r"dropped by .*here: .*, [\w ]+ ago; no DSN is sent",
        "deferred": (
            r"deferred(, and overdue for .*| until [-:0-9 ]+Z \(in .*\)), because .* \(try 1\)\."
            r" If it still fails after [-:0-9 ]+Z it expires, (and the sender is"
            r" told|without a DSN)"
        ),
        "expired": (
            r"expired [\w ]+ ago, because qmqp\.example\.net:628 deferred it: 451 still busy; (its"
            r" DSN|the send)"
        ),
        "bounced": (
            r"bounced [\w ]+ ago, because qmqp\.example\.net:628 rejected it: 550 5\.1\.1 .*; (its"
            r" DSN|the sender)"
        ),
    }
    for state, sentences in sentences_of.items():
        for sentence in sentences:
            assert re.search(f": ({patterns[state]}).*\\.$", sentence), sentence
    assert (
        sum(
            "has been pending for" in sentence
            for sentence in sentences_of["bounced"] + sentences_of["expired"]
        )
        == console.scenario.dsns_pending
    )
    assert sum("it is unknown whether" in sentence for sentence in sentences_of["deferred"]) == len(
        console.scenario.possibly_delivered
    )
    assert (
        sum(
            "the sender is told by" in sentence
            for sentence in sentences_of["bounced"] + sentences_of["expired"]
        )
        == created.dsns
    )


def test_show(console: Console) -> None:
    uncertain = next(
        i
        for i in console.scenario.ids["deferred"]
        if "it is unknown" in console.typed("why", i).stdout
    )
    shown = console.typed("show", uncertain[-12:]).stdout
    (header_id,) = console.queue.rows(
        "SELECT header_message_id AS h FROM messages WHERE id = @id(:id)", id=uncertain
    )
    duplicate = (
        f" duplicate: possibly delivered to qmqp.example.net:628: search there for {uncertain} or"
        f" {header_id['h']}\n"
    )
    for expected in (uncertain, duplicate, "100 bytes", "192.0.2.1 (client.example.com) by ESMTP"):
        assert expected in shown
    (whole,) = lines(console.typed("show", uncertain, "--json"))
    assert (whole["file_size"], whole["spool_mounted"]) == (100, True)
    assert [(row["outcome"], row["bytes_sent"]) for row in whole["attempts"]] == [("uncertain", 90)]
    sending = console.scenario.ids["sending"][0]
    assert f"by worker {console.queue.worker[-12:]}" in console.typed("show", sending).stdout
    for state, ids in console.scenario.ids.items():
        assert state in console.typed("show", ids[0]).stdout


def test_the_stored_message(console: Console) -> None:
    queue_id = console.scenario.ids["queued"][-1]
    assert console.typed("headers", queue_id).stdout == "Subject: x\n"
    assert console.typed("body", queue_id).stdout_bytes == b"Subject: x\n\n" + b"x" * 88
    console.spool.remove(queue_id)
    assert "its deliveries are queued" in console.typed("headers", queue_id, status=1).stderr


def test_pages(console: Console) -> None:
    browser, created = console.browser, console.scenario
    for state, ids in created.ids.items():
        page = browser.get(f"/message/{ids[0]}")
        assert page.status == 200
        assert ids[0] in page.visible_text
        assert state in page.visible_text
        assert "accepted from" in page.visible_text
    uncertain = created.ids["queued"][0]
    assert "DSN of" in browser.get(f"/message/{uncertain}").visible_text
    for path, expected in {
        f"/search?id={created.ids['held'][0][-12:]}": "1",
        "/search?sender=unknown@example.com": "No mail matches",
        "/search?id=zz": "is not a queue id",
        "/search?state=lost": "there is no state",
        "/search?after=x.y": "",
        f"/search?id={dashed(created.ids['sending'][0])}": "sending",
        "/search?sender=%3C%3E": "queued",
        "/search?reply=greylisted": "451 4.7.1",
        "/search?header_message_id=7@example.com": "sender7@example.com",
        "/search?recipient=many2@*": "many2@example.org",
    }.items():
        page = browser.get(path)
        assert page.status == 200, path
        assert expected in page.visible_text, path
    assert browser.get(f"/message/{'f' * 32}").status == 404
    assert "no message has an id" in browser.get(f"/message/{'f' * 32}").visible_text
    assert browser.get("/message/..%2F..%2Fetc").status == 404
    assert browser.get("/nothing").status == 404


def test_pages_with_older_mail_continue_by_key(
    console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("commands.web.pages.PAGE_ROWS", 7)
    ids = ids_on(console.browser, "/search")
    assert len(ids) == sum(console.scenario.recipients.values())
    assert ids == sorted(ids, reverse=True)
    twice = {i for i, count in Counter(ids).items() if count > 1}
    assert len(twice) == 2, "two messages have more than one recipient"
    monkeypatch.setattr("relay.report.queries.SCAN_LIMIT", 5)
    assert ids_on(console.browser, "/search") == ids
    oldest = "/search?reply=busy"  # no newer mail has this text
    assert "No mail received since" in console.browser.get(oldest).visible_text
    assert set(ids_on(console.browser, oldest)) == set(console.scenario.ids["expired"])


def test_text_of_peers_is_escaped(console: Console) -> None:
    paths = [
        "/",
        "/search",
        f"/search?reply={quote(HOSTILE)}",
        f"/search?sender={quote(HOSTILE)}",
        f"/{quote(HOSTILE)}",
    ]
    paths += [
        f"/search?id={quote(HOSTILE)}",
        f"/search?state={quote(HOSTILE)}",
        f"/message/{quote(HOSTILE, safe='')}",
    ]
    paths += [f"/message/{ids[n]}" for ids in console.scenario.ids.values() for n in (0, -1)]
    seen = 0
    for path in paths:
        text = console.browser.get(path).text
        assert text.count("<script") == text.count('<script src="/live.js" defer>') == 1, path
        assert TURNED[0] not in text, path
        assert "{{" not in text.replace(HOSTILE[-7:], ""), path
        assert not re.search(r"<[^>]*\b(on\w+|style)=", text), path
        seen += "alert(" in text
    assert seen >= 8
    assert (
        r"no body file \xe2\x80\xaegpj.exe"
        in console.browser.get(f"/message/{console.scenario.ids['held'][0]}").text
    )
    assert f'title="{LONG}"' in console.browser.get(f"/search?recipient={LONG}").text


def test_a_page_is_served_only_under_a_name_of_this_machine(console: Console) -> None:
    browser = console.browser
    page = browser.get("/")
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'self';")
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert "server" not in page.headers
    assert not re.search(r"(src|href)=\"(https?:)?//", page.text), "nothing comes from elsewhere"
    assert browser.get("/style.css").headers["content-type"].startswith("text/css")
    assert browser.get("/", Host="evil.example").status == 421
    assert (
        browser.get("/", Host="localhost:8025").status
        == browser.get("/", Host="[::1]").status
        == 200
    )
    for method in ("POST", "PUT", "DELETE"):
        assert browser.get("/search", method).status == 405


def test_an_empty_relay_and_one_without_database(
    database_url: str, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(database_url) as queue:
        typed_at(queue, spool, monkeypatch)
        queue.worker_queue.retire(queue.worker)
        with browsing(queue) as browser:
            overview = browser.get("/").visible_text
            for expected in (
                "No mail waits",
                "No mail was received yet",
                "No worker is alive",
                "No server was tried",
            ):
                assert expected in overview
            assert "No mail matches" in browser.get("/search").visible_text
            queue.change("ALTER TABLE messages RENAME TO elsewhere")
            page = browser.get("/search")
            assert (page.status, "does not answer" in page.visible_text) == (503, True)
            assert "messages" not in page.text, "what the database said is for the log"
