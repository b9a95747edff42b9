"""Common names, the reason why a delivery waits, and indexes that do not grow with waiting mail.

`TABLES`, `COLUMNS` and `VALUES` are renamed. `ADDED`: the new columns with their types. `INDEXES`:
the indexes of `deliveries` by name, after and before. The views are dropped first, because they
name renamed tables and columns; `migrations.views` creates them anew, and writes all comments.

One index on `due_at` held every state and every route together: a claim for one route scanned the
mail of all routes that was due earlier, and the search for stuck transfers scanned everything
overdue. Now each state that is searched has an index of its own. A row is in one of them at a time,
so a change of state costs what it did before. Queued mail that was never claimed lies apart from
retries in its index, so that either is found by its time.
"""

import importlib
import re
from collections.abc import Mapping

from alembic import op
from sqlalchemy import Connection

from migrations.views import drop_views

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

TABLES = {"actions": "audit", "touched": "audit_deliveries", "rests": "open_circuits"}
COLUMNS = {
    "messages": {"notice_of": "dsn_of"},
    "recipients": {"message_id": "queue_id"},
    "deliveries": {
        "message_id": "queue_id",
        "claims": "claim_count",
        "vanished": "crash_count",
        "wanted": "pending_operation",
        "wanted_why": "pending_reason",
    },
    "attempts": {"message_id": "queue_id", "hop": "attempt_index"},
    "audit": {"verb": "operation"},
    "audit_deliveries": {"message_id": "queue_id", "action": "audit_id"},
    "workers": {"until": "lease_expires_at", "ending": "end_reason"},
}
# Old and new values of columns. A K is `delivered`: `accepted` is left for what smtpd answers with
# 250. A worker whose lease ran out is expired.
VALUES = {
    "deliveries.last_outcome": ("accepted", "delivered"),
    "workers.end_reason": ("vanished", "expired"),
    "messages.protocol": ("NOTICE", "DSN"),
}
ADDED = {
    "deliveries.waiting_for": "TEXT",
    "messages.client_trusted": "BOOLEAN",
    "messages.dsn_content": "TEXT",
    "deliveries.dsn_withheld": "TEXT",
    # NULL for mail that waits during the upgrade: a migration does not know DELAY_WARNING.
    "deliveries.warn_at": "{instant}",
    "deliveries.reason_source": "TEXT",
}
# Before this column only the beginning of `last_reply` showed the source.
REASON_SOURCE = """UPDATE deliveries SET reason_source = CASE
        WHEN substr(last_reply, 1, 11) IN ('bounced by ', 'dropped by ')
            OR substr(last_reply, 1, 8) = 'held by ' THEN 'operator'
        WHEN last_outcome IN ('delivered', 'deferred', 'rejected') THEN 'server' ELSE 'relay' END
    WHERE last_reply IS NOT NULL"""
INDEXES = {
    "deliveries_queued": "(route, (CAST(claim_count > 0 AS integer)), due_at)"
    " WHERE state = 'queued'",
    "deliveries_sending": "(worker, due_at) WHERE state = 'sending'",
    "deliveries_deferred": "(due_at) WHERE state = 'deferred'",
    "deliveries_waiting": "(waiting_for, due_at)"
    " WHERE state = 'deferred' AND waiting_for IS NOT NULL",
    "deliveries_unwarned": "(warn_at, queue_id)"
    " WHERE warn_at IS NOT NULL AND state IN ('queued', 'sending', 'deferred')",
    "deliveries_dsn_pending": "(due_at)"
    " WHERE state IN ('bounced', 'expired') AND due_at IS NOT NULL",
}
BEFORE = {"deliveries_due_at": "(due_at) WHERE due_at IS NOT NULL"}
ROLE = "qmqp_relay_reader"  # may read every table; it may be missing (see 0002)
DSN_LIMITS = """CREATE TABLE dsn_limits (
    sender TEXT NOT NULL,
    last_at {instant} NOT NULL,
    CONSTRAINT dsn_limits_key PRIMARY KEY (sender)
)"""


def upgrade() -> None:
    """Rename, add the columns and the table that limits DSNs, replace the index."""
    connection = op.get_bind()
    postgresql = connection.dialect.name == "postgresql"
    drop_views(connection)
    for old, new in TABLES.items():
        _rename_table(connection, old, new)
    for table, names in COLUMNS.items():
        for old, new in names.items():
            connection.exec_driver_sql(f"ALTER TABLE {table} RENAME COLUMN {old} TO {new}")
    if postgresql:
        _rename_not_null(connection)
    for column, (old, new) in VALUES.items():
        _rename_value(connection, column, old, new)
    _rename_outcome(connection, "accepted", "delivered")
    instant = "TIMESTAMP WITH TIME ZONE" if postgresql else "BIGINT"
    for column, kind in ADDED.items():
        table, name = column.split(".")
        connection.exec_driver_sql(
            f"ALTER TABLE {table} ADD COLUMN {name} {kind.format(instant=instant)}"
        )
    connection.exec_driver_sql(REASON_SOURCE)
    _replace(connection, BEFORE, INDEXES)
    connection.exec_driver_sql(DSN_LIMITS.format(instant=instant))
    if (
        postgresql
        and connection.exec_driver_sql(f"SELECT 1 FROM pg_roles WHERE rolname = '{ROLE}'").scalar()
    ):
        connection.exec_driver_sql(f"GRANT SELECT ON dsn_limits TO {ROLE}")


def downgrade() -> None:
    """Take them away, put the index, the names and the views back."""
    connection = op.get_bind()
    drop_views(connection)
    for column, (old, new) in VALUES.items():
        _rename_value(connection, column, new, old)
    _rename_outcome(connection, "delivered", "accepted")
    _replace(connection, INDEXES, BEFORE)
    connection.exec_driver_sql("DROP TABLE dsn_limits")
    for column in reversed(ADDED):
        table, name = column.split(".")
        connection.exec_driver_sql(f"ALTER TABLE {table} DROP COLUMN {name}")
    for table, names in COLUMNS.items():
        for old, new in names.items():
            connection.exec_driver_sql(f"ALTER TABLE {table} RENAME COLUMN {new} TO {old}")
    for old, new in TABLES.items():
        _rename_table(connection, new, old)
    if connection.dialect.name == "postgresql":
        _rename_not_null(connection)
    before = importlib.import_module("migrations.versions.0002_looking")
    before.create_views(connection)


def _rename_table(connection: Connection, old: str, new: str) -> None:
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"ALTER TABLE {old} RENAME TO {new}")
        connection.exec_driver_sql(f"ALTER TABLE {new} RENAME CONSTRAINT {old}_key TO {new}_key")
        return
    # SQLite keeps the names of constraints when it renames a table.
    find = "SELECT sql FROM sqlite_master WHERE type = 'table' AND name = ?"
    made = str(connection.exec_driver_sql(find, (old,)).scalar())
    connection.exec_driver_sql(re.sub(rf"\b{old}(?=\b|_key)", new, made))
    connection.exec_driver_sql(f"INSERT INTO {new} SELECT * FROM {old}")
    connection.exec_driver_sql(f"DROP TABLE {old}")


def _rename_value(connection: Connection, column: str, old: str, new: str) -> None:
    table, name = column.split(".")
    connection.exec_driver_sql(f"UPDATE {table} SET {name} = '{new}' WHERE {name} = '{old}'")


def _rename_outcome(connection: Connection, old: str, new: str) -> None:
    """Rename an outcome of attempts, whose constraint names all outcomes."""
    if connection.dialect.name == "postgresql":
        (check,) = connection.exec_driver_sql(
            "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'attempts_outcome'"
        ).one()
        connection.exec_driver_sql("ALTER TABLE attempts DROP CONSTRAINT attempts_outcome")
        connection.exec_driver_sql(f"UPDATE attempts SET outcome = '{new}' WHERE outcome = '{old}'")
        changed = check.replace(f"'{old}'", f"'{new}'")
        connection.exec_driver_sql(
            f"ALTER TABLE attempts ADD CONSTRAINT attempts_outcome {changed}"
        )
        return
    find = """SELECT sql FROM sqlite_master WHERE tbl_name = 'attempts' AND sql IS NOT NULL
        ORDER BY type DESC"""
    table, *indexes = connection.exec_driver_sql(find).scalars().all()
    connection.exec_driver_sql("ALTER TABLE attempts RENAME TO attempts_before")
    connection.exec_driver_sql(str(table).replace(f"'{old}'", f"'{new}'"))
    columns = [row[1] for row in connection.exec_driver_sql("PRAGMA table_info(attempts)")]
    picked = ", ".join(
        f"CASE outcome WHEN '{old}' THEN '{new}' ELSE outcome END" if c == "outcome" else c
        for c in columns
    )
    connection.exec_driver_sql(f"INSERT INTO attempts SELECT {picked} FROM attempts_before")
    connection.exec_driver_sql("DROP TABLE attempts_before")
    for index in indexes:
        connection.exec_driver_sql(str(index))


def _rename_not_null(connection: Connection) -> None:
    """From version 18 on PostgreSQL names these constraints too, after the table and the column."""
    rows = connection.exec_driver_sql(
        """SELECT c.conrelid::regclass, c.conname, a.attname FROM pg_constraint c
        JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = c.conkey[1]
        WHERE c.contype = 'n' AND c.connamespace = 'public'::regnamespace"""
    ).all()
    for table, name, column in rows:
        if name != (wanted := f"{table}_{column}_not_null"):
            connection.exec_driver_sql(f"ALTER TABLE {table} RENAME CONSTRAINT {name} TO {wanted}")


def _replace(connection: Connection, old: Mapping[str, str], new: Mapping[str, str]) -> None:
    for name, definition in new.items():
        connection.exec_driver_sql(f"CREATE INDEX {name} ON deliveries {definition}")
    for name in old:
        connection.exec_driver_sql(f"DROP INDEX {name}")
