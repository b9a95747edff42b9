"""Runs migrations: one connection, one lock, one transaction for each migration.

Two migrations at the same time take turns: by an advisory lock on PostgreSQL, by the writers'
`flock` on SQLite. A migration that does not get its table lock within a few seconds fails, so that
other transactions do not wait behind it.
"""

from alembic import context
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, create_engine, pool

from migrations.tables import metadata
from migrations.views import create_views
from relay.db.engine import connect, writing
from relay.db.schema import REVISION

LOCK = 0x716D7170  # "qmqp"


def run(connection: Connection) -> None:
    """Run the migrations that are due; make the views anew if that led to the newest revision."""
    before = MigrationContext.configure(connection).get_current_revision()
    context.configure(
        connection=connection,
        target_metadata=metadata,
        render_as_batch=True,
        compare_type=True,
        compare_server_default=True,
        include_name=lambda name, kind, _parents: kind != "table" or name in metadata.tables,
    )
    with context.begin_transaction():
        context.run_migrations()
        after = MigrationContext.configure(connection).get_current_revision()
        if after != before and after == REVISION:
            create_views(connection)


def online() -> None:
    """Connect as the program does and migrate under a lock."""
    url = context.config.attributes["url"]
    if url.get_backend_name() == "sqlite":
        engine = connect(url)
        try:
            with writing(engine) as connection:
                run(connection)
        finally:
            engine.dispose()
        return
    engine = create_engine(url, poolclass=pool.NullPool, connect_args={"connect_timeout": 5})
    with engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL lock_timeout = '10s'")
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK})")
        run(connection)


online()
