"""The outbox of events, and who gets them.

`events` has what became of deliveries while somebody subscribed, `subscriptions` who does, and
`notifications` what each of them has not got yet. The triggers that write them are in
`migrations.triggers`, and are made when the newest revision has been reached.
"""

from alembic import op

from migrations.triggers import drop_triggers

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

ROLE = "qmqp_relay_reader"  # may be missing (see 0002)
EVENTS = """CREATE TABLE events (
    sequence {sequence} NOT NULL,
    id TEXT NOT NULL,
    at {instant} NOT NULL,
    type TEXT NOT NULL,
    queue_id {id} NOT NULL,
    delivery INTEGER NOT NULL,
    route TEXT NOT NULL,
    attempt INTEGER,
    server TEXT,
    outcome TEXT,
    reply TEXT,
    reason_source TEXT,
    next_at {instant},
    CONSTRAINT events_key PRIMARY KEY (sequence)
)"""
SUBSCRIPTIONS = """CREATE TABLE subscriptions (
    name TEXT NOT NULL,
    types TEXT,
    routes TEXT,
    created_at {instant} NOT NULL,
    seen_at {instant} NOT NULL,
    disabled_at {instant},
    disabled_reason TEXT,
    failing_since {instant},
    last_error TEXT,
    succeeded_at {instant},
    CONSTRAINT subscriptions_key PRIMARY KEY (name)
)"""
NOTIFICATIONS = """CREATE TABLE notifications (
    queue_id {id} NOT NULL,
    subscription TEXT NOT NULL,
    sequence BIGINT NOT NULL,
    queued_at {instant} NOT NULL,
    due_at {instant} NOT NULL,
    tries INTEGER DEFAULT '0' NOT NULL,
    claim {id},
    CONSTRAINT notifications_key PRIMARY KEY (queue_id, subscription, sequence)
)"""
TYPES = {
    "postgresql": {
        "sequence": "BIGSERIAL",
        "instant": "TIMESTAMP WITH TIME ZONE",
        "id": "UUID",
    },
    "sqlite": {"sequence": "INTEGER", "instant": "BIGINT", "id": "TEXT"},
}


def upgrade() -> None:
    """Create the tables, and let the reader read them."""
    connection = op.get_bind()
    drop_triggers(connection)
    types = TYPES[connection.dialect.name]
    postgresql = connection.dialect.name == "postgresql"
    for table in (EVENTS, SUBSCRIPTIONS, NOTIFICATIONS):
        connection.exec_driver_sql(table.format(**types))
    connection.exec_driver_sql("CREATE INDEX events_queue_id ON events (queue_id)")
    brin = "USING brin " if postgresql else ""
    connection.exec_driver_sql(f"CREATE INDEX events_at ON events {brin}(at)")
    connection.exec_driver_sql(
        "CREATE INDEX notifications_due ON notifications (subscription, due_at, sequence)"
    )
    if (
        postgresql
        and connection.exec_driver_sql(f"SELECT 1 FROM pg_roles WHERE rolname = '{ROLE}'").scalar()
    ):
        connection.exec_driver_sql(
            f"GRANT SELECT ON events, subscriptions, notifications TO {ROLE}"
        )


def downgrade() -> None:
    """Drop them. What was not delivered is lost."""
    connection = op.get_bind()
    drop_triggers(connection)
    for table in ("notifications", "subscriptions", "events"):
        connection.exec_driver_sql(f"DROP TABLE {table}")
