"""The file of routes at run time: changes take effect, mistakes do not."""

import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commands.ops import check
from relay import routes as module
from relay.queue.outcome import Outcome
from relay.routes import DEFAULT, Route, Routes, parse_routes, parse_server
from relay.settings import Settings, SettingsError, WorkerSettings, load
from smtpd.main import offered_size
from worker.circuit_breaker import ServerPool
from worker.delivery import next_state
from worker.producer import Capacity

A, B = parse_server("a.example"), parse_server("b.example")
ONE = '[one]\nrecipients = ["one.example"]\nservers = ["a.example"]\n'

type Write = Callable[[str], None]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "routes.toml"


@pytest.fixture
def write(file: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write the file with a new time; it is polled at once and counts as stable."""
    monkeypatch.setattr(module, "POLL_INTERVAL", 0.0)
    monkeypatch.setattr(module, "STABLE_FOR", 0.0)
    stamps = iter(range(10**9, 10**9 + 100))

    def write(text: str) -> None:
        file.write_text(text)
        stamp = next(stamps) * 10**9
        os.utime(file, ns=(stamp, stamp))

    write(ONE)
    return write


def loaded(file: Path) -> Routes:
    return Routes.load(load(Settings, routes=file, qmqp_servers=("z.example",)))


def test_example_of_the_page_is_a_valid_file() -> None:
    page = (Path(__file__).parents[2] / "docs" / "delivery.md").read_text()
    (example,) = re.findall(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (route,) = parse_routes(example)
    assert set(tomllib.loads(example)["lists"]) == set(Route.__dataclass_fields__) - {"name"}
    assert [server.name for server in route.servers] == ["10.0.0.9:628", "10.0.0.10:628"]
    assert (route.retry_min, route.retry_max, route.max_size) == (300.0, 14400.0, 10 * 2**20)
    assert (route.connections, route.bisect) == (10, False)
    assert [
        address
        for address in ("ann@lists.example.org", "bob@eu.example.net", "bulk-7@example.org")
        if not route.takes(address)
    ] == []


def test_servers_are_looked_up_at_each_attempt(file: Path, write: Write) -> None:
    routes = loaded(file)
    write(ONE.replace("a.example", "b.example"))
    route = routes.get("one")
    assert route is not None
    assert route.servers == (B,)


def test_change_reaches_a_running_worker(file: Path, write: Write) -> None:
    routes, servers = loaded(file), ServerPool(10)
    assert set(Capacity(routes, servers, 20, 5).reserve(routes.names(), 20)) == {"one", DEFAULT}
    write(ONE + '[two]\nrecipients = ["two.example"]\nservers = ["b.example"]\nconnections = 2\n')
    later = Capacity(routes, ServerPool(10), 20, 5).reserve(routes.names(), 20)
    assert set(later) == {"one", "two", DEFAULT}
    assert len(later["two"]) == 2


def test_mistake_changes_nothing_and_is_logged_once(
    file: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    routes = loaded(file)
    write(ONE + "[two]\nservers = 5\n")
    for _ in range(3):
        assert routes.names() == ("one", DEFAULT)
    said = capsys.readouterr()
    assert (said.out + said.err).count("routes file rejected") == 1
    assert "[two] servers = 5: must be a list of texts" in said.out + said.err
    write(ONE)
    assert routes.names() == ("one", DEFAULT)
    write(ONE.replace("one", "uno"))
    assert routes.names() == ("uno", DEFAULT)


def test_binary_file_changes_nothing(file: Path, write: Write) -> None:
    routes = loaded(file)
    file.write_bytes(b"\xff\xfe\0")
    os.utime(file, ns=(1, 1))
    assert routes.names() == ("one", DEFAULT)


def test_missing_file_stops_the_start(file: Path) -> None:
    with pytest.raises(SettingsError, match=r"RELAY_ROUTES: .*routes\.toml: No such file"):
        loaded(file)


def test_file_is_polled_at_intervals(
    file: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    routes = loaded(file)
    monkeypatch.setattr(module, "POLL_INTERVAL", 1000.0)
    write(ONE.replace("one", "uno"))
    assert routes.names() == ("one", DEFAULT)


def test_change_counts_when_it_is_stable(file: Path) -> None:
    """Half a file is often a whole one with fewer routes, and an empty one always is."""
    file.write_text(ONE)
    now, stamps = [100.0], iter(range(10**9, 10**10, 10**9))
    routes = Routes.load(load(Settings, routes=file), clock=lambda: now[0])

    def written(text: str) -> None:
        file.write_text(text)
        os.utime(file, ns=(stamp := next(stamps), stamp))

    def after(seconds: float) -> tuple[str, ...]:
        now[0] += seconds
        return routes.names()

    written("")
    assert after(1.0) == ("one", DEFAULT)
    written("# the routes of th")
    assert after(1.0) == ("one", DEFAULT), "it changes during a poll"
    written(ONE + ONE.replace("one", "two"))
    assert [after(0.5) for _ in range(3)] == [("one", DEFAULT)] * 3
    assert after(0.5) == ("one", "two", DEFAULT), "a second after it was first seen like this"
    file.unlink()
    assert after(5.0) == after(5.0) == ("one", "two", DEFAULT)
    written(ONE)
    assert [after(1.0), after(1.0)] == [("one", "two", DEFAULT), ("one", DEFAULT)]
    other = file.with_name("new")
    other.write_text(ONE.replace("one", "uno"))
    os.utime(other, ns=(file.stat().st_mtime_ns, file.stat().st_mtime_ns))
    other.rename(file)
    assert [after(1.0), after(1.0)] == [("one", DEFAULT), ("uno", DEFAULT)], (
        "same time, same size, another file"
    )


def test_file_that_changes_while_it_is_read_is_not_used(
    file: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    routes, parse = loaded(file), parse_routes

    def cut_off(text: str) -> list[Route]:
        monkeypatch.undo()
        monkeypatch.setattr(module, "POLL_INTERVAL", 0.0)
        monkeypatch.setattr(module, "STABLE_FOR", 0.0)
        file.write_text(ONE.replace("one", "uno"))
        return parse(text)

    write("")
    monkeypatch.setattr(module, "parse_routes", cut_off)
    assert routes.names() == ("one", DEFAULT)
    assert routes.names() == ("uno", DEFAULT)


def test_change_before_the_first_poll_is_seen(file: Path, write: Write) -> None:
    routes = loaded(file)
    write(ONE.replace("one", "uno"))
    assert routes.names() == ("uno", DEFAULT)


def test_default_route_may_have_servers_in_the_file(file: Path, write: Write) -> None:
    write('[default]\nservers = ["b.example"]\n')
    route = loaded(file).get(DEFAULT)
    assert route is not None
    assert route.servers == (B,)


def test_pattern_is_an_address_or_a_domain() -> None:
    route = Route(
        "r", (A,), ("example.org", "*.example.net", "news-*@example.com", "*@lists.example.com")
    )
    takes = ["x@example.org", "x@a.b.example.net", "News-1@EXAMPLE.com", "any@lists.example.com"]
    leaves = [
        "x@sub.example.org",
        "x@example.net",
        "old@example.com",
        "x@example.org.evil",
        "example.org@other",
    ]
    assert [address for address in takes + leaves if route.takes(address)] == takes


@given(st.emails(), st.text(max_size=20))
def test_any_address_and_pattern_have_a_route(address: str, pattern: str) -> None:
    routes = Routes([Route("r", (A,), (pattern,)), Route("all", (B,), ("*",))])
    assert routes.route_for(address) in {"r", "all"}
    assert Routes([Route("r", (A,), (address.lower(),))]).route_for(address) in {"r", DEFAULT}


def test_route_has_its_own_backoff() -> None:
    settings = load(WorkerSettings, retry_min=30.0, retry_max=3600.0)
    quick, slow = Route("q", (A,), retry_min=1.0, retry_max=4.0), Route("s", (A,), retry_min=7200.0)
    waits = [next_state(Outcome.DEFERRED, settings, step, route=quick)[1] for step in range(20)]
    assert 1.0 <= waits[0] <= 2.0
    assert all(2.0 <= wait <= 4.0 for wait in waits[3:])
    assert next_state(Outcome.DEFERRED, settings, 5, route=slow)[1] == 7200.0, (
        "a longest below the least is the least"
    )
    assert 1.0 <= next_state(Outcome.UNREACHABLE, settings, 9, route=quick)[1] <= 1.5


# --- sizes
# --------------------------------------------------------------------------------------------------


def sized(*sizes: str) -> Routes:
    return Routes(
        parse_routes(
            "\n".join(
                f'[r{n}]\nrecipients = ["{n}.example"]\nservers = ["a"]\n'
                + (f'max_size = "{size}"' if size else "")
                for n, size in enumerate(sizes)
            )
        )
    )


@pytest.mark.parametrize(
    ("sizes", "offered"),
    [
        ((), 25 << 20),
        (("", ""), 25 << 20),
        (("100M",), 25 << 20),
        (("10M", "20M", ""), (10 << 20) - (10 << 20) // 20 - 4096),
        (("25M",), (25 << 20) - (25 << 20) // 20 - 4096),
        (("1K",), 1),
    ],
)
def test_size_offered_is_the_smallest_limit_with_head_room(
    sizes: tuple[str, ...], offered: int
) -> None:
    assert offered_size(25 << 20, sized(*sizes)) == offered


def test_head_room_holds_the_trace_field_and_a_long_envelope() -> None:
    for limit in ("200000", "10M", "1G"):
        routes = sized(limit)
        least = routes.max_size()
        assert least is not None
        assert least - offered_size(1 << 40, routes) >= 4096 + least / 20 - 1


# --- `qmqp-relay check`
# -------------------------------------------------------------------------------------


def test_check_shows_routes_and_servers_in_order(file: Path, write: Write) -> None:
    write(
        ONE + '[two]\nrecipients = ["*.two.example", "x@y"]\nservers = ["b.example:629",'
        ' "unix:/run/q"]\n'
    )
    said = {finding.what: finding.words for finding in check.check_routes(loaded(file))}
    assert said == {
        "route one": "one.example -> a.example:628",
        "route two": "*.two.example, x@y -> b.example:629, unix:/run/q",
        "route default": "everything else -> z.example:628",
    }
    assert list(said) == ["route one", "route two", "route default"]


def test_check_refuses_a_bad_number(
    file: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(ONE + "retry_min = -5\n")
    monkeypatch.setenv("RELAY_ROUTES", str(file))
    (finding,) = check.check_all()
    assert (finding.what, finding.verdict) == ("settings", "fail")
    assert "[one] retry_min = -5: Input should be greater than 0" in finding.words


def test_check_reports_an_error_in_the_file(
    file: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("[one]\nrecipients = ['one.example']\nservers = ['a:0']\n")
    monkeypatch.setenv("RELAY_ROUTES", str(file))
    (finding,) = check.check_all()
    assert (finding.what, finding.verdict) == ("settings", "fail")
    assert "bad port in QMQP server 'a:0'" in finding.words
