"""Which plugins there are: those that RELAY_PLUGINS names, and then those that packages declare.

A process without plugins needs no other module of this package.
"""

from importlib.metadata import EntryPoint, entry_points

from relay.plugin_entries import PluginEntry
from relay.settings import Settings

GROUP = "qmqp_relay"


def installed_plugins() -> dict[str, EntryPoint]:
    """The plugins that installed packages declare, by their names."""
    return {point.name: point for point in entry_points(group=GROUP)}


def plugin_entries(settings: Settings) -> list[PluginEntry]:
    """All plugins, in the order in which they run."""
    named = {entry.name for entry in settings.plugins}
    return [
        *settings.plugins,
        *(PluginEntry(name) for name in sorted(installed_plugins()) if name not in named),
    ]
