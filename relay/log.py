"""Logs: structlog, one event a line, as JSON unless standard error is a terminal.

An event is a short fixed phrase with fields; `id` is the queue id, from the SMTP session to the
QMQP reply. docs/events.md lists the events. Records of other libraries become the same lines.

What must stay true: bytes from peers never reach a terminal raw; no field is a secret; a line that
cannot be written (a full disk, a closed pipe) stops no mail.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, TextIO, cast

from relay.redaction import redacted

if TYPE_CHECKING:
    from structlog.stdlib import BoundLogger

_ADDRESSES = ("sender", "recipient")
MOST_NAMED = 10  # recipients that an event names
_ADDRESS = re.compile(r'"[^"]*"@|[^\s<>()\[\],;:"]+')
"""A quoted local part, or a word that may contain an address. The pattern reads each character once
or twice. A pattern with the `@` in it would start again at each character of a word without one,
and a peer may send such words."""


class LogSettings(Protocol):
    """The settings of the log, as `relay.settings.Settings` has them."""

    @property
    def log_level(self) -> str: ...
    @property
    def log_format(self) -> str: ...
    @property
    def log_addresses(self) -> str: ...


@contextmanager
def _without_rich() -> Iterator[None]:
    """structlog is imported in this block. It would import rich, which typer brings along: rich
    takes 4 MiB in each process, and its tracebacks show the values of all local variables, of which
    some are secrets."""
    rich = sys.modules.get("rich")
    sys.modules["rich"] = None  # type: ignore[assignment]  # an import raises ImportError
    try:
        yield
    finally:
        del sys.modules["rich"]
        if rich is not None:  # it is a plugin's
            sys.modules["rich"] = rich


class _Logger:
    """structlog's logger, made at the first event: commands that log nothing start sooner."""

    def __init__(self, name: str) -> None:
        self._name = name

    @cached_property
    def _logger(self) -> Any:
        with _without_rich():
            from structlog.stdlib import get_logger

        return get_logger(self._name)

    def __getattr__(self, level: str) -> Any:
        return getattr(self._logger, level)


def get_logger(name: str) -> "BoundLogger":
    """A logger named after its module."""
    return cast("BoundLogger", _Logger(name))


def escaped(data: bytes | str, longest: int = 500) -> str:
    """Bytes from a peer as one bounded line of printable ASCII: everything else as `\\xNN`, cut at
    `longest`."""
    raw = (
        data.encode("utf-8", "surrogateescape")
        if isinstance(data, str)
        else bytes(data[: longest * 4])
    )
    if raw.isascii() and (text := raw.decode("ascii")).isprintable() and len(text) <= longest:
        return text
    text = "".join(chr(b) if 32 <= b < 127 else "\\n" if b == 10 else f"\\x{b:02x}" for b in raw)
    return text if len(text) <= longest else text[: longest - 3] + "..."


def first_line(error: BaseException | None) -> str:
    """The first line of an error's text, bounded; SQLAlchemy puts the statement below it."""
    # `redacted` needs the `@` behind a password, so the text is cut after it.
    return redacted((str(error).strip().splitlines() or [type(error).__name__])[0])[:300]


def redact_addresses(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Replace the local parts of all addresses of an event by `...`."""
    for name, value in event.items():
        if isinstance(value, str) and value and name in _ADDRESSES:
            event[name] = _redacted(value)
        elif name == "to":
            event[name] = [_redacted(address) for address in value]
        elif isinstance(value, str) and "@" in value:  # a reply or a text of a library
            event[name] = _ADDRESS.sub(_without_local_part, value)
    return event


def named(addresses: Iterable[str]) -> list[str]:
    """The first of the recipients, for the field `to` of an event: a list of thousands would make
    lines that no program reads."""
    return list(islice(addresses, MOST_NAMED))


def _as_postfix_does(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Write the recipients as `to=<a@example.org>,<b@example.org>`, for people with `grep`."""
    if isinstance(to := event.get("to"), list):
        event["to"] = ",".join(f"<{repr(address)[1:-1]}>" for address in to)
    return event


def _redacted(address: str) -> str:
    return "...@" + address.rpartition("@")[2]


def _without_local_part(word: re.Match[str]) -> str:
    local, _, domain = word[0].rpartition("@")
    return f"...@{domain}" if local else word[0]


_ENCODER = json.JSONEncoder(default=repr)  # json.dumps would make an encoder for every event


def _json(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> str:
    return _ENCODER.encode(event)


def _stamp(_logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Add level, time and traceback. One step takes the place of structlog's three, because each
    message writes three lines."""
    event["level"] = "error" if method == "exception" else method
    event["timestamp"] = datetime.now(UTC).isoformat(timespec="microseconds")[:-6] + "Z"
    if not event.get("exc_info"):
        return event
    from structlog.processors import format_exc_info

    return format_exc_info(_logger, method, event)


class _LineWriter:
    """The logger that structlog writes to; an error of the file is ignored."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def msg(self, line: str) -> None:
        with suppress(OSError):
            self._file.write(line + "\n")
            self._file.flush()

    debug = info = warning = error = critical = exception = msg


def log_to_stderr() -> None:
    """Keep what plugins log out of the output of a command that loads them."""
    with _without_rich():
        import structlog

    structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))


def configure(settings: LogSettings) -> None:
    """Set up this process' logs by LOG_LEVEL, LOG_FORMAT and LOG_ADDRESSES."""
    with _without_rich():
        import structlog

    is_tty = sys.stderr.isatty()
    for_people = settings.log_format == "console" or (settings.log_format == "auto" and is_tty)
    before: list[Any] = [redact_addresses] if settings.log_addresses == "redacted" else []
    before += (
        [
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(
                fmt="%H:%M:%SZ" if is_tty else "%Y-%m-%d %H:%M:%SZ", utc=True
            ),
            _as_postfix_does,
        ]
        if for_people
        else [_stamp]
    )
    colours = is_tty and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    last: Any = (
        structlog.dev.ConsoleRenderer(
            colors=colours, pad_event_to=12, exception_formatter=structlog.dev.plain_traceback
        )
        if for_people
        else _json
    )
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    structlog.configure(
        processors=[*before, last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: _LineWriter(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    strip = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=before, processors=[strip, last])
    )
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)
