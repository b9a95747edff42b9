"""The timeline of a message on its page, from the tables that record attempts, states, DSNs and
operations."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from commands.output import size
from relay.report.queries import Row


def timeline(
    message: dict[str, Any], dsns: Sequence[Row], actions: Sequence[Row]
) -> list[tuple[datetime, str, str]]:
    """What happened to a message, in order: (time, class of the style sheet, text)."""
    client = message["client_address"] or "this relay"
    events = []
    for row in message["attempts"]:
        attempt = f"delivery {row['delivery']}, try {row['claim']}"
        if row["attempt_index"] > 1:
            attempt += f".{row['attempt_index']}"
        to = "lost with its worker"
        if row["server"]:
            took = (row["finished_at"] - row["started_at"]).total_seconds()
            to = f"to {row['server']}, {size(row['bytes_sent'])}B in {took:.3f}s"
        events.append((row["started_at"], row["outcome"], f"{attempt} {to}: {row['reply']}"))
    for row in message["deliveries"]:
        if row["finished_at"]:
            text = f"delivery {row['number']} is {row['state']}"
            events.append((row["finished_at"], row["state"], text))
    for row in dsns:
        text = f"DSN {row['queue_id']} to the sender is generated ({row['state']} now)"
        events.append((row["received_at"], "DSN", text))
    for row in actions:
        verb, _, subject = row["verb"].partition(" ")
        text = f"{subject or f'delivery {row["delivery"]}'} by {row['actor']}"
        if row["reason"]:
            text += f": {row['reason']}"
        events.append((row["acted_at"], verb, text))
    events.sort(key=lambda event: event[0])
    return [(message["received_at"], "received", f"accepted from {client}"), *events]
