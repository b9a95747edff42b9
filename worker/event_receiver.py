"""What gets events: a webhook (`worker.webhook_client`) or a plugin."""

from dataclasses import dataclass
from typing import Protocol

from relay.events.model import MailEvent, NewSubscription


@dataclass(frozen=True, slots=True)
class SendResult:
    """What became of one try. `error` is empty if the event has arrived.

    `down`: the receiver as a whole seems to fail, and not this event alone. `gone`: it wants no
    events any more. `retry_after`: seconds that it asks for. `tried`: False for a fault of this
    machine.
    """

    error: str = ""
    down: bool = False
    gone: bool = False
    retry_after: float = 0.0
    tried: bool = True


class EventReceiver(Protocol):
    """Gets the events of one subscription, in a worker's event loop."""

    @property
    def subscription(self) -> NewSubscription:
        """What it wants."""

    async def send(self, event: MailEvent) -> SendResult:
        """Send an event once. It ends in bounded time, and raises nothing."""

    async def close(self) -> None:
        """Close what is open."""
