"""The database role that may only read: when it is made, its privileges, and a database that does
not allow it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import psycopg
import pytest
from alembic import command
from psycopg.errors import InsufficientPrivilege
from sqlalchemy.engine import URL, make_url
from structlog.testing import capture_logs
from typer.testing import CliRunner

from commands.cli.main import main
from commands.web.overview import Overview
from migrations.tables import metadata
from migrations.views import VIEWS
from relay.db.engine import alembic_config, connect, migrate
from relay.settings import SmtpdSettings, load
from relay.users import PAGE_ROLES, Users
from tests.conftest import Databases
from tests.integration.test_inspect_page import PAGE

ROLE = "qmqp_relay_reader"
FOR_A_PERSON, BY_HAND = re.findall(r"```sql\n(CREATE ROLE.*?)```", PAGE, re.DOTALL)


@dataclass
class Cluster:
    """An empty database in a cluster that does not know the role, and its administrator."""

    url: URL
    administrator: "psycopg.Connection[tuple[object, ...]]"

    def do(self, statements: str) -> None:
        for statement in filter(None, map(str.strip, statements.split(";"))):
            self.administrator.execute(statement.encode())

    def login(self, role: str) -> str:
        return self.url.set(username=role).render_as_string(hide_password=False)

    def may_look(self, role: str) -> bool:
        asked = "SELECT has_table_privilege(%s, 'mail_queue', 'SELECT')"
        return bool(self.administrator.execute(asked, (role,)).fetchone() == (True,))


@pytest.fixture
def cluster(postgres_databases: Databases) -> Iterator[Cluster]:
    name = f"{postgres_databases.template}_roles"
    postgres_databases.execute("CREATE DATABASE {}", name)
    url = make_url(postgres_databases.url(name))
    plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as administrator:
        found = Cluster(url, administrator)
        found.do(
            f"ALTER ROLE {ROLE} RENAME TO {ROLE}_away; CREATE ROLE bob LOGIN; CREATE ROLE"
            " keeper LOGIN"
        )
        found.do("GRANT CREATE ON SCHEMA public TO keeper")
        yield found
    postgres_databases.drop(name)
    for role in (ROLE, "ann", "bob", "keeper"):
        postgres_databases.execute("DROP ROLE IF EXISTS {}", role)
    postgres_databases.execute("ALTER ROLE {} RENAME TO {}", f"{ROLE}_away", ROLE)


def test_migration_makes_a_role_that_only_reads(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.do("ALTER ROLE keeper CREATEROLE")
    with capture_logs() as logs:
        migrate(cluster.login("keeper"))
    assert logs == []
    cluster.do(FOR_A_PERSON)
    with psycopg.connect(cluster.login("ann").replace("+psycopg", ""), autocommit=True) as ann:
        for name in (*VIEWS, *metadata.tables):
            assert ann.execute(f"SELECT count(*) FROM {name}".encode()).fetchone() is not None
        for change in (
            "DELETE FROM pauses",
            "UPDATE deliveries SET pending_operation = 'drop'",
            "CREATE TABLE mine (x int)",
            "INSERT INTO spool (id, created_at) VALUES (gen_random_uuid(), now())",
            "SELECT password_hash FROM users",
            "SELECT * FROM users",
        ):
            with pytest.raises(InsufficientPrivilege):
                ann.execute(change.encode())
    monkeypatch.setenv("RELAY_DATABASE_URL", cluster.login("bob"))
    for arguments, status in {
        ("list",): 1,
        ("list", "--all", "--server", "mx", "--uncertain"): 1,
        ("stats",): 0,
        ("show", "f" * 32): 1,
        ("actions",): 1,
        ("problems",): 1,  # no worker is alive
    }.items():
        assert CliRunner().invoke(main, arguments).exit_code == status, arguments
    assert CliRunner().invoke(main, ["pause", "--route", "default"]).exit_code != 0
    reader = connect(cluster.login("bob"))
    assert Overview(reader, load(SmtpdSettings), timeout=60).values("6h")["problems"]
    assert not Users(reader).exist(PAGE_ROLES)
    cluster.do("INSERT INTO users VALUES ('ann', '$', 'viewer', '[]', NULL, now())")
    assert Users(reader).exist(PAGE_ROLES), "from now on the page asks for a login"
    reader.dispose()


def test_migration_without_privileges_works_without_the_role(cluster: Cluster) -> None:
    with capture_logs() as logs:
        migrate(cluster.login("keeper"))
    assert [(one["event"], one["role"]) for one in logs] == [("no read-only role", ROLE)]
    cluster.do(BY_HAND)
    assert cluster.may_look(ROLE)
    reads = f"SELECT has_column_privilege('{ROLE}', 'users', %s, 'SELECT')"
    readable = {
        column.name: cluster.administrator.execute(reads, (column.name,)).fetchone() == (True,)
        for column in metadata.tables["users"].columns
    }
    assert [name for name, allowed in readable.items() if not allowed] == ["password_hash"]


def test_existing_role_is_used_and_outlives_a_schema(cluster: Cluster) -> None:
    cluster.do(f"CREATE ROLE {ROLE} NOLOGIN")
    migrate(cluster.login("keeper"))
    assert cluster.may_look(ROLE)
    command.downgrade(alembic_config(cluster.login("keeper")), "0001")
    assert not cluster.may_look(ROLE)
    cluster.do(f"DROP ROLE {ROLE}")  # no object of this database refers to it any more
