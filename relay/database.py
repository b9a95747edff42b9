"""The database: engines, transactions, and the few places where PostgreSQL and SQLite spell things differently.

How it works: SQL is written once, with macros (`@now`, `@later(x)`, `@rows(...)`) that `Dialect` spells for either
database. A batch of rows travels as one JSON parameter, so that a round is a handful of statements whatever its size.
`writing()` is a write transaction: on SQLite it first takes an exclusive `flock` on a file beside the database and then
BEGIN IMMEDIATE, because four writers that meet under SQLite's own busy handler stall each other for seconds.

What must stay true: the clock is the database's, in every statement; nothing here keeps a transaction open while a
network peer is waited for; a database that would forget a commit is refused (`check_durable`).
"""

import fcntl
import logging
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy
from sqlalchemy import Connection, Engine, TextClause, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from relay.log import first_line, get_logger
from relay.schema import REVISION

if TYPE_CHECKING:
    from alembic.config import Config

log = get_logger(__name__)
OLDEST_SQLITE = (3, 38)
# A statement that takes longer than this has met a dead host or a lock that nobody lets go of (seconds).
STATEMENT_TIMEOUT = 30


class DatabaseError(Exception):
    """The database cannot be used as it is; the text says why and what to do."""


class Dialect:
    """Spells the macros of our SQL for one database.

    `@now`: the time; `@later(s)`, `@ago(s)`: s seconds after or before it; `@since(t)`: seconds since t; `@when(t)`: t
    as people read it; `@iso(w)`: what `@when` made, as RFC 3339 has it; `@micros(t)`: t as microseconds since 1970;
    `@hex(id)`: an id as 32 digits; `@id(:name)`: an id parameter; `@like`: LIKE to which capitals are the same;
    `@at_least`, `@below`: >= and < by bytes; `@chance`: a number in [0, 1); `@skip_locked`, `@locked(table)`;
    `@rows(:name; column type, ...)`: the rows of a JSON array parameter, as x.
    """

    _MACRO = re.compile(r"@(\w+)(?:\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\))?")

    def __init__(self, name: str) -> None:
        self.postgresql = name == "postgresql"
        self.macros: dict[str, Callable[[str], str]] = self._postgresql() if self.postgresql else self._sqlite()

    def __call__(self, sql: str) -> str:
        return self._MACRO.sub(lambda found: self.macros[found[1]](self(found[2] or "")), sql)

    def _postgresql(self) -> dict[str, Callable[[str], str]]:
        def rows(given: str) -> str:
            name, columns = given.split(";")
            return f"json_to_recordset(CAST({name.strip()} AS json)) AS x({columns.strip()})"

        return {
            "now": lambda _: "now()",
            "later": lambda s: f"(now() + ({s}) * interval '1 second')",
            "ago": lambda s: f"(now() - ({s}) * interval '1 second')",
            "since": lambda t: f"CAST(extract(epoch FROM now() - {t}) AS float8)",
            "when": lambda t: t,
            "iso": lambda t: rf"""to_char({t} AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24\:MI\:SS.MS"+00\:00"')""",
            "micros": lambda t: f"CAST(extract(epoch FROM {t}) * 1000000 AS bigint)",
            "hex": lambda i: f"replace(CAST({i} AS text), '-', '')",
            "id": lambda i: f"CAST({i} AS uuid)",
            "like": lambda _: "ILIKE",
            "chance": lambda _: "random()",
            "at_least": lambda _: "~>=~",
            "below": lambda _: "~<~",
            "skip_locked": lambda _: "FOR UPDATE SKIP LOCKED",
            "locked": lambda table: f"FOR UPDATE OF {table}",
            "rows": rows,
        }

    def _sqlite(self) -> dict[str, Callable[[str], str]]:
        # SQLite's `now` is a whole number of milliseconds inside a Julian day: rounding gets it back exactly.
        now = "(CAST(round((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER) * 1000)"

        def rows(given: str) -> str:
            name, columns = given.split(";")
            picked = ", ".join(f"value ->> '$.{c.split()[0]}' AS {c.split()[0]}" for c in columns.split(","))
            return f"(SELECT {picked} FROM json_each({name.strip()})) AS x"

        return {
            "now": lambda _: now,
            "later": lambda s: f"({now} + CAST(({s}) * 1000000 AS INTEGER))",
            "ago": lambda s: f"({now} - CAST(({s}) * 1000000 AS INTEGER))",
            "since": lambda t: f"(({now} - ({t})) / 1000000.0)",
            "when": lambda t: f"datetime(({t}) / 1000000, 'unixepoch') || '.' || substr(({t}) / 1000, -3)",
            "iso": lambda t: f"replace({t}, ' ', 'T') || '+00\\:00'",
            "micros": lambda t: t,
            "hex": lambda i: f"replace({i}, '-', '')",
            "id": lambda i: i,
            "like": lambda _: "LIKE",
            "chance": lambda _: "(abs(random() % 1000000) / 1000000.0)",
            "at_least": lambda _: ">=",
            "below": lambda _: "<",
            "skip_locked": lambda _: "",
            "locked": lambda _: "",
            "rows": rows,
        }


def dialect_of(engine: Engine) -> Dialect:
    """The dialect of an engine's database."""
    return Dialect(engine.dialect.name)


class Statements:
    """Runs our SQL: spells it once for the engine's database, and adds the parameters that all statements share."""

    def __init__(self, engine: Engine, **common: Any) -> None:
        self._spell, self._common = dialect_of(engine), common
        self._spelt: dict[str, TextClause] = {}
        self.postgresql = self._spell.postgresql

    def run(self, connection: Connection, sql: str, **parameters: Any) -> Any:
        """Execute a statement with macros and `:name` parameters."""
        statement = self._spelt.get(sql)
        if statement is None:
            statement = self._spelt[sql] = text(self._spell(sql))
        return connection.execute(statement, self._common | parameters)

    def copied(self, connection: Connection, sql: str, **parameters: Any) -> Iterator[Any]:
        """The only column of a query with macros, streamed by COPY (PostgreSQL).

        The server goes on while we work, where a cursor waits for each lot to be asked for.
        """
        query = str(text(self._spell(sql)).compile(dialect=connection.dialect))
        cursor: Any = connection.connection.cursor()
        with cursor, cursor.copy(f"COPY ({query}) TO STDOUT", self._common | parameters) as copy:
            for (value,) in copy.rows():
                yield value


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
    raise DatabaseError(f"RELAY_DATABASE_URL: {kind} is not supported; use PostgreSQL or an SQLite file")


def connect(url: str, *, pool: int = 4, hot: bool = False) -> Engine:
    """An engine for one process; opens no connection yet. `hot`: for the statements that each message passes."""
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
        event.listen(engine, "connect", _prepare_postgresql)
        if hot:
            event.listen(engine, "connect", _prepare_hot)
        return engine
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        raise DatabaseError(f"SQLite {sqlite3.sqlite_version} is too old: 3.38 or newer is needed")
    engine = sqlalchemy.create_engine(made, pool_size=pool, max_overflow=2, connect_args={"timeout": 10})
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_postgresql(connection: Any, _record: Any) -> None:
    connection.execute(
        f"SELECT set_config('jit', 'off', false), set_config('statement_timeout', '{STATEMENT_TIMEOUT}s', false),"
        " set_config('idle_in_transaction_session_timeout', '60s', false)"
    )
    connection.commit()


def _prepare_hot(connection: Any, _record: Any) -> None:
    # Plans that psycopg prepares while a table is empty would go on scanning it when it has filled up. And a process
    # that is stopped in the middle of a transaction must not hold its rows for as long as a lease.
    connection.execute(
        "SELECT set_config('enable_seqscan', 'off', false), set_config('enable_hashjoin', 'off', false),"
        " set_config('enable_mergejoin', 'off', false), set_config('idle_in_transaction_session_timeout', '15s', false)"
    )
    connection.commit()


def _prepare_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None  # transactions are begun by `_begin_sqlite` alone
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000", "temp_store=MEMORY"):
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
    with _turn(engine), engine.connect().execution_options(relay_writing=True) as connection, connection.begin():
        yield connection


@contextmanager
def writing_once(engine: Engine) -> Iterator[Connection]:
    """As `writing`, for what is one statement on PostgreSQL: the statement is its own transaction and round trip."""
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
    """Whether the database was away or not fit, and not the data at fault: the same statement may do later."""
    if not isinstance(error, DBAPIError):
        return isinstance(error, sqlalchemy.exc.TimeoutError | OSError)
    if state := getattr(error.orig, "sqlstate", None):
        # 08: connection, 25: read-only, as a standby is, 40: deadlock, 42: not our schema, 53: out of resources, 55: a
        # lock, 57: cancelled or shutting down, 58: its disk. psycopg's classes say less: a value too long for its index
        # is an OperationalError too.
        return state[:2] in {"08", "25", "40", "42", "53", "55", "57", "58"}
    return error.connection_invalidated or isinstance(error, OperationalError | InterfaceError)


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
    """Wait for the database to answer and to have our schema: nothing depends on the order that services start in."""
    said = ""
    while True:
        try:
            with reading(engine) as connection:
                found = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
            if found == REVISION:
                return
            reason = f"schema revision is {found}, this program needs {REVISION}: run `qmqp-relay migrate`"
        except DBAPIError as error:
            missing = "alembic_version" in str(error.orig)
            reason = "no schema yet: run `qmqp-relay migrate`" if missing else first_line(error.orig)
        if reason != said:
            log.warning("waiting for the database", reason=reason)
            said = reason
        time.sleep(1.0)


def migrate(url: str, patience: float = 0.0) -> str:
    """Bring the schema up to date, under a lock that makes a second caller wait; the revision that it has then.

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
    config.set_main_option("script_location", str(Path(__file__).parent.parent / "migrations"))
    config.attributes["url"] = normalized(url)
    return config


def check_durable(engine: Engine) -> list[str]:
    """What would make this database forget a commit; empty when it keeps its word."""
    with reading(engine) as connection:
        if engine.dialect.name == "sqlite":
            found = {p: connection.exec_driver_sql(f"PRAGMA {p}").scalar() for p in ("journal_mode", "synchronous")}
            sound: dict[str, set[Any]] = {
                "journal_mode": {"wal", "delete", "truncate", "persist"}, "synchronous": {2, 3}
            }  # fmt: skip
            return [f"SQLite {name} is {value}" for name, value in found.items() if value not in sound[name]]
        rows = connection.exec_driver_sql(
            "SELECT name, setting FROM pg_settings WHERE name IN ('fsync', 'synchronous_commit', 'full_page_writes')"
        )
        return [f"PostgreSQL {name} is {setting}" for name, setting in rows if setting == "off"]


logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)  # it logs outages that we log ourselves
