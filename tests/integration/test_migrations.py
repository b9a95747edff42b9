"""Migrations create the schema that `migrations/tables.py` describes, on both databases, and
several processes may migrate at the same time."""

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from psycopg import sql
from sqlalchemy import Connection, Engine, create_engine, inspect, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

from migrations.tables import VIEW_COLUMNS, metadata
from migrations.views import VIEWS, create_views
from relay.db.engine import alembic_config, check_schema, connect, migrate, reading, writing
from relay.db.schema import REVISION
from relay.ids import dashed, new_id
from relay.queue.accept import Acceptor
from relay.spool.journal.directory import JournalDirectory
from relay.spool.journal.supply import make_segment
from relay.spool.store import Spool
from tests.integration.harness import new_message
from tests.services import Postgres

NUMBERS = itertools.count(1)
# Everything about a PostgreSQL schema that a statement can make, a line each.
CATALOG = """
SELECT format('%s.%s %s %s default %s: %s', c.relname, a.attname,
              format_type(a.atttypid, a.atttypmod),
              CASE WHEN a.attnotnull THEN 'not null' END, pg_get_expr(d.adbin, d.adrelid),
              col_description(c.oid, a.attnum))
FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'v')
UNION ALL SELECT format('%s: %s %s', relname, reloptions, obj_description(oid))
FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
UNION ALL SELECT indexdef FROM pg_indexes WHERE schemaname = 'public'
UNION ALL SELECT format('%s %s %s', conrelid::regclass, conname, pg_get_constraintdef(oid))
FROM pg_constraint WHERE connamespace = 'public'::regnamespace
UNION ALL SELECT format('%s: %s', viewname, definition) FROM pg_views WHERE schemaname = 'public'
"""


@pytest.fixture
def new_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Makes URLs of empty databases."""
    dropped = ExitStack()

    def new(kind: str) -> str:
        number = next(NUMBERS)
        if kind == "sqlite":
            return f"sqlite:///{tmp_path}/empty-{number}.db"
        url = make_url(request.getfixturevalue("postgres_maintenance_url"))
        name = f"relay_test_{os.getpid()}_empty_{number}"
        plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
        connection = psycopg.connect(plain, autocommit=True)
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        dropped.callback(connection.close)
        drop = sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name))
        dropped.callback(connection.execute, drop)
        return url.set(database=name).render_as_string(hide_password=False)

    with dropped:
        yield new


def dump(url: str) -> list[str]:
    """The schema in lines that can be compared, without Alembic's own table."""
    engine = connect(url)
    with reading(engine) as connection:
        listed = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL"
        rows = connection.execute(
            text(CATALOG.replace(":", r"\:") if engine.dialect.name == "postgresql" else listed)
        )
        lines = [
            re.sub(r"\s+", " ", row[0].replace('"', "")) for row in rows
        ]  # SQLite quotes what it renames
    engine.dispose()
    tight = [re.sub(r" ?([(),]) ?", r"\1", line).strip() for line in lines]
    return sorted(line for line in tight if "alembic_version" not in line)


def described(url: str) -> None:
    """Make everything as `migrations.tables` and the views' files have it, without migrations."""
    engine = connect(url)
    with writing(engine) as connection:
        metadata.create_all(connection)
        create_views(connection)
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_migrations_make_what_the_schema_describes(
    kind: str, new_url: Callable[[str], str]
) -> None:
    migrated, made = new_url(kind), new_url(kind)
    assert migrate(migrated) == REVISION
    described(made)
    assert dump(migrated) == dump(made)
    assert len(dump(migrated)) > 15


# SQLAlchemy cannot read expressions of an index back from SQLite; the test above compares its text.
@pytest.mark.filterwarnings("ignore:Skipped unsupported reflection of expression-based index")
@pytest.mark.filterwarnings("ignore:autogenerate skipping metadata-specified expression-based")
def test_alembic_reports_no_difference(database_url: str) -> None:
    engine = connect(database_url)
    with reading(engine) as connection:
        options = {
            "compare_type": True,
            "compare_server_default": True,
            "include_name": lambda name, kind, _: kind != "table" or name != "alembic_version",
        }
        assert (
            compare_metadata(MigrationContext.configure(connection, opts=options), metadata) == []
        )
    engine.dispose()


def test_downgrade_and_upgrade_restore_the_schema(kind: str, new_url: Callable[[str], str]) -> None:
    url = new_url(kind)
    empty = dump(url) if kind == "postgresql" else []
    migrate(url)
    there = dump(url)
    migrate(url)
    assert dump(url) == there, "a second time changes nothing"
    command.downgrade(alembic_config(url), "base")
    assert dump(url) == empty
    migrate(url)
    assert dump(url) == there


@pytest.fixture
def journal(
    kind: str, new_url: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Engine, Spool]]:
    """A database with its spool."""
    url = new_url(kind)
    migrate(url)
    monkeypatch.setenv("RELAY_SPOOL_DIR", str(tmp_path / "spool"))
    engine, spool = connect(url), Spool(tmp_path / "spool")
    spool.prepare(engine, unsafe=True)
    yield url, engine, spool
    engine.dispose()


def sealed(engine: Engine, segment: str, *, seal: bool = True) -> None:
    """A row of a segment."""
    acceptor = Acceptor(engine, lifetime=1000.0, grace=5.0)
    acceptor.open_segment(segment, 4096)
    if seal:
        acceptor.seal_segment(segment, 4096, 0, "", "")


@pytest.mark.parametrize("what", ["without a row", "with a row", "sealed", "another spool"])
def test_downgrade_is_refused_while_a_segment_may_hold_mail_without_rows(
    journal: tuple[str, Engine, Spool], what: str
) -> None:
    url, engine, spool = journal
    segment, file = make_segment(JournalDirectory(spool.handle), spool.identity, size=1 << 16)
    file.close()
    if what in ("with a row", "sealed"):
        sealed(engine, segment, seal=what == "sealed")
    elif what == "another spool":
        with writing(engine) as connection:
            connection.execute(text("UPDATE spool SET id = :id"), {"id": dashed(new_id())})
    if what in ("sealed", "another spool"):
        command.downgrade(alembic_config(url), "0003")
        return
    with pytest.raises(RuntimeError, match=segment):
        command.downgrade(alembic_config(url), "0003")


def test_downgrade_is_refused_while_a_large_message_waits(
    journal: tuple[str, Engine, Spool],
) -> None:
    """Its file ends in a trailer, which the earlier version takes for a part of the body."""
    url, engine, _ = journal
    acceptor = Acceptor(engine, lifetime=1000.0, grace=5.0)
    with writing(engine) as connection:
        acceptor.insert(connection, [new_message()])
    with pytest.raises(RuntimeError, match="1 deliveries wait"):
        command.downgrade(alembic_config(url), "0003")


def test_values_of_older_versions_are_renamed(kind: str, new_url: Callable[[str], str]) -> None:
    url = new_url(kind)
    command.upgrade(alembic_config(url), "0002")
    at, row = (
        ("now()", "00000000-0000-7000-8000-000000000001") if kind == "postgresql" else (0, "x")
    )
    engine = connect(url)
    with writing(engine) as connection:
        for statement in (
            f"""INSERT INTO workers (id, host, pid, started_at, until, ended_at, ending)
            VALUES ('{row}', 'host', 1, {at}, {at}, {at}, 'vanished')""",
            f"""INSERT INTO messages (id, sender, size, received_at, client_address, helo, protocol)
            VALUES ('{row}', '', 1, {at}, '', 'relay', 'NOTICE')""",
            f"INSERT INTO actions VALUES ('{row}', {at}, 'me', 'hold', 'why', '--all', 1)",
            f"INSERT INTO touched VALUES ('{row}', 1, '{row}')",
        ):
            connection.exec_driver_sql(statement)
    migrate(url)
    query = """SELECT end_reason, protocol, operation, CAST(audit_id AS text)
        FROM workers, messages, audit JOIN audit_deliveries ON audit_id = audit.id"""
    with reading(engine) as connection:
        assert connection.exec_driver_sql(query).all() == [("expired", "DSN", "hold", row)]
    command.downgrade(alembic_config(url), "0002")
    query = """SELECT ending, protocol, verb
        FROM workers, messages, actions JOIN touched ON action = actions.id"""
    with reading(engine) as connection:
        assert connection.exec_driver_sql(query).all() == [("vanished", "NOTICE", "hold")]
    engine.dispose()


def test_the_program_knows_the_newest_revision() -> None:
    assert ScriptDirectory.from_config(alembic_config("sqlite:///x")).get_heads() == [REVISION]


def test_the_database_has_its_revision(database_url: str) -> None:
    engine = connect(database_url)
    check_schema(engine)
    engine.dispose()


def test_several_that_migrate_at_once_take_turns(kind: str, new_url: Callable[[str], str]) -> None:
    """Two replicas start together: one migrates, and the other one has nothing to do."""
    url, other = new_url(kind), new_url(kind)
    migrate(other)
    command = [
        sys.executable,
        "-c",
        "import sys; from relay.db.engine import migrate; print(migrate(sys.argv[1]))",
        url,
    ]
    replicas = [
        subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [replica.communicate(timeout=60)[0] for replica in replicas] == [f"{REVISION}\n"] * 2
    assert dump(url) == dump(other)


def test_migrate_waits_for_a_database_on_request(postgres: Postgres, postgres_url: str) -> None:
    postgres.kill()
    with pytest.raises(OperationalError):
        migrate(postgres_url)
    with ThreadPoolExecutor(1) as pool:
        migrating = pool.submit(migrate, postgres_url, 60.0)
        postgres.start()
        assert migrating.result(60) == REVISION


def test_a_migration_that_fails_leaves_nothing(kind: str, new_url: Callable[[str], str]) -> None:
    url = new_url(kind)
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE workers (mine int)"))
    before = dump(url)
    with pytest.raises(Exception, match="workers"):
        migrate(url)
    assert dump(url) == before
    engine.dispose()


def test_tables_and_columns_are_explained(postgres_url: str) -> None:
    engine = connect(postgres_url)
    with reading(engine) as connection:
        for table in metadata.tables.values():
            assert table.comment
            meanings = comments(connection, table.name)
            assert meanings == {column.name: column.comment for column in table.columns}
            assert all(meanings.values()), table.name
        for view in VIEWS:
            described = connection.execute(
                text(f"SELECT obj_description(CAST('{view}' AS regclass))")
            ).scalar()
            assert "docs/inspect.md" in str(described), view
            assert comments(connection, view) == VIEW_COLUMNS[view]
    engine.dispose()


def comments(connection: Connection, table: str) -> dict[str, str | None]:
    return {column["name"]: column["comment"] for column in inspect(connection).get_columns(table)}


def test_views_can_be_read(database_url: str) -> None:
    engine: Engine = connect(database_url)
    with reading(engine) as connection:
        for view in VIEWS:
            periods = 3 if view == "mail_flow" else 0
            assert len(connection.execute(text(f"SELECT * FROM {view}")).all()) == periods
    engine.dispose()
