"""The journal: its segments, the place of each body, and the mark of the spool.

A body stands in a segment (`messages.segment`, `position`) or, as all bodies before this revision,
in a file of its own (both NULL). `backoff_step` becomes `deferrals`: a worker of an earlier version
would look for files, so its claims must fail and not misread.
"""

from alembic import op

from migrations.views import drop_views

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

ROLE = "qmqp_relay_reader"  # may read every table; it may be missing (see 0002)
SEGMENTS = """CREATE TABLE segments (
    id {id} NOT NULL,
    committed_to BIGINT NOT NULL,
    sealed_at {instant},
    messages BIGINT,
    least_id {id},
    greatest_id {id},
    live_bytes BIGINT,
    checked_at {instant},
    sparse_since {instant},
    CONSTRAINT segments_key PRIMARY KEY (id)
)"""
IN_SEGMENTS = """SELECT count(*) FROM messages m JOIN deliveries d ON d.queue_id = m.id
WHERE m.segment IS NOT NULL
    AND (d.state IN ('queued', 'sending', 'deferred', 'held') OR d.due_at IS NOT NULL)"""


def upgrade() -> None:
    """Add the table and the columns, and rename one."""
    connection = op.get_bind()
    postgresql = connection.dialect.name == "postgresql"
    kinds = (
        {"id": "UUID", "instant": "TIMESTAMP WITH TIME ZONE"}
        if postgresql
        else {"id": "TEXT", "instant": "BIGINT"}
    )
    drop_views(connection)
    connection.exec_driver_sql(SEGMENTS.format(**kinds))
    connection.exec_driver_sql(f"ALTER TABLE messages ADD COLUMN segment {kinds['id']}")
    connection.exec_driver_sql("ALTER TABLE messages ADD COLUMN position BIGINT")
    connection.exec_driver_sql("ALTER TABLE spool ADD COLUMN mark BIGINT DEFAULT '0' NOT NULL")
    _rename("backoff_step", "deferrals")
    if (
        postgresql
        and connection.exec_driver_sql(f"SELECT 1 FROM pg_roles WHERE rolname = '{ROLE}'").scalar()
    ):
        connection.exec_driver_sql(f"GRANT SELECT ON segments TO {ROLE}")


def downgrade() -> None:
    """Take them away; refused while mail waits whose body stands in a segment."""
    connection = op.get_bind()
    if waiting := connection.exec_driver_sql(IN_SEGMENTS).scalar():
        raise RuntimeError(
            f"{waiting} deliveries wait whose bodies stand in the journal, which the earlier"
            " version cannot read: deliver, bounce or drop them first"
        )
    drop_views(connection)
    _rename("deferrals", "backoff_step")
    connection.exec_driver_sql("ALTER TABLE spool DROP COLUMN mark")
    connection.exec_driver_sql("ALTER TABLE messages DROP COLUMN position")
    connection.exec_driver_sql("ALTER TABLE messages DROP COLUMN segment")
    connection.exec_driver_sql("DROP TABLE segments")


def _rename(old: str, new: str) -> None:
    connection = op.get_bind()
    connection.exec_driver_sql(f"ALTER TABLE deliveries RENAME COLUMN {old} TO {new}")
    if connection.dialect.name != "postgresql":
        return
    # From version 18 on PostgreSQL names NOT NULL constraints after their columns.
    named = "SELECT 1 FROM pg_constraint WHERE conname = 'deliveries_{}_not_null'"
    if connection.exec_driver_sql(named.format(old)).scalar():
        connection.exec_driver_sql(
            f"ALTER TABLE deliveries RENAME CONSTRAINT deliveries_{old}_not_null"
            f" TO deliveries_{new}_not_null"
        )
