"""An event as programs get it: its types, and its payload.

What must stay true: the payload of VERSION keeps its keys and their meaning, and docs/webhooks.md
lists them. A key may be added without a new version.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, NamedTuple

VERSION = 1


class EventType(StrEnum):
    """What became of a delivery."""

    ACCEPTED = "accepted"
    DELIVERED = "delivered"
    DEFERRED = "deferred"
    BOUNCED = "bounced"
    EXPIRED = "expired"
    HELD = "held"
    DROPPED = "dropped"
    SPLIT = "split"
    UNCERTAIN = "uncertain"
    WARNED = "warned"


class NewSubscription(NamedTuple):
    """What a worker registers; no types or no routes: all."""

    name: str
    types: tuple[EventType, ...] = ()
    routes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MailEvent:
    """One event, with what does not change of its message. `recipients` are those of the delivery
    when it happened; `next_at` is when the next attempt is due."""

    sequence: int
    id: str
    event_at: datetime
    type: EventType
    queue_id: str
    delivery: int
    route: str
    attempt: int | None
    server: str | None
    outcome: str | None
    reply: str | None
    reason_source: str | None
    next_at: datetime | None
    message_id: str | None
    sender: str
    size: int
    received_at: datetime
    auth_user: str | None
    client_address: str
    recipients: tuple[str, ...]

    def payload(self) -> Mapping[str, Any]:
        """The event as JSON, in the form of the Standard Webhooks specification."""
        return {
            "type": str(self.type),
            "timestamp": instant(self.event_at),
            "data": {
                "version": VERSION,
                "id": self.id,
                "queue_id": self.queue_id,
                "delivery": self.delivery,
                "message_id": self.message_id,
                "sender": self.sender,
                "recipients": list(self.recipients),
                "route": self.route,
                "server": self.server,
                "attempt": self.attempt,
                "outcome": self.outcome,
                "reply": self.reply,
                "reason_source": self.reason_source,
                "size": self.size,
                "received_at": instant(self.received_at),
                "next_attempt_at": instant(self.next_at) if self.next_at else None,
                "user": self.auth_user,
                "client_address": self.client_address,
            },
        }


def instant(when: datetime) -> str:
    """A time in UTC, to the microsecond: `2026-11-27T16:50:00.123456Z`."""
    return when.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
