"""RELAY_PLUGINS: which plugins are loaded, in which order, and with which arguments.

An entry is the plugin's name and its arguments, quoted as in a shell:
`./plugins/greylist.py delay=5m fail=open`. Entries stand on lines of their own, or between
semicolons; a line that begins with `#` is a comment. The relay itself takes three arguments:
`timeout=` for all hooks but `message` and `queue`, `message_timeout=` for these two (a plugin may
have other defaults for both), and `fail=open`, which lets mail pass when the plugin fails.
"""

import re
import shlex
from collections.abc import Callable
from typing import NamedTuple

TIMEOUT = 5.0
"""Seconds that a hook may take."""
MESSAGE_TIMEOUT = 30.0
"""Seconds that the hooks `message` and `queue` may take."""
_ENTRY = re.compile(r"""(?:[^;"'\\]|\\.|"(?:[^"\\]|\\.)*"|'[^']*'|["'\\].*)+""")
"""Up to a semicolon that is not quoted. A quote without its end reaches to the end of the line."""
_OPTION = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)


class PluginEntry(NamedTuple):
    """One plugin as RELAY_PLUGINS names it."""

    name: str
    words: tuple[str, ...] = ()
    options: tuple[tuple[str, str], ...] = ()
    timeout: float = TIMEOUT
    message_timeout: float = MESSAGE_TIMEOUT
    fail_open: bool = False
    own_limits: frozenset[str] = frozenset()
    """The names of the time limits that the entry sets itself."""


def parse_plugins(text: str, seconds: Callable[[str], float]) -> tuple[PluginEntry, ...]:
    """The entries; `seconds` parses a duration. Raises ValueError that names the entry and the
    argument, and shows no value of another argument."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    entries = []
    for line in lines:
        for part in _ENTRY.findall(line):
            try:
                words = shlex.split(part)
            except ValueError as error:
                name = part.split(None, 1)[0]
                raise ValueError(f"{name}: {str(error).lower()} in its arguments") from None
            if words:
                entries.append(_entry(words[0], words[1:], seconds))
    return tuple(entries)


def _entry(name: str, arguments: list[str], seconds: Callable[[str], float]) -> PluginEntry:
    words, options = [], dict[str, str]()
    for argument in arguments:
        match = _OPTION.fullmatch(argument)
        if match is None:
            words.append(argument)
        elif match[1] in options:
            raise ValueError(f"{name}: {match[1]}= is given twice")
        else:
            options[match[1]] = match[2]
    limits = {"timeout", "message_timeout"} & options.keys()
    return PluginEntry(
        name,
        tuple(words),
        timeout=_limit(name, "timeout", options.pop("timeout", None), TIMEOUT, seconds),
        message_timeout=_limit(
            name, "message_timeout", options.pop("message_timeout", None), MESSAGE_TIMEOUT, seconds
        ),
        own_limits=frozenset(limits),
        fail_open=_fail_open(name, options.pop("fail", "closed")),
        options=tuple(options.items()),
    )


def _limit(
    name: str, option: str, text: str | None, default: float, seconds: Callable[[str], float]
) -> float:
    try:
        value = default if text is None else seconds(text)
    except ValueError as error:
        raise ValueError(f"{name}: {option}={text}: {error}") from None
    if value <= 0:
        raise ValueError(f"{name}: {option}={text}: must be more than 0")
    return value


def _fail_open(name: str, text: str) -> bool:
    if text not in ("open", "closed"):
        raise ValueError(f"{name}: fail={text}: write open, or closed")
    return text == "open"
