"""What a dead server blocks: `--server` finds the mail, and every interface counts it by server."""

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from commands.ops.columns import COLUMNS
from commands.output import write
from relay.metrics import QueueMetrics
from relay.queue.outcome import Outcome
from relay.report.filters import Filter
from relay.report.queries import QueueReader
from relay.spool.store import Spool
from tests.acceptance.console import browsing
from tests.integration.harness import QueueHarness
from tests.integration.typed import Typed, lines, typed_at

ROUTES = {"default": ["a:628", "b:628"], "bulk": ["b:628"], "idle": ["c:628"]}


@pytest.fixture
def typed(queue: QueueHarness, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> Typed:
    return typed_at(queue, spool, monkeypatch)


@pytest.fixture
def mail(queue: QueueHarness) -> dict[str, str]:
    """Mail of both routes in several states, and one message whose route no worker knows."""
    queue.rescuer.publish_routes(queue.worker, ROUTES)
    ids = {
        f"{route} {state}": queue.accept(f"{route}:{state}@example.org")
        for route in ("default", "bulk")
        for state in ("queued", "deferred", "held", "delivered", "sending")
    }
    ids["gone queued"] = queue.accept("gone:queued@example.org")
    for name, queue_id in ids.items():
        route, state = name.split()
        if state == "queued":
            continue
        (claim,) = queue.claim(queue_id, capacity={route: 1})
        if state in ("deferred", "held"):
            outcome = Outcome.DEFERRED if state == "deferred" else Outcome.UNSENDABLE
            queue.complete(claim, outcome, server="old:628")  # was in the route
        elif state == "delivered":
            queue.complete(claim, Outcome.DELIVERED, server="a:628")
    return ids


@pytest.mark.parametrize(
    ("server", "wanted"),
    [
        ("a", {"default queued", "default deferred", "default held", "default sending"}),
        ("c", set[str]()),
        ("old", {"default deferred", "default held", "bulk deferred", "bulk held"}),
        ("o*", {"default deferred", "default held", "bulk deferred", "bulk held"}),
    ],
)
def test_server_filter_finds_what_was_tried_there_or_would_go_there(
    queue: QueueHarness, typed: Typed, mail: dict[str, str], server: str, wanted: set[str]
) -> None:
    found = lines(typed("list", "--server", server, "--json", status=None))
    assert {row["queue_id"] for row in found} == {mail[name] for name in wanted}


def test_server_filter_finds_all_routes_of_a_server(typed: Typed, mail: dict[str, str]) -> None:
    found = {row["queue_id"] for row in lines(typed("list", "--server", "b:*", "--json"))}
    unfinished = {i for name, i in mail.items() if name.split()[1] != "delivered"}
    assert found == unfinished - {mail["gone queued"]}
    everything = {
        row["queue_id"] for row in lines(typed("list", "--server", "a", "--all", "--json"))
    }
    assert mail["default delivered"] in everything, "it was last tried there"
    assert mail["bulk delivered"] in everything


def test_operations_take_what_a_server_blocks(
    queue: QueueHarness, typed: Typed, mail: dict[str, str]
) -> None:
    typed("hold", "--server", "a", "--yes")
    held = {name for name, i in mail.items() if queue.state(i) == "held"}
    assert held == {"default queued", "default deferred", "default held", "bulk held"}
    typed("release", "--server", "a", "--yes")
    assert queue.state(mail["default held"]) == "queued"
    assert queue.state(mail["bulk held"]) == "held"


def test_every_interface_counts_what_waits_for_a_server(
    queue: QueueHarness, typed: Typed, mail: dict[str, str], tmp_path: Path
) -> None:
    waiting = {"a:628": 2, "b:628": 4, "c:628": 0, "qmqp.example.net:628": 0}
    rows = queue.rows("SELECT server, waiting FROM server_health")
    assert {row["server"]: row["waiting"] for row in rows} == waiting
    stats = [row for row in lines(typed("stats", "--json")) if row["kind"] == "server"]
    assert {row["server"]: row["waiting"] for row in stats} == waiting
    registry = CollectorRegistry()
    registry.register(QueueMetrics(queue.database, Spool(tmp_path)))
    for server in ("a:628", "b:628", "c:628"):
        value = registry.get_sample_value("relay_waiting", {"server": server})
        assert value == waiting[server]
    with browsing(queue) as browser:
        page = browser.get("/").text
    for server, count in (("a", 2), ("b", 4)):
        assert page.count(f'/search?server={server}%3A628&amp;unfinished=1">{count}</a>') == 1


def test_waiting_mail_names_its_servers(
    queue: QueueHarness,
    typed: Typed,
    mail: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = queue.rows("SELECT queue_id, servers FROM mail_history")
    servers = {row["queue_id"]: row["servers"] for row in rows}
    assert servers[mail["default queued"]] == "a:628, b:628", "in the order in which they are tried"
    assert servers[mail["bulk deferred"]] == "b:628"
    assert servers[mail["bulk delivered"]] is servers[mail["gone queued"]] is None
    assert (
        "queued, route default to a:628, b:628, expires"
        in typed("show", mail["default queued"]).stdout
    )
    (whole,) = lines(typed("show", mail["bulk held"], "--json"))
    assert [row["servers"] for row in whole["deliveries"]] == ["b:628"]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for width, shown in ((200, True), (100, False)):
        monkeypatch.setenv("COLUMNS", str(width))
        write(QueueReader(queue.database).rows(Filter()), COLUMNS)
        assert ("a:628, b:628" in capsys.readouterr().out) == shown
