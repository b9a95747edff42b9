"""Who waits for what, and indexes that do not grow with what waits.

`ADDED`: a column a row, with its comment. `INDEXES`: the indexes of `deliveries` by name, after and before.
"""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

ADDED = {
    "deliveries.waiting_for": ("TEXT", "route:NAME: it becomes due when a server of that route answers"),
    "messages.client_trusted": ("BOOLEAN", "whether the client is in CLIENT_NETWORKS; empty: one of our own, or older"),
    "messages.dsn_content": ("TEXT", "what a DSN encloses of the original: full, header or none"),
}

WAITING = "deliveries (waiting_for, due_at) WHERE state = 'deferred' AND waiting_for IS NOT NULL"


def upgrade() -> None:
    """Add the columns."""
    connection = op.get_bind()
    postgresql = connection.dialect.name == "postgresql"
    for column, (kind, comment) in ADDED.items():
        table, name = column.split(".")
        connection.exec_driver_sql(f"ALTER TABLE {table} ADD COLUMN {name} {kind}")
        if postgresql:
            connection.exec_driver_sql(f"COMMENT ON COLUMN {column} IS '{comment}'")
    connection.exec_driver_sql(f"CREATE INDEX deliveries_waiting ON {WAITING}")


def downgrade() -> None:
    """Take them away."""
    connection = op.get_bind()
    connection.exec_driver_sql("DROP INDEX deliveries_waiting")
    for column in reversed(ADDED):
        table, name = column.split(".")
        connection.exec_driver_sql(f"ALTER TABLE {table} DROP COLUMN {name}")
