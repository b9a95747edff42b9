"""The relay as processes of its own. Those that still run at the end of the test, or of its
module, are killed.

start_up    `qmqp-relay up` in the directory of the test
install     smtpd and workers on "sqlite" or "postgresql", for the tests of a module to share
"""

import os
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from commands.standalone.up import SINK_PORT
from tests.acceptance.installation import Install, Installation
from tests.acceptance.stack import StartUp, Up, processes_of
from tests.waiting import until


@pytest.fixture(scope="session", autouse=True)
def the_usual_port_of_the_sink_is_taken() -> Iterator[None]:
    """Two demos that start at the same moment would share the usual port, and one would receive the
    mail of the other."""
    with socket.socket() as holder, suppress(OSError):
        holder.bind(("127.0.0.1", SINK_PORT))
        yield
        return
    yield


@pytest.fixture
def start_up(tmp_path: Path) -> Iterator[StartUp]:
    """`start_up("--demo", QMQP_SERVERS=...)`: a relay that is up, in the STATE_DIR `var` of the
    test."""
    started: list[Up] = []

    def start(*options: str, **settings: str) -> Up:
        up = Up(Path(settings.pop("STATE_DIR", str(tmp_path / "var"))), *options, **settings)
        started.append(up)
        up.start()
        return up

    yield start
    for up in started:
        if up.process is not None:
            up.end(signal.SIGKILL)
        for pid in processes_of(up.state_dir):
            with suppress(ProcessLookupError):  # it died with `up`
                os.kill(pid, signal.SIGKILL)
        until(lambda up=up: not processes_of(up.state_dir), what="nothing is left running")  # type: ignore[misc]


@pytest.fixture(scope="module")
def install(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path
) -> Iterator[Install]:
    """`install("postgresql", QMQP_SERVERS=...)`: an installation in which only the broker
    runs."""
    with ExitStack() as stack:

        def make(database: str, **settings: str) -> Installation:
            directory = tmp_path_factory.mktemp(f"{database}-installation")
            if database == "sqlite":
                shutil.copytree(sqlite_template, directory, dirs_exist_ok=True)
                url = f"sqlite:///{directory}/relay.db"
            else:
                databases = request.getfixturevalue("postgres_databases")
                name = databases.create()
                url = databases.url(name)
                stack.callback(databases.drop, name)
            installation = Installation(directory, url, **settings)
            stack.callback(installation.close)
            return installation

        yield make
