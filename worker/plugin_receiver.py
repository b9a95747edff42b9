"""Runs the `event` hook of one plugin, as a receiver of events.

Each such plugin is a subscription of its own, `plugin:NAME`, so one that fails does not keep events
from the others. What must stay true: a hook that raises, or takes longer than its time, gets the
event again, as a webhook does.
"""

from plugins.runner import Plugins
from qmqp_relay.events import Event
from relay.events.model import MailEvent, NewSubscription
from worker.event_receiver import SendResult

HOOK = "event"


class PluginReceiver:
    """The `event` hook of one plugin."""

    def __init__(self, plugins: Plugins, plugin: str) -> None:
        self.subscription = NewSubscription(f"plugin:{plugin}")
        self._plugins = plugins
        self._plugin = plugin

    async def send(self, event: MailEvent) -> SendResult:
        """Run the hook with an event once."""
        if await self._plugins.tell_one(self._plugin, HOOK, event=_public(event)):
            return SendResult()
        return SendResult("the hook failed or was late: the log of the worker says why")

    async def close(self) -> None:
        """Nothing is open. `Plugins.stop` ends the plugin."""


def receiving(plugins: Plugins) -> list[PluginReceiver]:
    """A receiver for each plugin with an `event` hook, in the order of the plugins."""
    return [PluginReceiver(plugins, one.name) for one in plugins.loaded if HOOK in one.hooks]


def _public(event: MailEvent) -> Event:
    """The event as plugins know it."""
    return Event(
        id=event.id,
        type=str(event.type),
        timestamp=event.event_at,
        queue_id=event.queue_id,
        delivery=event.delivery,
        message_id=event.message_id,
        sender=event.sender,
        recipients=event.recipients,
        route=event.route,
        server=event.server,
        attempt=event.attempt,
        outcome=event.outcome,
        reply=event.reply,
        reason_source=event.reason_source,
        size=event.size,
        received_at=event.received_at,
        next_attempt_at=event.next_at,
        user=event.auth_user,
        client_address=event.client_address,
    )
