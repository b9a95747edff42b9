"""Colours and links on a terminal, and neither elsewhere."""

import contextlib
import io

import pytest

from commands import output, terminal
from commands.output import Columns

COLUMNS: Columns = {
    "ID": lambda row: str(row["queue_id"][-4:]),
    "STATE": lambda row: str(row["state"]),
    "SENDER": lambda row: str(row["sender"]),
    "REASON": lambda row: str(row["reason"]),
}
ROWS = [
    {"queue_id": "0" * 28 + "cafe", "state": "deferred", "sender": "held", "reason": "busy"},
    {"queue_id": "0" * 28 + "beef", "state": "\x1b[2J", "sender": "", "reason": "\x1b]8;;x\x1b\\"},
]


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR")
    return Screen()


def printed(screen: Screen) -> list[str]:
    with contextlib.redirect_stdout(screen):
        output.write(ROWS, COLUMNS)
    return screen.getvalue().splitlines()


def test_states_have_colours_and_the_heading_is_bold(screen: Screen) -> None:
    heading, first, second = printed(screen)
    assert heading == "\x1b[1mID    STATE     SENDER  REASON\x1b[0m"
    assert first == "cafe  \x1b[33mdeferred\x1b[0m  held    busy", "a sender has no colour"
    assert "\x1b" not in second, "what peers wrote is escaped"


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb"), ("TERM", None)])
def test_a_terminal_without_colours_gets_text(
    screen: Screen, monkeypatch: pytest.MonkeyPatch, name: str, value: str | None
) -> None:
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    assert "\x1b" not in "".join(printed(screen))


def test_an_empty_no_color_does_not_count(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "")
    assert "\x1b[33m" in printed(screen)[1]


def test_ids_are_links_to_the_page_whose_address_is_known(
    screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELAY_WEB_URL", "https://relay.example.org/")
    monkeypatch.setenv("NO_COLOR", "1")
    address = f"https://relay.example.org/message/{ROWS[0]['queue_id']}"
    assert printed(screen)[1] == (
        f"\x1b]8;;{address}\x1b\\cafe\x1b]8;;\x1b\\  deferred  held    busy"
    )
    monkeypatch.setenv("TERM", "linux")
    assert not terminal.takes_links(screen), "the console of Linux would print a part of a link"


def test_a_pipe_gets_neither(
    screen: Screen, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RELAY_WEB_URL", "https://relay.example.org/")
    for form in ("table", "csv", "tsv", "json"):
        output.write(ROWS[:1], COLUMNS, form=form)
    assert "\x1b" not in capsys.readouterr().out
