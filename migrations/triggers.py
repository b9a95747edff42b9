"""The triggers that write the outbox: which change of a delivery is an event.

Like the views they are made anew when the newest revision has been reached, and a migration that
changes a table drops them first. `triggers.postgresql.sql` and `triggers.sqlite.sql` have them.

What must stay true: every way in which a delivery is accepted or gets a new state goes through a
trigger, so no statement can forget its event; without a row in `subscriptions` nothing is written.
"""

from sqlalchemy import Connection

from relay.db.sql import Queries


def drop_triggers(connection: Connection) -> None:
    """Drop every trigger."""
    Queries(connection.engine, __name__).run(connection, "drop_triggers")


def create_triggers(connection: Connection) -> None:
    """Make every trigger as this version has it."""
    drop_triggers(connection)
    Queries(connection.engine, __name__).run(connection, "create_triggers")
