"""A long queue on the command line: read by one statement, never held in memory; and the output on
a terminal and in a shell."""

import io
import itertools
import json
import os
import re
import threading
import time
import tracemalloc
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import event, text
from typer.testing import CliRunner

from commands.cli import completion
from commands.cli.main import main
from commands.ops import show
from commands.ops.columns import COLUMNS, circuit_of
from commands.ops.watch import watched
from commands.output import write, write_lines
from relay.db.engine import connect, reading
from relay.db.sql import named_statements
from relay.queue.outcome import Outcome
from relay.report.filters import Filter, spelled
from relay.report.queries import NoSuchMessage, QueueReader
from relay.spool.store import Spool
from tests.integration.harness import QueueHarness, new_message, opened
from tests.integration.typed import Typed, lines, typed_at


@pytest.fixture
def typed(queue: QueueHarness, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> Typed:
    return typed_at(queue, spool, monkeypatch)


@pytest.fixture
def statements(queue: QueueHarness) -> Iterator[list[str]]:
    """The statements that the engine executes from now on."""
    asked: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_more: object) -> None:
        asked.append(statement)

    event.listen(queue.database, "before_cursor_execute", note)
    yield asked
    event.remove(queue.database, "before_cursor_execute", note)


def test_long_queue_takes_one_statement_and_little_memory(
    queue: QueueHarness, statements: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses = [f"recipient{n}@example.org" for n in range(100)]
    queue.insert([new_message(*addresses) for _ in range(50)])
    statements.clear()

    class Nowhere(io.StringIO):
        def write(self, text: str) -> int:
            return len(text)

    monkeypatch.setattr("sys.stdout", Nowhere())
    tracemalloc.start()
    try:
        assert (
            write_lines(QueueReader(queue.database).lines(Filter(), objects=True), json_lines=True)
            == 5_000
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    copied = queue.database.dialect.name == "postgresql"  # COPY passes the driver alone
    reads = [one for one in statements if re.search("FROM deliveries|JOIN", one)]
    assert len(reads) == (0 if copied else 1)
    assert peak < 5 << 20, "all the rows are fifteen megabytes"


def test_pages_do_not_depend_on_the_plan(queue: QueueHarness) -> None:
    reader = QueueReader(queue.database)
    queue.insert(
        [new_message("a@example.org", "b@example.org") for _ in range(1001)]
    )  # many: another plan
    everything = [(row["queue_id"], row["position"]) for row in reader.rows(Filter())]
    paged: list[tuple[str, int]] = []
    while page := list(
        reader.rows(Filter(), newest=True, limit=701, after=paged[-1] if paged else None)
    ):
        paged += [(row["queue_id"], row["position"]) for row in page]
    assert paged == everything[::-1]
    assert len(everything) == 2002


def test_sqlite_finds_a_page_in_order_without_sorting(clean_sqlite_url: str) -> None:
    engine = connect(clean_sqlite_url)
    wanted = Filter(states=("bounced",))
    sql, given = QueueReader(engine).listing(
        "*", wanted, limit=50, finished=True, newest=True, after=("f" * 32, 1)
    )
    with reading(engine) as connection:
        plan = connection.execute(text(f"EXPLAIN QUERY PLAN {sql}"), given).all()
    engine.dispose()
    steps = [row[-1].partition(" USING")[0] for row in plan if row[1] == 0]
    # The few routes are read once, before the deliveries.
    assert steps[0] == "MATERIALIZE route_overview"
    assert steps[1:5] == ["SEARCH d", "SEARCH r", "SEARCH m", "SEARCH o"]
    assert {row[-1] for row in plan if row[1] == 0 and row[-1].startswith("USE TEMP")} <= {
        "USE TEMP B-TREE FOR RIGHT PART OF ORDER BY"
    }


def test_sqlite_reads_only_held_or_sending_deliveries(
    clean_sqlite_url: str,
) -> None:
    engine = connect(clean_sqlite_url)
    for state, index in (("held", "deliveries_held"), ("sending", "deliveries_sending")):
        sql, given = QueueReader(engine).listing(
            "*", Filter(states=(state,), reply="x"), limit=50, finished=True, newest=True
        )
        with reading(engine) as connection:
            plan = connection.execute(text(f"EXPLAIN QUERY PLAN {sql}"), given).all()
        deliveries = next(row[-1] for row in plan if row[1] == 0 and " d " in row[-1])
        assert index in deliveries
    engine.dispose()


def test_postgresql_starts_a_page_where_the_last_one_ended(clean_postgres_url: str) -> None:
    with opened(clean_postgres_url) as queue:
        queue_id = [queue.accept() for _ in range(9)][4]
        queue.change("ANALYZE")
        listed = QueueReader(queue.database).listing(
            "*", Filter(), limit=50, finished=True, newest=True, after=(queue_id, 1)
        )
        with reading(queue.database) as connection:
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
            plan = connection.execute(text(f"EXPLAIN {listed[0]}"), listed[1]).scalars().all()
    begins = [line for line in plan if "Index Cond" in line and "<=" in line]
    assert len(begins) == 3, "in each of the three tables"


def test_page_that_an_index_orders_uses_no_cursor(queue: QueueHarness) -> None:
    """PostgreSQL plans a cursor for a tenth of its rows."""
    queue_id, streamed = queue.accept(), list[bool]()

    def note(
        _connection: object,
        _cursor: object,
        statement: str,
        _given: object,
        context: Any,
        _many: bool,
    ) -> None:
        if "ORDER BY" in statement:
            streamed.append(bool(context.execution_options.get("stream_results")))

    event.listen(queue.database, "before_cursor_execute", note)
    for given in ({"limit": 50}, {"limit": 50, "down_to": queue_id}, {}):
        assert len(list(QueueReader(queue.database).rows(Filter(), **given))) == 1
    event.remove(queue.database, "before_cursor_execute", note)
    assert streamed == [False, True, True]


def test_page_without_an_index_scans_a_bounded_part(
    queue: QueueHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.report.queries.SCAN_LIMIT", 3)
    monkeypatch.setattr("relay.report.queries._FEW", 2)
    reader = QueueReader(queue.database)
    senders = ["one@example.com" if n == 2 else "many@example.com" for n in range(8)]
    ids = sorted(
        queue.accept(sender=sender) for sender in senders
    )  # within a millisecond ids have no order
    for found in (Filter(sender="one@example.com"), Filter(id=ids[0]), Filter(states=("queued",))):
        assert reader.horizon(found) is None
    for everything in (
        Filter(),
        Filter(sender="many@example.com"),
        Filter(sender="*"),
        Filter(states=("delivered",)),
    ):
        assert reader.horizon(everything) == ids[4]
    seen, after = list[str](), None
    while True:
        horizon = reader.horizon(Filter(), after)
        rows = list(reader.rows(Filter(), newest=True, finished=True, after=after, down_to=horizon))
        assert len(rows) <= 4
        seen += [row["queue_id"] for row in rows]
        if horizon is None:
            break
        after = (horizon, 0)
    assert seen == ids[::-1]


def test_limits_and_filters_mean_the_same_in_every_output(
    queue: QueueHarness, typed: Typed
) -> None:
    queue.accept("a@example.org", header_message_id="<1@example.com>")
    queue.accept("b@example.org", header_message_id="<2@example.com>", sender="")
    for arguments, expected in {
        ("--message-id", "2@example.com"): ["b@example.org"],
        ("--message-id", "<1@example.com>"): ["a@example.org"],
        ("--message-id", "*@example.com"): ["a@example.org", "b@example.org"],
        ("--sender", ""): ["b@example.org"],
        ("--limit", "1"): ["a@example.org"],
        ("--sender", "<>"): ["b@example.org"],
    }.items():
        assert [row["recipient"] for row in lines(typed("list", "--json", *arguments))] == expected
    dry = typed("hold", "--message-id", "2@example.com", "--dry-run", "--json")
    assert [row["recipient"] for row in lines(dry)] == ["b@example.org"]


def test_domain_of_an_address_is_case_insensitive(queue: QueueHarness, typed: Typed) -> None:
    for address in (
        "You@Example.ORG",
        "You@example.org",
        "you@example.org",
        "You@example.org.uk",
        "a@b@Example.org",
    ):
        queue.accept(address, sender=address)
    twice = ["You@Example.ORG", "You@example.org"]
    for spelt, expected in {
        "You@EXAMPLE.org": twice,
        "You@example.org": twice,
        "you@Example.org": ["you@example.org"],
        "YOU@example.org": [],
        "a@b@example.ORG": ["a@b@Example.org"],
        "@example.org": [],
        "You": [],
    }.items():
        for option in ("--recipient", "--sender"):
            rows = lines(typed("list", "--json", option, spelt, status=0 if expected else 1))
            assert [row["recipient"] for row in rows] == expected, spelt
    typed("hold", "--recipient", "You@EXAMPLE.ORG", "--yes")
    assert {row["recipient"] for row in lines(typed("list", "--json", "--state", "held"))} == set(
        twice
    )


def test_address_is_found_by_its_index(queue: QueueHarness) -> None:
    database = queue.database.dialect.name
    explain = "EXPLAIN" if database == "postgresql" else "EXPLAIN QUERY PLAN"
    keys = ("address", "address_from", "address_to")
    parameters = dict(zip(keys, spelled("You@Example.org"), strict=True)) | {"most": 1}
    statements = named_statements("relay.report.queries", database)
    for name, index in (
        ("count_from_sender", "messages_sender"),
        ("count_to_recipient", "recipients_address"),
    ):
        (statement,) = statements[name]
        with reading(queue.database) as connection:
            plan = " ".join(
                str(row) for row in connection.execute(text(f"{explain} {statement}"), parameters)
            )
        assert re.search(rf"{index}\b.*(~>=~|>\?)", plan), plan


def test_uncertain_mail_is_found_by_its_index(queue: QueueHarness) -> None:
    queue.complete(queue.claim(queue.accept())[0], Outcome.UNCERTAIN)
    explain = "EXPLAIN" if queue.dialect.postgresql else "EXPLAIN QUERY PLAN"
    sql, given = QueueReader(queue.database).listing(
        "*", Filter(uncertain=True), limit=50, finished=True
    )
    with reading(queue.database) as connection:
        plan = str(connection.execute(text(f"{explain} {sql}"), given).all())
    assert "attempts_uncertain" in plan, plan


def test_server_filter_takes_the_spelling_of_pause(queue: QueueHarness, typed: Typed) -> None:
    queue_id = queue.accept()
    queue.complete(queue.claim(queue_id)[0], Outcome.DEFERRED, server="127.0.0.1:628")
    for spelt in ("127.0.0.1", "127.0.0.1:628", "127.*"):
        assert [row["queue_id"] for row in lines(typed("list", "--json", "--server", spelt))] == [
            queue_id
        ]
    typed("list", "--server", "127.0.0.1:629", status=1)
    assert "bad QMQP server" in typed("list", "--server", "host:port", status=2).output


def test_times_are_utc_unless_local_ones_are_wanted(
    queue: QueueHarness, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue_id = queue.accept()
    monkeypatch.setenv("TZ", "Etc/GMT-2")
    time.tzset()
    try:
        shown = {local: typed("show", queue_id, *local).stdout for local in ((), ("--local",))}
        table = typed("list", "--format", "table", "--local").stdout
        counts = typed("list", "--format", "table", "--local", "--count-by", "domain").stdout
        (line,) = lines(typed("list", "--json", "--local"))
    finally:
        monkeypatch.undo()
        time.tzset()
    assert re.search(r"received: [-\d]+ [:\d]+Z ", shown[()])
    assert re.search(r"received: [-\d]+ [:\d]+\+02:00 ", shown["--local",])
    assert re.search(r"^ID +STATE +RECEIVED ", table)
    assert re.search(r" queued +[-\d]+ [:\d]+\+02:00 ", table)
    assert re.search(r" [-\d]+ [:\d]+\+02:00 +example.org$", counts, re.M), counts
    assert re.fullmatch(r"[-\d]+T[:\d]+\.\d{3}Z", line["received_at"]), "a program gets UTC"
    (row,) = queue.rows("SELECT * FROM mail_queue")
    assert queue.dialect.postgresql or row["received_at"].endswith("+00:00")


def test_filter_by_message_lists_finished_mail(queue: QueueHarness, typed: Typed) -> None:
    assert typed("list", status=1).stderr == "qmqp-relay: the queue is empty\n"
    assert typed("list", "--all", status=1).stderr == "qmqp-relay: no mail is kept\n"
    queue_id = queue.accept(header_message_id="<1@example.com>")
    queue.complete(queue.claim(queue_id)[0], Outcome.DELIVERED)
    for arguments in ((queue_id,), ("--id", queue_id[-12:]), ("--message-id", "1@example.com")):
        assert [row["state"] for row in lines(typed("list", "--json", *arguments))] == ["delivered"]
    assert typed("list", status=1).stderr == "qmqp-relay: the queue is empty\n"
    hint = typed("list", "--recipient", "b@example.org", status=1).stderr
    assert hint == "qmqp-relay: no unfinished mail matches; try --all\n"
    assert (
        typed("list", "--all", "--recipient", "x", status=1).stderr
        == "qmqp-relay: no mail matches\n"
    )


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_database_without_tables_is_explained(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (tmp_path / "empty.db").touch()
    url = f"sqlite:///{tmp_path}/empty.db"
    if kind == "postgresql":
        url = request.getfixturevalue(
            "postgres_maintenance_url"
        )  # where databases are made; it has no tables itself
    monkeypatch.setenv("RELAY_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("RELAY_DATABASE_URL", url)
    for arguments in (
        ["list"],
        ["stats"],
        ["show", "abcdef"],
        ["hold", "--all"],
        ["pause", "--route", "x"],
    ):
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 3, arguments
        assert (
            done.stderr
            == "qmqp-relay: the database has no tables of this version: run `qmqp-relay migrate`\n"
        )


def test_long_table_is_printed_while_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdout", screen)

    def rows() -> Iterator[dict[str, str]]:
        yield from ({"name": f"n{n}", "words": "word " * n} for n in range(250))
        assert "n199" in screen.getvalue()
        yield {"name": "last", "words": "\x1b[2J"}

    assert (
        write(rows(), {"NAME": lambda row: row["name"], "WORDS": lambda row: row["words"]}) == 251
    )
    shown = screen.getvalue()
    assert "\x1b" not in shown
    assert "\\x1b[2J" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert {line[:6].strip() for line in itertools.islice(shown.splitlines(), 3)} == {
        "NAME",
        "n0",
        "n1",
    }


@pytest.mark.parametrize("width", [80, 100, 140])
def test_a_queue_fits_the_terminal(
    queue: QueueHarness,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    width: int,
) -> None:
    queue_id = queue.accept(
        "somebody.whose.name.is.long@a.sub.domain.example.org", sender=f"{'s' * 30}@example.com"
    )
    reply = "451 4.7.1 somebody-else@example.net is greylisted"
    queue.complete(queue.claim(queue_id)[0], Outcome.DEFERRED, reply=reply)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    assert write(QueueReader(queue.database).rows(Filter()), COLUMNS) == 1
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width
    assert queue_id[-12:] in shown
    assert "somebody-else@example.net" in shown, "an address can be copied"
    assert ("SENDER" in shown) == (width > 100)


def test_watch_goes_on_until_it_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    assert watched(2.0, lambda: 1, pause) == 1
    assert pauses == [2.0, 2.0, 2.0]
    assert watched(None, lambda: 0, pause) == 0
    assert len(pauses) == 3


def test_an_outage_does_not_end_a_watch(
    queue: QueueHarness,
    typed: Typed,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    queue_id, pauses = queue.accept(), list[float]()

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        monkeypatch.setenv(
            "RELAY_DATABASE_URL", "postgresql://127.0.0.1:1/x" if len(pauses) == 1 else url
        )
        if len(pauses) == 3:
            raise KeyboardInterrupt

    url = os.environ["RELAY_DATABASE_URL"]
    assert watched(0.5, lambda: show.show_why(queue_id, json_lines=False), pause) == 0
    shown = capsys.readouterr()
    assert shown.out.count("b@example.org: queued") == 2
    assert shown.err.startswith("qmqp-relay: database: connection")
    with pytest.raises(NoSuchMessage):
        watched(0.5, lambda: show.show_message("f" * 32, json_lines=False), pause)


def completed(line: str) -> set[str]:
    """The completions that the shell gets at the end of the line."""
    words = line.split(" ")
    environ = {
        "_QMQP_RELAY_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    return set(CliRunner().invoke(main, [], env=environ, prog_name="qmqp-relay").output.split())


def test_shell_completes_routes_and_servers(
    queue: QueueHarness, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.rescuer.publish_routes(
        queue.worker, {"default": ["mx1:628"], "bulk": ["mx2:628", "other:628"]}
    )
    typed("pause", "--route", "gone")
    monkeypatch.setattr(completion, "TIMEOUT", 30.0)
    assert completed("qmqp-relay list --route ") == {"default", "bulk", "gone"}
    assert completed("qmqp-relay pause --server mx") == {"mx1:628", "mx2:628"}
    monkeypatch.setenv("RELAY_DATABASE_URL", "postgresql://127.0.0.1:1/x")
    assert completed("qmqp-relay list --route ") == set()
    monkeypatch.setattr(completion, "TIMEOUT", 0.0)
    monkeypatch.setattr(completion, "_known", lambda kind: threading.Event().wait(60))
    assert completed("qmqp-relay list --route ") == set()


def test_shell_completes_commands_and_states(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"retry", "release", "resume"} <= completed("qmqp-relay re")
    assert completed("qmqp-relay list --state d") == {"deferred", "delivered", "dropped"}
    assert "--older-than" in completed("qmqp-relay drop --o")


def test_stored_control_characters_are_escaped_on_a_terminal(
    queue: QueueHarness, spool: Spool, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue_id = queue.accept()
    spool.store(queue_id, [b"Subject: \x1b]0;x\x07\n\n\xff\x1b[2J\n".ljust(100, b"x")])
    assert b"\x1b" in typed("body", queue_id).stdout_bytes
    monkeypatch.setattr(show, "sys", SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: True)))
    assert "\x1b" not in typed("body", queue_id).stdout
    assert "\\x1b]0;x\\x07" in typed("headers", queue_id).stdout


def test_stats_counts_the_rows_that_it_leaves_out(
    queue: QueueHarness, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.insert([new_message(f"a@d{n}.example.org", f"b@d{n}.example.org") for n in range(23)])
    queue.accept("c@d7.example.org")
    stats = lines(typed("stats", "--json"))
    ages = [row for row in stats if row["kind"] == "age"]
    assert [row["domain"] for row in ages[:2]] == ["d7.example.org", "d0.example.org"]
    assert (len(ages), ages[-1]["domain"], ages[-1]["domains"], ages[-1]["waiting"]) == (
        21,
        None,
        3,
        6,
    )
    assert (ages[-1]["under_5m"], ages[-1]["older"]) == (6, 0)
    for _ in range(3):
        queue.register_worker()
    monkeypatch.setattr(show, "MAX_WORKERS", 2)
    shown = typed("stats").stdout
    assert "\nand 2 more workers, which are sending 0 deliveries\n" in shown
    assert len([row for row in lines(typed("stats", "--json")) if row["kind"] == "worker"]) == 4


def test_stats_reports_accepted_mail(queue: QueueHarness, typed: Typed) -> None:
    for _ in range(3):
        queue.accept()
    dsn = queue.accept(sender="", dsn_of=queue.accept())
    assert dsn

    def received() -> tuple[int, ...]:
        (row,) = [row for row in lines(typed("stats", "--json")) if row["kind"] == "received"]
        return row["last_minute"], row["last_hour"], row["bytes"]

    assert received() == (4, 4, 400)
    ago = "- :s * interval '1 second'" if queue.dialect.postgresql else "- :s * 1000000"
    queue.change(f"UPDATE messages SET received_at = received_at {ago} WHERE dsn_of IS NULL", s=120)
    assert received() == (0, 4, 400)
    queue.change(
        f"UPDATE messages SET received_at = received_at {ago} WHERE dsn_of IS NULL", s=3600
    )
    assert received() == (0, 0, 0)


def test_open_circuit_is_listed_with_its_reason(
    queue: QueueHarness, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.rescuer.publish_open_circuits(queue.worker, {"192.0.2.7:628": "450 too busy"})
    typed("pause", "--server", "192.0.2.8")
    now = {row["server"]: circuit_of(row) for row in QueueReader(queue.database).read("servers")}
    assert now.pop("192.0.2.8:628").startswith("paused for ")
    assert now == {"192.0.2.7:628": "circuit open: 450 too busy"}


@pytest.mark.parametrize(
    "wanted", [Filter(), Filter(route="default")], ids=["everything", "a route"]
)
def test_lines_equal_rows(queue: QueueHarness, wanted: Filter) -> None:
    """The database makes the text for pipes and programs; Python makes it from the same rows."""
    reader = QueueReader(queue.database)
    queue.accept('"100%s \\t\\n"@example.org', "b@example.org")
    queue.accept("c@example.org")
    rows = list(reader.rows(wanted))
    head, *listed = [line for lines in reader.lines(wanted) for line in lines]
    assert [line.split("\t")[: len(rows[0])] for line in listed] == [
        ["" if value is None else formatted(value) for value in row.values()] for row in rows
    ]
    assert head.split("\t") == list(rows[0])
    objects = [json.loads(line) for lines in reader.lines(wanted, objects=True) for line in lines]
    assert [[formatted(value) for value in one.values()] for one in objects] == [
        [formatted(v) for v in row.values()] for row in rows
    ]


def formatted(value: object) -> str:
    if not isinstance(value, datetime):
        return str(value)
    return value.isoformat(timespec="milliseconds").replace("+00:00", "Z")
