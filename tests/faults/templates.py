"""What all trials of a run copy: a migrated database of each kind, programs and the shim."""

from pathlib import Path

import psycopg

from relay.db.engine import migrate
from tests.faults.shim import compile_shim
from tests.faults.site import DATABASE
from tests.services import Postgres, postgres_programs, temporary_directory


def make_templates() -> Path:
    """Make them in a directory that is removed when this process ends."""
    directory = temporary_directory()
    directory.chmod(0o755)
    sqlite = directory / "sqlite"
    sqlite.mkdir()
    migrate(f"sqlite:///{sqlite}/relay.db")
    programs = postgres_programs(temporary_directory())
    (directory / "programs").write_text(str(programs))
    _make_cluster(directory / "postgres", programs)
    compile_shim(directory)
    return directory


def _make_cluster(directory: Path, programs: Path) -> None:
    """A PostgreSQL that was stopped in order, with the migrated database of the relay."""
    server = Postgres(programs=programs)
    server.start()
    with psycopg.connect(
        host=str(server.directory), user="postgres", dbname="postgres", autocommit=True
    ) as connection:
        connection.execute(f"CREATE DATABASE {DATABASE}")
    migrate(server.url(DATABASE))
    server.stop()
    directory.symlink_to(server.directory)
