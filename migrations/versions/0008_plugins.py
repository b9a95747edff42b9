"""Plugins: the header fields that they add after the content was stored."""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column."""
    op.get_bind().exec_driver_sql("ALTER TABLE messages ADD COLUMN prefix TEXT")


def downgrade() -> None:
    """Take the column away. Mail that waits is sent without these fields then."""
    op.get_bind().exec_driver_sql("ALTER TABLE messages DROP COLUMN prefix")
