"""`qmqp-relay` as a process of its own, and the processes that it leaves running."""

import os
import re
import smtplib
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.services import end, free_port, spawn
from tests.waiting import until

ROOT = Path(__file__).parents[2]
STARTING = 60.0  # seconds on a loaded machine
QUICK = {
    "RELAY_RETRY_MIN": "1s",
    "RELAY_RETRY_MAX": "2s",
    "RELAY_GRACE": "1s",
    "RELAY_UNSAFE_DURABILITY": "1",  # pytest's temporary directory may be in memory
}


def relay_environ(**settings: str) -> dict[str, str]:
    """The environment of a command: that of the tests without RELAY_ names, and these settings."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
    return (
        plain
        | {"PYTHONPATH": str(ROOT)}
        | QUICK
        | {f"RELAY_{name}": value for name, value in settings.items()}
    )


def command(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run `qmqp-relay ARGUMENTS` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "commands.cli.start", *arguments],
        env=relay_environ(**settings),
        capture_output=True,
        text=True,
        timeout=STARTING,
        check=False,
    )


def processes_of(state_dir: Path) -> list[int]:
    """The processes that were started for this STATE_DIR and still run, without this one."""
    return list(_running(state_dir))


def _running(state_dir: Path) -> dict[int, list[bytes]]:
    """Their command lines by pid, without those that end meanwhile."""
    running = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            environ, command_line = (
                (directory / "environ").read_bytes(),
                (directory / "cmdline").read_bytes(),
            )
            dead = (directory / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            continue
        if (
            os.fsencode(state_dir) in environ + command_line
            and not dead
            and int(directory.name) != os.getpid()
        ):
            running[int(directory.name)] = command_line.split(b"\0")
    return running


class Up:
    """`qmqp-relay up` on a port and a STATE_DIR of its own."""

    def __init__(self, state_dir: Path, *options: str, **settings: str) -> None:
        self.state_dir, self.options = state_dir, options
        self.port = free_port()
        self.settings = {
            "STATE_DIR": str(state_dir),
            "SMTP_LISTEN": f"127.0.0.1:{self.port}",
            **settings,
        }
        self.log = state_dir.with_suffix(".log")
        self.process: subprocess.Popen[Any] | None = None

    def begin(self) -> None:
        """Start it."""
        with self.log.open("w") as log:
            self.process = spawn(
                [sys.executable, "-m", "commands.cli.start", "up", *self.options],
                env=relay_environ(**self.settings),
                stdout=log,
                stderr=log,
                cwd=ROOT,
            )

    def start(self) -> None:
        """Start it and wait for the banner."""
        self.begin()
        until(
            lambda: "Ctrl-C to stop" in self.log_text() or not self.running,
            STARTING,
            what=self.log_text,
        )
        assert self.running, self.log_text()

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def log_text(self) -> str:
        """Everything that it and its children have written."""
        return self.log.read_text(errors="replace")

    def end(self, number: int, timeout: float = 30.0) -> int:
        """Signal it and wait; its exit status."""
        assert self.process is not None
        return end(self.process, number, timeout)

    def child(self, name: str) -> int | None:
        """The pid of the child whose program or command is `name`."""
        for pid, argv in _running(self.state_dir).items():
            program = argv[0].split(b" ")[0]  # Valkey writes more into its title
            if name.encode() in argv or program.endswith(b"/" + name.encode()):
                return pid
        return None

    def send(
        self, *recipients: str, sender: str = "me@example.com", body: str = "Subject: x\n\nHello.\n"
    ) -> str:
        """Hand a message over by SMTP; its queue id."""
        with smtplib.SMTP("127.0.0.1", self.port, timeout=30) as client:
            client.ehlo("client.example.com")
            assert client.mail(sender)[0] == 250
            for recipient in recipients:
                assert client.rcpt(recipient)[0] == 250
            code, reply = client.data(body)
        assert code == 250, reply
        queued = re.search(rb"queued as ([0-9a-f]{32})", reply)
        assert queued, reply
        return queued[1].decode()

    def states(self) -> dict[str, str]:
        """The state of every recipient, by address."""
        with sqlite3.connect(f"file:{self.state_dir}/relay.db?mode=ro", uri=True) as connection:
            states = dict(
                connection.execute("SELECT recipient, state FROM mail_history").fetchall()
            )
        connection.close()
        return states

    def until_state(self, recipient: str, state: str, timeout: float = 30.0) -> None:
        """Wait until that recipient's delivery is in that state."""
        until(
            lambda: self.states().get(recipient) == state,
            timeout,
            what=lambda: f"{self.states()}\n{self.log_text()}",
        )


type StartUp = Callable[..., Up]
