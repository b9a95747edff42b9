"""How the command line prints rows on a terminal, in a pipe and as JSON."""

import io
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from commands import output
from commands.output import Columns, ago, cut, local_times, size, span, stamp, write
from relay.report.rows import Row

COLUMNS: Columns = {"NAME": lambda row: str(row["name"])[:3], "AGE": lambda row: ago(row["at"])}
ROWS: list[Row] = [
    {"name": "one\ttwo", "at": datetime(2026, 11, 22, 12, 0, tzinfo=UTC)},
    {"name": "three", "at": None},
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("<>", "<>"),
        ("exactly-24@long.example.", "exactly-24@long.example."),
        ("somebody.with.a.name@example.com", "somebody.wi…@example.com"),
        ("a@" + "sub." * 20 + "example.com", "a@sub.s….sub.example.com"),
        ("no-domain-at-all-but-very-long-indeed", "no-doma…very-long-indeed"),
    ],
)
def test_an_address_fits_and_keeps_its_domain(address: str, shown: str) -> None:
    assert cut(address, 24) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0s"),
        (-3, "0s"),
        (0.6, "1s"),
        (59, "59s"),
        (60, "1m"),
        (200, "3m 20s"),
        (3600, "1h"),
        (187200, "2d 4h"),
    ],
)
def test_a_span_has_its_two_largest_units(seconds: float, shown: str) -> None:
    assert span(seconds) == shown


def test_a_span_omits_a_unit_that_is_zero() -> None:
    assert span(86400 + 60) == "1d"


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0"), (1023, "1023"), (1024, "1.0K"), (25 << 20, "25.0M"), (3 << 40, "3.0T")],
)
def test_sizes(count: int, shown: str) -> None:
    assert size(count) == shown


def test_times_are_relative_to_now(monkeypatch: pytest.MonkeyPatch) -> None:
    now = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
    monkeypatch.setattr(output, "datetime", SimpleNamespace(now=lambda _zone: now))
    assert ago(None) == ""
    assert ago(now - timedelta(seconds=200)) == "3m 20s"
    assert ago(now + timedelta(seconds=30.4)) == "in 30s"


def test_a_time_has_its_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Etc/GMT-2")
    time.tzset()
    at = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
    try:
        with local_times(True):
            assert stamp(at) == "2026-11-22 14:00:00+02:00"
        assert stamp(at) == "2026-11-22 12:00:00Z"
        assert stamp(None) == ""
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_pipe_gets_whole_values_between_tabs(capsys: pytest.CaptureFixture[str]) -> None:
    assert write(ROWS, COLUMNS) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t") for line in lines] == [
        ["name", "at"],
        ["one two", "2026-11-22T12:00:00.000Z"],
        ["three", ""],
    ]


def test_a_program_gets_an_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert write(ROWS, COLUMNS, json_lines=True) == 2
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        {"name": "one\ttwo", "at": "2026-11-22T12:00:00.000Z"},
        {"name": "three", "at": None},
    ]


def test_a_terminal_gets_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("sys.stdout", terminal)
    assert write(ROWS, COLUMNS) == 2
    shown = terminal.getvalue()
    assert shown.split()[:3] == ["NAME", "AGE", "one"]
    assert "three" not in shown


def test_markup_in_a_reply_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    output.write([{"name": "[red]x[/]"}], {"REPLY": lambda row: str(row["name"])})
    assert "[red]x[/]" in terminal.getvalue()


def test_no_rows_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert write([], COLUMNS) == 0
    assert write([], COLUMNS, json_lines=True) == 0
    assert capsys.readouterr().out == ""


def test_rows_are_printed_as_they_come(capsys: pytest.CaptureFixture[str]) -> None:
    def rows() -> Iterator[Row]:
        yield {"n": 1}
        assert capsys.readouterr().out == '{"n": 1}\n'
        yield {"n": 2}

    assert write(rows(), {}, json_lines=True) == 2


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("short", ["    short"]),
        ("sixteen columns!", ["    sixteen columns!"]),
        (
            "addresses like somebody-else@a.org stay",
            ["    addresses like", "    somebody-else@a.", "    org stay"],
        ),
        ("", ["    "]),
    ],
)
def test_text_is_folded_between_words(text: str, shown: list[str]) -> None:
    assert output.folded(text, 4, 20).split("\n") == shown


def test_the_last_column_stays_on_the_line_if_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("sys.stdout", terminal)
    rows = [{"many": "m" * 44, "left": "0"}, {"many": "m", "left": "word " * 20}]
    columns: Columns = {"MANY": lambda row: str(row["many"]), "LEFT": lambda row: str(row["left"])}
    write(rows[:1], columns)
    assert terminal.getvalue().splitlines()[1] == "m" * 44 + "  0"
    write(rows, columns)
    assert terminal.getvalue().splitlines()[3:5] == ["m" * 44, "    0"], (
        "a long text needs more columns than are left"
    )
    assert max(map(len, terminal.getvalue().splitlines())) <= 60
