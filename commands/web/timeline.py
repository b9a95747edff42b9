"""The timeline of a message on its page, from the tables that record attempts, states, DSNs and
operations."""

from collections.abc import Sequence
from datetime import datetime

from commands.output import size
from relay.report.records import DsnRow, MessageRow
from relay.report.rows import Row


def timeline(
    message: MessageRow, dsns: Sequence[DsnRow], operations: Sequence[Row]
) -> list[tuple[datetime, str, str]]:
    """What happened to a message, in order: (time, class of the style sheet, text)."""
    events = []
    for row in message.attempts:
        attempt = f"delivery {row.delivery}, try {row.claim}"
        if row.attempt_index > 1:
            attempt += f".{row.attempt_index}"
        to = "lost with its worker"
        if row.server:
            took = (row.finished_at - row.started_at).total_seconds()
            to = f"to {row.server}, {size(row.bytes_sent)}B in {took:.3f}s"
        events.append((row.started_at, row.outcome, f"{attempt} {to}: {row.reply}"))
    events += [
        (row.finished_at, row.state, f"delivery {row.number} is {row.state}")
        for row in message.deliveries
        if row.finished_at
    ]
    events += [
        (dsn.received_at, "DSN", f"DSN {dsn.queue_id} to the sender is generated ({dsn.state} now)")
        for dsn in dsns
    ]
    for operation in operations:
        name, _, subject = operation["operation"].partition(" ")
        reason = f": {operation['reason']}" if operation["reason"] else ""
        text = f"{subject or f'delivery {operation["delivery"]}'} by {operation['actor']}{reason}"
        events.append((operation["acted_at"], name, text))
    events.sort(key=lambda event: event[0])
    client = message.client_address or "this relay"
    return [(message.received_at, "received", f"accepted from {client}"), *events]
