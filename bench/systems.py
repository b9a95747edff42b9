"""A system: everything between an SMTP port and a sink."""

import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from bench.services import end, free_port, spawn

ROOT = Path(__file__).parent.parent
# Deliveries to one server at once: the default of RELAY_SERVER_CONNECTIONS, for Postfix too.
CONCURRENCY = 50


class System(Protocol):
    """A running relay; `name` is its column in the tables."""

    name: str
    smtp_port: int
    directory: Path

    def start(self) -> None: ...
    def stop(self) -> None: ...

    def arrange(self, workers: int = 1, *, slow: bool = False) -> bool:
        """Deliver with so many workers to the fast or the slow sink; False: not supported."""

    def processes(self) -> Mapping[str, list[int]]:
        """The process ids of each role."""

    def delivered(self) -> int:
        """How many messages the sink has accepted since its start."""

    def empty(self) -> bool:
        """Whether the queue is empty and all outcomes are committed."""

    def hold(self) -> None:
        """Accept messages without delivering them."""

    def release(self) -> None: ...

    def flush(self) -> None:
        """Write out what a later write-back would otherwise add to a measurement."""

    def facts(self) -> dict[str, str]:
        """Versions and durability settings."""


def find_program(name: str) -> str | None:
    """The path of a mail server's tool, which may be outside PATH."""
    return shutil.which(name) or shutil.which(
        name, path="/usr/sbin:/sbin:/usr/local/sbin:/usr/libexec/postfix"
    )


def clean_environment() -> dict[str, str]:
    """The environment without settings of a relay."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}


class SinkProcess:
    """A sink in a process of its own. It writes a running counter to a file, so that reading the
    counter does not disturb it.

    Postfix' tools are used where they are installed, because they cost least; with a `delay`
    (seconds) always our own sink.
    """

    def __init__(self, kind: str, directory: Path, delay: float = 0.0) -> None:
        self.port = free_port()
        address = f"127.0.0.1:{self.port}"
        self._file = directory / f"{kind}-{self.port}.count"
        tool = None if delay else find_program(kind)
        if tool:
            # As root, smtp-sink must be told which user to become.
            user = ["-u", "nobody"] if kind == "smtp-sink" and os.geteuid() == 0 else []
            command = [tool, "-c", *user, address, "1000"]
        else:
            command = [sys.executable, "-m", "bench.sink", address, str(delay)]
        with self._file.open("wb") as counter:
            self._child = spawn(command, stdout=counter, cwd=ROOT)
        self.pid = self._child.pid

    def count(self) -> int:
        """Accepted messages so far: the last number in the file."""
        with self._file.open("rb") as counter:
            size = counter.seek(0, os.SEEK_END)
            counter.seek(max(0, size - 100))
            numbers = re.findall(rb"(\d+)[\r\n]", counter.read())
        return int(numbers[-1]) if numbers else 0

    def stop(self) -> None:
        end(self._child)
