"""Plugins as files, for tests: a front end in a thread that has loaded them."""

from collections.abc import Iterable
from pathlib import Path
from textwrap import dedent

from plugins.loader import load
from plugins.runner import Plugins
from reception.hooks import HookHost
from relay.settings import SmtpdSettings
from relay.settings import load as load_settings

HEADING = "from qmqp_relay import *\n"


def plugin_file(directory: Path, text: str, name: str = "example") -> Path:
    """A plugin in a file, which has imported the whole public package."""
    path = directory / f"{name}.py"
    path.write_text(HEADING + dedent(text))
    return path


def plugins(entries: str) -> Plugins:
    """The plugins of RELAY_PLUGINS."""
    loaded = load(load_settings(SmtpdSettings, plugins=entries))
    assert loaded is not None
    return loaded


def host(entries: str, routes: Iterable[str] = ("default", "fast")) -> HookHost:
    """What a front end needs of the plugins."""
    return HookHost(plugins(entries), lambda: tuple(routes))
