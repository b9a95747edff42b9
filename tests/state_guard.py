"""Triggers that refuse every change and every first value of `deliveries.state` that `TRANSITIONS`
does not name.

The fixtures install them in the template databases, so the whole suite checks the table. A test
that writes other rows, as a fault or an older version would, does so in `unguarded`.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection

from relay.db.engine import connect, writing
from relay.queue.states import TRANSITIONS, State

_CHANGES = ", ".join(sorted({f"'{row.before} {row.after}'" for row in TRANSITIONS if row.before}))
_FIRST = ", ".join(sorted({f"'{row.after}'" for row in TRANSITIONS if row.before is None}))
# A K is recorded with the delivery that it answers; it also holds for what that was split into.
_RECORDED_K = f"""(NEW.state = '{State.DELIVERED}' AND EXISTS (SELECT 1 FROM deliveries k
    WHERE k.queue_id = NEW.queue_id AND k.last_outcome = 'delivered'))"""
# What each trigger refuses, by the name and the event of the trigger.
_REFUSED = {
    ("state_guard", "UPDATE OF state"): f"""NEW.state <> OLD.state
        AND (OLD.state || ' ' || NEW.state) NOT IN ({_CHANGES}) AND NOT {_RECORDED_K}""",
    ("state_guard_insert", "INSERT"): f"NEW.state NOT IN ({_FIRST})",
}
_SQLITE = """CREATE TRIGGER {name} AFTER {event} ON deliveries WHEN {refused}
    BEGIN SELECT RAISE(ABORT, 'TRANSITIONS does not name this change of state'); END"""
_POSTGRESQL = """CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF {refused} THEN
        RAISE EXCEPTION 'TRANSITIONS does not name this change of state: % of % to %',
            TG_OP, NEW.queue_id, NEW.state;
    END IF; RETURN NULL; END $$;
    CREATE TRIGGER {name} AFTER {event} ON deliveries FOR EACH ROW EXECUTE FUNCTION {name}()"""


def install(url: str) -> None:
    """Create the triggers in a migrated database."""
    engine = connect(url, pool=1)
    sql = _SQLITE if engine.dialect.name == "sqlite" else _POSTGRESQL
    with writing(engine) as connection:
        for (name, event), refused in _REFUSED.items():
            statement = sql.format(name=name, event=event, refused=refused)
            connection.connection.cursor().execute(statement)
    engine.dispose()


@contextmanager
def unguarded(connection: Connection) -> Iterator[None]:
    """Let this transaction change states in ways that the table does not name."""
    if connection.dialect.name == "sqlite":
        driver: Any = connection.connection.dbapi_connection
        driver.setconfig(sqlite3.SQLITE_DBCONFIG_ENABLE_TRIGGER, False)
        try:
            yield
        finally:
            driver.setconfig(sqlite3.SQLITE_DBCONFIG_ENABLE_TRIGGER, True)
    else:
        cursor = connection.connection.cursor()
        cursor.execute("SET LOCAL session_replication_role = replica")
        yield
        cursor.execute("SET LOCAL session_replication_role = origin")
