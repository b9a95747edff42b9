"""The audit: each operation with its actor, reason and filter, and the deliveries that it changed.

An operation changes deliveries chunk by chunk. The first chunk inserts the row of `audit`, later
chunks raise its `matched`, and each delivery gets a row in `audit_deliveries`. An operation that is
interrupted has recorded its changes.

What must stay true: an operator's change and its record are one transaction.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Engine

from relay.db.sql import Queries
from relay.ids import dashed, new_id

CHUNK = 500
FIRST = "00000000-0000-0000-0000-000000000000"  # before every id


@dataclass
class AuditEntry:
    """One row of `audit`. It is inserted with the first change. `filter_shown`: the filter as the
    operator would type it."""

    engine: Engine
    actor: str
    operation: str
    reason: str
    filter_shown: str = ""
    id: str = field(default_factory=lambda: dashed(new_id()))

    def note(self, connection: Connection, matched: int, keys: str = "[]") -> None:
        """Record that `matched` deliveries were changed, and their keys."""
        Queries(self.engine, __name__).run(
            connection,
            "record",
            id=self.id,
            actor=self.actor,
            operation=self.operation,
            reason=self.reason,
            filter=self.filter_shown,
            matched=matched,
            keys=keys,
        )

    def note_rows(self, connection: Connection, rows: Sequence[Any]) -> None:
        """Record rows that begin with the key of a delivery; without rows nothing is recorded."""
        if rows:
            self.note(connection, len(rows), keys_of(rows))


def keys_of(rows: Sequence[Sequence[Any]]) -> str:
    """Rows that begin with the key of a delivery, as statements take them in `:keys`."""
    return json.dumps([{"queue_id": str(row[0]), "number": row[1]} for row in rows])
