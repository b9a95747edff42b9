"""Logs: one event a line, JSON unless on a terminal, and never a raw byte from a peer."""

import json
import logging
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.log import configure, escaped, first_line, get_logger, redact_addresses
from relay.settings import Settings, load
from tests.scaling import growth


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """Returns the text that was written to standard error since the last call."""
    return lambda: capsys.readouterr().err


def lines(said: Callable[[], str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in said().splitlines()]


def test_event_is_a_line_of_json_with_its_fields(said: Callable[[], str]) -> None:
    configure(load(Settings))
    get_logger("reception.receiver").info("accepted", id="0" * 32, size=100, sender="a@example.com")
    (line,) = lines(said)
    assert line.pop("timestamp")
    assert line == {
        "event": "accepted",
        "level": "info",
        "id": "0" * 32,
        "size": 100,
        "sender": "a@example.com",
    }


def test_records_of_other_libraries_have_the_same_form(said: Callable[[], str]) -> None:
    configure(load(Settings))
    logging.getLogger("celery.worker").warning("connection %s", "lost")
    logging.getLogger("celery.worker").info("chatter")
    (line,) = lines(said)
    assert (line["event"], line["level"]) == ("connection lost", "warning")


def test_line_that_cannot_be_written_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    went_on = False
    with (
        suppress(OSError),
        Path("/dev/full").open("w") as full,
    ):  # closing it writes once more, and fails
        monkeypatch.setattr("sys.stderr", full)
        configure(load(Settings))
        get_logger("x").error("database away")
        went_on = True
    assert went_on


def test_level_hides_lower_events(said: Callable[[], str]) -> None:
    configure(load(Settings, log_level="warning"))
    get_logger("x").info("quiet")
    get_logger("x").warning("heard")
    assert [line["event"] for line in lines(said)] == ["heard"]


def test_traceback_is_a_field_of_the_line(said: Callable[[], str]) -> None:
    configure(load(Settings))
    try:
        raise ValueError("why")
    except ValueError:
        get_logger("x").exception("failed")
    (line,) = lines(said)
    assert "ValueError: why" in str(line["exception"])


def test_addresses_are_redacted(said: Callable[[], str]) -> None:
    configure(load(Settings, log_addresses="redacted"))
    get_logger("x").info("accepted", sender="ann@example.com", recipient="bob@example.org", size=1)
    get_logger("x").info("accepted", sender="")
    get_logger("x").info(
        "bounced", reply='no such mailbox: <bob@example.org>, "b o b"@example.net (#5.1.1)'
    )
    logging.getLogger("celery").warning("lost ann@example.com")
    first, second, third, fourth = lines(said)
    assert (first["sender"], first["recipient"]) == ("...@example.com", "...@example.org")
    assert second["sender"] == ""
    assert third["reply"] == "no such mailbox: <...@example.org>, ...@example.net (#5.1.1)"
    assert fourth["event"] == "lost ...@example.com"
    get_logger("x").info("delivered", to=['a b"@example.com', "postmaster", "c@example.org"])
    (fifth,) = lines(said)
    assert fifth["to"] == ["...@example.com", "...@postmaster", "...@example.org"]


@pytest.mark.parametrize(
    ("reply", "shown"),
    [
        ("a@b@c.example", "...@c.example"),
        ("@c.example", "@c.example"),
        ('a@"b c"@d', "...@...@d"),
        ('"no end @ all', '"no end @ all'),
        ("<a-b@c>,d@e", "<...@c>,...@e"),
    ],
)
def test_odd_addresses_are_redacted(reply: str, shown: str) -> None:
    assert redact_addresses(None, "info", {"reply": reply}) == {"reply": shown}


@pytest.mark.parametrize("piece", ["a", "a@", '"', '"a', 'a"@', "a "])
def test_redaction_takes_linear_time(piece: str) -> None:
    def redact(text: str) -> None:
        redact_addresses(None, "info", {"reply": text})

    assert growth(redact, piece * 1000 + " @", piece * 16_000 + " @") < 64, (
        "16 times as long, not 256"
    )


def test_console_format_is_not_json(said: Callable[[], str]) -> None:
    configure(load(Settings, log_format="console"))
    get_logger("x").info("accepted", id="abc")
    line = said()
    assert "accepted" in line
    assert not line.startswith("{")


def test_console_format_can_be_searched_as_the_log_of_postfix(
    said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    configure(load(Settings, log_format="console"))
    get_logger("x").info("delivered", id="abc", to=["you@example.org", "\x1b[31m@x"], recipients=2)
    line = said()
    assert " to=<you@example.org>,<\\x1b[31m@x>" in line
    assert "\x1b" not in line, "a file takes no colours"
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ ", line), "a file needs dates"


def test_console_format_shows_no_values_of_variables(said: Callable[[], str]) -> None:
    configure(load(Settings, log_format="console"))
    password = "s3cret"
    try:
        raise ValueError(len(password))
    except ValueError:
        get_logger("x").exception("failed")
    text = said()
    assert "ValueError: 6" in text
    assert text.count("s3cret") == 0


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"250 ok", "250 ok"),
        (b"a\nb", r"a\nb"),
        (b"\x1b[31mred", r"\x1b[31mred"),
        (b"\xff\x00", r"\xff\x00"),
        ("é", r"\xc3\xa9"),
        ("\udcff", r"\xff"),
        ("", ""),
        ("back\\slash", "back\\slash"),
    ],
)
def test_escaped_is_printable_ascii(raw: bytes | str, text: str) -> None:
    assert escaped(raw) == text


@given(
    st.one_of(st.binary(), st.binary().map(lambda raw: raw.decode("utf-8", "surrogateescape"))),
    st.integers(5, 50),
)
def test_escaped_bounds_any_bytes_of_a_peer(raw: bytes | str, longest: int) -> None:
    text = escaped(raw, longest)
    assert len(text) <= longest
    assert text.isascii()
    assert text.isprintable()


def test_first_line_of_an_error_is_bounded_and_redacted() -> None:
    assert first_line(ValueError("\nwhy\nSQL: secret")) == "why"
    assert first_line(ValueError()) == "ValueError"
    assert (
        first_line(OSError("redis://:s3cret@host:6379/0 refused"))
        == "redis://:***@host:6379/0 refused"
    )
    assert len(first_line(ValueError("x" * 1000))) == 300
