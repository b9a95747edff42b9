"""Users: the table of those who may log in with a password.

The column `auth_user` of the views needs no statement here, because `migrations.views` makes them
anew when the newest revision is reached. What must stay true: the role that only reads may read
every column but the hashes of passwords.
"""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

ROLE = "qmqp_relay_reader"  # may be missing (see 0002)
USERS = """CREATE TABLE users (
    name TEXT NOT NULL,
    password_hash TEXT NOT NULL,
    role TEXT NOT NULL,
    senders TEXT NOT NULL,
    messages_per_minute INTEGER,
    created_at {instant} NOT NULL,
    disabled_at {instant},
    last_seen_at {instant},
    CONSTRAINT users_key PRIMARY KEY (name),
    CONSTRAINT users_role CHECK (role IN ('sender', 'viewer', 'operator'))
)"""
READABLE = "name, role, senders, messages_per_minute, created_at, disabled_at, last_seen_at"


def upgrade() -> None:
    """Create the table, and let the reader read it."""
    connection = op.get_bind()
    postgresql = connection.dialect.name == "postgresql"
    instant = "TIMESTAMP WITH TIME ZONE" if postgresql else "BIGINT"
    connection.exec_driver_sql(USERS.format(instant=instant))
    if (
        postgresql
        and connection.exec_driver_sql(f"SELECT 1 FROM pg_roles WHERE rolname = '{ROLE}'").scalar()
    ):
        connection.exec_driver_sql(f"GRANT SELECT ({READABLE}) ON users TO {ROLE}")


def downgrade() -> None:
    """Drop the table. The views stay: they name nothing of it."""
    op.get_bind().exec_driver_sql("DROP TABLE users")
