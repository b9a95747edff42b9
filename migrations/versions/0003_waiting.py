"""Who waits for what, and indexes that do not grow with what waits.

`ADDED`: a column a row, with its comment. `INDEXES`: the indexes of `deliveries` by name, after and before.

One index on `due_at` held every state and every route together: a claim for one route walked through the mail of all
others that was due before, and a look for stuck transfers through everything overdue. Now each state that something
looks for has an index of its own. A row is in one of them at a time, so a change of state costs what it did before.
"""

from collections.abc import Mapping

from alembic import op
from sqlalchemy import Connection

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

ADDED = {
    "deliveries.waiting_for": ("TEXT", "server:NAME, route:NAME: the delivery becomes due when that is back"),
    "messages.client_trusted": ("BOOLEAN", "whether the client is in CLIENT_NETWORKS; empty: one of our own, or older"),
    "messages.dsn_content": ("TEXT", "what a DSN encloses of the original: full, header or none"),
}
INDEXES = {
    "deliveries_queued": "(route, due_at) WHERE state = 'queued'",
    "deliveries_sending": "(worker, due_at) WHERE state = 'sending'",
    "deliveries_deferred": "(due_at) WHERE state = 'deferred'",
    "deliveries_owing": "(due_at) WHERE state IN ('bounced', 'expired') AND due_at IS NOT NULL",
}
BEFORE = {"deliveries_due_at": "(due_at) WHERE due_at IS NOT NULL"}


def upgrade() -> None:
    """Add the columns, replace the index."""
    connection = op.get_bind()
    postgresql = connection.dialect.name == "postgresql"
    for column, (kind, comment) in ADDED.items():
        table, name = column.split(".")
        connection.exec_driver_sql(f"ALTER TABLE {table} ADD COLUMN {name} {kind}")
        if postgresql:
            connection.exec_driver_sql(f"COMMENT ON COLUMN {column} IS '{comment}'")
    _replace(connection, BEFORE, INDEXES)


def downgrade() -> None:
    """Take them away, put the index back."""
    connection = op.get_bind()
    _replace(connection, INDEXES, BEFORE)
    for column in reversed(ADDED):
        table, name = column.split(".")
        connection.exec_driver_sql(f"ALTER TABLE {table} DROP COLUMN {name}")


def _replace(connection: Connection, old: Mapping[str, str], new: Mapping[str, str]) -> None:
    for name, what in new.items():
        connection.exec_driver_sql(f"CREATE INDEX {name} ON deliveries {what}")
    for name in old:
        connection.exec_driver_sql(f"DROP INDEX {name}")
