"""TLS: protocol and cipher of the connection over which a message came."""

from alembic import op

from migrations.views import drop_views

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; the views are made anew afterwards."""
    connection = op.get_bind()
    drop_views(connection)
    connection.exec_driver_sql("ALTER TABLE messages ADD COLUMN tls TEXT")


def downgrade() -> None:
    """Take the column away, and the views with it."""
    connection = op.get_bind()
    drop_views(connection)
    connection.exec_driver_sql("ALTER TABLE messages DROP COLUMN tls")
