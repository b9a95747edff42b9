"""Listeners as operators write them, and the sockets that systemd passes."""

import os
import socket
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reception.listeners import SystemdSockets
from relay.listeners import OPTIONS, Listener, parse_listener
from relay.settings import SettingsError, SmtpdSettings, load


@pytest.mark.parametrize(
    ("text", "listener"),
    [
        ("0.0.0.0:25", Listener("0.0.0.0", 25)),
        (":465/tls", Listener("", 465, tls=True)),
        ("[::1]:587/auth", Listener("::1", 587, auth=True)),
        ("10.0.0.1:2526/proxy", Listener("10.0.0.1", 2526, proxy=True)),
        (
            "10.0.0.1:465/proxy/tls/auth",
            Listener("10.0.0.1", 465, tls=True, auth=True, proxy=True),
        ),
        ("systemd:smtp", Listener("", 0, socket_name="smtp")),
        ("systemd:relay.socket/tls", Listener("", 0, tls=True, socket_name="relay.socket")),
    ],
)
def test_a_listener_has_options_behind_its_address(text: str, listener: Listener) -> None:
    assert parse_listener(text) == listener
    assert parse_listener(str(listener)) == listener


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.0.0.0:25/tsl", "'tsl' is no option of this listener: write /tls or /auth or /proxy"),
        ("0.0.0.0:25/TLS", "'TLS' is no option"),
        ("0.0.0.0:25/", "'' is no option"),
        ("0.0.0.0:25/tls/tls", "has an option twice"),
        ("25/tls", "is not an address to listen on"),
        ("systemd:", "is not an address to listen on"),
        ("systemd:a:b", "is not an address to listen on"),
    ],
)
def test_nonsense_names_itself(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        parse_listener(text)


def test_a_protocol_may_have_fewer_options() -> None:
    assert parse_listener("127.0.0.1:628/proxy", ("proxy",)).proxy
    with pytest.raises(ValueError, match="'tls' is no option of this listener: write /proxy"):
        parse_listener("127.0.0.1:628/tls", ("proxy",))


@given(st.lists(st.sampled_from([*OPTIONS, "", "systemd:a", "[::1]:25", "127.0.0.1:25", "x", ":"])))
def test_any_parts_parse_to_what_they_say_or_raise_value_error(parts: list[str]) -> None:
    with suppress(ValueError):
        listener = parse_listener("/".join(parts))
        assert {name for name in OPTIONS if getattr(listener, name)} == set(parts[1:])


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("127.0.0.1:25, 127.0.0.1:25/auth", "127.0.0.1:25 is named twice"),
        ("systemd:a systemd:a", "systemd:a is named twice"),
    ],
)
def test_an_address_is_named_once(monkeypatch: pytest.MonkeyPatch, value: str, named: str) -> None:
    monkeypatch.setenv("RELAY_SMTP_LISTEN", value)
    with pytest.raises(SettingsError, match=f"RELAY_SMTP_LISTEN.*{named}"):
        load(SmtpdSettings)


def test_a_listener_where_no_client_can_log_in_is_refused() -> None:
    listen = "127.0.0.1:25, 127.0.0.1:587/auth"
    with pytest.raises(SettingsError, match=r"no client can log in at 127\.0\.0\.1:587/auth: set"):
        load(SmtpdSettings, smtp_listen=listen)
    settings = load(SmtpdSettings, smtp_listen=listen, auth_plaintext_networks="10.0.0.0/8")
    assert settings.smtp_listen[1].auth


def free_descriptors(count: int) -> int:
    """The first of so many descriptors in a row that nothing in this process uses."""
    used = {int(each.name) for each in Path("/proc/self/fd").iterdir()}
    return next(base for base in range(100, 1000) if used.isdisjoint(range(base, base + count)))


@pytest.fixture
def first() -> int:
    """Two listening sockets and one that does not listen, as systemd passes them: the first
    descriptor of three in a row."""
    made = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    made.append(socket.socket())
    base = free_descriptors(len(made))
    for number, each in enumerate(made):
        os.dup2(each.fileno(), base + number)
        each.close()
    return base


def environ(**values: str) -> dict[str, str]:
    return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "3", "PATH": "/bin"} | values


def test_systemd_sockets_are_taken_by_name_and_hidden_from_children(first: int) -> None:
    variables = environ(LISTEN_FDNAMES="smtp:smtp:other")
    passed = SystemdSockets(variables, first)
    assert variables == {"PATH": "/bin"}
    taken = passed.take("smtp")
    assert [each.fileno() for each in taken] == [first, first + 1]
    assert not any(each.get_inheritable() for each in taken)
    assert passed.names == ["other"]
    with pytest.raises(SettingsError, match=r"no socket 'smtp' to this process .others: other"):
        passed.take("smtp")
    with pytest.raises(SettingsError, match="'other' of systemd is not a TCP socket that listens"):
        passed.take("other")
    for each in taken:
        each.close()


def test_sockets_without_names_are_unknown(first: int) -> None:
    passed = SystemdSockets(environ(LISTEN_FDS="2"), first)
    assert passed.names == ["unknown"]
    for each in passed.take("unknown"):
        each.close()
    os.close(first + 2)


def test_sockets_of_another_process_are_not_taken(first: int) -> None:
    assert SystemdSockets(environ(LISTEN_PID="1", LISTEN_FDNAMES="smtp"), first).names == []
    with pytest.raises(SettingsError, match="passed no socket 'smtp'"):
        SystemdSockets({}).take("smtp")
    for number in range(3):
        os.close(first + number)


def test_a_unix_socket_is_refused(tmp_path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        server.listen()
        first = free_descriptors(1)
        os.dup2(server.fileno(), first)
    passed = SystemdSockets(environ(LISTEN_FDS="1", LISTEN_FDNAMES="smtp"), first)
    with pytest.raises(SettingsError, match="not a TCP socket"):
        passed.take("smtp")
