"""Transactions for a message that comes alone: named statements, sent in one round trip.

On PostgreSQL the thread that runs them keeps a connection and speaks with the driver itself. With
cold caches, as they are when a message comes alone, SQLAlchemy takes as long as the database does.
The statements of a transaction go out together (a pipeline). On SQLite this is
`relay.db.engine.writing`.

What must stay true: rows are returned after the COMMIT and never before it; an error is that which
SQLAlchemy would raise (`is_outage`), and a connection that breaks is not used again.
"""

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from sqlalchemy import Engine, PoolProxiedConnection, event
from sqlalchemy.exc import DBAPIError

from relay.db.engine import writing
from relay.db.sql import Queries


class SingleTransactions:
    """Runs the statements of `queries`. Another thread that disposes of the engine waits for the
    transaction."""

    def __init__(self, engine: Engine, queries: Queries) -> None:
        self._engine, self._queries = engine, queries
        self._kept: PoolProxiedConnection | None = None
        self._in_use = threading.Lock()
        if engine.dialect.name == "postgresql":
            event.listen(engine, "engine_disposed", self._close)

    def run(self, *statements: tuple[str, dict[str, Any]]) -> list[Any]:
        """Run statements, each with its name and parameters, in one transaction; the rows of the
        last one. Raises the database's errors."""
        if self._engine.dialect.name == "sqlite":
            with writing(self._engine) as connection:
                rows = [
                    self._queries.run(connection, name, **parameters).all()
                    for name, parameters in statements
                ]
            return list(rows[-1])
        with self._in_use:
            base = self._engine.dialect.loaded_dbapi.Error
            try:
                return self._sent(statements)
            except BaseException as error:
                if not self._usable():
                    self._drop()
                if isinstance(error, base):
                    raise DBAPIError.instance(statements[-1][0], None, error, base) from error
                raise

    def _sent(self, statements: Sequence[tuple[str, dict[str, Any]]]) -> list[Any]:
        queries = [self._queries.for_driver(*statement) for statement in statements]
        connection = self._connection()
        with connection.pipeline() if len(queries) > 1 else nullcontext():
            cursors = [connection.execute(*query, prepare=True) for query in queries]
        return list(cursors[-1].fetchall())

    def _connection(self) -> Any:
        """The connection of psycopg. It is not returned to the pool, which counts it."""
        if self._kept is not None:
            return self._kept.driver_connection
        self._kept = self._engine.raw_connection()
        connection: Any = self._kept.driver_connection
        connection.autocommit = True
        return connection

    def _usable(self) -> bool:
        """Whether a statement was refused and nothing else is wrong: the server waits for the next
        one."""
        connection: Any = self._kept and self._kept.driver_connection
        return bool(connection) and not connection.closed and not connection.info.transaction_status

    def _drop(self) -> None:
        pooled, self._kept = self._kept, None
        if pooled is not None:
            pooled.invalidate()  # closes it, without a ROLLBACK

    def _close(self, _engine: Engine) -> None:
        with self._in_use:
            self._drop()
