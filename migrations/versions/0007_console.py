"""What an operator asks at night: the views anew, the uncertain attempts, the running versions.

The views say what is paused and which servers mail is for, and their times carry their zone on
SQLite too. They are dropped here, and `migrations.views` makes them when the newest revision has
been reached. The index has only attempts with an unknown end, so an insert of another one does not
touch it.
"""

from alembic import op

from migrations.views import drop_views

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the index and the column."""
    connection = op.get_bind()
    drop_views(connection)
    instant = "BIGINT" if connection.dialect.name == "sqlite" else "TIMESTAMP WITH TIME ZONE"
    connection.exec_driver_sql("ALTER TABLE workers ADD COLUMN version TEXT")
    connection.exec_driver_sql(f"ALTER TABLE open_circuits ADD COLUMN since {instant}")
    connection.exec_driver_sql(
        "CREATE INDEX attempts_uncertain ON attempts (queue_id, delivery)"
        " WHERE outcome IN ('uncertain', 'malformed')"
    )


def downgrade() -> None:
    """Drop them; an older version makes its own views."""
    connection = op.get_bind()
    drop_views(connection)
    connection.exec_driver_sql("DROP INDEX attempts_uncertain")
    connection.exec_driver_sql("ALTER TABLE open_circuits DROP COLUMN since")
    connection.exec_driver_sql("ALTER TABLE workers DROP COLUMN version")
