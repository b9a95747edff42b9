"""Whether a body may be deleted: one rule for every caller that deletes one.

A body may be deleted when its message has deliveries, each of them is finished and has no DSN
pending, and every recipient has a delivery. The first and the last always hold for rows that this
program makes. But the cleaner, `fsck` and the operations may meet a database that was restored,
truncated or edited, and a missing row must not cost the mail. A worker that has just recorded an
outcome asks `body_needed` alone, because the recipients cost tens of microseconds a message.

What must stay true: the rule is asked again after the COMMIT that finished a delivery, because two
transactions that finish the last two deliveries cannot see each other.
"""

import json
from collections.abc import Iterable

from sqlalchemy import Engine

from relay.db.engine import reading
from relay.db.schema import NEEDS_BODY
from relay.db.sql import Statements
from relay.ids import dashed


def body_needed(message: str) -> str:
    """The SQL condition that some delivery needs the body; `message`: SQL for the queue id."""
    return f"EXISTS (SELECT 1 FROM deliveries o WHERE o.queue_id = {message} AND {NEEDS_BODY})"


def body_deletable(message: str) -> str:
    """The SQL condition of the whole rule; `message`: SQL for the queue id."""
    return f"""(EXISTS (SELECT 1 FROM deliveries o WHERE o.queue_id = {message})
        AND NOT {body_needed(message)}
        AND NOT EXISTS (SELECT 1 FROM recipients r LEFT JOIN deliveries o
            ON o.queue_id = r.queue_id AND o.number = r.delivery
            WHERE r.queue_id = {message} AND o.number IS NULL))"""


_DELETABLE = (
    f"SELECT @hex(x.queue_id) FROM @rows(:ids; queue_id uuid) WHERE {body_deletable('x.queue_id')}"
)


def deletable_bodies(engine: Engine, sql: Statements, ids: Iterable[str]) -> list[str]:
    """Those of these messages whose body may be deleted; queue ids of 32 digits, sorted."""
    rows = [{"queue_id": dashed(queue_id)} for queue_id in sorted(ids)]
    if not rows:
        return []
    with reading(engine) as connection:
        return sorted(row[0] for row in sql.run(connection, _DELETABLE, ids=json.dumps(rows)))
