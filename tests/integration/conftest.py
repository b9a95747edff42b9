"""One migrated database a test module, emptied for each test, and one Postfix for all of them:
making one takes longer than most of these tests."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import text

from migrations.tables import metadata
from relay.db.engine import connect, writing
from tests.conftest import Databases
from tests.integration.harness import QueueHarness, opened
from tests.postfix import Postfix
from tests.services import ServiceError


@pytest.fixture(scope="session")
def postfix() -> Iterator[Postfix]:
    """Real qmqpds: one that accepts mail, one that authorizes no client, one that never says D."""
    try:
        server = Postfix()
        server.start()
    except ServiceError as error:
        pytest.skip(str(error))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def databases() -> Iterator["ModuleDatabases"]:
    with ExitStack() as stack:
        yield ModuleDatabases({}, stack)


@pytest.fixture
def clean_sqlite_url(
    databases: "ModuleDatabases", sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> str:
    if "sqlite" not in databases.urls:
        directory = tmp_path_factory.mktemp("sqlite")
        for file in sqlite_template.iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
        databases.urls["sqlite"] = f"sqlite:///{directory}/relay.db"
    return _emptied(databases.urls["sqlite"])


@pytest.fixture
def clean_postgres_url(databases: "ModuleDatabases", postgres_databases: Databases) -> str:
    if "postgresql" not in databases.urls:
        name = postgres_databases.create()
        databases.stack.callback(postgres_databases.drop, name)
        databases.urls["postgresql"] = postgres_databases.url(name)
    return _emptied(databases.urls["postgresql"])


@pytest.fixture(params=["sqlite", "postgresql"])
def clean_url(request: pytest.FixtureRequest) -> str:
    """A migrated database without rows, which other tests of the module have used."""
    url: str = request.getfixturevalue(
        "clean_sqlite_url" if request.param == "sqlite" else "clean_postgres_url"
    )
    return url


@pytest.fixture
def queue(clean_url: str) -> Iterator[QueueHarness]:
    with opened(clean_url) as queue:
        yield queue


@pytest.fixture
def postgres_queue(clean_postgres_url: str) -> Iterator[QueueHarness]:
    with opened(clean_postgres_url) as queue:
        yield queue


@dataclass
class ModuleDatabases:
    """The databases of the module, created for the first test that uses them, and the stack that
    drops them."""

    urls: dict[str, str]
    stack: ExitStack


def _emptied(url: str) -> str:
    engine = connect(url)
    with writing(engine) as connection:
        for table in metadata.sorted_tables:
            connection.execute(text(f"DELETE FROM {table.name}"))
    engine.dispose()
    return url
