"""`qmqp-relay plugins`: what is loaded, in which order, and with which arguments and time limits.

The plugins are loaded and registered here as in smtpd and worker. No hook but `register` runs.
"""

from collections.abc import Iterator

from commands.errors import DONE, NOTHING_MATCHED, say
from commands.output import Columns, plain, span, write
from plugins.loader import load
from plugins.runner import Plugins
from relay.plugin_entries import PluginEntry
from relay.report.rows import Row
from relay.settings import Settings
from relay.settings import load as load_settings

SECRET = ("password", "passwd", "secret", "token", "key")
"""Parts of the names of options whose values are not shown."""
_COLUMNS: Columns = {
    "PLUGIN": lambda row: str(row["name"]),
    "TIMEOUT": lambda row: f"{span(row['timeout'])}, {span(row['message_timeout'])}",
    "FAIL": lambda row: str(row["fail"]),
    "HOOKS": lambda row: " ".join(row["hooks"]),
    "ARGUMENTS": lambda row: " ".join(row["arguments"]),
    "SOURCE": lambda row: plain(str(row["source"])),
}


def show_plugins(*, json_lines: bool) -> int:
    """Print the plugins in the order in which they run; the exit status."""
    loaded = load(load_settings(Settings))
    if loaded is None:
        say("no plugin: RELAY_PLUGINS is empty, and no package with a plugin is installed")
        return NOTHING_MATCHED
    write(plugin_rows(loaded), _COLUMNS, json_lines=json_lines)
    return DONE


def plugin_rows(loaded: Plugins) -> Iterator[Row]:
    """A row for each plugin. Values of options that are secrets by their names are `***`."""
    for plugin in loaded.loaded:
        entry = plugin.entry
        yield {
            "name": plugin.name,
            "source": plugin.source,
            "hooks": list(plugin.hooks),
            "arguments": list(_arguments(entry)),
            "timeout": entry.timeout,
            "message_timeout": entry.message_timeout,
            "fail": "open" if entry.fail_open else "closed",
        }


def _arguments(entry: PluginEntry) -> Iterator[str]:
    yield from entry.words
    for name, value in entry.options:
        secret = any(part in name.lower() for part in SECRET)
        yield f"{name}={'***' if secret else value}"
