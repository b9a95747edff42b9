"""Refusals by a rate, for `stats` and the page: counts by hours, which are kept for a day."""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

ROLE = "qmqp_relay_reader"  # may be missing (see 0002)
REFUSALS = """CREATE TABLE rate_refusals (
    subject TEXT NOT NULL,
    what TEXT NOT NULL,
    name TEXT NOT NULL,
    hour {instant} NOT NULL,
    refused BIGINT NOT NULL,
    last_at {instant} NOT NULL,
    CONSTRAINT rate_refusals_key PRIMARY KEY (subject, what, name, hour)
)"""


def upgrade() -> None:
    """Create the table, and let the reader read it."""
    connection = op.get_bind()
    postgresql = connection.dialect.name == "postgresql"
    instant = "TIMESTAMP WITH TIME ZONE" if postgresql else "BIGINT"
    connection.exec_driver_sql(REFUSALS.format(instant=instant))
    if (
        postgresql
        and connection.exec_driver_sql(f"SELECT 1 FROM pg_roles WHERE rolname = '{ROLE}'").scalar()
    ):
        connection.exec_driver_sql(f"GRANT SELECT ON rate_refusals TO {ROLE}")


def downgrade() -> None:
    """Drop the table."""
    op.get_bind().exec_driver_sql("DROP TABLE rate_refusals")
