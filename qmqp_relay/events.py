"""What the hook `event` gets: what became of mail."""

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Event:
    """One event. `type` is accepted, delivered, deferred, bounced, expired, held, dropped, split,
    uncertain or warned; docs/webhooks.md describes these and the fields.

    An event that is told again has the same `id`. `recipients` are those of the delivery when it
    happened. Times are UTC.
    """

    id: str
    type: str
    timestamp: datetime
    queue_id: str
    delivery: int
    message_id: str | None
    sender: str
    recipients: tuple[str, ...]
    route: str
    server: str | None
    attempt: int | None
    outcome: str | None
    reply: str | None
    reason_source: str | None
    size: int
    received_at: datetime
    next_attempt_at: datetime | None
    user: str | None
    client_address: str
