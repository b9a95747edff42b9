"""Views and comments, in one place for all migrations: they are made anew when the newest revision
has been reached.

A migration that changes a table drops the views first. `relay.db.schema.VIEWS` has their
statements, `migrations.tables` what tables and columns mean. What must stay true: the role that
only reads may read each of them.
"""

from sqlalchemy import Connection

from migrations.tables import VIEW_COLUMNS, metadata
from relay.db.schema import VIEWS
from relay.db.sql import Dialect

READER = "qmqp_relay_reader"
# SQLite has no type for times and no function for the time in microseconds: our statements read it
# from this view. Inside of a statement the time stands still.
CLOCK = "clock"
ABOUT = {
    "mail_queue": "what is unfinished: a row a recipient",
    "mail_history": "all mail, finished as well: a row a recipient",
    "queue_summary": "deliveries by state and route",
    "server_health": "attempts of the last hour by server",
}


def drop_views(connection: Connection) -> None:
    """Drop every view, so that the tables below it can be changed."""
    for view in (*VIEWS, CLOCK):
        connection.exec_driver_sql(f"DROP VIEW IF EXISTS {view}")


def create_views(connection: Connection) -> None:
    """Make every view as this version has it, with comments and the reader's right on
    PostgreSQL."""
    drop_views(connection)
    dialect = Dialect(connection.dialect.name)
    for view, select in VIEWS.items():
        connection.exec_driver_sql(
            f"CREATE VIEW {view} AS {dialect(select)}".replace(
                "%", "%%" if dialect.postgresql else "%"
            )
        )
    if not dialect.postgresql:
        connection.exec_driver_sql(f"CREATE VIEW {CLOCK} AS SELECT {dialect('@now')} AS now")
        return
    comments = {
        f"VIEW {view}": f"{text}; docs/inspect.md explains its columns"
        for view, text in ABOUT.items()
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
        connection.exec_driver_sql(f"GRANT SELECT ON {', '.join(VIEWS)} TO {READER}")
