"""Whether anybody still needs a body: one rule, for all who remove one.

A body goes when its message has deliveries, each of them is done and owes nothing, and no recipient
lacks one. The first and the last are always so in what our statements make. But who goes through
the spool, or does what an operator asks, does so beside a database that may have been restored, cut
or mended by hand, and there a missing row must not cost the mail. A worker that has just recorded
an outcome asks `body_needed` alone: looking at the recipients as well took tens of microseconds a
message.

What must stay true: it is asked again after the COMMIT that ended a delivery, because two who end
the last two deliveries of a message at once do not see each other before.
"""

import json
from collections.abc import Iterable

from sqlalchemy import Engine

from relay.db.engine import reading
from relay.db.schema import NEEDS_BODY
from relay.db.sql import Statements
from relay.ids import dashed


def body_needed(message: str) -> str:
    """That a delivery needs it, as a condition; `message` is the id as the statement around it has
    it."""
    return f"EXISTS (SELECT 1 FROM deliveries o WHERE o.queue_id = {message} AND {NEEDS_BODY})"


def body_deletable(message: str) -> str:
    """The whole rule."""
    return f"""(EXISTS (SELECT 1 FROM deliveries o WHERE o.queue_id = {message})
        AND NOT {body_needed(message)}
        AND NOT EXISTS (SELECT 1 FROM recipients r LEFT JOIN deliveries o
            ON o.queue_id = r.queue_id AND o.number = r.delivery
            WHERE r.queue_id = {message} AND o.number IS NULL))"""


_FREE = (
    f"SELECT @hex(x.queue_id) FROM @rows(:ids; queue_id uuid) WHERE {body_deletable('x.queue_id')}"
)


def deletable_bodies(engine: Engine, sql: Statements, ids: Iterable[str]) -> list[str]:
    """Those of these messages whose body nobody needs, as far as is committed; ids of 32 digits, in
    order."""
    rows = [{"queue_id": dashed(queue_id)} for queue_id in sorted(ids)]
    if not rows:
        return []
    with reading(engine) as connection:
        return sorted(row[0] for row in sql.run(connection, _FREE, ids=json.dumps(rows)))
