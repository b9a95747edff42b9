"""Whether a body may be deleted: one rule for every caller that deletes one.

A body may be deleted when its message has deliveries, each of them is finished and has no DSN
pending, and every recipient has a delivery. The first and the last always hold for rows that this
program makes. But the cleaner, `fsck` and the operations may meet a database that was restored,
truncated or edited, and a missing row must not cost the mail. A worker that has just recorded an
outcome asks only whether a delivery needs the body (`relay.queue.claim`), because the recipients
cost tens of microseconds a message.

What must stay true: the rule is asked again after the COMMIT that finished a delivery, because two
transactions that finish the last two deliveries cannot see each other.
"""

import json
from collections.abc import Iterable

from sqlalchemy import Engine

from relay.db.engine import reading
from relay.db.sql import Queries
from relay.ids import dashed


def deletable_bodies(engine: Engine, ids: Iterable[str]) -> list[str]:
    """Those of these messages whose body may be deleted; queue ids of 32 digits, sorted."""
    listed = [dashed(queue_id) for queue_id in ids]
    if not listed:
        return []
    with reading(engine) as connection:
        result = Queries(engine, __name__).run(
            connection, "deletable_bodies", ids=json.dumps(listed)
        )
        return list(result.scalars())
