"""Fixtures that every test may use: real databases, a real broker, a spool, and children that end
with their test.

    database_url    a new migrated database, once on SQLite and once on PostgreSQL
    sqlite_url, postgres_url    a new migrated database of that kind
    clean_url       a migrated database of the module, emptied for the test; cheaper than a new one
    clean_sqlite_url, clean_postgres_url    the same of that kind
    postgres        the PostgreSQL server, for faults: stop, kill, pause; repaired after the test
    broker          a Valkey of its own, for faults as well; `broker_url` is its URL
    spool           an empty `Spool` with an identity; `spool.prepare(engine)` binds a database
    spool_on_disk   the same on a disk, which can say what the page cache has
    spawn           starts a command; a command that still runs when the test ends is killed

RELAY_TEST_POSTGRES_URL names a PostgreSQL to use in place of our own (a superuser's URL; databases
named relay_test_* are made and dropped in it). RELAY_TESTS_NO_SKIP=1 makes a skipped test a failed
one. TMPDIR names the directory of spools and databases; without it they are in memory, if there is
room: on a disk the integration tests write 24 GB, and wait for it a third of their time.
"""

import gc
import itertools
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
import structlog
from hypothesis import settings as hypothesis_settings
from psycopg import sql
from sqlalchemy.engine import URL, make_url

from relay.ids import new_id
from relay.spool.store import Spool
from tests import services, state_guard
from tests.services import Broker, Postgres

# A slow moment of a shared machine is no failure of the code; the time of a whole test is bounded
# by pytest.
hypothesis_settings.register_profile("relay", deadline=None, print_blob=True)
hypothesis_settings.load_profile("relay")

# Hundreds of processes are started: compiling the code in each would be a fifth of the time
# that tests take.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Memory hides the faults of a power cut only, which `make faults` tries. A killed process loses
# nothing that it has written, on a disk or in memory.
MEMORY = Path("/dev/shm")
MEMORY_NEEDED = 4 << 30


def _memory_is_fit() -> bool:
    """Whether there is room in it, and programs of tests may run from there."""
    try:
        found = os.statvfs(MEMORY)
    except OSError:  # not Linux
        return False
    room = found.f_bavail * found.f_frsize >= MEMORY_NEEDED
    return room and not found.f_flag & os.ST_NOEXEC and os.access(MEMORY, os.W_OK)


if "TMPDIR" not in os.environ and _memory_is_fit():
    os.environ["TMPDIR"] = str(MEMORY)
    tempfile.tempdir = None  # it is determined again

# Settings of a relay in the developer's shell must not reach the tests, nor the programs that they
# spawn.
for _name in [
    name for name in os.environ if name.startswith("RELAY_") and not name.startswith("RELAY_TEST")
]:
    del os.environ[_name]
os.environ["NO_COLOR"] = "1"  # a terminal that a test pretends to have is plain, unless it says so


# The garbage collector would search the collected tests, which are as many as there are, while they
# are made and again and again while they run. None of them is garbage before the end.
gc.disable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    gc.freeze()
    gc.enable()


def _log_plainly() -> None:
    """As structlog does before it is configured, but with Python's own tracebacks, as the programs
    have them: with rich's, which show the values of all variables, an error takes seconds."""
    structlog.reset_defaults()
    *processors, _ = structlog.get_config()["processors"]
    renderer = structlog.dev.ConsoleRenderer(
        colors=False, exception_formatter=structlog.dev.plain_traceback
    )
    structlog.configure(processors=[*processors, renderer])


_log_plainly()


def _migrate(url: str) -> None:
    from relay.db.engine import migrate  # slow to import, and most unit tests need none of it

    migrate(url)
    state_guard.install(url)


# --- databases
# --------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def logs_as_they_were() -> Iterator[None]:
    """A command that runs in this process sets up its logs; they would go to a file that the test
    has closed."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    _log_plainly()
    root.handlers[:], root.level = handlers, level


@pytest.fixture(autouse=True)
def umask_as_it_was() -> Iterator[None]:
    """A command that runs in this process changes the umask; programs of other users must be able
    to read the created files."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one migrated SQLite database, to copy."""
    directory = tmp_path_factory.mktemp("sqlite-template")
    _migrate(f"sqlite:///{directory}/relay.db")
    return directory


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    for file in sqlite_template.iterdir():  # the write-ahead log too, if one is left
        shutil.copy(file, tmp_path)
    return f"sqlite:///{tmp_path}/relay.db"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """A PostgreSQL of the tests, one for the session, started at first use."""
    server = Postgres()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def postgres(postgres_server: Postgres) -> Iterator[Postgres]:
    yield postgres_server
    postgres_server.resume()
    postgres_server.start()


@pytest.fixture(scope="session")
def postgres_maintenance_url(request: pytest.FixtureRequest) -> str:
    """The server of the databases: that of RELAY_TEST_POSTGRES_URL, else the one of the tests."""
    if given := os.environ.get("RELAY_TEST_POSTGRES_URL"):
        return (
            make_url(given)
            .set(drivername="postgresql+psycopg")
            .render_as_string(hide_password=False)
        )
    server: Postgres = request.getfixturevalue("postgres_server")
    return server.url()


@pytest.fixture(scope="session")
def postgres_databases(postgres_maintenance_url: str) -> Iterator["Databases"]:
    databases = Databases(postgres_maintenance_url)
    yield databases
    databases.drop(databases.template)


@pytest.fixture
def postgres_url(postgres_databases: "Databases") -> Iterator[str]:
    name = postgres_databases.create()
    yield postgres_databases.url(name)
    postgres_databases.drop(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """A migrated database of its own, as RELAY_DATABASE_URL takes it."""
    url: str = request.getfixturevalue(
        "sqlite_url" if request.param == "sqlite" else "postgres_url"
    )
    return url


@pytest.fixture(scope="module")
def databases() -> Iterator["ModuleDatabases"]:
    """The databases of the module: to create and to drop one takes longer than to empty it."""
    with ExitStack() as stack:
        yield ModuleDatabases({}, stack)


@pytest.fixture
def clean_sqlite_url(
    databases: "ModuleDatabases", sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> str:
    if "sqlite" not in databases.urls:
        directory = tmp_path_factory.mktemp("sqlite")
        for file in sqlite_template.iterdir():
            shutil.copy(file, directory)
        databases.urls["sqlite"] = f"sqlite:///{directory}/relay.db"
    return _emptied(databases.urls["sqlite"])


@pytest.fixture
def clean_postgres_url(databases: "ModuleDatabases", postgres_databases: "Databases") -> str:
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


@dataclass
class ModuleDatabases:
    """The databases of the module, created for the first test that uses them, and the stack that
    drops them."""

    urls: dict[str, str]
    stack: ExitStack


def _emptied(url: str) -> str:
    """The URL of a database, after all rows are deleted: in one step, and without an engine, which
    would take longer than the step."""
    from migrations.tables import metadata  # as slow to import as `migrate`

    deletes = ";".join(f"DELETE FROM {table.name}" for table in metadata.sorted_tables)
    parsed = make_url(url)
    if parsed.drivername == "sqlite":
        with closing(sqlite3.connect(str(parsed.database))) as connection:
            connection.executescript(f"BEGIN; {deletes}; COMMIT")
    else:
        with _connected(parsed) as connection:
            connection.execute(sql.SQL(deletes))
    return url


class Databases:
    """Makes databases on a PostgreSQL server as copies of a migrated one, in some 40 ms each."""

    def __init__(self, maintenance_url: str) -> None:
        self._maintenance = make_url(maintenance_url)
        self._prefix = f"relay_test_{os.getpid()}"
        self._numbers = itertools.count(1)
        self.template = f"{self._prefix}_template"
        self.execute("CREATE DATABASE {}", self.template)
        _migrate(self.url(self.template))

    def url(self, name: str) -> str:
        return self._maintenance.set(database=name).render_as_string(hide_password=False)

    def create(self) -> str:
        name = f"{self._prefix}_{next(self._numbers)}"
        self.execute("CREATE DATABASE {} TEMPLATE {}", name, self.template)
        return name

    def drop(self, name: str) -> None:
        self.execute("DROP DATABASE IF EXISTS {} WITH (FORCE)", name)

    def execute(self, statement: str, *names: str) -> None:
        with _connected(self._maintenance) as connection:
            connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))


def _connected(url: URL) -> psycopg.Connection:
    plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
    return psycopg.connect(plain, autocommit=True)


# --- broker, spool, children
# ------------------------------------------------------------------------------


@pytest.fixture
def broker() -> Iterator[Broker]:
    directory = services.temporary_directory()
    server = Broker(directory)
    server.start()
    yield server
    server.stop()
    shutil.rmtree(directory)


@pytest.fixture
def broker_url(broker: Broker) -> str:
    return broker.url


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return _new_spool(tmp_path / "spool")


def _new_spool(directory: Path) -> Spool:
    directory.mkdir(mode=0o700)
    (directory / "spool-id").write_text(f"{new_id()}\n")
    return Spool(directory)


@pytest.fixture
def spool_on_disk() -> Iterator[Spool]:
    with tempfile.TemporaryDirectory(prefix="relay-test-", dir="/var/tmp") as directory:
        yield _new_spool(Path(directory) / "spool")


@pytest.fixture
def free_port() -> Callable[[], int]:
    return services.free_port


@pytest.fixture
def spawn() -> Iterator[Callable[..., subprocess.Popen[Any]]]:
    """`services.spawn` for one test: `spawn(["qmqp-relay", "smtpd"], env=..., stderr=...)`."""
    children: list[subprocess.Popen[Any]] = []

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[Any]:
        child = services.spawn(*arguments, **options)
        children.append(child)
        return child

    yield start
    for child in reversed(children):
        services.end(child, signal.SIGKILL)


# --- no test is skipped unseen
# ----------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        _fail_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped:
        _fail_skipped(report)
    return report


def _fail_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    if os.environ.get("RELAY_TESTS_NO_SKIP", "0") not in ("", "0"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"skipped, and RELAY_TESTS_NO_SKIP is set: {reason}"
