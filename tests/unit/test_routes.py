"""Routes: the syntax of servers, the matching of recipients, and a file that changes."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay import routes as module
from relay.routes import DEFAULT, Route, Routes, Server, parse_routes, parse_server
from relay.settings import Settings, load


@pytest.mark.parametrize(
    ("text", "server"),
    [
        ("qmqp.example.net", Server("qmqp.example.net:628", "qmqp.example.net", 628)),
        ("10.0.0.5:1628", Server("10.0.0.5:1628", "10.0.0.5", 1628)),
        ("[::1]", Server("[::1]:628", "::1", 628)),
        ("[2001:db8::25]:629", Server("[2001:db8::25]:629", "2001:db8::25", 629)),
        ("[fe80::1%eth0]:628", Server("[fe80::1%eth0]:628", "fe80::1%eth0", 628)),
        ("my_host", Server("my_host:628", "my_host", 628)),
        ("host.", Server("host.:628", "host.", 628)),
        ("unix:/run/qmqpd", Server("unix:/run/qmqpd", None, 0, "/run/qmqpd")),
    ],
)
def test_B26_server_is_parsed(text: str, server: Server) -> None:
    assert parse_server(text) == server
    assert parse_server(server.name) == server, "what is shown can be written"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host:",
        "host:0",
        "host:65536",
        "host:x",
        "::1",
        "[::1",
        "[::1]:",
        "host name",
        "-host",
        "unix:run",
        "unix:",
        "host:25:26",
        "http://host",
        "[host]:628",
        "ho/st",
    ],
)
def test_B26_invalid_server_is_named(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_server(text)
    assert repr(text) in str(caught.value)


@given(st.text(max_size=30))
def test_name_of_any_server_parses_to_the_same_server(text: str) -> None:
    try:
        server = parse_server(text)
    except ValueError:
        return
    assert parse_server(server.name) == server


def test_without_a_file_all_mail_takes_the_default_route() -> None:
    routes = Routes.load(load(Settings, qmqp_servers=("a", "b:629", "a:628")))
    assert routes.names() == (DEFAULT,)
    assert routes.route_for("x@example.org") == DEFAULT
    route = routes.get(DEFAULT)
    assert route is not None
    assert [server.name for server in route.servers] == ["a:628", "b:629"], "each once"
    assert routes.get("bulk") is None
    assert routes.max_size() is None


FILE = """
[lists]
recipients = ["lists.example.org", "*@*.example.net", "News@example.com"]
servers = ["10.0.0.5", "[::1]:629"]
connections = 20
retry_min = "10s"
retry_max = "30m"
max_size = "10M"
bisect = "off"

[second]
recipients = ["*.org"]
servers = ["b"]
max_size = "20M"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "routes.toml"
    path.write_text(FILE)
    return path


def test_file_of_routes_is_read(file: Path) -> None:
    routes = Routes.load(load(Settings, routes=file, qmqp_servers=("z",)))
    route = routes.get("lists")
    assert route is not None
    assert [server.name for server in route.servers] == ["10.0.0.5:628", "[::1]:629"]
    assert (route.connections, route.retry_min, route.retry_max) == (20, 10.0, 1800.0)
    assert (route.max_size, route.bisect) == (10 << 20, False)
    assert routes.names() == ("lists", "second", DEFAULT)
    assert routes.max_size() == 10 << 20


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("x@lists.example.org", "lists"),
        ("X@LISTS.Example.ORG", "lists"),
        ("x@sub.lists.example.org", "second"),
        ("x@a.example.net", "lists"),
        ("x@example.net", DEFAULT),
        ("news@example.com", "lists"),
        ("old-news@example.com", DEFAULT),
        ("a@b@lists.example.org", "lists"),
        ("postmaster", DEFAULT),
        ("", DEFAULT),
    ],
)
def test_first_matching_route_takes_the_recipient(file: Path, address: str, name: str) -> None:
    assert Routes.load(load(Settings, routes=file)).route_for(address) == name


def test_default_route_in_the_file_keeps_the_servers_of_the_settings() -> None:
    tuned = parse_routes('[default]\nconnections = 3\nbisect = "off"')
    routes = Routes(tuned, None, Route(DEFAULT, (parse_server("a"),)))
    route = routes.get(DEFAULT)
    assert route is not None
    assert (route.servers, route.connections, route.bisect) == ((parse_server("a"),), 3, False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1", "x: a route is a table"),
        ("[a]\nservers = ['s']", "[a] recipients: write at least one"),
        ("[a]\nrecipients = ['r']", "[a] servers: write at least one"),
        ("[a]\nrecipients = 'r'\nservers = ['s']", "[a] recipients = 'r': must be a list"),
        ("[a]\nrecipients = ['r']\nservers = ['s:0']", "[a] servers = ['s:0']: bad port"),
        (
            "[a]\nrecipients = ['r']\nservers = ['s']\nconnections = 0",
            "[a] connections = 0: Input should be greater than 0",
        ),
        *(
            (
                f"[a]\nrecipients = ['r']\nservers = ['s']\n{key} = {value}",
                f"[a] {key} = {expected}",
            )
            for key, value, expected in (
                ("connections", "true", "True: Input should be a valid integer"),
                ("connections", "2.5", "2.5: Input should be a valid integer"),
                ("retry_min", "-5", "-5: Input should be greater than 0"),
                ("retry_min", "0", "0: Input should be greater than 0"),
                ("retry_max", "inf", "inf: Input should be a finite number"),
                ("retry_max", "nan", "nan: Input should be a finite number"),
                ("retry_min", "true", "True: Input should be a valid number"),
                ("retry_max", "[1]", "[1]: Input should be a valid number"),
                ("max_size", "0", "0: Input should be greater than 0"),
                ("max_size", "-1", "-1: Input should be greater than 0"),
                ("max_size", "'0K'", "'0K': Input should be greater than 0"),
                ("max_size", "1.5", "1.5: Input should be a valid integer"),
                ("max_size", "false", "False: Input should be a valid integer"),
                ("max_size", "'big'", "'big': is not a size: write"),
            )
        ),
        (
            "[a]\nrecipients = ['r']\nservers = ['s']\nretry_min = 'soon'",
            "[a] retry_min = 'soon': is not a duration",
        ),
        (
            "[a]\nrecipients = ['r']\nservers = ['s']\nretry_min = '2h'\nretry_max = '1h'",
            "[a] retry_max: must not",
        ),
        (
            "[a]\nrecipients = ['r']\nservers = ['s']\nbisect = 'on'",
            "[a] bisect = 'on': must be off or address",
        ),
        ("[a]\ncolour = 'red'", "[a] colour: no such key"),
        ("[a", "Expected ']'"),
    ],
)
def test_error_in_a_file_names_route_and_key(text: str, expected: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        Routes.load(load(Settings, routes=file))
    assert str(caught.value).startswith(f"RELAY_ROUTES: {file}: ")
    assert expected in str(caught.value)


def test_changed_file_is_read_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_INTERVAL", 0.0)
    monkeypatch.setattr(module, "STABLE_FOR", 0.0)
    routes = Routes.load(load(Settings, routes=file, qmqp_servers=("z",)))

    def change(text: str, *, stamp: int) -> Callable[[], object]:
        file.write_text(text)
        os.utime(file, ns=(stamp, stamp))
        return routes.names

    assert change("[third]\nrecipients = ['c']\nservers = ['c']", stamp=1)() == ("third", DEFAULT)
    assert change("[broken", stamp=2)() == ("third", DEFAULT), "what cannot be used changes nothing"
    file.unlink()
    assert routes.names() == ("third", DEFAULT)
    assert change(FILE, stamp=3)() == ("lists", "second", DEFAULT)
