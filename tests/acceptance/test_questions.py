"""The twenty-four questions of docs/inspect.md, asked by command and by SQL where the answers are
known, on both databases."""

import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest

from commands.web.search import link_of
from relay.db.engine import reading
from relay.ids import dashed, new_id
from relay.queue.operations import OPERATIONS, QueueOperations
from relay.queue.outcome import Outcome
from relay.report.filters import Filter
from relay.spool.store import Spool
from relay.version import running_version
from tests.acceptance.console import Browser, browsing
from tests.integration.harness import QueueHarness, opened
from tests.integration.typed import Typed, lines, typed_at

PAGE = (Path(__file__).parents[2] / "docs" / "inspect.md").read_text()
SECTION = PAGE.split("\n## Questions\n")[1].split("\n## ")[0]
QUESTIONS = {
    int(number): (command, sql, link)
    for number, command, sql, link in re.findall(
        r"(?m)^(\d+)\\\. .*\n\n```sh\n(.*)\n```\n\n```sql\n((?:.*\n)+?)```\n\nPage: `(/.*)`$",
        SECTION,
    )
}
YESTERDAY = datetime.now(UTC) - timedelta(days=1)


@dataclass(slots=True)
class Night:
    """A queue on a bad night. `ids`: messages by name."""

    queue: QueueHarness
    typed: Typed
    browser: Browser
    ids: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> dict[str, str]:
        """The names of the messages by their ids."""
        return {queue_id: name for name, queue_id in self.ids.items()}

    def command(self, number: int) -> list[dict[str, Any]]:
        """What the command of a question prints."""
        command = self.ours(QUESTIONS[number][0]).replace(" --format csv", "")
        program, *arguments = shlex.split(command)
        assert program == "qmqp-relay"
        return lines(self.typed(*arguments, "--json", status=None))

    def sql(self, number: int) -> list[dict[str, Any]]:
        """What the statement of a question returns, for this database."""
        other = "-- SQLite" if self.queue.dialect.postgresql else "-- PostgreSQL"
        (statement,) = [s for s in QUESTIONS[number][1].split(";") if s.strip() and other not in s]
        with reading(self.queue.database) as connection:
            sql = self.ours(statement).replace("%", "%%")
            return [dict(row) for row in connection.exec_driver_sql(sql).mappings()]

    def ours(self, text: str) -> str:
        """A text of the page with the names of this night."""
        ours = {
            "you@example.org": "x@late.example",
            "019ab3f0-c1d2-7a31-b1f3-a44be53c7f10": dashed(self.ids["late"]),
            "2026-11-25": str(YESTERDAY.date()),
            "2026-11-26": str(YESTERDAY.date() + timedelta(days=1)),
        }
        examples = "|".join(map(re.escape, ours))
        return re.sub(examples, lambda match: ours[match[0]], text)

    def page(self, number: int) -> str:
        """What the page of a question shows; of a link with a mark, the part that has it."""
        path, _, mark = self.ours(QUESTIONS[number][2]).partition("#")
        page = self.browser.get(path)
        assert page.status == 200
        if not mark:
            return page.text
        part = re.search(rf'(?s)id="{mark}".*?(?=<h2|$)', page.text)
        assert part is not None, mark
        return part[0]

    def shown(self, number: int) -> set[str]:
        """The names of the messages that the page of a question lists."""
        ids = re.findall(r'<th scope="row"><a href="/message/([0-9a-f]{32})"', self.page(number))
        return {self.names[queue_id] for queue_id in ids}

    def found(self, rows: list[dict[str, Any]]) -> list[str]:
        """The names of the messages in these rows."""
        return [self.names[row["queue_id"]] for row in rows]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def night(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Night]:
    directory = tmp_path_factory.mktemp("night")
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
        queue, spool = stack.enter_context(opened(url, lease=3600.0)), Spool(directory / "spool")
        typed = typed_at(queue, spool, stack.enter_context(pytest.MonkeyPatch.context()))
        night = Night(queue, typed, stack.enter_context(browsing(queue)))
        fill(night)
        yield night


def fill(night: Night) -> None:
    """The mail of the night, and what workers and operators did."""
    queue, ids = night.queue, night.ids
    queue.rescuer.publish_routes(queue.worker, {"default": ["a:628", "b:628"], "bulk": ["c:628"]})
    old = f"{int(YESTERDAY.timestamp() * 1000):012x}{new_id()[12:]}"
    ids["csv"] = queue.accept("x@example.net", sender="shop@example.com", queue_id=old)
    queue.change(
        "UPDATE messages SET received_at = @ago(:age) WHERE id = @id(:id)",
        id=old,
        age=(datetime.now(UTC) - YESTERDAY).total_seconds(),  # midnight may have passed since
    )
    ids["late"] = queue.accept("x@late.example", sender="news@example.com")
    ids["twice"] = queue.accept("x@twice.example", header_message_id="<4711@app.example.com>")
    ids["bounced"] = queue.accept("x@gone.example")
    ids["client"] = queue.accept("x@client.example", client_address="198.51.100.7")
    for name, outcome, reply in (
        ("csv", Outcome.DELIVERED, "Ok"),
        ("late", Outcome.DEFERRED, "451 4.7.1 greylisted"),
        ("twice", Outcome.UNCERTAIN, "connection closed"),
        ("bounced", Outcome.REJECTED, "550 5.1.1 no such user"),
        ("client", Outcome.DELIVERED, "Ok"),
    ):
        queue.complete(queue.claim(ids[name])[0], outcome, reply=reply, delay=500.0)
    ids["sending"] = queue.accept("x@sending.example")
    queue.claim(ids["sending"])
    for number in (1, 2, 3):
        ids[f"bulk{number}"] = queue.accept("bulk:x@bulk.example")
    queue.pass_time(200, only=[ids[f"bulk{number}"] for number in (1, 2, 3)])
    queue.change("UPDATE deliveries SET expires_at = @later(86400)")
    queue.change(
        "UPDATE deliveries SET expires_at = @later(600) WHERE queue_id = @id(:id)", id=ids["late"]
    )
    queue.rescuer.publish_open_circuits(queue.worker, {"c:628": "connect: refused"})
    operations = QueueOperations(queue.database, sends_dsns=True)
    operations.pause("route:idle", actor="ann@host", reason="ticket 812")
    ids["dropped"] = queue.accept("x@dropped.example")
    operations.apply(OPERATIONS["drop"], Filter(id=ids["dropped"]), actor="bob@host", reason="spam")


def test_every_question_is_found_in_the_page() -> None:
    assert list(QUESTIONS) == list(range(1, 25))


@pytest.mark.parametrize(
    ("number", "names"),
    [
        (1, ["late"]),
        (9, ["twice", "late", "sending", "bulk1", "bulk2", "bulk3"]),
        (12, ["bounced"]),
        (14, ["late"]),
        (17, ["twice"]),
        (20, ["twice"]),
        (21, ["client"]),
        (22, ["csv"]),
    ],
)
def test_mail_is_found(night: Night, number: int, names: list[str]) -> None:
    assert set(night.found(night.command(number))) == set(names)
    assert set(night.found(night.sql(number))) == set(names)
    if number != 22:  # it is CSV
        assert night.shown(number) == set(names)


def test_one_message_is_explained(night: Night) -> None:
    (why,) = night.command(2)
    assert "a:628" not in why["why"], "the server of the attempt is named"
    assert "deferred it: 451 4.7.1 greylisted" in why["why"]
    (row,) = night.sql(2)
    assert (row["state"], row["last_outcome"], row["reason"], row["servers"]) == (
        "deferred",
        "deferred",
        "451 4.7.1 greylisted",
        "a:628, b:628",
    )
    (listed,), (row,) = night.command(3), night.sql(3)
    assert list(listed) == list(row) == ["recipient", "next_at", "paused_at", "expires_at"]
    assert str(listed["next_at"])[:19].replace("T", " ") == str(row["next_at"])[:19]
    assert row["paused_at"] is None
    (whole,), (attempt,) = night.command(4), night.sql(4)
    assert [tried["reply"] for tried in whole["attempts"]] == [attempt["reply"]] == ["its words"]
    assert attempt["seconds"] == pytest.approx(0.4, abs=0.01)
    words = "deferred it: 451 4.7.1 greylisted"
    assert words in night.page(2)
    assert re.search(r'data-label="Due">in \d', night.page(3))
    assert "its words" in night.page(4)


def test_worker_of_a_transfer_is_named(night: Night) -> None:
    (listed,), (row,) = night.command(5), night.sql(5)
    assert night.names[listed["queue_id"]] == night.names[row["queue_id"]] == "sending"
    assert listed["worker"].replace("-", "") == night.queue.worker
    assert (row["host"], row["pid"], row["servers"]) == ("host", 1, "a:628, b:628")
    assert night.shown(5) == {"sending"}
    assert f"worker <code>{night.queue.worker[-12:]}</code>" in night.page(5)


@pytest.mark.parametrize(
    ("number", "key", "counts"),
    [
        (
            6,
            "domain",
            {"bulk.example": 3, "late.example": 1, "twice.example": 1, "sending.example": 1},
        ),
        (7, "route", {"bulk": 3, "default": 2}),
        (8, "server", {"c:628": 3, "a:628": 2, "b:628": 2}),
        (13, "sender", {"news@example.com": 1, "a@example.com": 1}),
    ],
)
def test_waiting_mail_is_counted(
    night: Night, number: int, key: str, counts: dict[str, int]
) -> None:
    by_sql = {
        row[key]: row.get("deliveries", row.get("waiting", row.get("recipients")))
        for row in night.sql(number)
    }
    assert {row[key]: row["deliveries"] for row in night.command(number)} == counts
    assert by_sql == counts
    for value, count in counts.items():
        row = rf">{re.escape(value)}</a></th><td [^>]*>{count}</td>"
        assert re.search(row, re.sub(r"<wbr>|</?span[^>]*>", "", night.page(number))), value


def kind(rows: list[dict[str, Any]], wanted: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == wanted]


def test_flow_disk_and_versions_are_in_stats(night: Night) -> None:
    flow = kind(night.command(10), "flow")
    for row, by_sql, drain in zip(flow, night.sql(10), night.sql(19), strict=True):
        assert (row["received"], row["finished"]) == (by_sql["received"], by_sql["finished"])
        assert row["finished"] == 3
        assert row["waiting"] == drain["waiting"] == 5
        assert row["drain_seconds"] is drain["drain_seconds"] is None, "more came than went"
    assert QUESTIONS[19][0] == QUESTIONS[18][0] == QUESTIONS[23][0] == QUESTIONS[10][0]
    for number in (10, 19):
        shown = re.sub(r"<[^>]*>", " ", night.page(number))
        assert re.search(rf"hour +{flow[-1]['received']} +3 +5 +never at this rate", shown)
    assert "Unfinished mail takes 600." in night.page(18)
    assert "are free for bodies" in night.page(18)
    assert re.search(rf">{re.escape(running_version())}</th>.*>2</td>", night.page(23))
    (disk,), (row,) = kind(night.command(18), "disk"), night.sql(18)
    assert disk["free_bytes"] > 0
    assert row["bytes"] == 600
    (version,) = kind(night.command(23), "version")
    assert (version["version"], version["delivered"], version["rejected"]) == (
        running_version(),
        2,
        1,
    )
    outcomes = {(row["version"], row["outcome"]): row["attempts"] for row in night.sql(23)}
    assert outcomes == {
        (running_version(), outcome): count
        for outcome, count in {"delivered": 2, "deferred": 1, "rejected": 1, "uncertain": 1}.items()
    }


def test_failing_server_and_stuck_mail_are_problems(night: Night) -> None:
    assert QUESTIONS[11][0] == QUESTIONS[24][0]
    (problem,) = kind(night.command(11), "server_down")
    (row,) = night.sql(11)
    assert problem["subject"] == row["server"] == "c:628"
    assert problem["count"] == row["waiting"] == 3
    assert str(problem["since"])[:19].replace("T", " ") == str(row["failed_at"])[:19]
    assert row["circuit_open_reason"] in problem["text"]
    servers = re.sub(r"<[^>]*>", "", night.page(11))
    assert re.search(r"c:628failing for [\w ]+: circuit open: connect: refused3", servers)
    assert "c:628" in night.page(24).replace("<wbr>", "").replace('<span class="joined">', "")
    assert "problems</h1>" in night.page(24)
    assert [(row["state"], row["route"], int(row["overdue"])) for row in night.sql(24)] == [
        ("queued", "bulk", 3)
    ]


def test_pauses_and_operations_name_their_operators(night: Night) -> None:
    (pause,), (row,) = kind(night.command(15), "pause"), night.sql(15)
    for name in ("subject", "actor", "reason", "deliveries"):
        assert pause[name] == row[name]
    assert (row["subject"], row["actor"], row["reason"]) == ("route:idle", "ann@host", "ticket 812")
    by_sql = [(row["actor"], row["operation"], row["changed"]) for row in night.sql(16)]
    assert by_sql == [("bob@host", "drop", 1), ("ann@host", "pause route:idle", 1)]
    shown = [(row["actor"], row["operation"], row["changed"]) for row in night.command(16)]
    assert shown == by_sql
    paused, did = (re.sub(r"<[^>]*>", "", night.page(number)) for number in (15, 16))
    for text in ("route:idle", "by ann@host: ticket 812"):
        assert text in paused
    for text in ("bob@host", "drop", "ann@host", "ticket 812"):
        assert text in did


def test_mail_of_a_day_is_csv(night: Night) -> None:
    command = night.ours(QUESTIONS[22][0])
    header, row = night.typed(*shlex.split(command)[1:]).stdout.splitlines()
    assert header.split(",")[:3] == ["queue_id", "queue_uuid", "position"]
    assert row.split(",")[0] == night.ids["csv"]
    assert night.page(22) == f"{header}\n{row}\n"


@pytest.mark.parametrize(
    "number", [number for number in QUESTIONS if QUESTIONS[number][0].startswith("qmqp-relay list")]
)
def test_link_of_a_list_is_that_of_its_command(number: int) -> None:
    command, _, link = QUESTIONS[number]
    if number in (3, 22):
        return  # one message has a page, and CSV an address of its own
    assert dict(parse_qsl(link.partition("?")[2])).items() <= dict(
        parse_qsl(link_of(command).partition("?")[2])
    ).items() | {("unfinished", "1"), ("header_message_id", "4711@app.example.com")}
