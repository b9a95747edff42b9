"""Every filter means the same on both databases, for the list and for operations, and in the
audit."""

import csv
import io
import itertools
import re
from datetime import UTC, datetime, timedelta

import pytest
from typer.testing import CliRunner

from commands.cli.main import app_for
from relay.ids import new_id
from relay.queue.outcome import Outcome
from relay.report.filters import Filter
from relay.report.masking import masked
from relay.report.queries import QueueReader
from relay.spool.store import Spool
from tests.integration.harness import QueueHarness
from tests.integration.typed import Typed, lines, typed_at

HOUR = 3600.0


@pytest.fixture
def typed(queue: QueueHarness, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> Typed:
    return typed_at(queue, spool, monkeypatch)


def id_of(age: float) -> str:
    """The id of a message that was received so many seconds ago."""
    moment = datetime.now(UTC) - timedelta(seconds=age)
    return f"{int(moment.timestamp() * 1000):012x}{new_id()[12:]}"


@pytest.fixture
def mail(queue: QueueHarness) -> dict[str, str]:
    """Messages that differ in what filters look at."""
    ids = {
        "old": queue.accept("a@one.example", queue_id=id_of(30 * HOUR), auth_user="app"),
        "new": queue.accept("b@Two.Example", client_address="2001:db8::1"),
        "tried": queue.accept("c@sub.two.example", queue_id=id_of(2 * HOUR)),
        "unsure": queue.accept("d@one.example", queue_id=id_of(3 * HOUR), auth_user="web"),
    }
    queue.complete(queue.claim(ids["tried"])[0], Outcome.DEFERRED)
    queue.complete(queue.claim(ids["unsure"])[0], Outcome.UNCERTAIN)
    queue.change("UPDATE deliveries SET expires_at = @later(86400)")
    queue.change(
        "UPDATE deliveries SET expires_at = @later(60) WHERE queue_id = @id(:id)", id=ids["tried"]
    )
    return ids


def dated(option: str) -> str:
    """An option of a case; DAY+1 is tomorrow, when the test runs."""
    if not option.startswith("DAY"):
        return option
    offset = timedelta(days=int(option.removeprefix("DAY")))
    return (datetime.now(UTC) + offset).date().isoformat()


CASES = {
    "--newer-than 1h": {"new"},
    "--newer-than 150m": {"new", "tried"},
    "--older-than 1d": {"old"},
    "--newer-than 1d --older-than 1h": {"tried", "unsure"},
    "--received-between DAY-3 DAY+2": {"old", "new", "tried", "unsure"},
    "--received-between DAY+1 DAY+2": set[str](),
    "--expires-within 1h": {"tried"},
    "--client 192.0.2.1": {"old", "tried", "unsure"},
    "--client 2001:DB8::1": {"new"},
    "--client 2001:db8:*": {"new"},
    "--user app": {"old"},
    "--user *": {"old", "unsure"},
    "--outcome deferred": {"tried"},
    "--outcome deferred --outcome uncertain": {"tried", "unsure"},
    "--domain two.example": {"new"},
    "--domain TWO.example": {"new"},
    "--domain *two.example": {"new", "tried"},
    "--domain example": set[str](),
    "--uncertain": {"unsure"},
    "--uncertain --domain two.example": set[str](),
}


@pytest.mark.parametrize(("options", "names"), CASES.items())
def test_filter_means_the_same_for_list_and_operations(
    queue: QueueHarness, typed: Typed, mail: dict[str, str], options: str, names: set[str]
) -> None:
    wanted = {mail[name] for name in names}
    arguments = [dated(option) for option in options.split()]
    listed = typed("list", "--json", *arguments, status=None)
    assert {row["queue_id"] for row in lines(listed)} == wanted
    typed("hold", "--yes", *arguments, status=0 if wanted else 1)
    assert {i for i in mail.values() if queue.state(i) == "held"} == wanted
    for row in queue.rows("SELECT filter FROM audit"):
        assert row["filter"], "the audit has the filter"
        again = typed("list", "--json", "--state", "held", *row["filter"].replace("'", "").split())
        assert {row["queue_id"] for row in lines(again)} == wanted


def test_received_between_includes_its_beginning_and_not_its_end(
    queue: QueueHarness, typed: Typed
) -> None:
    moment = datetime(2026, 11, 25, 13, 0, tzinfo=UTC)
    stamp = int(moment.timestamp() * 1000)
    ids = [
        queue.accept(queue_id=f"{stamp + ms:012x}{new_id()[12:]}") for ms in (-1, 0, 59_999, 60_000)
    ]
    for begin, end in (
        ("2026-11-25 13:00", "2026-11-25T13:01Z"),
        ("2026-11-25T14:00:00+01:00", "2026-11-25 13:01:00+00:00"),
    ):
        found = lines(typed("list", "--json", "--received-between", begin, end))
        assert [row["queue_id"] for row in found] == ids[1:3]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ("--received-between", "yesterday", "2026-11-25"),
            "yesterday is no time: write 2026-11-25",
        ),
        (("--newer-than", "soon"), "--newer-than soon"),
        (("--expires-within", "soon"), "--expires-within soon"),
        (("--outcome", "lost"), "no outcome lost: choose one of delivered"),
        (("--format", "xml"), "no format xml: choose one of table, json, csv, tsv"),
        (("--columns", "queue_id,colour"), "no column colour: choose some of queue_id"),
        (("--count-by", "colour"), "cannot count by colour: choose one of reason, sender"),
    ],
)
def test_wrong_filter_is_explained(
    typed: Typed, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], text: str
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    refused = CliRunner().invoke(app_for(["list"]), ["list", *arguments])
    assert refused.exit_code == 2
    assert text in refused.output


def test_newest_comes_first_and_limits_operations(
    queue: QueueHarness, typed: Typed, mail: dict[str, str]
) -> None:
    order = [mail[name] for name in ("new", "tried", "unsure", "old")]
    for form in ("json", "tsv", "csv", "table"):
        shown = typed("list", "--newest", "--format", form).stdout
        ends = [
            next(i for i in order if i[-12:] in line)
            for line in shown.splitlines()
            if re.search("[0-9a-f]{12}", line)
        ]
        assert ends == order, form
    dry = lines(typed("hold", "--all", "--newest", "--limit", "2", "--dry-run", "--json"))
    assert {row["queue_id"] for row in dry} == set(order[:2])
    typed("hold", "--all", "--newest", "--limit", "2", "--yes")
    assert [queue.state(i) for i in order] == ["held", "held", "deferred", "queued"]
    assert queue.rows("SELECT filter FROM audit") == [{"filter": " --limit 2 --newest".strip()}]
    typed("hold", "--all", "--newest", "--limit", "9", "--yes")
    assert queue.states_of(order) == ["held"] * 4


def test_every_format_has_the_same_rows(typed: Typed, mail: dict[str, str]) -> None:
    options = ("list", "--columns", "queue_id,state,recipient", "--format")
    json_rows = [tuple(row.values()) for row in lines(typed(*options, "json"))]
    assert {row[0] for row in json_rows} == set(mail.values())
    text = typed(*options, "tsv").stdout
    assert [tuple(line.split("\t")) for line in text.splitlines()[1:]] == json_rows
    header, *rows = csv.reader(io.StringIO(typed(*options, "csv").stdout))
    assert header == ["queue_id", "state", "recipient"]
    assert [tuple(row) for row in rows] == json_rows
    table = typed(*options, "table").stdout.splitlines()
    assert table[0].split() == ["QUEUE", "ID", "STATE", "RECIPIENT"]
    assert [tuple(line.split()) for line in table[1:]] == [
        (i[-12:], *rest) for i, *rest in json_rows
    ]


def test_csv_quotes_what_peers_wrote(queue: QueueHarness, typed: Typed) -> None:
    queue_id = queue.accept('a,"b\n@example.org')
    queue.complete(queue.claim(queue_id)[0], Outcome.DEFERRED, reply='451 "x", y\r\n\x1b[2J')
    text = typed("list", "--format", "csv", "--columns", "recipient,reason").stdout
    assert "\x1b" not in text
    (_, row) = csv.reader(io.StringIO(text))
    assert row == ['a,"b\\x0a@example.org', '451 "x", y\\x0d\\x0a\\x1b[2J']


def test_table_in_a_pipe_is_not_folded(queue: QueueHarness, typed: Typed) -> None:
    queue.complete(queue.claim(queue.accept())[0], Outcome.DEFERRED, reply="451 " + "word " * 90)
    table = typed("list", "--format", "table").stdout.splitlines()
    assert len(table) == 2
    assert len(table[1]) > 400


@pytest.mark.parametrize("key", ["reason", "sender", "domain", "server", "route", "client"])
def test_counts_add_up(queue: QueueHarness, typed: Typed, mail: dict[str, str], key: str) -> None:
    queue.accept("x@one.example", "y@one.example", sender="")
    rows = lines(typed("list", "--count-by", key, "--json"))
    assert all(list(row) == [key, "deliveries", "recipients", "oldest_at"] for row in rows)
    assert sum(row["recipients"] for row in rows) == 6
    assert sum(row["deliveries"] for row in rows) == 5
    assert [row["deliveries"] for row in rows] == sorted(
        (r["deliveries"] for r in rows), reverse=True
    )
    oldest = min(row["received_at"] for row in lines(typed("list", "--json")))
    assert min(row["oldest_at"] for row in rows) == oldest
    assert len(lines(typed("list", "--count-by", key, "--json", "--limit", "1"))) == 1


def test_values_of_a_count_are_those_of_the_mail(
    queue: QueueHarness, typed: Typed, mail: dict[str, str]
) -> None:
    queue.rescuer.publish_routes(queue.worker, {"default": ["a:628", "b:628"]})
    done = queue.accept("z@one.example")
    queue.complete(queue.claim(done)[0], Outcome.DELIVERED, server="c:628")

    def counts(*arguments: str) -> dict[str, int]:
        rows = lines(typed("list", "--json", "--count-by", *arguments))
        return {row[arguments[0]]: row["deliveries"] for row in rows}

    assert counts("domain") == {"one.example": 2, "two.example": 1, "sub.two.example": 1}
    assert counts("client") == {"192.0.2.1": 3, "2001:db8::1": 1}
    assert counts("server") == {"a:628": 4, "b:628": 4}, "a delivery counts under each server"
    assert counts("server", "--all") == {"a:628": 4, "b:628": 4, "c:628": 1}
    assert counts("reason", "--outcome", "deferred") == {"its words": 1}
    table = typed("list", "--count-by", "domain", "--format", "table").stdout.splitlines()
    assert table[0].split() == ["DELIVERIES", "RECIPIENTS", "OLDEST", "DOMAIN"]


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        (
            "451 4.7.1 <a@example.org>: greylisted for 300 seconds",
            "451 4.7.1 <address> greylisted for # seconds",
        ),
        ("Ok: queued as 7F3A9", "Ok: queued as #"),
        ("550 5.1.1 no such user", "550 5.1.1 no such user"),
        ("199 4.7 4.7.1. 451:", "# # # #"),
        ("connect to 192.0.2.1:628: refused", "connect to # refused"),
        ("  two  blanks  9 ", "  two  blanks  # "),
        ("", ""),
    ],
)
def test_what_differs_between_reasons_is_masked(reason: str, shown: str) -> None:
    assert masked(reason) == shown


def test_masked_reasons_are_counted_together(queue: QueueHarness, typed: Typed) -> None:
    for number in range(3):
        reply = f"451 4.7.1 user{number}@example.org waits {number} s"
        queue.complete(queue.claim(queue.accept())[0], Outcome.DEFERRED, reply=reply)
    (row,) = lines(typed("list", "--count-by", "reason", "--json"))
    assert row["reason"] == "451 4.7.1 <address> waits # s"
    assert (row["deliveries"], row["recipients"]) == (3, 3)


def test_filters_combine(queue: QueueHarness, mail: dict[str, str]) -> None:
    """Any two filters together match what both match."""
    reader = QueueReader(queue.database)
    filters = [
        Filter(newer_than=3 * HOUR),
        Filter(expires_within=HOUR),
        Filter(client="192.0.2.1"),
        Filter(user="*"),
        Filter(outcomes=("deferred", "uncertain")),
        Filter(domain="*.example"),
        Filter(uncertain=True),
        Filter(server="a:628"),
        Filter(reply="words"),
    ]

    def ids(filter_: Filter) -> set[str]:
        return {row["queue_id"] for row in reader.rows(filter_)}

    for one, other in itertools.combinations(filters, 2):
        fields = {
            name: getattr(one, name) or getattr(other, name) for name in Filter.__dataclass_fields__
        }
        assert ids(Filter(**fields)) == ids(one) & ids(other), (one, other)
