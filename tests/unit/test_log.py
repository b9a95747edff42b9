"""Logs: one event a line, JSON unless somebody watches, and never a raw byte of a peer's."""

import io
import json
import logging
import sys
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from relay.log import configure, escaped, first_line, get_logger
from relay.settings import Settings, load


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What is written to standard error; logging is put right again at the end."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield stream
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_an_event_is_a_line_of_json_with_its_fields(said: io.StringIO) -> None:
    configure(load(Settings))
    get_logger("smtpd.receiver").info("accepted", id="0" * 32, size=100, sender="a@example.com")
    (line,) = lines(said)
    assert line.pop("timestamp")
    assert line == {"event": "accepted", "level": "info", "id": "0" * 32, "size": 100, "sender": "a@example.com"}


def test_other_libraries_speak_in_the_same_lines(said: io.StringIO) -> None:
    configure(load(Settings))
    logging.getLogger("celery.worker").warning("connection %s", "lost")
    logging.getLogger("celery.worker").info("chatter")
    (line,) = lines(said)
    assert (line["event"], line["level"]) == ("connection lost", "warning")


def test_levels(said: io.StringIO) -> None:
    configure(load(Settings, log_level="warning"))
    get_logger("x").info("quiet")
    get_logger("x").warning("heard")
    assert [line["event"] for line in lines(said)] == ["heard"]


def test_errors_bring_their_traceback_in_one_line(said: io.StringIO) -> None:
    configure(load(Settings))
    try:
        raise ValueError("why")
    except ValueError:
        get_logger("x").exception("failed")
    (line,) = lines(said)
    assert "ValueError: why" in str(line["exception"])


def test_addresses_can_be_left_out(said: io.StringIO) -> None:
    configure(load(Settings, log_addresses="redacted"))
    get_logger("x").info("accepted", sender="ann@example.com", recipient="bob@example.org", size=1)
    get_logger("x").info("accepted", sender="", recipients=["ann@example.com", "bob@example.org"])
    assert "ann" not in said.getvalue()
    assert "bob" not in said.getvalue()
    first, second = lines(said)
    assert (first["sender"], first["recipient"]) == ("...@example.com", "...@example.org")
    assert (second["sender"], second["recipients"]) == ("", ["...@example.com", "...@example.org"])


def test_people_get_plain_lines(said: io.StringIO) -> None:
    configure(load(Settings, log_format="console"))
    get_logger("x").info("accepted", id="abc")
    assert "accepted" in said.getvalue()
    assert not said.getvalue().startswith("{")


@pytest.mark.parametrize(("raw", "text"), [
    (b"250 ok", "250 ok"), (b"a\nb", r"a\nb"), (b"\x1b[31mred", r"\x1b[31mred"), (b"\xff\x00", r"\xff\x00"),
    ("é", r"\xc3\xa9"), ("\udcff", r"\xff"), ("", ""), ("back\\slash", "back\\slash"), ("\ud800", r"\xed\xa0\x80"),
])  # fmt: skip
def test_escaped(raw: bytes | str, text: str) -> None:
    assert escaped(raw) == text


@given(st.one_of(st.binary(), st.text(st.characters(exclude_categories=[]))), st.integers(5, 50))
def test_whatever_a_peer_says_becomes_a_short_printable_line(raw: bytes | str, longest: int) -> None:
    text = escaped(raw, longest)
    assert len(text) <= longest
    assert text.isascii()
    assert text.isprintable()


def test_first_line_of_an_error() -> None:
    assert first_line(ValueError("\nwhy\nSQL: secret")) == "why"
    assert first_line(ValueError()) == "ValueError"
    assert len(first_line(ValueError("x" * 1000))) == 300
