"""Where PostgreSQL and SQLite differ: every macro on both, outages and errors in the data,
durability, and writers in turn."""

import json
import sqlite3
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from relay.db import engine as database
from relay.db.engine import (
    DatabaseError,
    DatabaseFileError,
    check_durable,
    check_schema,
    connect,
    is_outage,
    reading,
    retry_until_available,
    writing,
)
from relay.db.schema import REVISION
from relay.ids import dashed, new_id
from tests.dialect import dialect_of
from tests.services import Postgres
from tests.waiting import until

NOW = {"postgresql": "now()", "sqlite": "(SELECT now FROM clock)"}


# --- the clock, and rows in a parameter
# -----------------------------------------------------------------------------------------------


def test_now_is_the_time(engine: Engine) -> None:
    kind = engine.dialect.name
    for _ in range(50):
        before = time.time()
        with reading(engine) as connection:
            now: Any = connection.exec_driver_sql(f"SELECT {NOW[kind]}").scalar()
        seconds = now / 1e6 if kind == "sqlite" else now.timestamp()
        assert before - 0.002 <= seconds <= time.time() + 0.002


def test_the_sqlite_clock_is_exact_to_the_millisecond_at_any_time(sqlite_url: str) -> None:
    engine = connect(sqlite_url)
    with reading(engine) as connection:
        view = connection.exec_driver_sql("SELECT sql FROM sqlite_master WHERE name = 'clock'")
        select = str(view.scalar()).partition(" AS\n")[2]
        assert "'now'" in select
        for moment in (
            0,
            1,
            999,
            946684799999,
            1763800000123,
            1763800000001,
            2147483647999,
            4102444800000,
        ):
            spelt = (
                datetime.fromtimestamp(moment // 1000, UTC).strftime("%Y-%m-%d %H:%M:%S.")
                + f"{moment % 1000:03d}"
            )
            found = connection.execute(text(select.replace("'now'", ":at")), {"at": spelt}).scalar()
            assert found == moment * 1000
    engine.dispose()


def test_rows_bring_every_kind_of_value(engine: Engine) -> None:
    sent = [
        {
            "id": dashed(new_id()),
            "n": 7,
            "big": 1 << 40,
            "x": 0.125,
            "t": "a 'quote' \\ and é \u2028",
        },
        {"id": dashed(new_id()), "n": -1, "big": 0, "x": 1e-6, "t": None},
    ]
    rows = dialect_of(engine)("@rows(:sent; id uuid, n int, big bigint, x float8, t text)")
    query = text(f"SELECT CAST(id AS text) AS id, n, big, x, t FROM {rows}")
    with reading(engine) as connection:
        found = connection.execute(query, {"sent": json.dumps(sent)}).mappings().all()
        assert [dict(row) for row in found] == sent
        assert connection.execute(query, {"sent": "[]"}).all() == []


# --- outages
# ----------------------------------------------------------------------------------------------


def failure(engine: Engine, sql: str, **given: Any) -> DBAPIError:
    with pytest.raises(DBAPIError) as caught, writing(engine) as connection:
        connection.execute(text(sql), given)
    return caught.value


def test_bad_data_is_no_outage(engine: Engine) -> None:
    insert = "INSERT INTO spool (id, created_at) VALUES (:id, :at)"
    assert not is_outage(failure(engine, insert, id=dashed(new_id()), at=None))
    twice = insert + ", (:id, :at)"
    assert not is_outage(failure(engine, twice, id=dashed(new_id()), at=None))
    assert not is_outage(ValueError("ours"))
    assert is_outage(failure(engine, "SELECT * FROM no_such_table")), (
        "a schema of another version is no fault of the row"
    )


def test_values_that_postgresql_refuses_are_no_outage(clean_postgres_url: str) -> None:
    engine = connect(clean_postgres_url)
    sender = "INSERT INTO messages SELECT CAST(:id AS uuid), :sender, 1, now(), '', '', ''"
    long = "".join(new_id() for _ in range(1000))  # nothing that compresses
    assert not is_outage(failure(engine, sender, id=dashed(new_id()), sender=long)), (
        "too long for an index"
    )
    assert not is_outage(failure(engine, sender, id="no uuid", sender=""))
    assert not is_outage(
        failure(engine, """SELECT CAST(:j AS json) ->> 'a'""", j=json.dumps({"a": "\0"}))
    )
    engine.dispose()


def test_outages_of_postgresql_are_recognised(postgres: Postgres) -> None:
    engine = connect(postgres.url())
    for sql in (
        "SELECT pg_terminate_backend(pg_backend_pid())",
        "SET LOCAL statement_timeout = 1; SELECT pg_sleep(5)",
        "SET TRANSACTION READ ONLY; CREATE TABLE t ()",
    ):
        assert is_outage(failure(engine, sql))
    postgres.stop()
    for _ in range(2):  # the connection that there was breaks, and a new one is refused
        assert is_outage(failure(engine, "SELECT 1"))
    postgres.start()
    with reading(engine) as connection:
        assert connection.execute(text("SELECT 1")).scalar() == 1, "the same engine goes on"
    engine.dispose()


def test_outages_of_sqlite_are_recognised(tmp_path: Path) -> None:
    engine = connect(f"sqlite:///{tmp_path}/missing/relay.db")
    with pytest.raises(OSError) as lock, writing(engine):
        pass
    assert is_outage(lock.value)
    with pytest.raises(DBAPIError) as open_, reading(engine):
        pass
    assert is_outage(open_.value)
    full = connect(f"sqlite:///{tmp_path}/full.db")
    with writing(full) as connection:
        connection.exec_driver_sql("CREATE TABLE t (x)")
        connection.exec_driver_sql("PRAGMA max_page_count=3")
        with pytest.raises(DBAPIError) as no_room:
            connection.execute(text("INSERT INTO t VALUES (zeroblob(100000))"))
        assert is_outage(no_room.value)
    full.dispose()


def test_a_file_that_reads_as_malformed_is_no_fault_of_the_row(tmp_path: Path) -> None:
    """As it does while the power fails: the outcome that is being recorded must be recorded
    later."""
    file = tmp_path / "relay.db"
    engine = connect(f"sqlite:///{file}")
    with writing(engine) as connection:
        connection.exec_driver_sql("CREATE TABLE t (x)")
        connection.exec_driver_sql("INSERT INTO t VALUES (zeroblob(100000))")
    engine.dispose()
    whole = file.read_bytes()
    file.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    error = failure(engine, "INSERT INTO t VALUES (1)")
    assert "malformed" in str(error)
    assert is_outage(error)
    engine.dispose()
    file.write_bytes(b"no database " * 1000)
    assert is_outage(failure(engine, "INSERT INTO t VALUES (1)"))
    engine.dispose()


def test_a_statement_may_take_the_time_of_its_engine(clean_postgres_url: str) -> None:
    engine = connect(clean_postgres_url, hot=True, timeout=0.05)
    assert "statement timeout" in str(failure(engine, "SELECT pg_sleep(20)"))
    engine.dispose()


def wait_for_schema(engine: Engine) -> None:
    retry_until_available(lambda: check_schema(engine))


def test_waiting_for_the_database_and_its_schema(postgres: Postgres, tmp_path: Path) -> None:
    """No process gives up when the database starts or is migrated later."""
    url = f"sqlite:///{tmp_path}/late.db"
    engine = connect(url)
    waiting = threading.Thread(target=wait_for_schema, args=(engine,))
    waiting.start()
    assert waiting.is_alive()
    assert database.migrate(url) == REVISION
    waiting.join(10)
    assert not waiting.is_alive()
    with writing(engine) as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'older'")
    waiting = threading.Thread(target=wait_for_schema, args=(engine,))
    waiting.start()
    with writing(engine) as connection:
        connection.exec_driver_sql(f"UPDATE alembic_version SET version_num = '{REVISION}'")
    waiting.join(10)
    assert not waiting.is_alive()
    engine.dispose()


def test_start_within_an_outage_waits_for_its_end(postgres: Postgres, postgres_url: str) -> None:
    """An outage begins after a successful statement: the statement is tried again until it
    succeeds."""
    engine = connect(postgres_url)
    asked = 0

    def ask() -> int:
        nonlocal asked
        asked += 1
        if asked == 1:
            postgres.stop()
        elif asked == 3:
            postgres.start()
        with reading(engine) as connection:
            return int(connection.exec_driver_sql("SELECT 1").scalar_one())

    assert retry_until_available(ask) == 1
    assert asked == 3
    with pytest.raises(ZeroDivisionError):
        retry_until_available(lambda: 1 // 0)
    engine.dispose()


# --- durability and settings
# ------------------------------------------------------------------------------


def test_databases_of_the_tests_are_durable(engine: Engine) -> None:
    assert check_durable(engine) == []


def test_a_connection_that_is_not_prepared_is_closed(database_url: str) -> None:
    engine = database.connect(database_url)
    refused = list[Any]()

    def refuse(connection: Any, _record: object) -> None:
        refused.append(connection)
        raise OSError("refused")

    database.prepare_connections(engine, refuse)
    with pytest.raises(OSError, match="refused"):
        engine.connect()
    (connection,) = refused
    with pytest.raises((psycopg.OperationalError, sqlite3.ProgrammingError), match="closed"):
        connection.execute("SELECT 1")
    engine.dispose()


def test_a_connection_that_is_in_use_while_its_engine_is_disposed_of_is_closed_at_its_return(
    database_url: str,
) -> None:
    engine = database.connect(database_url)
    with engine.connect() as connection:
        used: Any = connection.connection.driver_connection
        engine.dispose()
        assert connection.exec_driver_sql("SELECT 1").scalar_one() == 1
    with pytest.raises((psycopg.OperationalError, sqlite3.ProgrammingError), match="closed"):
        used.execute("SELECT 1")
    with engine.connect() as connection:
        kept: Any = connection.connection.driver_connection
    assert kept.execute("SELECT 1").fetchone() == (1,)
    engine.dispose()


def test_a_database_that_is_not_durable_is_refused(postgres: Postgres, sqlite_url: str) -> None:
    engine = connect(postgres.url())
    sqlalchemy.event.listen(
        engine, "connect", lambda c, _: (c.execute("SET synchronous_commit = off"), c.commit())
    )
    assert check_durable(engine) == ["PostgreSQL synchronous_commit is off"]
    engine.dispose()
    engine = connect(sqlite_url)
    sqlalchemy.event.listen(
        engine, "connect", lambda c, _: c.execute("PRAGMA synchronous=NORMAL").close()
    )
    assert check_durable(engine) == ["SQLite synchronous is 1"]
    engine.dispose()


def test_url_gets_the_driver_of_the_relay() -> None:
    assert database.normalized("postgresql://u:p@h/d").drivername == "postgresql+psycopg"
    assert database.normalized("postgresql+psycopg2://h/d").drivername == "postgresql+psycopg"
    assert database.normalized("sqlite:////var/lib/relay.db").database == "/var/lib/relay.db"
    for bad in ("mysql://h/d", "sqlite://", "sqlite:///:memory:", "nonsense", "host/name"):
        with pytest.raises(DatabaseError, match="RELAY_DATABASE_URL"):
            database.normalized(bad)


# --- writers in turn
# --------------------------------------------------------------------------------------

WRITER = """
import sys, time
from sqlalchemy import text
from relay.db.engine import connect, writing
from relay.ids import dashed, new_id
engine = connect(sys.argv[1])
with writing(engine):
    pass
print("ready", flush=True)
sys.stdin.readline()
longest = 0.0
for _ in range(40):
    began = time.monotonic()
    with writing(engine) as connection:
        insert = text("INSERT INTO spool (id, created_at) VALUES (:id, 0)")
        connection.execute(insert, {"id": dashed(new_id())})
    longest = max(longest, time.monotonic() - began)
print(longest, flush=True)
engine.dispose()
"""


def test_sqlite_writers_of_several_processes_do_not_stall(sqlite_url: str) -> None:
    """Under SQLite's own busy handler one of four would wait for many seconds; in turns none
    waits for long."""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, sqlite_url],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    said = []
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        out, _ = writer.communicate(timeout=60)
        said.append(float(out))
    assert max(said) < 3.0, said
    with sqlite3.connect(sqlite_url.removeprefix("sqlite:///")) as connection:
        assert connection.execute("SELECT count(*) FROM spool").fetchone() == (160,)
    connection.close()


def test_an_sqlite_file_that_was_replaced_is_opened_again(sqlite_url: str) -> None:
    """A backup was put in its place while the program ran."""
    path = Path(sqlite_url.removeprefix("sqlite:///"))
    engine, insert = connect(sqlite_url), text("INSERT INTO spool (id, created_at) VALUES (:id, 0)")
    with writing(engine) as connection:
        connection.execute(insert, {"id": dashed(new_id())})
    backup = path.with_name("backup.db")
    with sqlite3.connect(path) as source, sqlite3.connect(backup) as target:
        source.backup(target)
    source.close()
    target.close()
    with writing(engine) as connection:
        connection.execute(insert, {"id": dashed(new_id())})
    for end in ("-wal", "-shm"):
        path.with_name(path.name + end).unlink()
    backup.replace(path)
    with reading(engine) as connection:
        assert connection.execute(text("SELECT count(*) FROM spool")).scalar() == 1
    path.rename(backup)
    with pytest.raises(DatabaseFileError, match=str(path)) as raised, reading(engine):
        pass
    assert is_outage(raised.value)
    assert not path.exists(), "no empty database takes its place"
    backup.rename(path)
    with writing(engine) as connection:
        connection.execute(insert, {"id": dashed(new_id())})
    engine.dispose()


def test_a_thread_waits_for_its_turn_to_write(sqlite_url: str) -> None:
    engine = connect(sqlite_url)
    order: list[str] = []

    def second() -> None:
        order.append("asks")
        with writing(engine):
            order.append("writes")

    with writing(engine) as connection:
        thread = threading.Thread(target=second)
        thread.start()
        until(lambda: order == ["asks"])
        with reading(engine) as reader:
            assert reader.exec_driver_sql("SELECT count(*) FROM spool").scalar() == 0, (
                "readers do not wait"
            )
        connection.exec_driver_sql("INSERT INTO spool (id, created_at) VALUES ('x', 0)")
        assert order == ["asks"]
    thread.join(10)
    assert order == ["asks", "writes"]
    engine.dispose()


def test_a_transaction_that_fails_is_rolled_back_and_lets_the_next_one_in(engine: Engine) -> None:
    insert = text(dialect_of(engine)("INSERT INTO spool (id, created_at) VALUES (@id(:id), @now)"))
    with pytest.raises(DBAPIError), writing(engine) as connection:
        connection.execute(insert, [{"id": "11111111-1111-7111-8111-111111111111"}] * 2)
    with writing(engine) as connection:
        assert connection.execute(text("SELECT count(*) FROM spool")).scalar() == 0
