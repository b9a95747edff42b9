"""The timeline of a message on its page: what happened to it, in order, from the tables that record
it.

Tries, ends, notices and what operators did are rows of their own with times of their own; here they
become one list.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from commands.output import size
from relay.report.queries import Row


def timeline(
    message: dict[str, Any], notices: Sequence[Row], actions: Sequence[Row]
) -> list[tuple[datetime, str, str]]:
    """What happened to a message, in order: (when, a word that the style knows, words)."""
    first = (
        message["received_at"],
        "received",
        f"accepted from {message['client_address'] or 'this relay'}",
    )
    events = []
    for row in message["attempts"]:
        took = f"{(row['finished_at'] - row['started_at']).total_seconds():.3f}s"
        where = (
            f"to {row['server']}, {size(row['bytes_sent'])}B in {took}"
            if row["server"]
            else "worker lost"
        )
        number = f"delivery {row['delivery']}, try {row['claim']}" + (
            f".{row['attempt_index']}" if row["attempt_index"] > 1 else ""
        )
        events.append((row["started_at"], row["outcome"], f"{number} {where}: {row['reply']}"))
    ended = [row for row in message["deliveries"] if row["finished_at"]]
    events += [
        (row["finished_at"], row["state"], f"delivery {row['number']} is {row['state']}")
        for row in ended
    ]
    made = "notice {} to the sender is made ({} now)"
    events += [
        (row["received_at"], "notice", made.format(row["queue_id"], row["state"]))
        for row in notices
    ]
    for row in actions:
        verb, _, subject = row["verb"].partition(" ")
        words = f"{subject or f'delivery {row["delivery"]}'} by {row['actor']}" + (
            ": " if row["reason"] else ""
        )
        events.append((row["acted_at"], verb, words + row["reason"]))
    return [first, *sorted(events, key=lambda event: event[0])]
