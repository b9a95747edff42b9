"""Views, triggers and comments, in one place for all migrations: they are made anew when the newest
revision has been reached.

A migration that changes a table drops the views and triggers first. `views.postgresql.sql` and
`views.sqlite.sql` have their statements, `migrations.tables` what tables and columns mean. What
must stay true: the role that only reads may read each of them.
"""

from sqlalchemy import Connection

from migrations.tables import VIEW_COLUMNS, metadata
from migrations.triggers import create_triggers, drop_triggers
from relay.db.sql import Queries

READER = "qmqp_relay_reader"
VIEWS = {
    "mail_queue": "unfinished mail: one row for each recipient",
    "mail_history": "all mail, also finished: one row for each recipient",
    "queue_summary": "deliveries by state and route",
    "server_health": "attempts of the last hour by server",
    "mail_attempts": "attempts, each at one server",
    "operator_actions": "operations of operators",
    "mail_actions": "the deliveries that an operation changed",
    "worker_health": "workers, and what they are sending",
    "domain_summary": "unfinished mail by the domain of the recipient",
    "reason_summary": "unfinished mail by its reason, masked",
    "mail_flow": "what came, what went, and how long the rest takes",
    "paused": "routes and servers that operators have paused, and what waits",
    "route_servers": "the servers of each route, as the workers that are alive know them",
}
# Views below the public ones, which the program reads too.
INNER_VIEWS = ("paused_routes", "route_overview", "waiting_routes")


def drop_views(connection: Connection) -> None:
    """Drop every view and trigger, so that the tables below them can be changed."""
    drop_triggers(connection)
    Queries(connection.engine, __name__).run(connection, "drop_views")


def create_views(connection: Connection) -> None:
    """Make every view and trigger as this version has it, with comments and the reader's right on
    PostgreSQL."""
    drop_views(connection)
    Queries(connection.engine, __name__).run(connection, "create_views")
    create_triggers(connection)
    if connection.dialect.name == "sqlite":
        return
    comments = {
        f"VIEW {view}": f"{text}; docs/inspect.md explains its columns"
        for view, text in VIEWS.items()
    }
    for view, columns in VIEW_COLUMNS.items():
        comments |= {f"COLUMN {view}.{column}": meaning for column, meaning in columns.items()}
    for table in metadata.sorted_tables:
        comments[f"TABLE {table.name}"] = str(table.comment)
        comments |= {
            f"COLUMN {table.name}.{column.name}": str(column.comment) for column in table.columns
        }
    for subject, comment in comments.items():
        quoted = comment.replace("'", "''").replace("%", "%%")
        connection.exec_driver_sql(f"COMMENT ON {subject} IS '{quoted}'")
    if connection.exec_driver_sql(f"SELECT 1 FROM pg_roles WHERE rolname = '{READER}'").scalar():
        connection.exec_driver_sql(
            f"GRANT SELECT ON {', '.join((*VIEWS, *INNER_VIEWS))} TO {READER}"
        )
