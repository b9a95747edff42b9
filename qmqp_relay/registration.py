"""What `register` gets: the relay, and the words behind the plugin's name in RELAY_PLUGINS."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

from relay.settings import seconds, size


class PluginArgumentError(ValueError):
    """An argument of a plugin is wrong, or missing. The relay does not start, and shows the
    text."""


class PluginLog(Protocol):
    """A logger: `event` is a short phrase, and everything else a field."""

    def debug(self, event: str, **fields: Any) -> Any: ...

    def info(self, event: str, **fields: Any) -> Any: ...

    def warning(self, event: str, **fields: Any) -> Any: ...

    def error(self, event: str, **fields: Any) -> Any: ...


class PluginArguments:
    """The arguments of a plugin: `words`, and `options` of the form `name=value`.

    `timeout=`, `message_timeout=` and `fail=` are the relay's, and not among them.
    """

    def __init__(self, words: tuple[str, ...], options: dict[str, str]) -> None:
        self.words = words
        self.options = options

    def word(self, index: int, default: str | None = None) -> str:
        """The word at this index, from 0. Raises PluginArgumentError without one and without a
        default."""
        if index < len(self.words):
            return self.words[index]
        if default is None:
            raise PluginArgumentError(f"needs {index + 1} words behind its name")
        return default

    def option(self, name: str, default: str | None = None) -> str:
        """The value of `name=value`. Raises PluginArgumentError if it is missing and has no
        default."""
        value = self.options.get(name, default)
        if value is None:
            raise PluginArgumentError(f"needs {name}=...")
        return value

    def seconds(self, name: str, default: float) -> float:
        """The value of an option that is a duration, such as `delay=5m`."""
        return self._parsed(name, seconds, default)

    def size(self, name: str, default: int) -> int:
        """The value of an option that is a number of octets, such as `limit=64K`."""
        return self._parsed(name, size, default)

    def check_known(self, *names: str, words: int = 0) -> None:
        """Raises PluginArgumentError if there is another option than these, or more words."""
        for name in self.options.keys() - set(names):
            known = ", ".join(f"{each}=" for each in names) or "none"
            raise PluginArgumentError(f"has no option {name}=; its options are: {known}")
        if len(self.words) > words:
            raise PluginArgumentError(f"takes {words} words, and {self.words[words]!r} is too many")

    def _parsed[Value](self, name: str, parse: Callable[[str], Value], default: Value) -> Value:
        text = self.options.get(name)
        try:
            return default if text is None else parse(text)
        except ValueError as error:
            raise PluginArgumentError(f"{name}={text}: {error}") from None


class Relay:
    """The relay, as `register` gets it. `hostname` is its name, `log` a logger of the plugin's
    own."""

    def __init__(self, hostname: str, log: PluginLog) -> None:
        self.hostname = hostname
        self.log = log
        self.stopping: list[Callable[[], Awaitable[None] | None]] = []
        """What `at_stop` was called with."""

    def path(self, text: str) -> Path:
        """The path of a file that an argument names; a relative one as for RELAY_ROUTES."""
        return Path(text).expanduser()

    def at_stop(self, function: Callable[[], Awaitable[None] | None]) -> None:
        """Has a function, `def` or `async def`, called when the process stops: it closes what the
        plugin has opened."""
        self.stopping.append(function)
