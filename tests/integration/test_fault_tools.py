"""The tools of the fault matrix do what they say: a proxy that cuts, a shim, a broker that lies."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.faults.liar import LyingBroker
from tests.faults.proxy import CutMode, DatabaseProxy
from tests.faults.shim import FaultShim, compile_shim, why_no_shim
from tests.services import Broker, Postgres, temporary_directory

WRITER = """
import os, sys
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
for _ in range(6):
    try:
        print(os.write(file, b"1234"), os.fdatasync(file))
    except OSError as error:
        print(error.errno)
"""


@pytest.fixture
def proxy(postgres: Postgres) -> Iterator[DatabaseProxy]:
    proxy = DatabaseProxy(temporary_directory(), postgres.directory, random.Random(1))
    yield proxy
    proxy.close()


def connected(directory: Path) -> psycopg.Connection:
    return psycopg.connect(host=str(directory), user="postgres", dbname="postgres")


def commit_until_cut(proxy: DatabaseProxy, table: str) -> int:
    """Insert rows, each in a transaction, until the connection breaks; how many were confirmed."""
    with connected(proxy.directory) as connection:
        for confirmed in range(200):
            try:
                connection.execute(f"INSERT INTO {table} VALUES ({confirmed})")
                connection.commit()
            except psycopg.OperationalError:
                return confirmed
    raise AssertionError("the connection was not cut")


@pytest.mark.parametrize(("mode", "committed"), [("before COMMIT", 0), ("after COMMIT", 1)])
def test_a_commit_is_cut_before_the_server_has_it_or_after(
    postgres: Postgres, proxy: DatabaseProxy, mode: CutMode, committed: int
) -> None:
    table = f"cut_{committed}"
    with connected(postgres.directory) as direct:
        direct.execute(f"CREATE TABLE {table} (n int)")
        direct.commit()
        with proxy.cutting(mode):
            confirmed = commit_until_cut(proxy, table)
        assert proxy.cuts == 1
        rows = direct.execute(f"SELECT count(*) FROM {table}").fetchone()
        assert rows == (confirmed + committed,)
        direct.execute(f"DROP TABLE {table}")


def test_a_connection_is_cut_at_a_random_byte(proxy: DatabaseProxy) -> None:
    query = f"SELECT repeat('x', {1 << 20})"
    with connected(proxy.directory) as connection:
        assert connection.execute(query).fetchone() is not None
        with proxy.cutting("random"), pytest.raises(psycopg.OperationalError):
            connection.execute(query)
    with connected(proxy.directory) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


@pytest.fixture
def shim(tmp_path: Path) -> FaultShim:
    if why := why_no_shim():
        pytest.skip(why)
    library = compile_shim(tmp_path)
    assert library is not None
    return FaultShim(library, tmp_path / "control", tmp_path / "disk")


def output(shim: FaultShim, *arguments: str) -> list[str]:
    command = [sys.executable, "-c", *arguments]
    environ = {**os.environ, **shim.environ}
    return subprocess.run(
        command, env=environ, capture_output=True, text=True, check=True
    ).stdout.split("\n")[:-1]


def test_each_third_sync_fails_on_the_files_of_the_disk(shim: FaultShim, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    with shim.disk(sync=5):
        assert output(shim, WRITER, f"{tmp_path}/disk/file") == ["4 None", "4 None", "5"] * 2
        assert output(shim, WRITER, f"{tmp_path}/other") == ["4 None"] * 6
    assert shim.hits == 2
    assert output(shim, WRITER, f"{tmp_path}/disk/file") == ["4 None"] * 6


def test_each_third_write_is_short(shim: FaultShim, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    with shim.disk(short=True):
        assert output(shim, WRITER, f"{tmp_path}/disk/file") == ["4 None", "4 None", "2 None"] * 2


READER = """
import os, sys
file = os.open(sys.argv[1], os.O_RDONLY)
calls = (
    lambda at: os.pread(file, 100, at),
    lambda at: os.preadv(file, [bytearray(50), bytearray(50)], at),
    lambda at: (os.lseek(file, at, 0), os.read(file, 100)),
    lambda at: os.sendfile(os.open("/dev/null", os.O_WRONLY), file, at, 100),
)
for call in calls:
    for at in (300, 399, 400, 499, 500):
        try:
            call(at)
            print(at, end=" ")
        except OSError as error:
            print(error.errno, end=" ")
    print()
"""


def test_a_bad_place_is_never_read(shim: FaultShim, tmp_path: Path) -> None:
    bad, other = tmp_path / "disk", tmp_path / "other"
    for path in (bad, other):
        path.write_bytes(bytes(1000))
    with shim.bad_place(tmp_path / "di", 450, 500):
        assert output(shim, READER, str(bad)) == ["300 5 5 5 500 "] * 4
        assert output(shim, READER, str(other)) == ["300 399 400 499 500 "] * 4
    assert output(shim, READER, str(bad)) == ["300 399 400 499 500 "] * 4
    assert shim.hits == 12


@pytest.mark.parametrize("seconds", [7200, -7200.5])
def test_the_wall_clock_is_stepped_and_the_monotonic_clock_is_not(
    shim: FaultShim, seconds: float
) -> None:
    clocks = "import time; print(time.time()); print(time.monotonic())"
    shim.step_clock(seconds)
    before = time.time(), time.monotonic()
    wall, monotonic = map(float, output(shim, clocks))
    after = time.time(), time.monotonic()
    assert before[0] <= wall - seconds <= after[0]
    assert before[1] <= monotonic <= after[1]


def test_a_lying_broker_answers_on_the_socket_of_the_broker(broker: Broker) -> None:
    broker.kill()
    liar = LyingBroker(broker.socket, random.Random(1))
    assert broker.ask("PING") != b"+PONG"
    liar.close()
    assert liar.count == 1
    broker.start()
    assert broker.ask("PING") == b"+PONG"
