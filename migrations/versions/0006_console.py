"""What an operator asks at night: the views anew.

Times of the views carry their zone on SQLite, as they do on PostgreSQL. The views are dropped here,
and `migrations.views` makes them when the newest revision has been reached.
"""

from alembic import op

from migrations.views import drop_views

revision = "0006"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Drop the views, which are made anew."""
    drop_views(op.get_bind())


def downgrade() -> None:
    """Drop the views: they need columns that an older version lacks."""
    drop_views(op.get_bind())
