"""The database: engines, transactions, outages, and the schema that it must have (`relay.db.sql`
has our SQL).

How it works: `writing()` is a write transaction. On SQLite it first takes an exclusive `flock` on a
file beside the database and then BEGIN IMMEDIATE, because four writers that meet under SQLite's own
busy handler stall each other for seconds.

What must stay true: nothing here keeps a transaction open while a network peer is waited for; a
database that would forget a commit is refused (`check_durable`).
"""

import errno
import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from relay.db.schema import REVISION
from relay.log import first_line, get_logger

if TYPE_CHECKING:
    from alembic.config import Config

log = get_logger(__name__)
OLDEST_SQLITE = (3, 38)
# A statement that takes longer than this has met a dead host or a lock that nobody lets go of
# (seconds).
STATEMENT_TIMEOUT = 30


class TooLate(Exception):
    """Nothing was written: the time to begin had passed before there was a connection and a turn to
    write."""


class DatabaseError(Exception):
    """The database cannot be used as it is; the text says why and what to do."""


def normalized(url: str) -> URL:
    """The URL with our drivers named; raises DatabaseError for a database that we do not speak."""
    try:
        made = make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):  # a port that is no number, for one
        hint = "write postgresql://user@host/name or sqlite:///path"
        raise DatabaseError(f"RELAY_DATABASE_URL is not a database URL: {hint}") from None
    if made.get_backend_name() == "postgresql":
        return made.set(drivername="postgresql+psycopg")
    if made.get_backend_name() == "sqlite" and made.database not in (None, "", ":memory:"):
        return made
    kind = made.get_backend_name()
    raise DatabaseError(
        f"RELAY_DATABASE_URL: {kind} is not supported; use PostgreSQL or an SQLite file"
    )


def connect(
    url: str, *, pool: int = 4, hot: bool = False, timeout: float = STATEMENT_TIMEOUT
) -> Engine:
    """An engine for one process; opens no connection yet.

    `hot`: for the statements that each message passes; `timeout`: seconds for a statement
    (PostgreSQL).
    """
    made = normalized(url)
    if made.get_backend_name() == "postgresql":
        engine = sqlalchemy.create_engine(
            made,
            pool_size=pool,
            max_overflow=2,
            pool_timeout=STATEMENT_TIMEOUT,
            pool_use_lifo=True,
            connect_args={"connect_timeout": 5, "tcp_user_timeout": 10_000, "keepalives_idle": 30},
        )
        event.listen(engine, "connect", partial(_prepare_postgresql, timeout))
        if hot:
            event.listen(engine, "connect", _prepare_hot)
        return engine
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        raise DatabaseError(f"SQLite {sqlite3.sqlite_version} is too old: 3.38 or newer is needed")
    engine = sqlalchemy.create_engine(
        made, pool_size=pool, max_overflow=2, connect_args={"timeout": 10}
    )
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_postgresql(timeout: float, connection: Any, _record: Any) -> None:
    most = max(1, int(timeout * 1000))  # 0 would be no limit
    connection.execute(
        f"SELECT set_config('jit', 'off', false), set_config('statement_timeout', '{most}ms', false),"
        " set_config('idle_in_transaction_session_timeout', '60s', false)"
    )
    connection.commit()


def _prepare_hot(connection: Any, _record: Any) -> None:
    # Plans that psycopg prepares while a table is empty would go on scanning it when it has filled
    # up. And a process that is stopped in the middle of a transaction must not hold its rows for as
    # long as a lease.
    connection.execute(
        "SELECT set_config('enable_seqscan', 'off', false), set_config('enable_hashjoin', 'off', false),"
        " set_config('enable_mergejoin', 'off', false), set_config('idle_in_transaction_session_timeout', '15s', false)"
    )
    connection.commit()


def _prepare_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None  # transactions are begun by `_begin_sqlite` alone
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "busy_timeout=10000",
        "temp_store=MEMORY",
    ):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: Connection) -> None:
    immediate = connection.get_execution_options().get("relay_writing", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


@contextmanager
def _turn(engine: Engine) -> Iterator[None]:
    """Wait for this thread's turn to write (SQLite only)."""
    if engine.dialect.name != "sqlite":
        yield
        return
    lock = os.open(f"{engine.url.database}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """One write transaction; committed at the end, rolled back by an exception."""
    with (
        _turn(engine),
        engine.connect().execution_options(relay_writing=True) as connection,
        connection.begin(),
    ):
        yield connection


@contextmanager
def writing_once(engine: Engine) -> Iterator[Connection]:
    """As `writing`, for what is one statement on PostgreSQL: the statement is its own transaction
    and round trip."""
    if engine.dialect.name == "sqlite":
        with writing(engine) as connection:
            yield connection
    else:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            yield connection


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """One read transaction."""
    with engine.connect() as connection, connection.begin():
        yield connection


def is_outage(error: BaseException) -> bool:
    """Whether the database was away or not fit, and not the data at fault: the same statement may
    do later."""
    if not isinstance(error, DBAPIError):
        return isinstance(error, sqlalchemy.exc.TimeoutError | OSError | TooLate)
    if state := getattr(error.orig, "sqlstate", None):
        # 08: connection, 25: read-only, as a standby is, 40: deadlock, 42: not our schema, 53: out
        # of resources, 55: a lock, 57: cancelled or shutting down, 58: its disk. psycopg's classes
        # say less: a value too long for its index is an OperationalError too.
        return state[:2] in {"08", "25", "40", "42", "53", "55", "57", "58"}
    # A file that reads as malformed does so for every row, also while a disk fails or loses its
    # power: the rows that are to be written are not at fault, and must be kept until it can be read
    # again.
    return (
        error.connection_invalidated
        or isinstance(error, OperationalError | InterfaceError)
        or is_no_database(error)
    )


def committed_nothing(error: BaseException) -> bool:
    """Whether an outage is known to have come before a COMMIT could be asked for.

    PostgreSQL undoes the transaction with an ERROR; a FATAL may follow a COMMIT. Without a
    connection no statement ran, but a connection that breaks leaves everything open. SQLite opens,
    locks and refuses to write before it commits.
    """
    if isinstance(error, DBAPIError):
        code = getattr(error.orig, "sqlite_errorcode", None)
        if code is not None:
            return code & 0xFF in (
                sqlite3.SQLITE_READONLY,
                sqlite3.SQLITE_CANTOPEN,
                sqlite3.SQLITE_BUSY,
            )
        if getattr(error.orig, "sqlstate", None):
            return (
                getattr(getattr(error.orig, "diag", None), "severity_nonlocalized", None) == "ERROR"
            )
        return error.statement is None and not error.connection_invalidated
    if isinstance(error, OSError):
        return error.errno == errno.EROFS  # the lock file
    return isinstance(error, sqlalchemy.exc.TimeoutError | TooLate)


def is_no_database(error: DBAPIError) -> bool:
    """Whether the file is none of SQLite's, or broken."""
    code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)


def lacks_schema(error: DBAPIError) -> bool:
    """Whether a table or a column is not there that this version has."""
    if state := getattr(error.orig, "sqlstate", None):
        return state in ("42P01", "42703")  # undefined_table, undefined_column
    return str(error.orig).startswith(("no such table", "no such column"))


def wait_until_ready(engine: Engine) -> None:
    """Wait for the database to answer and to have our schema: nothing depends on the order that
    services start in."""
    said = ""
    while True:
        try:
            with reading(engine) as connection:
                found = connection.exec_driver_sql(
                    "SELECT version_num FROM alembic_version"
                ).scalar()
            if found == REVISION:
                return
            reason = f"schema revision is {found}, this program needs {REVISION}: run `qmqp-relay migrate`"
        except DBAPIError as error:
            missing = "alembic_version" in str(error.orig)
            reason = (
                "no schema yet: run `qmqp-relay migrate`" if missing else first_line(error.orig)
            )
        if reason != said:
            log.warning("waiting for the database", reason=reason)
            said = reason
        time.sleep(1.0)


def migrate(url: str, patience: float = 0.0) -> str:
    """Bring the schema up to date, under a lock that makes a second caller wait; the revision that
    it has then.

    A database that is away is waited for, `patience` seconds at most; then its error is raised.
    """
    engine = connect(url, pool=1)
    try:
        if engine.dialect.name != "sqlite":
            _wait_until_there(engine, time.monotonic() + patience)
    finally:
        engine.dispose()
    config = alembic_config(url)
    from alembic import command  # a third of a second of imports that only this needs

    command.upgrade(config, "head")
    return REVISION


def _wait_until_there(engine: Engine, deadline: float) -> None:
    said = False
    while True:
        try:
            with reading(engine):
                return
        except DBAPIError as error:
            if not is_outage(error) or time.monotonic() >= deadline:
                raise
            if not said:
                log.warning("waiting for the database", reason=first_line(error.orig))
            said = True
        time.sleep(0.5)


def alembic_config(url: str) -> "Config":
    """Alembic's configuration for a database: the migrations beside this package."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parents[2] / "migrations"))
    config.attributes["url"] = normalized(url)
    return config


def check_durable(engine: Engine) -> list[str]:
    """What would make this database forget a commit; empty when it keeps its word."""
    with reading(engine) as connection:
        if engine.dialect.name == "sqlite":
            found = {
                p: connection.exec_driver_sql(f"PRAGMA {p}").scalar()
                for p in ("journal_mode", "synchronous")
            }
            sound: dict[str, set[Any]] = {
                "journal_mode": {"wal", "delete", "truncate", "persist"}, "synchronous": {2, 3}
            }  # fmt: skip
            return [
                f"SQLite {name} is {value}"
                for name, value in found.items()
                if value not in sound[name]
            ]
        rows = connection.exec_driver_sql(
            "SELECT name, setting FROM pg_settings WHERE name IN ('fsync', 'synchronous_commit', 'full_page_writes')"
        )
        return [f"PostgreSQL {name} is {setting}" for name, setting in rows if setting == "off"]


logging.getLogger("sqlalchemy.pool").setLevel(
    logging.CRITICAL
)  # it logs outages that we log ourselves
