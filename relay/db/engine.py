"""The database: engines, transactions, outages and migrations (`relay.db.sql` loads SQL).

`writing()` is a write transaction. On SQLite it first takes an exclusive `flock` on a file beside
the database and then BEGIN IMMEDIATE: four writers that meet in SQLite's own busy handler stall
each other for seconds.

What must stay true: no transaction stays open while the relay waits for a network peer; a database
that could lose a commit is refused (`check_durable`).
"""

import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, DisconnectionError, InterfaceError, OperationalError

from relay.db.schema import REVISION
from relay.log import first_line, get_logger

if TYPE_CHECKING:
    from alembic.config import Config

log = get_logger(__name__)
OLDEST_SQLITE = (3, 38)
# Seconds. A statement that takes longer waits for a dead host or for a lock that is not released.
STATEMENT_TIMEOUT = 30


class OlderDatabase(Exception):
    """The database was restored from a backup and lacks what was committed since
    (`relay.spool.mark`)."""


class WrongSchema(Exception):
    """The database has no schema, or that of another version; the text says what to do."""


class DatabaseFileError(OSError):
    """The file of an SQLite database, or of its lock, is not there or cannot be opened."""


class DatabaseError(Exception):
    """The database cannot be used; the text says why and what to do."""


def normalized(url: str) -> URL:
    """The URL with the driver of the relay.

    Raises DatabaseError for a database that is not supported.
    """
    try:
        parsed = make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):  # for example a port that is not a number
        hint = "write postgresql://user@host/name or sqlite:///path"
        raise DatabaseError(f"RELAY_DATABASE_URL is not a database URL: {hint}") from None
    if parsed.get_backend_name() == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() == "sqlite" and parsed.database not in (None, "", ":memory:"):
        return parsed
    kind = parsed.get_backend_name()
    raise DatabaseError(
        f"RELAY_DATABASE_URL: {kind} is not supported; use PostgreSQL or an SQLite file"
    )


def connect(
    url: str, *, pool: int = 4, hot: bool = False, timeout: float = STATEMENT_TIMEOUT
) -> Engine:
    """An engine for one process; opens no connection yet.

    `hot`: for the statements that run for every message; `timeout`: seconds for a statement
    (PostgreSQL).
    """
    parsed = normalized(url)
    if parsed.get_backend_name() == "postgresql":
        engine = sqlalchemy.create_engine(
            parsed,
            pool_size=pool,
            max_overflow=2,
            pool_timeout=STATEMENT_TIMEOUT,
            pool_use_lifo=True,
            connect_args={"connect_timeout": 5, "tcp_user_timeout": 10_000, "keepalives_idle": 30},
        )
        prepare_connections(engine, partial(_prepare_postgresql, timeout))
        if hot:
            prepare_connections(engine, _prepare_hot)
        _close_when_returned(engine)
        return engine
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        raise DatabaseError(f"SQLite {sqlite3.sqlite_version} is too old: 3.38 or newer is needed")
    engine = sqlalchemy.create_engine(
        parsed, pool_size=pool, max_overflow=2, connect_args={"timeout": 10}
    )
    prepare_connections(engine, _prepare_sqlite)
    event.listen(engine, "checkout", _check_file)
    event.listen(engine, "begin", _begin_sqlite)
    _close_when_returned(engine)
    return engine


def prepare_connections(engine: Engine, prepare: Callable[[Any, Any], object]) -> None:
    """Call a function with each new connection of an engine, and its record in the pool. If it
    raises, the connection is closed; the pool does not know it yet."""

    def connected(connection: Any, record: Any) -> None:
        try:
            prepare(connection, record)
        except BaseException:
            connection.close()
            raise

    event.listen(engine, "connect", connected)


def _close_when_returned(engine: Engine) -> None:
    """When the engine is disposed of, close the connections in use as soon as they are returned.
    The pool to which they return is gone, and would leave them open."""
    disposals = 0

    def disposed(_engine: Engine) -> None:
        nonlocal disposals
        disposals += 1

    def connected(_connection: Any, record: Any) -> None:
        record.info["disposals"] = disposals

    def returned(_connection: Any, record: Any) -> None:
        if record.info.get("disposals") != disposals:
            record.invalidate()

    event.listen(engine, "engine_disposed", disposed)
    event.listen(engine, "connect", connected)
    event.listen(engine, "checkin", returned)


def _prepare_postgresql(timeout: float, connection: Any, _record: Any) -> None:
    milliseconds = max(1, int(timeout * 1000))  # 0 would be no limit
    connection.execute(
        "SELECT set_config('jit', 'off', false),"
        f" set_config('statement_timeout', '{milliseconds}ms', false),"
        " set_config('idle_in_transaction_session_timeout', '60s', false)"
    )
    connection.commit()


def _prepare_hot(connection: Any, _record: Any) -> None:
    # psycopg prepares plans while a table is empty; they would still scan it when it is full. And
    # a process that is stopped within a transaction must not lock its rows for as long as a lease.
    connection.execute(
        "SELECT set_config('enable_seqscan', 'off', false),"
        " set_config('enable_hashjoin', 'off', false),"
        " set_config('enable_mergejoin', 'off', false),"
        " set_config('idle_in_transaction_session_timeout', '15s', false)"
    )
    connection.commit()


def _prepare_sqlite(connection: sqlite3.Connection, record: Any) -> None:
    connection.isolation_level = None  # only `_begin_sqlite` begins transactions
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "busy_timeout=10000",
        "temp_store=MEMORY",
    ):
        connection.execute(f"PRAGMA {pragma}").close()
    path = Path(connection.execute("PRAGMA database_list").fetchone()[2])
    record.info["file"] = path, _file_at(path)


def _check_file(_connection: sqlite3.Connection, record: Any, _proxy: Any) -> None:
    """Open the file again if another one has its name: a backup was put there, and what is written
    to the old file is lost. Raises DatabaseFileError without a file, which is an outage."""
    path, file = record.info["file"]
    if _file_at(path) != file:
        raise DisconnectionError("another file has the name of the database")


def _file_at(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise DatabaseFileError(error.errno, error.strerror, str(path)) from error
    return status.st_dev, status.st_ino


def _begin_sqlite(connection: Connection) -> None:
    immediate = connection.get_execution_options().get("relay_writing", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


@contextmanager
def write_lock(engine: Engine) -> Iterator[None]:
    """Wait for this thread's turn to write (SQLite only)."""
    if engine.dialect.name != "sqlite":
        yield
        return
    name = f"{engine.url.database}.lock"
    try:
        lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DatabaseFileError(error.errno, error.strerror, name) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """One write transaction; committed at the end, rolled back by an exception."""
    with (
        write_lock(engine),
        engine.connect().execution_options(relay_writing=True) as connection,
        connection.begin(),
    ):
        yield connection


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """One read transaction."""
    with engine.connect() as connection, connection.begin():
        yield connection


def is_outage(error: BaseException) -> bool:
    """Whether the database is at fault and not the data: the same statement may succeed later."""
    if not isinstance(error, DBAPIError):
        return isinstance(
            error, sqlalchemy.exc.TimeoutError | OSError | WrongSchema | OlderDatabase
        )
    if state := getattr(error.orig, "sqlstate", None):
        # 08: connection, 25: read-only, as a standby is, 40: deadlock, 42: not our schema, 53: out
        # of resources, 55: a lock, 57: cancelled or shutting down, 58: its disk, XX: damaged.
        # psycopg's classes say less: a value too long for its index is an OperationalError too.
        return state[:2] in {"08", "25", "40", "42", "53", "55", "57", "58", "XX"}
    # SQLite reports a malformed file also while a disk fails or loses power. The rows to be written
    # are not at fault, and are kept until the file can be read again.
    code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
    return (
        error.connection_invalidated
        or isinstance(error, OperationalError | InterfaceError)
        or code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
    )


def lacks_schema(error: DBAPIError) -> bool:
    """Whether a table or a column of this version does not exist."""
    if state := getattr(error.orig, "sqlstate", None):
        return state in ("42P01", "42703")  # undefined_table, undefined_column
    return str(error.orig).startswith(("no such table", "no such column"))


def check_schema(engine: Engine) -> None:
    """Raise WrongSchema unless the database has the schema of this program."""
    try:
        with reading(engine) as connection:
            query = "SELECT version_num FROM alembic_version"
            revision = connection.exec_driver_sql(query).scalar()
    except DBAPIError as error:
        if lacks_schema(error):
            raise WrongSchema("no schema yet: run `qmqp-relay migrate`") from None
        raise
    if revision != REVISION:
        raise WrongSchema(
            f"schema revision is {revision}, this program needs {REVISION}:"
            " run `qmqp-relay migrate`"
        )


def retry_until_available[Answer](ask: Callable[[], Answer], wait: float = float("inf")) -> Answer:
    """Call `ask` until no outage of the database interrupts it, or for `wait` seconds. Raises
    its other errors, and that of an outage which lasts longer."""
    give_up_at, reported = time.monotonic() + wait, ""
    while True:
        try:
            return ask()
        except Exception as error:
            if not is_outage(error) or time.monotonic() >= give_up_at:
                raise
            reason = first_line(getattr(error, "orig", error))
        if reason != reported:
            log.warning("waiting for the database", reason=reason)
            reported = reason
        time.sleep(0.5)


def migrate(url: str, wait: float = 0.0) -> str:
    """Migrate the schema to the newest revision and return that; a second caller waits.

    During an outage it tries again for `wait` seconds, then raises the error.
    """
    engine = connect(url, pool=1)
    try:
        if engine.dialect.name != "sqlite":
            retry_until_available(lambda: engine.connect().close(), wait)
    finally:
        engine.dispose()
    config = alembic_config(url)
    from alembic import command  # a third of a second of imports that only this needs

    command.upgrade(config, "head")
    return REVISION


def alembic_config(url: str) -> "Config":
    """Alembic's configuration for a database: the migrations beside this package."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parents[2] / "migrations"))
    config.attributes["url"] = normalized(url)
    return config


def check_durable(engine: Engine) -> list[str]:
    """The settings that could make this database lose a commit; empty if there are none."""
    with reading(engine) as connection:
        if engine.dialect.name == "sqlite":
            settings = {
                p: connection.exec_driver_sql(f"PRAGMA {p}").scalar()
                for p in ("journal_mode", "synchronous")
            }
            durable: dict[str, set[Any]] = {
                "journal_mode": {"wal", "delete", "truncate", "persist"},
                "synchronous": {2, 3},
            }
            return [
                f"SQLite {name} is {value}"
                for name, value in settings.items()
                if value not in durable[name]
            ]
        rows = connection.exec_driver_sql(
            "SELECT name, setting FROM pg_settings"
            " WHERE name IN ('fsync', 'synchronous_commit', 'full_page_writes')"
        )
        return [f"PostgreSQL {name} is {setting}" for name, setting in rows if setting == "off"]


# The pool logs outages, which the relay logs too.
logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)
