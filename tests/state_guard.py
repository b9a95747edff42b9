"""A trigger that refuses every change of `deliveries.state` that `TRANSITIONS` does not name.

The fixtures install it in the template databases, so the whole suite checks the table. A test that
writes other rows, as a fault or an older version would, does so in `unguarded`.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection

from relay.db.engine import connect, writing
from relay.queue.states import TRANSITIONS, State

_NAMED = ", ".join(sorted({f"'{row.before} {row.after}'" for row in TRANSITIONS if row.before}))
# A K is recorded with the delivery that it answers; it also holds for what that was cut into.
_RECORDED_K = f"""(NEW.state = '{State.DELIVERED}' AND EXISTS (SELECT 1 FROM deliveries k
    WHERE k.queue_id = NEW.queue_id AND k.last_outcome = 'delivered'))"""
_REFUSED = f"""NEW.state <> OLD.state AND (OLD.state || ' ' || NEW.state) NOT IN ({_NAMED})
    AND NOT {_RECORDED_K}"""
_SQLITE = f"""CREATE TRIGGER state_guard AFTER UPDATE OF state ON deliveries WHEN {_REFUSED}
    BEGIN SELECT RAISE(ABORT, 'TRANSITIONS does not name this change of state'); END"""
_POSTGRESQL = (
    f"""CREATE FUNCTION state_guard() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN IF {_REFUSED} THEN
    RAISE EXCEPTION 'TRANSITIONS does not name this change of state: % to %', OLD.state, NEW.state;
    END IF; RETURN NULL; END $$""",
    """CREATE TRIGGER state_guard AFTER UPDATE OF state ON deliveries FOR EACH ROW
    EXECUTE FUNCTION state_guard()""",
)


def install(url: str) -> None:
    """Create the trigger in a migrated database."""
    engine = connect(url, pool=1)
    with writing(engine) as connection:
        for statement in (_SQLITE,) if engine.dialect.name == "sqlite" else _POSTGRESQL:
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
