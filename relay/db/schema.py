"""The schema: constants of the tables.

`messages` and `recipients` are insert-only. `deliveries` is the queue: a row is one QMQP request,
hot and narrow. `attempts` are kept as long as their message. `due_at` is when a delivery must be
handled again, and changes together with the state. Each state that is searched has a partial index
of its own (`migrations/tables.py`), so that no search scans the rows of another state.

What must stay true: no foreign keys on the hot tables, because they cost half as much again as the
writes themselves; `fsck` finds what they would refuse. Ids are UUIDv7 (`uuid` on PostgreSQL, dashed
text on SQLite). Times are `timestamptz`, on SQLite whole microseconds since 1970.
"""

from enum import StrEnum


def literals(values: tuple[str, ...] | type[StrEnum]) -> str:
    """The values as an SQL list of literals."""
    return ", ".join(f"'{value}'" for value in values)


REVISION = "0010"  # the newest migration
LONGEST_INDEXED = 1000
LONGEST_TEXT = 4000
