"""The rows that the commands explain, typed: what `relay.report.queries` returns of a message, of
workers and of pauses.

The fields stand in the order of the statement's columns, and in JSON too. Times are aware
datetimes, ids are 32 hex digits, sizes are bytes.
"""

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class RecipientRow:
    """A recipient of a message."""

    position: int
    address: str
    delivery: int
    notify: str | None
    orcpt: str | None


@dataclass(frozen=True, slots=True)
class DeliveryRow:
    """A delivery of a message."""

    number: int
    parent: int | None
    route: str
    servers: str | None  # unfinished: those of its route today
    state: str
    due_at: datetime | None
    expires_at: datetime
    claim_count: int
    worker: str | None
    deferrals: int
    crash_count: int
    pending_operation: str | None
    last_outcome: str | None
    last_reply: str | None
    reason_source: str | None
    last_server: str | None
    dsn_withheld: str | None
    finished_at: datetime | None


@dataclass(frozen=True, slots=True)
class AttemptRow:
    """An attempt to send a delivery."""

    delivery: int
    claim: int
    attempt_index: int
    worker: str | None
    server: str | None
    started_at: datetime
    finished_at: datetime
    outcome: str
    reply: str
    bytes_sent: int


@dataclass(frozen=True, slots=True)
class MessageRow:
    """A message with what belongs to it, each in the order of its numbers. `segment` and
    `position` are the place of its body in the journal; None if a file has it. `prefix`: the fields
    that plugins have added, which stand before the body."""

    queue_id: str
    sender: str
    size: int
    received_at: datetime
    client_address: str
    helo: str
    protocol: str
    auth_user: str | None
    header_message_id: str | None
    body_type: str | None
    ret: str | None
    envid: str | None
    dsn_of: str | None
    dsn_content: str | None
    segment: str | None
    position: int | None
    tls: str | None
    prefix: str | None
    recipients: list[RecipientRow]
    deliveries: list[DeliveryRow]
    attempts: list[AttemptRow]


@dataclass(frozen=True, slots=True)
class DsnRow:
    """A DSN about a message, with its delivery."""

    queue_id: str
    received_at: datetime
    dsn_content: str | None
    state: str
    due_at: datetime | None
    finished_at: datetime | None
    last_outcome: str | None
    last_reply: str | None
    reason_source: str | None
    last_server: str | None


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """A worker. `sending` counts its deliveries; `routes` are the servers of each route in its
    settings, None before it has published them."""

    id: str
    host: str
    pid: int
    started_at: datetime
    lease_expires_at: datetime
    ended_at: datetime | None
    end_reason: str | None
    alive: bool
    sending: int
    claim_seconds: float | None
    routes: dict[str, list[str]] | None
    version: str | None


@dataclass(frozen=True, slots=True)
class PauseRow:
    """A route or server (`route:NAME`, `server:NAME`) that an operator paused."""

    subject: str
    since_at: datetime
    actor: str
    reason: str
